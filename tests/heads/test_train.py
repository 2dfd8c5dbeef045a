"""``vizoo train`` and ``vizoo evaluate`` of detectors and segmentors: learning, exact resume, figures, bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from runs import rows
from torch.utils.data import Dataset

from vizoo.tools import cli
from vizoo.tools.training import dense as tool

SMALL = [
    "fpn_channels=32",
    "box_batch_size_per_image=64",
    "rpn_pre_nms_top_n_train=300",
    "rpn_post_nms_top_n_train=100",
]
SMALL += ["rpn_pre_nms_top_n_test=300", "rpn_post_nms_top_n_test=100"]
DETECTION = ["--task", "detection", "--size", "128", "160", "--arch-kwargs", *SMALL]
SEGMENTATION = ["--task", "segmentation", "--size", "128", "--scale", "0.8", "1.25", "--reduce-zero-label"]
SEGMENTATION += ["--arch-kwargs", "channels=32"]
SHARED = ["-b", "4", "-j", "0", "--lr", "1e-3", "--warmup-updates", "5", "--clip-grad", "5", "--device", "cpu"]


def train(data: Path, folder: Path, words: list[str], *more: str) -> int:
    where = ["--data", str(data), "--output", str(folder.parent), "--experiment", folder.name]
    return cli.main(["train", *words, *SHARED, *where, *more])


@pytest.fixture(scope="module")
def detector_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "det"
    assert train(shapes, folder, DETECTION, "--model", "test_litv2", "--epochs", "12") == 0
    return folder


@pytest.fixture(scope="module")
def segmentor_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "seg"
    words = ["--model", "test_dinat_s", "--arch", "upernet", "--epochs", "6"]
    assert train(shapes, folder, SEGMENTATION, *words) == 0
    return folder


@pytest.mark.slow
def test_detector_learns(detector_run: Path) -> None:
    assert max(float(r["AP50"]) for r in rows(detector_run)) >= 80
    assert float(rows(detector_run)[0]["lr"]) > float(rows(detector_run)[-1]["lr"]) > 0
    with Image.open(detector_run / "curves.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.slow
def test_segmentor_learns(segmentor_run: Path) -> None:
    """All background would be 22 %."""
    assert max(float(r["mIoU"]) for r in rows(segmentor_run)) >= 40


@pytest.mark.slow
def test_semantic_fpn_learns(shapes: Path, tmp_path: Path) -> None:
    words = ["--model", "test_nat", "--arch", "semantic_fpn", "--epochs", "5"]
    assert train(shapes, tmp_path / "run", SEGMENTATION, *words) == 0
    assert max(float(r["mIoU"]) for r in rows(tmp_path / "run")) >= 40


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["detector", "segmentor"])
def test_evaluation_repeats_training(kind: str, request, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The best epoch again, figures as JSON, a picture with more than one colour."""
    folder = request.getfixturevalue(f"{kind}_run")
    out, plot = tmp_path / "figures.json", tmp_path / "picture.png"
    assert cli.main(["evaluate", str(folder), "--out", str(out), "--plot", str(plot), "--device", "cpu"]) == 0
    found = json.loads(out.read_text())
    key = "AP" if kind == "detector" else "mIoU"
    assert found[key] == pytest.approx(max(float(r[key]) for r in rows(folder)), rel=1e-5)
    names = [c["name"] for c in found["classes"]]
    assert names == [*["background"] * (kind == "segmentor"), "rectangle", "disc", "triangle"]
    printed = capsys.readouterr().out
    assert f"{key} {found[key]:.2f}" in printed
    assert "triangle" in printed
    with Image.open(plot) as picture:
        assert len(picture.convert("RGB").getcolors(10**7)) > 1000


def fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert cli.main([str(w) for w in words]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    return message


@pytest.fixture
def never_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool, "build", lambda *args: pytest.fail("a model was built"))


