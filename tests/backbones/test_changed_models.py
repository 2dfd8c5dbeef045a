"""A model of the zoo is a real module: what people do to its layers takes part, in every mode."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from changes import calls, check_calls, check_changed_layers, check_trace, check_transforms, owners
from timm.models.vision_transformer import VisionTransformer
from tolerance import close
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from zoo import KINDS, build, each_kind, gradients, sample, shallow

from vizoo.tools.profiler import count

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),  # a trace is made for one size
]
LAYERS = (nn.Linear, nn.Conv2d)


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LAYERS)}


class Adapter(nn.Module):
    """A layer as peft wraps it: it shows the weight and bias of the layer inside."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gain = nn.Parameter(torch.zeros(()))

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        return out + self.gain * out


# every layer is called


@each_kind
def test_every_layer_is_called(name: str) -> None:
    """As often in training as in evaluation and without gradients."""
    model = build(name)
    x = sample(model, batch=2)
    found = check_calls(model, lambda m: m(x))
    again = any(family in name for family in ("ninformer", "transnext", "moh_vit"))  # one norm; tokens and pooled ones
    twice = 2 if isinstance(model, VisionTransformer) or again else 1  # tokens and prompts
    assert max(found.values()) <= twice


@each_kind
def test_watched_by_all(name: str) -> None:
    """A hook on all modules, as counters and profilers set it, sees every layer too."""
    model = build(name)
    x, seen = sample(model), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(module))
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
    assert seen.issuperset(owners(model).values())


@each_kind
def test_wrapped_layers(name: str) -> None:
    """Adapters around every layer get a gradient, and take part without gradients."""
    model = build(name)
    x = sample(model, batch=2)
    with torch.no_grad():
        before = model(x)
    for path, layer in layers(model).items():
        model.set_submodule(path, Adapter(layer))
    close(model(x), before, "rerun")
    adapters = [m for m in model.modules() if isinstance(m, Adapter)]
    model(x).square().sum().backward()
    assert not [a for a in adapters if a.gain.grad is None]
    with torch.no_grad():
        for adapter in adapters:
            adapter.gain.fill_(0.1)
        expected = torch.enable_grad()(model)(x)
        assert not torch.allclose(expected, before)
        close(model(x), expected.detach(), "rerun")


@each_kind
def test_one_wrapped_layer(name: str) -> None:
    """Among plain ones, with nothing but a ``forward`` of its own: no attribute of the layer inside is needed."""
    model = build(name)
    x = sample(model, side=64)
    with torch.no_grad():
        expected = model(x)
        for path, layer in layers(model).items():
            model.set_submodule(path, nn.Sequential(layer))
            close(model(x), expected, "rerun", path)
            model.set_submodule(path, layer)


@each_kind
def test_patched_layers(name: str) -> None:
    """A ``forward`` put on one layer is what runs."""
    model = build(name)
    x, used = sample(model, batch=2), set()

    def patch(path: str, layer: nn.Module) -> None:
        original = layer.forward

        def forward(*args: Tensor) -> Tensor:
            used.add(path)
            return original(*args)

        layer.forward = forward  # type: ignore[method-assign]

    for path, layer in layers(model).items():
        patch(path, layer)
    for training, recorded in ((True, True), (False, True), (False, False)):
        used.clear()
        with torch.set_grad_enabled(recorded):
            model.train(training)(x)
        assert used == layers(model).keys()


@each_kind
def test_changed_layers(name: str) -> None:
    """Pruning, int8, offloading and LoRA."""
    model = build(name)
    x = sample(model, batch=2)
    check_changed_layers(model, lambda m: m(x), x)


