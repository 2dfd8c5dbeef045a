"""A short training of every task: its words, ways to break it off, other processes, and what two runs have equal."""

from __future__ import annotations

import csv
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import shapes
import torch
from PIL import Image
from torch import nn

from vizoo.tools import cli
from vizoo.tools.training import loop
from vizoo.tools.training.loop import Loop

TASKS = ("classification", "detection", "segmentation", "scanpath")
SMALL = ["fpn_channels=16", "box_batch_size_per_image=32", "rpn_pre_nms_top_n_train=100", "rpn_post_nms_top_n_train=50"]
SMALL += ["rpn_pre_nms_top_n_test=100", "rpn_post_nms_top_n_test=50"]
DENSE = ["--model", "test_resnet", "-b", "4", "-j", "0", "--lr", "1e-3", "--device", "cpu"]


def write(root: Path) -> Path:
    """Write ``images``, class folders of dark and bright pictures, and ``shapes``, boxes and masks."""
    for split, count in (("train", 8), ("val", 4)):
        for k, name in enumerate(("bright", "dark")):
            (root / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng([k, i]).integers(0, 100, (20, 24, 3)) + 120 * (1 - k)
                Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / split / name / f"{i}.png")
    shapes.write(root / "shapes")
    return root


def words(task: str, folders: Path) -> list[str]:
    """A short training of each task."""
    if task == "classification":
        out = ["--data", str(folders / "images"), "--model", "test_resnet", "-b", "8", "-j", "0", "--img-size", "32"]
        return ["train", *out, "--lr", "0.05", "--warmup-epochs", "0", "--device", "cpu", "--epochs", "2"]
    if task == "scanpath":
        out = ["--data", "search", "--trials", "40", "--model", "test_oat", "--device", "cpu", "--lr", "1e-3"]
        return ["train", "--task", task, *out, "--grid", "2", "3", "--epochs", "2"]
    size = ["--size", "64", "80", "--arch-kwargs", *SMALL] if task == "detection" else ["--size", "32"]
    size += [] if task == "detection" else ["--arch", "semantic_fpn", "--arch-kwargs", "channels=16"]
    size += [] if task == "detection" else ["--reduce-zero-label"]
    return ["train", "--task", task, "--data", str(folders / "shapes"), *DENSE, *size, "--epochs", "2"]


def start(task: str, folders: Path, folder: Path, *more: str) -> int:
    return cli.main([*words(task, folders), "--output", str(folder.parent), "--experiment", folder.name, *more])


def draw_nothing(history: list[dict[str, float]], path: Path, *rest: Any) -> None:
    """Leave an empty picture in place of the curves, half a second sooner."""
    path.touch()


# what runs have equal


def read(path: Path) -> dict[str, Any]:
    return torch.load(path, map_location="cpu", weights_only=True)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "summary.csv", newline="") as f:
        return list(csv.DictReader(f))


def assert_same(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Equal structure and bit-identical values."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b or (a != a and b != b), where  # NaN is a figure of nothing


def assert_same_run(a: Path, b: Path) -> None:
    """Equal files, bit for bit, but for the times and names of the runs; nothing half-written."""
    assert (a / "summary.csv").read_text() == (b / "summary.csv").read_text()
    names = {p.name for p in a.iterdir()}
    assert names == {p.name for p in b.iterdir()}
    assert {"last.pth.tar", "model_best.pth.tar", "args.yaml", "curves.png"} <= names
    assert not [name for name in names if name.startswith(".") or name.endswith((".tmp", ".lock"))]
    for name in sorted(n for n in names if n.endswith(".pth.tar")):
        x, y = read(a / name), read(b / name)
        for part in ("args", "run"):
            for key in ("output", "experiment", "recovery_interval", "elapsed"):
                x[part].pop(key, None), y[part].pop(key, None)
        assert_same(x, y, name)


# ways to end


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


def die() -> None:
    raise Killed


def signalled(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def at_call(monkeypatch: Any, owner: type, name: str, number: int, action: Callable[[], None]) -> list[int]:
    """Do something before the given call of a method; returns a list that grows with the calls."""
    method, calls = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(0)
        if len(calls) == number:
            action()
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, counted)
    return calls


# processes beside each other


class Fault(NamedTuple):
    """A signal that one of several processes gets before a call of a method of the loop."""

    rank: int
    name: str
    call: int
    signum: int


# imports take seconds, so one process does them, and the others are forked from it
IMPORTS = [f"vizoo.tools.training.{name}" for name in ("classification", "dense", "scanpath")]
IMPORTS += ["torch.distributed", "torchmetrics.detection", "pycocotools.cocoeval", "matplotlib.figure", "rich.progress"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTS)


def together(
    words: Sequence[str], log: Path, size: int = 2, fault: Fault | None = None, alike: bool = False
) -> list[int | None]:
    """Run a command in several processes with gloo, as ``torchrun`` does.

    Args:
        words: The command.
        log: Where all of them print.
        size: Number of processes.
        fault: What happens to one of them.
        alike: Leave out what makes several processes differ from one: dropout and statistics of batches.

    Returns:
        The status of each; minus the signal that ended it.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    what = (list(words), str(log), fault, alike)
    processes = [FORKS.Process(target=_process, args=(rank, size, port, *what)) for rank in range(size)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=120)
    finally:
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def _process(rank: int, size: int, port: int, words: list[str], log: str, fault: Fault | None, alike: bool) -> None:
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()})
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1), os.dup2(output, 2)
    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "draw_curves", draw_nothing)
    if alike:
        patch.setattr(nn.BatchNorm2d, "train", lambda self, mode=True: nn.Module.train(self, False))
        for owner in (nn.Dropout, nn.Dropout2d):
            patch.setattr(owner, "forward", lambda self, x: x)
    if fault and fault.rank == rank:
        at_call(patch, Loop, fault.name, fault.call, signalled(fault.signum))
    sys.exit(cli.main(words))
