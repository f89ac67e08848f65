"""A model in a process of its own: what it does to its engine, a crash, a hang, all the memory, ends there.

The two processes exchange JSON and the bytes of arrays, nothing that runs code when it is read.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import asdict, fields
from typing import IO, Any

import numpy as np
from anysize.backends import errors
from anysize.backends.base import Array
from anysize.backends.errors import (
    AnysizeError,
    Cancelled,
    ExecutionError,
    IntegrityError,
    MemoryBudgetError,
    ModelLoadError,
    OptionError,
    TimedOut,
)
from anysize.limit import seconds_left
from anysize.report import Report
from anysize.session import Options, as_options
from anysize.tiling import Tiling, parse_bytes
from anysize.upscale import Upscaler, check_outscale, result_size
from anysize.work import Cancel, Progress, Rows, as_check

_COMMAND = [sys.executable, "-P", "-m", "anysize.isolate"]
#: seconds between looks at whether to stop
_LOOK = 0.05
_REPORTED = [field.name for field in fields(Report)]
#: bytes of a message beside its array
_LONGEST = 2**24


class Isolated(Upscaler):
    """An `Upscaler` whose model is opened and run in a process of its own. Thread-safe; one picture at once.

    `source`: a file or a name. `most`: bytes of memory, or text such as "4GiB", that the process may take
    (None: what the machine has left; not on Windows and macOS, which know no such limit). The other arguments
    are an `Upscaler`'s, with engines by name. A process that ends is an `ExecutionError`, or a
    `ModelLoadError` while the model is opened, and the next picture has a new one. Cancelling, and the end of
    a `time_limit`, end the process at once, also in the middle of a run.

    It is a fence, not a prison: the process has the files and the network of its user.
    Raises what `Upscaler` raises.
    """

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
        self.tiling = Tiling() if tiling is None else tiling
        settings = asdict(as_options(options))
        if not all(isinstance(picture, (str, os.PathLike)) for picture in settings["calibration"]):
            raise OptionError("calibration pictures of another process are files")
        settings["calibration"] = [os.fspath(picture) for picture in settings["calibration"]]
        if settings["cache_dir"] is not None:
            settings["cache_dir"] = os.fspath(settings["cache_dir"])
        self._job = {
            "source": os.fspath(source),
            "backend": backend,
            "precision": precision,
            "tiling": asdict(self.tiling),
            "options": settings,
            "verify": verify,
            "most": parse_bytes(most),
        }
        self._last = threading.local()
        self._lock = threading.Lock()
        self._child: _Child | None = None
        with self._lock:
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
            child = self._open(stop)
            child.send({"outscale": outscale}, np.ascontiguousarray(array))
            answer, result = self._answer(child, stop, progress, "report")
        finally:
            self._lock.release()
        height, width, channels = array.shape
        size = result_size(height, width, outscale, self.scale)
        if (result.shape, result.dtype) != ((*size, channels), array.dtype):
            raise IntegrityError(
                "the model's process returned another picture",
                backend="",
                got=(result.shape, result.dtype),
                want=((*size, channels), array.dtype),
            )
        self._last.report = Report(**{name: answer["report"].get(name) for name in _REPORTED})
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
        """End the process."""
        with self._lock:
            if self._child is not None:
                self._child.kill()
                self._child = None

    # -- under the lock

    def _open(self, stop: Callable[[], bool]) -> _Child:
        """The process, with the model opened; a new one where there is none."""
        if self._child is None:
            self._child = _Child()
            self._child.send(self._job)
            try:
                answer, _ = self._answer(self._child, stop, None, "scale", "identity")
            except _EndedError as error:
                raise ModelLoadError(f"{self._job['source']}: {error}") from error
            self.scale, self._identity = answer["scale"], answer["identity"]
        return self._child

    def _answer(
        self, child: _Child, stop: Callable[[], bool], progress: Progress | None, *wanted: str
    ) -> tuple[dict[str, Any], Array]:
        """What the process says at last, which has what is wanted. Ends it where it is to stop."""
        try:
            while True:
                message, data = child.receive(stop)
                if "progress" in message:
                    if progress is not None:
                        progress(*message["progress"])
                elif "error" in message:
                    raise _error(message)
                elif message.keys() >= set(wanted):
                    return message, data
                else:
                    raise _EndedError(f"the model's process said something else: {list(message)}", backend="")
        except BaseException as error:
            if not isinstance(error, AnysizeError) or isinstance(error, (Cancelled, TimedOut, _EndedError)):
                child.kill()
                self._child = None
            raise


class _EndedError(ExecutionError):
    """The process has ended."""


class _Child:
    """The process and its two pipes."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(_COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._messages: queue.Queue[tuple[dict[str, Any], Array] | None] = queue.Queue()
        threading.Thread(target=self._listen, name="anysize-isolated", daemon=True).start()

    def send(self, message: dict[str, Any], data: Array | None = None) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, OSError):  # its end is told by what it does not answer
            _write(self._process.stdin, message, data)

    def receive(self, stop: Callable[[], bool]) -> tuple[dict[str, Any], Array]:
        """The next message. Raises `Cancelled`, `TimedOut` and `_EndedError`."""
        while True:
            _check(stop, ", and its process ended")
            left = seconds_left()
            try:
                found = self._messages.get(timeout=_LOOK if left is None else max(0.0, min(_LOOK, left)))
            except queue.Empty:
                continue
            if found is None:
                raise _EndedError(f"the model's process ended: {self._end()}", backend="")
            return found

    def _end(self) -> str:
        code = self._process.wait()
        if code >= 0:
            return f"exit code {code}"
        with suppress(ValueError):
            return signal.Signals(-code).name
        return f"signal {-code}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                assert pipe is not None
                pipe.close()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with suppress(OSError, ValueError, EOFError, TypeError, KeyError, RecursionError):
            while True:
                self._messages.put(_read(self._process.stdout))
        self._process.kill()  # also where what it says makes no sense
        self._messages.put(None)


