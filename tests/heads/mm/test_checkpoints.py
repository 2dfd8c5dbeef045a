"""No checkpoint runs code, however it is read with ``vizoo.heads.mm`` imported; those of mmengine load all the same."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pickles import CORRUPT, RUNS, WRITERS, text

import vizoo
from vizoo.heads.checkpoints import NUMPY_GLOBALS, mmengine_checkpoints, read_checkpoint

pytestmark = [pytest.mark.mm, pytest.mark.usefixtures("fast_parsing")]
pytest.importorskip("mmengine", reason="needs mmengine (extra mm), not installed")

SOURCE = str(Path(vizoo.__file__).parents[1])


def python(code: str, *argv: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A fresh process."""
    words = [sys.executable, "-W", "ignore", "-c", code, *map(str, argv)]
    env = {**os.environ, "PYTHONPATH": SOURCE, "TORCH_HOME": str(cwd / "torch")}
    return subprocess.run(words, env=env, cwd=cwd, capture_output=True, text=True, check=False)


WITHOUT_LIMITS = """
import json, os, pathlib, pickle, sys
ran = []
for path in sorted(pathlib.Path(sys.argv[1]).glob("*.raw")):
    try:
        pickle.loads(path.read_bytes())
    except Exception as e:
        print(path, e, file=sys.stderr)
    if os.path.exists("ran"):
        ran.append(path.stem)
        os.unlink("ran")
print(json.dumps(ran))
"""
READERS = """
import contextlib, functools, http.server, io, json, os, pathlib, sys, threading
import timm, torch
import vizoo.heads.mm as mm
from mmengine.config import config as parser, utils
from mmengine.runner import CheckpointLoader, load_checkpoint
from vizoo.heads.checkpoints import mmengine_checkpoints, read_checkpoint
from vizoo.heads.segmentation import load_segmentor, segmentor
from vizoo.tools import cli

utils.load, parser.is_installed = functools.cache(utils.load), functools.cache(parser.is_installed)  # once is enough
config = sys.argv[1]
model = segmentor("semantic_fpn", "test_nat", 3)


def load_without_limits(path, map_location):
    return torch.load(path.removeprefix("unsafe://"), weights_only=False)


CheckpointLoader.register_scheme("unsafe://", load_without_limits)
handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=os.getcwd())
handler.func.log_message = lambda *args: None
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
threading.Thread(target=server.serve_forever, daemon=True).start()


def within(path):
    with mmengine_checkpoints():
        torch.load(path, weights_only=False)


def backbone(path):
    mm.VizooBackbone("test_nat", pretrained=path).init_weights()


def command(*words):
    def run(path):
        status = cli.main(["mm", words[0], config, "--work-dir", "work", *words[1:], path])
        raise SystemExit(status)
    return run


readers = {
    "read_checkpoint": read_checkpoint,
    "load_segmentor": lambda path: load_segmentor(model, path),
    "torch.load": torch.load,
    "within": within,
    "create_model": lambda path: timm.create_model("test_nat", checkpoint_path=path),
    "load_checkpoint": lambda path: load_checkpoint(torch.nn.Linear(1, 1), path),
    "scheme": lambda path: CheckpointLoader.load_checkpoint("unsafe://" + path),
    "http": lambda path: CheckpointLoader.load_checkpoint(f"http://127.0.0.1:{server.server_port}/{path}"),
    "backbone": backbone,
}
commands = {
    "convert": command("convert", "--out", "out.pth", "--load-from"),
    "test": command("test", "--load-from"),
    "train": command("train", "--load-from"),
    "resume": command("train", "--resume"),
}
answers = []
for path in sorted(p.name for p in pathlib.Path().glob("*.pth")):
    for reader, read in {**readers, **(commands if path.endswith(".all.pth") else {})}.items():
        errors, what = io.StringIO(), None
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                read(path)
            except SystemExit as e:
                what = e.code
            except Exception as e:
                what = type(e).__name__ + ": " + str(e)
        answers.append([path, reader, what, errors.getvalue(), os.path.exists("ran")])
        for made in ("ran", "out.pth", "work"):
            if os.path.exists(made):
                answers[-1][4] = True
                os.rename(made, f"{made}-{len(answers)}")
print("ANSWERS", json.dumps(answers))
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, write_config: Any) -> Path:
    """A folder of malicious files, a config, and code that torch.hub would run."""
    folder = tmp_path_factory.mktemp("files")
    write_config(folder / "config.py", "semantic_fpn", "test_nat", options="feature_norms=(0, 1, 2, 3)")
    (folder / "hub").mkdir()
    (folder / "hub" / "hubconf.py").write_text("def entry():\n    open('ran', 'w').close()\n")
    for i, pickled in enumerate([*RUNS.values(), *CORRUPT.values()]):
        data = b"\x80\x02}" + text("state_dict") + pickled + b"s."
        for kind, write in WRITERS.items():
            if kind == "zip" or i % 3 == 0:
                write(folder / f"{i:02d}.{kind}{'.all' * (i % 3 == 1)}.pth", data)
        if i < len(RUNS):
            (folder / f"{i:02d}.raw").write_bytes(data)
    torch.jit.script(torch.nn.Linear(2, 2)).save(folder / "99.script.all.pth")
    return folder


def test_the_pickles_run_code_without_limits(files: Path) -> None:
    """Otherwise the next test would show nothing."""
    done = python("import mmengine.logging, numpy.f2py, torch.hub\n" + WITHOUT_LIMITS, files, cwd=files)
    ran = json.loads(done.stdout.splitlines()[-1])
    assert len(ran) == len(RUNS), done.stderr


def test_nothing_runs(files: Path) -> None:
    """Every way to read a file: an error, no code, nothing written; the commands say it in one line."""
    done = python(READERS, files / "config.py", cwd=files)
    assert done.returncode == 0, done.stderr[-3000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS "))
    answers = json.loads(line.removeprefix("ANSWERS "))
    assert len(answers) > 9 * (len(RUNS) + len(CORRUPT))
    for path, reader, what, errors, written in answers:
        where = f"{path} through {reader}: {what} {errors}"
        assert not written, where
        assert what is not None, where
        if reader in ("convert", "test", "train", "resume"):
            assert what == 2, where
            assert errors.startswith("vizoo mm: error: --"), where
            assert len(errors.splitlines()) == 1, where
        if reader in ("read_checkpoint", "load_segmentor"):
            assert what.startswith("ValueError: "), where
            assert "\n" not in what, where


# what loads


class Meta:
    """A class that a user allowed."""


def test_the_list_is_never_left(tmp_path: Path) -> None:
    """Names of the user stay; those that we answer are ours while a file is read, and the user's again after it."""
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": Meta()}, tmp_path / "own.pth")
    with torch.serialization.safe_globals([Meta, getattr, np.ndarray]):
        before = set(torch.serialization.get_safe_globals())
        assert isinstance(read_checkpoint(tmp_path / "own.pth")["meta"], Meta)
        with mmengine_checkpoints(), mmengine_checkpoints():
            inside = torch.serialization.get_safe_globals()
            assert getattr not in inside
            assert Meta in inside
        assert set(torch.serialization.get_safe_globals()) == before
    code = """
import torch
import vizoo.heads.mm
known = torch.serialization.get_safe_globals()
names = [g[1] if isinstance(g, tuple) else f"{g.__module__}.{g.__qualname__}" for g in known]
print([n for n in names if "getattr" in n or "numpy" in n or "HistoryBuffer" in n])
"""
    assert python(code, cwd=tmp_path).stdout.splitlines()[-1] == "[]"


