"""Reading images and masks: the one place where any task opens one, with one rule for each kind of file.

Pillow turns 16-bit gray into 8 bits by cutting everything above 255 off; medical images must not pass through that.
Cameras store pictures lying and say in a tag of EXIF how to turn them: every image is read upright, as viewers show it,
but where labels were drawn on the pixels as they are stored, those are read.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vizoo.tools.common import UserError, check_file, short
from vizoo.tools.options import window_type

DICOM = (".dcm", ".dicom")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I")  # modes of Pillow for more than 8 bits of gray
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # of an image: where Pillow, too, takes a file for a bomb
ROUND = Image.Transpose
TURNS = {  # how an image is turned upright, by its tag, and back
    2: (ROUND.FLIP_LEFT_RIGHT, ROUND.FLIP_LEFT_RIGHT),
    3: (ROUND.ROTATE_180, ROUND.ROTATE_180),
    4: (ROUND.FLIP_TOP_BOTTOM, ROUND.FLIP_TOP_BOTTOM),
    5: (ROUND.TRANSPOSE, ROUND.TRANSPOSE),
    6: (ROUND.ROTATE_270, ROUND.ROTATE_90),
    7: (ROUND.TRANSVERSE, ROUND.TRANSVERSE),
    8: (ROUND.ROTATE_90, ROUND.ROTATE_270),
}

# what matters in a file is an error here; the rest, such as half an EXIF block, would be a line for each image
warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\b")


class ImageError(UserError):
    """Names the file and what is wrong with it in one line, also when a loader's process hands it on."""

    def __init__(self, message: str) -> None:
        if message.startswith("Caught "):  # torch makes one of the same class whose message is the whole traceback
            message = message.rstrip().rpartition(f"{type(self).__name__}: ")[2]
        super().__init__(message)


class UnreadableImage(ImageError):
    """The file is missing, broken, or of a kind that is not supported."""


def read_image(
    path: str | Path,
    mode: str = "RGB",
    window: tuple[float, float] | None = None,
    size: tuple[int, int] | None = None,
    turned: bool | None = None,
) -> Image.Image:
    """Read an image as 8 bits a channel, upright by its EXIF orientation.

    16-bit gray files are scaled from their whole range, files of floats between 0 and 1 from that.  DICOM files are
    rescaled to their modality's units and shown by the look-up table or else the first window they hold, without either
    from their smallest to their greatest value; ``MONOCHROME1`` is inverted, so that more is brighter.  An alpha
    channel and transparent colours of a palette are dropped: the colours are those stored below.  Of the pictures that
    a camera puts into one JPEG file (MPO) the first is read.

    Args:
        path: PNG, JPEG or any other format of Pillow; DICOM by the suffix ``.dcm`` or ``.dicom``.
        mode: Pillow mode of the result, ``"L"`` or ``"RGB"``.
        window: Centre and width of the values that 16-bit gray, float and DICOM files show, instead of their own; as
            DICOM's function LINEAR, for floats LINEAR_EXACT.
        size: Width and height that the image's labels were drawn for.  If only the pixels as they are stored have it,
            they are not turned.
        turned: Whether the labels were drawn on the upright image; None if only ``size`` tells.

    Returns:
        The image.

    Raises:
        UnreadableImage: If the file is missing, no regular file, broken, holds several frames, over 178,956,970 pixels
            or values that need a window, or is of a kind that is not supported.
        ImageError: If the image does not have ``size``, or has it turned and not turned, so that nobody knows how its
            labels were drawn.
        UserError: For a DICOM file without pydicom, the extra ``medical``.
    """
    with _reading(path, "image") as file:
        if _is_dicom(file):
            image = _read_dicom(file, window)
            _as_stored(file, image.size, 1, size, turned)
            return image.convert(mode)
        with _open(file) as opened:
            tag = _orientation(opened)
            as_stored = _as_stored(file, _stored_size(opened, tag), tag, size, turned)
            image = _load(opened, tag, as_stored)
        if image.mode in (*DEEP, "F"):
            image = _to_gray(_deep(np.asarray(image), window))
        elif image.mode in ("P", "PA"):
            image = image.convert("RGBA")  # straight to RGB, Pillow warns of transparent colours
        return image.convert(mode)


def read_mask(path: str | Path) -> tuple[np.ndarray, bool]:
    """Read a mask of class ids, turned by its own EXIF orientation.

    Args:
        path: File of one channel: black and white, gray of 8, 16 or 32 bits, or with a palette, whose indices count.

    Returns:
        The ids ``[H, W]``, and whether the mask was turned.

    Raises:
        UnreadableImage: As :func:`read_image`, and for a file with several channels or of floats.
    """
    with _reading(path, "mask") as file, _open(file) as opened:
        tag = _orientation(opened)
        if opened.mode not in ("1", "L", "P", *DEEP):
            bands = len(opened.getbands())
            what = "floats" if bands == 1 else f"several channels ({opened.mode})"
            raise ValueError(f"it has {what}, need one channel that holds class ids")
        return np.array(_load(opened, tag, False)), tag != 1


