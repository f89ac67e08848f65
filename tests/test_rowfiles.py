"""Pictures from file to file in bands: the same result as in memory, and nothing left after a fault."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import anysize.files
import numpy as np
import pytest
import pyvips
from anysize import Cancelled, ExecutionError, ImageError, Tiling, Upscaler, upscale_file
from anysize.files import read_picture, write_picture
from anysize.rowfiles import RowReader, RowWriter
from conftest import ENGINES, ToyBox

GRAPH_ENGINES = [e for e in ENGINES if e != "torch"]
BANDS = Tiling("stream", 8)


@pytest.fixture
def nearest(toybox: ToyBox) -> Upscaler:
    return toybox.upscaler("Nearest", GRAPH_ENGINES[0], BANDS, max_live=64)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Any:
    yield
    left = [t.name for t in threading.enumerate() if t.name == "anysize-writer"]
    assert not left


def leftovers(folder: Path) -> list[str]:
    return [f.name for f in folder.iterdir() if f.name.startswith(".anysize")]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_file_in_bands_equals_the_picture_in_memory(
    nearest: Upscaler, picture: Any, tmp_path: Path, suffix: str, channels: int, dtype: Any
) -> None:
    x = picture(61, 33, channels, dtype)
    if channels in (2, 4):
        x[..., -1] = np.maximum(x[..., -1], 1)
        x[10:30, 5:20, -1] = np.iinfo(dtype).max
    write_picture(tmp_path / "in.png", x)
    seen: list[tuple[int, int]] = []
    report = upscale_file(
        tmp_path / "in.png", tmp_path / f"out{suffix}", nearest, progress=lambda a, b: seen.append((a, b))
    )
    assert report.method == "stream"
    assert seen[-1][0] == seen[-1][1] == len(seen)
    got = read_picture(tmp_path / f"out{suffix}").array
    np.testing.assert_array_equal(got, nearest(x))
    np.testing.assert_array_equal(got, x.repeat(2, 0).repeat(2, 1))
    assert not leftovers(tmp_path)


def test_constant_and_hidden_alpha(nearest: Upscaler, picture: Any, tmp_path: Path) -> None:
    for level in (0, 77, 255):
        x = picture(50, 20, 4)
        x[..., -1] = level
        write_picture(tmp_path / "in.png", x)
        upscale_file(tmp_path / "in.png", tmp_path / "out.png", nearest)
        assert (read_picture(tmp_path / "out.png").array[..., -1] == level).all()
    x = picture(50, 20, 4)
    x[20:30, :, -1] = 0  # needs the whole picture, and gets it
    write_picture(tmp_path / "in.png", x)
    upscale_file(tmp_path / "in.png", tmp_path / "out.png", nearest)
    np.testing.assert_array_equal(read_picture(tmp_path / "out.png").array, nearest(x))


def test_turned_pictures(nearest: Upscaler, picture: Any, tmp_path: Path) -> None:
    x = picture(64, 40)
    image = pyvips.Image.new_from_array(x)
    for orientation in (1, 6):
        turned = image.copy()
        turned.set_type(pyvips.GValue.gint_type, "orientation", orientation)
        turned.write_to_file(str(tmp_path / "in.tif"))
        upscale_file(tmp_path / "in.tif", tmp_path / "out.png", nearest)
        upright = x if orientation == 1 else np.rot90(x, -1)
        want = upright.repeat(2, 0).repeat(2, 1)
        np.testing.assert_array_equal(read_picture(tmp_path / "out.png").array, want)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_truncated_file_leaves_the_destination_as_it_was(
    nearest: Upscaler, picture: Any, tmp_path: Path, suffix: str
) -> None:
    source, target = tmp_path / f"in{suffix}", tmp_path / "out.png"
    write_picture(source, picture(400, 300))
    source.write_bytes(source.read_bytes()[: source.stat().st_size * 2 // 3])
    target.write_bytes(b"before")
    with pytest.raises(ImageError, match="damaged picture"):
        upscale_file(source, target, nearest)
    assert target.read_bytes() == b"before"
    assert not leftovers(tmp_path)


def test_cancel_in_the_middle_leaves_nothing(nearest: Upscaler, picture: Any, tmp_path: Path) -> None:
    write_picture(tmp_path / "in.png", picture(200, 30))
    done: list[int] = []
    with pytest.raises(Cancelled):
        upscale_file(
            tmp_path / "in.png",
            tmp_path / "out.png",
            nearest,
            progress=lambda a, b: done.append(a),
            cancel=lambda: len(done) > 5,
        )
    assert not (tmp_path / "out.png").exists()
    assert not leftovers(tmp_path)


def test_an_engine_fault_in_the_middle_leaves_nothing(
    nearest: Upscaler, picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anysize.guard import Sequence

    write_picture(tmp_path / "in.png", picture(200, 30))
    calls = [0]
    run = Sequence.run

    def breaks(self: Sequence, feeds: Any) -> Any:
        calls[0] += 1
        if calls[0] == 7:
            raise ExecutionError("gone", backend="x")
        return run(self, feeds)

    monkeypatch.setattr(Sequence, "run", breaks)
    with pytest.raises(ExecutionError, match="row 7, column 0"):
        upscale_file(tmp_path / "in.png", tmp_path / "out.png", nearest)
    assert not (tmp_path / "out.png").exists()
    assert not leftovers(tmp_path)


def test_a_format_that_cannot_hold_the_result_says_so(
    nearest: Upscaler, picture: Any, tmp_path: Path
) -> None:
    write_picture(tmp_path / "in.png", picture(40, 8200))
    with pytest.raises(ImageError, match="cannot be written"):
        upscale_file(tmp_path / "in.png", tmp_path / "out.webp", nearest)  # WebP ends at 16383
    assert not (tmp_path / "out.webp").exists()
    assert not leftovers(tmp_path)


def test_too_few_rows_are_no_file(tmp_path: Path) -> None:
    rows = np.zeros((5, 7, 3), np.uint8)
    with (
        pytest.raises(ImageError, match="3 rows of the picture were not written"),
        RowWriter(tmp_path / ".new.png", 7, 8, 3, np.dtype(np.uint8), None, tmp_path / "out.png") as writer,
    ):
        writer.write(rows)


def test_the_writer_keeps_the_resolution_and_drops_the_turn(picture: Any, tmp_path: Path) -> None:
    header = pyvips.Image.black(1, 1).copy(xres=11.0, yres=12.0)
    header.set_type(pyvips.GValue.gint_type, "orientation", 6)
    x = picture(20, 10, 4, np.uint16)
    with RowWriter(tmp_path / "out.png", 10, 20, 4, x.dtype, header, tmp_path / "out.png") as writer:
        for row in range(0, 20, 3):
            writer.write(x[row : row + 3])
    written = read_picture(tmp_path / "out.png")
    np.testing.assert_array_equal(written.array, x)
    assert written.header.xres == pytest.approx(11.0, rel=1e-3)
    assert not written.header.get_typeof("orientation") or written.header.get("orientation") == 1


def test_a_large_tiff_is_tiled_and_big(picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = picture(300, 280)
    monkeypatch.setattr(anysize.files, "_LARGE_TIFF", 1000)
    write_picture(tmp_path / "out.tif", x)
    data = (tmp_path / "out.tif").read_bytes()
    assert int.from_bytes(data[2:4], "little") == 43  # BigTIFF
    np.testing.assert_array_equal(read_picture(tmp_path / "out.tif").array, x)


def test_a_reader_decodes_each_row_once_for_bands_of_any_height(
    picture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = picture(97, 31)
    write_picture(tmp_path / "in.png", x)
    fetched: list[tuple[int, int]] = []
    fetch = RowReader._fetch

    def noted(self: RowReader, top: int, bottom: int) -> np.ndarray:
        fetched.append((top, bottom))
        return fetch(self, top, bottom)

    monkeypatch.setattr(RowReader, "_fetch", noted)
    for ends in ((0, 97), (0, 30, 40, 50, 60, 97), (0, 3, 50, 97), (0, 20, 28, 36, 96, 97)):
        reader = RowReader(tmp_path / "in.png")
        got = [reader.read(a, b) for a, b in itertools.pairwise(ends)]
        np.testing.assert_array_equal(np.concatenate(got), x)
        reader.close()
        assert fetched[0][0] == 0
        assert all(before[1] == after[0] for before, after in itertools.pairwise(fetched))
        fetched.clear()
