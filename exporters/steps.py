"""What an ONNX operator does to some rows of a picture, anywhere in it: which it reads for those it gives.

`Reader` sorts a graph's nodes into steps on pictures, values of the whole picture, sizes, and constants; it
refuses what it does not know, by name. `stages` puts the steps together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import NotStreamable
from anysize.backends.spec import Dim, ModelSpec
from anysize.exporters.cost import computed, infer_shapes
from anysize.exporters.operators import POINTWISE

#: [first, last) rows of a tensor
Rows = tuple[int, int]
Shape = tuple[int, ...]
#: an input of a graph: its shape (None: open) and type
Port = tuple[tuple[int | None, ...], type]
#: what an operator reads of its source for the rows wanted, what it then gives, and its inputs for this tile
Reading = tuple[Rows, Rows, dict[str, Array]]
_REDUCTIONS = {
    "ReduceMean": "mean",
    "ReduceSum": "sum",
    "ReduceMax": "max",
    "ReduceMin": "min",
    "GlobalAveragePool": "mean",
    "GlobalMaxPool": "max",
}


@dataclass(frozen=True)
class Step:
    """An operator on rows: `reads(rows wanted, shape of its source, of its output)`; `nodes` compute it.

    Inputs of the nodes that are named as the step's sources are the rows it asked for. `ports`: its own
    inputs, with their shape and type, whose values `reads` gives. `cheap`: rather computed again than stored.
    """

    sources: tuple[str, ...]
    output: str
    nodes: tuple[Any, ...]
    reads: Callable[[Rows, Shape, Shape], Reading]
    ports: Mapping[str, Port] = field(default_factory=dict)
    cheap: bool = False


@dataclass(frozen=True)
class Gathered:
    """A value of the whole picture: the `kind` (mean, sum, max, min) over all rows of what a stage gives."""

    name: str
    kind: str
    source: str
    nodes: tuple[Any, ...]  # from the rows of `source` to one value for each row


class Reader:
    """Turns the nodes of a graph into steps. Refuses what it does not know, by name."""

    def __init__(self, onnx: Any, proto: Any, spec: ModelSpec) -> None:
        self.onnx, self.proto = onnx, proto
        self.constants = {i.name: onnx.numpy_helper.to_array(i) for i in proto.graph.initializer}
        self.fixed: list[Any] = []  # nodes that compute from constants alone
        self.fixed_names = set(self.constants)
        self.sizes: set[str] = set()
        self.pictures = {spec.inputs[0].name}
        self.turned: dict[str, str] = {}  # rows laid along the last axis -> the tensor they are of
        self.global_nodes: dict[str, Any] = {}  # value of the whole picture -> the node that computes it
        self.gathered: dict[str, Gathered] = {}
        self.steps: dict[str, Step] = {}
        size = {name: dim.min for name, dim in spec.dims.items()}
        for i, dim in enumerate(spec.inputs[0].shape[2:]):  # sides that differ, and are larger than 1
            if isinstance(dim, Dim):
                size[dim.name] = dim.floor(dim.min + 40 + 7 * i)
        self.shapes = infer_shapes(proto, spec.input_shapes(size))
        for node in proto.graph.node:
            self._read(node)

    def _read(self, node: Any) -> None:
        inputs = [i for i in node.input if i]
        values = {*self.gathered, *self.global_nodes}
        pictures = [i for i in inputs if i in self.pictures or i in self.turned]
        if any(a.HasField("g") or len(a.graphs) for a in node.attribute):
            raise refuse(node, "it has graphs inside, which may read anything")
        if node.op_type in ("Shape", "Size") and pictures:
            self.sizes.update(node.output)
        elif pictures:
            self._of_pictures(node, pictures)
        elif any(i in values for i in inputs):
            if any(i in self.sizes for i in inputs):
                raise refuse(node, "it depends on the picture's size and on a value of all of it")
            self.global_nodes.update(dict.fromkeys(node.output, node))
        elif any(i in self.sizes for i in inputs):
            self.sizes.update(node.output)
        else:
            self._fix(node)

    def _fix(self, node: Any) -> None:
        """Keep a node on constants, and its value where they are small, such as the axes of a reduction."""
        if node.op_type.startswith("Random") or node.op_type in ("Bernoulli", "Multinomial"):
            raise refuse(node, "it gives something else each time")
        if unknown := [i for i in node.input if i and i not in self.fixed_names]:
            raise refuse(node, f"where '{unknown[0]}' comes from is not known")
        self.fixed.append(node)
        self.fixed_names.update(node.output)
        self.constants.update(computed(node, self.constants))

    def _of_pictures(self, node: Any, pictures: list[str]) -> None:
        if node.domain not in ("", "ai.onnx"):
            raise refuse(node, "it is not known")
        output = node.output[0]
        if node.op_type in _REDUCTIONS:
            self._reduction(node)
            return
        if node.op_type == "Reshape" and self._turns(node):
            self.turned[output] = node.input[0]
            return
        if any(p in self.turned for p in pictures):
            raise refuse(node, "it reads rows that were laid along another axis")
        reader = _READERS.get(node.op_type, _pointwise if node.op_type in POINTWISE | {"Identity"} else None)
        if reader is None:
            raise refuse(node, "it is not known to work on some rows alone")
        if len([o for o in node.output if o]) > 1:
            raise refuse(node, "it has more than one output")
        self.steps[output] = reader(self, node)
        self.pictures.add(output)

    def _turns(self, node: Any) -> bool:
        before, after = (self.shapes.get(n, ((),))[0] for n in (node.input[0], node.output[0]))
        return len(before) == len(after) == 4 and before[3] == 1 and after == (*before[:2], 1, before[2])

    def _reduction(self, node: Any) -> None:
        source, output = node.input[0], node.output[0]
        settings = self.settings(node)
        axes: Any = [2, 3]
        if node.op_type.startswith("Reduce"):
            axes = settings.get("axes")
            if len(node.input) > 1 and node.input[1]:
                axes = self.constants.get(node.input[1])
            if axes is None or not settings.get("keepdims", 1):
                raise refuse(node, "its axes are computed, or do not stay")
        axes = sorted(int(a) % 4 for a in axes)
        if not axes:
            raise refuse(node, "it names no axes")
        if self.shapes.get(source, ((), 0))[1] != self.onnx.TensorProto.FLOAT:
            raise refuse(node, "its numbers are not 32-bit floats")
        kind = _REDUCTIONS[node.op_type]
        if source in self.turned:
            if axes != [3]:
                raise refuse(node, "it reads rows that were laid along another axis")
            self.gathered[output] = Gathered(output, kind, self.turned[source], ())
        elif 2 not in axes:
            self.steps[output] = _pointwise(self, node)
            self.pictures.add(output)
        else:
            others = [a for a in axes if a != 2]
            nodes = []
            if others:
                where, make = f"stages/{output}/axes", self.onnx.helper.make_node
                nodes = [
                    make("Constant", [], [where], value_ints=others),
                    make(f"Reduce{kind.capitalize()}", [source, where], [output], keepdims=1),
                ]
            self.gathered[output] = Gathered(output, kind, source, tuple(nodes))

    def settings(self, node: Any) -> dict[str, Any]:
        return {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}

    def copy(self, node: Any, **attributes: Any) -> Any:
        """The node with other attributes (None: without)."""
        made = type(node)()
        made.CopyFrom(node)
        for name, value in attributes.items():
            for attribute in [a for a in made.attribute if a.name == name]:
                made.attribute.remove(attribute)
            if value is not None:
                made.attribute.append(self.onnx.helper.make_attribute(name, value))
        return made

    def rows(self, name: str) -> int:
        return int(self.shapes[name][0][2])


def refuse(node: Any, why: str) -> NotStreamable:
    name = f" '{node.name}'" if node.name else ""
    return NotStreamable(f"operator {node.op_type}{name} cannot run in stages of tiles: {why}")


def _pointwise(reader: Reader, node: Any) -> Step:
    sources = tuple(dict.fromkeys(i for i in node.input if i in reader.pictures))
    output = node.output[0]
    for name in node.input:
        if name in reader.sizes:
            raise refuse(node, f"'{name}' depends on the picture's size")
        shape = reader.shapes.get(name, ((),))[0]
        if name and name not in sources and len(shape) > 1 and shape[-2] != 1:
            raise refuse(node, f"'{name}' has values for each row")
        if name in sources and reader.rows(name) != reader.rows(output):
            raise refuse(node, f"'{name}' has rows of its own")
    return Step(sources, output, (node,), lambda rows, *_: (rows, rows, {}), cheap=len(sources) == 1)


def _window(reader: Reader, node: Any) -> Step:
    """Convolution and pooling."""
    source, output = node.input[0], node.output[0]
    settings = reader.settings(node)
    if any(i in reader.pictures or i in reader.sizes for i in node.input[1:]):
        raise refuse(node, "its weights are computed from the picture")
    if settings.get("auto_pad", b"NOTSET") != b"NOTSET" or settings.get("ceil_mode", 0):
        raise refuse(node, "its padding is automatic; export it with numbers")
    kernel = reader.shapes[node.input[1]][0][2] if node.op_type == "Conv" else settings["kernel_shape"][0]
    stride, dilation = (settings.get(name, [1, 1])[0] for name in ("strides", "dilations"))
    pads = settings.get("pads", [0, 0, 0, 0])
    top, reach = pads[0], (kernel - 1) * dilation
    padded = bool(pads[0] or pads[2])
    if max(pads[0], pads[2]) > reach:
        raise refuse(node, "it is padded by more than it reaches, so that rows may see no picture at all")
    if padded and node.op_type == "AveragePool" and not settings.get("count_include_pad", 0):
        raise refuse(node, "it divides by the number of pixels at the picture's ends")

    def reads(rows: Rows, before: Shape, after: Shape) -> Reading:
        first, last = rows[0] * stride - top, (rows[1] - 1) * stride + reach + 1 - top
        beyond = (max(0, -first), max(0, last - before[2]))
        own = _pads(port, beyond) if padded else {}
        return (first + beyond[0], last - beyond[1]), rows, own

    inner = reader.copy(node, pads=[0, pads[1], 0, pads[3]])
    if not padded:
        return Step((source,), output, (inner,), reads)
    port, wide, value = (f"stages/{output}/{what}" for what in ("pads", "padded", "value"))
    inner.input[0] = wide
    make, filler = reader.onnx.helper.make_node, -np.inf if node.op_type == "MaxPool" else 0.0
    nodes = (
        make("Constant", [], [value], value_float=filler),
        make("Pad", [source, port, value], [wide]),
        inner,
    )
    return Step((source,), output, nodes, reads, {port: ((8,), np.int64)})


def _pads(port: str, rows: tuple[int, int], columns: tuple[int, int] = (0, 0)) -> dict[str, Array]:
    return {port: np.array([0, 0, rows[0], columns[0], 0, 0, rows[1], columns[1]], np.int64)}


def _padding(reader: Reader, node: Any) -> Step:
    source, output = node.input[0], node.output[0]
    pads = reader.constants.get(node.input[1])
    if pads is None or len(pads) != 8 or (len(node.input) > 3 and node.input[3]) or min(pads) < 0:
        raise refuse(node, "its numbers are computed, negative, or of some axes only")
    if pads[0] or pads[1] or pads[4] or pads[5]:
        raise refuse(node, "it adds channels")
    top, left, right = (int(pads[i]) for i in (2, 3, 7))
    mode = reader.settings(node).get("mode", b"constant")
    if mode not in (b"constant", b"edge", b"reflect"):
        raise refuse(node, f"mode {mode.decode()} reads rows far away")
    mirrors = mode == b"reflect"
    port = f"stages/{output}/pads"

    def reads(rows: Rows, before: Shape, after: Shape) -> Reading:
        # what lies beyond the picture is made from its first or last rows, as many as a reflection needs
        above, below = max(0, top - rows[0]), max(0, rows[1] - top - before[2])
        first = min(max(rows[0] - top, 0), before[2] - 1 - (below if mirrors else 0))
        last = max(min(rows[1] - top, before[2]), 1 + (above if mirrors else 0))
        gives = (first + top - above, last + top + below)
        return (first, last), gives, _pads(port, (above, below), (left, right))

    made = reader.copy(node)
    made.input[1] = port
    return Step((source,), output, (made,), reads, {port: ((8,), np.int64)})


def _resize(reader: Reader, node: Any) -> Step:
    """Rows are picked or interpolated by numbers that the tile is given, columns by the operator itself."""
    source, output = node.input[0], node.output[0]
    settings = reader.settings(node)
    mode = settings.get("mode", b"nearest").decode()
    where = settings.get("coordinate_transformation_mode", b"half_pixel").decode()
    rounding = settings.get("nearest_mode", b"round_prefer_floor").decode()
    known = where in ("half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric")
    if mode not in ("nearest", "linear") or not known or settings.get("antialias", 0):
        raise refuse(node, f"mode {mode} with {where} is not supported")
    if settings.get("axes") is not None or settings.get("keep_aspect_ratio_policy", b"stretch") != b"stretch":
        raise refuse(node, "it names axes, or keeps the aspect")
    before, after = (reader.shapes[name][0] for name in (source, output))
    if before[:2] != after[:2]:
        raise refuse(node, "it resizes channels")
    scales = reader.constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2] and scales is None:
        raise refuse(node, "its scales are computed")
    if scales is not None and any(float(s) != int(s) for s in scales):
        raise refuse(node, "a scale that is no whole number can round sizes")
    sizes, lower, upper, weight = (f"stages/{output}/{n}" for n in ("sizes", "lower", "upper", "weight"))

    def reads(rows: Rows, before: Shape, after: Shape) -> Reading:
        end = before[2] - 1
        places = _places(np.arange(*rows), before[2], after[2], where)
        own = {sizes: np.array([*after[:2], rows[1] - rows[0], after[3]], np.int64)}
        if mode == "nearest":
            if where == "align_corners" or rounding.startswith("round"):
                _no_ties(node, np.arange(*rows), before[2], after[2], where, rounding)
            chosen = np.clip(_NEAREST[rounding](places), 0, end).astype(np.int64)
            first, last = int(chosen.min()), int(chosen.max()) + 1
            return (first, last), rows, {**own, lower: chosen - first}
        places = np.clip(places, 0, end)
        below = np.floor(places).astype(np.int64)
        above = np.minimum(below + 1, end)
        first, last = int(below.min()), int(above.max()) + 1
        part = (places - below).astype(np.float32).reshape(1, 1, -1, 1)
        return (first, last), rows, {**own, lower: below - first, upper: above - first, weight: part}

    helper = reader.onnx.helper
    names = [f"stages/{output}/{i}" for i in range(4)]
    if mode == "nearest":
        nodes = [helper.make_node("Gather", [source, lower], [names[3]], axis=2)]
    else:
        nodes = [
            helper.make_node("Gather", [source, lower], [names[0]], axis=2),
            helper.make_node("Gather", [source, upper], [names[1]], axis=2),
            helper.make_node("Sub", [names[1], names[0]], [f"{names[1]}/less"]),
            helper.make_node("Mul", [f"{names[1]}/less", weight], [names[2]]),
            helper.make_node("Add", [names[0], names[2]], [names[3]]),
        ]
    columns = reader.copy(node)
    columns.input[:] = [names[3], "", "", sizes]
    ports: dict[str, Port] = {lower: ((None,), np.int64), sizes: ((4,), np.int64)}
    if mode == "linear":
        ports |= {upper: ((None,), np.int64), weight: ((1, 1, None, 1), np.float32)}
    return Step((source,), output, (*nodes, columns), reads, ports)


def _places(rows: Array, before: int, after: int, where: str) -> Array:
    """Where rows of a resized picture lie in the original, in f32, as the ONNX operator Resize defines it."""
    rows = rows.astype(np.float32)
    if where == "align_corners":
        return rows * np.float32(before - 1) / np.float32(after - 1) if after > 1 else 0 * rows
    scale = np.float32(after) / np.float32(before)
    if where == "asymmetric":
        return rows / scale
    if where == "pytorch_half_pixel" and after == 1:
        return 0 * rows
    return (rows + np.float32(0.5)) / scale - np.float32(0.5)


def _no_ties(node: Any, rows: Array, before: int, after: int, where: str, rounding: str) -> None:
    """Refuse rows so near the border between two that engines, by their rounding, pick different ones.

    Those of 'asymmetric' and of 'half_pixel' with floor and ceil were seen to pick the same for all sizes.
    """
    corners = where == "align_corners"
    over, under = (before - 1, after - 1) if corners else (before, after)
    if not over or not under or (not corners and under % over == 0):
        return  # one row, or borders lie far from all of them
    ratio = Fraction(over, under)
    if all(n & (n - 1) == 0 for n in (ratio.numerator, ratio.denominator)):
        return  # exact in floats, whichever way it is computed
    shift = 0.0 if corners or where == "asymmetric" else 0.5
    places = (rows + shift) * over / under - shift
    border = places + 0.5 if rounding.startswith("round") else places
    near = np.abs(border - np.rint(border)) <= 4 * np.finfo(np.float32).eps * np.maximum(places, 1)
    if (near & (rows > 0)).any():
        raise refuse(node, f"from {before} to {after} rows, rounding decides which of two it picks")


_NEAREST: dict[str, Callable[[Array], Array]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}


def _shuffle(reader: Reader, node: Any) -> Step:
    block = reader.settings(node)["blocksize"]
    if node.op_type == "SpaceToDepth":
        return Step(
            (node.input[0],), node.output[0], (node,), lambda r, *_: ((r[0] * block, r[1] * block), r, {})
        )

    def reads(rows: Rows, before: Shape, after: Shape) -> Reading:
        first, last = rows[0] // block, -(-rows[1] // block)
        return (first, last), (first * block, last * block), {}

    return Step((node.input[0],), node.output[0], (node,), reads)


def _concat(reader: Reader, node: Any) -> Step:
    if reader.settings(node).get("axis") not in (1, -3):
        raise refuse(node, "it joins along another axis than the channels")
    return _pointwise(reader, node)


def _batch_norm(reader: Reader, node: Any) -> Step:
    if reader.settings(node).get("training_mode", 0):
        raise refuse(node, "it takes statistics of the batch")
    return _pointwise(reader, node)


_READERS: dict[str, Callable[[Reader, Any], Step]] = {
    "AveragePool": _window,
    "BatchNormalization": _batch_norm,
    "Concat": _concat,
    "Conv": _window,
    "DepthToSpace": _shuffle,
    "MaxPool": _window,
    "Pad": _padding,
    "Resize": _resize,
    "SpaceToDepth": _shuffle,
}
