"""What every constructor checks of its arguments: type from the annotation, range from the name.

An argument of one name means the same in every family and layer, so its range stands in :data:`RANGES` once; a
constructor says only where it differs.  What two arguments must be to each other it checks by :func:`need`.
"""

import difflib
import functools
import inspect
import math
import operator
import reprlib
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import timm
from timm.layers import get_act_layer, get_norm_layer, to_2tuple

__all__ = [
    "ANY",
    "NATURAL",
    "WRAPPERS",
    "Range",
    "check_arguments",
    "check_counts",
    "check_heads",
    "check_indices",
    "check_lengths",
    "check_model_name",
    "check_multiple",
    "check_names",
    "check_patches",
    "check_positions",
    "check_stages",
    "checked",
    "is_sequence",
    "need",
    "scaled",
]

WRAPPERS = ("getter", "list", "dict", "hook", "hooks", "fx")  # timm's wrappers of features, by their names
TOO_LARGE = 2**63  # for PyTorch's sizes
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Range(NamedTuple):
    """Numbers from ``low`` to ``high``, without those that are ``open``."""

    low: float = -math.inf
    high: float = math.inf
    open: tuple[float, ...] = ()

    def __contains__(self, number: object) -> bool:
        return number not in self.open and self.low <= number <= self.high  # type: ignore[operator]

    def __str__(self) -> str:
        high = f"{'below ' if self.high in self.open else ''}{self.high:g}"
        if self.low == -math.inf:
            return "" if self.high == math.inf else f" of at most {high}"
        if self.high == math.inf:
            return f" above {self.low:g}" if self.low in self.open else f" of at least {self.low:g}"
        return f" {'above' if self.low in self.open else 'from'} {self.low:g} to {high}"


Bounds = Range | tuple[Any, ...]
ANY, NATURAL, COUNT = Range(), Range(0), Range(1)
POSITIVE, SHARE, RATE = Range(0, open=(0,)), Range(0, 1), Range(0, 1, open=(1,))
_POOLS = ("avg", "max", "avgmax", "catavgmax", "")
RANGES: dict[str, Bounds] = {
    **dict.fromkeys(("final_dim", "halo_size", "head_width", "num_classes", "num_features"), NATURAL),
    **dict.fromkeys(("pe_alpha", "reg_tokens", "routed_heads", "shared_heads", "training_rounds"), NATURAL),
    "window_size": NATURAL,
    **dict.fromkeys(("conv_stages", "feature_norms", "prune_blocks", "stages"), ANY),  # positions: by check_stages, ...
    **dict.fromkeys(("out_indices", "ulsam_insert", "ulsam_replace"), ANY),
    **dict.fromkeys(("C", "head_dim_scale", "mlp_ratio", "norm", "pe_norm", "pe_sigma", "qk_ratio"), POSITIVE),
    **dict.fromkeys(("rb", "rv", "sigma", "sub_mlp_ratio", "tau", "temperature", "width", "width_factor"), POSITIVE),
    **dict.fromkeys(("alpha", "bn_momentum", "ulsam_bn_momentum"), SHARE),
    "frozen_stages": Range(-1),
    "gate": ("mul", "residual"),
    "global_pool": (*_POOLS, *(f"fast{pool}" for pool in _POOLS)),
    "head_out": ("spatial", "channel"),
    "output_stride": (8, 16, 32),
    "pad_mode": ("zero", "mask"),
    "pos_embed": ("learn", "none", ""),
    "rel_index": ("array", "pixel"),
    "spp": Range(0, 4),
}
"""Ranges, or choices, of the names that differ from the default: 1 and more for whole numbers, [0, 1) for the dropout
rates, which have ``drop`` in their names, all but NaN and infinity for others."""
_LAYERS = {"act_layer": get_act_layer, "norm_layer": get_norm_layer, "embed_norm_layer": get_norm_layer}


class _PoolError(ValueError, AssertionError):
    """A pooling that a model does not have, for which code written for timm's models expects an AssertionError."""


def need(ok: object, what: str, **values: Any) -> None:
    """Refuse arguments.

    Args:
        ok: Whether they fit.
        what: What is allowed.
        **values: The arguments by name.

    Raises:
        ValueError: ``got a=1 and b=2, need ...`` if they do not.
    """
    if not ok:
        given = " and ".join(f"{name}={_short(value)}" for name, value in values.items())
        raise (_PoolError if "global_pool" in values else ValueError)(f"got {given}, need {what}")


