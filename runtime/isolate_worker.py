"""The process of an `Isolated`, and the messages between the two.

JSON and the bytes of arrays: nothing that runs code when it is read.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import IO, Any

import numpy as np
from anysize.backends import errors
from anysize.backends.base import Array
from anysize.backends.errors import (
    AnysizeError,
    ExecutionError,
    IntegrityError,
    MemoryBudgetError,
    OptionError,
    TimedOut,
)
from anysize.guard import log
from anysize.session import Options
from anysize.tiling import Tiling
from anysize.upscale import Upscaler

#: bytes of a message beside its array
_LONGEST = 2**24
#: seconds between two messages of how far a picture is
_SHOWN = 0.05

#: characters of a text, and of an error's attribute, that a message may hold
_LONG = 2**16
#: what the process says first; before that, other code may have printed
_START = b"anysize begins\n"

Message = dict[str, Any]


def await_start(pipe: IO[bytes]) -> None:
    """Pass over what was printed before the process had begun. Raises `EOFError`."""
    while (line := pipe.readline(_LONG)) != _START:
        if not line:
            raise EOFError


def write(pipe: IO[bytes], message: Message, data: Array | None = None) -> None:
    if data is not None:
        message = {**message, "shape": data.shape, "dtype": data.dtype.str}
    text = json.dumps(message).encode()
    pipe.write(struct.pack("<I", len(text)) + text)
    if data is not None:
        pipe.write(data.reshape(-1).view(np.uint8).data)
    pipe.flush()


def read(pipe: IO[bytes], most: Sequence[int] = (sys.maxsize,)) -> tuple[Message, Array]:
    """A message, and its array of at most so many bytes.

    Raises `EOFError` at the end, and `ValueError` where it makes no sense, among others.
    """
    (length,) = struct.unpack("<I", _exactly(pipe, 4))
    if length > _LONGEST:
        raise ValueError("too long a message")
    message = json.loads(_exactly(pipe, length))
    if not isinstance(message, dict):
        raise ValueError("not a message")
    for name, kinds in (("progress", [int, int]), ("log", [int, str])):
        if name in message and [type(part) for part in message[name]] != kinds:
            raise ValueError(f"not {kinds}")
    data = np.empty(0, np.uint8)
    if "dtype" in message:
        dtype = np.dtype(str(message["dtype"]))
        shape = tuple(map(int, message["shape"]))
        if dtype.kind not in "uif" or math.prod(shape) * dtype.itemsize > most[0]:
            raise ValueError("not an array of numbers, or not one of that size")
        data = np.empty(shape, dtype)
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


def main() -> None:
    """Opens the model of the first message, and upscales the picture of each that follows."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process decides
    given, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what engines print is no answer
    answers.write(b"\n" + _START)
    answers.flush()
    jobs: queue.Queue[tuple[Message, Array] | MemoryError] = queue.Queue()
    turn = threading.Lock()  # threads may have something to say at once

    def tell(message: Message, data: Array | None = None) -> None:
        with turn:
            write(answers, message, data)

    def listen() -> None:
        try:
            while True:
                jobs.put(read(given))
        except MemoryError as error:
            jobs.put(error)
        except Exception:  # nobody is there any more
            os._exit(0)

    def following() -> tuple[Message, Array]:
        job = jobs.get()
        if isinstance(job, MemoryError):  # what comes next on the pipe is the rest of a picture
            tell({**_said(job), "ends": True})
            os._exit(0)
        return job

    threading.Thread(target=listen, daemon=True).start()
    job, _ = following()
    log.setLevel(job["level"])
    log.addHandler(_Passing(tell))
    _limit(job["most"])
    try:
        upscaler = _opened(job)
        try:
            identity: Any = upscaler.identity()
        except OptionError as error:
            identity = str(error)
        tell({"scale": upscaler.scale, "identity": identity})
    except BaseException as error:
        tell(_said(error))
        return
    while True:
        _answer(upscaler, tell, *following())


def _answer(upscaler: Upscaler, tell: Callable[..., None], job: Message, array: Array) -> None:
    """One picture, of which nothing is left when it is answered."""
    shown = 0.0

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if done == total or time.monotonic() - shown > _SHOWN:
            shown = time.monotonic()
            tell({"progress": [done, total]})

    log.setLevel(job["level"])
    try:
        result = upscaler(array, outscale=job["outscale"], progress=progress)
        assert upscaler.report is not None
        tell({"report": upscaler.report.to_dict()}, np.ascontiguousarray(result))
    except BaseException as error:
        tell(_said(error))


class _Passing(logging.Handler):
    """Gives messages to the other process."""

    def __init__(self, tell: Callable[[Message], None]) -> None:
        super().__init__()
        self.tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.tell({"log": [record.levelno, self.format(record)[:_LONG]]})
        except Exception:
            self.handleError(record)


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
            if len(json.dumps({name: value})) <= _LONG:
                known[name] = value
    kind = type(error).__mro__
    name = next((k.__name__ for k in kind if k.__module__ == errors.__name__), "ExecutionError")
    return {"error": name, "text": text[:_LONG], "known": known}
