"""The shape guard: which program runs, how many live, and what happens when one fails."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import anysize
import numpy as np
import pytest
import torch
from anysize import ExecutionError, IntegrityError, OptionError, Options, ShapeError, time_limit
from anysize.backends import EngineOptions, Executable, Model, get_backend
from anysize.backends.base import Shapes
from anysize.guard import ShapeGuard
from conftest import ToyBox
from toys import Faulty, NumpyBackend, image_spec, nearest, numpy_session, raises


def x(height: int, width: int) -> np.ndarray:
    return np.zeros((1, 3, height, width), np.float32)


def test_auto_is_static_until_the_bound_then_open_and_promotes_what_returns() -> None:
    backend = NumpyBackend()
    session = numpy_session(nearest(1), image_spec(), backend=backend, max_live=3)
    for size in (4, 5, 6):
        session(x(size, size))
    assert [s["x"][2] for s in backend.compiled] == [4, 5, 6]
    session(x(7, 7))
    assert backend.compiled[3] is None  # the open program came in, the oldest went
    for size in range(8, 40):
        session(x(size, size))
    assert len(backend.compiled) == 4
    assert session.stats.live <= 3
    for _ in range(10):
        session(x(50, 50))
    assert backend.compiled[4]["x"] == (1, 3, 50, 50)
    assert len(backend.compiled) == 5
    assert session.stats.evictions == backend.closed == 2


def test_static_evicts_the_least_recently_used() -> None:
    backend = NumpyBackend()
    session = numpy_session(nearest(1), image_spec(), backend=backend, shapes="static", max_live=2)
    for size in (4, 5, 4, 6, 4, 5):
        session(x(size, size))
    assert [s["x"][2] for s in backend.compiled] == [4, 5, 6, 5]
    stats = session.stats
    assert (stats.calls, stats.compiles, stats.cache_hits, stats.evictions, stats.live) == (6, 4, 2, 2, 2)


def test_dynamic_compiles_once() -> None:
    backend = NumpyBackend()
    session = numpy_session(nearest(1), image_spec(), backend=backend, shapes="dynamic")
    for size in range(1, 20):
        session(x(size, size))
    assert backend.compiled == [None]


@pytest.mark.parametrize("max_live", [1, 2])
@pytest.mark.parametrize("shapes", ["auto", "static", "dynamic"])
def test_the_bound_holds(max_live: int, shapes: str) -> None:
    session = numpy_session(nearest(1), image_spec(), shapes=shapes, max_live=max_live)
    for i in range(60):
        session(x(1 + i % 7, 1 + i % 5))
        assert session.stats.live <= max_live


def test_two_threads_compile_a_new_shape_once() -> None:
    class Slow(NumpyBackend):
        def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
            time.sleep(0.05)
            return super().compile(model, shapes, options)

    backend = Slow()
    session = numpy_session(nearest(2), image_spec(2), backend=backend)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: session(x(9, 9)), range(16)))
    assert len(backend.compiled) == 1
    assert session.stats.calls == 16


@pytest.mark.parametrize("limit", [None, 60.0])
@pytest.mark.parametrize("where", ["retire", "compile"])
def test_an_interrupt_costs_no_shape(
    monkeypatch: pytest.MonkeyPatch, where: str, limit: float | None
) -> None:
    """Ctrl-C in one call: the shape was waited for without end ever after, or others had its exception."""
    main, compiling = threading.main_thread(), threading.Event()

    def interrupt() -> None:
        if threading.current_thread() is main:
            compiling.set()
            time.sleep(0.2)  # another thread begins to wait for the same program
            monkeypatch.undo()
            raise KeyboardInterrupt

    class Interrupted(NumpyBackend):
        def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
            if where == "compile" and shapes is not None and shapes["x"][2] == 9 and not compiling.is_set():
                interrupt()
            return super().compile(model, shapes, options)

    session = numpy_session(nearest(2), image_spec(2), backend=Interrupted(), shapes="static", max_live=1)
    session(x(5, 5))
    if where == "retire":
        monkeypatch.setattr(ShapeGuard, "_retire", lambda *_: interrupt())
    elif limit:  # there, no exception breaks into the compiling, but into the wait for it
        monkeypatch.setattr("anysize.guard.wait_for", lambda *_: interrupt())
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: compiling.wait(60) and session(x(9, 9)))
        with pytest.raises(KeyboardInterrupt), time_limit(limit):
            session(x(9, 9))
        with time_limit(60):
            assert session(x(9, 9)).shape == (1, 3, 18, 18)
        assert other.result(60).shape == (1, 3, 18, 18)
    assert session.stats.live == 1


def test_programs_are_closed_once_and_never_under_a_run() -> None:
    backend = NumpyBackend()
    running, go = threading.Event(), threading.Event()

    def slow(value: np.ndarray) -> np.ndarray:
        if value.shape[2] == 4:
            running.set()
            assert go.wait(10)
            assert backend.closed == 0
        return value

    session = numpy_session(slow, image_spec(), backend=backend, shapes="static", max_live=1)
    thread = threading.Thread(target=lambda: session(x(4, 4)))
    thread.start()
    assert running.wait(10)
    session(x(5, 5))  # evicts the program that is running
    go.set()
    thread.join()
    assert backend.closed == 1
    session.close()
    session.close()
    assert backend.closed == 2
    with pytest.raises(OptionError, match="closed"):
        session(x(4, 4))


def test_a_failed_compile_is_everyones_error_and_is_tried_again() -> None:
    class Flaky(NumpyBackend):
        broken = True

        def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
            if self.broken:
                time.sleep(0.02)
                raise MemoryError("no room")
            return super().compile(model, shapes, options)

    backend = Flaky()
    session = numpy_session(nearest(1), image_spec(), backend=backend)

    def attempt(_: int) -> type:
        with pytest.raises(ExecutionError) as caught:
            session(x(3, 3))
        return type(caught.value.__cause__)

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(attempt, range(8))) == {MemoryError}
    backend.broken = False
    assert session(x(3, 3)).shape == (1, 3, 3, 3)
    assert session.stats.live == 1


def test_a_program_that_raised_is_thrown_away(backend: str, toybox: ToyBox) -> None:
    faulty = Faulty(get_backend(backend), raises, 1)
    session = toybox.session("Nearest", faulty)
    value = np.random.default_rng(0).random((1, 3, 6, 6), np.float32)
    first = session(value)
    with pytest.raises(ExecutionError, match="planted failure") as caught:
        session(value)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert caught.value.backend == backend
    assert caught.value.shape == {"x": (1, 3, 6, 6)}
    np.testing.assert_array_equal(session(value), first)
    assert (session.stats.compiles, session.stats.discarded, session.stats.calls) == (2, 1, 2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda v: v[:, :, :-1], "shape"),
        (lambda v: np.pad(v, ((0, 0), (0, 0), (0, 1), (0, 1))), "shape"),
        (lambda v: v[0], "shape"),
        (lambda v: v.astype(np.float64), "float64"),
    ],
)
def test_wrong_outputs_are_integrity_errors(function: object, message: str) -> None:
    session = numpy_session(function, image_spec())
    with pytest.raises(IntegrityError, match=message) as caught:
        session(x(4, 4))
    assert caught.value.got != caught.value.want
    assert session.stats.live == 0


def test_missing_output_is_an_integrity_error() -> None:
    session = numpy_session(nearest(1), image_spec())
    spec = session.spec
    object.__setattr__(spec.outputs[0], "name", "elsewhere")
    with pytest.raises(IntegrityError, match="elsewhere"):
        session(x(4, 4))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_finiteness_is_checked_where_asked(value: float) -> None:
    session = numpy_session(lambda v: np.where(np.arange(4) == 2, np.float32(value), v), image_spec())
    assert not np.isfinite(session(x(4, 4))).all()
    with pytest.raises(IntegrityError, match="not finite"):
        session.run({"x": x(4, 4)}, finite=True)


def test_another_precision_than_asked_is_an_error() -> None:
    class Sly(NumpyBackend):
        def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
            program = super().compile(model, shapes, options)
            program.precision = "bf16"
            return program

    session = numpy_session(nearest(1), image_spec(), backend=Sly())
    with pytest.raises(ExecutionError, match="asked for f32, but the engine runs bf16"):
        session(x(4, 4))


def test_bad_feeds_never_reach_the_engine() -> None:
    backend = NumpyBackend()
    session = numpy_session(nearest(1), image_spec(multiple=4), backend=backend)
    for feeds in (
        {"x": x(5, 4)},
        {"x": x(4, 4)[0]},
        {"y": x(4, 4)},
        {},
        {"x": x(4, 4).astype(np.uint8)},
        {"x": x(4, 4).astype(np.complex64)},
        {"x": "text"},
        {"x": [[1, 2], [3]]},
        {"x": torch.zeros(1, 3, 4, 4, dtype=torch.bfloat16)},
        {"x": torch.zeros(1, 3, 4, 4, requires_grad=True)},
    ):
        with pytest.raises(ShapeError):
            session.run(feeds)
    assert backend.compiled == []
    assert session(x(4, 4).astype(np.float64)).dtype == np.float32


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 0},
        {"max_live": 0},
        {"shapes": "rubber"},
        {"fallback": "torch"},
        {"colour": "red"},
        {"device": "abacus"},
        {"device": None},
        {"threads": 1.5},
        {"threads": "2"},
        {"max_live": "x"},
        {"fallback": None},
        {"fallback": (1,)},
        3,
    ],
)
def test_bad_options_are_refused(toybox: ToyBox, backend: str, options: dict) -> None:
    with pytest.raises(OptionError):
        anysize.load("default", backend=backend, options=options)(x(4, 4))


def test_options_may_be_an_object(backend: str) -> None:
    session = anysize.load("default", backend=backend, options=Options(threads=1, shapes="dynamic"))
    assert session(x(3, 5)).shape == (1, 3, 12, 20)
    assert session.stats.compiles == 1
    assert session.precision == "f32"


def test_a_session_is_a_context_manager(backend: str) -> None:
    with anysize.load("default", backend=backend) as session:
        session(x(3, 5))
    with pytest.raises(OptionError):
        session(x(3, 5))


def test_several_inputs_need_names() -> None:
    import toys
    from anysize.guard import ShapeGuard
    from anysize.session import Session

    spec = image_spec()
    two = type(spec)((spec.inputs[0], spec.inputs[0]), spec.outputs)
    session = Session(
        [ShapeGuard(toys.NumpyBackend(), Model("numpy", None, two), EngineOptions(), "auto", 1)]
    )
    with pytest.raises(OptionError, match="several"):
        session(x(4, 4))


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
def test_programs_of_one_module_run_one_after_the_other() -> None:
    """A module that keeps things on itself gave one thread the other's numbers."""
    import torch

    class Keeps(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.kept = x.mean()
            time.sleep(0.05 if x.shape[2] == 48 else 0)
            return x * 0 + self.kept

    with anysize.load(Keeps(), backend="torch", options={"shapes": "static"}) as session:
        for size in (48, 50):
            session(x(size, size))

        def mean(size: int) -> float:
            time.sleep(0 if size == 48 else 0.02)
            return float(session(np.full((1, 3, size, size), size, np.float32)).mean())

        with ThreadPoolExecutor(2) as pool:
            assert list(pool.map(mean, (48, 50) * 4)) == [48, 50] * 4


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
def test_f32_on_cuda_is_set_and_given_back() -> None:
    """The settings alone, which need no such device: TF32 is off within, and the host's are back after."""
    import torch
    from anysize.backends.pytorch import _no_tf32

    parts = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)

    def settings() -> list[str]:
        return [part.fp32_precision for part in parts] + [str(torch.backends.cudnn.enabled)]

    before = settings()
    with _no_tf32(torch):
        assert settings() == ["ieee"] * 3 + before[3:]
    assert settings() == before
    torch.set_float32_matmul_precision("high")
    try:
        chosen = settings()
        with _no_tf32(torch):
            assert settings() == ["ieee"] * 3 + before[3:]
            assert torch.get_float32_matmul_precision() == "highest"
        assert settings() == chosen
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("device", ["cuda:256", "cuda:999", "cuda:-1", "meta", "CPU", "nonsense", ""])
def test_devices_that_are_not_there_are_refused_at_once(device: str) -> None:
    with pytest.raises(OptionError, match="device"):
        anysize.load("default", backend="torch", options={"device": device})
