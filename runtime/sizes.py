"""Size policies: from the size a picture has to one that a model takes, and back.

A policy is a rule; its plan for one size is applied to the picture and to everything tied to it (masks,
glyphs, position maps, latents). Sizes are (height, width) in pixels, and computed in whole numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Literal

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import ImageError, OptionError, ShapeError
from anysize.pixels import quantise, resize, to_float
from anysize.session import whole_number

Size = tuple[int, int]
Rounding = Literal["floor", "nearest", "ceil"]
Mode = Literal["resize", "pad", "crop", "bin"]
Scaler = Callable[[Array, Size], Array]

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
    the size is the one of `bins` whose height / width is nearest to the picture's. Halves are rounded up.

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
        try:
            bins = tuple(_size("a size of bins", size) for size in self.bins)
        except TypeError as error:
            raise OptionError(f"bins are sizes, (height, width) each, not {self.bins!r}") from error
        if any(0 in size for size in bins):
            raise OptionError(f"a size of bins has no pixels: {self.bins!r}")
        object.__setattr__(self, "bins", bins)
        if bool(self.bins) != (self.mode == "bin"):
            raise OptionError("bins and mode 'bin' go together")
        others = ("multiple", "rounding", "min_side", "max_side", "square")
        more = [f.name for f in fields(self) if f.name in others and getattr(self, f.name) != f.default]
        if self.bins and more:
            raise OptionError(f"mode 'bin' takes sizes as they are: leave {' and '.join(more)} out")
        if self.mode == "pad" and self.multiple > 1 and self.rounding != "ceil":
            raise OptionError(f"padding can only add: use rounding 'ceil' with it, not '{self.rounding}'")
        if self.upscale and self.max_side is None:
            raise OptionError("upscale needs max_side, the side to reach")
        if (self.min_side or 0) > (self.max_side or math.inf):
            raise OptionError(f"min_side {self.min_side} is more than max_side {self.max_side}")

    def __str__(self) -> str:
        changed = [f for f in fields(self) if getattr(self, f.name) != f.default]
        return f"SizePolicy({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in changed)})"

    @staticmethod
    def preset(name: str) -> SizePolicy:
        """A policy by name, out of `PRESETS`. Raises `OptionError`."""
        if not isinstance(name, str) or name not in PRESETS:
            raise OptionError(f"no size policy is called {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    def plan(self, size: Size) -> SizePlan:
        """For a picture of (height, width). Raises `ShapeError` where that would leave a side of 0."""
        size = _size("the picture's size", size)
        if 0 in size:
            raise ShapeError("image", None, f"{size[1]} x {size[0]}", "must have at least one pixel a side")
        box = content = size
        roomy = False  # for the size itself, unscaled, which is all that rounding down asks for
        if self.bins:
            aspect = Fraction(size[0], max(1, size[1]))
            target = min(self.bins, key=lambda bin_: abs(Fraction(*bin_) - aspect))
        else:
            frame = size
            if self.square:
                frame = (min(size),) * 2 if self.mode == "crop" else (max(size),) * 2
            scale, most = Fraction(1), self.max_side
            if most is not None and (max(frame) > most or self.upscale):
                scale = Fraction(most, max(1, *frame))
            sides = [max(side, self.min_side or 0) for side in _scaled(frame, scale)]
            height, width = (_ROUND[self.rounding](side, self.multiple) for side in sides)
            target = height, width
            content = _scaled(size, scale)
            roomy = scale == 1 and height <= size[0] and width <= size[1]
        if 0 in (*size, *target, *content):
            got, made = (f"{width} x {height}" for height, width in (size, target))
            raise ShapeError("image", None, got, f"{self} would make it {made}")
        if self.mode in ("crop", "bin"):
            box = target if roomy else _within(size, target)
        return SizePlan(self, size, box, content if self.mode == "pad" else target, target)


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
            factor = Fraction(at.item() if isinstance(at, np.generic) else at)
        except (TypeError, ValueError, ArithmeticError):
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
        up or down. Scaled in float32, by Lanczos-3 where it shrinks and bicubic where it grows, and each
        channel kept within the values it had; what has its final size already is returned itself.
        Raises `ShapeError` for another size, `OptionError` for another dtype, `ImageError` for NaN.
        """
        return self._apply(_checked(image), at, _smooth)

    def apply_mask(self, mask: Array, at: Fraction | float = 1) -> Array:
        """The same by nearest pixels: any dtype, and no value that was not there."""
        return self._apply(mask, at, _nearest)

    def _apply(self, image: Array, at: Fraction | float, scaled: Scaler) -> Array:
        target, have = self.shape(at), _extent(image)
        at = Fraction(target[0], self.target[0])
        if any(abs(n - side * at) >= 1 for n, side in zip(have, self.size, strict=True)):
            want = " x ".join(f"{float(side * at):g}" for side in self.size)
            raise ShapeError("image", None, image.shape, f"the plan is for (height, width) = {want}")
        if self.policy.mode == "pad":
            content = have if self.content == self.size else _at_least_1(_scaled(self.content, at))
            return _pad(scaled(image, content), target)
        if self.box != self.size:
            # where the middle begins is told in the picture's pixels, so that all that is tied begins there
            begins = _scaled(((self.size[0] - self.box[0]) // 2, (self.size[1] - self.box[1]) // 2), at)
            image = _cut(image, begins, _at_least_1(_scaled(self.box, at)))
        return scaled(image, target)

    def invert(self, output: Array) -> Array:
        """A result for the target -> for the picture: (height, width) times k for one of k times the target.

        HW or HWC, uint8, uint16 or float, of any k = n/m. What was padded is cut off, what was stretched is
        stretched back; where the middle was cut out, the result is scaled to cover the picture, its aspect
        kept, and its middle taken. Returned as it is if the policy does not restore. Raises as `apply` does.
        """
        return self._invert(_checked(output), _smooth)

    def invert_mask(self, output: Array) -> Array:
        """The same by nearest pixels: any dtype, and no value that was not there."""
        return self._invert(output, _nearest)

    def _invert(self, output: Array, scaled: Scaler) -> Array:
        have = _extent(output)
        times = Fraction(have[0], self.target[0])
        if have[1] != self.target[1] * times:
            raise ShapeError("output", None, output.shape, f"must be {self.target} times a number")
        if not self.policy.restore:
            return output
        size = _at_least_1(_scaled(self.size, times))
        if self.policy.mode == "pad":
            output = _cut(output, (0, 0), _at_least_1(_scaled(self.content, times)))
        elif self.box != self.size:
            middle = _within(have, size)
            output = _cut(output, ((have[0] - middle[0]) // 2, (have[1] - middle[1]) // 2), middle)
        return scaled(output, size)


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
    return sides[0], sides[1]


def _extent(image: Array) -> Size:
    """Height and width. Raises `OptionError` for what is no HW or HWC array."""
    if not isinstance(image, np.ndarray):
        raise OptionError(f"images are arrays, HW or HWC, not {type(image).__name__}")
    if image.ndim not in (2, 3) or image.size == 0:
        raise ShapeError("image", None, image.shape, "must be (height, width) or (height, width, channels)")
    return image.shape[0], image.shape[1]


def _checked(image: Array) -> Array:
    _extent(image)
    if image.dtype.name not in ("uint8", "uint16") and image.dtype.kind != "f":
        raise OptionError(f"images are uint8, uint16 or float, not {image.dtype}; *_mask takes any")
    return image


def _scaled(size: Size, scale: Fraction) -> Size:
    """Sides times a number, to the nearest whole one."""
    height, width = (math.floor(side * scale + Fraction(1, 2)) for side in size)
    return height, width


def _at_least_1(size: Size) -> Size:
    return max(1, size[0]), max(1, size[1])


def _within(size: Size, aspect: Size) -> Size:
    """The largest size of this aspect, to the nearest pixel, that fits into `size`."""
    scale = min(Fraction(size[0], aspect[0]), Fraction(size[1], aspect[1]))
    return _at_least_1(_scaled(aspect, scale))


def _smooth(image: Array, size: Size) -> Array:
    if image.shape[:2] == size:
        return image
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    if not (np.isfinite(low) & np.isfinite(high)).all():
        raise ImageError("what is to be scaled holds NaN or infinity, which would spread")
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


def _cut(image: Array, begins: Size, size: Size) -> Array:
    """Less where the image ends before: one that is tied to the picture may be rounded down."""
    top, left = (max(0, min(b, have - n)) for b, have, n in zip(begins, image.shape[:2], size, strict=True))
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
