"""Evaluation: the figures against counts by hand, runs and checkpoints, pictures, bad input."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset

from vizoo.tools import cli
from vizoo.tools.evaluation.classification import LARGEST_MATRIX, draw_confusion, figures


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Dark and bright images; three splits of different sizes."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 5), ("test", 3)):
        for k, name in enumerate(("bright", "dark")):
            (root / split / name).mkdir(parents=True)
            for i in range(count + k):
                pixels = np.random.default_rng([k, i]).integers(0, 100, (20, 24, 3)) + 120 * (1 - k)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs")
    words = ["train", "--data", str(folder), "--model", "test_resnet", "--epochs", "2", "-b", "8", "--workers", "0"]
    words += ["--img-size", "32", "--lr", "0.05", "--output", str(out), "--experiment", "run"]
    assert cli.main(words) == 0
    return out / "run"


def evaluate(*words, out: Path | None = None):
    assert cli.main(["evaluate", *map(str, words), *(["--out", str(out)] if out else [])]) == 0
    return json.loads(out.read_text()) if out else None


def test_figures_by_hand():
    """Five images of three of four classes; nothing is called class 3 and nothing is class 2."""
    calls, target = torch.tensor([0, 0, 1, 2, 1]), torch.tensor([0, 1, 1, 3, 1])
    logits = torch.nn.functional.one_hot(calls, 4).float()
    loader = DataLoader(TensorDataset(logits, target), batch_size=2)
    found = figures(torch.nn.Identity(), loader, torch.device("cpu"), ["a", "b", "c", "d"])
    assert found["images"] == 5
    assert found["top1"] == pytest.approx(60)
    assert found["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-6)
    assert found["confusion"] == [[1, 0, 0, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert found["classes"] == [
        {"name": "a", "images": 1, "sensitivity": 100.0, "ppv": 50.0},
        {"name": "b", "images": 3, "sensitivity": pytest.approx(200 / 3), "ppv": 100.0},
        {"name": "c", "images": 0, "sensitivity": None, "ppv": 0.0},
        {"name": "d", "images": 1, "sensitivity": 0.0, "ppv": None},
    ]


def test_run_gives_what_training_measured(trained, tmp_path, capsys):
    found = evaluate(trained, "--plot", tmp_path / "c.png", out=tmp_path / "r.json")
    best = torch.load(trained / "model_best.pth.tar", weights_only=True)
    assert found["top1"] == pytest.approx(best["metric"])
    assert (found["model"], found["input"], found["images"]) == ("test_resnet", "3x32x32", 11)
    assert [c["name"] for c in found["classes"]] == ["bright", "dark"]
    out = capsys.readouterr().out
    assert f"accuracy {found['top1']:.2f} %" in out
    assert "PPV" in out
    with Image.open(tmp_path / "c.png") as image:
        assert len(image.convert("RGB").getcolors(10**6)) > 20


@pytest.mark.parametrize("model", ["test_vit", "test_vit_tcpa"])
def test_prompts_of_a_run_are_built_again(model, folder, tmp_path):
    words = ["train", "--data", str(folder), "--model", model, "--epochs", "1", "-b", "8", "--workers", "0", "--tune"]
    words += ["tcpa", "--model-kwargs", "depth=2", "--warmup-epochs", "0"]
    assert cli.main([*words, "--img-size", "32", "--output", str(tmp_path), "--experiment", "run"]) == 0
    found = evaluate(tmp_path / "run", out=tmp_path / "r.json")
    best = torch.load(tmp_path / "run" / "model_best.pth.tar", weights_only=True)
    assert any("prompt" in name for name in best["state_dict"])
    assert found["top1"] == pytest.approx(best["metric"])


def test_other_split_checkpoint_and_batch_size(trained, folder, tmp_path):
    found = evaluate(trained, "--split", "test", "-b", "2", out=tmp_path / "a.json")
    assert [c["images"] for c in found["classes"]] == [3, 4]
    words = ["--model", "test_resnet", "--checkpoint", trained / "model_best.pth.tar", "--img-size", "32"]
    same = evaluate(*words, "--data", folder, "--split", "test", "-j", "0", out=tmp_path / "b.json")
    assert same["confusion"] == found["confusion"]
    assert same["loss"] == pytest.approx(found["loss"], rel=1e-5)


def test_more_outputs_than_classes(folder, tmp_path):
    """A classifier of ten classes on a folder of two: the other eight can only be wrong."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    words = ["--model", "test_resnet", "--checkpoint", tmp_path / "m.pth", "--num-classes", "10", "--img-size", "32"]
    found = evaluate(*words, "--data", folder, "-j", "0", "--plot", tmp_path / "c.png", out=tmp_path / "r.json")
    assert np.array(found["confusion"]).shape == (10, 10)
    assert len(found["classes"]) == 2
    assert found["images"] == 11


def test_digits(tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "m.pth")
    words = ["--model", "test_resnet", "--checkpoint", tmp_path / "m.pth", "--data", "digits"]
    found = evaluate(*words, out=tmp_path / "r.json")
    assert found["images"] == 360
    assert sum(sum(row) for row in found["confusion"]) == 360


def test_some_digits(tmp_path, capsys):
    """A run on some classes is measured on these; so is a checkpoint, where they are named."""
    words = ["train", "--data", "digits", "--only-classes", "3", "8", "--model", "test_resnet", "--epochs", "1"]
    assert cli.main([*words, "--output", str(tmp_path), "--experiment", "run"]) == 0
    found = evaluate(tmp_path / "run", out=tmp_path / "a.json")
    assert [c["name"] for c in found["classes"]] == ["3", "8"]
    words = ["--model", "test_resnet", "--checkpoint", tmp_path / "run" / "model_best.pth.tar", "--data", "digits"]
    same = evaluate(*words, "--only-classes", "8", "3", out=tmp_path / "b.json")
    assert same["confusion"] == found["confusion"]
    capsys.readouterr()
    assert cli.main(["evaluate", *map(str, words)]) == 2
    assert "was trained on 3, 8" in capsys.readouterr().err


def test_picture_of_many_classes(tmp_path):
    n = LARGEST_MATRIX + 5
    result = {"model": "m", "data": "d", "top1": 1.0, "classes": [{"name": f"class {i}"} for i in range(n)]}
    draw_confusion({**result, "confusion": np.eye(n, dtype=int).tolist()}, tmp_path / "c.png")
    with Image.open(tmp_path / "c.png") as image:
        assert min(image.size) > 1000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN or --model is missing"),
        (["{tmp}"], "it holds no args.yaml"),
        (["--model", "test_resnet", "--data", "{data}"], "--checkpoint is missing"),
        (["{run}", "--checkpoint", "/nowhere.pth"], "'/nowhere.pth' does not exist"),
        (["{run}", "--split", "nope"], "has no folder 'nope/'"),
        (["{run}", "--num-classes", "1"], "--num-classes 1 is below the 2 classes"),
        (["{run}", "--num-classes", "7"], "does not fit 'test_resnet'"),
        (["{run}", "--out", "x.txt"], "--out 'x.txt': the ending must be .json"),
        (["{run}", "--plot", "/nowhere/x.png"], "--plot '/nowhere/x.png': no such folder"),
        (["{run}", "--device", "meta"], "holds no values"),
        (["{run}", "--model", "resnet_x"], "unknown model 'resnet_x'"),
        (["{run}", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_bad_input_is_one_line(words, message, trained, folder, tmp_path, capsys):
    words = [w.format(tmp=tmp_path, run=trained, data=folder) for w in words]
    assert cli.main(["evaluate", *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1, err
    assert message in err