@each_kind
def test_lora_trains(name: str) -> None:
    """Every adapter of peft gets a gradient, and merging is exact."""
    peft = pytest.importorskip("peft")
    model = build(name)
    x = sample(model, batch=2)
    config = peft.LoraConfig(target_modules="all-linear", init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    adapted(x).square().sum().backward()
    mine = {n: p for n, p in adapted.named_parameters() if "lora_" in n}
    assert mine
    assert not [n for n, p in mine.items() if p.grad is None or not p.grad.any()]
    with torch.no_grad():
        close(adapted.merge_and_unload().eval()(x), adapted.eval()(x), "rerun", "merged")


@each_kind
def test_torchao(name: str) -> None:
    """int8 weights, and int8 activations too, stay within a fifth of the largest logit."""
    quantization = pytest.importorskip("torchao.quantization")
    model = build(name)
    x = sample(model, batch=2)
    with torch.no_grad():
        expected = model(x)
        for config in (
            quantization.Int8WeightOnlyConfig(),
            quantization.Int8DynamicActivationInt8WeightConfig(),
        ):
            changed = copy.deepcopy(model)
            quantization.quantize_(changed, config)
            assert (changed(x) - expected).abs().max() < 0.2 * expected.abs().max()


@each_kind
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_weights_made_anew(name: str) -> None:
    """Pruned and weight-normed models train on, and answer with the weights that were loaded last."""
    model = build(name, drop_path_rate=0.0)
    x = sample(model, batch=2)

    def change(model: nn.Module, amount: float) -> nn.Module:
        for i, layer in enumerate(layers(model).values()):
            if i % 2 and type(layer) in LAYERS and layer.weight.any():  # zeros have no direction
                nn.utils.weight_norm(layer)
            else:
                prune.l1_unstructured(layer, "weight", amount)
        return model

    first, second = change(copy.deepcopy(model), 0.3), change(model, 0.1)
    optimizer = torch.optim.SGD(first.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        first.train()(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        second(x)
        second.load_state_dict(first.state_dict())
        close(second.eval()(x), first.eval()(x), "same")


@each_kind
def test_nothing_outlives_its_weights(name: str) -> None:
    """Updates that no version counter shows are seen at once."""
    model = build(name)
    x = sample(model, batch=2)
    with torch.no_grad():
        model(x)
        for p in model.parameters():
            p.data.mul_(0.9)
        fresh = copy.deepcopy(model)
        close(model(x), fresh(x), "same")
    with torch.inference_mode():
        close(model(x), fresh(x), "rerun")


# other ways to run


@each_kind
def test_training_without_gradients(name: str) -> None:
    """Training mode is training mode: outputs, what is dropped and running statistics."""
    model = build(name, drop_path_rate=0.3).train()
    twin, x = copy.deepcopy(model), sample(model, batch=4)
    torch.manual_seed(1)
    expected = model(x).detach()
    torch.manual_seed(1)
    with torch.no_grad():
        close(twin(x), expected, "rerun")
    for (key, found), buffer in zip(twin.named_buffers(), model.buffers(), strict=True):
        close(found, buffer, "rerun", key)


@each_kind
def test_transforms(name: str) -> None:
    """``torch.func``, forward mode and second derivatives."""
    model = build(name)
    check_transforms(model, lambda call, x: call(x), sample(model, side=64, batch=2))


@each_kind
def test_no_tangent_is_lost(name: str) -> None:
    """Forward mode under ``no_grad``, where inference operators would drop the tangent."""
    model = build(name)
    x = sample(model)
    with torch.no_grad():
        _, found = torch.func.jvp(model, (x,), (x,))
    close(found, torch.func.jvp(model, (x,), (x,))[1], "gradient")
    assert found.abs().max() > 0


@each_kind
def test_default_trace(name: str) -> None:
    model = shallow(name)
    check_trace(model, sample(model))


LOAD = """
import sys, torch
for path in sys.argv[1:]:
    x, y = torch.load(path + ".pt")
    found = torch.jit.load(path)(x)
    assert torch.allclose(found, y, rtol=1e-4, atol=1e-5), path
assert not [m for m in sys.modules if m.split(".")[0] in ("timm", "vizoo")]
"""


def test_traces_need_no_vizoo(tmp_path: Path) -> None:
    """Traces without gradients, where inference has paths of its own, answer as the model, also in another process."""
    paths = []
    for name in KINDS:
        model = shallow(name)
        x = sample(model)
        paths.append(str(tmp_path / name))
        with torch.no_grad():
            traced, expected = torch.jit.trace(model, x, check_trace=False), model(x)
            close(traced(x), expected, "graph", name)
        traced.save(paths[-1])
        torch.save((x, expected), f"{paths[-1]}.pt")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *paths], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr


@each_kind
@pytest.mark.parametrize("without", ["statistics", "affine"])
def test_bare_batch_norms(name: str, without: str) -> None:
    """Norms that take the statistics of the batch, or have no parameters, give the same without gradients."""
    model = build(name)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        if without == "affine":
            norm.weight = norm.bias = None  # type: ignore[assignment]
        else:
            norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    x = sample(model, batch=3)
    with torch.no_grad():
        close(model(x), torch.enable_grad()(model)(x).detach(), "rerun")


@each_kind
def test_empty_batch(name: str) -> None:
    model = build(name)
    x = sample(model)[:0]
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded):
            assert model(x).shape == (0, model.num_classes)
    if not any(isinstance(m, nn.BatchNorm2d) for m in model.modules()):  # which need a value of each channel
        model.train()(x).sum().backward()


@each_kind
def test_deterministic_algorithms(name: str) -> None:
    model = build(name)
    x = sample(model, batch=2)
    torch.use_deterministic_algorithms(True)  # it fills new memory with NaN, too
    try:
        model.train()(x).square().mean().backward()
        with torch.no_grad():
            assert model.eval()(x).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)
    gradients(model)


