"""Tile geometry and the tiled result, against the fake nearest model and real convolutions."""

from __future__ import annotations

import itertools
import threading

import numpy as np
import pytest
from anysize import Cancelled, OptionError, Tiling, Upscaler
from anysize.tiling import grid, spans
from conftest import ToyBox
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import NumpyBackend, image_spec, nearest, numpy_session


@given(st.integers(1, 300), st.integers(1, 80), st.integers(0, 60), st.integers(1, 9))
@settings(max_examples=500)
def test_spans_are_uniform_aligned_complete_and_haloed(size: int, core: int, halo: int, step: int) -> None:
    size *= step
    extent, cut = spans(size, core, halo, step)
    assert extent <= size
    assert extent % step == 0
    assert cut[0].first == 0
    assert cut[-1].last == size
    for before, after in itertools.pairwise(cut):
        assert before.last == after.first
    for span in cut:
        assert span.start % step == 0
        assert span.start >= 0
        assert span.start + extent <= size
        assert span.first < span.last
        assert span.first == 0 or span.first - span.start >= halo
        assert span.last == size or span.start + extent - span.last >= halo


def test_no_more_tiles_than_needed() -> None:
    assert len(spans(128, 128, 16, 1)[1]) == 1
    assert len(spans(160, 128, 16, 1)[1]) == 1  # the tile reaches both borders, where no halo is needed
    assert len(spans(161, 128, 16, 1)[1]) == 2
    assert grid(160, 272, 128, 16, (1, 1)).work == 2 * 160 * 160 / (160 * 272)


@pytest.mark.parametrize("overlap", ["exact", 0, 3])
@pytest.mark.parametrize("tile", [1, 5, 8])
def test_nearest_is_np_repeat_at_all_sizes(tile: int, overlap: str | int) -> None:
    upscale = Upscaler(
        numpy_session(nearest(2), image_spec(2, radius=0)), tiling=Tiling("tile", tile, overlap)
    )
    for height in range(1, 3 * tile + 2):
        for width in (1, tile, 2 * tile + 1, 3 * tile + 1):
            x = np.random.default_rng(height * 100 + width).random((height, width, 3), np.float32)
            np.testing.assert_array_equal(upscale(x), x.repeat(2, 0).repeat(2, 1))


def test_all_tiles_have_one_shape() -> None:
    backend = NumpyBackend()
    session = numpy_session(nearest(1), image_spec(), backend=backend)
    Upscaler(session, tiling=Tiling("tile", 16, 4))(np.zeros((70, 45, 3), np.float32))
    assert [s["x"] for s in backend.compiled] == [(1, 3, 24, 24)]


@pytest.mark.parametrize("size", [(41, 29), (64, 64), (23, 90), (7, 5)])
def test_exact_halo_equals_whole(backend: str, toybox: ToyBox, size: tuple[int, int]) -> None:
    x = np.random.default_rng(0).random((*size, 3), np.float32)
    whole = toybox.upscaler("Convolution", backend, Tiling("whole"))(x)
    tiled = toybox.upscaler("Convolution", backend, Tiling("tile", 16, "exact"))
    assert np.abs(tiled(x) - whole).max() <= 1e-6
    assert tiled.report.exact
    assert tiled.report.overlap == 3
    assert tiled.report.max_error is None


def test_a_halo_below_the_radius_differs_and_says_how_much(backend: str, toybox: ToyBox) -> None:
    x = np.random.default_rng(0).random((60, 70, 3), np.float32)
    whole = toybox.upscaler("Convolution", backend, Tiling("whole"))(x)
    short = toybox.upscaler("Convolution", backend, Tiling("tile", 16, 1))
    difference = np.abs(short(x) - whole).max()
    assert difference > 1e-3
    assert short.report.exact is False
    assert 0.2 * difference <= short.report.max_error <= difference + 1e-6


@pytest.mark.parametrize("name", ["Unshuffle", "Windows", "EncoderDecoder"])
def test_tiles_keep_to_the_models_grid(backend: str, toybox: ToyBox, name: str) -> None:
    x = np.random.default_rng(0).random((97, 61, 3), np.float32)
    whole = toybox.upscaler(name, backend, Tiling("whole"))(x)
    tiled = toybox.upscaler(name, backend, Tiling("tile", 17, "exact"))(x)
    assert np.abs(tiled - whole).max() <= 1e-5


def test_whole_picture_models_are_not_tiled(backend: str, toybox: ToyBox) -> None:
    x = np.random.default_rng(0).random((50, 40, 3), np.float32)
    with pytest.raises(OptionError, match="whole picture"):
        toybox.upscaler("WholePicture", backend, Tiling("tile", 16))(x)
    automatic = toybox.upscaler("WholePicture", backend)
    automatic(x)
    assert automatic.report.method == "whole"
    insisted = toybox.upscaler("WholePicture", backend, Tiling("tile", 16, 4))
    insisted(x)
    difference = float(np.abs(insisted(x) - automatic(x)).max())
    assert insisted.report.exact is False
    assert insisted.report.max_error == pytest.approx(difference, abs=1e-5)
    session = insisted.session
    tight = Upscaler(session, tiling=Tiling("tile", 64, 4))
    larger = np.random.default_rng(0).random((400, 400, 3), np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("anysize.planning.available", lambda: 55 * 2**20)
        tight(larger)
    assert (tight.report.exact, tight.report.max_error) == (False, None)
    assert "how far tiles are off is not known" in tight.report.reason


def test_auto_tiles_large_pictures_exactly_while_that_is_cheap() -> None:
    upscale = Upscaler(numpy_session(nearest(1), image_spec(radius=18)))
    upscale(np.zeros((256, 256, 3), np.float32))
    assert (upscale.report.method, upscale.report.exact) == ("whole", True)
    upscale(np.zeros((700, 1200, 3), np.float32))
    assert (upscale.report.method, upscale.report.exact, upscale.report.overlap) == ("tile", True, 18)


def test_auto_takes_the_smallest_good_halo_where_exact_is_dear() -> None:
    def leak(x: np.ndarray) -> np.ndarray:
        """Each pixel adds 1% of the one 40 rows above it."""
        y = x.copy()
        y[:, :, 40:] += 0.01 * x[:, :, :-40]
        return y * 0.9

    upscale = Upscaler(numpy_session(leak, image_spec(radius=300)))
    x = np.random.default_rng(0).random((900, 900, 3), np.float32)
    upscale(x)
    assert upscale.report.method == "tile"
    assert upscale.report.overlap == 48
    assert not upscale.report.exact
    assert upscale.report.max_error == 0


def test_progress_counts_up_and_cancel_stops() -> None:
    seen: list[tuple[int, int]] = []
    upscale = Upscaler(numpy_session(nearest(1), image_spec()), tiling=Tiling("tile", 10, 0))
    x = np.zeros((30, 30, 3), np.float32)
    upscale(x, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 9) for i in range(1, 10)]
    stop = threading.Event()
    seen.clear()

    def progress(done: int, total: int) -> None:
        seen.append((done, total))
        if done == 4:
            stop.set()

    with pytest.raises(Cancelled, match="row 1, column 1"):
        upscale(x, progress=progress, cancel=stop)
    assert len(seen) == 4
    with pytest.raises(Cancelled):
        upscale(x, cancel=lambda: True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("tile", 0),
        ("tile", -5),
        ("tile", 2.5),
        ("tile", 8, -1),
        ("tile", 8, "some"),
        ("spiral",),
        ("tile", True),
    ],
)
def test_bad_tilings_are_refused(arguments: tuple) -> None:
    with pytest.raises(OptionError):
        Tiling(*arguments)
