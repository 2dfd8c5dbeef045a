"""Bad data of every task, from the command line: status 2, one line that names the file, and no run."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicoms import dicom
from PIL import Image
from runs import words

from vizoo.tools import cli

PIXELS = np.random.default_rng(0).integers(0, 255, (128, 160, 3)).astype(np.uint8)


def write_film(path: Path) -> None:
    frames = [Image.new("L", (160, 128), i) for i in range(3)]
    frames[0].save(path, format="PNG", save_all=True, append_images=frames[1:])


def write_turned(path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 3
    Image.fromarray(PIXELS).save(path, format="PNG", exif=exif)


def write_deep(path: Path) -> None:
    Image.fromarray((PIXELS[..., 0] * 1000.0 - 7).astype(np.float32)).save(path, format="TIFF")


def write_large(path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(path, format="PNG")


# what an image of any task may be instead of a good one: how it is made and what is said
PICTURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing link": (lambda p: p.symlink_to("nothing"), "does not exist"),
    "empty": (lambda p: p.write_bytes(b""), "cannot identify image file"),
    "text": (lambda p: p.write_text("no image"), "cannot identify image file"),
    "pipe": (lambda p: os.mkfifo(p), "is a pipe or device, need a file"),
    "film": (write_film, "3 frames in one PNG file; need one image in each file"),
    "float": (write_deep, "float values from -7 to "),
    "bomb": (write_large, "200000000 pixels"),
    "cut": (lambda p: (Image.fromarray(PIXELS).save(p), p.write_bytes(p.read_bytes()[:9000])), "truncated"),
}
IMAGE = {
    "classification": "train/bright/3.png",
    "detection": "images/training/3.png",
    "segmentation": "images/training/3.png",
    "scanpath": "a.png",
}


def coco(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    """Change the annotations in place."""

    def spoil(root: Path) -> None:
        file = root / "annotations" / "instances_training.json"
        data = json.loads(file.read_text())
        change(data)
        file.write_text(json.dumps(data))

    return spoil


def field(key: str, value: Any, record: str = "annotations") -> Callable[[Path], None]:
    return coco(lambda data: data[record][1].__setitem__(key, value))


def replace(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content)  # type: ignore[return-value]


def mask(pixels: np.ndarray) -> Callable[[Path], None]:
    return lambda root: Image.fromarray(pixels).save(root / "annotations" / "training" / "3.png")


JSON = "annotations/instances_training.json"
IDS = np.ones((128, 160), np.uint8)
RLE = {"size": [128, 160]}
FAULTS: dict[str, list[tuple[str, Callable[[Path], Any], str]]] = {
    "classification": [
        ("one folder twice", lambda r: (r / "train/bright/x").symlink_to("../dark"), "are the same folder"),
        ("class without image", lambda r: (r / "train/third").mkdir(), "train/third' holds no image"),
        ("class of text", lambda r: ((r / "train/c").mkdir(), (r / "train/c/a.txt").touch()), "c' holds no image"),
        ("half a window", lambda r: half_window(r / "train/dark/x.dcm"), "WindowCenter without WindowWidth"),
    ],
    "detection": [
        ("bbox nan", lambda r: nan(r), "NaN is no number of JSON"),
        ("bbox huge", field("bbox", [1, 1, 1e9, 7]), "annotation 1: bbox [1, 1, 1000000000.0, 7] is"),
        ("bbox text", field("bbox", ["1", "1", "8", "7"]), "is not four numbers"),
        ("bbox digits", field("bbox", [1, 1, 10**400, 7]), "is not four numbers"),
        ("bbox of three", field("bbox", [1, 1, 8]), "is not four numbers"),
        ("bbox negative", field("bbox", [1, 1, -8, 7]), "lies outside"),
        ("polygon 1e9", field("segmentation", [[1, 1, 1e9, 1, 5, 8]]), "beyond its image of 160x128 pixels"),
        ("polygon text", field("segmentation", [[1, 1, "9", 1, 5, 8]]), "what is no number"),
        ("polygon 1e999", field("segmentation", [[1, 1, float("inf"), 1, 5, 8]]), "Infinity is no number of JSON"),
        ("polygon flat", field("segmentation", [1, 1, 9, 1, 5, 8]), "is no list of polygons"),
        ("polygon of two", field("segmentation", [[1, 1, 9, 1]]), "fewer than 3 points"),
        ("outline text", field("segmentation", "abc"), "is no list of polygons"),
        ("counts absent", field("segmentation", RLE), "run lengths None are no text"),
        ("counts short", field("segmentation", {**RLE, "counts": [7]}), "run lengths add up to 7 pixels"),
        ("counts negative", field("segmentation", {**RLE, "counts": [20481, -1]}), "run lengths [20481, -1]"),
        ("counts nonsense", field("segmentation", {**RLE, "counts": "nonsense"}), "no compressed counts of COCO"),
        ("counts of another size", field("segmentation", {"size": [160, 128], "counts": [20480]}), "mask of size"),
        ("crowd text", field("iscrowd", "no"), "iscrowd 'no' is neither 0 nor 1"),
        ("area negative", field("area", -1), "area -1 is no number from 0 on"),
        ("id list", field("id", [1]), "id [1] is no whole number and no text"),
        ("id object", field("id", {}), "id {} is no whole number and no text"),
        ("id digits", field("id", 10**400), "is no whole number and no text"),
        ("id twice", field("id", 0), "annotation 0: its id is used twice"),
        ("image_id float", field("image_id", 1.0), "image_id 1.0 is no image of the file"),
        ("category_id none", field("category_id", None), "category_id None is none of the file's 3 categories"),
        ("width huge", field("width", 10**9, "images"), "width=1000000000, height=128: need whole numbers"),
        ("width wrong", field("width", 161, "images"), "is 160x128 pixels, its labels are for 161x128"),
        ("file_name list", field("file_name", ["1.png"], "images"), "file_name=['1.png']: need a name"),
        ("file_name folder", field("file_name", ".", "images"), "is a folder, need a file"),
        ("names twice", field("name", "rectangle", "categories"), "category 1 has the name 'rectangle' too"),
        ("record text", coco(lambda d: d["annotations"].append("x")), "got 'x', need an object"),
        ("no images", coco(lambda d: d.pop("images")), "has no 'images', a list that is not empty"),
        ("json list", replace(JSON, b"[]"), "is no COCO file: got a list"),
        ("json cut", replace(JSON, b'{"images": ['), "is no JSON"),
        ("json empty", replace(JSON, b""), "is no JSON"),
        ("json deep", replace(JSON, b"[" * 100_000), "nested too deeply"),
        ("json utf-16", replace(JSON, "{}".encode("utf-16")), "is no text in UTF-8"),
        ("json pipe", lambda r: ((r / JSON).unlink(), os.mkfifo(r / JSON)), "is a pipe or device"),
        ("turned", lambda r: write_turned(r / "images/training/3.png"), "EXIF orientation 3 or not"),
    ],
    "segmentation": [
        ("mask rgb", mask(PIXELS), "several channels (RGB), need one channel"),
        ("mask value", mask(IDS * 9), "3.png' holds class id 9, need 1 to 4 or 255"),
        ("mask 16 bits", mask(IDS.astype(np.uint16) * 999), "holds class id 999, need 1 to 4 or 255"),
        ("mask empty", mask(IDS * 0), "3.png' holds no class at all"),
        ("mask size", mask(IDS.T.copy()), "is 160x128 pixels, its labels are for 128x160"),
        ("mask film", lambda r: write_film(r / "annotations/training/3.png"), "3 frames in one PNG file"),
        ("mask absent", lambda r: (r / "annotations/training/3.png").unlink(), "3.png' does not exist"),
        ("image absent", lambda r: (r / "images/training/3.png").unlink(), "3.png' does not exist"),
        ("classes latin-1", replace("classes.txt", "gr\xfcn\nb\nc\nd".encode("latin-1")), "is no text in UTF-8"),
        ("classes utf-16", replace("classes.txt", "a\nb\nc\nd".encode("utf-16")), "is no text in UTF-8"),
        ("classes twice", replace("classes.txt", b"a\nb\na\nd"), "names 'a' 2 times"),
        ("classes pipe", lambda r: ((r / "classes.txt").unlink(), os.mkfifo(r / "classes.txt")), "is a pipe or device"),
        ("300 classes", replace("classes.txt", "\n".join(map(str, range(300))).encode()), "need 1 to 254, as 255"),
        ("turned", lambda r: write_turned(r / "images/training/3.png"), "EXIF orientation 3 or not"),
        ("one folder twice", lambda r: (r / "images/training/x").symlink_to("../validation"), "does not exist"),
    ],
    "scanpath": [
        ("gaze", lambda r: gaze(r, [-500, 99999]), "got (-500, 99999), far outside the screen of 140x60 pixels"),
        ("gaze text", lambda r: gaze(r, ["5", 5]), "fixations of viewer '1': got"),
        ("gaze digits", lambda r: gaze(r, [10**400, 5]), "fixations of viewer '1': got"),
        ("gaze of three", lambda r: gaze(r, [5, 5, 5]), "fixations of viewer '1': got"),
        ("json nan", lambda r: gaze(r, [float("nan"), 5]), "NaN is no number of JSON"),
        ("json deep", replace("data.json", b"[" * 100_000), "nested too deeply"),
        ("json utf-16", replace("data.json", "{}".encode("utf-16")), "is no text in UTF-8"),
        ("json number", replace("data.json", b"3"), "holds int, need an object of images or a list"),
    ],
}


def nan(root: Path) -> None:
    field("bbox", [1, 1, float("nan"), 7])(root)


def half_window(path: Path) -> None:
    dicom(path, WindowCenter=40)


def gaze(root: Path, point: list[Any]) -> None:
    data = scenes()
    data["a.png"]["fixations"]["1"][1] = point
    (root / "data.json").write_text(json.dumps(data))


def scenes() -> dict[str, Any]:
    """Twenty viewers of ten scenes, each with 84 objects."""
    truth = [{"xmin": 21, "xmax": 29, "ymin": 11, "ymax": 19}]
    paths = {str(i): [[5, 5], [15, 5], [25, 15]] for i in range(1, 3)}
    names = [f"{c}.png" for c in "abcdefghij"]
    one = {"size": {"width": 140, "height": 60}, "ground_truth": truth, "fixations": paths}
    return {name: json.loads(json.dumps(one)) for name in names}


def folder(task: str, folders: Path, root: Path) -> Path:
    """A copy of the data of a task."""
    if task == "scanpath":
        root.mkdir()
        (root / "data.json").write_text(json.dumps(scenes()))
        for name in scenes():
            Image.fromarray(PIXELS).save(root / name)
        return root
    return Path(shutil.copytree(folders / ("images" if task == "classification" else "shapes"), root))


def command(task: str, root: Path, folders: Path, out: Path) -> list[str]:
    given = words(task, folders)
    given[given.index("--data") + 1] = str(root / "data.json" if task == "scanpath" else root)
    if task == "scanpath":
        place = given.index("--grid")
        given[place : place + 3] = ["--images", str(root), "--model-kwargs", "pe_sigma=6.0"]
    return [*given, "--output", str(out), "--experiment", "run"]


def refused(given: list[str], word: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(given) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    assert err.startswith("vizoo")
    assert word in err, err


ROWS = [(task, *row) for task, rows in FAULTS.items() for row in rows]
CASES = [pytest.param(t, spoil, word, id=f"{t}-{name}") for t, name, spoil, word in ROWS]


@pytest.mark.parametrize(("task", "spoil", "word"), CASES)
def test_bad_data(task, spoil, word, folders, tmp_path, capfd) -> None:
    root = folder(task, folders, tmp_path / "data")
    spoil(root)
    refused(command(task, root, folders, tmp_path / "out"), word, capfd)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("task", IMAGE)
def test_bad_pictures(task, name, folders, tmp_path, capfd) -> None:
    """One rule for all tasks: what one refuses, every other refuses."""
    make, word = PICTURES[name]
    root = folder(task, folders, tmp_path / "data")
    file = root / IMAGE[task]
    file.unlink()
    make(file)
    given = command(task, root, folders, tmp_path / "out")
    refused(given, word, capfd)
    # of boxes and masks only the headers are looked at first, the pixels when they are needed
    assert not (tmp_path / "out").exists() or (name in ("float", "cut") and task in ("detection", "segmentation"))


@pytest.mark.parametrize("task", ["classification", "detection", "segmentation"])
def test_unchecked_data_stop_a_run(task, folders, tmp_path, capfd) -> None:
    """An image that turns bad after the check ends the run with its name; it is never replaced by another one."""
    root = folder(task, folders, tmp_path / "data")
    file = root / IMAGE[task]
    file.write_bytes(file.read_bytes()[:900])
    given = command(task, root, folders, tmp_path / "out")
    given += ["--check-images" if task == "classification" else "--check-data", "none", "-j", "1"]
    assert cli.main(given) == 2
    err = capfd.readouterr().err
    assert err.splitlines()[-1] == f"vizoo train: error: cannot read image {str(file)!r}: image file is truncated"


@pytest.mark.parametrize("name", ["code", "memo", "text"])
def test_bad_pickles(name, folders, tmp_path, capfd) -> None:
    content = {
        "code": b"cos\nsystem\n(S'touch ran'\ntR.",
        "memo": b"\x80\x02]r\xff\xff\xff\x7f.",
        "text": pickle.dumps("text"),
    }[name]
    (tmp_path / "a.pkl").write_bytes(content)
    given = words("scanpath", folders)
    given[given.index("--data") + 1] = str(tmp_path / "a.pkl")
    refused([*given, "--output", str(tmp_path / "out")], "a.pkl'", capfd)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pkl"]


def test_good_copies_train(folders, tmp_path) -> None:
    """The faults above are what was refused."""
    for task in IMAGE:
        root = folder(task, folders, tmp_path / task)
        given = command(task, root, folders, tmp_path / "out")
        assert cli.main([*given[:-1], task]) == 0, task
