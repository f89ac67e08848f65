"""Picture files from the top down: rows read from one and written to another, neither whole in memory."""

from __future__ import annotations

import queue
import struct
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import ImageError
from anysize.files import open_picture_file, readable, save

_FORMATS: dict[str, np.dtype[Any]] = {"uchar": np.dtype(np.uint8), "ushort": np.dtype(np.uint16)}
_PIECE = 768  # rows; a multiple of the side of the crops that precision "auto" looks at
_WAITING = 3  # bands between the maker and the writer


class RowReader:
    """A picture file as `Rows`: decoded once, in order, one read ahead in a thread. Close it.

    `header`: libvips image with the file's metadata. `upright`: False where EXIF asks for a turn, which needs
    the whole picture. Raises `ImageError` as `files.read_picture` does; damage shows when it is reached.
    """

    def __init__(self, path: Path) -> None:
        import pyvips

        self._path = path
        self.header = open_picture_file(path)
        self.width, self.height = self.header.width, self.header.height
        self.channels = self.header.bands
        self.dtype = _FORMATS[self.header.format]
        turned = self.header.get_typeof("orientation") and self.header.get("orientation") != 1
        self.upright = not turned
        self.alpha_range = self._alpha_range() if self.channels in (2, 4) and self.upright else None
        self._region = pyvips.Region.new(self.header)
        self._worker = ThreadPoolExecutor(1)
        # rows that have been decoded but not asked for, and those that are being decoded after them
        self._held: Array = np.empty((0, self.width, self.channels), self.dtype)
        self._ahead: Future[Array] | None = None

    def _alpha_range(self) -> tuple[float, float]:
        """By decoding the file once more: what to do with colour depends on all of the alpha."""
        with readable(self._path):
            stats = open_picture_file(self._path)[self.channels - 1].stats()
            low, high = stats(0, 0)[0], stats(1, 0)[0]
        full = np.iinfo(self.dtype).max
        return float(low / full), float(high / full)

    def read(self, top: int, bottom: int) -> Array:
        """Rows [top, bottom), which begin where the last ended."""
        want = bottom - top
        if top + len(self._held) < bottom and self._ahead is not None:
            self._held = np.concatenate((self._held, self._ahead.result()))
            self._ahead = None
        have = top + len(self._held)
        if have < bottom:
            self._held = np.concatenate((self._held, self._fetch(have, bottom)))
            have = bottom
        rows, self._held = self._held[:want], self._held[want:]
        if self._ahead is None and len(self._held) < want and have < self.height:
            following = min(have + want, self.height)
            self._ahead = self._worker.submit(self._fetch, have, following)
        return rows

    def pieces(self) -> Iterator[Array]:
        """All rows from the top down, in pieces, by decoding the file once more."""
        import pyvips

        region = pyvips.Region.new(open_picture_file(self._path))
        for top in range(0, self.height, _PIECE):
            yield self._fetch(top, min(top + _PIECE, self.height), region)

    def _fetch(self, top: int, bottom: int, region: Any = None) -> Array:
        with readable(self._path):
            data = (region or self._region).fetch(0, top, self.width, bottom - top)
        return np.frombuffer(data, self.dtype).reshape(bottom - top, self.width, self.channels)

    def close(self) -> None:
        self._worker.shutdown()


class RowWriter:
    """Writes rows to a picture file as they come, in a thread; at the end all were, or an error is raised.

    A context manager. `temporary`: the file, which will become `path`. `header` as in `files.write_picture`.
    Raises `ImageError`.
    """

    def __init__(
        self,
        temporary: Path,
        width: int,
        height: int,
        channels: int,
        dtype: np.dtype[Any],
        header: Any,
        path: Path,
    ) -> None:
        self._temporary, self._path, self._header, self._dtype = temporary, path, header, dtype
        # libvips takes no rows from outside, but reads files from a stream: here an uncompressed PNG, made
        # as the rows come, which holds all there is to hold
        kind = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
        fields = struct.pack(">IIBBBBB", width, height, 8 * dtype.itemsize, kind, 0, 0, 0)
        self._chunks: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._chunk = memoryview(b"\x89PNG\r\n\x1a\n" + _png_chunk(b"IHDR", fields))
        self._zlib = zlib.compressobj(0)
        self._missing = height
        self._ended = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="anysize-writer", daemon=True)

    def __enter__(self) -> RowWriter:
        self._thread.start()
        return self

    def write(self, rows: Array) -> None:
        """The next rows, (rows, W, C) of the writer's dtype."""
        self._missing -= len(rows)
        lines = rows.astype(self._dtype.newbyteorder(">"), copy=False).reshape(len(rows), -1)
        # each row begins with its filter: none
        raw = np.concatenate((np.zeros((len(rows), 1), np.uint8), lines.view(np.uint8)), axis=1)
        data = self._zlib.compress(raw.tobytes())
        if self._missing == 0:
            data += self._zlib.flush()
        chunk = _png_chunk(b"IDAT", data)
        self._put(chunk if self._missing else chunk + _png_chunk(b"IEND", b""))

    def _put(self, chunk: bytes) -> None:
        while self._thread.is_alive():
            try:
                return self._chunks.put(chunk, timeout=0.2)
            except queue.Full:
                continue
        if self._error is not None:
            raise self._error
        raise ImageError(f"{self._path}: the writer ended early")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._missing == 0:
            self._thread.join()
            if self._error is not None:
                raise self._error
            return
        self._ended = True  # the writer finds its stream cut short
        while self._thread.is_alive():
            try:
                self._chunks.put(None, timeout=0.2)
            except queue.Full:
                continue
            self._thread.join(0.2)
        if kind is None:
            raise ImageError(f"{self._path}: {self._missing} rows of the picture were not written")

    # -- in the thread

    def _work(self) -> None:
        import pyvips

        try:
            source = pyvips.SourceCustom()
            source.on_read(self._read)
            stream = pyvips.Image.new_from_source(
                source, "", access="sequential", fail_on="error", unlimited=True
            )
            save(self._temporary, stream, self._header, self._path)
        except BaseException as error:
            self._error = error

    def _read(self, length: int) -> bytes:
        """At most `length` bytes of the stream; none at its end."""
        if not len(self._chunk):
            chunk = None if self._ended else self._chunks.get()
            if chunk is None:
                return b""
            self._chunk = memoryview(chunk)
        data, self._chunk = self._chunk[:length], self._chunk[length:]
        return bytes(data)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    """PNG specification (third edition), 5.3."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
