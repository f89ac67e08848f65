"""One picture's way through a model: its pixels as the model takes them, and what it gives as pixels."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from typing import Any, Protocol

import numpy as np
from anysize.backends import Dim, ModelSpec
from anysize.backends.base import Array
from anysize.backends.errors import Cancelled, ModelLoadError, OptionError
from anysize.exporters.radius import image_step
from anysize.lockstep import LockstepRun
from anysize.pixels import constant_runs, fill_hidden, quantise, split
from anysize.planning import Plan
from anysize.session import Session
from anysize.streaming import Band, BandRun
from anysize.tiling import round_up, run_grid
from anysize.verify import Verification

Progress = Callable[[int, int], Any]
#: a flag such as `threading.Event`, or a function that says whether to stop
Cancel = threading.Event | Callable[[], bool]


class Rows(Protocol):
    """A picture that can be had from the top down: HWC, alpha last where it has any.

    `alpha_range`: the least and the largest alpha in 0..1; None without alpha.
    """

    height: int
    width: int
    channels: int
    dtype: np.dtype[Any]
    alpha_range: tuple[float, float] | None

    def read(self, top: int, bottom: int) -> Array:
        """Rows [top, bottom), (rows, W, C). A file is read in order, each row once."""
        ...

    def pieces(self) -> Iterable[Array]:
        """All of it in pieces from the top down, to measure on, whatever has been read."""
        ...


class ArrayRows:
    """A picture in memory; colour under zero alpha is replaced first, so that it cannot bleed."""

    def __init__(self, array: Array) -> None:
        self.array = fill_hidden(array)
        self.height, self.width, self.channels = array.shape
        self.dtype = array.dtype
        self.alpha_range = None
        if self.channels in (2, 4):
            full = 1 if array.dtype.kind == "f" else np.iinfo(array.dtype).max
            alpha = array[:, :, -1]
            self.alpha_range = (float(alpha.min() / full), float(alpha.max() / full))

    def read(self, top: int, bottom: int) -> Array:
        return self.array[top:bottom]

    def pieces(self) -> Iterable[Array]:
        return (self.array,)


class Work:
    """One picture's way through the model, as parts: colour (its planes for a one-channel model), alpha."""

    plan: Plan
    verification: Verification | None = None

    def __init__(
        self,
        session: Session,
        rows: Rows,
        dtype: np.dtype[Any],
        progress: Progress | None,
        cancelled: Callable[[], bool],
    ) -> None:
        if not (progress is None or callable(progress)):
            raise OptionError(f"progress must be a function, not {type(progress).__name__}")
        self.session, self.spec, self.rows, self.dtype = session, session.spec, rows, dtype
        self.progress, self.cancelled = progress, cancelled
        self.scale = image_scale(self.spec)
        self.padded = self._padded()
        self.grey = rows.channels <= 2
        # an alpha that is the same everywhere stays so
        self.alpha = rows.alpha_range is not None and rows.alpha_range[0] != rows.alpha_range[1]
        self.engine_seconds = 0.0
        self.done = 0
        self.above: Array | None = None  # the rows before those read last
        self.alpha_read: Array = np.empty((1, 0, rows.width), np.float32)  # (1, rows, W) of those, in 0..1

    # -- in

    def inputs(self, top: int = 0, bottom: int | None = None) -> list[Array]:
        """The model's input for rows [top, bottom) of the padded picture, (C, rows, W) for each part."""
        height, width = self.padded
        bottom = height if bottom is None else bottom
        real = min(bottom, self.rows.height)
        need = bottom - real  # rows below the picture mirror those above its edge
        pixels = self.rows.read(top, real)
        if need:
            pixels = self._continued(pixels, need)
        else:
            self.above = pixels[-image_step(self.spec, 2) :]
        colour, alpha = split(pixels)
        parts = list(colour[:, None]) if self.spec.channels == 1 else [colour]
        if self.alpha and alpha is not None:
            parts.append(alpha)
            self.alpha_read = alpha[:, : real - top]
        beyond = width - self.rows.width
        if beyond:
            # reflect needs as many pixels as it adds; np.pad would repeat the reflection
            mode = "reflect" if beyond < self.rows.width else "edge"
            parts = [np.pad(p, ((0, 0), (0, 0), (0, beyond)), mode=mode) for p in parts]  # type: ignore[call-overload]
        return [self._model_input(part) for part in parts]

    def _continued(self, pixels: Array, need: int) -> Array:
        """The picture's last rows and `need` below it: a reflection, or its edge where it is too small."""
        known = pixels if self.above is None else np.concatenate((self.above, pixels))
        mode = "reflect" if need < self.rows.height else "edge"
        grown: Array = np.pad(known, ((0, need), (0, 0), (0, 0)), mode=mode)  # type: ignore[call-overload]
        return grown[len(known) - len(pixels) :]

    def _padded(self) -> tuple[int, int]:
        """The next size the model takes, which grows at the bottom and right; the result is cropped."""
        spec, sizes = self.spec, []
        wanted = [(2, self.rows.height), (3, self.rows.width)]
        if str(spec.inputs[0].shape[3]) == getattr(spec.inputs[0].shape[2], "name", None):  # squares alone
            wanted = [(2, max(self.rows.height, self.rows.width))] * 2
        for axis, have in wanted:
            size = spec.inputs[0].shape[axis]
            step = image_step(spec, axis)
            want = size if isinstance(size, int) else round_up(max(have, spec.dims[_name(size)].min), step)
            if want < have or (not isinstance(size, int) and not spec.dims[_name(size)].allows(want)):
                raise OptionError(
                    f"the picture is {self.rows.width} x {self.rows.height}, but this model takes at most "
                    f"{spec.inputs[0]}"
                )
            sizes.append(want)
        return sizes[0], sizes[1]

    def _model_input(self, planes: Array) -> Array:
        """In the model's value range and channels: grey runs as three equal ones."""
        low, high = self.spec.value_range
        if (low, high) != (0.0, 1.0):
            planes = planes * np.float32(high - low) + np.float32(low)
        return np.repeat(planes, 3, axis=0) if self.spec.channels != planes.shape[0] else planes

    # -- out

    def _channels(self, part: int, parts: int) -> slice:
        """The channels of the result that a part gives."""
        if self.alpha and part == parts - 1:
            return slice(self.rows.channels - 1, self.rows.channels)
        return slice(0, 1 if self.grey else 3) if self.spec.channels != 1 else slice(part, part + 1)

    def store(self, values: Array, into: Array) -> None:
        """Model output (C', h, w) -> HWC of the result's dtype."""
        if values.shape[0] != into.shape[2]:  # grey comes back as one
            values = values.mean(axis=0, keepdims=True)
        low, high = self.spec.value_range
        if (low, high) != (0.0, 1.0):
            values = (values - np.float32(low)) / np.float32(high - low)
        into[...] = quantise(values, self.dtype).transpose(1, 2, 0)

    def _flat_alpha(self, result: Array) -> None:
        """Fill in an alpha that did not go through the model."""
        if self.rows.alpha_range is not None and not self.alpha:
            level = np.full(1, self.rows.alpha_range[0], np.float32)
            result[:, :, -1] = quantise(level, self.dtype)[0]

    def _clean_alpha(self, result: Array, top: int, alpha: Array, first: int) -> None:
        """What is wholly opaque or transparent stays so.

        `result`: rows of the output from `top` on; `alpha`: rows of the input, (1, h, W), from `first` on,
        one more on either side where the picture has them.
        """
        a, b = top // self.scale, -(-(top + len(result)) // self.scale)
        for value in (0.0, 1.0):
            keep = constant_runs(alpha, value)[a - first : b - first]
            keep = keep.repeat(self.scale, 0)[top - a * self.scale :][: len(result)].repeat(self.scale, 1)
            result[:, :, -1][keep] = quantise(np.full(1, value, np.float32), self.dtype)[0]

    def _step_done(self, total: int) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, total)

    # -- the three ways

    def tiles(self, result: Array) -> None:
        """Whole or in tiles, into `result`."""
        cut = self.plan.cut
        assert cut is not None
        self.done = 0
        self.above = None
        parts = self.inputs()
        total = len(parts) * len(cut.rows) * len(cut.columns)
        for i, planes in enumerate(parts):
            channels = self._channels(i, len(parts))

            def put(top: int, left: int, values: Array, channels: slice = channels) -> None:
                into = result[top : top + values.shape[1], left : left + values.shape[2], channels]
                self.store(values[:, : into.shape[0], : into.shape[1]], into)
                self._step_done(total)

            self.engine_seconds += run_grid(self.session, planes, cut, put, self.cancelled, self.plan.streams)
            self._verify([planes], (0, self.padded[0]), 0, result[:, :, channels])
            if self.cancelled():
                raise Cancelled("cancelled after the last tile")
        self._finish_alpha(result)

    def _verify(self, pieces: list[Array], known: tuple[int, int], top: int, result: Array) -> None:
        if self.verification is not None:
            self.verification.check(pieces, known, self.padded[0], top, result, self.store)

    def _finish_alpha(self, result: Array) -> None:
        """Of a whole result: what did not go through the model, and what is wholly opaque or transparent."""
        self._flat_alpha(result)
        if self.alpha:
            alpha = split(self.rows.read(0, self.rows.height))[1]
            assert alpha is not None
            self._clean_alpha(result, 0, alpha, 0)

    def lockstep(self, result: Array) -> None:
        """In tiles that wait for each other at each stage of the model, into `result`."""
        plan = self.plan
        assert plan.stages is not None
        self.done = 0
        self.above = None
        parts = self.inputs()
        for i, planes in enumerate(parts):
            channels = self._channels(i, len(parts))

            def put(top: int, values: Array, channels: slice = channels) -> None:
                into = result[top : top + values.shape[1], :, channels]
                self.store(values[:, : into.shape[0], : into.shape[1]], into)

            with closing(LockstepRun(plan.stages, planes, plan.tile or 1)) as run:
                total = len(parts) * run.steps
                run.run(put, self.cancelled, partial(self._step_done, total))
                self.engine_seconds += run.engine_seconds
        self._finish_alpha(result)

    def stream(self) -> Iterator[tuple[int, Array]]:
        """In bands: yields (first row, rows of the result), from the top down."""
        plan = self.plan
        assert plan.bands is not None
        cut = plan.bands.cut(self.padded[0], plan.tile or 1)
        width, height = self.rows.width * self.scale, self.rows.height * self.scale
        runs: list[BandRun] = []
        recent = _Recent()
        read: deque[tuple[Band, list[Array]]] = deque()  # what a place of the next rows may reach
        top = 0
        waiting = np.empty((0, width, self.rows.channels), self.dtype)  # rows from `top` on
        try:
            for band in cut:
                if self.cancelled():
                    raise Cancelled(f"cancelled before the band of rows {band.top} to {band.bottom}")
                parts = self.inputs(band.top, band.bottom)
                runs = runs or [BandRun(plan.bands, plan.strips, plan.streams) for _ in parts]
                pieces = [run.push(band, part) for run, part in zip(runs, parts, strict=True)]
                begin = top + len(waiting)
                end = min(begin + pieces[0].shape[1], height)
                result = np.empty((end - begin, width, self.rows.channels), self.dtype)
                for i, values in enumerate(pieces):
                    channels = self._channels(i, len(parts))
                    self.store(values[:, : end - begin, :width], result[:, :, channels])
                if self.verification is not None:
                    read.append((band, parts))
                    while read[0][0].bottom <= begin // self.scale - 2 * self.verification.reach:
                        read.popleft()
                    known = read[0][0].top, band.bottom
                    for i in range(len(parts)):
                        seen = result[:, :, self._channels(i, len(parts))]
                        self._verify([planes[i] for _, planes in read], known, begin // self.scale, seen)
                self._flat_alpha(result)
                if self.alpha:
                    # what alpha is below a row decides what becomes of it, so the last rows wait for theirs
                    recent.add(self.alpha_read)
                    result, bottom = np.concatenate((waiting, result)), end
                    if band.part != "last":
                        bottom = min(end, max(top, (band.bottom - 1) * self.scale))
                    result, waiting = result[: bottom - top], result[bottom - top :]
                    first, last = max(0, top // self.scale - 1), -(-bottom // self.scale) + 1
                    self._clean_alpha(result, top, recent.take(first, last), first)
                if len(result):
                    yield top, result
                top += len(result)
                self._step_done(len(cut))
        finally:
            for run in runs:
                self.engine_seconds += run.engine_seconds
                run.close()
        assert top == height


class _Recent:
    """Rows of alpha that have gone into the model, for as long as their results have not come out."""

    def __init__(self) -> None:
        self.rows: Array | None = None
        self.first = 0

    def add(self, rows: Array) -> None:
        self.rows = rows if self.rows is None else np.concatenate((self.rows, rows), axis=1)

    def take(self, first: int, last: int) -> Array:
        """Rows [first, last) as far as there are; those before are forgotten."""
        assert self.rows is not None
        self.rows = self.rows[:, first - self.first :]
        self.first = first
        return self.rows[:, : last - first]


def _name(size: Any) -> str:
    return str(getattr(size, "name", None) or size.dim)


def image_scale(spec: ModelSpec) -> int:
    """The probed scale of a picture-to-picture model. Raises `ModelLoadError` for any other."""
    scale = spec.scale
    out = spec.outputs[0].shape
    floats = all(t.dtype.kind == "f" for t in (*spec.inputs, *spec.outputs))
    batch = spec.inputs[0].shape[0]
    single = batch.allows(1) if isinstance(batch, Dim) else batch == 1
    if scale is None or not floats or not single or spec.channels not in (1, 3) or out[1] != spec.channels:
        found = "; ".join(map(str, (*spec.inputs, *spec.outputs)))
        raise ModelLoadError(
            "not a picture-to-picture model: expected one float NCHW input and output of 1 or 3 channels, in "
            f"a whole ratio of sizes; found {found}"
        )
    return scale


def as_check(cancel: Cancel | None) -> Callable[[], bool]:
    """Whether to stop, as a function. Raises `OptionError`."""
    if cancel is None:
        return lambda: False
    if hasattr(cancel, "is_set"):
        return cancel.is_set
    if not callable(cancel):
        raise OptionError(f"cancel must be an event or a function, not {type(cancel).__name__}")
    return cancel
