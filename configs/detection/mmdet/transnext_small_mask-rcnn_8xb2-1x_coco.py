"""Mask R-CNN on TransNeXt-Small, COCO, 12 epochs.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024, arXiv 2311.17132.
Published: box AP 51.1, mask AP 45.5; 69.3 M parameters.
Parameters: 69,346,308.
Position biases: made for 800x800 and interpolated, as in the official config.
No AMP, as there.
"""

_base_ = "./_base_/mask-rcnn_1x.py"

model = dict(
    backbone=dict(model_name="transnext_small", bias_size=800, drop_path_rate=0.6),
    neck=dict(in_channels=[72, 144, 288, 576]),
)
optim_wrapper = dict(
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
