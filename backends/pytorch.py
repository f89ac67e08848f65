"""PyTorch, eager: channels_last, inference mode, bf16 by autocast so that residual sums stay f32."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, is_dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from anysize.backends.base import Array, Backend, EngineOptions, Executable, Feeds, Model, Port, Shapes
from anysize.backends.errors import ModelLoadError, OptionError
from anysize.backends.spec import TensorSpec

# The programs of all shapes share a module, and a module may keep things on itself during a call. One call
# uses all cores anyway.
_calls: WeakKeyDictionary[Any, threading.Lock] = WeakKeyDictionary()
_new_calls = threading.Lock()
_f32_on_cuda = threading.Lock()


class TorchBackend(Backend):
    name = "torch"
    formats = ("module",)
    precisions = ("f32", "bf16")
    propagates_nan = True

    def __init__(self) -> None:
        import torch

        self._torch = torch

    @property
    def version(self) -> str:
        return str(self._torch.__version__)

    def check(self, options: EngineOptions) -> None:
        torch = self._torch
        if options.precision not in self.precisions:
            raise OptionError(f"torch runs {' or '.join(self.precisions)}, not {options.precision}")
        try:
            device = torch.device(options.device)
        except RuntimeError as error:
            raise OptionError(f"unknown device '{options.device}' for torch") from error
        found = {"cpu": 1, "cuda": torch.cuda.device_count()}.get(device.type, 0)
        # torch takes cuda:256 for cuda:0
        if (device.index or 0) >= found or str(device) != options.device:
            raise OptionError(f"device '{options.device}' is not available to torch here")
        if options.precision == "bf16" and device.type == "cpu" and not _cpu_has_bf16(torch):
            raise OptionError("this processor has no bf16 arithmetic; use f32")

    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        if model.spec is None:
            raise ModelLoadError("torch needs a module with its contract")
        return _Program(self._torch, model, self._torch.device(options.device), options)


def _cpu_has_bf16(torch: Any) -> bool:
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _Program(Executable):
    def __init__(self, torch: Any, model: Model, device: Any, options: EngineOptions) -> None:
        assert model.spec is not None
        self._torch, self._options, self._where = torch, options, device
        self._module = model.data.to(device=device)
        for weight in (*self._module.parameters(), *self._module.buffers()):
            if weight.ndim == 4:  # the module's own way would fail on weights of five axes
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)
        self._spec = model.spec
        self.inputs, self.outputs = _ports(model.spec.inputs), _ports(model.spec.outputs)
        self.precision, self.device = options.precision, str(device)
        with _new_calls:
            self._lock = _calls.setdefault(model.data, threading.Lock())

    def run(self, feeds: Feeds) -> dict[str, Array]:
        torch = self._torch
        with self._lock, ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(_threads(torch, self._options.threads))
            # A host's own autocast must not change what runs here, so it is set either way.
            bf16 = self.precision == "bf16"
            stack.enter_context(torch.autocast(self._where.type, torch.bfloat16, enabled=bf16))
            if self._where.type == "cuda" and not bf16:
                stack.enter_context(_no_tf32(torch))
            # The copy is ours: modules may work in place, and from_numpy cannot take read-only memory.
            tensors = [torch.from_numpy(np.array(feeds[p.name], order="C")) for p in self.inputs]
            tensors = [
                t.to(self._where, memory_format=torch.channels_last) if t.ndim == 4 else t.to(self._where)
                for t in tensors
            ]
            results = flatten_outputs(self._module(*tensors))
            if len(results) != len(self.outputs):
                raise RuntimeError(f"the module returned {len(results)} tensors, not {len(self.outputs)}")
            return {p.name: _to_numpy(torch, r, p.dtype) for p, r in zip(self.outputs, results, strict=True)}


def flatten_outputs(value: Any) -> list[Any]:
    """The tensors of a module's return value in order: a tensor, or a data class, dict or list of them.

    What is no tensor, such as a name among them, is left out.
    """
    if isinstance(value, Mapping):
        value = list(value.values())
    elif is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [tensor for item in value for tensor in flatten_outputs(item)]
    return [value] if hasattr(value, "detach") else []


def _to_numpy(torch: Any, tensor: Any, dtype: np.dtype[Any]) -> Array:
    if tensor.dtype == torch.bfloat16:  # numpy has no bf16
        tensor = tensor.float()
    owned = tensor.detach().to("cpu", memory_format=torch.contiguous_format, copy=True).numpy()
    return np.asarray(owned.astype(dtype, copy=False))


def _ports(specs: tuple[TensorSpec, ...]) -> tuple[Port, ...]:
    return tuple(
        Port(t.name, t.dtype, tuple(s if isinstance(s, int) else None for s in t.shape)) for t in specs
    )


@contextmanager
def _no_tf32(torch: Any) -> Iterator[None]:
    """f32 proper on CUDA, where convolutions are TF32 by default; the host's settings come back after.

    They are the process's, so one call runs at a time. Kernels raise where the older setting of matrix
    products, which a host may have used, contradicts the newer ones, so both are set.
    """
    parts = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    with _f32_on_cuda:
        try:
            older = torch.get_float32_matmul_precision()
        except RuntimeError:  # the host uses the newer ones only
            older = "highest"
        before = [part.fp32_precision for part in parts]
        try:
            if older != "highest":
                torch.set_float32_matmul_precision("highest")
            for part in parts:
                part.fp32_precision = "ieee"
            yield
        finally:
            if older != "highest":
                torch.set_float32_matmul_precision(older)
            for part, value in zip(parts, before, strict=True):
                part.fp32_precision = value


@contextmanager
def _threads(torch: Any, count: int | None) -> Iterator[None]:
    """torch's thread count belongs to the calling thread; give it back as it was."""
    if count is None:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
