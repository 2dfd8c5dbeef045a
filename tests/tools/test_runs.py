"""Runs of every task: what they leave, who may write there, what they know of their classes, and how they go on."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import shapes as pictures
import timm
import torch
import yaml
from PIL import Image
from runs import TASKS, read, start

from vizoo.tools import cli, common
from vizoo.tools.training.classification import logits_of
from vizoo.tools.training.run import Saver, locked, match_classes, newest_checkpoint, say_unnamed
from vizoo.tools.training.task import extra_loss

pytestmark = pytest.mark.usefixtures("no_curves")


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def run(runs: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a run."""

    def copy(task: str) -> Path:
        return Path(shutil.copytree(runs / task, tmp_path / "copy" / task))

    return copy


# broken


@pytest.mark.parametrize("task", TASKS)
def test_broken_checkpoints(task, folders, run, capsys) -> None:
    """A truncated last checkpoint is passed over with a warning, and blocks no other; nothing readable is an error."""
    folder = run(task)
    last = folder / "last.pth.tar"
    whole = last.read_bytes()
    last.unlink()
    last.write_bytes(whole[: len(whole) // 2])  # a new file: the best ones may be links to the same data
    capsys.readouterr()
    assert start(task, folders, folder, "--resume", str(last)) == 2
    assert "cannot read the checkpoint" in line(capsys)
    assert start(task, folders, folder, "--resume") == 0
    err = capsys.readouterr().err
    assert "last.pth.tar" in err.splitlines()[0]
    assert "instead" in err.splitlines()[0]
    assert start(task, folders, folder, "--resume", str(folder / "model_best.pth.tar")) == 0
    for file in folder.glob("*.pth.tar"):
        file.unlink()
        file.write_bytes(b"")
    capsys.readouterr()
    assert start(task, folders, folder, "--resume") == 2
    assert "can be read" in line(capsys)


def test_newest_checkpoint(tmp_path: Path) -> None:
    """By the position inside, not by name or time; other names do not count."""
    entries = {"arch": "x", "state_dict": {}, "optimizer": {}}
    assert newest_checkpoint(tmp_path) is None
    torch.save({**entries, "epoch": 9}, tmp_path / "mine.pth.tar")
    assert newest_checkpoint(tmp_path) is None
    torch.save({**entries, "epoch": 0}, tmp_path / "model_best.pth.tar")
    assert newest_checkpoint(tmp_path) == tmp_path / "model_best.pth.tar"
    torch.save({**entries, "epoch": 1}, tmp_path / "last.pth.tar")
    torch.save({**entries, "epoch": 2, "run": {"epoch": 2, "batch": 3}}, tmp_path / "recovery-2-3.pth.tar")
    assert newest_checkpoint(tmp_path) == tmp_path / "recovery-2-3.pth.tar"


# the folder


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("left", ["args.yaml", "summary.csv", "model_best.pth.tar"])
def test_nothing_is_overwritten(task, left, folders, run, capsys) -> None:
    """A folder with one file of a run is refused, with and without --resume, and stays as it is."""
    folder = run(task)
    for file in folder.iterdir():
        if file.name != left:
            file.unlink()
    before = listing(folder)
    capsys.readouterr()
    assert start(task, folders, folder) == 2
    assert "--experiment" in line(capsys)
    if left != "model_best.pth.tar":
        assert start(task, folders, folder, "--resume") == 2
        assert "no checkpoint" in line(capsys)
    assert listing(folder) == before


def hold(folder: Path, held: Event) -> None:
    with locked(folder):
        held.set()
        time.sleep(60)


@pytest.mark.parametrize("task", TASKS)
def test_one_run_at_a_time(task, folders, tmp_path, capsys) -> None:
    """A second process is told who holds the folder; the lock ends with its holder, even one that is killed."""
    folder = tmp_path / "run"
    folder.mkdir()
    forks = multiprocessing.get_context("fork")
    held = forks.Event()
    other = forks.Process(target=hold, args=(folder, held), daemon=True)
    other.start()
    assert held.wait(60)
    assert start(task, folders, folder) == 2
    assert f"process {other.pid} on host {socket.gethostname()}" in line(capsys)
    other.kill()
    other.join()
    with locked(folder):
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("task", TASKS)
def test_a_bad_start_leaves_nothing(task, folders, tmp_path, capsys) -> None:
    assert start(task, folders, tmp_path / "a" / "run", "--model", "resnet1000") == 2
    assert start(task, folders, tmp_path / "a" / "run", "--lr", "nan") == 2
    assert start(task, folders, tmp_path / "a" / "run", "--resume", str(tmp_path / "no.pth.tar")) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("task", TASKS)
def test_full_disk(task, folders, run, tmp_path, monkeypatch, capsys) -> None:
    """One line, status 1, and the checkpoint of before."""
    folder = run(task)
    last = folder / "last.pth.tar"
    before = last.read_bytes()

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(common.os, "fsync", full)
    capsys.readouterr()
    assert start(task, folders, tmp_path / "new") == 1
    message = line(capsys)
    assert "No space left on device" in message
    assert "cannot write" in message
    assert not (tmp_path / "new").exists()
    assert start(task, folders, folder, "--resume") == 1
    assert last.read_bytes() == before


# what a checkpoint says


@pytest.mark.parametrize("change", ["files", "pending", "best"])
def test_no_path_from_a_checkpoint(change, folders, run, tmp_path) -> None:
    """Names in the bookkeeping of a checkpoint remove and write nothing but numbered checkpoints of the folder."""
    folder = run("classification")
    (tmp_path / "outside").mkdir()
    for victim in (tmp_path / "outside" / "checkpoint-7.pth.tar", folder / "notes.txt", tmp_path / "x.pth.tar"):
        victim.write_text("mine")
    names = ["../../outside/checkpoint-7.pth.tar", str(tmp_path / "outside" / "checkpoint-7.pth.tar"), "notes.txt"]
    saver = {
        "files": {"checkpoint_files": [(n, 99.0) for n in names], "best_epoch": 0, "best_metric": 99.0},
        "pending": {"checkpoint_files": [], "pending": ("../../../x", 1.0)},
        "best": {"checkpoint_files": [], "best_epoch": "../../outside/checkpoint-7", "best_metric": 1.0},
    }[change]
    state = read(folder / "last.pth.tar")
    state["saver"].update(saver)
    (folder / "last.pth.tar").unlink()
    torch.save(state, folder / "last.pth.tar")
    before = listing(tmp_path / "outside")
    assert start("classification", folders, folder, "--resume", "--epochs", "4", "--checkpoint-hist", "1") == 0
    assert listing(tmp_path / "outside") == before
    assert (folder / "notes.txt").read_text() == (tmp_path / "x.pth.tar").read_text() == "mine"


def test_saver_removes_its_own_files_only(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    saver = Saver(dict, model=model, optimizer=None, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    for name in ("recovery-mine.pth.tar", "recovery-1-2.pth.tar", "recovery-1-2.pth.tar.bak"):
        (tmp_path / name).touch()
    saver.drop_recovery()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recovery-1-2.pth.tar.bak", "recovery-mine.pth.tar"]


@pytest.mark.parametrize(
    "change",
    [
        {"run": 3},
        {"run": {"epoch": "x", "batch": 0}},
        {"run": {"epoch": 0, "batch": -1}},
        {"state_dict": 5},
        {"optimizer": {"state": {}}},
        {"optimizer": []},
        {"saver": {"checkpoint_files": 7}},
        {"args": 3},
        {"run": {"epoch": 1, "batch": 0, "history": [1, 2]}},
        {"run": {"epoch": 1, "batch": 0, "history": [{"epoch": 0, "train_loss": "x"}]}},
        {"run": {"epoch": 1, "batch": 0, "sums": 3}},
        {"run": {"epoch": 1, "batch": 0, "elapsed": None}},
        {"state_dict": {}},
        {"classes": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("task", TASKS)
def test_crafted_checkpoints(change, task, folders, run, capsys) -> None:
    """Well-formed pickles of nonsense are one line."""
    folder = run(task)
    state = {**read(folder / "last.pth.tar"), **change}
    (folder / "last.pth.tar").unlink()
    torch.save(state, folder / "last.pth.tar")
    capsys.readouterr()
    more = ["--epochs", "3"] if task in ("classification", "scanpath") else []  # the others keep theirs
    status = start(task, folders, folder, "--resume", str(folder / "last.pth.tar"), *more)
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert status == (0 if {"classes", "saver"} & change.keys() else 2), err


# classes


def test_match_classes(capsys) -> None:
    assert match_classes(["a", "b", "c"], ["c", "a", "b"], "data", "run") == [2, 0, 1]
    assert match_classes(None, ["x", "y"], "data", "run") == [0, 1]
    say_unnamed(["x", "y"], "run")
    assert capsys.readouterr().err == ""
    say_unnamed(None, "run")
    assert "by their number only" in capsys.readouterr().err
    for found in (["a", "b"], ["a", "b", "d"], ["a", "b", "c", "d"]):
        with pytest.raises(common.UserError, match=rf"data has classes {', '.join(found)}; run was trained on a, b, c"):
            match_classes(["a", "b", "c"], found, "data", "run")
    with pytest.raises(common.UserError, match="two classes named 'a'"):
        match_classes(["a", "b"], ["a", "a"], "data", "run")
    many = [f"c{i}" for i in range(1000)]
    with pytest.raises(common.UserError, match=r"c9, \.\.\. \(1000 in total\)"):
        match_classes(many, ["x"], "data", "run")


def renamed(task: str, folders: Path, out: Path) -> Path:
    """The data with other classes of the same number."""
    if task == "classification":
        shutil.copytree(folders / "images", out)
        for split in ("train", "val"):
            (out / split / "dark").rename(out / split / "dusk")
        return out
    shutil.copytree(folders / "shapes", out)
    if task == "detection":
        for part in ("training", "validation"):
            file = out / "annotations" / f"instances_{part}.json"
            file.write_text(file.read_text().replace('"disc"', '"disk"'))
    else:
        (out / "classes.txt").write_text((out / "classes.txt").read_text().replace("disc", "disk"))
    return out


@pytest.mark.parametrize("task", TASKS[:3])
def test_classes_are_stored_and_compared(task, folders, runs, run, tmp_path, capsys) -> None:
    names = {"classification": ["bright", "dark"], "detection": list(pictures.CLASSES)}
    names["segmentation"] = ["background", *pictures.CLASSES]
    stored = [yaml.safe_load((runs / task / "args.yaml").read_text())["classes"]]
    stored += [read(file)["classes"] for file in (runs / task).glob("*.pth.tar")]
    assert len(stored) >= 3
    assert all(found == names[task] for found in stored)
    other = renamed(task, folders, tmp_path / "other")
    capsys.readouterr()
    assert cli.main(["evaluate", str(runs / task), "--data", str(other), "--device", "cpu"]) == 2
    message = line(capsys)
    assert ", ".join(names[task]) in message
    assert "disk" in message or "dusk" in message
    before = listing(folder := run(task))
    assert start(task, folders, folder, "--resume", "--data", str(other)) == 2
    assert "was trained on" in line(capsys)
    assert listing(folder) == before
    if task == "classification":
        checkpoint = ["--model", "test_resnet", "--checkpoint", str(runs / task / "last.pth.tar"), "--img-size", "32"]
        assert cli.main(["evaluate", *checkpoint, "--data", str(other), "--device", "cpu", "-j", "0"]) == 2
        assert "was trained on" in line(capsys)
        shutil.rmtree(other / "val" / "dusk")
        assert cli.main(["evaluate", str(runs / task), "--data", str(other), "--device", "cpu"]) == 2
        assert "classes bright; " in line(capsys)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_order_of_classes_is_mended(task, folders, runs, tmp_path) -> None:
    """The same data with other ids give the same figures, class by class."""
    other = tmp_path / "other"
    shutil.copytree(folders / "shapes", other)
    order = {1: 3, 2: 1, 3: 2}
    if task == "detection":
        for part in ("training", "validation"):
            file = other / "annotations" / f"instances_{part}.json"
            data = json.loads(file.read_text())
            for category in data["categories"]:
                category["id"] = order[category["id"]]
            for annotation in data["annotations"]:
                annotation["category_id"] = order[annotation["category_id"]]
            file.write_text(json.dumps(data))
    else:
        names = ["background", *pictures.CLASSES]
        (other / "classes.txt").write_text("\n".join([names[0], names[2], names[3], names[1]]))
        for file in (other / "annotations").glob("*/*.png"):
            with Image.open(file) as f:
                values = np.array(f)
            Image.fromarray(np.array([0, 1, 4, 2, 3], np.uint8)[values]).save(file)
    figures = []
    for data in (folders / "shapes", other):
        out = tmp_path / f"{data.name}.json"
        command = ["evaluate", str(runs / task), "--data", str(data), "--device", "cpu", "--out", str(out)]
        assert cli.main(command) == 0
        figures.append(json.loads(out.read_text()))
    assert {k: v for k, v in figures[0].items() if k != "data"} == {k: v for k, v in figures[1].items() if k != "data"}


def test_published_weights_need_their_classes(folders, capsys, monkeypatch) -> None:
    """A head of another size would be a random one."""
    monkeypatch.setattr(common, "build_model", lambda *a, **k: pytest.fail("a model was built"))
    command = ["evaluate", "--model", "resnet18", "--pretrained", "--data", str(folders / "images"), "--device", "cpu"]
    assert cli.main(command) == 2
    assert "have 1000 outputs, the data 2 classes" in line(capsys)


# going on with other options


def test_other_options(folders, run, tmp_path, capsys) -> None:
    folder = run("classification")
    last = str(folder / "last.pth.tar")
    more = ["--epochs", "3", "--resume"]
    before = listing(folder)
    for opt in ("lion", "adamw", "lamb", "adafactor"):
        capsys.readouterr()
        assert start("classification", folders, folder, *more, "--opt", opt) == 2
        message = line(capsys)
        assert "--opt" in message
        assert "--no-resume-opt" in message
    assert start("classification", folders, tmp_path / "new", "--resume", last) == 2  # all epochs are done
    assert "all 2 epochs are done already; raise --epochs" in line(capsys)
    assert not (tmp_path / "new").exists()
    assert listing(folder) == before
    assert start("classification", folders, folder, *more, "--mixup", "0.4", "--weight-decay", "0.3") == 0
    lines = (folder / "summary.csv").read_text().splitlines()
    assert lines[0].split(",").count("train_top1") == 1
    assert len(lines) == 4
    state = read(folder / "last.pth.tar")["optimizer"]["param_groups"]
    assert {g["weight_decay"] for g in state} == {0.0, 0.3}  # what was asked for, not what was stored


@pytest.mark.parametrize("task", TASKS[1:])
def test_options_that_make_another_run(task, folders, run, tmp_path, capsys) -> None:
    folder = run(task)
    last = str(folder / "last.pth.tar")
    capsys.readouterr()
    assert start(task, folders, folder, "--resume", "--seed", "7") == 2
    assert "--seed was" in line(capsys)
    assert start(task, folders, tmp_path / "new", "--resume", last) == 2
    assert "all 2 epochs are done already" in line(capsys)
    other = next(t for t in TASKS if t != task)
    assert start(other, folders, tmp_path / "new", "--resume", last) == 2
    assert "--resume" in line(capsys)
    assert not (tmp_path / "new").exists()


def test_auxiliary_classifiers_are_trained(folders, tmp_path) -> None:
    """The loss of OverLoCK's second classifier counts 0.4 times."""
    more = ["--model", "test_overlock", "--model-kwargs", "aux_head=True", "--epochs", "1", "--img-size", "64"]
    assert start("classification", folders, tmp_path / "run", *more) == 0
    assert logits_of({"main": torch.ones(2, 3), "aux": torch.zeros(2, 3)}).mean() == 1
    model = timm.create_model("test_overlock", aux_head=True)
    out = {"main": torch.ones(2, 3), "aux": torch.full((2, 3), 2.0)}
    assert extra_loss(model, out, lambda logits: logits.sum()).item() == pytest.approx(0.4 * 12)
    assert extra_loss(model, out["main"], torch.sum) is None
    for wrong in ((1, 2), {"aux": torch.ones(2, 3)}):
        with pytest.raises(TypeError, match=type(wrong).__name__):
            logits_of(wrong)


@pytest.mark.parametrize("task", TASKS[:3])
def test_dead_worker(task, folders, tmp_path, monkeypatch, capfd) -> None:
    """A data worker that the system kills is one line and status 1."""
    from vizoo.tools.data.dense import Boxes, Masks
    from vizoo.tools.data.folders import Images

    owner = {"classification": Images, "detection": Boxes, "segmentation": Masks}[task]
    monkeypatch.setattr(owner, "__getitem__", lambda self, index: os.kill(os.getpid(), 9))
    assert start(task, folders, tmp_path / "run", "-j", "1") == 1
    err = capfd.readouterr().err
    assert "Traceback" not in err
    assert "a data worker died" in err
