"""Mask R-CNN on TransNeXt-Base, COCO, 12 epochs.

Paper: "TransNeXt: Robust Foveal Visual Perception for Vision Transformers", CVPR 2024, arXiv 2311.17132.
Published: box AP 51.7, mask AP 45.9; 109.2 M parameters.
Parameters: 109,226,400.
Position biases: made for 800x800 and interpolated, as in the official config.
Not repeated from the official config: the fixed loss scale of 512.
"""

_base_ = "./_base_/mask-rcnn_1x.py"

model = dict(
    backbone=dict(model_name="transnext_base", bias_size=800, drop_path_rate=0.7),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    type="AmpOptimWrapper",
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
