"""UPerNet on OverLoCK-B, ADE20K, 160,000 iterations.

Paper: "OverLoCK: An Overview-first-Look-Closely-next ConvNet with Context-Mixing Dynamic Kernels", CVPR 2025, arXiv
    2502.20087.
Published: mIoU 51.7 (single scale).
Parameters: 128,156,068.
Not repeated from the official config: the no-decay names absolute_pos_embed and relative_position_bias_table match no
    parameter. No AMP, as there (the authors met NaN).
Not repeated: the data set repeated 50 times, which only saved restarts of the loader.
"""

_base_ = "./_base_/upernet_160k.py"

model = dict(
    backbone=dict(model_name="overlock_b", dense="seg", drop_path_rate=0.5),
    decode_head=dict(in_channels=[80, 160, 528, 720]),
    auxiliary_head=dict(in_channels=528),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"norm": dict(decay_mult=0.0)}))
sync_bn = "torch"

test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 512), keep_ratio=True),
    dict(type="ResizeToMultiple", size_divisor=32, interpolation="bicubic"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
