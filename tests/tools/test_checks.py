"""Data of detection and segmentation: every kind of bad record is named with its file, and good data passes."""

from __future__ import annotations

import copy
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from vizoo.tools.common import UserError
from vizoo.tools.data import checks
from vizoo.tools.data.checks import ClassIds, MaskFolder, check_masks
from vizoo.tools.data.coco import check_coco, read_coco
from vizoo.tools.data.dense import Boxes, Crops, Masks, detection_parts, outline, segmentation_parts
from vizoo.tools.data.images import ImageError

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


def compressed(mask=None):
    from pycocotools import mask as coco

    mask = np.eye(12, 20, dtype=np.uint8) if mask is None else mask
    return coco.encode(np.asfortranarray(mask))["counts"].decode()


def test_good_coco(images, tmp_path):
    file = tmp_path / "good.json"
    file.write_text(json.dumps(GOOD))
    check_coco(file, images)
    check_coco(str(file), str(images), ["dog"])
    for counts in (compressed(), [100, 40, 100], [0, 240]):
        rle = change("annotations.0.segmentation", {"size": [12, 20], "counts": counts})
        file.write_text(json.dumps(rle))
        check_coco(file, images, ["cat", "dog"])
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())  # with byte order mark
    check_coco(file, images)
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
        ("images.2.width", 21, "is 20x12 pixels, its labels are for 21x12"),
        ("images.2.height", None, "height=None"),
        ("images.2.id", 1, "image 1: its id is used twice"),
        ("images.2.id", None, "image number 2: id None is no whole number and no text"),
        ("annotations.1.id", 1, "annotation 1: its id is used twice"),
        ("annotations.1.image_id", 5, "annotation 2: image_id 5 is no image of the file"),
        ("annotations.1.category_id", 8, "annotation 2: category_id 8 is none of the file's 2 categories"),
        ("annotations.1.bbox", [15, 0, 8, 4], "annotation 2: bbox [15, 0, 8, 4] lies outside its image of 20x12"),
        ("annotations.1.bbox", [-3, 0, 8, 4], "lies outside"),
        ("annotations.1.bbox", [1, 2, -1, 4], "lies outside"),
        ("annotations.1.bbox", [1, 2, 3], "is not four numbers"),
        ("annotations.1.bbox", None, "bbox None is not four numbers"),
        ("annotations.1.bbox", [1, 2, 0, 4], "annotation 2: bbox [1, 2, 0, 4] is below a pixel"),
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
    with pytest.raises(ValueError, match=r"image 1: cannot read image .*1\.png': cannot identify"):
        check_coco(tmp_path / "good.json", images)


def test_ten_records_and_the_count(images, tmp_path):
    bad = [{**BOX, "id": i, "category_id": 3} for i in range(25)]
    (tmp_path / "bad.json").write_text(json.dumps({**GOOD, "annotations": bad}))
    with pytest.raises(ValueError, match="has 25 bad records") as e:
        check_coco(tmp_path / "bad.json", images)
    first, *others = str(e.value).split("; ")
    assert first.endswith("bad records: annotation 0: category_id 3 is none of the file's 2 categories")
    assert len(others) == 10
    assert others[-1] == "... and 15 more"
    assert "\n" not in str(e.value)


def test_rare_empty_boxes_pass(images, tmp_path):
    """COCO's own training set has one; loaders drop it."""
    boxes = [{**BOX, "id": i} for i in range(2000)]
    boxes[5]["bbox"] = [1, 1, 1.03, 0]
    boxes[6]["bbox"] = [1, 1, 0.9, 5]
    (tmp_path / "a.json").write_text(json.dumps({**GOOD, "annotations": boxes}))
    check_coco(tmp_path / "a.json", images)
    data = Boxes(read_coco(tmp_path / "a.json"), images, False, lambda *both: both, True)
    assert len(data) == 1
    assert len(data[0][1]["boxes"]) == 1998
    boxes[7]["segmentation"] = []
    (tmp_path / "a.json").write_text(json.dumps({**GOOD, "annotations": boxes}))
    with pytest.raises(ValueError, match=r"has 3 bad records: .*annotation 7: the segmentation is empty"):
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


def look(root, classes=4, reduce_zero_label=False, images="images", masks="masks", **options):
    check_masks(MaskFolder(root / images, root / masks, **options), ClassIds(classes, reduce_zero_label))


