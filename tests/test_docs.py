"""What the pages show works: their blocks run as printed, and the site has a place for every public name."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any
from unittest.mock import Mock, create_autospec

import anysize
import anysize.bench
import anysize.parity
import anysize.sweep
import diffusers_toys as small
import hosts
import numpy as np
import pytest
import torch
import toys
from anysize.cli import main
from anysize.exporters import exporting
from anysize.exporters.exporting import verification_sizes
from anysize.models import animegan
from anysize.models.animegan import AnimeGANv2, ConvNormLReLU
from anysize.models.architectures import SRVGGNetCompact
from anysize.models.registry import KNOWN
from PIL import Image

ROOT = Path(__file__).parent.parent
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
FENCE = re.compile(r"^(?P<indent> *)```(?P<language>.*?)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S)
EXAMPLE = re.compile(r"--8<--\nexamples/(\w+\.py)\n--8<--\n")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TARGETS = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.M)

#: commands of other programs and languages of other blocks that may stand on a page: what it is -> why
OTHER_COMMANDS: dict[str, str] = {}
OTHER_LANGUAGES: dict[str, str] = {}


def photo(path: Path) -> None:
    waves = np.sin(np.mgrid[:43, :53].sum(0) / 9)[..., None] * (60, 80, 100) + 128
    Image.fromarray(waves.astype(np.uint8)).save(path)


def mask(path: Path) -> None:
    Image.fromarray(np.pad(np.full((13, 23), 255, np.uint8), 15)).save(path)


def folder(path: Path) -> None:
    path.mkdir()
    photo(path / "a.png")
    photo(path / "b.jpg")


class Narrow(AnimeGANv2):
    """The generator's keys, sizes and ways to upsample, with few of its layers."""

    def __init__(self, align_corners: bool = True) -> None:
        torch.nn.Module.__init__(self)
        self.in_channels, self.align_corners = 3, align_corners
        layer, none = partial(ConvNormLReLU, 8, 8), torch.nn.Identity()
        sequence = torch.nn.Sequential
        self.block_a = sequence(ConvNormLReLU(3, 8, stride=2, padding=(0, 1, 0, 1)))
        self.block_b = sequence(layer(stride=2, padding=(0, 1, 0, 1)))
        self.block_c, self.block_d, self.block_e = layer(), layer(), sequence(none, none, layer())
        self.out_layer = sequence(torch.nn.Conv2d(8, 3, 1, bias=False), torch.nn.Tanh())


def saved(make: Callable[[], torch.nn.Module], path: Path) -> None:
    """Of any name the same bytes, so that the cache knows them again."""
    torch.manual_seed(0)
    file = BytesIO()
    torch.save(make().state_dict(), file)
    path.write_bytes(file.getvalue())


upscaling = partial(saved, partial(SRVGGNetCompact, features=8, convolutions=2))
restyling = partial(saved, Narrow)


def contract(path: Path) -> None:
    anysize.exporters.export(toys.Convolution(), path, inputs=[("n", 3, "h", "w")])


def community(path: Path) -> None:
    from anysize.models.community import import_spandrel
    from safetensors.torch import save_file

    import_spandrel()
    from spandrel.architectures.PLKSR import PLKSR

    save_file(PLKSR(dim=16, n_blocks=2).state_dict(), path)


def sdxl(path: Path) -> None:
    from diffusers import AutoencoderKL

    unet = small.unet(
        9,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("UpBlock2D",),
        mid_block_type=None,
        block_out_channels=(16,),
        transformer_layers_per_block=1,
        attention_head_dim=2,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )
    small.inpainting(unet, vae)[0].save_pretrained(path)


