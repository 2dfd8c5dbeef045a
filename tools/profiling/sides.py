"""Both sides of a benchmark, with equal weights: ours, and official code, timm, or the same thing in plain PyTorch.

What can be timed, and against what, is one entry of :data:`CASES`.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
import hashlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vizoo.tools.common import UserError, build_model

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

# ||ours - theirs|| / ||theirs|| of outputs, at most
TOLERANCE = {"float32": 1e-5, "tf32": 1e-2, "bfloat16": 5e-2, "float16": 1e-2}
# in training norms of a small batch enlarge rounding, up to a thousand times in HaloNet; float64 shows what is the same
TRAINING_TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "tf32": 1e-1, "bfloat16": 2e-1, "float16": 1e-1}


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
        label: Name in the rows, filled in with the arguments and ``side``.
        side: Of the map, where nothing else is said.
        arguments: Of both layers; ``dim`` are the channels of the input.
        tokens: Whether it takes tokens in place of a map.
    """

    ours: str
    label: str
    side: int
    arguments: dict[str, Any]
    tokens: bool = False


class Official(NamedTuple):
    """Official code that can be the other side.

    Attributes:
        adapter: Function of :mod:`vizoo.tools.profiling.official` that imports and builds it.
        file: In a checkout, by which it is known.
        square: Whether it is built for square images.
    """

    adapter: str
    file: str
    square: bool = True


class Case(NamedTuple):
    """What a layer or a model is timed against.

    Attributes:
        official: The official code; or why there is none.
        against: What the other side is without a checkout of it.
        peer: Builds that, from the arguments of a layer; None means ours once more, in plain PyTorch.
        layer: None for models.
    """

    official: Official | str
    against: str = "plain"
    peer: Callable[..., nn.Module] | None = None
    layer: Layer | None = None


def _timm_halo(**arguments: Any) -> nn.Module:
    from timm.layers.halo_attn import HaloAttn

    return HaloAttn(**arguments)


def _loop(**arguments: Any) -> nn.Module:
    from vizoo.tools.profiling.official import ULSAMLoop

    return ULSAMLoop(**arguments)


def _timm_model(name: str, **changes: Any) -> nn.Module:
    import timm

    return timm.create_model(name, **changes)


def _timm_h1() -> nn.Module:
    import dataclasses

    from timm.models.byoanet import model_cfgs

    cfg: Any = model_cfgs["halonet_h1"]  # 8 heads in every stage; the paper has 4 in the first
    attention = {**cfg.self_attn_kwargs, "num_heads": 4}
    first = dataclasses.replace(cfg.blocks[0], self_attn_layer="halo", self_attn_kwargs=attention)
    return _timm_model("halonet_h1", blocks=(first, *cfg.blocks[1:]))


def _halonet(peer: Callable[[], nn.Module]) -> Case:
    return Case("there is no official code of HaloNet; this model is timed against timm's", "timm", peer)


