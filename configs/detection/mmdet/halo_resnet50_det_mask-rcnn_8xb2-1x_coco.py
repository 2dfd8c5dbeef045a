"""Mask R-CNN on Halo-ResNet-50, COCO, 12 epochs.

Paper: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021, arXiv 2103.12731.
Published: nothing for this model; the recipe is ours.
Parameters: 39,750,920.
The paper's detection backbone: attention in the last stage; model.backbone.block_size=32 for its global form at
    1024x1024.
No weights exist: train it first (`vizoo train`) and name the file, --cfg-options model.backbone.pretrained=FILE; from
    scratch it needs a longer schedule and norms with statistics of their own (norm_eval=False).
"""

_base_ = "./_base_/mask-rcnn_1x.py"

model = dict(
    backbone=dict(model_name="halo_resnet50_det", pretrained=False, norm_eval=True),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(flat_decay_mult=0.0))