@pytest.mark.usefixtures("never_built")
def test_bad_data_is_told_before_anything_is_built(shapes, tmp_path, capsys) -> None:
    det, seg = ["train", *DETECTION, "--data"], ["train", *SEGMENTATION, "--data"]
    assert "0 files annotations/instances_train*.json, need one" in fails(capsys, *det, tmp_path)
    assert "neither images/training (ADE20K) nor ImageSets/Segmentation/train.txt" in fails(
        capsys, *seg, tmp_path, "--num-classes", "4"
    )
    shutil.copytree(shapes, tmp_path / "a")
    file = tmp_path / "a" / "annotations" / "instances_training.json"
    data = json.loads(file.read_text())
    data["annotations"][0]["category_id"] = 77
    data["annotations"][1]["bbox"][0] = 1000
    file.write_text(json.dumps(data))
    (tmp_path / "a" / "images" / "training" / "3.png").unlink()
    message = fails(capsys, *det, tmp_path / "a")
    for text in ("instances_training.json", "annotation 0: category_id 77", "annotation 1: bbox [1000", "3.png"):
        assert text in message
    assert "3: image" in fails(capsys, *seg, tmp_path / "a")
    (tmp_path / "a" / "annotations" / "training" / "3.png").unlink()
    (tmp_path / "a" / "annotations" / "validation" / "2.png").unlink()
    assert "2: mask" in fails(capsys, *seg, tmp_path / "a")
    (tmp_path / "a" / "classes.txt").unlink()
    assert "--num-classes is missing" in fails(capsys, *seg, tmp_path / "a")
    assert "class id 4, need 1 to 3" in fails(capsys, *seg, tmp_path / "a", "--num-classes", "3")


def test_bad_options(shapes, tmp_path, capsys) -> None:
    det, seg = (["train", *w, *SHARED, "--data", shapes, "--output", tmp_path] for w in (DETECTION, SEGMENTATION))
    assert "--arch: invalid choice: 'yolo'" in fails(capsys, *det, "--arch", "yolo")
    assert "--lr: got -1, must be a finite number above 0" in fails(capsys, *det, "--lr", "-1")
    assert "--scale" in fails(capsys, *seg, "--scale", "2", "1")
    assert "--batch-size 1: the batch norms of UPerNet" in fails(capsys, *seg, "-b", "1")
    assert "--num-classes 7: " in fails(capsys, *seg, "--num-classes", "7")
    assert "no feature of stride 8" in fails(capsys, *det, "--arch", "fcos", "--model", "vit_tiny_patch16_224")
    assert "--batch-size 99 exceeds the 16 training images" in fails(capsys, *det, "--model", "test_resnet", "-b", "99")
    assert "--opt 'nothing'" in fails(capsys, *det, "--model", "test_resnet", "--opt", "nothing")
    assert "no folder of 'vizoo train --task detection'" in fails(
        capsys, "evaluate", tmp_path, "--task", "detection", "--device", "cpu"
    )


def test_run_is_kept(shapes, tmp_path, capsys) -> None:
    """No run is overwritten, and one that goes on keeps its settings."""
    words = ["--model", "test_resnet", "--epochs", "1"]
    assert train(shapes, tmp_path / "run", SEGMENTATION, *words) == 0
    where = ["--data", shapes, "--output", tmp_path, "--experiment", "run"]
    again = ["train", *SEGMENTATION, *SHARED, *words, *where]
    assert "holds a run; add --resume" in fails(capsys, *again)
    assert "--batch-size was 4 and is 2; it must not change" in fails(capsys, *again, "-b", "2", "--resume")
    options = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert options["classes"] == ["background", "rectangle", "disc", "triangle"]
    bad = tmp_path / "bad.pth"
    torch.save({"arch": "x", "epoch": 0, "optimizer": {}, "state_dict": {"a": torch.zeros(1)}}, bad)
    run = ["evaluate", tmp_path / "run", "--device", "cpu"]
    assert "does not fit the run" in fails(capsys, *run, "--checkpoint", bad)
    assert "--plot 'x.jpg': the ending must be .png" in fails(capsys, *run, "--plot", "x.jpg")
    other = tmp_path / "other"
    shutil.copytree(shapes, other)
    (other / "classes.txt").write_text("background\nsquare\ndisc\ntriangle\n")
    assert "was trained on" in fails(capsys, *run, "--data", other)


