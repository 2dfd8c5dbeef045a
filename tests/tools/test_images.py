"""Reading images: every kind of file becomes the 8 bits it shows, everything else one clear error."""

import argparse
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from dicoms import STORED, dicom
from PIL import Image

from vizoo.tools import cli
from vizoo.tools.common import UserError
from vizoo.tools.data.folders import folder_splits, open_split
from vizoo.tools.data.images import (
    ImageError,
    UnreadableImage,
    check_header,
    list_files,
    read_image,
    read_mask,
)
from vizoo.tools.options import add

RAMP = np.linspace(0, 65535, 24 * 20).round().astype(np.uint16).reshape(24, 20)


def gray(path, **kwargs):
    image = read_image(path, "L", **kwargs)
    assert image.mode == "L"
    return np.asarray(image).astype(float)


def near(found, expected):
    """Equal but for the rounding of halves."""
    assert found.shape == expected.shape
    assert np.abs(found - 255 * expected).max() <= 0.5 + 1e-6


def linear(values, center, width):
    """PS3.3 C.11.2.1.2.1, case by case."""
    low, high = center - 0.5 - (width - 1) / 2, center - 0.5 + (width - 1) / 2
    inside = (values - (center - 0.5)) / (width - 1) + 0.5
    return np.where(values <= low, 0.0, np.where(values > high, 1.0, inside))


def test_eight_bits_as_pillow(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), pixels)
    assert read_image(tmp_path / "a.png", "L").mode == "L"


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_keep_their_range(suffix, tmp_path):
    """Pillow's own conversion would make nearly everything white."""
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(RAMP).save(path)
    near(gray(path), RAMP / 65535)
    assert len(np.unique(gray(path))) > 200
    assert read_image(path).mode == "RGB"
    near(gray(path, window=(30000, 10000)), linear(RAMP.astype(float), 30000, 10000))


def test_thirty_two_bits_need_a_window(tmp_path):
    path = tmp_path / "deep.tiff"
    Image.fromarray(RAMP.astype(np.int32) - 70000).save(path)
    with pytest.raises(UnreadableImage, match="values from -70000 to -4465; give a --window"):
        read_image(path)
    near(gray(path, window=(-30000, 20000)), linear(RAMP.astype(float) - 70000, -30000, 20000))


def test_dicom_window(tmp_path):
    values = STORED.astype(float)
    near(gray(dicom(tmp_path / "none.dcm")), values / 4095)
    window = {"WindowCenter": [1000, 40], "WindowWidth": [600, 400]}
    near(gray(dicom(tmp_path / "first.dcm", **window)), linear(values, 1000, 600))
    near(gray(tmp_path / "first.dcm", window=(2000, 100)), linear(values, 2000, 100))
    inverse = dicom(tmp_path / "inverse.DCM", PhotometricInterpretation="MONOCHROME1", **window)
    near(gray(inverse), 1 - linear(values, 1000, 600))
    units = dicom(tmp_path / "units.dcm", RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    near(gray(units), linear(2 * values - 1024, 40, 400))
    exact = dicom(tmp_path / "exact.dcm", WindowCenter=1000, WindowWidth=600, VOILUTFunction="LINEAR_EXACT")
    near(gray(exact), ((values - 1000) / 600 + 0.5).clip(0, 1))
    sigmoid = dicom(tmp_path / "sigmoid.dcm", WindowCenter=1000, WindowWidth=600, VOILUTFunction="SIGMOID")
    near(gray(sigmoid), 1 / (1 + np.exp(-4 * (values - 1000) / 600)))
    step = dicom(tmp_path / "step.dcm", WindowCenter=1000, WindowWidth=1)
    near(gray(step), (values > 999.5).astype(float))


def test_dicom_look_up_table(tmp_path):
    import pydicom

    table = pydicom.Dataset()
    table.LUTDescriptor = [4096, 0, 10]
    table.add_new("LUTData", "OW", (1023 - np.arange(4096) // 4).astype(np.uint16).tobytes())
    path = dicom(tmp_path / "table.dcm", VOILUTSequence=pydicom.Sequence([table]))
    near(gray(path), (1023 - STORED // 4) / 1023)


def test_dicom_colour(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 7, 3)).astype(np.uint8)
    assert np.array_equal(np.asarray(read_image(dicom(tmp_path / "a.dcm", pixels))), pixels)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"NumberOfFrames": 3}, "3 frames in one DICOM file"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "photometric interpretation PALETTE COLOR; allowed"),
        ({"PixelData": b"short"}, "cannot decode its pixels"),
    ],
)
def test_dicom_errors(tags, message, tmp_path):
    path = dicom(tmp_path / "a.dcm")
    check_header(str(path))
    with pytest.raises(UnreadableImage, match=message):
        read_image(dicom(tmp_path / "b.dcm", **tags))


