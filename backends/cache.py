"""A folder of things that are costly to make: converted models and compiled programs, by what they depend on.

Safe to lose, to share between processes, and to damage: a file is written beside its name and renamed, is
read only if its digest is right, and is named by everything that its content follows from.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

log = logging.getLogger("anysize")

#: bytes kept in all; beyond it, what was used longest ago goes first
LIMIT = 2 * 2**30
_DIGEST = 32


class Cache:
    """Bytes by key and anysize's version. Thread-safe; what cannot be read or written is just not there."""

    def __init__(self, folder: Path, limit: int = LIMIT) -> None:
        self.folder, self.limit = folder, limit
        self._warned = False

    def get(self, *key: str) -> bytes | None:
        """What was put under this key; None if nothing was, or it is damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        if data[:_DIGEST] == _digest(path.name, data[_DIGEST:]):
            return data[_DIGEST:]
        log.warning("%s is damaged and will be made again", path)
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def put(self, data: bytes, *key: str) -> None:
        """Keep `data` under this key."""
        path = self._path(key)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(prefix=".new-", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(_digest(path.name, data))
                    file.write(data)
                os.replace(name, path)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(name)
                raise
            self._trim()
        except OSError as error:
            if not self._warned:
                log.warning("the cache %s cannot be written to: %s", self.folder, error.strerror)
            self._warned = True

    def _path(self, key: tuple[str, ...]) -> Path:
        return self.folder / hashlib.sha256("\0".join((version("anysize"), *key)).encode()).hexdigest()

    def _trim(self) -> None:
        files = []
        for path in self.folder.iterdir():
            with contextlib.suppress(OSError):  # another process may have removed it
                state = path.stat()
                files.append((state.st_mtime, state.st_size, path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size


def _digest(name: str, data: bytes) -> bytes:
    digest = hashlib.sha256(name.encode())
    digest.update(data)
    return digest.digest()
