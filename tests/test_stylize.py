"""AnimeGANv2 and `Stylizer`: engines agree at any size, batches, policies, alpha, the cache of results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import anysize
import numpy as np
import pytest
import torch
import toys
from anysize import (
    ModelLoadError,
    OptionError,
    Options,
    ResultCache,
    SizePolicy,
    Stylizer,
    Tiling,
    bucket_batch,
)
from anysize.backends import Dim, Rule, get_backend
from anysize.models import load_weights
from anysize.models.animegan import AnimeGANv2
from anysize.pixels import open_picture
from conftest import ENGINES, ToyBox
from PIL import Image

GRAPHS = [name for name in ENGINES if name != "torch"]
#: the sizes to agree at, (height, width)
SIZES = [(256, 256), (333, 250), (384, 512), (720, 1080)]


def noise(*shape: int, dtype: type = np.uint8, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).random(shape)
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else (values * 256).astype(dtype)


@pytest.fixture(scope="module", params=[True, False], ids=["align_corners", "by 2"])
def generator(request: pytest.FixtureRequest, toybox: ToyBox) -> tuple[AnimeGANv2, Path]:
    """The generator with random weights of its real size, and its export."""
    file = toybox.file("Anime", align_corners=int(request.param))
    return toys.Anime(int(request.param)), file


def test_engines_agree(generator: tuple[AnimeGANv2, Path]) -> None:
    """With eager PyTorch, which is what the third engine runs; at sizes that export has not seen."""
    module, path = generator
    sessions = [anysize.load(path, backend=engine, options=Options(max_live=1)) for engine in GRAPHS]
    for session in sessions:
        spec = session.spec
        assert spec.value_range == (-1, 1)
        assert (spec.scale, spec.radius, spec.tileable) == (1, None, False)
        assert spec.dims["h"] == Dim("h", 8)
        assert spec.outputs[0].shape[2] == (Rule("h") if module.align_corners else Rule("h", 4, 4))
    for size in SIZES[:3] if module.align_corners else SIZES[2:]:  # all of them: benchmarks/styles.py
        x = noise(1, 3, *size, dtype=np.float32) * 2 - 1
        with torch.inference_mode():
            want = module(torch.from_numpy(x)).numpy()
        assert want.shape[2:] == (size if module.align_corners else tuple(n // 4 * 4 for n in size))
        for session in sessions:
            assert np.abs(session(x) - want).max() <= 1e-4, (session.backend, size)


def test_weights_files(tmp_path: Path) -> None:
    """As published: a plain state dict called .pt."""
    torch.manual_seed(0)
    module = AnimeGANv2().eval()
    torch.save(module.state_dict(), tmp_path / "paprika.pt")
    weights = load_weights(tmp_path / "paprika.pt")
    assert (weights.architecture, weights.in_channels) == ("AnimeGANv2", 3)
    # those of the published files
    assert sum(p.numel() for p in weights.module.parameters()) == 2143552
    assert "block_c.1.layers.0.1.weight" in module.state_dict()
    session = anysize.load(tmp_path / "paprika.pt", backend="torch")
    x = torch.rand(1, 3, 40, 33)
    with torch.inference_mode():
        np.testing.assert_allclose(session(x.numpy()), module(x).numpy(), atol=1e-5)
    assert session.spec.value_range == (-1, 1)
    state = module.state_dict()
    del state["block_d.1.1.weight"]
    torch.save(state, tmp_path / "paprika.pt")
    with pytest.raises(ModelLoadError, match=r"looks like AnimeGANv2, but .*block_d.1.1.weight"):
        load_weights(tmp_path / "paprika.pt")


class Tint(torch.nn.Module):
    """Each pixel by itself, so that the answer is known; refuses sizes that are no multiples of 4."""

    value_range = (-1.0, 1.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 4, 4, w // 4, 4).reshape(n, c, h, w).flip(1) * 0.5


@pytest.fixture(scope="module", params=ENGINES)
def tint(request: pytest.FixtureRequest) -> anysize.Session:
    return anysize.load(Tint(), backend=request.param)


def tinted(picture: np.ndarray) -> np.ndarray:
    full = 1 if picture.dtype.kind == "f" else np.iinfo(picture.dtype).max
    values = picture[..., ::-1] / full / 2 + 0.25
    return values.astype(picture.dtype) if full == 1 else np.rint(values * full).astype(picture.dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_any_size_and_kind(tint: anysize.Session, dtype: type) -> None:
    stylize = Stylizer(tint)
    for size in ((8, 8), (5, 13), (1, 1), (33, 2)):
        picture = noise(*size, 3, dtype=dtype)
        result = stylize(picture)
        assert result.dtype == dtype
        assert np.abs(result.astype(float) - tinted(picture)).max() <= (1 if dtype != np.float32 else 1e-6)
    assert stylize.report is not None
    assert (stylize.report.width, stylize.report.height, stylize.report.scale) == (2, 33, 1)
    grey = stylize(noise(6, 7))
    assert grey.shape == (6, 7)
    pil = stylize(Image.fromarray(noise(6, 7, 3)))
    assert isinstance(pil, Image.Image)
    assert pil.size == (7, 6)


def test_alpha_comes_back_as_it_was(tint: anysize.Session) -> None:
    picture = noise(9, 10, 4)
    picture[0, 0] = 0
    result = Stylizer(tint)(picture)
    np.testing.assert_array_equal(result[:, :, 3], picture[:, :, 3])
    np.testing.assert_allclose(result[1:, :, :3], tinted(picture[1:, :, :3]), atol=1)
    face = Stylizer(tint, "animegan-face")(picture)
    assert face.shape == (512, 512, 4)
    grey = Stylizer(tint)(noise(9, 10, 2))
    assert grey.shape == (9, 10, 2)


def test_alpha_is_cut_as_the_colour_is() -> None:
    """A policy that takes the middle enlarges it to the picture's size; then alpha has to follow."""
    identity = toys.numpy_session(lambda x: x, toys.image_spec())
    stylize = Stylizer(identity, SizePolicy(mode="crop", square=True))
    picture = np.zeros((300, 900, 4), np.uint8)
    picture[..., 3] = 1
    picture[100:200, 400:500] = 255
    result = stylize(picture)
    np.testing.assert_array_equal(result[..., 3] > 128, result[..., 0] > 128)
    reduced = Stylizer(stylize.session, SizePolicy(64))(picture)
    np.testing.assert_array_equal(reduced[..., 3], picture[..., 3])
    np.testing.assert_array_equal(reduced[..., 0] > 128, picture[..., 0] > 128)


