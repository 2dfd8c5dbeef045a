"""Other users of timm's features take the zoo's backbones by name: segmentation_models_pytorch, transformers."""

from __future__ import annotations

import pytest
import torch
from tolerance import close
from zoo import build, each_pyramid, is_fixed


def squares(name: str) -> int:
    """Side of an image in pixels that every model takes."""
    return 96 if is_fixed(build(name, device="meta")) else 64


@each_pyramid
def test_smp(name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    side = squares(name)
    for arch in (smp.Unet, smp.UPerNet):
        model = arch(f"tu-{name}", encoder_weights=None, classes=3).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, side, side)).shape == (1, 3, side, side)


@each_pyramid
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_smp_scripts(name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    model = smp.Unet(f"tu-{name}", encoder_weights=None, classes=3).eval()
    x = torch.randn(1, 3, squares(name), squares(name))
    with torch.no_grad():
        close(torch.jit.script(model)(x), model(x), "graph")


def test_smp_dilation() -> None:
    """Decoders that want stride 16 or 8 get it from the families that have it, and hear who has not."""
    smp = pytest.importorskip("segmentation_models_pytorch", reason="segmentation-models-pytorch is not installed")
    for arch, stride in ((smp.PAN, 16), (smp.DeepLabV3, 8)):
        with pytest.raises(ValueError, match=f"output_stride={stride}, but test_litv2 is never dilated"):
            arch("tu-test_litv2", encoder_weights=None)
        model = arch("tu-test_ulsam", encoder_weights=None, classes=3).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 3, 128, 128)).shape == (1, 3, 128, 128)


@each_pyramid
def test_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    side = squares(name)
    backbone = transformers.TimmBackboneConfig(
        backbone=name, features_only=True, use_pretrained_backbone=False, out_indices=[0, 1, 2, 3]
    )
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, use_auxiliary_head=False, num_labels=3, auxiliary_in_channels=16
    )
    model = transformers.UperNetForSemanticSegmentation(config).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, side, side)).logits.shape == (1, 3, side, side)
