"""What people do to a model (hook, adapt, prune, offload, differentiate and trace it) and what must hold then."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import close
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import prune

Run = Callable[[nn.Module], Any]


def owners(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that has parameters of its own."""
    return {name: m for name, m in model.named_modules() if list(m.parameters(recurse=False))}


def calls(model: nn.Module, run: Run) -> Counter[str]:
    """How often each module with parameters of its own is called by ``run(model)``."""
    found: Counter[str] = Counter()

    def count(name: str) -> Callable[..., None]:
        return lambda *_: found.update([name])

    handles = [m.register_forward_hook(count(name)) for name, m in owners(model).items()]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def check_calls(model: nn.Module, run: Run) -> Counter[str]:
    """Every module with parameters is called, as often without gradients and in training as in evaluation."""
    expected = calls(model.eval(), run)
    assert expected.keys() == owners(model).keys()
    with torch.no_grad():
        assert calls(model, run) == expected
    assert calls(model.train(), run) == expected
    model.eval()
    return expected


def check_changed_layers(model: nn.Module, run: Callable[[nn.Module], Tensor], x: Tensor) -> None:
    """Pruned, offloaded, quantised and adapted layers take part.

    Args:
        model: Model in evaluation mode.
        run: Its output, from the model alone.
        x: The input that ``run`` gives it, without which LoRA has nothing to follow.
    """
    with torch.no_grad():
        plain = run(model)
    pruned, by_hand = copy.deepcopy(model), copy.deepcopy(model)
    for name, layer in owners(model).items():
        for kind, p in list(layer.named_parameters(recurse=False)):
            if p.numel() > 1 and kind.endswith(("weight", "bias", "keys", "prompts")):
                target = pruned.get_submodule(name)
                prune.random_unstructured(target, kind, 0.3)
                with torch.no_grad():  # as an optimizer does: only a call makes the weight anew
                    original, mask = target.get_parameter(f"{kind}_orig"), target.get_buffer(f"{kind}_mask")
                    by_hand.get_submodule(name).get_parameter(kind).copy_(original.mul_(0.9) * mask)
    with torch.no_grad():
        close(run(pruned), run(by_hand), "rerun", "pruned")
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, torch.qint8)
    linear = [n for n, m in model.named_modules() if type(m) is nn.Linear]
    assert not [n for n in linear if type(quantised.get_submodule(n)) is nn.Linear]
    with torch.no_grad():
        assert (run(quantised) - plain).norm() < 0.1 * plain.norm()
        assert not torch.equal(run(quantised), plain)
    accelerate = pytest.importorskip("accelerate")
    offloaded = accelerate.cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    with torch.no_grad():
        close(run(offloaded), plain, "rerun", "offloaded")
    peft = pytest.importorskip("peft")
    adapted = peft.inject_adapter_in_model(
        peft.LoraConfig(target_modules=linear, init_lora_weights=False), copy.deepcopy(model)
    )
    with torch.no_grad():
        out = run(adapted)
        assert not torch.allclose(out, plain)
        for module in adapted.modules():
            if isinstance(module, peft.tuners.lora.Linear):
                module.merge()
        close(out, run(adapted), "rerun", "merged")


def check_transforms(model: nn.Module, forward: Callable[..., Tensor], x: Tensor) -> None:
    """Transforms of ``torch.func`` and second derivatives, one against the other, in float64.

    Args:
        model: Model without randomness; it is changed to float64.
        forward: ``forward(call, x)`` gives an output for each of the inputs ``x``, where ``call`` stands for the model.
        x: Floating inputs.
    """
    model, x = model.double(), x.double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    along = {name: torch.randn_like(p) for name, p in parameters.items()}
    direction = torch.randn_like(x)

    def out(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return forward(lambda *args, **kwargs: functional_call(model, p, args, kwargs), x)

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return out(p, x).square().sum()

    def autograd(x: Tensor) -> dict[str, Tensor]:
        found = torch.autograd.grad(forward(model, x).square().sum(), list(model.parameters()), allow_unused=True)
        return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}

    expected = autograd(x)
    for name, g in grad(loss)(parameters, x).items():
        close(g, expected[name], "gradient", f"func.grad {name}")
    each = vmap(grad(lambda p, one: loss(p, one[None])), (None, 0))(parameters, x)
    for i in range(len(x)):
        expected = autograd(x[i : i + 1])
        for name, g in each.items():
            close(g[i], expected[name], "gradient", f"vmap(grad) {name}")
    close(vmap(lambda one: out(parameters, one[None])[0])(x), out(parameters, x), "rerun", "vmap")
    leaves = [*model.parameters(), x.requires_grad_()]
    y = forward(model, x)
    pull = torch.zeros_like(y, requires_grad=True)  # gradients are linear in it, with the tangents as derivatives
    pulled = torch.autograd.grad(y, leaves, pull, create_graph=True, allow_unused=True, materialize_grads=True)
    total = sum((g * t).sum() for g, t in zip(pulled, [*along.values(), direction], strict=True))
    _, tangent = jvp(out, (parameters, x.detach()), (along, direction))
    close(tangent, torch.autograd.grad(total, pull)[0], "gradient", "jvp")

    first = torch.autograd.grad(forward(model, x).square().sum(), leaves, create_graph=True, materialize_grads=True)
    total = sum((g * t).sum() for g, t in zip(first, [*along.values(), direction], strict=True))
    second = torch.autograd.grad(total, leaves, materialize_grads=True)
    _, (forward_p, forward_x) = jvp(grad(loss, (0, 1)), (parameters, x.detach()), (along, direction))
    for name, g, expected in zip([*along, "x"], second, [*forward_p.values(), forward_x], strict=True):
        close(g, expected, "gradient", f"second derivative, {name}")


def check_trace(model: nn.Module, *inputs: Tensor) -> None:
    """The default trace, with its check and gradients on, has operators of PyTorch only and is exact."""
    traced = torch.jit.trace(model, inputs)
    kinds = {node.kind().partition("::")[0] for node in traced.inlined_graph.nodes()}
    assert kinds <= {"aten", "prim", "torchvision"}, kinds
    with torch.no_grad():
        for args in (inputs, tuple(x.flip(0) for x in inputs)):
            close(traced(*args), model(*args), "graph")


class Wrapper(nn.Module):
    """A module around a backbone, as scripted detectors have."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor):
        """Two maps."""
        return self.net.forward_intermediates(x, indices=[0, 2], intermediates_only=True)


def check_script_inside(model: nn.Module, x: Tensor) -> torch.jit.ScriptModule:
    """The features of a model script as part of another module, which is returned."""
    wrapper = Wrapper(model)
    scripted = torch.jit.script(wrapper)
    with torch.no_grad():
        for got, expected in zip(scripted(x), wrapper(x), strict=True):
            close(got, expected, "graph")
    return scripted
