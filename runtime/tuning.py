"""What runs fastest on this machine, by a short measurement: bands, tiles, streams, live programs.

The figures are kept in the cache by model, engine, precision and processor; `planning` weighs them against
what the halos of a picture's strips or tiles cost.
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from anysize.backends.base import Array, cores
from anysize.backends.cache import Cache
from anysize.backends.errors import BackendUnavailableError, NotStreamable, OptionError
from anysize.backends.spec import Dim
from anysize.exporters.bands import ROWS
from anysize.exporters.exporting import random_feeds, sizes_near
from anysize.exporters.radius import image_step
from anysize.guard import Sequence, log
from anysize.limit import in_time
from anysize.memory import Held, available, measure, resident

if TYPE_CHECKING:
    from anysize.session import Session

#: seconds after which nothing more is measured
SECONDS = 15.0
#: columns of the bands that are measured, in all strips together
_COLUMNS = 1024
#: of the pixels that a band has without this
_BANDS = (1.0, 2.0, 0.5)
#: sides of tiles with their halo
_TILES = (256, 640, 448)
#: programs for pictures of this many pixels may take this part of the free memory
_PROGRAM_PIXELS, _PART = 256 * 256, 0.1
_LIVE = range(2, 9)
#: a case this much slower than the fastest so far is measured once and let go
_SLOW = 0.75


@dataclass(frozen=True)
class Speed:
    """`streams` bands or tiles at the same time, of about `pixels` each, take in `per_second` pixels.

    Pixels of halos count.
    """

    method: str
    streams: int
    pixels: int
    per_second: float


@dataclass(frozen=True)
class Tuned:
    """What was measured: of the way the model runs, how many programs may stay alive, and their memory."""

    speeds: tuple[Speed, ...]
    max_live: int
    held: Held | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Tuned:
        fields = json.loads(text)
        speeds = tuple(Speed(**speed) for speed in fields["speeds"])
        return cls(speeds, fields["max_live"], fields["held"] and Held(**fields["held"]))


def processor() -> str:
    """Its name and the numbers that tell it from others of that name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        facts.setdefault(key.strip(), value.strip())
    numbers = [facts[key] for key in ("cpu family", "model", "stepping") if key in facts]
    return " ".join([facts.get("model name", platform.machine()), "/".join(numbers)]).strip()


def known(session: Session) -> Tuned | None:
    """What was measured before for this model on this engine and machine."""
    kept = _kept(session)
    data = kept and kept[0].get(*kept[1])
    try:
        return None if data is None else Tuned.from_json(data.decode())
    except (KeyError, TypeError, ValueError):  # nothing of ours: not known
        return None


def is_kept(session: Session) -> bool:
    """Whether there is a cache to keep what is measured in, and a way to know this model again."""
    return _kept(session) is not None


def tune(session: Session, say: Callable[[str], Any] = lambda text: None) -> Tuned:
    """Measure the session's first engine, keep and return; the session's pictures go by it from now on.

    Takes half a minute: a model so slow that this is not enough for all is measured on what there is time
    for. `max_live` counts for sessions that are loaded later. Raises `OptionError` for a model that is not
    picture in, picture out, and what a run raises.
    """
    if session.spec.scale is None or not all(isinstance(s, Dim) for s in session.spec.inputs[0].shape[2:]):
        raise OptionError("only models of one picture of any size to one picture can be tuned")
    started = time.perf_counter()
    with session.alone() as alone:
        live = _live(alone)
        try:
            alone.bands()
            speeds = _measure(alone, _Bands, _BANDS, started, say)
        except (NotStreamable, BackendUnavailableError):
            speeds = _measure(alone, _Tiles, _TILES, started, say)
    say("memory")
    tuned = Tuned(speeds, live, in_time(partial(measure, session), "while memory is measured"))
    kept = _kept(session)
    if kept is not None:
        kept[0].put(tuned.to_json().encode(), *kept[1])
    session.tuned = tuned
    log.info("tuned in %.1f s: %s", time.perf_counter() - started, tuned)
    return tuned


def _kept(session: Session) -> tuple[Cache, tuple[str, ...]] | None:
    """Where what is measured is kept, and its key; None without a cache or a way to know the model again."""
    guard = session._guards[0]
    model = guard.model.digest or guard.spec.source_sha256
    options, backend = guard.options, guard.backend
    if options.cache is None or not model:
        return None
    asked = (options.precision, options.device, str(options.threads), str(cores()), guard.strategy)
    return options.cache, ("tuned", model, backend.name, backend.version, *asked, processor())


