"""Records a golden case from an official model or module: ``python tests/record_golden.py --help``.

The case holds what a test needs to rebuild weights and inputs without the official code: names for what is drawn from
names, numbers for special values, and the tensors themselves for a model's own initialisation.  A seed would not do for
the last: the numbers it gives change with PyTorch and with the order in which a constructor draws them.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import golden
import numpy as np
import torch
from torch import Tensor, nn

GRADIENT_SEED = 7  # of the gradient of the output


class Recipe(NamedTuple):
    """What is fed and kept.

    Attributes:
        draw: For each input its shape, its seed and its kind, as :func:`golden.special` takes them.
        values: Pattern of names in the state dict -> a number, or ``"own"`` for what the constructor made; the last
            that fits counts, and names that fit none are drawn.
        modules: Names of submodules whose outputs are kept too.
        grad: Names of parameters whose gradients are kept, with those of the inputs; None keeps no gradient.
        train: Whether the pass is one in training.
        strides: Name of an output -> a stride for each of its leading dimensions.
    """

    draw: Sequence[tuple[tuple[int, ...], int, str | float]]
    values: dict[str, str | float] = {}  # noqa: RUF012 - never changed
    modules: Sequence[str] = ()
    grad: Sequence[str] | None = None
    train: bool = False
    strides: dict[str, Sequence[int]] = {}  # noqa: RUF012


def known(what: str, wanted: Iterable[str], there: Collection[str]) -> None:
    """Refuse names that are not there."""
    for name in wanted:
        if name not in there:
            some = ", ".join([*there][:5]) or "none"
            raise ValueError(f"got {what} {name!r}, need one of the {len(there)} there are: {some}")


def keys_of(state: dict[str, Tensor], values: dict[str, str | float]) -> dict[str, list]:
    """What :func:`golden.weights` takes for a state dict and the recipe's values."""
    keys: dict[str, list] = {name: [list(t.shape), str(t.dtype)] for name, t in state.items()}
    for pattern, value in values.items():
        fitting = [name for name in keys if fnmatchcase(name, pattern)]
        known("a value for", [] if fitting else [pattern], keys)
        for name in fitting:
            keys[name][2:] = [state[name].detach().clone() if value == "own" else float(value)]
    return keys


def named(out: Any, name: str = "out") -> dict[str, Tensor]:
    """The tensors of an output: ``out``, ``out_0`` and so on of a sequence, the keys of a dict."""
    if isinstance(out, Tensor):
        return {name: out}
    if isinstance(out, dict):
        parts = [(str(k) if name == "out" else f"{name}_{k}", v) for k, v in out.items()]
    elif isinstance(out, Sequence) and not isinstance(out, str):
        parts = [(f"{name}_{i}", v) for i, v in enumerate(out)]
    elif out is None:
        return {}
    else:
        raise ValueError(f"got {type(out).__name__} as {name}, need tensors in sequences and dicts")
    return {k: t for part, value in parts for k, t in named(value, part).items()}


