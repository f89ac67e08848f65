"""Failures that users met elsewhere, by the number under which we keep them; see each docstring."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import anysize
import numpy as np
import psutil
import pytest
from anysize import (
    ExecutionError,
    IntegrityError,
    MemoryBudgetError,
    ModelLoadError,
    OptionError,
    Options,
    ShapeError,
    Tiling,
    Upscaler,
)
from anysize.backends import get_backend
from anysize.files import read_picture
from conftest import BF16, ENGINES, ToyBox
from PIL import Image
from test_cache import write_weights
from test_files import broken_files
from toys import Faulty, image_spec, nearest, not_a_number, numpy_session, raises, too_large, too_small

TESTS = Path(__file__).parent
TILES = Tiling("tile", 16, "exact")


def digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def in_a_fresh_process(code: str, *arguments: object, cwd: Path | None = None) -> str:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("tiling", [Tiling("whole"), TILES])
def test_r01_same_picture_twice_with_another_between(
    backend: str, picture: Callable[..., np.ndarray], tiling: Tiling
) -> None:
    """vladmandic/sdnext#3121: the second result of one picture had repeated tiles."""
    a, b = picture(50, 37, seed=1), picture(37, 50, seed=2)
    upscale = Upscaler("default", backend=backend, tiling=tiling)
    results = [digest(upscale(p)) for p in (a, a, b, a)]
    assert results[0] == results[1] == results[3] != results[2]
    code = """
        import hashlib, sys, numpy as np, anysize
        method, tile, backend = sys.argv[1:]
        tiling = anysize.Tiling(method, None if tile == "None" else int(tile))
        x = (np.random.default_rng(1).random((50, 37, 3)) * 255).astype(np.uint8)
        y = anysize.Upscaler("default", backend=backend, tiling=tiling)(x)
        print(hashlib.sha256(y.tobytes()).hexdigest())
    """
    assert in_a_fresh_process(code, tiling.method, tiling.tile, backend) == results[0]


def test_r02_tile_shapes_do_not_hit_each_others_program(backend: str, toybox: ToyBox) -> None:
    """Tiles of [208,208], [208,200] and [208,146] shared one compiled model."""
    session = toybox.session("Nearest", backend, max_live=2)
    shapes = [(52, 52), (52, 50), (52, 36), (36, 52), (50, 52)]
    rng = np.random.default_rng(0)
    order = [shapes[i] for i in rng.permutation(len(shapes)).tolist() * 3] + [shapes[0], shapes[2]] * 5
    for height, width in order:
        x = rng.random((1, 3, height, width), np.float32)
        np.testing.assert_array_equal(session(x), x.repeat(2, 2).repeat(2, 3))


@pytest.mark.parametrize("fault", [too_large, too_small])
def test_r03_wrong_size_tile_is_never_pasted(
    backend: str, toybox: ToyBox, picture: Callable[..., np.ndarray], fault: Callable
) -> None:
    """A tile of another size was pasted where a crop of it fitted."""
    upscale = toybox.upscaler("Nearest", Faulty(get_backend(backend), fault, 4), Tiling("tile", 8, 0))
    with pytest.raises(IntegrityError) as caught:
        upscale(picture(24, 24))
    assert caught.value.tile == (1, 1)
    assert caught.value.want == (1, 3, 16, 16)
    assert caught.value.got != caught.value.want
    assert "tile (row 1, column 1)" in str(caught.value)


@pytest.mark.parametrize("at", [0, 4, 8])
def test_r04_a_failing_tile_ends_the_picture(
    backend: str, toybox: ToyBox, tmp_path: Path, picture: Callable[..., np.ndarray], at: int
) -> None:
    """xinntao/Real-ESRGAN#516, #633, HAT#98: the error was printed and a stale tile pasted."""
    Image.fromarray(picture(24, 24)).save(tmp_path / "in.png")
    upscale = toybox.upscaler("Nearest", Faulty(get_backend(backend), raises, at), Tiling("tile", 8, 0))
    with pytest.raises(ExecutionError, match="planted failure") as caught:
        anysize.upscale_file(tmp_path / "in.png", tmp_path / "out.png", upscale)
    assert caught.value.tile == divmod(at, 3)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert [f.name for f in tmp_path.iterdir()] == ["in.png"]


