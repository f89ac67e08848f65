"""OpenVINO on the CPU: a program per shape, precision always set and read back, one request per run."""

from __future__ import annotations

import io
import logging
import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

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
)
from anysize.backends.cache import Cache
from anysize.backends.errors import ExecutionError, ModelLoadError, OptionError
from anysize.backends.spec import SPEC_KEY, TensorSpec

log = logging.getLogger("anysize")

_REMEMBERED_SHAPES = 1024
#: seconds of compiling; taking a program up again was measured to take a third of compiling it
_WORTH_KEEPING = 0.2
_TYPES = ("f32", "f64", "f16", "i64", "i32", "u8", "i8", "boolean")


class OpenVINOBackend(Backend):
    name = "openvino"
    formats = ("onnx", "xml")
    precisions = ("f32", "bf16")
    prefers_static = True

    def __init__(self) -> None:
        import openvino
        from openvino.frontend import FrontEndManager

        self._ov = openvino
        self._core = openvino.Core()
        self._frontends = FrontEndManager()
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
        if shapes is not None:
            graph = self._graph_at(model, shapes)
        else:
            graph = self._graph(model).clone()
            if device == "CPU":
                # Else a cache of kernels per shape seen grows with every new size.
                config["CPU_RUNTIME_CACHE_CAPACITY"] = 0
        given = {name for port in graph.inputs for name in port.get_names()}
        stateful = shapes is not None and bool(model.states) and given.issuperset(model.states)
        if stateful:
            from openvino.passes import MakeStateful, Manager

            passes = Manager()
            passes.register_pass(MakeStateful(dict(model.states)))
            passes.run_passes(graph)
        elif model.states and options.precision == "bf16":
            # What leads to an f32 output is computed in f32 back to the last convolution. A state is not the
            # end of the computation: it is rounded as it would be inside the program.
            from openvino.preprocess import PrePostProcessor

            ends = PrePostProcessor(graph)
            for state in model.states.values():
                ends.output(state).tensor().set_element_type(self._ov.Type.bf16)
            graph = ends.build()
        asked = None if shapes is None else sorted(shapes.items())
        compiled = self._compile(graph, device, config, options.cache, (model, asked))
        if stateful:
            return _Stateful(self._ov, compiled, model)
        return _Program(compiled, model, None if shapes is not None else graph)

    def _compile(
        self, graph: Any, device: str, config: dict[str, Any], cache: Cache | None, of: tuple[Model, object]
    ) -> Any:
        """Compile, or take up a program of before: of this model, shapes, settings, engine and processor."""
        model, shapes = of
        if cache is None or model.digest is None:
            return self._core.compile_model(graph, device, config)
        processor = self._core.get_property(device, "FULL_DEVICE_NAME")
        made_for = (shapes, sorted(model.states.items()), sorted(config.items()))
        key = ("compiled", self.name, self.version, processor, model.digest, repr(made_for))
        known = cache.get(*key)
        if known is not None:
            try:
                return self._core.import_model(io.BytesIO(known), device, config)
            except Exception as error:  # the engine knows best what it can take up again
                log.warning("openvino does not take up its own program: %s", error)
        started = time.perf_counter()
        compiled = self._core.compile_model(graph, device, config)
        if time.perf_counter() - started >= _WORTH_KEEPING:
            stream = io.BytesIO()
            compiled.export_model(stream)
            cache.put(stream.getvalue(), *key)
        return compiled

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
                    raise ModelLoadError(f"openvino cannot load this model: {_reason(error)}") from error
            return self._read[model]

    def _graph_at(self, model: Model, shapes: Shapes) -> Any:
        """The graph at fixed sizes.

        ONNX files get theirs before they are converted: while sizes are open, OpenVINO takes the width of a
        linear Resize after SpaceToDepth for another than that of a state joined to it, and refuses the graph.
        """
        if model.format != "onnx":
            graph = self._graph(model).clone()
            graph.reshape({name: list(shape) for name, shape in shapes.items()})
            return graph
        data = str(model.data) if isinstance(model.data, Path) else io.BytesIO(model.data)
        with self._lock:
            frontend = self._frontends.load_by_framework("onnx")
            try:
                opened = frontend.load(data)
                for name, shape in shapes.items():
                    place = opened.get_place_by_tensor_name(name)
                    opened.set_partial_shape(place, self._ov.PartialShape(list(shape)))
                return frontend.convert(opened)
            except Exception as error:
                text = f"openvino cannot convert this model at these sizes: {_reason(error)}"
                raise ExecutionError(text, backend=self.name, shape=shapes) from error


