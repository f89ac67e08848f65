"""ComfyUI: a node that loads an upscale model on an engine, and one that upscales images with it.

A file `custom_nodes/anysize_nodes.py` with one line makes them appear:

    from anysize.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

Models come from ComfyUI's `models/upscale_models`, and of formats that it does not list (.onnx, .xml, .param)
from `models/anysize`. Follows comfy_extras/nodes_upscale_model.py and execution.py of ComfyUI 0.3 and later.
"""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, Any, ClassVar

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
from anysize import Cancelled, ImageError, MemoryBudgetError, ModelLoadError, Tiling, Upscaler
from anysize.backends.registry import known_backends
from anysize.models import BUNDLED
from anysize.sources import GRAPHS
from anysize.tiling import METHODS

if TYPE_CHECKING:
    import torch

_OWN, _HOSTS = "anysize", "upscale_models"
folder_paths.add_model_folder_path(_OWN, os.path.join(folder_paths.models_dir, _OWN))


class AnysizeModelLoader:
    """A model on an engine, as `anysize.Upscaler` takes them."""

    RETURN_TYPES = ("ANYSIZE_MODEL",)
    FUNCTION = "load"
    CATEGORY = "anysize"
    DESCRIPTION = "Loads an upscale model to run on PyTorch, ONNX Runtime or OpenVINO."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        own = [n for n in folder_paths.get_filename_list(_OWN) if os.path.splitext(n)[1].lower() in GRAPHS]
        names = [*BUNDLED, *dict.fromkeys([*folder_paths.get_filename_list(_HOSTS), *own])]
        return {
            "required": {
                "model_name": (names,),
                "backend": (["auto", *known_backends()],),
                "precision": (["f32", "auto", "bf16"],),
            }
        }

    def load(self, model_name: str, backend: str, precision: str) -> tuple[Upscaler]:
        """Raises what `anysize.Upscaler` raises."""
        source = model_name
        if model_name not in BUNDLED:
            found = (folder_paths.get_full_path(folder, model_name) for folder in (_HOSTS, _OWN))
            source = next(filter(None, found), "")
            if not source:
                raise ModelLoadError(f"{model_name}: no such model in {_HOSTS} or {_OWN}")
        return (Upscaler(source, backend=backend, precision=precision),)


class AnysizeUpscale:
    """Images upscaled: (B, H, W, C) float in 0..1 of 1 to 4 channels -> (B, H * scale, W * scale, C)."""

    RETURN_TYPES = ("IMAGE",)
    FUNCTION = "upscale"
    CATEGORY = "anysize"
    DESCRIPTION = "Upscales images of any size: in bands, tiles or whole, with the same result."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("ANYSIZE_MODEL",),
                "image": ("IMAGE",),
                "method": (list(METHODS),),
            }
        }

    #: the images' total is not known before the first is planned, so each counts as this much
    _PARTS: ClassVar[int] = 1000

    def upscale(self, model: Upscaler, image: torch.Tensor, method: Any) -> tuple[torch.Tensor]:
        """Raises `ImageError` for what is no such image, `MemoryBudgetError` where the results do not fit,
        what a call of `anysize.Upscaler` raises, and ComfyUI's own error where the user interrupts.
        """
        import torch

        if not isinstance(image, torch.Tensor) or image.ndim != 4 or not image.is_floating_point():
            what = f"{image.dtype} of shape {tuple(image.shape)}" if hasattr(image, "shape") else f"{image}"
            raise ImageError(f"images are floats of shape (B, H, W, C), not {what}")
        upscale = copy.copy(model)  # shares the session; others may use it by another method
        upscale.tiling = Tiling(method)
        count, height, width, channels = image.shape
        shape = (count, height * upscale.scale, width * upscale.scale, channels)
        try:
            result = np.empty(shape, np.float32)
        except MemoryError as error:
            raise MemoryBudgetError(f"the results' {shape} do not fit: {error}") from error
        bar = comfy.utils.ProgressBar(count * self._PARTS)
        interrupted = comfy.model_management.processing_interrupted
        try:
            for i, one in enumerate(image):

                def progress(done: int, total: int, i: int = i) -> None:
                    bar.update_absolute(int((i + done / total) * self._PARTS))

                picture = one.detach().cpu().float().clamp(0, 1).numpy()
                result[i] = upscale(picture, progress=progress, cancel=interrupted)
        except Cancelled:
            comfy.model_management.throw_exception_if_processing_interrupted()
            raise
        return (torch.from_numpy(result),)


NODE_CLASS_MAPPINGS = {"AnysizeModelLoader": AnysizeModelLoader, "AnysizeUpscale": AnysizeUpscale}
NODE_DISPLAY_NAME_MAPPINGS = {
    "AnysizeModelLoader": "Load Upscale Model (anysize)",
    "AnysizeUpscale": "Upscale Image (anysize)",
}
