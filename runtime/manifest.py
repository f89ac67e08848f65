"""What became of each picture of a folder, so that a run that was cut short can go on where it was."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from anysize.backends.errors import ImageError
from anysize.files import check_is_no_pipe
from anysize.report import Report

log = logging.getLogger("anysize")

NAME = "anysize.jsonl"


class Manifest:
    """The file `anysize.jsonl` in a folder of results. Thread-safe; several processes may add to one.

    A JSON object a line: a `Report`'s fields, `sha256` of the result, `source_sha256` of the picture it was
    made from, `settings`, a digest of the model, the engine and all else that it follows from. Of the lines
    on one result the last counts. It is written before the result gets its name. So a result which is there,
    and is what its line says, is whole; and none is whole without its line. Failures before the first result
    are written with it: where all fails, nothing is.
    """

    def __init__(self, folder: Path, settings: Iterable[str], verified: bool = False) -> None:
        """`verified`: only results that were computed twice, in places, are finished."""
        self._path, self._lock, self._verified = folder / NAME, threading.Lock(), verified
        self._waiting: list[bytes] = []
        self._settings = hashlib.sha256("\0".join(settings).encode()).hexdigest()
        self._last = read(folder)

    def finished(self, src: Path, dst: Path) -> Report | None:
        """The report of a result that is there, whole, and of this picture and these settings; else None."""
        line = self._last.get(dst.name, {})
        same = line.get("status") == "ok" and line.get("settings") == self._settings
        if not (same and dst.is_file() and line.get("sha256") == digest(dst)):
            return None
        if line.get("source_sha256") != digest(src) or (self._verified and not line.get("verified")):
            return None
        return Report("kept", input=str(src), output=str(dst), reason="done before, with the same settings")

    def add(self, report: Report, result: Path | None = None, source: str | None = None) -> None:
        """Note what became of a picture. `result`: the file that will be its result; `source`: its digest.

        Raises `ImageError` where the manifest cannot be written.
        """
        line: dict[str, Any] = report.to_dict()
        if result is not None:
            line |= {"sha256": digest(result), "source_sha256": source, "settings": self._settings}
        with self._lock:
            self._waiting.append(json.dumps(line).encode() + b"\n")
            if result is not None or self._path.exists():
                self._write()

    def _write(self) -> None:
        try:
            with self._path.open("ab") as file:
                if file.tell() and not _ends_a_line(self._path):  # somebody was cut short
                    self._waiting.insert(0, b"\n")
                file.write(b"".join(self._waiting))
        except OSError as error:
            raise ImageError(f"{self._path}: cannot be written: {error.strerror}") from error
        finally:
            self._waiting.clear()


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The last line on each result in a folder, by its file's name; nothing where there is no manifest.

    Lines that are none of ours are passed over, and logged. Raises `ImageError` where it cannot be read.
    """
    found: dict[str, dict[str, Any]] = {}
    path = folder / NAME
    check_is_no_pipe(path)
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text) if text.strip() else None
                    if line is not None and line["output"] is not None:
                        found[Path(line["output"]).name] = line
                except (ValueError, TypeError, KeyError, RecursionError):
                    log.warning("%s: line %d is passed over: it is not one of a manifest", path, number)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error
    return found


def digest(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text. Raises `ImageError`."""
    check_is_no_pipe(path)
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read: {error.strerror}") from error


def _ends_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, 2)
        return file.read(1) == b"\n"
