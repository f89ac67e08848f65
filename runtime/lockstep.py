"""Tiles in lockstep: a model with statistics of the whole picture, exactly, in memory for some of its rows.

All tiles go through one stage of the model (`anysize.exporters.stages`) before any goes through the next. In
between, the statistics are gathered over all tiles in float64; what later stages read is kept in files.
"""

from __future__ import annotations

import errno
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from anysize.backends.base import Array, Executable
from anysize.backends.errors import (
    Cancelled,
    ExecutionError,
    IntegrityError,
    MemoryBudgetError,
    NotStreamable,
    TimedOut,
)
from anysize.backends.spec import Dim
from anysize.exporters.exporting import random_feeds
from anysize.exporters.stages import Stage, StagedModel, staged_model, tile
from anysize.exporters.steps import Gathered, Rows, Shape
from anysize.guard import ShapeGuard, Stats
from anysize.limit import closing_in_time, in_time
from anysize.stale import Results, digest_of_feeds, digest_of_results
from anysize.tracing import span

#: rows of a tile
TILE = 64
#: What a stage was seen to hold, as a multiple of its three largest tensors for one tile
_HELD = 3
#: what it is verified on: rows and columns beyond the least, the first that it takes, in so many tiles; and
#: how close it has to come to the model in one
_VERIFIED, _VERIFIED_TILES, _VERIFIED_ERROR = ((67, 22), (63, 22), (78, 22), (100, 22)), 4, 1e-3
_OVER: dict[str, Callable[..., Any]] = {"mean": np.mean, "sum": np.sum, "max": np.max, "min": np.min}


