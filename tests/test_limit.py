"""A limit of time: how a process ends that left a run to itself, and what the limit reaches."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from anysize.files import write_picture

#: leaves some runs that would take a second or more, one after the other, and ends with code 7
LEAVES = """
import sys, threading, time
import anysize, numpy
session = anysize.load("default", backend=sys.argv[1])
session(numpy.zeros((1, 3, 64, 64), numpy.float32))
started, left = time.monotonic(), 0
for side in (256, 384, 512):
    try:
        with anysize.time_limit(0.1):
            session(numpy.zeros((1, 3, side, side), numpy.float32))
    except anysize.TimedOut:
        left += 1
print(left, time.monotonic() - started, flush=True)
sys.exit(7)
"""
#: leaves one that never ends
HANGS = """
import sys, threading
import anysize
from anysize.limit import in_time
try:
    with anysize.time_limit(0.1):
        in_time(threading.Event().wait, "in a run")
except anysize.TimedOut:
    sys.exit(7)
"""


def ended(*command: str | Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """How the process did, and in how many seconds."""
    started = time.monotonic()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=100)
    return done, time.monotonic() - started


def test_a_process_ends_with_its_own_code_though_a_run_goes_on(backend: str) -> None:
    """An abort, or worse, was seen where a thread came back from the engine to a Python that was ending."""
    done, _ = ended("-c", LEAVES, backend)
    assert (done.returncode, done.stderr) == (7, "")
    left, seconds = done.stdout.split()
    assert int(left) >= 1
    assert float(seconds) < 3


def test_a_process_ends_though_a_run_never_does() -> None:
    done, seconds = ended("-c", HANGS)
    assert (done.returncode, done.stderr) == (7, "")
    assert seconds < 15


@pytest.mark.parametrize("method", ["whole", "tile"])
def test_the_command_ends_with_its_own_code_though_a_run_goes_on(
    tmp_path: Path, backend: str, method: str
) -> None:
    write_picture(tmp_path / "a.png", np.zeros((700, 700, 3), np.uint8))
    out = tmp_path / "out.png"
    line = ["upscale", tmp_path / "a.png", "-o", out, "--backend", backend, "--method", method]
    done, seconds = ended("-m", "anysize.cli", *line, "--timeout", "0.3")
    assert done.returncode == 1
    assert done.stderr.startswith("error: the time is up")
    assert not out.exists()
    assert seconds < 15
