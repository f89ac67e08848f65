"""Module -> ONNX -> OpenVINO IR with declared dynamic axes, verified on every installed engine."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import tempfile
import threading
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends import (
    SPEC_KEY,
    Backend,
    Dim,
    EngineOptions,
    Model,
    ModelSpec,
    TensorSpec,
    available_backends,
    get_backend,
)
from anysize.backends.base import Array, Executable, Feeds
from anysize.backends.errors import BackendUnavailableError, ExportError, OptionError
from anysize.backends.spec import bounds
from anysize.exporters.branches import Doubts, breaking_sizes
from anysize.exporters.cost import working_bytes
from anysize.exporters.probing import Templates, batch_axis, clip, noise, probe
from anysize.exporters.radius import Run
from anysize.exporters.replay import doubtful_sizes
from anysize.exporters.translations import translations

log = logging.getLogger("anysize")
#: torch.export is not made for several threads
_exporting = threading.Lock()

OPSET = 18
#: engines must agree with eager f32 within this times max(1, max|reference|)
TOLERANCE = 1e-4
#: bytes of weights that fit into one file: a protobuf message has less than 2 GiB, some for the graph
ONE_FILE = 2**31 - 2**27
#: the most memory that a run to hold an export against its module may take, by an estimate
TRIED_BYTES = 2**31

#: what describes one input: an example tensor or array, or its shape with names for the free axes
InputLike = Any


def export(
    module: Any,
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, InputLike] | Sequence[InputLike] | InputLike = None,
    value_range: tuple[float, float] | None = None,
    source_sha256: str = "",
) -> Path:
    """Write `module` to `path` (`.onnx`, or `.xml` with its `.bin` for OpenVINO) with its probed contract.

    Weights of 2 GiB and more go to a file of their own, PATH.data, which belongs beside it.

    `inputs`, by argument name or in the order of `forward`, each either an example (tensor or array; of an
    NCHW example N, H and W are probed, of any other every axis but the second) or a shape such as
    `("n", 3, "h", "w")`, where names are the axes to probe and ints are fixed; all dtypes float32 unless an
    example says otherwise. None: what the module's own `inputs` says, as `TensorSpec`s. `value_range`: of
    image values; None: what the module's own `value_range` says, or else 0 to 1. The module is not changed.

    The contract is probed in eager PyTorch, the graph exported, and every installed engine that takes
    the file run at sizes not used in the export: outputs must be finite, of the ruled shape, and within
    1e-4 * max(1, max|reference|). Nothing is written otherwise.

    Raises `ExportError`, `BackendUnavailableError` (missing torch, onnx or, for .xml, openvino),
    `OptionError` (unknown suffix, no range).
    """
    path = Path(path)
    folder = folder_of(path)
    templates, example = input_templates(module, inputs)
    module = private_copy(module, share=True)
    spec = probe_module(module, templates, example=example, value_range=value_range)
    spec = replace(spec, source_sha256=source_sha256)
    with _temporary_folder(folder) as temporary:
        file = temporary / path.name
        model, doubts = to_onnx(module, spec, file.with_suffix(".onnx"))
        if path.suffix == ".xml":
            model = _to_openvino(model, file)
        takers = [get_backend(n) for n in available_backends()]
        verify(module, model, [b for b in takers if model.format in b.formats], doubts)
        for made in sorted(temporary.iterdir(), key=lambda f: f.suffix == path.suffix):
            if path.suffix == ".onnx" or made.suffix in (".bin", ".xml"):
                os.replace(made, path.parent / made.name)  # the named file comes last
    return path


def folder_of(path: Path) -> Path:
    """Where an export to `path` would write. Raises `OptionError` where it cannot."""
    if path.suffix not in (".onnx", ".xml"):
        raise OptionError(f"{path}: the suffix must be .onnx or .xml")
    if path.is_dir():
        raise OptionError(f"{path}: is a folder, not a file name")
    if not path.parent.is_dir():
        raise OptionError(f"{path}: the folder does not exist")
    return path.parent


@contextlib.contextmanager
def _temporary_folder(parent: Path) -> Iterator[Path]:
    try:
        made = tempfile.TemporaryDirectory(prefix=".anysize-", dir=parent)
    except OSError as error:
        raise OptionError(f"{parent}: cannot be written to: {error.strerror}") from error
    with made as folder:
        yield Path(folder)


def private_copy(module: Any, *, share: bool = False) -> Any:
    """A copy on the CPU, in f32 and eval mode, that the caller's further use of the module cannot change.

    `share`: while the caller waits, weights for which one file is too small are not copied where they are on
    the CPU, in f32; a forward that writes to its weights would then write to the caller's.
    """
    import copy

    import torch

    weights, memo = list(module.parameters()), {}
    for weight in weights if share and sum(weight.nbytes for weight in weights) >= ONE_FILE else ():
        if type(weight) is torch.nn.Parameter:
            memo[id(weight)] = torch.nn.Parameter(weight.detach(), requires_grad=False)
    try:
        return copy.deepcopy(module, memo).cpu().float().eval().requires_grad_(False)
    except Exception as error:  # locks, cached tensors, compiled modules: whatever the module holds
        raise ExportError(f"{type(module).__name__} cannot be copied: {error}") from error


def input_templates(
    module: Any, inputs: Mapping[str, InputLike] | Sequence[InputLike] | InputLike | None
) -> tuple[Templates, dict[str, int] | None]:
    """Bring `export`'s `inputs` into templates for the probe, and the example's sizes if there is one."""
    if inputs is None:
        declared = declared_inputs(module)
        if declared is None:
            raise OptionError(f"inputs: {type(module).__name__} does not say what it takes; name its inputs")
        return declared, None
    if not isinstance(inputs, Mapping):
        one = hasattr(inputs, "shape") or any(isinstance(a, (int, str)) for a in inputs)
        values = [inputs] if one else list(inputs)
        parameters = list(inspect.signature(module.forward).parameters)
        inputs = dict(zip(parameters, values, strict=False))
    if not inputs:
        raise OptionError("inputs: at least one is needed")
    templates: list[TensorSpec] = []
    example: dict[str, int] = {}
    for i, (name, value) in enumerate(inputs.items()):
        if hasattr(value, "shape"):
            shape = tuple(map(int, value.shape))
            dtype = np.dtype(str(value.dtype).removeprefix("torch."))
            tag = "" if i == 0 else f"_{name}"
            letters = {0: "n", 2: f"h{tag}", 3: f"w{tag}"} if len(shape) == 4 else {}
            axes: list[int | Dim] = []
            for axis, size in enumerate(shape):
                free = letters.get(axis) or (f"d{axis}{tag}" if axis and len(shape) != 4 else "n")
                axes.append(size if axis == 1 else Dim(free))
                if axis != 1 and example.setdefault(free, size) != size:
                    raise OptionError(f"input '{name}': batch {size} differs from {example[free]}")
            templates.append(TensorSpec(name, dtype, tuple(axes)))
        else:
            if not all(isinstance(a, (int, str)) for a in value):
                raise OptionError(f"input '{name}': a shape holds ints and names, got {value!r}")
            axes = [a if isinstance(a, int) else Dim(a) for a in value]
            templates.append(TensorSpec(name, np.dtype(np.float32), tuple(axes)))
    return templates, example or None


def declared_inputs(module: Any) -> Templates | None:
    """What a module says that it takes, in its `inputs`; None where it says nothing."""
    inputs = getattr(module, "inputs", None)
    if isinstance(inputs, (tuple, list)) and inputs and all(isinstance(t, TensorSpec) for t in inputs):
        return inputs
    return None


def eager(module: Any, names: Sequence[str]) -> Run:
    """`module` as a function on named arrays, run in eager f32; outputs are named output, output_1, ..."""
    import torch
    from anysize.backends.pytorch import flatten_outputs

    def run(feeds: Feeds) -> dict[str, Array]:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            results = flatten_outputs(module(*(torch.from_numpy(np.array(feeds[n])) for n in names)))
        base = "output" if "output" not in names else "result"
        return {
            base if i == 0 else f"{base}_{i}": np.array(r.numpy(), order="C") for i, r in enumerate(results)
        }

    return run


def probe_module(
    module: Any,
    templates: Templates,
    *,
    example: Mapping[str, int] | None = None,
    value_range: tuple[float, float] | None = None,
) -> ModelSpec:
    """The contract of a torch module; see `probe`, and `export` for `value_range`.

    A module may say more of itself: `tileable` False spares measuring how far a pixel reaches, and `note` is
    kept in the contract.
    """
    import torch

    values: Any = getattr(module, "value_range", (0.0, 1.0)) if value_range is None else value_range
    try:
        low, high = bounds([float(value) for value in values])
    except (TypeError, ValueError, OverflowError):
        low = high = 0.0
    if not low < high:
        raise OptionError(f"value_range must be the least and the largest value, not {values!r}")
    spec = probe(
        eager(module, [t.name for t in templates]),
        templates,
        example=example,
        value_range=(low, high),
        radius=getattr(module, "tileable", True),
    )
    note = getattr(module, "note", "")
    return replace(spec, producer=f"torch {torch.__version__}" + (f"; {note}" if note else ""))


def to_onnx(module: Any, spec: ModelSpec, path: Path) -> tuple[Model, Doubts]:
    """Export to `path`, the contract embedded; the model holds the bytes where the file stands alone.

    Not verified: see `verify`, which takes the second result too. Raises `ExportError`, also where the module
    does something else at sizes too large to be tried.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - torch's exporter needs it and says so less clearly
        import torch
    except ImportError as error:
        raise BackendUnavailableError(
            f'exporting needs torch, onnx and onnxscript: pip install "anysize[export]" ({error})',
            name="export",
        ) from error

    from anysize.backends.pytorch import flatten_outputs

    # Batch 2 and odd sizes where allowed: an exporter that bakes a size in is then caught by verification.
    batch = batch_axis(spec)
    # What a model does at odd sizes alone, such as cropping what it padded, is right at even ones as well.
    wanted = {n: 2 if n == batch else (d.min + 6 + 14 * i) | 1 for i, (n, d) in enumerate(spec.dims.items())}
    sizes = {n: clip(d, wanted[n]) for n, d in spec.dims.items()}
    shapes = spec.input_shapes(sizes)
    args = tuple(torch.full(shapes[t.name], 0.5).to(getattr(torch, t.dtype.name)) for t in spec.inputs)
    auto = torch.export.Dim.AUTO
    dynamic = tuple(
        {axis: auto for axis, size in enumerate(t.shape) if not isinstance(size, int)} for t in spec.inputs
    )

    class Flat(torch.nn.Module):
        """With a tuple of tensors as the result: torch exports no data classes that it does not know."""

        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(flatten_outputs(self.module(*tensors)))

    try:
        with _exporting, _quiet(), torch.autocast("cpu", enabled=False):
            program = torch.export.export(Flat(), args, dynamic_shapes=(dynamic,))
            # optimize=True deletes `+ eps` for tiny eps
            exported = torch.onnx.export(
                program,
                optimize=False,
                verbose=False,
                opset_version=OPSET,
                input_names=[t.name for t in spec.inputs],
                custom_translation_table=translations(),
            )
    except Exception as error:  # the exporter's own classes are many and private
        raise ExportError(f"torch cannot export this module: {_why(error)}") from error
    assert exported is not None
    weights = exported.model.graph.initializers.values()
    alone = sum(w.const_value.nbytes for w in weights if w.const_value is not None) < ONE_FILE
    if alone:
        proto = exported.model_proto
    else:  # the weights go to a file beside it, never through one message
        exported.save(path, external_data=True)
        proto = onnx.load_model(path, load_external_data=False)
    spec = replace(spec, opset=OPSET)
    onnx.helper.set_model_props(proto, {SPEC_KEY: spec.to_json()})
    _name_outputs(onnx, proto.graph, [t.name for t in spec.outputs])
    _declare(proto, spec)
    onnx.save_model(proto, path)
    model = Model("onnx", path.read_bytes() if alone else path, spec)

    def fits(sizes: dict[str, int]) -> bool:
        return (working_bytes(model, sizes) or 0) <= TRIED_BYTES

    with _exporting, _quiet():
        doubts = doubtful_sizes(module, program, spec, sizes)
    for found, note in doubts:
        if not fits(found):
            raise ExportError(f"at {found}{note}, which is too large to try")
    # a condition says more of why, so its sizes come first
    return model, [*breaking_sizes(program, spec, fits), *doubts]


