"""UPerNet on DiNAT-Large, ADE20K, 160,000 iterations.

Paper: "Dilated Neighborhood Attention Transformer", arXiv 2209.15001.
Published: mIoU 54.0 (single scale), 54.9 (multi-scale); 238 M parameters, 2335 G multiply-adds at 640x2560.
Parameters: 238,170,974.
Not repeated from the official config: named 640x640, it inherits the data at 512x512.
ImageNet-22K weights, as there. No AMP, as there.
"""

_base_ = "./_base_/upernet_160k_640x640.py"

model = dict(
    backbone=dict(model_name="dinat_large_21k", feature_norms=(0, 1, 2, 3), dilations="seg640", drop_path_rate=0.3),
    decode_head=dict(in_channels=[192, 384, 768, 1536]),
    auxiliary_head=dict(in_channels=768),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={"rpb": dict(decay_mult=0.0), "norm": dict(decay_mult=0.0)}))
