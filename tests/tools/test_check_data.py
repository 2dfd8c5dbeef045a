"""Data of detection and segmentation: every kind of bad record is named with its file, and good data passes."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
from PIL import Image

from vizoo.tools._check_data import check_coco, check_masks

IMAGES = [{"id": i, "file_name": f"{i}.png", "width": 20, "height": 12} for i in range(3)]
TRIANGLE = [[1.0, 1.0, 9.0, 1.0, 5.0, 8.0]]
BOX = {"image_id": 0, "category_id": 7, "bbox": [1, 1, 8, 7], "area": 28, "iscrowd": 0, "segmentation": TRIANGLE}
GOOD = {
    "images": IMAGES,
    "annotations": [{**BOX, "id": 1}, {**BOX, "id": 2, "image_id": 1, "bbox": [0, 0, 20.4, 12]}],
    "categories": [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}],
}


@pytest.fixture
def images(tmp_path):
    for image in IMAGES:
        Image.new("RGB", (20, 12)).save(tmp_path / image["file_name"])
    return tmp_path


def change(path: str, value) -> dict:
    """GOOD with one value replaced, or removed."""
    data = copy.deepcopy(GOOD)
    *parents, last = (int(p) if p.isdigit() else p for p in path.split("."))
    node: dict = data
    for p in parents:
        node = node[p]
    if value is None:
        del node[last]
    else:
        node[last] = value
    return data


def test_good_coco(images, tmp_path):
    file = tmp_path / "good.json"
    file.write_text(json.dumps(GOOD))
    check_coco(file, images)
    check_coco(str(file), str(images), ["dog"])
    rle = change("annotations.0.segmentation", {"size": [12, 20], "counts": "x"})
    file.write_text(json.dumps(rle))
    check_coco(file, images, ["cat", "dog"])
    file.write_text(json.dumps(change("annotations", None)))
    check_coco(file, images, labelled=False)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("images", None, "has no 'images'"),
        ("images", [], "has no 'images'"),
        ("annotations", None, "has no 'annotations'"),
        ("annotations", [], "has no 'annotations'"),
        ("categories", None, "has no 'categories'"),
        ("images.2.file_name", "gone.png", "image 2: image '"),
        ("images.2.file_name", "gone.png", "gone.png' does not exist"),
        ("images.2.width", 21, "is 20x12, the record says 21x12"),
        ("images.2.height", None, "height=None"),
        ("images.2.id", 1, "image 1: the id is missing or used twice"),
        ("annotations.1.id", 1, "annotation 1: the id is missing or used twice"),
        ("annotations.1.image_id", 5, "annotation 2: image_id 5 is no image of the file"),
        ("annotations.1.category_id", 8, "annotation 2: category_id 8 is none of the file's 2 categories"),
        ("annotations.1.bbox", [15, 0, 8, 4], "annotation 2: bbox [15, 0, 8, 4] lies outside its image of 20x12"),
        ("annotations.1.bbox", [-3, 0, 8, 4], "lies outside"),
        ("annotations.1.bbox", [1, 2, -1, 4], "lies outside"),
        ("annotations.1.bbox", [1, 2, 3], "is not four numbers"),
        ("annotations.1.bbox", [1, 2, 3, float("nan")], "is not four numbers"),
        ("annotations.1.bbox", None, "bbox None is not four numbers"),
        ("annotations.1.bbox", [1, 2, 0, 4], "annotation 2: bbox [1, 2, 0, 4] is empty"),
        ("annotations.1.segmentation", [], "the segmentation is empty"),
        ("annotations.1.segmentation", [[1, 1, 2, 2]], "fewer than 3 points"),
        ("annotations.1.segmentation", {"size": [20, 12], "counts": ""}, "mask of size [20, 12] (height, width)"),
    ],
)
def test_bad_coco(path, value, message, images, tmp_path):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(change(path, value)))
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        check_coco(file, images)
    assert "bad.json" in str(e.value)


def test_bad_coco_files(images, tmp_path):
    with pytest.raises(ValueError, match=r"none\.json' does not exist"):
        check_coco(tmp_path / "none.json", images)
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(ValueError, match="is no JSON"):
        check_coco(tmp_path / "text.json", images)
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="is no COCO file: got a list"):
        check_coco(tmp_path / "list.json", images)
    (tmp_path / "good.json").write_text(json.dumps(GOOD))
    with pytest.raises(ValueError, match=r"has no category 'cow' and 1 more.*it has cat, dog"):
        check_coco(tmp_path / "good.json", images, ["cat", "cow", "pig"])
    with pytest.raises(ValueError, match=r"image folder .* does not exist"):
        check_coco(tmp_path / "good.json", tmp_path / "nowhere")
    (images / "1.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"image 1: image .*1\.png' cannot be read"):
        check_coco(tmp_path / "good.json", images)


def test_ten_records_and_the_count(images, tmp_path):
    bad = [{**BOX, "id": i, "category_id": 3} for i in range(25)]
    (tmp_path / "bad.json").write_text(json.dumps({**GOOD, "annotations": bad}))
    with pytest.raises(ValueError, match="has 25 bad records") as e:
        check_coco(tmp_path / "bad.json", images)
    lines = str(e.value).splitlines()
    assert len(lines) == 12
    assert lines[1].startswith("  annotation 0: category_id 3")
    assert lines[-1] == "  ... and 15 more"


def test_rare_empty_boxes_pass(images, tmp_path):
    """COCO's own training set has one; loaders drop it."""
    boxes = [{**BOX, "id": i} for i in range(2000)]
    boxes[5]["bbox"] = [1, 1, 1.03, 0]
    (tmp_path / "a.json").write_text(json.dumps({**GOOD, "annotations": boxes}))
    check_coco(tmp_path / "a.json", images)


