"""The recorder of golden cases: what it writes is replayed exactly, and what cannot be replayed is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import golden
import pytest
import timm
import torch
from golden import inputs, load, thin, weights
from record_golden import GRADIENT_SEED, Recipe, main, record
from timm.layers.halo_attn import HaloAttn
from tolerance import close, golden_close, golden_gradients
from torch import Tensor, nn

DRAW = [((2, 3, 6, 5), 0, "normal")]


class Official(nn.Module):
    """A branch that a special value opens, statistics, and a table that is no weight."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm, self.unread = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.Linear(1, 1)
        self.gamma = nn.Parameter(torch.zeros(1))
        self.register_buffer("order", torch.arange(width).flip(0))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        return (x + self.gamma * x.sin())[:, self.order]


@torch.no_grad()
def replayed(path: Path, model: nn.Module) -> Tensor:
    """The output of a model with the weights and inputs of a case."""
    case = load(path)
    model.load_state_dict(weights(case.keys))
    model.train(case.meta["mode"] == "train")
    return thin(model(*inputs(case)), case.meta["strides"].get("out", ()))


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(DRAW, {"order": "own"}),
        Recipe(DRAW, {"order": "own"}, train=True, strides={"out": (1, 2, 3)}),
        Recipe(DRAW, {"*": "own", "gamma": 3, "norm.w*": 0.5}),
        *(Recipe([((2, 3, 6, 5), 3, kind)], {"order": "own"}) for kind in ("tiny", "large", "impulse", 0, 1.5)),
    ],
    ids=["drawn", "training, thinned", "own and numbers", "tiny", "large", "impulse", "zeros", "constant"],
)
def test_replay_is_exact(recipe: Recipe, tmp_path: Path) -> None:
    path = record("case", Official, recipe, {"source": "here"}, folder=tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["case.npz"]
    out = replayed(path, Official())
    close(out, load(path).outputs["out"], "same")
    assert out.abs().max() > 0


def test_every_change_is_seen(tmp_path: Path) -> None:
    """A weight, a special value, a table, an input."""
    path = record("case", Official, Recipe(DRAW, {"order": "own", "gamma": 3}), {}, folder=tmp_path)
    case = load(path)
    model, expected = Official().eval(), case.outputs["out"]
    state = weights(case.keys)
    assert float(state["gamma"]) == 3
    assert state["order"].tolist() == [3, 2, 1, 0]
    assert state["order"].dtype == torch.int64
    assert [t.flatten()[0].item() for t in (state["norm.bias"], state["norm.num_batches_tracked"])] != [0, 1]
    for name, value in (("gamma", 0.0), ("order", torch.arange(4)), ("conv.weight", state["conv.weight"] * 1.001)):
        model.load_state_dict({**state, name: torch.zeros_like(state[name]) + value})
        with pytest.raises(AssertionError, match="relative error"):
            golden_close(model(*inputs(case)), expected)
    model.load_state_dict(state)
    golden_close(model(*inputs(case)), expected)
    with pytest.raises(AssertionError, match="relative error"):
        golden_close(model(golden.image(case.input_shape, seed=1)), expected)


def test_special_inputs() -> None:
    shape = (1, 2, 5, 4)
    drawn = golden.image(shape, 3)
    assert torch.equal(golden.special(shape, 3), drawn)
    torch.testing.assert_close(golden.special(shape, 3, "large"), drawn * 1e4)
    tiny = golden.special(shape, 3, "tiny")
    assert 0 < tiny.abs().max() < torch.finfo(torch.float32).tiny
    impulse = golden.special(shape, 3, "impulse")
    assert impulse.nonzero().tolist() == [[0, 1, 2, 2]]
    assert impulse.sum() == 1
    assert (golden.special(shape, 3, -0.5) == -0.5).all()


def test_modules_and_gradients(tmp_path: Path) -> None:
    """Outputs of submodules as they were when they were made, gradients as ``golden_gradients`` reads them."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 1))
    recipe = Recipe(DRAW, {}, ["0"], ["2.weight"], strides={"0": (1, 2)})
    case = load(record("case", lambda: net, recipe, {}, folder=tmp_path))
    assert list(case.outputs) == ["out", "0", "grad_input", "grad_2_weight"]
    assert case.outputs["0"].min() < 0
    assert case.outputs["0"].shape == (2, 2, 6, 5)
    (x,) = inputs(case)
    x.requires_grad_()
    golden_gradients(net(x), {"input": x, "2.weight": net[2].weight}, case.outputs, GRADIENT_SEED)


class Parts(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> dict:
        return {"main": x, "all": [y > 0, (x * 2, None)]}


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    draw = [((2, 3), 0, "normal"), ((4,), 1, "normal")]
    case = load(record("case", Parts, Recipe(draw), {}, folder=tmp_path))
    assert case.input_shape == (2, 3)
    x, y = inputs(case)
    close(x, golden.image((2, 3)), "same")
    close(y, golden.image((4,), seed=1), "same")
    assert list(case.outputs) == ["main", "all_0", "all_1_0"]
    assert torch.equal(case.outputs["all_0"], y > 0)


def test_stored_case_comes_again(tmp_path: Path) -> None:
    """A case that is in the repository: names, shapes, drawn weights, outputs."""
    stored = load("haloattn_stride2")
    recipe = Recipe([(stored.input_shape, 0, "normal")])
    again = load(record("case", lambda: HaloAttn(**stored.meta["kwargs"]), recipe, {}, folder=tmp_path))
    assert again.keys == stored.keys
    assert again.input_shape == stored.input_shape
    state = weights(stored.keys)
    for name, value in weights(again.keys).items():
        close(value, state[name], "same", name)
    golden_close(again.outputs["out"], stored.outputs["out"])


@pytest.mark.parametrize(
    ("build", "recipe", "message"),
    [
        (Official, Recipe(DRAW, {"orde": "own"}), "got a value for 'orde', need one of the 11 there are: gamma, "),
        (Official, Recipe(DRAW, modules=["nrom"]), "got module 'nrom', need one of"),
        (Official, Recipe(DRAW, grad=["gama"]), "got parameter 'gama', need one of"),
        (Official, Recipe(DRAW, grad=["unread.weight"]), "got no gradient of unread.weight"),
        (Official, Recipe(DRAW, modules=["unread"]), "got module 'unread', which is called 0 times"),
        (Official, Recipe(DRAW, strides={"outt": (2,)}), "got strides for 'outt'"),
        (Official, Recipe(DRAW, strides={"out": (1,) * 5}), r"got 5 strides for out \[2, 4, 4, 3\]"),
        (Official, Recipe(DRAW, {"norm.running_var": -1}), "got out with infinite or undefined values"),
        (nn.Dropout, Recipe(DRAW, train=True), "got out that differs between two passes"),
        (nn.Identity, Recipe([((300, 400), 0, "normal")]), r"need at most 300; most is out \[300, 400\]: take strides"),
        (
            lambda: nn.Linear(300, 400),
            Recipe([((1, 300), 0, 0)], {"*": "own"}),
            "take a smaller model or drawn weights",
        ),
        (lambda: nn.LSTM(3, 3), Recipe([((2, 3), 0, "normal")], grad=[]), "got tuple as output, need one tensor"),
    ],
)
def test_refuses(build, recipe: Recipe, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        record("case", build, recipe, {}, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_existing_cases_stay(tmp_path: Path) -> None:
    path = record("case", nn.Identity, Recipe(DRAW), {}, folder=tmp_path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"got case\.npz, which exists"):
        record("case", nn.Identity, Recipe(DRAW), {}, folder=tmp_path)
    assert path.read_bytes() == before
    record("case", nn.Identity, Recipe(DRAW), {}, folder=tmp_path, overwrite=True)
    assert path.read_bytes() == before  # nothing of the day or the machine is in it
    with pytest.raises(ValueError, match="without folders"):
        record("../case", nn.Identity, Recipe(DRAW), {}, folder=tmp_path)


OFFICIAL = """
from torch import nn


def net(width=4, bias=True, norm="batch"):
    return nn.Sequential(nn.Conv2d(3, width, 3, bias=bias), {"batch": nn.BatchNorm2d, "none": nn.Identity}[norm](width))
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Function that runs the command; gives the status and what it said."""
    (tmp_path / "checkout").mkdir()
    (tmp_path / "checkout" / "official_net.py").write_text(OFFICIAL)
    (tmp_path / "golden").mkdir()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "official_net", raising=False)

    start = ["case", "--origin", "here 1234567", "--input", "1", "3", "6", "5"]

    def run(*words: str) -> tuple[int, str]:
        try:
            status = main([*start, *words], tmp_path / "golden")
        except SystemExit as e:
            status = int(e.code or 0)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return run


def test_command(command, tmp_path: Path) -> None:
    call = ("--checkout", str(tmp_path / "checkout"), "--call", "official_net:net")
    words = ("--kwargs", "width=6", "norm=batch", "--set", "1.weight=0.25", "--seed", "5", "--notes", "nothing changed")
    assert command(*call, *words, "--strides", "out=1,2", "--outputs", "0") == (0, "case.npz, 1 KiB: out, 0\n")
    path = tmp_path / "golden" / "case.npz"
    case = load(path)
    assert case.meta == {
        "source": "here 1234567",
        "call": "official_net:net",
        "kwargs": {"width": 6, "norm": "batch"},
        "notes": "nothing changed",
        "mode": "eval",
        "draw": [[[1, 3, 6, 5], 5, "normal"]],
        "strides": {"out": [1, 2]},
    }
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6))
    close(replayed(path, net), case.outputs["out"], "same")
    status, text = command(*call)
    assert status == 2
    assert "error: got case.npz, which exists" in text


def test_command_takes_models_by_name(command, tmp_path: Path) -> None:
    """A model of the zoo, replayed from the file alone."""
    assert command("--model", "test_nat", "--kwargs", "num_classes=5", "--special", "impulse")[0] == 0
    path = tmp_path / "golden" / "case.npz"
    close(replayed(path, timm.create_model("test_nat", num_classes=5)), load(path).outputs["out"], "same")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model", "no_such_model"), "got --model no_such_model"),
        (("--call", "no_such_module:net"), "got 'no_such_module:net', need MODULE:NAME that can be imported"),
        (("--call", "torch.nn:NoSuchClass"), "got 'torch.nn:NoSuchClass'"),
        (("--call", ""), "got '', need MODULE:NAME"),
        (("--call", "torch.nn:Identity", "--checkout", "no_such_folder"), "got checkout no_such_folder"),
        (("--call", "torch.nn:Identity", "--kwargs", "width"), "got 'width', need NAME=VALUE"),
        (("--call", "torch.nn:Identity", "--set", "a=x"), "got --set to 'x'"),
        (("--call", "torch.nn:Identity", "--special", "odd"), "got --special odd, need normal, large, tiny, impulse"),
        (("--call", "torch.nn:Identity", "--strides", "out=0"), "got strides (0,)"),
        (("--call", "torch.nn:Identity", "--model", "test_litv2"), "not allowed with"),
        ((), "one of the arguments --call --model is required"),
    ],
)
def test_command_refuses(command, words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    status, text = command(*words)
    assert (status, message in text) == (2, True), text
    assert list((tmp_path / "golden").iterdir()) == []
