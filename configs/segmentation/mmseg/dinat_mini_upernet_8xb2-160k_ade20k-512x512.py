"""UPerNet on DiNAT-Mini, ADE20K, 160,000 iterations.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: mIoU 45.8 (single scale), 47.2 (multi-scale); 50 M parameters, 900 G multiply-adds at 512x2048.
Parameters: 49,779,698.
Not repeated from the official code: freezing of stages that reads a missing attribute; no stage is frozen.
"""

_base_ = "./_base_/upernet_160k.py"

model = dict(
    backbone=dict(model_name="dinat_mini", feature_norms=(0, 1, 2, 3), dilations="seg", drop_path_rate=0.2),
    decode_head=dict(in_channels=[64, 128, 256, 512]),
    auxiliary_head=dict(in_channels=256),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
    paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}),
)
