"""Picture files, by libvips: nothing half read, nothing half written, depth and metadata kept."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import ImageError

READABLE = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".tif", ".tiff", ".gif")
#: libvips' loaders of these, and how their files begin. It has others, such as SVG's, that a few bytes can
#: keep busy for minutes before they say what they are.
_LOADERS = ("pngload", "jpegload", "webpload", "heifload", "tiffload", "gifload")
_BEGINNINGS = re.compile(
    rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|RIFF.{4}WEBP|.{4}ftyp|II[*+]\0|MM\0[*+]|GIF8[79]a", re.DOTALL
)
#: pixels that a byte can stand for: each block of 8 x 8 of a JPEG has a Huffman code, of at least a bit, and
#: each code of a GIF stands for at most 4096 pixels, in 12 bits where they are so many
_MOST_PIXELS = {"jpegload": 512, "gifload": 4096}
#: that any file may have: a small frame on a large canvas is a GIF too
_ANY = 2**24
#: chunks of compressed text or colour profile of a PNG, each of which libpng makes up to 8 MB of
_COMPRESSED, _MOST_COMPRESSED = (b"zTXt", b"iTXt", b"iCCP"), 32
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
_TIFF = (".tif", ".tiff")
_SIXTEEN_BITS = (".png", *_TIFF)
#: bytes of pixels from which a TIFF is written in tiles, and able to exceed 4 GiB
_LARGE_TIFF = 2**30
#: what a file is called while it is written
_NEW = ".anysize-"


@dataclass(frozen=True)
class FilePicture:
    """A picture read whole: HWC uint8 or uint16, upright, and libvips' header with its metadata."""

    array: Array
    header: Any


def pictures_in(path: str | os.PathLike[str]) -> list[Path]:
    """The pictures directly in a folder, by suffix; else the path itself. Raises `ImageError`."""
    path = Path(path)
    try:
        if not path.is_dir():
            return [path]
        files = list(path.iterdir())
    except OSError as error:  # such as a name that is too long
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    found = sorted(f for f in files if f.suffix.lower() in READABLE and not f.name.startswith("."))
    if not found:
        raise ImageError(f"{path}: no pictures in this folder ({', '.join(READABLE)})")
    return found


def read_picture(path: Path, pixel_limit: int = PIXEL_LIMIT) -> FilePicture:
    """Read a picture: EXIF orientation applied, palettes expanded, 16 bits kept.

    Raises `ImageError` for anything that is not one whole picture: missing, empty, truncated, no picture,
    animated or multi-page, over `pixel_limit` pixels (checked before they are decoded).
    """
    image = open_picture_file(path, pixel_limit)
    with readable(path):
        # turning needs random access, so the pixels are decoded first
        image = image.copy_memory().autorot()
        array = image.numpy()
    array = np.ascontiguousarray(array.reshape(image.height, image.width, image.bands))
    return FilePicture(array, image)


def open_picture_file(path: Path, pixel_limit: int = PIXEL_LIMIT) -> Any:
    """A libvips image of the file, as RGB or grey of 8 or 16 bits, to be decoded once and from the top down.

    Not turned upright. Raises `ImageError` as `read_picture` does, except for damage further down.
    """
    import pyvips

    head = _head(path)
    chunks = _png_chunks(path) if head.startswith(b"\x89PNG") else Counter[bytes]()
    if sum(chunks[kind] for kind in _COMPRESSED) > _MOST_COMPRESSED:
        raise ImageError(f"{path}: not a readable picture: more than {_MOST_COMPRESSED} compressed texts")
    if not _BEGINNINGS.match(head):
        raise ImageError(f"{path}: not a readable picture; {', '.join(READABLE)} are read")
    # libjpeg only warns about damaged data, and fills in; the other readers' warnings are harmless.
    strict = "warning" if head.startswith(b"\xff\xd8") else "error"
    with _vips(f"{path}: not a readable picture"):
        # By descriptor: libvips takes options from file names ("a.png[page=1]") and remembers them.
        with path.open("rb") as file:
            source = pyvips.Source.new_from_descriptor(file.fileno())
        image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on=strict)
    if (loader := image.get("vips-loader").removesuffix("_source")) not in _LOADERS:
        form = loader.removesuffix("load")
        raise ImageError(f"{path}: not a readable picture: '{form}'; {', '.join(READABLE)} are read")
    if image.width * image.height > pixel_limit:
        raise ImageError(
            f"{path}: {image.width} x {image.height} pixels, more than the limit of {pixel_limit}"
        )
    # memory for all pixels of a header may be taken, or even given, before its data is looked at
    if image.width * image.height > max(_ANY, _MOST_PIXELS.get(loader, math.inf) * path.stat().st_size):
        raise ImageError(
            f"{path}: damaged picture: too few bytes for {image.width} x {image.height} pixels of "
            f"{loader.removesuffix('load').upper()}"
        )
    pages = image.get("n-pages") if image.get_typeof("n-pages") else 1
    animated = b"acTL" in chunks
    if pages > 1 or animated:
        count = "several" if animated else pages
        raise ImageError(f"{path}: has {count} pages or frames; only single pictures are supported")
    with readable(path):
        return _as_rgb_or_grey(image, path)


