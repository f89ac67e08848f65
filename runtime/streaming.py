"""Bands of rows through a model's three graphs: the whole picture's result, nothing computed twice."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import ExecutionError, IntegrityError, ModelLoadError, NotStreamable, TimedOut
from anysize.backends.spec import Dim
from anysize.exporters.bands import ROWS, BandModel, band_model
from anysize.exporters.cost import working_bytes
from anysize.guard import Sequence, ShapeGuard, Stats, Strategy
from anysize.stale import RepeatedError, Results, digest, digest_of_results
from anysize.tiling import Span, round_up

#: Pixels of a band at four bytes a number: with fewer, more of the work is copying rows; with more, less
#: stays in the caches. Measured on two Zen 4 cores at width 1024, as part of the raw engine's speed.
#: RRDBNet-6: f32 with 8 rows 0.85, 12 0.85, 16 0.89, 24 0.86, 32 0.84; bf16 with 16 0.87, 24 0.89, 32 0.89.
#: Compact: f32 with 8 rows 0.88, 16 0.90, 24 0.92; bf16 0.89 with 16 to 32.
BAND_PIXELS = 16384
SHORTEST_BAND, TALLEST_BAND = 8, 128
#: A wide picture is cut in strips of at least this many columns, and of so many times the halo's width that
#: their halos stay cheap: 16 bands of 8 x 8192 with Compact held 2.0 GiB and ran at 0.8 of the speed of
#: strips of 1024
STRIP, STRIP_HALOS = 1024, 24
#: What programs were seen to hold, as a multiple of the tensors alive at once in the three graphs: 2.1
#: (RRDBNet-6) to 3.9 (Compact). Engines hold states twice, reorder them, and take and give copies.
_HELD = 4


@dataclass(frozen=True)
class Band:
    """Rows [top, bottom) of the input go through the graph `part`."""

    part: str
    top: int
    bottom: int


class BandRunner:
    """A guard's model in bands. Thread-safe; its programs are checked and counted as the guard's are."""

    def __init__(self, guard: ShapeGuard) -> None:
        """Raises `NotStreamable`, `BackendUnavailableError`."""
        self.model: BandModel = band_model(guard.model)
        if guard.backend.prefers_static:
            self._readable(guard)
        # states can be kept inside a program of fixed shapes only; an engine that gains nothing from such
        # programs has one for all widths
        shapes: Strategy = "static" if guard.backend.prefers_static else "dynamic"
        self.guards = {
            part: ShapeGuard(guard.backend, getattr(self.model, part), guard.options, shapes, guard.max_live)
            for part in ("first", "middle", "last")
        }
        spec = guard.spec
        self.input, self.output = spec.inputs[0].name, spec.outputs[0].name
        self.scale = spec.scale or 1
        columns = spec.inputs[0].shape[3]
        assert isinstance(columns, Dim)
        self._columns = columns.name
        #: of all bands of all pictures
        self.results = Results()
        self._itemsize = 2 if guard.options.precision == "bf16" else 4

    def _readable(self, guard: ShapeGuard) -> None:
        """Raises `NotStreamable` where the engine refuses one of the graphs, which are not its usual fare."""
        for part in (self.model.first, self.model.middle, self.model.last):
            assert part.spec is not None
            try:
                guard.backend.metadata(part)
            except ModelLoadError:  # OpenVINO takes some at fixed sizes only
                sizes = {name: dim.min for name, dim in part.spec.dims.items()}
                try:
                    guard.backend.compile(part, part.spec.input_shapes(sizes), guard.options).close()
                except (ModelLoadError, ExecutionError) as error:
                    raise NotStreamable(f"in bands of rows, {error}") from error

    @property
    def band_pixels(self) -> int:
        """Pixels of a band that keeps the activations in the cache."""
        return BAND_PIXELS * 4 // self._itemsize

    def default_band(self, width: int, pixels: int | None = None) -> int:
        """Rows per band for a width and a number of pixels (None: `band_pixels`)."""
        rows = 8 * round((pixels or self.band_pixels) / width / 8)
        return round_up(min(max(rows, SHORTEST_BAND), TALLEST_BAND), self.model.step)

    def default_strip(self, width: int, radius: int | None) -> int:
        """Columns of a strip, without halos; all of them where cutting does not pay."""
        core = max(STRIP, STRIP_HALOS * (radius or 0))
        return width if radius is None or width < 2 * core else core

    def shortest(self) -> int:
        """The least height that can be cut in bands."""
        return self.model.warm_up + self.model.step

    def cut(self, height: int, rows: int) -> list[Band]:
        """Cut a height: the first band takes what is left over, so that all others are alike."""
        step = self.model.step
        inner = (height - self.shortest()) // rows
        top = height - step - inner * rows
        ends = [0, *(top + i * rows for i in range(inner + 1)), height]
        parts = ["first", *["middle"] * inner, "last"]
        return [Band(part, a, b) for part, a, b in zip(parts, ends[:-1], ends[1:], strict=True)]

    def bytes(self, height: int, width: int, rows: int, strips: int, streams: int = 1) -> int:
        """An estimate of what the three programs and their states take, all alive at once."""
        total = 0
        for part, band in {b.part: b for b in self.cut(height, rows)}.items():
            guard = self.guards[part]
            sizes = {ROWS: band.bottom - band.top, self._columns: width}
            total += streams * (working_bytes(guard.model, sizes) or 0)
            if part == "middle":
                shapes = guard.spec.input_shapes(sizes)
                total += 4 * strips * sum(math.prod(shapes[name]) for name in self.model.middle.states)
        return _HELD * total

    def stats(self) -> list[Stats]:
        return [guard.stats() for guard in self.guards.values()]

    def close(self) -> None:
        for guard in self.guards.values():
            guard.close()


class BandRun:
    """One picture's planes on their way through a `BandRunner`. Not thread-safe; close it."""

    def __init__(self, runner: BandRunner, strips: tuple[int, tuple[Span, ...]], streams: int = 1) -> None:
        """`strips`: columns as `tiling.spans` cuts them; `streams` of them run at the same time."""
        self._runner = runner
        self._extent, self._columns = strips
        self._streams = streams
        self._pool = ThreadPoolExecutor(streams) if streams > 1 else None
        self._states: list[dict[str, Array]] = [{} for _ in self._columns]
        self._sequences: list[Sequence | None] = [None for _ in self._columns]
        #: by strip, digests of the rows whose results have not come back
        self._rows: list[list[int]] = [[] for _ in self._columns]
        self._pushed = 0
        self.engine_seconds = 0.0

    def push(self, band: Band, pixels: Array) -> Array:
        """Run the next band, (C, rows, W) model input; return the output rows now there, (C', rows, W*scale).

        Raises `ExecutionError` or `IntegrityError`, whose `tile` is the band and the strip.
        """
        started = time.perf_counter()
        strips = range(len(self._columns))
        if self._pool is None:
            runs: list[Callable[[], Array]] = [partial(self._strip, band, pixels, s) for s in strips]
        else:
            futures = [self._pool.submit(copy_context().run, self._strip, band, pixels, s) for s in strips]
            wait(futures)
            runs = [future.result for future in futures]
        parts = []
        for strip, run in enumerate(runs):
            try:
                parts.append(run())
            except (ExecutionError, IntegrityError, TimedOut) as error:  # shared by several
                column = self._columns[strip].start
                window = pixels[None, :, :, column : column + self._extent]
                error.tile, error.shape = (self._pushed, strip), {self._runner.input: window.shape}
                raise
        self.engine_seconds += time.perf_counter() - started
        self._pushed += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2)

    def _strip(self, band: Band, pixels: Array, strip: int) -> Array:
        column, scale = self._columns[strip], self._runner.scale
        window = np.ascontiguousarray(pixels[None, :, :, column.start : column.start + self._extent])
        result = self._run(band.part, strip, window)
        self._is_new(strip, window, result)
        left, right = ((edge - column.start) * scale for edge in (column.first, column.last))
        return result[0, :, :, left:right]

    def _run(self, part: str, strip: int, window: Array) -> Array:
        runner, feeds = self._runner, {self._runner.input: window}
        guard, sequence = runner.guards[part], self._sequences[strip]
        if part == "middle":
            if sequence is None:
                sequence = guard.begin(feeds, self._states[strip], self._streams)
                self._sequences[strip], self._states[strip] = sequence, {}
            return sequence.run(feeds)[runner.output]
        if sequence is not None:
            self._states[strip] = sequence.states()
        outputs = guard.run({**feeds, **self._states[strip]}, finite=True, streams=self._streams)
        self._states[strip] = {name: outputs[following] for name, following in guard.model.states.items()}
        return outputs[runner.output]

    def _is_new(self, strip: int, window: Array, result: Array) -> None:
        """Raises `RepeatedError` for what was returned for other rows; the same rows may have the same."""
        rows = self._rows[strip]
        rows += [digest(window[0, :, row]) for row in range(window.shape[2])]
        count = result.shape[2] // self._runner.scale
        given, self._rows[strip] = hash(tuple(rows[:count])), rows[count:]
        if self._runner.results.earlier(given, digest_of_results([result])):
            raise RepeatedError(
                "the engine returned an earlier band's result again",
                backend=self._runner.guards["first"].backend.name,
                got="an earlier result",
                want="a new one",
            )

    def close(self) -> None:
        """Let go of the programs."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        for sequence in self._sequences:
            if sequence is not None:
                sequence.close()
        self._sequences = []
