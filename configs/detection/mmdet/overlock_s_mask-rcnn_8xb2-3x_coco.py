"""Mask R-CNN on OverLoCK-S, COCO, 36 epochs.

Paper: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", CVPR 2025, arXiv
    2502.20087.
Published: box AP 51.0, mask AP 45.0.
Parameters: 76,679,468.
Not repeated from the official config: the no-decay names absolute_pos_embed and relative_position_bias_table match no
    parameter. No AMP, as there (the authors met NaN).
"""

_base_ = "./_base_/mask-rcnn_3x.py"

model = dict(
    backbone=dict(model_name="overlock_s", dense="det", drop_path_rate=0.4),
    neck=dict(in_channels=[64, 128, 448, 640]),
)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)})
)
sync_bn = "torch"
