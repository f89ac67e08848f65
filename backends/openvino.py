"""OpenVINO on the CPU: a program per shape, precision always set and read back, one request per run."""

from __future__ import annotations

import queue
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from anysize.backends.base import Array, Backend, EngineOptions, Executable, Feeds, Model, Port, Shapes
from anysize.backends.errors import ModelLoadError, OptionError
from anysize.backends.spec import SPEC_KEY

_REMEMBERED_SHAPES = 1024
_TYPES = ("f32", "f64", "f16", "i64", "i32", "u8", "i8", "boolean")


class OpenVINOBackend(Backend):
    name = "openvino"
    formats = ("onnx", "xml")
    precisions = ("f32", "bf16")
    prefers_static = True

    def __init__(self) -> None:
        import openvino

        self._ov = openvino
        self._core = openvino.Core()
        self._read: WeakKeyDictionary[Model, Any] = WeakKeyDictionary()
        self._lock = threading.Lock()

    @property
    def version(self) -> str:
        return str(self._ov.__version__)

    def check(self, options: EngineOptions) -> None:
        device = options.device.upper()
        if device not in self._core.available_devices:
            found = ", ".join(self._core.available_devices).lower()
            raise OptionError(f"device '{options.device}' is not available to openvino here; found: {found}")
        if options.precision not in self.precisions:
            raise OptionError(f"openvino runs {' or '.join(self.precisions)}, not {options.precision}")
        if options.precision == "bf16" and "BF16" not in self._core.get_property(
            device, "OPTIMIZATION_CAPABILITIES"
        ):
            raise OptionError("this processor has no bf16 arithmetic; use f32")

    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        device = options.device.upper()
        config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": options.precision,  # left unset it is bf16, silently
            "PERFORMANCE_HINT": "LATENCY",
        }
        if options.threads is not None:
            config["INFERENCE_NUM_THREADS"] = options.threads
        graph = self._graph(model).clone()
        if shapes is not None:
            graph.reshape({name: list(shape) for name, shape in shapes.items()})
        elif device == "CPU":
            # Else a cache of kernels per shape seen grows with every new size.
            config["CPU_RUNTIME_CACHE_CAPACITY"] = 0
        compiled = self._core.compile_model(graph, device, config)
        return _Program(compiled, None if shapes is not None else graph)

    def metadata(self, model: Model) -> dict[str, str]:
        graph = self._graph(model)
        found = {}
        # An ONNX file's own metadata arrives under "framework".
        for path in ([SPEC_KEY], ["framework", SPEC_KEY]):
            if graph.has_rt_info(path):
                found[SPEC_KEY] = str(graph.get_rt_info(path).value)
        return found

    def _graph(self, model: Model) -> Any:
        with self._lock:
            if model not in self._read:
                data = str(model.data) if isinstance(model.data, Path) else model.data
                try:
                    self._read[model] = self._core.read_model(data)
                except Exception as error:
                    text = str(error).strip().splitlines()
                    reason = text[-1] if text else type(error).__name__
                    raise ModelLoadError(f"openvino cannot load this model: {reason}") from error
            return self._read[model]


class _Program(Executable):
    def __init__(self, compiled: Any, open_graph: Any | None) -> None:
        self._compiled = compiled
        self._graph = open_graph
        self._inferred: OrderedDict[tuple[tuple[int, ...], ...], None] = OrderedDict()
        self._lock = threading.Lock()
        self.inputs = tuple(map(_port, compiled.inputs))
        self.outputs = tuple(map(_port, compiled.outputs))
        self.precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        self.device = ",".join(compiled.get_property("EXECUTION_DEVICES")).lower()
        # One request per concurrent run: a request's tensors are its own, and `compiled(...)` has one only.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        if self._graph is not None:
            self._infer_shapes(self._graph, {name: value.shape for name, value in feeds.items()})
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        # Both flags False: copies in and out. A request that raised is dropped, not reused.
        arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        results = request.infer(arrays, share_inputs=False, share_outputs=False)
        outputs = {port.name: results[i] for i, port in enumerate(self.outputs)}
        self._idle.put(request)
        return outputs

    def _infer_shapes(self, graph: Any, shapes: Shapes) -> None:
        """Raise for sizes that do not fit somewhere in an open program's graph.

        Running them has returned the previous output, poisoned the program, and with one thread ended the
        process. Shape inference costs milliseconds, and only for a size not seen lately.
        """
        key = tuple(shapes[port.name] for port in self.inputs)
        with self._lock:
            if key not in self._inferred:
                graph.reshape({name: list(shape) for name, shape in shapes.items()})
                self._inferred[key] = None
                while len(self._inferred) > _REMEMBERED_SHAPES:
                    self._inferred.popitem(last=False)


def _port(port: Any) -> Port:
    kind = port.get_element_type().get_type_name()
    if kind not in _TYPES:  # to_dtype gives bf16 as float16, and ends the process for strings
        raise ModelLoadError(f"tensor '{port.get_any_name()}' has type {kind}, which is not supported")
    if port.get_partial_shape().rank.is_dynamic:
        raise ModelLoadError(f"tensor '{port.get_any_name()}' has no fixed number of axes")
    shape = tuple(None if d.is_dynamic else d.get_length() for d in port.get_partial_shape())
    return Port(port.get_any_name(), np.dtype(port.get_element_type().to_dtype()), shape)
