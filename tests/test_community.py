"""Architectures that spandrel knows: their contract, engines against PyTorch, and what cannot be loaded."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import anysize
import numpy as np
import pytest
import torch
from anysize.models import community, load_weights
from conftest import ENGINES, ToyBox
from PIL import Image
from safetensors.torch import save_file

if not community.installed():
    pytest.skip("needs spandrel", allow_module_level=True)
spandrel = community.import_spandrel()


def saved(path: Path, architecture: str, name: str | None = None, **arguments: Any) -> Path:
    """The file of a small one with random weights."""
    torch.manual_seed(0)
    module = importlib.import_module(f"spandrel.architectures.{architecture}")
    state = getattr(module, name or architecture)(**arguments).state_dict()
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path


def plksr(folder: Path) -> Path:
    return saved(folder / "plksr.safetensors", "PLKSR", dim=16, n_blocks=2, upscaling_factor=2)


@pytest.mark.parametrize(
    ("weights", "golden", "sides", "exact"),
    [
        ("DITN_Real_x4.pth", "DITN_Real_x4", (16, 32, 64), 0.99),
        ("realcugan-se-up2x-no-denoise.safetensors", "up2x-latest-no-denoise", (32, 64), 0.0),
    ],
)
def test_published_results(
    assets: Path, weights: str, golden: str, sides: tuple[int, ...], exact: float
) -> None:
    """What spandrel's own tests keep for real weights, on each engine."""
    for engine in ENGINES:
        upscale = anysize.Upscaler(assets / "weights" / weights, backend=engine)
        for side in sides:
            size = f"{side}x{side}"
            picture = np.array(Image.open(assets / "golden_inputs" / f"{size}.png").convert("RGB"))
            want = np.array(Image.open(assets / "golden" / f"{golden}__{size}.png").convert("RGB"))
            off = np.abs(upscale(picture).astype(int) - want)
            assert off.max() <= 1, (engine, side)
            assert (off == 0).mean() >= exact, (engine, side)


def test_an_architecture_of_the_community(tmp_path: Path, picture: Callable[..., np.ndarray]) -> None:
    """Its contract is probed, tiles are exact, and engines agree with what spandrel itself computes."""
    file = plksr(tmp_path)
    whole = picture(45, 61, 3, np.float32)
    own = spandrel.ModelLoader().load_from_file(file)
    want = own(torch.from_numpy(whole).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    for engine in ENGINES:
        upscale = anysize.Upscaler(file, backend=engine, tiling=anysize.Tiling("tile", 16))
        assert np.abs(upscale(whole) - want).max() <= 1e-5
        assert upscale.report.exact
        assert upscale.session.spec.radius == 22
    assert anysize.compare(file, sizes=[(9, 30)]).ok


def test_what_a_host_has_loaded_opens_as_it_is(tmp_path: Path) -> None:
    """A descriptor, which the session's use does not change, nor its later changes the session."""
    file = saved(
        tmp_path / "span.safetensors", "SPAN", num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2
    )
    x = np.random.default_rng(0).random((1, 3, 13, 18), np.float32)
    for engine in ENGINES:
        descriptor = spandrel.ModelLoader().load_from_file(file)
        want = descriptor(torch.from_numpy(x)).numpy()
        session = anysize.load(descriptor, backend=engine)
        stand_in = anysize.as_module(session, like=descriptor.model)
        assert isinstance(stand_in, type(descriptor.model))
        with torch.no_grad():
            for weight in descriptor.model.parameters():
                weight.zero_()
        assert np.abs(session(x).clip(0, 1) - want).max() <= 1e-5
        assert np.array_equal(stand_in(torch.from_numpy(x)).numpy(), session(x))
        assert np.abs(descriptor(torch.from_numpy(x)).numpy() - want).max() > 1e-3


def test_size_requirements_are_the_contract(tmp_path: Path) -> None:
    file = saved(tmp_path / "m.safetensors", "SAFMN", dim=8, n_blocks=1, upscaling_factor=2)
    session = anysize.load(file, backend="torch")
    assert [(d.min, d.multiple_of) for d in session.spec.dims.values()] == [(8, 8), (8, 8)]
    with pytest.raises(anysize.ShapeError, match="a multiple of 8"):
        session(np.zeros((1, 3, 16, 20), np.float32))
    upscale = anysize.Upscaler(session)
    assert upscale(np.zeros((7, 21, 3), np.uint8)).shape == (14, 42, 3)


def test_squares_of_many() -> None:
    """Uformer takes squares of multiples of 128; of the network a convolution is enough."""
    module = importlib.import_module("spandrel.architectures.Uformer")
    network = module.Uformer(img_size=128, embed_dim=4, depths=[1] * 9, num_heads=[1] * 9)
    descriptor = spandrel.MAIN_REGISTRY.load(network.state_dict())
    descriptor._model = torch.nn.Conv2d(3, 3, 3, padding=1)
    session = anysize.load(descriptor, backend="torch")
    assert [str(s) for s in session.spec.inputs[0].shape[2:]] == ["h >= 128, a multiple of 128", "h"]
    with pytest.raises(anysize.ShapeError, match="must be h = 128"):
        session(np.zeros((1, 3, 128, 256), np.float32))


def test_squares_alone(picture: Callable[..., np.ndarray]) -> None:
    """Pictures grow to the next square, by their own reflection."""
    network = torch.nn.Conv2d(3, 3, 3, padding=1)
    descriptor = spandrel.ImageModelDescriptor(
        network,
        network.state_dict(),
        architecture=spandrel.MAIN_REGISTRY["Uformer"].architecture,
        purpose="Restoration",
        tags=[],
        supports_half=False,
        supports_bfloat16=False,
        scale=1,
        input_channels=3,
        output_channels=3,
        size_requirements=spandrel.SizeRequirements(multiple_of=16, square=True),
    )
    upscale = anysize.Upscaler(anysize.load(descriptor, backend="torch"))
    for height, width, side in ((40, 64, 64), (17, 9, 32), (16, 16, 16)):
        image = picture(height, width, 3, np.float32)
        grown = np.pad(
            image, ((0, side - height), (0, 0), (0, 0)), "reflect" if side < 2 * height else "edge"
        )
        grown = np.pad(grown, ((0, 0), (0, side - width), (0, 0)), "reflect" if side < 2 * width else "edge")
        with torch.no_grad():
            want = network(torch.from_numpy(grown).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
        assert np.abs(upscale(image) - want[:height, :width].clip(0, 1)).max() <= 1e-5


def test_many_threads_load_one_file(tmp_path: Path) -> None:
    """PyTorch's exporter is not made for that; none of it may fail, or be remembered as impossible."""
    file, problems = plksr(tmp_path), list[Exception]()
    level = logging.getLogger("torch.onnx").level
    options = {"cache_dir": str(tmp_path / "cache")}

    def run(backend: str) -> None:
        try:
            anysize.load(file, backend=backend, options=options)
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(name,)) for name in (*ENGINES, "auto") * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert anysize.load(file, options=options).stats.fallbacks == []
    assert logging.getLogger("torch.onnx").level == level


def test_while_another_thread_imports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "spandrel", ModuleType("spandrel"))
    assert anysize.load(torch.nn.Conv2d(3, 3, 1), backend="torch").backend == "torch"