@contextmanager
def watched(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of submodules in a pass; each must be called once."""
    found: dict[str, Tensor] = {}
    calls = dict.fromkeys(names, 0)
    modules = dict(model.named_modules())
    known("module", names, modules)

    def keep(name: str, out: Any) -> None:
        calls[name] += 1
        found.update({k: t.clone() for k, t in named(out, name).items()})  # a later layer may work in place

    hooks = [modules[n].register_forward_hook(lambda _, __, out, n=n: keep(n, out)) for n in names]
    yield found
    for hook in hooks:
        hook.remove()
    for name, times in calls.items():
        if times != 1:
            raise ValueError(f"got module {name!r}, which is called {times} times; need one call")


def outputs_of(model: nn.Module, state: dict[str, Tensor], recipe: Recipe) -> dict[str, Tensor]:
    """All recorded tensors of one pass from given weights, thinned."""
    model.load_state_dict(state)
    model.train(recipe.train)
    given = [golden.special(*entry).requires_grad_(recipe.grad is not None) for entry in recipe.draw]
    with torch.set_grad_enabled(recipe.grad is not None), watched(model, recipe.modules) as found:
        out = model(*given)
    parts = [named(out), found, {} if recipe.grad is None else gradients(model, out, given, recipe.grad)]
    found = {name: t for part in parts for name, t in part.items()}
    if len(found) < sum(map(len, parts)):
        raise ValueError(f"got an output and a module of one name, need different ones: {', '.join(found)}")
    known("strides for", recipe.strides, found)
    for name, strides in recipe.strides.items():
        if len(strides) > found[name].dim():
            raise ValueError(f"got {len(strides)} strides for {name} {list(found[name].shape)}, need at most one each")
    return {name: golden.thin(t.detach(), recipe.strides.get(name, ())).contiguous() for name, t in found.items()}


def gradients(model: nn.Module, out: Any, given: list[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Gradients as :func:`tolerance.golden_gradients` reads them: ``grad_input``, ``grad_input_1``, ``grad_NAME``."""
    if not isinstance(out, Tensor):
        raise ValueError(f"got {type(out).__name__} as output, need one tensor for gradients")
    parameters = dict(model.named_parameters())
    known("parameter", names, parameters)
    leaves = {f"input_{i}" if i else "input": x for i, x in enumerate(given)}
    leaves |= {name: parameters[name] for name in names}
    given_back = golden.image(tuple(out.shape), GRADIENT_SEED).to(out)
    found = torch.autograd.grad(out, list(leaves.values()), given_back, allow_unused=True)
    if unread := [name for name, g in zip(leaves, found, strict=True) if g is None]:
        raise ValueError(f"got no gradient of {unread[0]}, need a tensor that the output depends on")
    return {f"grad_{name.replace('.', '_')}": g for name, g in zip(leaves, found, strict=True)}


def checked(found: dict[str, Tensor], again: dict[str, Tensor]) -> None:
    """Refuse what no test could reproduce."""
    if not found:
        raise ValueError("got no output, need a tensor")
    for name, value in found.items():
        if name in golden.FIELDS or name.startswith(golden.STATE):
            raise ValueError(f"got an output named {name!r}, need one that is not {', '.join(golden.FIELDS)}")
        if not torch.isfinite(value).all():
            raise ValueError(f"got {name} with infinite or undefined values, need finite ones")
        if not torch.equal(value, again[name]):
            raise ValueError(f"got {name} that differs between two passes, need a model without chance")


def array(value: Tensor) -> np.ndarray:
    """For NumPy, which has no bfloat16."""
    return (value.float() if value.dtype in (torch.bfloat16, torch.float16) else value).cpu().numpy()


def write(path: Path, keys: dict[str, list], meta: dict[str, Any], found: dict[str, Tensor]) -> None:
    """Write a case as a whole or not at all."""
    stored = {name: entry[2] for name, entry in keys.items() if isinstance(entry[-1], Tensor)}
    entries = {name: [*entry[:2], "stored"] if name in stored else entry for name, entry in keys.items()}
    fields = {"keys": json.dumps(entries), "meta": json.dumps(meta), "input_shape": np.asarray(meta["draw"][0][0])}
    tensors = {**{golden.STATE + name: t for name, t in stored.items()}, **found}
    arrays = {name: array(t) for name, t in tensors.items()}
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, **fields, **arrays)
        size = unfinished.stat().st_size
        if size > golden.LARGEST:
            name = max(arrays, key=lambda k: arrays[k].nbytes)
            way = "a smaller model or drawn weights" if name.startswith(golden.STATE) else "strides"
            most = f"{name} {list(arrays[name].shape)}"
            raise ValueError(f"got {size >> 10} KiB, need at most {golden.LARGEST >> 10}; most is {most}: take {way}")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def record(
    name: str,
    build: Callable[[], nn.Module],
    recipe: Recipe,
    meta: dict[str, Any],
    seed: int = 0,
    folder: Path = golden.FOLDER,
    overwrite: bool = False,
) -> Path:
    """Record one case.

    Args:
        name: Of the file, without suffix.
        build: Makes the official model or module.
        recipe: What is fed and kept.
        meta: Origin and arguments, in words for people and for the test.
        seed: Of the constructor's own initialisation.
        folder: Where the file goes.
        overwrite: Whether an existing file is replaced.

    Returns:
        The file's path.

    Raises:
        ValueError: If an argument does not fit the model, the file exists, its size is over ``golden.LARGEST``, or no
            test could reproduce the outputs.
    """
    path = folder / f"{name}.npz"
    if path.parent != folder:
        raise ValueError(f"got name {name!r}, need one without folders")
    if path.exists() and not overwrite:
        raise ValueError(f"got {path.name}, which exists; need another name or overwrite")
    torch.manual_seed(seed)
    model = build()
    keys = keys_of(model.state_dict(), recipe.values)
    state = golden.weights(keys)
    found = outputs_of(model, state, recipe)
    checked(found, outputs_of(model, state, recipe))
    mode = "train" if recipe.train else "eval"
    write(path, keys, {**meta, "mode": mode, "draw": list(recipe.draw), "strides": dict(recipe.strides)}, found)
    return path


