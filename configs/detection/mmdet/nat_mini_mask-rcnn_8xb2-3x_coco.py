"""Mask R-CNN on NAT-Mini, COCO, 36 epochs.

Paper: "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143.
Published: box AP 46.5, mask AP 41.7; 40 M parameters, 225 G multiply-adds at 1280x800.
Parameters: 39,623,094.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/mask-rcnn_3x.py"

model = dict(
    backbone=dict(model_name="nat_mini", feature_norms=(0, 1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
