"""What was measured is kept, found again, and gone by; several runs at the same time give the one result."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anysize.tuning
import numpy as np
import pytest
import torch
from anysize import (
    Cancelled,
    ExecutionError,
    ModelSpec,
    OptionError,
    Options,
    TensorSpec,
    Tiling,
    Upscaler,
    load,
)
from anysize.backends import EngineOptions, get_backend
from anysize.cli import main
from anysize.exporters import export
from anysize.guard import ShapeGuard
from anysize.session import Session
from anysize.tuning import Speed, Tuned, known, tune
from conftest import ENGINES
from toys import Faulty, FixedSize, NumpyBackend, image_spec, nearest, numpy_session, raises

PARALLEL = [name for name in ENGINES if get_backend(name).has_streams]


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anysize.tuning, "SECONDS", 1.0)
    monkeypatch.setattr(anysize.tuning, "measure", lambda session: None)


@pytest.mark.usefixtures("quickly")
def test_what_was_measured_is_found_again(backend: str, tmp_path: Path) -> None:
    options = Options(cache_dir=tmp_path, tune=True)
    session = load("default", backend=backend, options=options)
    tuned = session.tuned
    assert tuned is not None
    assert {s.method for s in tuned.speeds} == {"tile" if backend == "torch" else "stream"}
    assert all(s.per_second > 0 for s in tuned.speeds)
    assert min(s.streams for s in tuned.speeds) >= 1
    assert session._guards[0].max_live == tuned.max_live
    # without being asked to measure, and never for other settings
    assert load("default", backend=backend, options=Options(cache_dir=tmp_path)).tuned == tuned
    other = load("default", backend=backend, options=Options(cache_dir=tmp_path, threads=1, max_live=3))
    assert other.tuned is None
    assert other._guards[0].max_live == 3
    assert known(load("default", backend=backend, options=Options(cache_dir=""))) is None


def test_a_slow_model_is_measured_on_what_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anysize.tuning, "SECONDS", 0.5)

    def slow(x: np.ndarray) -> np.ndarray:
        time.sleep(1e-6 * x.size)
        return nearest(2)(x)

    session = numpy_session(slow, image_spec(2))
    started = time.perf_counter()
    tuned = tune(session)
    assert [(s.method, s.streams, s.pixels) for s in tuned.speeds] == [("tile", 1, 256**2)]
    assert time.perf_counter() - started < 2


def test_only_models_of_pictures_of_any_size_are_tuned() -> None:
    f32 = np.dtype(np.float32)
    ends = [(TensorSpec(name, f32, (1, 3, 16, 16)),) for name in ("x", "output")]
    with pytest.raises(OptionError, match="of any size to one picture"):
        tune(numpy_session(nearest(1), ModelSpec(*ends)))


def meeting(count: int) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """What an engine answers, once so many of its runs have got there."""
    barrier = threading.Barrier(count)

    def wait(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        barrier.wait(timeout=10)
        return outputs

    return wait


@pytest.mark.parametrize("engine", PARALLEL)
@pytest.mark.parametrize("method", ["stream", "tile"])
def test_they_do_run_at_the_same_time(engine: str, method: str, toybox: Any, picture: Any) -> None:
    backend = Faulty(get_backend(engine), meeting(2), *range(4))
    model = toybox.model("Convolution", backend.inner)
    session = Session([ShapeGuard(backend, model, EngineOptions(), "auto", 4)])
    session.streams = 2
    upscaler = Upscaler(session, tiling=Tiling(method, 32))  # type: ignore[arg-type]
    upscaler(picture(64, 128))
    assert (upscaler.report.method, upscaler.report.streams) == (method, 2)
    assert backend.calls >= 4


@pytest.mark.parametrize("engine", PARALLEL)
def test_the_engine_is_told(engine: str, toybox: Any) -> None:
    session = toybox.session("Convolution", engine, threads=6)
    for streams in (1, 2, 4):
        session.run({"x": np.zeros((1, 3, 20, 20), np.float32)}, streams=streams)
    programs = {key[1]: p.ready.result() for key, p in session._guards[0]._programs.items()}
    if engine == "openvino":
        told = {n: program._compiled.get_property("NUM_STREAMS") for n, program in programs.items()}
        assert told == {n: min(n, os.cpu_count() or 1) for n in programs}
    else:  # each run has its caller's thread beside those of the pool
        told = {n: p._session.get_session_options().intra_op_num_threads for n, p in programs.items()}
        assert told == {1: 6, 2: 5, 4: 3}


@pytest.mark.parametrize("streams", [0, -1, 2.5, True, "2", 100000])
def test_runs_at_the_same_time_are_counted_in_whole_numbers(streams: Any) -> None:
    session = numpy_session(nearest(1), image_spec())
    with pytest.raises(OptionError, match="streams must be at least 1 and a whole number"):
        session.run({"x": np.zeros((1, 3, 4, 4), np.float32)}, streams=streams)


def test_an_engine_without_streams_has_one_program_for_all() -> None:
    session = numpy_session(nearest(1), image_spec())
    for streams in (1, 2, 3):
        session.run({"x": np.zeros((1, 3, 4, 4), np.float32)}, streams=streams)
    assert session.stats.compiles == 1


@pytest.mark.parametrize("engine", PARALLEL)
@pytest.mark.parametrize("method", ["stream", "tile"])
def test_a_program_that_cannot_be_made_is_the_first_one_s_failure(
    engine: str, method: str, toybox: Any, picture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = get_backend(engine)
    session = Session([ShapeGuard(backend, toybox.model("Convolution", backend), EngineOptions(), "auto", 4)])
    session.streams = 4
    upscaler = Upscaler(session, tiling=Tiling(method, 16))  # type: ignore[arg-type]
    if method == "stream":
        session.bands()

    def compile(*_: Any) -> Any:
        time.sleep(0.05)  # until the others wait for it
        raise RuntimeError("planted failure")

    monkeypatch.setattr(backend, "compile", compile)
    with pytest.raises(ExecutionError) as caught:
        upscaler(picture(90, 260))
    assert caught.value.tile == (0, 0)


@pytest.mark.parametrize("engine", PARALLEL)
@pytest.mark.parametrize("channels", [3, 4])
def test_strips_at_the_same_time_give_the_picture(engine: str, channels: int, picture: Any) -> None:
    x = picture(90, 260, channels)
    plain = Upscaler("default", backend=engine, tiling=Tiling("stream"))
    several = Upscaler("default", backend=engine, tiling=Tiling("stream"), options=Options(streams=2))
    want = plain(x)
    for _ in range(3):
        assert np.array_equal(several(x), want)
    assert (several.report.method, several.report.streams, several.report.exact) == ("stream", 2, True)
    assert "2 at a time" in several.report.reason
    assert several.report.backend == engine
    assert plain.report.streams == 1


@pytest.mark.parametrize("engine", PARALLEL)
def test_tiles_at_the_same_time_give_the_picture(engine: str, picture: Any) -> None:
    x = picture(150, 120)
    want = Upscaler("default", backend=engine, tiling=Tiling("whole"))(x)
    order: list[tuple[int, int]] = []
    several = Upscaler("default", backend=engine, tiling=Tiling("tile", 40), options=Options(streams=3))
    got = several(x, progress=lambda done, total: order.append((done, total)))
    assert np.abs(got.astype(int) - want).max() <= 1
    assert (several.report.method, several.report.streams, several.report.exact) == ("tile", 3, True)
    assert (several.report.backend, several.report.precision) == (engine, "f32")
    assert order == [(i + 1, order[-1][1]) for i in range(len(order))]
    assert order[-1][0] == order[-1][1]


@pytest.mark.parametrize("engine", PARALLEL)
def test_the_fastest_that_was_measured_is_taken(engine: str, picture: Any) -> None:
    upscaler = Upscaler("default", backend=engine)
    x = picture(300, 400)
    want = upscaler(x)
    speeds = [Speed("stream", 1, 32768, 1.0), Speed("stream", 2, 8192, 3.0), Speed("stream", 2, 16384, 2.0)]
    upscaler.session.tuned = Tuned(tuple(speeds), 4)
    assert np.array_equal(upscaler(x), want)
    columns = (400 - 2 * (upscaler.session.spec.radius or 0)) // 2
    assert (upscaler.report.streams, upscaler.report.tile) == (2, 8 * round(8192 / columns / 8))
    # a halo costs: strips that are hardly faster are not worth theirs
    upscaler.session.tuned = Tuned((Speed("stream", 1, 16384, 1.0), Speed("stream", 2, 16384, 1.01)), 4)
    upscaler(x)
    assert upscaler.report.streams == 1
    # and what the caller says goes
    upscaler.session.streams = 2
    upscaler(x)
    assert upscaler.report.streams == 2


def test_a_faster_tile_does_not_cost_exactness(picture: Any) -> None:
    """A small tile that is fast has more halo than "auto" allows; a large one keeps the result exact."""
    session = numpy_session(nearest(1), image_spec(1, radius=60))
    session.tuned = Tuned((Speed("tile", 1, 256**2, 100.0), Speed("tile", 1, 640**2, 1.0)), 4)
    upscaler = Upscaler(session)
    x = picture(1160, 640)
    assert np.array_equal(upscaler(x), x)
    assert upscaler.report.exact
    assert upscaler.report.tile > 256


@pytest.mark.parametrize("method", ["stream", "tile"])
@pytest.mark.parametrize("engine", PARALLEL)
def test_a_failure_among_several_names_its_place_and_ends_the_call(
    engine: str, method: str, toybox: Any, picture: Any
) -> None:
    inner = get_backend(engine)
    faulty = Faulty(inner, raises, 5)
    model = toybox.model("Convolution", inner)
    session = Session([ShapeGuard(faulty, model, EngineOptions(), "auto", 4)])
    session.streams = 2
    upscaler = Upscaler(session, tiling=Tiling(method, 16))  # type: ignore[arg-type]
    x = picture(90, 80)
    with pytest.raises(ExecutionError) as caught:
        upscaler(x)
    assert caught.value.tile is not None
    assert "planted failure" in str(caught.value)
    got = upscaler(x)  # the next call has fresh programs
    assert np.array_equal(got, Upscaler(session, tiling=Tiling("whole"))(x))


def test_cancelling_ends_what_has_not_begun(picture: Any) -> None:
    stop, runs = threading.Event(), [0]

    def function(x: np.ndarray) -> np.ndarray:
        runs[0] += 1
        if runs[0] == 3:
            stop.set()
        return nearest(1)(x)

    session = numpy_session(function, image_spec(1))
    session.streams = 2
    with pytest.raises(Cancelled):
        Upscaler(session, tiling=Tiling("tile", 8))(picture(80, 80), cancel=stop)
    assert runs[0] <= 5


def test_memory_limits_what_runs_at_the_same_time(monkeypatch: pytest.MonkeyPatch, picture: Any) -> None:
    session = numpy_session(nearest(1), image_spec(1))
    session.streams = 4
    x = picture(200, 200)
    monkeypatch.setattr("anysize.planning.resident", lambda: 0)
    monkeypatch.setattr(session, "working_bytes", lambda sizes: 10 * 2**20)
    upscaler = Upscaler(session, tiling=Tiling("tile", 32, memory="85MiB"))
    upscaler(x)
    assert upscaler.report.streams == 2


def test_measuring_does_not_keep_to_a_limit_of_memory() -> None:
    with pytest.raises(OptionError, match="tuning would not keep to the memory limit"):
        Upscaler("default", tiling=Tiling(memory="1GiB"), options=Options(tune=True))


@pytest.mark.parametrize("engine", PARALLEL)
@pytest.mark.parametrize("text", [b"null", b"{}", b"not JSON", b'{"speeds": [{"speed": 1}], "max_live": 4}'])
def test_what_is_no_measurement_is_none(engine: str, text: bytes, tmp_path: Path) -> None:
    session = load("default", backend=engine, options=Options(cache_dir=tmp_path))
    cache, key = anysize.tuning._kept(session)
    cache.put(text, *key)
    assert load("default", backend=engine, options=Options(cache_dir=tmp_path)).tuned is None


@pytest.mark.parametrize("wrong", ["yes", 2, None])
def test_tune_is_yes_or_no(wrong: Any) -> None:
    with pytest.raises(OptionError, match="tune must be True or False"):
        Options(tune=wrong)


@pytest.mark.parametrize("wrong", [{"streams": 0}, {"streams": 1.5}, {"streams": True}, {"max_live": 0}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="at least 1 and a whole number"):
        Options(**wrong)


def test_an_engine_without_streams_says_so() -> None:
    if "torch" not in ENGINES:
        pytest.skip("needs torch")
    with pytest.raises(OptionError, match="one run at a time"):
        load("default", backend="torch", options=Options(streams=2))


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("engine", PARALLEL)
def test_what_cannot_be_measured_runs_untuned(engine: str, tmp_path: Path) -> None:
    options = Options(tune=True, cache_dir=tmp_path)
    fixed = tmp_path / "fixed.onnx"
    export(FixedSize(24, 40).eval(), fixed, inputs=torch.rand(1, 3, 24, 40))
    assert load(fixed, backend=engine, options=options).tuned is None
    failing = Faulty(get_backend(engine), raises, *range(1000))
    with load("default", backend=failing, options=replace(options, fallback=(engine,))) as session:
        assert session.tuned is None
        x = np.zeros((1, 3, 8, 8), np.float32)
        assert np.array_equal(session(x), load("default", backend=engine)(x))


@pytest.mark.usefixtures("quickly")
def test_measuring_leaves_the_session_as_it_was(toybox: Any) -> None:
    session = toybox.session("Doubling", PARALLEL[0])
    tune(session)
    assert session.stats.compiles == session.stats.live == 0


@pytest.mark.parametrize("engine", PARALLEL)
def test_programs_of_different_streams_are_different_programs(engine: str, toybox: Any) -> None:
    session = toybox.session("Convolution", engine)
    x = np.random.default_rng(0).random((1, 3, 20, 20), np.float32)
    one, two = session.run({"x": x}), session.run({"x": x}, streams=2)
    assert np.array_equal(one["output"], two["output"])
    assert session.stats.compiles == session.stats.live == 2


def test_programs_of_several_streams_share_the_bound() -> None:
    backend = NumpyBackend()
    session = numpy_session(nearest(1), image_spec(), backend=backend, max_live=2)
    run: Callable[..., Any] = lambda side, streams: session.run(  # noqa: E731
        {"x": np.zeros((1, 3, side, side), np.float32)}, streams=streams
    )
    for side in range(1, 9):
        for streams in (1, 2):
            run(side, streams)
            assert session.stats.live <= 2
    assert None in backend.compiled


def test_tuned_survives_its_text() -> None:
    tuned = Tuned((Speed("stream", 2, 16384, 1.5),), 7)
    assert Tuned.from_json(tuned.to_json()) == tuned


@pytest.mark.usefixtures("quickly")
def test_what_has_no_digest_is_measured_and_not_kept() -> None:
    session = numpy_session(nearest(2), image_spec(2))
    assert tune(session) is session.tuned
    assert known(session) is None


@pytest.mark.usefixtures("quickly")
def test_the_command(toybox: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(toybox.file("Doubling"))
    engine = PARALLEL[0]
    with pytest.raises(SystemExit) as stop:
        main(["tune", "-m", model, "-b", engine, "--json"])
    assert stop.value.code == 0
    tuned = Tuned.from_json(capsys.readouterr().out)
    assert tuned.speeds
    assert load(model, backend=engine).tuned == tuned
    with pytest.raises(SystemExit) as stop:
        main(["tune", "-m", model, "--precision", "auto"])
    assert stop.value.code == 2
    assert "--precision must be f32 or bf16 here" in capsys.readouterr().err
