"""ONNX Runtime on the CPU: one session takes every size; f32 only, it has no bf16 arithmetic there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends.base import (
    Array,
    Backend,
    EngineOptions,
    Executable,
    Feeds,
    Model,
    Port,
    Sequence,
    Shapes,
    cores,
)
from anysize.backends.errors import ModelLoadError, OptionError

_DTYPES = {
    "tensor(float)": np.float32,
    "tensor(double)": np.float64,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(uint8)": np.uint8,
    "tensor(int8)": np.int8,
    "tensor(bool)": np.bool_,
}


class OnnxRuntimeBackend(Backend):
    name = "onnxruntime"
    formats = ("onnx",)
    propagates_nan = True
    has_streams = True

    def __init__(self) -> None:
        import onnxruntime

        self._ort = onnxruntime

    @property
    def version(self) -> str:
        return str(self._ort.__version__)

    def check(self, options: EngineOptions) -> None:
        if options.precision != "f32":
            raise OptionError(f"onnxruntime runs f32 on the CPU, not {options.precision}")
        if options.device != "cpu":
            raise OptionError(f"onnxruntime runs on the cpu here, not on '{options.device}'")

    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        settings = self._settings()
        settings.intra_op_num_threads = options.threads or 0
        if options.streams > 1:  # each run has its caller's thread, and all share the other ones
            settings.intra_op_num_threads = max(1, (options.threads or cores()) - options.streams + 1)
        # A spinning pool starves every other engine and worker of the process.
        settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
        settings.enable_mem_pattern = shapes is not None  # patterns are per shape and pile up otherwise
        return _Program(self._ort, self._session(model, settings))

    def metadata(self, model: Model) -> dict[str, str]:
        settings = self._settings()
        settings.graph_optimization_level = self._ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return dict(self._session(model, settings).get_modelmeta().custom_metadata_map)

    def _settings(self) -> Any:
        settings = self._ort.SessionOptions()
        settings.log_severity_level = 4  # errors arrive as exceptions; do not also print them
        return settings

    def _session(self, model: Model, settings: Any) -> Any:
        data = str(model.data) if isinstance(model.data, Path) else model.data
        try:
            return self._ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # it raises its own classes, which share no public base
            raise ModelLoadError(f"onnxruntime cannot load this model: {error}") from error


class _Program(Executable):
    def __init__(self, ort: Any, session: Any) -> None:
        self._ort, self._session = ort, session
        self.inputs = tuple(map(_port, session.get_inputs()))
        self.outputs = tuple(map(_port, session.get_outputs()))
        self.precision, self.device = "f32", "cpu"
        self._names = [p.name for p in self.outputs]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        contiguous = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        return dict(zip(self._names, self._session.run(self._names, contiguous), strict=True))

    def sequence(self, links: Mapping[str, str], states: Feeds) -> Sequence:
        return _Sequence(self._ort, self._session, links, states)


class _Sequence(Sequence):
    """States stay the engine's own values: what a run gives is fed to the next without a copy."""

    def __init__(self, ort: Any, session: Any, links: Mapping[str, str], states: Feeds) -> None:
        self._session, self._links = session, links
        self._value = ort.OrtValue.ortvalue_from_numpy
        self._states = {name: self._value(np.ascontiguousarray(array)) for name, array in states.items()}
        self._names = [node.name for node in session.get_outputs()]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        values = {name: self._value(np.ascontiguousarray(array)) for name, array in feeds.items()}
        results = self._session.run_with_ort_values(self._names, {**values, **self._states})
        outputs = dict(zip(self._names, results, strict=True))
        self._states = {name: outputs.pop(following) for name, following in self._links.items()}
        return {name: np.array(value.numpy()) for name, value in outputs.items()}  # numpy() may be a view

    def states(self) -> dict[str, Array]:
        return {name: np.array(value.numpy()) for name, value in self._states.items()}


def _port(node: Any) -> Port:
    if node.type not in _DTYPES:
        raise ModelLoadError(f"tensor '{node.name}' has type {node.type}, which is not supported")
    shape = tuple(d if isinstance(d, int) and d > 0 else None for d in node.shape)
    return Port(node.name, np.dtype(_DTYPES[node.type]), shape)
