"""Configs of mmdet and mmseg that train on the tiny pictures in seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from vizoo.tools.mm import build_parser
from vizoo.tools.training import mm as launcher

DETECTION = """
_base_ = ["mmdet::_base_/models/{model}.py", "mmdet::_base_/default_runtime.py"]
custom_imports = dict(imports=["vizoo.heads.mm"], allow_failed_imports=False)
meta = dict(classes=("rectangle", "disc", "triangle"), palette=[(220, 60, 40), (40, 200, 60), (50, 80, 230)])
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask={masks}),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(160, 128), keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True, with_mask={masks}),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=4, num_workers=0, persistent_workers=False, sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(type="CocoDataset", metainfo=meta, data_root="{root}",
                 ann_file="annotations/instances_training.json",
                 data_prefix=dict(img="images/training"), filter_cfg=dict(filter_empty_gt=True),
                 pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1, num_workers=0, persistent_workers=False, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CocoDataset", metainfo=meta, data_root="{root}",
                 ann_file="annotations/instances_validation.json",
                 data_prefix=dict(img="images/validation"), test_mode=True, pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file="{root}/annotations/instances_validation.json", metric={metrics})
test_evaluator = val_evaluator
train_cfg = dict(type="EpochBasedTrainLoop", max_epochs={epochs}, val_interval={epochs})
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [dict(type="CosineAnnealingLR", T_max={steps}, by_epoch=False, eta_min=1e-5)]
optim_wrapper = dict(
    type="OptimWrapper", optimizer=dict(type="AdamW", lr={lr}, weight_decay=1e-4), clip_grad=dict(max_norm=5)
)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=1, max_keep_ckpts=3))
randomness = dict(seed=0)
"""

RETINANET = (
    DETECTION
    + """
model = dict(
    backbone=dict(_delete_=True, type="VizooBackbone", model_name="{backbone}", {options}),
    neck=dict(in_channels={channels}, out_channels=32),
    bbox_head=dict(num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1),
)
"""
)

MASK_RCNN = (
    DETECTION
    + """
model = dict(
    backbone=dict(_delete_=True, type="VizooBackbone", model_name="{backbone}", {options}),
    neck=dict(in_channels={channels}, out_channels=64),
    rpn_head=dict(in_channels=64, feat_channels=64),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=64),
        mask_roi_extractor=dict(out_channels=64),
        bbox_head=dict(in_channels=64, fc_out_channels=128, num_classes=3),
        mask_head=dict(num_convs=2, in_channels=64, conv_out_channels=64, num_classes=3),
    ),
    train_cfg=dict(rpn=dict(sampler=dict(num=64)), rpn_proposal=dict(nms_pre=200, max_per_img=100),
                   rcnn=dict(sampler=dict(num=64))),
    test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=100)),
)
"""
)

SEGMENTATION = """
_base_ = ["mmseg::_base_/models/{model}.py", "mmseg::_base_/default_runtime.py"]
custom_imports = dict(imports=["vizoo.heads.mm"], allow_failed_imports=False)
meta = dict(classes=("ground", "rectangle", "disc", "triangle"),
            palette=[(120, 120, 120), (220, 60, 40), (40, 200, 60), (50, 80, 230)])
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="RandomCrop", crop_size=(96, 128)),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", reduce_zero_label=True),
    dict(type="PackSegInputs"),
]
shapes = dict(type="BaseSegDataset", metainfo=meta, data_root="{root}", img_suffix=".png", seg_map_suffix=".png",
              reduce_zero_label=True)
train_dataloader = dict(
    batch_size=4, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(data_prefix=dict(img_path="images/training", seg_map_path="annotations/training"),
                 pipeline=train_pipeline, **shapes),
)
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(data_prefix=dict(img_path="images/validation", seg_map_path="annotations/validation"),
                 pipeline=test_pipeline, **shapes),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator
train_cfg = dict(type="IterBasedTrainLoop", max_iters={steps}, val_interval={steps})
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
param_scheduler = [dict(type="PolyLR", eta_min=1e-6, power=0.9, begin=0, end={steps}, by_epoch=False)]
optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr={lr}, weight_decay=1e-4))
default_hooks = dict(
    timer=dict(type="IterTimerHook"), logger=dict(type="LoggerHook", interval=1),
    param_scheduler=dict(type="ParamSchedulerHook"), sampler_seed=dict(type="DistSamplerSeedHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval={interval}),
)
randomness = dict(seed=0)
"""

UPERNET = (
    SEGMENTATION
    + """
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(96, 128)),
    backbone=dict(_delete_=True, type="VizooBackbone", model_name="{backbone}", {options}),
    decode_head=dict(in_channels={channels}, channels=64, num_classes=4),
    auxiliary_head=dict(in_channels={channels}[2], channels=32, num_classes=4),
)
"""
)

SEMANTIC_FPN = (
    SEGMENTATION
    + """
model = dict(
    pretrained=None,
    data_preprocessor=dict(size=(96, 128)),
    backbone=dict(_delete_=True, type="VizooBackbone", model_name="{backbone}", {options}),
    neck=dict(in_channels={channels}, out_channels=64),
    decode_head=dict(in_channels=[64] * 4, channels=64, num_classes=4),
)
"""
)
DEFAULTS = {
    "retinanet": (RETINANET, {"model": "retinanet_r50_fpn", "masks": False, "metrics": '"bbox"', "lr": 1e-3}),
    "mask_rcnn": (MASK_RCNN, {"model": "mask-rcnn_r50_fpn", "masks": True, "metrics": '["bbox", "segm"]', "lr": 2e-3}),
    "upernet": (UPERNET, {"model": "upernet_r50", "lr": 3e-4}),
    "semantic_fpn": (SEMANTIC_FPN, {"model": "fpn_r50", "lr": 3e-4}),
}


@pytest.fixture(scope="session")
def write_config(shapes):
    """Function that writes a config of one of the four models to a file."""

    def write(path: Path, kind: str, backbone: str, extra: str = "", **values) -> Path:
        from vizoo.heads.mm import channels

        text, defaults = DEFAULTS[kind]
        epochs = values.get("epochs", 1)
        steps = {"epochs": epochs, "steps": 4 * epochs, "interval": 1000, "options": ""}
        numbers = {"root": shapes, "backbone": backbone, "channels": channels(backbone), **defaults, **steps, **values}
        for key, value in numbers.items():
            text = text.replace(f"{{{key}}}", str(value))
        path.write_text(text + extra)
        return path

    return write


@pytest.fixture(scope="session")
def train():
    """Function that trains a config in this process by the launcher, and returns the runner."""

    def train(config: Path, work_dir: Path, *words: str, action: str = "train"):
        argv = [action, str(config), "--work-dir", str(work_dir), *words]
        args = build_parser().parse_args(argv)
        return launcher.run(launcher.load_config(args), args)

    return train