# the command


def literal(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def pairs(words: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` words as a dict."""
    split = [word.partition("=") for word in words]
    if wrong := [name for name, equals, _ in split if not equals]:
        raise ValueError(f"got {wrong[0]!r}, need NAME=VALUE")
    return {name: literal(value) for name, _, value in split}


def found_callable(checkout: Path | None, call: str) -> Callable[..., nn.Module]:
    """The function or class ``module:name`` of a checkout."""
    if checkout is not None:
        if not checkout.is_dir():
            raise ValueError(f"got checkout {checkout}, need a folder")
        sys.path.insert(0, str(checkout))
    module, _, name = call.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as e:
        raise ValueError(f"got {call!r}, need MODULE:NAME that can be imported: {e}") from e


def zoo_callable(name: str) -> Callable[..., nn.Module]:
    """What makes a model of timm or of the zoo."""
    import timm

    import vizoo  # noqa: F401 - registers the zoo

    if not timm.is_model(name):
        raise ValueError(f"got --model {name}, need a name of timm or of the zoo")
    return partial(timm.create_model, name)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Record the outputs of an official model as tests/golden/NAME.npz.")
    add = parser.add_argument
    add("name", help="name of the case")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--call", metavar="MODULE:NAME", help="function or class that makes the official model")
    source.add_argument("--model", metavar="NAME", help="a name of timm or of the zoo instead")
    add("--checkout", type=Path, help="folder of the official repository from which MODULE is imported")
    add("--kwargs", nargs="+", default=[], metavar="NAME=VALUE", help="arguments of the constructor")
    add("--origin", required=True, help="repository and commit, as in 'github.com/ziplab/LITv2 7501c86'")
    add("--notes", default="", help="what was replaced or left out to run the official code")
    add("--input", nargs="+", type=int, action="append", required=True, metavar="N", help="shape; once for each input")
    add("--seed", type=int, default=0, help="seed of the first input, each further one has the next; and of the model")
    add("--special", default="normal", help="values of the inputs: normal, large, tiny, impulse, or a number")
    add(
        "--set",
        nargs="+",
        default=[],
        metavar="PATTERN=VALUE",
        help="weights that are not drawn from their names: a number fills them, 'own' keeps what the constructor made "
        "('*=own': all)",
    )
    add("--outputs", nargs="+", default=[], metavar="MODULE", help="submodules whose outputs are kept too")
    add("--grad", nargs="*", metavar="PARAMETER", help="keep the gradients of the inputs and of these parameters")
    add("--train", action="store_true", help="a pass in training")
    add("--strides", nargs="+", default=[], metavar="OUTPUT=A,B,..", help="keep every a-th, b-th .. entry of an output")
    add("--overwrite", action="store_true", help="replace an existing case")
    return parser


def recipe_of(args: argparse.Namespace) -> Recipe:
    """The recipe of a command line."""
    kind = literal(args.special)
    if kind not in (*golden.SCALES, "impulse") and not isinstance(kind, (int, float)):
        raise ValueError(f"got --special {args.special}, need {', '.join(golden.SCALES)}, impulse or a number")
    values = pairs(args.set)
    if wrong := [v for v in values.values() if v != "own" and not isinstance(v, (int, float))]:
        raise ValueError(f"got --set to {wrong[0]!r}, need a number or own")
    strides = {name: value if isinstance(value, tuple) else (value,) for name, value in pairs(args.strides).items()}
    if wrong := [v for v in strides.values() if not all(isinstance(n, int) and n > 0 for n in v)]:
        raise ValueError(f"got strides {wrong[0]}, need whole numbers of at least 1, as in out=1,8,4,4")
    draw = [(tuple(shape), args.seed + i, kind) for i, shape in enumerate(args.input)]
    return Recipe(draw, values, args.outputs, args.grad, args.train, strides)


def main(argv: Sequence[str] | None = None, folder: Path = golden.FOLDER) -> int:
    """Run the command."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        kwargs = pairs(args.kwargs)
        build = found_callable(args.checkout, args.call) if args.call is not None else zoo_callable(args.model)
        meta = {"source": args.origin, "call": args.call or args.model, "kwargs": kwargs, "notes": args.notes}
        path = record(args.name, partial(build, **kwargs), recipe_of(args), meta, args.seed, folder, args.overwrite)
    except ValueError as e:
        parser.error(str(e))
    print(f"{path.name}, {path.stat().st_size >> 10} KiB: {', '.join(golden.load(path).outputs)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
