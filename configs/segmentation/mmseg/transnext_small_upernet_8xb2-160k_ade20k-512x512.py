"""UPerNet on TransNeXt-Small, ADE20K, 160,000 iterations.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024, arXiv 2311.17132.
Published: mIoU 52.2 (single scale), 52.5 (multi-scale); 80 M parameters.
Parameters: 80,000,576.
Position biases: made for 512x512 and interpolated, as in the official config.  With
    bias_size=None they are made for each crop: the same at 512x512, and the published multi-scale mIoU is 52.8.
No AMP, as there.
"""

_base_ = "./_base_/upernet_160k.py"

model = dict(
    backbone=dict(model_name="transnext_small", bias_size=512, drop_path_rate=0.6),
    decode_head=dict(in_channels=[72, 144, 288, 576]),
    auxiliary_head=dict(in_channels=288),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.05),
    paramwise_cfg=dict(
        custom_keys={
            "query_embedding": dict(decay_mult=0.0),
            "relative_pos_bias_local": dict(decay_mult=0.0),
            "cpb": dict(decay_mult=0.0),
            "temperature": dict(decay_mult=0.0),
            "norm": dict(decay_mult=0.0),
        }
    ),
)