def _live(session: Session) -> int:
    """Programs that may stay alive, from what one was seen to take."""
    spec = session.spec
    feeds = random_feeds(spec, sizes_near(spec, 128))
    before = resident()
    session.run(feeds)
    rows, columns = feeds[spec.inputs[0].name].shape[2:]
    taken = max(resident() - before, 2**20) * max(1, _PROGRAM_PIXELS / (rows * columns))
    fit = int(available() * _PART / taken)
    return min(max(fit, _LIVE[0]), _LIVE[-1])


class _Bands:
    """Bands in the middle of a picture, in as many strips as streams, without halos."""

    method = "stream"

    def __init__(self, session: Session, streams: int, size: float) -> None:
        runner = session.bands()
        guard = runner.guards["middle"]
        step, name = image_step(session.spec, 3), guard.spec.inputs[0].name
        columns = session.spec.inputs[0].shape[3]
        assert isinstance(columns, Dim)
        width = columns.floor(max(columns.min, _COLUMNS // streams // step * step))
        self.pixels = int(runner.band_pixels * size)
        rows = runner.default_band(width, self.pixels)
        feeds = random_feeds(guard.spec, {ROWS: rows, columns.name: width})
        states = {other: np.zeros_like(feeds[other]) for other in guard.model.states}
        self._window = {name: feeds[name]}
        self.taken = streams * rows * width
        self._sequences: list[Sequence] = []
        try:
            for _ in range(streams):
                self._sequences.append(guard.begin(self._window, states, streams))
        except BaseException:
            self.close()
            raise

    def run(self, stream: int) -> None:
        self._sequences[stream].run(self._window)

    def close(self) -> None:
        for sequence in self._sequences:
            sequence.close()
        self._sequences = []


class _Tiles:
    """As many tiles as streams."""

    method = "tile"

    def __init__(self, session: Session, streams: int, size: float) -> None:
        spec = session.spec
        self._session, self._streams = session, streams
        self._feeds: dict[str, Array] = random_feeds(spec, sizes_near(spec, int(size)))
        self.pixels = int(size) ** 2
        rows, columns = self._feeds[spec.inputs[0].name].shape[2:]
        self.taken = streams * rows * columns

    def run(self, stream: int) -> None:
        self._session.run(self._feeds, streams=self._streams)

    def close(self) -> None:
        pass


def _measure(
    session: Session,
    kind: type[_Bands] | type[_Tiles],
    sizes: tuple[float, ...],
    started: float,
    say: Callable[[str], Any],
) -> tuple[Speed, ...]:
    """Cases in turns, for as long as there is time; those begin that are likely to be done in it.

    What is clearly slower than another does not take part in the turns, and lets go of its programs.
    """
    backend, threads = session._guards[0].backend, session._guards[0].options.threads or cores()
    counts = {1, 2, threads // 2, threads} if backend.has_streams and session.spec.radius is not None else {1}
    wanted = [(n, size) for size in sizes for n in sorted(counts) if 1 <= n <= threads]
    cases: dict[tuple[int, float], _Bands | _Tiles] = {}
    seconds: dict[tuple[int, float], list[float]] = {}
    fast: list[tuple[int, float]] = []
    slowest = 0.0  # seconds per pixel, of making a case ready and running it

    def left() -> float:
        return SECONDS - (time.perf_counter() - started)

    def speed(key: tuple[int, float]) -> float:
        return cases[key].taken / statistics.median(seconds[key])

    with ThreadPoolExecutor(max(counts)) as pool:

        def timed(case: _Bands | _Tiles, streams: int) -> float:
            begun = time.perf_counter()
            # a limit of time holds in the threads of the pool too
            runs = [pool.submit(copy_context().run, case.run, stream) for stream in range(streams)]
            for run in runs:
                run.result()
            return time.perf_counter() - begun

        try:
            for n, size in wanted:
                begun = time.perf_counter()
                area = kind.method == "tile"
                likely = slowest * (n * size**2 if area else n * session.bands().band_pixels * size)
                if cases and likely > left():
                    continue
                say(f"{kind.method}, {n} at a time")
                case = cases[n, size] = kind(session, n, size)
                timed(case, n)
                seconds[n, size] = [timed(case, n)]
                slowest = max(slowest, (time.perf_counter() - begun) / case.taken)
                fast = [key for key in cases if speed(key) >= _SLOW * max(map(speed, cases))]
                for key in cases.keys() - fast:
                    cases[key].close()
            say("in turns")
            while sum(seconds[key][-1] for key in fast) < left() and len(fast) > 1:
                for key in fast:
                    seconds[key].append(timed(cases[key], key[0]))
        finally:
            for case in cases.values():
                case.close()
    return tuple(Speed(kind.method, key[0], case.pixels, speed(key)) for key, case in cases.items())
