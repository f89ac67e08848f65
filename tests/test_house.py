"""The house itself: what importing costs, who may import whom, what the wheel holds."""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import anysize
import pytest

ROOT = Path(__file__).parent.parent
#: room -> rooms it may import; runtime may import all
ALLOWED = {
    "backends": {"backends"},
    "models": {"models", "backends"},
    "exporters": {"exporters", "backends"},
}
ENGINES = {"torch", "onnx", "onnxscript", "onnxruntime", "openvino", "safetensors"}
HEAVY = ENGINES | {"pyvips", "typer", "rich", "PIL"}
LAZY = {"cli.py": {"typer", "rich"}, "torch_module.py": {"torch"}, "architectures.py": {"torch"}}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_no_engine_and_no_interface() -> None:
    loaded = run("import anysize, sys; print(*{m.partition('.')[0] for m in sys.modules})").split()
    assert not HEAVY & set(loaded)
    assert "numpy" in loaded


def test_importing_takes_little_more_than_numpy() -> None:
    code = """
import time
started = time.perf_counter()
import numpy
between = time.perf_counter()
import anysize
print(time.perf_counter() - between)
"""
    assert min(float(run(code)) for _ in range(5)) <= 0.050


@pytest.mark.parametrize("room", ["runtime", *ALLOWED])
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
                assert parts[0] not in {"runtime", *ALLOWED}, f"{file}: imports {name} as a second copy"
                if parts[0] == "anysize" and room in ALLOWED:
                    assert len(parts) > 1, f"{file}: imports {name}"
                    assert parts[1] in ALLOWED[room], f"{file}: imports {name}"


@pytest.mark.parametrize("room", ["runtime", *ALLOWED])
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


def test_wheel_holds_all_rooms_and_the_bundled_model(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for room, package in (("runtime", "anysize"), *((r, f"anysize/{r}") for r in ALLOWED)):
        for file in (ROOT / room).glob("*.py"):
            assert f"{package}/{file.name}" in names
    assert {"anysize/py.typed", "anysize/models/default.onnx", "anysize/models/default.safetensors"} <= names
    assert not [n for n in names if n.split("/")[0] in ("training", "tests", "benchmarks")]
