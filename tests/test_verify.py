"""Places of a result that are computed once more: the right ones pass, wrong ones do not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import pytest
from anysize import IntegrityError, OptionError, Tiling, Upscaler
from anysize.backends import EngineOptions, get_backend
from anysize.files import write_picture
from anysize.guard import ShapeGuard
from anysize.session import Session
from conftest import ENGINES, ToyBox
from fuzzing import NIGHTLY
from toys import Faulty, raises

GRAPH_ENGINES = [engine for engine in ENGINES if engine != "torch"]
METHODS = ("tile", "whole", "stream")
WAYS = [(e, m) for e in ENGINES for m in METHODS if m != "stream" or e in GRAPH_ENGINES]
#: places have at most this side
SIDE = 64


def upscaler(toybox: ToyBox, engine: Any, method: Any, name: str = "Doubling", **how: Any) -> Upscaler:
    session = Session([ShapeGuard(engine, toybox.model(name, engine), EngineOptions(), "auto", 4)])
    return Upscaler(session, tiling=Tiling(method, None if method == "whole" else 16), verify=True, **how)


@pytest.mark.parametrize(("engine", "method"), WAYS)
@pytest.mark.parametrize("name", ["Doubling", "Unshuffle", "EncoderDecoder", "Convolution"])
def test_right_pictures_pass(
    toybox: ToyBox, engine: str, method: str, name: str, picture: Callable[..., np.ndarray]
) -> None:
    if name == "Unshuffle" and method == "stream":
        pytest.skip("not in bands")
    upscale = upscaler(toybox, get_backend(engine), method, name)
    plain = Upscaler(upscale.session, tiling=upscale.tiling)
    kinds = [(3, np.uint8), (4, np.uint16), (1, np.float32), (2, np.uint8)]
    for i, (height, width) in enumerate([(70, 90), (200, 33), (1, 1), (101, 67)] * 2):
        channels, dtype = kinds[i % len(kinds)]
        x = picture(height, width, channels, dtype, seed=i)
        np.testing.assert_array_equal(upscale(x), plain(x))
        assert upscale.report is not None
        assert upscale.report.verified >= 1
        assert plain.report is not None
        assert plain.report.verified == 0


@pytest.mark.parametrize(("engine", "method"), WAYS)
def test_wrong_pictures_do_not(
    toybox: ToyBox, engine: str, method: str, tmp_path: Path, picture: Callable[..., np.ndarray]
) -> None:
    """All calls but those of the verification's own program are off by a twentieth of the range."""
    write_picture(tmp_path / "in.png", picture(100, 90) // 2)

    class Off(Faulty):
        """Programs for pieces as large as the places come after those for the picture."""

        def run(self, inner: Any, feeds: Any) -> dict[str, np.ndarray]:
            outputs = inner.run(feeds)
            if feeds["x"].shape[3] != SIDE + 2:
                outputs["output"] += np.float32(0.05)
            return outputs

    upscale = upscaler(toybox, Off(get_backend(engine), raises), method)
    assert upscale.session.spec.radius == 1
    with pytest.raises(IntegrityError, match=r"verification: rows .* differ by 1[23]\.\d\d/255"):
        anysize.upscale_file(tmp_path / "in.png", tmp_path / "out.png", upscale)
    assert [f.name for f in tmp_path.iterdir()] == ["in.png"]


def test_a_tile_in_anothers_place_is_found(
    backend: str, toybox: ToyBox, monkeypatch: pytest.MonkeyPatch, picture: Callable[..., np.ndarray]
) -> None:
    """In one of the pictures at the latest: the places are random."""
    upscale = upscaler(toybox, get_backend(backend), "tile")
    real = anysize.work.run_grid

    def shifted(session: Any, planes: Any, cut: Any, put: Any, *rest: Any) -> Any:
        return real(session, planes, cut, lambda top, left, values: put(top, left, values[:, ::-1]), *rest)

    monkeypatch.setattr(anysize.work, "run_grid", shifted)
    with pytest.raises(IntegrityError, match="verification"):
        upscale(picture(300, 300))


def test_what_cannot_be_verified_is_refused(toybox: ToyBox, backend: str) -> None:
    session = toybox.session("WholePicture", backend)
    with pytest.raises(OptionError, match="no part of it can be computed again"):
        Upscaler(session, verify=True)
    with pytest.raises(OptionError, match="verify must be True or False"):
        Upscaler(toybox.session("Nearest", backend), verify="yes")  # type: ignore[arg-type]


def test_tiles_that_err_are_held_against_their_error(
    backend: str, toybox: ToyBox, picture: Callable[..., np.ndarray]
) -> None:
    session = toybox.session("Convolution", backend)
    upscale = Upscaler(session, tiling=Tiling("tile", 16, 0), verify=True)
    upscale(picture(150, 150))
    assert upscale.report is not None
    assert upscale.report.exact is False
    assert upscale.report.verified >= 1


def test_the_command_says_how_much(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from anysize.cli import main

    write_picture(tmp_path / "in.png", np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8))
    with pytest.raises(SystemExit) as caught:
        main(["upscale", str(tmp_path / "in.png"), "-o", str(tmp_path / "out.png"), "--verify"])
    assert caught.value.code == 0
    assert "verified in 1 place in" in capsys.readouterr().out


@pytest.mark.skipif(not NIGHTLY, reason="a measurement of a minute or two")
@pytest.mark.parametrize(("engine", "method"), [way for way in WAYS if way[1] != "whole"])
def test_what_it_costs(
    engine: str,
    method: Any,
    picture: Callable[..., np.ndarray],
    record_property: Callable[[str, object], None],
) -> None:
    """The median of five ratios, with and without in turns, after a first run of each; 1 megapixel, x4."""
    ways = [Upscaler(backend=engine, tiling=Tiling(method), verify=verify) for verify in (False, True)]
    x, ratios = picture(1000, 1000), []
    for _ in range(6):
        seconds = []
        for upscale in ways:
            started = time.perf_counter()
            upscale(x)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
    ratio = statistics.median(ratios[1:])
    record_property("time", f"x {ratio:.3f} ({engine})")
    assert ratio < 1.25
