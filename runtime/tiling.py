"""Uniform tiles: geometry as data, and the loop that runs a model over them.

All tiles of a picture have one shape; the last ones shift inwards. So a tile border that lies on the
picture's border *is* the picture's border, with the same padding inside the model, and every other
border is a halo wide of the pixels taken from the tile.
"""

from __future__ import annotations

import math
import re
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import Cancelled, ExecutionError, IntegrityError, OptionError, TimedOut
from anysize.session import Session

#: takes the first output row and column of a part, (C', h, w) float, and the part
Put = Callable[[int, int, Array], Any]


Method = Literal["auto", "stream", "tile", "whole", "lockstep"]
METHODS: tuple[Method, ...] = get_args(Method)


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut.

    `method`: "stream" runs bands of rows through a model taken apart for it, "tile" tiles, "whole" the
    picture at once, "lockstep" all tiles through each stage of a model with statistics of the whole picture,
    which may not be tiled otherwise; "auto" streams where the model allows, small pictures whole, and tiles
    otherwise, in lockstep where memory is limited to less than the whole takes. "stream", "lockstep" and
    "whole" give the same result. `tile`: side in input pixels of the part of a tile that is kept, or rows of
    a band or of a tile in lockstep (None: chosen). `overlap` of tiles: "exact" is a halo of the model's
    receptive radius, which gives the whole-picture result; an integer is a halo of that many pixels, and
    asking for one below the radius is accepting an error, which is then measured and reported. `memory`: the
    most the process may hold, in bytes or as text such as "2GiB" (None: what the machine has left); kept by
    estimates of what engines take, on the safe side, or by what `anysize tune` measured of this model.
    """

    method: Method = "auto"
    tile: int | None = None
    overlap: Literal["exact"] | int = "exact"
    memory: int | str | None = None

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise OptionError(f"method must be one of {', '.join(METHODS)}, not {self.method!r}")
        if self.tile is not None and (type(self.tile) is not int or self.tile < 1):
            raise OptionError(f"tile must be a positive number of pixels, not {self.tile!r}")
        if self.overlap != "exact" and (type(self.overlap) is not int or self.overlap < 0):
            raise OptionError(f"overlap must be 'exact' or a number of pixels >= 0, not {self.overlap!r}")
        if self.overlap != "exact" and self.method in ("stream", "lockstep"):
            raise OptionError(f"leave overlap at 'exact' with method '{self.method}', which has none")
        object.__setattr__(self, "memory", parse_bytes(self.memory))


_UNITS = {"": 1} | {
    f"{letter}{kind}B": base ** (i + 1)
    for i, letter in enumerate("KMGT")
    for kind, base in (("", 1000), ("I", 1024))
}


def as_tiling(tiling: Tiling | None) -> Tiling:
    """A `Tiling` out of what callers give. Raises `OptionError`."""
    if tiling is None:
        return Tiling()
    if not isinstance(tiling, Tiling):
        raise OptionError(f"tiling must be a Tiling, not {tiling!r}")
    return tiling


def parse_bytes(size: int | str | None) -> int | None:
    """A number of bytes, or text like "2GiB", "500 MB". Raises `OptionError`."""
    if size is None:
        return None
    match = re.fullmatch(r"\s*([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMGT]I?B|)\s*", str(size).upper())
    number = 0 if match is None or isinstance(size, (bool, float)) else float(match[1]) * _UNITS[match[2]]
    if number < 1:
        raise OptionError(
            "memory must be a number of bytes, or one with a unit (KB, MB, GB, TB or KiB, MiB, GiB, TiB), "
            f"not {str(size)[:40]!r}"
        )
    return int(number)


@dataclass(frozen=True)
class Span:
    """One tile along one axis: it reads [start, start + extent) and writes [first, last)."""

    start: int
    first: int
    last: int


@dataclass(frozen=True)
class Grid:
    """The tiles of one picture: `shape` is every tile's (height, width), all numbers input pixels."""

    shape: tuple[int, int]
    rows: tuple[Span, ...]
    columns: tuple[Span, ...]

    @property
    def work(self) -> float:
        """Pixels computed per pixel of the picture."""
        done = len(self.rows) * self.shape[0] * len(self.columns) * self.shape[1]
        return done / (self.rows[-1].last * self.columns[-1].last)


def round_up(value: int, step: int) -> int:
    return step * math.ceil(value / step)


def spans(size: int, core: int, halo: int, step: int) -> tuple[int, tuple[Span, ...]]:
    """Cut one axis. `size` is a multiple of `step`; so will be all starts and the extent.

    Returns the extent of every tile, and the spans, whose written parts cover [0, size) once.
    """
    core, halo = round_up(core, step), round_up(halo, step)
    extent = min(size, core + 2 * halo)
    count = math.ceil((size - extent) / core) + 1
    starts = [min(i * core, size - extent) for i in range(count)]
    # A tile takes over as soon as its halo has passed; the first and the last reach the picture's ends.
    firsts = [0, *(s + halo for s in starts[1:])]
    lasts = [*firsts[1:], size]
    return extent, tuple(map(Span, starts, firsts, lasts))


def grid(height: int, width: int, core: int, halo: int, steps: tuple[int, int]) -> Grid:
    """Cut a picture of (height, width), which are multiples of `steps`."""
    tall, rows = spans(height, core, halo, steps[0])
    wide, columns = spans(width, core, halo, steps[1])
    return Grid((tall, wide), rows, columns)


