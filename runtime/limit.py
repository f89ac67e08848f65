"""A limit of time for whatever runs a model, also where an engine hangs."""

from __future__ import annotations

import atexit
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager, suppress
from contextvars import ContextVar, copy_context
from typing import Any, Protocol, TypeVar

from anysize.backends.errors import ExecutionError, OptionError, TimedOut

T = TypeVar("T")


class _Closes(Protocol):
    def close(self) -> Any: ...


Closes = TypeVar("Closes", bound=_Closes)
#: when, by the monotonic clock, what is done in this context has to end
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)
#: seconds that the process, as it ends, waits for runs that were left
_PATIENCE = 5.0


@contextmanager
def time_limit(seconds: float | None) -> Iterator[None]:
    """Whatever opens or runs models in this `with` raises `TimedOut` after so many seconds of wall-clock.

    A run that has begun cannot be stopped: it goes on in a thread, its result is dropped, and its program is
    not used again. The process can end meanwhile: it ends what still goes on there, at the next step in
    Python, and waits for it, but no longer than 5 seconds. An engine that keeps Python's lock cannot be left
    before it gives it back. What is measured in processes of its own (`sweep`, `anysize bench`) and
    `anysize.exporters.export`, called by itself, go on to their end. Within another limit, the one that ends
    first counts; None is no limit. Raises `OptionError` for what is not a positive number.
    """
    check_seconds(seconds)
    ends = [outer] if (outer := _deadline.get()) is not None else []
    if seconds is not None:
        ends.append(time.monotonic() + min(seconds, threading.TIMEOUT_MAX))
    token = _deadline.set(min(ends, default=None))
    try:
        yield
    finally:
        _deadline.reset(token)


def check_seconds(seconds: float | None) -> None:
    """Raise `OptionError` unless None or a positive number."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and seconds > 0):
        raise OptionError(f"a time limit must be a positive number of seconds, not {seconds!r}")


def seconds_left() -> float | None:
    """Until the limit; None where there is none."""
    ends = _deadline.get()
    return None if ends is None else ends - time.monotonic()


def limited() -> bool:
    """Whether there is a limit here."""
    return _deadline.get() is not None


def wait_for(future: Future[T], what: str) -> T:
    """Its result. Raises what it raises, and `TimedOut` at the limit."""
    ends = _deadline.get()
    try:
        return future.result(None if ends is None else max(0.0, ends - time.monotonic()))
    except NotYet:
        if future.done():  # its own error
            raise
        raise TimedOut(f"the time is up, {what}", backend="") from None


class NotBegun(TimedOut):
    """The time was up before there was anything to leave."""


def in_time(function: Callable[[], T], what: str) -> T:
    """Call it. Raises `TimedOut` at the limit: `NotBegun` before the call or, leaving it to itself, in it."""
    ends = _deadline.get()
    if ends is None:
        return function()
    if time.monotonic() >= ends:
        raise NotBegun(f"the time is up, {what}", backend="")
    return wait_for(in_a_thread(function), what)


@contextmanager
def closing_in_time(thing: Closes) -> Iterator[Closes]:
    """Close it at the end, unless the time was up, when a run of it may still go on."""
    try:
        yield thing
    except TimedOut:
        raise
    except BaseException:
        thing.close()
        raise
    thing.close()


class _Run(threading.Thread):
    """One that keeps no process from ending for more than a few seconds."""


def in_a_thread(function: Callable[[], T]) -> Future[T]:
    """Call it in a `_Run`. Raises `ExecutionError` where no thread can be started."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    thread = _Run(target=copy_context().run, args=(run,), name="anysize-limited", daemon=True)
    try:
        thread.start()
    except RuntimeError as error:  # no memory, or too many of them
        raise ExecutionError(f"no thread can be started: {error}", backend="") from error
    return future


def runs_left() -> list[_Run]:
    """Those that still go on."""
    return [thread for thread in threading.enumerate() if isinstance(thread, _Run)]


@atexit.register
def _end_runs() -> None:
    """Before Python ends, end the runs that were left, as far as a short wait can.

    A thread that comes back from an engine to a Python that is ending is unwound by CPython before 3.14,
    through C++ frames that do not allow that: the process would abort.
    """
    ends = time.monotonic() + _PATIENCE
    for run in runs_left():
        # where it runs many operators one by one, it gets no further than the next; silent in a thread
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(run.ident or 0), ctypes.py_object(SystemExit)
        )
    for run in runs_left():
        with suppress(RuntimeError):  # its start was interrupted
            run.join(max(0.0, ends - time.monotonic()))
