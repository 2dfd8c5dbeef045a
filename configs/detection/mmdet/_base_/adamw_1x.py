"""AdamW for 12 epochs: warm-up of 500 iterations from 0.001, x0.1 after epochs 8 and 11."""

_base_ = "mmdet::_base_/schedules/schedule_1x.py"

optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05)
)
