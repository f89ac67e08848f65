"""The shape guard: one model on one engine, the right program for each shape, checked on both sides.

Before a run the feeds are held against the contract, so the engine never sees a size it would break on.
After it, names, dtypes, shapes and (where asked) finiteness of the outputs are held against the output
rule, so another shape's result is an error and never a picture. Nor is a result that was given before.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import numpy as np
from anysize.backends import base
from anysize.backends.base import Array, Backend, EngineOptions, Executable, Feeds, Model
from anysize.backends.errors import AnysizeError, ExecutionError, IntegrityError, OptionError, TimedOut
from anysize.limit import NotBegun, in_a_thread, in_time, limited, wait_for
from anysize.stale import Results, digest_of_feeds, digest_of_results
from anysize.tracing import span

log = logging.getLogger("anysize")

Strategy = Literal["auto", "static", "dynamic"]
#: the shapes a program is for (None: any), and how many of its runs are made at the same time
Key = tuple[tuple[tuple[str, tuple[int, ...]], ...] | None, int]

# A shape that keeps coming back after the bound is reached earns a program of its own.
_PROMOTE_AFTER = 8
_REMEMBERED = 256
#: where a limit of time ended
_COMPILING, _RUNNING = "while the model is compiled", "in a run"


@dataclass
class Stats:
    """Counters of one guard or session; seconds are wall-clock.

    `calls`: runs that gave results. `compiles`, `live`: programs made, and alive now. `cache_hits`: calls
    that found their program. `evictions`: programs that gave way to others. `failed`: runs that raised in the
    engine, took too long or were found wrong; `discarded`: programs thrown away. `repeated`: results that had
    come before, and were asked for again. `fallbacks`: each use of another engine, with its reason.
    """

    calls: int = 0
    compiles: int = 0
    cache_hits: int = 0
    evictions: int = 0
    failed: int = 0
    discarded: int = 0
    repeated: int = 0
    compile_seconds: float = 0.0
    run_seconds: float = 0.0
    live: int = 0
    backend: str = ""
    device: str = ""
    precision: str = ""
    fallbacks: list[str] = field(default_factory=list)


class _Program:
    """An executable with a count of its users, so that it is closed once and never under a run."""

    def __init__(self, key: Key) -> None:
        self.key = key
        #: who compiles it has this turn, and leaves what came of it in `ready`
        self.turn, self.ready = threading.Lock(), Future[Executable]()
        #: the thread that compiles it for those who have a limit of time
        self.compiling: Future[None] | None = None
        self.users = 0
        self.retired = False
        self.hangs = False


class ShapeGuard:
    """Programs of one model on one backend, at most `max_live` at a time, least recently used out first.

    Weights, precision, options and engine version are fixed for a guard's life, so shapes and the number of
    runs at the same time key its programs. `strategy` "static" compiles per distinct shape, "dynamic" has one
    program for all, "auto" is static while few shapes are alive on engines that gain from it.
    """

    def __init__(
        self, backend: Backend, model: Model, options: EngineOptions, strategy: Strategy, max_live: int
    ) -> None:
        assert model.spec is not None
        if strategy not in ("auto", "static", "dynamic"):
            raise OptionError(f"shapes must be auto, static or dynamic, not {strategy!r}")
        if max_live < 1:
            raise OptionError(f"max_live must be at least 1, not {max_live}")
        backend.check(options)
        self.backend, self.model, self.spec, self.options = backend, model, model.spec, options
        self.strategy, self.max_live = strategy, max_live
        self._programs: OrderedDict[Key, _Program] = OrderedDict()
        self._asked: OrderedDict[Key, int] = OrderedDict()
        self._results, self._pictures = Results(), self.spec.scale is not None
        self._lock = threading.Lock()
        self._closed = False
        self._stats = Stats(backend=backend.name, device=options.device, precision=options.precision)

    def stats(self) -> Stats:
        """A snapshot."""
        with self._lock:
            copy = Stats(**self._stats.__dict__)
            copy.live = sum(program.ready.done() for program in self._programs.values())
            return copy

    def run(self, feeds: Feeds, *, finite: bool, streams: int = 1) -> dict[str, Array]:
        """One checked run, of `streams` at the same time.

        Raises `ShapeError`, `ExecutionError`, `IntegrityError` or `TimedOut`.
        """
        outputs, program = self._run(feeds, finite, streams)
        if self._pictures:
            given, result = digest_of_feeds(feeds), digest_of_results(outputs.values())
            if self._results.earlier(given, result):
                self._confirm(program, feeds, result, finite, streams)
        return outputs

    def _run(self, feeds: Feeds, finite: bool, streams: int) -> tuple[dict[str, Array], _Program]:
        shapes = {name: value.shape for name, value in feeds.items()}
        sizes = self.spec.bind(shapes)
        program = self._acquire((tuple(sorted(shapes.items())), streams))
        try:
            with self._watched(program, shapes):
                executable = self._executable(program)
                started = time.perf_counter()
                with span("run", backend=self.backend.name, shapes=shapes):
                    outputs = in_time(partial(executable.run, feeds), _RUNNING)
                seconds = time.perf_counter() - started
                self._check(outputs, self.spec.output_shapes(sizes), feeds, shapes, finite)
        finally:
            self._release(program)
        self._count(executable, seconds)
        return outputs, program

    def _confirm(self, program: _Program, feeds: Feeds, result: int, finite: bool, streams: int) -> None:
        """Ask again for what came twice, after something else, and a new program the first time.

        Where values are cut off at 0 or 1, it may well be right. Raises `IntegrityError` unless it is.
        """
        shapes = {name: value.shape for name, value in feeds.items()}
        log.info("a result came twice for %s on %s, and is asked for again", shapes, self.backend.name)
        with self._lock:
            self._stats.repeated += 1
        if not self._results.is_usual(result):
            self._discard(program)
        answers = []
        for asked in (self._noise(feeds), feeds):
            outputs, program = self._run(asked, finite, streams)
            answers.append(digest_of_results(outputs.values()))
        if answers[0] == result or answers[1] != result:
            with self._lock:
                self._stats.failed += 1
            self._discard(program)
            raise IntegrityError(
                "the engine returned an earlier result again, which is not this picture's",
                backend=self.backend.name,
                shape=shapes,
                got="an earlier result",
                want="a new one",
            )
        self._results.confirm(result)

    def _noise(self, feeds: Feeds) -> dict[str, Array]:
        rng, (low, high) = np.random.default_rng(0), self.spec.value_range
        return {n: np.asarray(rng.uniform(low, high, a.shape), a.dtype) for n, a in feeds.items()}

    def begin(self, feeds: Feeds, states: Feeds, streams: int = 1) -> Sequence:
        """Start a sequence of checked runs on feeds of these shapes, beginning at these states.

        For a model with `states`. The sequence holds its program until it is closed. Raises as `run` does.
        """
        shapes = {name: value.shape for name, value in {**feeds, **states}.items()}
        want = self.spec.output_shapes(self.spec.bind(shapes))
        program = self._acquire((tuple(sorted(shapes.items())), streams))
        try:
            with self._watched(program, shapes):
                executable = self._executable(program)
                inner = in_time(partial(executable.sequence, self.model.states, states), _RUNNING)
        except BaseException:
            self._release(program)
            raise
        kept = set(self.model.states.values())
        return Sequence(self, program, inner, shapes, {n: s for n, s in want.items() if n not in kept})

    @contextmanager
    def _watched(self, program: _Program, shapes: object) -> Iterator[None]:
        """Whatever goes wrong in the engine ends the program and is one of our errors."""
        try:
            yield
        except NotBegun as error:
            error.backend, error.shape = self.backend.name, shapes
            raise
        except Exception as error:
            with self._lock:
                self._stats.failed += 1
            if not isinstance(error, AnysizeError):
                # Engines have been seen to keep failing, or to answer with old data, after one failure.
                self._discard(program)
                raise ExecutionError(
                    f"the engine failed: {_first_line(error)}", backend=self.backend.name, shape=shapes
                ) from error
            if isinstance(error, IntegrityError):
                self._discard(program)
            if isinstance(error, TimedOut):
                error.backend, error.shape = self.backend.name, shapes
                if program.ready.done():  # its run goes on; what is still being compiled will be of use
                    program.hangs = True
                    self._discard(program)
            raise

    def _count(self, executable: Executable, seconds: float) -> None:
        with self._lock:
            self._stats.calls += 1
            self._stats.run_seconds += seconds
            self._stats.device, self._stats.precision = executable.device, executable.precision

    def close(self) -> None:
        """Free all programs; those in use are freed by the run that ends last."""
        with self._lock:
            self._closed = True
            programs = list(self._programs.values())
            self._programs.clear()
        for program in programs:
            self._retire(program)

    # -- choosing and compiling

    def _choose(self, key: Key) -> Key:
        """Under the lock: the key of the program that shall serve this shape."""
        open_key = (None, key[1])
        if self.strategy == "dynamic" or (self.strategy == "auto" and not self.backend.prefers_static):
            return open_key
        if self.strategy == "static" or key in self._programs:
            return key
        if len(self._programs) < self.max_live:
            return key
        self._asked[key] = asked = self._asked.pop(key, 0) + 1
        while len(self._asked) > _REMEMBERED:
            self._asked.popitem(last=False)
        if asked > _PROMOTE_AFTER and self.max_live > 1:
            del self._asked[key]
            return key
        return open_key

    def _acquire(self, key: Key) -> _Program:
        """The program for it, compiled or not."""
        retired = []
        with self._lock:
            if self._closed:
                raise OptionError("this session is closed")
            key = self._choose(key)
            program = self._programs.get(key)
            if program is None:
                program = self._programs[key] = _Program(key)
                while len(self._programs) > self.max_live:
                    # a program for any shape goes last
                    oldest = min((k for k in self._programs if k != key), key=lambda k: k[0] is None)
                    retired.append(self._programs.pop(oldest))
                    self._stats.evictions += 1
            else:
                self._stats.cache_hits += 1
                self._programs.move_to_end(key)
            program.users += 1
        for old in retired:
            self._retire(old)
        return program

    def _executable(self, program: _Program) -> Executable:
        """Compiled by who comes first; others wait, and have what came of it, also an error.

        An exception that breaks in, such as Ctrl-C's, is of its thread alone: another one compiles.
        """
        if not (limited() or program.ready.done()):
            self._compile(program)
        if not program.ready.done():
            with self._lock:
                program.compiling = program.compiling or in_a_thread(partial(self._compile, program))
            wait_for(program.compiling, _COMPILING)
        return program.ready.result()

    def _compile(self, program: _Program) -> None:
        with program.turn:
            if not program.ready.done():
                try:
                    program.ready.set_result(self._compiled(program.key))
                except Exception as error:
                    self._drop(program)
                    program.ready.set_exception(error)

    def _compiled(self, key: Key) -> Executable:
        started = time.perf_counter()
        shapes = None if key[0] is None else dict(key[0])
        try:
            options = replace(self.options, streams=key[1])
            with span("compile", backend=self.backend.name, shapes=shapes or "any"):
                executable = self.backend.compile(self.model, shapes, options)
            if executable.precision != self.options.precision:
                raise ExecutionError(
                    f"asked for {self.options.precision}, but the engine runs {executable.precision}",
                    backend=self.backend.name,
                    shape=shapes,
                )
        except AnysizeError:
            raise
        except Exception as error:
            raise ExecutionError(
                f"the engine cannot compile this model: {_first_line(error)}",
                backend=self.backend.name,
                shape=shapes,
            ) from error
        seconds = time.perf_counter() - started
        with self._lock:
            self._stats.compiles += 1
            self._stats.compile_seconds += seconds
            self._stats.device, self._stats.precision = executable.device, executable.precision
        log.debug("compiled for %s on %s in %.3f s", shapes or "any shape", self.backend.name, seconds)
        return executable

    def _drop(self, program: _Program) -> bool:
        """So that the next call gets a fresh one. Whether it was there."""
        with self._lock:
            there = self._programs.get(program.key) is program
            if there:
                del self._programs[program.key]
            return there

    def _discard(self, program: _Program) -> None:
        """Drop a program that failed in a run."""
        if self._drop(program):
            with self._lock:
                self._stats.discarded += 1
        self._retire(program)

    def _retire(self, program: _Program) -> None:
        with self._lock:
            program.retired = True
            idle = program.users == 0
        if idle:
            _close(program)

    def _release(self, program: _Program) -> None:
        with self._lock:
            program.users -= 1
            last = program.users == 0 and program.retired
        if last:
            _close(program)

    # -- what came back

    def _check(
        self,
        outputs: dict[str, Array],
        want: dict[str, tuple[int, ...]],
        feeds: Feeds,
        shapes: object,
        finite: bool,
    ) -> None:
        def wrong(message: str, got: object, expected: object) -> IntegrityError:
            return IntegrityError(message, backend=self.backend.name, shape=shapes, got=got, want=expected)

        if set(outputs) != set(want):
            raise wrong(f"outputs {sorted(outputs)} instead of {sorted(want)}", sorted(outputs), sorted(want))
        for tensor in self.spec.outputs:
            if tensor.name not in want:  # a state, which the engine keeps
                continue
            output = outputs[tensor.name]
            if output.shape != want[tensor.name]:
                raise wrong(
                    f"output '{tensor.name}' has shape {output.shape}, the contract says {want[tensor.name]}",
                    output.shape,
                    want[tensor.name],
                )
            if output.dtype != tensor.dtype:
                raise wrong(
                    f"output '{tensor.name}' is {output.dtype}, not {tensor.dtype}",
                    output.dtype,
                    tensor.dtype,
                )
            # min and max carry NaN and infinity without a temporary of the output's size
            if finite and output.size and not (np.isfinite(output.min()) and np.isfinite(output.max())):
                raise wrong(
                    f"output '{tensor.name}' holds values that are not finite", "not finite", "finite"
                )
        if name := self._results.shares_memory(outputs, feeds):
            raise wrong(
                f"output '{name}' lies in memory of an input, or of a result still in use", "shared", "own"
            )


class Sequence:
    """Checked runs of one program in order, each taking up the states of the one before."""

    def __init__(
        self,
        guard: ShapeGuard,
        program: _Program,
        inner: base.Sequence,
        shapes: dict[str, tuple[int, ...]],
        want: dict[str, tuple[int, ...]],
    ) -> None:
        self._guard, self._program, self._inner = guard, program, inner
        self._shapes, self._want = shapes, want

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """One run on feeds of the shapes it was begun with; outputs must be finite. Raises as `run` does."""
        for name, value in feeds.items():
            assert value.shape == self._shapes[name], (name, value.shape)
        with self._guard._watched(self._program, self._shapes):
            started = time.perf_counter()
            with span("run", backend=self._guard.backend.name, shapes=self._shapes):
                outputs = in_time(partial(self._inner.run, feeds), _RUNNING)
            seconds = time.perf_counter() - started
            self._guard._check(outputs, self._want, feeds, self._shapes, True)
        self._guard._count(self._program.ready.result(), seconds)
        return outputs

    def states(self) -> dict[str, Array]:
        """The states as they are now, by input name."""
        with self._guard._watched(self._program, self._shapes):
            return in_time(self._inner.states, _RUNNING)

    def close(self) -> None:
        """Let go of the program. Once only."""
        self._guard._release(self._program)


def _close(program: _Program) -> None:
    if program.ready.done() and program.ready.exception() is None and not program.hangs:
        program.ready.result().close()


def _first_line(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0].strip()}" if lines else type(error).__name__
