"""Cascade Mask R-CNN on DiNAT_s-Large, COCO, 36 epochs.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: box AP 54.8, mask AP 47.2; 253 M parameters, 1357 G multiply-adds at 1280x800.
Parameters: 253,475,910.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
ImageNet-22K weights, as there.
"""

_base_ = "./_base_/cascade-mask-rcnn_4conv1fc_3x.py"

model = dict(
    backbone=dict(model_name="dinat_s_large_21k", feature_norms=(0, 1, 2, 3), dilations="det_s", drop_path_rate=0.6),
    neck=dict(in_channels=[192, 384, 768, 1536]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(lr=5e-5, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
