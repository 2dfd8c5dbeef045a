"""The one loop with every task: exact resume after any kind of end, signals, the best epoch, several processes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from runs import (
    TASKS,
    Fault,
    Killed,
    assert_same_run,
    at_call,
    die,
    read,
    rows,
    signalled,
    start,
    together,
    words,
)

from vizoo.tools import cli
from vizoo.tools.training.classification import Classification
from vizoo.tools.training.dense import Dense
from vizoo.tools.training.loop import Loop
from vizoo.tools.training.run import newest_checkpoint
from vizoo.tools.training.scanpath import Scanpath

pytestmark = pytest.mark.usefixtures("no_curves")
KINDS = {"classification": Classification, "detection": Dense, "segmentation": Dense, "scanpath": Scanpath}
BATCHES = 4  # of an epoch, three of them for the first update and one for the second
RANDOM = {
    "classification": ["-b", "4", "--drop", "0.2", "--drop-path", "0.2", "--mixup", "0.4", "--cutmix", "1"],
    "detection": ["--model-kwargs", "drop_path_rate=0.2"],
    "segmentation": ["--model-kwargs", "drop_path_rate=0.2", "--scale", "0.8", "1.25"],
    "scanpath": ["-b", "8", "--model-kwargs", "drop_rate=0.2"],
}
RANDOM["classification"] += ["--reprob", "0.5"]
LOOP = ["--grad-accum-steps", "3", "--model-ema", "--model-ema-decay", "0.9"]


def run(task: str, folders: Path, folder: Path, *more: str) -> int:
    """A training with everything random."""
    return start(task, folders, folder, *RANDOM[task], *LOOP, *more)


@pytest.fixture(scope="session")
def whole(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An uninterrupted run of a task."""
    root = tmp_path_factory.mktemp("whole")

    def found(task: str) -> Path:
        if not (root / task).exists():
            assert run(task, folders, root / task) == 0
        return root / task

    return found


