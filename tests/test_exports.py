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
from zoo import BACKWARD, build, each_kind, gradients, sample

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


@pytest.mark.slow
@each_kind
def test_onnx(name: str, tmp_path: Path) -> None:
    """ONNX Runtime agrees, at the exported batch size and at another."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, path = build(name, exportable=True), tmp_path / "model.onnx"
    x, larger = sample(model, batch=2), sample(model, batch=3)
    with torch.no_grad():
        torch.onnx.export(
            model, (x,), path, dynamo=True, input_names=["x"], output_names=["y"], dynamic_shapes=({0: "batch"},)
        )
    onnx.checker.check_model(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        for images in (x, larger):
            (got,) = session.run(None, {"x": images.numpy()})
            close(torch.from_numpy(got), model(images), "runtime")
