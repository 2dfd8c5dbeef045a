"""UPerNet of mmseg on a backbone of the zoo, ADE20K at 512x512, 160,000 iterations."""

_base_ = [
    "mmseg::_base_/models/upernet_r50.py",
    "mmseg::_base_/datasets/ade20k.py",
    "mmseg::_base_/default_runtime.py",
    "./adamw_poly_160k.py",
]

custom_imports = dict(imports=["vizoo.heads.mm"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(512, 512)),
    pretrained=None,
    backbone=dict(_delete_=True, type="VizooBackbone", pretrained=True),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=2)
