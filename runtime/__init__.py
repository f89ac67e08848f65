"""Run image models at any size on PyTorch, ONNX Runtime or OpenVINO, and never get a wrong pixel.

    import anysize

    upscale = anysize.Upscaler()                      # the bundled x4 model, fastest installed engine
    big = upscale(picture)                            # HWC array or PIL image, any size
    session = anysize.load("model.pth", backend="openvino")
    y = session(x)                                    # NCHW float32

Importing this loads numpy and no engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from anysize.backends.errors import (
    AnysizeError,
    BackendNotFoundError,
    BackendUnavailableError,
    Cancelled,
    ExecutionError,
    ExportError,
    ImageError,
    IntegrityError,
    MemoryBudgetError,
    ModelLoadError,
    NotStreamable,
    OptionError,
    ShapeError,
    TimedOut,
)
from anysize.backends.registry import available_backends
from anysize.backends.spec import Dim, ModelSpec, Rule, TensorSpec
from anysize.batch import upscale_file
from anysize.guard import Stats
from anysize.parity import ParityReport, compare
from anysize.session import Options, Session, load
from anysize.tiling import Tiling
from anysize.upscale import Report, Upscaler

if TYPE_CHECKING:
    import torch

__version__ = "0.1.0"


def as_module(session: Session) -> torch.nn.Module:
    """A `torch.nn.Module` with the original's call signature that runs `session`; needs torch."""
    from anysize.torch_module import SessionModule

    return SessionModule(session)


__all__ = [
    "AnysizeError",
    "BackendNotFoundError",
    "BackendUnavailableError",
    "Cancelled",
    "Dim",
    "ExecutionError",
    "ExportError",
    "ImageError",
    "IntegrityError",
    "MemoryBudgetError",
    "ModelLoadError",
    "ModelSpec",
    "NotStreamable",
    "OptionError",
    "Options",
    "ParityReport",
    "Report",
    "Rule",
    "Session",
    "ShapeError",
    "Stats",
    "TensorSpec",
    "Tiling",
    "TimedOut",
    "Upscaler",
    "as_module",
    "available_backends",
    "compare",
    "load",
    "upscale_file",
]
