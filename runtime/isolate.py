"""A model in a process of its own: what it does to its engine, a crash, a hang, all the memory, ends there.

This is the caller's side; `isolate_worker` is the process's.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any
from weakref import finalize

from anysize.backends import errors
from anysize.backends.base import Array
from anysize.backends.errors import (
    AnysizeError,
    Cancelled,
    ExecutionError,
    IntegrityError,
    ModelLoadError,
    OptionError,
    TimedOut,
)
from anysize.guard import log
from anysize.isolate_worker import Message, read, write
from anysize.limit import seconds_left
from anysize.report import Report
from anysize.session import Options, as_options
from anysize.tiling import Tiling, as_tiling, parse_bytes
from anysize.upscale import Upscaler, check_outscale, result_size
from anysize.work import Cancel, Progress, Rows, as_check

_COMMAND = [sys.executable, "-P", "-m", "anysize.isolate_worker"]
#: seconds between looks at whether to stop
_LOOK = 0.05
_REPORTED = [field.name for field in fields(Report)]
#: bytes of memory with which an engine can be opened at all
_LEAST = 2**28


class Isolated(Upscaler):
    """An `Upscaler` whose model is opened and run in a process of its own. Thread-safe; one picture at once.

    `source`: a file or a name. `most`: bytes of memory, or text such as "4GiB", that the process may take
    (None: what the machine has left; not on Windows and macOS, which know no such limit). The other arguments
    are an `Upscaler`'s, with engines by name. A process that ends is an `ExecutionError`, or a
    `ModelLoadError` while the model is opened, and the next picture has a new one. Cancelling, and the end of
    a `time_limit`, end the process at once, also in the middle of a run; so does `close`, from any thread.

    It is a fence, not a prison: the process has the files and the network of its user.
    Raises what `Upscaler` raises.
    """

    at_once = 1

    def __init__(
        self,
        source: str | os.PathLike[str] = "default",
        *,
        backend: str = "auto",
        precision: str = "f32",
        tiling: Tiling | None = None,
        options: Options | None = None,
        verify: bool = False,
        most: int | str | None = None,
    ) -> None:
        if not isinstance(source, (str, os.PathLike)):
            raise OptionError("only a model in a file, or one by name, can be opened in another process")
        if not isinstance(backend, str):
            raise OptionError("an engine in another process is given by its name")
        self.tiling = as_tiling(tiling)
        settings = asdict(as_options(options))
        if not all(isinstance(picture, (str, os.PathLike)) for picture in settings["calibration"]):
            raise OptionError("calibration pictures of another process are files")
        settings["calibration"] = [os.fspath(picture) for picture in settings["calibration"]]
        if settings["cache_dir"] is not None:
            settings["cache_dir"] = os.fspath(settings["cache_dir"])
        limit = parse_bytes(most)
        if limit is not None and limit < _LEAST:
            raise OptionError(f"no engine can be opened in less than {_LEAST // 2**20} MiB, not {most!r}")
        self._job = {
            "source": os.fspath(source),
            "backend": backend,
            "precision": precision,
            "tiling": asdict(self.tiling),
            "options": settings,
            "verify": verify,
            "most": limit,
        }
        self._last = threading.local()
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._closed = False
        self._identity: Any = None
        self._open(as_check(None))

    def _upscale(
        self, array: Array, outscale: float | None, progress: Progress | None, cancel: Cancel | None
    ) -> Array:
        check_outscale(outscale)
        if not (progress is None or callable(progress)):
            raise OptionError(f"progress must be a function, not {type(progress).__name__}")
        stop = as_check(cancel)
        while not self._lock.acquire(timeout=_LOOK):  # another thread's picture
            _check(stop, "")
        try:
            self._open(stop)
            height, width, channels = array.shape
            shape = (*result_size(height, width, outscale, self.scale), channels)
            want = math.prod(shape) * array.dtype.itemsize
            answer, result = self._ask({"outscale": outscale}, array, want, stop, progress)
        finally:
            self._lock.release()
        if (result.shape, result.dtype) != (shape, array.dtype):
            raise IntegrityError(
                "the model's process returned another picture",
                backend="",
                got=(result.shape, result.dtype),
                want=(shape, array.dtype),
            )
        reported = answer.get("report")
        known = reported if isinstance(reported, dict) else {}
        self._last.report = Report(**{name: known[name] for name in _REPORTED if name in known})
        return result

    def stream(
        self, rows: Rows, *, progress: Progress | None = None, cancel: Cancel | None = None
    ) -> Generator[Array, None, None] | None:
        """None: whole pictures go from one process to the other."""
        return None

    def fall_back(self, error: AnysizeError) -> bool:
        """False: the other process has done so."""
        return False

    def identity(self) -> tuple[str, ...]:
        """As `Upscaler` does."""
        if isinstance(self._identity, str):
            raise OptionError(self._identity)
        return tuple(self._identity)

    def close(self) -> None:
        """End the process, also while it runs another thread's picture. Further ones are an `OptionError`."""
        self._closed = True
        if (child := self._child) is not None:
            child.kill()

    # -- under the lock, and in the constructor

    def _open(self, stop: Callable[[], bool]) -> None:
        """Have a process with the model opened: a new one where there is none that lives."""
        if self._closed:
            raise OptionError("this upscaler is closed")
        if self._child is not None and self._child.lives():
            return
        self._child = None  # the one that has ended
        self._child = _Child()
        if self._closed:  # just now
            self._child.kill()
        try:
            job = {**self._job, "level": log.getEffectiveLevel()}
            answer, _ = self._ask(job, None, 0, stop, None)
            scale, identity = answer.get("scale"), answer.get("identity")
            if not (type(scale) is int and scale >= 1 and _is_identity(identity)):
                raise _EndedError(f"its process says {answer}, which makes no sense", backend="")
        except BaseException as error:
            self._child.kill()
            if isinstance(error, _EndedError):
                raise ModelLoadError(f"{self._job['source']}: {error}") from error
            raise
        self.scale, self._identity = scale, identity

    def _ask(
        self,
        message: Message,
        data: Array | None,
        most: int,
        stop: Callable[[], bool],
        progress: Progress | None,
    ) -> tuple[Message, Array]:
        """What the process answers, with an array of at most so many bytes.

        Where no answer was read, for whatever reason, the process is ended: it would be the next question's.
        """
        assert self._child is not None
        answered = False
        try:
            self._child.send(message, data, most)
            while not answered:
                answer, array = self._child.receive(stop)
                match answer:
                    case {"log": [level, text]}:
                        if log.isEnabledFor(level):
                            log.handle(_record(level, text))
                    case {"progress": [done, total]}:
                        if progress is not None:
                            progress(done, total)
                    case _:
                        answered = True
        finally:
            if not answered:
                self._child.kill()
        if answer.get("ends"):
            self._child.kill()
        if "error" in answer:
            raise _error(answer)
        return answer, array


