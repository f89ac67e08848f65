"""Procedural pictures for training: dead leaves, line art, text and textures; no one's data.

Dead leaves (occluding shapes whose sizes follow a power law of exponent -3, which makes the picture
scale-invariant like natural images: Lee, Mumford & Huang 2001) are known to train restoration networks
to near natural-image quality (Achddou, Gousseau & Ladjal 2021). Everything is drawn `_FINER` times as
large and averaged down, and is determined by the seed and the versions of NumPy, Pillow and Matplotlib.
"""

from __future__ import annotations

import string
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Array = np.ndarray
Colour = Array  # (3,) float, 0..1

_FINER = 3
#: textures, and the side of one
_TEXTURES, _TEXTURE = 60, 1024
#: of DejaVu and STIX, free fonts that come with Matplotlib; Pillow's own Aileron is the ninth
_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSansMono",
    "STIXGeneral",
    "STIXGeneralItalic",
)
_LETTERS = string.ascii_letters + string.digits + " " * 10 + ".,:;!?()-+=%&@"


# -- textures: grey, 0..255, as large as the largest leaf ---------------------------------------------------


def _spectrum(rng: np.random.Generator, amplitude: Array) -> Array:
    """A periodic random field of that amplitude spectrum (of `_frequencies`), mean 0, deviation 1."""
    phase = np.exp(2j * np.pi * rng.random(amplitude.shape))
    field = np.fft.irfft2(amplitude * phase, s=(_TEXTURE, _TEXTURE))
    return (field - field.mean()) / (field.std() + 1e-9)


@lru_cache(1)
def _frequencies() -> tuple[Array, Array]:
    """Along rows and columns, in cycles per texture."""
    return np.meshgrid(
        np.fft.fftfreq(_TEXTURE) * _TEXTURE, np.fft.rfftfreq(_TEXTURE) * _TEXTURE, indexing="ij"
    )


def _grain(rng: np.random.Generator) -> Array:
    """Fractal noise, 1/f^e, sometimes drawn out into fibres."""
    fy, fx = _frequencies()
    if rng.random() < 0.4:
        fx = fx * rng.uniform(3, 12)
    f = np.hypot(fy, fx)
    f[0, 0] = np.inf
    return _spectrum(rng, f ** -rng.uniform(1.0, 2.2)) * 0.9


def _blobs(rng: np.random.Generator) -> Array:
    """Level sets of noise around one wavelength: patches, labyrinths, animals' skins."""
    fy, fx = _frequencies()
    f = np.hypot(fy, fx * rng.choice([1, 1, 2.5])) * rng.uniform(10, 60) * _FINER / _TEXTURE
    field = _spectrum(rng, np.exp(-((np.log(f + 1e-9) / rng.uniform(0.25, 0.6)) ** 2)))
    return np.tanh((field - rng.normal(0, 0.5)) * 10 ** rng.uniform(0, 1.2))


def _waves(rng: np.random.Generator) -> Array:
    """Stripes, weaves and dots, bent by noise."""
    fy, fx = _frequencies()
    f = np.hypot(fy, fx)
    f[0, 0] = np.inf
    bend = _spectrum(rng, f**-2.5) * rng.choice([0, 0.3, 1.5])
    yy, xx = np.mgrid[0:_TEXTURE, 0:_TEXTURE] / _TEXTURE
    length = np.exp(rng.uniform(np.log(2.5), np.log(30))) * _FINER / _TEXTURE
    first = np.sin(2 * np.pi * (xx / length + bend))
    kind = rng.random()
    if kind < 0.5:
        wave = first
    else:
        wave = np.sin(2 * np.pi * (yy / length * rng.uniform(0.5, 1.5) + bend))
        wave = first * wave if kind < 0.7 else np.maximum(first, wave) if kind < 0.85 else first + wave - 0.5
    return np.tanh(wave * 10 ** rng.uniform(-0.3, 0.9))


@lru_cache(_TEXTURES)
def _drawn(number: int) -> Image.Image:
    """One of the `_TEXTURES`, the same for every picture: they take longer to make than a picture."""
    field = (_grain, _blobs, _waves)[number % 3](np.random.default_rng(number))
    return Image.fromarray(np.clip(field * 100 + 127.5, 0, 255).astype(np.uint8))


