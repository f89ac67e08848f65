"""Where a model comes from, and how it reaches an engine: file -> (module) -> (ONNX) -> `Model`."""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    describe_backends,
    get_backend,
    known_backends,
)
from anysize.backends.base import Array, Feeds
from anysize.backends.cache import Cache
from anysize.backends.errors import (
    BackendUnavailableError,
    ExportError,
    ModelLoadError,
    OptionError,
)
from anysize.models import (
    BUNDLED,
    bundled_file,
    described,
    is_checkpoint,
    is_descriptor,
    load_weights,
    parts,
    recipes_of,
)

if TYPE_CHECKING:
    import torch

    Source = str | os.PathLike[str] | torch.nn.Module
else:
    Source = object

WEIGHTS = (".pth", ".pt", ".ckpt", ".safetensors")
#: suffix -> format of files that engines read themselves
GRAPHS = {".onnx": "onnx", ".xml": "xml", ".param": "ncnn"}
#: format -> extras to install for it
_TAKERS = {
    "bundled": ("openvino", "onnxruntime", "torch"),
    "module": ("torch", "export"),
    "onnx": ("openvino", "onnxruntime"),
    "xml": ("openvino",),
    "ncnn": ("ncnn",),
}
#: channels of the image input tried on a bare module
_CHANNELS = (3, 1, 4, 2)


def is_module(source: object) -> bool:
    """Whether this is a `torch.nn.Module`, without importing torch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.nn.Module)


def source_format(source: Source) -> str:
    """ "module", "onnx", "xml" or "bundled". Raises `ModelLoadError` for anything else."""
    if is_module(source):
        return "module"
    if not isinstance(source, (str, os.PathLike)):
        raise ModelLoadError(f"a model is a path, a name or a torch.nn.Module, not {type(source).__name__}")
    if str(source) in BUNDLED:
        return "bundled"
    path = Path(source)
    try:
        if is_checkpoint(path):
            return "module"
    except OSError as error:  # such as a name that is too long
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    known = (*WEIGHTS, *GRAPHS)
    if path.is_dir():
        raise ModelLoadError(f"{path}: a folder without config.json, so not of a model of diffusers")
    if path.suffix.lower() not in known:
        files = f"{', '.join(BUNDLED)} or a {', '.join(known)} file"
        what = "not a known model" if path.is_file() else "no such model or file"
        raise ModelLoadError(f"{path}: {what}; expected {files}, or a folder of diffusers")
    if not path.is_file():
        raise ModelLoadError(f"{path}: no such file")
    return GRAPHS.get(path.suffix.lower(), "module")


def located(source: Source) -> Source:
    """The file of known weights that are named, the module of what spandrel loaded; all else as it is.

    Raises `ModelLoadError`.
    """
    from anysize.models.registry import KNOWN, local

    if is_descriptor(source):
        return described(source)
    if not isinstance(source, str) or source not in KNOWN or Path(source).exists():
        return source
    file = local(KNOWN[source], checked=True)
    if file is None:
        raise ModelLoadError(f"{source} is not here, or damaged; fetch it with: anysize models get {source}")
    return file


def _takes(formats: Collection[str], form: str) -> bool:
    """Directly, for modules by way of an ONNX file; bundled models are there as both."""
    if form == "bundled":
        return "module" in formats or "onnx" in formats
    return form in formats or (form == "module" and "onnx" in formats)


def takers(source: Source) -> list[str]:
    """The engines that work here and take such a source, fastest first. Raises `ModelLoadError`."""
    form = source_format(source)
    return [i.name for i in describe_backends() if i.problem is None and _takes(i.formats, form)]


def choose_backend(source: Source, backend: str | Backend) -> Backend:
    """The named engine, or for "auto" the fastest installed one that takes the source."""
    form = source_format(source)
    if isinstance(backend, Backend):
        chosen = backend
    elif backend != "auto":
        chosen = get_backend(backend)
    else:
        chosen_or_none = _fastest(form)
        if chosen_or_none is None:
            lines = " or ".join(f'pip install "anysize[{name}]"' for name in _TAKERS[form])
            raise BackendUnavailableError(f"no installed engine takes this model; {lines}")
        chosen = chosen_or_none
    if not _takes(chosen.formats, form):
        others = [info for info in describe_backends() if info.name != chosen.name]
        # what one that is not installed takes is not known, but for the few of our own
        takers = [
            i.name for i in others if _takes(i.formats, form) or (i.problem and i.name in _TAKERS[form])
        ]
        raise ModelLoadError(
            f"backend '{chosen.name}' takes {', '.join(chosen.formats)}, not {form} ({source}); "
            f"try {' or '.join(takers)}"
        )
    return chosen


def _fastest(form: str) -> Backend | None:
    for name in known_backends():
        try:
            backend = get_backend(name)
        except BackendUnavailableError:
            continue
        direct = form in backend.formats or form == "bundled"
        if direct or (_takes(backend.formats, form) and _can_export()):
            return backend
    return None


def _can_export() -> bool:
    return all(find_spec(name) for name in ("torch", "onnx", "onnxscript"))


def open_source(source: Source, backend: Backend, cache: Cache | None = None) -> Model:
    """The source in a form this backend takes, with its contract."""
    form = source_format(source)
    if form == "bundled":
        suffix = ".onnx" if "onnx" in backend.formats else ".safetensors"
        source = bundled_file(str(source), suffix)
        form = source_format(source)
    if form == "module":
        if isinstance(source, (str, os.PathLike)) and not Path(source).is_dir():
            return _from_weights(Path(source), backend, cache)
        return _from_module(source, backend)
    assert isinstance(source, (str, os.PathLike))
    return _from_graph(Path(source), form, backend, cache)


def _from_weights(path: Path, backend: Backend, cache: Cache | None) -> Model:
    """A weights file: probed once, and converted once (without torch after that) for engines of graphs."""
    direct = "module" in backend.formats
    sha256 = _file_sha256(path)
    # all that the contract follows from; with the engine, also the conversion and its verification
    made_by = [f"{name} {version_of(name)}" for name in ("torch", "onnx", "onnxscript", "spandrel")]
    of_file = (sha256, path.suffix.lower(), *made_by)
    of_engine = (*of_file, f"{backend.name} {backend.version}")
    if cache is not None and not direct:
        if (data := cache.get("converted", *of_engine)) is not None:
            model = Model("onnx", data)
            return replace(model, spec=ModelSpec.from_json(backend.metadata(model)[SPEC_KEY]))
        if (reason := cache.get("refused", *of_engine)) is not None:
            raise ExportError(reason.decode())
    weights = load_weights(path)
    if weights.sha256 != sha256:  # another file since
        cache = None
    known = cache.get("contract", *of_file) if cache is not None else None
    if known is not None:
        spec = ModelSpec.from_json(known.decode())
    else:
        spec = replace(_contract(weights.module, (weights.in_channels,)), source_sha256=weights.sha256)
        if cache is not None:
            cache.put(spec.to_json().encode(), "contract", *of_file)
    if direct:
        return Model("module", weights.module, spec)
    try:
        model = _converted(weights.module, spec, backend)
    except ExportError as error:
        # what follows from the model alone, not from memory or a disk that were full
        if cache is not None and not isinstance(error.__cause__, (MemoryError, OSError)):
            cache.put(str(error).encode(), "refused", *of_engine)
        raise
    if cache is not None:
        cache.put(model.data, "converted", *of_engine)
    return model


@cache
def version_of(package: str) -> str:
    """Its version; "none" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _file_sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error


