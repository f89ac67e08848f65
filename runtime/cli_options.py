"""What the commands share: options, exit codes, consoles, and the reading of their values."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer
from anysize.backends.errors import ImageError, OptionError
from rich.console import Console

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
out, err = Console(), Console(stderr=True)

Model = Annotated[
    str, typer.Option("--model", "-m", help="A model file, or a name that `anysize models` shows.")
]
BackendName = Annotated[str, typer.Option("--backend", "-b", help="auto, openvino, onnxruntime, torch, ...")]
Precision = Annotated[
    str, typer.Option("--precision", help="f32, bf16, int8, or auto: bf16 where it is as good.")
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option("--calibration", help="For int8: pictures, or a folder of them; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")]


def names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",")] if text else None


def sizes_of(text: str | None, option: str = "--sizes") -> list[tuple[int, int]] | None:
    if text is None:
        return None
    try:
        pairs = [part.lower().split("x") for part in text.split(",")]
        return [(int(h), int(w)) for h, w in pairs]
    except ValueError:
        raise OptionError(f"{option} must look like 64x48, not '{text}'") from None


def size_of(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise OptionError(f"--size must be WIDTHxHEIGHT, not '{text}'")
    return int(width), int(height)


def region_of(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError:
        raise OptionError(f"--region must be LEFT,TOP,WIDTH,HEIGHT, not '{text}'") from None
    return left, top, width, height


def make_folder(folder: Path) -> list[Path]:
    """Make the folder; return those that were missing, deepest first."""
    try:
        missing = [f for f in (folder, *folder.parents) if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{folder}: cannot be made: {error.strerror}") from error
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Those that hold a result stay. `folders`: deepest first."""
    for folder in folders:
        with suppress(OSError):  # it holds something, or somebody has removed it
            folder.rmdir()
