"""Bundled models and known weights: what they are, where they are, and how they come to this machine."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from anysize.backends.errors import ModelLoadError, OptionError

log = logging.getLogger("anysize")

_RELEASES = "https://github.com/xinntao/Real-ESRGAN/releases/download/"
_CHUNK = 2**18
_HERE = Path(__file__).parent
#: seconds without a byte before a server is given up, and tries that brought nothing new
_TIMEOUT, _TRIES = 30.0, 3
_PAUSE = 1.0


@dataclass(frozen=True)
class Bundled:
    """A model of this package, as ONNX and as weights; the digests are sha256 of those files, in hex."""

    name: str
    architecture: str
    scale: int
    licence: str
    sha256: str
    weights_sha256: str


#: by name; the file is written with the models, by training/publish.py
BUNDLED = {
    facts["name"]: Bundled(**facts)
    for facts in json.loads(_HERE.joinpath("bundled.json").read_text(encoding="utf-8"))
}


def bundled_file(name: str, suffix: str = ".onnx") -> Path:
    """The file of a bundled model; `suffix` is ".onnx" or ".safetensors".

    Raises `ModelLoadError` where it is missing, or does not have the bytes it was published with.
    """
    known = BUNDLED[name]
    path = _HERE / (known.name + suffix)
    try:
        found = _sha256(path)
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}; install anysize again") from error
    if found != {".onnx": known.sha256, ".safetensors": known.weights_sha256}[suffix]:
        raise ModelLoadError(f"{path}: is damaged, its sha256 is {found}; install anysize again")
    return path


@dataclass(frozen=True)
class Known:
    """Published weights. `size` in bytes; `sha256` of the file, in hex."""

    name: str
    architecture: str
    scale: int
    licence: str
    size: int
    sha256: str
    url: str

    @property
    def file(self) -> str:
        """Its name in the folder of models."""
        return self.url.rpartition("/")[2]


def _real_esrgan(release: str, name: str, architecture: str, scale: int, size: int, sha256: str) -> Known:
    return Known(name, architecture, scale, "BSD-3-Clause", size, sha256, f"{_RELEASES}{release}/{name}.pth")


#: by name
KNOWN = {
    known.name: known
    for known in (
        _real_esrgan(
            "v0.1.0",
            "RealESRGAN_x4plus",
            "RRDBNet",
            4,
            67040989,
            "4fa0d38905f75ac06eb49a7951b426670021be3018265fd191d2125df9d682f1",
        ),
        _real_esrgan(
            "v0.2.2.4",
            "RealESRGAN_x4plus_anime_6B",
            "RRDBNet",
            4,
            17938799,
            "f872d837d3c90ed2e05227bed711af5671a6fd1c9f7d7e91c911a61f155e99da",
        ),
        _real_esrgan(
            "v0.2.1",
            "RealESRGAN_x2plus",
            "RRDBNet",
            2,
            67061725,
            "49fafd45f8fd7aa8d31ab2a22d14d91b536c34494a5cfe31eb5d89c2fa266abb",
        ),
        _real_esrgan(
            "v0.2.5.0",
            "realesr-general-x4v3",
            "SRVGGNetCompact",
            4,
            4885111,
            "8dc7edb9ac80ccdc30c3a5dca6616509367f05fbc184ad95b731f05bece96292",
        ),
        _real_esrgan(
            "v0.2.5.0",
            "realesr-animevideov3",
            "SRVGGNetCompact",
            4,
            2504012,
            "b8a8376811077954d82ca3fcf476f1ac3da3e8a68a4f4d71363008000a18b75d",
        ),
    )
}


def home() -> Path:
    """Where models are kept: `models` in the environment's `ANYSIZE_HOME`, else in the user's data folder."""
    folder = os.environ.get("ANYSIZE_HOME")
    if not folder:
        from platformdirs import user_data_dir

        folder = user_data_dir("anysize", appauthor=False)
    return Path(folder) / "models"


def local(known: Known, *, checked: bool = False) -> Path | None:
    """Its file, if it was fetched, by its size. `checked`: by its sha256."""
    path = home() / known.file
    if not path.is_file() or path.stat().st_size != known.size:
        return None
    return path if not checked or _sha256(path) == known.sha256 else None


def fetch(name: str, *, progress: Callable[[int, int], None] | None = None) -> Path:
    """Download known weights to `home()`, unless they are there, and return their file; or a bundled one's.

    `progress`: called with the bytes that are there and those of the whole. A broken download goes on where
    it stopped, in this call or a later one. The file appears under its name only with the right sha256; what
    has another is deleted. Threads and processes may call it at once.

    Raises `OptionError` (unknown name, no folder to write to), `ModelLoadError` (no network, a server's
    error, wrong bytes, a bundled file that is damaged).
    """
    if name in BUNDLED:
        return bundled_file(name)
    if name not in KNOWN:
        raise OptionError(f"{name}: not a known model; known are {', '.join([*BUNDLED, *KNOWN])}")
    known = KNOWN[name]
    path = home() / known.file
    if path.is_dir():
        raise OptionError(f"{path}: is a folder, and the file of {name} belongs there")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            if _sha256(path) == known.sha256:
                return path
            log.warning("%s does not have the sha256 of %s and is fetched again", path, name)
            path.unlink(missing_ok=True)
        part = _own_part(path)
        try:
            _download(known, part, progress)
        except BaseException:
            with suppress(OSError):  # for the next call
                if part.stat().st_size:
                    os.replace(part, f"{path}.part")
                else:
                    part.unlink()
            raise
        if (found := _sha256(part)) != known.sha256:
            part.unlink()
            raise ModelLoadError(
                f"{name}: what {known.url} gave has sha256 {found}, not {known.sha256}; it was deleted"
            )
        os.replace(part, path)
    except OSError as error:
        raise OptionError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def _own_part(path: Path) -> Path:
    """A file of this thread alone to load into: a broken download that nobody goes on with, or a new one."""
    import psutil

    own = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.part")
    for left in (path.with_name(f"{path.name}.part"), *path.parent.glob(f"{path.name}.*-*.part")):
        process = re.search(r"\.(\d{1,9})-\d+\.part$", left.name)
        if left.is_symlink() or not left.is_file() or (process and psutil.pid_exists(int(process[1]))):
            continue
        with suppress(OSError):  # gone, or taken by another process
            os.replace(left, own)
            break
    own.touch()
    return own


class _BrokenError(Exception):
    """A connection that may be tried again."""


def _download(known: Known, part: Path, progress: Callable[[int, int], None] | None) -> None:
    """Load what `part` lacks. Raises `ModelLoadError`."""
    failed = 0
    while (have := part.stat().st_size) < known.size:
        try:
            _go_on(known, part, have, progress)
            problem = f"the connection ended after {part.stat().st_size} of {known.size} bytes"
        except _BrokenError as error:
            problem = str(error)
        failed = failed + 1 if part.stat().st_size <= have else 0
        if failed == _TRIES:
            raise ModelLoadError(f"{known.name}: cannot be loaded from {known.url}: {problem}")
        if failed:
            time.sleep(_PAUSE)


def _go_on(known: Known, part: Path, have: int, progress: Callable[[int, int], None] | None) -> None:
    import http.client
    import urllib.error
    import urllib.request

    request = urllib.request.Request(known.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == 416:  # it has fewer bytes than are here
            part.write_bytes(b"")
        elif error.code < 500 and error.code not in (408, 429):
            problem = f"{known.url} answers {error.code} {error.reason}"
            raise ModelLoadError(f"{known.name}: {problem}") from error
        raise _BrokenError(f"{error.code} {error.reason}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise _BrokenError(str(getattr(error, "reason", error)) or type(error).__name__) from error
    with answer, part.open("r+b") as file:
        # a server that knows no ranges sends it all
        begin = have if answer.status == 206 else 0
        if begin and not str(answer.headers.get("Content-Range", "")).startswith(f"bytes {begin}-"):
            raise _BrokenError("it sends another range than was asked for")
        file.seek(begin)
        file.truncate()
        while begin < known.size:
            try:
                chunk = answer.read1(min(_CHUNK, known.size - begin))
            except (OSError, http.client.HTTPException) as error:
                raise _BrokenError(str(error) or type(error).__name__) from error
            if not chunk:
                break
            file.write(chunk)
            begin += len(chunk)
            if progress is not None:
                progress(begin, known.size)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