CASES = {  # by name of a layer, or pattern of names of models; the first that fits is taken
    "hilo": Case(
        Official("hilo", "hilo.py"),
        layer=Layer(
            ours="HiLo",
            label="hilo w{window_size} alpha {alpha:g}",
            side=56,
            arguments={"dim": 384, "num_heads": 12, "qkv_bias": True, "window_size": 2, "alpha": 0.9},
            tokens=True,
        ),
    ),
    "halo": Case(
        "there is no official code of 'halo'; it is timed against timm's layer",
        against="timm",
        peer=_timm_halo,
        layer=Layer(
            ours="HaloAttention",
            label="halo {dim}@{side} b{block_size} h{halo_size}",
            side=64,
            arguments={"dim": 64, "num_heads": 4, "block_size": 8, "halo_size": 3},
        ),
    ),
    "ulsam": Case(
        "the official code of 'ulsam' has no licence; it is timed against a loop like it",
        against="loop",
        peer=_loop,
        layer=Layer(
            ours="ULSAM",
            label="ulsam {dim}@{side} g{num_splits}",
            side=14,
            arguments={"dim": 512, "num_splits": 4},
        ),
    ),
    "reversed": Case(
        "there is no official code of 'reversed'; it is timed against its plain form",
        layer=Layer(
            ours="ReversedAttention",
            label="reversed {num_heads} heads",
            side=32,
            arguments={"dim": 96, "num_heads": 3},
            tokens=True,
        ),
    ),
    "aggregated": Case(
        Official("aggregated", "classification/attention_native.py"),
        layer=Layer(
            ours="AggregatedAttention",
            label="aggregated {dim}@{side} h{num_heads} sr{sr_ratio}",
            side=56,
            arguments={"dim": 72, "num_heads": 3, "sr_ratio": 8, "pretrain_map": 56},
            tokens=True,
        ),
    ),
    "litv2_*": Case(Official("litv2", "classification/models/litv2.py")),
    "overlock_*": Case(Official("overlock", "models/overlock.py")),
    "transnext_*": Case(Official("transnext", "classification/transnext.py")),
    "moh_vit_*": Case(Official("moh_vit", "MoH-ViT/transnext.py")),
    "flowformer_*": Case(Official("flowformer", "Flowformer_CV/flowformer.py")),
    "ninformer_*": Case(Official("ninformer", "ninformer.py")),
    "vit_base_patch16_224_tcpa": Case(Official("tcpa", "models/VFPT_TCPA.py")),
    "oat_base": Case(Official("oat", "src/model/models.py", square=False)),
    "oat_small": Case(Official("oat", "src/model/models.py", square=False)),
    "nat_*": Case(Official("nat", "classification/nat.py")),
    "dinat_*": Case(Official("nat", "classification/nat.py")),
    "vitrpb_*": Case(Official("nat", "classification/nat.py")),
    "halo_26t": _halonet(functools.partial(_timm_model, "halonet26t")),
    "halo_se33ts": _halonet(functools.partial(_timm_model, "sehalonet33ts")),
    "halo_50ts": _halonet(functools.partial(_timm_model, "halonet50ts")),
    "halo_eca26ts": _halonet(functools.partial(_timm_model, "eca_halonext26ts")),
    "halo_regnetz_b": _halonet(functools.partial(_timm_model, "haloregnetz_b")),
    "halo_h1": _halonet(_timm_h1),
}
LAYERS = {name: case.layer for name, case in CASES.items() if case.layer}


def official_names() -> str:
    """Layers, and patterns of names of models, that can be timed against official code."""
    return ", ".join(name for name, case in CASES.items() if isinstance(case.official, Official))


def find_case(name: str) -> Case:
    """What a layer or a model, with or without tag, is timed against: any model against its plain form."""
    base = name.partition(".")[0]
    plain = Case(f"no official code is known for {name!r}; it is known for {official_names()}")
    return next((case for pattern, case in CASES.items() if fnmatch.fnmatchcase(base, pattern)), plain)


def find_official(name: str) -> Official:
    """The official code of a layer or a model.

    Args:
        name: As for :func:`find_case`.

    Returns:
        Its adapter, and its file in a checkout.

    Raises:
        UserError: If there is none.
    """
    code = find_case(name).official
    if isinstance(code, str):
        raise UserError(f"--official: {code}")
    return code


def build_sides(
    name: str,
    size: tuple[int, int] | None = None,
    official: Path | None = None,
    reparam: bool = False,
    arguments: dict[str, Any] | None = None,
) -> Sides:
    """Both sides with equal weights in float32 on the CPU, and without chance in training.

    Args:
        name: Of a layer in :data:`CASES`, or of a model of the zoo.
        size: Height and width of the image or map; None means its own.
        official: Checkout of the official code; without one the other side is what :data:`CASES` says.
        reparam: Both models in their merged form.
        arguments: Of a layer, in place of those in the table.

    Returns:
        Both.

    Raises:
        UserError: If one of them cannot be built, or takes no such size.
    """
    from vizoo.tools.profiling.official import official_side
    from vizoo.tools.profiling.timing import fused

    case = find_case(name)
    layer = case.layer
    given = {**layer.arguments, **(arguments or {})} if layer else {}
    build = functools.partial(_layer, layer.ours, given) if layer else functools.partial(_model, name, reparam)
    ours = build()
    size = size or ((layer.side, layer.side) if layer else ours.pretrained_cfg["input_size"][-2:])
    _check_square(name, case, size, official)
    more: tuple[int, ...] = ()
    if official is not None:
        code = find_official(name)
        model = {"name": name.partition(".")[0], "size": size[0], "reparam": reparam}
        peer = official_side(code.adapter, official, code.file, **({**given, "side": size[0]} if layer else model))
        more = size if layer and layer.tokens else ()
    elif case.peer is not None:
        peer = case.peer(**given)
    else:
        with fused(False):
            peer = build()
    draw_weights(peer)
    weights = peer.state_dict()
    if official is not None and not layer:
        weights = sys.modules[type(ours).__module__].checkpoint_filter_fn(weights, ours)
    ours.load_state_dict(weights)
    for module in (ours, peer):
        leave_nothing_to_chance(module)
    against = case.against if official is None else "official"
    label, shape = _described(layer, given, size) if layer else (name, (3, *size))
    return Sides(ours, peer, against, label, shape, more)


