"""UPerNet on DiNAT_s-Base, ADE20K, 160,000 iterations.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: mIoU 49.4 (single scale), 50.2 (multi-scale); 121 M parameters, 1173 G multiply-adds at 512x2048.
Parameters: 121,279,716.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/upernet_160k.py"

model = dict(
    backbone=dict(model_name="dinat_s_base", feature_norms=(0, 1, 2, 3), dilations="seg_s", drop_path_rate=0.3),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
