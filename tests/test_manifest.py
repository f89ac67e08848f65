"""Folders of results: what is noted of each, what a killed run leaves, and how the next goes on."""

from __future__ import annotations

import ctypes
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from anysize import ImageError, Isolated, OptionError, Tiling, Upscaler
from anysize.batch import open_manifest, plan_jobs, run_jobs
from anysize.files import remove_left_behind, replacing, write_picture
from anysize.manifest import NAME, digest, read
from conftest import ENGINES, ToyBox
from fuzzing import NIGHTLY
from toys import image_spec, nearest, numpy_session

#: moments at which a run is killed; many in the nightly run
KILLS = 50 if NIGHTLY else 3


@pytest.fixture
def folder(tmp_path: Path, picture: Callable[..., np.ndarray]) -> Path:
    """Five pictures."""
    (tmp_path / "in").mkdir()
    for i in range(5):
        write_picture(tmp_path / "in" / f"{i}.png", picture(9 + i, 7, seed=i))
    return tmp_path


def run(folder: Path, upscaler: Upscaler, resume: bool = False, outscale: float | None = None) -> list[str]:
    """Upscale `folder/in` into `folder/out`; what became of each."""
    out = folder / "out"
    out.mkdir(exist_ok=True)
    jobs = plan_jobs([folder / "in"], out, 2)
    manifest = open_manifest(out, upscaler, outscale, resume)
    results = run_jobs(jobs, upscaler, outscale=outscale, manifest=manifest, resume=resume)
    return [report.status for report, _ in results]


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / NAME).read_text().splitlines()]


def test_each_picture_has_a_line_with_its_result(folder: Path, toybox: ToyBox) -> None:
    (folder / "in" / "3.png").write_bytes(b"no picture")
    assert run(folder, toybox.upscaler("Nearest", ENGINES[0])) == ["ok", "ok", "ok", "failed", "ok"]
    found = {Path(line["input"]).name: line for line in lines(folder)}
    assert len(found) == len(lines(folder)) == 5
    assert "3.png" in found["3.png"]["error"]
    for i in (0, 1, 2, 4):
        line = found[f"{i}.png"]
        assert (line["status"], line["backend"], line["precision"]) == ("ok", ENGINES[0], "f32")
        assert line["seconds"] > 0
        assert line["error"] is None
        assert line["sha256"] == digest(folder / "out" / f"{i}_x2.png")
        assert line["source_sha256"] == digest(folder / "in" / f"{i}.png")


def test_resume_leaves_what_is_whole_and_does_the_rest(folder: Path, toybox: ToyBox) -> None:
    upscaler = toybox.upscaler("Nearest", ENGINES[0])
    assert run(folder, upscaler) == ["ok"] * 5
    out, want = folder / "out", {f.name: f.read_bytes() for f in (folder / "out").glob("*.png")}
    before = {f.name: f.stat().st_ino for f in out.glob("*.png")}
    (out / "0_x2.png").unlink()
    (out / "1_x2.png").write_bytes(want["2_x2.png"])  # somebody else's
    write_picture(folder / "in" / "2.png", np.zeros((4, 4, 3), np.uint8))  # another picture by that name
    assert run(folder, upscaler, resume=True) == ["ok", "ok", "ok", "kept", "kept"]
    for name in ("0_x2.png", "1_x2.png", "3_x2.png", "4_x2.png"):
        assert (out / name).read_bytes() == want[name]
    assert all((out / name).stat().st_ino == before[name] for name in ("3_x2.png", "4_x2.png"))
    assert run(folder, upscaler, resume=True) == ["kept"] * 5
    assert run(folder, upscaler) == ["ok"] * 5


def test_other_settings_are_another_result(folder: Path, toybox: ToyBox) -> None:
    upscaler = toybox.upscaler("Nearest", ENGINES[0])
    run(folder, upscaler)
    assert run(folder, upscaler, True, outscale=3) == ["ok"] * 5
    assert run(folder, upscaler, True, outscale=3) == ["kept"] * 5
    tiled = toybox.upscaler("Nearest", ENGINES[0], Tiling("tile", 4, 0))
    assert run(folder, tiled, True, outscale=3) == ["ok"] * 5
    other = toybox.upscaler("Doubling", ENGINES[0], Tiling("tile", 4, 0))
    assert run(folder, other, True, outscale=3) == ["ok"] * 5
    assert run(folder, other, True, outscale=2.0) == ["ok"] * 5
    assert run(folder, other, True) == ["kept"] * 5  # twice as large is its own scale


