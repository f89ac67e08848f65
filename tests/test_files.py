"""Picture files: read whole or refused, written whole or not at all, nothing lost on the way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import pytest
import pyvips
from anysize import Cancelled, ExecutionError, ImageError, Options, Tiling, Upscaler, upscale_file
from anysize.backends import get_backend
from anysize.batch import plan_jobs, run_jobs
from anysize.files import read_picture, write_picture
from anysize.rowfiles import RowWriter
from conftest import ENGINES
from PIL import Image
from toys import image_spec, nearest, numpy_session


@pytest.fixture
def upscaler() -> Upscaler:
    return Upscaler(numpy_session(nearest(2), image_spec(2)))


def doubled(array: np.ndarray) -> np.ndarray:
    return array.repeat(2, 0).repeat(2, 1)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_lossless_round_trip(
    tmp_path: Path, picture: Callable[..., np.ndarray], suffix: str, dtype: type, channels: int
) -> None:
    x = picture(9, 7, channels, dtype)
    write_picture(tmp_path / f"x{suffix}", x)
    y = read_picture(tmp_path / f"x{suffix}").array
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, x)
    assert [f.name for f in tmp_path.iterdir()] == [f"x{suffix}"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".avif"])
def test_lossy_formats_stay_close(tmp_path: Path, suffix: str) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    x = np.stack(
        [np.tile(ramp, (64, 1)), np.tile(ramp[:, None], (1, 64)), np.full((64, 64), 90, np.uint8)], -1
    )
    write_picture(tmp_path / f"x{suffix}", x)
    y = read_picture(tmp_path / f"x{suffix}").array
    assert np.abs(y.astype(int) - x).mean() < 3


def test_sixteen_bits_into_jpeg_are_scaled_not_cut(tmp_path: Path) -> None:
    write_picture(tmp_path / "x.jpg", np.full((16, 16, 3), 0x8000, np.uint16))
    assert abs(int(read_picture(tmp_path / "x.jpg").array.mean()) - 128) <= 1


def test_jpeg_keeps_full_chroma(tmp_path: Path) -> None:
    write_picture(tmp_path / "x.jpg", np.zeros((16, 16, 3), np.uint8))
    assert Image.open(tmp_path / "x.jpg").layer[1][1:3] == (1, 1)


def test_icc_exif_and_xmp_survive_and_orientation_is_applied(tmp_path: Path, upscaler: Upscaler) -> None:
    x = np.zeros((4, 6, 3), np.uint8)
    x[0, 0] = 255
    image = Image.fromarray(x)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees to show it
    exif[0x010E] = "a description"
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image.save(tmp_path / "x.png", exif=exif, icc_profile=profile, dpi=(300, 300))
    upscale_file(tmp_path / "x.png", tmp_path / "y.png", upscaler)
    result = Image.open(tmp_path / "y.png")
    assert result.size == (8, 12)
    assert result.info["icc_profile"] == profile
    exif = result.getexif()
    assert exif.get(0x010E, "").startswith("a description")
    assert exif.get(0x0112, 1) == 1
    assert np.asarray(result)[:2, -2:].min() == 255
    assert round(result.info["dpi"][0]) == 300


def test_kinds_of_png(tmp_path: Path) -> None:
    grey = Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8))
    for mode, channels, dtype in (("1", 1, np.uint8), ("P", 3, np.uint8), ("L", 1, np.uint8)):
        grey.convert(mode).save(tmp_path / "x.png")
        array = read_picture(tmp_path / "x.png").array
        assert (array.shape[2], array.dtype) == (channels if mode != "P" else array.shape[2], dtype)
        if mode == "1":
            assert set(np.unique(array)) == {0, 255}
    Image.fromarray(np.full((4, 4), 200, np.uint16)).save(tmp_path / "x.png")
    array = read_picture(tmp_path / "x.png").array
    assert array.dtype == np.uint16
    assert (array == 200).all()


def test_cmyk_jpeg_becomes_rgb(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "x.jpg")
    array = read_picture(tmp_path / "x.jpg").array
    assert array.shape == (8, 8, 3)
    assert array[0, 0, 0] < 100 < array[0, 0, 2]


def broken_files(folder: Path) -> dict[str, str]:
    """File name -> what the error must say."""
    good = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(good).save(folder / "good.png")
    Image.fromarray(good).save(folder / "good.jpg")
    for name in ("good.png", "good.jpg"):
        data = (folder / name).read_bytes()
        (folder / f"truncated-{name}").write_bytes(data[: len(data) // 2])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("I am no picture")
    corrupt = bytearray((folder / "good.png").read_bytes())
    corrupt[100:140] = bytes(40)
    (folder / "corrupt.png").write_bytes(corrupt)
    Image.fromarray(good).save(folder / "raw.tif")
    (folder / "truncated.tif").write_bytes((folder / "raw.tif").read_bytes()[:6000])
    (folder / "raw.tif").unlink()
    damaged = (folder / "good.jpg").read_bytes()
    (folder / "damaged.jpg").write_bytes(damaged[:1500] + damaged[1800:])
    apng = [Image.new("RGB", (4, 4), v) for v in ("red", "blue")]
    apng[0].save(folder / "moving.png", save_all=True, append_images=apng[1:])
    frames = [Image.new("L", (4, 4), v) for v in (0, 255)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].save(folder / "pages.tif", save_all=True, append_images=frames[1:])
    (folder / "folder.png").mkdir()
    pyvips.Image.black(4, 4).cast("float").write_to_file(str(folder / "float.tif"))
    return {
        "truncated-good.png": "truncated-good.png",
        "truncated-good.jpg": "truncated-good.jpg",
        "empty.png": "empty",
        "text.png": "not a readable picture",
        "corrupt.png": "corrupt.png",
        "moving.gif": "2 pages or frames",
        "pages.tif": "2 pages or frames",
        "folder.png": "not a file",
        "missing.png": "no such file",
        "float.tif": "pixels of type float",
        "truncated.tif": "truncated.tif",
        "damaged.jpg": "damaged.jpg",
        "moving.png": "several pages or frames",
        "n" * 300 + ".png": "cannot be read: File name too long",
    }


def test_what_is_not_one_whole_picture_is_refused(tmp_path: Path) -> None:
    for name, says in broken_files(tmp_path).items():
        with pytest.raises(ImageError, match=says) as caught:
            read_picture(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_the_pixel_limit_is_checked_before_decoding(tmp_path: Path) -> None:
    Image.new("1", (4000, 3000)).save(tmp_path / "x.png")
    with pytest.raises(ImageError, match="4000 x 3000 pixels, more than the limit"):
        read_picture(tmp_path / "x.png", pixel_limit=10_000_000)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("x.bmp", "cannot write"),
        ("x", "cannot write"),
        ("missing/x.png", "does not exist"),
        ("in.png", "overwrite the input"),
        ("sub/../in.png", "overwrite the input"),
        ("sub.png", "is a folder"),
        ("x.jpg", "transparency"),
    ],
)
def test_bad_destinations_are_refused_before_work(
    tmp_path: Path, picture: Callable[..., np.ndarray], upscaler: Upscaler, name: str, says: str
) -> None:
    write_picture(tmp_path / "in.png", picture(4, 4, 4))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ImageError, match=says):
        upscale_file(tmp_path / "in.png", tmp_path / name, upscaler)
    assert sorted(tmp_path.rglob("*")) == before
    assert upscaler.session.stats.calls == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_unwritable_folder_is_refused(tmp_path: Path, upscaler: Upscaler) -> None:
    write_picture(tmp_path / "in.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(ImageError, match="not writable"):
        upscale_file(tmp_path / "in.png", tmp_path / "locked" / "x.png", upscaler)


def test_a_failing_writer_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "x.png"
    target.write_bytes(b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(ImageError, match="No space left"):
        write_picture(target, np.zeros((4, 4, 3), np.uint8))
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_failures_and_cancellation_write_nothing(tmp_path: Path) -> None:
    def fail(x: np.ndarray) -> np.ndarray:
        raise RuntimeError("no")

    write_picture(tmp_path / "in.png", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ExecutionError):
        upscale_file(tmp_path / "in.png", tmp_path / "x.png", Upscaler(numpy_session(fail, image_spec())))
    with pytest.raises(Cancelled):
        upscale_file(tmp_path / "in.png", tmp_path / "x.png", "default", cancel=lambda: True)
    assert [f.name for f in tmp_path.iterdir()] == ["in.png"]


def test_upscale_file_reports(tmp_path: Path, backend: str) -> None:
    write_picture(tmp_path / "in.png", np.zeros((5, 6, 3), np.uint8))
    report = upscale_file(tmp_path / "in.png", tmp_path / "x.png", backend=backend, outscale=2)
    assert (report.status, report.width, report.height, report.scale) == ("ok", 12, 10, 2.0)
    assert (report.backend, report.precision, report.device, report.method) == (
        backend,
        "f32",
        "cpu",
        "whole",
    )
    assert report.output == str(tmp_path / "x.png")
    assert report.model_scale == 4
    assert oct((tmp_path / "x.png").stat().st_mode & 0o777) == oct(0o666 & ~_umask())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_jobs_for_files_and_folders(tmp_path: Path, upscaler: Upscaler) -> None:
    for name in ("a.png", "b.JPG", "a.jpg", "notes.txt", ".hidden.png"):
        (tmp_path / name).write_bytes(b"x")
    out = tmp_path / "out"
    names = [(j.src.name, j.dst.name) for j in plan_jobs([tmp_path], out, 2.0)]
    assert names == [("a.jpg", "a_x2.png"), ("a.png", "a_x2.png"), ("b.JPG", "b_x2.png")]
    assert plan_jobs([tmp_path / "a.png"], tmp_path / "r.webp", 4)[0].dst == tmp_path / "r.webp"
    assert plan_jobs([tmp_path / "a.png"], out, 1.5)[0].dst == out / "a_x1.5.png"
    (tmp_path / "none").mkdir()
    for inputs, output, says in (
        ([tmp_path / "none"], out, "no pictures"),
        ([tmp_path / "a.png", tmp_path / "b.JPG"], tmp_path / "r.png", "need a folder"),
        ([tmp_path], tmp_path / "notes", None),
        ([tmp_path], tmp_path / "b", None),
    ):
        if says:
            with pytest.raises(ImageError, match=says):
                plan_jobs(inputs, output, 2)
        else:
            plan_jobs(inputs, output, 2)
    (tmp_path / "plain").write_bytes(b"x")
    with pytest.raises(ImageError, match="not a folder"):
        plan_jobs([tmp_path], tmp_path / "plain", 2)


def test_one_result_never_replaces_another_of_the_same_run(tmp_path: Path, upscaler: Upscaler) -> None:
    write_picture(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    write_picture(tmp_path / "a.tif", np.full((4, 4, 3), 255, np.uint8))
    (tmp_path / "out").mkdir()
    results = list(run_jobs(plan_jobs([tmp_path], tmp_path / "out", 2), upscaler))
    assert [r.status for r, _ in results] == ["ok", "failed"]
    assert "is taken by the result of" in str(results[1][1])
    assert read_picture(tmp_path / "out" / "a_x2.png").array.max() == 0


def test_top_level_names() -> None:
    assert not [name for name in anysize.__all__ if not hasattr(anysize, name)]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".gif", ".avif"])
def test_a_file_that_changed_is_read_again(tmp_path: Path, suffix: str) -> None:
    """libvips remembers pictures by file name."""
    for value in (10, 120, 230):
        Image.new("RGB", (16, 16), (value,) * 3).save(tmp_path / f"x{suffix}")
        assert abs(int(read_picture(tmp_path / f"x{suffix}").array.mean()) - value) <= 2


def test_names_are_not_options(tmp_path: Path, upscaler: Upscaler) -> None:
    """libvips takes options in square brackets from file names."""
    write_picture(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    write_picture(tmp_path / "b.png", np.full((4, 4, 3), 255, np.uint8))
    (tmp_path / "b.png").rename(tmp_path / "a.png[access=random].png")
    upscale_file(tmp_path / "a.png[access=random].png", tmp_path / "out[Q=1].png", upscaler)
    assert read_picture(tmp_path / "out[Q=1].png").array.min() == 255


def test_a_batch_never_overwrites_its_own_inputs(tmp_path: Path, upscaler: Upscaler) -> None:
    write_picture(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8))
    write_picture(tmp_path / "a_x2.png", np.full((4, 4, 3), 255, np.uint8))
    results = list(run_jobs(plan_jobs([tmp_path], tmp_path, 2), upscaler))
    assert [r.status for r, _ in results] == ["failed", "ok"]
    assert "would overwrite" in str(results[0][1])
    assert read_picture(tmp_path / "a_x2.png").array.shape == (4, 4, 3)


def test_long_names(tmp_path: Path) -> None:
    name = "\N{GRINNING FACE}" * 61 + ".png"  # 248 bytes
    write_picture(tmp_path / name, np.zeros((4, 4, 3), np.uint8))
    assert (tmp_path / name).exists()
    with pytest.raises(ImageError, match="File name too long"):
        upscale_file(tmp_path / name, tmp_path / ("n" * 300 + ".png"))


def gathering(most: list[int]) -> Callable[[np.ndarray], np.ndarray]:
    """A model that waits a moment for others to be in it too, and notes how many there were."""
    inside, lock = [0], threading.Lock()

    def run(x: np.ndarray) -> np.ndarray:
        with lock:
            inside[0] += 1
            most.append(inside[0])
        for _ in range(50):
            if inside[0] > 1:
                break
            time.sleep(0.005)
        time.sleep(0.02)
        with lock:
            inside[0] -= 1
        return nearest(2)(x)

    return run


@pytest.mark.parametrize(("memory", "at_once"), [(None, 2), ("8GiB", 1)])
def test_two_pictures_of_a_batch_are_in_work_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str | None, at_once: int
) -> None:
    most: list[int] = []
    session = numpy_session(gathering(most), image_spec(2))
    monkeypatch.setattr(session, "working_bytes", lambda sizes: 0)
    upscaler = Upscaler(session, tiling=Tiling(memory=memory))
    for i in range(5):
        write_picture(tmp_path / f"{i}.png", np.full((4, 4, 3), i, np.uint8))
    (tmp_path / "out").mkdir()
    results = list(run_jobs(plan_jobs([tmp_path], tmp_path / "out", 2), upscaler))
    assert [Path(r.input).name for r, _ in results] == [f"{i}.png" for i in range(5)]
    assert [read_picture(Path(r.output)).array.max() for r, _ in results] == list(range(5))
    assert max(most) == at_once


def test_a_batch_that_is_left_early_stops(tmp_path: Path) -> None:
    most: list[int] = []
    upscaler = Upscaler(numpy_session(gathering(most), image_spec(2)))
    for i in range(9):
        write_picture(tmp_path / f"{i}.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "out").mkdir()
    batch = run_jobs(plan_jobs([tmp_path], tmp_path / "out", 2), upscaler)
    next(batch)
    batch.close()
    done = len(most)
    assert done <= 3
    time.sleep(0.1)
    assert len(most) == done
    assert not list((tmp_path / "out").glob(".*"))


def test_a_picture_that_cannot_be_written_lets_go_of_its_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Any
) -> None:
    """While its error is still held."""
    engine = next((name for name in ENGINES if get_backend(name).has_streams), None)
    if engine is None:
        pytest.skip("needs an engine that runs bands")
    write_picture(tmp_path / "in.png", picture(300, 300))
    upscaler = Upscaler("default", backend=engine, options=Options(streams=2))
    threads = threading.active_count()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RowWriter, "write", full)
    with pytest.raises((OSError, ImageError), match="No space left") as caught:
        upscale_file(tmp_path / "in.png", tmp_path / "out.png", upscaler)
    assert caught.value.__traceback__ is not None
    programs = [p for guard in upscaler.session.bands().guards.values() for p in guard._programs.values()]
    assert programs
    assert [p.users for p in programs] == [0] * len(programs)
    assert threading.active_count() == threads
    assert not (tmp_path / "out.png").exists()