def line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def resume(task: str, folders: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    """Go on with a run that was cut off, from where it was saved."""
    newest = newest_checkpoint(folder)
    assert newest is not None
    position = read(newest)["run"]
    epochs = yaml.safe_load((folder / "args.yaml").read_text())["epochs"]
    left = (epochs - position["epoch"]) * BATCHES - position["batch"]
    with monkeypatch.context() as patch:
        calls = at_call(patch, Loop, "train_batch", 0, die)
        assert run(task, folders, folder, "--resume", *more) == 0
    assert len(calls) == left


@pytest.mark.parametrize("task", TASKS)
def test_whole_run(task, whole) -> None:
    """It trains, averages, and leaves its table and its best epochs."""
    folder = whole(task)
    last = read(folder / "last.pth.tar")
    assert (last["epoch"], last["run"]["epoch"], last["run"]["batch"]) == (1, 2, 0)
    weights, average = last["state_dict"], last["state_dict_ema"]
    assert weights.keys() == average.keys()
    assert any(not torch.equal(v, average[k]) for k, v in weights.items())
    table = rows(folder)
    assert [r["epoch"] for r in table] == ["0", "1"]
    assert len({r["train_loss"] for r in table}) == 2
    assert len({p.name for p in folder.glob("checkpoint-*")}) == 2


@pytest.mark.parametrize("task", TASKS)
def test_curves_are_a_picture(task, runs) -> None:
    with Image.open(runs / task / "curves.png") as picture:
        assert picture.size[0] > 1000
        assert len(picture.convert("RGB").getcolors(10**6)) > 20


# resume

KILLS = {  # call of a method of the loop, further options, and the checkpoint of before
    "before an update": ("train_batch", 2, [], "recovery-0-0"),
    "after an update": ("backward", 8, ["--recovery-interval", "1"], "recovery-1-3"),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kill", KILLS)
def test_killed_run_resumes_exactly(task, kill, folders, whole, tmp_path, monkeypatch, capsys) -> None:
    folder, (name, call, more, saved) = tmp_path / "run", KILLS[kill]
    with monkeypatch.context() as patch:
        at_call(patch, Loop, name, call, die)
        with pytest.raises(Killed):
            run(task, folders, folder, *more)
    assert newest_checkpoint(folder) == folder / f"{saved}.pth.tar"
    capsys.readouterr()
    assert run(task, folders, folder) == 2
    assert "add --resume" in line(capsys)
    resume(task, folders, folder, monkeypatch)
    assert_same_run(whole(task), folder)


STOPS = {  # signal, call of Loop.backward, or None for the first held-out batch, and the checkpoint that is written
    "ctrl-c": (signal.SIGINT, 2, "recovery-0-3"),
    "sigterm at the last update": (signal.SIGTERM, 8, "recovery-1-4"),
    "ctrl-c while measuring": (signal.SIGINT, None, "recovery-0-4"),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("stop", STOPS)
def test_signal_saves_at_an_update(task, stop, folders, whole, tmp_path, monkeypatch, capsys) -> None:
    folder, (signum, call, saved) = tmp_path / "run", STOPS[stop]
    kind, act = KINDS[task], signalled(signum)
    measure: Any = kind.measure
    with monkeypatch.context() as patch:
        if call is None:
            patch.setattr(kind, "measure", lambda self, model, tick: measure(self, model, lambda: (act(), tick())))
        else:
            at_call(patch, Loop, "backward", call, act)
        capsys.readouterr()
        assert run(task, folders, folder) == 128 + signum
    message = line(capsys)
    assert f"saved {folder / saved}.pth.tar; continue with the same command and --resume" in message
    assert newest_checkpoint(folder) == folder / f"{saved}.pth.tar"
    resume(task, folders, folder, monkeypatch)
    assert_same_run(whole(task), folder)


def test_process_killed_by_the_system_resumes_exactly(folders, whole, tmp_path, monkeypatch) -> None:
    task, folder = "classification", tmp_path / "run"
    command = [*words(task, folders), *RANDOM[task], *LOOP, "--recovery-interval", "1"]
    command += ["--output", str(tmp_path), "--experiment", "run"]
    fault = Fault(0, "backward", 8, signal.SIGKILL)
    assert together(command, tmp_path / "log", 1, fault) == [-signal.SIGKILL]
    assert newest_checkpoint(folder) == folder / "recovery-1-3.pth.tar"
    resume(task, folders, folder, monkeypatch)
    assert_same_run(whole(task), folder)


HALVES = [*((task, "bfloat16") for task in TASKS), ("classification", "float16"), ("scanpath", "float16")]


@pytest.mark.parametrize(("task", "dtype"), HALVES)  # float16 is slow on CPU where there is much to compute
def test_half_precision_resumes_exactly(task, dtype, folders, tmp_path, monkeypatch) -> None:
    """Training and measuring in bfloat16, with data workers; and in float16, with the scale of the losses."""
    more = ["--epochs", "1", "--amp", "--amp-dtype", dtype, *["-j", "2"] * (dtype == "bfloat16")]
    seen = []
    with monkeypatch.context() as patch:
        for name in ("losses", "measure"):
            note = lambda: seen.append((torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")))  # noqa: E731
            at_call(patch, KINDS[task], name, 1, note)
        assert run(task, folders, tmp_path / "whole", *more) == 0
    assert seen == [(True, getattr(torch, dtype))] * 2
    with monkeypatch.context() as patch:
        at_call(patch, Loop, "backward", 2, signalled(signal.SIGINT))
        assert run(task, folders, tmp_path / "cut", *more) == 130
    saved = read(tmp_path / "cut" / "recovery-0-3.pth.tar")
    assert ("amp_scaler" in saved) is (dtype == "float16")
    assert dtype == "bfloat16" or saved["amp_scaler"]["_growth_tracker"] == 1
    resume(task, folders, tmp_path / "cut", monkeypatch, *more)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize("task", TASKS)
def test_args_yaml_repeats_the_run(task, whole, tmp_path) -> None:
    command = ["train", "-c", str(whole(task) / "args.yaml"), "--output", str(tmp_path), "--experiment", "again"]
    assert cli.main(command) == 0
    assert_same_run(whole(task), tmp_path / "again")


# the best epoch

BEST = [
    ("classification", "top5", "eval_top5"),
    ("classification", "loss", "eval_loss"),
    ("detection", "AP75", "AP75"),
    ("segmentation", "mAcc", "mAcc"),
    ("scanpath", "sequence_score", "sequence_score"),
    ("scanpath", "delta", "delta"),
]


@pytest.mark.parametrize(("task", "metric", "column"), BEST)
def test_metric_says_which_epochs_are_the_best(task, metric, column, folders, tmp_path, monkeypatch, capsys) -> None:
    """The two best of four are kept, and a figure that is none is worse than any other."""
    values = iter([math.nan, 2.0, 4.0, 1.0])
    names = ("loss", "top1", "top5", "AP", "AP50", "AP75", "mIoU", "mAcc", "sequence_score", "delta")
    others = dict.fromkeys(names, 3.0)
    monkeypatch.setattr(KINDS[task], "measure", lambda self, model, tick: {**others, metric: next(values)})
    assert (
        start(task, folders, tmp_path / "run", "--epochs", "4", "--eval-metric", metric, "--checkpoint-hist", "2") == 0
    )
    table = [float(r[column]) for r in rows(tmp_path / "run")]
    assert table == pytest.approx([math.nan, 2, 4, 1], nan_ok=True)
    best = 3 if metric in ("loss", "delta") else 2
    kept = {p.name for p in (tmp_path / "run").glob("checkpoint-*")}
    assert kept == {f"checkpoint-{best}.pth.tar", "checkpoint-1.pth.tar"}
    assert read(tmp_path / "run" / "model_best.pth.tar")["epoch"] == best
    assert read(tmp_path / "run" / "last.pth.tar")["epoch"] == 3
    assert f"epoch {best + 1} of 4" in capsys.readouterr().out


# divergence


@pytest.mark.parametrize("task", TASKS)
def test_nan(task, folders, runs, tmp_path, capsys) -> None:
    """A loss that is none, and weights that are none, are status 1 and one line."""
    rate = {"classification": "1e30", "scanpath": "1e30"}.get(task, "1e20")
    assert start(task, folders, tmp_path / "new", "--lr", rate, *["--clip-grad", "1e30"] * (task != "scanpath")) == 1
    assert "loss is" in line(capsys)
    folder = shutil.copytree(runs / task, tmp_path / task)
    state = read(folder / "model_best.pth.tar")
    next(v for v in state["state_dict"].values() if v.is_floating_point())[:] = float("nan")
    (folder / "model_best.pth.tar").unlink()
    torch.save(state, folder / "model_best.pth.tar")
    assert cli.main(["evaluate", str(folder), "--device", "cpu", "--out", str(tmp_path / "x.json")]) == 1
    assert "holds NaN or infinity in" in line(capsys)
    assert not (tmp_path / "x.json").exists()


# several processes

# what one process and two do alike: no augmentation, batches whose parts weigh differently, and steps of the size of
# the gradients, so that rounding stays rounding
ALIKE = {
    "classification": ["--model", "test_vit", "--no-aug", "-vb", "4", "--drop-path", "0", "--lr", "0.01"],
    "detection": ["--arch", "retinanet", "--hflip", "0", "--warmup-updates", "0", "--lr", "0.01"],
    "segmentation": ["--scale", "1", "1", "--hflip", "0", "--warmup-updates", "0", "--lr", "0.01"],
    "scanpath": ["--model-kwargs", "drop_rate=0.0", "--lr", "0.01"],
}
ALIKE["detection"] += ["--arch-kwargs", "fpn_channels=32", "score_thresh=0.0"]  # so that there is something to rank
PER_BATCH = {"classification": 4, "detection": 4, "segmentation": 4, "scanpath": 8}  # of all processes


def square(folders: Path, out: Path) -> Path:
    """The shapes in squares as small as a crop, and without a class in some rows of them, more in each."""
    shutil.copytree(folders, out)
    for file in (out / "shapes").glob("*/*/*.png"):
        with Image.open(file) as picture:
            small = picture.resize((32, 32), Image.Resampling.NEAREST)
        if file.parts[-3] == "annotations":
            small.paste(0, (0, 0, 32, int(file.stem)))
        small.save(file)
    return out


def command(task: str, folders: Path, folder: Path, *more: str) -> list[str]:
    return [*words(task, folders), *more, "--output", str(folder.parent), "--experiment", folder.name]


def numbers(folder: Path) -> list[dict[str, float]]:
    return [{k: float(v) for k, v in row.items()} for row in rows(folder)]


PAIR = {task: [*RANDOM[task], *LOOP, "-b", str(PER_BATCH[task] // 2), "--log-interval", "1"] for task in TASKS}


@pytest.fixture(scope="session")
def pair(folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """An uninterrupted run of two processes with everything random."""
    root = tmp_path_factory.mktemp("pair")

    def found(task: str) -> Path:
        if not (root / task).exists():
            assert together(command(task, folders, root / task, *PAIR[task]), root / f"{task}.txt") == [0, 0]
        return root / task

    return found


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_train_as_one(task, folders, tmp_path) -> None:
    """Half of each batch in each of two: the weights and figures of one process; measured again alone, the same."""
    data = square(folders, tmp_path / "data") if task == "segmentation" else folders
    more = [*ALIKE[task], "--opt", "sgd", "--grad-accum-steps", "3"]
    for size, name in ((1, "one"), (2, "two")):
        batch = ["-b", str(PER_BATCH[task] // size)]
        log = tmp_path / f"{name}.txt"
        ends = together(command(task, data, tmp_path / name, *more, *batch), log, size, alike=True)
        assert ends == [0] * size, log.read_text()
    log = (tmp_path / "two.txt").read_text()
    assert "cpu x 2 processes" in log
    assert log.count("best ") == 1
    one, two = (read(tmp_path / name / "last.pth.tar")["state_dict"] for name in ("one", "two"))
    for key, value in one.items():
        assert (two[key] - value).double().norm() <= 1e-5 * value.double().norm(), key
    table, last = numbers(tmp_path / "one"), numbers(tmp_path / "two")[-1]
    assert numbers(tmp_path / "two") == [pytest.approx(row, rel=1e-3, nan_ok=True) for row in table]
    out = tmp_path / "found.json"
    again = ["evaluate", str(tmp_path / "two"), "--checkpoint", str(tmp_path / "two" / "last.pth.tar")]
    again += ["--split", "val", "-b", str(PER_BATCH[task])] if task == "scanpath" else []
    assert cli.main([*again, "--out", str(out), "--device", "cpu"]) == 0
    found = json.loads(out.read_text())
    found |= found.get("greedy", {})
    measured = {k: v for k, v in last.items() if k not in ("epoch", "lr", "train_loss", "train_top1")}
    alone = {k: found[k.removeprefix("eval_")] for k in measured}
    assert measured == pytest.approx({k: math.nan if v is None else v for k, v in alone.items()}, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_measure_as_one(task, runs, tmp_path) -> None:
    """The figures of 'vizoo evaluate' are equal, also where one process has nothing to do, and told once."""
    for batch in ("1", "20"):
        words = ["evaluate", str(runs / task), "--device", "cpu", "-b", batch]
        assert cli.main([*words, "--out", str(tmp_path / "one.json")]) == 0
        log = tmp_path / f"{batch}.txt"
        plot = ["--plot", str(tmp_path / "two.png")]
        assert together([*words, "--out", str(tmp_path / "two.json"), *plot], log) == [0, 0], log.read_text()
        assert json.loads((tmp_path / "two.json").read_text()) == json.loads((tmp_path / "one.json").read_text())
        assert sum(line.startswith("test_") or " on test_" in line for line in log.read_text().splitlines()) == 1


CUTS = [  # a signal for one of two processes before a step of its loop, and what is saved then
    *((task, Fault(i % 2, "backward", 8, signal.SIGKILL), "recovery-1-3") for i, task in enumerate(TASKS)),
    ("classification", Fault(1, "backward", 4, signal.SIGTERM), "recovery-0-4"),
    ("scanpath", Fault(0, "backward", 5, signal.SIGINT), "recovery-1-3"),
]


@pytest.mark.parametrize(("task", "fault", "saved"), CUTS, ids=lambda v: v.signum.name if isinstance(v, Fault) else v)
def test_two_processes_resume_exactly(task, fault, saved, folders, pair, tmp_path) -> None:
    """One is killed, and the other one ends too; one is stopped, and both save.  Nothing is written by halves."""
    folder, log = tmp_path / "run", tmp_path / "log"
    words = command(task, folders, folder, *PAIR[task], "--recovery-interval", "1")
    began = time.monotonic()
    ends = together(words, log, fault=fault)
    assert time.monotonic() - began < 60
    killed = fault.signum == signal.SIGKILL
    assert ends[fault.rank] == (-signal.SIGKILL if killed else 128 + fault.signum)
    assert ends[1 - fault.rank] == (1 if killed else 128 + fault.signum)
    assert newest_checkpoint(folder) == folder / f"{saved}.pth.tar"
    for file in folder.glob("*.pth.tar"):
        read(file)
    assert together([*words, "--resume"], log) == [0, 0], log.read_text()
    assert f"resuming {folder / saved}.pth.tar" in log.read_text()
    assert_same_run(pair(task), folder)


DYING = """
import os, signal, sys
from vizoo.tools import cli
from vizoo.tools.training.loop import Loop
backward, calls = Loop.backward, []
def dying(*args):
    calls.append(0)
    if os.environ["RANK"] == "1" and len(calls) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    backward(*args)
Loop.backward = dying
sys.exit(cli.main(sys.argv[1:]))
"""


@contextlib.contextmanager
def torchrun(words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
    with log.open("wb") as out:
        started = subprocess.Popen(launch, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        yield started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


@pytest.mark.slow
def test_torchrun_ends_when_one_is_killed(folders, pair, tmp_path) -> None:
    (tmp_path / "dying.py").write_text(DYING)
    words = command("scanpath", folders, tmp_path / "run", *PAIR["scanpath"], "--recovery-interval", "1")
    with torchrun([str(tmp_path / "dying.py"), *words], tmp_path / "log") as started:
        assert started.wait(timeout=120) == 1, (tmp_path / "log").read_text()
    assert newest_checkpoint(tmp_path / "run") == tmp_path / "run" / "recovery-1-3.pth.tar"
    assert together([*words, "--resume"], tmp_path / "log") == [0, 0]
    assert_same_run(pair("scanpath"), tmp_path / "run")


@pytest.mark.slow
def test_torchrun_that_is_stopped_saves(folders, tmp_path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    words = command("scanpath", folders, folder, *PAIR["scanpath"], "--epochs", "400", "--patience", "400")
    with torchrun(["-m", "vizoo.tools.train", *words[1:]], log) as started:
        until = time.monotonic() + 120
        while not (folder / "summary.csv").is_file() and started.poll() is None and time.monotonic() < until:
            time.sleep(0.1)
        started.send_signal(signal.SIGTERM)
        assert started.wait(timeout=60) != 0, log.read_text()
    said = log.read_text()
    assert "cpu x 2 processes" in said
    assert said.count("continue with the same command and --resume") == 1, said
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert f"saved {newest};" in said


@pytest.mark.parametrize("task", TASKS)
def test_nan_in_two_processes(task, folders, tmp_path) -> None:
    """Both end with status 1, whichever sees it."""
    more = ["-b", str(PER_BATCH[task] // 2), "--lr", "1e30", "--clip-grad", "1e30"]
    began = time.monotonic()
    ends = together(command(task, folders, tmp_path / "run", *more), tmp_path / "log")
    assert ends == [1, 1]
    assert time.monotonic() - began < 60
    assert "loss is" in (tmp_path / "log").read_text()
