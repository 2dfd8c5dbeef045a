"""AdamW for 36 epochs: warm-up of 500 iterations from 0.001, x0.1 after epochs 27 and 33."""

_base_ = "./adamw_1x.py"

train_cfg = dict(max_epochs=36)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