def _layer(ours: str, given: dict[str, Any]) -> Any:
    from vizoo.backbones import layers

    return getattr(layers, ours)(**given)


def _model(name: str, reparam: bool) -> Any:
    model = build_model(name)
    if reparam:
        if not hasattr(model, "reparameterize"):
            raise UserError(f"--reparam: {name!r} has no branches to merge")
        model.reparameterize()
    return model


def _check_square(name: str, case: Case, size: tuple[int, int], official: Path | None) -> None:
    height, width = size
    square = official is not None and (not isinstance(case.official, Official) or case.official.square)
    if height == width or not (case.layer.tokens if case.layer else square):
        return
    what = f"{name!r} takes the tokens of a square map" if case.layer else "official code is built for square images"
    raise UserError(f"--size {height} {width}: {what}; give one side")


def _described(layer: Layer, given: dict[str, Any], size: tuple[int, int]) -> tuple[str, tuple[int, ...]]:
    """Label of a layer in the rows, and shape of its input without the batch."""
    height, width = size
    side = f"{height}" if height == width else f"{height}x{width}"
    shape = (height * width, given["dim"]) if layer.tokens else (given["dim"], height, width)
    return layer.label.format(**given, side=side), shape


def leave_nothing_to_chance(model: nn.Module) -> None:
    """Set every rate of dropout, stochastic depth and the like to 0: in training both sides then compute the same.

    Args:
        model: Of any library.  Its rates are the numbers that its modules keep under a name with "drop" in it, and
            ``p`` or ``prob`` of modules that are called so; those kept as a share that stays become 1.
    """
    for module in model.modules():
        drops = any(word in type(module).__name__.lower() for word in ("drop", "stochasticdepth"))
        for name, value in vars(module).items():
            if type(value) is not float:
                continue
            if name in ("keep_prob", "keep_rate", "survival_prob"):
                setattr(module, name, 1.0)
            elif "drop" in name or (drops and name in ("p", "prob")):
                setattr(module, name, 0.0)


def run_pass(run: Callable[..., Any], inputs: Sequence[Any], train: bool) -> list[Tensor]:
    """One pass of a side.

    Args:
        run: The module, perhaps compiled.
        inputs: Its input, and what else it takes.
        train: Whether a backward pass follows, from the mean of the squared outputs.

    Returns:
        The outputs: the first of a tuple (reversed attention also returns its messages), else all.
    """
    from torch.utils._pytree import tree_leaves

    out = run(*inputs)
    outputs: list[Tensor] = tree_leaves(out[0] if isinstance(out, tuple) else out)
    if train:
        sum(t.square().mean() for t in outputs).backward()  # type: ignore[union-attr]
    return outputs


def distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Norm of the difference of two lists of tensors over the norm of the second."""
    import torch

    a, b = (torch.cat([t.detach().double().flatten() for t in tensors]) for tensors in (ours, theirs))
    return float((a - b).norm() / b.norm())


@contextlib.contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """Both sides draw the same numbers on a device, where there is chance that has no rate."""
    import torch

    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def training_distances(sides: Sides) -> dict[str, float]:
    """How far both sides are apart in training, in float64 on the CPU, where rounding explains nothing.

    Args:
        sides: As :func:`build_sides` gives them, which draws all values at random.

    Returns:
        Distance of ``outputs``; and of ``gradients``: of the input and of all parameters that have the same values on
        both sides, whatever their names, which are all but those that one side splits, merges or turns.
    """
    import torch

    # two images: on a CPU the gradient of batch normalisation of one image is wrong for some layouts (torch 2.14)
    x = torch.randn(2, *sides.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs, gradients = [], []
    for module, more in ((sides.ours, ()), (sides.peer, sides.more)):
        side, image = copy.deepcopy(module).double().train(), x.clone().requires_grad_()
        with seeded(x.device), torch.enable_grad():
            outputs.append(run_pass(side, (image, *more), train=True))
        gradients.append(_gradients((image, *side.parameters())))
    same = [values for values in gradients[0] if values in gradients[1]]
    return {
        "outputs": distance(*outputs),
        "gradients": distance(*([side[values] for values in same] for side in gradients)),
    }


def _gradients(leaves: Iterable[Tensor]) -> dict[bytes, Tensor]:
    """Gradients by what is in the tensors."""
    import torch

    return {
        hashlib.sha256(t.detach().numpy().tobytes()).digest(): torch.zeros_like(t) if t.grad is None else t.grad
        for t in leaves
    }


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
