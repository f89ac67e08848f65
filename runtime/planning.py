"""Which way a picture goes through a model: in bands, whole, or in tiles, and within what memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from anysize.backends.base import Array
from anysize.backends.errors import (
    BackendUnavailableError,
    MemoryBudgetError,
    NotStreamable,
    OptionError,
)
from anysize.backends.spec import Dim
from anysize.exporters.radius import image_step
from anysize.limit import in_time
from anysize.lockstep import TILE, LockstepRunner
from anysize.memory import available, resident
from anysize.session import Session
from anysize.streaming import BandRunner
from anysize.tiling import Grid, Span, Tiling, grid, measured_error, round_up, spans, whole_error
from anysize.tuning import Speed

#: "auto" runs pictures up to this many pixels whole: below, compiling two more programs takes longer than
#: bands could save, and the result is the same
WHOLE_PIXELS = 256 * 256
#: "auto" takes an exact halo while it costs less than this many times the picture's own pixels
MAX_EXACT_WORK = 2.5
#: ... and otherwise the smallest of these halos whose measured error stays below the bound
HALOS = (16, 32, 48, 64, 96, 128)
HALO_ERROR = 0.5 / 255
_LARGEST_TILE = 640
_SMALLEST_TILE = 32
#: A band's result exists as floats, rounded, as bytes, as the writer's chunks and in its queue; and the first
#: and last bands give some rows more than they are given
_COPIES, _BEYOND = 5, 16
#: What a program was seen to hold, as a multiple of the tensors alive at once (0.8 to 1.9 on three engines),
#: and what an engine takes beside it with its first program (5 to 35 MiB)
_HELD, _ENGINE = 2, 40 * 2**20
#: where a limit of time ended: taking a model apart, and what has to be imported for that, can take seconds
_PLANNING = "while it was planned how to run"

#: gives the model's input planes, (C, H, W) each, where a plan has to measure on the picture
Inputs = Callable[[], list[Array]]


@dataclass(frozen=True)
class Plan:
    """How one picture runs, and why. All sizes in input pixels.

    `cut`: the tiles, for the methods tile (and whole, which is one); `bands` runs `strips` (an extent and the
    columns it is cut in) of `tile` rows, for the method stream; `stages` runs tiles of `tile` rows, for the
    method lockstep. `streams` strips or tiles run at the same time. The rest as in `Report`.
    """

    method: str
    reason: str
    tile: int | None = None
    overlap: int | None = None
    exact: bool = True
    max_error: float | None = None
    cut: Grid | None = None
    bands: BandRunner | None = None
    strips: tuple[int, tuple[Span, ...]] = (0, ())
    streams: int = 1
    stages: LockstepRunner | None = None


def make_plan(session: Session, tiling: Tiling, height: int, width: int, held: int, inputs: Inputs) -> Plan:
    """Choose for a padded picture of (height, width); `held`: bytes its pixels and the result will take.

    Raises `OptionError` for a request the model cannot serve, `NotStreamable`, `MemoryBudgetError`,
    `TimedOut`.
    """
    planner = _Planner(session, tiling, height, width, held)
    if not planner.limited and planner.spare < 0:
        raise MemoryBudgetError(planner.short(0))
    return in_time(partial(planner.plan, inputs), _PLANNING)


def fit_together(session: Session, height: int, width: int, held: int, most: int) -> int:
    """How many padded pictures of this size, `most` at most, can run at once in the memory that is left.

    Raises `MemoryBudgetError` where not even one can, `TimedOut`.
    """
    planner = _Planner(session, Tiling("whole"), height, width, held)
    for count in range(most, 0, -1):
        cost = in_time(partial(planner.fits, height, width, count), _PLANNING)
        if not cost:
            return count
    raise MemoryBudgetError(planner.short(cost))


def stream_plan(session: Session, tiling: Tiling, height: int, width: int, held: int) -> Plan | None:
    """The same where bands will run, which needs no look at the pixels; else None."""
    planner = _Planner(session, tiling, height, width, held)
    return in_time(planner.streamed, _PLANNING) if planner.may_stream() else None


class _Planner:
    def __init__(self, session: Session, tiling: Tiling, height: int, width: int, held: int) -> None:
        self.session, self.tiling, self.height, self.width = session, tiling, height, width
        self.spec = session.spec
        self.steps = (image_step(self.spec, 2), image_step(self.spec, 3))
        self.fixed = any(isinstance(s, int) for s in self.spec.inputs[0].shape[2:])
        self.asked = tiling.tile is not None or tiling.overlap != "exact"
        self.why_not = ""  # no bands
        assert not isinstance(tiling.memory, str)
        # without a limit by the caller, the machine's own: nobody wants to be ended by it
        self.limited, self.held = tiling.memory is not None, held
        self.budget = available() if tiling.memory is None else tiling.memory
        self.spare = self.budget - held - (resident() if self.limited else 0)

    # -- bands

    def may_stream(self) -> bool:
        """Whether bands are wanted at all; `streamed` says whether they can be."""
        if self.tiling.method == "auto":
            return not (self.asked or self.fixed or self.height * self.width <= WHOLE_PIXELS)
        return self.tiling.method == "stream"

    def streamed(self) -> Plan | None:
        """The plan in bands, or None, and then why not in `why_not`."""
        try:
            bands = self.session.bands()
        except (NotStreamable, BackendUnavailableError) as error:
            if self.tiling.method == "stream":
                raise
            self.why_not = str(error)
            return None
        step = bands.model.step
        if self.height < bands.shortest():
            self.why_not = f"{self.height} rows are fewer than the {bands.shortest()} that bands begin with"
            return None
        if self._least() > 1 and self.height <= self._least():
            self.why_not = "the picture is as small as the model takes"
            return None
        radius = self.spec.radius
        speeds = self._speeds("stream", bands.band_pixels)
        speed = min(speeds, key=lambda s: self._strip_seconds(bands, s))
        core, streams = self._core(bands, speed), speed.streams
        rows = bands.default_band(core, speed.pixels)
        rows = min(round_up(self.tiling.tile, step) if self.tiling.tile else rows, self.height)
        while True:
            halo = 0 if core >= self.width else radius or 0
            strips = spans(self.width, core, halo, self.steps[1])
            streams = min(streams, len(strips[1]))
            if not self.limited:
                break
            taken = bands.bytes(self.height, strips[0], rows, len(strips[1]), streams)
            cost = taken + self._beside(rows) + _ENGINE
            if cost <= self.spare:
                break
            if rows > max(8, step) and self.tiling.tile is None:
                rows = max(round_up(rows // 2, step), step)
            elif streams > 1:
                streams -= 1
            elif radius is not None and core > max(2 * radius, _SMALLEST_TILE):
                core = round_up(core // 2, self.steps[1])
            else:
                self.why_not = self.short(cost)
                if self.tiling.method == "stream":
                    raise MemoryBudgetError(self.why_not)
                return None
        reason = "the model runs in bands of rows, which is exact and computes nothing twice"
        if len(strips[1]) > 1:
            reason += f"; {len(strips[1])} strips of columns with an exact halo, for the cache or the memory"
        if streams > 1:
            reason += f"; {streams} at a time"
        return Plan("stream", reason, rows, halo, bands=bands, strips=strips, streams=streams)

    def _speeds(self, method: str, pixels: int) -> list[Speed]:
        """What was measured here for this way; else the default alone, whose speed compares with nothing."""
        asked = self.session.streams
        found = self.session.tuned.speeds if self.session.tuned else ()
        fit = [s for s in found if s.method == method and asked in (None, s.streams)]
        return fit or [Speed(method, asked or 1, pixels, 1.0)]

    def _core(self, bands: BandRunner, speed: Speed) -> int:
        """Columns of a strip, without halos: at least as many strips as run at the same time."""
        core = bands.default_strip(self.width, self.spec.radius)
        count = -(-self.width // core)
        if speed.streams == 1 or self.spec.radius is None:
            return core
        count = speed.streams * -(-count // speed.streams)
        # the outermost strips have a halo on one side only
        inner = -(-(self.width - 2 * self.spec.radius) // count)
        return round_up(max(inner, self.spec.radius, _SMALLEST_TILE), self.steps[1])

    def _strip_seconds(self, bands: BandRunner, speed: Speed) -> float:
        """Seconds a row takes in strips that run at this speed."""
        core = self._core(bands, speed)
        halo = 0 if core >= self.width else self.spec.radius or 0
        extent, columns = spans(self.width, core, halo, self.steps[1])
        return _turns(len(columns), speed.streams) * extent / speed.per_second

    def _tile_seconds(self, cut: Grid, speed: Speed) -> float:
        tiles = len(cut.rows) * len(cut.columns)
        return _turns(tiles, speed.streams) * cut.shape[0] * cut.shape[1] / speed.per_second

    def _least(self) -> int:
        """The smallest height the model takes."""
        size = self.spec.inputs[0].shape[2]
        return size.min if isinstance(size, Dim) else 0

    def _beside(self, rows: int) -> int:
        """Bytes of a band outside the engine: its result as floats, rounded, and waiting to be written."""
        pixels = (rows + _BEYOND) * self.width * (self.spec.scale or 1) ** 2
        return 4 * (self.spec.channels or 3) * pixels * _COPIES

    def short(self, cost: int) -> str:
        """Why this is too much: what there is, what is needed, and what would do."""
        budget = f"{self.budget >> 20} MiB" if self.budget >= 2**20 else f"{self.budget} bytes"
        held, need, now = ((n + 2**20 - 1) >> 20 for n in (self.held, cost, resident()))
        model = f"about {need} MiB more" if cost else "some more"
        if self.limited:
            return (
                f"a memory limit of {budget} is too little for this picture: {now + held} MiB are taken by "
                f"the process and the picture, and the model needs {model}; allow "
                f"{now + held + need} MiB"
            )
        return (
            f"the {budget} of memory that are left here are too little: the picture and its result take "
            f"{held} MiB and the model {model}; make the picture smaller, or insist with a "
            f"memory limit of {now + held + need} MiB"
        )

    # -- the rest

    def plan(self, inputs: Inputs) -> Plan:
        method = self.tiling.method
        if method in ("tile", "lockstep") and self.fixed:
            raise OptionError(
                f"this model takes one size only ({self.spec.inputs[0]}), so it cannot be tiled"
            )
        if method == "lockstep":
            return self._in_lockstep("as asked")
        if self.may_stream():
            streamed = self.streamed()
            if streamed is not None:
                return streamed
        reason = self.why_not or "as asked"
        small = self.height * self.width <= WHOLE_PIXELS
        if method in ("auto", "stream"):
            tileable = self.spec.tileable or self.asked
            if self.fixed:
                method, reason = "whole", "the model takes one size only"
            elif method == "stream" or not tileable or (small and not self.asked):
                method = "whole"
                reason = self.why_not or (
                    "a picture this small gains nothing from being cut"
                    if small
                    else "the model cannot be tiled"
                )
            else:
                method = "tile"
        if method == "whole":
            cost = self.fits(self.height, self.width)
            if not cost:
                cut = grid(self.height, self.width, max(self.height, self.width), 0, self.steps)
                return Plan("whole", reason, cut=cut)
            if self.tiling.method == "whole":
                raise MemoryBudgetError(self.short(cost))
            if not self.spec.tileable:
                return self._or_in_lockstep(cost)
            reason = self.short(cost)
        plan = self._tiled(inputs)
        return replace(plan, reason="; ".join(filter(None, (reason, plan.reason))))

    def _or_in_lockstep(self, cost: int) -> Plan:
        """Where the whole takes too much memory and plain tiles would change the result."""
        try:
            return self._in_lockstep(self.short(cost))
        except (NotStreamable, BackendUnavailableError) as error:
            raise MemoryBudgetError(f"{self.short(cost)}; {error}") from error

    def _in_lockstep(self, reason: str) -> Plan:
        """The whole picture's result in tiles of rows, smaller ones where memory asks for it."""
        stages = self.session.lockstep()
        rows = min(self.tiling.tile or TILE, self.height)
        while (cost := stages.bytes(self.height, self.width, rows) + _ENGINE) > self.spare:
            if self.tiling.tile is not None or rows <= _SMALLEST_TILE:
                raise MemoryBudgetError(self.short(cost))
            rows = max(_SMALLEST_TILE, rows // 2)
        stages.check(self.height, self.width, rows)
        reason += "; all tiles go through each stage of the model together, which is exact"
        return Plan("lockstep", reason, rows, 0, stages=stages)

    def fits(self, height: int, width: int, streams: int = 1) -> int:
        """0 if a program for this size stays within the memory allowed, else the bytes it takes."""
        if not self.limited and height * width * streams <= WHOLE_PIXELS:
            return 0
        names = [s.name for s in self.spec.inputs[0].shape[2:] if isinstance(s, Dim)]
        sizes = {name: dim.min for name, dim in self.spec.dims.items()}
        alive = self.session.working_bytes({**sizes, **dict(zip(names, (height, width), strict=False))})
        if alive is None and not self.limited:
            return 0
        if alive is None:
            raise MemoryBudgetError(
                "the memory this model takes cannot be told in advance: convert it to a .onnx file of one "
                "piece, or set no limit"
            )
        pixels = height * width * (self.spec.scale or 1) ** 2
        waiting = (streams + 1) * 4 * (self.spec.channels or 3) * pixels if streams > 1 else 0
        measured = self.session.tuned and self.session.tuned.held
        alive *= streams
        cost = (measured.bytes(alive) if measured else _HELD * alive + _ENGINE) + waiting
        return cost if cost > self.spare else 0

    def _tiled(self, inputs: Inputs) -> Plan:
        if self.tiling.overlap != "exact":
            return self._checked(self._grid(self.tiling.tile or 256, self.tiling.overlap), inputs)
        if self.spec.radius is None or not self.spec.tileable:
            raise OptionError(
                "this model has no known receptive radius (it looks at the whole picture, or its file does "
                "not tell), so exact tiles are impossible; use method 'whole', or 'lockstep' where it is for "
                "statistics of the whole picture, or insist with an overlap in pixels"
            )
        radius = self.spec.radius
        if self.tiling.method == "tile" or self.tiling.tile is not None:
            return self._checked(self._grid(self.tiling.tile or max(128, 512 - 2 * radius), radius), inputs)
        sizes = {math.isqrt(speed.pixels): None for speed in self._speeds("tile", _LARGEST_TILE**2)}
        cuts = [self._grid(max(128, side - 2 * radius), radius) for side in sizes]
        cheap = [c for c in cuts if c[0].work <= MAX_EXACT_WORK] or cuts
        cut = min(cheap, key=lambda c: self._tile_seconds(c[0], self._tile_speed(c[0])))
        if cut[0].work <= MAX_EXACT_WORK:
            reason = f"tiles with an exact halo cost {cut[0].work:.2f} times the picture's own pixels"
            return replace(self._checked(cut, inputs), reason=reason)
        for halo in HALOS:  # the smallest that is good enough on this picture's own busiest tiles
            plan = self._checked(self._grid(_LARGEST_TILE - 2 * halo, halo), inputs)
            if plan.exact or (plan.max_error or 0.0) <= HALO_ERROR:
                break
        reason = (
            f"tiles with an exact halo would cost {cut[0].work:.2f} times the picture's own pixels; a halo "
            f"of {plan.overlap} errs by {255 * (plan.max_error or 0.0):.2f}/255 where its edges are strongest"
        )
        return replace(plan, reason=reason)

    def _grid(self, core: int, halo: int) -> tuple[Grid, int, int]:
        """Tiles with their core and halo; a core nobody asked for shrinks into the memory allowed."""
        while True:
            cut = grid(self.height, self.width, core, halo, self.steps)
            cost = self.fits(*cut.shape)
            if not cost:
                return cut, core, halo
            if self.tiling.tile is not None or core <= _SMALLEST_TILE:
                raise MemoryBudgetError(self.short(cost))
            core = max(_SMALLEST_TILE, core // 2)

    def _checked(self, tiles: tuple[Grid, int, int], inputs: Inputs) -> Plan:
        """The plan for these tiles, its error measured where they are not exact."""
        cut, core, halo = tiles
        single = len(cut.rows) == len(cut.columns) == 1
        known = self.spec.radius if self.spec.tileable else None
        exact = single or (known is not None and halo >= known)
        error = None
        reason = ""
        if not exact and known is None and self.fits(self.height, self.width):
            reason = "how far tiles are off is not known: the whole picture does not fit into the memory"
        elif not exact:
            low, high = self.spec.value_range
            errors = [
                whole_error(self.session, part, cut)
                if known is None
                else measured_error(self.session, part, cut, known, self.steps)
                for part in inputs()
            ]
            error = max(errors) / (high - low)
        tile = max(round_up(core, step) for step in self.steps)
        overlap = max(round_up(halo, step) for step in self.steps)
        streams = min(self._tile_speed(cut).streams, len(cut.rows) * len(cut.columns))
        while streams > 1 and self.fits(*cut.shape, streams):
            streams -= 1
        return Plan("tile", reason, tile, overlap, exact, error, cut, streams=streams)

    def _tile_speed(self, cut: Grid) -> Speed:
        """The best way to run these tiles: of the sizes that were measured, the nearest counts."""
        speeds = self._speeds("tile", _LARGEST_TILE**2)
        area = cut.shape[0] * cut.shape[1]
        nearest = min(abs(s.pixels - area) for s in speeds)
        fit = [s for s in speeds if abs(s.pixels - area) == nearest]
        return min(fit, key=lambda s: self._tile_seconds(cut, s))


def _turns(parts: int, streams: int) -> int:
    """Parts that the slowest of the streams has to run, as many times as there are streams."""
    return streams * -(-parts // streams)