def put(pairs, values, name="y"):
    Image.fromarray(np.asarray(values, np.uint8)).save(pairs / "masks" / f"{name}.png")


def test_good_masks(pairs):
    look(pairs)
    check_masks(MaskFolder(str(pairs / "images"), str(pairs / "masks")), ClassIds(3, reduce_zero_label=True))
    put(pairs, np.full((12, 20), 255) - 253 * np.eye(12, 20))
    look(pairs)
    with Image.open(pairs / "masks" / "x.png") as mask:
        mask.putpalette(list(range(256)) * 3)
        mask.save(pairs / "masks" / "x.png")
    look(pairs)
    look(pairs, names=["x", "a/z"])


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (np.full((12, 20), 4), {}, "y.png' holds class id 4, need 0 to 3 or 255"),
        (np.full((12, 20), 4), {"classes": 3, "reduce_zero_label": True}, "holds class id 4, need 1 to 3 or 255"),
        (np.zeros((20, 12)), {}, "y.jpg' is 20x12 pixels, its labels are for 12x20"),
        (np.full((12, 20), 255), {}, "y.png' holds no class at all"),
        (np.zeros((12, 20)), {"reduce_zero_label": True}, "y.png' holds no class at all"),
        (np.zeros((12, 20, 3)), {}, "y.png': it has several channels (RGB), need one channel"),
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
        look(pairs, **options)


def test_rare_empty_masks_pass(pairs):
    """One of 1,000 may be empty, as of boxes."""
    put(pairs, np.full((12, 20), 255))
    look(pairs, names=[*["x"] * 999, "y"])
    with pytest.raises(ValueError, match=r"has 1 bad record: y: .*y\.png' holds no class at all"):
        look(pairs, names=[*["x"] * 998, "y"])
    (pairs / "images" / "x.jpg").unlink()
    with pytest.raises(ValueError, match=r"has 999 bad records: x: image"):  # and not the empty one
        look(pairs, names=[*["x"] * 999, "y"])


def test_many_files_are_only_looked_for(pairs, images, tmp_path, monkeypatch):
    """Beyond the limit no file is opened, but one that is missing is still found: of masks and of COCO files."""
    (tmp_path / "a.json").write_text(json.dumps(GOOD))
    for file in (pairs / "images" / "y.jpg", pairs / "masks" / "y.png", images / "2.png"):
        file.write_bytes(b"no image")
    with pytest.raises(UserError, match="cannot read mask"):
        look(pairs)
    with pytest.raises(UserError, match="cannot read image"):
        check_coco(tmp_path / "a.json", images)
    monkeypatch.setattr(checks, "FULL_CHECK_LIMIT", 2)
    look(pairs)
    check_coco(tmp_path / "a.json", images)
    (pairs / "masks" / "y.png").unlink()
    (images / "2.png").unlink()
    with pytest.raises(UserError, match=r"y\.png' does not exist"):
        look(pairs)
    with pytest.raises(UserError, match=r"2\.png' does not exist"):
        check_coco(tmp_path / "a.json", images)


