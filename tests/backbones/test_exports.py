"""The contract of timm over every registered model: script, fx, compile, export, ONNX."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from timm.layers import create_feature_extractor, get_graph_node_names
from tolerance import close
from torch._dynamo.testing import CompileCounterWithBackend
from zoo import BACKWARD, build, each_kind, gradients, is_fixed, sample, shallow

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
    """One graph without a break for every batch: of inference, and of training forward and backward."""
    model = shallow(name, drop_path_rate=0.0).train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for batch in (2, 3):
        x = sample(model, batch=batch)
        torch._dynamo.mark_dynamic(x, 0)
        with torch.set_grad_enabled(training):
            out, expected = compiled(x), model(x)
        close(out, expected, "layout")
        if training:
            out.mean().backward()
            gradients(model)
    assert counter.frame_count == 1


@each_kind
def test_export(name: str) -> None:
    """A program with a dynamic batch, before and after saving."""
    model = shallow(name)
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
def test_any_size(name: str, tmp_path: Path) -> None:
    """One program for every batch, height and width, in PyTorch and ONNX Runtime.

    Those of OverLoCK hold from the size of its windows on.
    """
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    fixed, path = is_fixed(build(name, device="meta")), tmp_path / "model.onnx"
    model = shallow(name, exportable=True, **({"dynamic_img_size": True} if fixed else {}))
    sizes = [(2, 96, 96), (3, 64, 128)]
    if "overlock" in name:
        sizes = [(2, 224, 256), (3, 288, 224), (1, 231, 299)]
    if "dependencyvit" in name or "flowformer" in name:  # positions that count, resampled up and down and not at all
        sizes = [(2, 96, 128), (1, 96, 96), (3, 64, 160), (2, 101, 135), (2, 224, 224), (1, 32, 32)]
        torch.nn.init.normal_(getattr(model.pos_embed, "weight", model.pos_embed))
    images = [torch.randn(batch, 3, height, width) for batch, height, width in sizes]
    free = ({0: "batch", 2: "height", 3: "width"},)
    with torch.no_grad():
        made = torch.onnx.export(model, (images[0],), input_names=["x"], dynamo=True, dynamic_shapes=free)
        made.save(path)
        onnx.checker.check_model(path)
        program = made.exported_program.module()
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for x in images:
            expected = model(x)
            close(program(x), expected, "graph")
            (got,) = session.run(None, {"x": x.numpy()})
            close(torch.from_numpy(got), expected, "runtime")