def _why(error: BaseException) -> str:
    """Why torch's exporter failed, and at which operator, or at which line of the module's code."""
    chain = [error]
    while chain[-1].__cause__ is not None:  # the first says what step failed, the last why
        chain.append(chain[-1].__cause__)
    reason = (str(chain[-1]).strip() or type(chain[-1]).__name__).splitlines()[0]
    for one in chain:
        if named := re.search(r"target=torch\.ops\.([\w.]+)", str(one)):
            return f"{named[1]}: {reason}"
    lines = [f.line for f in traceback.extract_tb(chain[-1].__traceback__) if f.name == "forward"]
    return f"`{lines[-1]}`: {reason}" if lines and lines[-1] else reason


def _name_outputs(onnx: Any, graph: Any, names: Sequence[str]) -> None:
    """Name the outputs. The exporter's own way renames the input too where a module returns it."""
    taken = {value.name for value in graph.input}
    for value, name in zip(graph.output, names, strict=True):
        if value.name in taken:  # an input, or the same tensor returned twice
            graph.node.append(onnx.helper.make_node("Identity", [value.name], [name]))
        else:
            for node in graph.node:
                for field in (node.input, node.output):
                    for i, other in enumerate(field):
                        if other == value.name:
                            field[i] = name
        taken |= {value.name, name}
        value.name = name


