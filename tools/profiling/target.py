"""What is profiled: a model by the text that names it, as commands take it, or any module with its input."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timm.models import get_model_input_config
from timm.utils.model import reparameterize_model
from torch import nn
from torch.utils._pytree import tree_map_only

from vizoo.tools.common import (
    UserError,
    build_model,
    check_file,
    check_weights,
    is_exhausted,
    named,
    one_line,
    read_spec,
    resolve_model,
    resolve_models,
    short,
)
from vizoo.tools.options import read_size
from vizoo.tools.profiling.counting import initialized, unwrap
from vizoo.tools.profiling.meta import NoValues
from vizoo.tools.profiling.recording import tensors_in
from vizoo.tools.profiling.timing import Images

DTYPES = ["float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64"]
CLIP = 16  # frames of a video, where the model's metadata asks for no more


class Target(NamedTuple):
    """What is profiled.

    Attributes:
        net: The module; of a name without real weights on the meta device.
        name: Of the model, or of the module's class.
        size: Height and width of the image; None for inputs that the caller gave or that are no image.
        inputs: Positional inputs at batch 1; :func:`vizoo.tools.profiling.timing.random_like` makes those of n images.
        own: Whether it was built here; a module of the caller is neither moved nor converted.
        anew: Builds it with real weights; None for inputs that the caller gave to a model of timm, or for a module.
        spec: The text that names it; empty for a module.
        kind: ``timm``, ``torchvision``, ``function``, ``mm``, ``exported``, ``torchscript``, ``onnx`` or ``module``.
        weights: File of its weights.
        kwargs: Arguments of its constructor.
    """

    net: nn.Module
    name: str
    size: tuple[int, int] | None
    inputs: Sequence[Any]
    own: bool
    anew: Callable[[], nn.Module] | None
    spec: str = ""
    kind: str = "module"
    weights: str | None = None
    kwargs: dict[str, Any] = {}  # noqa: RUF012 - nobody writes into it

    def to_dict(self) -> dict[str, Any]:
        """The target of a record."""
        return {
            "spec": self.spec or self.name,
            "kind": self.kind,
            "name": self.name,
            "size": list(self.size) if self.size else None,
            "inputs": [list(t.shape) for t in tensors_in(self.inputs)],
            "weights": self.weights,
            "kwargs": self.kwargs,
        }


class _Asked(NamedTuple):
    """The arguments of :func:`find_target` for a text."""

    name: str
    inputs: Sequence[Any] | None
    size: tuple[int, int] | None
    kwargs: dict[str, Any]
    real: bool
    reparam: bool
    weights: str | None

    def finished(self, net: nn.Module) -> nn.Module:
        """A model that was just built, with weights and merged branches where they were asked for."""
        if self.weights:
            _load(net, self.weights, self.name)
        return reparameterize_model(net.eval() if self.inputs is None else net) if self.reparam else net


class _Built(NamedTuple):
    """A model of some kind, with the inputs that it takes where none were given."""

    net: nn.Module
    inputs: Sequence[Any]
    size: tuple[int, int] | None
    anew: Callable[[], nn.Module] | None
    name: str


def find_target(
    model: Any,
    inputs: Any = None,
    size: Any = None,
    kwargs: dict[str, Any] | None = None,
    real: bool = False,
    reparam: bool = False,
    weights: str | None = None,
) -> Target:
    """Build a model that a text names, or take a module.

    Detectors are counted as :mod:`vizoo.tools.profiling.boxes` says.

    Args:
        model: What :func:`vizoo.tools.common.read_spec` reads, or a module.  A function is called with ``kwargs``, and
            so is the class of a module.
        inputs: Positional inputs at batch 1, the only one, or a text of :func:`read_inputs`; None draws one image, of a
            program what it was made with.
        size: Side, or height and width, in pixels; None is the model's own, and a suffix of the text goes before it.
        kwargs: Arguments of ``timm.create_model``, of the constructor of torchvision or of the function.
        real: Whether weights are needed; else those of timm, torchvision and configs are on the meta device.
        reparam: Merge branches where the model can, which needs weights.
        weights: File with a state dict.

    Returns:
        The target.

    Raises:
        UserError: For an unknown name, what is neither name nor module, arguments, weights or a size that do not fit,
            or a file that cannot be read.
        Failure: If weights are not finite.
    """
    own, kwargs = isinstance(model, str), dict(kwargs or {})
    if not own and not isinstance(model, nn.Module):
        raise UserError(f"model {short(model)}: give a name of timm or vizoo, or an nn.Module")
    if isinstance(inputs, str):
        inputs = read_inputs(inputs)
    elif inputs is not None and (isinstance(inputs, torch.Tensor) or not isinstance(inputs, Sequence)):
        inputs = (inputs,)
    spec = read_spec(model) if own else None
    side = spec.size if spec and spec.size else size
    side = None if side is None else read_size(side, "size")
    if spec is None and weights:
        raise UserError(f"weights {weights!r}: load them into the module that was given")
    if spec is None:
        found = _module(_Asked("", inputs, side, kwargs, real, reparam, weights), unwrap(model))
        name = type(unwrap(model)).__name__
        return Target(found.net, name, found.size, found.inputs, False, found.anew)
    asked = _Asked(spec.name, inputs, side, kwargs, real or bool(weights), reparam, weights)
    found = _KINDS[spec.kind](asked)
    return Target(found.net, found.name, found.size, found.inputs, True, found.anew, model, spec.kind, weights, kwargs)


def read_inputs(text: str) -> list[torch.Tensor]:
    """Inputs by their shapes: on the meta device where they are floating, else zeros, which are valid indices.

    Args:
        text: Shapes with ``x`` between the sides and commas between inputs, perhaps with a dtype: ``1x3x224x224``,
            ``1x77:int64,1x16``.

    Returns:
        The tensors.

    Raises:
        UserError: For anything else.
    """
    found = []
    for part in text.split(","):
        shape, colon, dtype = part.strip().partition(":")
        sides = shape.split("x")
        if not all(s.isdecimal() and s.isascii() and len(s) < 10 for s in sides) or (colon and dtype not in DTYPES):
            allowed = f"1x3x224x224 or 1x77:int64, with commas between several; dtypes {', '.join(DTYPES)}"
            raise UserError(f"--input {short(part)}: write shapes like {allowed}")
        kind: torch.dtype = getattr(torch, dtype or "float32")
        place = "meta" if kind.is_floating_point or kind.is_complex else "cpu"
        found.append(torch.zeros([int(s) for s in sides], dtype=kind, device=place))
    return found


# one function for each kind


def _image(chans: int, side: tuple[int, int]) -> torch.Tensor:
    return torch.empty(1, chans, *side, device="meta")


def _side_of(inputs: Sequence[Any]) -> tuple[int, int] | None:
    """Height and width of inputs that are images."""
    shapes = [t.shape[-2:] for t in tensors_in(inputs) if t.dim() >= 4]
    return (int(shapes[0][0]), int(shapes[0][1])) if shapes else None


def _timm(asked: _Asked) -> _Built:
    name = resolve_model(asked.name, "model")
    place: dict[str, Any] = {} if asked.real or asked.reparam else {"device": "meta"}
    more: dict[str, Any] = {"checkpoint_path": asked.weights} if asked.weights else {}
    net = build_model(name, **asked.kwargs, **more, **place)
    if asked.inputs is not None:
        return _module(asked._replace(weights=None), net)._replace(name=name)
    config = get_model_input_config(net)
    if config["fixed_input_size"] and asked.size not in (None, tuple(config["input_size"][1:])):
        net = build_model(name, **{**asked.kwargs, "img_size": asked.size}, **more, **place)
    return _module(asked._replace(weights=None), net)._replace(name=name, anew=_anew(_timm, asked))


def _module(asked: _Asked, net: nn.Module) -> _Built:
    """A module, with the inputs given or an image of the size that it is made for."""
    if asked.inputs is not None:
        net = initialized(net, asked.inputs, {})
        return _Built(asked.finished(net), asked.inputs, None, None, asked.name)
    chans, *given = get_model_input_config(net)["input_size"]
    side = asked.size or (given[0], given[1])
    whole = asked.finished(net)
    return _Built(whole, (_image(chans, side),), side, whole.eval, asked.name)


def _anew(build: Callable[[_Asked], _Built], asked: _Asked) -> Callable[[], nn.Module]:
    return lambda: build(asked._replace(real=True)).net.eval()


def _torchvision(asked: _Asked) -> _Built:
    import torchvision.models as models

    name = _one(asked, "torchvision:")
    builder = models.get_model_builder(name)
    nothing = {k: None for k in ("weights", "weights_backbone") if k in inspect.signature(builder).parameters}
    if name in ("googlenet", "inception_v3"):
        nothing["init_weights"] = False  # type: ignore[assignment] # it is slow, and they warn of it
    place = contextlib.nullcontext() if asked.real or asked.reparam else torch.device("meta")
    with NoValues(), place, _building(f"torchvision:{name}"):
        net = builder(**{**nothing, **asked.kwargs})
    inputs, side = _of_torchvision(net, name, asked.size)
    inputs = inputs if asked.inputs is None else asked.inputs
    size = side if asked.inputs is None else None
    return _Built(asked.finished(net), inputs, size, _anew(_torchvision, asked), f"torchvision:{name}")


def _of_torchvision(net: Any, name: str, size: tuple[int, int] | None) -> tuple[Sequence[Any], tuple[int, int]]:
    """Inputs of a model of torchvision, and their height and width: those of the paper or of its weights.

    A detector scales every image; it is set to the size of this one, so that the network sees what is asked for.
    """
    import torchvision.models as models

    if hasattr(net, "transform") and hasattr(net.transform, "fixed_size"):  # a detector
        fixed = net.transform.fixed_size
        short_side, long_side = net.transform.min_size[-1], net.transform.max_size
        own = tuple(reversed(fixed)) if fixed else _landscape(short_side, long_side)
        if fixed and size not in (None, own):
            raise UserError(f"size {size[0]}x{size[1]}: 'torchvision:{name}' scales every image to {own[0]}x{own[1]}")  # type: ignore[index]
        side = size or own
        net.transform.min_size, net.transform.max_size = (min(side),), max(side)
        return (Images([torch.empty(3, *side, device="meta")]),), side
    weights = getattr(models.get_model_weights(name), "DEFAULT", None)
    preset: Any = weights.transforms() if weights else None
    crop, meta = (
        getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None),
        weights.meta if weights else {},
    )
    own = (crop[0], crop[-1]) if crop else (224, 224)
    kind = type(net).__module__
    if ".optical_flow" in kind:
        side = size or (520, 960)  # of torchvision's own figures
        return (_image(3, side), _image(3, side)), side
    side = size or own
    if ".video" in kind:
        frames = max(CLIP, meta.get("min_temporal_size", 1))
        return (torch.empty(1, 3, frames, *side, device="meta"),), side
    return (_image(3, side),), side


def _landscape(short_side: int, long_side: int) -> tuple[int, int]:
    """Height and width of the image that detectors are compared with: 800x1280 for sides of at most 800 and 1333."""
    return short_side, min(long_side, short_side * 8 // 5)


def _one(asked: _Asked, prefix: str) -> str:
    names = resolve_models([f"{prefix}{asked.name}"])
    if len(names) != 1:
        raise UserError(f"model '{prefix}{asked.name}' matches {len(names)} models; name one")
    return names[0].removeprefix(prefix)


def _function(asked: _Asked) -> _Built:
    where, colon, name = asked.name.rpartition(":")
    if not colon or not where or not name:
        raise UserError(f"model {asked.name!r}: write file.py:function or package.module:function")
    make = _imported(where)
    for part in name.split("."):
        if not hasattr(make, part):
            raise UserError(f"model {asked.name!r}: {where} has no {name!r}")
        make = getattr(make, part)
    if not callable(make):
        raise UserError(f"model {asked.name!r}: {name!r} is a {type(make).__name__}, need a function or a class")
    with _building(asked.name):
        net = make(**asked.kwargs)
    if not isinstance(net, nn.Module):
        raise UserError(f"model {asked.name!r} returns a {type(net).__name__}, need an nn.Module")
    net = unwrap(net)
    chans, *own = getattr(net, "pretrained_cfg", getattr(net, "default_cfg", {})).get("input_size", (3, 224, 224))
    side = asked.size or (own[0], own[1])
    inputs = asked.inputs if asked.inputs is not None else (_image(chans, side),)
    net = asked.finished(initialized(net, inputs, {}))
    return _Built(net, inputs, side if asked.inputs is None else _side_of(inputs), lambda: net, asked.name)


def _imported(where: str) -> Any:
    """A module of Python, or a file as Python runs it: imports are looked for in its folder first."""
    file = Path(where)
    if where.endswith(".py"):
        check_file(where, "model file")
    folder = str(file.resolve().parent) if where.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        if not where.endswith(".py"):
            return importlib.import_module(where)
        spec = importlib.util.spec_from_file_location(f"vizoo_target_{file.stem}", file)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (Exception, SystemExit) as e:  # code of the user can raise anything
        raise UserError(f"model {where!r} cannot be imported: {named(e)}") from e


@contextlib.contextmanager
def _building(name: str) -> Iterator[None]:
    """What a constructor raises is one line."""
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError) or is_exhausted(e):
            raise
        raise UserError(f"cannot build {name!r}: {named(e)}") from e


def _mm(asked: _Asked) -> _Built:
    from vizoo.tools.training import mm

    if mm.MISSING:
        raise UserError(mm.MISSING)
    if asked.kwargs:
        raise UserError(f"model 'mm:{asked.name}': a config has all arguments; --model-kwargs change nothing")
    from mmengine.config import ConfigDict
    from mmengine.registry import MODELS, DefaultScope

    cfg = mm.read_config(asked.name)
    config = ConfigDict(cfg.get("model") or {})
    backbone = config.get("backbone")
    if backbone is not None and backbone.get("pretrained"):  # weights change nothing of the cost
        backbone.pretrained = False if backbone.type == "VizooBackbone" else None
    place = contextlib.nullcontext() if asked.real or asked.reparam else torch.device("meta")
    scope = cfg.get("default_scope") or "mmengine"
    with NoValues(), DefaultScope.overwrite_default_scope(scope), place, _building(f"mm:{asked.name}"):
        net: Any = MODELS.build(config)
    side = asked.size or _size_of_config(cfg)
    inputs: Any = asked.inputs or (_image(3, side), *([_sample(side)] if hasattr(net, "roi_head") else []))
    size = side if asked.inputs is None else None
    return _Built(asked.finished(net), inputs, size, _anew(_mm, asked), Path(asked.name).stem)


def _sample(side: tuple[int, int]) -> Any:
    """What mmdet wants to know of an image before it proposes boxes."""
    from mmdet.structures import DetDataSample

    shapes = dict.fromkeys(("img_shape", "ori_shape", "pad_shape", "batch_input_shape"), side)
    return Images([DetDataSample(metainfo={**shapes, "scale_factor": (1.0, 1.0)})])


def _size_of_config(cfg: Any) -> tuple[int, int]:
    """Height and width of the images of a config: of its crops, else as detectors are compared."""
    crop = cfg.get("crop_size") or (cfg.model.get("data_preprocessor") or {}).get("size")
    if crop:
        return int(crop[0]), int(crop[-1])
    scales = [t.get("scale") for t in cfg.get("test_pipeline") or () if t.get("type") == "Resize"]
    if scales and isinstance(scales[0], Sequence):
        return _landscape(min(scales[0]), max(scales[0]))
    crops = [t.get("crop_size") for t in cfg.get("test_pipeline") or () if t.get("type") == "CenterCrop"]
    return read_size(crops[0] if crops else 224, "size")


def _exported(asked: _Asked) -> _Built:
    from vizoo.tools.profiling.programs import read_exported

    _check_program(asked)
    net, inputs = read_exported(asked.name)
    return _program(asked, net, inputs)


def _torchscript(asked: _Asked) -> _Built:
    from vizoo.tools.profiling.programs import read_script

    _check_program(asked)
    return _program(asked, read_script(asked.name), (_image(3, asked.size or (224, 224)),))


def _onnx(asked: _Asked) -> _Built:
    from vizoo.tools.profiling.onnx_file import OnnxFile

    _check_program(asked)
    net = OnnxFile(asked.name)
    return _program(asked, net, net.images(asked.size))._replace(anew=None)  # a run shows PyTorch no operator


def _check_program(asked: _Asked) -> None:
    for name, value in (("--model-kwargs", asked.kwargs), ("--reparam", asked.reparam), ("--weights", asked.weights)):
        if value:
            raise UserError(f"{name}: {asked.name!r} is a finished program, which takes none")


def _program(asked: _Asked, net: nn.Module, inputs: Sequence[Any] | None) -> _Built:
    if asked.inputs is None and inputs is None:
        raise UserError(f"model file {asked.name!r} does not say what it takes: give --input, such as 1x3x224x224")
    given: Any = inputs if asked.inputs is None else asked.inputs
    given = tree_map_only(torch.Tensor, lambda t: t.to("meta") if t.is_floating_point() else t, tuple(given))
    side = _side_of(given)
    if asked.size not in (None, side):
        raise UserError(
            f"size {asked.size[0]}x{asked.size[1]}: {asked.name!r} is made for {'x'.join(map(str, side or ()))}"
        )  # type: ignore[index]
    return _Built(net, given, side, lambda: net, Path(asked.name).name)


def _load(net: nn.Module, file: str, name: str) -> None:
    """Load a state dict that fits exactly, without running any code in its file."""
    from safetensors.torch import load_file

    from vizoo.backbones.layers.checkpoint import unwrap as state_of
    from vizoo.heads.checkpoints import read_checkpoint

    check_file(file, "weights")
    try:
        state = load_file(file) if file.endswith(".safetensors") else state_of(read_checkpoint(file))
        net.load_state_dict(state)
    except Exception as e:  # whatever a broken file makes them raise
        if is_exhausted(e):
            raise
        raise UserError(f"weights {file!r} do not fit {name!r} or cannot be read: {one_line(e)}") from e
    check_weights(net, file)


_KINDS: dict[str, Callable[[_Asked], _Built]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "function": _function,
    "mm": _mm,
    "exported": _exported,
    "torchscript": _torchscript,
    "onnx": _onnx,
}


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode that it was in."""
    before = {m: m.training for m in net.modules() if hasattr(m, "training")}  # frozen TorchScript has no mode
    with contextlib.suppress(NotImplementedError):  # exported programs have one for ever
        net.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training
