"""UPerNet on Halo-50ts, ADE20K, 160,000 iterations.

Paper: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021, arXiv 2103.12731.
Published: nothing for this model; the recipe is ours.
Parameters: 63,673,124.
Batch norms keep their ImageNet statistics: two images on each GPU are too few for them.
"""

_base_ = "./_base_/upernet_160k.py"

model = dict(
    backbone=dict(model_name="halo_50ts", norm_eval=True, drop_path_rate=0.1),
    decode_head=dict(in_channels=[256, 512, 1024, 2048]),
    auxiliary_head=dict(in_channels=1024),
)
optim_wrapper = dict(paramwise_cfg=dict(flat_decay_mult=0.0))
