"""UPerNet of mmseg on a backbone of the zoo, ADE20K at 640x640, 160,000 iterations."""

_base_ = [
    "mmseg::_base_/models/upernet_r50.py",
    "mmseg::_base_/datasets/ade20k_640x640.py",
    "mmseg::_base_/default_runtime.py",
    "./adamw_poly_160k.py",
]

custom_imports = dict(imports=["vizoo.heads.mm"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(size=(640, 640)),
    pretrained=None,
    backbone=dict(_delete_=True, type="VizooBackbone", pretrained=True),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
)
train_dataloader = dict(batch_size=2)
