"""From a model with statistics of the whole picture to stages of tiles, which end where all of it is needed.

The mean of a normalisation depends on every row, so no tile can go through the whole model. But what comes
before it can be computed tile by tile, and once it is known so can what comes after it, up to the next one. A
*stage* is the part of a model between two such values: a graph that reads some rows of tensors stored before,
writes rows of others, and gives a value for each row of what is to be gathered over all of them.

Tiles are rows over the full width, so only rows need care. Each operator says which rows it reads for those
it gives, from the sizes at hand; what differs from tile to tile is an input of the graph: how many rows to
pad with at the picture's ends, which rows to cut off, between which to interpolate. So there is one graph for
any tile of any picture.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from anysize.backends.base import Array, Model
from anysize.backends.errors import NotStreamable
from anysize.backends.spec import Dim, ModelSpec, TensorSpec
from anysize.exporters.cost import infer_shapes, picture_graph
from anysize.exporters.steps import Gathered, Port, Reader, Rows, Shape, Step

#: rows beyond the least, and tiles they are cut in, on which it is seen who reads fewer rows than there are
_SAMPLES, _COUNTS = (16, 37, 58, 83, 500, 2003), (1, 2, 3, 5, 37)
_PICTURE: Port = ((1, None, None, None), np.float32)


@dataclass(frozen=True)
class Stage:
    """A graph on rows. It reads `stored` tensors and `known` values, writes `writes` and gives `gathers`."""

    model: Model
    steps: tuple[Step, ...]
    stored: tuple[str, ...]
    known: tuple[str, ...]
    writes: tuple[str, ...]
    gathers: tuple[Gathered, ...]
    cuts: frozenset[tuple[str, str]]  # (who reads, tensor): reads fewer rows than there are

    @property
    def made(self) -> tuple[str, ...]:
        """The tensors whose rows a tile of it is about."""
        return (*self.writes, *(gather.source for gather in self.gathers))

    def feeds(
        self, wanted: Mapping[str, Rows], shapes: Mapping[str, Shape]
    ) -> tuple[dict[str, Rows], dict[str, Array]]:
        """For rows of what it writes or gathers: those of stored tensors to read, and its other inputs."""
        have, needs, feeds = trace(self.steps, self.writes, self.gathers, wanted, shapes)
        for (who, name), (first, last) in needs.items():
            start, end = have[name]
            if (who, name) in self.cuts:
                feeds[_cut(who, name, "first")] = np.array([first - start], np.int64)
                feeds[_cut(who, name, "last")] = np.array([last - start], np.int64)
            elif (first, last) != (start, end):
                text = f"'{who}' would read rows {first} to {last} of {start} to {end} of '{name}'"
                raise NotStreamable(text)
        return {name: have[name] for name in self.stored}, feeds


def trace(
    steps: Sequence[Step],
    writes: Iterable[str],
    gathers: Iterable[Gathered],
    wanted: Mapping[str, Rows],
    shapes: Mapping[str, Shape],
) -> tuple[dict[str, Rows], dict[tuple[str, str], Rows], dict[str, Array]]:
    """Which rows of each tensor there must be, who reads which of them, and the operators' own inputs."""
    needs: dict[tuple[str, str], Rows] = {("out", name): wanted[name] for name in writes}
    needs |= {(g.name, g.source): wanted[g.source] for g in gathers}
    readers: dict[str, list[Rows]] = defaultdict(list)
    for (_, name), rows in needs.items():
        readers[name].append(rows)
    have: dict[str, Rows] = {}
    feeds: dict[str, Array] = {}
    for step in reversed(steps):
        rows = _union(readers[step.output])
        read, have[step.output], own = step.reads(rows, shapes[step.sources[0]], shapes[step.output])
        feeds |= own
        for source in step.sources:
            needs[step.output, source] = read
            readers[source].append(read)
    for name, several in readers.items():
        have.setdefault(name, _union(several))
    return have, needs, feeds


def _union(rows: Iterable[Rows]) -> Rows:
    firsts, lasts = zip(*rows, strict=True)
    return min(firsts), max(lasts)


def _cut(reader: str, name: str, end: str) -> str:
    return f"stages/{reader}/{name}/{end}"


@dataclass(frozen=True)
class StagedModel:
    """Stages in order. `shapes` gives the shape of every tensor for a picture of (height, width)."""

    stages: tuple[Stage, ...]
    input: str
    output: str
    shapes: Callable[[int, int], dict[str, Shape]]


