"""Whether a trace does what its module does, at many sizes, on tensors without data.

A trace is of one size. Where the module's code asks about a size (`if height % 8`), the trace has one answer
for all sizes, and the engine would return a picture of the right shape that is wrong. So module and trace are
run side by side at many sizes, on PyTorch's fake tensors, which cost microseconds at any size: they must call
the same operators on the same tensors with the same numbers. Where they do not, the export has to be held
against the module by value; it may well be right, as where padding by nothing was left out.
"""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from anysize.backends.spec import ModelSpec
from anysize.exporters.branches import Doubts, guards, is_thin, positions
from anysize.exporters.probing import batch_axis, clip

log = logging.getLogger("anysize")

#: (height, width) that come first: usual ones, with common factors and without, thin ones, large ones
_USUAL = (
    *((64, 64), (720, 1280), (1, 1), (37, 91), (512, 512), (1280, 720), (96, 160), (1000, 1500), (20, 700)),
    *((700, 20), (224, 224), (1080, 1920), (333, 500), (128, 128), (256, 256), (518, 518), (1024, 1024)),
    *((100, 1), (1, 100), (48, 72), (300, 200), (2160, 3840), (384, 384), (200, 300), (640, 480), (48, 48)),
    *((4096, 4096), (131, 131), (600, 800), (2048, 1365), (320, 320), (17, 300), (3000, 8), (8, 3000)),
    *((768, 768), (336, 336), (1344, 896), (832, 1216), (80, 80), (57, 240)),
)
#: what is run with data where nothing can be run without
_INSTEAD = ((64, 64), (96, 128), (20, 300))
#: how many of these where the module's code sees nothing of the sizes
_FEW = 8
#: calls of the module's operators in all, half a millisecond each, and sizes tried at least and at most
_CALLS, _LEAST, _MOST = 8_000, 16, 80
#: a run that calls so many times as many operators as the trace has is another one
_LONGER = 16
#: different ways of doing that are held by value, of each the smallest two
_WAYS = 8
#: bytes of a constant that is known by its values; larger ones by where they lie
_SMALL = 2**14
#: operators that return what they are given where nothing else changes
_COPIES = ("aten::clone", "aten::lift_fresh", "aten::lift_fresh_copy", "aten::detach", "aten::_to_copy")


