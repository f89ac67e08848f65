"""The scripts in examples/ run as they are."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import pyvips

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("picture", [None, "photo.png"])
def test_anytext(tmp_path: Path, picture: str | None) -> None:
    if picture:
        pyvips.Image.black(300, 200, bands=4).write_to_file(str(tmp_path / picture))
    said = run("anytext.py", tmp_path, *filter(None, [picture]))
    assert ("300 x 200 -> 256 x 192" if picture else "551 x 754 -> 512 x 704") in said
    assert "h >= 64, a multiple of 64" in said
    assert "without a plan: input 'picture', axis 2: got" in said
    made = pyvips.Image.new_from_file(str(tmp_path / "out" / "anytext.png"))
    assert (made.width, made.height) == ((300, 200) if picture else (551, 754))


def test_sdxl_inpaint(tmp_path: Path) -> None:
    said = run("sdxl_inpaint.py", tmp_path)
    assert "153 x 105 -> 152 x 104" in said
    assert float(re.search(r"openvino against torch: (\S+) of 255", said)[1]) <= 2
    shifts = [float(found) for found in re.findall(r"dE2000 (\S+)", said)]
    assert shifts[1] < shifts[0]
    made = pyvips.Image.new_from_file(str(tmp_path / "out" / "sdxl-inpaint.png"))
    assert (made.width, made.height) == (153, 105)


def test_sana(tmp_path: Path) -> None:
    said = run("sana.py", tmp_path)
    assert "positions computed: hidden_states: float32[n, 4, h, w]" in said
    assert "positions fixed: hidden_states: float32[n, 4, 32, 32]" in said
    assert "result 1023 x 577" in said
    assert "fixed positions: input 'hidden_states', axis 2: got 16, but must be 32; nearest valid: 32" in said
    made = pyvips.Image.new_from_file(str(tmp_path / "out" / "sana.png"))
    assert (made.width, made.height) == (400, 1001)


def test_animegan(tmp_path: Path) -> None:
    said = run("animegan.py", tmp_path)
    assert "h >= 8" in said
    # two of one size together, and none the second time
    assert "again, from the cache: " in said
    assert said.count(" 3 calls of the engine") == 2
    made = pyvips.Image.new_from_file(str(tmp_path / "out" / "animegan-3.png"))
    assert (made.width, made.height) == (333, 511)
    assert run("animegan.py", tmp_path, str(tmp_path / "out" / "animegan.safetensors"), "out/animegan-3.png")
