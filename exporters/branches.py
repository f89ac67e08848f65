"""Sizes of the contract that break a condition of a trace.

A trace is of one size. Where the module's code, or an operator's, asks about a size (`if width >= 3000`),
PyTorch keeps what held as a condition. Here they are tried over the sizes of the contract: where one does not
hold, what was exported has to be held against the module. It may well be right: many conditions are those of
PyTorch's own operators. Conditions tell of the traced way alone, and not of all that code does with a size;
`exporters/replay.py` sees what the module does. These see how operators are taken apart for ONNX.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.spec import ModelSpec
from anysize.exporters.probing import batch_axis

log = logging.getLogger("anysize")

#: sides that are tried: all small ones, then those around powers of two and half as much again
_SIDES = (
    *range(1, 41),
    *(side + d for k in range(5, 15) for side in (2**k, 3 * 2 ** (k - 1)) for d in (-1, 0, 1)),
)
#: positions beyond which nothing is run, of all pictures together
_MOST = 2**22
#: as PyTorch calls the sizes of inputs
_SYMBOL = re.compile(r"\bs\d+\b")
#: pairs of sides that are tried together
_PAIRS = 2000


#: sizes to hold an export against its module at, and why
Doubts = Sequence[tuple[dict[str, int], str]]


def breaking_sizes(program: Any, spec: ModelSpec, fits: Callable[[dict[str, int]], bool]) -> Doubts:
    """Few and small sizes of the contract that break each condition of an export.

    `program`: a `torch.export.ExportedProgram`, whose inputs are the contract's in order. `fits`: whether
    sizes are small enough to be run. A condition that only others break (operators ask about 2^31 values) is
    left out, and logged.
    """
    conditions, symbols = _conditions(program, spec)
    if not conditions:
        return []
    tried = sorted(_tried(spec, conditions), key=lambda sizes: (is_thin(spec, sizes), positions(sizes)))
    shapes = [spec.input_shapes(sizes) for sizes in tried]
    values = {
        symbol: np.array([shape[name][axis] for shape in shapes]) for symbol, (name, axis) in symbols.items()
    }
    small = np.array([positions(sizes) <= _MOST for sizes in tried])
    chosen: dict[int, str] = {}
    before, left = np.ones(len(tried), bool), _MOST
    for condition in conditions:
        holds = _holds(condition, values, len(tried))
        text = _SYMBOL.sub(lambda s: "{}.shape[{}]".format(*symbols[s[0]]), str(condition))
        # code asks in order, and the next question only where the answers were those of the trace
        for broken in (~holds & before & small, ~holds & small, ~holds):
            if broken.any():
                first = int(np.flatnonzero(broken)[0])
                need = 0 if first in chosen else positions(tried[first])
                if need <= left and fits(tried[first]):
                    chosen.setdefault(first, f", where the trace's {text} does not hold")
                    left -= need
                else:
                    log.info("the trace holds only where %s; larger pictures were not tried", text)
                break
        before &= holds
    return [(tried[i], note) for i, note in chosen.items()]


def guards(program: Any) -> list[Any]:
    """The conditions of an export, as SymPy's expressions."""
    sizes = [n for node in program.graph.nodes for n in getattr(node.meta.get("val"), "shape", ())]
    environment = next((size.node.shape_env for size in sizes if not isinstance(size, int)), None)
    return [] if environment is None else [guard.expr for guard in environment.guards]


def _conditions(program: Any, spec: ModelSpec) -> tuple[list[Any], dict[str, tuple[str, int]]]:
    """SymPy's expressions, and of which axis of which input each of their symbols is the size."""
    symbols: dict[str, tuple[str, int]] = {}
    tensors = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder"]
    for tensor, wanted in zip(tensors[-len(spec.inputs) :], spec.inputs, strict=True):
        for axis, size in enumerate(tensor.shape):
            if not isinstance(size, int) and size.node.expr.is_symbol:
                symbols.setdefault(str(size.node.expr), (wanted.name, axis))
    found = guards(program)
    return [one for one in found if {str(symbol) for symbol in one.free_symbols} <= symbols.keys()], symbols


def _tried(spec: ModelSpec, conditions: list[Any]) -> Iterator[dict[str, int]]:
    numbers = {int(n) for one in conditions for n in one.atoms() if n.is_Integer and 0 < n < _MOST}
    sides = sorted({*_SIDES, *(n + d for n in numbers for d in (-1, 0, 1))})
    batch = batch_axis(spec)
    # at the least sizes normalisations have next to nothing to normalise, and many pictures of it show noise
    base = {n: dim.min if n == batch else dim.ceil(dim.min + 6) for n, dim in spec.dims.items()}
    valid = {name: [s for s in sides if dim.allows(s)] for name, dim in spec.dims.items()}
    for name, own in valid.items():
        for side in own:
            yield base | {name: side}
    rng = np.random.default_rng(0)
    for _ in range(_PAIRS):
        yield base | {
            name: own[int(len(own) * rng.random() ** 2)]
            for name, own in valid.items()
            if own and name != batch
        }


def is_thin(spec: ModelSpec, sizes: Mapping[str, int]) -> bool:
    """Whether a side is so small that normalisations, and what acts along it, have next to nothing to do."""
    batch = batch_axis(spec)
    return any(sizes[name] < dim.ceil(dim.min + 6) for name, dim in spec.dims.items() if name != batch)


def positions(sizes: Mapping[str, int]) -> int:
    """How many there are of them, in all pictures together."""
    return int(np.prod([*sizes.values()], dtype=np.int64))


def _holds(condition: Any, values: Mapping[str, Array], count: int) -> Array:
    """At which of so many sizes; everywhere where SymPy's text cannot be computed by NumPy."""
    names = {
        "Mod": np.mod,
        "PythonMod": np.mod,
        "FloorDiv": np.floor_divide,
        "CleanDiv": np.floor_divide,
        "IntTrueDiv": np.true_divide,
        "FloatTrueDiv": np.true_divide,
        "PowByNatural": np.power,
        "ToFloat": np.float64,
        "TruncToInt": np.trunc,
        "FloorToInt": np.floor,
        "CeilToInt": np.ceil,
        "Max": lambda *given: np.maximum.reduce(np.broadcast_arrays(*given)),
        "Min": lambda *given: np.minimum.reduce(np.broadcast_arrays(*given)),
        "Eq": np.equal,
        "Ne": np.not_equal,
        "Abs": np.abs,
        "FloatPow": np.float_power,
        "RoundToInt": np.round,
        "RoundDecimal": np.round,
        "CeilDiv": lambda a, b: -np.floor_divide(-a, b),
        "OpaqueUnaryFn_sqrt": np.sqrt,
        "OpaqueUnaryFn_log2": np.log2,
    }
    try:
        with np.errstate(all="ignore"):
            found = eval(str(condition), {"__builtins__": {}, **names}, dict(values))
    except Exception as error:
        log.debug("a condition of the trace is not understood: %s (%s)", condition, error)
        return np.ones(count, bool)
    return np.broadcast_to(np.asarray(found, bool), count)
