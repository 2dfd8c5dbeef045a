"""torchvision's detectors on the zoo: anchors, normalisation, losses, predictions; the trainer tests learning."""

from __future__ import annotations

import pytest
import torch
from tolerance import close
from torch import Tensor
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from zoo import each_pyramid

from vizoo.heads.detection import ARCHS, detector

SMALL = {"min_size": 64, "max_size": 96, "fpn_channels": 32}
CLASSES = {"retinanet": RetinaNet, "fcos": FCOS, "faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN}
SIZES = {
    "retinanet": [(32, 40, 50), (64, 80, 101), (128, 161, 203), (256, 322, 406), (512, 645, 812)],
    "fcos": [(8,), (16,), (32,), (64,), (128,)],
    "faster_rcnn": [(32,), (64,), (128,), (256,), (512,)],
    "mask_rcnn": [(32,), (64,), (128,), (256,), (512,)],
}


def batch() -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Two images of different size, one without an object."""
    images = [torch.rand(3, 60, 90), torch.rand(3, 70, 50)]
    masks = torch.zeros(1, 60, 90, dtype=torch.uint8)
    masks[:, 10:40, 20:60] = 1
    boxes = torch.tensor([[20.0, 10, 60, 40]])
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    first = {"boxes": boxes, "labels": torch.tensor([2]), "masks": masks}
    return images, [first, {**empty, "masks": torch.zeros(0, 70, 50, dtype=torch.uint8)}]


@pytest.mark.parametrize("arch", ARCHS)
def test_trains_and_predicts(arch: str) -> None:
    model = detector(arch, "test_litv2", 4, **SMALL)
    assert type(model) is CLASSES[arch]
    generator = model.rpn.anchor_generator if hasattr(model, "rpn") else model.anchor_generator
    assert list(generator.sizes) == SIZES[arch]
    images, targets = batch()
    losses = model(images, targets)
    sum(losses.values()).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing
    found = model.eval()(images)
    assert len(found) == 2
    for one, image in zip(found, images, strict=True):
        assert {"boxes", "labels", "scores"} <= one.keys()
        assert (one["boxes"][:, 2::2] <= image.shape[2]).all()
        assert arch != "mask_rcnn" or one["masks"].shape[1:] == (1, *image.shape[1:])


@each_pyramid
def test_every_family(name: str) -> None:
    model = detector("faster_rcnn", name, 3, box_batch_size_per_image=8, **SMALL)
    images, targets = batch()
    loss = sum(model(images, targets).values())
    loss.backward()
    assert loss.isfinite()


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:.*in scripting:UserWarning")
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", ["test_litv2", "test_nat", "test_overlock", "test_halonet", "resnet18"])
def test_scripts(arch: str, name: str) -> None:
    """Images of the size that is wanted: torchvision's own scaling is another one in scripts, by a rounding."""
    if arch in ("retinanet", "fcos"):
        few = {"score_thresh": 0.0, "detections_per_img": 10}
    else:
        few = {"box_score_thresh": 0.0, "box_detections_per_img": 10, "rpn_post_nms_top_n_test": 20}
    model = detector(arch, name, 3, **SMALL, **few).double().eval()  # no ties of boxes
    images = [torch.rand(3, 64, 96, dtype=torch.float64), torch.rand(3, 64, 80, dtype=torch.float64)]
    with torch.no_grad():
        expected = model(images)
        _, found = torch.jit.script(model)(images)  # losses and predictions, unlike eager
    assert len(found) == 2
    for one, wanted in zip(found, expected, strict=True):
        assert one.keys() == wanted.keys()
        assert len(wanted["boxes"]) == 10
        for key, value in wanted.items():
            close(one[key], value, "graph", key)


def test_normalisation_is_the_backbones() -> None:
    for name, mean in (("test_litv2", [0.485, 0.456, 0.406]), ("test_vit", [0.5, 0.5, 0.5])):
        strides = (16,) if name == "test_vit" else None
        kwargs = {"dynamic_img_size": True} if name == "test_vit" else {}
        model = detector("faster_rcnn", name, 3, strides=strides, backbone_kwargs=kwargs)
        assert model.transform.image_mean == pytest.approx(mean)


def test_frozen_stages() -> None:
    model = detector("retinanet", "test_litv2", 3, frozen_stages=1, **SMALL)
    assert {p.requires_grad for n, p in model.backbone.backbone.named_parameters() if "stages.0" in n} == {False}
    assert {p.requires_grad for n, p in model.backbone.fpn.named_parameters()} == {True}


def test_errors() -> None:
    with pytest.raises(ValueError, match="arch='yolo', need 'retinanet', 'fcos', 'faster_rcnn' or 'mask_rcnn'"):
        detector("yolo", "test_litv2", 3)
    with pytest.raises(ValueError, match="num_classes=1, need at least 2: the background counts"):
        detector("fcos", "test_litv2", 1)
    with pytest.raises(ValueError, match="no feature of stride 8; it has 16"):
        detector("fcos", "vit_tiny_patch16_224", 3)