class LockstepRunner:
    """A guard's model in stages. Thread-safe: each picture has programs and files of its own.

    A program lives for one stage of one picture: all at once would hold the buffers of all.
    """

    def __init__(self, guard: ShapeGuard) -> None:
        """Raises `NotStreamable`, `BackendUnavailableError`."""
        self.model = staged_model(guard.model)
        self.backend, self.options = guard.backend, replace(guard.options, precision="f32")
        self._stats = Stats(
            backend=guard.backend.name, device=guard.options.device, precision=guard.options.precision
        )
        self._lock = threading.Lock()
        self._verify(guard)

    def _verify(self, guard: ShapeGuard) -> None:
        """Hold the stages against the model in one, on noise, in f32, where it can be told whether they are
        right; then see that they run in the guard's precision. Raises `NotStreamable`.
        """
        spec = guard.spec
        axes = [size for size in spec.inputs[0].shape[2:] if isinstance(size, Dim)]
        rows: list[Array] = []
        for last, extra in enumerate(_VERIFIED, 1 - len(_VERIFIED)):
            sizes = {name: dim.min for name, dim in spec.dims.items()}
            sizes |= {dim.name: dim.floor(dim.min + n) for dim, n in zip(axes, extra, strict=True)}
            feeds = random_feeds(spec, sizes)
            planes = feeds[spec.inputs[0].name][0]
            try:
                run = LockstepRun(self, planes, max(1, planes.shape[1] // _VERIFIED_TILES))
                break
            except NotStreamable:  # it can be this size alone
                if not last:
                    raise
        try:
            with closing(self.backend.compile(guard.model, None, self.options)) as program:
                want = program.run(feeds)[self.model.output][0]
            with closing(run):
                run.run(lambda top, values: rows.append(values))
                if guard.options != self.options:
                    self.options = guard.options
                    run.run(lambda top, values: None)
        except (ExecutionError, IntegrityError) as error:
            text = f"{self.backend.name} does not run its stages in {self.options.precision}: {error}"
            raise NotStreamable(text) from error
        got = np.concatenate(rows, axis=1)
        allowed = _VERIFIED_ERROR * max(1.0, float(np.abs(want).max()))
        if got.shape != want.shape or not np.allclose(got, want, rtol=0, atol=allowed):
            raise NotStreamable("in stages, the model gives something else than in one")
        with self._lock:
            self._stats = replace(self._stats, calls=0, compiles=0, run_seconds=0.0, compile_seconds=0.0)

    def check(self, height: int, width: int, rows: int) -> None:
        """Raise `NotStreamable` where a picture of this size cannot be cut in tiles of so many rows."""
        _work(self.model, height, width, rows)

    def bytes(self, height: int, width: int, rows: int) -> int:
        """An estimate of the memory a run takes: that of the largest stage, for one tile."""
        shapes = self.model.shapes(height, width)
        count = max(1, height // rows)
        largest = 0
        for stage in self.model.stages:
            names = {*stage.stored, *stage.writes, *(step.output for step in stage.steps)}
            held = sorted(math.prod(shapes[name]) for name in names if name in shapes)
            largest = max(largest, sum(held[-3:]) // count)
        return _HELD * 4 * largest

    def compile(self, stage: Stage) -> Executable:
        started = time.perf_counter()
        with span("compile", backend=self.backend.name, shapes="any"):
            program = self.backend.compile(stage.model, None, self.options)
        with self._lock:
            self._stats.compiles += 1
            self._stats.compile_seconds += time.perf_counter() - started
        return program

    def count(self, seconds: float) -> None:
        """A run of a program that took so long."""
        with self._lock:
            self._stats.calls += 1
            self._stats.run_seconds += seconds

    def count_failure(self) -> None:
        """A run of a program that failed, or was found wrong."""
        with self._lock:
            self._stats.failed += 1

    def stats(self) -> list[Stats]:
        with self._lock:
            return [replace(self._stats)]

    def close(self) -> None:
        """Nothing is held between pictures."""


def _work(model: StagedModel, height: int, width: int, rows: int) -> tuple[dict[str, Shape], int]:
    """The shapes of all tensors and the number of tiles, seen through for all of them before any runs."""
    shapes = model.shapes(height, width)
    least = min(shapes[name][2] for stage in model.stages for name in stage.made)
    if not least:
        raise NotStreamable(f"a picture of {width} x {height} is too small for it")
    count = min(max(1, height // rows), least)
    for stage in model.stages:
        for i in range(count):
            stage.feeds(tile(shapes, stage.made, i, count), shapes)
    return shapes, count


class LockstepRun:
    """One picture's planes on their way through a `LockstepRunner`. Not thread-safe; close it."""

    def __init__(self, runner: LockstepRunner, planes: Array, rows: int) -> None:
        """`planes`: (C, H, W), the model's input; `rows`: of a tile. Raises `NotStreamable`."""
        self._runner, self._planes = runner, planes
        self._shapes, self._count = _work(runner.model, planes.shape[1], planes.shape[2], rows)
        self._results = Results()
        self._files: dict[str, _Scratch] = {}
        self._values: dict[str, Array] = {}
        self.steps = len(runner.model.stages) * self._count
        self.engine_seconds = 0.0

    def run(
        self,
        put: Callable[[int, Array], Any],
        cancelled: Callable[[], bool] = lambda: False,
        step_done: Callable[[], Any] = lambda: None,
    ) -> None:
        """Calls `put(first row, rows of the output, (C', h, W'))` for each tile, from the top down.

        Raises `Cancelled`, `ExecutionError` or `IntegrityError`, which name stage and tile, and
        `MemoryBudgetError` where the files do not fit on their disk.
        """
        stages = self._runner.model.stages
        for index, stage in enumerate(stages):
            rows_of: dict[str, list[Array]] = {gather.name: [] for gather in stage.gathers}
            for name in stage.writes:
                if name != self._runner.model.output:
                    self._files[name] = _Scratch(self._shapes[name])
            with closing_in_time(self._compiled(index, stage)) as program:
                for i in range(self._count):
                    if cancelled():
                        raise Cancelled(f"cancelled before tile {i} of stage {index}")
                    wanted = tile(self._shapes, stage.made, i, self._count)
                    try:
                        outputs = self._tile(program, stage, (index, i), wanted)
                    except (ExecutionError, IntegrityError, TimedOut):
                        self._runner.count_failure()
                        raise
                    for name in stage.writes:
                        values, first = outputs[f"stages/out/{name}"], wanted[name][0]
                        if name == self._runner.model.output:
                            put(first, values[0])
                        else:
                            self._files[name].write(first, values)
                    for gather in stage.gathers:
                        rows_of[gather.name].append(outputs[f"stages/rows/{gather.name}"])
                    step_done()
            for gather in stage.gathers:
                rows = np.concatenate(rows_of[gather.name], axis=2).astype(np.float64)
                over = _OVER[gather.kind](rows, axis=2, keepdims=True)
                self._values[gather.name] = np.asarray(over, np.float32)
            later = {name for following in stages[index + 1 :] for name in following.stored}
            for name in self._files.keys() - later:
                self._files.pop(name).close()

    def close(self) -> None:
        """Free the files."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def _compiled(self, index: int, stage: Stage) -> Executable:
        try:
            return in_time(partial(self._runner.compile, stage), f"compiling stage {index}")
        except TimedOut:
            raise
        except Exception as error:
            text = f"stage {index} cannot be compiled: {error}"
            raise ExecutionError(text, backend=self._runner.backend.name) from error

    def _tile(
        self,
        program: Executable,
        stage: Stage,
        place: tuple[int, int],
        wanted: Mapping[str, Rows],
        again: bool = False,
    ) -> dict[str, Array]:
        reads, feeds = stage.feeds(wanted, self._shapes)
        for name, (first, last) in reads.items():
            if name == self._runner.model.input:
                feeds[name] = np.ascontiguousarray(self._planes[None, :, first:last])
            else:
                feeds[name] = self._files[name].read(first, last)
        where: dict[str, Any] = {
            "backend": self._runner.backend.name,
            "shape": {name: feeds[name].shape for name in reads},
            "tile": (place[1], 0),
        }
        at = f"in stage {place[0]} of {len(self._runner.model.stages)}"
        feeds |= {name: self._values[name] for name in stage.known}
        started = time.perf_counter()
        try:
            with span("run", backend=where["backend"], shapes=where["shape"]):
                outputs = in_time(partial(program.run, feeds), at)
        except TimedOut as error:
            raise TimedOut(error.message, **where) from error
        except Exception as error:  # each engine has its own classes
            raise ExecutionError(f"{at}, the engine failed: {error}", **where) from error
        seconds = time.perf_counter() - started
        self.engine_seconds += seconds
        self._runner.count(seconds)
        for name, shape in self._due(stage, wanted).items():
            got = outputs[name].shape if name in outputs else None
            if got != shape:
                raise IntegrityError(f"{at}, '{name}' came back wrong", got=got, want=shape, **where)
            if not np.isfinite(outputs[name]).all():
                text = f"{at}, '{name}' holds values that are not finite"
                raise IntegrityError(text, got="NaN or infinity", want="numbers", **where)
        given = hash((place[0], digest_of_feeds(feeds)))
        result = hash((place[0], digest_of_results(outputs.values())))
        if self._results.earlier(given, result) and not again:
            # where values are cut off, it may well be right
            with closing_in_time(self._compiled(place[0], stage)) as fresh:
                if digest_of_results(self._tile(fresh, stage, place, wanted, again=True).values()) != (
                    digest_of_results(outputs.values())
                ):
                    text = f"{at}, the engine returned an earlier result again"
                    raise IntegrityError(text, got="an earlier result", want="a new one", **where)
        return outputs

    def _due(self, stage: Stage, wanted: Mapping[str, Rows]) -> dict[str, Shape]:
        """The shapes that a stage's outputs must have."""
        due: dict[str, Shape] = {}
        for name in stage.writes:
            n, c, _, w = self._shapes[name]
            due[f"stages/out/{name}"] = (n, c, wanted[name][1] - wanted[name][0], w)
        for gather in stage.gathers:
            first, last = wanted[gather.source]
            n, c, _, w = self._of_rows(gather)
            due[f"stages/rows/{gather.name}"] = (n, c, last - first, w)
        return due

    def _of_rows(self, gather: Gathered) -> Shape:
        """The shape of a gathered value, of one row: rows laid along the last axis have one column."""
        n, c, _, w = self._shapes[gather.name if gather.name in self._shapes else gather.source]
        return n, c, 1, w


@contextmanager
def _on_disk() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MemoryBudgetError(
            f"what waits between stages cannot be kept in {tempfile.gettempdir()}: {error.strerror}; the "
            "environment variable TMPDIR names another folder"
        ) from error


class _Scratch:
    """A tensor on disk, row after row; read and written, not mapped, which would count as memory held.

    Raises `MemoryBudgetError` where the disk is full.
    """

    def __init__(self, shape: Shape) -> None:
        _, self.channels, _, self.width = shape
        self._row = 4 * self.channels * self.width
        with _on_disk():
            self._file = tempfile.TemporaryFile(prefix="anysize-", buffering=0)  # noqa: SIM115

    def write(self, first: int, rows: Array) -> None:
        data = np.ascontiguousarray(rows[0].transpose(1, 0, 2)).reshape(-1).view(np.uint8).data
        with _on_disk():
            self._file.seek(first * self._row)
            while data:
                data = data[self._file.write(data) :]

    def read(self, first: int, last: int) -> Array:
        rows = np.empty((last - first, self.channels, self.width), np.float32)
        data = rows.reshape(-1).view(np.uint8).data
        with _on_disk():
            self._file.seek(first * self._row)
            while data:
                done = self._file.readinto(data)
                if not done:
                    raise OSError(errno.EIO, "a file is shorter than what was written to it")
                data = data[done:]
        return np.ascontiguousarray(rows.transpose(1, 0, 2))[None]

    def close(self) -> None:
        self._file.close()
