"""The engine contract: every backend passes all of this or is none."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anysize
import numpy as np
import pytest
import torch
from anysize import ModelLoadError, OptionError
from anysize.backends import SPEC_KEY, EngineOptions, Executable, Model, ModelSpec, get_backend
from anysize.exporters.bands import ROWS, band_model
from conftest import ToyBox

F32 = EngineOptions()


@pytest.fixture(params=anysize.available_backends())
def backend(request: pytest.FixtureRequest) -> str:
    """Every installed engine, those with files of their own too."""
    return str(request.param)


def compile_toy(
    toybox: ToyBox, backend: str, name: str, shape: tuple[int, ...] | None, **kw: int
) -> Executable:
    engine = get_backend(backend)
    model = toybox.model(name, engine, **kw)
    return engine.compile(model, None if shape is None else {"x": shape}, F32)


def pictures(backend: str) -> int:
    """More than one at a time where the engine can."""
    return 1 if backend == "ncnn" else 2


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape, np.float32)


def test_names_itself_and_its_engine(backend: str) -> None:
    engine = get_backend(backend)
    assert engine.name == backend
    assert engine.version[0].isdigit()
    assert engine.formats
    assert "f32" in engine.precisions
    assert get_backend(backend) is engine


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("name", ["SlopesByChannel", "SqueezeExcite", "Strided"])
def test_few_pixels_in_every_precision(backend: str, toybox: ToyBox, name: str, fixed: bool) -> None:
    """OpenVINO's programs for any shape went wrong where a convolution takes or makes one, but not in f32."""
    engine = get_backend(backend)
    model = toybox.model(name, engine)
    reference, _ = toybox.make(name)
    for precision in (p for p in engine.precisions if p != "int8"):
        options = EngineOptions(precision)
        program = None if fixed else engine.compile(model, None, options)
        step = 2 if name == "Strided" else 1
        for height, width in ((1, 1), (7, 9), (1, 2), (3, 1), (1, 1)):
            x = noise(1, 3, height * step, width * step)
            used = program or engine.compile(model, {"x": x.shape}, options)
            with torch.inference_mode():
                want = reference(torch.from_numpy(x)).numpy()
            got = used.run({"x": x})["output"]
            assert np.abs(got - want).max() < (1e-5 if precision == "f32" else 0.02), (precision, x.shape)


@pytest.mark.parametrize("fixed", [False, True])
def test_declares_and_returns_what_the_model_has(backend: str, toybox: ToyBox, fixed: bool) -> None:
    shape = (pictures(backend), 3, 9, 14)
    program = compile_toy(toybox, backend, "Nearest", shape if fixed else None)
    assert [p.name for p in program.inputs] == ["x"]
    assert [p.name for p in program.outputs] == ["output"]
    assert program.inputs[0].dtype == np.float32
    x = noise(*shape)
    outputs = program.run({"x": x})
    assert list(outputs) == ["output"]
    np.testing.assert_array_equal(outputs["output"], x.repeat(2, 2).repeat(2, 3))
    assert outputs["output"].flags.c_contiguous
    program.close()


def test_reads_precision_and_device_back(backend: str, toybox: ToyBox) -> None:
    program = compile_toy(toybox, backend, "Convolution", (1, 3, 16, 16))
    assert program.precision == "f32"
    assert program.device == "cpu"


def test_open_program_takes_ever_new_sizes(backend: str, toybox: ToyBox) -> None:
    program = compile_toy(toybox, backend, "Nearest", None)
    for height, width in ((5, 8), (8, 5), (1, 1), (5, 8), (17, 2)):
        x = noise(1, 3, height, width)
        np.testing.assert_array_equal(program.run({"x": x})["output"], x.repeat(2, 2).repeat(2, 3))


@pytest.mark.parametrize("name", ["Identity", "Nearest", "Convolution"])
def test_outputs_belong_to_the_caller(backend: str, toybox: ToyBox, name: str) -> None:
    program = compile_toy(toybox, backend, name, (1, 3, 8, 8))
    x = noise(1, 3, 8, 8)
    first = program.run({"x": x})["output"]
    kept = first.copy()
    second = program.run({"x": noise(1, 3, 8, 8, seed=1)})["output"]
    assert not np.shares_memory(first, second)
    assert not np.shares_memory(first, x)
    np.testing.assert_array_equal(first, kept)
    assert first.flags.writeable
    first[:] = -1  # may not reach the engine or the next result
    np.testing.assert_array_equal(program.run({"x": x})["output"], kept)
    del program
    gc.collect()
    np.testing.assert_array_equal(first, -np.ones_like(first))


@pytest.mark.parametrize("name", ["Identity", "InPlace", "Convolution"])
def test_feeds_stay_the_callers(backend: str, toybox: ToyBox, name: str) -> None:
    program = compile_toy(toybox, backend, name, (1, 3, 8, 10))
    x = noise(1, 3, 8, 10)
    want = program.run({"x": x.copy()})["output"]
    frozen = x.copy()
    frozen.setflags(write=False)
    strided = noise(1, 3, 16, 20)[:, :, ::2, ::2]
    strided[:] = x
    backwards = x[:, :, ::-1].copy()[:, :, ::-1]
    for feed in (x, frozen, strided, backwards):
        before = feed.copy()
        np.testing.assert_array_equal(program.run({"x": feed})["output"], want)
        np.testing.assert_array_equal(feed, before)


def test_the_buffer_may_be_refilled(backend: str, toybox: ToyBox) -> None:
    program = compile_toy(toybox, backend, "Identity", (1, 3, 6, 6))
    buffer = np.empty((1, 3, 6, 6), np.float32)
    results = []
    for value in range(5):
        buffer[:] = value
        results.append(program.run({"x": buffer})["output"])
    for value, result in enumerate(results):
        assert (result == value).all()


