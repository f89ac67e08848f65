"""A limit of time: how a process ends that left a run to itself, and what the limit reaches."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import pytest
from anysize import ExecutionError, Tiling, TimedOut, Upscaler, time_limit
from anysize.backends import get_backend
from anysize.files import write_picture
from anysize.tuning import tune
from conftest import ENGINES, ToyBox

GRAPH_ENGINES = [e for e in ENGINES if e != "torch"]

#: leaves some runs that would take a second or more, one after the other, and ends with code 7
LEAVES = """
import sys, time
import anysize, numpy
session = anysize.load("default", backend=sys.argv[1])
session(numpy.zeros((1, 3, 64, 64), numpy.float32))
started, left = time.monotonic(), 0
for side in (256, 384, 512):
    try:
        with anysize.time_limit(0.1):
            session(numpy.zeros((1, 3, side, side), numpy.float32))
    except anysize.TimedOut:
        left += 1
print(left, time.monotonic() - started, flush=True)
sys.exit(7)
"""
#: the command, with the engine imported and the model ready, so that opening takes none of its time
COMMAND = """
import sys
import anysize
from anysize.cli import main
anysize.load("default", backend=sys.argv[1])
main(sys.argv[2:])
"""
#: leaves one that never ends
HANGS = """
import sys, threading
import anysize
from anysize.limit import in_time
try:
    with anysize.time_limit(0.1):
        in_time(threading.Event().wait, "in a run")
except anysize.TimedOut:
    sys.exit(7)
"""


def ended(*command: str | Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """How the process did, and in how many seconds."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100)
    return done, time.monotonic() - started


def test_a_process_ends_with_its_own_code_though_a_run_goes_on(backend: str) -> None:
    """An abort, or worse, was seen where a thread came back from the engine to a Python that was ending."""
    done, _ = ended("-c", LEAVES, backend)
    assert (done.returncode, done.stderr) == (7, "")
    left, seconds = done.stdout.split()
    assert int(left) >= 1
    assert float(seconds) < 3


def test_a_process_ends_though_a_run_never_does() -> None:
    done, seconds = ended("-c", HANGS)
    assert (done.returncode, done.stderr) == (7, "")
    assert seconds < 15


@pytest.mark.parametrize("method", ["whole", "tile"])
def test_the_command_ends_with_its_own_code_though_a_run_goes_on(
    tmp_path: Path, backend: str, method: str
) -> None:
    write_picture(tmp_path / "a.png", np.zeros((1400, 1400, 3), np.uint8))
    out = tmp_path / "out.png"
    line = ["upscale", tmp_path / "a.png", "-o", out, "--backend", backend, "--method", method]
    done, seconds = ended("-c", COMMAND, backend, *line, "--timeout", "1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the time is up, in a run")
    assert not out.exists()
    assert seconds < 15


@pytest.fixture
def hangs() -> Iterator[Callable[..., Any]]:
    """A function that waits until the test is over."""
    go_on = threading.Event()

    def wait(*_: Any, **__: Any) -> Any:
        go_on.wait(60)
        raise RuntimeError("nobody waits for this")

    yield wait
    go_on.set()


@pytest.mark.parametrize(
    ("method", "what"), [("whole", "exporters.cost.working_bytes"), ("stream", "streaming.BandRunner")]
)
def test_planning_has_a_limit(
    toybox: ToyBox, monkeypatch: pytest.MonkeyPatch, hangs: Callable[..., Any], method: Any, what: str
) -> None:
    """Taking a model apart, and importing what that takes, was seen to last for 10 seconds."""
    upscale = Upscaler(toybox.file("Doubling"), backend=GRAPH_ENGINES[0], tiling=Tiling(method))
    picture = np.zeros((300, 300, 3), np.uint8)
    started = time.monotonic()
    with monkeypatch.context() as patch:
        patch.setattr(f"anysize.{what}", hangs)
        for _ in range(2):  # counters, which each picture asks for, do not wait for it either
            with pytest.raises(TimedOut, match="while it was planned"), time_limit(0.3):
                upscale(picture)
    assert time.monotonic() - started < 5


@pytest.mark.skipif(len(GRAPH_ENGINES) < 2, reason="needs a second engine to compare")
def test_a_limit_is_no_finding_of_a_comparison(
    toybox: ToyBox, monkeypatch: pytest.MonkeyPatch, hangs: Callable[..., Any]
) -> None:
    reference, other = sorted(GRAPH_ENGINES)
    file = toybox.file("Doubling")
    monkeypatch.setattr(type(get_backend(other)), "compile", hangs)
    with pytest.raises(TimedOut, match="compiled"), time_limit(3):
        anysize.compare(file, backends=[reference, other], sizes=[(8, 8)])


def test_a_search_for_an_operator_has_a_limit(
    toybox: ToyBox, monkeypatch: pytest.MonkeyPatch, hangs: Callable[..., Any]
) -> None:
    import onnx.reference

    file, engine = toybox.file("Doubling"), GRAPH_ENGINES[0]
    anysize.bisect(file, backends=[engine], sizes=[(8, 8)])  # imports what it takes
    for owner, method, where in (
        (onnx.reference.ReferenceEvaluator, "run", "ONNX's own"),
        (type(get_backend(engine)), "compile", f"in a run of {engine}"),
    ):
        started = time.monotonic()
        with monkeypatch.context() as patch:
            patch.setattr(owner, method, hangs)
            with pytest.raises(TimedOut, match=where), time_limit(1):
                anysize.bisect(file, backends=[engine], sizes=[(8, 8)])
        assert time.monotonic() - started < 5


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs an engine with streams")
def test_tuning_has_a_limit_in_all_its_threads(
    toybox: ToyBox, monkeypatch: pytest.MonkeyPatch, hangs: Callable[..., Any]
) -> None:
    session = anysize.load(toybox.file("Doubling"), backend="openvino")
    monkeypatch.setattr("anysize.tuning._live", lambda session: 4)  # which has a run of its own
    monkeypatch.setattr("anysize.backends.openvino._Sequence.run", hangs)
    started = time.monotonic()
    with pytest.raises(TimedOut, match="in a run"), time_limit(1):
        tune(session)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_where_no_thread_can_be_started_the_next_run_is_right(
    engine: str, toybox: ToyBox, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit takes a thread; without one, compiling was never done, and waited for without end."""

    def opened() -> Upscaler:
        return Upscaler(toybox.file("Nearest"), backend=engine, tiling=Tiling("whole"))

    upscale = opened()
    picture = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
    start, failed = threading.Thread.start, 0
    for allowed in range(20):
        left = [allowed]

        def refuse(thread: threading.Thread, left: list[int] = left) -> None:
            if thread.name == "anysize-limited":
                left[0] -= 1
                if left[0] < 0:
                    raise RuntimeError("can't start new thread")
            start(thread)

        with monkeypatch.context() as patch, time_limit(60):
            patch.setattr(threading.Thread, "start", refuse)
            try:
                upscale(picture)
                break
            except ExecutionError:
                failed += 1
        if allowed % 2:  # each of the others begins with what the one before left
            with time_limit(60):
                np.testing.assert_array_equal(upscale(picture), picture.repeat(2, 0).repeat(2, 1))
            upscale = opened()
    assert failed >= 2
    with time_limit(60):
        np.testing.assert_array_equal(upscale(picture), picture.repeat(2, 0).repeat(2, 1))
