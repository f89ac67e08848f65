"""The scripts in examples/ run as they are."""

from __future__ import annotations

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


def test_animegan(tmp_path: Path) -> None:
    said = run("animegan.py", tmp_path)
    assert "h >= 8" in said
    # two of one size together, and none the second time
    assert "again, from the cache: " in said
    assert said.count(" 3 calls of the engine") == 2
    made = pyvips.Image.new_from_file(str(tmp_path / "out" / "animegan-3.png"))
    assert (made.width, made.height) == (333, 511)
    assert run("animegan.py", tmp_path, str(tmp_path / "out" / "animegan.safetensors"), "out/animegan-3.png")