def _texture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A random cut of a random texture, at 0.7 to 1.6 times its size."""
    texture = _drawn(int(rng.integers(_TEXTURES)))
    zoom = rng.choice([0.7, 1, 1, 1.6])
    w, h = (min(int(side / zoom) + 1, _TEXTURE) for side in (width, height))
    x, y = (int(rng.integers(_TEXTURE - side + 1)) for side in (w, h))
    cut = texture.crop((x, y, x + w, y + h))
    if zoom != 1:
        cut = cut.resize((width, height), Image.Resampling.BILINEAR)
    return cut.crop((0, 0, width, height))


@lru_cache(1)
def _ramps() -> list[Image.Image]:
    """Linear ones of 36 directions, and round ones."""
    linear, inner = Image.linear_gradient("L"), (38, 38, 218, 218)
    turned = [linear.rotate(angle, Image.Resampling.BILINEAR).crop(inner) for angle in range(0, 360, 10)]
    round_ = Image.radial_gradient("L")
    return turned + [round_.crop((x, x // 2, x + 128, x // 2 + 128)) for x in range(0, 128, 10)]


def _shade(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """A linear or round ramp."""
    ramp = _ramps()[rng.integers(len(_ramps()))]
    return ramp.resize((width, height), Image.Resampling.BILINEAR)


def _coloured(grey: Image.Image, one: Colour, other: Colour) -> Image.Image:
    """0..255 becomes from `one` colour to the `other`."""
    steps = np.linspace(0, 1, 256)[:, None]
    table = np.clip((one + (other - one) * steps) * 255 + 0.5, 0, 255).astype(np.uint8)
    return Image.fromarray(table[np.asarray(grey)])


# -- colours -----------------------------------------------------------------------------------------------


class _Palette:
    """A few colours that a picture keeps to; natural ones differ in light more than in hue."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        count = int(rng.integers(3, 9))
        light = rng.random((count, 1)) ** rng.uniform(0.6, 1.6)
        self.colours = light + rng.normal(0, rng.choice([0.0, 0.08, 0.2]), (count, 3))

    def __call__(self) -> Colour:
        colour = self.colours[self.rng.integers(len(self.colours))]
        return np.clip(colour + self.rng.normal(0, 0.06) + self.rng.normal(0, 0.02, 3), 0, 1)

    def near(self, colour: Colour) -> Colour:
        """Another shade of it, often a close one."""
        rng = self.rng
        if rng.random() < 0.25:
            return self()
        return np.clip(colour + rng.normal(0, 0.15) + rng.normal(0, 0.03, 3), 0, 1)


# -- dead leaves -------------------------------------------------------------------------------------------


def _outline(rng: np.random.Generator, radius: float, upright: float = 0.0) -> Array:
    """A closed outline around 0, (points, 2); with probability `upright` a bar along an axis."""
    kind, angle, flatness = rng.random(), rng.uniform(0, 2 * np.pi), rng.uniform(0.25, 1)
    if rng.random() < upright:
        kind, angle, flatness = 1.0, rng.choice([0, np.pi / 2]), np.exp(rng.uniform(np.log(0.03), 0))
    if kind < 0.4:  # round, wobbling
        count = int(np.clip(radius * 1.5, 10, 90))
        theta = np.linspace(0, 2 * np.pi, count, endpoint=False)
        r = np.ones(count)
        for k in range(2, 7):
            r = r + rng.normal(0, rng.choice([0, 0.25]) / k) * np.sin(k * theta + rng.uniform(0, 6))
    elif kind < 0.8:  # cornered
        count = int(rng.integers(3, 8))
        theta = np.sort(rng.uniform(0, 2 * np.pi, count))
        r = rng.uniform(0.5, 1.3, count)
    else:  # a rectangle or a bar
        theta = np.arctan2([1, 1, -1, -1], [1, -1, -1, 1])
        r = np.full(4, np.sqrt(2))
    points = np.stack([r * np.cos(theta), r * np.sin(theta) * flatness], 1) * radius
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return points @ turn


def _upright(rng: np.random.Generator) -> float:
    """How many of a picture's shapes are bars along an axis: few, or all, as in what people build."""
    return float(rng.choice([0.05, 1.0], p=[0.8, 0.2]))


def _curve(rng: np.random.Generator, length: float, bend: float = 1.0) -> Array:
    """An open smooth curve, (points, 2), from 0."""
    count = int(np.clip(length / 4, 4, 80))
    turning = np.cumsum(rng.normal(0, bend / count, count)) + rng.normal(0, 3 * bend / count)
    angle = rng.uniform(0, 2 * np.pi) + np.cumsum(turning)
    steps = np.stack([np.cos(angle), np.sin(angle)], 1) * length / count
    return np.cumsum(steps, 0)


def _flat(points: Array) -> list[float]:
    return [float(v) for v in points.ravel()]


