"""UPerNet on DiNAT_s-Small, ADE20K, 160,000 iterations.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: mIoU 48.6 (single scale), 49.9 (multi-scale); 81 M parameters, 1030 G multiply-adds at 512x2048.
Parameters: 81,259,766.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/upernet_160k.py"

model = dict(
    backbone=dict(model_name="dinat_s_small", feature_norms=(0, 1, 2, 3), dilations="seg_s", drop_path_rate=0.3),
    decode_head=dict(in_channels=[96, 192, 384, 768]),
    auxiliary_head=dict(in_channels=384),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
