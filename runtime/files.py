"""Picture files, by libvips: nothing half read, nothing half written, depth and metadata kept."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import ImageError

READABLE = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".gif")
#: suffix -> options of libvips' saver; JPEG at 4:4:4 because chroma was computed at full size
WRITABLE: dict[str, dict[str, Any]] = {
    ".png": {},
    ".jpg": {"Q": 95, "subsample_mode": "off"},
    ".jpeg": {"Q": 95, "subsample_mode": "off"},
    ".webp": {"Q": 95},
    ".avif": {"Q": 90},
    ".tif": {"compression": "deflate", "predictor": "horizontal"},
    ".tiff": {"compression": "deflate", "predictor": "horizontal"},
}
PIXEL_LIMIT = 500_000_000
_NO_ALPHA = (".jpg", ".jpeg")
_SIXTEEN_BITS = (".png", ".tif", ".tiff")


@dataclass(frozen=True)
class FilePicture:
    """A picture read whole: HWC uint8 or uint16, upright, and libvips' header with its metadata."""

    array: Array
    header: Any


def read_picture(path: Path, pixel_limit: int = PIXEL_LIMIT) -> FilePicture:
    """Read a picture: EXIF orientation applied, palettes expanded, 16 bits kept.

    Raises `ImageError` for anything that is not one whole picture: missing, empty, truncated, no picture,
    animated or multi-page, over `pixel_limit` pixels (checked before they are decoded).
    """
    import pyvips

    # From memory: libvips takes options from file names ("a.png[page=1]") and remembers pictures by name.
    data = _bytes(path)
    # libjpeg only warns about damaged data, and fills in; the other readers' warnings are harmless.
    strict = "warning" if data.startswith(b"\xff\xd8") else "error"
    try:
        image = pyvips.Image.new_from_buffer(data, "", access="sequential", fail_on=strict, revalidate=True)
    except pyvips.Error as error:
        raise ImageError(f"{path}: not a readable picture: {_reason(error)}") from error
    if image.width * image.height > pixel_limit:
        raise ImageError(
            f"{path}: {image.width} x {image.height} pixels, more than the limit of {pixel_limit}"
        )
    pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
    animated = data.startswith(b"\x89PNG") and b"acTL" in data[: max(0, data.find(b"IDAT"))]
    if pages > 1 or animated:
        count = "several" if animated else pages
        raise ImageError(f"{path}: has {count} pages or frames; only single pictures are supported")
    try:
        # turning needs random access, so the pixels are decoded first
        image = _as_rgb_or_grey(image, path).copy_memory().autorot()
        array = image.numpy()
    except pyvips.Error as error:
        raise ImageError(f"{path}: damaged picture: {_reason(error)}") from error
    array = np.ascontiguousarray(array.reshape(image.height, image.width, image.bands))
    return FilePicture(array, image)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: not a file") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise ImageError(f"{path}: the file is empty")
    return data


def _as_rgb_or_grey(image: Any, path: Path) -> Any:
    if image.format not in ("uchar", "ushort"):
        raise ImageError(f"{path}: pixels of type {image.format}; 8 and 16 bits per channel are supported")
    wide = image.format == "ushort"
    if image.interpretation in ("cmyk", "lab", "labs", "xyz", "hsv", "scrgb"):
        image = image.colourspace("rgb16" if wide else "srgb")
        image.remove("icc-profile-data") if image.get_typeof("icc-profile-data") else None
    if image.bands > 4:
        raise ImageError(f"{path}: has {image.bands} channels; 1 to 4 are supported")
    return image


def check_destination(path: Path, source: Path, *, has_alpha: bool | None = None) -> None:
    """Raise `ImageError` if `path` cannot become the result of `source`; call before working."""
    suffix = path.suffix.lower()
    if suffix not in WRITABLE:
        raise ImageError(f"{path}: cannot write '{suffix}' files; use {', '.join(WRITABLE)}")
    try:
        is_folder = path.is_dir()
    except OSError as error:  # a name too long, a loop of links
        raise ImageError(f"{path}: {error.strerror}") from error
    if is_folder:
        raise ImageError(f"{path}: is a folder, not a file name")
    if not path.parent.is_dir():
        raise ImageError(f"{path}: the folder {path.parent} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise ImageError(f"{path}: the folder {path.parent} is not writable")
    if path.exists() and source.exists() and path.samefile(source):
        raise ImageError(f"{path}: would overwrite the input")
    if has_alpha and suffix in _NO_ALPHA:
        raise ImageError(f"{path}: the picture has transparency, which JPEG cannot hold; use .png or .webp")


def write_picture(path: Path, array: Array, header: Any | None = None) -> None:
    """Write HWC uint8 or uint16 to `path`, atomically: either the whole file is there or the old state.

    `header`: libvips image whose ICC profile, EXIF, XMP and resolution are carried over. 16 bits become 8
    where the format holds no more. Raises `ImageError`.
    """
    import pyvips

    image = pyvips.Image.new_from_array(np.ascontiguousarray(array))
    wide = array.dtype == np.uint16
    grey = array.shape[2] <= 2
    image = image.copy(
        interpretation=("grey16" if wide else "b-w") if grey else ("rgb16" if wide else "srgb")
    )
    suffix = path.suffix.lower()
    if wide and suffix not in _SIXTEEN_BITS:
        image = image.colourspace("b-w" if grey else "srgb")
    if header is not None:
        image = image.copy(xres=header.xres, yres=header.yres)
        for name in header.get_fields():
            if (
                name.startswith(("icc-", "exif-", "xmp-", "iptc-", "png-comment"))
                or name == "resolution-unit"
            ):
                image.set_type(header.get_typeof(name), name, header.get(name))
        # the pixels are upright, but the EXIF block still says how they were
        image.set_type(pyvips.GValue.gint_type, "orientation", 1)
    with replacing(path) as temporary:
        try:
            image.write_to_file(str(temporary), **WRITABLE[suffix])
        except pyvips.Error as error:
            raise ImageError(f"{path}: cannot be written: {_reason(error)}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; moved onto it at the end, removed if anything goes wrong."""
    temporary = path.with_name(f".anysize-{os.urandom(8).hex()}{path.suffix}")
    try:
        yield temporary
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise ImageError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """libvips piles up lines of several attempts; the first that is not our own call says it."""
    lines = [line.strip() for line in str(getattr(error, "detail", "") or error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
