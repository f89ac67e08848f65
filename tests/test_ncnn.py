"""ncnn's own files through the same doors: probed, checked, upscaled, and refused where they are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anysize
import numpy as np
import pytest
from anysize import ModelLoadError, OptionError, ShapeError, Tiling, Upscaler, load
from anysize.backends import get_backend
from conftest import ToyBox

pytestmark = pytest.mark.skipif("ncnn" not in anysize.available_backends(), reason="needs ncnn")


@pytest.fixture
def net(toybox: ToyBox) -> Path:
    """x2 by a convolution and a shuffle of pixels."""
    return Path(toybox.model("Doubling", get_backend("ncnn")).data)


def test_a_file_is_probed_and_runs_at_any_size(net: Path, toybox: ToyBox, picture: Any) -> None:
    session = load(net)
    assert session.backend == "ncnn"
    assert (session.spec.scale, session.spec.channels) == (2, 3)
    assert session.spec.radius is None  # nothing traces it
    x = np.random.default_rng(0).random((1, 3, 13, 18), np.float32)
    want = toybox.session("Doubling", "onnxruntime")(x)
    assert np.abs(session(x) - want).max() <= 1e-5
    upscale = Upscaler(net)
    for size in ((1, 1), (7, 30), (40, 21)):
        assert upscale(picture(*size)).shape == (2 * size[0], 2 * size[1], 3)
    assert upscale.report.backend == "ncnn"
    with pytest.raises(OptionError, match="no known receptive radius"):
        Upscaler(net, tiling=Tiling("tile", 16))(picture(60, 60))


def test_sizes_that_do_not_fit_inside_are_found(toybox: ToyBox) -> None:
    """ncnn adds tensors of different sizes without a word; 9 would have become 12."""
    session = load(toybox.model("EncoderDecoder", get_backend("ncnn")).data)
    assert [d.multiple_of for d in session.spec.dims.values()] == [4, 4]
    with pytest.raises(ShapeError):
        session(np.zeros((1, 3, 9, 9), np.float32))


def test_bf16_is_near(net: Path) -> None:
    x = np.random.default_rng(0).random((1, 3, 30, 30), np.float32)
    rough = load(net, precision="bf16")
    assert 0 < np.abs(rough(x) - load(net)(x)).max() < 0.05
    assert rough.precision == "bf16"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p, b: b.unlink(), "no such file; ncnn keeps"),
        (lambda p, b: b.write_bytes(b.read_bytes()[:-4]), "cannot load"),
        (lambda p, b: b.write_bytes(b""), "cannot load"),
        (lambda p, b: p.write_text(p.read_text().rpartition("Pixel")[0]), "cut short"),
        (lambda p, b: p.write_text(p.read_text().replace("6=", "7=")), "not an ncnn .param"),
        (lambda p, b: p.write_bytes(b"\xff\xfe\x00"), "not an ncnn .param"),
        (lambda p, b: p.write_text("7767517\n"), "not an ncnn .param"),
    ],
)
def test_damaged_files_are_refused(spoil: Any, message: str, net: Path, tmp_path: Path) -> None:
    param, weights = tmp_path / "model.param", tmp_path / "model.bin"
    param.write_bytes(net.read_bytes())
    weights.write_bytes(net.with_suffix(".bin").read_bytes())
    load(param)
    spoil(param, weights)
    with pytest.raises(ModelLoadError, match=message):
        load(param)


def test_other_engines_do_not_take_them(net: Path) -> None:
    with pytest.raises(ModelLoadError, match="not ncnn"):
        load(net, backend="onnxruntime")
    with pytest.raises(ModelLoadError, match="takes ncnn"):
        load("default", backend="ncnn")


def test_real_weights(assets: Path, picture: Any) -> None:
    """The same model as for the others, but its weights were rounded to f16."""
    x = picture(40, 50, 3, np.float32)
    got = Upscaler(assets / "weights" / "realesr-animevideov3-x4.param")(x)
    want = Upscaler(assets / "weights" / "realesr-animevideov3.pth", backend="torch")(x)
    assert np.abs(got - want).max() <= 3 / 255
