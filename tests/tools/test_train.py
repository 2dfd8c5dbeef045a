"""Training: options, data checks, learning, checkpoints that load, exact resume after any kind of end."""

from __future__ import annotations

import importlib.resources
import itertools
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from runs import Killed, assert_same_run, at_call, die, read, rows, signalled
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from vizoo.backbones.layers import PROMPTS
from vizoo.tools import train as tool
from vizoo.tools.data.folders import digits_splits, held_out_loader, seeded_batches
from vizoo.tools.training import classification
from vizoo.tools.training.classification import Classification, accuracies
from vizoo.tools.training.loop import Loop
from vizoo.tools.training.parsers import TUNES, classifier_parser, parse_classifier
from vizoo.tools.training.run import Saver, draw_curves
from vizoo.tools.training.task import World

pytestmark = pytest.mark.usefixtures("no_curves")
DATA: list[str] = []
DIGITS = ["--data", "digits", "--model", "test_convnext", "-b", "256"]
# everything random at once: dropout, stochastic depth, mixing, erasing, an odd accumulation, a weight average
RANDOM = ["--drop", "0.2", "--drop-path", "0.2", "--mixup", "0.4", "--cutmix", "1", "--reprob", "0.5", "--model-ema"]
RANDOM += ["--model-ema-decay", "0.9", "--grad-accum-steps", "2", "--epochs", "2", "--warmup-epochs", "1"]


def image_folder(root: Path, splits: tuple[str, ...] = ("train", "val"), classes: str = "ab", count: int = 6) -> Path:
    for split in splits:
        for c in classes:
            (root / split / c).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([ord(c), i]).integers(0, 127, (20, 24, 3)) + 64 * (c == "a")
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / c / f"{i}.png")
    return root


