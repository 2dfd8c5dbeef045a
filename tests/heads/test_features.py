"""Features by stride: which levels, layouts, freezing, norms and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tolerance import close
from torch import nn
from zoo import PYRAMIDS, build, each_pyramid, is_fixed

from vizoo.heads.features import FeatureLevels, FeaturePyramid, feature_levels


def test_most_families_are_pyramids() -> None:
    assert len(PYRAMIDS) >= 8


@pytest.mark.parametrize(
    ("name", "indices", "channels"),
    [
        ("resnet18", [1, 2, 3, 4], [64, 128, 256, 512]),  # starts at stride 2
        ("convnext_atto", [0, 1, 2, 3], [40, 80, 160, 320]),
        ("mobilenetv3_small_050", [1, 2, 3, 4], [8, 16, 24, 288]),
        ("litv2_s", [0, 1, 2, 3], [96, 192, 384, 768]),
        ("overlock_t", [0, 1, 2, 3], [64, 128, 384, 640]),
    ],
)
def test_levels_by_stride(name: str, indices: list[int], channels: list[int]) -> None:
    assert feature_levels(name) == (tuple(indices), tuple(channels), (4, 8, 16, 32))
    assert feature_levels(name, (8, 32)) == (tuple(indices[1::2]), tuple(channels[1::2]), (8, 32))
    assert feature_levels(name, out_indices=indices[:2]) == (tuple(indices[:2]), tuple(channels[:2]), (4, 8))


@each_pyramid
def test_maps(name: str) -> None:
    """Channels first, every side the image's over the stride, rounded up or as the official network does."""
    net = FeatureLevels(name).eval()
    height, width = (96, 96) if is_fixed(build(name, device="meta")) else (97, 133)
    maps = net(torch.randn(2, 3, height, width))
    assert isinstance(maps, tuple)
    for m, channels, stride in zip(maps, net.channels, net.strides, strict=True):
        assert m.shape[:2] == (2, channels)
        for got, full in zip(m.shape[2:], (height, width), strict=True):
            assert full // stride <= got <= -(-full // stride)


def test_channels_last_models_are_permuted() -> None:
    net = FeatureLevels("swin_tiny_patch4_window7_224", device="cpu").eval()
    assert [m.shape[1] for m in net(torch.randn(1, 3, 224, 224))] == net.channels == [96, 192, 384, 768]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"no feature of stride 4; it has 16"):
        feature_levels("vit_tiny_patch16_224")
    with pytest.raises(ValueError, match=r"strides=\(8, 4\), need increasing"):
        feature_levels("resnet18", (8, 4))
    with pytest.raises(ValueError, match=r"model_name='litv2_z', which timm does not know; near: litv2_"):
        FeatureLevels("litv2_z")
    with pytest.raises(ValueError, match="out_norm='batch', need 'layer' or None"):
        FeatureLevels("test_litv2", out_norm="batch")
    with pytest.raises(ValueError, match=r"frozen_stages=9, need -1 to 4"):
        FeatureLevels("test_litv2", frozen_stages=9)
    with pytest.raises(ValueError, match=r"pretrained='nowhere\.pth', need True, False, an existing file or a URL"):
        FeatureLevels("test_litv2", pretrained="nowhere.pth")


def test_weights_from_a_file(tmp_path: Path) -> None:
    """Of a classifier: its head is dropped, everything else is loaded."""
    model = build("test_litv2")
    torch.save({"model": model.state_dict()}, tmp_path / "m.pth")
    net, x = FeatureLevels("test_litv2", pretrained=tmp_path / "m.pth").eval(), torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model.forward_intermediates(x, intermediates_only=True)
        for a, b in zip(net(x), expected, strict=True):
            close(a, b, "graph")


@pytest.mark.parametrize("name", ["test_litv2", "test_overlock", "resnet18"])
def test_frozen_stages(name: str) -> None:
    """The stem and two stages get no gradient and keep their statistics, also after ``train()``; the rest trains."""
    net = FeatureLevels(name, frozen_stages=2, norm_eval=False).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    sum(m.square().mean() for m in net(torch.randn(2, 3, 64, 64))).backward()
    depth = net.layers(coarse=True)
    for key, parameter in net.body.named_parameters():
        assert (parameter.grad is None) is (depth[key] <= 2), key
    after = net.state_dict()
    moved = {k for k, v in before.items() if not torch.equal(v, after[k])}
    first = {k for k in moved if any(k.startswith(f"body.{p.rpartition('.')[0]}.") for p, d in depth.items() if d <= 2)}
    assert not first
    assert all(not p.requires_grad for n, p in net.body.named_parameters() if depth[n] <= 2)


def test_norm_eval() -> None:
    net = FeatureLevels("resnet18", norm_eval=True).train()
    assert not any(m.training for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert net.training


def test_checkpointing_changes_nothing() -> None:
    torch.manual_seed(0)
    plain = FeatureLevels("test_litv2", drop_path_rate=0.0)
    again = FeatureLevels("test_litv2", drop_path_rate=0.0, grad_checkpointing=True)
    again.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 64, 64)
    for net in (plain, again):
        sum(m.square().mean() for m in net.train()(x)).backward()
    for (key, p), q in zip(plain.named_parameters(), again.parameters(), strict=True):
        close(q.grad, p.grad, "gradient", key)


def test_pyramid() -> None:
    body = FeatureLevels("test_litv2", (8, 16, 32))
    pyramid = FeaturePyramid(body, 32)
    out = pyramid(torch.randn(1, 3, 96, 160))
    assert list(out) == ["0", "1", "2"]
    assert [tuple(m.shape[1:]) for m in out.values()] == [(32, 12, 20), (32, 6, 10), (32, 3, 5)]
    assert pyramid.out_channels == 32


def test_dense_norms_pass_through() -> None:
    """The official dense variants are asked for by their own arguments."""
    net = FeatureLevels("test_litv2", feature_norms=(0, 1, 2, 3))
    assert len(net.state_dict()) > len(FeatureLevels("test_litv2").state_dict())
