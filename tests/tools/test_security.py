"""No file that a command or a public function reads runs code, with ``vizoo.heads.mm`` imported."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import runs as made
from pickles import RUNS, WRITERS, text

import vizoo

pytestmark = pytest.mark.mm
SOURCE = str(Path(vizoo.__file__).parents[1])
CHOSEN = ("exec", "os", "numpy f2py", "numpy testing", "partial", "globals of a method", "state by name", "torch.hub")
SCRIPT = """
import contextlib, io, json, os, sys
import torch, timm
import vizoo.heads.mm
from vizoo.heads.classification import linear_probe
from vizoo.heads.detection import detector
from vizoo.heads.features import FeatureLevels
from vizoo.heads.segmentation import segmentor
from vizoo.tools import cli
from vizoo.tools.data.scanpaths import load_scanpaths
from vizoo.tools.training.run import load_training_checkpoint, newest_checkpoint

bad = json.loads(sys.argv[1])
functions = {
    "create_model": lambda f: timm.create_model("test_litv2", checkpoint_path=f),
    "pretrained file": lambda f: timm.create_model(
        "test_litv2", pretrained=True, pretrained_cfg_overlay={"file": f}
    ),
    "load_checkpoint": lambda f: timm.models.load_checkpoint(timm.create_model("test_nat"), f),
    "load_training_checkpoint": load_training_checkpoint,
    "load_scanpaths": load_scanpaths,
    "FeatureLevels": lambda f: FeatureLevels("test_nat", pretrained=f),
    "detector": lambda f: detector("retinanet", "test_nat", 3, pretrained=f),
    "segmentor": lambda f: segmentor("semantic_fpn", "test_nat", 3, pretrained=f),
    "torch.load": torch.load,
}
answers = []
for file, cases in bad.items():
    for name, function in functions.items() if os.path.isfile(file) else ():
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                function(file)
                what = 0
            except Exception as e:
                what = type(e).__name__
        answers.append([name, file, what, ""])
    for words in cases:
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            what = cli.main([word.replace("BAD", file) for word in words])
        answers.append([" ".join(words), file, what, errors.getvalue()])
    if os.path.exists("ran"):
        answers.append(["RAN", file, 0, ""])
        os.unlink("ran")
print("ANSWERS", json.dumps(answers))
"""
YAMLS = (
    "!!python/object/apply:os.system ['touch ran']\n",
    "epochs: !!python/object/apply:os.system ['touch ran']\n",
    "epochs: !!python/object/new:subprocess.check_call [['touch', 'ran']]\n",
    "!!python/module:antigravity\n",
)


def ask(files: dict[Path, list[list[str]]], cwd: Path) -> list[list]:
    """What each file or folder gets from the functions and from its commands, in one process, which imports much."""
    words = [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps({str(f): c for f, c in files.items()})]
    done = subprocess.run(
        words, env={**os.environ, "PYTHONPATH": SOURCE}, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    return json.loads(line.removeprefix("ANSWERS "))


def test_pickles(folders: Path, runs: Path, tmp_path: Path) -> None:
    """Every command that takes a file, and every public function, with pickles of many kinds in files of many kinds."""
    files = []
    for i, key in enumerate(CHOSEN):
        kind = list(WRITERS)[i % len(WRITERS)]
        files.append(tmp_path / f"{i}.pkl")
        entries = (
            b"".join(text(k) + b"}" for k in ("arch", "optimizer")) + text("epoch") + b"K\x00" + text("state_dict")
        )
        WRITERS[kind](files[-1], b"\x80\x02}(" + entries + RUNS[key] + b"u.")
    image = str(next((folders / "images").rglob("*.png")))
    where = ["--output", "out", "--experiment", "new"]
    cases = [
        *([*made.words(task, folders), *where, "--resume", "BAD"] for task in made.TASKS),
        [*made.words("classification", folders), *where, "--initial-checkpoint", "BAD"],
        [*made.words("classification", folders), *where, "--pretrained-path", "BAD"],
        ["train", "-c", "BAD", *where],
        ["train", "--task", "scanpath", "--data", "BAD", "--grid", "2", "3", *where],
        ["evaluate", str(runs / "scanpath"), "--data", "BAD", "--device", "cpu"],
        *(["evaluate", str(runs / task), "--checkpoint", "BAD", "--device", "cpu"] for task in made.TASKS),
        ["evaluate", "--model", "test_resnet", "--checkpoint", "BAD", "--data", str(folders / "images")],
        ["show", image, "--model", "test_medusa", "--checkpoint", "BAD"],
        ["mm", "convert", "litv2_s_mask-rcnn_8xb2-1x_coco", "--load-from", "BAD", "--out", "new.pth"],
        ["profile", "BAD"],
        ["bench", "BAD"],
    ]
    answers = ask(dict.fromkeys(files, cases), tmp_path)
    assert len(answers) == len(files) * (len(cases) + 9)
    for what, file, status, errors in answers:
        assert what != "RAN", file
        assert status not in (0, 1), (what, file)
        assert len(errors.strip().splitlines()) == isinstance(status, int), (what, file, errors)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(f.name for f in files)


def test_folders_of_runs(folders: Path, runs: Path, tmp_path: Path) -> None:
    """A whole run of somebody else: its checkpoints and its args.yaml run nothing, in evaluation and in going on."""
    made_by_others = {}
    for task in made.TASKS:
        going_on = [*made.words(task, folders), "--output", "BAD", "--experiment", ".", "--resume"]
        cases = [["evaluate", "BAD", "--device", "cpu"], going_on, ["train", "-c", "BAD/args.yaml", "--lr", "x"]]
        for i, key in enumerate(("exec", "partial", "os")):
            folder = tmp_path / f"{task}-run{i}"
            shutil.copytree(runs / task, folder)
            for file in folder.glob("*.pth.tar"):
                file.unlink()
                WRITERS["zip"](file, b"\x80\x02" + RUNS[key] + b".")
            made_by_others[folder] = cases
        for i, content in enumerate(YAMLS):
            folder = tmp_path / f"{task}-yaml{i}"
            folder.mkdir()
            (folder / "args.yaml").write_text(f"task: {task}\n" * (i == 1) + content)
            made_by_others[folder] = cases
    answers = ask(made_by_others, tmp_path)
    assert [a[2] for a in answers] == [2] * sum(map(len, made_by_others.values())), answers
    assert not (tmp_path / "ran").exists()