def staged_model(model: Model) -> StagedModel:
    """Take an ONNX model (its bytes and contract are all that is read) apart into stages.

    Raises `NotStreamable` naming the operator and the reason, `BackendUnavailableError` without onnx.
    """
    onnx, proto = picture_graph(model, "stages", 18)
    spec = model.spec
    assert spec is not None
    if any(name.startswith("stages/") for node in proto.graph.node for name in node.output):
        raise NotStreamable("the model's tensors are named as those of stages are: 'stages/...'")
    reader = Reader(onnx, proto, spec)
    output = spec.outputs[0].name
    if output not in reader.steps:
        raise NotStreamable(f"the output '{output}' is not computed from the picture by itself")

    def shapes(height: int, width: int) -> dict[str, Shape]:
        sizes = {name: dim.min for name, dim in spec.dims.items()}
        axes = [size.name for size in spec.inputs[0].shape[2:] if isinstance(size, Dim)]
        sizes |= dict(zip(axes, (height, width), strict=True))
        known = infer_shapes(proto, spec.input_shapes(sizes))
        found: dict[str, Shape] = {name: shape for name, (shape, _) in known.items() if len(shape) == 4}
        want = spec.output_shapes(sizes)[output]
        if found.get(output) != want:
            raise NotStreamable(f"'{output}' would come to {found.get(output)}, and the contract says {want}")
        return found

    return StagedModel(_Cutter(reader, spec, shapes).stages(), spec.inputs[0].name, output, shapes)