def test_run_is_thread_safe(backend: str, toybox: ToyBox) -> None:
    program = compile_toy(toybox, backend, "Convolution", None)
    inputs = [noise(1, 3, 12 + i % 3, 15 + i % 5, seed=i) for i in range(24)]
    serial = [program.run({"x": x})["output"] for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            parallel = list(pool.map(lambda x: program.run({"x": x})["output"], inputs))
            for got, want in zip(parallel, serial, strict=True):
                np.testing.assert_array_equal(got, want)


def test_is_repeatable_and_agrees_with_torch(backend: str, toybox: ToyBox) -> None:
    import torch

    module, _ = toybox.make("EncoderDecoder")
    program = compile_toy(toybox, backend, "EncoderDecoder", None)
    x = noise(pictures(backend), 3, 24, 32)
    want = module(torch.from_numpy(x)).numpy()
    got = program.run({"x": x})["output"]
    assert np.abs(got - want).max() <= 1e-5
    np.testing.assert_array_equal(got, program.run({"x": x})["output"])


def test_a_bad_size_is_an_error_and_a_new_program_is_well(backend: str, toybox: ToyBox) -> None:
    shape = (1, 3, 9, 9)  # not a multiple of 4
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the engine raises; the guard wraps it
        compile_toy(toybox, backend, "EncoderDecoder", shape).run({"x": noise(*shape)})
    program = compile_toy(toybox, backend, "EncoderDecoder", (1, 3, 8, 8))
    assert program.run({"x": noise(1, 3, 8, 8)})["output"].shape == (1, 3, 8, 8)


def test_threads_option_does_not_change_results(backend: str, toybox: ToyBox) -> None:
    one = toybox.session("Convolution", backend, threads=1)
    x = noise(1, 3, 20, 20)
    many = toybox.session("Convolution", backend)
    assert np.abs(one(x) - many(x)).max() <= 1e-6


@pytest.mark.parametrize("options", [EngineOptions(precision="f7"), EngineOptions(device="abacus")])
def test_refuses_what_it_has_not(backend: str, options: EngineOptions) -> None:
    with pytest.raises(OptionError):
        get_backend(backend).check(options)


def test_nan_passes_where_the_engine_says_so(backend: str, toybox: ToyBox) -> None:
    """A pixel's reach is traced by NaN, through clip and through a padding-free ReLU too."""
    if not get_backend(backend).propagates_nan:
        pytest.skip(f"{backend} does not let NaN through, and says so")
    for name in ("InPlace", "EncoderDecoder"):
        x = noise(1, 3, 16, 16)
        x[:, :, 7, 7] = np.nan
        assert np.isnan(compile_toy(toybox, backend, name, None).run({"x": x})["output"][:, :, 7, 7]).all()


def test_a_module_that_keeps_state_during_a_call_is_safe(backend: str, toybox: ToyBox) -> None:
    session = toybox.session("KeepsState", backend)
    inputs = [np.full((1, 3, 24, 24), i / 16, np.float32) for i in range(16)]
    want = [session(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            for got, right in zip(pool.map(session, inputs), want, strict=True):
                np.testing.assert_array_equal(got, right)


def test_metadata_carries_the_contract(backend: str, toybox: ToyBox) -> None:
    engine = get_backend(backend)
    _, onnx = toybox.make("Nearest")
    if "onnx" not in engine.formats:
        assert engine.metadata(onnx) == {}
        return
    assert ModelSpec.from_json(engine.metadata(onnx)[SPEC_KEY]) == onnx.spec


def test_a_damaged_file_is_a_load_error(backend: str, tmp_path: Path) -> None:
    engine = get_backend(backend)
    damaged = Model("module", None)
    if "onnx" in engine.formats:
        damaged = Model("onnx", b"not an ONNX file at all")
    if "ncnn" in engine.formats:
        damaged = Model("ncnn", tmp_path / "model.param")
        damaged.data.write_bytes(b"not a file of ncnn at all")
    with pytest.raises(ModelLoadError):
        engine.compile(damaged, None, F32)


def test_a_sequence_carries_its_states(backend: str, toybox: ToyBox) -> None:
    """What a run leaves is what the next begins with, however the engine keeps it."""
    engine = get_backend(backend)
    if "onnx" not in engine.formats:
        pytest.skip(f"{backend} takes no graphs, so nothing of its own has states")
    _, whole = toybox.make("UShaped")
    middle = band_model(whole).middle
    shapes = middle.spec.input_shapes({ROWS: 8, "w": 16})
    program = engine.compile(middle, shapes, EngineOptions())
    rng = np.random.default_rng(0)
    start = {n: rng.random(s, np.float32) for n, s in shapes.items() if n in middle.states}
    feeds = [{"x": rng.random(shapes["x"], np.float32)} for _ in range(3)]
    states, want = dict(start), []
    for feed in feeds:
        outputs = program.run({**feed, **states})
        states = {name: outputs.pop(following) for name, following in middle.states.items()}
        want.append(outputs)
    first, second = (program.sequence(middle.states, start) for _ in range(2))
    for feed, outputs in zip(feeds, want, strict=True):  # side by side: neither sees the other
        for sequence in (first, second):
            got = sequence.run(feed)
            assert set(got) == set(outputs)
            for name, value in outputs.items():
                np.testing.assert_array_equal(got[name], value)
    left = first.states()
    for name, value in states.items():
        np.testing.assert_array_equal(left[name], value)
        left[name][...] = 7  # the caller's own
    for name, value in first.states().items():
        np.testing.assert_array_equal(value, states[name])
