"""An engine that goes wrong at any of its calls: a right picture, or an error that says where."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import pytest
from anysize import ExecutionError, IntegrityError, OptionError, Tiling, TimedOut, Upscaler, time_limit
from anysize.backends import EngineOptions, get_backend
from anysize.files import read_picture, write_picture
from anysize.guard import ShapeGuard
from anysize.session import Session
from conftest import ENGINES, ToyBox
from fuzzing import NIGHTLY
from toys import Faulty, image_spec, nearest, not_a_number, numpy_session, raises, too_large, too_small

Outputs = dict[str, np.ndarray]
#: takes what an engine returned
Fault = Callable[[Outputs], Outputs]
#: seconds a hanging engine is waited for
LIMIT = 0.3


class Remembers:
    """A fault of calls since the one numbered `at`, `count` of them, that takes what came before."""

    def __init__(self, at: int, count: int = 1) -> None:
        self.at, self.count, self.calls = at, count, 0
        self.last: dict[tuple[int, ...], Outputs] = {}

    def __call__(self, outputs: Outputs) -> Outputs:
        shapes = tuple(size for name in sorted(outputs) for size in outputs[name].shape)
        given = outputs
        if self.at <= self.calls < self.at + self.count and shapes in self.last:
            given = self.wrong(outputs, self.last[shapes])
        self.calls += 1
        self.last[shapes] = self.kept(outputs, given)
        return given

    def wrong(self, outputs: Outputs, last: Outputs) -> Outputs:
        raise NotImplementedError

    def kept(self, outputs: Outputs, given: Outputs) -> Outputs:
        return {name: array.copy() for name, array in outputs.items()}


class Stale(Remembers):
    """The last result of these shapes again."""

    def wrong(self, outputs: Outputs, last: Outputs) -> Outputs:
        return {name: array.copy() for name, array in last.items()}

    def kept(self, outputs: Outputs, given: Outputs) -> Outputs:
        return {name: array.copy() for name, array in given.items()}


class Late(Remembers):
    """Each result one call too late."""

    def wrong(self, outputs: Outputs, last: Outputs) -> Outputs:
        return last


class Aliased(Remembers):
    """Each result in the memory of the last."""

    def wrong(self, outputs: Outputs, last: Outputs) -> Outputs:
        for name, array in last.items():
            array[...] = outputs[name]
        return last

    def kept(self, outputs: Outputs, given: Outputs) -> Outputs:
        return given


def at_once(fault: Fault) -> Callable[[int], Fault]:
    """A fault of one call."""

    def make(at: int) -> Fault:
        calls = iter(range(10**9))
        return lambda outputs: fault(outputs) if next(calls) == at else outputs

    return make


FAULTS: dict[str, Callable[[int], Fault]] = {
    "fails": at_once(raises),
    "NaN": at_once(not_a_number),
    "too large": at_once(too_large),
    "too small": at_once(too_small),
    "nothing": at_once(lambda outputs: {}),
    "stale": Stale,
    "stale from then on": lambda at: Stale(at, 10**9),
    "late from then on": lambda at: Late(at, 10**9),
    "aliased from then on": lambda at: Aliased(at, 10**9),
}
#: how a picture of (height, width) is cut, and in how many calls
CUTS = {
    "grid of 5 x 5": (Tiling("tile", 8), (40, 40), 25),
    "stream of 12 bands": (Tiling("stream", 4), (43, 17), 12),
}
#: torch takes no graphs, so nothing runs in bands
GRAPH_ENGINES = [engine for engine in ENGINES if engine != "torch"]
WAYS = [(e, cut) for e in ENGINES for cut in CUTS if e in GRAPH_ENGINES or CUTS[cut][0].method == "tile"]


class Case:
    """A x2 model on an engine that will go wrong, and what it makes of two pictures where it does not."""

    def __init__(self, toybox: ToyBox, engine: str, cut: str, folder: Path, streams: int = 1) -> None:
        self.toybox, self.engine, self.folder, self.streams = toybox, engine, folder, streams
        self.tiling, self.size, self.calls = CUTS[cut]
        rng = np.random.default_rng(0)
        pictures = [rng.integers(0, 256, (*self.size, 3), np.uint8) for _ in range(2)]
        self.files = [folder / "a.png", folder / "b.png"]
        for file, pixels in zip(self.files, pictures, strict=True):
            write_picture(file, pixels)
        upscaler = self.upscaler(get_backend(engine))
        totals: set[int] = set()
        self.want = [upscaler(p, progress=lambda done, total: totals.add(total)) for p in pictures]
        assert totals == {self.calls}
        assert upscaler.report is not None
        assert upscaler.report.method == self.tiling.method

    def upscaler(self, engine: Any) -> Upscaler:
        model = self.toybox.model("Doubling", engine)
        session = Session([ShapeGuard(engine, model, EngineOptions(), "auto", 4)])
        session.streams = self.streams
        return Upscaler(session, tiling=self.tiling)

    def outcome(self, make: Callable[[int], Fault], call: int, limit: float | None = None) -> str:
        """Of the second picture, in whose course the engine goes wrong, and after it of the first again."""
        fault = make(self.calls + call)
        engine = Faulty(get_backend(self.engine), fault, *range(4 * self.calls))
        upscaler, out = self.upscaler(engine), self.folder / "out.png"
        assert self.right(upscaler, 0)
        started, caught = time.monotonic(), None
        try:
            with nullcontext() if limit is None else time_limit(limit):
                assert self.right(upscaler, 1), f"a wrong picture, from call {call}"
            outcome = "right picture"
        except (ExecutionError, IntegrityError, TimedOut) as error:
            outcome, caught = type(error).__name__, error
        if caught is not None:
            assert caught.tile is not None
            assert caught.backend == self.engine
            assert not out.exists()
        assert time.monotonic() - started < (limit or 60) + 5
        assert {f.name for f in self.folder.iterdir()} <= {"a.png", "b.png", "out.png"}
        out.unlink(missing_ok=True)
        engine.at = ()
        assert self.right(upscaler, 0)
        assert self.right(upscaler, 1)
        upscaler.close()
        return outcome

    def right(self, upscaler: Upscaler, which: int) -> bool:
        out = self.folder / "out.png"
        anysize.upscale_file(self.files[which], out, upscaler)
        pixels = read_picture(out).array.astype(int)
        right = bool(np.abs(pixels - self.want[which]).max() <= 1)  # tiles after bands may round otherwise
        out.unlink()
        return right


@pytest.mark.parametrize(("engine", "cut"), WAYS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_call_of_a_picture_may_go_wrong(
    engine: str, toybox: ToyBox, tmp_path: Path, fault: str, cut: str, record_property: Callable[..., None]
) -> None:
    case = Case(toybox, engine, cut, tmp_path)
    outcomes = Counter(case.outcome(FAULTS[fault], call) for call in range(case.calls))
    if fault.startswith("aliased"):  # each is used before the next comes
        assert set(outcomes) <= {"right picture", "IntegrityError"}
    elif fault.startswith(("stale", "late")):  # bands are done again, in tiles
        assert outcomes == {"IntegrityError" if case.tiling.method == "tile" else "right picture": case.calls}
    else:
        assert outcomes == {"ExecutionError" if fault == "fails" else "IntegrityError": case.calls}
    record_property("cases", case.calls)
    record_property("outcomes", json.dumps(outcomes))


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs an engine with streams")
@pytest.mark.parametrize(
    "fault", ["fails", "stale from then on", "late from then on", "aliased from then on"]
)
def test_tiles_that_run_at_the_same_time(
    toybox: ToyBox, tmp_path: Path, fault: str, record_property: Callable[..., None]
) -> None:
    case = Case(toybox, "openvino", "grid of 5 x 5", tmp_path, streams=2)
    outcomes = Counter(case.outcome(FAULTS[fault], call) for call in range(case.calls))
    record_property("cases", case.calls)
    record_property("outcomes", json.dumps(outcomes))


@pytest.mark.parametrize(("engine", "cut"), WAYS if NIGHTLY else WAYS[:2])
def test_a_hanging_engine_is_left_at_the_limit(
    engine: str, toybox: ToyBox, tmp_path: Path, cut: str, record_property: Callable[..., None]
) -> None:
    case, go_on = Case(toybox, engine, cut, tmp_path), threading.Event()

    def hangs(outputs: Outputs) -> Outputs:
        go_on.wait(60)
        return outputs

    try:
        outcomes = Counter(case.outcome(at_once(hangs), call, LIMIT) for call in range(case.calls))
    finally:
        go_on.set()
    assert outcomes == {"TimedOut": case.calls}
    record_property("cases", case.calls)
    record_property("outcomes", json.dumps(outcomes))


def test_the_same_result_may_be_right_for_several(backend: str, toybox: ToyBox) -> None:
    """Values cut off at 0 and 1: other pictures, the same result."""
    engine = Faulty(get_backend(backend), raises)
    session = Session([ShapeGuard(engine, toybox.model("Threshold", engine), EngineOptions(), "auto", 4)])
    dark = [np.full((1, 3, 8, 8), level, np.float32) for level in (0.0, 0.1, 0.2, 0.0)]
    for x in dark:
        np.testing.assert_array_equal(session(x), 0.25)
    # two more runs for each of the two that repeat another's, of a new program the first time
    assert engine.calls == len(dark) + 4
    assert session.stats.compiles == 2
    assert session.stats.discarded == 1


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_bands_that_come_twice_are_done_in_tiles(toybox: ToyBox, engine: str) -> None:
    upscale = toybox.upscaler("Threshold", engine, Tiling("stream", 8))
    ramp = np.linspace(0, 0.2, 64, dtype=np.float32)[:, None, None] * np.ones((1, 8, 3), np.float32)
    np.testing.assert_array_equal(upscale(ramp), 0.25)
    assert upscale.report is not None
    assert upscale.report.method == "tile"


def test_memory_of_inputs_is_not_returned() -> None:
    class Returns(Faulty):
        def run(self, inner: Any, feeds: Any) -> Outputs:
            return {"output": feeds["x"]}

    from toys import NumpyBackend

    engine = Returns(NumpyBackend(), raises)
    model = numpy_session(nearest(1), image_spec())._guards[0].model
    session = Session([ShapeGuard(engine, model, EngineOptions(), "auto", 4)])
    with pytest.raises(IntegrityError, match="memory of an input"):
        session(np.zeros((1, 3, 4, 4), np.float32))


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), "1", True])
def test_limits_are_positive_numbers(seconds: Any) -> None:
    with pytest.raises(OptionError, match="a time limit"), time_limit(seconds):
        pass


def test_limits_nest_and_may_be_none_or_long() -> None:
    session = numpy_session(nearest(2), image_spec(2))
    x = np.zeros((1, 3, 4, 4), np.float32)
    for seconds in (None, 1e300, float("inf"), 60):
        with time_limit(seconds):
            session(x)
    with pytest.raises(TimedOut, match="the time is up"), time_limit(1e-9), time_limit(60), time_limit(None):
        session(x)
    session(x)


def test_a_slow_compile_is_of_use_to_the_next() -> None:
    from toys import NumpyBackend

    class Slow(NumpyBackend):
        def compile(self, *given: Any) -> Any:
            time.sleep(0.5)
            return super().compile(*given)

    engine = Slow()
    session = numpy_session(nearest(2), image_spec(2), backend=engine)
    x = np.zeros((1, 3, 4, 4), np.float32)
    with pytest.raises(TimedOut, match="while the model is compiled") as caught, time_limit(0.05):
        session(x)
    assert caught.value.shape == {"x": (1, 3, 4, 4)}
    session(x)
    assert len(engine.compiled) == 1


def test_the_command_has_a_limit_for_each_picture(tmp_path: Path) -> None:
    from anysize.cli import main

    write_picture(tmp_path / "a.png", np.zeros((40, 40, 3), np.uint8))
    line = ["upscale", str(tmp_path / "a.png"), "-o", str(tmp_path / "out.png"), "--timeout"]
    for seconds, code in (("1e-6", 1), ("0", 2), ("60", 0)):
        with pytest.raises(SystemExit) as caught:
            main([*line, seconds])
        assert caught.value.code == code
        assert (tmp_path / "out.png").exists() == (code == 0)


def test_a_limit_that_is_over_costs_no_program(toybox: ToyBox, backend: str) -> None:
    """Nothing hangs where nothing was begun."""
    session = anysize.load(toybox.file("Doubling") if backend != "torch" else "default", backend=backend)
    x = np.zeros((1, 3, 8, 8), np.float32)
    session(x)
    for _ in range(3):
        with pytest.raises(TimedOut), time_limit(1e-9):
            session(x)
    stats = session.stats
    assert (stats.compiles, stats.failed, stats.discarded) == (1, 0, 0)


@pytest.mark.parametrize("load", [anysize.load, Upscaler])
def test_opening_has_a_limit_too(toybox: ToyBox, load: Callable[..., Any]) -> None:
    """An engine that hangs as it reads a file, or is probed."""
    go_on = threading.Event()

    class Hangs(type(get_backend(GRAPH_ENGINES[0]))):  # type: ignore[misc]
        def metadata(self, model: Any) -> dict[str, str]:
            go_on.wait(60)
            return super().metadata(model)

    started = time.monotonic()
    with pytest.raises(TimedOut, match="while the model is opened"), time_limit(0.3):
        load(toybox.file("Doubling"), backend=Hangs())
    assert time.monotonic() - started < 3
    go_on.set()
