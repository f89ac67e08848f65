"""SD.Next and AUTOMATIC1111's web UI: an upscaler beside their own.

A file `extensions/anysize/scripts/anysize_upscaler.py` makes it appear:

    from anysize.integrations.webui import UpscalerAnysize

    UpscalerAnysize.backend = "openvino"

Models are the files in `models/anysize`, and the bundled ones. Follows modules/upscaler.py and
modules/modelloader.py of both.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import anysize
from anysize import Cancelled, ModelLoadError
from anysize.models import BUNDLED
from anysize.sources import GRAPHS, WEIGHTS
from modules import shared
from modules.upscaler import Upscaler, UpscalerData


class UpscalerAnysize(Upscaler):  # type: ignore[misc]  # the host's, found by it among the subclasses
    """`backend` and `precision`: as `anysize.Upscaler` takes them; set them before a model is used."""

    backend = "auto"
    precision = "f32"

    def __init__(self, dirname: str | None = None) -> None:
        """`dirname`: a folder with models, beside the host's `models/anysize`."""
        self.name = "anysize"
        super().__init__()
        self._lock, self._loaded = threading.Lock(), dict[str, anysize.Upscaler]()
        files: list[Path] = []
        folders = [Path(shared.models_path, self.name), *([Path(dirname)] if dirname else [])]
        for folder in dict.fromkeys(folder.resolve() for folder in folders):
            if folder.is_dir():  # the host catches nothing here
                files += sorted(p for p in folder.iterdir() if p.suffix.lower() in (*WEIGHTS, *GRAPHS))
        models = {name: name for name in BUNDLED}
        for file in files:  # SD.Next has nothing but the name to choose by
            names = (file.stem, file.name, str(file))
            models[next(name for name in names if name not in models)] = str(file)
        self.scalers = [UpscalerData(f"anysize {name}", path, self, 4) for name, path in models.items()]

    def do_upscale(self, img: Any, selected_model: str) -> Any:
        """A PIL image upscaled by the model's own scale; the image itself where the user interrupts.

        `selected_model`: the name or the path of one of `scalers`, which is what hosts differ in. Raises
        `ModelLoadError` for another, and what `anysize.Upscaler` raises.
        """
        upscale = self.load_model(selected_model)
        try:
            return upscale(img, cancel=lambda: bool(getattr(shared.state, "interrupted", False)))
        except Cancelled:
            return img

    def load_model(self, path: str) -> anysize.Upscaler:
        """The model of this name or path, loaded once."""
        known = [data.data_path for data in self.scalers if path in (data.name, data.data_path)]
        if not known:
            raise ModelLoadError(f"anysize: no model is called {path!r}")
        with self._lock:
            if known[0] not in self._loaded:
                self._loaded[known[0]] = anysize.Upscaler(
                    known[0], backend=self.backend, precision=self.precision
                )
            return self._loaded[known[0]]
