"""RetinaNet on LITv2-M, COCO, 12 epochs.

Paper: "Fast Vision Transformers with HiLo Attention", NeurIPS 2022, arXiv 2205.13213.
Published: box AP 46.0; 59 M parameters, 348 G multiply-adds at 1280x800.
Parameters: 59,000,620.
Not repeated from the official config (last commit): its optimiser keys are those of mmdet 2, so that it trains with
    SGD at 0.02; the base file that it names does not exist.
Kept: norms are decayed; the official config exempts them, but without the custom_keys level that would do it.
"""

_base_ = "./_base_/retinanet_1x.py"

model = dict(
    backbone=dict(model_name="litv2_m", feature_norms=(1, 2, 3), drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper", optimizer=dict(lr=1e-4, weight_decay=1e-4))
