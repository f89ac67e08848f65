"""Where does an engine go wrong? The first operator of a graph whose result departs from the reference."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends import Backend, EngineOptions, Model, ModelSpec, available_backends, get_backend
from anysize.backends.base import Array, Feeds, Shapes
from anysize.backends.errors import (
    AnysizeError,
    BackendUnavailableError,
    ExecutionError,
    ExportError,
    ModelLoadError,
    OptionError,
    TimedOut,
)
from anysize.exporters.exporting import ONE_FILE, eager, random_feeds
from anysize.limit import in_time
from anysize.parity import check_atol, chosen_sizes
from anysize.sources import Source, as_graph

#: inputs at each size: a wrong operator may not show on one
_SEEDS = 2
#: where a limit of time ended
_OPENING = "while the model is opened"

_SCRIPT = """# One operator of {model!r}: {backend} {version} departs from the reference by {error}.

from pathlib import Path

import numpy
{imports}

here = Path(__file__).parent
arrays = dict(numpy.load(here / "inputs.npz"))
want = arrays.pop("expected").astype(numpy.float64)
{run}
got = numpy.asarray(got, numpy.float64)
print("shapes:", got.shape, want.shape)
if got.shape == want.shape:
    same = (got == want) | (numpy.isnan(got) & numpy.isnan(want))
    print("largest difference:", numpy.where(same, 0, abs(got - want)).max(initial=0))