def sana(path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline

    scheduler = FlowMatchEulerDiscreteScheduler()
    SanaPipeline(None, None, small.deep_vae(), small.sana(layers=1), scheduler).save_pretrained(path)


#: what a page's blocks name and read -> what makes it, small and of random weights
FILES: dict[str, Callable[[Path], None]] = {
    "RealESRGAN_x4plus.pth": upscaling,
    "model.pth": upscaling,
    "model.onnx": contract,
    "edited.onnx": contract,
    "paprika.pt": restyling,
    "face_paint_512_v2.pt": restyling,
    "sdxl-inpainting/": sdxl,
    "sana/": sana,
    "folder/": folder,
    "community.safetensors": community,
    "mask.png": mask,
    **dict.fromkeys(("in.jpg", "photo.jpg", "photo.png", "portrait.jpg", "map.png"), photo),
}
#: page -> variables that it says its reader has
GIVEN: dict[str, dict[str, Callable[[], Any]]] = {"README.md": {"net": toys.Convolution}}


#: page -> the double of its host
HOSTS = {"docs/hosts/comfyui.md": hosts.comfyui, "docs/hosts/webui.md": hosts.webui}


@dataclass(frozen=True)
class Block:
    language: str
    code: str
    line: int


def blocks(page: str) -> list[Block]:
    text = PAGES[page]
    return [
        Block(m["language"], textwrap.dedent(m["code"]), text.count("\n", 0, m.start()) + 1)
        for m in FENCE.finditer(text)
    ]


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder that pages run in; stand-ins for downloads, text encoders and long measuring."""
    from diffusers import SanaPipeline, StableDiffusionXLInpaintPipeline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ANYSIZE_HOME", str(tmp_path / "home"))
    (tmp_path / "home" / "models").mkdir(parents=True)
    known = KNOWN["RealESRGAN_x4plus"]
    downloaded = tmp_path / "home" / "models" / known.file
    upscaling(downloaded)
    data = downloaded.read_bytes()
    known = replace(known, size=len(data), sha256=sha256(data).hexdigest())
    monkeypatch.setitem(KNOWN, known.name, known)

    texts = [torch.zeros(shape) for shape in ((1, 7, 32), (1, 7, 32), (1, 32), (1, 32))]
    monkeypatch.setattr(StableDiffusionXLInpaintPipeline, "encode_prompt", lambda *_, **__: texts)
    monkeypatch.setattr(SanaPipeline, "_optional_components", ["tokenizer", "text_encoder"])

    monkeypatch.setattr(animegan, "AnimeGANv2", Narrow)
    for module in (exporting, anysize.parity):  # one each
        monkeypatch.setattr(module, "verification_sizes", lambda spec: verification_sizes(spec)[-1:])
    # measuring takes minutes and has tests of its own; here the arguments are read and bound
    for module, name in ((anysize.bench, "bench"), (anysize.sweep, "sweep")):
        result = Mock(**{"write.return_value": [], "markdown.return_value": ""})
        monkeypatch.setattr(module, name, create_autospec(getattr(module, name), return_value=result))
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_blocks_of_a_page_run(page: str, there: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = blocks(page)
    if page in HOSTS:
        HOSTS[page](monkeypatch, there)
    shown = "".join(block.code for block in found)
    for name, make in FILES.items():
        if name in shown:
            make(there / name)
    namespace = {name: make() for name, make in GIVEN.get(page, {}).items()}
    for block in found:
        where = f"{page}:{block.line}"
        if block.language == "python":
            python(where, block, namespace)
        elif block.language == "sh":
            for line in block.code.replace("\\\n", " ").splitlines():
                if words := shlex.split(line, comments=True):
                    command(where, words)
        elif block.language == "toml":
            tomllib.loads(block.code)
        else:
            assert block.language in OTHER_LANGUAGES, f"{where}: nothing checks a block of this language"


def python(where: str, block: Block, namespace: dict[str, Any]) -> None:
    if example := EXAMPLE.fullmatch(block.code):
        # which that file runs
        assert f'"{example[1]}"' in (ROOT / "tests" / "test_examples.py").read_text(), where
        return
    code = compile("\n" * block.line + block.code, ROOT / where.partition(":")[0], "exec")
    exec(code, namespace)


def command(where: str, words: list[str]) -> None:
    match words:
        case ["anysize", *arguments]:
            with pytest.raises(SystemExit) as caught:
                main(arguments)
            assert caught.value.code == 0, f"{where}: {shlex.join(words)}"
        case ["make", *targets]:
            assert targets, where
            assert set(targets) <= set(TARGETS), where
        case ["pip", "install", "--no-deps", *names]:
            extras = str(PROJECT["optional-dependencies"])  # einops is what spandrel takes
            assert all(name == "einops" or name in extras for name in names), where
        case ["pip", "install", what, *others]:
            assert set(others) <= {"pytest"}, where
            extras = re.fullmatch(r"(?:anysize|\.)\[(.+)\]", what)
            assert extras, f"{where}: {what}"
            assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"]), where
        case ["pytest", file]:  # the blocks before it run here
            assert f"`{file}`" in PAGES[where.partition(":")[0]], where
        case _:
            assert words[0] in OTHER_COMMANDS, f"{where}: nothing checks '{shlex.join(words)}'"


@pytest.mark.parametrize("page", PAGES)
def test_no_fence_is_missed(page: str) -> None:
    fences = re.findall(r"^[ >]*(?:```|~~~)", PAGES[page], re.M)
    assert len(fences) == 2 * len(blocks(page))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not (find_spec("material") and find_spec("mkdocstrings")):
        pytest.skip("needs the extra docs")
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(build, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_builds_and_its_pages_load_nothing_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert {page.with_suffix("").name for page in pages} >= {Path(page).stem for page in PAGES if "/" in page}
    for page in pages:
        loaded = re.findall(
            r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?(//|https?:)", page.read_text()
        )
        assert not loaded, page


def test_each_public_name_is_in_the_reference(site: Path) -> None:
    from mkdocstrings import Inventory

    with (site / "objects.inv").open("rb") as file:
        documented = set(Inventory.parse_sphinx(file))
    assert [name for name in anysize.__all__ if f"anysize.{name}" not in documented] == []