def test_what_was_not_verified_is_done_again_where_that_is_asked_for(folder: Path, toybox: ToyBox) -> None:
    file = toybox.file("Doubling")
    plain, verified = (Upscaler(file, backend=ENGINES[0], verify=verify) for verify in (False, True))
    run(folder, plain)
    assert run(folder, verified, True) == ["ok"] * 5
    assert run(folder, verified, True) == run(folder, plain, True) == ["kept"] * 5
    with closing(Isolated(file, backend=ENGINES[0], verify=True)) as alone:
        assert run(folder, alone, True) == ["kept"] * 5


def test_a_model_without_identity_is_not_resumed(folder: Path) -> None:
    upscaler = Upscaler(numpy_session(nearest(2), image_spec(2)))
    assert run(folder, upscaler) == ["ok"] * 5
    with pytest.raises(OptionError, match="nothing tells this model from another"):
        run(folder, upscaler, resume=True)


def test_a_damaged_manifest_costs_its_damaged_lines_alone(folder: Path, toybox: ToyBox) -> None:
    upscaler = toybox.upscaler("Nearest", ENGINES[0])
    run(folder, upscaler)
    path = folder / "out" / NAME
    text = path.read_bytes().splitlines(keepends=True)
    name = json.loads(text[1])["output"]
    text[1] = b'{"output": ' + b"[" * 100_000 + b"\n\xff\n[]\n3\n{}\n\n"
    text[4] = text[4][:100]  # cut short
    path.write_bytes(b"".join(text))
    assert len(read(folder / "out")) == 3
    assert sorted(run(folder, upscaler, resume=True)) == ["kept"] * 3 + ["ok"] * 2
    assert Path(name).name in read(folder / "out")
    assert run(folder, upscaler, resume=True) == ["kept"] * 5


def test_a_manifest_that_cannot_be_written_is_no_result(folder: Path, toybox: ToyBox) -> None:
    upscaler = toybox.upscaler("Nearest", ENGINES[0])
    out = folder / "out"
    out.mkdir()
    manifest = open_manifest(out, upscaler, None, False)
    (out / NAME).mkdir()
    results = list(run_jobs(plan_jobs([folder / "in"], out, 2), upscaler, manifest=manifest))
    assert all(isinstance(error, ImageError) and NAME in str(error) for _, error in results)
    assert [f.name for f in out.iterdir()] == [NAME]
    with pytest.raises(ImageError, match="not a file"):
        open_manifest(out, upscaler, None, False)


def test_results_beside_their_sources_are_not_taken_for_pictures(folder: Path, toybox: ToyBox) -> None:
    upscaler, out = toybox.upscaler("Nearest", ENGINES[0]), folder / "in"
    for resume in (False, True, False):
        jobs = plan_jobs([out], out, 2)
        assert [job.src.name for job in jobs] == [f"{i}.png" for i in range(5)]
        manifest = open_manifest(out, upscaler, None, resume)
        status = [report.status for report, _ in run_jobs(jobs, upscaler, manifest=manifest, resume=resume)]
        assert status == ["kept" if resume else "ok"] * 5


def test_sources_that_vanish_do_not_end_the_batch(folder: Path, toybox: ToyBox) -> None:
    upscaler, out = toybox.upscaler("Nearest", ENGINES[0]), folder / "out"
    out.mkdir()
    jobs = plan_jobs([folder / "in"], out, 2)
    (folder / "in" / "2.png").unlink()
    manifest = open_manifest(out, upscaler, None, False)
    results = list(run_jobs(jobs, upscaler, manifest=manifest))
    assert [report.status for report, _ in results] == ["ok", "ok", "failed", "ok", "ok"]
    assert isinstance(results[2][1], ImageError)
    assert "2.png" in str(results[2][1])


