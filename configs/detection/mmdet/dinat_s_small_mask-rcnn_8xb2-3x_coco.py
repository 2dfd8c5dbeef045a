"""Mask R-CNN on DiNAT_s-Small, COCO, 36 epochs.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: box AP 48.6, mask AP 43.5; 69 M parameters, 350 G multiply-adds at 1280x800.
Parameters: 69,112,506.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/mask-rcnn_3x.py"

model = dict(
    backbone=dict(model_name="dinat_s_small", feature_norms=(0, 1, 2, 3), dilations="det_s", drop_path_rate=0.35),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