def run_grid(
    session: Session, planes: Array, cut: Grid, put: Put, cancelled: Callable[[], bool], streams: int = 1
) -> float:
    """Run `session` over every tile of `planes`, (C, H, W), `streams` at the same time; engine seconds.

    Each result is given to `put`, in order and in this thread; every output pixel is put once. An error of
    the engine or in what it returned names the tile and ends the call.
    """
    scale = session.spec.scale
    assert scale is not None
    seconds, waited = 0.0, deque[tuple[int, int, Future[tuple[Array, float]]]]()

    def run(i: int, j: int) -> tuple[Array, float]:
        if cancelled():
            raise Cancelled(f"cancelled before tile (row {i}, column {j})")
        return run_window(session, planes, cut.shape, cut.rows[i], cut.columns[j], streams)

    def store(i: int, j: int, done: Callable[[], tuple[Array, float]]) -> float:
        try:
            result, seconds = done()
        except (ExecutionError, IntegrityError, TimedOut) as error:  # shared by several
            error.tile = (i, j)
            raise
        put(cut.rows[i].first * scale, cut.columns[j].first * scale, result)
        return seconds

    places = [(i, j) for i in range(len(cut.rows)) for j in range(len(cut.columns))]
    if streams == 1:
        return sum(store(i, j, partial(run, i, j)) for i, j in places)
    with ThreadPoolExecutor(streams) as pool:
        try:
            for i, j in places:
                waited.append((i, j, pool.submit(copy_context().run, run, i, j)))
                if len(waited) > streams:
                    row, column, future = waited.popleft()
                    seconds += store(row, column, future.result)
            while waited:
                row, column, future = waited.popleft()
                seconds += store(row, column, future.result)
        finally:
            pool.shutdown(cancel_futures=True)
    return seconds / streams


def run_window(
    session: Session, planes: Array, shape: tuple[int, int], row: Span, column: Span, streams: int = 1
) -> tuple[Array, float]:
    """Run one tile; return the part it has to write, (C', h*s, w*s), and the seconds in the engine."""
    scale = session.spec.scale or 1
    name, out = session.spec.inputs[0].name, session.spec.outputs[0].name
    window = planes[None, :, row.start : row.start + shape[0], column.start : column.start + shape[1]]
    started = time.perf_counter()
    result = session.run({name: np.ascontiguousarray(window)}, finite=True, streams=streams)[out]
    seconds = time.perf_counter() - started
    top, left = (row.first - row.start) * scale, (column.first - column.start) * scale
    height, width = (row.last - row.first) * scale, (column.last - column.first) * scale
    return result[0, :, top : top + height, left : left + width], seconds


def measured_error(
    session: Session, planes: Array, cut: Grid, radius: int, steps: tuple[int, int], patch: int = 32
) -> float:
    """The largest difference seen that a halo below `radius` makes, in units of the model's output.

    Measured where it is largest: on the patches along this picture's inner tile borders that have the
    strongest edges, against the same patches run with the exact halo. It is a sample, not a bound.
    """
    worst = 0.0
    for row, column in _busiest_patches(planes, cut, patch):
        got, _ = run_window(session, planes, cut.shape, row, column)
        rows, tall = around(row, planes.shape[1], patch, radius, steps[0])
        columns, wide = around(column, planes.shape[2], patch, radius, steps[1])
        want, _ = run_window(session, planes, (tall, wide), rows, columns)
        worst = max(worst, float(np.abs(got - want).max()))
    return worst


def whole_error(session: Session, planes: Array, cut: Grid) -> float:
    """The largest difference of all tiles from the whole picture, in units of the model's output.

    For models of unknown reach, where no smaller piece of the picture can stand for the whole.
    """
    height, width = planes.shape[1:]
    whole, _ = run_window(session, planes, (height, width), Span(0, 0, height), Span(0, 0, width))
    scale = session.spec.scale or 1
    worst = 0.0
    for row in cut.rows:
        for column in cut.columns:
            got, _ = run_window(session, planes, cut.shape, row, column)
            rows, columns = (slice(s.first * scale, s.last * scale) for s in (row, column))
            worst = max(worst, float(np.abs(got - whole[:, rows, columns]).max()))
    return worst


def around(span: Span, limit: int, patch: int, radius: int, step: int) -> tuple[Span, int]:
    """A window with at least an exact halo around the span's written part, and its extent.

    The extent is the same for all patches of a picture, so that they share one program.
    """
    # a patch may begin between the model's grid lines, hence step - 1
    extent = min(limit, round_up(patch + step - 1, step) + 2 * round_up(radius, step))
    start = max(0, span.first - round_up(radius, step)) // step * step
    return Span(min(start, limit - extent), span.first, span.last), extent


def _busiest_patches(planes: Array, cut: Grid, patch: int, count: int = 4) -> list[tuple[Span, Span]]:
    """Patches that start at a tile's inner top or left border, with the strongest edges around them."""

    def pieces(span: Span) -> list[Span]:
        ends = range(span.first, span.last, patch)
        return [Span(span.start, first, min(first + patch, span.last)) for first in ends]

    candidates = []
    for row in cut.rows:
        for column in cut.columns:
            rows, columns = pieces(row), pieces(column)
            candidates += [(r, columns[0]) for r in rows if column.first]
            candidates += [(rows[0], c) for c in columns if row.first]
    edges = np.zeros((planes.shape[1] + 1, planes.shape[2] + 1))
    edges[2:, 1:] += np.abs(np.diff(planes, axis=1)).sum(axis=0)
    edges[1:, 2:] += np.abs(np.diff(planes, axis=2)).sum(axis=0)
    edges = edges.cumsum(axis=0).cumsum(axis=1)

    def energy(spans: tuple[Span, Span]) -> float:
        (top, bottom), (left, right) = (
            (max(0, span.first - patch), min(size, span.last + patch))
            for span, size in zip(spans, planes.shape[1:], strict=True)
        )
        return float(edges[bottom, right] - edges[top, right] - edges[bottom, left] + edges[top, left])

    return sorted(candidates, key=energy, reverse=True)[:count]
