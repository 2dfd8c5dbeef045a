"""Reading images for training and evaluation: 8-bit files as Pillow does, 16-bit gray and DICOM by their window.

Pillow turns 16-bit gray into 8 bits by cutting everything above 255 off; medical images must not pass through that.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from timm.data.readers import get_img_extensions
from timm.data.readers.reader_image_folder import ReaderImageFolder

DICOM = (".dcm", ".dicom")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # modes of Pillow for more than 8 bits of gray


class UnreadableImage(OSError):
    """The message says what is wrong with the file, but not which file it is."""


class ImageFolder(ReaderImageFolder):
    """timm's reader of class folders for all that :func:`read_image` reads.

    Args:
        root: Folder of class folders.
        mode: Pillow mode, ``"L"`` or ``"RGB"``.
        window: As in :func:`read_image`.
    """

    def __init__(self, root: str, mode: str, window: tuple[float, float] | None = None) -> None:
        super().__init__(root, input_key=";".join((*get_img_extensions(), *DICOM)))
        self.mode, self.window = mode, window

    def __getitem__(self, index: int) -> tuple[_File, int]:
        path, target = self.samples[index]
        return _File(path, self.mode, self.window), target


class _File:
    """What timm's data set asks for its image: with ``load_bytes`` it takes whatever ``read()`` returns."""

    def __init__(self, *args: Any) -> None:
        self.args = args

    def read(self) -> Image.Image:
        return read_image(*self.args)


def read_image(path: str | Path, mode: str = "RGB", window: tuple[float, float] | None = None) -> Image.Image:
    """Read an image as 8 bits a channel.

    16-bit gray files are scaled from their whole range.  DICOM files are rescaled to their modality's units and shown
    by the look-up table or else the first window they hold, without either from their smallest to their greatest value;
    ``MONOCHROME1`` is inverted, so that more is brighter.

    Args:
        path: PNG, JPEG or any other format of Pillow; DICOM by the suffix ``.dcm`` or ``.dicom``.
        mode: Pillow mode of the result, ``"L"`` or ``"RGB"``.
        window: Centre and width of the values to show, of 16-bit gray and DICOM files, instead of the file's own.

    Returns:
        The image.

    Raises:
        UnreadableImage: If the file is missing, broken, holds several frames, or is of a kind that is not supported.
        ImportError: For a DICOM file without pydicom, the extra ``medical``.
    """
    try:
        if str(path).lower().endswith(DICOM):
            return _read_dicom(path, window).convert(mode)
        with Image.open(path) as image:
            if image.mode in DEEP:
                return _to_gray(_deep(np.asarray(image), window)).convert(mode)
            return image.convert(mode)
    except UnreadableImage:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e).replace(repr(str(path)), "").strip()
        raise UnreadableImage(reason or type(e).__name__) from None


def check_header(path: str) -> None:
    """Read an image as far as is cheap.

    Args:
        path: The file.

    Raises:
        UnreadableImage: As in :func:`read_image`.
        ImportError: Likewise.
    """
    if path.lower().endswith(DICOM):
        _open_dicom(path, header_only=True)
        return
    try:
        with Image.open(path):
            pass
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UnreadableImage(str(e).replace(repr(path), "").strip() or type(e).__name__) from None


def _to_gray(values: np.ndarray) -> Image.Image:
    """Values from 0 to 1 to an 8-bit image."""
    return Image.fromarray(np.rint(255 * values.clip(0, 1)).astype(np.uint8))


def _deep(values: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    if window:
        return _windowed(values, *window)
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage(f"32-bit values from {values.min()} to {values.max()}; give a window")
    return values / 65535


def _windowed(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """The window of the DICOM standard, PS3.3 C.11.2.1, from 0 to 1."""
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return 0.5 + 0.5 * np.tanh(2 * (values - center) / width)  # 1 / (1 + exp(-4 x)) without its overflow
    if function == "LINEAR_EXACT":
        return ((values - center) / width + 0.5).clip(0, 1)
    if width <= 1:  # one step: LINEAR has width - 1 in the denominator
        return (values > center - 0.5).astype(np.float64)
    return ((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def _open_dicom(path: str | Path, header_only: bool = False) -> Any:
    if importlib.util.find_spec("pydicom") is None:
        raise ImportError("DICOM files need pydicom: pip install 'vizoo[medical]'")
    import pydicom

    try:
        data = pydicom.dcmread(path, stop_before_pixels=header_only)
    except pydicom.errors.InvalidDicomError:
        raise UnreadableImage("no DICOM file: its header is missing") from None
    if not header_only and "PixelData" not in data:
        raise UnreadableImage("a DICOM file without pixels")
    if int(data.get("NumberOfFrames") or 1) > 1:
        raise UnreadableImage(f"{data.NumberOfFrames} frames in one DICOM file; need one image in each file")
    kind = data.get("PhotometricInterpretation", "none")
    if kind not in ("MONOCHROME1", "MONOCHROME2", "RGB") and not kind.startswith("YBR_"):
        raise UnreadableImage(f"photometric interpretation {kind}; allowed: MONOCHROME1, MONOCHROME2, RGB, YBR_*")
    return data


def _read_dicom(path: str | Path, window: tuple[float, float] | None) -> Image.Image:
    data = _open_dicom(path)
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    try:
        pixels = pixel_array(data)
    except Exception as e:  # decoders raise what they like; the message is all there is
        raise UnreadableImage(f"cannot decode its pixels: {' '.join(str(e).split())[:200]}") from None
    if pixels.ndim == 3:
        top = 2 ** int(data.BitsStored) - 1
        return Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8))
    values = apply_modality_lut(pixels, data)
    if window:
        gray = _windowed(values, *window)
    elif "VOILUTSequence" in data:
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        gray = apply_voi_lut(np.rint(values).astype(np.int32), data) / (2**bits - 1)
    elif data.get("WindowWidth") not in (None, ""):
        center, width = (float(np.atleast_1d(data[name].value)[0]) for name in ("WindowCenter", "WindowWidth"))
        gray = _windowed(values, center, width, data.get("VOILUTFunction", "LINEAR"))
    else:
        low, high = float(values.min()), float(values.max())
        gray = (values - low) / max(high - low, 1e-12)
    return _to_gray(1 - gray if data.PhotometricInterpretation == "MONOCHROME1" else gray)
