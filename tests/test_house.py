"""The house itself: what importing costs, who may import whom, what the wheel holds."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import anysize
import numpy as np
import pytest
from anysize.models import BUNDLED
from PIL import Image

ROOT = Path(__file__).parent.parent
#: room -> rooms it may import; runtime may import all
ALLOWED = {
    "backends": {"backends"},
    "models": {"models", "backends"},
    "exporters": {"exporters", "backends"},
}
ENGINES = {
    "torch",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "safetensors",
    "diffusers",
    "transformers",
    "spandrel",
    "torchvision",
}
HEAVY = ENGINES | {"pyvips", "typer", "rich", "PIL"}
LAZY = {
    "cli.py": {"typer", "rich"},
    "cli_measure.py": {"typer", "rich"},
    "cli_models.py": {"typer", "rich"},
    "cli_options.py": {"typer", "rich"},
    "torch_module.py": {"torch"},
    "architectures.py": {"torch"},
    "animegan.py": {"torch"},
    "modules.py": {"torch"},
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_engine_and_no_interface() -> None:
    loaded = run("import anysize, sys; print(*{m.partition('.')[0] for m in sys.modules})").split()
    assert not HEAVY & set(loaded)
    assert not HEAVY & set(
        run(
            "import anysize, sys; [getattr(anysize, n) for n in anysize.__all__]; "
            "print(*{m.partition('.')[0] for m in sys.modules})"
        ).split()
    )


def test_importing_takes_little_more_than_numpy() -> None:
    code = """
import time
import numpy
started = time.perf_counter()
import anysize
print(time.perf_counter() - started)
"""
    assert min(float(run(code)) for _ in range(5)) <= 0.050


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_nothing_is_reported_over_the_network() -> None:
    """Importing openvino starts a process that tells its makers, unless it lacks their package for that."""
    code = (
        "import anysize, sys; anysize.load('default', backend='openvino'); print('openvino' in sys.modules, "
    )
    assert run(code + "'openvino_telemetry' in sys.modules)").split() == ["True", "False"]


@pytest.mark.parametrize("room", ["runtime", "integrations", *ALLOWED])
def test_layering(room: str) -> None:
    for file in (ROOT / room).glob("*.py"):
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}: relative import"
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                assert parts[0] not in {"runtime", "integrations", *ALLOWED}, (
                    f"{file}: imports {name} as a second copy"
                )
                if parts[0] == "anysize" and room in ALLOWED:
                    assert len(parts) > 1, f"{file}: imports {name}"
                    assert parts[1] in ALLOWED[room], f"{file}: imports {name}"


@pytest.mark.parametrize("room", ["runtime", "integrations", *ALLOWED])
def test_engines_and_interfaces_are_imported_inside_functions(room: str) -> None:
    for file in (ROOT / room).glob("*.py"):
        allowed = LAZY.get(file.name, set())
        for node in ast.parse(file.read_text()).body:
            names = []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                assert name.partition(".")[0] not in HEAVY - allowed, f"{file}: imports {name} at the top"


@pytest.mark.parametrize("name", anysize.__all__)
def test_public_names_are_documented(name: str) -> None:
    assert (getattr(anysize, name).__doc__ or "").strip()


def test_wheel_holds_all_rooms_and_the_bundled_models(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for room, package in (("runtime", "anysize"), *((r, f"anysize/{r}") for r in ("integrations", *ALLOWED))):
        for file in (ROOT / room).glob("*.py"):
            assert f"{package}/{file.name}" in names
    assert {"anysize/py.typed", "anysize/models/bundled.json"} <= names
    for name in BUNDLED:
        assert {f"anysize/models/{name}{suffix}" for suffix in (".onnx", ".safetensors")} <= names
    assert not [n for n in names if n.split("/")[0] in ("training", "tests", "benchmarks")]


def test_the_wheel_alone_upscales_a_picture(tmp_path: Path) -> None:
    """An empty environment with only the openvino extra: no torch, no other engine, no network at run time.

    onnx, which takes models apart for streaming, comes with the extra; without it pictures are tiled.
    """
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", f"{wheel}[openvino]"]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    code = "import pyvips; pyvips.Image.black(7, 9, bands=3).pngsave('in.png')"
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
    anysize_command = [tmp_path / "env" / "bin" / "anysize", "upscale", "in.png", "-o", "out.png", "--json"]
    done = subprocess.run(anysize_command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"width": 28, "height": 36' in done.stdout
    assert (tmp_path / "out.png").stat().st_size > 0
    listed = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert not {"torch", "onnxscript", "onnxruntime"} & set(listed.split())
    uninstall = [python, "-m", "pip", "uninstall", "--quiet", "--yes", "onnx"]
    subprocess.run(uninstall, check=True, capture_output=True)
    code = "import pyvips; pyvips.Image.black(300, 300, bands=3).pngsave('in.png')"
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True)
    done = subprocess.run(anysize_command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert '"method": "tile"' in done.stdout
    assert "pip install onnx" in done.stdout


@pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino")
def test_the_demo_compares_with_bicubic_where_it_belongs(tmp_path: Path) -> None:
    """An enlargement that is shifted by half a pixel is 0.4 dB worse than it should be."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "demo.py", tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    low, sheet = (np.asarray(Image.open(tmp_path / f"{n}.png"), np.float32) for n in ("input", "sheet"))
    height, width = low.shape[0] * 4, low.shape[1] * 4
    for channel in range(3):  # in floats, as Pillow rounds and clips 8 bits between its two passes
        plane = Image.fromarray(low[..., channel])
        bicubic = np.asarray(plane.resize((width, height), Image.Resampling.BICUBIC)).clip(0, 255)
        beside = np.abs(sheet[:, :width, channel] - bicubic)[8:-8, 8:-8]  # they mend the ends otherwise
        assert beside.max() <= 0.51
    (theirs, ours) = map(float, re.findall(r"([\d.]+) dB", done.stdout))
    assert ours > theirs + 4


def test_what_is_locked_is_what_the_tests_run_with() -> None:
    """Each pin, with a digest; PyTorch, whose build differs by index, is the one without."""
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    locked = re.findall(
        r"^([\w.-]+)==(\S+) \\\n((?: {4}--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)",
        (ROOT / "requirements-locked.txt").read_text(),
        re.M,
    )

    def plain(name: str) -> str:
        return name.lower().replace("_", "-")

    have = {plain(name): version for name, version, _ in locked}
    assert {plain(name): version for name, version in pins.items() if name != "torch"}.items() <= have.items()
    assert len(locked) == (ROOT / "requirements-locked.txt").read_text().count("==")


def test_the_workflow_may_only_read() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert re.findall(r"permissions:\n((?:  .*\n)+)", text) == ["  contents: read\n"]
    assert all(
        re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v[\d.]+", use) for use in re.findall(r"uses: (.*)", text)
    )
    assert text.count("persist-credentials: false") == text.count("actions/checkout@")
    assert "secrets." not in text
