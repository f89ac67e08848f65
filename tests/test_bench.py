"""The benchmark: cases in processes of their own, figures from what was measured, and a case that fails."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from anysize import ExecutionError, ModelLoadError, OptionError
from anysize.bench import Workers, _measure, bench
from anysize.bench_result import COMMON, Benchmark
from anysize.bench_worker import _looped, _pixels, picture
from anysize.cli import main
from anysize.pixels import to_float
from conftest import ENGINES, ToyBox


@pytest.fixture(scope="module")
def measured() -> Benchmark:
    return bench(sizes=[(96, 64)], rounds=2, quick=True)


def test_every_case_is_measured(measured: Benchmark) -> None:
    assert list(measured.tables) == ["96 x 64"]
    for rows in measured.tables.values():
        assert {row.case["kind"] for row in rows} >= {"anysize", "raw", "torch", "loop"}
        for row in rows:
            assert len(row.seconds) == 2
            assert row.mpx_per_second > 0
            assert row.ratio is not None
            assert row.ratio[1] <= row.ratio[0] <= row.ratio[2]
        common = next(row for row in rows if row.name == COMMON)
        assert common.ratio == (1, 1, 1)
    assert not measured.left_out


def test_results_are_compared(measured: Benchmark) -> None:
    for row in measured.tables["96 x 64"]:
        if row.decibels is not None:
            # f32 agrees to rounding, which bf16 does not
            assert (row.decibels > 90) == (row.case["precision"] == "f32")
            assert row.decibels > 45
            assert row.decibels_8bit is not None
            # of nearly equal values the rounding keeps some equal and moves others apart
            assert row.decibels_8bit != row.decibels or row.decibels == np.inf


def test_part_of_the_peak_follows_from_the_operations(measured: Benchmark) -> None:
    row = next(r for r in measured.tables["96 x 64"] if r.name == "openvino f32 alone, tile 128")
    work = row.facts["operations_per_pixel"]
    assert 1e4 < work < 1e6
    peak = measured.ceilings["matrix product f32"]
    assert row.of_peak == pytest.approx(row.mpx_per_second * 1e6 * work / peak)


def test_advice_names_the_fastest(measured: Benchmark) -> None:
    rows = [r for r in measured.tables["96 x 64"] if r.case["kind"] == "anysize"]
    best = max((r for r in rows if r.case["precision"] == "f32"), key=lambda r: r.ratio[0])
    assert f"f32: --backend {best.case['backend']} --precision f32" in measured.advice()[0]


def test_what_is_written(measured: Benchmark, tmp_path: Path) -> None:
    made = {path.suffix: path for path in measured.write(tmp_path / "new")}
    read = json.loads(made[".json"].read_text())
    assert read["tables"]["96 x 64"][0]["mpx_per_second"] == measured.tables["96 x 64"][0].mpx_per_second
    for row in measured.tables["96 x 64"]:
        assert f"| {row.name} | {row.mpx_per_second:.4f} |" in made[".md"].read_text()
    assert made[".png"].read_bytes().startswith(b"\x89PNG")


def test_a_case_that_dies_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    case = {"kind": "anysize", "model": "default", "backend": ENGINES[0], "precision": "f32"}
    case |= {"method": "auto", "threads": None, "tune": False}
    with Workers() as workers:
        for name in "ab":
            assert workers.add(name, case | {"width": 20, "height": 20})
        workers.ready["a"]._process.kill()
        workers.ready["a"]._process.wait()
        (row,) = _measure(workers, 2, False, {}, print)
        assert row.name == "b"
        assert len(row.seconds) == 2
        assert "a" in workers.left_out


def test_the_loop_pastes_every_tile() -> None:
    case = {"height": 47, "width": 61, "tile": 20}
    run, facts = _looped(case, lambda x: x.repeat(2, 2).repeat(2, 3))
    want = picture(47, 61).repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(facts["picture"], to_float(want))
    np.testing.assert_array_equal(run(), want)


def test_the_middle_of_a_picture_or_more_of_it_mirrored(tmp_path: Path) -> None:
    given = picture(20, 30)
    np.save(tmp_path / "picture.npy", given)
    case = {"picture": str(tmp_path / "picture.npy"), "height": 10, "width": 36}
    got = _pixels(case)
    assert got.shape == (10, 36, 3)
    np.testing.assert_array_equal(got[:, :30], given[5:15])
    np.testing.assert_array_equal(got[:, 30:], given[5:15, :-7:-1])
    np.testing.assert_array_equal(_pixels(case, 20, 10), given[:, 10:20])


def test_a_picture_that_is_given_is_upscaled() -> None:
    """A flat one costs bf16 nothing but a shift, and is grey with 16 bits."""
    flat = np.full((40, 50), 30000, np.uint16)
    rows = bench(picture=flat, sizes=[(96, 64)], rounds=1, quick=True).tables["96 x 64"]
    assert {row.name for row in rows} >= {COMMON}
    for row in rows:
        assert row.decibels_8bit is None or row.decibels_8bit == np.inf


def test_a_model_that_does_not_run_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(ExecutionError, match=r"no engine runs this model.*bad\.onnx"):
        bench(str(tmp_path / "bad.onnx"))
    with pytest.raises(ModelLoadError, match="no such file"):
        bench(str(tmp_path / "none.onnx"))
    with pytest.raises(OptionError, match="at least 1"):
        bench(rounds=0)


def test_the_command(toybox: ToyBox, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = toybox.file("Doubling")
    arguments = ["--size", "32x24", "--rounds", "1", "--quick", "--threads", "1", "--method", "stream"]
    arguments += ["--backends", ENGINES[0]]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "-m", str(model), "-o", str(tmp_path), "--json", *arguments, "--method", "auto"])
    assert stop.value.code == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["model"] == str(model)
    assert printed["advice"]
    names = [row["name"] for row in printed["tables"]["32 x 24"]]
    for wanted in ("f32, stream, 1 threads", "f32, 1 threads"):
        assert f"anysize {ENGINES[0]} {wanted}" in names
    assert not [name for name in names if "torch alone" in name]
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--size", "32"])
    assert stop.value.code == 2
    assert "--size must be WIDTHxHEIGHT" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["bench", "--backends", "abacus", "-o", str(tmp_path / "new" / "er")])
    assert stop.value.code == 2
    assert not (tmp_path / "new").exists()
    assert "backend 'abacus' is not installed here" in capsys.readouterr().err
