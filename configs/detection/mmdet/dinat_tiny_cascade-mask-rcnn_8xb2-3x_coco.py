"""Cascade Mask R-CNN on DiNAT-Tiny, COCO, 36 epochs.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: box AP 52.2, mask AP 45.1; 85 M parameters, 737 G multiply-adds at 1280x800.
Parameters: 85,375,704.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/cascade-mask-rcnn_4conv1fc_3x.py"

model = dict(
    backbone=dict(model_name="dinat_tiny", feature_norms=(0, 1, 2, 3), dilations="det", drop_path_rate=0.3),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
