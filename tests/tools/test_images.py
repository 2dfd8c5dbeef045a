"""Reading images: every kind of file becomes the 8 bits it shows, everything else one clear error."""

import numpy as np
import pytest
from PIL import Image

from vizoo.tools._data import folder_splits
from vizoo.tools._images import UnreadableImage, check_header, read_image
from vizoo.tools.common import UserError

RAMP = np.linspace(0, 65535, 24 * 20).round().astype(np.uint16).reshape(24, 20)
STORED = np.linspace(0, 4095, 24 * 20).round().astype(np.uint16).reshape(24, 20)  # 12 bits


def dicom(path, pixels=STORED, **tags):
    """Write a minimal radiograph."""
    import pydicom
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = pydicom.Dataset()
    data.file_meta = meta
    data.Rows, data.Columns = pixels.shape[-2:] if pixels.dtype == np.uint16 else pixels.shape[:2]
    deep = pixels.dtype == np.uint16
    data.SamplesPerPixel = 1 if deep else 3
    data.PhotometricInterpretation = "MONOCHROME2" if deep else "RGB"
    data.BitsAllocated, data.BitsStored, data.HighBit = (16, 12, 11) if deep else (8, 8, 7)
    data.PixelRepresentation = 0
    if not deep:
        data.PlanarConfiguration = 0
    data.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path, enforce_file_format=True)
    return path


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
    with pytest.raises(UnreadableImage, match="values from -70000 to -4465; give a window"):
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
        with pytest.raises(UnreadableImage, match="No such file"):
            read(tmp_path / "missing.png")


def test_dicom_needs_its_extra(tmp_path, monkeypatch):
    path = dicom(tmp_path / "a.dcm")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"vizoo\[medical\]"):
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