class _Program(Executable):
    def __init__(self, compiled: Any, model: Model, open_graph: Any | None) -> None:
        self._compiled = compiled
        self._graph = open_graph
        self._inferred: OrderedDict[tuple[tuple[int, ...], ...], None] = OrderedDict()
        self._lock = threading.Lock()
        self.inputs, self.outputs = _ports(compiled, model, {})
        self.precision, self.device = _what_runs(compiled)
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
        outputs = {port.name: _widened(results[i], port) for i, port in enumerate(self.outputs)}
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


class _Stateful(Executable):
    """A program whose states are the engine's variables: each request holds its own."""

    def __init__(self, ov: Any, compiled: Any, model: Model) -> None:
        self._ov, self._compiled, self._links = ov, compiled, dict(model.states)
        self.inputs, self.outputs = _ports(compiled, model, self._links)
        self.precision, self.device = _what_runs(compiled)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        sequence = self.sequence(self._links, {name: feeds[name] for name in self._links})
        outputs = sequence.run({n: v for n, v in feeds.items() if n not in self._links})
        return {**outputs, **{self._links[n]: v for n, v in sequence.states().items()}}

    def sequence(self, links: Mapping[str, str], states: Feeds) -> Sequence:
        names = [port.name for port in self.outputs]
        return _Sequence(self._ov, self._compiled.create_infer_request(), names, links, states)


class _Sequence(Sequence):
    def __init__(
        self, ov: Any, request: Any, names: list[str], links: Mapping[str, str], states: Feeds
    ) -> None:
        self._request, self._names = request, names
        # the pass names a variable after the two ends it joins
        inputs = {name + following: name for name, following in links.items()}
        self._variables = {inputs[v.name]: v for v in request.query_state()}
        for name, variable in self._variables.items():
            variable.state = ov.Tensor(np.ascontiguousarray(states[name]))

    def run(self, feeds: Feeds) -> dict[str, Array]:
        arrays = {name: np.ascontiguousarray(value) for name, value in feeds.items()}
        results = self._request.infer(arrays, share_inputs=False, share_outputs=False)
        return {name: results[i] for i, name in enumerate(self._names)}

    def states(self) -> dict[str, Array]:
        return {name: np.array(variable.state.data) for name, variable in self._variables.items()}


def _reason(error: Exception) -> str:
    """The line of OpenVINO's report that names the step; else its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((n for n in lines if n.startswith("While validating")), lines[-1] if lines else repr(error))


def _what_runs(compiled: Any) -> tuple[str, str]:
    """Precision and device, as the engine tells."""
    precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    return precision, ",".join(compiled.get_property("EXECUTION_DEVICES")).lower()


def _ports(
    compiled: Any, model: Model, hidden: Mapping[str, str]
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs by the names of the contract, without the states `hidden` in the program.

    A tensor has several names where a step that did nothing at these sizes was left out.
    """

    def named(ports: Any, tensors: tuple[TensorSpec, ...], without: Collection[str]) -> tuple[Port, ...]:
        names = [t.name for t in tensors if t.name not in without]
        if len(names) != len(ports) or not all(n in p.get_names() for n, p in zip(names, ports, strict=True)):
            names = [p.get_any_name() for p in ports]  # a contract in another order
        states = model.states.values()
        return tuple(_port(port, name, name in states) for port, name in zip(ports, names, strict=True))

    spec = model.spec
    ins, outs = (spec.inputs, spec.outputs) if spec is not None else ((), ())
    return named(compiled.inputs, ins, hidden), named(compiled.outputs, outs, hidden.values())


def _widened(values: Array, port: Port) -> Array:
    """Numbers that the engine gives as bf16, which NumPy takes for another type of 16 bits."""
    if values.dtype == port.dtype:
        return values
    return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def _port(port: Any, name: str, state: bool) -> Port:
    kind = port.get_element_type()
    if state and kind.get_type_name() == "bf16":
        dtype: Any = np.float32
    elif kind.get_type_name() in _TYPES:
        dtype = kind.to_dtype()  # gives bf16 as float16, and ends the process for strings
    else:
        raise ModelLoadError(f"tensor '{name}' has type {kind.get_type_name()}, which is not supported")
    if port.get_partial_shape().rank.is_dynamic:
        raise ModelLoadError(f"tensor '{name}' has no fixed number of axes")
    shape = tuple(None if d.is_dynamic else d.get_length() for d in port.get_partial_shape())
    return Port(name, np.dtype(dtype), shape)
