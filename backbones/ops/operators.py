"""Operators of ours as PyTorch sees them: one call each for autograd, ``torch.compile`` and profilers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("vizoo", "FRAGMENT")
BODIES: dict[str, Callable[..., Any]] = {}  # what each operator runs, by its qualified name


def operator(body: Callable[..., Any]) -> Any:
    """Define ``vizoo::<name>`` on every device, by a function that changes no argument and returns no view of one.

    ``torch.library.custom_op`` does the same and checks that promise at every call, which costs as much as all else
    that the host does for it, 2 to 3 us; here ``torch.library.opcheck`` checks it in tests.

    Args:
        body: Called ``_<name>``; its annotations are the operator's schema.

    Returns:
        The operator, for ``torch.library.register_fake`` and ``register_autograd``.
    """
    name = body.__name__.lstrip("_")
    _LIBRARY.define(name + torch.library.infer_schema(body, mutates_args=()), tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, body, "CompositeExplicitAutograd")
    BODIES[f"vizoo::{name}"] = body
    return getattr(torch.ops.vizoo, name).default
