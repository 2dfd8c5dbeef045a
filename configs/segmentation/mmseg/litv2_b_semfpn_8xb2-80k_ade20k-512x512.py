"""Semantic FPN on LITv2-B, ADE20K, 80,000 iterations.

Paper: "Fast Vision Transformers with HiLo Attention", NeurIPS 2022, arXiv 2205.13213.
Published: mIoU 47.2; 90 M parameters, 93 G multiply-adds at 512x512.
Parameters: 89,993,518.
Not repeated from the official config: it names no ImageNet weights, they came from the command line.
Kept: norms are decayed; no gradient checkpointing.
"""

_base_ = "./_base_/semfpn_80k.py"

model = dict(
    backbone=dict(model_name="litv2_b", feature_norms=(0, 1, 2, 3), drop_path_rate=0.3),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
