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
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, fields
from typing import Any
from weakref import finalize

import numpy as np
import psutil
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
from anysize.isolate_worker import Message, await_start, read, write
from anysize.limit import seconds_left
from anysize.models import BUNDLED
from anysize.report import Report
from anysize.session import Options, as_options
from anysize.tiling import Tiling, as_tiling, parse_bytes
from anysize.upscale import Upscaler, check_outscale, result_size
from anysize.work import Cancel, Progress, Rows, as_check

#: seconds between looks at whether to stop
_LOOK = 0.05
#: looks after which a process that has ended says no more
_LAST_LOOKS = 5
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
    A later process must find the same model and engine, else it is a `ModelLoadError`.

    It is a fence, not a prison: the process has the files and the network of its user.
    Raises what `Upscaler` raises, and `OptionError` from within a picture's own `progress` or `cancel`.
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
        if not isinstance(verify, bool):
            raise OptionError(f"verify must be True or False, not {verify!r}")
        self.tiling, self.verify = as_tiling(tiling), verify
        settings = asdict(as_options(options))
        if not all(isinstance(picture, (str, os.PathLike)) for picture in settings["calibration"]):
            raise OptionError("calibration pictures of another process are files")
        # a later process may start when the program is in another folder
        settings["calibration"] = [_absolute(picture) for picture in settings["calibration"]]
        if settings["cache_dir"]:
            settings["cache_dir"] = _absolute(settings["cache_dir"])
        name = os.fspath(source)
        if name not in BUNDLED and os.path.exists(name):
            name = _absolute(name)
        limit = parse_bytes(most)
        if limit is not None and limit < _LEAST:
            raise OptionError(f"no engine can be opened in less than {_LEAST // 2**20} MiB, not {most!r}")
        self._job = {
            "source": name,
            "backend": backend,
            "precision": precision,
            "tiling": asdict(self.tiling),
            "options": settings,
            "verify": verify,
            "most": limit,
        }
        self._last = threading.local()
        #: by process, as a fork lacks the thread that may have the lock
        self._turns: dict[int, _Turn] = {}
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
        me, turn = threading.get_ident(), self._turns.setdefault(os.getpid(), _Turn())
        if turn.owner == me:
            raise OptionError("this upscaler is busy with the picture that this call is made in")
        try:
            while not turn.lock.acquire(timeout=_LOOK):  # another thread's picture
                _check(stop, "")
            turn.owner = me
            self._open(stop)
            height, width, channels = array.shape
            shape = (*result_size(height, width, outscale, self.scale), channels)
            want = math.prod(shape) * array.dtype.itemsize
            answer, result = self._ask({"outscale": outscale}, array, want, stop, progress)
        finally:
            if turn.owner == me:
                turn.owner = 0
                turn.lock.release()
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
        """Have a process with the model opened: a new one where there is none that waits for a question."""
        if self._closed:
            raise OptionError("this upscaler is closed")
        if self._child is not None:
            if self._child.is_free():
                return
            self._child.kill()
        source = self._job["source"]
        child = self._child = _Child()
        try:
            if self._closed:  # just now
                child.kill()
            answer, _ = self._ask(self._job, None, 0, stop, None)
            scale, identity = answer.get("scale"), answer.get("identity")
            if not (type(scale) is int and scale >= 1 and _is_identity(identity)):
                raise _EndedError(f"its process says {answer}, which makes no sense", backend="")
            if self._identity not in (None, identity):
                raise ModelLoadError(f"{source}: no longer the model, or the engine, that was opened first")
        except BaseException as error:
            child.kill()
            if isinstance(error, _EndedError):
                raise ModelLoadError(f"{source}: {error}") from error
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

        Where no answer was read, for whatever reason, it would be the next question's: the process stays busy
        and is never asked again, also where an exception keeps it from being ended here.
        """
        child = self._child
        assert child is not None
        try:
            child.send({**message, "level": max(1, log.getEffectiveLevel())}, data, most)
            while child.busy:
                answer, array = child.receive(stop)
                match answer:
                    case {"log": [level, text]}:
                        if log.isEnabledFor(level):
                            log.handle(_record(level, text))
                    case {"progress": [done, total]}:
                        if progress is not None:
                            progress(done, total)
                    case _:
                        child.busy = False
        finally:
            if child.busy:
                child.kill()
        if answer.get("ends"):
            child.kill()
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


class _Turn:
    """Who has it makes the one picture at once."""

    def __init__(self) -> None:
        self.lock, self.owner = threading.Lock(), 0


class _Child:
    """The process, and two threads at its pipes, so that neither end can keep its caller waiting."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[tuple[Message, Array] | None] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[tuple[Message, Array | None] | None] = queue.SimpleQueue()
        #: bytes that the array of an answer may have
        self._most = [0]
        #: whether it has something to do, or was ended
        self.busy = True
        self._owner = os.getpid()
        # what engines print, on either, is seen by who looks for faults
        shown = None if log.isEnabledFor(logging.DEBUG) else subprocess.DEVNULL
        pipe = subprocess.PIPE
        try:
            # in a session of its own, so that a terminal's Ctrl-C is for its caller alone
            self._process = subprocess.Popen(
                _command(), stdin=pipe, stdout=pipe, stderr=shown, start_new_session=True
            )
        except OSError as error:  # no memory, or too many of them
            raise ExecutionError(f"no process can be started: {error}", backend="") from error
        finalize(self, _end, self._process, self._jobs, self._owner)
        # neither thread holds this object, so that the process ends with it
        for target, given in ((_listen, (self._messages, self._most)), (_talk, (self._jobs,))):
            name = f"anysize-isolated{target.__name__}"
            thread = threading.Thread(target=target, args=(self._process, *given), name=name, daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no memory, or too many of them
                self.kill()
                raise ExecutionError(f"no thread can be started: {error}", backend="") from error

    def is_free(self) -> bool:
        return not self.busy and self._owner == os.getpid() and not _has_ended(self._process)

    def kill(self) -> None:
        """End it, and all that it has started. Can be done again, where an exception broke in."""
        self.busy = True
        if self._owner == os.getpid():  # not a fork, whose process this is not
            _end(self._process, self._jobs, self._owner)
            self._process.wait()

    def send(self, message: Message, data: Array | None, most: int) -> None:
        self.busy = True
        self._most[0] = most
        self._jobs.put((message, None if data is None else np.ascontiguousarray(data)))

    def receive(self, stop: Callable[[], bool]) -> tuple[Message, Array]:
        """The next message. Raises `Cancelled`, `TimedOut` and `_EndedError`."""
        looks = 0
        while True:
            _check(stop, ", and the model's process was ended")
            left = seconds_left()
            try:
                found = self._messages.get(timeout=_LOOK if left is None else max(0.0, min(_LOOK, left)))
            except queue.Empty:
                looks += _has_ended(self._process)
                if looks < _LAST_LOOKS:
                    continue
                found = None  # though something that it has started has its end of the pipe
            if found is None:
                raise _EndedError(f"the model's process ended: {self._how()}", backend="")
            return found

    def _how(self) -> str:
        _kill(self._process)
        code = self._process.wait()
        if code >= 0:
            return f"exit code {code}"
        with suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"


def _absolute(path: Any) -> str:
    try:
        return str(os.path.abspath(path))
    except OSError as error:
        raise OptionError(f"{path}: the folder that it is relative to is gone") from error


def _command() -> list[str]:
    """The process finds modules where this one does, except in the folder that it happens to be in."""
    if not sys.executable:
        raise ExecutionError("where Python is not a program of its own, no other can be started", backend="")
    places = [place for place in sys.path if isinstance(place, str) and place]  # as Python does
    code = f"import sys; sys.path[:] = {places!r}; from anysize.isolate_worker import main; main()"
    return [sys.executable, "-P", "-c", code]


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    """Without taking note of it, after which its number could be another's."""
    try:
        return psutil.Process(process.pid).status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.Error:
        return True
    except OSError:  # no file can be opened, so nobody knows
        return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """And all that it has started, on systems that know such groups. Does not wait."""
    if process.returncode is None:
        with suppress(OSError):
            if hasattr(os, "killpg"):
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()


def _end(
    process: subprocess.Popen[bytes], jobs: queue.SimpleQueue[tuple[Message, Array | None] | None], owner: int
) -> None:
    if owner == os.getpid():
        _kill(process)
        jobs.put(None)


def _listen(
    process: subprocess.Popen[bytes],
    messages: queue.SimpleQueue[tuple[Message, Array] | None],
    most: list[int],
) -> None:
    """What the process says, until it ends or makes no sense."""
    assert process.stdout is not None
    try:
        with process.stdout as pipe:
            await_start(pipe)
            while True:
                messages.put(read(pipe, most))
    except Exception:  # whatever strange bytes can cause
        pass
    finally:
        ends = time.monotonic() + _LOOK
        while not _has_ended(process) and time.monotonic() < ends:  # by itself, and how is of interest
            time.sleep(_LOOK / 10)
        _kill(process)
        messages.put(None)


def _talk(
    process: subprocess.Popen[bytes], jobs: queue.SimpleQueue[tuple[Message, Array | None] | None]
) -> None:
    """Tell the process its jobs. That it does not listen is told by what it does not answer."""
    assert process.stdin is not None
    with suppress(OSError), process.stdin as pipe:
        while (job := jobs.get()) is not None:
            try:
                write(pipe, *job)
            except Exception:
                _kill(process)
            del job  # a caller's picture
    process.wait()


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
    text = str(message.get("text"))
    error = _made(kind, text, message.get("known"))
    try:
        str(error)  # made from what was said
    except Exception:
        error = _made(ExecutionError, text, None)
    return error


def _made(kind: type[AnysizeError], text: str, known: object) -> AnysizeError:
    error = kind.__new__(kind)
    Exception.__init__(error, text)
    plain = {"shape": None, "tile": None, "got": None, "want": None, "backend": ""}
    for name, value in {**plain, **(known if isinstance(known, dict) else {})}.items():
        if not (name.startswith("_") or hasattr(Exception, name)):
            setattr(error, name, tuple(value) if isinstance(value, list) else value)
    error.message = text  # type: ignore[attr-defined]
    return error