class DispatchCounter(TorchDispatchMode):
    """FLOPs of every operator that runs, by PyTorch's own table."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


@each_kind
def test_flop_counters(name: str) -> None:
    """Counters by dispatch and by hooks see what ours sees, with and without gradients."""
    model = build(name)
    x = sample(model)
    expected = 2 * count(model, x).macs
    for recorded in (True, False):
        with torch.set_grad_enabled(recorded), FlopCounterMode(display=False) as counter:
            model(x)
        assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)
    with torch.no_grad(), DispatchCounter() as dispatch:
        model(x)
    merged = 0.5 if "overlock" in name else 0.9  # merged branches, and prompts that are no products, cost less
    assert merged * expected < dispatch.flops < 1.001 * expected


@each_kind
def test_counters_by_hooks(name: str) -> None:
    """What ptflops, thop and torchinfo count: the layers, as often as they run, in any mode."""
    model = build(name)
    x, found = sample(model), []

    def hook(layer: Any, args: tuple[Tensor], out: Tensor) -> None:
        found.append(out.numel() * (layer.weight.numel() // layer.weight.shape[0]))

    for layer in layers(model).values():
        layer.register_forward_hook(hook)
    model(x)
    expected = sum(found)
    found.clear()
    with torch.no_grad():
        model(x)
    assert sum(found) == expected
    assert 0.6 < expected / count(build(name), x).macs <= 1  # the rest is attention


# layers of ours


def test_subclasses_of_layers_keep_their_constructor() -> None:
    """Tools build a layer anew by ``type(layer)(in, out, ...)``."""
    import inspect

    for name in KINDS:
        for layer in build(name, device="meta").modules():
            base = next((b for b in type(layer).__mro__ if b.__module__.startswith("torch.nn.modules")), nn.Module)
            if type(layer).__module__.startswith("vizoo.") and base not in (nn.Module, nn.Sequential):
                assert inspect.signature(type(layer)) == inspect.signature(base), type(layer)


def test_changed_geometry() -> None:
    """A layer of the same class and another geometry is not taken for the one that was built."""
    litv2, halo = build("test_litv2"), build("test_halonet")
    ffn = litv2.stages[0].blocks[0].mlp
    ffn.dwconv = nn.Conv2d(ffn.dwconv.in_channels, ffn.dwconv.out_channels, 5, padding=2)
    attention = next(m for m in halo.modules() if hasattr(m, "kv"))
    attention.kv = nn.Conv2d(attention.kv.in_channels, attention.kv.out_channels, 3, padding=1)
    mobile = build("test_ulsam")
    ulsam = next(m for m in mobile.modules() if hasattr(m, "conv_point"))
    ulsam.conv_point = nn.Conv2d(ulsam.conv_point.in_channels, ulsam.conv_point.out_channels, 3, padding=1)
    overlock = build("test_overlock")
    block = overlock.sub_blocks3[0]
    block.mlp[0] = nn.Conv2d(block.mlp[0].in_channels, block.mlp[0].out_channels, 3, padding=1)
    block.lepe[0].lk_origin.dilation = (2, 2)
    block.lepe[0].lk_origin.padding = tuple(2 * p for p in block.lepe[0].lk_origin.padding)
    block.weight_proj.bias = None
    for model in (litv2, halo, mobile, overlock):
        x = sample(model, batch=2)
        expected = model(x).detach()
        with torch.no_grad():
            close(model(x), expected, "rerun")


def test_chunks_call_a_layer_once() -> None:
    """Images worked on a few at a time: not where somebody counts the calls."""
    model = build("test_overlock")
    x = torch.randn(8, 3, 256, 256)
    with torch.no_grad():
        expected = model(x)
        assert set(calls(model, lambda m: m(x)).values()) == {1}
        close(model(x), expected, "same")


@pytest.mark.parametrize("name", ["test_litv2", "test_nat"])
def test_pt2e_quantization(name: str) -> None:
    """Export, calibrate and convert by torchao's flow."""
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    quantizers = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model = build(name)
    x = sample(model, batch=2)
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,)).module()
        quantizer = quantizers.X86InductorQuantizer()
        quantizer.set_global(quantizers.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(program, quantizer)
        prepared(x)
        found = pt2e.convert_pt2e(prepared)(x)
    assert (found - expected).abs().max() < 0.2 * expected.abs().max()


def test_features_of_inner_layers() -> None:
    """Grad-CAM: a hook on an inner layer gets activations with a gradient, without gradients of the parameters too."""
    for name in KINDS:
        model = build(name).requires_grad_(False)
        block = next(m for n, m in model.named_modules() if n.count(".") >= 1 and list(m.children()))
        kept: list[Tensor] = []
        block.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        model(sample(model).requires_grad_()).amax().backward(inputs=None)
        assert isinstance(kept[0], Tensor), name
        assert kept[0].requires_grad, name


def test_forward_mode_leaves_no_trace() -> None:
    """After a transform the fast path runs again."""
    from vizoo.backbones.ops.backend import is_transforming

    model = timm.create_model("test_litv2").eval()
    torch.func.jvp(model, (sample(model),), (sample(model),))
    assert not is_transforming()