class _Cutter:
    def __init__(
        self, reader: Reader, spec: ModelSpec, shapes: Callable[[int, int], dict[str, Shape]]
    ) -> None:
        self.reader, self.spec = reader, spec
        dims = [size for size in spec.inputs[0].shape[2:] if isinstance(size, Dim)]
        self.samples = [shapes(*(dim.floor(dim.min + extra) for dim in dims)) for extra in _SAMPLES]
        self.levels: dict[str, int] = {spec.inputs[0].name: 0}
        for node in reader.proto.graph.node:  # in order, so that what is read is there
            read = [self.levels[i] for i in node.input if i in self.levels]
            for name in node.output:
                if name in reader.gathered:
                    self.levels[name] = self.levels[reader.gathered[name].source] + 1
                elif name in reader.steps or name in reader.global_nodes:
                    self.levels[name] = max(read, default=0)

    def stages(self) -> tuple[Stage, ...]:
        reader, output = self.reader, self.spec.outputs[0].name
        last = self.levels[output]
        kept: dict[int, list[str]] = defaultdict(list)  # tensors that later stages read
        kept[last].append(output)
        plans = []
        for level in range(last, -1, -1):
            gathers = [g for g in reader.gathered.values() if self.levels[g.source] == level]
            writes = list(dict.fromkeys(kept[level]))
            steps, stored = self._behind([*writes, *(g.source for g in gathers)], level)
            for name in (*stored, *writes):
                if reader.shapes[name][1] != reader.onnx.TensorProto.FLOAT:
                    raise NotStreamable(f"tensor '{name}' is not of 32-bit floats, but has to be stored")
            for name in stored:
                if name != self.spec.inputs[0].name:
                    kept[self.levels[name]].append(name)
            plans.append((steps, stored, writes, gathers))
        return tuple(self._stage(*plan) for plan in reversed(plans))

    def _behind(self, names: Sequence[str], level: int) -> tuple[list[Step], list[str]]:
        """The steps that lead to these tensors within a level, and the tensors of earlier ones they read.

        What is cheap is computed again rather than stored.
        """
        wanted: set[str] = set()
        stored: dict[str, None] = {}
        waiting = list(names)
        while waiting:
            name = waiting.pop()
            step = self.reader.steps.get(name)
            if step is None or (self.levels[name] < level and not step.cheap):
                stored[name] = None
            elif name not in wanted:
                wanted.add(name)
                waiting += step.sources
        order = [step for name, step in self.reader.steps.items() if name in wanted]
        return order, list(stored)

    def _stage(
        self, steps: list[Step], stored: list[str], writes: list[str], gathers: list[Gathered]
    ) -> Stage:
        cuts = self._cuts(steps, writes, gathers)
        helper, reader = self.reader.onnx.helper, self.reader
        nodes: list[Any] = []
        ports: dict[str, Port] = dict.fromkeys(stored, _PICTURE)

        def rows_of(name: str, who: str) -> str:
            """The rows of a tensor that `who` reads."""
            if (who, name) not in cuts:
                return name
            bounds = [_cut(who, name, end) for end in ("first", "last")]
            ports.update(dict.fromkeys(bounds, ((1,), np.int64)))
            made = f"stages/{who}/{name}/rows"
            nodes.append(helper.make_node("Slice", [name, *bounds, "stages/two"], [made]))
            return made

        known: dict[str, None] = {}
        values: dict[str, Any] = {}

        def value(name: str) -> None:
            """What is needed for a value of the whole picture, behind what was gathered."""
            if name in reader.gathered:
                known[name] = None
            elif name in reader.global_nodes and name not in values:
                node = reader.global_nodes[name]
                for other in node.input:
                    value(other)
                values.update(dict.fromkeys(node.output, node))

        for step in steps:
            names = {source: rows_of(source, step.output) for source in step.sources}
            ports |= step.ports
            for template in step.nodes:
                node = reader.copy(template)
                node.input[:] = [names.get(i, i) for i in template.input]
                for name in node.input:
                    value(name)
                nodes.append(node)
        results = []
        for name in writes:
            results.append(f"stages/out/{name}")
            nodes.append(helper.make_node("Identity", [rows_of(name, "out")], [results[-1]]))
        for gather in gathers:
            results.append(f"stages/rows/{gather.name}")
            source = rows_of(gather.source, gather.name)
            made = source
            for template in gather.nodes:
                node = reader.copy(template)
                node.input[:] = [source if i == gather.source else i for i in template.input]
                made = node.output[0]
                nodes.append(node)
            nodes.append(helper.make_node("Identity", [made], [results[-1]]))
        ports |= dict.fromkeys(known, _PICTURE)
        model = self._model([*{id(node): node for node in values.values()}.values(), *nodes], ports, results)
        return Stage(model, tuple(steps), tuple(stored), tuple(known), tuple(writes), tuple(gathers), cuts)

    def _cuts(
        self, steps: Sequence[Step], writes: Sequence[str], gathers: Sequence[Gathered]
    ) -> frozenset[tuple[str, str]]:
        """Who reads fewer rows of a tensor than there are: seen on tiles of several pictures.

        A stage asks again at each tile, so a reader that these did not show is an error and not a wrong row.
        """
        cuts = set()
        for shapes in self.samples:
            made = [*writes, *(g.source for g in gathers)]
            least = min(shapes[name][2] for name in made)
            for count in sorted({min(count, least) for count in _COUNTS}):
                for i in range(count):
                    wanted = tile(shapes, made, i, count)
                    with contextlib.suppress(NotStreamable):  # of this size: it is asked again for each
                        have, needs, _ = trace(steps, writes, gathers, wanted, shapes)
                        cuts |= {(who, name) for (who, name), rows in needs.items() if rows != have[name]}
        return frozenset(cuts)

    def _model(self, nodes: list[Any], ports: Mapping[str, Port], results: list[str]) -> Model:
        onnx, proto = self.reader.onnx, self.reader.proto
        helper, kinds = onnx.helper, onnx.helper.np_dtype_to_tensor_dtype
        two = onnx.numpy_helper.from_array(np.array([2], np.int64), "stages/two")
        fixed = self._fixed(nodes)
        used = {i for node in (*fixed, *nodes) for i in node.input}
        weights = [w for w in (*proto.graph.initializer, two) if w.name in used]
        inputs = [
            helper.make_tensor_value_info(name, kinds(np.dtype(kind)), shape)
            for name, (shape, kind) in ports.items()
        ]
        outputs = [helper.make_tensor_value_info(n, kinds(np.dtype(np.float32)), [None] * 4) for n in results]
        graph = helper.make_graph([*fixed, *nodes], f"{proto.graph.name}.stage", inputs, outputs, weights)
        made = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
        free = tuple(Dim(str(axis)) for axis in range(4))
        spec = ModelSpec(
            tuple(TensorSpec(n, np.dtype(kind), free[: len(shape)]) for n, (shape, kind) in ports.items()),
            tuple(TensorSpec(n, np.dtype(np.float32), free) for n in results),
        )
        return Model("onnx", made.SerializeToString(), spec)

    def _fixed(self, nodes: list[Any]) -> list[Any]:
        """The nodes on constants that these need, in order."""
        used = {i for node in nodes for i in node.input}
        chosen = []
        for node in reversed(self.reader.fixed):
            if used & set(node.output):
                chosen.append(node)
                used.update(node.input)
        return chosen[::-1]


def tile(shapes: Mapping[str, Shape], names: Iterable[str], index: int, count: int) -> dict[str, Rows]:
    """The rows of each tensor that one of `count` tiles covers: all tiles together every row once."""
    rows = {name: shapes[name][2] for name in names}
    return {name: (n * index // count, n * (index + 1) // count) for name, n in rows.items()}
