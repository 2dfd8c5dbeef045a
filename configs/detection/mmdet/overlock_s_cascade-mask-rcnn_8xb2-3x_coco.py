"""Cascade Mask R-CNN on OverLoCK-S, COCO, 36 epochs.

Paper: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", CVPR 2025, arXiv
    2502.20087.
Published: no config and no checkpoint; the recipe is ours.
Parameters: 109,607,738.
Ours: mmdet's Cascade Mask R-CNN with the settings of the official Mask R-CNN 3x. No AMP.
"""

_base_ = "./_base_/cascade-mask-rcnn_3x.py"

model = dict(
    backbone=dict(model_name="overlock_s", dense="det", drop_path_rate=0.4),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)})
)
sync_bn = "torch"
