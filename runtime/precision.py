"""Precisions that have to prove themselves: bf16 chosen by "auto", and int8, each held against f32."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends import Backend
from anysize.backends.base import Array, Feeds
from anysize.backends.errors import ExecutionError, IntegrityError, OptionError, ShapeError
from anysize.backends.spec import ModelSpec
from anysize.exporters.exporting import random_feeds, sizes_near
from anysize.exporters.quantizing import check_installed, quantize
from anysize.exporters.radius import image_step
from anysize.files import open_picture_file, pictures_in, read_picture
from anysize.guard import ShapeGuard
from anysize.pixels import open_picture, split
from anysize.session import LIVE, Options, Session, load, tuned
from anysize.sources import Source, version_of
from anysize.tiling import round_up

#: bf16 is kept only above this: at 50 dB the root of the mean square difference is 0.8/255
LEAST_DB = 50.0
#: int8 is taken only above this: at 35 dB the root of the mean square difference is 4.5/255
LEAST_INT8_DB = 35.0
#: crops of the calibration pictures: so many to calibrate on, so many to judge by, of about this side
CALIBRATING, JUDGING, CROP = 32, 16, 64
#: the values of calibration pictures reach over this part of what a picture's may: int8 has no numbers for
#: what lies far beyond, so that flat or dark pictures would judge it good which ruins others
LEAST_CONTRAST = 0.5
#: the probe: so many crops of about this side, those with the strongest edges
CROPS, SIDE = 3, 96
#: pictures with fewer pixels run in f32: the probe would cost more than bf16 gains
WORTH_PROBING = 256 * 256


@dataclass(frozen=True)
class Choice:
    """The session to run, and why."""

    session: Session
    reason: str


class Precisions:
    """One model in f32 and, where the engine can, in bf16."""

    def __init__(self, source: Source, backend: str | Backend, options: Options) -> None:
        """Raises what `load` raises."""
        self.precise = load(source, backend=backend, options=options)
        self.rough: Session | None = None
        self._missing = ""
        # the engines to fall back on are asked for f32, unless the caller said otherwise
        chain = tuple(name if ":" in name else f"{name}:f32" for name in options.fallback)
        try:
            rough = load(source, backend=backend, precision="bf16", options=replace(options, fallback=chain))
        except OptionError as error:
            self._missing = str(error)
        except BaseException:
            self.precise.close()
            raise
        else:
            if rough.precision == "bf16" and not rough.stats.fallbacks:
                self.rough = rough
            else:
                self._missing = "; ".join(rough.stats.fallbacks)
                rough.close()

    def choose(self, probes: list[Feeds], where: str) -> Choice:
        """Compare the two on these inputs; f32 if there are none."""
        if self.rough is None:
            return Choice(self.precise, self._missing)
        if not probes:
            return Choice(self.precise, f"{where} is too small for a probe to pay")
        failed = len(self.rough.stats.fallbacks)
        try:
            worst = min(decibels(self.precise, self.rough, probe) for probe in probes)
        except (ExecutionError, IntegrityError) as error:
            return Choice(self.precise, f"bf16 failed on the probe: {error}")
        if len(self.rough.stats.fallbacks) > failed:
            return Choice(self.precise, f"bf16 failed on the probe: {self.rough.stats.fallbacks[-1]}")
        reason = f"bf16 is {worst:.1f} dB from f32 on {where}; at least {LEAST_DB:g} dB are asked for"
        return Choice(self.rough if worst >= LEAST_DB else self.precise, reason)

    def close(self, but: Session | None = None) -> None:
        """Free both, or the other one."""
        for session in (self.precise, self.rough):
            if session is not None and session is not but:
                session.close()


def decibels(precise: Session, rough: Session, probe: Feeds) -> float:
    """PSNR of the worst output: over the value range of a picture, the largest value of anything else."""
    spec = precise.spec
    low, high = spec.value_range
    want, got = (session.run(probe, finite=True) for session in (precise, rough))
    worst = np.inf
    for name, values in want.items():
        ours, others = values.astype(np.float64), got[name].astype(np.float64)
        peak = high - low
        if spec.scale is None:
            peak = float(np.abs(ours).max())
        else:
            ours, others = ours.clip(low, high), others.clip(low, high)
        square = float(np.square(ours - others).mean())
        if square:
            worst = min(worst, 10 * np.log10(max(peak, 1e-30) ** 2 / square))
    return worst


def noise(spec: ModelSpec) -> list[Feeds]:
    """Noise as input: harder to round than a picture."""
    return [random_feeds(spec, sizes_near(spec, SIDE))]


def busiest(picture: Iterable[Array], height: int, width: int, spec: ModelSpec) -> list[Feeds]:
    """The busiest crops of each plane that will run, as inputs; none of too small a picture.

    `picture`: HWC pixels in pieces from the top down. Alpha counts: it runs through the model as grey.
    """
    rows, columns = (round_up(SIDE, image_step(spec, axis)) for axis in (2, 3))
    name = spec.inputs[0].name
    if height < rows or width < columns or height * width < WORTH_PROBING:
        return []
    try:
        spec.bind({name: (1, spec.channels or 3, rows, columns)})
    except ShapeError:
        return []
    best: dict[int, list[tuple[float, Array]]] = {}
    for piece in picture:
        for top in range(0, len(piece) - rows + 1, rows):
            for left in range(0, width - columns + 1, columns):
                colour, alpha = split(piece[top : top + rows, left : left + columns])
                parts = list(colour[:, None]) if spec.channels == 1 else [colour]
                for i, part in enumerate([*parts, *([] if alpha is None else [alpha])]):
                    edges = float(np.abs(np.diff(part, axis=1)).mean() + np.abs(np.diff(part, axis=2)).mean())
                    found = best.setdefault(i, [])
                    found.append((edges, part))
                    found.sort(key=lambda item: -item[0])
                    del found[CROPS:]
    low, high = spec.value_range
    probes: list[Feeds] = []
    for _, part in (item for found in best.values() for item in found):
        planes = np.repeat(part, spec.channels or 3, axis=0) if len(part) != spec.channels else part
        probes.append({name: planes[None] * np.float32(high - low) + np.float32(low)})
    return probes


def load_int8(source: Source, backend: str | Backend, options: Options) -> Session:
    """The model in int8, calibrated on `options.calibration` and held against f32 on other parts of it.

    Raises what `load`, `crops` and `quantize` raise; `OptionError` without pictures, on an engine without
    int8, and with the figure where int8 is further from f32 than `LEAST_INT8_DB`.
    """
    precise = load(source, backend=backend, options=replace(options, tune=False, calibration=()))
    first, *others = precise._guards
    opened = [first]
    try:
        engine_options = replace(first.options, precision="int8")
        first.backend.check(engine_options)
        check_installed()
        calibrating, judging = crops(options.calibration, first.spec)
        cache = first.options.cache
        digest = hashlib.sha256(b"".join(feed.tobytes() for feed in calibrating)).hexdigest()
        made_by = [f"{name} {version_of(name)}" for name in ("nncf", "onnx", "onnxruntime")]
        key = ("int8", first.model.digest or "", digest, *made_by)
        data = cache.get(*key) if cache is not None else None
        if data is None:
            data = quantize(first.model, calibrating)
            if cache is not None:
                cache.put(data, *key)
        model = replace(first.model, data=data)
        guard = ShapeGuard(first.backend, model, engine_options, options.shapes, options.max_live or LIVE)
        opened.append(guard)
        name = first.spec.inputs[0].name
        worst = min(decibels(precise, Session([guard]), {name: feed}) for feed in judging)
        reason = f"int8 is {worst:.1f} dB from f32 on crops of the calibration pictures"
        if worst < LEAST_INT8_DB:
            raise OptionError(f"{reason}, and at least {LEAST_INT8_DB:g} dB are asked for")
        session = tuned(Session([guard, *others], precise.stats.fallbacks, reason), options)
    except BaseException:
        for guard in [*opened, *others]:
            guard.close()
        raise
    first.close()
    return session


def crops(pictures: Sequence[Any], spec: ModelSpec) -> tuple[list[Array], list[Array]]:
    """Inputs cut out of pictures (files, folders of them, or what `Upscaler` takes): to calibrate, to judge.

    `CALIBRATING` and `JUDGING` of them at most, from as many pictures, spread evenly over those given. The
    longer side of each is cut in two, and one half calibrates, the other judges; places are random but the
    same each time. Pictures too small for a crop from either half are left out.

    Raises `ImageError`, and `OptionError` where all are too small, have too little contrast, or the model
    takes no picture.
    """
    shape = spec.inputs[0].shape
    if len(spec.inputs) != 1 or len(shape) != 4 or spec.channels not in (1, 3):
        raise OptionError("int8 is calibrated on pictures, and this model does not take one picture")
    least = spec.input_shapes(sizes_near(spec, CROP))[spec.inputs[0].name][2:]
    given: list[Any] = []
    for item in pictures:
        given += pictures_in(item) if isinstance(item, (str, os.PathLike)) else [item]
    most = CALIBRATING + JUDGING
    chosen = given if len(given) <= most else [given[i * len(given) // most] for i in range(most)]
    chosen = [item for item in chosen if _has_room(item, least)]
    rng = np.random.default_rng(0)
    found: tuple[list[Array], list[Array]] = ([], [])
    for item in chosen:
        array = read_picture(item).array if isinstance(item, Path) else open_picture(item).array
        halves = np.array_split(array, 2, int(array.shape[1] > array.shape[0]))
        for half, parts, wanted in zip(halves, found, (CALIBRATING, JUDGING), strict=True):
            parts += (_crop(half, least, spec, rng) for _ in range(-(-wanted // len(chosen))))
    if not chosen:
        what = "all of these are smaller" if given else "none are given"
        side = max(least)
        raise OptionError(f"int8 needs calibration pictures, of {2 * side} x {side} pixels or more: {what}")
    low, high = spec.value_range
    darkest, brightest = (edge(part) for edge, part in ((np.min, found[0]), (np.max, found[0])))
    if brightest - darkest < LEAST_CONTRAST * (high - low):
        raise OptionError(
            f"the calibration pictures reach from {darkest:.2g} to {brightest:.2g} of {low:g} to {high:g}, "
            "and int8 would ruin pictures with more contrast"
        )
    for parts in found:
        rng.shuffle(parts)  # so that none of the pictures is left out at the end
    return found[0][:CALIBRATING], found[1][:JUDGING]


def _has_room(item: Any, least: tuple[int, ...]) -> bool:
    """Whether each half of a picture holds a crop, whichever way it is turned."""
    if isinstance(item, Path):
        image = open_picture_file(item)
        short, long = sorted((image.height, image.width))
    else:
        short, long = sorted(open_picture(item).array.shape[:2])
    return bool(short >= max(least) and long // 2 >= max(least))


def _crop(pixels: Array, size: tuple[int, ...], spec: ModelSpec, rng: np.random.Generator) -> Array:
    """A random place of (H, W, C) pixels as the model's input, (1, C', *size); one colour for C' 1."""
    top, left = (int(rng.integers(pixels.shape[i] - size[i] + 1)) for i in (0, 1))
    planes = split(pixels[top : top + size[0], left : left + size[1]])[0]
    if spec.channels == 1:
        planes = planes[rng.integers(len(planes))][None]
    low, high = spec.value_range
    planes = np.broadcast_to(planes, (spec.channels or 3, *size))
    made: Array = planes[None] * np.float32(high - low) + np.float32(low)
    return made
