"""Mask R-CNN on DependencyViT-S, COCO, 12 epochs.

Paper: "Visual Dependency Transformers: Dependency Tree Emerges from Reversed Attention", CVPR 2023, arXiv 2304.03282.
Published: nothing for this model; the recipe is ours.
Parameters: 44,674,044.
Levels: the maps of blocks 3, 6, 9 and 12, all at stride 16, brought to strides 4, 8, 16 and 32 by mmseg's
    Feature2Pyramid.
No weights exist: train it first (`vizoo train`) and name the file, --cfg-options model.backbone.pretrained=FILE.
"""

_base_ = "./_base_/mask-rcnn_1x.py"

model = dict(
    data_preprocessor=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    backbone=dict(model_name="dependencyvit_small", out_indices=(2, 5, 8, 11), pretrained=False, drop_path_rate=0.1),
    neck=[
        dict(type="mmseg.Feature2Pyramid", embed_dim=384, rescales=[4, 2, 1, 0.5]),
        dict(type="FPN", in_channels=[384, 384, 384, 384], out_channels=256, num_outs=5),
    ],
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"pos_embed": dict(decay_mult=0.0)}, flat_decay_mult=0.0),
)
