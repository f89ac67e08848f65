"""From a model of whole pictures to one of bands: a few rows in, a few rows out, nothing computed twice.

Every tensor that is looked back upon keeps its last rows as a *state*: the rows above the band that a 3x3
convolution reads, or the rows a skip connection holds until its branch has caught up. Three graphs share
the weights: `first` pads at the top and starts the states, `middle` carries them on, `last` pads at the
bottom and ends them. Put together they compute each row of each tensor of the whole picture once.

Distances are measured back from the *front*: after E rows of the picture have gone in, the front of a tensor
with `rate` rows per picture row lies at rate * E. It holds rows up to `lag` before its front (those whose
inputs are there), and is remembered from `reach` before it; the state is the rows between the two. With
that, all row counts are constants and every graph takes any number of rows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
from anysize.backends.base import Array, Model
from anysize.backends.errors import NotStreamable
from anysize.backends.spec import Dim, ModelSpec, Rule, Size, TensorSpec
from anysize.exporters.cost import computed, infer_shapes, picture_graph
from anysize.exporters.operators import Facts, Operator, read_operator, refuse
from anysize.exporters.radius import image_step

#: the dimension of a band's rows; a contract's own may be called anything that people call a dimension
ROWS = "bands/rows"
_END = np.iinfo(np.int64).max
# Sizes at which all shapes are inferred, in steps beyond the least: what is not in proportion to the picture
# at all of them is none. Odd and even ones, and no common factor that a rounded size could hide behind.
_SIZES = ((13, 29), (24, 35), (31, 18), (40, 46))


@dataclass(frozen=True)
class BandModel:
    """A model that runs in bands of rows.

    `first` takes at least `warm_up` rows, `middle` and `last` any number; all are multiples of `step`.
    Their input and outputs are named as in the whole model's `spec`; each state is an input that takes what
    the graph before gave as the output `Model.states` names. The first graph returns fewer rows than it has
    read, and the last as many more.
    """

    first: Model
    middle: Model
    last: Model
    step: int
    warm_up: int


@dataclass
class _Tensor:
    """A tensor of the whole picture: `rate`, `width` per picture row and column; distances as above."""

    dtype: int
    channels: int
    rate: Fraction
    width: Fraction
    lag: int = 0
    reach: int = 0

    @property
    def kept(self) -> int:
        return self.reach - self.lag


@dataclass
class _Network:
    """The whole model, read: operators on pictures in order, and what they need besides."""

    proto: Any
    spec: ModelSpec
    tensors: dict[str, _Tensor]
    operators: list[Operator]
    constants: list[Any] = field(default_factory=list)  # nodes that compute from weights alone


def band_model(model: Model) -> BandModel:
    """Turn an ONNX model (its bytes and contract are all that is read) into a band model.

    Raises `NotStreamable` naming the operator and the reason, `BackendUnavailableError` without onnx.
    """
    onnx, proto = picture_graph(model, "bands", 13)
    spec = model.spec
    assert spec is not None
    taken = [*proto.graph.input, *proto.graph.initializer]
    names = [*(value.name for value in taken), *(n for node in proto.graph.node for n in node.output)]
    if any(name.startswith("bands/") for name in names):
        raise NotStreamable("the model's tensors are named as those of bands are: 'bands/...'")
    network = _read(onnx, proto, spec)
    _trace(network)
    source = network.tensors[spec.inputs[0].name]
    result = network.tensors[spec.outputs[0].name]
    step = image_step(spec, 2)
    coarsest = math.lcm(*(t.rate.denominator for t in network.tensors.values()))
    if step % coarsest:
        raise NotStreamable(f"the model works on {coarsest} rows at a time, but takes sizes between them")
    for name, tensor in network.tensors.items():
        if tensor.kept and tensor.dtype != onnx.TensorProto.FLOAT:
            raise NotStreamable(f"tensor '{name}' is not of 32-bit floats, and would have to be remembered")
    assert source.rate == 1
    assert result.rate == spec.scale
    starts = max(math.ceil(max(t.reach, t.lag + 1) / t.rate) for t in network.tensors.values())
    warm_up = step * math.ceil(starts / step)
    first, middle, last = (
        _Writer(onnx, network, part).model(warm_up) for part in ("first", "middle", "last")
    )
    return BandModel(first, middle, last, step, warm_up)


# -- reading


def _read(onnx: Any, proto: Any, spec: ModelSpec) -> _Network:
    """Sort the graph's nodes into those on pictures, on weights, and on sizes."""
    shapes = []
    for tall, wide in _SIZES:
        shape = (1, spec.channels or 0, _size(spec, 2, tall), _size(spec, 3, wide))
        shapes.append(infer_shapes(proto, {spec.inputs[0].name: shape}))
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
    name = spec.inputs[0].name
    network = _Network(proto, spec, {name: _tensor(name, shapes, name)}, [])
    sizes: set[str] = set()  # tensors that hold the picture's size, or follow from it
    consumers: dict[str, list[Any]] = defaultdict(list)
    for node in proto.graph.node:
        for i in node.input:
            consumers[i].append(node)
    facts = Facts(onnx, network.tensors, sizes, weights, shapes, consumers)
    absorbed: set[str] = set()
    for node in proto.graph.node:
        if node.output[0] in absorbed:
            continue
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise refuse(node, "what it runs is chosen at run time")
        if any(i in network.tensors or i in facts.padded for i in node.input):
            if node.op_type in ("Shape", "Size"):
                sizes.update(node.output)
                continue
            for operator in read_operator(node, facts):
                absorbed.update(operator.absorbs)
                network.operators.append(operator)
                network.tensors[operator.output] = _tensor(operator.output, shapes, name)
        elif any(i in sizes for i in node.input):
            sizes.update(node.output)
        else:
            network.constants.append(node)
            weights.update(computed(node, weights))
    if spec.outputs[0].name not in network.tensors:
        raise NotStreamable(f"the output '{spec.outputs[0].name}' does not depend on the picture")
    return network