VALUES = [
    *(np.float64(2.5), np.int32(-3), np.bool_(True), np.complex64(1j), np.float16(0.5), np.str_("gaze")),
    *(np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.zeros((0, 3)), np.array(3), np.array([True])),
    *(np.array(["ab", "c"]), np.array([b"ab", b"c"]), np.array([1, "x", None], dtype=object)),
    *(np.arange(3, dtype=">i2"), np.arange(4, dtype=np.uint8)[::2], np.ones(3, np.float16)),
]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_numpy_globals(protocol: int) -> None:
    """Numbers, text and objects of NumPy load as by NumPy itself, and are written as by it again."""

    class Limited(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            return NUMPY_GLOBALS[module, name]

    for value in VALUES:
        data = pickle.dumps(value, protocol)
        expected, found = pickle.loads(data), Limited(io.BytesIO(data)).load()
        again = pickle.loads(pickle.dumps(found, protocol))
        for result in (found, again):
            assert isinstance(result, type(expected))
            assert np.asarray(result).dtype == np.asarray(expected).dtype
            assert np.asarray(result).tolist() == np.asarray(expected).tolist()
        assert type(again) is type(expected)


@pytest.fixture
def runner(tmp_path: Path) -> Any:
    """Function that gives a runner of mmengine for a number of epochs."""
    from mmengine.model import BaseModel
    from mmengine.runner import Runner

    class Model(BaseModel):
        def __init__(self) -> None:
            super().__init__()
            self.fc = torch.nn.Linear(2, 1)

        def forward(self, inputs: torch.Tensor, mode: str) -> dict[str, torch.Tensor]:
            return {"loss": self.fc(inputs).square().mean()}

    def runner(epochs: int, **options: Any) -> Runner:
        loader = {
            "dataset": [torch.ones(2)] * 4,
            "batch_size": 2,
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": lambda items: {"inputs": torch.stack(items)},
        }
        return Runner(
            Model(),
            str(tmp_path / "work"),
            train_dataloader=loader,
            train_cfg={"by_epoch": True, "max_epochs": epochs},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1}},
            default_hooks={"logger": {"type": "LoggerHook", "interval": 1}},
            experiment_name=f"{tmp_path.name}_{epochs}",
            **options,
        )

    return runner


