"""bf16 only where the picture's own crops pass, int8 only where other crops do."""

from __future__ import annotations

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anysize
import anysize.exporters.quantizing
import anysize.precision
import numpy as np
import pytest
from anysize import (
    BackendUnavailableError,
    ExecutionError,
    ImageError,
    OptionError,
    Options,
    Session,
    Tiling,
    Upscaler,
    load,
    upscale_file,
)
from anysize.bench_worker import picture as photograph
from anysize.files import read_picture, write_picture
from anysize.precision import CALIBRATING, CROPS, JUDGING, Precisions, busiest, crops
from conftest import ENGINES, needs_bf16


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(1 / np.square(a.astype(np.float64) - b).mean()))


@needs_bf16
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_bf16_is_taken_where_the_picture_passes(channels: int, picture: Any) -> None:
    x = picture(300, 280, channels, np.float32) / 4  # white noise of full contrast may not pass
    auto = Upscaler("default", backend="openvino", precision="auto")
    result = auto(x)
    assert auto.report.precision == "bf16"
    assert "dB from f32" in auto.report.precision_reason
    want = Upscaler("default", backend="openvino")(x)
    assert decibels(result[:, :, :3], want[:, :, :3]) >= 50
    assert not np.array_equal(result, want)


@needs_bf16
def test_f32_is_kept_where_it_does_not(picture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anysize.precision, "LEAST_DB", 90)
    x = picture(300, 280)
    auto = Upscaler("default", backend="openvino", precision="auto")
    result = auto(x)
    assert auto.report.precision == "f32"
    assert "90 dB are asked for" in auto.report.precision_reason
    assert np.array_equal(result, Upscaler("default", backend="openvino")(x))


