"""The main job on real weights and pictures, from `../shared/assets`; skipped where that is missing."""

from __future__ import annotations

import hashlib
from pathlib import Path

import anysize
import numpy as np
import pytest
import torch
from anysize import Tiling, Upscaler
from anysize.exporters import export
from anysize.files import read_picture
from anysize.models import BUNDLED, load_weights
from anysize.pixels import to_float
from anysize.session import Session
from conftest import ENGINES

WEIGHTS = ["realesr-animevideov3.pth", "rrdbnet6-trained.pth"]
PICTURES = ["0030.jpg", "children-alpha.png"]
RADIUS = {"realesr-animevideov3.pth": 18, "rrdbnet6-trained.pth": 94}


@pytest.fixture(scope="module")
def sessions(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Session]:
    """One file for the engines of graphs; that each converts weights by itself, tests/test_cache.py tries."""
    made, folder = {}, tmp_path_factory.mktemp("real")
    for name in WEIGHTS:
        weights = load_weights(assets / "weights" / name)
        file = export(weights.module, folder / f"{name}.onnx", inputs=[("n", weights.in_channels, "h", "w")])
        for engine in ENGINES:
            source = assets / "weights" / name if engine == "torch" else file
            made[name, engine] = anysize.load(source, backend=engine)
    return made


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_engines_agree_and_exact_tiles_equal_the_whole(
    sessions: dict[tuple[str, str], Session], assets: Path, weights: str, name: str, tmp_path: Path
) -> None:
    array = read_picture(assets / "images" / name).array
    if weights.startswith("rrdb"):  # minutes of arithmetic otherwise; tests/acceptance.py does it all
        array = array[:96, :128]
    whole = {}
    for engine in ENGINES:
        upscale = Upscaler(sessions[weights, engine], tiling=Tiling("whole"))
        whole[engine] = upscale(to_float(array))
        assert upscale.report.precision == "f32"
    for engine in ENGINES[1:]:
        assert np.abs(whole[engine] - whole[ENGINES[0]]).max() <= 1e-4
    tiled = Upscaler(sessions[weights, ENGINES[0]], tiling=Tiling("tile", 64, "exact"))
    assert np.abs(tiled(to_float(array)) - whole[ENGINES[0]]).max() <= 1e-5
    assert tiled.report.exact
    assert tiled.report.overlap == RADIUS[weights]
    rough = Upscaler(sessions[weights, ENGINES[0]], tiling=Tiling("tile", 64, 10))
    rough(array)
    assert rough.report.exact is False
    assert rough.report.max_error is not None


def host_tiler(
    model: torch.nn.Module, picture: np.ndarray, tile: int, pad: int, before: int = 10
) -> np.ndarray:
    """The pattern of Real-ESRGAN's own RealESRGANer, x4: padded before; tiles with their surroundings, of
    other sizes at the edges; cropped; pasted. HWC uint8 both ways."""
    x = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    x = torch.nn.functional.pad(x, (0, before, 0, before), "reflect")
    height, width = x.shape[2:]
    result = x.new_zeros((1, 3, 4 * height, 4 * width))
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            bottom, right = min(top + tile, height), min(left + tile, width)
            y, x0 = max(top - pad, 0), max(left - pad, 0)
            with torch.no_grad():
                made = model(x[:, :, y : min(bottom + pad, height), x0 : min(right + pad, width)])
            made = made[:, :, 4 * (top - y) :, 4 * (left - x0) :]
            made = made[:, :, : 4 * (bottom - top), : 4 * (right - left)]
            result[:, :, 4 * top : 4 * bottom, 4 * left : 4 * right] = made
    result = result[0, :, : 4 * picture.shape[0], : 4 * picture.shape[1]]
    return (result.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def test_a_hosts_own_tiler(sessions: dict[tuple[str, str], Session], assets: Path) -> None:
    original = load_weights(assets / "weights" / WEIGHTS[0]).module
    pictures = [read_picture(assets / "images" / name).array[..., :3] for name in PICTURES]
    wanted = [host_tiler(original, picture, 192, 8) for picture in pictures]
    for engine in ENGINES:
        model = anysize.as_module(sessions[WEIGHTS[0], engine], like=original)
        assert type(model) is type(original)
        for picture, want in (*zip(pictures, wanted, strict=True),) * 2:
            got = host_tiler(model, picture, 192, 8)
            assert np.abs(got.astype(int) - want).max() <= 1, engine


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
def test_r01_real_model_on_openvino_with_interleaved_sizes(
    sessions: dict[tuple[str, str], Session], assets: Path
) -> None:
    """The reported scenario: sizes interleaved in one process, each twice, identical hashes, few compiles."""
    picture = read_picture(assets / "images" / "OST_009.png").array
    sizes = [(400, 146), (146, 400), (401, 147), (67, 53)]
    model = sessions[WEIGHTS[0], "openvino"]._guards[0].model
    from anysize.backends import EngineOptions, get_backend
    from anysize.guard import ShapeGuard

    guard = ShapeGuard(get_backend("openvino"), model, EngineOptions(), "static", 8)
    upscale = Upscaler(Session([guard]), tiling=Tiling("tile", 64, "exact"))
    digests: dict[tuple[int, int], set[str]] = {size: set() for size in sizes}
    for size in sizes * 2:
        crop = np.resize(picture, (*size, picture.shape[2]))[..., :3]
        digests[size].add(hashlib.sha256(upscale(crop).tobytes()).hexdigest())
    assert all(len(d) == 1 for d in digests.values())
    assert upscale.session.stats.compiles == len({(min(h, 100), min(w, 100)) for h, w in sizes})


@pytest.mark.parametrize("name", BUNDLED)
@pytest.mark.usefixtures("assets")
def test_bundled_models_reach_their_figures(name: str) -> None:
    """As `make eval-model`, on the first engine."""
    from benchmarks.acceptance import Table
    from training.evaluate import half, manners, quality, strokes, work

    table = Table()
    quality(table, name, ENGINES[0])
    manners(table, name, ENGINES[0])
    strokes(table, name, ENGINES[0])
    half(table, name, ENGINES[0])
    if "openvino" in ENGINES:  # which counts them
        work(table, name)
    assert table.rows
    assert not [row for row in table.rows if not row["ok"]]


@pytest.mark.parametrize("name", ["00017_gray.png", "tree_alpha_16bit.png", "children-alpha.png"])
def test_kinds_of_pictures_keep_their_kind(assets: Path, tmp_path: Path, name: str) -> None:
    source = read_picture(assets / "images" / name).array
    anysize.upscale_file(assets / "images" / name, tmp_path / "out.png")
    result = read_picture(tmp_path / "out.png").array
    assert result.dtype == source.dtype
    assert result.shape == (4 * source.shape[0], 4 * source.shape[1], source.shape[2])
    small = to_float(result).reshape(source.shape[0], 4, source.shape[1], 4, -1).mean(axis=(1, 3))
    visible = source[..., -1:] > 0 if source.shape[2] in (2, 4) else np.ones((*source.shape[:2], 1), bool)
    assert np.abs(small - to_float(source))[np.broadcast_to(visible, small.shape)].mean() < 0.02
