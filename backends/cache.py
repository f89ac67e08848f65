"""A folder of things that are costly to make: converted models and compiled programs, by what they depend on.

Safe to lose, to share between processes, and to damage: a file is written beside its name and renamed, is
read only if its digest is right, and is named by everything that its content follows from.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tempfile
import time
from pathlib import Path

log = logging.getLogger("anysize")

#: bytes kept in all; beyond it, what was used longest ago goes first
LIMIT = 2 * 2**30
_DIGEST = 32
#: what a file is called while it is written, and seconds after which nobody is writing it any more
_NEW, _ABANDONED = ".anysize-", 86400


class Cache:
    """Bytes by key and by the code that made them. Thread-safe; what cannot be read is not there."""

    def __init__(self, folder: Path, made_by: str = "", limit: int = LIMIT) -> None:
        self.folder, self.made_by, self.limit = folder, made_by, limit
        self._warned = False

    def get(self, *key: str) -> bytes | None:
        """What was put under this key; None if nothing was, or it is damaged."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:
            return None
        with contextlib.suppress(OSError):  # a cache may be read-only
            os.utime(path)  # used now
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
            handle, name = tempfile.mkstemp(prefix=_NEW, dir=self.folder)
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
        return self.folder / hashlib.sha256("\0".join((self.made_by, *key)).encode()).hexdigest()

    def _trim(self) -> None:
        """Of files by our own names only: the folder may be somebody else's too."""
        files, now = [], time.time()
        for path in self.folder.iterdir():
            left = path.name.startswith(_NEW)
            if not left and not re.fullmatch("[0-9a-f]{64}", path.name):
                continue
            with contextlib.suppress(OSError):  # another process may have removed it
                state = path.stat()
                if not left:
                    files.append((state.st_mtime, state.st_size, path))
                elif now - state.st_mtime > _ABANDONED:
                    path.unlink()
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