def _from_module(source: Any, backend: Backend) -> Model:
    module, spec = _probed(source)
    if "module" in backend.formats:
        return Model("module", module, spec)
    return _converted(module, spec, backend)


def _probed(source: Any) -> tuple[Any, ModelSpec]:
    """The module of a source, which nobody else changes, and its contract."""
    from anysize.exporters.exporting import private_copy

    if is_module(source) or Path(source).is_dir():
        module = private_copy(_only_part(source))
        return module, _contract(module, _CHANNELS)
    weights = load_weights(Path(source))
    spec = _contract(weights.module, (weights.in_channels,))
    return weights.module, replace(spec, source_sha256=weights.sha256)


def _contract(module: Any, channels: Sequence[int]) -> ModelSpec:
    """What the module says that it takes, or one image of so many channels, probed."""
    from anysize.exporters.exporting import declared_inputs, probe_module

    problem: ExportError | None = None
    declared = declared_inputs(module)
    for templates in [declared] if declared else [_image_template(module, count) for count in channels]:
        try:
            return probe_module(module, templates)
        except ExportError as error:
            problem = problem or error
    what = f"one NCHW image of {' or '.join(map(str, channels))} channels"
    what = ", ".join(map(str, declared)) if declared else f"{what}; export it with its inputs named"
    name = getattr(module, "architecture", type(module).__name__)
    raise ModelLoadError(f"{name} does not run on {what}: {problem}")


def _converted(module: Any, spec: ModelSpec, backend: Backend) -> Model:
    """The module as a graph that this engine was seen to run rightly."""
    from anysize.exporters.exporting import ONE_FILE, to_onnx, verify

    too_large = "this model is too large to convert on the fly; export it to a file first"
    if sum(weight.nbytes for weight in module.parameters()) > ONE_FILE:
        raise ModelLoadError(too_large)
    with tempfile.TemporaryDirectory(prefix="anysize-") as folder:
        model, doubts = to_onnx(module, spec, Path(folder) / "model.onnx")
        if isinstance(model.data, Path):
            raise ModelLoadError(too_large)
    verify(module, model, [backend], doubts)
    return model


