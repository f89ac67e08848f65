"""Precisions that have to prove themselves: bf16 chosen by "auto", and int8, each held against f32."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from anysize.backends import Backend
from anysize.backends.base import Array, Feeds
from anysize.backends.errors import ExecutionError, IntegrityError, OptionError, ShapeError
from anysize.backends.spec import ModelSpec
from anysize.exporters.exporting import random_feeds, sizes_near
from anysize.exporters.quantizing import quantize
from anysize.exporters.radius import image_step
from anysize.files import pictures_in, read_picture
from anysize.guard import ShapeGuard
from anysize.pixels import open_picture, split
from anysize.session import LIVE, Options, Session, load, tuned
from anysize.sources import Source, version_of
from anysize.tiling import round_up

#: bf16 is kept only above this: at 50 dB the root of the mean square difference is 0.8/255
LEAST_DB = 50.0
#: int8 is taken only above this: at 35 dB the root of the mean square difference is 4.5/255
LEAST_INT8_DB = 35.0
#: crops of the calibration pictures: so many to calibrate on, so many others to judge by, of about this side
CALIBRATING, JUDGING, CROP = 32, 16, 64
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
    """The model in int8, calibrated on `options.calibration` and held against f32 on other crops of it.

    Raises what `load` and `quantize` raise; `OptionError` without pictures, on an engine without int8, and
    with the figure where int8 is further from f32 than `LEAST_INT8_DB`.
    """
    precise = load(source, backend=backend, options=replace(options, tune=False))
    first, *others = precise._guards
    try:
        engine_options = replace(first.options, precision="int8")
        first.backend.check(engine_options)
        feeds = crops(options.calibration, first.spec)
        cache = first.options.cache
        digest = hashlib.sha256(b"".join(feed.tobytes() for feed in feeds[:CALIBRATING])).hexdigest()
        made_by = [f"{name} {version_of(name)}" for name in ("nncf", "onnx", "onnxruntime")]
        key = ("int8", first.model.digest or "", digest, *made_by)
        data = cache.get(*key) if cache is not None else None
        if data is None:
            data = quantize(first.model, feeds[:CALIBRATING])
            if cache is not None:
                cache.put(data, *key)
        model = replace(first.model, data=data)
        guard = ShapeGuard(first.backend, model, engine_options, options.shapes, options.max_live or LIVE)
        name = first.spec.inputs[0].name
        alone = Session([guard])
        worst = min(decibels(precise, alone, {name: feed}) for feed in feeds[CALIBRATING:])
        reason = f"int8 is {worst:.1f} dB from f32 on crops of the calibration pictures"
        if worst < LEAST_INT8_DB:
            alone.close()
            raise OptionError(f"{reason}, and at least {LEAST_INT8_DB:g} dB are asked for")
        session = tuned(Session([guard, *others], precise.stats.fallbacks, reason), options)
    except BaseException:
        precise.close()
        raise
    first.close()
    return session


def crops(pictures: Iterable[Any], spec: ModelSpec) -> list[Array]:
    """Inputs cut out of pictures (files, folders of them, or what `Upscaler` takes).

    `CALIBRATING` and then `JUDGING` of them, in turns from all pictures, at places that are random but the
    same each time.

    Raises `ImageError`, and `OptionError` where all are too small or the model takes no picture.
    """
    shape = spec.inputs[0].shape
    if len(spec.inputs) != 1 or len(shape) != 4 or spec.channels not in (1, 3):
        raise OptionError("int8 is calibrated on pictures, and this model does not take one picture")
    rows, columns = spec.input_shapes(sizes_near(spec, CROP))[spec.inputs[0].name][2:]
    planes: list[Array] = []
    for item in pictures:
        is_path = isinstance(item, (str, os.PathLike))
        for picture in pictures_in(item) if is_path else (item,):
            array = read_picture(picture).array if is_path else open_picture(picture).array
            colour = split(array)[0]
            if colour.shape[1] >= rows and colour.shape[2] >= columns:
                planes += (
                    colour[:, None]
                    if spec.channels == 1
                    else [np.broadcast_to(colour, (3, *colour.shape[1:]))]
                )
    if not planes:
        raise OptionError(
            f"int8 needs calibration pictures of {columns} x {rows} pixels or more: none are given"
        )
    rng = np.random.default_rng(0)
    low, high = spec.value_range
    found = []
    for i in range(CALIBRATING + JUDGING):
        plane = planes[i % len(planes)]
        top = int(rng.integers(plane.shape[1] - rows + 1))
        left = int(rng.integers(plane.shape[2] - columns + 1))
        part = plane[:, top : top + rows, left : left + columns]
        found.append(np.ascontiguousarray(part[None] * np.float32(high - low) + np.float32(low)))
    return found
