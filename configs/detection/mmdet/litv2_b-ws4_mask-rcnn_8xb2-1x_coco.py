"""Mask R-CNN on LITv2-B with windows of 4, COCO, 12 epochs.

Paper: "Fast Vision Transformers with HiLo Attention", NeurIPS 2022, arXiv 2205.13213.
Published: box AP 46.8, mask AP 42.3; 106 M parameters, 449 G multiply-adds at 1280x800.
Parameters: 105,894,024.
Not repeated from the official config (last commit): its optimiser keys are those of mmdet 2, so that it trains with
    SGD at 0.02; the base file that it names does not exist.
"""

_base_ = "./_base_/mask-rcnn_1x.py"

model = dict(
    backbone=dict(model_name="litv2_b", window_size=4, feature_norms=(1, 2, 3), drop_path_rate=0.3, with_cp=True),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    optimizer=dict(lr=2e-4, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}),
)
