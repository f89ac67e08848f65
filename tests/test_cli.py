"""The command line: one line per mistake, documented exit codes, nothing written on failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from anysize import cli
from anysize.backends import EngineOptions
from anysize.files import read_picture
from conftest import ENGINES, ToyBox
from PIL import Image

FIELDS = {
    *("status", "error", "input", "output", "width", "height", "scale", "backend", "device", "precision"),
    *("method", "tile", "overlap", "exact", "max_error", "compiles", "engine_seconds", "seconds"),
    "fallbacks",
}


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """run(arguments) -> exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return int(caught.value.code or 0), out, err

    return call


@pytest.fixture
def photo(tmp_path: Path, picture: Callable[..., np.ndarray]) -> Path:
    Image.fromarray(picture(20, 30)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


Run = Callable[..., tuple[int, str, str]]


def test_upscale_one_picture(run: Run, photo: Path, tmp_path: Path, backend: str) -> None:
    code, out, err = run("upscale", photo, "-o", tmp_path / "big.png", "--backend", backend)
    assert (code, err) == (0, "")
    assert f"{backend} f32 on cpu, whole, exact" in out
    assert read_picture(tmp_path / "big.png").array.shape == (80, 120, 3)


def test_json_report(run: Run, photo: Path, tmp_path: Path) -> None:
    code, out, _ = run(
        *("upscale", photo, "-o", tmp_path / "big.png", "--json", "--method", "tile"),
        *("--tile", 16, "--overlap", 2, "--outscale", 3, "--threads", 1),
    )
    assert code == 0
    (line,) = out.splitlines()
    report = json.loads(line)
    assert set(report) >= FIELDS
    assert (report["width"], report["height"], report["scale"]) == (90, 60, 3.0)
    assert (report["method"], report["tile"], report["overlap"], report["exact"]) == ("tile", 16, 2, False)
    assert report["max_error"] > 0
    assert report["fallbacks"] == []


def test_a_folder_goes_to_a_folder(run: Run, photo: Path, tmp_path: Path) -> None:
    Image.open(photo).save(photo.with_name("other.webp"))
    code, out, err = run("upscale", tmp_path, "-o", tmp_path / "out")
    assert code == 0
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == [
        "anysize.jsonl",
        "other_x4.png",
        "photo_x4.png",
    ]
    assert out.count("\n") == 2
    assert "2 of 2 pictures done" in err
    code, _, err = run("upscale", tmp_path, "-o", tmp_path / "out", "--method", "tile", "--memory", "1KiB")
    assert code == 1
    assert {line.split(": ")[1] for line in err.splitlines()[:2]} == {
        str(photo),
        str(photo.with_name("other.webp")),
    }


def mistakes(folder: Path) -> list[tuple[list[str], str]]:
    """Arguments after `upscale`, and what the one line must say."""
    (folder / "text.png").write_text("hello")
    (folder / "zero.png").write_bytes(b"")
    (folder / "weights.pth").write_text("hello")
    ok, out = str(folder / "photo.png"), ["-o", str(folder / "out.png")]
    return [
        ([str(folder / "text.png"), *out], "text.png: not a readable picture"),
        ([str(folder / "zero.png"), *out], "zero.png: the file is empty"),
        ([str(folder / "none.png"), *out], "none.png: no such file"),
        ([ok, *out, "--tile", "-4"], "tile must be a positive number of pixels, not -4"),
        ([ok, *out, "--tile", "0"], "tile must be a positive number of pixels, not 0"),
        ([ok, *out, "--overlap", "-1"], "overlap must be"),
        ([ok, *out, "--overlap", "lots"], "--overlap must be 'exact' or a number of pixels, not 'lots'"),
        (
            [ok, *out, "--method", "magic"],
            "method must be one of auto, stream, tile, whole, lockstep, not 'magic'",
        ),
        ([ok, *out, "--backend", "tensorflow"], "unknown backend 'tensorflow'; known: openvino"),
        ([ok, *out, "--precision", "f7"], "precision must be one of f32, bf16, int8, auto, not 'f7'"),
        ([ok, *out, "--backend", "openvino", "--precision", "int8"], "int8 needs calibration pictures"),
        ([ok, *out, "--device", "abacus"], "'abacus'"),
        ([ok, *out, "--threads", "0"], "threads must be at least 1"),
        ([ok, *out, "--outscale", "-2"], "outscale must be a positive number, not -2"),
        (
            [ok, *out, "--model", "nothing"],
            "nothing: no such model or file; expected default, default-x2 or a",
        ),
        (
            [ok, *out, "--model", str(folder / "weights.pth")],
            "weights.pth: not a readable weights file: it is",
        ),
        ([ok, *out, "--model", str(folder / "none.onnx")], "none.onnx: no such file"),
        ([ok, "-o", str(folder / "missing" / "out.png")], "does not exist"),
        ([ok, "-o", "/proc/anysize/out"], "cannot be made"),
        ([ok, "-o", "/proc/out.png"], "/proc/out.png"),
        ([ok, "-o", str(folder / "out.bmp")], "cannot write '.bmp' files"),
        ([ok, "-o", ok], "would overwrite"),
        ([ok, "-o", ""], "--output is empty"),
        ([ok, "-o", str(folder / "new" / "er"), "--outscale", "nan"], "outscale"),
        ([str(folder / "text.png"), "-o", str(folder / "new" / "er")], "text.png: not a readable picture"),
        (["n" * 300, *out], "File name too long"),
        ([ok], "Missing option"),
        ([ok, *out, "--tile", "many"], "--tile"),
        ([ok, *out, "--colour", "red"], "No such option"),
    ]


def test_each_mistake_is_one_line_and_exit_code_2(run: Run, photo: Path, tmp_path: Path) -> None:
    cases = mistakes(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    for arguments, says in cases:
        code, out, err = run("upscale", *arguments)
        assert code == 2, (arguments, err)
        assert says in " ".join(err.replace("│", " ").split()), (arguments, err)
        assert out == ""
        assert "Traceback" not in err
        if err.startswith("error: "):
            assert err.count("\n") == 1
        assert sorted(tmp_path.rglob("*")) == before


def test_five_channel_model(run: Run, photo: Path, tmp_path: Path) -> None:
    import torch
    from anysize.exporters import export

    export(torch.nn.Conv2d(5, 5, 3, padding=1), tmp_path / "five.onnx", inputs=[("n", 5, "h", "w")])
    code, _, err = run("upscale", photo, "-o", tmp_path / "o.png", "-m", tmp_path / "five.onnx")
    assert code == 2
    assert "expected one float NCHW input and output of 1 or 3 channels" in err
    assert err.count("\n") == 1
    assert not (tmp_path / "o.png").exists()


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    code, _, err = run("upscale", tmp_path / "none.png", "-o", tmp_path / "o.png", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_debug_does_not_end_a_folder_at_its_first_failure(run: Run, photo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(photo.read_bytes()[:100])
    (folder / "b.png").write_bytes(photo.read_bytes())
    code, _, err = run("upscale", folder, "-o", tmp_path / "out", "--debug")
    assert code == 1
    assert "Traceback" in err
    assert f"error: {folder / 'a.png'}" in err
    assert [f.name for f in sorted((tmp_path / "out").glob("*.png"))] == ["b_x4.png"]
    code, _, err = run("upscale", folder / "a.png", "-o", tmp_path / "a.png", "--debug")
    assert code == 2
    assert "Traceback" in err


def test_file_names_with_a_will_of_their_own(photo: Path, tmp_path: Path) -> None:
    for name in ("-dash.png", "ein Bild, größer.png", "[bold]x.png", "a\nb.png"):
        photo.with_name(name).write_bytes(photo.read_bytes())
        done = subprocess.run(
            [sys.executable, "-m", "anysize.cli", "upscale", "-o", "out", "--", name],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert name in done.stdout
        assert (tmp_path / "out" / f"{Path(name).stem}_x4.png").exists()


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
def test_export_and_use(run: Run, photo: Path, tmp_path: Path, suffix: str) -> None:
    target = tmp_path / f"model{suffix}"
    code, out, err = run("export", "default", "-o", target, "--json")
    assert code == 0, err
    data = json.loads(out)
    assert data["verified"] == (["openvino", "onnxruntime"] if suffix == ".onnx" else ["openvino"])
    assert data["spec"]["radius"] == 14
    assert run("upscale", photo, "-o", tmp_path / "o.png", "-m", target)[0] == 0
    code, out, _ = run("export", "default", "-o", target)
    assert "receptive radius 14" in out
    assert run("export", target, "-o", tmp_path / "again.onnx")[0] == 2
    assert run("export", "default", "-o", tmp_path / "x.pt")[0] == 2


def test_parity(run: Run) -> None:
    code, out, _ = run("parity", "default", "--sizes", "17x33,8x8", "--json")
    assert code == 0
    report = json.loads(out)
    assert report["ok"]
    assert {r["backend"] for r in report["rows"]} == set(ENGINES)
    assert [r["size"] for r in report["rows"][:: len(ENGINES)]] == [
        {"n": 1, "h": 17, "w": 33},
        {"n": 1, "h": 8, "w": 8},
    ]
    code, out, _ = run("parity", "default", "--sizes", "9x9", "--atol", "1e-12")
    assert code == 1
    assert "FAIL" in out
    assert run("parity", "default", "--sizes", "wide")[0] == 2
    assert run("parity", "default", "--backends", "nothing")[0] == 2


@pytest.mark.parametrize(
    ("command", "policy"), [(["backends"], "PASSIVE"), (["bench", "--size", "wide"], None)]
)
def test_threads_sleep_while_they_wait_except_where_they_are_measured(
    run: Run, monkeypatch: pytest.MonkeyPatch, command: list[str], policy: str | None
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "")  # so that it is given back
    monkeypatch.delenv("OMP_WAIT_POLICY")
    run(*command)
    assert os.environ.get("OMP_WAIT_POLICY") == policy


def test_backends(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, _ = run("backends", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert {r["name"] for r in rows} >= {"openvino", "onnxruntime", "torch"}
    assert all(r["version"] and r["problem"] is None for r in rows if r["name"] in ENGINES)
    from anysize.backends import registry

    for row in rows:
        for precision in row["precisions"]:
            registry.get_backend(row["name"]).check(EngineOptions(precision))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    registry.get_backend.cache_clear()
    try:
        _, out, _ = run("backends")
        assert 'pip install "anysize[onnxruntime]"' in " ".join(out.split())
    finally:
        registry.get_backend.cache_clear()


def test_an_internal_error_is_one_line(run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from anysize import upscale

    def explode(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(upscale, "load", explode)
    code, _, err = run("upscale", photo, "-o", photo.with_name("o.png"))
    assert code == 1
    assert err.splitlines() == ["internal error: ZeroDivisionError: oops; --debug shows more"]


def test_whole_picture_models_say_why_they_cannot_be_tiled(
    run: Run, photo: Path, tmp_path: Path, toybox: ToyBox
) -> None:
    model = toybox.file("WholePicture")
    code, _, err = run(
        "upscale", photo, "-o", tmp_path / "o.png", "-m", model, "--method", "tile", "--tile", 8
    )
    assert code == 2
    assert "looks at the whole picture" in err