def test_policies(tint: anysize.Session) -> None:
    stylize = Stylizer(tint, "animegan")
    picture = noise(300, 200, 3) // 8 + 100
    result = stylize(picture)
    assert result.shape == picture.shape
    assert stylize.report.reason.startswith("200 x 300 -> 256 x 288, resize")
    assert (stylize.report.width, stylize.report.height) == (200, 300)
    assert Stylizer(tint, SizePolicy(max_side=64, restore=False))(picture).shape == (64, 43, 3)
    with pytest.raises(OptionError, match="no size policy is called 'animgan'"):
        Stylizer(tint, "animgan")
    for wrong in (512, 0, []):
        with pytest.raises(OptionError, match="policy must be"):
            Stylizer(tint, wrong)
    with pytest.raises(anysize.ShapeError):
        Stylizer(tint, SizePolicy(64))(picture[:63])
    with pytest.raises(OptionError, match="progress must be"):
        stylize(picture, progress=5)


def test_mixed_sizes_in_batches(tint: anysize.Session) -> None:
    sizes = [(8, 12), (20, 8), (8, 12), (7, 11), (8, 12), (20, 8), (1, 1)]
    pictures = [noise(*size, 3, seed=i) for i, size in enumerate(sizes)]
    stylize = Stylizer(tint)
    calls = stylize.session.stats.calls
    results = stylize.batch(pictures, most=3)
    # 7 x 11 is padded to 8 x 12, so there are four of that, two of the next, and one
    assert stylize.session.stats.calls - calls == 4
    for picture, result in zip(pictures, results, strict=True):
        np.testing.assert_array_equal(result, stylize(picture))
    assert stylize.batch([]) == []
    mixed = stylize.batch([pictures[0], Image.fromarray(pictures[0]), noise(8, 12)])
    np.testing.assert_array_equal(mixed[1], mixed[0])
    assert mixed[2].shape == (8, 12)
    with pytest.raises(OptionError, match="most"):
        stylize.batch(pictures, most=0)
    for tiling in (Tiling(memory="1GiB"), Tiling("tile", 64, 4), Tiling("tile")):
        with pytest.raises(OptionError, match="one by one"):
            Stylizer(tint, tiling=tiling).batch(pictures)
    for one in (pictures[0], Image.fromarray(pictures[0]), None):
        with pytest.raises(OptionError, match="several pictures"):
            stylize.batch(one)


