"""Cascade Mask R-CNN on DiNAT_s-Base, COCO, 36 epochs.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: box AP 52.6, mask AP 45.3; 145 M parameters, 966 G multiply-adds at 1280x800.
Parameters: 144,977,002.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/cascade-mask-rcnn_4conv1fc_3x.py"

model = dict(
    backbone=dict(model_name="dinat_s_base", feature_norms=(0, 1, 2, 3), dilations="det_s", drop_path_rate=0.6),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(lr=7.5e-5, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
