"""RetinaNet on Halo-50ts, COCO, 12 epochs.

Paper: "Scaling Local Self-Attention for Parameter Efficient Visual Backbones", CVPR 2021, arXiv 2103.12731.
Published: nothing for this model; the recipe is ours.
Parameters: 35,144,940.
Batch norms keep their ImageNet statistics: two images on each GPU are too few for them.
"""

_base_ = "./_base_/retinanet_1x.py"

model = dict(
    backbone=dict(model_name="halo_50ts", norm_eval=True, drop_path_rate=0.1),
    neck=dict(in_channels=[256, 512, 1024, 2048]),
)
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05), paramwise_cfg=dict(flat_decay_mult=0.0))