def test_bad_mask_folders(pairs):
    with pytest.raises(ValueError, match=r"mask folder '.*nowhere' does not exist"):
        look(pairs, masks="nowhere")
    with pytest.raises(ValueError, match=r"image folder '.*nowhere' does not exist"):
        look(pairs, images="nowhere")
    data = (pairs / "masks" / "x.png").read_bytes()
    (pairs / "masks" / "x.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"mask folder '.*' has 1 bad record: x: cannot read mask .*x\.png'"):
        look(pairs)


# every number of every record

HUGE = [1e9, -1e9, 1e300, 10**400, -(10**400), "5", None, True, [1], {}]
SIZE = {"size": [12, 20]}
WRONG = {
    "bbox": [*([1, 1, 8, bad] for bad in HUGE), "1 1 8 7", {}, [], [1, 1, 8], [1, 1, 8, 7, 0], [[1, 1, 8, 7]], -3],
    "segmentation": [
        *([[1, 1, 9, 1, bad, 8]] for bad in HUGE),
        [[1, 1, 9, 1, -21, 8]],
        [[1, 1, 9, 1, 5, 25]],
        [1, 1, 9, 1, 5, 8],
        [[]],
        [[1, 1, 9, 1, 5, 8], []],
        [[1, 1, 9, 1, 5, 8, 2]],
        "polygon",
        7,
        {},
        SIZE,
        {**SIZE, "counts": 7},
        {**SIZE, "counts": None},
        {**SIZE, "counts": []},
        {**SIZE, "counts": [240.0]},
        {**SIZE, "counts": ["240"]},
        {**SIZE, "counts": [True] * 240},
        {**SIZE, "counts": [239]},
        {**SIZE, "counts": [100, 200]},
        {**SIZE, "counts": [300, -60]},
        {**SIZE, "counts": [10**400]},
        {**SIZE, "counts": ""},
        {**SIZE, "counts": "x"},
        {**SIZE, "counts": "nonsense"},
        {**SIZE, "counts": "\ud800"},
        {**SIZE, "counts": "oooooooooooooooooooooooooooo0"},
        {**SIZE, "counts": "PPPPPPPPPPPP"},
        {"size": "12x20", "counts": [240]},
        {"size": [12, 20, 1], "counts": [240]},
        {"size": [12.0, 20], "counts": [240]},
        {"size": [10**9, 10**9], "counts": [10**18]},
        {"counts": [240]},
    ],
    "iscrowd": ["no", 2, -1, 0.5, None, []],
    "area": ["28", -1, 1e300, 10**400, [], True],
    "id": [None, 1.0, True, [1], {}, 10**400, ""],
    "image_id": [None, 0.0, False, [0], {}, 10**400, "0", 7],
    "category_id": [None, 7.0, [7], {}, 10**400, "7", 8],
}


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_every_number_of_an_annotation_is_checked(key, value, images, tmp_path):
    """Told with and without images, before anything is computed from it."""
    data = change("annotations.1.id", 2)
    data["annotations"][1][key] = value
    file = tmp_path / "bad.json"
    file.write_text(json.dumps(data))
    for check in (read_coco, lambda f: check_coco(f, images)):
        with pytest.raises(UserError, match=r"bad\.json' has 1 bad record: annotation ") as e:
            check(file)
        assert len(str(e.value)) < 1000
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("images.1", 7, "image number 1: got 7, need an object"),
        ("images.1.id", [1], "image number 1: id [1] is no whole number and no text"),
        ("images.2.id", "two", "image ids are whole numbers and text"),
        ("images.1.width", 10**9, "need whole numbers above 0 of at most 178,956,970 pixels"),
        ("images.1.width", 10**400, "need whole numbers above 0"),
        ("images.1.width", -20, "need whole numbers above 0"),
        ("images.1.width", "20", "need whole numbers above 0"),
        ("images.1.height", 12.0, "need whole numbers above 0"),
        ("images.1.height", True, "need whole numbers above 0"),
        ("images.1.file_name", ["a.png"], "file_name=['a.png']: need a name"),
        ("images.1.file_name", "", "file_name='': need a name"),
        ("images.1.file_name", "a\0b.png", "embedded null byte"),
        ("images.1.file_name", "a" * 300, "File name too long"),
        ("images.1.file_name", ".", "is a folder, need a file"),
        ("images", {"0": {}}, "has no 'images', a list that is not empty"),
        ("categories.1", None, "annotation 1"),
        ("categories.1.id", 7, "category 7: its id is used twice"),
        ("categories.1.id", {}, "category number 1: id {} is no whole number"),
        ("categories.1.id", "9", "category ids are whole numbers and text"),
        ("categories.1.name", "cat", "category 9: category 7 has the name 'cat' too"),
        ("categories.1.name", 9, "category 9: name 9 is no text"),
        ("categories.1.name", " ", "category 9: name ' ' is no text"),
        ("categories.1.name", "\ud800", "category 9: name"),
        ("annotations.1", [], "annotation number 1: got [], need an object"),
        ("annotations", {"1": {}}, "has no 'annotations', a list that is not empty"),
    ],
)
def test_every_other_record_is_checked(path, value, message, images, tmp_path):
    if path == "categories.1":
        path, value, message = "categories.0", None, "annotation 1: category_id 7 is none of the file's 1 categories"
    file = tmp_path / "bad.json"
    data = change(path, value)
    file.write_text(json.dumps(data))
    with pytest.raises(UserError, match=re.escape(message)) as e:
        check_coco(file, images)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"[" * 100_000, "nested too deeply"),
        (json.dumps(GOOD).encode()[:-20], "is no JSON"),
        (json.dumps(GOOD).encode("utf-16"), "is no text in UTF-8"),
        (json.dumps({**GOOD, "x": "\xe9"}, ensure_ascii=False).encode("latin-1"), "is no text in UTF-8"),
        (json.dumps(GOOD).replace("28", "NaN").encode(), "NaN is no number of JSON"),
        (json.dumps(GOOD).replace("28", "-Infinity").encode(), "-Infinity is no number of JSON"),
        (json.dumps(GOOD).replace("28", "9" * 5000).encode(), "is no JSON"),
        (json.dumps(GOOD).replace("28", "1e999").encode(), "area inf is no number"),
        (b"null", "is no COCO file: got a NoneType"),
        (b'"text"', "is no COCO file: got a str"),
    ],
)
def test_files_that_are_no_coco(content, message, tmp_path):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as e:
        read_coco(tmp_path / "bad.json")
    assert "\n" not in str(e.value)


