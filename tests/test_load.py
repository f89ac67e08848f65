"""Under load: many threads, models, sizes and engines at once; processes that share a cache."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import anysize
import numpy as np
import psutil
import pytest
import torch
from anysize import Cancelled, ShapeError, Tiling, TimedOut, Upscaler, time_limit
from anysize.backends.base import Array
from anysize.models.architectures import SRVGGNetCompact
from conftest import ENGINES, ToyBox
from fuzzing import NIGHTLY

SECONDS = 600 if NIGHTLY else 15
SIZES = [(16, 16), (17, 40), (48, 31), (64, 64), (33, 100), (90, 70), (120, 64), (7, 9)]
KINDS = [(3, np.uint8), (4, np.uint8), (1, np.uint16), (3, np.float32)]
#: how much more memory the last fifth of the time may take than the second one: what the allocator holds of
#: eight threads' freed results comes and goes by so much
MEMORY = 1.05


#: threads that open OpenVINO and do what it does with a new program's ports, at the same moment
FIRST = """
import os, sys, threading
from anysize.backends.openvino import import_openvino
together, threads = threading.Barrier(8), []
def port():
    together.wait()
    import_openvino().Type.f32.to_dtype()
sys.setswitchinterval(1e-6)
for _ in range(8):
    threads.append(threading.Thread(target=port, daemon=True))
    threads[-1].start()
for thread in threads:
    thread.join(5)
os._exit(any(thread.is_alive() for thread in threads))
"""


def digest(array: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.skipif("openvino" not in ENGINES, reason="a lock of OpenVINO's")
def test_first_programs_of_threads_do_not_wait_for_each_other() -> None:
    """In six of ten processes they did, in turns for a table of its and for Python's lock."""
    for _ in range(5):
        assert subprocess.run([sys.executable, "-c", FIRST]).returncode == 0


def test_eight_threads(
    toybox: ToyBox, picture: Callable[..., Array], record_property: Callable[[str, object], None]
) -> None:
    """Each result is the one that was had alone; what a thread cancels, or has no time for, is an error."""
    ways = [
        (source, engine, tiling, shapes)
        for engine in ENGINES
        for source, tiling, shapes in (
            ("default", Tiling("whole"), "static"),
            ("default", Tiling("tile", 32), "dynamic"),
            (toybox.file("Doubling") if engine != "torch" else "default", Tiling("whole"), "dynamic"),
            *([("default", Tiling("stream", 16), "static")] if engine != "torch" else []),
        )
    ]
    upscalers = [
        Upscaler(source, backend=engine, tiling=tiling, options={"shapes": shapes, "max_live": 3})  # type: ignore[arg-type]
        for source, engine, tiling, shapes in ways
    ]
    pictures = [picture(*size, *kind) for size in SIZES for kind in KINDS]
    want = [[digest(upscale(x)) for x in pictures] for upscale in upscalers]
    outcomes, lock = Counter[str](), threading.Lock()
    problems: list[str] = []
    ends = time.monotonic() + SECONDS

    def work(seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < ends and not problems:
            i, j = rng.randrange(len(upscalers)), rng.randrange(len(pictures))
            try:
                outcome = once(rng, i, j)
            except Exception as error:
                problems.append(f"{ways[i]}, {pictures[j].shape}: {error!r}")
                return
            with lock:
                outcomes[outcome] += 1

    def once(rng: random.Random, i: int, j: int) -> str:
        match rng.randrange(40):
            case 0:
                try:
                    upscalers[i](pictures[j], cancel=lambda: True)
                except Cancelled:
                    return "cancelled"
                raise AssertionError("not cancelled")
            case 1:
                try:
                    with time_limit(rng.random() / 100):
                        got = upscalers[i](pictures[j])
                except TimedOut:
                    return "out of time"
            case 2:
                try:
                    upscalers[i].session(np.zeros((1, 2, 8, 8), np.float32))
                except ShapeError:
                    return "refused"
                raise AssertionError("two channels were taken")
            case 3:
                source, engine, tiling, shapes = ways[i]
                with anysize.load(source, backend=engine, options={"shapes": shapes}) as session:
                    got = Upscaler(session, tiling=tiling)(pictures[j])
            case _:
                got = upscalers[i](pictures[j])
        if digest(got) != want[i][j]:
            raise AssertionError("another picture")
        return "right"

    process = psutil.Process()
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    seen: list[tuple[int, int, int]] = []
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(0.5)
        seen.append((process.memory_info().rss, process.num_threads(), process.num_fds()))
    assert not problems, problems
    fifth = len(seen) // 5
    early, late = seen[fifth : 2 * fifth], seen[-fifth:]
    memory, running, files = (
        [statistics.median(moment[k] for moment in part) for part in (early, late)] for k in range(3)
    )
    record_property("cases", outcomes.total())
    record_property("outcomes", json.dumps(outcomes))
    record_property("memory", f"{memory[0] / 2**20:.0f} -> {memory[1] / 2**20:.0f} MiB")
    record_property("threads", f"{running[0]:.0f} -> {running[1]:.0f}")
    record_property("files", f"{files[0]:.0f} -> {files[1]:.0f}")
    assert outcomes["right"] > 0.8 * outcomes.total() > 0
    assert files[1] <= files[0] + 8
    assert running[1] <= running[0] + 8
    if NIGHTLY:
        assert memory[1] <= MEMORY * memory[0]


SHARING = """
import hashlib, sys
import anysize, numpy as np
session = anysize.load(sys.argv[1], backend=sys.argv[2], options={"cache_dir": sys.argv[3], "threads": 1})
x = np.random.default_rng(0).random((1, 3, 24, 20), np.float32)
print(hashlib.sha256(session(x).tobytes()).hexdigest())
"""


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "torch"])
def test_two_processes_share_a_cache_and_one_is_killed(
    tmp_path: Path, engine: str, record_property: Callable[[str, object], None]
) -> None:
    """At any moment of converting, compiling or writing; the other goes on, the next takes what is whole."""
    torch.manual_seed(0)
    torch.save(SRVGGNetCompact(3, 8, 2, 2).state_dict(), tmp_path / "x.pth")

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SHARING, str(tmp_path / "x.pth"), engine, str(folder)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    started = time.monotonic()
    want, complaint = start(tmp_path / "undisturbed").communicate()
    seconds = time.monotonic() - started
    assert want, complaint
    rng = random.Random(os.getpid())
    outcomes = Counter[str]()
    for n in range(20 if NIGHTLY else 1):
        folder = tmp_path / f"shared{n}"
        victim, other = start(folder), start(folder)
        # the last part of the time is when files are written
        time.sleep(seconds * rng.uniform(0.3, 1.3))
        victim.send_signal(signal.SIGKILL)
        said, _ = victim.communicate()
        outcomes["killed" if victim.returncode < 0 else "had ended"] += 1
        assert said in ("", want)
        got, complaint = other.communicate()
        assert (got, complaint) == (want, "")
        got, complaint = start(folder).communicate()
        assert (got, complaint) == (want, "")
    record_property("cases", outcomes.total())
    record_property("outcomes", json.dumps(outcomes))