def test_files_that_are_no_images(tmp_path):
    (tmp_path / "text.dcm").write_text("not an image")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(UnreadableImage, match="no DICOM file"):
        check_header(str(tmp_path / "text.dcm"))
    for read in (read_image, lambda p: check_header(str(p))):
        with pytest.raises(UnreadableImage, match="cannot identify image file"):
            read(tmp_path / "text.png")
        with pytest.raises(UnreadableImage, match=r"image '.*missing\.png' does not exist"):
            read(tmp_path / "missing.png")


def test_dicom_needs_its_extra(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"vizoo\[medical\]"):
        read_image(path)


def test_folders_mix_the_kinds(tmp_path):
    for split in ("train", "val"):
        for name in ("negative", "positive"):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            dicom(folder / "a.dcm", WindowCenter=1000, WindowWidth=600)
            Image.fromarray(RAMP).save(folder / "b.png")
    train, _, classes = folder_splits(str(tmp_path), "train", "val", "L", "full")
    assert classes == ["negative", "positive"]
    assert [target for _, target in train] == [0, 0, 1, 1]
    near(np.asarray(train[0][0]).astype(float), linear(STORED.astype(float), 1000, 600))
    near(np.asarray(train[1][0]).astype(float), RAMP / 65535)
    windowed, *_ = folder_splits(str(tmp_path), "train", "val", "L", "full", (3000, 900))
    near(np.asarray(windowed[2][0]).astype(float), linear(STORED.astype(float), 3000, 900))
    dicom(tmp_path / "val" / "negative" / "c.dcm", NumberOfFrames=2)
    with pytest.raises(UserError, match=r"c\.dcm': 2 frames in one DICOM file"):
        folder_splits(str(tmp_path), "train", "val", "L", "header")


# orientation

TURNS = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}
STORED_AS = {
    "rgb.png": (3, np.uint8, {}),
    "deep.png": (1, np.uint16, {}),
    "rgb.tiff": (3, np.uint8, {}),
    "gray.tiff": (1, np.uint8, {}),
    "deep.tiff": (1, np.uint16, {}),
    "packed.tiff": (1, np.uint16, {"compression": "tiff_lzw"}),
    "rgb.webp": (3, np.uint8, {"lossless": True}),
    "rgb.jpg": (3, np.uint8, {"quality": 100, "subsampling": "4:4:4"}),
}


def oriented(path, pixels, tag, **options):
    """Save pixels as they are, with a tag that says how to turn them."""
    exif = Image.Exif()
    exif[274] = tag
    Image.fromarray(pixels).save(path, exif=exif, **options)
    return path


