"""Architectures of the community, as the package spandrel knows them."""

from __future__ import annotations

import copy
import inspect
import sys
import threading
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
from anysize.backends.errors import BackendUnavailableError, ModelLoadError
from anysize.backends.spec import Dim, TensorSpec

if TYPE_CHECKING:
    import torch

_importing = threading.Lock()
#: modules that spandrel imports, for two of its architectures
_TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")


def installed() -> bool:
    """Whether spandrel is there; it is not imported."""
    return find_spec("spandrel") is not None


def is_descriptor(source: object) -> bool:
    """Whether this is a model that spandrel loaded, without importing spandrel."""
    base = getattr(sys.modules.get("spandrel"), "ModelBase", None)  # not there yet while it is imported
    return base is not None and isinstance(source, base)


def recognise(loaded: Any) -> torch.nn.Module | None:
    """The module (see `described`) for the content of a weights file; None where spandrel knows it not.

    Raises `ModelLoadError` where the keys are of an architecture, but the sizes impossible.
    """
    spandrel = import_spandrel()
    try:
        descriptor = spandrel.MAIN_REGISTRY.load(loaded)
        return _module(descriptor, descriptor.model)
    except spandrel.UnsupportedModelError:
        return None
    except Exception as error:  # its readers index, divide, assert and load in their own ways
        raise ModelLoadError(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error


def described(descriptor: Any) -> torch.nn.Module:
    """What a descriptor computes, as a module of its own with the contract that it declares.

    Its `forward` takes an image, (1, C, H, W) in 0..1, and where it paints into one a mask, (1, 1, H, W), 1
    to paint. Sizes are those that the descriptor requires, which it would pad to; batches are one, as it
    promises no others. Not tileable where it advises against tiles. Raises `ModelLoadError` for a model that
    cannot be copied, or whose arguments are not known.
    """
    try:
        return _module(descriptor, copy.deepcopy(descriptor.model).float())
    except Exception as error:  # locks, compiled or traced modules: whatever the host put into it
        reason = f"{type(error).__name__}: {error}"
        raise ModelLoadError(f"{type(descriptor.model).__name__} cannot be taken over: {reason}") from error


def _module(descriptor: Any, model: Any) -> torch.nn.Module:
    spandrel = import_spandrel()
    import torch

    for part in model.eval().modules():
        if hasattr(part, "update_params"):  # folds its weights at each call, which no exporter takes
            part.update_params()
            part.update_params = _done

    class Described(torch.nn.Module):
        architecture, value_range = str(descriptor.architecture.name), (0.0, 1.0)
        tileable = descriptor.tiling is spandrel.ModelTiling.SUPPORTED
        note = "" if tileable else f"{architecture}: tiling is {descriptor.tiling.name.lower()}"
        inputs, in_channels = _inputs(descriptor, model), int(descriptor.input_channels)
        # the public call pads, clips and forbids gradients around this, which cannot be exported
        call = staticmethod(descriptor._call_fn)

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.call(self.model, *tensors)
            return result

    return Described()


def _done() -> None:
    """In place of what was done once for all."""


def _inputs(descriptor: Any, model: Any) -> tuple[TensorSpec, ...]:
    """Named as the model's own forward names them, so that a stand-in for it takes the same."""
    required, float32 = descriptor.size_requirements, np.dtype(np.float32)
    sides = [Dim(name, max(required.minimum, 1), None, required.multiple_of) for name in "hw"]
    height, width = sides[:1] * 2 if required.square else sides
    channels = [descriptor.input_channels] + [1] * (descriptor.purpose == "Inpainting")
    names = list(inspect.signature(model.forward).parameters)
    return tuple(
        TensorSpec(name, float32, (1, count, height, width))
        for name, count in zip(names, channels, strict=False)
    )


def import_spandrel() -> Any:
    """The package, also where torchvision, of which it needs three small functions, is missing or broken.

    PyTorch's CPU builds often stand beside a torchvision that was built for others and fails on import. Then
    stand-ins take its place while spandrel is imported, and are gone afterwards. RestoreFormer gets its
    `normalize`; LaMa's `rotate`, which no released model calls, says what is missing.

    Raises `BackendUnavailableError`.
    """
    with _importing:
        return import_module("spandrel") if "spandrel" in sys.modules else _import_spandrel()


def _import_spandrel() -> Any:
    before = set(sys.modules)
    try:
        import_module(_TORCHVISION[-1])
    except Exception:  # ImportError, or what a library that does not load raises
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "torchvision":
                del sys.modules[name]
        sys.modules.update(_stand_ins())
    try:
        import spandrel
    except ImportError as error:
        raise BackendUnavailableError(
            f'this needs spandrel: pip install "anysize[archs]" ({error})', name="spandrel"
        ) from error
    finally:
        for name in _TORCHVISION:
            if getattr(sys.modules.get(name), "__file__", "") is None:
                del sys.modules[name]
    return spandrel


def _stand_ins() -> dict[str, ModuleType]:

    def normalize(tensor: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
        shape = (-1, 1, 1)
        return (tensor - tensor.new_tensor(mean).view(shape)) / tensor.new_tensor(std).view(shape)

    def rotate(*arguments: object, **named: object) -> torch.Tensor:
        raise BackendUnavailableError("this model needs torchvision, which is not installed or does not load")

    made = {name: ModuleType(name) for name in _TORCHVISION}
    for module in made.values():
        module.__file__ = None
    functional = made[_TORCHVISION[-1]]
    modes = SimpleNamespace(BILINEAR="bilinear")
    vars(functional).update(normalize=normalize, rotate=rotate, InterpolationMode=modes)
    return made
