"""Detectors and segmentors trained by mmdet and mmseg on tiny pictures: accuracy, inference, resume, processes."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import vizoo
from vizoo.heads.checkpoints import read_checkpoint
from vizoo.tools import cli

pytestmark = [pytest.mark.mm, pytest.mark.usefixtures("fast_parsing")]
pytest.importorskip("mmengine", reason="needs mmengine (extra mm), not installed")
importlib.import_module("vizoo.heads.mm")  # before anything of mmdet and mmseg

NO_VALIDATION = "val_cfg = val_dataloader = val_evaluator = None\n"
SOURCE = str(Path(vizoo.__file__).parents[1])


def flat(config: Path) -> Path:
    """The config without bases, whose parsing takes a fresh process seconds."""
    from mmengine.config import Config

    path = config.with_name(f"flat_{config.name}")
    Config.fromfile(config, import_custom_modules=False).dump(path)
    return path


class Run(NamedTuple):
    """A finished training; ``scalars`` maps each logged name to its values."""

    config: Path
    work_dir: Path
    scalars: dict[str, np.ndarray]

    def last(self, name: str) -> float:
        return float(self.scalars[name][-1])

    @property
    def checkpoint(self) -> Path:
        return Path((self.work_dir / "last_checkpoint").read_text())


@pytest.fixture(scope="module")
def trained(tmp_path_factory, write_config, train):
    """Function that trains a config once in this process."""
    folder = tmp_path_factory.mktemp("trained")

    def trained(name: str, kind: str, backbone: str, extra: str = "", **values: Any) -> Run:
        config, work_dir = write_config(folder / f"{name}.py", kind, backbone, extra, **values), folder / name
        runner = train(config, work_dir)
        logged = runner.message_hub.log_scalars
        return Run(config, work_dir, {k: v.data[0].copy() for k, v in logged.items()})

    return trained


@pytest.fixture(scope="module")
def mask_rcnn(trained) -> Run:
    return trained("mask_rcnn", "mask_rcnn", "test_litv2", epochs=10, options="feature_norms=(0, 1, 2, 3)")


@pytest.fixture(scope="module")
def retinanet(trained) -> Run:
    return trained("retinanet", "retinanet", "resnet18", epochs=2, options="frozen_stages=0, norm_eval=True")


@pytest.fixture(scope="module")
def upernet(trained) -> Run:
    return trained("upernet", "upernet", "test_nat", steps=36, options="feature_norms=(0, 1, 2, 3)")


@pytest.fixture(scope="module")
def semantic_fpn(trained) -> Run:
    return trained("semantic_fpn", "semantic_fpn", "test_litv2", steps=40, options="feature_norms=(0, 1, 2, 3)")


@pytest.fixture(scope="module")
def picture(shapes) -> str:
    return str(shapes / "images" / "validation" / "0.png")


# accuracy


def test_mask_rcnn_learns(mask_rcnn):
    assert mask_rcnn.last("val/coco/bbox_mAP_50") >= 0.7
    assert mask_rcnn.last("val/coco/segm_mAP_50") >= 0.7


def test_upernet_learns(upernet):
    assert upernet.last("val/mIoU") >= 40


def test_semantic_fpn_learns(semantic_fpn):
    assert semantic_fpn.last("val/mIoU") >= 40


def test_retinanet_trains(retinanet):
    losses = retinanet.scalars["train/loss"]
    assert len(losses) == 8
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0]
    state = read_checkpoint(retinanet.checkpoint)
    assert state["meta"]["epoch"] == 2
    stem = [v for k, v in state["state_dict"].items() if k.startswith("backbone.body.bn1.running_mean")]
    assert len(stem) == 1
    assert not stem[0].any()  # frozen: as it was


def test_test_command(semantic_fpn, tmp_path, capsys):
    """``vizoo mm test`` measures what training measured."""
    words = [str(semantic_fpn.config), "--load-from", str(semantic_fpn.checkpoint), "--work-dir", str(tmp_path)]
    assert cli.main(["mm", "test", *words]) == 0
    capsys.readouterr()
    (found,) = tmp_path.glob("*/*.json")
    measured = json.loads(found.read_text().splitlines()[-1])
    assert measured["mIoU"] == pytest.approx(semantic_fpn.last("val/mIoU"))


def test_checkpoint_of_another_model(semantic_fpn, upernet, tmp_path, capsys):
    """mmengine alone would load what fits and measure random weights."""
    words = [str(semantic_fpn.config), "--load-from", str(upernet.checkpoint), "--work-dir", str(tmp_path)]
    assert cli.main(["mm", "test", *words]) == 2
    message = capsys.readouterr().err
    assert "does not fit the config" in message
    assert "missing: backbone.body.model." in message
    assert "unexpected: auxiliary_head." in message
    assert "of another shape: " in message


# inference


def test_detector_api(mask_rcnn, picture):
    from mmdet.apis import inference_detector, init_detector

    model = init_detector(str(mask_rcnn.config), str(mask_rcnn.checkpoint), device="cpu")
    assert model.dataset_meta["classes"] == ("rectangle", "disc", "triangle")
    found = inference_detector(model, picture).pred_instances
    n = len(found.scores)
    assert n > 0
    assert found.scores.max() > 0.5
    assert found.bboxes.shape == (n, 4)
    assert found.masks.shape == (n, 128, 160)


def test_det_inferencer(mask_rcnn, picture):
    from mmdet.apis import DetInferencer

    inferencer = DetInferencer(str(mask_rcnn.config), str(mask_rcnn.checkpoint), device="cpu", show_progress=False)
    (found,) = inferencer(picture)["predictions"]
    assert len(found["bboxes"]) == len(found["scores"]) == len(found["masks"]) > 0
    assert max(found["scores"]) > 0.5


def test_segmentor_api(semantic_fpn, shapes, picture):
    from mmseg.apis import MMSegInferencer, inference_model, init_model
    from PIL import Image

    model = init_model(str(semantic_fpn.config), str(semantic_fpn.checkpoint), device="cpu")
    found = inference_model(model, picture).pred_sem_seg.data
    assert found.shape == (1, 128, 160)
    with Image.open(shapes / "annotations" / "validation" / "0.png") as mask:
        truth = torch.from_numpy(np.array(mask).astype(int)) - 1
    assert (found[0] == truth).float().mean() > 0.8
    inferencer = MMSegInferencer(
        str(semantic_fpn.config),
        str(semantic_fpn.checkpoint),
        classes=model.dataset_meta["classes"],
        palette=model.dataset_meta["palette"],
        device="cpu",
    )
    assert np.array_equal(inferencer(picture)["predictions"], found[0].numpy())


def test_weights_of_the_backbone(trained, retinanet, semantic_fpn, tmp_path, monkeypatch):
    """Training loads them; inference, which has all weights in its checkpoint, never asks for them."""
    import timm
    from mmdet.apis import DetInferencer, init_detector
    from mmengine.config import Config
    from mmseg.apis import MMSegInferencer, init_model

    state = timm.create_model("resnet18").state_dict()
    torch.save(state, tmp_path / "resnet18.pth")
    options = f'frozen_stages=4, norm_eval=True, pretrained="{tmp_path / "resnet18.pth"}"'
    run = trained("pretrained", "retinanet", "resnet18", NO_VALIDATION, options=options)
    kept = {k: v for k, v in read_checkpoint(run.checkpoint)["state_dict"].items() if ".body." in k}
    assert kept
    for k, v in kept.items():
        assert torch.equal(v, state[k.removeprefix("backbone.body.")]), k

    def unreachable(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", unreachable)
    for run, inits in ((retinanet, (init_detector, DetInferencer)), (semantic_fpn, (init_model, MMSegInferencer))):
        cfg = Config.fromfile(run.config)
        cfg.model.backbone.pretrained = True
        cfg.dump(tmp_path / "c.py")
        model, inferencer = (init(str(tmp_path / "c.py"), str(run.checkpoint), device="cpu") for init in inits)
        wanted = read_checkpoint(run.checkpoint)["state_dict"]
        for found in (model.state_dict(), inferencer.model.state_dict()):
            for k, v in wanted.items():
                assert torch.equal(found[k], v), k


# resume


def assert_equal(a: Path, b: Path) -> None:
    """Weights and optimiser of two checkpoints, bit for bit."""
    first, second = (read_checkpoint(p) for p in (a, b))
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for k, v in first["state_dict"].items():
        assert torch.equal(v, second["state_dict"][k]), k
    for group in first["optimizer"]["state"]:
        for k, v in first["optimizer"]["state"][group].items():
            assert torch.equal(v, second["optimizer"]["state"][group][k]), (group, k)


def test_resume_by_epoch(retinanet, tmp_path, train):
    """From the newest checkpoint to the end: as if nothing had happened."""
    work_dir = tmp_path / "stopped"
    work_dir.mkdir()
    shutil.copy(retinanet.work_dir / "epoch_1.pth", work_dir)
    (work_dir / "last_checkpoint").write_text(str(work_dir / "epoch_1.pth"))
    runner = train(retinanet.config, work_dir, "--resume")
    assert (runner.epoch, runner.iter) == (2, 8)
    assert_equal(work_dir / "epoch_2.pth", retinanet.work_dir / "epoch_2.pth")


def test_killed_with_spawned_workers(trained, train, tmp_path):
    """A run with a spawned data worker, killed, goes on exactly like one that was never stopped."""
    worker = "train_dataloader.update(num_workers=1)\n" + NO_VALIDATION
    whole = trained("whole", "semantic_fpn", "test_nat", worker, steps=6, interval=2, options="drop_path_rate=0.3")
    stopped = tmp_path / "stopped"
    options = ["train_cfg.max_iters=100000", "env_cfg.mp_cfg.mp_start_method=spawn"]
    argv = ["train", str(flat(whole.config)), "--work-dir", str(stopped), "--cfg-options", *options]
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", "from vizoo.tools.cli import main; raise SystemExit(main())", "mm", *argv],
            env={**os.environ, "PYTHONPATH": SOURCE},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        while process.poll() is None and not (stopped / "iter_4.pth").is_file():
            time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert (stopped / "iter_2.pth").is_file(), log.read_text()[-3000:]
    foreign = ("pkg_resources is deprecated", "is an Enum subclass", "``build_loss`` would be deprecated")
    assert not [text for text in foreign if text in log.read_text()]  # in this process and in the worker
    runner = train(whole.config, stopped, "--resume", str(stopped / "iter_2.pth"))
    assert runner.iter == 6
    assert_equal(stopped / "iter_6.pth", whole.work_dir / "iter_6.pth")


# several processes

WITNESS = """
import json
import torch
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class Witness(Hook):
    def after_train(self, runner):
        parameters = [p.double().sum().item() for p in runner.model.parameters()]
        wrapper = type(runner.model).__name__
        norms = sorted({type(m).__name__ for m in runner.model.modules() if "Norm" in type(m).__name__})
        with open(f"{runner.work_dir}/rank{get_rank()}.json", "w") as file:
            json.dump({"parameters": parameters, "wrapper": wrapper, "norms": norms, "iter": runner.iter,
                       "images": self.images}, file)

    def before_train(self, runner):
        self.images = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.images += [s.img_path for s in data_batch["data_samples"]]