def test_descriptors_that_cannot_be_taken_over(tmp_path: Path) -> None:
    for change in (
        lambda network: setattr(network, "lock", threading.Lock()) or network,
        lambda network: torch.jit.trace(network, torch.zeros(1, 3, 8, 8)),
    ):
        descriptor = spandrel.ModelLoader().load_from_file(plksr(tmp_path))
        descriptor._model = change(descriptor.model)
        with pytest.raises(anysize.ModelLoadError, match="cannot be taken over"):
            anysize.load(descriptor)


def test_advice_against_tiles_is_followed(tmp_path: Path, picture: Callable[..., np.ndarray]) -> None:
    """SwinIR's: run whole where that is left open, and the contract says why."""
    file = saved(
        tmp_path / "m.safetensors",
        "SwinIR",
        img_size=16,
        embed_dim=12,
        depths=[2],
        num_heads=[2],
        window_size=8,
        mlp_ratio=2.0,
        upscale=2,
        upsampler="pixelshuffle",
    )
    upscale = anysize.Upscaler(file, backend="torch")
    upscale(picture(300, 300))
    assert upscale.report.method == "whole"
    spec = upscale.session.spec
    assert not spec.tileable
    assert spec.producer.endswith("SwinIR: tiling is discouraged")
    assert [d.min for d in spec.dims.values()] == [16, 16]


def test_an_engine_that_cannot_says_what_and_another_runs(tmp_path: Path) -> None:
    file = saved(
        tmp_path / "m.safetensors",
        "ATD",
        img_size=16,
        embed_dim=24,
        depths=(2,),
        num_heads=(2,),
        window_size=8,
        category_size=32,
        num_tokens=8,
        upscale=2,
        upsampler="pixelshuffle",
    )
    engine = anysize.available_backends()[0]  # which "auto" would take
    for _ in range(2):
        started = time.perf_counter()
        with pytest.raises(anysize.ExportError, match=r"aten\.sort"):
            anysize.load(file, backend=engine)
        took = time.perf_counter() - started
    assert took < 0.5  # the second time it is known
    upscale = anysize.Upscaler(file)
    assert upscale.session.backend == "torch"
    (note,) = upscale.session.stats.fallbacks
    assert "aten.sort" in note
    for _ in range(2):
        upscale(np.zeros((16, 16, 3), np.uint8))
        assert upscale.report.fallbacks == [note]
    report = anysize.compare(file, backends=["torch", engine], sizes=[(16, 24)])
    assert [(row.backend, row.ok) for row in report.rows] == [("torch", True), (engine, False)]
    assert "aten.sort" in report.rows[1].error