@pytest.fixture(autouse=True, scope="module")
def _data(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A folder of 20 training images, which are five batches, and of 12 held-out images."""
    root = image_folder(tmp_path_factory.mktemp("images"), ("train",), count=10)
    recipe = importlib.resources.files("vizoo.configs") / "classification" / "digits_litv2_s.yaml"
    DATA[:] = ["-c", str(recipe), "--data", str(image_folder(root, ("val",))), "--model", "test_convnext", "-b", "4"]


def run(folder: Path, *options: str) -> int:
    return tool.main([*DATA, "--output", str(folder.parent), "--experiment", folder.name, *options])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run with everything random."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert run(folder, *RANDOM) == 0
    return folder


def test_columns_of_a_mixed_run(whole: Path) -> None:
    """No share of right answers in training, where targets are mixed."""
    assert set(rows(whole)[0]) == {"epoch", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"}


@pytest.mark.parametrize(
    ("name", "call"),
    [
        pytest.param("_save", 1, id="before-saving"),
        pytest.param("_duplicate", 1, id="between-last-and-best"),
        pytest.param("_duplicate", 2, id="before-best"),
        pytest.param("drop_recovery", 1, id="before-log"),
    ],
)
def test_run_killed_while_saving_resumes_exactly(whole, tmp_path, monkeypatch, name, call) -> None:
    """The other ends are those of tests/tools/test_tasks.py."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_call(patch, Saver, name, call, die)
        with pytest.raises(Killed):
            run(folder, *RANDOM, "--recovery-interval", "1")
    assert run(folder, *RANDOM, "--resume") == 0
    assert_same_run(whole, folder)


def test_seeds_change_the_run(whole, tmp_path) -> None:
    assert run(tmp_path / "run", *RANDOM, "--seed", "1") == 0
    assert rows(tmp_path / "run") != rows(whole)


def test_best_checkpoint_loads_and_gives_the_reported_accuracy(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    options = [*DIGITS, "--epochs", "3", "--in-chans", "1", "--model-ema", "--model-ema-decay", "0.5"]
    assert tool.main([*options, "--output", str(tmp_path), "--experiment", "run"]) == 0
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith("load it: "))
    names: dict = {}
    exec(line.removeprefix("load it: "), names)  # the printed words really work
    args = parse_classifier([*DIGITS, "--in-chans", "1"])
    data = timm.data.resolve_data_config(vars(args), model=names["model"])
    loader = held_out_loader(args, digits_splits("L").held_out, data, torch.device("cpu"))
    measured = accuracies(names["model"], loader, torch.device("cpu"))
    best = max(float(r["eval_top1"]) for r in rows(folder))
    assert best > 50
    assert measured["top1"] == best
    assert f"best top-1 {best:.2f} % on 360 held-out images" in out


def test_fine_tuning_keeps_the_body_and_replaces_the_head(whole) -> None:
    saved = read(whole / "last.pth.tar")["state_dict_ema"]  # two classes
    model = trainer("--pretrained-path", str(whole / "last.pth.tar")).model  # ten classes
    for name, value in model.state_dict().items():
        assert name.startswith("head.fc.") or torch.equal(value, saved[name]), name
    assert model.get_classifier().out_features == 10


def test_fixed_size_models_get_the_input_size(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--model", "test_vit", "--img-size", "32", "--epochs", "1", "--channels-last") == 0
    out = capsys.readouterr().out
    assert "img_size=(32, 32)" in out
    best = str(folder / "model_best.pth.tar")
    timm.create_model("test_vit", num_classes=2, img_size=(32, 32), checkpoint_path=best)


@pytest.mark.parametrize("sched", [("cosine", True), ("step", False), ("wsd", True)], ids=str)
def test_resumed_learning_rate_follows_the_schedule(tmp_path, monkeypatch, sched) -> None:
    options = ["--epochs", "4", "--sched", sched[0], "--decay-epochs", "1", "--opt", "sgd", "--lr", "0.01"]
    options += ["--sched-on-updates" if sched[1] else "--no-sched-on-updates"]
    assert run(tmp_path / "whole", *options) == 0
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "backward", 13, signalled(signal.SIGINT))
        assert run(tmp_path / "cut", *options) == 130
    assert run(tmp_path / "cut", *options, "--resume") == 0
    lrs = [r["lr"] for r in rows(tmp_path / "whole")]
    assert len(set(lrs)) > 2
    assert [r["lr"] for r in rows(tmp_path / "cut")] == lrs


def test_more_epochs_and_other_options_after_the_end(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--epochs", "1") == 0
    assert run(folder, "--epochs", "1", "--resume") == 0
    assert "all 1 epochs are done already" in capsys.readouterr().out
    assert run(folder, "--epochs", "2", "--resume", "--opt", "sgd", "--no-resume-opt") == 0
    err = capsys.readouterr().err
    assert "epochs 1 -> 2" in err
    assert "opt adamw -> sgd" in err
    assert [r["epoch"] for r in rows(folder)] == ["0", "1"]


def test_resume_from_an_earlier_checkpoint_restores_its_best(tmp_path) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--epochs", "3", "--checkpoint-hist", "3") == 0
    first = folder / "checkpoint-0.pth.tar"
    assert run(folder, "--epochs", "1", "--checkpoint-hist", "3", "--resume", str(first)) == 0
    assert read(folder / "model_best.pth.tar")["epoch"] == 0
    assert read(folder / "last.pth.tar")["epoch"] == 0


def test_resume_without_a_name_finds_the_newest_run(tmp_path, capsys) -> None:
    options = [*DATA, "--output", str(tmp_path), "--epochs", "1"]
    assert tool.main([*options, "--resume"]) == 0
    assert "starting from the beginning" in capsys.readouterr().out
    assert tool.main([*options, "--resume"]) == 0
    assert "all 1 epochs are done" in capsys.readouterr().out
    assert len(list(tmp_path.glob("*-test_convnext-32"))) == 1


ERRORS = {
    "model": (["--model", "test_convnex"], ["test_convnex", "did you mean test_convnext"]),
    "several models": (["--model", "test_convnext*"], ["matches 3 models"]),
    "device": (["--device", "gpu"], ["'gpu'", "allowed: cpu, cuda"]),
    "meta device": (["--device", "meta"], ["'meta'", "allowed: cpu"]),
    "batch size 0": (["-b", "0"], ["--batch-size", "got 0", "at least 1"]),
    "batch too large": (["-b", "1438"], ["--batch-size 1438", "1437"]),
    "odd batch": (["-b", "15", "--mixup", "1"], ["--batch-size 15 is odd"]),
    "epochs 0": (["--epochs", "0"], ["--epochs", "got 0", "at least 1"]),
    "epochs word": (["--epochs", "ten"], ["--epochs", "got ten", "a whole number of at least 1"]),
    "nan": (["--lr", "nan"], ["--lr", "got nan"]),
    "config": (["-c", "no.yaml"], ["--config 'no.yaml' does not exist"]),
    "optimizer": (["--opt", "adamx"], ["adamx", "did you mean", "adam"]),
    "schedule": (["--sched", "cosin"], ["--sched", "cosin", "cosine"]),
    "smoothing": (["--smoothing", "1.5"], ["--smoothing", "between 0 and 1"]),
    "augmentation": (["--aa", "nonsense"], ["--aa nonsense", "rand-m9-mstd0.5-inc1"]),
    "classes": (["--num-classes", "9"], ["--num-classes 9", "10 classes"]),
    "only classes": (["--only-classes", "1", "10"], ["'10' is no class of --data 'digits'", "has 0, 1, 2, 3, 4, ..."]),
    "one class": (["--only-classes", "1", "1"], ["--only-classes names one class, '1'"]),
    "channels": (["--input-size", "2", "32", "32"], ["--input-size 2", "1 or 3"]),
    "mean": (["--mean", "0.1", "0.2"], ["--mean has 2 values"]),
    "interpolation": (["--interpolation", "cubic"], ["'cubic'", "bicubic"]),
    "lr scale": (["--lr-scale", "0.1"], ["PATTERN=FACTOR"]),
    "lr scale match": (["--lr-scale", "x.*=0.1"], ["matches 'x.*'", "stem"]),
    "pretrained path": (["--pretrained-path", "no.pth"], ["'no.pth' does not exist"]),
    "pretrained": (["--model", "test_litv2", "--pretrained"], ["test_litv2", "No pretrained weights"]),
    "initial checkpoint": (["--initial-checkpoint", "no.pth"], ["'no.pth' does not exist"]),
    "resume": (["--resume", "no.pth.tar"], ["--resume 'no.pth.tar' does not exist"]),
    "data": (["--data", "nowhere"], ["'nowhere' is no folder", "digits"]),
    "size": (["--model", "test_vit", "--img-size", "9"], ["'test_vit'", "9"]),
    "tiny size": (["--model", "test_resnet", "--img-size", "2", "-b", "1"], ["'test_resnet'", "2x2", "--batch-size 1"]),
    "unknown": (["--learning-rate", "1"], ["unrecognized arguments: --learning-rate"]),
    "compiler": (["--torchcompile", "nonsense"], ["--torchcompile 'nonsense'"]),
    "output": (["--output", "/dev/null/x"], ["/dev/null/x"]),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_with_status_2(case, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    options, words = ERRORS[case]
    assert tool.main([*DIGITS, "--epochs", "1", *options]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("vizoo train: error: ")
    assert len(err.strip().splitlines()) == 1
    assert not [w for w in words if w not in err], err
    assert "top-1" not in out


def test_resume_refuses_other_models_shapes_and_folders_in_use(tmp_path, capsys) -> None:
    folder = tmp_path / "run"
    assert run(folder, "--epochs", "1") == 0
    capsys.readouterr()
    last = str(folder / "last.pth.tar")
    bare = tmp_path / "bare.pth.tar"
    torch.save(read(folder / "last.pth.tar")["state_dict"], bare)
    half = tmp_path / "half.pth.tar"
    half.write_bytes(bare.read_bytes()[:5000])
    cases = [
        ([], ["holds a run", "--resume"]),
        (["--resume", "--model", "test_vit", "--img-size", "32"], ["'test_convnext'", "'test_vit'"]),
        (["--resume", last, "--num-classes", "11"], ["does not fit the model"]),
        (["--resume", last, "--layer-decay", "0.5"], ["optimizer state does not fit", "--no-resume-opt"]),
        (["--resume", str(bare)], ["no training checkpoint", "--initial-checkpoint"]),
        (["--resume", str(half)], ["cannot read the checkpoint"]),
    ]
    for options, words in cases:
        assert run(folder, "--epochs", "2", *options) == 2
        err = capsys.readouterr().err
        assert len(err.strip().splitlines()) == 1
        assert not [w for w in words if w not in err], err


FOLDER = ["--model", "test_convnext", "--img-size", "32", "-b", "4", "--epochs", "1", "--workers", "0", "--lr", "0.01"]


@pytest.mark.parametrize("held_out", ["val", "validation"])
def test_trains_on_folders(tmp_path, capsys, held_out) -> None:
    data = image_folder(tmp_path / "data", ("train", held_out))
    options = ["--output", str(tmp_path), "--experiment", "run"]
    assert tool.main([*FOLDER, "--data-dir", str(data), *options]) == 0
    out = capsys.readouterr().out
    assert "2 classes, 12 training and 12 held-out images" in out
    assert "num_classes=2" in out
    assert set(rows(tmp_path / "run")[0]) >= {"train_loss", "train_top1", "eval_top1"}


def _drop(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


BAD_DATA = {
    "no val": (lambda d: (d / "val").rename(d / "test"), ["data' has no folder", "'val/'"]),
    "class missing": (lambda d: (d / "val" / "b").rename(d / "val" / "c"), ["only in train/: b", "only in val/: c"]),
    "empty class": (lambda d: _drop(d / "train" / "b"), ["train/b' holds no image"]),
    "broken": (lambda d: (d / "train" / "b" / "2.png").write_bytes(b"no image"), ["train/b/2.png", "cannot read"]),
    "cut off": (
        lambda d: (d / "val" / "a" / "3.png").write_bytes((d / "val" / "a" / "3.png").read_bytes()[:700]),
        ["val/a/3.png", "cannot read"],
    ),
    "stray": (lambda d: (d / "val" / "a" / "3.png").rename(d / "val" / "3.png"), ["val/3.png", "outside any class"]),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data_is_found_before_training(tmp_path, capsys, case) -> None:
    data = image_folder(tmp_path / "data")
    spoil, words = BAD_DATA[case]
    spoil(data)
    assert tool.main([*FOLDER, "--data", str(data), "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert len(err.strip().splitlines()) == 1
    assert not [w for w in words if w not in err], err
    assert not (tmp_path / "out").exists()


def test_data_without_classes_or_with_one(tmp_path, capsys) -> None:
    for root, classes, word in (("none", "", "one folder for each class"), ("one", "a", "holds one class, 'a'")):
        data = image_folder(tmp_path / root, classes=classes)
        for split in ("train", "val"):
            (data / split).mkdir(parents=True, exist_ok=True)
        assert tool.main([*FOLDER, "--data", str(data), "--output", str(tmp_path / "out")]) == 2
        assert word in capsys.readouterr().err


def test_help_says_what_the_recipe_sets() -> None:
    recipe = importlib.resources.files("vizoo.configs") / "classification" / "digits_litv2_s.yaml"
    stored = yaml.safe_load(recipe.read_text())
    notes = {a.dest: re.search(r"digits:? (\S+)\)", a.help or "") for a in classifier_parser()._actions}
    said = {dest: found[1] for dest, found in notes.items() if found}
    assert said == {dest: v if isinstance(v := stored[dest], str) else f"{v:g}" for dest in said}
    assert {"epochs", "opt", "img_size", "workers"} <= said.keys()


def test_only_some_classes(tmp_path, capsys) -> None:
    """Those of a run are kept in its options; what is wrong with the others is of no interest."""
    data = image_folder(tmp_path / "data", classes="abcd")
    (data / "train" / "a" / "0.png").write_bytes(b"no image")
    _drop(data / "val" / "c")
    words = [*FOLDER, "--data", str(data), "--output", str(tmp_path), "--experiment", "run"]
    assert tool.main([*words, "--only-classes", "d", "b"]) == 0
    assert "2 classes, 12 training and 12 held-out images" in capsys.readouterr().out
    stored = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert (stored["classes"], stored["only_classes"]) == (["b", "d"], ["d", "b"])
    assert parse_classifier(["-c", str(tmp_path / "run" / "args.yaml")]).only_classes == ["d", "b"]
    for more, message in (
        (["--resume", "--only-classes", "b", "d", "e"], "'e' is no class of "),
        (["--resume", "--only-classes", "a", "b"], "train/a/0.png"),
        (["--resume", "--only-classes", "b", "c"], "val/c' holds no image"),
    ):
        assert tool.main([*words, *more]) == 2
        assert message in capsys.readouterr().err
    (data / "train" / "a" / "0.png").unlink()
    assert tool.main([*words, "--resume", "--only-classes", "a", "b"]) == 2
    assert "has classes a, b; --resume" in (err := capsys.readouterr().err)
    assert "was trained on b, d" in err
    assert tool.main([*words, "--resume", "--only-classes", "b", "d", "--epochs", "2"]) == 0


def test_check_images_can_be_limited(tmp_path, capsys) -> None:
    data = image_folder(tmp_path / "data")
    file = data / "train" / "a" / "0.png"
    file.write_bytes(file.read_bytes()[:700])  # the header is whole
    options = [*FOLDER, "--data", str(data), "--output", str(tmp_path / "out")]
    assert tool.main([*options, "--check-images", "full"]) == 2
    assert "0.png" in capsys.readouterr().err
    for how in ("header", "none"):
        assert tool.main([*options, "--check-images", how, "--experiment", how]) == 2
        *_, last = capsys.readouterr().err.splitlines()
        assert last == f"vizoo train: error: cannot read image {str(file)!r}: image file is truncated"


def test_options_come_from_recipe_then_config_then_command_line(tmp_path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "epochs: 7\nlr_scale: ['head.*=0.5']\nmodel-ema: true\nmodel_kwargs: {act_layer: relu}\nscale: [1, 1]\n"
    )
    args = parse_classifier(["--data", "digits", "-c", str(config), "--seed", "3", "--lr-scale", "stem.*=2"])
    assert (args.model, args.img_size, args.hflip, args.opt) == ("litv2_s", 32, 0.0, "adamw")  # recipe
    assert (args.epochs, args.model_ema, args.scale, args.model_kwargs) == (7, True, [1.0, 1.0], {"act_layer": "relu"})
    assert args.lr_scale == [("head.*", 0.5), ("stem.*", 2.0)]
    assert parse_classifier(["--data", "digits", "-c", str(config), "--epochs", "2", "--no-model-ema"]).epochs == 2
    assert not parse_classifier(["--data", "digits", "-c", str(config), "--no-model-ema"]).model_ema
    assert parse_classifier(["--data", "x", "--model", "y"]).opt == "sgd"  # no recipe for folders


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("epoch: 3", "unknown option 'epoch', did you mean 'epochs'"),
        ("epochs: 0", "got 0"),
        ("epochs: true", "takes a value"),
        ("amp: 3", "true or false"),
        ("- a", "option: value"),
        ("a: [", "no YAML"),
        ("scale: [1]", "expected 2 arguments"),
    ],
)
def test_bad_config_names_the_file(tmp_path, capsys, text, word) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    assert tool.main([*DIGITS, "-c", str(config)]) == 2
    err = capsys.readouterr().err
    assert "c.yaml" in err
    assert word in err
    assert len(err.strip().splitlines()) == 1


def trainer(*options: str) -> Loop:
    return Loop(Classification(parse_classifier([*DIGITS, *options]), World()))


def test_learning_rates_and_parameter_groups() -> None:
    run = trainer("--lr", "0.1", "--warmup-epochs", "0", "--lr-scale", "stem.*=0.01", "--lr-scale", "*.bias=0")
    names = {id(p): n for n, p in run.model.named_parameters()}
    seen = {}
    for group in run.optimizer.param_groups:
        for p in group["params"]:
            seen[names[id(p)]] = group
    assert seen.keys() == set(names.values())
    for name, group in seen.items():
        scale = 0.0 if name.endswith(".bias") else 0.01 if name.startswith("stem.") else 1.0
        assert group["lr"] == pytest.approx(0.1 * scale), name
        one_dim = run.model.get_parameter(name).ndim <= 1
        assert group["weight_decay"] == (0.0 if one_dim else run.args.weight_decay), name
    assert run.base_lr() == pytest.approx(0.1)
    # square root for adam-like optimizers, linear for the others, over the total batch
    scaled = ["--lr-base", "0.1", "--lr-base-size", "64", "--warmup-epochs", "0"]
    assert trainer(*scaled, "--opt", "adamw").base_lr() == pytest.approx(0.2)
    assert trainer(*scaled, "--opt", "sgd", "--grad-accum-steps", "2").base_lr() == pytest.approx(0.8)
    decayed = trainer("--lr", "0.1", "--layer-decay", "0.5", "--warmup-epochs", "0")
    assert len({g["lr"] for g in decayed.optimizer.param_groups}) > 2
    assert decayed.base_lr() == pytest.approx(0.1)


def test_augmentation_options_reach_the_loader() -> None:
    run = trainer("--vflip", "0.3", "--hflip", "0.2", "--rotate", "5", "--translate", "0.1", "--color-jitter", "0.2")
    text = str(run.task.loader.dataset.transform)
    for word in (
        "VerticalFlip(p=0.3)",
        "HorizontalFlip(p=0.2)",
        "degrees=[-5.0, 5.0]",
        "translate=(0.1, 0.1)",
        "(0.8,",
    ):
        assert word in text, text
    plain = str(trainer("--no-aug").task.loader.dataset.transform)
    assert "Random" not in plain
    more = trainer("--aa", "rand-m3", "--grayscale-prob", "0.1", "--gaussian-blur-prob", "0.1", "--reprob", "0.5")
    text = str(more.task.loader.dataset.transform)
    assert "RandAugment" in text
    assert "Grayscale" in text
    assert "GaussianBlur" in text
    assert more.task.loader.random_erasing.probability == 0.5
    assert "RandomCropOrPad" in str(trainer("--train-crop-mode", "rkrr").task.loader.dataset.transform)


def test_batches_follow_seed_epoch_and_position_only() -> None:
    loader = trainer("--reprob", "0.5").task.loader

    def batches(epoch: int, rank: int = 0, disturb: bool = False) -> list[torch.Tensor]:
        out = []
        for images, _ in seeded_batches(loader, 42, rank, epoch):
            out.append(images)
            if disturb:
                torch.rand(7), np.random.rand(3)  # as dropout or anything else in between would
        return out

    first = batches(0)
    assert len(first) == 5
    assert all(map(torch.equal, first, batches(0, disturb=True)))
    assert not torch.equal(first[0], batches(1)[0])
    assert not torch.equal(first[0], batches(0, rank=1)[0])


def test_digits_split_is_fixed_and_stratified() -> None:
    a, b = digits_splits("L"), digits_splits("RGB")
    assert (len(a.train), len(a.held_out)) == (1437, 360)
    assert np.array_equal(a.held_out.images, b.held_out.images)
    counts = np.bincount(a.held_out.targets)
    assert counts.min() >= 34
    assert counts.max() <= 37
    both = {x.tobytes() for x in a.train.images} & {x.tobytes() for x in a.held_out.images}
    assert not both
    assert a.train[0][0].mode == "L"
    assert b.train[0][0].getextrema()[0][1] == 255


def test_some_digits() -> None:
    """The images of a digit are the same ones in every choice, its number is its place among the chosen."""
    whole, some = digits_splits("L"), digits_splits("L", ["9", "5", "7"])
    assert some.classes == ["5", "7", "9"]
    for part, chosen in zip(whole[:2], some[:2], strict=True):
        for number, digit in enumerate((5, 7, 9)):
            assert np.array_equal(chosen.images[chosen.targets == number], part.images[part.targets == digit])
        assert set(chosen.targets) == {0, 1, 2}


def test_accuracies_by_hand() -> None:
    logits = torch.tensor([[2.0, 0, 0], [0, 1, 0], [0, 3, 0], [0, 0, 1]])
    target = torch.tensor([0, 0, 1, 2])
    loader = DataLoader(TensorDataset(logits, target), batch_size=3)
    seen = []
    device = torch.device("cpu")
    out = accuracies(torch.nn.Identity(), loader, device, on_batch=lambda logits, target: seen.append(len(target)))
    assert out["top1"] == 75.0
    assert out["top5"] == 100.0
    assert out["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), rel=1e-6)
    assert seen == [3, 1]


@pytest.mark.parametrize("epochs", [1, 60])
def test_learning_curves_are_a_picture(tmp_path, epochs) -> None:
    columns = {"train_loss": 2.0, "eval_loss": 1.0, "eval_top1": 90.0}
    history = [{"epoch": i, **{k: v + i / 60 for k, v in columns.items()}} for i in range(epochs)]
    draw_curves(history, tmp_path / "c.png", "title", "augmented")
    with Image.open(tmp_path / "c.png") as image:
        assert image.size[0] > 1000
        assert len(image.convert("RGB").getcolors(10**6)) > 20


@pytest.mark.slow
def test_learns_the_digits(tmp_path) -> None:
    options = [*DIGITS, "-b", "64", "--drop-path", "0", "--epochs", "12", "--output", str(tmp_path)]
    assert tool.main([*options, "--experiment", "run"]) == 0
    assert max(float(r["eval_top1"]) for r in rows(tmp_path / "run")) >= 95.0
    used = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert (used["epochs"], used["sched_on_updates"], used["rotate"]) == (12, True, 10.0)  # option, recipe, recipe


def test_prompts_learn_the_other_digits(tmp_path) -> None:
    """A transformer that knows the digits 0 to 4 stays as it is, and learns 5 to 9 by prompts and head."""
    size = ["embed_dim=128", "num_heads=4", "depth=2", "patch_size=4", "global_pool=avg"]
    words = ["--data", "digits", "--only-classes", *"01234", "--model", "test_vit", "--model-kwargs", *size]
    words += ["--img-size", "16", "-b", "16", "--lr", "2e-3", "--epochs", "4", "--warmup-epochs", "1"]
    assert tool.main([*words, "--drop-path", "0", "--output", str(tmp_path), "--experiment", "half"]) == 0
    half = tmp_path / "half"
    words = ["-c", str(half / "args.yaml"), "--only-classes", *"56789", "--tune", "tcpa", "--experiment", "tuned"]
    words += ["--pretrained-path", str(half / "model_best.pth.tar"), "--tune-kwargs", "random_epochs=1"]
    assert tool.main([*words, "--lr", "0.05", "-b", "32", "--epochs", "3"]) == 0
    known, tuned = (read(folder / "model_best.pth.tar")["state_dict"] for folder in (half, tmp_path / "tuned"))
    assert {k for k in known if not torch.equal(known[k], tuned[k])} == {"head.weight", "head.bias"}
    assert max(float(row["eval_top1"]) for row in rows(tmp_path / "tuned")) > 35  # chance is 20


MEDUSA = ["--model", "test_medusa", "--epochs", "3", "--warmup-epochs", "0", "--lr-scale", "body.*=0.5"]


def test_medusa_trains_in_turn_and_resumes_exactly(tmp_path, capsys, monkeypatch) -> None:
    """Backbone, then body, then both at a tenth of the rate; a run cut off in the last part ends the same."""
    states, rates = [], []
    epoch = Loop.train_epoch

    def spy(self):
        if not states:
            states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        epoch(self)
        states.append({k: v.clone() for k, v in self.model.state_dict().items()})
        rates.append(sorted({g["lr"] for g in self.optimizer.param_groups}))

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "train_epoch", spy)
        assert run(tmp_path / "whole", *MEDUSA, "--sched", "constant", "--lr", "0.01") == 0
    out = capsys.readouterr().out
    sizes = {k: v.numel() for k, v in timm.create_model("test_medusa", num_classes=2).named_parameters()}
    total = sum(sizes.values())
    body, heads = (sum(n for k, n in sizes.items() if k.startswith(part)) for part in ("body.", "attention"))
    for line in (
        f"from epoch 1 on: {total - body:,} of {total:,} parameters learn\n",
        f"from epoch 2 on: {body + heads:,} of {total:,} parameters learn\n",
        f"from epoch 3 on: {total:,} of {total:,} parameters learn, at 0.1 of the learning rate\n",
    ):
        assert out.count(line) == 1

    def moved(a, b):
        changed = {k for k in a if not torch.equal(a[k], b[k])}
        body, heads = ({k for k in changed if k.startswith(part)} for part in ("body.", "attention"))
        return bool(body), bool(heads), bool(changed - body - heads)

    turns = [moved(a, b) for a, b in itertools.pairwise(states)]
    assert turns == [(False, True, True), (True, True, False), (True, True, True)]
    assert rates == [[0.005, 0.01], [0.005, 0.01], pytest.approx([0.0005, 0.001])]
    assert [float(r["lr"]) for r in rows(tmp_path / "whole")] == pytest.approx([0.01, 0.01, 0.001])
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "backward", 13, signalled(signal.SIGINT))
        assert run(tmp_path / "cut", *MEDUSA, "--sched", "constant", "--lr", "0.01") == 130
    assert run(tmp_path / "cut", *MEDUSA, "--sched", "constant", "--lr", "0.01", "--resume") == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_phases_are_checked(tmp_path, capsys) -> None:
    assert run(tmp_path / "b", *MEDUSA, "--model-kwargs", "training_rounds=2") == 2
    assert (
        "--epochs 3 with --model 'test_medusa': got training_rounds=2, need at most 1 for 3 epochs"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "b").exists()
    assert run(tmp_path / "c", *MEDUSA, "--model-kwargs", "training_rounds=0", "--epochs", "1") == 0
    assert "from epoch" not in capsys.readouterr().out


def test_every_kind_of_prompts_is_an_option() -> None:
    assert (*PROMPTS, "linear", "full") == TUNES


@pytest.mark.parametrize("method", TUNES)
def test_tune(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is frozen stays, the rest is trained, and the printed line loads the result."""
    vit = {"num_classes": 2, "img_size": 32, "patch_size": 8, "depth": 2}
    before = timm.create_model("test_vit", **vit).state_dict()
    torch.save(before, tmp_path / "vit.pth")
    options = ["--model", "test_vit", "--model-kwargs", "patch_size=8", "depth=2", "--tune", method]
    options += ["--initial-checkpoint", str(tmp_path / "vit.pth"), "--epochs", "2"]
    options += ["--warmup-epochs", "0"]
    if method in PROMPTS:
        options += ["--tune-kwargs", "prompt_drop=0.2"]
    assert run(tmp_path / "run", *options) == 0
    after = read(tmp_path / "run" / "last.pth.tar")["state_dict"]
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed >= {"head.weight", "head.bias"}
    assert ("blocks.0.attn.qkv.weight" in changed) is (method == "full")
    assert method == "full" or changed == {"head.weight", "head.bias"}
    assert len(after) > len(before) or method not in PROMPTS
    namespace: dict = {}
    exec(capsys.readouterr().out.rpartition("load it: ")[2].strip(), namespace)
    assert namespace["model"].state_dict().keys() == after.keys()


def test_tune_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([*DATA, "--tune", "tcpa"]) == 2
    assert "test_convnext" in capsys.readouterr().err
    assert tool.main([*DATA, "--tune", "linear", "--tune-kwargs", "cls_pool=3"]) == 2
    assert "--tune-kwargs" in capsys.readouterr().err


class Hooked(nn.Module):
    """A classifier with the hooks that need nothing: a loss of its own, and phases without a factor."""

    num_classes = 2
    pretrained_cfg: dict = {}  # noqa: RUF012

    def __init__(self, **kwargs):
        super().__init__()
        self.fc, self.phases = nn.Linear(3, 2), []
        self.free = nn.Parameter(torch.ones(2))

    def forward(self, x):
        self.size = self.free.square().sum()
        return self.fc(x.mean((2, 3)))

    def extra_loss(self):
        return self.size

    def training_phase(self, epoch, epochs):
        self.phases.append((epoch, epochs))
        self.fc.requires_grad_(epoch > 0)


def test_hooks_of_any_model(tmp_path, capsys, monkeypatch) -> None:
    """What a loss of its own adds is minimised, and each epoch begins with its phase."""
    made = []
    monkeypatch.setattr(classification, "build_model", lambda name, **kwargs: made.append(Hooked()) or made[-1])
    options = ["--model", "test_resnet", "--epochs", "3", "--sched", "constant", "--warmup-epochs", "0"]
    assert run(tmp_path / "run", *options, "--weight-decay", "0", "--lr", "0.01") == 0
    (model,) = made
    assert model.phases == [(0, 3), (0, 3), (1, 3), (2, 3)]
    said = capsys.readouterr().out
    assert "from epoch 1 on: 2 of 10 parameters learn\n" in said
    assert "from epoch 2 on: 10 of 10 parameters learn\n" in said
    assert "from epoch 3" not in said
    losses = [float(r["train_loss"]) for r in rows(tmp_path / "run")]
    steps = read(tmp_path / "run" / "last.pth.tar")["optimizer"]["state"]
    assert steps.keys() == {0, 1, 2}
    assert (model.free < 1).all()
    assert losses[0] > 2 > 0.5 < losses[-1]
    assert model.free[0] == model.free[1]


def test_outputs_without_a_loss_for_them(tmp_path, capsys, monkeypatch) -> None:
    """A second output that nothing trains is one line before the run starts."""

    class Silent(Hooked):
        def forward(self, x):
            logits = super().forward(x)
            return {"main": logits, "aux": logits} if self.training else logits

    monkeypatch.delattr(Hooked, "extra_loss")
    monkeypatch.setattr(classification, "build_model", lambda name, **kwargs: Silent())
    assert run(tmp_path / "run", "--model", "test_resnet") == 2
    assert "its output in training has main, aux, but it has no extra_loss() for them" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
