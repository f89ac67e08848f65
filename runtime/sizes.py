"""Size policies: from the size a picture has to one that a model takes, and back.

A policy is a rule; its plan for one size is applied to the picture and to everything tied to it (masks,
glyphs, position maps, latents). Sizes are (height, width) in pixels, and computed in whole numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import OptionError, ShapeError
from anysize.pixels import quantise, resize, to_float
from anysize.session import whole_number

Size = tuple[int, int]
Rounding = Literal["floor", "nearest", "ceil"]
Mode = Literal["resize", "pad", "crop", "bin"]

_MODES = ("resize", "pad", "crop", "bin")
#: side, multiple -> a multiple; of two that are equally near the larger
_ROUND: dict[str, Callable[[int, int], int]] = {
    "floor": lambda side, multiple: side // multiple * multiple,
    "nearest": lambda side, multiple: (2 * side + multiple) // (2 * multiple) * multiple,
    "ceil": lambda side, multiple: -(-side // multiple) * multiple,
}


@dataclass(frozen=True)
class SizePolicy:
    """A rule for sizes. `plan` says what it makes of one.

    In this order: `square` makes the sides equal, to the longer one (in mode "crop" to the shorter).
    `max_side`: if the longest side exceeds this, it becomes exactly this and the other one is scaled alike,
    rounded to the nearest pixel; with `upscale` also if it is shorter. `min_side`: a shorter side becomes
    this, each by itself. `multiple`: both sides become multiples, by `rounding`. In mode "bin" none of these:
    the size is the one of `bins` whose height / width is nearest to the picture's.

    `mode` says how a picture comes to that size. "resize": stretched. "pad": rows below and columns at the
    right are added that mirror the picture (after it was scaled, where `max_side` asks for that). "crop" and
    "bin": its middle is cut out, as large as the size's aspect allows, and scaled where that is needed.
    `restore`: whether `SizePlan.invert` brings results back to the picture's own size.

    Raises `OptionError` for settings that cannot be meant together.
    """

    multiple: int = 1
    rounding: Rounding = "floor"
    mode: Mode = "resize"
    min_side: int | None = None
    max_side: int | None = None
    upscale: bool = False
    square: bool = False
    bins: tuple[Size, ...] = ()
    restore: bool = True

    def __post_init__(self) -> None:
        for name, known in (("rounding", tuple(_ROUND)), ("mode", _MODES)):
            if getattr(self, name) not in known:
                raise OptionError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name in ("upscale", "square", "restore"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, not {getattr(self, name)!r}")
        whole_number("multiple", self.multiple)
        for name in ("min_side", "max_side"):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name))
        object.__setattr__(self, "bins", tuple(_size("a size of bins", size) for size in self.bins))
        if bool(self.bins) != (self.mode == "bin"):
            raise OptionError("bins and mode 'bin' go together")
        others = ("multiple", "min_side", "max_side", "square")
        more = [f.name for f in fields(self) if f.name in others and getattr(self, f.name) != f.default]
        if self.bins and more:
            raise OptionError(f"mode 'bin' takes sizes as they are: leave {' and '.join(more)} out")
        if self.mode == "pad" and self.multiple > 1 and self.rounding != "ceil":
            raise OptionError(f"padding can only add: use rounding 'ceil' with it, not '{self.rounding}'")
        if self.upscale and self.max_side is None:
            raise OptionError("upscale needs max_side, the side to reach")

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"SizePolicy({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @staticmethod
    def preset(name: str) -> SizePolicy:
        """A policy by name, out of `PRESETS`. Raises `OptionError`."""
        if name not in PRESETS:
            raise OptionError(f"no size policy is called {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    def plan(self, size: Size) -> SizePlan:
        """For a picture of (height, width). Raises `ShapeError` where that would leave a side of 0."""
        size = _size("the picture's size", size)
        box = content = size
        if self.bins:
            height, width = size
            aspect = Fraction(height, width)
            target = min(self.bins, key=lambda bin_: abs(Fraction(*bin_) - aspect))
        else:
            frame = size
            if self.square:
                frame = (min(size),) * 2 if self.mode == "crop" else (max(size),) * 2
            fitted = self._fit(frame)
            sides = [_ROUND[self.rounding](max(n, self.min_side or 0), self.multiple) for n in fitted]
            target = sides[0], sides[1]
            if self.mode == "pad":
                content = _scaled(size, fitted[0], frame[0])
        if 0 in (*target, *content):
            got, made = (f"{width} x {height}" for height, width in (size, target))
            raise ShapeError("image", None, got, f"{self} would make it {made}")
        if self.mode in ("crop", "bin"):
            # no scaling where there is room for the size itself, which is all that rounding down asks for
            unscaled = not self.bins and fitted == frame and all(map(int.__le__, target, size))
            box = target if unscaled else _within(size, target)
        if self.mode != "pad":
            content = target
        return SizePlan(self, size, box, content, target)

    def _fit(self, size: Size) -> Size:
        longest, most = max(size), self.max_side
        if most is not None and (longest > most or self.upscale):
            return _scaled(size, most, longest)
        return size


@dataclass(frozen=True)
class SizePlan:
    """What a policy makes of one size; made by `SizePolicy.plan`.

    Of a picture of `size` its middle `box` is taken (all of it, except in modes "crop" and "bin"), scaled to
    `content`, and padded to `target` (the same, except in mode "pad"). All are (height, width).
    """

    policy: SizePolicy
    size: Size
    box: Size
    content: Size
    target: Size

    @property
    def scale_y(self) -> float:
        """Pixels of the target per pixel of the picture, vertically."""
        return self.content[0] / self.box[0]

    @property
    def scale_x(self) -> float:
        """The same horizontally."""
        return self.content[1] / self.box[1]

    @property
    def aspect_error(self) -> float:
        """`scale_x / scale_y - 1`: 0.01 where things come out 1 % wider than they are."""
        return self.scale_x / self.scale_y - 1

    def __str__(self) -> str:
        (h, w), (th, tw) = self.size, self.target
        return (
            f"{w} x {h} -> {tw} x {th}, {self.policy.mode}, scale {self.scale_x:.4g} x {self.scale_y:.4g}, "
            f"aspect error {self.aspect_error:+.2%}"
        )

    def shape(self, at: Fraction | float = 1) -> Size:
        """The target of what is tied to the picture with `at` times its pixels a side.

        Raises `ShapeError` if that is not whole, `OptionError` for what is no factor.
        """
        try:
            factor = Fraction(at)
        except (TypeError, ValueError, OverflowError):
            factor = Fraction(0)
        if factor <= 0:
            raise OptionError(f"at must be a positive number, not {at!r}")
        sides = [factor * side for side in self.target]
        if any(side.denominator != 1 for side in sides):
            rule = f"{self.target[1]} x {self.target[0]} times it must be whole"
            raise ShapeError("at", None, str(at), rule)
        return int(sides[0]), int(sides[1])

    def apply(self, image: Array, at: Fraction | float = 1) -> Array:
        """Bring an HW or HWC array, any number of channels, to `shape(at)`.

        uint8, uint16 or float; the dtype stays. `at`: its pixels a side for one of the picture's, such as 2
        for glyphs drawn at twice the size or 1/8 for latents; its sides are the picture's times this, rounded
        up or down. Scaled in float32 by Lanczos-3, antialiased, and kept within the values it had; what has
        its final size already is returned itself.
        Raises `ShapeError` for another size, `OptionError` for another dtype.
        """
        if image.dtype.name not in ("uint8", "uint16") and image.dtype.kind != "f":
            raise OptionError(f"images are uint8, uint16 or float, not {image.dtype}; masks: apply_mask")
        return self._apply(image, at, _smooth)

    def apply_mask(self, mask: Array, at: Fraction | float = 1) -> Array:
        """The same by nearest pixels: any dtype, and no value that was not there."""
        return self._apply(mask, at, _nearest)

    def _apply(self, image: Array, at: Fraction | float, scaled: Callable[[Array, Size], Array]) -> Array:
        target, have = self.shape(at), image.shape[:2]
        if image.ndim not in (2, 3) or any(
            abs(n - side * Fraction(at)) >= 1 for n, side in zip(have, self.size, strict=True)
        ):
            want = " x ".join(str(float(side * Fraction(at))) for side in self.size)
            raise ShapeError("image", None, image.shape, f"the plan is for (height, width) = {want}")
        if self.policy.mode == "pad":
            content = have if self.content == self.size else _times(self.content, at, target)
            return _pad(scaled(image, content), target)
        if self.box != self.size:
            image = _middle(image, _times(self.box, at, have))
        return scaled(image, target)

    def invert(self, output: Array) -> Array:
        """A result for the target -> for the picture: (height, width) times k for one of k times the target.

        HW or HWC, of any k = n/m. What was padded is cut off, what was stretched is stretched back; where the
        middle was cut out, the result is scaled to cover the picture, its aspect kept, and its middle taken.
        Returned as it is if the policy does not restore. Raises `ShapeError`.
        """
        times = Fraction(output.shape[0], self.target[0]) if output.ndim in (2, 3) else Fraction(0)
        if not times or output.shape[:2] != tuple(side * times for side in self.target):
            raise ShapeError("output", None, output.shape, f"must be {self.target} times a number")
        if not self.policy.restore:
            return output
        height, width = (max(1, round(side * times)) for side in self.size)
        if self.policy.mode == "pad":
            output = output[tuple(slice(n) for n in _times(self.content, times, output.shape[:2]))]
        elif self.box != self.size:
            output = _middle(output, _within(output.shape[:2], (height, width)))
        return _smooth(output, (height, width))


def fit_longest(side: int, upscale: bool = False) -> SizePolicy:
    """The longest side becomes exactly `side`, the aspect kept; smaller pictures stay, unless `upscale`."""
    return SizePolicy(max_side=side, upscale=upscale)


def _size(name: str, size: Size) -> Size:
    try:
        height, width = size
    except (TypeError, ValueError):
        raise OptionError(f"{name} is (height, width), not {size!r}") from None
    sides = [side.item() if isinstance(side, np.integer) else side for side in (height, width)]
    if not all(type(side) is int and side >= 0 for side in sides):
        raise OptionError(f"{name} is (height, width), whole numbers of pixels, not {size!r}")
    if 0 in sides:
        raise ShapeError("image", sides.index(0), 0, f"{name} must have pixels")
    return sides[0], sides[1]


def _scaled(size: Size, mul: int, div: int) -> Size:
    """Sides times mul / div, to the nearest whole number."""
    height, width = ((2 * side * mul + div) // (2 * div) for side in size)
    return height, width


def _times(size: Size, at: Fraction | float, most: Size) -> Size:
    """Sides times `at`, to the nearest whole number from 1 to `most`."""
    height, width = (min(max(1, round(Fraction(at) * n)), m) for n, m in zip(size, most, strict=True))
    return height, width


def _within(size: Size, aspect: Size) -> Size:
    """The largest size of this aspect, to the nearest pixel, that fits into `size`."""
    if size[0] * aspect[1] > size[1] * aspect[0]:  # taller
        return max(1, _scaled(aspect, size[1], aspect[1])[0]), size[1]
    return size[0], max(1, _scaled(aspect, size[0], aspect[0])[1])


def _smooth(image: Array, size: Size) -> Array:
    if image.shape[:2] == size:
        return image
    low, high = image.min(), image.max()
    planes = image if image.ndim == 3 else image[:, :, None]
    values = resize(to_float(planes), *size).reshape(*size, *image.shape[2:])
    made = values.astype(image.dtype) if image.dtype.kind == "f" else quantise(values, image.dtype)
    return np.clip(made, low, high, out=made)


def _nearest(image: Array, size: Size) -> Array:
    if image.shape[:2] == size:
        return image
    # the pixel under the middle of each new one
    rows, columns = (
        (2 * np.arange(n) + 1) * have // (2 * n) for n, have in zip(size, image.shape[:2], strict=True)
    )
    result: Array = image[rows[:, None], columns]
    return result


def _pad(image: Array, size: Size) -> Array:
    if image.shape[:2] == size:
        return image
    beyond = [(0, n - have) for n, have in zip(size, image.shape[:2], strict=True)]
    return np.pad(image, [*beyond, *[(0, 0)] * (image.ndim - 2)], "symmetric")


def _middle(image: Array, size: Size) -> Array:
    top, left = ((have - n) // 2 for n, have in zip(size, image.shape[:2], strict=True))
    return image[top : top + size[0], left : left + size[1]]


def _named(text: str) -> Size:
    height, width = map(int, text.split("x"))
    return height, width


#: height x width, of about 1024 x 1024 pixels: the sizes of PixArt (Chen et al., arXiv:2310.00426) and Sana
_SANA_1024 = """
512x2048 512x1856 576x1792 576x1728 576x1664 640x1600 640x1536 704x1472 704x1408 704x1344 768x1344
768x1280 832x1216 832x1152 896x1152 896x1088 960x1088 960x1024 1024x1024 1024x960 1088x960 1088x896
1152x896 1152x832 1216x832 1280x768 1344x768 1408x704 1472x704 1536x640 1600x640 1728x576 2048x512
"""

#: policies by name, as the programs of these names have them
PRESETS = {
    # resize_image(max_length=768), then sides less their remainder by 64
    "anytext": SizePolicy(64, max_side=768),
    # to_32s: below 256 it is 256, else less its remainder by 32
    "animegan": SizePolicy(32, min_side=256),
    # face2paint: the centre square, as 512 x 512, which is also what comes out
    "animegan-face": SizePolicy(mode="crop", square=True, max_side=512, upscale=True, restore=False),
    "sdxl": SizePolicy(8),
    "sana": SizePolicy(mode="bin", bins=tuple(_named(size) for size in _SANA_1024.split())),
    "pad-square": SizePolicy(mode="pad", square=True),
    "cap-2048": SizePolicy(max_side=2048),
}