def _mask(points: Array, side: int, stroke: int = 0) -> tuple[tuple[int, int], Image.Image] | None:
    """The shape's place and mask, cut to the canvas; None outside of it. `stroke`: a line of that width."""
    low = np.maximum(np.floor(points.min(0)).astype(int) - stroke, 0)
    high = np.minimum(np.ceil(points.max(0)).astype(int) + stroke + 1, side)
    if (high <= low).any():
        return None
    width, height = (int(v) for v in high - low)
    mask = Image.new("L", (width, height))
    draw, vertices = ImageDraw.Draw(mask), _flat(points - low)
    if stroke:
        draw.line(vertices, fill=255, width=stroke, joint="curve" if stroke > 4 else None)
    else:
        draw.polygon(vertices, fill=255)
    return (int(low[0]), int(low[1])), mask


def _fill(rng: np.random.Generator, palette: _Palette, width: int, height: int) -> Any:
    """A flat colour, or a shaded or textured picture."""
    colour, kind = palette(), rng.random()
    if kind < 0.3 or width * height < 64:
        return tuple(int(v * 255 + 0.5) for v in colour)
    grey = (_shade if kind < 0.55 else _texture)(rng, width, height)
    return _coloured(grey, colour, palette.near(colour))


def _leaves(rng: np.random.Generator, side: int) -> Image.Image:
    palette = _Palette(rng)
    canvas = Image.new("RGB", (side, side))
    canvas.paste(_fill(rng, palette, side, side), (0, 0, side, side))
    smallest = np.exp(rng.uniform(np.log(2.0), np.log(12.0))) * _FINER
    largest = rng.uniform(0.15, 0.5) * side
    strokes, soft = rng.choice([0.05, 0.3]), rng.choice([0, 0, 0.2])
    upright = _upright(rng)
    covered, wanted = 0.0, rng.uniform(1.5, 4) * side**2
    while covered < wanted:
        # inverse-transform sample of p(r) ~ r^-3 on [smallest, largest]
        u = rng.random()
        radius = 1 / np.sqrt(u / largest**2 + (1 - u) / smallest**2)
        centre = rng.uniform(-0.1, 1.1, 2) * side
        if rng.random() < strokes * (1 - upright):
            width = max(1, int(min(rng.exponential(2.0) + 0.7, radius / 3) * _FINER))
            shape = _mask(_curve(rng, radius * rng.uniform(2, 6)) + centre, side, width)
            covered += radius * width * 4
        else:
            shape = _mask(_outline(rng, radius, upright) + centre, side)
            covered += radius**2 * 2
        if shape is None:
            continue
        at, mask = shape
        if rng.random() < soft:
            mask = mask.filter(ImageFilter.GaussianBlur(rng.uniform(1, 4) * _FINER))
        canvas.paste(_fill(rng, palette, *mask.size), (*at, at[0] + mask.width, at[1] + mask.height), mask)
    return canvas


# -- drawings ----------------------------------------------------------------------------------------------


def _lines(rng: np.random.Generator, side: int) -> Image.Image:
    """Filled, outlined and hatched shapes, as in comics."""
    palette = _Palette(rng)
    ink = palette() * rng.choice([0, 0.1, 0.4])
    paper = np.clip(1 - palette() * rng.choice([0, 0.15, 0.7]), 0, 1)
    as_int = [tuple(int(v * 255) for v in c) for c in (paper, ink)]
    canvas = Image.new("RGB", (side, side), as_int[0])
    draw = ImageDraw.Draw(canvas)
    pen, upright = rng.uniform(0.8, 3) * _FINER, _upright(rng)
    outlined = rng.choice([0.0, 0.3, 1.0, 1.0])  # were all, what is grey and narrow would come out hollow
    for _ in range(int(rng.integers(6, 40))):
        radius = np.exp(rng.uniform(np.log(4 * _FINER), np.log(0.4 * side)))
        centre = rng.uniform(0, 1, 2) * side
        width = max(1, int(pen * rng.uniform(0.5, 1.5)))
        if rng.random() < 0.4:
            stroke = _curve(rng, radius * 4, 2.0)
            if rng.random() < upright:
                stroke[:, rng.integers(2)] = 0
            shade: Any = as_int[1]
            if rng.random() < 0.4:  # else what is grey and wide would be taken for two lines
                shade, width = tuple(int(v * 255) for v in palette()), int(width * rng.uniform(1, 4))
            draw.line(_flat(stroke + centre), fill=shade, width=width, joint="curve")
            continue
        points = _outline(rng, radius, upright) + centre
        shape = _mask(points, side)
        if shape is None:
            continue
        (x, y), mask = shape
        kind = rng.random()
        fill: Any = tuple(int(v * 255) for v in (palette() if kind < 0.8 else ink))
        if kind < 0.25:
            fill = _hatching(rng, mask.size, pen, as_int[0], as_int[1], upright)
        elif kind < 0.4:
            colour = palette()
            fill = _coloured(_shade(rng, *mask.size), colour, palette.near(colour))
        canvas.paste(fill, (x, y, x + mask.width, y + mask.height), mask)
        if rng.random() < outlined:
            outline = _flat(np.concatenate([points, points[:2]]))
            draw.line(outline, fill=as_int[1], width=width, joint="curve")
    return canvas