def _record(level: int, text: str) -> logging.LogRecord:
    """A message of the other process's logger."""
    known = {"name": log.name, "levelno": level, "levelname": logging.getLevelName(level), "msg": text}
    return logging.makeLogRecord(known)


def _is_identity(value: object) -> bool:
    """Text that says why there is none, or a list of text."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


class _EndedError(ExecutionError):
    """The process has ended."""


class _Child:
    """The process, and two threads at its pipes, so that neither end can keep its caller waiting."""

    def __init__(self) -> None:
        try:
            # what engines print, on either, is seen by who looks for faults
            shown = None if log.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(_COMMAND, stdin=pipe, stdout=pipe, stderr=shown)
        except OSError as error:  # no memory, or too many of them
            raise ExecutionError(f"no process can be started: {error}", backend="") from error
        self._messages: queue.Queue[tuple[Message, Array] | None] = queue.Queue()
        self._jobs: queue.Queue[tuple[Message, Array | None] | None] = queue.Queue()
        #: bytes that the array of an answer may have
        self._most = [0]
        # neither thread holds this object, so that the process ends with it
        for target, given in ((_listen, (self._messages, self._most)), (_talk, (self._jobs,))):
            name = f"anysize-isolated{target.__name__}"
            threading.Thread(target=target, args=(self._process, *given), name=name, daemon=True).start()
        self.kill = finalize(self, _end, self._process, self._jobs)

    def lives(self) -> bool:
        return self._process.poll() is None

    def send(self, message: Message, data: Array | None, most: int) -> None:
        self._most[0] = most
        self._jobs.put((message, data))

    def receive(self, stop: Callable[[], bool]) -> tuple[Message, Array]:
        """The next message. Raises `Cancelled`, `TimedOut` and `_EndedError`."""
        while True:
            _check(stop, ", and its process ended")
            left = seconds_left()
            try:
                found = self._messages.get(timeout=_LOOK if left is None else max(0.0, min(_LOOK, left)))
            except queue.Empty:
                continue
            if found is None:
                raise _EndedError(f"the model's process ended: {self._how()}", backend="")
            return found

    def _how(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"exit code {code}"
        with suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"


def _listen(
    process: subprocess.Popen[bytes], messages: queue.Queue[tuple[Message, Array] | None], most: list[int]
) -> None:
    """What the process says, until it ends or makes no sense."""
    assert process.stdout is not None
    try:
        with process.stdout as pipe:
            while True:
                messages.put(read(pipe, most))
    except Exception:  # whatever strange bytes can cause
        pass
    finally:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK)  # it may be ending by itself, and how is of interest
        process.kill()
        messages.put(None)


def _talk(process: subprocess.Popen[bytes], jobs: queue.Queue[tuple[Message, Array | None] | None]) -> None:
    """Tell the process its jobs. That it does not listen is told by what it does not answer."""
    assert process.stdin is not None
    with suppress(OSError), process.stdin as pipe:
        while (job := jobs.get()) is not None:
            write(pipe, *job)


def _end(process: subprocess.Popen[bytes], jobs: queue.Queue[tuple[Message, Array | None] | None]) -> None:
    process.kill()
    process.wait()
    jobs.put(None)


def _check(stop: Callable[[], bool], what: str) -> None:
    """Raise `Cancelled` or `TimedOut` where it is to stop."""
    if stop():
        raise Cancelled(f"cancelled{what}")
    left = seconds_left()
    if left is not None and left <= 0:
        raise TimedOut(f"the time is up{what}", backend="")


def _error(message: Message) -> AnysizeError:
    """The other process's error, as far as it is one of ours."""
    kind = getattr(errors, str(message["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, AnysizeError)):
        kind = ExecutionError
    error, text = kind.__new__(kind), str(message.get("text"))
    Exception.__init__(error, text)
    for name in ("shape", "tile", "got", "want"):
        setattr(error, name, None)
    error.message, error.backend = text, ""  # type: ignore[attr-defined]
    known = message.get("known")
    for name, value in known.items() if isinstance(known, dict) else ():
        if not name.startswith("_"):
            setattr(error, name, tuple(value) if isinstance(value, list) else value)
    return error
