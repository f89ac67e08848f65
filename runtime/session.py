"""`load` a model into a `Session`: one model, one engine, any size its contract allows."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import asdict, dataclass, fields
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

import numpy as np
from anysize.backends import Backend, EngineOptions, ModelSpec, TensorSpec, get_backend
from anysize.backends.base import Array, Feeds
from anysize.backends.cache import Cache
from anysize.backends.errors import (
    AnysizeError,
    BackendUnavailableError,
    ExecutionError,
    ExportError,
    IntegrityError,
    NotStreamable,
    OptionError,
    ShapeError,
)
from anysize.guard import ShapeGuard, Stats, Strategy, log
from anysize.limit import in_time
from anysize.sources import Source, choose_backend, located, open_source, version_of
from anysize.stale import RepeatedError
from anysize.tracing import span

if TYPE_CHECKING:
    from anysize.lockstep import LockstepRunner
    from anysize.streaming import BandRunner
    from anysize.tuning import Tuned

    Runner = TypeVar("Runner", BandRunner, LockstepRunner)

#: programs kept at once
LIVE = 4
#: sizes whose memory is remembered
_MOST_SIZES = 256
#: the guards whose runs gave results, noted in the context of whoever wants to know, and in copies of it
_ran: ContextVar[WeakSet[ShapeGuard]] = ContextVar("ran")
PRECISIONS = ("f32", "bf16", "int8", "auto")


@dataclass(frozen=True)
class Options:
    """How a session uses its engine.

    `device`: "cpu", or "cuda" (torch), or a device OpenVINO lists. `threads`: of the engine (None: its
    default). `streams`: strips or tiles of a picture that run at the same time, each on its share of the
    threads (None: what `anysize tune` found, else 1). `max_live`: programs kept at once (None: what it found,
    else 4). `tune`: measure first, half a minute in each precision, where that was not done before
    and can be; where it cannot, that is logged. `shapes`: "static" compiles per shape, "dynamic" one program
    for all, "auto" static while few are alive. `fallback`: tried in order when the engine fails or returns
    something wrong, as "backend" or "backend:precision"; none unless given, and each use is counted in
    `Session.stats.fallbacks` and logged.
    `cache_dir`: a folder for converted weights and compiled programs, so that the next start is quick; None:
    the environment's `ANYSIZE_CACHE_DIR`, or else the user's cache folder; "": no cache. `calibration`: for
    precision "int8", pictures of the kind that will come: files, folders, arrays or PIL images.
    """

    device: str = "cpu"
    threads: int | None = None
    streams: int | None = None
    max_live: int | None = None
    tune: bool = False
    shapes: Strategy = "auto"
    fallback: tuple[str, ...] = ()
    cache_dir: str | os.PathLike[str] | None = None
    calibration: tuple[Any, ...] = ()

    def __post_init__(self) -> None:
        for name, most in (("threads", 4096), ("streams", 4096), ("max_live", None)):
            if getattr(self, name) is not None:
                whole_number(name, getattr(self, name), most)
        if not isinstance(self.tune, bool):
            raise OptionError(f"tune must be True or False, not {self.tune!r}")
        if not isinstance(self.device, str):
            raise OptionError(f"device must be a name, not {self.device!r}")
        if not isinstance(self.fallback, (tuple, list)) or not all(isinstance(f, str) for f in self.fallback):
            raise OptionError(f"fallback must be a tuple of names, not {self.fallback!r}")
        if not isinstance(self.calibration, (tuple, list)):
            raise OptionError(
                f"calibration must be a tuple of pictures, not {type(self.calibration).__name__}"
            )
        if not isinstance(self.cache_dir, (str, os.PathLike, type(None))):
            raise OptionError(f"cache_dir must be a folder, not {self.cache_dir!r}")

    def cache(self) -> Cache | None:
        """The cache these options name. Raises `OptionError` where a named one cannot be made."""
        folder: Any = self.cache_dir
        if folder is None:
            folder = os.environ.get("ANYSIZE_CACHE_DIR")
        elif os.fspath(folder):
            try:
                Path(folder).mkdir(parents=True, exist_ok=True)
            except (OSError, ValueError) as error:
                raise OptionError(f"{folder!r} cannot be a cache folder: {error}") from error
        if folder is None:
            from platformdirs import user_cache_dir

            folder = user_cache_dir("anysize", appauthor=False)
        if not os.fspath(folder):
            return None
        return Cache(Path(folder).absolute(), code_digest("tuning.py", "memory.py"))


def whole_number(name: str, value: object, most: int | None = None) -> None:
    """Raise `OptionError` for what is not a whole number from 1 to `most`."""
    if not (type(value) is int and 1 <= value <= (most or value)):
        raise OptionError(f"{name} must be at least 1 and a whole number, not {value!r}")


@cache
def code_digest(*runtime: str) -> str:
    """A digest of the code that probes, converts and compiles, and of these files of the runtime (patterns).

    What other code made is not taken from a cache. In a frozen program there are no such files; there the
    version tells.
    """
    from anysize import backends, exporters, models

    digest = hashlib.sha256(version_of("anysize").encode())
    folders = [Path(package.__path__[0]) for package in (backends, exporters, models)]
    files = [file for folder in folders for file in folder.glob("*.py")]
    for file in sorted([*files, *(f for pattern in runtime for f in Path(__file__).parent.glob(pattern))]):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def load(
    source: Source,
    *,
    backend: str | Backend = "auto",
    precision: str = "f32",
    options: Options | Mapping[str, Any] | None = None,
) -> Session:
    """Open a model on an engine.

    `source`: path of a .pth, .pt, .ckpt, .safetensors, .onnx or .xml file, a `torch.nn.Module` (one NCHW
    image in; export others; its `value_range` tells its image values where they are not in 0..1), a model
    that spandrel loaded, or the name of a bundled one: "default" (x4) or "default-x2". `backend`: a name, a
    `Backend` instance, or "auto": the fastest installed engine that takes the source; PyTorch, with a note
    in `stats.fallbacks`, where a module cannot be converted for it. `precision`: "f32" or "bf16"; the
    engine is told, and asked what it runs; "auto": bf16 where the engine has it and is within 50 dB of f32
    on a picture of noise, else f32 (an `Upscaler` asks the picture itself); "int8": on OpenVINO, calibrated
    on `Options.calibration`, and refused where that is not close enough to f32. `options`: an `Options` or
    a mapping of its fields.

    Raises `ModelLoadError`, `BackendNotFoundError`, `BackendUnavailableError`, `OptionError`, `ExportError`,
    and `TimedOut` within a `time_limit`.
    """
    name = source if isinstance(source, (str, os.PathLike)) else type(source).__name__
    with span("load", source=name) as note:
        settings = as_options(options)
        session = in_time(partial(_load, source, backend, precision, settings), "while the model is opened")
        note(backend=session.backend, precision=session.precision)
    return session


def _load(source: Source, backend: str | Backend, precision: str, settings: Options) -> Session:
    if settings.calibration and precision != "int8":
        raise OptionError(f"calibration pictures are for precision int8, not for {precision}")
    if precision == "auto":
        from anysize.precision import Precisions, noise

        pair = Precisions(source, backend, settings)
        try:
            choice = pair.choose(noise(pair.precise.spec), "noise")
        except BaseException:
            pair.close()
            raise
        log.info("precision auto: %s", choice.reason)
        pair.close(but=choice.session)
        choice.session.precision_reason = choice.reason
        return choice.session
    if precision == "int8":
        from anysize.precision import load_int8

        return load_int8(source, backend, settings)
    chain: list[tuple[str | Backend, str]] = [(backend, precision)]
    for entry in settings.fallback:
        name, _, other = entry.partition(":")
        chain.append((name, other or precision))
    for _, wanted in chain:
        if wanted not in PRECISIONS:
            raise OptionError(f"precision must be one of {', '.join(PRECISIONS)}, not '{wanted}'")
        if wanted in ("auto", "int8"):
            raise OptionError(f"a fallback runs in f32 or bf16, not in {wanted}")
    if isinstance(source, (str, os.PathLike)) and not os.fspath(source):
        raise OptionError("the model's name is empty")
    source = located(source)
    kept = settings.cache()
    guards: list[ShapeGuard] = []
    skipped: list[str] = []
    for i, (engine_name, wanted) in enumerate(chain):
        try:
            engine = choose_backend(source, engine_name)
            engine_options = EngineOptions(wanted, settings.device, settings.threads, cache=kept)
            try:
                model = open_source(source, engine, kept)
            except ExportError as error:  # PyTorch runs what it cannot convert
                if engine_name != "auto" or "module" in engine.formats:
                    raise
                skipped.append(f"{engine.name}:{wanted}: {error}")
                log.warning("fallback: %s", skipped[-1])
                engine = get_backend("torch")
                model = open_source(source, engine, kept)
            live = settings.max_live or LIVE
            guards.append(ShapeGuard(engine, model, engine_options, settings.shapes, live))
        except (BackendUnavailableError, OptionError) as error:
            if i == len(chain) - 1 and not guards:
                raise
            name = engine_name if isinstance(engine_name, str) else engine_name.name
            skipped.append(f"{name}:{wanted}: {error}")
            log.warning("fallback: %s", skipped[-1])
    session = Session(guards, skipped)
    return tuned(session, settings)


def tuned(session: Session, settings: Options) -> Session:
    """The session with what is known about this machine, measured now if that was asked for."""
    from anysize.tuning import known, tune

    guard = session._guards[0]
    try:
        if (settings.streams or 1) > 1 and not guard.backend.has_streams:
            raise OptionError(f"{guard.backend.name} does one run at a time; leave streams at 1")
        session.streams, session.tuned = settings.streams, known(session)
        if session.tuned is None and settings.tune:
            try:
                tune(session)
            except AnysizeError as error:  # which the caller's own runs meet too, and their fallbacks heal
                log.warning("not tuned: %s", error)
    except BaseException:
        session.close()
        raise
    if session.tuned is not None and settings.max_live is None:
        guard.max_live = session.tuned.max_live
    return session


def as_options(options: Options | Mapping[str, Any] | None) -> Options:
    """An `Options` out of what callers give. Raises `OptionError`."""
    if isinstance(options, Options):
        return options
    if options is not None and not isinstance(options, Mapping):
        raise OptionError(f"options must be an Options or a mapping, not {type(options).__name__}")
    known = [f.name for f in fields(Options)]
    unknown = [k for k in options or {} if k not in known]
    if unknown:
        raise OptionError(f"unknown option '{unknown[0]}'; known: {', '.join(known)}")
    return Options(**dict(options or {}))


class Session:
    """One model on one engine (and its fallbacks, if the caller named any). Thread-safe.

    `spec`: the contract. `backend`, `precision`: names of what runs; the precision is the one asked for
    until the first program is compiled, then what the engine reported. `stats`: a snapshot of counters.
    `precision_reason`: why this precision, where that was measured. `tuned`: what was measured about its
    speed here, None if nothing was; `streams`: how many strips or tiles shall run at the same time, None for
    what that says. `skipped`: engines that `load` tried before, each with its reason.
    """

    def __init__(
        self, guards: list[ShapeGuard], skipped: list[str] | None = None, precision_reason: str | None = None
    ) -> None:
        self._guards = guards
        self.precision_reason = precision_reason
        self.tuned: Tuned | None = None
        self.streams: int | None = None
        self.skipped: tuple[str, ...] = tuple(skipped or ())
        self._fallbacks: list[str] = list(self.skipped)
        self._lock = threading.Lock()
        self._bytes: dict[tuple[tuple[str, int], ...], int | None] = {}
        self._apart: dict[type, BandRunner | LockstepRunner | AnysizeError] = {}
        self._taking = threading.Lock()  # apart, which takes long: counters are not to wait for it
        self._closed = False

    @property
    def spec(self) -> ModelSpec:
        return self._guards[0].spec

    @property
    def backend(self) -> str:
        return self._guards[0].backend.name

    @property
    def precision(self) -> str:
        return self.stats.precision

    @property
    def stats(self) -> Stats:
        """Counters so far, those of fallbacks added; names are of the first engine."""
        total = self._guards[0].stats()
        apart = [stats for runner in self._runners() for stats in runner.stats()]
        for stats in (*(guard.stats() for guard in self._guards[1:]), *apart):
            for name, value in asdict(stats).items():
                if isinstance(value, (int, float)):
                    setattr(total, name, getattr(total, name) + value)
        with self._lock:
            total.fallbacks = list(self._fallbacks)
        return total

    def run(self, feeds: Feeds, *, finite: bool = False, streams: int = 1) -> dict[str, Array]:
        """Run the model: arrays by input name -> arrays by output name, in the shapes `spec` says.

        Floating inputs are converted to the contract's dtype; other dtypes must match. Feeds are not
        changed; the results are the caller's. `finite` also checks that no output holds NaN or infinity.
        `streams`: how many such runs are made at the same time, if the caller makes several; the engine then
        gives each its share of the threads.
        Raises `ShapeError` before the engine runs, `ExecutionError` if it fails, `IntegrityError` if
        what it returns cannot be right, `TimedOut` within a `time_limit`.
        """
        if not isinstance(feeds, Mapping):
            raise OptionError(f"feeds are arrays by input name, not {type(feeds).__name__}")
        whole_number("streams", streams, 4096)
        arrays = {name: _array(name, value) for name, value in feeds.items()}
        for tensor in self.spec.inputs:
            if tensor.name in arrays:
                arrays[tensor.name] = _cast(arrays[tensor.name], tensor)
        for guard, following in zip(self._guards, [*self._guards[1:], None], strict=True):
            try:
                at_once = streams if guard.backend.has_streams else 1
                outputs = guard.run(arrays, finite=finite, streams=at_once)
                _ran.get(WeakSet()).add(guard)
                return outputs
            except (ExecutionError, IntegrityError) as error:
                if following is None:
                    raise
                self._note(guard, following, error)
        raise AssertionError("a session has at least one guard")

    def ran_here(self, *, reset: bool = False) -> list[Stats]:
        """Counters of the engines that runs of this context have used since it last reset this."""
        if reset:
            _ran.set(WeakSet())
        used = _ran.get(WeakSet())
        return [guard.stats() for guard in self._guards if guard in used]

    def alone(self) -> Session:
        """The first engine with programs of its own, and no fallbacks."""
        first = self._guards[0]
        guard = ShapeGuard(first.backend, first.model, first.options, first.strategy, LIVE)
        return Session([guard])

    def bands(self) -> BandRunner:
        """The model in bands, on the first engine. Raises `NotStreamable`, `BackendUnavailableError`."""
        from anysize.streaming import BandRunner

        return self._taken_apart(BandRunner)

    def lockstep(self) -> LockstepRunner:
        """The model in stages, on the first engine. Raises `NotStreamable`, `BackendUnavailableError`."""
        from anysize.lockstep import LockstepRunner

        return self._taken_apart(LockstepRunner)

    def _taken_apart(self, kind: type[Runner]) -> Runner:
        """Made once; what keeps a model from it does so each time."""
        with self._taking:
            with self._lock:
                closed, found = self._closed, self._apart.get(kind)
            if closed:
                raise OptionError("this session is closed")
            if found is None:
                try:
                    found = kind(self._guards[0])
                except AnysizeError as error:
                    found = error
                except Exception as error:  # a graph stranger than the pass foresees
                    text = f"{type(error).__name__}: {error}"
                    found = NotStreamable(f"the graph cannot be taken apart: {text}")
                    log.warning("the graph cannot be taken apart: %s", text, exc_info=True)
                with self._lock:
                    self._apart[kind] = found
        if isinstance(found, AnysizeError):
            raise found.with_traceback(None)
        assert isinstance(found, kind)
        return found

    def _runners(self) -> list[BandRunner | LockstepRunner]:
        with self._lock:
            return [runner for runner in self._apart.values() if not isinstance(runner, AnysizeError)]

    def identity(self) -> tuple[str, ...]:
        """What results follow from beside the inputs: weights, engine, its version, device and precision.

        Raises `OptionError` where nothing tells the weights from others: a module's own.
        """
        guard = self._guards[0]
        model, options = guard.model, guard.options
        # of ONNX with external data, the file that was read is not all
        weights = model.digest or ("" if model.format == "onnx" else self.spec.source_sha256)
        if not weights:
            raise OptionError("nothing tells this model from another: give a file of weights, or .onnx")
        ran = (guard.backend.name, guard.backend.version, options.device, options.precision)
        return weights, *ran, version_of("anysize")

    def working_bytes(self, sizes: Mapping[str, int]) -> int | None:
        """An estimate of the memory a run of these sizes takes; None where the graph cannot be read."""
        from anysize.exporters.cost import working_bytes

        key = tuple(sorted(sizes.items()))
        with self._lock:
            if key in self._bytes:
                return self._bytes[key]
        found = working_bytes(self._guards[0].model, sizes)
        with self._lock:
            if len(self._bytes) >= _MOST_SIZES:
                self._bytes.clear()
            self._bytes[key] = found
        return found

    def operations(self, sizes: Mapping[str, int]) -> tuple[int, int] | None:
        """Operations and bytes moved in a run of these sizes; None where the graph cannot be read."""
        from anysize.exporters.cost import operations

        return operations(self._guards[0].model, sizes)

    def fall_back(self, error: AnysizeError) -> bool:
        """After the first engine failed in bands: whether to go on in tiles, where the caller named another.

        After a result that came twice, also with the same one.
        """
        if isinstance(error, RepeatedError):
            log.warning("in tiles: %s", error)
            return True
        if len(self._guards) == 1:
            return False
        self._note(self._guards[0], self._guards[1], error)
        return True

    def _note(self, failed: ShapeGuard, following: ShapeGuard, error: Exception) -> None:
        names = [f"{g.backend.name}:{g.options.precision}" for g in (failed, following)]
        text = f"{names[0]} -> {names[1]}: {error}"
        log.warning("fallback: %s", text)
        with self._lock:
            self._fallbacks.append(text)

    def __call__(self, x: Array) -> Array:
        """The same for a model with one input and one output."""
        if len(self.spec.inputs) != 1 or len(self.spec.outputs) != 1:
            raise OptionError("this model has several inputs or outputs; use run() with names")
        return self.run({self.spec.inputs[0].name: x})[self.spec.outputs[0].name]

    def close(self) -> None:
        """Free the engine's programs. Further runs raise `OptionError`."""
        with self._lock:
            self._closed = True
        for guard in self._guards:
            guard.close()
        for runner in self._runners():
            runner.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _array(name: str, value: object) -> Array:
    try:
        return np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # tensors with gradients, or of dtypes it has not
        raise ShapeError(name, None, type(value).__name__, f"must be an array ({error})") from error


def _cast(array: Array, tensor: TensorSpec) -> Array:
    if array.dtype == tensor.dtype:
        return array
    if array.dtype.kind == "f" and tensor.dtype.kind == "f":
        return array.astype(tensor.dtype)
    raise ShapeError(tensor.name, None, f"dtype {array.dtype}", f"the dtype must be {tensor.dtype}")
