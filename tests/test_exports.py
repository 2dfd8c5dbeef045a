"""The contract of timm over every registered model: script, trace, fx, compile, export, ONNX."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.layers import create_feature_extractor, get_graph_node_names
from tolerance import close
from zoo import BACKWARD, build, each_kind, gradients, is_fixed, sample

# timm still promises TorchScript, which torch announces to retire
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def graph_of(model: torch.nn.Module) -> torch.nn.Module:
    """The fx graph of the whole model in its present mode, from image to last node; timm's leaf modules stay whole."""
    train, evaluation = get_graph_node_names(model)
    return create_feature_extractor(model, [(train if model.training else evaluation)[-1]])


def only(output: dict) -> torch.Tensor:
    (value,) = output.values()
    return value


@each_kind
def test_script(name: str) -> None:
    model = build(name, scriptable=True)
    x = sample(model, BACKWARD)
    with torch.no_grad():
        close(torch.jit.script(model)(x), model(x), "graph")


@each_kind
@pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning"
)  # a trace is made for one size: checks of it are constants
def test_trace(name: str) -> None:
    model = build(name)
    x = sample(model)
    with torch.no_grad():
        close(torch.jit.trace(model, x, check_trace=False)(x), model(x), "graph")


@each_kind
def test_fx(name: str) -> None:
    """torchvision's symbolic trace: values, and the traced graph scripts."""
    model = build(name, scriptable=True)
    x = sample(model)
    graph = graph_of(model).eval()
    with torch.no_grad():
        expected = model(x)
        close(only(graph(x)), expected, "graph")
        close(only(torch.jit.script(graph)(x)), expected, "graph", "scripted")


@each_kind
def test_fx_gradients(name: str) -> None:
    """A graph traced in training mode trains every parameter, as the model does."""
    model = build(name, drop_path_rate=0.0).train()
    graph, x = graph_of(copy.deepcopy(model)).train(), sample(model, BACKWARD, batch=2)
    only(graph(x)).mean().backward()
    model(x).mean().backward()
    expected = gradients(model)
    for key, gradient in gradients(graph).items():
        close(gradient, expected.pop(key), "gradient", key)
    assert not expected, "the graph lacks parameters"


@each_kind
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_compile(name: str, training: bool) -> None:
    """One graph without a break, forward and backward."""
    model = build(name, drop_path_rate=0.0).train(training)
    x = sample(model, batch=2)
    expected = model(x)
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    close(out, expected, "layout")
    out.mean().backward()
    gradients(model)


@each_kind
def test_export(name: str) -> None:
    """A program with a dynamic batch, before and after saving."""
    model = build(name)
    x, larger = sample(model, batch=2), sample(model, batch=3)
    batch = torch.export.Dim("batch", min=2, max=16)
    stored = io.BytesIO()
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=False)
        torch.export.save(program, stored)
        stored.seek(0)
        for exported in (program.module(), torch.export.load(stored).module()):
            close(exported(x), model(x), "graph")
            close(exported(larger), model(larger), "graph")


FREE = torch.export.Dim.AUTO


def free_sized(name: str) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """A model that takes images of any size, and batches of several sizes, the first as the example."""
    fixed = is_fixed(build(name, device="meta"))
    model = build(name, exportable=True, **({"dynamic_img_size": True} if fixed else {}))
    sizes = [(2, 224, 256), (3, 288, 224), (1, 231, 299)] if "overlock" in name else [(2, 96, 96), (3, 64, 128)]
    return model, [torch.randn(batch, 3, height, width) for batch, height, width in sizes]


@each_kind
def test_export_any_size(name: str) -> None:
    """One program for every batch, height and width; OverLoCK's from the size of its windows on."""
    model, images = free_sized(name)
    with torch.no_grad():
        program = torch.export.export(
            model, (images[0],), dynamic_shapes=({0: FREE, 2: FREE, 3: FREE},), strict=False
        ).module()
        for x in images:
            close(program(x), model(x), "graph")


@pytest.mark.slow
@each_kind
def test_onnx_any_size(name: str, tmp_path: Path) -> None:
    """ONNX Runtime agrees at the exported size and at others."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    (model, images), path = free_sized(name), tmp_path / "model.onnx"
    free = ({0: "batch", 2: "height", 3: "width"},)
    with torch.no_grad():
        torch.onnx.export(
            model, (images[0],), path, dynamo=True, input_names=["x"], output_names=["y"], dynamic_shapes=free
        )
        onnx.checker.check_model(path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for x in images:
            (got,) = session.run(None, {"x": x.numpy()})
            close(torch.from_numpy(got), model(x), "runtime")