def test_run_lengths_of_any_mask_are_read(tmp_path):
    """The check of compressed run lengths follows pycocotools, which writes them."""

    def parse(data):
        (tmp_path / "a.json").write_text(json.dumps(data))
        return read_coco(tmp_path / "a.json")

    rng = np.random.default_rng(0)
    for height, width in ((1, 1), (1, 40), (37, 1), (12, 20), (300, 500)):
        for share in (0.0, 0.01, 0.5, 0.99, 1.0):
            mask = (rng.random((height, width)) < share).astype(np.uint8)
            if share == 0.5 and height > 100:
                mask = np.kron(rng.integers(0, 2, (3, 5)), np.ones((100, 100))).astype(np.uint8)
            image = {"id": 1, "file_name": "a", "width": width, "height": height}
            shape = {"size": [height, width], "counts": compressed(mask)}
            record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height], "segmentation": shape}
            data = {"images": [image], "annotations": [record], "categories": [{"id": 1, "name": "a"}]}
            found = parse(data).annotations[0].segmentation
            assert np.array_equal(outline(found, height, width), mask)
            for spoilt in (shape["counts"][:-1], shape["counts"] + "1", shape["counts"] + "o"):
                record["segmentation"] = {**shape, "counts": spoilt}
                with pytest.raises(UserError, match="run lengths"):
                    parse(data)


def test_text_ids_and_slack_are_fine(images, tmp_path):
    """What other tools write: names for ids, boxes off by rounding, polygons a little outside, ``true`` for a crowd."""
    data = copy.deepcopy(GOOD)
    for record in data["images"]:
        record["id"] = f"image {record['id']}"
    for record in data["annotations"]:
        record |= {"image_id": f"image {record['image_id']}", "iscrowd": False, "bbox": [-0.9, 0, 20.5, 12.9]}
        record["segmentation"] = [[-3, -3, 23, 1, 5, 14.5]]
        del record["area"]
    (tmp_path / "a.json").write_text(json.dumps(data))
    found = read_coco(tmp_path / "a.json")
    assert [i.id for i in found.images] == ["image 0", "image 1", "image 2"]
    assert outline(found.annotations[0].segmentation, 12, 20).shape == (12, 20)


# the frame of the labels


def coco_folder(root, tag, width, height, parts=("train", "val")):
    """One image of 20x12 stored pixels with a tag, and a record of the given size with a box on its bright spot."""
    (root / "annotations").mkdir(parents=True)
    pixels = np.zeros((12, 20, 3), np.uint8)
    pixels[2:5, 8:12] = 255
    exif = Image.Exif()
    exif[274] = tag
    for part in parts:
        (root / part).mkdir()
        Image.fromarray(pixels).save(root / part / "a.png", exif=exif)
        with Image.open(root / part / "a.png") as image:
            shown = np.asarray(image if (width, height) == (20, 12) else ImageOps.exif_transpose(image))
        rows, columns = np.nonzero(shown[..., 0])
        box = [*map(int, (columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1))]
        x, y, w, h = box
        shape = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        record = {"id": 1, "image_id": 1, "category_id": 1, "bbox": box, "segmentation": shape}
        data = {
            "images": [{"id": 1, "file_name": "a.png", "width": width, "height": height}],
            "annotations": [record],
            "categories": [{"id": 1, "name": "spot"}],
        }
        (root / "annotations" / f"instances_{part}.json").write_text(json.dumps(data))
    return root


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("size", [(20, 12), (12, 20)])
@pytest.mark.parametrize("checked", [True, False])
def test_boxes_and_outlines_lie_on_what_they_label(tag, size, checked, tmp_path):
    """The record's size tells whether boxes were drawn on the stored or the upright pixels; else it is said."""
    root = coco_folder(tmp_path / "data", tag, *size)

    def read():
        return detection_parts(str(root), True, 0.0, checked).train[0]

    if 2 <= tag <= 4 or (tag == 1 and size == (12, 20)):
        with pytest.raises(UserError, match="nobody knows how" if size == (20, 12) else "its labels are for 12x20"):
            read()
        return
    image, target = read()
    assert tuple(image.shape) == (3, size[1], size[0])
    (x1, y1, x2, y2) = target["boxes"][0].int().tolist()
    inside = np.zeros(image.shape[1:], bool)
    inside[y1:y2, x1:x2] = True
    assert np.array_equal(image[0].numpy() > 0.5, inside)
    assert np.array_equal(target["masks"][0].numpy() > 0, inside)