@pytest.fixture
def pairs(tmp_path):
    """Three images with masks of classes 0 to 3, one of them in a sub-folder."""
    random = np.random.RandomState(0)
    for folder in ("images/a", "masks/a"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("x", "y", "a/z"):
        Image.new("RGB", (20, 12)).save(tmp_path / "images" / f"{name}.jpg")
        Image.fromarray(random.randint(0, 4, (12, 20)).astype(np.uint8)).save(tmp_path / "masks" / f"{name}.png")
    return tmp_path


def put(pairs, values, name="y"):
    Image.fromarray(np.asarray(values, np.uint8)).save(pairs / "masks" / f"{name}.png")


def test_good_masks(pairs):
    check_masks(pairs / "images", pairs / "masks", 4)
    check_masks(str(pairs / "images"), str(pairs / "masks"), 3, reduce_zero_label=True)
    put(pairs, np.full((12, 20), 255) - 253 * np.eye(12, 20))
    check_masks(pairs / "images", pairs / "masks", 4)
    with Image.open(pairs / "masks" / "x.png") as mask:
        mask.putpalette(list(range(256)) * 3)
        mask.save(pairs / "masks" / "x.png")
    check_masks(pairs / "images", pairs / "masks", 4)
    check_masks(pairs / "images", pairs / "masks", 4, names=["x", "a/z"])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.full((12, 20), 4), {}, "y.png' holds class id 4, need 0 to 3 or 255"),
        (np.full((12, 20), 4), {"num_classes": 3, "reduce_zero_label": True}, "holds class id 4, need 1 to 3 or 255"),
        (np.zeros((20, 12)), {}, "y.png' is 12x20 pixels, its image 20x12"),
        (np.full((12, 20), 255), {}, "y.png' holds no class at all"),
        (np.zeros((12, 20)), {"reduce_zero_label": True}, "y.png' holds no class at all"),
        (np.zeros((12, 20, 3)), {}, "y.png' has several channels"),
        (None, {}, "y.png' does not exist"),
        (None, {"names": ["w"]}, "w.jpg' does not exist"),
        (None, {"image_suffix": ".tif"}, "holds no image that ends in '.tif'"),
    ],
)
def test_bad_masks(values, options, message, pairs):
    if values is None:
        (pairs / "masks" / "y.png").unlink()
    else:
        put(pairs, values)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_masks(pairs / "images", pairs / "masks", **{"num_classes": 4, **options})


def test_bad_mask_folders(pairs):
    with pytest.raises(ValueError, match=r"mask folder '.*nowhere' does not exist"):
        check_masks(pairs / "images", pairs / "nowhere", 4)
    with pytest.raises(ValueError, match=r"image folder '.*nowhere' does not exist"):
        check_masks(pairs / "nowhere", pairs / "masks", 4)
    data = (pairs / "masks" / "x.png").read_bytes()
    (pairs / "masks" / "x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"mask folder '.*' has 1 bad record:\n  x: mask .*x\.png' cannot be read"):
        check_masks(pairs / "images", pairs / "masks", 4)