def test_what_killed_runs_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    left = [tmp_path / f".anysize-{'0' * 15}{i}.png" for i in range(3)]
    for file in left:
        file.write_bytes(b"half")
    (tmp_path / ".anysize-notes.txt").write_text("mine")
    (tmp_path / f".anysize-{'a' * 16}.png").symlink_to(tmp_path / ".anysize-notes.txt")
    with replacing(tmp_path / "x.png") as temporary:
        temporary.write_bytes(b"in work")
        code = "import sys, pathlib, anysize.files as f; f.remove_left_behind(pathlib.Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
        remove_left_behind(tmp_path)
        assert temporary.read_bytes() == b"in work"
        assert not any(file.exists() for file in left)
    assert (tmp_path / "x.png").read_bytes() == b"in work"
    remove_left_behind(tmp_path)
    names = {f.name for f in tmp_path.iterdir()}
    assert names == {"x.png", ".anysize-notes.txt", f".anysize-{'a' * 16}.png"}


# -- whole programs


def command(folder: Path, *more: object) -> list[str]:
    line = [sys.executable, "-m", "anysize.cli", "upscale", folder / "in", "-o", folder / "out", *more]
    return [*map(str, line), "--backend", ENGINES[0]]


def finish(folder: Path, *more: object, **how: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command(folder, *more), capture_output=True, text=True, timeout=300, **how)
    assert "Traceback" not in done.stderr
    return done


def test_killed_at_any_moment_and_resumed(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """SIGKILL: results are those of an undisturbed run, none is made twice, nothing is left lying about."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(20):
        pixels = rng.integers(0, 256, (60 + 9 * i, 200, 3), np.uint8)
        write_picture(tmp_path / "in" / f"{i:02}.png", pixels)
    assert finish(tmp_path).returncode == 0
    out = tmp_path / "out"
    want = {f.name: f.read_bytes() for f in out.glob("*.png")}
    assert len(want) == 20
    moments, outcomes = random.Random(0), Counter[str]()
    for kill in range(KILLS):
        for file in out.iterdir():
            file.unlink()
        wait = 20 * kill // KILLS
        process = subprocess.Popen(command(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        while len(list(out.glob("[!.]*.png"))) < wait:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.2 if wait else 2))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        there = {f.name: f.stat().st_ino for f in out.glob("[!.]*.png")}
        assert all((out / name).read_bytes() == want[name] for name in there)
        outcomes["of them left a half-written file"] += bool(list(out.glob(".anysize-*")))
        done = finish(tmp_path, "--resume")
        assert done.returncode == 0, done.stderr
        assert {f.name for f in out.iterdir()} == {*want, NAME}
        assert all((out / name).read_bytes() == data for name, data in want.items())
        assert all((out / name).stat().st_ino == inode for name, inode in there.items())
        noted = [Path(line["output"]).name for line in lines(tmp_path)]
        assert all(noted.count(name) == 1 for name in there), "done again"
        outcomes[f"{'none' if not there else 'all' if len(there) == 20 else 'some'} done"] += 1
    record_property("cases", KILLS)
    record_property("outcomes", json.dumps(outcomes))


def test_a_full_disk_fails_what_does_not_fit(tmp_path: Path) -> None:
    """A limit on the size of files stands for it."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    for i, side in enumerate((20, 150, 30)):
        write_picture(tmp_path / "in" / f"{i}.png", rng.integers(0, 256, (side, side, 3), np.uint8))
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # noqa: E731
    done = finish(tmp_path, preexec_fn=limit)
    assert done.returncode == 1
    assert "1_x4.png: cannot be written" in done.stderr
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"0_x4.png", "2_x4.png", NAME}
    assert [line["status"] for line in sorted(lines(tmp_path), key=lambda line: line["input"])] == [
        "ok",
        "failed",
        "ok",
    ]
    done = finish(tmp_path, "--resume")
    assert done.returncode == 0
    assert "3 of 3 pictures done, 2 of them before" in done.stderr


def test_a_destination_that_is_read_only_is_said_once_for_each(folder: Path) -> None:
    out = folder / "out"
    out.mkdir()
    out.chmod(0o555)

    def mere_user() -> None:
        """Root may write anywhere by CAP_DAC_OVERRIDE, which prctl(PR_CAPBSET_DROP) takes away."""
        if os.geteuid() == 0:
            ctypes.CDLL(None).prctl(24, 1, 0, 0, 0)

    done = finish(folder, preexec_fn=mere_user)
    assert done.returncode == 1
    assert done.stderr.count("is not writable") == 5
    assert list(out.iterdir()) == []


def test_resume_is_for_folders(folder: Path) -> None:
    picture = folder / "in" / "0.png"
    line = [sys.executable, "-m", "anysize.cli", "upscale", picture, "-o", folder / "x.png", "--resume"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--resume is for a folder of results" in done.stderr
