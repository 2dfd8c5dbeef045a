"""What the model tests share: the registered names, how to build a model, how big an input it is given."""

from __future__ import annotations

import csv
import functools
import math
import sys
from importlib import resources
from types import ModuleType
from typing import Any

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import vizoo  # noqa: F401 - registers the zoo
from vizoo.tools.profiling.meta import Kernels, NoValues

FORWARD, BACKWARD, SMALL = 384, 128, 96  # sides in pixels: one pass, training step, everything else
LARGE = 70_000_000  # parameters from which a model takes seconds to build


def module_of(name: str) -> ModuleType:
    """The family's module that registered a model."""
    return sys.modules[timm.models.model_entrypoint(name).__module__]


def _registered() -> list[str]:
    return [n for n in timm.list_models() if module_of(n).__name__.startswith("vizoo.")]


def build(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` in evaluation mode."""
    with NoValues():
        return timm.create_model(name, **kwargs).eval()


class QuickMeta(TorchDispatchMode):
    """Runs each operator on the meta device once for calls that look the same: shapes of a model in half the time."""

    kernels = Kernels()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return self.kernels.run(func, args, kwargs or {})


def _one_of_each_kind(names: list[str]) -> list[str]:
    """Of every family its ``test_*`` models, one for each way it is built; without one, its smallest model."""
    families: dict[str, list[str]] = {}
    for name in names:
        families.setdefault(module_of(name).__name__, []).append(name)
    kinds = []
    for members in families.values():
        tiny = [n for n in members if n.startswith("test_")]
        kinds += tiny or [min(members, key=lambda n: sum(p.numel() for p in build(n, device="meta").parameters()))]
    return kinds


@functools.cache
def recorded() -> dict[str, dict[str, str]]:
    """Rows of ``backbones/models.csv`` by name; a test recounts them."""
    text = resources.files("vizoo.backbones").joinpath("models.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    table = {row["name"]: row for row in rows}
    assert len(table) == len(rows), "a name has two rows"
    return table


def _is_small(name: str) -> bool:
    return name not in recorded() or int(recorded()[name]["params"]) < LARGE


REGISTERED = _registered()
NAMES = [n for n in REGISTERED if timm.models.get_pretrained_cfg(n).num_classes]  # an OAT has no classes of its own
assert NAMES, "vizoo registers no classifier, so there is nothing to test"
KINDS = _one_of_each_kind(NAMES)

all_models = pytest.mark.parametrize("name", NAMES)
"""Every classifier: for what costs one pass on the meta device."""
each_kind = pytest.mark.parametrize("name", KINDS)
"""One small model of each kind: for what cannot differ by size."""
PYRAMIDS = [
    n for n in KINDS if {4, 8, 16, 32} <= {level["reduction"] for level in build(n, device="meta").feature_info}
]
each_pyramid = pytest.mark.parametrize("name", PYRAMIDS)
"""Those with features of the strides that detectors and segmentors take."""
each_map_kind = pytest.mark.parametrize(
    "name", [n for n in KINDS if not isinstance(build(n, device="meta"), VisionTransformer)]
)
"""Without timm's plain transformers, which norm every tap and keep their head when pruned."""
other_models = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) for n in NAMES if n not in KINDS and _is_small(n)],
)
"""The models that ``each_kind`` leaves out, as slow tests; of the largest, which are wide siblings, only the counts."""


def is_fixed(model: nn.Module) -> bool:
    """Whether the model accepts a single input size."""
    return bool(model.pretrained_cfg.get("fixed_input_size"))


def input_shape(model: nn.Module, side: int) -> tuple[int, int, int]:
    """Channels, height and width at most ``side``, unless the configuration demands more."""
    cfg = model.pretrained_cfg
    c, h, w = cfg["input_size"]
    if is_fixed(model) or max(h, w) <= side:
        return c, h, w
    return cfg.get("min_input_size") or (c, min(h, side), min(w, side))


def sample(model: nn.Module, side: int = SMALL, batch: int = 1) -> Tensor:
    """Standard-normal images for ``model``."""
    return torch.randn(batch, *input_shape(model, side))


def as_nchw(features: Tensor, model: nn.Module) -> Tensor:
    """Bring the unpooled map, or the tokens of an image as wide as high, of ``model`` to channels first."""
    if features.ndim == 3:
        tokens = features[:, getattr(model, "num_prefix_tokens", 0) :]
        return tokens.transpose(1, 2).unflatten(2, (math.isqrt(tokens.shape[1]), -1))
    fmt = str(getattr(model, "output_fmt", "NCHW")).rpartition(".")[2]
    assert fmt in ("NCHW", "NHWC"), f"output_fmt {fmt}"
    return features.permute(0, 3, 1, 2) if fmt == "NHWC" else features


def names_of(value: Any) -> tuple[str, ...]:
    """A configuration entry that is one name, several, or None."""
    return () if value is None else (value,) if isinstance(value, str) else tuple(value)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of every parameter; fails when one is missing or not finite."""
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, f"no gradient for {missing}"
    found = {n: p.grad for n, p in model.named_parameters()}
    broken = [n for n, g in found.items() if not torch.isfinite(g).all()]
    assert not broken, f"gradient not finite for {broken}"
    return found


def overlay(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of ``build`` that load ``state`` the way pretrained weights are loaded."""
    copy = {k: v.clone() for k, v in state.items()}
    return {"pretrained": True, "pretrained_cfg_overlay": {"state_dict": copy, "source": ""}}


def spread(model: nn.Module) -> nn.Module:
    """Weights of order one, so that gates, scores and attention differ from token to token."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) / p[0].numel() ** 0.5)
    return model


# each kind of block and what lies between blocks once, as a second one only costs time; gates open
_TWO_STAGES = {"embed_dims": (20, 40), "depths": (1, 1), "sr_ratios": (4, 1), "mlp_ratios": (4.0, 4.0)}  # of TransNeXt
SHALLOW: dict[str, dict[str, Any]] = {
    "test_dependencyvit": {"depth": 2, "gate_init": 0.0},
    "test_dependencyvit_lite": {"depth": 2, "prune_blocks": (1, 2), "gate_init": 0.0},
    "test_dinat_s": {"depths": (1, 1), "num_heads": (2, 4), "dilations": (2, 1)},
    "test_flowformer": {"depths": (1, 1), "embed_dims": (16, 32)},
    "test_halonet": {"depths": (1, 1, 1), "num_heads": (2, 2, 4)},
    "test_litv2": {"depths": (1, 1, 1), "num_heads": (1, 4, 8), "window_size": (0, 2, 1)},
    "test_moh_vit": {**_TWO_STAGES, "num_heads": (2, 4), "shared_heads": (1, 2), "routed_heads": (1, 1)},
    "test_nat": {"depths": (1, 1), "num_heads": (2, 4), "dilations": (1, 2)},
    "test_nat_isotropic": {"depths": (1, 1), "dilations": (1, 2)},
    "test_ninformer": {"depth": 2},
    "test_overlock": {"depths": (1, 1, 1, 1), "sub_depths": (1, 1)},
    "test_transnext": {**_TWO_STAGES, "num_heads": (1, 2)},
    "test_ulsam": {
        "stages": ("ds_r1_k3_s1_c16", "ir_r2_k3_s2_e2_c24", "ir_r2_k3_s2_e2_c40"),
        "ulsam_replace": (4,),
        "ulsam_insert": (5,),
    },
    "test_ulsam_v1": {
        "stages": ("dsa_r1_k3_s1_c16", "dsa_r2_k3_s2_c24", "dsa_r1_k3_s2_c40"),
        "ulsam_replace": (4,),
        "ulsam_insert": (5,),
    },
    "test_vit_gap_tcpa": {"depth": 2},
    "test_vit_tcpa": {"depth": 2},
}


def shallow(name: str, **kwargs: Any) -> torch.nn.Module:
    """The model without repetitions, with weights that make what it attends to count."""
    return spread(build(name, **{**SHALLOW.get(name, {}), **kwargs}))