def checked(**ranges: Bounds) -> Callable[[_Function], _Function]:
    """Decorator of a constructor, method or function that refuses wrong arguments before it runs.

    Checked are the annotations ``bool``, ``int``, ``float``, ``str``, ``dict``, ``Literal``, tuples and sequences of
    these, and unions; numbers of NumPy and PyTorch count as such.  Others are left to the function.

    Args:
        **ranges: Ranges, or choices, of arguments where they differ from those of the name.

    Returns:
        The decorator.
    """

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checking(*args: Any, **kwargs: Any) -> Any:
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:
                return function(*args, **kwargs)  # Python's own message
            check_arguments(function, given, **ranges)
            return function(*args, **kwargs)

        return checking  # type: ignore[return-value]

    return decorate


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any], **ranges: Bounds) -> None:
    """Check arguments that are about to be given to a function or class.

    Args:
        function: It; names that it does not know are left to it.
        arguments: The arguments by name.
        **ranges: As in :func:`checked`.

    Raises:
        ValueError: Naming the first argument that is wrong, its value and what is allowed.
    """
    hints = _hints(function)
    for name, value in arguments.items():
        if name not in hints or (name.endswith("_layer") and callable(value)):  # timm takes classes for all names
            continue
        hint, default = hints[name]
        bounds = ranges.get(name) or RANGES.get(name)
        if not _fits(value, hint, name, bounds, empty=default == ()):
            huge = _number(value, operator.index) is not None and abs(value) >= TOO_LARGE
            need(False, _words(hint, name, bounds) + (" and below 2**63" if huge else ""), **{name: value})
        if isinstance(value, str) and name in _LAYERS:
            _check_layer(name, value)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Annotation and default of the arguments that are checked."""
    made = function.__init__ if isinstance(function, type) else function  # type: ignore[misc]
    hints, found = get_type_hints(made), {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = hints.get(name, Any)
        # a model is checked by who takes it; Python 3.10 takes tuple[int, int] for a class
        plain = get_origin(hint) is not None or not isinstance(hint, type) or hint in (bool, int, float, str, dict)
        named = parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if plain and named and hint is not Any and name not in ("device", "dtype"):
            found[name] = (hint, parameter.default)
    return found


def _number(value: Any, convert: Callable[[Any], Any]) -> Any:
    """The value as a number, or None if it is none."""
    try:
        return None if isinstance(value, (str, bytes, bool)) else convert(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None


def is_sequence(value: Any) -> bool:
    """Whether a value is a list of others: a tuple, a list, a vector of NumPy or PyTorch."""
    if isinstance(value, (str, bytes)):
        return False
    return isinstance(value, Sequence) or (hasattr(value, "__array__") and getattr(value, "ndim", 0) == 1)


def _range(hint: Any, name: str, bounds: Bounds | None) -> Bounds:
    if bounds is not None:
        return bounds
    if hint is float:
        return RATE if "drop" in name else ANY
    return COUNT


def _fits(value: Any, hint: Any, name: str, bounds: Bounds | None, empty: bool = False) -> bool:
    """Whether a value is of an annotated type and in the range of its name."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part, name, bounds, empty) for part in parts)
    if origin is Literal:
        return any(type(value) is not bool and value == part for part in parts if type(part) is not bool)
    if hint is Any:
        return True
    if hint is type(None):
        return value is None
    if hint is bool:
        return type(value).__name__ in ("bool", "bool_") or _number(value, operator.index) in (0, 1)
    if hint is int:
        whole = _number(value, operator.index)
        return whole is not None and abs(whole) < TOO_LARGE and whole in _range(hint, name, bounds)
    if hint is float:
        number = _number(value, float)
        return number is not None and math.isfinite(number) and number in _range(hint, name, bounds)
    if hint is str:
        return isinstance(value, str) and (isinstance(bounds, Range) or bounds is None or value in bounds)
    if origin is tuple and ... not in parts:
        fixed = is_sequence(value) and len(value) == len(parts)
        return fixed and all(_fits(v, part, name, bounds) for v, part in zip(value, parts, strict=True))
    if isinstance(origin, type) and issubclass(origin, (Sequence, tuple)):
        return is_sequence(value) and (empty or len(value) > 0) and all(_fits(v, parts[0], name, bounds) for v in value)
    kind = origin or hint
    if isinstance(kind, type) and kind not in (type, Callable):
        return isinstance(value, kind)
    return callable(value)


def _words(hint: Any, name: str, bounds: Bounds | None, many: bool = False) -> str:
    """What :func:`_fits` accepts."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part, name, bounds, many) for part in parts))
    if origin is Literal:
        return _either(map(repr, parts))
    if hint is type(None):
        return "None"
    if hint is bool:
        return "True or False"
    if hint in (int, str) and type(bounds) is tuple:
        return _either(map(repr, bounds))
    if hint in (int, float):
        bounds = _range(hint, name, bounds)
        what = "whole number" if hint is int else "number" if str(bounds) else "finite number"
        return f"{what}s{bounds}" if many else f"a {what}{bounds}"
    if hint is str:
        return "strings" if many else "a string"
    if origin is tuple and ... not in parts:
        return f"{len(parts)} {_words(parts[0], name, bounds, many=True)}"
    if isinstance(origin, type) and issubclass(origin, (Sequence, tuple)):
        return f"{'lists' if many else 'a list'} of {_words(parts[0], name, bounds, many=True)}"
    kind = origin or hint
    return f"a {kind.__name__}" if isinstance(kind, type) and kind not in (type, Callable) else "a callable"


def _short(value: Any) -> str:
    """A value on one line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 200 else " ".join(reprlib.repr(value).split())