def test_resume_in_mmengine(runner: Any, tmp_path: Path) -> None:
    """The logs go on as mmengine's own; a config in the file, which is a program, is not run."""
    from mmengine.logging import HistoryBuffer
    from mmengine.runner import CheckpointLoader

    first = runner(1)
    first.train()
    file = tmp_path / "work" / "epoch_1.pth"
    with mmengine_checkpoints(HistoryBuffer):
        saved = torch.load(file)
    saved["meta"].update(config=f"open({str(tmp_path / 'ran')!r}, 'w').close()", score=np.float64(0.5), best=np.ones(2))
    torch.save(saved, file)
    again = CheckpointLoader.load_checkpoint(str(file))
    assert again["meta"]["score"] == 0.5
    assert again["meta"]["best"].tolist() == [1.0, 1.0]
    second = runner(2, resume=True)
    second.train()
    losses = second.message_hub.log_scalars["train/loss"]
    assert type(losses) is HistoryBuffer
    assert len(losses.data[0]) == 4
    assert losses.statistics("mean") == pytest.approx(losses.data[0].mean())
    assert second.epoch == 2
    assert not (tmp_path / "ran").exists()
    torch.save({"logs": losses}, tmp_path / "again.pth")
    with mmengine_checkpoints(HistoryBuffer):
        assert type(torch.load(tmp_path / "again.pth")["logs"]) is HistoryBuffer
    code = (
        "import sys; sys.modules['mmengine'] = None; from vizoo.heads.checkpoints import read_checkpoint; "
        "found = read_checkpoint(sys.argv[1]); logs = found['message_hub']['log_scalars']['train/loss']; "
        "print(found['state_dict']['fc.weight'].tolist(), logs._log_history.tolist())"
    )
    done = python(code, tmp_path / "work" / "epoch_2.pth", cwd=tmp_path)
    expected = [second.model.fc.weight.tolist(), losses.data[0].tolist()]
    assert done.stdout.strip() == " ".join(map(str, expected)), done.stderr


def test_diverged(runner: Any, tmp_path: Path) -> None:
    """No checkpoint of a model that is broken."""
    broken = runner(1, custom_hooks=[{"type": "StopWhenDiverged"}])
    torch.nn.init.constant_(broken.model.fc.weight, float("nan"))
    with pytest.raises(FloatingPointError, match="the training loss is nan in iteration 1; lower"):
        broken.train()
    assert not list((tmp_path / "work").glob("*.pth"))
