"""Models in files: exported programs and TorchScript.

Such a file is a program, which runs when the model is called; reading it runs nothing of Python in it.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import functools
import pickle
import warnings
import zipfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from vizoo.tools.common import UserError, check_file, named, short
from vizoo.tools.profiling.recording import tensors_in

SIZES = (torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, torch.sym_not, torch.sym_ite)
FORMULA = (  # parts of arithmetic
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp, ast.Compare,
    ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


def read_exported(file: str) -> tuple[nn.Module, tuple[Any, ...] | None]:
    """Read what ``torch.export.save`` wrote.

    Args:
        file: A file ``.pt2``.

    Returns:
        The module, and the inputs that it was exported with; None if the file has none.

    Raises:
        UserError: If it is no such file, holds pickled objects, or calls what is no operator.
    """
    check_file(file, "model file")
    try:
        with _no_code():
            program = torch.export.load(file)
        _check_calls(program.graph_module, file)
        net = program.module()
    except UserError:
        raise
    except Exception as e:  # whatever a broken archive makes it raise
        raise UserError(f"model file {file!r} is no exported program that can be read safely: {named(e)}") from e
    args, kwargs = program.example_inputs or (None, None)
    if kwargs:
        raise UserError(
            f"model file {file!r} takes inputs by name ({', '.join(kwargs)}): export it with positional ones"
        )
    batches = _batches(program)
    if any(isinstance(batch, int) for batch in batches):
        net.register_forward_pre_hook(functools.partial(_check_batch, batches, file))
    return net, tree_map_only(Tensor, lambda t: t[:1], args) if batches and all(b is None for b in batches) else args


def _batches(program: Any) -> list[int | None]:
    """First sides of the inputs of a program that are tensors with any; None for one that may change."""
    inputs = set(program.graph_signature.user_inputs)
    made = [n.meta.get("val") for n in program.graph.nodes if n.op == "placeholder" and n.name in inputs]
    sides = [t.shape[0] for t in made if isinstance(t, Tensor) and t.dim()]
    return [side if isinstance(side, int) else None for side in sides]


def _check_batch(batches: list[int | None], file: str, net: nn.Module, args: Any) -> None:
    given = [t.shape[0] for t in tensors_in(args) if t.dim()]
    for batch, n in zip(batches, given, strict=False):
        if batch not in (None, n):
            raise ValueError(f"{file} is exported for a batch of {batch}, got {n}: export it with dynamic_shapes")


@contextlib.contextmanager
def _no_code() -> Iterator[None]:
    """Reading of archives without what may run code: pickles of whole objects, and text that sympy would evaluate."""
    import sympy

    load, sympify = torch.load, sympy.sympify

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise pickle.UnpicklingError("it holds pickled objects")

    def safe_load(*args: Any, **kwargs: Any) -> Any:
        return load(*args, **{**kwargs, "weights_only": True})

    def safe_sympify(text: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(text, str) and not _is_formula(text):
            raise ValueError(f"a size of {short(text)}")
        return sympify(text, *args, **kwargs)

    with (
        mock.patch.object(torch, "load", safe_load),
        mock.patch.object(pickle, "loads", refuse),
        mock.patch.object(sympy, "sympify", safe_sympify),
    ):
        yield


def _is_formula(text: str) -> bool:
    """Whether text is arithmetic of symbols and functions of sympy, which reach nothing of Python."""
    try:
        nodes = list(ast.walk(ast.parse(text, mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    names = [n.id for n in nodes if isinstance(n, ast.Name)]
    names += [n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    plain = all(name.isidentifier() and "__" not in name and not hasattr(builtins, name) for name in names)
    return plain and all(isinstance(n, FORMULA) for n in nodes)


def _check_calls(graph: torch.fx.GraphModule, file: str) -> None:
    """Refuse a program that calls any other function of Python than operators and arithmetic of sizes."""
    for part in graph.modules():
        for node in part.graph.nodes if isinstance(part, torch.fx.GraphModule) else ():
            operator = isinstance(node.target, torch._ops.OpOverload | torch._ops.HigherOrderOperator)
            module = getattr(node.target, "__module__", "")
            simple = module in ("_operator", "math") or node.target in SIZES
            if node.op == "call_function" and not operator and not simple:
                raise UserError(f"model file {file!r} calls {short(str(node.target))}, which is no operator of PyTorch")


def read_script(file: str) -> nn.Module:
    """Read what ``torch.jit.save`` wrote.

    Args:
        file: A file ``.pt``, ``.pth`` or ``.ts``.

    Returns:
        The module, on the CPU.

    Raises:
        UserError: If it is no such file: a checkpoint, which holds weights only, or anything else.
    """
    check_file(file, "model file")
    names = []
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
    if "constants.pkl" not in names:
        what = "holds no program: give its model by name and a checkpoint of weights by --weights"
        raise UserError(f"model file {file!r} is not TorchScript and {what}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of TorchScript, which is what was given
            net: nn.Module = torch.jit.load(file, map_location="cpu")
        return net
    except Exception as e:  # whatever a broken archive makes it raise
        raise UserError(f"model file {file!r} cannot be read: {named(e)}") from e
