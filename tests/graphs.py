"""Programs as ``torch.compile`` sees them."""

from collections.abc import Callable
from typing import Any

import torch


def compiled(f: Callable[..., Any], *args: Any) -> tuple[list[str], Any]:
    """What the one graph of a function calls, in order, and what the function gives, compiled for these arguments."""
    names: list[str] = []

    def look(graph: Any, given: Any) -> Any:
        names.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch._dynamo.reset()
    out = torch.compile(f, backend=look, fullgraph=True)(*args)
    return names, out
