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


def test_files_that_changed_since_are_not_run(net: Path, tmp_path: Path) -> None:
    param, weights = tmp_path / "model.param", tmp_path / "model.bin"
    param.write_bytes(net.read_bytes())
    weights.write_bytes(net.with_suffix(".bin").read_bytes())
    session = load(param)
    weights.write_bytes(bytes(len(weights.read_bytes())))
    with pytest.raises(ModelLoadError, match="has changed since"):
        session(np.zeros((1, 3, 8, 8), np.float32))


def test_numbers_for_each_channel_are_no_misfit(tmp_path: Path) -> None:
    """A global pooling's result multiplies every pixel of its channel."""
    (tmp_path / "model.param").write_text(
        "7767517\n4 5\nInput in 0 1 x 0=0 1=0 2=3\nSplit split 1 2 x a b\n"
        "Pooling mean 1 1 a m 0=1 4=1\nBinaryOp times 2 1 b m output 0=2\n"
    )
    (tmp_path / "model.bin").write_bytes(b"")
    session = load(tmp_path / "model.param")
    x = np.random.default_rng(0).random((1, 3, 6, 8), np.float32)
    assert np.abs(session(x) - x * x.mean((2, 3), keepdims=True)).max() <= 1e-6


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