def _hatching(
    rng: np.random.Generator, size: tuple[int, int], pen: float, paper: Any, ink: Any, upright: float
) -> Image.Image:
    """Parallel strokes, crossed or not, or a screen of dots; with probability `upright` along the axes."""
    hatched = Image.new("RGB", size, paper)
    draw = ImageDraw.Draw(hatched)
    gap = pen * np.exp(rng.uniform(np.log(1.6), np.log(8)))
    reach = float(np.hypot(*size))
    if rng.random() < 0.2:
        r = gap * rng.uniform(0.2, 0.45)
        for y in np.arange(0, size[1], gap):
            for x in np.arange(0, size[0], gap):
                draw.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        return hatched
    width = max(1, int(gap * rng.uniform(0.2, 0.5)))
    angles = rng.uniform(0, np.pi, int(rng.integers(1, 3)))
    if rng.random() < upright:
        angles = np.round(angles / (np.pi / 2)) * (np.pi / 2)
    for angle in angles:
        along = np.array([np.cos(angle), np.sin(angle)])
        across = np.array([-along[1], along[0]])
        for offset in np.arange(-reach, reach, gap):
            middle = np.array(size) / 2 + across * offset
            ends = np.stack([middle - along * reach, middle + along * reach])
            draw.line(_flat(ends), fill=ink, width=width)
    return hatched


@lru_cache(256)
def _font(number: int, size: int) -> Any:
    if number == len(_FONTS):
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{_FONTS[number]}.ttf", size)


def _text(rng: np.random.Generator, side: int) -> Image.Image:
    palette = _Palette(rng)
    paper, ink = palette(), palette()
    if rng.random() < 0.6:
        paper, ink = np.clip(paper + 0.7, 0, 1), ink * rng.choice([0.3, 1.0])
        if rng.random() < 0.3:
            paper, ink = ink, paper
    canvas = Image.new("RGB", (side, side))
    canvas.paste(_coloured(_shade(rng, side, side), paper, palette.near(paper) * 0.3 + paper * 0.7))
    draw, y = ImageDraw.Draw(canvas), 0.0
    while y < side:
        size = int(np.exp(rng.uniform(np.log(8), np.log(96))) * _FINER)
        font = _font(int(rng.integers(len(_FONTS) + 1)), size)
        for _ in range(int(rng.integers(1, 4))):
            line = "".join(rng.choice(list(_LETTERS), 60))
            draw.text(
                (rng.uniform(-0.5, 0.1) * side, y), line, font=font, fill=tuple(int(v * 255) for v in ink)
            )
            y += size * rng.uniform(1.0, 1.5)
    if rng.random() < 0.4:
        canvas = canvas.rotate(
            rng.uniform(-45, 45), Image.Resampling.BICUBIC, fillcolor=tuple(int(v * 255) for v in paper)
        )
    return canvas


def _cloth(rng: np.random.Generator, side: int) -> Image.Image:
    """One or two textures all over."""
    palette = _Palette(rng)
    one, other = palette(), palette()
    canvas = _coloured(_texture(rng, side, side), one, other)
    if rng.random() < 0.5:
        canvas.paste(
            _coloured(_texture(rng, side, side), palette(), palette()), mask=_texture(rng, side, side)
        )
    return canvas


#: kinds of pictures, and how many there are of each
KINDS = {"leaves": (_leaves, 0.40), "lines": (_lines, 0.34), "text": (_text, 0.18), "cloth": (_cloth, 0.08)}


def picture(seed: int, size: int = 256, kind: str | None = None) -> Array:
    """One picture: (size, size, 3) uint8 RGB, wholly determined by its arguments.

    `kind`: one of `KINDS`; None: as often as it says there. Raises `ValueError` where `size` is not one of 32
    to 341, beyond which textures do not reach.
    """
    if not 32 <= size <= _TEXTURE // _FINER:
        raise ValueError(f"pictures are of 32 to {_TEXTURE // _FINER} pixels, not of {size}")
    rng = np.random.default_rng(seed)
    chosen = kind or str(rng.choice(list(KINDS), p=[share for _, share in KINDS.values()]))
    drawn = KINDS[chosen][0](rng, size * _FINER).reduce(_FINER)
    if rng.random() < 0.6:  # the blur of lenses and of reductions
        drawn = drawn.filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.9)))
    shown = np.asarray(drawn)
    if rng.random() < 0.5:
        shown = shown[:, ::-1]
    return np.rot90(shown, int(rng.integers(4))).copy()
