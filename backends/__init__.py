"""Engines behind one contract, the errors, and the model contract as data."""

from anysize.backends.base import Backend, EngineOptions, Executable, Model, Port
from anysize.backends.registry import (
    BackendInfo,
    available_backends,
    describe_backends,
    get_backend,
    install_line,
    known_backends,
)
from anysize.backends.spec import SPEC_KEY, Dim, ModelSpec, Rule, TensorSpec

__all__ = [
    "SPEC_KEY",
    "Backend",
    "BackendInfo",
    "Dim",
    "EngineOptions",
    "Executable",
    "Model",
    "ModelSpec",
    "Port",
    "Rule",
    "TensorSpec",
    "available_backends",
    "describe_backends",
    "get_backend",
    "install_line",
    "known_backends",
]