def _size(spec: ModelSpec, axis: int, steps: int) -> int:
    """A size the model takes, so many steps beyond its least."""
    size = spec.inputs[0].shape[axis]
    assert isinstance(size, Dim)
    step = image_step(spec, axis)
    return step * (math.ceil(size.min / step) + steps)


def _tensor(name: str, shapes: list[dict[str, tuple[tuple[int, ...], int]]], source: str) -> _Tensor:
    rates = set()
    for known in shapes:
        if name not in known or len(known[name][0]) != 4 or known[name][0][0] != 1:
            raise NotStreamable(f"tensor '{name}' is not an NCHW picture of known size")
        (_, channels, rows, columns), dtype = known[name]
        height, width = known[source][0][2:]
        rates.add((Fraction(rows, height), Fraction(columns, width), channels))
    if len(rates) > 1 or 0 in next(iter(rates)):
        raise NotStreamable(f"the size of tensor '{name}' is not in proportion to the picture's")
    rate, per_column, channels = rates.pop()
    return _Tensor(dtype, channels, rate, per_column)


def _trace(network: _Network) -> None:
    """How far each tensor lags behind its front, then how far back it must be remembered."""
    tensors = network.tensors
    for operator in network.operators:
        tensors[operator.output].lag = max(operator.window.lag(tensors[s].lag) for s in operator.sources)
    for tensor in tensors.values():
        tensor.reach = tensor.lag
    for operator in reversed(network.operators):
        start = operator.start(tensors[operator.output].lag, tensors[operator.output].reach)
        for source in operator.sources:
            tensors[source].reach = max(tensors[source].reach, operator.window.reach(start))


# -- writing