def test_a_mask_is_a_second_input() -> None:
    """Of LaMa only the descriptor: the network has 50 million weights."""

    class Paint(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = torch.nn.Conv2d(4, 3, 3, padding=1)

        def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            painted = self.mix(torch.cat([image * (1 - mask), mask], 1))
            return image * (1 - mask) + painted * mask

    network = Paint().eval()
    descriptor = spandrel.MaskedImageModelDescriptor(
        network,
        network.state_dict(),
        architecture=spandrel.MAIN_REGISTRY["LaMa"].architecture,
        purpose="Inpainting",
        tags=[],
        supports_half=False,
        supports_bfloat16=False,
        input_channels=3,
        output_channels=3,
        size_requirements=spandrel.SizeRequirements(minimum=16, multiple_of=8),
    )
    rng = np.random.default_rng(0)
    image, mask = (
        rng.random((1, 3, 24, 40), np.float32),
        (rng.random((1, 1, 24, 40)) > 0.5).astype(np.float32),
    )
    with torch.no_grad():
        want = network(torch.from_numpy(image), torch.from_numpy(mask)).numpy()
    for engine in ENGINES:
        session = anysize.load(descriptor, backend=engine)
        (got,) = session.run({"image": image, "mask": mask}).values()
        assert np.abs(got - want).max() <= 1e-5
        with pytest.raises(anysize.ShapeError):
            session.run({"image": image, "mask": mask[..., :32]})


def test_what_spandrel_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = plksr(tmp_path)
    wrong = {key: torch.zeros(3, 5, 1, 1) for key in spandrel.ModelLoader().load_state_dict_from_file(file)}
    save_file(wrong, tmp_path / "wrong.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save([torch.zeros(2)], tmp_path / "list.pth")
    for name, text in (
        ("wrong.safetensors", "spandrel: "),
        ("other.safetensors", "is none of RRDBNet.* and spandrel does not know it either"),
        ("list.pth", "holds list, not a state dict"),
    ):
        with pytest.raises(anysize.ModelLoadError, match=text):
            load_weights(tmp_path / name)
    monkeypatch.setattr("anysize.models.weights.installed", lambda: False)
    with pytest.raises(anysize.ModelLoadError, match=r"anysize\[archs\]"):
        load_weights(file)


@pytest.mark.parametrize("torchvision", ["missing", "broken", "there"])
def test_importing_beside_any_torchvision(tmp_path: Path, torchvision: str) -> None:
    """It is not needed; where it is whole it is used, and where not, nothing of it or for it stays."""
    code = "raise RuntimeError('operator torchvision::nms does not exist')" if torchvision == "broken" else ""
    package = tmp_path / "torchvision" / "transforms"
    if torchvision != "missing":
        package.mkdir(parents=True)
        for init in (package.parent / "__init__.py", package / "__init__.py"):
            init.write_text(code)
        lines = ["from enum import Enum", "class InterpolationMode(Enum): BILINEAR = 1", "def rotate(): pass"]
        (package / "functional.py").write_text("\n".join([*lines, "def normalize(): 'its own'"]))
    program = """
import sys, threading
from anysize.models import community
threads = [threading.Thread(target=community.import_spandrel) for _ in range(4)]
[t.start() for t in threads], [t.join() for t in threads]
from spandrel.architectures import RestoreFormer
import torch
normalize = RestoreFormer.tv_normalize
print(normalize.__doc__ or normalize(torch.ones(1, 3, 2, 2), [0.5, 0, 0], [0.25, 1, 2])[0, :, 0, 0].tolist())
print(*(m for m in sys.modules if m.partition(".")[0] == "torchvision"))
"""
    search = f"import sys; sys.path.insert(0, {str(tmp_path)!r})" if torchvision != "missing" else ""
    ran = subprocess.run([sys.executable, "-c", search + program], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    used, modules = ran.stdout.splitlines()
    assert used == ("its own" if torchvision == "there" else "[2.0, 1.0, 0.5]")
    assert bool(modules) == (torchvision == "there")


def test_own_architectures_stay_this_packages(tmp_path: Path, toybox: ToyBox) -> None:
    """spandrel knows them too, without the batches that these take."""
    from anysize.models.architectures import SRVGGNetCompact

    torch.save({"params": SRVGGNetCompact(3, 8, 2, 2).state_dict()}, tmp_path / "m.pth")
    assert load_weights(tmp_path / "m.pth").architecture == "SRVGGNetCompact"