def check_header(path: str | Path, size: tuple[int, int] | None = None, turned: bool | None = None) -> bool:
    """Read an image as far as is cheap.

    Args:
        path: The file.
        size: As in :func:`read_image`.
        turned: Likewise.

    Returns:
        Whether its labels were drawn on the pixels as they are stored although a tag turns them.

    Raises:
        UnreadableImage: As in :func:`read_image`, but for what only the pixels tell.
        ImageError: Likewise.
        UserError: Likewise.
    """
    with _reading(path, "image") as file:
        if _is_dicom(file):
            data = _open_dicom(file, header_only=True)
            return _as_stored(file, (int(data.Columns), int(data.Rows)), 1, size, turned)
        with _open(file) as opened:
            if size is None:
                return False
            tag = _orientation(opened)
            return _as_stored(file, _stored_size(opened, tag), tag, size, turned)


def list_files(folder: str | Path) -> list[Path]:
    """All files below a folder, also behind links to other folders.

    Links back to a folder that holds them are not followed: there is nothing new behind them.

    Args:
        folder: Where to look.

    Returns:
        Paths that begin with ``folder``, in no order.

    Raises:
        UserError: If a folder cannot be listed, or can be reached in two ways, so that its files would count twice.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot list folder {short(str(error.filename), 500)}: {error.strerror}") from None

    def is_loop(link: Path) -> bool:
        target = link.resolve()
        above = [p for p in link.parents if p.is_relative_to(folder)]
        return any(p.resolve().is_relative_to(target) for p in above)

    folder = Path(folder)
    found: list[Path] = []
    seen: dict[str, str] = {}
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        first = seen.setdefault(os.path.realpath(root), root)
        if first != root:
            raise UserError(f"{first!r} and {root!r} are the same folder; its files would count twice")
        folders[:] = sorted(d for d in folders if not (os.path.islink(p := os.path.join(root, d)) and is_loop(Path(p))))
        found += [Path(root, f) for f in files]
    return found


@contextlib.contextmanager
def _reading(path: str | Path, what: str) -> Iterator[Path]:
    """Whatever goes wrong with a file becomes one line that names it."""
    try:
        file = check_file(path, what)
    except UserError as e:
        raise UnreadableImage(str(e)) from None
    try:
        yield file
    except (UserError, MemoryError):
        raise
    except Exception as e:  # decoders raise what they like; the message is all there is
        text = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        reason = " ".join(text.split())[:200] or type(e).__name__
        raise UnreadableImage(f"cannot read {what} {short(str(path), 500)}: {reason}") from None


def _is_dicom(file: Path) -> bool:
    return file.name.lower().endswith(DICOM)


@contextlib.contextmanager
def _open(file: Path) -> Iterator[Image.Image]:
    with contextlib.ExitStack() as stack:
        try:  # by its handle: by its name, Pillow maps plain TIFF files into memory and turns them wrongly
            opened = stack.enter_context(Image.open(stack.enter_context(file.open("rb"))))
        except UnidentifiedImageError:
            raise ValueError("cannot identify image file") from None
        frames = 1 if opened.format == "MPO" else getattr(opened, "n_frames", 1)
        if frames > 1:
            raise ValueError(f"{frames} frames in one {opened.format} file; need one image in each file")
        yield opened


def _orientation(opened: Image.Image) -> int:
    try:
        tag = opened.getexif().get(ExifTags.Base.Orientation)
    except OSError:  # of the pixels, which Pillow reads on its way to the EXIF block of a PNG file
        raise
    except Exception:  # no EXIF at all, which viewers pass over too
        return 1
    return tag if isinstance(tag, int) and tag in TURNS else 1


def _stored_size(opened: Image.Image, tag: int) -> tuple[int, int]:
    """Width and height of the pixels as they are stored."""
    width, height = opened.size
    return (height, width) if opened.format == "TIFF" and tag >= 5 else (width, height)  # Pillow turns that format


def _as_stored(
    file: Path, stored: tuple[int, int], tag: int, size: tuple[int, int] | None, turned: bool | None
) -> bool:
    """Whether an image is taken as it is stored although a tag turns it."""
    if size is None:
        return False
    upright = stored[::-1] if tag >= 5 else stored
    name = short(str(file), 500)
    if upright == size and (tag == 1 or turned or stored != size):
        return False
    if stored == size and turned is None and stored != upright:
        return True
    if upright != size:
        also = "" if upright == stored else f" ({_text(upright)} upright by its EXIF orientation {tag})"
        raise ImageError(f"image {name} is {_text(stored)} pixels{also}, its labels are for {_text(size)}")
    both = f"{_text(size)} pixels turned by its EXIF orientation {tag} or not"
    raise ImageError(f"image {name} is {both}, so nobody knows how its labels were drawn; store it upright")


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _load(opened: Image.Image, tag: int, as_stored: bool) -> Image.Image:
    """The image with its pixels, turned or not."""
    opened.load()
    is_turned = opened.format == "TIFF"  # by Pillow
    if tag == 1 or is_turned is not as_stored:
        return opened.copy()
    return opened.transpose(TURNS[tag][as_stored])


def _to_gray(values: np.ndarray) -> Image.Image:
    """Values from 0 to 1 to an 8-bit image."""
    return Image.fromarray(np.rint(255 * values.clip(0, 1)).astype(np.uint8))


def _deep(values: np.ndarray, window: tuple[float, float] | None) -> np.ndarray:
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    kind, top, function = ("float", 1, "LINEAR_EXACT") if values.dtype.kind == "f" else ("32-bit", 65535, "LINEAR")
    if window:
        return _windowed(values, *window, function)
    if values.min() < 0 or values.max() > top:
        raise ValueError(f"{kind} values from {values.min():g} to {values.max():g}; give a --window")
    return values / top


def _windowed(values: np.ndarray, center: float, width: float, function: str = "LINEAR") -> np.ndarray:
    """The window of the DICOM standard, PS3.3 C.11.2.1, from 0 to 1."""
    center, width = window_type((center, width))
    values = values.astype(np.float64)
    if function == "SIGMOID":
        return 0.5 + 0.5 * np.tanh(2 * (values - center) / width)  # 1 / (1 + exp(-4 x)) without its overflow
    if function == "LINEAR_EXACT":
        return ((values - center) / width + 0.5).clip(0, 1)
    if width <= 1:  # one step: LINEAR has width - 1 in the denominator
        return (values > center - 0.5).astype(np.float64)
    return ((values - (center - 0.5)) / (width - 1) + 0.5).clip(0, 1)


def _open_dicom(file: Path, header_only: bool = False) -> Any:
    if importlib.util.find_spec("pydicom") is None:
        raise UserError("DICOM files need pydicom: pip install 'vizoo[medical]'")
    import pydicom

    try:
        data = pydicom.dcmread(file, stop_before_pixels=header_only)
    except pydicom.errors.InvalidDicomError:
        raise ValueError("no DICOM file: its header is missing") from None
    if not header_only and "PixelData" not in data:
        raise ValueError("a DICOM file without pixels")
    frames = _dicom_number(data, "NumberOfFrames")
    if frames is not None and frames > 1:
        raise ValueError(f"{frames:g} frames in one DICOM file; need one image in each file")
    columns, rows = (_dicom_number(data, name) or 0 for name in ("Columns", "Rows"))
    if not 0 < columns * rows <= MOST_PIXELS:
        raise ValueError(f"Columns and Rows {columns:g} and {rows:g}: need 1 to {MOST_PIXELS:,} pixels")
    kind = str(data.get("PhotometricInterpretation"))
    if kind not in ("MONOCHROME1", "MONOCHROME2", "RGB") and not kind.startswith("YBR_"):
        raise ValueError(f"photometric interpretation {kind}; allowed: MONOCHROME1, MONOCHROME2, RGB, YBR_*")
    return data


def _dicom_number(data: Any, name: str) -> float | None:
    """The first number of an element, None if there is none."""
    try:
        values = [v for v in np.atleast_1d(data.get(name)) if v not in (None, "")]
        value = float(values[0]) if values else None
    except (TypeError, ValueError):
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{name} is no finite number")
    return value


def _read_dicom(file: Path, window: tuple[float, float] | None) -> Image.Image:
    data = _open_dicom(file)
    from pydicom.pixels import apply_modality_lut, apply_voi_lut, pixel_array

    try:
        pixels = pixel_array(data)
    except MemoryError:
        raise
    except Exception as e:
        raise ValueError(f"cannot decode its pixels: {e}") from None
    if pixels.ndim == 3:
        top = 2 ** int(data.BitsStored) - 1
        return Image.fromarray(np.rint(pixels * (255 / top)).astype(np.uint8))
    values = apply_modality_lut(pixels, data)
    if not np.isfinite(values).all():
        raise ValueError("it holds values that are not finite")
    center, width = (_dicom_number(data, name) for name in ("WindowCenter", "WindowWidth"))
    if window:
        gray = _windowed(values, *window)
    elif "VOILUTSequence" in data:
        bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
        gray = apply_voi_lut(np.rint(values).astype(np.int32), data) / (2**bits - 1)
    elif center is not None and width is not None:
        gray = _windowed(values, center, width, data.get("VOILUTFunction", "LINEAR"))
    elif center is not None or width is not None:
        given, absent = ("WindowCenter", "WindowWidth")[:: 1 if width is None else -1]
        raise ValueError(f"{given} without {absent}; give a --window")
    else:
        low, high = float(values.min()), float(values.max())
        gray = (values - low) / max(high - low, 1e-12)
    return _to_gray(1 - gray if data.PhotometricInterpretation == "MONOCHROME1" else gray)
