"""Which engines exist: four of our own, and whatever the entry point group `anysize.backends` names."""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

from anysize.backends.base import Backend, EngineOptions
from anysize.backends.errors import BackendNotFoundError, BackendUnavailableError

ENTRY_POINT_GROUP = "anysize.backends"

#: name -> "module:class", fastest first; each name is also the extra that installs its engine
BUILTIN = {
    "openvino": "anysize.backends.openvino:OpenVINOBackend",
    "onnxruntime": "anysize.backends.onnxruntime:OnnxRuntimeBackend",
    "torch": "anysize.backends.pytorch:TorchBackend",
    "ncnn": "anysize.backends.ncnn:NcnnBackend",
}


@dataclass(frozen=True)
class BackendInfo:
    """One engine as it stands here; `problem` says why it cannot be used (None: it can)."""

    name: str
    version: str | None
    formats: tuple[str, ...]
    precisions: tuple[str, ...]
    install: str
    problem: str | None


@cache
def _plugins() -> dict[str, str]:
    from importlib.metadata import entry_points

    return {e.name: e.value for e in entry_points(group=ENTRY_POINT_GROUP) if e.name not in BUILTIN}


def known_backends() -> dict[str, str]:
    """All registered backends by preference: name -> "module:class"."""
    return {**BUILTIN, **_plugins()}


def _backend_class(name: str) -> type[Backend]:
    known = known_backends()
    if name not in known:
        raise BackendNotFoundError(f"unknown backend '{name}'; known: {', '.join(known)}")
    module, _, attribute = known[name].partition(":")
    cls: type[Backend] = getattr(importlib.import_module(module), attribute)
    return cls


@cache
def get_backend(name: str) -> Backend:
    """The engine of this name; imports it.

    Raises `BackendNotFoundError` for an unknown name, `BackendUnavailableError` (with the install line)
    for an engine that is missing or fails to import.
    """
    try:
        return _backend_class(name)()
    except BackendNotFoundError:
        raise
    except Exception as error:  # a broken engine or plugin fails in its own way
        raise BackendUnavailableError(
            f"backend '{name}' cannot be used: {error}; install it with: {install_line(name)}", name=name
        ) from error


def install_line(name: str) -> str:
    """The pip command that installs the engine of a built-in backend."""
    return f'pip install "anysize[{name}]"' if name in BUILTIN else "see the plugin's own page"


def available_backends() -> list[str]:
    """Names of the backends whose engine works here, fastest first."""
    return [info.name for info in describe_backends() if info.problem is None]


def _precisions(backend: Backend) -> tuple[str, ...]:
    """Those that this processor runs."""
    able = []
    for precision in backend.precisions:
        with suppress(Exception):  # a plugin may refuse in its own way
            backend.check(EngineOptions(precision))
            able.append(precision)
    return tuple(able)


def describe_backends() -> list[BackendInfo]:
    """Every registered backend, working or not. Imports all installed engines."""
    found = []
    for name in known_backends():
        try:
            backend = get_backend(name)
        except BackendUnavailableError as error:
            found.append(BackendInfo(name, None, (), (), install_line(name), str(error)))
        else:
            found.append(
                BackendInfo(
                    name, backend.version, backend.formats, _precisions(backend), install_line(name), None
                )
            )
    return found
