"""Pictures in memory: what a caller holds -> float planes -> the same kind of thing again.

Planes are (C, H, W) float32 in 0..1. Depth comes from the dtype, never from the content.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import ImageError

_FULL = {"uint8": 255.0, "uint16": 65535.0}


@dataclass(frozen=True)
class Picture:
    """A checked HWC array (1 to 4 channels) and how to give a result back as what came in."""

    array: Array
    restore: Callable[[Array], Any]

    @property
    def has_alpha(self) -> bool:
        return self.array.shape[2] in (2, 4)


def open_picture(image: Any) -> Picture:
    """Take an HW or HWC array (uint8, uint16, or float in 0..1) or a PIL image. Raises `ImageError`."""
    if type(image).__module__.partition(".")[0] == "PIL":
        return _from_pil(image)
    if not isinstance(image, np.ndarray):
        raise ImageError(f"an image is a numpy array or a PIL image, not {type(image).__name__}")
    array = np.asarray(image)  # subclasses have ideas of their own about axes
    array = array[:, :, None] if array.ndim == 2 else array
    check_array(array)
    return Picture(array, (lambda out: out[:, :, 0]) if image.ndim == 2 else (lambda out: out))


def check_array(array: Array) -> None:
    """Raise `ImageError` unless this is an HWC picture we can hold."""
    if array.ndim != 3 or not 1 <= array.shape[2] <= 4:
        raise ImageError(f"an image is HW or HWC with 1 to 4 channels, not of shape {array.shape}")
    if 0 in array.shape:
        raise ImageError(f"the image is empty: {array.shape[1]} x {array.shape[0]} pixels")
    if array.dtype.name not in _FULL and array.dtype.kind != "f":
        raise ImageError(f"an image is uint8, uint16 or float in 0..1, not {array.dtype}")
    if array.dtype.kind == "f":
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= 1):  # also catches NaN
            raise ImageError(f"a float image must lie in 0..1; this one reaches from {low:g} to {high:g}")


def _from_pil(image: Any) -> Picture:
    try:
        image.load()
    except (OSError, ValueError) as error:  # truncated, or closed
        raise ImageError(f"the PIL image cannot be read: {error}") from error
    keyed = "transparency" in image.info
    modes = {
        "1": "L",
        "L": "LA" if keyed else "L",
        "P": "RGBA" if keyed else "RGB",
        "PA": "RGBA",
        "La": "LA",
        "RGBa": "RGBA",
        "RGBX": "RGB",
        "RGB": "RGBA" if keyed else "RGB",
        "CMYK": "RGB",
        "YCbCr": "RGB",
        "HSV": "RGB",
        "LAB": "RGB",
    }
    if image.mode not in (*modes, "LA", "RGBA", "F", "I;16", "I;16L", "I;16B", "I;16N"):
        raise ImageError(f"PIL mode {image.mode} says no depth; convert it to L, RGB, I;16 or F first")
    if keyed and image.mode.startswith("I;16"):
        raise ImageError("16-bit PIL images cannot hold keyed transparency; give an array with alpha")
    target = modes.get(image.mode, image.mode)
    if image.mode == "L" and keyed:  # PIL has no direct way
        converted = image.convert("RGBA").convert("LA")
    else:
        converted = image if target == image.mode else image.convert(target)
    array = np.asarray(converted)
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = array.astype(np.uint16)  # native byte order
    array = array[:, :, None] if array.ndim == 2 else array
    check_array(array)
    from PIL import Image

    carried = {k: image.info[k] for k in ("icc_profile", "exif", "dpi") if k in image.info}
    if image.mode in ("CMYK", "YCbCr", "HSV", "LAB"):
        carried.pop("icc_profile", None)  # it describes the colours that were converted

    def restore(out: Array) -> Any:
        result = Image.fromarray(out[:, :, 0] if out.shape[2] == 1 else out)
        result.info.update(carried)
        return result

    return Picture(array, restore)


def to_float(array: Array) -> Array:
    """Any picture array -> float32 in 0..1."""
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    return array.astype(np.float32) / np.float32(_FULL[array.dtype.name])


def quantise(values: Array, dtype: np.dtype[Any]) -> Array:
    """Float values -> 0..1 clipped -> `dtype`, rounded to the nearest step."""
    if dtype.kind == "f":
        return np.clip(values, 0, 1).astype(dtype, copy=False)
    full = np.float32(_FULL[dtype.name])
    levels = values * full
    np.rint(levels, out=levels)
    return np.clip(levels, 0, full, out=levels).astype(dtype)


def split(array: Array) -> tuple[Array, Array | None]:
    """HWC of any dtype -> colour planes (1 or 3, H, W) and alpha (1, H, W) or None, float32 in 0..1."""
    planes = np.ascontiguousarray(to_float(array).transpose(2, 0, 1))
    return (planes, None) if array.shape[2] in (1, 3) else (planes[:-1], planes[-1:])


def fill_hidden(array: Array) -> Array:
    """Colour under zero alpha replaced by that of the nearest visible pixel, so that it cannot bleed."""
    if array.shape[2] in (1, 3):
        return array
    hidden = array[:, :, -1:] == 0
    if not hidden.any() or hidden.all():
        return array
    import pyvips

    # where the nearest pixel is, not its colour: values stay as they came, at any depth
    height, width = hidden.shape[:2]
    places = np.arange(1, height * width + 1, dtype=np.float64).reshape(hidden.shape)
    marked = pyvips.Image.new_from_array(np.where(hidden, 0.0, places))
    nearest = marked.fill_nearest().numpy().reshape(height, width).astype(np.intp) - 1
    # only where it was asked: libvips moves the other pixels by one
    result: Array = np.where(hidden, array.reshape(height * width, -1)[nearest], array)
    result[:, :, -1:] = array[:, :, -1:]
    return result


def constant_runs(alpha: Array, value: float) -> Array:
    """(H, W) bool: pixels of (1, H, W) alpha that equal `value` with their 8 neighbours."""
    same = np.pad(alpha[0] == value, 1, mode="edge")
    height, width = alpha.shape[1:]
    result = np.ones((height, width), bool)
    for dy in range(3):
        for dx in range(3):
            result &= same[dy : dy + height, dx : dx + width]
    return result


def resize(array: Array, height: int, width: int) -> Array:
    """Float HWC -> (height, width, C), by libvips: Lanczos-3 where a side shrinks, bicubic where it grows.

    The picture's ends stay where they are. Values may overshoot those there were.
    """
    import pyvips

    image = pyvips.Image.new_from_array(np.ascontiguousarray(array, np.float32))
    down, across = height / image.height, width / image.width
    image = image.resize(min(1.0, across), vscale=min(1.0, down), kernel="lanczos3")
    if down > 1 or across > 1:
        image = image.affine(
            [max(1.0, across), 0, 0, max(1.0, down)],
            interpolate=pyvips.Interpolate.new("bicubic"),
            oarea=[0, 0, width, height],
            extend="copy",
            # the middles of pixels are what is mapped; its own resize is half a pixel off
            **{"idx": 0.5, "idy": 0.5, "odx": -0.5, "ody": -0.5},
        )
    result: Array = image.numpy().reshape(image.height, image.width, -1)
    if result.shape[:2] != (height, width):
        raise ImageError(f"resizing gave {result.shape[:2]}, not {(height, width)}")
    return result
