"""OpenVINO on the CPU: a program per shape, precision always set and read back, one request per run."""

from __future__ import annotations

import io
import logging
import math
import queue
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from functools import partial
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
from anysize.backends.spec import SPEC_KEY

log = logging.getLogger("anysize")

_REMEMBERED_SHAPES = 1024
#: seconds of compiling; taking a program up again was measured to take a third of compiling it
_WORTH_KEEPING = 0.2
#: of the inputs and of the outputs
_Names = tuple[list[str], list[str]]
_TYPES = ("f32", "f64", "f16", "i64", "i32", "u8", "i8", "boolean")


_importing = threading.Lock()


def import_openvino() -> Any:
    """The package, without the event that importing it sends over the network in a process of its own.

    It takes its own stub where `openvino_telemetry` is missing. A host that has imported it has decided.
    """
    telemetry = "openvino_telemetry"
    with _importing:
        hide = "openvino" not in sys.modules and telemetry not in sys.modules
        if hide:
            sys.modules[telemetry] = None  # type: ignore[assignment]
        try:
            import openvino
        finally:
            if hide:
                del sys.modules[telemetry]
        # makes a table, in which two threads that are there first wait for each other for ever
        openvino.Type.f32.to_dtype()
    return openvino


class OpenVINOBackend(Backend):
    name = "openvino"
    formats = ("onnx", "xml")
    precisions = ("f32", "bf16", "int8")
    prefers_static = True
    has_streams = True

    def __init__(self) -> None:
        self._ov = openvino = import_openvino()
        from openvino.frontend import FrontEndManager

        self._core = openvino.Core()
        self._onnx = FrontEndManager().load_by_framework("onnx")
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
        able = [*self._core.get_property(device, "OPTIMIZATION_CAPABILITIES"), "F32"]
        if options.precision.upper() not in able:
            raise OptionError(f"this processor has no {options.precision} arithmetic; use f32")

    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        device = options.device.upper()
        config: dict[str, Any] = {
            # left unset it is bf16, silently; int8 is what the graph itself says, and the rest of it is f32
            "INFERENCE_PRECISION_HINT": "f32" if options.precision == "int8" else options.precision,
        }
        if options.streams > 1:
            config["NUM_STREAMS"] = options.streams
        else:
            config["PERFORMANCE_HINT"] = "LATENCY"
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
        names = self._names(model)
        if stateful:
            return _Stateful(self._ov, compiled, model, names, options)
        if shapes is not None:
            return _Program(compiled, model, names, options)
        return _OpenProgram(
            compiled, model, names, options, graph, partial(self.compile, model, options=options)
        )

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
                    raise _unreadable(error) from error
            return self._read[model]

    def _graph_at(self, model: Model, shapes: Shapes) -> Any:
        """The graph at fixed sizes."""
        try:
            graph = self._graph(model).clone()
        except ModelLoadError:
            if model.format != "onnx" or isinstance(model.data, Path):
                raise
            return self._converted_at(model, shapes)
        _reshape(graph, self._names(model), shapes)
        return graph

    def _converted_at(self, model: Model, shapes: Shapes) -> Any:
        """The graph of an ONNX file whose sizes are fixed before it is converted.

        While they are open, OpenVINO takes the width of a linear Resize after SpaceToDepth for another than
        that of a state joined to it, and refuses the graph.
        """
        with self._lock:
            try:
                opened = self._onnx.load(io.BytesIO(model.data))
            except Exception as error:
                raise _unreadable(error) from error
            try:
                for name, shape in shapes.items():
                    place = opened.get_place_by_tensor_name(name)
                    opened.set_partial_shape(place, self._ov.PartialShape(list(shape)))
                return self._onnx.convert(opened)
            except Exception as error:
                text = f"openvino cannot convert this model at these sizes: {_reason(error)}"
                raise ExecutionError(text, backend=self.name, shape=shapes) from error

    def _names(self, model: Model) -> _Names:
        """Of the inputs and outputs, in order: the contract's, else those the file declares, if it is known.

        OpenVINO's own are arbitrary where a tensor has several, as behind a step that does nothing.
        """
        if model.spec is not None:
            return [t.name for t in model.spec.inputs], [t.name for t in model.spec.outputs]
        if model.format != "onnx":
            return [], []
        data = str(model.data) if isinstance(model.data, Path) else io.BytesIO(model.data)
        with self._lock:
            opened = self._onnx.load(data)
            ins, outs = opened.get_inputs(), opened.get_outputs()
            return [place.get_names()[0] for place in ins], [place.get_names()[0] for place in outs]


