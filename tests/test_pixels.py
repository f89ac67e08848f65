"""Every kind of picture in memory: same kind out, right size, depth, grey and alpha kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import anysize
import numpy as np
import pytest
from anysize import ImageError, OptionError, Tiling, Upscaler
from anysize.pixels import constant_runs, fill_hidden, quantise, split
from PIL import Image
from toys import image_spec, nearest, numpy_session


@pytest.fixture
def upscale() -> Upscaler:
    """Nearest x2 on the numpy oracle: the right answer is np.repeat."""
    return Upscaler(numpy_session(nearest(2), image_spec(2)))


def doubled(array: np.ndarray) -> np.ndarray:
    return array.repeat(2, 0).repeat(2, 1)


def visible(array: np.ndarray) -> np.ndarray:
    """Colour under zero alpha is replaced, so none here has it."""
    if array.shape[2] in (2, 4):
        array[..., -1] = np.maximum(array[..., -1], 1e-2 if array.dtype.kind == "f" else 1)
    return array


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64, np.float16])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_dtype_and_channel_count(
    upscale: Upscaler, picture: Callable[..., np.ndarray], channels: int, dtype: type
) -> None:
    x = visible(picture(7, 9, channels, dtype))
    y = upscale(x)
    assert y.dtype == dtype
    tolerance = {"uint16": 0, "uint8": 0, "float16": 0}.get(np.dtype(dtype).name, 1e-7)
    assert np.abs(y.astype(float) - doubled(x).astype(float)).max() <= tolerance
    assert y.flags.c_contiguous
    assert not np.shares_memory(x, y)


def test_a_2d_array_stays_2d(upscale: Upscaler, picture: Callable[..., np.ndarray]) -> None:
    x = picture(5, 4, 1)[:, :, 0]
    np.testing.assert_array_equal(upscale(x), doubled(x))


def test_single_channel_models_run_each_plane(picture: Callable[..., np.ndarray]) -> None:
    upscale = Upscaler(numpy_session(nearest(2), image_spec(2, channels=1)))
    for channels in (1, 2, 3, 4):
        x = visible(picture(6, 5, channels))
        np.testing.assert_array_equal(upscale(x), doubled(x))


def test_other_value_ranges_are_mapped() -> None:
    spec = image_spec(2)
    spec = type(spec)(spec.inputs, spec.outputs, value_range=(-1.0, 1.0), radius=0, tileable=True)

    def model(x: np.ndarray) -> np.ndarray:
        assert x.min() < 0
        return nearest(2)(x)

    x = np.random.default_rng(0).random((5, 5, 3), np.float32)
    np.testing.assert_allclose(Upscaler(numpy_session(model, spec))(x), doubled(x), atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "out"),
    [
        ("1", "L"),
        ("L", "L"),
        ("LA", "LA"),
        ("P", "RGB"),
        ("RGB", "RGB"),
        ("RGBA", "RGBA"),
        ("I;16", "I;16"),
        ("F", "F"),
        ("CMYK", "RGB"),
        ("YCbCr", "RGB"),
    ],
)
def test_pil_images_come_back_as_pil(upscale: Upscaler, mode: str, out: str) -> None:
    rgb = Image.fromarray((np.random.default_rng(0).random((6, 8, 3)) * 255).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((np.arange(48).reshape(6, 8) * 1000).astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray(np.linspace(0, 1, 48, dtype=np.float32).reshape(6, 8))
    else:
        image = rgb.convert(mode)
    image.info["icc_profile"] = b"profile"
    result = upscale(image)
    assert isinstance(result, Image.Image)
    assert (result.mode, result.size) == (out, (16, 12))
    # the profile of colours that were converted would be wrong for the result
    assert result.info.get("icc_profile") == (None if mode in ("CMYK", "YCbCr") else b"profile")
    same = image if out == mode else image.convert(out)
    # grey floats are the mean of three equal channels: the last bit may differ
    tolerance = 1e-7 if mode == "F" else 0
    np.testing.assert_allclose(np.asarray(result), doubled(np.asarray(same)), rtol=tolerance)


def test_keyed_transparency_becomes_alpha(upscale: Upscaler) -> None:
    palette = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    palette.info["transparency"] = 1
    result = np.asarray(upscale(palette))
    assert result.shape == (4, 4, 4)
    assert (result[:2, 2:, 3] == 0).all()
    assert (result[:2, :2] == [255, 0, 0, 255]).all()
    grey = Image.fromarray(np.array([[0, 100], [200, 100]], np.uint8))
    grey.info["transparency"] = 100
    assert upscale(grey).mode == "LA"


def test_pil_mode_without_a_depth_is_refused(upscale: Upscaler) -> None:
    with pytest.raises(ImageError, match="mode I "):
        upscale(Image.fromarray(np.zeros((3, 3), np.int32)))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4, 5), np.uint8),
        np.zeros((4, 4, 0), np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((4, 4, 3), np.int64),
        np.zeros((4, 4, 3), bool),
        np.full((4, 4, 3), 2.0),
        np.full((4, 4, 3), -0.1),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), np.inf),
        "picture.png",
        None,
    ],
)
def test_what_is_no_picture_is_refused(upscale: Upscaler, image: object) -> None:
    with pytest.raises(ImageError):
        upscale(image)


@pytest.mark.parametrize("outscale", [0, -1, float("nan"), float("inf"), 1e9, "2", True])
def test_bad_outscales_are_refused(upscale: Upscaler, outscale: float) -> None:
    with pytest.raises(OptionError):
        upscale(np.zeros((4, 4, 3), np.uint8), outscale=outscale)


def test_other_bad_arguments_are_refused(upscale: Upscaler) -> None:
    x = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(OptionError):
        upscale(x, cancel="now")
    with pytest.raises(OptionError):
        Upscaler(upscale.session, tiling="tile")
    import multiprocessing

    assert upscale(x, cancel=multiprocessing.Event()).shape == (8, 8, 3)


def test_array_subclasses(upscale: Upscaler) -> None:
    x = np.arange(20, dtype=np.uint8).reshape(4, 5)
    np.testing.assert_array_equal(upscale(x.view(np.matrix)), doubled(x))


def test_unreadable_pil_images(upscale: Upscaler, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    closed = Image.open(tmp_path / "x.png")
    closed.close()
    for image in (Image.open(tmp_path / "cut.png"), closed):
        with pytest.raises(ImageError):
            upscale(image)


@pytest.mark.parametrize(
    "function", [lambda x: x.transpose(0, 1, 3, 2), lambda x: (x * 255).astype(np.uint8)]
)
def test_models_of_other_kinds_are_refused(function: Callable) -> None:
    import torch

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(function(x.numpy()))

    with pytest.raises(anysize.ModelLoadError, match="not a picture-to-picture model"):
        Upscaler(Model(), backend="torch")


def test_a_changed_batch_is_no_picture() -> None:
    import torch

    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x * 0, x])

    with pytest.raises(anysize.ModelLoadError, match="not a picture-to-picture model"):
        Upscaler(Twice(), backend="torch")


def test_quantise_rounds_to_nearest_and_clips() -> None:
    values = np.array([-0.5, 0, 0.49 / 255, 0.51 / 255, 1, 1.7], np.float32)
    np.testing.assert_array_equal(quantise(values, np.dtype(np.uint8)), [0, 0, 0, 1, 255, 255])
    np.testing.assert_array_equal(quantise(values[[0, 4, 5]], np.dtype(np.uint16)), [0, 65535, 65535])


def test_hidden_colour_is_that_of_the_nearest_visible_pixel() -> None:
    rgba = np.zeros((5, 7, 4), np.uint8)
    rgba[..., :3] = [255, 0, 255]  # hidden magenta
    rgba[2, 3] = [10, 20, 30, 255]
    rgba[0, 0] = [0, 0, 0, 255]  # visible black is not a hole
    colour, alpha = split(fill_hidden(rgba))
    assert alpha.shape == (1, 5, 7)
    np.testing.assert_allclose(colour[:, 3, 4] * 255, [10, 20, 30], atol=1e-3)
    np.testing.assert_allclose(colour[:, 0, 0], 0, atol=1e-6)
    np.testing.assert_allclose(colour[:, 0, 1], 0, atol=1e-6)


def test_constant_runs() -> None:
    alpha = np.ones((1, 5, 6), np.float32)
    alpha[0, 2, 2] = 0
    runs = constant_runs(alpha, 1.0)
    assert not runs[1:4, 1:4].any()
    assert runs.sum() == 30 - 9


def test_the_report_is_the_calling_threads() -> None:
    import threading

    upscale = Upscaler(numpy_session(nearest(2), image_spec(2)), tiling=Tiling("tile", 8, 0))
    assert upscale.report is None
    upscale(np.zeros((10, 20, 3), np.uint8))
    threading.Thread(target=lambda: upscale(np.zeros((3, 3, 3), np.uint8))).start()
    report = upscale.report
    assert (report.width, report.height, report.scale, report.method) == (40, 20, 2.0, "tile")
    assert (report.tile, report.overlap, report.exact, report.backend) == (8, 0, True, "numpy")


def test_models_that_make_no_picture_are_refused(tmp_path: object) -> None:
    spec = image_spec(channels=5)
    with pytest.raises(anysize.ModelLoadError, match="not a picture-to-picture model"):
        Upscaler(numpy_session(nearest(1), spec))


@pytest.mark.parametrize("size", [(40, 30), (101, 77), (300, 90), (90, 300), (99, 76), (400, 308)])
def test_resizing_keeps_everything_in_place(size: tuple[int, int]) -> None:
    """Whether it shrinks or grows: ramps stay where the middles of pixels lie."""
    from anysize.pixels import resize

    have = (100, 77)
    ramps = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float32) for n in have), indexing="ij"), -1)
    resized = resize(ramps, *size)
    for axis in (0, 1):
        places = (np.arange(size[axis]) + 0.5) * have[axis] / size[axis] - 0.5
        inner = (places > 6) & (places < have[axis] - 7)
        line = resized[:, size[1] // 2, 0] if axis == 0 else resized[size[0] // 2, :, 1]
        # libvips has its kernels at a number of places between two pixels only
        assert np.abs(line - places)[inner].max() < 1 / 32
        assert abs((line - places)[inner].mean()) < 0.002
