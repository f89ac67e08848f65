"""Results held against the model itself: random places of a picture, computed once more by another path."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import IntegrityError, OptionError, ShapeError
from anysize.exporters.radius import image_step
from anysize.session import Session
from anysize.tiling import Span, around, run_window

#: first and last, as of a slice
Pair = tuple[int, int]
#: side of a place, in input pixels, and the part of a picture's work that is done again
_SIDE, _SHARE = 64, 0.05
#: of the values' range, what engines differ by between shapes of one model, and what rounding makes of that
_F32, _ROUNDED = 1e-3, 0.03
#: what shorter halos cost is measured on a few places, and other places may err more
_BEYOND = 4


class Verifier:
    """Computes places of pictures again, alone, with an exact halo, by programs of its own. Thread-safe.

    Raises `OptionError` for a model whose reach is not known: no part of a picture stands for itself.
    """

    def __init__(self, session: Session) -> None:
        if session.spec.radius is None or not session.spec.tileable:
            raise OptionError(
                "this model looks at the whole picture, so no part of it can be computed again to verify it; "
                "`anysize parity` holds engines against each other"
            )
        self._session, self.radius = session.alone(), session.spec.radius
        self._steps = image_step(session.spec, 2), image_step(session.spec, 3)
        self._random = random.Random()
        self.scale, self.backend, self.close = session.spec.scale or 1, session.backend, self._session.close

    def place(self, low: int, high: int) -> Pair:
        """A random part of [low, high)."""
        side = min(_SIDE, high - low)
        start = self._random.randint(low, high - side)
        return start, start + side

    def alone(self, planes: Array, known: Pair, height: int, row: Pair, column: Pair) -> Array | None:
        """The result there, (C', h, w), of a crop; None where the model does not take one of its size."""
        rows, tall = around(Span(0, *row), height, _SIDE, self.radius, self._steps[0])
        columns, wide = around(Span(0, *column), planes.shape[2], _SIDE, self.radius, self._steps[1])
        begin, end = max(rows.start, known[0]), min(rows.start + tall, known[1])
        inside = Span(0, row[0] - begin, row[1] - begin)
        window = planes[:, begin - known[0] : end - known[0]]
        try:
            return run_window(self._session, window, (end - begin, wide), inside, columns)[0]
        except ShapeError:
            return None

    def begin(self, max_error: float | None) -> Verification:
        """Of one picture, whose tiles err by so much where that was measured (None: by nothing)."""
        rough = self._session._guards[0].options.precision != "f32"
        tolerance = (_ROUNDED if rough else _F32) + _BEYOND * (max_error or 0.0)
        return Verification(self, tolerance, self._random.random())


class Verification:
    """Of one picture. `places`: how many were computed again so far; `seconds`: in how long."""

    def __init__(self, verifier: Verifier, tolerance: float, due: float) -> None:
        self._of, self._tolerance, self._due = verifier, tolerance, due
        self.reach, self.places, self.seconds = verifier.radius, 0, 0.0

    def check(
        self,
        pieces: list[Array],
        known: Pair,
        height: int,
        top: int,
        result: Array,
        store: Callable[[Array, Array], None],
    ) -> None:
        """Hold some places of a result against the model; raises `IntegrityError` where they differ.

        `pieces`: (C, h, W) each, the model's input, of the `known` rows [first, last) of a picture that is
        `height` rows high. `result`: what came of its rows from `top` on, HWC as `store` made it of the
        model's output.
        """
        v = self._of
        scale, reach = v.scale, v.radius
        bottom = top + len(result) // scale
        low = max(top, known[0] + reach if known[0] else 0)
        high = min(bottom, known[1] - reach if known[1] < height else height)
        self._due += _SHARE * (bottom - top) * result.shape[1] / scale / (_SIDE + 2 * reach) ** 2
        if known[1] == height and not self.places:  # at least one
            self._due += 1
        started = time.perf_counter()
        while self._due >= 1 and low < high:
            self._due -= 1
            row, column = v.place(low, high), v.place(0, result.shape[1] // scale)
            planes = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=1)
            want = v.alone(planes, known, height, row, column)
            if want is None:
                continue
            rows = slice((row[0] - top) * scale, (row[1] - top) * scale)
            got = result[rows, column[0] * scale : column[1] * scale]
            again = np.empty_like(got)
            store(want, again)
            full = 1.0 if got.dtype.kind == "f" else float(np.iinfo(got.dtype).max)
            off = float(np.abs(got.astype(np.float64) - again).max()) / full
            self.places += 1
            if not off <= self._tolerance + (0 if got.dtype.kind == "f" else 1 / full):
                raise IntegrityError(
                    f"verification: rows {row[0]} to {row[1]}, columns {column[0]} to {column[1]} are not "
                    f"what the model gives there alone: they differ by {255 * off:.2f}/255",
                    backend=v.backend,
                    shape=(row, column),
                    got=off,
                    want=self._tolerance,
                )
        self.seconds += time.perf_counter() - started