"""
#: by engine: what a script imports, and how it gets the operator's result
_RUNS = {
    "onnxruntime": (
        "import onnxruntime",
        'session = onnxruntime.InferenceSession(here / "operator.onnx", providers=["CPUExecutionProvider"])\n'
        "got = session.run(None, arrays)[{which}]",
    ),
    "openvino": (
        "import openvino",
        'settings = {{"INFERENCE_PRECISION_HINT": "{precision}"}}\n'
        'program = openvino.Core().compile_model(here / "operator.onnx", "CPU", settings)\n'
        "got = program(arrays)[{which}]",
    ),
}
_ANY_RUN = (
    "from anysize.backends import EngineOptions, Model, get_backend",
    'model = Model("onnx", (here / "operator.onnx").read_bytes())\n'
    'program = get_backend("{backend}").compile(model, None, EngineOptions("{precision}"))\n'
    "got = list(program.run(arrays).values())[{which}]",
)


@dataclass(frozen=True)
class Departure:
    """Where one engine departs first.

    `operator`: its ONNX type; `node`: its name; `place`: its number, from 1, of `operators`; `tensor`: the
    output that departs; `seen`: on how many of the inputs it does. `max_abs` (None: its shape is another, or
    it does not run), `allowed` and `worst_at`: on the input with the largest difference, which has `size`.
    `alone`: the difference of this operator run by itself on the reference's inputs (None: the engine
    cannot). `fused`: it shows only while the engine may merge operators. `edited`: how the operator differs
    from the reference file's. `folder`: where the operator, its inputs and a script were saved.
    """

    operator: str
    node: str
    place: int
    tensor: str
    seen: int
    size: dict[str, int]
    max_abs: float | None
    allowed: float
    worst_at: str
    alone: float | None
    fused: bool
    edited: str
    folder: str | None


@dataclass(frozen=True)
class BisectRow:
    """One engine: where it departs, or None; `error` where it cannot run the graph at all."""

    backend: str
    precision: str
    departure: Departure | None
    error: str | None = None


@dataclass(frozen=True)
class BisectReport:
    """All engines; `atol` is relative to max(1, max|reference|), tensor by tensor."""

    reference: str
    atol: float
    operators: int
    inputs: int
    rows: tuple[BisectRow, ...]

    @property
    def ok(self) -> bool:
        return all(row.departure is None and row.error is None for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "ok": self.ok}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [f"reference: {self.reference}, tolerance {self.atol:g}, {self.inputs} inputs"]
        for row in self.rows:
            who, found = f"{row.backend} {row.precision}", row.departure
            if found is None:
                lines.append(f"{who}: {row.error or f'all {self.operators} operators agree'}")
                continue
            lines += [
                f"{who}: departs first at {found.operator} '{found.node}', operator {found.place} of "
                f"{self.operators}, on {found.seen} of {self.inputs} inputs",
                f"  {found.worst_at}"
                if found.max_abs is None
                else f"  off by {found.max_abs:.3g}, allowed {found.allowed:.3g}; worst at {found.worst_at}",
            ]
            if found.fused:
                lines.append("  only while the engine may merge operators: each result by itself agrees")
            elif found.alone is not None:
                lines.append(f"  by itself, on the reference's inputs, it is off by {found.alone:.3g}")
            if found.edited:
                lines.append(f"  it is not the reference's: {found.edited}")
            if found.alone is not None and found.alone <= found.allowed and not found.fused:
                lines.append("  so what it is given differs already, in what cannot be compared here")
            if found.folder:
                lines.append(f"  saved with its inputs: {Path(found.folder) / 'reproduce.py'}")
        all_of = [row.departure for row in self.rows if row.departure is not None]
        if len(all_of) > 1 and not any(d.edited for d in all_of) and len({d.tensor for d in all_of}) == 1:
            lines.append(
                "engines depart at the same operator: ONNX's own implementation may be the wrong one"
            )
        return "\n".join(lines)


def bisect(
    source: Source,
    *,
    reference: Source | None = None,
    backends: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    precision: str = "f32",
    atol: float = 1e-4,
    folder: str | os.PathLike[str] | None = None,
) -> BisectReport:
    """Find the first operator at which each engine departs from the reference, over several inputs.

    `source`: an ONNX file, or weights or a module, which are converted. The reference is ONNX's own
    implementation of the operators, in NumPy; of `reference`, where that is given, such as the file that
    `source` was edited from: their tensors pair up by name. `backends`: names, by default all installed that
    take ONNX. `sizes`: (height, width), by default those that an export is verified at; two inputs of seeded
    noise for each. `precision`: "f32" or "bf16". `folder`: where to save, in a folder for each engine that
    departs, the operator, the reference's inputs for it, and a script that needs the engine and NumPy alone.

    Raises `ModelLoadError`, `OptionError`, `BackendUnavailableError` (no onnx), `ExportError`,
    and `TimedOut` within a `time_limit`.
    """
    check_atol(atol)
    home = _folder(folder)
    onnx = _onnx()
    engines = _engines(backends, precision)
    graph, module = in_time(partial(_first_of, engines, source), _OPENING)
    assert graph.spec is not None
    true = graph if reference is None else in_time(partial(_first_of, engines, reference), _OPENING)[0]
    module = None if reference is not None else module  # what is compared is the two graphs
    search = _Search(onnx, _proto(onnx, graph), _proto(onnx, true), graph.spec, atol)
    cases = [
        (size, random_feeds(graph.spec, size, seed))
        for size in chosen_sizes(graph.spec, sizes)
        for seed in range(_SEEDS)
    ]
    search.refer(cases, None if module is None else eager(module, [t.name for t in graph.spec.inputs]))
    name = source if isinstance(source, (str, os.PathLike)) else type(source).__name__
    rows = []
    for engine in engines:
        try:
            found = search.departure(engine, precision)
        except TimedOut:
            raise
        except AnysizeError as error:
            problem = f"cannot run the graph: {_first_line(error)}"
            rows.append(BisectRow(engine.name, precision, None, problem))
            continue
        if found is not None and home is not None:
            found = search.save(found, home / engine.name, engine, precision, Path(name).name)
        rows.append(BisectRow(engine.name, precision, None if found is None else found.report))
    text = "ONNX in NumPy" + ("" if reference is None else f" of {reference}")
    return BisectReport(text, atol, len(search.nodes), len(cases), tuple(rows))


def _folder(folder: object) -> Path | None:
    """Raises `OptionError` before any work, for what could not hold the results."""
    if folder is None:
        return None
    try:
        path = Path(folder)  # type: ignore[arg-type]
        with suppress(FileNotFoundError), os.scandir(path):
            pass
    except (TypeError, ValueError, OSError) as error:
        raise OptionError(f"folder {folder!r} cannot be written: {error}") from error
    return path


def _engines(names: Sequence[str] | None, precision: str) -> list[Backend]:
    """Those named, or all installed that run ONNX graphs in this precision. Raises `OptionError`."""
    chosen, problem = [], None
    for name in available_backends() if names is None else names:
        engine = get_backend(name)
        try:
            engine.check(EngineOptions(precision))
            if "onnx" not in engine.formats:
                raise OptionError(f"{name}: runs no ONNX graphs, whose operators could be told apart")
            chosen.append(engine)
        except OptionError as error:
            if names is not None:
                raise
            problem = problem or error
    if not chosen:
        raise problem or OptionError("no engine that runs ONNX graphs is named, or installed")
    return chosen


def _first_of(engines: Sequence[Backend], source: Source) -> tuple[Model, Any]:
    """As a graph, by the first engine that can read it: that others cannot is what is asked."""
    problem: AnysizeError | None = None
    for engine in engines:
        try:
            return as_graph(source, engine)
        except AnysizeError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def _run(
    engine: Backend, model: Model, shapes: Shapes | None, precision: str, feeds: Feeds
) -> dict[str, Array]:
    """One run of a program made for it. Raises what the engine does, and `TimedOut`."""

    def run() -> dict[str, Array]:
        with closing(engine.compile(model, shapes, EngineOptions(precision))) as program:
            return program.run(feeds)

    return in_time(run, f"in a run of {engine.name}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _taken(node: Any) -> list[str]:
    """The tensors that an operator reads, those of the graphs within it that come from around it too."""
    found = dict.fromkeys(filter(None, node.input))
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs):
            own = {value.name for value in (*graph.input, *graph.initializer)}
            own.update(name for inner in graph.node for name in inner.output)
            for inner in graph.node:
                found.update(dict.fromkeys(name for name in _taken(inner) if name not in own))
            found.update(dict.fromkeys(v.name for v in graph.output if v.name not in own))
    return list(found)


def _onnx() -> Any:
    try:
        import onnx
        import onnx.reference
    except ImportError as error:
        raise BackendUnavailableError(
            f'this needs onnx: pip install "anysize[export]" ({error})', name="onnx"
        ) from error
    return onnx


def _proto(onnx: Any, model: Model) -> Any:
    try:
        proto = onnx.load(model.data) if isinstance(model.data, Path) else onnx.load_from_string(model.data)
    except Exception as error:  # protobuf's errors share no public base
        raise ModelLoadError(f"not a readable ONNX graph: {error}") from error
    if proto.ByteSize() >= ONE_FILE:
        raise OptionError("this model is too large to be taken apart in memory")
    return proto


@dataclass(frozen=True)
class _Found:
    """A departure with what saving it takes."""

    report: Departure
    model: bytes
    inputs: dict[str, Array]
    expected: Array
    which: int


@dataclass(frozen=True)
class _Case:
    """One input: its sizes, the graph's inputs, and every tensor as the reference has it."""

    size: dict[str, int]
    feeds: Feeds
    values: Mapping[str, Array]