@pytest.mark.parametrize("engine", GRAPHS)
def test_a_batch_equals_one_by_one(generator: tuple[AnimeGANv2, Path], engine: str) -> None:
    """Statistics are of each picture, not of the batch."""
    images = [
        noise(3, *size, dtype=np.float32, seed=i) * (i + 1) / 2 - 1
        for i, size in enumerate([(64, 48), (40, 52), (64, 48)])
    ]
    with anysize.load(generator[1], backend=engine) as session:
        for image, result in zip(images, bucket_batch(session, images), strict=True):
            assert np.abs(result - session(image[None])[0]).max() <= 1e-5


def test_a_model_of_one_picture_at_a_time() -> None:
    class Single(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[0] != 1:
                raise ValueError("one only")
            return 1 - x

    with anysize.load(Single(), backend="torch") as session:
        images = [noise(3, 8, 8, dtype=np.float32, seed=i) for i in range(3)]
        for image, result in zip(images, bucket_batch(session, images), strict=True):
            np.testing.assert_array_equal(result, 1 - image)


def test_tiles_of_statistics_are_refused(toybox: ToyBox) -> None:
    stylize = Stylizer(toybox.file("WholePicture"), backend=GRAPHS[0], tiling=Tiling("tile", 16))
    with pytest.raises(OptionError, match="looks at the whole picture"):
        stylize(noise(64, 64, 3))


@pytest.mark.parametrize("source", ["default"])
def test_other_models_are_refused(source: str) -> None:
    with pytest.raises(ModelLoadError, match="restyles colour pictures"):
        Stylizer(source)


# -- the cache of results


def test_results_are_kept_by_all_they_follow_from(toybox: ToyBox, tmp_path: Path) -> None:
    cache = ResultCache(tmp_path / "results")
    file = toybox.file("WholePicture")
    picture = noise(20, 24, 3)
    first = Stylizer(file, cache=cache)
    result = first(picture)
    assert first.session.stats.calls == 1
    np.testing.assert_array_equal(first(picture.copy()), result)
    assert first.session.stats.calls == 1
    assert first.report.method == "cache"
    assert (first.report.width, first.report.height) == (24, 20)
    again = Stylizer(file, cache=ResultCache(tmp_path / "results"))
    np.testing.assert_array_equal(again(picture), result)
    assert isinstance(again(Image.fromarray(picture)), Image.Image)
    assert again.session.stats.calls == 0
    # anything else is another result
    others = [
        (again, noise(20, 24, 3, seed=1)),
        (again, picture.reshape(24, 20, 3)),
        (again, picture.astype(np.uint16)),
        (again, picture[:, :, 0]),
        (again, picture[:, ::-1]),
        (Stylizer(file, SizePolicy(8), cache=cache), picture),
        (Stylizer(toybox.file("Convolution"), cache=cache), picture),
        (Stylizer(file, tiling=Tiling("whole"), cache=cache), picture),
        *((Stylizer(file, backend=e, cache=cache), picture) for e in GRAPHS if e != first.session.backend),
    ]
    for stylize, image in others:
        calls = stylize.session.stats.calls
        stylize(image)
        assert stylize.session.stats.calls == calls + 1
    assert len(list((tmp_path / "results").iterdir())) == 1 + len(others)
    steps: list[tuple[int, int]] = []
    again(picture, progress=lambda *step: steps.append(step))
    assert steps == [(1, 1)]
    with pytest.raises(anysize.Cancelled):
        again(picture, cancel=lambda: True)
    result[:] = 0  # the caller's own
    assert again(picture).any()
    batch = again.batch([picture, noise(20, 24, 3, seed=2), others[0][1]])
    assert again.session.stats.calls == 6
    np.testing.assert_array_equal(batch[0], again(picture))


def test_the_cache_is_bounded_and_survives_damage(tint: anysize.Session, tmp_path: Path) -> None:
    cache = ResultCache(tmp_path, limit=5000)
    for i in range(10):
        cache.put(noise(20, 20, 3, seed=i), str(i))
    files = list(tmp_path.iterdir())
    assert sum(f.stat().st_size for f in files) <= 5000
    np.testing.assert_array_equal(cache.get("9"), noise(20, 20, 3, seed=9))
    for file in files:
        file.write_bytes(file.read_bytes()[:-1])
    assert cache.get("9") is None
    with pytest.raises(OptionError, match="limit"):
        ResultCache(tmp_path, limit=0)
    with pytest.raises(OptionError, match="folder"):
        ResultCache(5)
    with pytest.raises(OptionError, match="arrays of numbers"):
        cache.put(np.array([None]), "1")
    with pytest.raises(OptionError, match="cache must be"):
        Stylizer(tint, cache=str(tmp_path))
    with pytest.raises(OptionError, match="nothing tells this model"):
        Stylizer(tint if tint.backend == "torch" else anysize.load(Tint(), backend="torch"), cache=cache)


@pytest.mark.parametrize(
    "other", [np.zeros((2, 2, 3), np.uint8), np.zeros((20, 24, 3)), np.zeros(5, np.uint8), b"", b"junk"]
)
def test_an_entry_that_does_not_fit_is_not_returned(toybox: ToyBox, tmp_path: Path, other: object) -> None:
    cache = ResultCache(tmp_path)
    stylize = Stylizer(toybox.file("WholePicture"), cache=cache)
    picture = noise(20, 24, 3)
    key = stylize._key(open_picture(picture))
    if isinstance(other, bytes):
        cache._cache.put(other, *key)
    else:
        cache.put(other, *key)
    want = Stylizer(stylize.session)(picture)
    np.testing.assert_array_equal(stylize.batch([picture])[0], want)
    cache._cache.put(b"again", *key)
    np.testing.assert_array_equal(stylize(picture), want)


@pytest.mark.skipif(len(GRAPHS) < 2, reason="needs two engines")
def test_what_a_fallback_made_is_not_kept(toybox: ToyBox, tmp_path: Path) -> None:
    """Under the name of the engine that was asked, it would be returned where that one works."""
    faulty = toys.Faulty(get_backend(GRAPHS[0]), toys.raises, 0, 2)
    session = anysize.load(
        toybox.file("WholePicture"), backend=faulty, options=Options(fallback=(GRAPHS[1],))
    )
    stylize = Stylizer(session, cache=ResultCache(tmp_path))
    pictures = [noise(16, 16, 3, seed=i) for i in range(3)]
    stylize(pictures[0])
    assert stylize.report.fallbacks
    assert not list(tmp_path.iterdir())
    stylize(pictures[0])
    assert stylize.report.method == "whole"
    assert len(list(tmp_path.iterdir())) == 1
    stylize.batch(pictures[1:])
    assert len(list(tmp_path.iterdir())) == 1


def test_two_processes_share_a_cache(toybox: ToyBox, tmp_path: Path) -> None:
    code = (
        "import sys, numpy, anysize\n"
        "pictures = [numpy.full((16, 16, 3), i, numpy.uint8) for i in range(20)]\n"
        "stylize = anysize.Stylizer(sys.argv[1], cache=anysize.ResultCache(sys.argv[2], limit=9000))\n"
        "first = [stylize(p) for p in pictures]\n"
        "assert all((a == stylize(p)).all() for a, p in zip(first, pictures))\n"
    )
    command = [sys.executable, "-c", code, str(toybox.file("WholePicture")), str(tmp_path / "results")]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait(120) for process in running] == [0, 0]


def test_results_of_other_code_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ResultCache(tmp_path).put(np.ones(3), "key")
    assert ResultCache(tmp_path).get("key") is not None
    monkeypatch.setattr("anysize.stylize.code_digest", lambda *runtime: "another")
    assert ResultCache(tmp_path).get("key") is None