def doubtful_sizes(module: Any, program: Any, spec: ModelSpec, traced: dict[str, int]) -> Doubts:
    """Small sizes of the contract at which `module` does something else than `program`, its trace.

    `program`: a `torch.export.ExportedProgram` of it, made at the sizes `traced`, whose inputs are the
    contract's in order. Of each other way of doing, the two smallest sizes found. A few usual sizes where
    this cannot be told.
    """
    instead = [(_sizes(spec, sides, 1), "") for sides in _INSTEAD]
    try:
        pair = _Pair(module, program, spec)
        own = pair.module(traced)
        failed = own.failed or ("it keeps tensors outside of itself" if pair.left_behind() else "")
    except Exception as error:  # weights that have no fakes
        failed = str(error)
    if failed:
        log.info("the module cannot be run without data, so %d sizes are run with: %s", len(instead), failed)
        return instead
    same_way = own.result == pair.trace(traced).result
    if not same_way:
        log.info("module and trace are not alike in all they call, so operators' names are compared")

    most = (1 + len(own.calls)) * _LONGER

    def other_way(sizes: dict[str, int], numbers: bool = True) -> tuple[str, ...] | None:
        """What the module calls where that is not what the trace does; None where they are alike."""
        run = pair.module(sizes, most)
        way = (run.failed,) if run.failed else run.calls
        if way == own.calls and not (numbers and same_way):
            return None
        comparable = same_way or run.failed
        return None if comparable and run.result == pair.trace(sizes, most).result else way

    def takes(way: tuple[str, ...], sizes: dict[str, int]) -> bool:
        return other_way(sizes) == way

    asked = {own.seen, *(pair.module(sizes).seen for sizes in _tried(spec, program, 2))}
    count = min(max(_CALLS // max(1, own.count), _LEAST), _MOST) if len(asked) > 1 else _FEW
    found: dict[tuple[str, ...], list[dict[str, int]]] = {}
    for i, sizes in enumerate(_tried(spec, program, count)):
        # the same operators with other numbers are rarer, and take as long again to find
        if (way := other_way(sizes, numbers=i < _FEW or i % 3 == 0)) is not None:
            found.setdefault(way, []).append(sizes)
    doubts = [] if same_way else list(instead)
    for way, several in sorted(found.items(), key=lambda item: min(map(positions, item[1])))[:_WAYS]:
        smallest = sorted(several, key=lambda sizes: (is_thin(spec, sizes), positions(sizes)))[:2]
        least = [_least(spec, sizes, partial(takes, way)) for sizes in smallest]
        doubts += [(sizes, ", where the module does not do what was traced") for sizes in least]
    return [one for i, one in enumerate(doubts) if one not in doubts[:i]]


def _tried(spec: ModelSpec, program: Any, count: int) -> Iterator[dict[str, int]]:
    """`count` sizes: usual ones, those that the trace's conditions name, then any."""
    rng = np.random.default_rng(0)
    named = sorted(_numbers(program))[: count // 8]
    near = [(number + d, number + d) for number in named for d in (0, 1)]
    seen: set[tuple[int, ...]] = set()
    steps = (1, 1, 2, 4, 7, 8, 16, 32, 64, 100)
    for i in range(8 * count):
        pairs = [*_USUAL, *near]
        if i < len(pairs):
            sides: Sequence[int] = pairs[i]
        else:
            step = int(rng.choice(steps))
            sides = [max(1, int(2 ** rng.uniform(0, 11.5)) // step) * step for _ in spec.dims]
        sizes = _sizes(spec, sides, (1, 2, 1, 5, 1, 3)[i % 6])
        key = tuple(sizes.values())
        if key not in seen and len(seen) < count:
            seen.add(key)
            yield sizes


def _sizes(spec: ModelSpec, sides: Sequence[int], batch: int) -> dict[str, int]:
    """Valid sizes about these: the batch's, and the others' in turn."""
    own, others = batch_axis(spec), [name for name in spec.dims if name != batch_axis(spec)]
    wanted = {name: sides[i % len(sides)] for i, name in enumerate(others)} | {own: batch}
    return {name: clip(dim, wanted[name]) for name, dim in spec.dims.items()}


def _numbers(program: Any) -> set[int]:
    """Sides that the conditions of the trace are about: their whole numbers, and products of two."""
    found = {abs(int(n)) for guard in guards(program) for n in guard.atoms() if n.is_Integer}
    large = sorted(n for n in found if 1 < n <= 4096)[:12]
    return {*large, *(a * b for a in large for b in large if a * b <= 4096)}


def _least(
    spec: ModelSpec, sizes: dict[str, int], likewise: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
    """As small as halving makes them where the same happens, and no side so small that nothing shows."""
    for name, dim in spec.dims.items():
        floor = clip(dim, dim.min + (0 if name == batch_axis(spec) else 8))
        if floor < sizes[name] and likewise(sizes | {name: floor}):  # most sides have no part in it
            sizes = sizes | {name: floor}
        while floor < (smaller := clip(dim, max(floor, sizes[name] // 2))) < sizes[name]:
            if not likewise(sizes | {name: smaller}):
                break
            sizes = sizes | {name: smaller}
    return sizes


@dataclass
class _Run:
    """What happened: a digest of the results, operators called (in all: their count), what code was told."""

    result: Any = None
    calls: tuple[str, ...] = ()
    count: int = 0
    seen: tuple[Any, ...] = ()
    failed: str = ""


class _Pair:
    """A module and its trace, to be run on fake tensors."""

    def __init__(self, module: Any, program: Any, spec: ModelSpec) -> None:
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.spec, self._module, self._program = spec, module, program
        self._weights = {**program.constants, **program.state_dict}
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        #: by real weight, its fake; by storage, what is in it
        self._fakes: dict[int, Any] = {}
        self._known = {
            weight.untyped_storage()._cdata: (_held(weight), _where(weight))
            for weight in self._weights.values()
        }
        self._made: list[weakref.ref[Any]] = []
        with self._mode:
            for weight in (*module.parameters(), *module.buffers()):
                fake = self._mode.from_tensor(weight)
                self._fakes[id(weight)] = fake
                self._known[fake.untyped_storage()._cdata] = _held(weight), _where(weight)

    def module(self, sizes: dict[str, int], most: int = 10**9) -> _Run:
        from anysize.backends.pytorch import flatten_outputs

        # a copy each time: modules keep tables of the last size
        module = copy.deepcopy(self._module, dict(self._fakes))
        return self._run(lambda *tensors: flatten_outputs(module(*tensors)), sizes, most)

    def trace(self, sizes: dict[str, int], most: int = 10**9) -> _Run:
        import torch

        program, weights = self._program, self._weights

        class Interpreter(torch.fx.Interpreter):
            def run_node(self, n: Any) -> Any:
                """Conditions are what is in question here."""
                asserts = n.op == "call_function" and "assert" in str(n.target)
                return None if asserts else super().run_node(n)

        def replay(*tensors: Any) -> Any:
            given = iter(tensors)
            specs = program.graph_signature.input_specs
            inputs = [next(given) if s.kind.name == "USER_INPUT" else weights[s.target] for s in specs]
            return Interpreter(program.graph_module).run(*inputs, enable_io_processing=False)

        return self._run(replay, sizes, most)

    def left_behind(self) -> bool:
        """Whether something still holds a tensor of the last run: a table that all copies of a module share.

        The caller's own runs would find these there.
        """
        gc.collect()
        return any(made() is not None for made in self._made)

    def _run(self, function: Callable[..., Any], sizes: dict[str, int], most: int) -> _Run:
        import torch

        run, shapes = _Run(), self.spec.input_shapes(sizes)
        recorder, watcher = _recorder(dict(self._known), most), _watcher()
        with self._mode, torch.no_grad(), torch.autocast("cpu", enabled=False):
            inputs = [
                torch.empty(shapes[t.name], dtype=getattr(torch, t.dtype.name)) for t in self.spec.inputs
            ]
            for i, tensor in enumerate(inputs):
                recorder.give(tensor, hash(("input", i)))
            try:
                with recorder, watcher:
                    outputs = function(*inputs)
                run.result = tuple((recorder.of(tensor), *tensor.shape) for tensor in outputs)
            except Exception as error:  # whatever the module raises
                run.failed = f"{type(error).__name__}: {error}"
                run.result = "failed"
        run.calls, run.count, run.seen = tuple(recorder.calls), len(recorder.alive), tuple(watcher.seen)
        own = {id(fake) for fake in self._fakes.values()}
        self._made = [weakref.ref(t) for t in recorder.alive if id(t) not in own and hasattr(t, "fake_mode")]
        return run


def _where(tensor: Any) -> tuple[Any, ...]:
    """In its storage."""
    return tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()


def _held(tensor: Any) -> int:
    """A digest of a real tensor: of small ones' values, so that constants made twice agree."""
    from torch.utils._python_dispatch import _disable_current_modes

    if tensor.nbytes <= _SMALL:
        with _disable_current_modes():
            return hash((tensor.dtype, str(tensor.detach().tolist())))
    return hash((tensor.untyped_storage().data_ptr(), _where(tensor)))


def _recorder(known: dict[int, Any], most: int) -> Any:
    """Notes which operators are called, and of each storage, as a digest, how what it holds came about."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            #: by storage: what is in it, and as what
            self.holds = known
            self.alive: list[Any] = []  # a storage's number is taken again once it is free
            self.calls: list[str] = []

        def give(self, tensor: Any, digest: int) -> None:
            self.holds[tensor.untyped_storage()._cdata] = digest, _where(tensor)
            self.alive.append(tensor)

        def of(self, tensor: Any) -> int:
            """Of its values. A view is where it lies in what it is of, by whichever steps it was taken."""
            place = tensor.untyped_storage()._cdata
            if place not in self.holds:
                self.give(tensor, hash("unknown") if isinstance(tensor, FakeTensor) else _held(tensor))
            (digest, whole), where = self.holds[place], _where(tensor)
            return digest if where == whole else hash((digest, whole, where))

        def digest(self, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return self.of(value)
            if isinstance(value, (list, tuple)):
                return tuple(map(self.digest, value))
            return repr(value)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given, schema = kwargs or {}, func._schema
            if func.is_view:
                out = func(*args, **given)
                self.alive.append(out)
                return out
            named = sorted((k, v) for k, v in given.items() if k != "device")
            call = hash((str(func), self.digest(args), self.digest(named)))
            out = func(*args, **given)
            several = out if isinstance(out, (list, tuple)) else (out,)
            outs = [one for one in several if isinstance(one, torch.Tensor)]
            if not outs and not schema.is_mutable:  # such as which device a tensor is on
                return out
            if schema.name in _COPIES and (outs[0].dtype, outs[0].shape) == (args[0].dtype, args[0].shape):
                self.give(outs[0], self.of(args[0]))
                return out
            self.calls.append(str(func))
            if len(self.calls) > most:
                raise RuntimeError("far more operators than in the trace")
            written = [
                a
                for a, s in zip(args, schema.arguments, strict=False)
                if s.alias_info is not None and s.alias_info.is_write and isinstance(a, torch.Tensor)
            ]
            for tensor in written:
                place = tensor.untyped_storage()._cdata
                self.holds[place] = hash((call, _where(tensor))), self.holds[place][1]
            for i, made in enumerate(outs):
                if not any(made is tensor for tensor in written):
                    self.give(made, hash((call, i)))
            return out

    return Recorder()


def _watcher() -> Any:
    """Notes what Python code is told of tensors: shapes, numbers, whether they are so or so."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Watcher(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Any] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, (bool, int, float, str, torch.Size)):
                self.seen.append((str(func), out))
            return out

    return Watcher()