class _Program(Executable):
    def __init__(self, compiled: Any, model: Model, names: _Names, options: EngineOptions) -> None:
        self._compiled = compiled
        self.inputs, self.outputs = _ports(compiled, model, names, {})
        self.precision, self.device = _what_runs(compiled, options)
        # One request per concurrent run: a request's tensors are its own, and `compiled(...)` has one only.
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        try:
            request = self._idle.get_nowait()
        except queue.Empty:
            request = self._compiled.create_infer_request()
        # Both flags False: copies in and out. A request that raised is dropped, not reused.
        results = request.infer(_in_order(feeds, self.inputs), share_inputs=False, share_outputs=False)
        outputs = {port.name: _widened(results[i], port) for i, port in enumerate(self.outputs)}
        self._idle.put(request)
        return outputs


class _OpenProgram(_Program):
    """A program for any shape, which runs those only that the engine is known to get right with it."""

    def __init__(
        self,
        compiled: Any,
        model: Model,
        names: _Names,
        options: EngineOptions,
        graph: Any,
        compile_at: Callable[[Shapes], Executable],
    ) -> None:
        """`graph`: what was compiled, to be used by nobody else."""
        super().__init__(compiled, model, names, options)
        self._graph, self._names, self._compile_at = graph, names, compile_at
        self._inferred: OrderedDict[tuple[tuple[int, ...], ...], bool] = OrderedDict()
        self._fixed: tuple[Any, Executable] | None = None
        self._lock = threading.Lock()

    def run(self, feeds: Feeds) -> dict[str, Array]:
        shapes = {name: value.shape for name, value in feeds.items()}
        program = self._program_for(shapes)
        return super().run(feeds) if program is None else program.run(feeds)

    def _program_for(self, shapes: Shapes) -> Executable | None:
        """None for this program, or one of fixed shape. Raises for sizes that do not fit in the graph.

        Running such has returned the previous output, poisoned the program, and with one thread ended the
        process. Shape inference costs milliseconds, and only for a size not seen lately.

        Where a convolution takes or makes a single pixel, bf16 and int8 have come out wrong by up to the
        whole range of values: in a program for any shape, what follows it by channel (the slopes of a PReLU,
        an addition behind a ReLU) went wrong. In programs of fixed shape it does not.
        """
        key = tuple(shapes[port.name] for port in self.inputs)
        with self._lock:
            if key not in self._inferred:
                _reshape(self._graph, self._names, shapes)
                rough = self.precision != "f32"
                self._inferred[key] = rough and any(map(_of_a_pixel, self._graph.get_ops()))
                while len(self._inferred) > _REMEMBERED_SHAPES:
                    self._inferred.popitem(last=False)
            if not self._inferred[key]:
                return None
            if self._fixed is None or self._fixed[0] != key:
                self._fixed = key, self._compile_at(shapes)
            return self._fixed[1]


def _of_a_pixel(step: Any) -> bool:
    """Whether this is a convolution of a picture of one pixel, or to one."""
    if "Convolution" not in step.get_type_name():
        return False
    return any(math.prod([*end.get_shape()][2:]) == 1 for end in (step.input_value(0), step.output(0)))