def test_r04_exit_code_of_a_failing_engine(
    tmp_path: Path, picture: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    from anysize import cli, session

    Image.fromarray(picture(24, 24)).save(tmp_path / "in.png")
    engine = Faulty(get_backend(ENGINES[0]), raises, 0)
    monkeypatch.setattr(session, "choose_backend", lambda *_: engine)
    with pytest.raises(SystemExit) as caught:
        cli.main(["upscale", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png")])
    assert caught.value.code == 1
    assert not (tmp_path / "out.png").exists()


def test_r05_every_pixel_written_once(backend: str, toybox: ToyBox) -> None:
    """Black or missing tiles: a sentinel-filled canvas and a write counter, all sizes up to 3 tiles + 1."""
    from anysize.tiling import grid, run_grid

    session = toybox.session("Nearest", backend, shapes="dynamic")
    tile = 4

    class Counting(np.ndarray):
        counts: np.ndarray

        def __setitem__(self, key: object, value: object) -> None:
            self.counts[key] += 1
            super().__setitem__(key, value)

    for height in range(1, 3 * tile + 2):
        for width in range(1, 3 * tile + 2, 3):
            x = np.random.default_rng(0).random((3, height, width), np.float32)
            canvas = np.full((3, 2 * height, 2 * width), -7, np.float32).view(Counting)
            canvas.counts = np.zeros(canvas.shape, int)
            cut = grid(height, width, tile, 1, (1, 1))

            def put(top: int, left: int, part: np.ndarray, canvas: np.ndarray = canvas) -> None:
                canvas[:, top : top + part.shape[1], left : left + part.shape[2]] = part

            run_grid(session, x, cut, put, lambda: False)
            assert (canvas.counts == 1).all()
            np.testing.assert_array_equal(canvas, x.repeat(2, 1).repeat(2, 2))


def test_r06_results_outlive_the_next_call(backend: str, toybox: ToyBox) -> None:
    """openvino#70, model_api PR#92: outputs were views that the next inference overwrote."""
    session = toybox.session("Nearest", backend)
    results = [session(np.full((1, 3, 8, 8), v, np.float32)) for v in range(12)]
    for value, result in enumerate(results):
        assert (result == value).all()
    assert not any(np.shares_memory(a, b) for i, a in enumerate(results) for b in results[:i])


def test_r07_inputs_stay_as_they_were(backend: str, toybox: ToyBox) -> None:
    """An engine wrote into the caller's array after mixed kinds of calls."""
    session = toybox.session("InPlace", backend)
    a, b = (np.random.default_rng(i).random((1, 3, 6, 8), np.float32) for i in range(2))
    kept = a.copy(), b.copy()
    b.setflags(write=False)
    strided = np.zeros((1, 3, 12, 16), np.float32)[:, :, ::2, ::2]
    strided[:] = a
    want = session(a)
    for feed in (b, a, strided, b, a.astype(np.float64)):
        session(feed)
    np.testing.assert_array_equal(session(strided), want)
    np.testing.assert_array_equal(a, kept[0])
    np.testing.assert_array_equal(b, kept[1])
    a[:] = 0  # refilling the buffer changes no earlier result
    np.testing.assert_array_equal(session(strided), want)
    assert want.max() > 0


def test_r08_threads_do_not_mix_pictures(
    backend: str, toybox: ToyBox, picture: Callable[..., np.ndarray]
) -> None:
    """Real-ESRGAN#658, nataili#25, openvino#2349: pictures mixed in a thread pool."""
    upscale = toybox.upscaler("Convolution", backend, Tiling("tile", 12, "exact"))
    pictures = [picture(14 + 3 * i, 30 - 2 * i, seed=i) for i in range(8)]
    serial = [digest(upscale(p)) for p in pictures]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(50):
            assert list(pool.map(lambda p: digest(upscale(p)), pictures)) == serial


def test_r09_results_that_come_out_of_order(
    backend: str, toybox: ToyBox, picture: Callable[..., np.ndarray]
) -> None:
    """Asynchronous results out of order: each call takes as long as it likes, and one of them fails."""
    delays = np.random.default_rng(0).random(10_000) / 200

    def dawdles(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        number = next(numbers)
        time.sleep(delays[number])
        if number == failing:
            raise RuntimeError("planted failure")
        return outputs

    numbers, failing = count(), -1
    engine = Faulty(get_backend(backend), dawdles, *range(10_000))
    upscale = toybox.upscaler("Convolution", engine, Tiling("tile", 8))
    upscale.session.streams = 3 if engine.has_streams else 1
    plain = toybox.upscaler("Convolution", backend, Tiling("tile", 8))
    pictures = [picture(40, 30 + i, seed=i) for i in range(4)]
    want = [plain(p) for p in pictures]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, right in zip(pool.map(upscale, pictures, timeout=60), want, strict=True):
                np.testing.assert_array_equal(got, right)
        failing = next(numbers) + 7
        futures = [pool.submit(upscale, p) for p in pictures]
        errors = [future.exception(timeout=60) for future in futures]
        assert [type(error) for error in errors if error] == [ExecutionError]
        for future, error, right in zip(futures, errors, want, strict=True):
            if error is None:
                np.testing.assert_array_equal(future.result(), right)


def test_r10_no_silent_switch_of_backend(backend: str, toybox: ToyBox) -> None:
    """Real-ESRGAN PR#998, ComfyUI PR#6638: it ran, but elsewhere."""
    x = np.random.default_rng(0).random((1, 3, 8, 8), np.float32)
    broken = Faulty(get_backend(backend), raises, *range(100))
    source = "default"
    with pytest.raises(ExecutionError):
        anysize.load(source, backend=broken)(x)
    other = next(e for e in ENGINES if e != backend)
    session = anysize.load(source, backend=broken, options=Options(fallback=(other,)))
    np.testing.assert_array_equal(session(x), anysize.load(source, backend=other)(x))
    (used,) = session.stats.fallbacks
    assert used.startswith(f"{backend}:f32 -> {other}:f32: the engine failed")
    upscale = Upscaler(session)
    upscale(np.zeros((5, 5, 3), np.uint8))
    assert len(upscale.report.fallbacks) == 1
    assert upscale.report.backend == other
    with pytest.raises(anysize.BackendNotFoundError):
        anysize.load(source, backend="nothing", options=Options(fallback=(other,)))


def test_r11_f32_unless_asked(backend: str, toybox: ToyBox) -> None:
    """openvino#36715: bf16 ran where f32 was assumed."""
    import torch

    module, _ = toybox.make("EncoderDecoder")
    x = np.random.default_rng(0).random((1, 3, 32, 32), np.float32)
    want = module(torch.from_numpy(x)).numpy()
    session = toybox.session("EncoderDecoder", backend)
    assert np.abs(session(x) - want).max() <= 1e-4
    assert session.precision == session.stats.precision == "f32"
    if backend not in BF16:
        with pytest.raises(OptionError, match="f32"):
            toybox.session("EncoderDecoder", backend, precision="bf16")(x)
        return
    rough = toybox.session("EncoderDecoder", backend, precision="bf16")
    difference = np.abs(rough(x) - want).max()
    assert rough.precision == "bf16"
    assert 1e-4 < difference < 5e-2
    upscale = Upscaler(rough)
    upscale(np.zeros((8, 8, 3), np.uint8))
    assert upscale.report.precision == "bf16"


def test_r12_nan_is_an_error_and_never_black(
    backend: str, toybox: ToyBox, picture: Callable[..., np.ndarray]
) -> None:
    """Real-ESRGAN#330, IOPaint#261: NaN became uint8 zero."""
    x = picture(24, 24)
    bad = Faulty(get_backend(backend), not_a_number, 4)
    with pytest.raises(IntegrityError, match="not finite") as caught:
        toybox.upscaler("Nearest", bad, Tiling("tile", 8, 0))(x)
    assert caught.value.tile == (1, 1)
    if "bf16" in get_backend(backend).precisions:
        bad = Faulty(get_backend(backend), not_a_number, *range(100))
        options = Options(fallback=(f"{backend}:f32",))
        upscale = Upscaler("default", backend=bad, precision="bf16", options=options)
        np.testing.assert_array_equal(upscale(x), Upscaler("default", backend=backend)(x))
        how = f" -> {backend}:f32: " if backend in BF16 else ": this processor has no bf16 arithmetic"
        assert upscale.report.fallbacks[0].startswith(f"{backend}:bf16{how}")


@pytest.mark.parametrize(
    ("name", "multiple"), [("Unshuffle", 2), ("Unshuffle", 4), ("Unshuffle", 8), ("Windows", 7)]
)
def test_r13_odd_sizes(backend: str, toybox: ToyBox, name: str, multiple: int) -> None:
    """chaiNNer#985, #2918: odd sizes broke x2 and windowed models."""
    argument = {"factor" if name == "Unshuffle" else "window": multiple}
    session = toybox.session(name, backend, shapes="dynamic", **argument)
    for height, width in ((543, 337), (323, 264), (31, 29), (13, 97), (3, 3)):
        x = np.random.default_rng(0).random((height, width, 3), np.float32)
        after = (-height % multiple, -width % multiple)
        mode = "reflect" if after[0] < height and after[1] < width else "edge"
        padded = np.pad(x, ((0, after[0]), (0, after[1]), (0, 0)), mode=mode)
        want = session(padded.transpose(2, 0, 1)[None])[0].transpose(1, 2, 0)[:height, :width].clip(0, 1)
        for tiling in (Tiling("whole"), Tiling("tile", 64, "exact")):
            got = Upscaler(session, tiling=tiling)(x)
            assert got.shape == (height, width, 3)
            assert np.abs(got - want).max() <= 1e-5
        if height % multiple:
            with pytest.raises(ShapeError):
                session(x.transpose(2, 0, 1)[None])


def test_r13_pads_to_the_next_multiple_only() -> None:
    seen: list[tuple[int, ...]] = []

    def model(x: np.ndarray) -> np.ndarray:
        seen.append(x.shape)
        return x

    Upscaler(numpy_session(model, image_spec(multiple=4)))(np.zeros((3, 3, 3), np.uint8))
    assert seen == [(1, 3, 4, 4)]


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (40, 1), (2, 3), (5, 5), (15, 17)])
def test_r14_tiny_pictures(backend: str, toybox: ToyBox, size: tuple[int, int]) -> None:
    """nunif#183: tiny pictures crashed or came out black."""
    x = np.random.default_rng(0).random((*size, 3), np.float32)
    session = toybox.session("EncoderDecoder", backend)
    after = (-size[0] % 4, -size[1] % 4)
    modes = ["reflect" if n < s else "edge" for n, s in zip(after, size, strict=True)]
    padded = np.pad(x, ((0, after[0]), (0, 0), (0, 0)), mode=modes[0])
    padded = np.pad(padded, ((0, 0), (0, after[1]), (0, 0)), mode=modes[1])
    want = session(padded.transpose(2, 0, 1)[None])[0].transpose(1, 2, 0)[: size[0], : size[1]].clip(0, 1)
    for tiling in (Tiling(), Tiling("tile", 8, "exact"), Tiling("tile", 64, 32)):
        got = Upscaler(session, tiling=tiling)(x)
        assert got.shape == x.shape
        assert np.isfinite(got).all()
        assert np.abs(got - want).max() <= 1e-5
    big = Upscaler("default", backend=backend)(x)
    assert big.shape == (4 * size[0], 4 * size[1], 3)
    assert big.max() > 0.05


def test_r15_seams(backend: str) -> None:
    """Real-ESRGAN#197, #211: seams between tiles. Exact tiles have none; shorter halos say what they cost."""
    x = np.random.default_rng(0).random((90, 75, 3), np.float32)
    whole = Upscaler("default", backend=backend, tiling=Tiling("whole"))(x)
    exact = Upscaler("default", backend=backend, tiling=Tiling("tile", 24, "exact"))
    assert np.abs(exact(x) - whole).max() <= 1e-5
    assert exact.report.exact
    short = Upscaler("default", backend=backend, tiling=Tiling("tile", 24, 2))
    assert np.abs(short(x) - whole).max() > 1e-4
    assert short.report.exact is False
    assert short.report.max_error > 1e-4


def test_r16_outscale_is_a_resize_of_the_true_scale(
    backend: str, toybox: ToyBox, picture: Callable[..., np.ndarray]
) -> None:
    """Real-ESRGAN-ncnn-vulkan#19, #37, #73: -s 2 with a x4 model shuffled the tiles."""
    from anysize.pixels import resize

    x = picture(33, 21)
    upscale = Upscaler("default", backend=backend, tiling=Tiling("tile", 16, "exact"))
    assert upscale.scale == 4
    full = upscale(x.astype(np.float32) / 255)
    got = upscale(x, outscale=2)
    want = np.rint(resize(full, 66, 42).clip(0, 1) * 255)
    assert got.shape == (66, 42, 3)
    assert np.abs(got - want).max() <= 1
    assert (upscale.report.scale, upscale.report.model_scale) == (2.0, 4)
    assert upscale(x, outscale=1.5).shape == (50, 32, 3)
    assert upscale(x, outscale=4).shape == (132, 84, 3)


@pytest.mark.parametrize("engine", [e for e in ENGINES if e != "torch"])
def test_r16_a_lying_scale_is_refused(tmp_path: Path, toybox: ToyBox, engine: str) -> None:
    import onnx

    proto = onnx.load(toybox.file("Nearest"))
    (prop,) = proto.metadata_props
    spec = json.loads(prop.value)
    for size in spec["outputs"][0]["shape"][2:]:
        size["Rule"]["mul"] = 4  # the model's true scale is 2
    prop.value = json.dumps(spec)
    onnx.save(proto, tmp_path / "liar.onnx")
    upscale = Upscaler(tmp_path / "liar.onnx", backend=engine)
    with pytest.raises(IntegrityError, match=r"the contract says \(1, 3, 20, 20\)"):
        upscale(np.zeros((5, 5, 3), np.uint8))


def test_r17_transparency(backend: str) -> None:
    """ESRGAN#18, Real-ESRGAN_GUI#5: transparent edges became dark or were lost."""
    upscale = Upscaler("default", backend=backend)
    rgba = np.zeros((24, 24, 4), np.uint8)
    rgba[..., :3] = [255, 0, 255]  # hidden under zero alpha; must not show anywhere
    rgba[6:18, 6:18] = [40, 160, 40, 255]
    out = upscale(rgba)
    alpha = out[..., 3]
    assert (alpha[:16] == 0).all()
    assert (alpha[40:56, 40:56] == 255).all()
    visible = out[alpha > 0][:, :3].astype(int)
    assert np.abs(visible - [40, 160, 40]).max() <= 12
    opaque = np.dstack([rgba[..., :3], np.full((24, 24), 255, np.uint8)])
    assert (upscale(opaque)[..., 3] == 255).all()
    half = np.dstack([rgba[..., :3], np.full((24, 24), 128, np.uint8)])
    assert (upscale(half)[..., 3] == 128).all()
    assert (upscale(half, outscale=3)[..., 3] == 128).all()
    la = np.dstack([rgba[..., 1], rgba[..., 3]])
    out = upscale(la)
    assert out.shape == (96, 96, 2)
    assert (out[:16, :, 1] == 0).all()
    palette = Image.fromarray(rgba).convert("P")
    palette.info["transparency"] = int(np.asarray(palette)[0, 0])
    result = upscale(palette)
    assert result.mode == "RGBA"
    assert (np.asarray(result)[:16, :, 3] == 0).all()
    assert (np.asarray(result)[40:56, 40:56, 3] == 255).all()


def test_r18_depth_is_the_files_not_the_contents(backend: str, tmp_path: Path) -> None:
    """CodeFormer#222: depth was guessed from max > 256."""
    upscale = Upscaler("default", backend=backend)
    dark = np.full((16, 16, 3), 200, np.uint16)
    out = upscale(dark)
    assert out.dtype == np.uint16
    assert out.max() < 2000
    ramp = np.tile(np.linspace(0, 65535, 400).astype(np.uint16)[None, :, None], (8, 1, 3))
    assert len(np.unique(upscale(ramp))) > 256
    grey = upscale(np.full((9, 9, 1), 77, np.uint8))
    assert grey.shape == (36, 36, 1)
    for mode, array in (
        ("1", np.eye(12) > 0),
        ("P", (np.arange(144).reshape(12, 12) % 200).astype(np.uint8)),
        ("I;16", (np.arange(144).reshape(12, 12) * 400).astype(np.uint16)),
    ):
        image = Image.fromarray(array, mode) if mode == "P" else Image.fromarray(array)
        if mode == "P":
            image.putpalette(list(range(256)) * 3)
        image.save(tmp_path / "in.png")
        anysize.upscale_file(tmp_path / "in.png", tmp_path / "out.png", upscale)
        result = read_picture(tmp_path / "out.png").array
        assert result.shape[:2] == (48, 48)
        assert result.dtype == (np.uint16 if mode == "I;16" else np.uint8)
        assert result.shape[2] == (1 if mode != "P" else result.shape[2])


def test_r19_memory_does_not_grow_with_every_size(backend: str, toybox: ToyBox) -> None:
    """openvino#20633, onnxruntime#7271: each new size was kept for ever."""
    toybox.make("Nearest")
    code = """
        import gc, sys, numpy as np, psutil, toys
        import anysize
        backend, file = sys.argv[1:]
        source = toys.Nearest() if backend == "torch" else file
        session = anysize.load(source, backend=backend, options={"max_live": 4})
        rng, resident = np.random.default_rng(0), []
        for i in range(1500):
            x = rng.random((1, 3, *rng.integers(8, 96, 2)), np.float32)
            assert np.array_equal(session(x), x.repeat(2, 2).repeat(2, 3))
            assert session.stats.live <= 4
            if i in (499, 1499):
                gc.collect()
                resident.append(psutil.Process().memory_info().rss)
        print(resident[1] / resident[0])
    """
    assert float(in_a_fresh_process(code, backend, toybox.file("Nearest"), cwd=TESTS)) <= 1.05


def test_r20_what_does_not_fit_is_refused_or_cut_smaller(
    backend: str, picture: Callable[..., np.ndarray]
) -> None:
    """Out of memory in the middle of large pictures."""
    x = picture(300, 300)
    upscale = Upscaler("default", backend=backend)
    want, own = upscale(x), psutil.Process().memory_info().rss
    tiles = set()
    for more in (1, 20, 50, 100, 200, 2000):
        limited = Upscaler(upscale.session, tiling=Tiling(memory=own + more * 2**20))
        calls = upscale.session.stats.calls
        try:
            got = limited(x)
        except MemoryBudgetError:
            assert upscale.session.stats.calls == calls
            tiles.add("refused")
        else:
            assert np.abs(got.astype(int) - want).max() <= 1
            tiles.add(limited.report.tile or "whole")
    assert "refused" in tiles
    assert len(tiles) >= 2


def test_r21_other_weights_under_the_same_name(backend: str, toybox: ToyBox, tmp_path: Path) -> None:
    """openvino#21942: a compiled blob was taken for other weights than those it was made of."""
    x = np.random.default_rng(0).random((1, 3, 12, 12), np.float32)
    results = []
    for seed in (0, 1, 0):
        if backend == "torch":
            path = write_weights(tmp_path / "model.pth", seed)
        else:
            path = tmp_path / "model.onnx"
            path.write_bytes(toybox.file("Convolution", radius=1 + seed).read_bytes())
        with anysize.load(path, backend=backend, options=Options(cache_dir=tmp_path / "cache")) as session:
            results.append(session(x))
    np.testing.assert_array_equal(results[0], results[2])
    assert np.abs(results[0] - results[1]).max() > 1e-3


def test_r22_a_bad_file_does_not_end_the_batch(backend: str, tmp_path: Path) -> None:
    """upscayl#204: one bad file ended a batch of thousands."""
    folder = tmp_path / "in"
    folder.mkdir()
    broken_files(folder)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "anysize.cli",
            "upscale",
            folder,
            "-o",
            tmp_path / "out",
            "-b",
            backend,
            "--json",
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    status = {Path(r["input"]).name: r["status"] for r in rows}
    assert [name for name, s in status.items() if s == "ok"] == ["good.jpg"]
    assert status["good.png"] == "failed"  # its result would be good_x4.png too
    bad = [r for r in rows if r["status"] == "failed"]
    assert all(Path(r["input"]).name in r["error"] for r in bad if "is taken by" not in r["error"])
    assert len(bad) == len(rows) - 1 >= 8
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["anysize.jsonl", "good_x4.png"]
    assert "Traceback" not in done.stderr
    assert "1 of" in done.stderr


def test_r23_interrupting_leaves_no_picture(backend: str, tmp_path: Path) -> None:
    """An interrupted run left a broken picture: SIGINT and SIGKILL in the middle."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), np.uint8)).save(
        tmp_path / "in.png"
    )
    command = [
        sys.executable,
        "-m",
        "anysize.cli",
        "upscale",
        tmp_path / "in.png",
        "-o",
        tmp_path / "out.png",
    ]
    command += ["-b", backend, "--method", "tile", "--tile", "24"]
    for number, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        deadline = time.time() + 60
        while time.time() < deadline and not _is_running_tiles(process.pid):
            time.sleep(0.1)
        time.sleep(0.5)
        assert process.poll() is None, "finished before it could be interrupted"
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        assert [f.name for f in tmp_path.iterdir()] == ["in.png"]


def _is_running_tiles(pid: int) -> bool:
    """More processor time than any import takes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") > 6


def test_r24_one_core_and_a_bad_size(backend: str, toybox: ToyBox) -> None:
    """One-threaded OpenVINO returned the previous result for a bad size, and stayed broken after it."""
    toybox.make("EncoderDecoder")
    file = toybox.file("EncoderDecoder")
    code = """
        import os, sys, numpy as np, torch, toys
        import anysize
        from anysize import ExecutionError, IntegrityError, ShapeError
        from anysize.backends import EngineOptions, Model, get_backend
        from anysize.guard import ShapeGuard
        from anysize.session import Session

        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        torch.set_num_threads(1)
        backend, file = sys.argv[1:]
        source = toys.EncoderDecoder() if backend == "torch" else file
        honest = anysize.load(source, backend=backend, options={"threads": 1})
        good = [np.random.default_rng(i).random((1, 3, 8, 12), np.float32) for i in range(3)]
        fresh = anysize.load(source, backend=backend)
        want = [fresh(x) for x in good]
        bad = np.random.default_rng(9).random((1, 3, 9, 13), np.float32)
        engine = get_backend(backend)
        form = "module" if backend == "torch" else "onnx"
        data = toys.EncoderDecoder().eval() if backend == "torch" else open(file, "rb").read()
        sessions = [honest]
        for shapes in ("static", "dynamic"):  # a contract that lies: any size is fine, it says
            model = Model(form, data, toys.image_spec())
            options = EngineOptions(threads=1)
            sessions.append(Session([ShapeGuard(engine, model, options, shapes, 2)]))
        for session in sessions:
            np.testing.assert_allclose(session(good[0]), want[0], atol=1e-6)
            try:
                session(bad)
            except (ShapeError, ExecutionError, IntegrityError) as error:
                print(type(error).__name__)
            else:
                raise SystemExit("a bad size gave a result")
            np.testing.assert_allclose(session(good[1]), want[1], atol=1e-6)
            np.testing.assert_allclose(session(good[2]), want[2], atol=1e-6)
    """
    lines = in_a_fresh_process(code, backend, file, cwd=TESTS).split()
    assert lines[0] == "ShapeError"
    assert set(lines[1:]) <= {"ExecutionError", "IntegrityError"}
    assert len(lines) == 3


def test_the_oracle_is_right() -> None:
    x = np.arange(12, dtype=np.float32).reshape(1, 1, 3, 4)
    assert nearest(2)(x).shape == (1, 1, 6, 8)
    with pytest.raises(ModelLoadError):
        anysize.load("nothing")