def _check(stop: Callable[[], bool], what: str) -> None:
    """Raise `Cancelled` or `TimedOut` where it is to stop."""
    if stop():
        raise Cancelled(f"cancelled{what}")
    left = seconds_left()
    if left is not None and left <= 0:
        raise TimedOut(f"the time is up{what}", backend="")


def _error(message: dict[str, Any]) -> AnysizeError:
    """The other process's error, as far as it is one of ours."""
    kind = getattr(errors, str(message["error"]), None)
    if not (isinstance(kind, type) and issubclass(kind, AnysizeError)):
        kind = ExecutionError
    error = kind.__new__(kind)
    Exception.__init__(error, str(message["text"]))
    known = {"message": str(message["text"]), "backend": ""} | dict.fromkeys(("shape", "tile", "got", "want"))
    for name, value in {**known, **message["known"]}.items():
        setattr(error, name, tuple(value) if isinstance(value, list) else value)
    return error


def _write(pipe: IO[bytes], message: dict[str, Any], data: Array | None = None) -> None:
    if data is not None:
        message = {**message, "shape": data.shape, "dtype": data.dtype.str}
    text = json.dumps(message).encode()
    pipe.write(struct.pack("<I", len(text)) + text)
    if data is not None:
        pipe.write(data.reshape(-1).view(np.uint8).data)
    pipe.flush()


def _read(pipe: IO[bytes]) -> tuple[dict[str, Any], Array]:
    """Raises `EOFError` at the end, and `ValueError` where it makes no sense."""
    (length,) = struct.unpack("<I", _exactly(pipe, 4))
    if length > _LONGEST:
        raise ValueError("too long a message")
    message = json.loads(_exactly(pipe, length))
    data = np.empty(0, np.uint8)
    if "dtype" in message:
        dtype = np.dtype(str(message["dtype"]))
        if dtype.kind not in "uif":
            raise ValueError("not an array of numbers")
        data = np.empty(tuple(map(int, message["shape"])), dtype)
        view, have = data.reshape(-1).view(np.uint8).data, 0
        while have < len(view):
            got = pipe.readinto(view[have:])  # type: ignore[attr-defined]
            if not got:
                raise EOFError
            have += got
    return message, data


def _exactly(pipe: IO[bytes], count: int) -> bytes:
    data = pipe.read(count)
    if len(data) < count:
        raise EOFError
    return data


# -- in the process


def main() -> None:
    """Opens the model of the first message, and upscales the picture of each that follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides
    given, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what engines print is no answer
    jobs: queue.Queue[tuple[dict[str, Any], Array]] = queue.Queue()

    def listen() -> None:
        try:
            while True:
                jobs.put(_read(given))
        finally:  # nobody is there any more
            os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    job, _ = jobs.get()
    _limit(job["most"])
    try:
        upscaler = _opened(job)
        try:
            identity: Any = upscaler.identity()
        except OptionError as error:
            identity = str(error)
        _write(answers, {"scale": upscaler.scale, "identity": identity})
    except BaseException as error:
        _write(answers, _said(error))
        return
    while True:
        job, array = jobs.get()
        shown = [0.0]

        def progress(done: int, total: int, shown: list[float] = shown) -> None:
            if done == total or time.monotonic() - shown[0] > _LOOK:
                shown[0] = time.monotonic()
                _write(answers, {"progress": [done, total]})

        try:
            result = upscaler(array, outscale=job["outscale"], progress=progress)
            assert upscaler.report is not None
            _write(answers, {"report": upscaler.report.to_dict()}, np.ascontiguousarray(result))
        except BaseException as error:
            _write(answers, _said(error))


def _opened(job: dict[str, Any]) -> Upscaler:
    options = {**job["options"], "fallback": tuple(job["options"]["fallback"])}
    return Upscaler(
        job["source"],
        backend=job["backend"],
        precision=job["precision"],
        tiling=Tiling(**job["tiling"]),
        options=Options(**{**options, "calibration": tuple(options["calibration"])}),
        verify=job["verify"],
    )


def _limit(most: int | None) -> None:
    """No core dumps, and no more memory than that."""
    try:
        import resource
    except ImportError:  # Windows
        return
    from anysize.memory import available

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        most = most or available()
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _said(error: BaseException) -> dict[str, Any]:
    """An error as a message."""
    if isinstance(error, MemoryError):
        error = MemoryBudgetError("the model's process may take no more memory")
    text = str(error) if isinstance(error, AnysizeError) else f"{type(error).__name__}: {error}"
    if isinstance(error, ExecutionError | IntegrityError | TimedOut):
        text = error.message
    known = {}
    for name, value in vars(error).items():
        with suppress(TypeError, ValueError):
            json.dumps({name: value})
            known[name] = value
    kind = type(error).__mro__
    name = next((k.__name__ for k in kind if k.__module__ == errors.__name__), "ExecutionError")
    return {"error": name, "text": text, "known": known}


if __name__ == "__main__":
    main()