@pytest.mark.parametrize("tag", TURNS)
@pytest.mark.parametrize("name", STORED_AS)
def test_orientation(name, tag, tmp_path):
    """Upright without labels; with labels in the frame that fits, and refused where both frames do."""
    channels, dtype, options = STORED_AS[name]
    top = np.iinfo(dtype).max
    smooth = np.add.outer(np.arange(12) * 3, np.arange(20)) * (top // 60)  # JPEG keeps it
    pixels = np.repeat(smooth[..., None], 3, 2) if channels == 3 else smooth
    path = oriented(tmp_path / name, pixels.astype(dtype), tag, **options)
    mode = "RGB" if channels == 3 else "L"
    shown = np.rint(pixels / top * 255)

    def equal(image, expected):
        found = np.asarray(image).astype(float)
        return found.shape == expected.shape and np.abs(found - expected).max() <= (5 if name.endswith("jpg") else 0)

    upright = TURNS[tag](shown)
    assert equal(read_image(path, mode), upright)
    if tag == 1 or tag >= 5:
        assert equal(read_image(path, mode, size=(20, 12)), shown)
        assert check_header(path, (20, 12)) == (tag >= 5)
        assert equal(read_image(path, mode, size=upright.shape[1::-1]), upright)
        assert not check_header(path, upright.shape[1::-1])
    else:
        for read in (read_image, lambda p, size: check_header(p, size)):
            with pytest.raises(ImageError, match=rf"is 20x12 pixels turned by its EXIF orientation {tag} or not"):
                read(path, size=(20, 12))
    assert equal(read_image(path, mode, size=upright.shape[1::-1], turned=True), upright)
    with pytest.raises(ImageError, match=r"is 20x12 pixels.*, its labels are for 20x13"):
        read_image(path, size=(20, 13))


def test_squares_are_refused_whatever_their_orientation(tmp_path):
    for tag in TURNS:
        path = oriented(tmp_path / f"{tag}.png", np.arange(144, dtype=np.uint8).reshape(12, 12), tag)
        if tag == 1:
            read_image(path, size=(12, 12))
        else:
            with pytest.raises(ImageError, match=f"EXIF orientation {tag} or not"):
                read_image(path, size=(12, 12))


def test_broken_exif_is_no_orientation(tmp_path):
    pixels = np.arange(240, dtype=np.uint8).reshape(12, 20)
    for i, exif in enumerate((b"Exif\0\0nonsense", b"Exif\0\0II*\0\xff\xff\xff\xff", b"")):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png", exif=exif)
        assert np.array_equal(np.asarray(read_image(tmp_path / f"{i}.png", "L")), pixels)
    for tag in (0, 9, 65535):
        assert np.array_equal(np.asarray(read_image(oriented(tmp_path / "a.png", pixels, tag), "L")), pixels)


@pytest.mark.parametrize("tag", TURNS)
def test_masks_are_turned_by_their_own_orientation(tag, tmp_path):
    ids = np.random.default_rng(0).integers(0, 9, (12, 20)).astype(np.uint8)
    found, turned = read_mask(oriented(tmp_path / "a.png", ids, tag))
    assert np.array_equal(found, TURNS[tag](ids))
    assert turned == (tag != 1)


# kinds of files


def test_every_mode_as_pillow_shows_it(tmp_path):
    """Transparency is dropped without a word; the colours below it stay."""
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 255, (9, 7, 4)).astype(np.uint8), "RGBA")
    rgb = np.asarray(rgba)[..., :3]
    rgba.save(tmp_path / "rgba.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "rgba.png")), rgb)
    Image.fromarray(rng.integers(0, 255, (9, 7, 2)).astype(np.uint8), "LA").save(tmp_path / "la.png")
    with Image.open(tmp_path / "la.png") as image:
        gray = np.asarray(image)[..., 0]
    assert np.array_equal(np.asarray(read_image(tmp_path / "la.png")), np.repeat(gray[..., None], 3, 2))
    indices = rng.integers(0, 4, (9, 7)).astype(np.uint8)
    colours = rng.integers(0, 255, (4, 3)).astype(np.uint8)
    for transparency in (2, bytes([0, 128, 255, 7])):
        image = Image.fromarray(indices, "P")
        image.putpalette(colours.tobytes())
        image.save(tmp_path / "p.png", transparency=transparency)
        assert np.array_equal(np.asarray(read_image(tmp_path / "p.png")), colours[indices])
    Image.fromarray(rgb).convert("CMYK").save(tmp_path / "cmyk.tiff")
    assert np.array_equal(np.asarray(read_image(tmp_path / "cmyk.tiff")), rgb)
    bits = rng.integers(0, 2, (9, 7)).astype(bool)
    Image.fromarray(bits).save(tmp_path / "bits.png")
    assert np.array_equal(np.asarray(read_image(tmp_path / "bits.png", "L")), bits * 255)
    Image.fromarray(rgb).convert("YCbCr").save(tmp_path / "y.jpg", quality=100, subsampling=0)
    assert np.abs(np.asarray(read_image(tmp_path / "y.jpg")).astype(int) - rgb).mean() < 3


def test_floats(tmp_path):
    """From 0 to 1 they are shares; else only a window tells what to show."""
    shares = np.linspace(0, 1, 240, dtype=np.float32).reshape(12, 20)
    Image.fromarray(shares).save(tmp_path / "shares.tiff")
    near(gray(tmp_path / "shares.tiff"), shares)
    near(gray(tmp_path / "shares.tiff", window=(0.5, 0.2)), ((shares - 0.5) / 0.2 + 0.5).clip(0, 1))
    Image.fromarray(shares * 300 - 20).save(tmp_path / "units.tiff")
    with pytest.raises(UnreadableImage, match="float values from -20 to 280; give a --window"):
        read_image(tmp_path / "units.tiff")
    near(gray(tmp_path / "units.tiff", window=(100, 50)), ((shares * 300 - 120) / 50 + 0.5).clip(0, 1))
    for value in (np.nan, np.inf):
        Image.fromarray(np.where(shares > 0.5, np.float32(value), shares)).save(tmp_path / "bad.tiff")
        for window in (None, (0.5, 1.0)):
            with pytest.raises(UnreadableImage, match="values that are not finite"):
                read_image(tmp_path / "bad.tiff", window=window)


@pytest.mark.parametrize("kind", ["gif", "tiff", "png", "webp"])
def test_several_frames_are_refused_and_one_is_read(kind, tmp_path):
    first, second = (Image.new("RGB", (8, 6), colour) for colour in ("red", "lime"))
    several, one = tmp_path / f"several.{kind}", tmp_path / f"one.{kind}"
    first.save(several, save_all=True, append_images=[second, first])
    first.save(one, **({"lossless": True} if kind == "webp" else {}))
    assert np.array_equal(np.asarray(read_image(one)), np.asarray(first))
    check_header(one)
    for read in (read_image, check_header, read_mask):
        with pytest.raises(UnreadableImage, match=r"several\.\w+': 3 frames in one \w+ file; need one image in each"):
            read(several)


def test_second_picture_of_a_camera_is_no_frame(tmp_path):
    first = Image.new("RGB", (16, 16), "red")
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (16, 16), "lime")])
    red, green, blue = np.asarray(read_image(tmp_path / "a.jpg"))[8, 8]
    assert red > 200 > 50 > green