def _declare(proto: Any, spec: ModelSpec) -> None:
    """Write the contract's axis names into the graph, and drop the tracer's inner symbols and its notes.

    The notes tell where on this machine each line of the module's code lies.
    """
    graph = proto.graph
    for noted in (graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        del noted.metadata_props[:]
    del proto.graph.value_info[:]
    for values, tensors in ((proto.graph.input, spec.inputs), (proto.graph.output, spec.outputs)):
        for value, tensor in zip(values, tensors, strict=True):
            for axis, size in zip(value.type.tensor_type.shape.dim, tensor.shape, strict=True):
                if isinstance(size, int):
                    axis.dim_value = size
                else:
                    axis.dim_param = size.name if isinstance(size, Dim) else str(size)


def _to_openvino(model: Model, path: Path) -> Model:
    from anysize.backends.openvino import import_openvino

    try:
        openvino = import_openvino()
    except ImportError as error:
        raise BackendUnavailableError(
            f'writing .xml needs openvino: pip install "anysize[openvino]" ({error})', name="openvino"
        ) from error
    assert model.spec is not None
    data = str(model.data) if isinstance(model.data, Path) else model.data
    graph = openvino.Core().read_model(data)
    graph.set_rt_info(model.spec.to_json(), [SPEC_KEY])
    openvino.save_model(graph, path, compress_to_fp16=False)  # the default halves the weights silently
    return Model("xml", path, model.spec)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch tells of packages, internals and failed attempts, which do not concern the caller."""
    loggers = [logging.getLogger(f"torch.{part}") for part in ("onnx", "_subclasses.fake_tensor")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def verification_sizes(spec: ModelSpec) -> list[dict[str, int]]:
    """Valid sizes not used in the export: the lower bound, two non-square ones, one with a batch."""
    spatial = [n for n in spec.dims if n != batch_axis(spec)]
    wanted = [
        dict.fromkeys(spec.dims, 1),
        dict(zip(spatial, (29, 23, 31, 37), strict=False)),
        dict(zip(spatial, (18, 50, 40, 27), strict=False)),
        {n: 3 if n not in spatial else 13 for n in spec.dims},
    ]
    chosen = []
    for sizes in wanted:
        valid = {n: clip(d, d.min - 1 + sizes.get(n, 1)) for n, d in spec.dims.items()}
        if valid not in chosen:
            chosen.append(valid)
    return chosen


def sizes_near(spec: ModelSpec, side: int) -> dict[str, int]:
    """Valid sizes of the free axes: the batch its least, all others about `side`."""
    batch = batch_axis(spec)
    return {n: d.min if n == batch else d.floor(max(side, d.min)) for n, d in spec.dims.items()}


def random_feeds(spec: ModelSpec, sizes: Mapping[str, int], seed: int = 0) -> dict[str, Array]:
    """Uniform noise in the contract's ranges of values, of the shapes that `sizes` give."""
    rng = np.random.default_rng(seed)
    return {t.name: noise(t, sizes, spec.value_range, rng) for t in spec.inputs}


def verify(module: Any, model: Model, backends: Sequence[Backend], doubts: Doubts = ()) -> None:
    """Hold each engine, with fixed and with open shapes, against eager. Raises `ExportError`.

    `doubts`: more sizes, of open shapes alone, each with words about why.
    """
    spec = model.spec
    assert spec is not None
    reference = eager(module, [t.name for t in spec.inputs])
    usual = [(sizes, "") for sizes in verification_sizes(spec)]
    cases = []
    for sizes, note in [*usual, *doubts]:
        feeds = random_feeds(spec, sizes)
        try:
            cases.append((sizes, note, feeds, reference(feeds)))
        except Exception as error:  # whatever the module raises
            raise ExportError(f"the module does not run at {dict(sizes)}: {error}") from error
    for backend in backends:
        for fixed in (False, True)[: 1 + backend.prefers_static]:
            program: Executable | None = None
            for sizes, note, feeds, want in cases[: len(usual) if fixed else None]:
                where = f"{backend.name} at {dict(sizes)}{note}"
                try:
                    if fixed or program is None:
                        program = None  # one at a time: each may hold a copy of the weights
                        shapes = spec.input_shapes(sizes) if fixed else None
                        program = backend.compile(model, shapes, EngineOptions())
                    got = program.run(feeds)
                except Exception as error:
                    raise ExportError(f"{where}: the exported graph does not run: {error}") from error
                _compare(got, want, where)


def _compare(got: Mapping[str, Array], want: Mapping[str, Array], where: str) -> None:
    for name, reference in want.items():
        output = got.get(name)
        if output is None or output.shape != reference.shape:
            shape = None if output is None else output.shape
            raise ExportError(f"{where}: output '{name}' has shape {shape}, eager has {reference.shape}")
        limit = TOLERANCE * max(1.0, float(np.abs(reference).max()))
        error = float(np.abs(output.astype(np.float64) - reference).max())
        if not error <= limit:  # also catches NaN
            raise ExportError(
                f"{where}: output '{name}' differs from eager by {error:.3g}, allowed {limit:.3g}"
            )
