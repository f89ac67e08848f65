"""Uniform tiles: geometry as data, and the loop that runs a model over them.

All tiles of a picture have one shape; the last ones shift inwards. So a tile border that lies on the
picture's border *is* the picture's border, with the same padding inside the model, and every other
border is a halo wide of the pixels taken from the tile.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import Cancelled, ExecutionError, IntegrityError, OptionError
from anysize.session import Session

Store = Callable[[Array], Array]


@dataclass(frozen=True)
class Tiling:
    """How a picture is cut.

    `method`: "whole" runs it at once, "tile" in tiles, "auto" whole while small. `tile`: side in input
    pixels of the part of a tile that is kept (None: chosen). `overlap`: "exact" is a halo of the model's
    receptive radius, which gives the whole-picture result; an integer is a halo of that many pixels,
    and asking for one below the radius is accepting an error, which is then measured and reported.
    """

    method: Literal["auto", "tile", "whole"] = "auto"
    tile: int | None = None
    overlap: Literal["exact"] | int = "exact"

    def __post_init__(self) -> None:
        if self.method not in ("auto", "tile", "whole"):
            raise OptionError(f"method must be auto, tile or whole, not {self.method!r}")
        if self.tile is not None and (type(self.tile) is not int or self.tile < 1):
            raise OptionError(f"tile must be a positive number of pixels, not {self.tile!r}")
        if self.overlap != "exact" and (type(self.overlap) is not int or self.overlap < 0):
            raise OptionError(f"overlap must be 'exact' or a number of pixels >= 0, not {self.overlap!r}")


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
    session: Session,
    planes: Array,
    cut: Grid,
    canvas: Array,
    store: Store,
    step_done: Callable[[], Any],
    cancelled: Callable[[], bool],
) -> float:
    """Run `session` over every tile of `planes`, (C, H, W), into `canvas`, (C', H*s, W*s); engine seconds.

    `store` converts a finished float part to the canvas's dtype. Every pixel of the canvas is written
    once. An error of the engine or in what it returned names the tile and ends the call.
    """
    scale = session.spec.scale
    assert scale is not None
    seconds = 0.0
    for i, row in enumerate(cut.rows):
        for j, column in enumerate(cut.columns):
            if cancelled():
                raise Cancelled(f"cancelled before tile (row {i}, column {j})")
            try:
                part, spent = run_window(session, planes, cut.shape, row, column)
            except (ExecutionError, IntegrityError) as error:
                error.tile = (i, j)
                raise
            seconds += spent
            canvas[:, row.first * scale : row.last * scale, column.first * scale : column.last * scale] = (
                store(part)
            )
            step_done()
    return seconds


def run_window(
    session: Session, planes: Array, shape: tuple[int, int], row: Span, column: Span
) -> tuple[Array, float]:
    """Run one tile; return the part it has to write, (C', h*s, w*s), and the seconds in the engine."""
    scale = session.spec.scale or 1
    name, out = session.spec.inputs[0].name, session.spec.outputs[0].name
    window = planes[None, :, row.start : row.start + shape[0], column.start : column.start + shape[1]]
    started = time.perf_counter()
    result = session.run({name: np.ascontiguousarray(window)}, finite=True)[out]
    seconds = time.perf_counter() - started
    top, left = (row.first - row.start) * scale, (column.first - column.start) * scale
    height, width = (row.last - row.first) * scale, (column.last - column.first) * scale
    return result[0, :, top : top + height, left : left + width], seconds


def measured_error(
    session: Session, planes: Array, cut: Grid, radius: int, steps: tuple[int, int], patch: int = 32
) -> float:
    """The largest difference that a halo below `radius` makes, in units of the model's output.

    Measured where it matters most: at the inner corners of the two tiles of this picture whose corner
    has the strongest edges, against the same patch run with the exact halo.
    """
    worst = 0.0
    for row, column in _busiest_corners(planes, cut, patch):
        got, _ = run_window(session, planes, cut.shape, row, column)
        height, width = min(patch, row.last - row.first), min(patch, column.last - column.first)
        scale = session.spec.scale or 1
        want_rows, tall = _around(row.first, height, planes.shape[1], radius, steps[0])
        want_columns, wide = _around(column.first, width, planes.shape[2], radius, steps[1])
        want, _ = run_window(session, planes, (tall, wide), want_rows, want_columns)
        difference = got[:, : height * scale, : width * scale] - want
        worst = max(worst, float(np.abs(difference).max()))
    return worst


def _around(first: int, size: int, limit: int, radius: int, step: int) -> tuple[Span, int]:
    """A window with an exact halo around [first, first + size), aligned to `step`."""
    start = max(0, first - radius) // step * step
    stop = min(limit, round_up(first + size + radius, step))
    return Span(start, first, first + size), stop - start


def _busiest_corners(planes: Array, cut: Grid, patch: int) -> list[tuple[Span, Span]]:
    def energy(row: Span, column: Span) -> float:
        around = planes[
            :,
            max(0, row.first - patch) : row.first + patch,
            max(0, column.first - patch) : column.first + patch,
        ]
        return sum(float(np.abs(np.diff(around, axis=axis)).sum()) for axis in (1, 2))

    corners = [(row, column) for row in cut.rows for column in cut.columns if row.first or column.first]
    return sorted(corners, key=lambda spans: energy(*spans), reverse=True)[:2]
