"""Cascade Mask R-CNN of mmdet on a backbone of the zoo, COCO with several scales, 36 epochs."""

_base_ = [
    "mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py",
    "./coco_instance_ms_crop.py",
    "mmdet::_base_/default_runtime.py",
    "./adamw_3x.py",
]

custom_imports = dict(imports=["vizoo.heads.mm"], allow_failed_imports=False)

model = dict(backbone=dict(_delete_=True, type="VizooBackbone", pretrained=True))
