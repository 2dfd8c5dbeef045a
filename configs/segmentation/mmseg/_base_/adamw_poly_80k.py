"""AdamW for 80,000 iterations, polynomial of power 0.9 down to 1e-6, no warm-up."""

_base_ = "mmseg::_base_/schedules/schedule_80k.py"

optim_wrapper = dict(
    _delete_=True, type="OptimWrapper", optimizer=dict(type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4)
)
param_scheduler = [dict(type="PolyLR", eta_min=1e-6, power=0.9, begin=0, end=80000, by_epoch=False)]
auto_scale_lr = dict(enable=False, base_batch_size=16)
