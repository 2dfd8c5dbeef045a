"""Mask R-CNN of mmdet on a backbone of the zoo, COCO, 12 epochs."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "mmdet::_base_/default_runtime.py",
    "./adamw_1x.py",
]

custom_imports = dict(imports=["vizoo.heads.mm"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="VizooBackbone", pretrained=True))