def test_masks_hold_ids(tmp_path):
    ids = np.arange(240).reshape(12, 20)
    for name, stored in (("8", ids.astype(np.uint8)), ("16", (ids * 200).astype(np.uint16)), ("1", ids > 99)):
        Image.fromarray(stored).save(tmp_path / f"{name}.png")
        assert np.array_equal(read_mask(tmp_path / f"{name}.png")[0], stored)
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette(list(range(256)) * 3)
    image.save(tmp_path / "p.png", transparency=0)
    assert np.array_equal(read_mask(tmp_path / "p.png")[0], ids)
    Image.new("RGB", (3, 3)).save(tmp_path / "rgb.png")
    with pytest.raises(UnreadableImage, match=r"several channels \(RGB\), need one channel"):
        read_mask(tmp_path / "rgb.png")
    Image.fromarray(np.zeros((3, 3), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(UnreadableImage, match="it has floats"):
        read_mask(tmp_path / "f.tiff")


def bomb(path):
    """A PNG file that says it has 10 billion pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def cut(path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:2000])


BROKEN = {
    "bomb": ("a.png", bomb, "10000000000 pixels"),
    "cut png": ("a.png", cut, "truncated"),
    "cut jpeg": ("a.jpg", cut, "truncated"),
    "cut tiff": ("a.tiff", cut, "cannot read image"),
    "pipe": ("a.png", lambda p: os.mkfifo(p), "is a pipe or device, need a file"),
    "dicom pipe": ("a.dcm", lambda p: os.mkfifo(p), "is a pipe or device, need a file"),
    "folder": ("a.png", lambda p: p.mkdir(), "is a folder, need a file"),
    "empty": ("a.png", lambda p: p.touch(), "cannot identify image file"),
    "link to nothing": ("a.png", lambda p: p.symlink_to("nothing"), "does not exist"),
    "link to itself": ("a.png", lambda p: p.symlink_to("a.png"), "Too many levels of symbolic links"),
    "long name": ("a" * 300 + ".png", lambda p: None, "File name too long"),
    "long path": ("a/" * 3000 + "a.png", lambda p: None, "File name too long"),
    "nul": ("a\0b.png", lambda p: None, "embedded null byte"),
    "cut dicom": ("a.dcm", lambda p: p.write_bytes(dicom(p).read_bytes()[:200]), "cannot read image"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_one_line(case, tmp_path):
    name, make, message = BROKEN[case]
    make(tmp_path / name)
    with pytest.raises(UnreadableImage, match=message) as e:
        read_image(tmp_path / name)
    assert "\n" not in str(e.value)


def broken_dicom(path, **tags):
    """With values that pydicom itself would not write."""
    path = dicom(path, **dict.fromkeys(tags, "11111"))
    data = path.read_bytes()
    for value in tags.values():
        data = data.replace(b"11111 ", value.ljust(6).encode(), 1)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ({"WindowCenter": 1000}, "WindowCenter without WindowWidth; give a --window"),
        ({"WindowWidth": 1000}, "WindowWidth without WindowCenter; give a --window"),
        ({"WindowCenter": 1000, "WindowWidth": 0}, "window of centre 1000 and width 0: need"),
        ({"WindowCenter": 1000, "WindowWidth": -5}, "window of centre 1000 and width -5: need"),
        ({"Rows": 65535, "Columns": 65535}, "Columns and Rows 65535 and 65535: need 1 to 178,956,970 pixels"),
        ({"Rows": 0}, "Columns and Rows 20 and 0: need"),
        ({"RescaleSlope": "1e308", "RescaleIntercept": "1e308"}, "values that are not finite"),
        ({"BitsAllocated": 7}, "cannot decode its pixels"),
        ({"PhotometricInterpretation": ""}, "photometric interpretation"),
    ],
)
def test_more_dicom_errors(tags, message, tmp_path):
    with pytest.raises(UnreadableImage, match=message):
        read_image(dicom(tmp_path / "a.dcm", **tags))
    if "window" in message.lower():
        near(gray(tmp_path / "a.dcm", window=(1000, 600)), linear(STORED.astype(float), 1000, 600))


@pytest.mark.parametrize("tag", ["WindowCenter", "WindowWidth"])
@pytest.mark.parametrize("value", ["wide", "nan", "1e999"])
def test_dicom_words_for_numbers(tag, value, tmp_path):
    other = {"WindowCenter": "WindowWidth", "WindowWidth": "WindowCenter"}[tag]
    path = broken_dicom(tmp_path / "a.dcm", **{other: "40", tag: value})
    with pytest.raises(UnreadableImage, match=r"a\.dcm"):
        read_image(path)


def test_nothing_is_printed_about_files_that_are_read(tmp_path):
    """Large images, halves of EXIF blocks and transparent palettes make Pillow warn, once for each image."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    Image.new("P", (9, 9)).save(tmp_path / "palette.png", transparency=b"\1\2")
    exif = Image.Exif()
    exif[274], exif[271] = 1, "camera"
    Image.new("L", (9, 9)).save(tmp_path / "exif.png", exif=exif.tobytes()[:-9])
    code = "import sys; from vizoo.tools.data.images import read_image; [read_image(p) for p in sys.argv[1:]]"
    words = [sys.executable, "-c", code, *map(str, tmp_path.iterdir())]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# windows


@pytest.mark.parametrize("words", ["nan 10", "inf 10", "1 nan", "1 inf", "1 0", "1 -10", "1e999 1"])
def test_windows_are_checked(words, tmp_path):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add(parser, "--window")
    with pytest.raises(argparse.ArgumentError, match="need a finite centre and a width above 0"):
        parser.parse_args(["--window", *words.split()])
    assert parser.parse_args(["--window", "-600", "1500"]).window == (-600, 1500)
    Image.fromarray(RAMP).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImage, match="need a finite centre and a width above 0"):
        read_image(tmp_path / "a.png", window=tuple(map(float, words.split())))


# folders


def class_folders(root, count=3):
    for split in ("train", "val"):
        for name in ("a", "b"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.random.default_rng(i).integers(0, 255, (24, 24, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def opened(root, check="full", **options):
    return open_split(str(root), "train", "RGB", check, **options)


def test_listing_is_that_of_timm(tmp_path):
    from timm.data.readers.reader_image_folder import find_images_and_targets

    root = class_folders(tmp_path / "data", 12) / "train"
    (root / "b" / "deeper").mkdir()
    (root / "b" / "5.png").rename(root / "b" / "deeper" / "5.PNG")
    (root / "a10").mkdir()
    (root / "a9").symlink_to(class_folders(tmp_path / "elsewhere") / "val" / "a")
    (root / "a" / "3.png").rename(root / "a10" / "3.png")
    (root / "a" / "notes.txt").write_text("no image")
    reader = opened(tmp_path / "data").reader
    samples, classes = find_images_and_targets(str(root))
    assert reader.samples == samples
    assert reader.class_to_idx == classes
    assert list(classes) == ["a", "a9", "a10", "b", "deeper"]


@pytest.mark.parametrize("target", [".", "..", "../..", "../../..", "/"])
def test_loops_of_links_count_nothing_twice(target, tmp_path):
    root = class_folders(tmp_path / "data")
    (root / "train" / "a" / "loop").symlink_to(target)
    assert len(opened(root)) == 6
    assert len(list_files(root / "train")) == 6


def test_folder_that_is_reached_twice_is_refused(tmp_path):
    root = class_folders(tmp_path / "data")
    (root / "train" / "a" / "x").symlink_to("../b")
    with pytest.raises(UserError, match=r"are the same folder; its files would count twice"):
        opened(root)


def test_class_without_an_image_is_refused(tmp_path):
    root = class_folders(tmp_path / "data")
    (root / "train" / "c").mkdir()
    (root / "train" / "c" / "a.txt").write_text("no image")
    with pytest.raises(UserError, match=r"train/c' holds no image"):
        opened(root)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_never_replaced(workers, tmp_path):
    """timm would give its neighbour; here the file is named, also from the loader's process."""
    root = class_folders(tmp_path / "data")
    bad = root / "train" / "a" / "1.png"
    bad.write_bytes(bad.read_bytes()[:700])
    dataset = opened(root, "header")
    dataset.transform = np.array
    loader = torch.utils.data.DataLoader(dataset, num_workers=workers)
    with pytest.raises(UnreadableImage) as e:
        list(loader)
    assert str(e.value) == f"cannot read image {str(bad)!r}: image file is truncated"


def test_skip_unreadable_leaves_out_and_counts(tmp_path, capsys):
    root = class_folders(tmp_path / "data")
    bad = [root / "train" / "a" / "1.png", root / "val" / "b" / "0.png", root / "val" / "b" / "2.png"]
    for file in bad:
        file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(UserError, match=r"1\.png': .* \(and 2 more unreadable images\); --skip-unreadable leaves"):
        folder_splits(str(root), "train", "val", "RGB", "full")
    splits = folder_splits(str(root), "train", "val", "RGB", "none", skip_unreadable=True)
    assert (splits.train.skipped, splits.held_out.skipped) == (1, 2)
    assert (len(splits.train), len(splits.held_out)) == (5, 4)
    assert not {str(f) for f in bad} & {f for d in splits[:2] for f, _ in d.reader.samples}
    assert "--skip-unreadable: 3 of 12 images left out; the first: cannot read image" in capsys.readouterr().out
    assert opened(root, skip_unreadable=True).skipped == 1
    (root / "val" / "b" / "1.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image of class 'b' in .* can be read"):
        folder_splits(str(root), "train", "val", "RGB", "none", skip_unreadable=True)


def test_evaluation_stops_at_an_unreadable_image(tmp_path, capsys):
    root = class_folders(tmp_path / "data")
    bad = root / "val" / "b" / "1.png"
    bad.write_bytes(bad.read_bytes()[:700])
    weights = tmp_path / "weights.pth"
    import timm

    torch.save(timm.create_model("test_convnext", num_classes=2).state_dict(), weights)
    words = ["evaluate", "--model", "test_convnext", "--checkpoint", str(weights), "--data", str(root), "-j", "1"]
    assert cli.main([*words, "--check-images", "header", "--device", "cpu", "--out", str(tmp_path / "a.json")]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last == f"vizoo evaluate: error: cannot read image {str(bad)!r}: image file is truncated"
    assert not Path(tmp_path / "a.json").exists()
