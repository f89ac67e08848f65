"""Web services: a picture's bytes in, the larger picture's bytes out. For any framework, or none."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

from anysize import ImageError, OptionError, Upscaler, upscale_file
from anysize.files import open_picture_file
from anysize.work import Cancel

_FORMATS = ("png", "jpg", "webp", "tif")


class Service:
    """Upscales pictures that strangers send. Thread-safe.

    `most_pixels`: a picture with more is refused by its header, before anything is decoded. `at_once`: so
    many are in work at a time, the others wait; each takes what `upscaler.tiling.memory` allows.
    """

    def __init__(
        self, upscaler: Upscaler, *, format: str = "png", most_pixels: int = 2**24, at_once: int = 1
    ) -> None:
        if not isinstance(upscaler, Upscaler):
            raise OptionError(f"upscaler is an anysize.Upscaler, not {type(upscaler).__name__}")
        if format not in _FORMATS:
            raise OptionError(f"format must be one of {', '.join(_FORMATS)}, not {format!r}")
        for name, value in (("most_pixels", most_pixels), ("at_once", at_once)):
            if type(value) is not int or value < 1:
                raise OptionError(f"{name} must be a whole number from 1, not {value!r}")
        self.upscaler, self.format, self.most_pixels = upscaler, format, most_pixels
        self._turn = threading.BoundedSemaphore(at_once)

    def __call__(self, data: bytes, *, outscale: float | None = None, cancel: Cancel | None = None) -> bytes:
        """The picture file `data`, upscaled, as a file of `format`; metadata survives as in `upscale_file`.

        `cancel` is also looked at once it is this picture's turn. Raises `ImageError` (not a picture, too
        large, alpha that the format would lose), and what `upscale_file` raises.
        """
        if not isinstance(data, (bytes, bytearray, memoryview)) or not len(data):
            raise ImageError("a picture's bytes are needed")
        with tempfile.TemporaryDirectory(prefix="anysize-") as folder:
            source, result = Path(folder, "input"), Path(folder, f"output.{self.format}")
            source.write_bytes(bytes(data))
            with self._turn:
                try:
                    open_picture_file(source, self.most_pixels)
                    upscale_file(source, result, self.upscaler, outscale=outscale, cancel=cancel)
                except ImageError as error:  # nobody outside should read this machine's paths
                    raise ImageError(str(error).replace(f"{folder}/", "")) from None
            return result.read_bytes()