class _Stateful(Executable):
    """A program whose states are the engine's variables: each request holds its own."""

    def __init__(self, ov: Any, compiled: Any, model: Model, names: _Names, options: EngineOptions) -> None:
        self._ov, self._compiled, self._links = ov, compiled, dict(model.states)
        self.inputs, self.outputs = _ports(compiled, model, names, self._links)
        self.precision, self.device = _what_runs(compiled, options)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        sequence = self.sequence(self._links, {name: feeds[name] for name in self._links})
        outputs = sequence.run({n: v for n, v in feeds.items() if n not in self._links})
        return {**outputs, **{self._links[n]: v for n, v in sequence.states().items()}}

    def sequence(self, links: Mapping[str, str], states: Feeds) -> Sequence:
        request = self._compiled.create_infer_request()
        return _Sequence(self._ov, request, (self.inputs, self.outputs), links, states)


class _Sequence(Sequence):
    def __init__(
        self,
        ov: Any,
        request: Any,
        ports: tuple[tuple[Port, ...], tuple[Port, ...]],
        links: Mapping[str, str],
        states: Feeds,
    ) -> None:
        self._request = request
        self._inputs, self._outputs = ports
        # the pass names a variable after the two ends it joins
        inputs = {name + following: name for name, following in links.items()}
        self._variables = {inputs[v.name]: v for v in request.query_state()}
        for name, variable in self._variables.items():
            variable.state = ov.Tensor(np.ascontiguousarray(states[name]))

    def run(self, feeds: Feeds) -> dict[str, Array]:
        arrays = _in_order(feeds, self._inputs)
        results = self._request.infer(arrays, share_inputs=False, share_outputs=False)
        return {port.name: results[i] for i, port in enumerate(self._outputs)}

    def states(self) -> dict[str, Array]:
        return {name: np.array(variable.state.data) for name, variable in self._variables.items()}


def _unreadable(error: Exception) -> ModelLoadError:
    return ModelLoadError(f"openvino cannot load this model: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The line of OpenVINO's report that names the step; else its last."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((n for n in lines if n.startswith("While validating")), lines[-1] if lines else repr(error))


def _what_runs(compiled: Any, asked: EngineOptions) -> tuple[str, str]:
    """Precision and device, as the engine tells; int8 if any convolution is."""
    precision = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
    if asked.precision == "int8":
        steps = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
        ran = {
            s["runtimePrecision"].astype(str)
            for s in steps
            if s["layerType"].astype(str).endswith(("Convolution", "Deconvolution"))
        }
        precision = "int8" if ran & {"i8", "u8"} else precision
    return precision, ",".join(compiled.get_property("EXECUTION_DEVICES")).lower()


def _ports(
    compiled: Any, model: Model, names: _Names, hidden: Mapping[str, str]
) -> tuple[tuple[Port, ...], tuple[Port, ...]]:
    """Inputs and outputs, without the states `hidden` in the program."""
    states = model.states.values()

    def ports(nodes: Any, wanted: list[str], without: Collection[str]) -> tuple[Port, ...]:
        wanted = [name for name in wanted if name not in without]
        found = _named(nodes, wanted)
        return tuple(_port(node, name, name in states) for node, name in zip(nodes, found, strict=True))

    ins, outs = names
    return ports(compiled.inputs, ins, hidden), ports(compiled.outputs, outs, hidden.values())


def _named(nodes: Any, wanted: list[str]) -> list[str]:
    """The name of each input or output: of `wanted` the first left that it has, or the only one left."""
    left = list(wanted)
    found: list[str | None] = []
    for node in nodes:
        name = next((name for name in left if name in node.get_names()), None)
        found.append(name)
        if name is not None:
            left.remove(name)
    if len(left) == found.count(None) == 1:
        return [name or left[0] for name in found]
    return [name or node.get_any_name() for name, node in zip(found, nodes, strict=True)]


def _reshape(graph: Any, names: _Names, shapes: Shapes) -> None:
    ports = zip(_named(graph.inputs, names[0]), graph.inputs, strict=True)
    graph.reshape({port: list(shapes[name]) for name, port in ports})


def _in_order(feeds: Feeds, inputs: tuple[Port, ...]) -> dict[int, Array]:
    """By number: the engine may have forgotten a name. `ascontiguousarray` would give scalars an axis."""
    return {i: np.asarray(feeds[port.name], order="C") for i, port in enumerate(inputs)}


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