def readable(path: Path) -> AbstractContextManager[None]:
    """Errors of libvips while pixels are decoded are those of the picture."""
    return _vips(f"{path}: damaged picture")


@contextmanager
def _vips(problem: str) -> Iterator[None]:
    """What libvips says is wrong is an `ImageError`."""
    import pyvips

    try:
        yield
    except pyvips.Error as error:
        raise ImageError(f"{problem}: {_first_line(str(error.detail or error))}") from error
    except UnicodeDecodeError as error:  # it quotes the file, whose bytes pyvips takes for text
        pyvips.vips_lib.vips_error_clear()  # or they are in the next message too
        raise ImageError(f"{problem}: {_first_line(error.object.decode(errors='replace'))}") from error


def check_is_no_pipe(path: Path) -> None:
    """Raise `ImageError` for what is there and is no file: a pipe would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ImageError(f"{path}: not a file")


def _head(path: Path) -> bytes:
    check_is_no_pipe(path)
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except FileNotFoundError:
        raise ImageError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ImageError(f"{path}: not a file") from None
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null byte
        raise ImageError(f"{str(path)!r}: no name of a file") from error
    if not head:
        raise ImageError(f"{path}: the file is empty")
    return head


def _png_chunks(path: Path) -> Counter[bytes]:
    """How many of each kind a PNG has."""
    found = Counter[bytes]()
    with path.open("rb") as file:
        file.seek(8)
        while len(chunk := file.read(8)) == 8 and not found[b"IEND"]:
            found[chunk[4:]] += 1
            file.seek(int.from_bytes(chunk[:4], "big") + 4, os.SEEK_CUR)
    return found


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
    with replacing(path) as temporary:
        save(temporary, array, header, path)


def save(temporary: Path, image: Any, header: Any | None, path: Path) -> None:
    """The same to a file that will become `path`; `image` may be libvips', and still come in from the top."""
    import pyvips

    if isinstance(image, np.ndarray):
        image = pyvips.Image.new_from_array(np.ascontiguousarray(image))

    wide = image.format == "ushort"
    grey = image.bands <= 2
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
                with suppress(UnicodeDecodeError):  # text that is none; it stays in the blob it is from
                    image.set_type(header.get_typeof(name), name, header.get(name))
        # the pixels are upright, but the EXIF block still says how they were
        image.set_type(pyvips.GValue.gint_type, "orientation", 1)
    options = WRITABLE[suffix]
    if suffix in _TIFF and image.width * image.height * image.bands * (1 + wide) >= _LARGE_TIFF:
        options = {**options, "bigtiff": True, "tile": True, "tile_width": 256, "tile_height": 256}
    with _vips(f"{path}: cannot be written"):
        image.write_to_file(str(temporary), **options)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write to; moved onto it at the end, removed if anything goes wrong.

    It is locked meanwhile, so that others can tell it from what a process left behind that was killed.
    """
    temporary = path.with_name(f"{_NEW}{os.urandom(8).hex()}{path.suffix}")
    with ExitStack() as stack:
        stack.callback(temporary.unlink, missing_ok=True)
        try:
            held = stack.enter_context(temporary.open("xb"))
        except OSError as error:
            raise ImageError(f"{path}: cannot be written: {error.strerror}") from error
        with suppress(OSError):  # not every file system has locks
            _lock(held)
        yield temporary
        if os.name == "nt":  # which moves no open file
            held.close()
        try:
            os.replace(temporary, path)
        except OSError as error:
            raise ImageError(f"{path}: cannot be written: {error.strerror}") from error


def remove_left_behind(folder: Path) -> None:
    """Remove what processes that were killed had begun to write in a folder. Others' files stay."""
    with suppress(OSError):
        for path in folder.glob(f"{_NEW}*"):
            ours = re.fullmatch(rf"{re.escape(_NEW)}[0-9a-f]{{16}}\.\w+", path.name)
            with suppress(OSError):  # it is being written, or gone
                if ours and path.is_file() and not path.is_symlink():
                    with path.open("ab") as file:
                        _lock(file)
                    path.unlink()


def _lock(file: Any) -> None:
    """Until it is closed. Raises `OSError` where another has locked it."""
    try:
        import fcntl
    except ImportError:  # Windows, which removes no open file
        return
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _first_line(text: str) -> str:
    """libvips piles up lines of several attempts, of which the first says it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "no reason given"