@dataclass(frozen=True)
class _Problem:
    """The largest difference (infinite: no numbers to compare), what is allowed, where it is, on what."""

    error: float
    allowed: float
    where: str
    case: _Case


class _Search:
    def __init__(self, onnx: Any, proto: Any, true: Any, spec: ModelSpec, atol: float) -> None:
        self.onnx, self.proto, self.true, self.spec, self.atol = onnx, proto, true, spec, atol
        self.nodes = list(proto.graph.node)
        self.cases: list[_Case] = []
        #: tensors that can be held against the reference's, and the number of the operator that gives them
        self.places: dict[str, int] = {}

    def refer(self, cases: Sequence[tuple[dict[str, int], Feeds]], module: Callable[..., Any] | None) -> None:
        """Run the reference, and hold its results against PyTorch's where there is a module.

        Raises `ModelLoadError` for an operator that ONNX's implementation lacks, `ExportError` where the
        conversion differs from the module.
        """
        for size, feeds in cases:
            self.cases.append(_Case(size, feeds, self.evaluated(self.true, feeds, "the reference")))
        for case in self.cases if module is not None else ():
            assert module is not None
            results = in_time(partial(module, case.feeds), "in PyTorch's run")
            for value, got in zip(self.true.graph.output, results.values(), strict=True):
                if (problem := self.differ(got, case, value.name)) is not None:
                    raise ExportError(f"the converted graph is not what PyTorch computes: {problem.where}")
        known = self.cases[0].values
        for place, node in enumerate(self.nodes):
            for name in node.output:
                if name and isinstance(known.get(name), np.ndarray) and known[name].dtype.kind in "fiub":
                    self.places[name] = place
        if not self.places:
            raise OptionError("the reference has no tensor of the same name; take the file that was edited")

    def evaluated(self, proto: Any, feeds: Feeds, what: str) -> dict[str, Array]:
        """Every tensor of a graph, by ONNX's own implementation. Raises `ModelLoadError`."""
        initial = {tensor.name for tensor in proto.graph.initializer}
        names = [value.name for value in proto.graph.input if value.name not in initial]
        if len(names) != len(feeds):
            raise ModelLoadError(f"{what} takes {', '.join(names)}; the contract says {', '.join(feeds)}")
        given = feeds if set(names) == set(feeds) else dict(zip(names, feeds.values(), strict=True))
        try:
            evaluator = self.onnx.reference.ReferenceEvaluator(proto)
            run = partial(evaluator.run, None, given, intermediate=True)
            values: dict[str, Array] = in_time(run, f"in the run of {what} by ONNX's own implementation")
        except TimedOut:
            raise
        except Exception as error:  # what it lacks and what it cannot do have classes of its own
            reason = f"ONNX's own implementation cannot run {what}: {_first_line(error)}"
            raise ModelLoadError(reason) from error
        return values

    def differ(self, got: Array, case: _Case, tensor: str) -> _Problem | None:
        """What is wrong with an engine's result; None where that is within the tolerance."""
        want = case.values[tensor]
        if got.shape != want.shape:
            return _Problem(np.inf, 0.0, f"{tensor}: its shape is {got.shape}, not {want.shape}", case)
        if not want.size:
            return None
        a, b = got.astype(np.float64), want.astype(np.float64)
        with np.errstate(invalid="ignore"):
            error = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        allowed = self.atol * max(1.0, float(np.abs(b[np.isfinite(b)]).max(initial=0.0)))
        allowed = allowed if want.dtype.kind == "f" else 0.0
        index = np.unravel_index(int(error.argmax()), error.shape)  # NaN counts as the largest
        if error[index] <= allowed:
            return None
        place = f"[{', '.join(map(str, index))}]: {a[index]:.6g}, not {b[index]:.6g}"
        return _Problem(float(error[index]), allowed, f"{tensor}{place}", case)

    # -- running graphs

    def run(self, engine: Backend, precision: str, proto: Any, case: _Case) -> dict[str, Array]:
        """Raises `ExecutionError` for whatever the engine raises."""
        shapes = self.spec.input_shapes(case.size) if engine.prefers_static else None
        model = Model("onnx", proto.SerializeToString())
        try:
            return _run(engine, model, shapes, precision, case.feeds)
        except TimedOut:
            raise
        except Exception as error:
            text = getattr(error, "message", None) or _first_line(error)
            raise ExecutionError(text, backend=engine.name, shape=case.size) from error

    def showing(self, tensors: Sequence[str], last: int | None = None) -> Any:
        """The graph with these tensors as outputs too; of its first operators alone, up to number `last`."""
        proto = self.onnx.ModelProto()
        proto.CopyFrom(self.proto)
        if last is not None:
            del proto.graph.node[last + 1 :], proto.graph.output[:]
        shown = {value.name for value in proto.graph.output}
        proto.graph.output.extend(self.onnx.ValueInfoProto(name=n) for n in tensors if n not in shown)
        return proto

    # -- looking

    def departure(self, engine: Backend, precision: str) -> _Found | None:
        seen: dict[str, list[_Problem]] = {}
        shown = self.showing(list(self.places))
        wrong: list[_Case] = []
        try:
            for case in self.cases:
                results = self.run(engine, precision, shown, case)
                for name in self.places:
                    if (problem := self.differ(results[name], case, name)) is not None:
                        seen.setdefault(name, []).append(problem)
                results = self.run(engine, precision, self.proto, case)
                if any(self.differ(results[n], case, n) for n in results if n in self.places):
                    wrong.append(case)
        except ExecutionError:  # it cannot run the graph
            found = self.by_halves(engine, precision, self.cases, fused=False)
            if found is None:
                raise
            return found
        # whole numbers depart where a tie was rounded, too, or an engine clips a huge one; that counts where
        # an operator that agrees by itself departs because of it
        results_of = {value.name for value in self.proto.graph.output}
        telling = [n for n in seen if n in results_of or self.cases[0].values[n].dtype.kind == "f"]
        if not telling:
            return self.by_halves(engine, precision, wrong, fused=True) if wrong else None
        while True:
            tensor = min(telling, key=lambda name: self.places[name])
            result = self.found(engine, precision, tensor, seen[tensor], fused=False)
            alone = result.report.alone
            telling = [name for name in _taken(self.nodes[self.places[tensor]]) if name in seen]
            if not telling or alone is None or alone > result.report.allowed:
                return result

    def by_halves(
        self, engine: Backend, precision: str, wrong: Sequence[_Case], *, fused: bool
    ) -> _Found | None:
        """The shortest beginning of the graph that departs, or does not run; None where none does."""
        tensors, first, last = list(self.places), 0, len(self.places) - 1
        while first < last:
            middle = (first + last) // 2
            if self.beginning(engine, precision, tensors[middle], wrong[0]) is None:
                first = middle + 1
            else:
                last = middle
        found = [self.beginning(engine, precision, tensors[last], case) for case in wrong]
        departing = [one for one in found if one is not None]
        if not departing:
            return None
        tensor = departing[0][0]
        problems = [problem for name, problem in departing if name == tensor]
        return self.found(engine, precision, tensor, problems, fused=fused)

    def beginning(
        self, engine: Backend, precision: str, tensor: str, case: _Case
    ) -> tuple[str, _Problem] | None:
        """What is wrong with the graph's first operators, up to this tensor's: which result, and how.

        All branches are in it, each as far as it got, so that a longer beginning has all that a shorter has.
        """
        place = self.places[tensor]
        taken = {name for node in self.nodes[: place + 1] for name in _taken(node)}
        ends = [name for name, at in self.places.items() if at <= place and name not in taken]
        try:
            results = self.run(engine, precision, self.showing(ends, place), case)
        except ExecutionError as error:
            return tensor, _Problem(np.inf, 0.0, f"{tensor}: {_first_line(error)}", case)
        for name in (tensor, *ends):
            if name in results and (problem := self.differ(results[name], case, name)) is not None:
                return name, problem
        return None

    def found(
        self, engine: Backend, precision: str, tensor: str, problems: Sequence[_Problem], *, fused: bool
    ) -> _Found:
        node = self.nodes[self.places[tensor]]
        worst = max(problems, key=lambda problem: problem.error)
        want = worst.case.values[tensor]
        proto, inputs = self.alone(node, worst.case)
        which = [name for name in node.output if name].index(tensor)
        difference: float | None = None
        try:
            got = list(_run(engine, Model("onnx", proto), None, precision, inputs).values())[which]
            if got.shape == want.shape:
                difference = float(np.abs(got.astype(np.float64) - want).max(initial=0.0))
        except TimedOut:
            raise
        except Exception:  # alone it may lack what the engine knew of its inputs
            pass
        report = Departure(
            operator=node.op_type,
            node=node.name or tensor,
            place=self.places[tensor] + 1,
            tensor=tensor,
            seen=len(problems),
            size=worst.case.size,
            max_abs=float(worst.error) if np.isfinite(worst.error) else None,
            allowed=worst.allowed,
            worst_at=worst.where,
            alone=difference,
            fused=fused,
            edited=self.edited(node),
            folder=None,
        )
        return _Found(report, proto, inputs, want, which)

    def alone(self, node: Any, case: _Case) -> tuple[bytes, dict[str, Array]]:
        """A graph of this operator, and its inputs as the reference has them."""
        helper, arrays = self.onnx.helper, self.onnx.numpy_helper
        weights = {tensor.name: tensor for tensor in self.proto.graph.initializer}
        fixed = {name for n in self.nodes if n.op_type == "Constant" for name in n.output}
        own_names = dict.fromkeys(filter(None, node.input))
        # what a subgraph takes from around it keeps its name
        names = {name: f"input_{i}" for i, name in enumerate(own_names)} | {
            name: name for name in _taken(node) if name not in own_names
        }
        values = {name: case.values[name] for name in names if name in case.values}
        values |= {name: arrays.to_array(weights[name]) for name in names if name in weights}
        if values.keys() != names.keys():  # the reference lacks some
            values = {**self.evaluated(self.proto, case.feeds, "the graph"), **values}
        initial, ports, inputs = [], [], {}
        for name, new in names.items():
            value = values[name]
            # engines want to know weights, sizes and axes
            if name in weights or name in fixed or value.dtype.kind in "iub":
                initial.append(arrays.from_array(value, new))
                continue
            kind = helper.np_dtype_to_tensor_dtype(value.dtype)
            ports.append(helper.make_tensor_value_info(new, kind, value.shape))
            inputs[new] = np.ascontiguousarray(value)
        outputs = [self.onnx.ValueInfoProto(name=name) for name in node.output if name]
        own = self.onnx.NodeProto()
        own.CopyFrom(node)
        own.input[:] = [names.get(name, "") for name in node.input]
        graph = helper.make_graph([own], "operator", ports, outputs, initial)
        proto = helper.make_model(graph, opset_imports=list(self.proto.opset_import))
        proto.ir_version = self.proto.ir_version
        proto.functions.extend(self.proto.functions)
        return proto.SerializeToString(), inputs

    def edited(self, node: Any) -> str:
        """How it differs from the reference's operator of the same result; "" where it does not."""
        others = (n for n in self.true.graph.node if set(n.output) & set(filter(None, node.output)))
        other = next(others, None)
        if other is None:
            return "the reference has it as a weight"
        found = [] if node.op_type == other.op_type else [f"it is {node.op_type}, not {other.op_type}"]
        mine, its = ({a.name: a for a in n.attribute} for n in (node, other))
        for name in dict.fromkeys([*mine, *its]):
            a, b = (
                self.onnx.helper.get_attribute_value(had[name]) if name in had else None
                for had in (mine, its)
            )
            if a != b:
                found.append(f"{name} is {a}, not {b}")
        if list(node.input) != list(other.input):
            found.append(f"its inputs are {', '.join(node.input)}, not {', '.join(other.input)}")
        for name in node.input:
            a, b = (
                next((t for t in p.graph.initializer if t.name == name), None)
                for p in (self.proto, self.true)
            )
            if a is not None and b is not None:
                a, b = map(self.onnx.numpy_helper.to_array, (a, b))
                if a.shape != b.shape or not np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
                    found.append(f"its weights '{name}' are others")
        return "; ".join(found)

    # -- saving

    def save(self, found: _Found, folder: Path, engine: Backend, precision: str, model: str) -> _Found:
        imports, run = _RUNS.get(engine.name, _ANY_RUN)
        settings = {"backend": engine.name, "precision": precision, "which": found.which}
        script = _SCRIPT.format(
            model=model,
            version=engine.version,
            error="another shape" if found.report.max_abs is None else f"{found.report.max_abs:.3g}",
            imports=imports,
            run=run.format(**settings),
            backend=engine.name,
        )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "operator.onnx").write_bytes(found.model)
            arrays: dict[str, Any] = {**found.inputs, "expected": found.expected}
            np.savez(folder / "inputs.npz", **arrays)
            (folder / "reproduce.py").write_text(script)
        except OSError as error:
            raise OptionError(f"{folder}: cannot be written: {error.strerror}") from error
        return replace(found, report=replace(found.report, folder=str(folder)))