"""


@pytest.mark.slow
def test_two_processes(write_config, tmp_path):
    """gloo on CPUs: SyncBN becomes BN, every process sees images of its own, and the weights stay together."""
    (tmp_path / "witness.py").write_text(WITNESS)
    extra = (
        'custom_imports = dict(imports=["vizoo.heads.mm", "witness"], allow_failed_imports=False)\n'
        'custom_hooks = [dict(type="Witness")]\n'
        f"{NO_VALIDATION}"
        "train_dataloader.update(batch_size=2)\n"
        'model.update(backbone=dict(_delete_=True, type="VizooBackbone", model_name="test_nat"))\n'
    )
    config = write_config(tmp_path / "config.py", "upernet", "test_nat", extra, steps=4)
    work_dir = tmp_path / "work"
    argv = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "vizoo.tools.mm"]
    argv += ["train", str(flat(config)), "--work-dir", str(work_dir), "--launcher", "pytorch", "--no-check-data"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([SOURCE, str(tmp_path)])}
    done = subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((work_dir / f"rank{r}.json").read_text()) for r in (0, 1))
    assert first["wrapper"] == "MMDistributedDataParallel"
    assert first["iter"] == 4
    assert "SyncBatchNorm" not in first["norms"]
    assert not set(first["images"][:8]) & set(second["images"][:8])
    assert len(first["parameters"]) > 50
    for a, b in zip(first["parameters"], second["parameters"], strict=True):
        assert math.isclose(a, b, rel_tol=0, abs_tol=0)