def _either(words: Iterable[str]) -> str:
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def _check_layer(name: str, value: str) -> None:
    try:
        _LAYERS[name](value)
    except (AssertionError, KeyError, ValueError):
        need(False, "a name that timm knows, such as 'relu' or 'layernorm2d', or a class", **{name: value})


def check_names(given: Iterable[str], allowed: Iterable[str], what: str) -> None:
    """Refuse unknown names of arguments.

    Args:
        given: Names.
        allowed: Those that exist.
        what: Whose arguments they are.

    Raises:
        ValueError: Naming the first unknown one, and all that exist.
    """
    known = sorted(allowed)
    for name in given:
        if name not in known:
            raise ValueError(f"got argument {name!r}, which {what} does not take; need one of {', '.join(known)}")


def check_multiple(factor: int = 1, **values: int) -> None:
    """Check that the first of two whole numbers is a multiple of the second, times ``factor``."""
    (name, value), (of, count) = values.items()
    times = f"{factor} * " if factor > 1 else ""
    need(count > 0 and value % (factor * count) == 0, f"{name} to be a multiple of {times}{of}", **values)


def check_heads(dims: Sequence[int], heads: Sequence[int], **values: Any) -> None:
    """Check that the channels of each stage are a multiple of its heads; ``values`` are the arguments they are from."""
    fits = all(count > 0 and dim % count == 0 for dim, count in zip(dims, heads, strict=True))
    need(fits, f"heads that divide the channels of their stages, {', '.join(map(str, dims))}", **values)


def check_counts(count: int, **values: Sequence[Any]) -> None:
    """Check that each of some sequences has ``count`` entries, one for each stage."""
    for name, value in values.items():
        need(len(value) == count, f"{count} numbers, one for each stage", **{name: value})


def check_lengths(**values: Sequence[Any]) -> None:
    """Check that sequences are as long as each other."""
    (count, *others) = map(len, values.values())
    need(all(other == count for other in others), "as many of one as of the other", **values)


def check_stages(count: int, **values: Sequence[int]) -> None:
    """Check that each of some sequences holds stages of ``count``, counted from 0."""
    for name, value in values.items():
        need(all(i in range(count) for i in value), f"stages from 0 to {count - 1}", **{name: tuple(value)})


def check_positions(count: int, **values: Sequence[int]) -> None:
    """Check that sequences hold different positions in a list of ``count``; negative ones count from the end."""
    for name, value in values.items():
        found = [_number(i, operator.index) for i in value] if is_sequence(value) else []
        inside = bool(found) and all(i is not None and -count <= i < count for i in found)
        different = inside and len({i % count for i in found}) == len(found)
        need(different, f"different numbers from {-count} to {count - 1}", **{name: value})


def check_indices(count: int, out_indices: int | Sequence[int]) -> None:
    """Check which of ``count`` features are asked for: the last ones by their number, or a list of positions."""
    last = _number(out_indices, operator.index)
    if last is None:
        check_positions(count, out_indices=out_indices)  # type: ignore[arg-type]
    else:
        need(1 <= last <= count, f"1 to {count} of the last features, or a list of some", out_indices=out_indices)


def check_patches(img_size: int | Sequence[int], patch_size: int | Sequence[int]) -> None:
    """Check that an image holds a patch, both given by their side, or height and width."""
    fits = all(i >= p >= 1 for i, p in zip(to_2tuple(img_size), to_2tuple(patch_size), strict=True))
    need(fits, "images of at least one patch", img_size=img_size, patch_size=patch_size)


def check_model_name(**names: str) -> None:
    """Check that timm knows a model, and suggest others if not."""
    for argument, name in names.items():
        plain = name.partition(".")[0]
        if ":" not in name and not timm.is_model(plain):
            near = difflib.get_close_matches(plain, timm.list_models(), n=3) or ["see timm.list_models()"]
            raise ValueError(f"got {argument}={name!r}, which timm does not know; near: {', '.join(near)}")


def scaled(dim: int, **ratio: float) -> int:
    """``int(dim * ratio)``, which must be a channel at least."""
    ((name, value),) = ratio.items()
    hidden = int(dim * value)
    need(hidden > 0, f"a ratio that leaves one of {dim} channels", **{name: value})
    return hidden
