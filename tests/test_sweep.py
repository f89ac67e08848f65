"""The sweep over sizes: time, memory and likeness of each resolution on each engine."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anysize import BackendUnavailableError, ExecutionError, ModelLoadError, OptionError
from anysize.cli import main
from anysize.files import write_picture
from anysize.sweep import Sweep, _ssim, sweep
from conftest import ENGINES, ToyBox

GRAPHS = [name for name in ENGINES if name != "torch"]


@pytest.fixture(scope="module")
def waves() -> np.ndarray:
    """Smooth in its left half, noise in its right, 90 x 150."""
    y, x = np.mgrid[:90, :150]
    smooth = 127 + 100 * np.sin(x / 20 + y / 30)
    noise = np.random.default_rng(0).integers(0, 256, (90, 150))
    return np.repeat(np.where(x < 75, smooth, noise)[..., None], 3, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def measured(toybox: ToyBox, waves: np.ndarray) -> Sweep:
    model = str(toybox.file("Identity"))
    region = (5, 10, 50, 60)
    return sweep(model, waves, region=region, backends=GRAPHS, resolutions=(40, 150, 300), rounds=2)


def test_likeness_grows_with_the_resolution(measured: Sweep) -> None:
    """A model that changes nothing: what is lost is the resizing, and most of it is noise."""
    for engine in GRAPHS:
        small, same, large = (r for r in measured.rows if r.backend == engine)
        assert small.ssim < 0.9 < small.ssim_region < 1
        assert same.ssim == pytest.approx(1, abs=1e-6)
        assert same.ssim_region == pytest.approx(1, abs=1e-6)
        assert 0.9 < large.ssim < 1
        assert [(r.width, r.height) for r in (small, same, large)] == [(40, 24), (150, 90), (300, 180)]


def test_time_and_memory_are_those_of_a_process(measured: Sweep) -> None:
    for row in measured.rows:
        assert 0 < row.spread[0] <= row.seconds <= row.spread[1] < 5
        assert row.seconds < row.first < 60
        assert 30 * 2**20 < row.peak < 2**30
        assert row.method == "whole"
    assert not measured.left_out


def test_what_is_written(measured: Sweep, tmp_path: Path) -> None:
    made = {path.name: path for path in measured.write(tmp_path / "new")}
    assert json.loads(made["sweep.json"].read_text())["rows"][0]["ssim"] == measured.rows[0].ssim
    text = made["sweep.md"].read_text()
    assert "a picture of 150 x 90; region: 5 px from the left, 10 from the top, 50 x 60" in text
    assert text.count("\n| ") == 1 + len(measured.rows)
    assert made["sweep.png"].read_bytes().startswith(b"\x89PNG")


def test_ssim_is_the_published_one() -> None:
    """Wang et al. (2004): of flat pictures only the means count, (2ab + c) / (a^2 + b^2 + c), c = 0.01^2."""
    a, b = (np.full((20, 20, 3), value, np.float32) for value in (0.25, 0.75))
    assert _ssim(a, b) == pytest.approx((2 * 0.1875 + 1e-4) / (0.0625 + 0.5625 + 1e-4), abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"region": (0, 0, 10, 50)}, "a region is left,top,width,height within the picture of 150 x 90"),
        ({"region": (120, 0, 50, 50)}, "within the picture"),
        ({"region": (-1, 0, 50, 50)}, "within the picture"),
        ({"rounds": 0}, "at least 1"),
        ({"resolutions": ()}, "at least 1"),
        ({"methods": ["magic"]}, "method must be"),
        ({"backends": ["none"]}, "'none' is not installed"),
    ],
)
def test_wrong_requests(arguments: dict[str, Any], says: str, waves: np.ndarray) -> None:
    with pytest.raises(OptionError, match=says):
        sweep("default", waves, **arguments)


def test_other_models_and_tiny_pictures_are_refused(waves: np.ndarray) -> None:
    with pytest.raises(ModelLoadError, match="not a model that restyles"):
        sweep("default", waves, backends=GRAPHS[:1])
    with pytest.raises(OptionError, match="11 pixels at least a side"):
        sweep("default", waves[:5])


def test_where_nothing_runs(waves: np.ndarray, toybox: ToyBox) -> None:
    with pytest.raises(ExecutionError, match=r"nothing ran: .*exact tiles are impossible"):
        sweep(
            str(toybox.file("WholePicture")),
            waves,
            backends=GRAPHS[:1],
            methods=["tile"],
            resolutions=[50],
        )


def test_without_scikit_image(waves: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "skimage.metrics", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'anysize\[bench\]'"):
        sweep("default", waves)


def test_the_command(
    toybox: ToyBox,
    waves: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_picture(tmp_path / "in.png", waves)
    picture = ["--picture", str(tmp_path / "in.png")]
    command = ["bench", "--sweep", "sizes", "-m", str(toybox.file("Identity")), "--backends", GRAPHS[0]]
    tail = ["--rounds", "1", "-o", str(tmp_path / "out"), "--json"]
    monkeypatch.setattr(sys, "argv", ["anysize", *command, *picture, "--region", "5,5,40,40", *tail])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 0
    found = json.loads(capsys.readouterr().out)
    assert found["region"] == [5, 5, 40, 40]
    assert len(found["rows"]) == 5
    for wrong, says in (
        ([*picture, "--sweep", "colours"], "--sweep takes 'sizes'"),
        ([], "takes a --picture"),
        ([*picture, "--size", "64x64"], "no --size"),
        ([*picture, "--region", "1,2,3"], "--region must be LEFT,TOP"),
    ):
        monkeypatch.setattr(sys, "argv", ["anysize", *command, *tail, *wrong])
        with pytest.raises(SystemExit) as done:
            main()
        assert done.value.code == 2
        assert says in " ".join(capsys.readouterr().err.split())


def test_a_region_without_a_sweep(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["anysize", "bench", "--region", "1,2,30,40"])
    with pytest.raises(SystemExit) as done:
        main()
    assert done.value.code == 2
    assert "--region is for --sweep sizes" in capsys.readouterr().err
