"""The engine contract. `tests/test_conformance.py` is its executable form: an engine passes or is none."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from anysize.backends.cache import Cache
from anysize.backends.spec import ModelSpec

Array = np.ndarray[Any, np.dtype[Any]]
Feeds = Mapping[str, Array]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, eq=False)
class Model:
    """A model in one form an engine may take.

    `format` and `data`: "module" a `torch.nn.Module` in eval mode that nobody else changes; "onnx" the
    file's bytes, or its path where it does not stand alone (external data); "xml" the path of an OpenVINO
    IR; plugins may add their own. `spec` is None only while a foreign file is being probed. `states`: inputs
    that take, in a sequence of runs, what the run before gave as the output named here. A model that only
    starts a sequence has such outputs without the inputs.
    """

    format: str
    data: Any
    spec: ModelSpec | None = None
    states: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def digest(self) -> str | None:
        """The sha256 of the bytes; None where the model is not bytes."""
        return hashlib.sha256(self.data).hexdigest() if isinstance(self.data, bytes) else None


@dataclass(frozen=True)
class EngineOptions:
    """What an engine is asked for.

    `threads` None: the engine's own default, all cores. `streams`: runs that will be made at the same time
    and share the threads. `cache`: where it may keep compiled programs.
    """

    precision: str = "f32"
    device: str = "cpu"
    threads: int | None = None
    streams: int = 1
    cache: Cache | None = None


def cores() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Port:
    """An input or output as the engine declares it; None marks an axis it leaves open."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Executable(ABC):
    """One compiled program.

    `precision` and `device` are what really runs, read back from the engine where it tells.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    precision: str
    device: str

    @abstractmethod
    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run once. Thread-safe; never changes `feeds`; returns C-contiguous arrays that the caller owns."""

    def sequence(self, links: Mapping[str, str], states: Feeds) -> Sequence:
        """Start a sequence of runs at these states; `links` are the model's `states`.

        Passing arrays from run to run serves every engine; one that can keep them inside overrides this.
        """
        return PassedStates(self, links, states)

    def close(self) -> None:  # noqa: B027 - most engines free their program with the object
        """Free the program. Called once, when no run is under way."""


class Sequence(ABC):
    """Runs of one program in order, each beginning with the states the one before ended with.

    Not thread-safe; sequences of one program are independent of each other.
    """

    @abstractmethod
    def run(self, feeds: Feeds) -> dict[str, Array]:
        """One run; `feeds` and the result are without the states. As `Executable.run` otherwise."""

    @abstractmethod
    def states(self) -> dict[str, Array]:
        """The states as they are now, by the name of their input; arrays the caller owns."""


class PassedStates(Sequence):
    """States as arrays that the program takes and gives."""

    def __init__(self, program: Executable, links: Mapping[str, str], states: Feeds) -> None:
        self._program, self._links, self._states = program, links, dict(states)

    def run(self, feeds: Feeds) -> dict[str, Array]:
        outputs = self._program.run({**feeds, **self._states})
        self._states = {name: outputs.pop(following) for name, following in self._links.items()}
        return outputs

    def states(self) -> dict[str, Array]:
        return {name: np.array(value) for name, value in self._states.items()}


class Backend(ABC):
    """An engine. Constructing one imports the engine, and only that may fail with `ImportError`."""

    name: ClassVar[str]
    #: model formats it takes, best first
    formats: ClassVar[tuple[str, ...]]
    precisions: ClassVar[tuple[str, ...]] = ("f32",)
    #: True if a program compiled for fixed shapes runs better than one for any shape
    prefers_static: ClassVar[bool] = False
    #: True if it can make several runs at the same time, each on a share of the threads
    has_streams: ClassVar[bool] = False
    #: True if NaN passes its ReLU and clip, so that a pixel's reach can be traced by it
    propagates_nan: ClassVar[bool] = False

    @property
    @abstractmethod
    def version(self) -> str:
        """The engine's version."""

    @abstractmethod
    def check(self, options: EngineOptions) -> None:
        """Raise `OptionError` for a precision or device that the engine or this processor has not."""

    @abstractmethod
    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        """Compile for exactly these input shapes, or for any (None). `options` have passed `check`.

        Raises `ModelLoadError` for data the engine cannot read, and whatever it raises for anything else.
        """

    def metadata(self, model: Model) -> dict[str, str]:
        """The texts stored in the model's file, by key; empty where the format holds none."""
        return {}