def as_graph(source: Source, backend: Backend) -> tuple[Model, Any]:
    """The source as an ONNX graph with its contract, held against nothing, and its module where it has one.

    `backend` probes a file that carries no contract. Raises `ModelLoadError`, `ExportError`.
    """
    from anysize.exporters.exporting import to_onnx

    source = located(source)
    form = source_format(source)
    if form == "bundled":
        source, form = bundled_file(str(source), ".onnx"), "onnx"
    if form == "module":
        module, spec = _probed(source)
        with tempfile.TemporaryDirectory(prefix="anysize-") as folder:
            return to_onnx(module, spec, Path(folder) / "model.onnx")[0], module
    if form != "onnx":
        raise ModelLoadError(f"{source}: takes weights and .onnx files")
    assert isinstance(source, (str, os.PathLike))
    return _from_graph(Path(source), form, backend, None), None


def _only_part(source: Any) -> Any:
    """The part of a diffusion model or of its folder, where it has one; anything else as it is."""
    if is_module(source) and recipes_of(source) is None:
        return source
    found = parts(source)
    if len(found) > 1:
        raise ModelLoadError(
            f"the model has several parts; take one of anysize.parts(...): {', '.join(found)}"
        )
    return next(iter(found.values()))


def _image_template(module: Any, channels: int) -> list[TensorSpec]:
    import inspect

    name = next(iter(inspect.signature(module.forward).parameters), "input")
    return [TensorSpec(name, np.dtype(np.float32), (Dim("n"), channels, Dim("h"), Dim("w")))]


def _from_graph(path: Path, form: str, backend: Backend, cache: Cache | None) -> Model:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ModelLoadError(f"{path}: cannot be read: {error.strerror}") from error
    if not data:
        raise ModelLoadError(f"{path}: the file is empty")
    # A file with external data says where under this key; engines resolve that from the path.
    alone = form == "onnx" and b"location" not in data
    model = Model(form, data if alone else path.absolute())
    try:
        text = backend.metadata(model).get(SPEC_KEY)
        if text is not None:
            return replace(model, spec=ModelSpec.from_json(text))
        # all that the probe follows from; another engine may trace the radius
        others = (name for name in known_backends() if find_spec(name))
        key = ("probed", model.digest or "", backend.name, backend.version, *others)
        known = cache.get(*key) if cache is not None and model.digest else None
        spec = ModelSpec.from_json(known.decode()) if known else _probe_graph(model, backend)
        if cache is not None and model.digest and not known:
            cache.put(spec.to_json().encode(), *key)
    except Exception as error:  # an engine that compiles a foreign file fails in its own way
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelLoadError(f"{path}: {reason[0]}") from error
    if form != "onnx" and (weights := path.with_suffix(".bin")).exists():
        data += weights.read_bytes()
    return replace(model, spec=replace(spec, source_sha256=hashlib.sha256(data).hexdigest()))


def _probe_graph(model: Model, backend: Backend) -> ModelSpec:
    """The contract of a file that carries none, found by running it on this engine."""
    from anysize.exporters.probing import probe
    from anysize.exporters.radius import measure_radius

    options = EngineOptions()
    program = backend.compile(model, None, options)
    templates = []
    letters = {0: "n", 2: "h", 3: "w"}
    for i, port in enumerate(program.inputs):
        tag = f"_{port.name}" if i else ""
        axes = tuple(
            size if size is not None else Dim(letters.get(axis, f"d{axis}") + (tag if axis else ""))
            for axis, size in enumerate(port.shape)
        )
        templates.append(TensorSpec(port.name, port.dtype, axes))
    image = templates[0].shape if templates else ()
    if not (len(image) == 4 and isinstance(image[1], int)):
        found = "; ".join(map(str, templates))
        raise OptionError(f"expected an NCHW image input with fixed channels, found {found}")

    def run(feeds: Feeds) -> dict[str, Array]:
        nonlocal program
        if backend.prefers_static:  # an open program has been seen to answer a bad size with old data
            return backend.compile(model, {n: f.shape for n, f in feeds.items()}, options).run(feeds)
        try:
            return program.run(feeds)
        except Exception:
            program = backend.compile(model, None, options)
            raise

    spec = probe(run, templates, radius=False)
    # Without NaN a reach cannot be traced, and a guess would be a wrong picture: then it stays unknown.
    tracer = _tracer(model, backend) if spec.scale is not None else None
    if tracer is not None:
        traced = tracer.compile(model, None, options)
        radius = measure_radius(traced.run, spec, np.random.default_rng(0))
        spec = replace(spec, radius=radius, tileable=radius is not None)
    return replace(spec, producer=f"{backend.name} {backend.version}")


def _tracer(model: Model, backend: Backend) -> Backend | None:
    """An installed engine that takes the model and lets NaN through, this one if it does."""
    if backend.propagates_nan:
        return backend
    installed = (get_backend(name) for name in available_backends())
    return next((b for b in installed if b.propagates_nan and model.format in b.formats), None)
