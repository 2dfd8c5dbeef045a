"""The scripts of examples/ do what they say, on a few small pictures and with the smallest models."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import onnx
import pytest
import shapes
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(FOLDER.glob("*.py"))
SMALL = ["--model", "test_litv2", "--no-pretrained"]


def run(name: str, *words: object) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([str(word) for word in words])


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of bright and dark pictures."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 8), ("val", 3)):
        for k, name in enumerate(("bright", "dark")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([k, i, count]).integers(0, 100, (40, 48, 3)) + 120 * (1 - k)
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def values(pattern: str, text: str) -> list[float]:
    """The numbers of all places that fit."""
    return [float(found) for found in re.findall(pattern, text)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_is_short_and_explained(path: Path) -> None:
    """At most 60 lines; the command of the docstring is that of README.md, where each script has one."""
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    (command,) = re.findall(r"^    (python examples/.*)$", text, re.MULTILINE)
    assert f"\n{command}\n" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_every_command_has_a_script() -> None:
    named = re.findall(r"^python examples/(\w+)\.py", (FOLDER / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == [path.stem for path in SCRIPTS]


def test_finetune(folder, capsys) -> None:
    run("finetune", "--data", folder, *SMALL, "--epochs", 6, "--workers", 0)
    out = capsys.readouterr().out
    losses = values(r"loss (\S+),", out)
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert values(r"accuracy (\S+) %", out)[-1] == 100
    names: dict = {"timm": timm}
    exec(out.splitlines()[-1], names)  # the printed line loads the weights
    assert names["model"].get_classifier().out_features == 2


def test_retrieval(folder, capsys) -> None:
    query = folder / "train" / "dark" / "3.png"
    run("retrieval", "--data", folder, "--query", query, *SMALL, "--top", 4)
    found = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert (found[0][1], float(found[0][0])) == (str(query), pytest.approx(1, abs=1e-4))
    assert len({name for _, name in found}) == 4
    assert all(Path(name).parent.name == "dark" for _, name in found)
    assert [x for x, _ in found] == sorted((x for x, _ in found), reverse=True)


def test_detector(tmp_path, capsys) -> None:
    root = shapes.write(tmp_path / "shapes")
    (root / "images" / "training").rename(root / "train2017")
    (root / "annotations" / "instances_training.json").rename(root / "annotations" / "instances_train2017.json")
    show = root / "train2017" / "0.png"
    run("detector", "--data", root, "--show", show, *SMALL, "--steps", 8, "--size", 64)
    out = capsys.readouterr().out
    losses = values(r"loss (\S+)", out)
    assert len(losses) == 8
    assert sum(losses[-3:]) < sum(losses[:3])
    assert Image.open("detections.png").size == Image.open(show).size


def test_lora(folder, tmp_path, capsys) -> None:
    run("lora", "--data", folder, *SMALL, "--epochs", 4)
    out = capsys.readouterr().out
    losses = values(r": loss (\S+)", out)
    assert losses[-1] < losses[0]
    assert values(r"differs by (\S+)", out) == [0]
    kept = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    assert all("lora_" in name or "head.fc" in name for name in kept)
    assert any(value.abs().sum() > 0 for name, value in kept.items() if "lora_B" in name)


def test_custom_head(tmp_path, capsys) -> None:
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (2, 2, 3)).astype(np.uint8)
        image = Image.fromarray(pixels).resize((60, 50), Image.Resampling.BICUBIC)
        for name, picture in (("images", image), ("targets", image.convert("L"))):
            (tmp_path / name).mkdir(exist_ok=True)
            picture.save(tmp_path / name / f"{i}.png")
    run("custom_head", "--data", tmp_path, *SMALL, "--steps", 8)
    losses = values(r"error (\S+)", capsys.readouterr().out)
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert Image.open("prediction.png").size == (224, 224)


def test_export(tmp_path, capsys) -> None:
    run("export", "--model", "test_resnet", "--no-pretrained", "--size", 64, "--num-classes", 3)
    differences = values(r"difference (\S+)", capsys.readouterr().out)
    assert len(differences) == 2
    assert max(differences) < 1e-5
    inputs = onnx.load(tmp_path / "exported.onnx").graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in inputs] == [0, 3, 64, 64]  # 0: any
    assert torch.export.load(tmp_path / "exported.pt2").module()(torch.randn(9, 3, 64, 64)).shape == (9, 3)
