"""Both sides of a benchmark, with equal weights: ours, and official code, timm, or the same thing in plain PyTorch.

A layer that can be timed by itself is one entry of :data:`LAYERS`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vizoo.tools.common import UserError, build_model

if TYPE_CHECKING:
    from torch import nn

# ||ours - theirs|| / ||theirs||, at most
TOLERANCE = {"float32": 1e-5, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}


class Sides(NamedTuple):
    """What is timed against each other, in float32 on the CPU.

    Attributes:
        ours: Our module.
        peer: The other one, with the same weights.
        against: What it is: ``official``, ``timm``, ``loop`` or ``plain``.
        label: Name of ours in the rows.
        shape: Of an input without the batch.
        more: Further inputs of the peer.
    """

    ours: nn.Module
    peer: nn.Module
    against: str
    label: str
    shape: tuple[int, ...]
    more: tuple[Any, ...] = ()


class Layer(NamedTuple):
    """A layer that can be timed by itself.

    Attributes:
        ours: Name of our layer in :mod:`vizoo.backbones.layers`.
        peer: Builds the other one from our layer, for its weights, and the arguments.
        label: Name in the rows, filled in with the arguments and ``side``.
        side: Of the map, where nothing else is said.
        against: As of :class:`Sides`.
        arguments: Of the layer; ``dim`` are the channels of the input.
        official: Builds the layer of the official code from a checkout and the arguments; or why there is none.
        tokens: Whether it takes tokens in place of a map.
    """

    ours: str
    peer: Callable[[Any, dict[str, Any]], nn.Module]
    label: str
    side: int
    against: str
    arguments: dict[str, Any]
    official: Callable[..., nn.Module] | str
    tokens: bool = False


def _timm_halo(ours: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    from timm.layers.halo_attn import HaloAttn

    peer: nn.Module = HaloAttn(**arguments)
    peer.load_state_dict(ours.state_dict())
    return peer


def _loop(ours: Any, arguments: dict[str, Any]) -> nn.Module:
    from vizoo.tools.profiling.official import ULSAMLoop

    peer = ULSAMLoop(**arguments)
    peer.load_state_dict(ours.official_state_dict())
    return peer


def _plain(ours: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    peer: Any = copy.deepcopy(ours)
    peer.fused_attn = False
    return peer


def _official_hilo(*args: Any, **arguments: Any) -> nn.Module:
    from vizoo.tools.profiling.official import official_hilo

    return official_hilo(*args, **arguments)


LAYERS = {
    "hilo": Layer(
        ours="HiLo",
        peer=_plain,
        label="hilo w{window_size} alpha {alpha:g}",
        side=56,
        against="plain",
        arguments={"dim": 384, "num_heads": 12, "qkv_bias": True, "window_size": 2, "alpha": 0.9},
        official=_official_hilo,
        tokens=True,
    ),
    "halo": Layer(
        ours="HaloAttention",
        peer=_timm_halo,
        label="halo {dim}@{side} b{block_size} h{halo_size}",
        side=64,
        against="timm",
        arguments={"dim": 64, "num_heads": 4, "block_size": 8, "halo_size": 3},
        official="there is no official code of 'halo'; it is timed against timm's layer",
    ),
    "ulsam": Layer(
        ours="ULSAM",
        peer=_loop,
        label="ulsam {dim}@{side} g{num_splits}",
        side=14,
        against="loop",
        arguments={"dim": 512, "num_splits": 4},
        official="the official code of 'ulsam' has no licence; it is timed against a loop like it",
    ),
    "reversed": Layer(
        ours="ReversedAttention",
        peer=_plain,
        label="reversed {num_heads} heads",
        side=32,
        against="plain",
        arguments={"dim": 96, "num_heads": 3},
        official="there is no official code of 'reversed'; it is timed against its plain form",
        tokens=True,
    ),
}


def build_sides(
    name: str,
    size: tuple[int, int] | None = None,
    official: Path | None = None,
    reparam: bool = False,
    arguments: dict[str, Any] | None = None,
) -> Sides:
    """Both sides with equal weights in float32 on the CPU.

    Args:
        name: Key of :data:`LAYERS`, or a model of the zoo.
        size: Height and width of the image or map; None means its own.
        official: Checkout of the official code; without one the other side is timm's where it has one, else plain.
        reparam: Both models in their merged form.
        arguments: Of a layer, in place of those in the table.

    Returns:
        Both.

    Raises:
        UserError: If one of them cannot be built, or takes no such size.
    """
    if name in LAYERS:
        return _layer_sides(name, size, official, arguments or {})
    return _model_sides(name, size, official, reparam)


def _layer_sides(name: str, size: tuple[int, int] | None, official: Path | None, given: dict[str, Any]) -> Sides:
    from vizoo.backbones import layers

    layer = LAYERS[name]
    arguments = {**layer.arguments, **given}
    height, width = size or (layer.side, layer.side)
    if layer.tokens and height != width:
        raise UserError(f"--size {height} {width}: {name!r} takes the tokens of a square map; give one side")
    ours: nn.Module = getattr(layers, layer.ours)(**arguments)
    draw_weights(ours)
    side = f"{height}" if height == width else f"{height}x{width}"
    label = layer.label.format(**arguments, side=side)
    dim = arguments["dim"]
    shape = (height * width, dim) if layer.tokens else (dim, height, width)
    if official is None or isinstance(layer.official, str):
        return Sides(ours, layer.peer(ours, arguments), layer.against, label, shape)
    peer = layer.official(official, **arguments)
    peer.load_state_dict(ours.state_dict())
    return Sides(ours, peer, "official", label, shape, (height, width) if layer.tokens else ())


def _model_sides(name: str, size: tuple[int, int] | None, official: Path | None, reparam: bool) -> Sides:
    from vizoo.tools.profiling.official import official_model, timm_model
    from vizoo.tools.profiling.timing import fused

    kwargs: dict[str, Any] = {"deploy": True} if reparam else {}
    ours = build_model(name, **kwargs)
    if official is not None and size and size[0] != size[1]:
        raise UserError(f"--size {size[0]} {size[1]}: official code is built for square images; give one side")
    size = size or ours.pretrained_cfg["input_size"][-2:]
    shape = (3, *size)
    plain_name = name.partition(".")[0]
    if official is not None:
        peer = official_model(official, plain_name, size[1], reparam)
        draw_weights(peer)
        filter_fn = sys.modules[type(ours).__module__].checkpoint_filter_fn
        ours.load_state_dict(filter_fn(peer.state_dict(), ours))
        return Sides(ours, peer, "official", name, shape)
    draw_weights(ours)
    found = timm_model(plain_name)
    against = "plain" if found is None else "timm"
    if found is None:
        with fused(False):
            found = build_model(name, **kwargs)
    found.load_state_dict(ours.state_dict())
    return Sides(ours, found, against, name, shape)


def draw_weights(model: nn.Module) -> None:
    """Give every parameter and buffer of a model random values of a trained model's size, offsets included."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = torch.randn(value.shape, generator=generator)
        if name.endswith("running_var"):
            value.copy_(0.5 + noise.abs())
        elif value.dim() > 1:
            value.copy_(noise / value[0].numel() ** 0.5)
        else:
            value.copy_(0.1 * noise + (1.0 if name.endswith("weight") else 0.0))
