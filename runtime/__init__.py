"""Run image models at any size on PyTorch, ONNX Runtime or OpenVINO, and never get a wrong pixel.

    import anysize

    upscale = anysize.Upscaler()                      # the bundled x4 model, fastest installed engine
    big = upscale(picture)                            # HWC array or PIL image, any size
    session = anysize.load("model.pth", backend="openvino")
    y = session(x)                                    # NCHW float32

Importing this is cheap: each name is loaded when it is first used, and no engine before it runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    import torch
    from anysize import backends, exporters, integrations, models
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
    from anysize.departure import BisectReport, bisect
    from anysize.guard import Stats
    from anysize.isolate import Isolated
    from anysize.limit import time_limit
    from anysize.models.diffusion import parts
    from anysize.parity import ParityReport, assert_parity, compare
    from anysize.report import Report
    from anysize.session import Options, Session, load
    from anysize.sizes import SizePlan, SizePolicy, fit_longest
    from anysize.stylize import ResultCache, Stylizer, bucket_batch
    from anysize.tiling import Tiling
    from anysize.upscale import Upscaler

#: where each public name lives, for loading it on first use
_HOMES = {
    "backends.errors": (
        "AnysizeError BackendNotFoundError BackendUnavailableError Cancelled ExecutionError ExportError "
        "ImageError IntegrityError MemoryBudgetError ModelLoadError NotStreamable OptionError ShapeError "
        "TimedOut"
    ),
    "backends.registry": "available_backends",
    "backends.spec": "Dim ModelSpec Rule TensorSpec",
    "batch": "upscale_file",
    "departure": "BisectReport bisect",
    "guard": "Stats",
    "isolate": "Isolated",
    "limit": "time_limit",
    "models.diffusion": "parts",
    "parity": "ParityReport assert_parity compare",
    "report": "Report",
    "session": "Options Session load",
    "sizes": "SizePlan SizePolicy fit_longest",
    "stylize": "ResultCache Stylizer bucket_batch",
    "tiling": "Tiling",
    "upscale": "Upscaler",
}
_HOME_OF = {name: f"anysize.{home}" for home, names in _HOMES.items() for name in names.split()}
_ROOMS = ("backends", "exporters", "integrations", "models")


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        value = getattr(import_module(_HOME_OF[name]), name)
    elif name in _ROOMS:
        value = import_module(f"anysize.{name}")
    else:
        raise AttributeError(f"module 'anysize' has no attribute '{name}'")
    globals()[name] = value
    return value


def as_module(
    session: Session | Mapping[str, Session], *, like: torch.nn.Module | None = None
) -> torch.nn.Module:
    """A `torch.nn.Module` with the original's call signature that runs `session`; needs torch.

    `like`: the model that the session was made from, whose class, attributes, config, arguments and results
    the module then has; its weights may be let go. Both are run at small sizes and must agree within 1 % of
    the largest value, or 10 % where either is not in f32; a model of diffusers is held so where it has
    weights, and positions for any size. Of one with several parts, `session` names one or more (`{"encoder":
    ..., "decoder": ...}`); parts without a session stay as they are.
    Without `like`: arguments as the contract has them; one tensor as the result, or a tuple.
    Raises `OptionError` where a session is not of that model, and later where a call brings an argument it
    does not take, or a backward pass reaches it; what `Session.run` raises where the engine fails.
    """
    try:
        from anysize.torch_module import module
    except ImportError as error:
        from anysize.backends.errors import BackendUnavailableError

        raise BackendUnavailableError(
            f"a module needs torch: pip install 'anysize[torch]' ({error})", name="torch"
        ) from error
    return module(session, like)


__all__ = [
    "AnysizeError",
    "BackendNotFoundError",
    "BackendUnavailableError",
    "BisectReport",
    "Cancelled",
    "Dim",
    "ExecutionError",
    "ExportError",
    "ImageError",
    "IntegrityError",
    "Isolated",
    "MemoryBudgetError",
    "ModelLoadError",
    "ModelSpec",
    "NotStreamable",
    "OptionError",
    "Options",
    "ParityReport",
    "Report",
    "ResultCache",
    "Rule",
    "Session",
    "ShapeError",
    "SizePlan",
    "SizePolicy",
    "Stats",
    "Stylizer",
    "TensorSpec",
    "Tiling",
    "TimedOut",
    "Upscaler",
    "as_module",
    "assert_parity",
    "available_backends",
    "backends",
    "bisect",
    "bucket_batch",
    "compare",
    "exporters",
    "fit_longest",
    "integrations",
    "load",
    "models",
    "parts",
    "time_limit",
    "upscale_file",
]