@pytest.mark.parametrize("tag", range(1, 9))
def test_mm_wants_labels_for_upright_images(tag, tmp_path):
    """mmdet and mmseg turn every image; labels for its stored pixels would be wrong there."""
    root = coco_folder(tmp_path / "data", tag, 20, 12)
    file = root / "annotations" / "instances_train.json"
    if tag == 1:
        check_coco(file, root / "train")
        return
    with pytest.raises(UserError, match="nobody knows how" if tag < 5 else "its labels are for its stored pixels"):
        check_coco(file, root / "train")
    if tag >= 5:
        read_coco(file, folder=root / "train")
        check_coco(
            coco_folder(tmp_path / "b", tag, 12, 20) / "annotations" / "instances_train.json", tmp_path / "b/train"
        )


def ade_folder(root, tag, ids, mask_tag=1, count=1):
    """Images of 20x12 stored pixels that show their class, a tag, and masks."""
    pixels = np.repeat((np.arange(240).reshape(12, 20) % 5 * 50).astype(np.uint8)[..., None], 3, 2)
    for part in ("training", "validation"):
        for folder, array, t in (("images", pixels, tag), ("annotations", ids, mask_tag)):
            (root / folder / part).mkdir(parents=True)
            exif = Image.Exif()
            exif[274] = t
            for i in range(count):
                Image.fromarray(array).save(root / folder / part / f"{i}.png", exif=exif)
    return root


STORED_IDS = (np.arange(240).reshape(12, 20) % 5).astype(np.uint8)


def masks(root, classes=5, checked=True, **options):
    crops = Crops(64, (1, 1), 0.0, (0.0,) * 3, (1.0,) * 3)
    return segmentation_parts(str(root), classes, False, crops, checked, **options).train


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("tag", range(1, 9))
def test_masks_lie_on_what_they_label(tag, checked, tmp_path):
    """Masks drawn on stored pixels, on upright ones, and turned by a tag of their own."""
    exif = Image.Exif()
    exif[274] = tag
    image = Image.fromarray(STORED_IDS)
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        upright = np.asarray(ImageOps.exif_transpose(image))
    for name, ids, mask_tag in (("stored", STORED_IDS, 1), ("upright", upright, 1), ("own", STORED_IDS, tag)):
        root = ade_folder(tmp_path / name, tag, ids, mask_tag)
        if 2 <= tag <= 4 and name != "own":
            with pytest.raises(UserError, match="nobody knows how its labels were drawn"):
                masks(root, checked=checked).read(0)
            continue
        image, found = masks(root, checked=checked).read(0)
        assert np.array_equal(image[0].numpy() // 50, found.numpy()), name
        assert found.shape == (upright if name != "stored" else STORED_IDS).shape


def test_mm_wants_masks_for_upright_images(tmp_path):
    root = ade_folder(tmp_path, 6, STORED_IDS)
    folder = MaskFolder(root / "images" / "training", root / "annotations" / "training", ".png")
    with pytest.raises(UserError, match="its labels are for its stored pixels"):
        check_masks(folder, ClassIds(5))
    check_masks(folder, ClassIds(5), as_stored=True)


# segmentation folders


@pytest.mark.parametrize("options", [{}, {"checked": False}, {"skip_unreadable": True}])
def test_folders_without_images_are_refused(options, tmp_path):
    """Nothing to train on is said, whether files are looked at or not."""
    root = ade_folder(tmp_path, 1, STORED_IDS)
    for kind in ("images", "annotations"):
        (root / kind / "training" / "0.png").unlink()
    with pytest.raises(UserError, match=r"images/training' holds no image that ends in '\.jpg'"):
        masks(root, **options)


def test_more_classes_than_masks_can_hold_are_refused(tmp_path):
    """255 is no class, so 300 classes would train one of them as no class."""
    root = ade_folder(tmp_path, 1, STORED_IDS)
    for classes in (0, -1, 256, 300):
        with pytest.raises(UserError, match="need 1 to 255, as 255 in a mask is no class"):
            masks(root, classes)
    assert len(masks(root, 255)) == 1
    (root / "classes.txt").write_text("\n".join(map(str, range(256))))
    with pytest.raises(UserError, match="need 1 to 255"):
        masks(root, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("caf\xe9\n".encode("latin-1"), r"classes.txt' is no text in UTF-8"),
        ("one\ntwo\n".encode("utf-16"), r"classes.txt' is no text in UTF-8"),
        (b"one\ntwo\none\n", r"classes.txt' names 'one' 2 times"),
        (b"\n\n", "--num-classes is missing"),
    ],
)
def test_class_lists(content, message, tmp_path):
    root = ade_folder(tmp_path, 1, STORED_IDS)
    (root / "classes.txt").write_bytes(content)
    with pytest.raises(UserError, match=message):
        masks(root, None)
    (root / "classes.txt").write_bytes(b"\xef\xbb\xbfa\nb\nc\nd\ne\n")
    assert len(masks(root, None)) == 1


