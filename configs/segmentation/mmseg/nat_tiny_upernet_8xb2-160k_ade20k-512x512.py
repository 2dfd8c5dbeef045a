"""UPerNet on NAT-Tiny, ADE20K, 160,000 iterations.

Paper: "Neighborhood Attention Transformer", CVPR 2023, arXiv 2204.07143.
Published: mIoU 47.1 (single scale), 48.4 (multi-scale); 58 M parameters, 934 G multiply-adds at 512x2048.
Parameters: 57,697,106.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/upernet_160k.py"

model = dict(
    backbone=dict(model_name="nat_tiny", feature_norms=(0, 1, 2, 3), drop_path_rate=0.3),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
