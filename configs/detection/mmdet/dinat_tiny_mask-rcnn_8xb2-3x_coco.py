"""Mask R-CNN on DiNAT-Tiny, COCO, 36 epochs.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: box AP 48.6, mask AP 43.5; 48 M parameters, 258 G multiply-adds at 1280x800.
Parameters: 47,540,502.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/mask-rcnn_3x.py"

model = dict(
    backbone=dict(model_name="dinat_tiny", feature_norms=(0, 1, 2, 3), dilations="det", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
