"""What an ONNX operator does to the rows of a picture: which it reads for which it gives, as data.

`read_operator` knows every operator that can run on bands; for any other it says why not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import NotStreamable


@dataclass(frozen=True)
class Window:
    """Rows [a, b) of the output need rows [(a*down - before) // up, (b*down + after) // up) of the input.

    The three methods say the same of distances back from the front (see `bands`), where larger is earlier.
    """

    up: int = 1
    down: int = 1
    before: int = 0
    after: int = 0

    def reach(self, start: int) -> int:
        """Where the input must begin for the output to begin at `start`."""
        return -((-start * self.down - self.before) // self.up)

    def hold(self, end: int) -> int:
        """Where the input needed for the output up to `end` stops."""
        return -((-end * self.down + self.after) // self.up)

    def lag(self, lag: int) -> int:
        """How far the output can get if the input is there up to `lag`."""
        return -((self.up * (1 - lag) - 1 - self.after) // self.down)


@dataclass(frozen=True)
class Operator:
    """One step on pictures: node templates, of which the first reads `sources` and the last gives `output`.

    `cheap`: making rows again costs no more than fetching them from a state would. `pads`: rows (top, bottom)
    that the first node, Pad or Conv, adds at the ends of the picture. `crops`: its padding takes rows of the
    result away, at no cost. `weights`: initializers of its own. `absorbs`: outputs of later nodes that this
    operator has already done.
    """

    nodes: tuple[Any, ...]
    sources: tuple[str, ...]
    output: str
    window: Window = field(default_factory=Window)
    cheap: bool = False
    pads: tuple[int, int] | None = None
    crops: bool = False
    weights: Mapping[str, Array] = field(default_factory=dict)
    absorbs: tuple[str, ...] = ()

    def start(self, lag: int, reach: int) -> int:
        """Where its output begins: with the rows remembered if it makes those itself."""
        return reach if self.cheap else lag

    def write(
        self, feeds: Mapping[str, str], output: str, top: bool, bottom: bool, crop: tuple[int, int]
    ) -> list[Any]:
        """The nodes, reading `feeds` for `sources`.

        `top`, `bottom`: whether the picture's end is there; `crop`: rows to leave out at both ends.
        """
        names = {**feeds, self.output: output}
        written = []
        for template in self.nodes:
            node = type(template)()
            node.CopyFrom(template)
            inner = [names.setdefault(n, n if n == self.output else f"{output}/{n}") for n in node.output]
            node.input[:] = [names.get(n, n) for n in template.input]
            node.output[:] = inner
            node.name = ""
            written.append(node)
        for attribute in written[0].attribute:
            half = len(attribute.ints) // 2
            if attribute.name == "pads" and self.pads is not None:  # of a Conv; a Pad reads its own
                attribute.ints[0] = self.pads[0] if top else 0
                attribute.ints[half] = self.pads[1] if bottom else 0
            elif attribute.name == "pads" and self.crops:
                attribute.ints[0] += crop[0]
                attribute.ints[half] += crop[1]
        return written

    def initializers(self, top: bool, bottom: bool) -> Mapping[str, Array]:
        """`weights`; of a Pad, whose numbers of rows stand there, with none where the picture goes on."""
        pad = self.nodes[0]
        if pad.op_type != "Pad":
            return self.weights
        return {pad.input[1]: self.weights[pad.input[1]] * [1, 1, top, 1, 1, 1, bottom, 1]}


class Facts:
    """What reading an operator may look up: the rest of the graph, and shapes at several sizes."""

    def __init__(
        self,
        onnx: Any,
        pictures: Mapping[str, Any],
        sizes: set[str],
        weights: Mapping[str, Array],
        shapes: list[dict[str, tuple[tuple[int, ...], int]]],
        consumers: Mapping[str, list[Any]],
    ) -> None:
        self.onnx, self.pictures, self.sizes, self.weights = onnx, pictures, sizes, weights
        self.shapes, self.consumers = shapes, consumers
        self.joined: dict[str, tuple[str, ...]] = {}  # Concat's output -> what it joins
        self.padded: dict[str, Any] = {}  # Pad's output -> the Pad, which the Conv that reads it has to do

    def shape(self, name: str) -> tuple[int, ...] | None:
        """At the first of the sizes."""
        return self.shapes[0].get(name, (None, 0))[0]

    def growth(self, before: str, after: str, axis: int) -> Fraction | None:
        """Size of `after` per size of `before`, where it is the same at all sizes."""
        if not all(before in s and after in s for s in self.shapes):
            return None
        ratios = {Fraction(s[after][0][axis], s[before][0][axis]) for s in self.shapes}
        return ratios.pop() if len(ratios) == 1 else None

    def attributes(self, node: Any) -> dict[str, Any]:
        return {a.name: self.onnx.helper.get_attribute_value(a) for a in node.attribute}


#: operators whose every output value depends on the input values at the same place alone
_POINTWISE = """
Abs Add Cast Ceil Celu Clip Cos Div Elu Equal Erf Exp Floor Gelu Greater
GreaterOrEqual HardSigmoid HardSwish LeakyRelu Less LessOrEqual Log Max Mean Min Mish Mod Mul Neg PRelu Pow
Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Sub Sum Tanh ThresholdedRelu Where
"""
POINTWISE = frozenset(_POINTWISE.split())
#: the ways of Reshape - Transpose - Reshape that move pixels into channels and back: permutation of the six
#: axes -> (operator, its channel order)
_PERMUTATIONS = {
    (0, 1, 4, 2, 5, 3): ("DepthToSpace", "CRD"),
    (0, 3, 4, 1, 5, 2): ("DepthToSpace", "DCR"),
    (0, 1, 3, 5, 2, 4): ("SpaceToDepth", "CRD"),
    (0, 3, 5, 1, 2, 4): ("SpaceToDepth", "DCR"),
}
_WHOLE = "it looks at the whole picture at once"
_REASONS = {
    "GlobalAveragePool": _WHOLE,
    "GlobalMaxPool": _WHOLE,
    "InstanceNormalization": "its statistics are of the whole picture",
    "GroupNormalization": "its statistics are of the whole picture",
    "LayerNormalization": "it normalises over an axis, not at each place",
    "MatMul": "it is attention or a product over places",
    "Gemm": "it mixes all places",
    "Einsum": "it is attention or a product over places",
    "Softmax": "it normalises over an axis, not at each place",
    "Reshape": "it rearranges rows (a shuffle of pixels into channels and back is all that is known)",
    "Transpose": "it exchanges axes",
    "Pad": "only a constant or the border's pixels around what one convolution reads are supported",
    "Expand": "it repeats values to the picture's size",
}


def refuse(node: Any, why: str) -> NotStreamable:
    name = f" '{node.name}'" if node.name else ""
    return NotStreamable(f"operator {node.op_type}{name} cannot run in bands of rows: {why}")


def read_operator(node: Any, facts: Facts) -> list[Operator]:
    """The operators a node stands for. Raises `NotStreamable`."""
    if node.domain not in ("", "ai.onnx"):
        raise refuse(node, f"it is of the domain '{node.domain}'")
    others = [i for i in node.input if i and i not in facts.pictures]
    reader = _READERS.get(node.op_type)
    if reader is None and node.op_type not in POINTWISE:
        why = _WHOLE if node.op_type.startswith("Reduce") else "it is not known to"
        raise refuse(node, _REASONS.get(node.op_type, why))
    if reader is not None:
        return reader(node, facts)
    if len([o for o in node.output if o]) > 1:
        raise refuse(node, "it has more than one output")
    for name in others:
        if name in facts.sizes:
            raise refuse(node, f"'{name}' depends on the picture's size")
        shape = facts.shape(name)
        if shape is None or (len(shape) > 1 and shape[-2] != 1):
            raise refuse(node, f"'{name}' has values for each row")
    return [Operator((node,), _pictures(node, facts), node.output[0])]


def _pictures(node: Any, facts: Facts) -> tuple[str, ...]:
    return tuple(dict.fromkeys(i for i in node.input if i in facts.pictures))


def _conv(node: Any, facts: Facts) -> list[Operator]:
    """With the Pad in front of it, if there is one, whose rows stand for zeros of its own."""
    settings = facts.attributes(node)
    if any(i in facts.pictures or i in facts.sizes for i in node.input[1:]):
        raise refuse(node, "its weights are computed from the picture")
    if settings.get("auto_pad", b"NOTSET") != b"NOTSET":
        raise refuse(node, "its padding is automatic; export it with numbers")
    kernel = facts.shape(node.input[1])
    if kernel is None or len(kernel) != 4:
        raise refuse(node, "its kernel is not two-dimensional, or of unknown size")
    stride = settings.get("strides", [1, 1])[0]
    reach = (kernel[2] - 1) * settings.get("dilations", [1, 1])[0]
    pads = settings.get("pads", [0, 0, 0, 0])
    top, bottom, source = pads[0], pads[2], node.input[0]
    nodes: tuple[Any, ...] = (node,)
    weights = {}
    if source in facts.padded:
        pad = type(node)()
        pad.CopyFrom(facts.padded[source])
        if top or bottom:
            raise refuse(pad, _REASONS["Pad"])
        around, pad.input[1] = facts.weights[pad.input[1]], f"bands/{source}/pads"
        nodes, weights = (pad, node), {pad.input[1]: around}
        top, bottom, source = int(around[2]), int(around[6]), pad.input[0]
    if facts.growth(source, node.output[0], 2) != Fraction(1, stride):
        raise refuse(node, f"{top} + {bottom} rows of padding do not keep the picture's size")
    window = Window(down=stride, before=top, after=reach + 1 - top - stride)
    return [Operator(nodes, (source,), node.output[0], window, pads=(top, bottom), weights=weights)]


def _pad(node: Any, facts: Facts) -> list[Operator]:
    """Nothing by itself: the convolution that reads it pads otherwise than with zeros."""
    following = facts.consumers.get(node.output[0], [])
    if facts.attributes(node).get("mode", b"constant") not in (b"constant", b"edge"):
        raise refuse(node, _REASONS["Pad"])
    if [f.op_type for f in following] != ["Conv"] or following[0].input[0] != node.output[0]:
        raise refuse(node, _REASONS["Pad"])
    pads = facts.weights.get(node.input[1])
    if pads is None or pads.shape != (8,) or pads.min() < 0 or any(node.input[3:]):
        raise refuse(node, "its numbers are computed from the picture, negative, or of some axes only")
    if pads[[0, 1, 4, 5]].any() or node.input[0] not in facts.pictures:
        raise refuse(node, _REASONS["Pad"])
    if any(i in facts.pictures or i in facts.sizes for i in node.input[1:]):
        raise refuse(node, "what it pads with is computed from the picture")
    facts.padded[node.output[0]] = node
    return []


def _transposed_conv(node: Any, facts: Facts) -> list[Operator]:
    settings = facts.attributes(node)
    if any(i in facts.pictures or i in facts.sizes for i in node.input[1:]):
        raise refuse(node, "its weights are computed from the picture")
    if settings.get("auto_pad", b"NOTSET") != b"NOTSET" or "output_shape" in settings:
        raise refuse(node, "its padding is automatic; export it with numbers")
    kernel = facts.shape(node.input[1])
    if kernel is None or len(kernel) != 4:
        raise refuse(node, "its kernel is not two-dimensional, or of unknown size")
    stride = settings.get("strides", [1, 1])[0]
    top = settings.get("pads", [0, 0, 0, 0])[0]
    reach = (kernel[2] - 1) * settings.get("dilations", [1, 1])[0]
    if facts.growth(node.input[0], node.output[0], 2) != stride:
        raise refuse(node, f"its output is not {stride} times its input")
    # input row i adds to the output rows stride * i - top + (0 ... reach)
    window = Window(up=stride, before=max(0, reach + 1 - top - stride), after=top + stride - 1)
    template = type(node)()
    template.CopyFrom(node)
    if "pads" not in settings:
        template.attribute.append(facts.onnx.helper.make_attribute("pads", [0, 0, 0, 0]))
    return [Operator((template,), (node.input[0],), node.output[0], window, crops=True)]


def _batch_norm(node: Any, facts: Facts) -> list[Operator]:
    if facts.attributes(node).get("training_mode", 0) or len(node.output) > 1:
        raise refuse(node, "its statistics are of the whole picture")
    if any(i in facts.pictures or i in facts.sizes for i in node.input[1:]):
        raise refuse(node, "its statistics are computed from the picture")
    return [Operator((node,), (node.input[0],), node.output[0])]


def _resize(node: Any, facts: Facts) -> list[Operator]:
    settings = facts.attributes(node)
    source, output = node.input[0], node.output[0]
    rows, columns = (facts.growth(source, output, axis) for axis in (2, 3))
    if facts.growth(source, output, 1) != 1 or rows is None or columns is None:
        raise refuse(node, "its output is not in proportion to the picture")
    if rows.denominator > 1 or columns.denominator > 1:
        raise refuse(node, f"only whole factors are supported, not {rows} x {columns}")
    scales = facts.weights.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if scales is not None and any(float(s) != int(s) for s in scales):
        raise refuse(node, f"only whole factors are supported, not {' x '.join(map(str, scales))}")
    factor = int(rows)
    where = settings.get("coordinate_transformation_mode", b"half_pixel").decode()
    mode = settings.get("mode", b"nearest").decode()
    if mode == "nearest":
        rounding = settings.get("nearest_mode", b"round_prefer_floor").decode()
        if not all(_repeats(int(f), where, rounding) for f in (rows, columns)):
            raise refuse(node, f"nearest with {where} and {rounding} does not repeat pixels evenly")
        window = Window(up=factor, after=factor - 1)
    elif mode == "linear" and where in ("half_pixel", "pytorch_half_pixel"):
        reach = Window(up=factor, before=factor // 2, after=2 * factor - 1 - factor // 2)
        window = Window() if factor == 1 else reach
    else:
        raise refuse(node, f"mode {mode} with {where} is not supported")
    factors = np.array([1, 1, factor, int(columns)], np.float32)
    template = type(node)()
    template.CopyFrom(node)
    template.input[:] = [source, "", f"bands/{output}/scales"]
    for attribute in [a for a in template.attribute if a.name in ("axes", "keep_aspect_ratio_policy")]:
        template.attribute.remove(attribute)
    return [
        Operator(
            (template,),
            (source,),
            output,
            window,
            cheap=mode == "nearest",
            weights={f"bands/{output}/scales": factors},
        )
    ]


def _repeats(factor: int, where: str, rounding: str) -> bool:
    """Whether nearest by a whole factor gives each pixel `factor` times."""
    to_index: dict[str, Callable[[Fraction], int]] = {
        "floor": math.floor,
        "ceil": math.ceil,
        "round_prefer_floor": lambda x: math.ceil(x - Fraction(1, 2)),
        "round_prefer_ceil": lambda x: math.floor(x + Fraction(1, 2)),
    }
    half = Fraction(1, 2)
    centres = {"asymmetric": Fraction(0), "half_pixel": half, "pytorch_half_pixel": half}
    if where not in centres or rounding not in to_index:
        return False
    shift = centres[where]
    # the second pixel, where nothing is clamped to the picture
    places = ((i + shift) / factor - shift for i in range(factor, 2 * factor))
    return all(to_index[rounding](place) == 1 for place in places)


def _channels(node: Any, facts: Facts) -> list[Operator]:
    """Concat, along the channels."""
    if facts.attributes(node).get("axis") not in (1, -3):
        raise refuse(node, "it joins pictures along another axis than the channels")
    if any(i not in facts.pictures for i in node.input):
        raise refuse(node, "it joins a picture with something else")
    # Concat of Concat is taken apart: the inner ones would carry more rows than each reader needs
    flat = type(node)()
    flat.CopyFrom(node)
    flat.input[:] = [leaf for i in node.input for leaf in facts.joined.get(i, (i,))]
    facts.joined[node.output[0]] = tuple(flat.input)
    return [Operator((flat,), _pictures(flat, facts), node.output[0], cheap=True)]


def _slice(node: Any, facts: Facts) -> list[Operator]:
    axes = facts.weights.get(node.input[3]) if len(node.input) > 3 else None
    if axes is None or list(axes) not in ([1], [-3]):
        raise refuse(node, "it cuts another axis than the channels")
    if any(i and i not in facts.weights for i in node.input[1:]):
        raise refuse(node, "its bounds are computed")
    return [Operator((node,), (node.input[0],), node.output[0], cheap=True)]


def _split(node: Any, facts: Facts) -> list[Operator]:
    """One slice per output."""
    if facts.attributes(node).get("axis", 0) not in (1, -3):
        raise refuse(node, "it cuts another axis than the channels")
    operators, begin = [], 0
    for output in node.output:
        shape = facts.shape(output)
        if shape is None:
            raise refuse(node, f"the size of '{output}' is unknown")
        bounds = {
            f"bands/{output}/{name}": np.array([value], np.int64)
            for name, value in (("begin", begin), ("end", begin + shape[1]), ("axis", 1))
        }
        cut = facts.onnx.helper.make_node("Slice", [node.input[0], *bounds], [output])
        operators.append(Operator((cut,), (node.input[0],), output, cheap=True, weights=bounds))
        begin += shape[1]
    return operators


def _shuffle(node: Any, facts: Facts) -> list[Operator]:
    settings = facts.attributes(node)
    block = settings["blocksize"]
    grows = node.op_type == "DepthToSpace"
    window = Window(up=block, after=block - 1) if grows else Window(down=block)
    return [Operator((node,), (node.input[0],), node.output[0], window)]


def _reshape(node: Any, facts: Facts) -> list[Operator]:
    """Reshape - Transpose - Reshape that shuffles pixels into channels or back; or a Reshape of nothing."""
    helper = facts.onnx.helper
    if all(s[node.output[0]] == s[node.input[0]] for s in facts.shapes if node.output[0] in s):
        same = helper.make_node("Identity", [node.input[0]], [node.output[0]])
        return [Operator((same,), (node.input[0],), node.output[0], cheap=True)]
    source, wide = facts.shape(node.input[0]), facts.shape(node.output[0])
    chain = [node]
    for kind in ("Transpose", "Reshape"):
        following = facts.consumers.get(chain[-1].output[0], [])
        if len(following) != 1 or following[0].op_type != kind:
            raise refuse(node, _REASONS["Reshape"])
        chain += following
    output = chain[-1].output[0]
    result = facts.shape(output)
    order = tuple(facts.attributes(chain[1]).get("perm", ()))
    if source is None or wide is None or result is None or order not in _PERMUTATIONS:
        raise refuse(node, _REASONS["Reshape"])
    if (len(source), len(wide), len(result)) != (4, 6, 4):
        raise refuse(node, _REASONS["Reshape"])
    kind, channels = _PERMUTATIONS[order]
    n, c, h, w = source
    if max(h, result[2]) % min(h, result[2]) or (result[2] > h) != (kind == "DepthToSpace"):
        raise refuse(node, _REASONS["Reshape"])
    if kind == "DepthToSpace":
        block = result[2] // h
        inner = (c // block**2, block, block) if channels == "CRD" else (block, block, c // block**2)
        want, ends = (n, *inner, h, w), (n, c // block**2, h * block, w * block)
    else:
        block = h // result[2]
        want, ends = (n, c, h // block, block, w // block, block), (n, c * block**2, h // block, w // block)
    if wide != want or result != ends:
        raise refuse(node, _REASONS["Reshape"])
    absorbs = (chain[1].output[0], output)
    if kind == "DepthToSpace":
        made = helper.make_node(kind, [node.input[0]], [output], blocksize=block, mode=channels)
        window = Window(up=block, after=block - 1)
        return [Operator((made,), (node.input[0],), output, window, absorbs=absorbs)]
    # ONNX's own order of channels is (row, column, channel)
    inner_name, indices = f"bands/{output}/deep", f"bands/{output}/channels"
    if channels == "DCR":
        deep = helper.make_node(kind, [node.input[0]], [output], blocksize=block)
        return [Operator((deep,), (node.input[0],), output, Window(down=block), absorbs=absorbs)]
    deep = helper.make_node(kind, [node.input[0]], [inner_name], blocksize=block)
    places = np.arange(c * block**2).reshape(block**2, c).T.ravel().astype(np.int64)
    sort = helper.make_node("Gather", [inner_name, indices], [output], axis=1)
    return [
        Operator(
            (deep, sort),
            (node.input[0],),
            output,
            Window(down=block),
            weights={indices: places},
            absorbs=absorbs,
        )
    ]


def _identity(node: Any, facts: Facts) -> list[Operator]:
    return [Operator((node,), (node.input[0],), node.output[0], cheap=True)]


_READERS: dict[str, Callable[[Any, Facts], list[Operator]]] = {
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Pad": _pad,
    "ConvTranspose": _transposed_conv,
    "Resize": _resize,
    "Concat": _channels,
    "Slice": _slice,
    "Split": _split,
    "DepthToSpace": _shuffle,
    "SpaceToDepth": _shuffle,
    "Reshape": _reshape,
    "Identity": _identity,
}
