"""A short training of every task, for tests of what runs leave and of what commands refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import shapes
from PIL import Image

from vizoo.tools import cli

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
    size = ["--size", "96", "120", "--arch-kwargs", *SMALL] if task == "detection" else ["--size", "64"]
    size += [] if task == "detection" else ["--arch", "semantic_fpn", "--reduce-zero-label"]
    return ["train", "--task", task, "--data", str(folders / "shapes"), *DENSE, *size, "--epochs", "2"]


def start(task: str, folders: Path, folder: Path, *more: str) -> int:
    return cli.main([*words(task, folders), "--output", str(folder.parent), "--experiment", folder.name, *more])
