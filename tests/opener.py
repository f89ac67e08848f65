"""Opens model files and runs them, each in a process of its own, forked from one with engines imported.

Reads lines of JSON, [file, engine, seconds it may take]; writes one for each, [what became of it, seconds].
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import sys
import time
from importlib import import_module
from pkgutil import iter_modules

import anysize
import anysize.backends
import anysize.exporters
import numpy as np
import onnx  # noqa: F401
import onnxruntime  # noqa: F401
import openvino  # noqa: F401
from anysize import AnysizeError
from anysize.backends import get_backend

#: bytes that a process may take
MEMORY = 2 * 2**30


def opened(file: str, engine: str) -> str:
    try:
        session = anysize.load(file, backend=engine, options={"cache_dir": "", "threads": 1})
        result = anysize.Upscaler(session)(np.zeros((12, 10, 3), np.uint8))
        return "taken" if result.dtype == np.uint8 else "another picture"
    except AnysizeError as error:
        return type(error).__name__
    except BaseException as error:
        return f"untyped {type(error).__name__}: {error}"


def alone(file: str, engine: str, limit: float) -> str:
    """What became of it in a process of its own; a signal's name where that ended."""
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.close(reads)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        os.write(writes, opened(file, engine).encode()[:4000])
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads, "rb") as pipe:
        said = pipe.read() if select.select([pipe], [], [], limit)[0] else b""
    done, status = os.waitpid(child, 0 if said else os.WNOHANG)
    if not done:
        time.sleep(0.2)  # it may be ending
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        return "no end"
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return said.decode() or f"exit code {os.WEXITSTATUS(status)}"


def main() -> None:
    for name in anysize.available_backends():
        get_backend(name)
    for package in (anysize, anysize.backends, anysize.exporters):  # once, not in each process
        for module in iter_modules(package.__path__, f"{package.__name__}."):
            if not module.name.startswith("anysize.cli"):
                import_module(module.name)
    quiet = os.open(os.devnull, os.O_WRONLY)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    for line in sys.stdin:
        started = time.monotonic()
        outcome = alone(*json.loads(line))
        print(json.dumps([outcome, time.monotonic() - started]), file=answers, flush=True)


if __name__ == "__main__":
    main()
