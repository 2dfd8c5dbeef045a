"""What makes a layer another one than its class says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import prune

from vizoo.backbones.layers.plain import is_plain


def test_plain_layers() -> None:
    """Everything that makes a layer another one than its class says."""
    layer = nn.Linear(3, 4)

    def changed(change: Callable[[nn.Linear], Any]) -> bool:
        other = nn.Linear(3, 4)
        change(other)
        return is_plain(other, nn.Linear)

    assert is_plain(layer, nn.Linear)
    assert is_plain(layer, nn.Conv2d, nn.Linear)
    assert not is_plain(layer, nn.Conv2d)
    assert not is_plain(type("Mine", (nn.Linear,), {})(3, 4), nn.Linear)
    assert not changed(lambda m: m.register_forward_hook(print))
    assert not changed(lambda m: m.register_forward_pre_hook(print))
    assert not changed(lambda m: m.register_full_backward_hook(print))
    assert not changed(lambda m: m.register_full_backward_pre_hook(print))
    assert not changed(lambda m: setattr(m, "forward", m.forward))
    assert not changed(lambda m: prune.l1_unstructured(m, "bias", 0.5))
    assert not changed(lambda m: nn.utils.parametrizations.weight_norm(m))
    assert not changed(lambda m: setattr(m, "weight", nn.Parameter(m.weight.as_subclass(type("T", (Tensor,), {})))))
