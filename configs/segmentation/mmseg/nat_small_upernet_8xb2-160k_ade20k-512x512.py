"""UPerNet on NAT-Small, ADE20K, 160,000 iterations.

Paper: "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143.
Published: mIoU 48.0 (single scale), 49.5 (multi-scale); 82 M parameters, 1010 G multiply-adds at 512x2048.
Parameters: 82,396,805.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/upernet_160k.py"

model = dict(
    backbone=dict(model_name="nat_small", feature_norms=(0, 1, 2, 3), drop_path_rate=0.5),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