@needs_bf16
def test_f32_is_kept_where_bf16_fails(picture: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    auto = Upscaler("default", backend="openvino", precision="auto")
    run = Session.run

    def fails(self: Session, *arguments: Any, **options: Any) -> Any:
        if self is auto._precisions.rough:
            raise ExecutionError("no", backend="openvino", shape=None)
        return run(self, *arguments, **options)

    monkeypatch.setattr(Session, "run", fails)
    auto(picture(300, 280))
    assert auto.report.precision == "f32"
    assert "bf16 failed on the probe: no" in auto.report.precision_reason


@pytest.mark.parametrize("size", [(60, 60), (20, 5000), (255, 256)])
def test_a_picture_too_small_to_probe_runs_in_f32(backend: str, size: tuple[int, int], picture: Any) -> None:
    auto = Upscaler("default", backend=backend, precision="auto", tiling=Tiling(tile=256))
    auto(picture(*size))
    assert auto.report.precision == "f32"
    assert auto.report.precision_reason


@pytest.mark.skipif("onnxruntime" not in ENGINES, reason="needs onnxruntime")
def test_an_engine_without_bf16_says_so(picture: Any) -> None:
    auto = Upscaler("default", backend="onnxruntime", precision="auto")
    auto(picture(260, 260))
    assert auto.report.precision == "f32"
    assert "not bf16" in auto.report.precision_reason
    assert load("default", backend="onnxruntime", precision="auto").precision == "f32"


@needs_bf16
def test_a_session_decides_on_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load("default", backend="openvino", precision="auto").precision == "bf16"
    monkeypatch.setattr(anysize.precision, "LEAST_DB", 90)
    session = load("default", backend="openvino", precision="auto")
    assert session.precision == "f32"
    session(np.zeros((1, 3, 9, 9), np.float32))  # not the one that was closed


@needs_bf16
def test_files_are_probed_before_they_are_read(tmp_path: Path, picture: Any) -> None:
    write_picture(tmp_path / "in.png", picture(600, 300))
    tiling = Tiling("stream")
    auto = Upscaler("default", backend="openvino", precision="auto", tiling=tiling)
    report = upscale_file(tmp_path / "in.png", tmp_path / "auto.png", auto)
    assert (report.method, report.precision) == ("stream", "bf16")
    upscale_file(
        tmp_path / "in.png", tmp_path / "bf16.png", backend="openvino", precision="bf16", tiling=tiling
    )
    assert (tmp_path / "auto.png").read_bytes() == (tmp_path / "bf16.png").read_bytes()


def test_a_fallback_is_of_one_precision() -> None:
    with pytest.raises(OptionError, match="a fallback runs in f32 or bf16, not in auto"):
        load("default", options=Options(fallback=("openvino:auto",)))


def test_the_busiest_crops_are_taken(picture: Any) -> None:
    spec = load("default", backend=ENGINES[0]).spec
    x = np.full((400, 400, 3), 128, np.uint8)
    x[96 * 2 : 96 * 3, 96:192] = picture(96, 96)
    probes = busiest((x,), 400, 400, spec)
    assert len(probes) == CROPS
    assert np.allclose(
        next(iter(probes[0].values())), x[96 * 2 : 96 * 3, 96:192].transpose(2, 0, 1)[None] / 255, atol=1e-6
    )


def test_alpha_and_each_plane_are_probed(picture: Any) -> None:
    spec = load("default", backend=ENGINES[0]).spec
    x = np.full((400, 400, 4), 128, np.uint8)
    x[:96, :96, 3] = picture(96, 96)[:, :, 0]
    probes = busiest((x,), 400, 400, spec)
    assert len(probes) == 2 * CROPS
    grey = next(iter(probes[CROPS].values()))
    assert np.allclose(grey, np.repeat(x[None, None, :96, :96, 3] / 255, 3, axis=1), atol=1e-6)


@needs_bf16
@pytest.mark.skipif("onnxruntime" not in ENGINES, reason="needs onnxruntime")
def test_fallbacks_are_neither_probed_nor_lost(picture: Any) -> None:
    x = picture(300, 280)
    options = Options(fallback=("openvino:f32",))
    auto = Upscaler("default", backend="onnxruntime", precision="auto", options=options)
    auto(x)
    assert (auto.report.backend, auto.report.precision) == ("onnxruntime", "f32")
    assert "not bf16" in auto.report.precision_reason
    pair = Precisions("default", "openvino", Options(fallback=("onnxruntime",)))
    assert [(g.backend.name, g.options.precision) for g in pair.rough._guards] == [
        ("openvino", "bf16"),
        ("onnxruntime", "f32"),
    ]
    pair.close()


@needs_bf16
def test_a_session_of_several_inputs_decides_too(tmp_path: Path, toybox: Any) -> None:
    import toys
    from anysize.exporters import export

    file = export(toys.TwoInputs(), tmp_path / "two.onnx", inputs=[("n", 3, "h", "w"), ("n", 1, "h2", "w2")])
    assert load(file, backend="openvino", precision="auto").precision in ("f32", "bf16")


def test_both_are_freed() -> None:
    pair = Precisions("default", ENGINES[0], Options())
    pair.close()
    with pytest.raises(OptionError, match="closed"):
        pair.precise(np.zeros((1, 3, 9, 9), np.float32))


needs_int8 = pytest.mark.skipif(
    "openvino" not in ENGINES or find_spec("nncf") is None or find_spec("onnxruntime") is None,
    reason="needs openvino, onnxruntime and nncf",
)


@needs_int8
def test_int8_is_calibrated_judged_and_kept(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = photograph(200, 300)
    (tmp_path / "pictures").mkdir()
    write_picture(tmp_path / "pictures" / "a.png", photograph(140, 100))
    options = Options(calibration=(tmp_path / "pictures", shown), cache_dir=tmp_path / "cache")
    kind = logging.getLoggerClass()
    upscale = Upscaler("default", backend="openvino", precision="int8", options=options)
    assert capfd.readouterr() == ("", "")
    assert logging.getLoggerClass() is kind
    result = upscale(shown.astype(np.float32) / 255)
    assert upscale.report.precision == "int8"
    assert "dB from f32 on crops of the calibration pictures" in upscale.report.precision_reason
    want = Upscaler("default", backend="openvino")(shown.astype(np.float32) / 255)
    assert 35 <= decibels(result, want) < 60
    # the second time it is taken up, and judged again
    monkeypatch.setattr(anysize.precision, "quantize", lambda *_: pytest.fail("quantized again"))
    again = load("default", backend="openvino", precision="int8", options=options)
    assert again.precision_reason == upscale.report.precision_reason
    x = np.random.default_rng(0).random((1, 3, 16, 24), np.float32)
    assert np.array_equal(again(x), upscale.session(x))
    assert again.precision == "int8"


@needs_int8
def test_int8_is_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anysize.precision, "LEAST_INT8_DB", 90)
    options = Options(calibration=(photograph(130, 100),))
    with pytest.raises(OptionError, match=r"int8 is \d\d\.\d dB from f32.* at least 90 dB"):
        load("default", backend="openvino", precision="int8", options=options)


@needs_int8
def test_int8_never_answers_for_f32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph whose convolutions have no eight bits is not run as int8."""
    monkeypatch.setattr(anysize.precision, "quantize", lambda model, feeds: model.data)
    options = Options(calibration=(photograph(130, 100),), cache_dir="")
    with pytest.raises(ExecutionError, match="asked for int8, but the engine runs f32"):
        load("default", backend="openvino", precision="int8", options=options)


@pytest.mark.parametrize(
    ("backend", "pictures", "says"),
    [
        ("openvino", (), "needs calibration pictures, of 128 x 64"),
        ("openvino", (np.zeros((63, 200, 3), np.uint8),), "of 128 x 64 pixels or more: all of these are sm"),
        ("openvino", (np.zeros((127, 90, 3), np.uint8),), "of 128 x 64 pixels or more: all of these are sm"),
        ("openvino", (np.full((130, 90, 3), 128, np.uint8),), "reach from 0.5 to 0.5 of 0 to 1, and int8"),
        ("openvino", (photograph(130, 90) // 16,), "reach from 0 to 0.0.* of 0 to 1, and int8 would ruin"),
        ("onnxruntime", (np.zeros((64, 128, 3), np.uint8),), "f32"),
        ("torch", (np.zeros((64, 128, 3), np.uint8),), "int8"),
    ],
)
def test_int8_without_what_it_needs(backend: str, pictures: tuple[Any, ...], says: str) -> None:
    if backend not in ENGINES:
        pytest.skip(f"needs {backend}")
    with pytest.raises(OptionError, match=says):
        load("default", backend=backend, precision="int8", options=Options(calibration=pictures))


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
def test_int8_without_nncf_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anysize.exporters.quantizing, "find_spec", lambda name: None)
    options = Options(calibration=(photograph(130, 100),), cache_dir="")
    with pytest.raises(BackendUnavailableError, match=r'int8 needs nncf: pip install "anysize\[int8\]"'):
        load("default", backend="openvino", precision="int8", options=options)


def test_int8_is_no_fallback() -> None:
    with pytest.raises(OptionError, match="a fallback runs in f32 or bf16, not in int8"):
        load("default", options=Options(fallback=("openvino:int8",)))
    with pytest.raises(OptionError, match="tuple of pictures"):
        Options(calibration="pictures")  # type: ignore[arg-type]


@needs_int8
def test_transposed_convolutions_run_in_int8(toybox: Any) -> None:
    options = Options(calibration=(photograph(130, 100),), cache_dir="")
    with load(toybox.file("Transposed"), backend="openvino", precision="int8", options=options) as session:
        session(np.zeros((1, 3, 16, 16), np.float32))
        assert session.precision == "int8"


@pytest.mark.skipif("openvino" not in ENGINES or find_spec("nncf") is None, reason="needs openvino and nncf")
@pytest.mark.parametrize("name", ["a\0b", "a" * 5000, "none.png"])
def test_calibration_pictures_that_are_no_files(name: str) -> None:
    with pytest.raises(ImageError):
        load("default", backend="openvino", precision="int8", options=Options(calibration=(name,)))


def test_calibration_is_for_int8() -> None:
    for precision in ("f32", "bf16", "auto"):
        with pytest.raises(OptionError, match=f"for precision int8, not for {precision}"):
            load("default", precision=precision, options=Options(calibration=(photograph(130, 100),)))


def test_crops_are_inputs_of_the_model(picture: Any) -> None:
    spec = load("default", backend=ENGINES[0]).spec
    pictures = [picture(64, 128, 1), picture(140, 70, 4), picture(500, 64, 3, np.uint16), picture(90, 90)]
    calibrating, judging = crops(pictures, spec)
    assert (len(calibrating), len(judging)) == (CALIBRATING, JUDGING)
    assert {feed.shape for feed in (*calibrating, *judging)} == {(1, 3, 64, 64)}
    assert all(0 <= feed.min() <= feed.max() <= 1 for feed in (*calibrating, *judging))
    # of the smallest, each half is a crop
    for half, found in zip(np.array_split(pictures[0][:, :, 0], 2, 1), (calibrating, judging), strict=True):
        assert any(np.array_equal(feed[0, 0] * 255, half) for feed in found)
    for once, again in zip((calibrating, judging), crops(pictures, spec), strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(once, again, strict=True))


@pytest.mark.parametrize("shape", [(128, 64), (64, 150), (300, 100)])
def test_no_pixel_both_calibrates_and_judges(shape: tuple[int, int]) -> None:
    spec = load("default", backend=ENGINES[0]).spec
    numbers = np.linspace(0, 1, shape[0] * shape[1], dtype=np.float32)
    numbers = np.random.default_rng(0).permutation(numbers).reshape(*shape, 1)
    calibrating, judging = (set(np.unique(feeds)) for feeds in crops([numbers], spec))
    assert calibrating
    assert judging
    assert not calibrating & judging


def test_of_many_pictures_some_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(200):
        write_picture(tmp_path / f"{i:03}.png", np.full((64, 128, 3), i, np.uint8))
    read: list[str] = []

    def reading(path: Path) -> Any:
        read.append(path.name)
        return read_picture(path)

    monkeypatch.setattr(anysize.precision, "read_picture", reading)
    calibrating, judging = crops([tmp_path], load("default", backend=ENGINES[0]).spec)
    assert len(read) == CALIBRATING + JUDGING
    assert (len(calibrating), len(judging)) == (CALIBRATING, JUDGING)
    assert len({float(feed.max()) for feed in calibrating}) == CALIBRATING
    assert max(float(feed.max()) for feed in judging) > 0.5