def test_masks_are_checked_while_running_too(tmp_path):
    """With ``--check-data none`` a class that does not exist is found when its mask is read."""
    root = ade_folder(tmp_path, 1, (STORED_IDS + 1).astype(np.uint8))
    with pytest.raises(ImageError, match=r"0\.png' holds class id 5, need 0 to 4 or 255"):
        masks(root, checked=False)[0]
    deep = ade_folder(tmp_path / "deep", 1, (STORED_IDS.astype(np.uint16) * 300))
    with pytest.raises(ImageError, match="holds class id 300"):
        masks(deep, checked=False)[0]
    bits = ade_folder(tmp_path / "bits", 1, STORED_IDS > 2)
    assert masks(bits, 2).read(0)[1].unique().tolist() == [0, 1]


def test_unreadable_pictures_are_left_out_and_counted(tmp_path, capsys):
    root = ade_folder(tmp_path / "ade", 1, STORED_IDS, count=4)
    for file in ("images/training/1.png", "annotations/training/2.png", "images/validation/3.png"):
        (root / file).write_bytes((root / file).read_bytes()[:60])
    with pytest.raises(UserError, match="cannot read"):
        masks(root)
    with pytest.raises(ImageError, match=r"cannot read image '.*/images/training/1\.png'"):
        masks(root, checked=False)[1]
    found = masks(root, skip_unreadable=True)
    assert (len(found), found.skipped) == (2, 2)
    assert isinstance(found, Masks)
    assert "2 of 4 images left out" in capsys.readouterr().out
    root = coco_folder(tmp_path / "coco", 1, 20, 12)
    data = json.loads((root / "annotations" / "instances_train.json").read_text())
    data["images"].append({**data["images"][0], "id": 2, "file_name": "b.png"})
    data["annotations"].append({**data["annotations"][0], "id": 2, "image_id": 2})
    (root / "annotations" / "instances_train.json").write_text(json.dumps(data))
    (root / "train" / "b.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"cannot read image '.*b\.png'"):
        detection_parts(str(root), True, 0.0, True)
    with pytest.raises(ImageError, match=r"cannot read image '.*b\.png'"):
        detection_parts(str(root), True, 0.0, False).train[1]
    found = detection_parts(str(root), True, 0.0, True, skip_unreadable=True).train
    assert (len(found), found.skipped) == (1, 1)


def test_linked_folders_of_masks_are_found(tmp_path):
    """A folder behind a link counts, a link back to itself does not."""
    root = ade_folder(tmp_path / "a", 1, STORED_IDS)
    other = ade_folder(tmp_path / "b", 1, STORED_IDS, count=3)
    for kind in ("images", "annotations"):
        (root / kind / "training" / "more").symlink_to(other / kind / "training")
        (root / kind / "training" / "loop").symlink_to(".")
    assert len(masks(root)) == 4
