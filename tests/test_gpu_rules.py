"""What holds for every model on a GPU and needs none to be seen: graphs, fixed order, layout and dtype of maps."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import zoo
from fake_gpu import fake_gpu
from timm.layers import set_fast_norm
from torch import Tensor

# operators whose gradients raise under torch.use_deterministic_algorithms(True) on a GPU
UNORDERED = {
    "aten::_adaptive_avg_pool2d",
    "aten::adaptive_max_pool2d",
    "aten::_upsample_bilinear2d_aa",
    "aten::_upsample_bicubic2d_aa",
    "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d",
    "aten::grid_sampler_2d",
    "aten::reflection_pad2d",
    "aten::histc",
    "aten::bincount",
    "aten::put_",
}


def images(model: Any, batch: int = 2) -> Tensor:
    chans, *size = model.pretrained_cfg["input_size"]
    return torch.empty(batch, chans, *size, device="cuda")


@pytest.mark.parametrize("name", zoo.KINDS)
def test_a_graph_can_record_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference asks the GPU for no value, which the fake one could not give, and sends it none from the host."""
    model = timm.create_model(name).eval()
    with fake_gpu(model, monkeypatch) as watch, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(images(model))
    assert watch.calls
    for operator, took, gave in watch.calls:
        if any(t.is_cuda for t in gave):  # numbers of the host travel with the call
            assert not any(t.is_cpu and t.dim() for t in took), operator


@pytest.mark.parametrize("name", zoo.KINDS)
def test_a_fixed_order_can_be_asked_for(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(name).train()
    torch.use_deterministic_algorithms(True)
    try:  # the forward pass alone: autograd wants a true GPU
        with fake_gpu(model, monkeypatch) as watch, torch.autocast("cuda", torch.bfloat16):
            model(images(model))
    finally:
        torch.use_deterministic_algorithms(False)
    assert watch.calls
    found = {operator for operator, took, _ in watch.calls if any(t.requires_grad for t in took)}
    assert found
    assert UNORDERED.isdisjoint(found)


@pytest.mark.parametrize("name", ["test_overlock", "test_halonet"])
def test_maps_keep_layout_and_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images become channels-last once; no layer copies a map to another layout, nor autocast a stage to float32."""
    model = timm.create_model(name).eval()
    with fake_gpu(model, monkeypatch) as watch, torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        model(images(model, 8))
    cloned = [took[0] for operator, took, _ in watch.calls if operator == "aten::clone"]
    maps = [t for t in cloned if t.dim() == 4 and 1 < t.shape[2] == t.shape[3]]
    assert [tuple(t.shape[:2]) for t in maps] == [(8, 3)]
    sums = [gave[0] for operator, _, gave in watch.calls if operator in ("aten::add", "aten::cat")]
    assert {t.dtype for t in sums if t.dim() == 4 and t.shape[2] > 1} == {torch.bfloat16}


def moved(name: str, monkeypatch: pytest.MonkeyPatch, half: bool = False, fast_norm: bool = False) -> str:
    """Gigabytes that inference on 128 images reads and writes, with autocast or in half precision."""
    set_fast_norm(fast_norm)
    try:
        model = timm.create_model(name).eval()
    finally:
        set_fast_norm(False)
    model = model.bfloat16() if half else model
    with fake_gpu(model, monkeypatch) as watch, torch.no_grad():
        x = images(model, 128)
        with torch.autocast("cuda", torch.bfloat16, enabled=not half):
            model(x.bfloat16() if half else x)
    return f"{watch.moved / 1e9:.0f}"


def test_what_casts_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of docs/kernels.md on autocast, norms in half precision, and weights in half precision."""
    text = " ".join((Path(__file__).parents[1] / "docs" / "kernels.md").read_text(encoding="utf-8").split())
    told = re.search(
        r"`nat_tiny` reads and writes (\d+) GB .*? (\d+) GB .*? (\d+) GB .*?`overlock_t` (\d+), (\d+) and (\d+)", text
    )
    assert told is not None
    found = [
        moved(name, monkeypatch, **options)
        for name in ("nat_tiny", "overlock_t")
        for options in ({}, {"fast_norm": True}, {"half": True})
    ]
    assert list(told.groups()) == found