class _Answers(torch.nn.Module):
    """A detector that knows the truth, or a segmentor that is right but for one class."""

    def __init__(self, data: Dataset) -> None:
        super().__init__()
        self.answers = [data[i][1] for i in range(len(data))]  # type: ignore[arg-type]

    def forward(self, images):
        if isinstance(images, list):
            batch, self.answers = self.answers[: len(images)], self.answers[len(images) :]
            return [
                {**{k: t[k] for k in ("boxes", "labels")}, "scores": torch.ones(len(t["labels"])),
                 "masks": t["masks"][:, None].float()}
                for t in batch
            ]  # fmt: skip
        ids, *self.answers = self.answers
        ids = ids.where(ids != 3, 0)  # triangles are called background
        return {"out": torch.nn.functional.one_hot(ids.clamp_max(3), 4).permute(2, 0, 1)[None].float() * 9}


def test_figures_of_known_answers(shapes: Path) -> None:
    options = {"batch_size": 4, "workers": 0, "amp": False, "check_data": "full", "data": str(shapes)}
    device = torch.device("cpu")
    parts = tool.open_parts({**options, "task": "detection", "arch": "mask_rcnn", "hflip": 0.0})
    found = tool.figures(_Answers(parts.val), parts.val, parts.classes, 4, 0, device)
    assert {k: found[k] for k in ("AP", "AP50", "AP_mask", "AP50_mask")} == dict.fromkeys(
        ("AP", "AP50", "AP_mask", "AP50_mask"), pytest.approx(100)
    )
    extra = {"reduce_zero_label": True, "size": [128], "scale": [1, 1], "hflip": 0.0}
    parts = tool.open_parts({**options, **extra, "task": "segmentation"})
    found = tool.figures(_Answers(parts.val), parts.val, parts.classes, 4, 0, device)
    by_hand = {c["name"]: c for c in found["classes"]}
    assert by_hand["triangle"]["IoU"] == 0
    assert by_hand["rectangle"]["IoU"] == by_hand["disc"]["IoU"] == pytest.approx(100)
    assert by_hand["background"]["Acc"] == pytest.approx(100)
    pixels = [(parts.val[i][1] == 3).sum().item() for i in range(len(parts.val))]
    assert found["pixel_accuracy"] == pytest.approx(100 * (1 - sum(pixels) / (6 * 160 * 128)))
    assert found["mIoU"] == pytest.approx((by_hand["background"]["IoU"] + 200) / 4)


def test_voc_folder(tmp_path: Path) -> None:
    """Lists of names, masks with a palette, 255 for no class, with which training crops are padded too."""
    names = {"train": ["a", "b"], "val": ["c"]}
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for part, stems in names.items():
        (tmp_path / "ImageSets" / "Segmentation" / f"{part}.txt").write_text("\n".join(stems) + "\n")
        for stem in stems:
            Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "JPEGImages" / f"{stem}.jpg")
            mask = Image.new("P", (40, 30), 2)
            mask.putpalette([v for i in range(256) for v in (i, 255 - i, i)])
            mask.paste(255, (0, 0, 40, 3))
            mask.save(tmp_path / "SegmentationClass" / f"{stem}.png")
    options = {"task": "segmentation", "data": str(tmp_path), "num_classes": 3, "reduce_zero_label": False}
    options |= {"size": [64], "scale": [1, 1], "hflip": 0.0, "check_data": "full"}
    parts = tool.open_parts(options, ((0.5,) * 3, (0.25,) * 3))
    assert (len(parts.train), len(parts.val), parts.classes) == (2, 1, ["class 0", "class 1", "class 2"])
    image, ids = parts.train[0]
    assert image.shape == (3, 64, 64)
    counts = {int(v): int((ids == v).sum()) for v in ids.unique()}
    assert counts == {2: 40 * 27, 255: 64 * 64 - 40 * 27}
    assert image[0][ids == 2].mean() == pytest.approx((200 / 255 - 0.5) / 0.25, abs=0.05)
    assert image[:, ids == 255].abs().sum() < image.abs().sum()
    image, ids = parts.val[0]
    assert (image.shape, ids.shape) == ((3, 64, 85), (30, 40))