class _Writer:
    """Writes one of the three graphs."""

    def __init__(self, onnx: Any, network: _Network, part: str) -> None:
        self.onnx, self.network, self.part = onnx, network, part
        self.nodes: list[Any] = []
        self.initializers: dict[str, Any] = {}
        self.names: dict[str, str] = {}  # tensor -> its rows from `reach` (or the picture's top) on
        self.inputs: list[tuple[TensorSpec, int]] = []
        self.outputs: list[tuple[TensorSpec, int]] = []
        self.states: dict[str, str] = {}

    def model(self, warm_up: int) -> Model:
        spec, tensors = self.network.spec, self.network.tensors
        source, result = spec.inputs[0], spec.outputs[0]
        step = image_step(spec, 2)
        assert isinstance(source.shape[3], Dim)
        rows = Dim(ROWS, warm_up if self.part == "first" else step, None, step)
        columns = source.shape[3]
        self.columns = columns.name
        shape: tuple[Size, ...] = (1, tensors[source.name].channels, rows, columns)
        self._port(self.inputs, source.name, tensors[source.name], shape)
        self._remember(source.name, source.name)
        for operator in self.network.operators:
            self._emit(operator)
        final = tensors[result.name]
        late = {"first": -final.lag, "middle": 0, "last": final.lag}[self.part]
        after = Rule(ROWS, mul=int(final.rate), add=late)
        shape = (1, final.channels, after, _columns(self.columns, final))
        self._port(self.outputs, result.name, final, shape)
        self.outputs.insert(0, self.outputs.pop())
        return self._model()

    def _emit(self, operator: Operator) -> None:
        tensors, window = self.network.tensors, operator.window
        out = tensors[operator.output]
        start = operator.start(out.lag, out.reach)
        feeds = {}
        for name in operator.sources:
            tensor = tensors[name]
            begin = 0 if self.part == "first" else tensor.reach - window.reach(start)
            end = 0 if self.part == "last" else window.hold(out.lag) - tensor.lag
            feeds[name] = self._rows(self.names[name], begin, end)
        made = self._fresh(operator.output)
        top, bottom = self.part == "first", self.part == "last"
        for name, values in operator.initializers(top, bottom).items():
            self.initializers[name] = self.onnx.numpy_helper.from_array(values, name)
        beyond = (0, 0)  # rows it makes before and after those wanted
        if window.down == 1 and operator.pads is None:
            beyond = (
                0 if self.part == "first" else window.up * window.reach(start) - start,
                0 if self.part == "last" else out.lag - window.up * window.hold(out.lag),
            )
        crop = beyond if operator.crops else (0, 0)
        self.nodes += operator.write(feeds, made, top, bottom, crop)
        if not operator.crops:
            made = self._rows(made, *beyond)
        if operator.output == self.network.spec.outputs[0].name:
            # the result proper: rows from its lag on
            back = 0 if self.part == "first" else start - out.lag
            shown = self._rows(made, back, 0)
            self.nodes.append(self.onnx.helper.make_node("Identity", [shown], [operator.output]))
        if operator.cheap:
            self.names[operator.output] = made
        else:
            self._remember(operator.output, made)

    def _remember(self, tensor: str, fresh: str) -> None:
        """Put the state in front of the fresh rows, and keep the last rows for the next band."""
        kept = self.network.tensors[tensor].kept
        joined = fresh
        shape = self._state_shape(tensor)
        if kept and self.part != "first":
            state = f"bands/{tensor}/state"
            self._port(self.inputs, state, self.network.tensors[tensor], shape)
            joined = self._fresh(f"{tensor}/joined")
            self.nodes.append(self.onnx.helper.make_node("Concat", [state, fresh], [joined], axis=2))
        if kept and self.part != "last":
            following = f"bands/{tensor}/next"
            self._slice(joined, -kept, _END, following)
            self._port(self.outputs, following, self.network.tensors[tensor], shape)
            self.states[f"bands/{tensor}/state"] = following
        self.names[tensor] = joined

    def _state_shape(self, name: str) -> tuple[Size, ...]:
        tensor = self.network.tensors[name]
        return (1, tensor.channels, tensor.kept, _columns(self.columns, tensor))

    def _rows(self, name: str, begin: int, end: int) -> str:
        """Rows of a tensor without `begin` at the top and `end` at the bottom."""
        if not begin and not end:
            return name
        return self._slice(name, begin, -end if end else _END, self._fresh(f"{name}/rows"))

    def _slice(self, name: str, begin: int, end: int, into: str) -> str:
        bounds = [self._weight(np.array([v], np.int64)) for v in (begin, end, 2)]
        self.nodes.append(self.onnx.helper.make_node("Slice", [name, *bounds], [into]))
        return into

    def _fresh(self, name: str) -> str:
        return f"bands/{name.removeprefix('bands/')}/{len(self.nodes)}"

    def _weight(self, values: Array) -> str:
        name = f"bands/{'/'.join(map(str, values.ravel()))}"
        self.initializers[name] = self.onnx.numpy_helper.from_array(values, name)
        return name

    def _port(
        self, ports: list[tuple[TensorSpec, int]], name: str, tensor: _Tensor, shape: tuple[Size, ...]
    ) -> None:
        dtype = np.dtype(self.onnx.helper.tensor_dtype_to_np_dtype(tensor.dtype))
        ports.append((TensorSpec(name, dtype, shape), tensor.dtype))

    def _model(self) -> Model:
        helper, proto = self.onnx.helper, self.network.proto

        def infos(ports: list[tuple[TensorSpec, int]]) -> list[Any]:
            return [
                helper.make_tensor_value_info(
                    t.name,
                    kind,
                    [s if isinstance(s, int) else s.name if isinstance(s, Dim) else str(s) for s in t.shape],
                )
                for t, kind in ports
            ]

        used = {i for node in (*self.nodes, *self.network.constants) for i in node.input}
        weights = [w for w in proto.graph.initializer if w.name in used]
        graph = helper.make_graph(
            [*self.network.constants, *self.nodes],
            f"{proto.graph.name}.{self.part}",
            infos(self.inputs),
            infos(self.outputs),
            [*weights, *self.initializers.values()],
        )
        made = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
        spec = replace(
            self.network.spec,
            inputs=tuple(t for t, _ in self.inputs),
            outputs=tuple(t for t, _ in self.outputs),
            radius=None,
            tileable=False,
        )
        return Model("onnx", made.SerializeToString(), spec, self.states)


def _columns(name: str, tensor: _Tensor) -> Size:
    return Rule(name, mul=tensor.width.numerator, div=tensor.width.denominator)
