"""`anysize bench`: what this machine can do, what each way of running a model gets of it, and what to use.

Every case is a process of its own (`bench_worker`), because engines that share one slow each other. Rounds
take turns, A B C A B C ..., and ratios are medians of ratios within a round, because machines drift.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from anysize.backends import BackendInfo, describe_backends
from anysize.backends.base import Array
from anysize.backends.errors import AnysizeError, ExecutionError, OptionError
from anysize.bench_result import COMMON, Benchmark, Row
from anysize.pixels import open_picture, quantise, split
from anysize.session import Options
from anysize.sources import located, source_format
from anysize.tiling import Tiling
from anysize.tuning import processor

#: seconds a quick run may take in rounds, after all cases have been made ready
_QUICK_SECONDS = 100
#: pixels of a quick run's picture take the fastest f32 case about this long
_RUN_SECONDS = 1.0
#: rounds of a case that is slower than the common one, which nobody would choose
_SLOW_ROUNDS = 2
_LEAST, _MOST = 192 * 108, 1280 * 720
_LARGEST = 2**26


class _Worker:
    """A case in its process: made ready, then run once for each call."""

    def __init__(self, case: dict[str, Any], folder: Path) -> None:
        self.case = case
        self.result = folder / "result.npy"
        command = [
            sys.executable,
            "-P",
            "-m",
            "anysize.bench_worker",
            json.dumps(case | {"result": str(self.result)}),
        ]
        self._errors = (folder / "errors").open("w+")
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.facts: dict[str, Any] = {}

    def ready(self) -> None:
        """Raises `ExecutionError` with the last line the process wrote."""
        self.facts = json.loads(self._answer())

    def run(self) -> float:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = (self._errors.read().strip().splitlines() or ["no message"])[-1]
            raise ExecutionError(
                f"the process ended: {last}", backend=self.case.get("backend", ""), shape=None
            )
        return line

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()
        self._errors.close()


class Workers:
    """All cases of one size, alive at once. `picture`: uint8 HWC, if theirs is not the usual one."""

    def __init__(self, picture: Array | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="anysize-bench-")
        self._common: dict[str, Any] = {}
        if picture is not None:
            path = Path(self._folder.name) / "picture.npy"
            np.save(path, picture)
            self._common["picture"] = str(path)
        self.ready: dict[str, _Worker] = {}
        self.left_out: dict[str, str] = {}

    def add(self, name: str, case: dict[str, Any]) -> _Worker | None:
        """Make a case ready; one that cannot be is noted in `left_out`."""
        folder = Path(self._folder.name) / str(len(self.ready) + len(self.left_out))
        folder.mkdir()
        worker = self.ready[name] = _Worker(case | self._common, folder)
        try:
            worker.ready()
        except (AnysizeError, OSError, ValueError) as error:
            self.drop(name, error)
            return None
        return worker

    def drop(self, name: str, error: Exception) -> None:
        """A case that cannot go on; the others do."""
        self.left_out[name] = str(error)
        self.ready.pop(name).close()

    def turn(self, seconds: dict[str, list[float]], skip: Collection[str] = ()) -> None:
        """Run each case once and note how long it took; one that cannot go on is dropped from both."""
        for name, worker in [case for case in self.ready.items() if case[0] not in skip]:
            try:
                seconds[name].append(worker.run())
            except (AnysizeError, OSError, ValueError) as error:
                self.drop(name, error)
                del seconds[name]

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        for worker in self.ready.values():
            worker.close()
        self._folder.cleanup()


def bench(
    model: str = "default",
    *,
    picture: Any = None,
    ncnn: str | None = None,
    backends: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] = (),
    methods: Sequence[str] = ("auto",),
    threads: Sequence[int | None] = (None,),
    rounds: int = 7,
    quick: bool = False,
    say: Callable[[str], Any] = lambda text: None,
) -> Benchmark:
    """Measure. `picture`: what is upscaled, an HW or HWC array (uint8, uint16, or float in 0..1) or a PIL
    image, made 8-bit RGB; none: one with waves at all scales and noise. `sizes`: (width, height), of the
    middle of the picture, mirrored onward where it is smaller; none: one that takes about a second. `ncnn`:
    the same model as a .param file, for ncnn as a peer. `backends`: the engines to run it on (None: all that
    are installed); the common case is there in any case. `methods`, `threads`: as `Tiling` and `Options` take
    them, for the cases that are ours.

    Ours are tuned first (`anysize.tuning`), which `quick` leaves out: that is three rounds at most, ended
    early after a hundred seconds. int8 is calibrated on the picture. `say` is told what is going on.
    Raises `ImageError`, `OptionError`, `ExecutionError` where no case runs.
    """
    given = None if picture is None else as_rgb(picture)
    for method in methods:
        Tiling(method)  # type: ignore[arg-type]  # which checks it
    for count in threads:
        Options(threads=count)
    if rounds < 1 or any(min(size) < 1 for size in sizes):
        raise OptionError("rounds and sizes must be at least 1")
    if any(width * height > _LARGEST for width, height in sizes):
        raise OptionError(f"sizes may have {_LARGEST} pixels at most")
    model = str(located(model))
    for path in filter(None, (model, ncnn)):
        source_format(path)
    engines = installed_engines(backends)
    rounds = min(rounds, 3) if quick else rounds
    say("what the machine can do")
    ceilings = _ceilings(engines)
    left_out: dict[str, str] = {}
    sizes = list(sizes) or [_size(model, engines, left_out)]
    tables = {}
    for width, height in sizes:
        with Workers(given) as workers:
            ours = [
                {"method": method, "threads": count, "tune": not quick}
                for method in methods
                for count in threads
            ]
            for name, case in _cases(model, ncnn, width, height, engines, ours).items():
                say(f"{width} x {height}: {name}")
                workers.add(name, case)
            rows = _measure(workers, rounds, quick, ceilings, say) if workers.ready else []
            left_out |= workers.left_out
            if not rows:
                raise ExecutionError(f"nothing ran: {left_out}", backend="", shape=None)
            tables[f"{width} x {height}"] = rows
    return Benchmark(command_line(), machine(), model, ceilings, tables, left_out)


def installed_engines(names: Sequence[str] | None = None) -> list[BackendInfo]:
    """The engines of these names (None: all) that can be used here. Raises `OptionError`."""
    installed = [info for info in describe_backends() if info.problem is None]
    known = [info.name for info in installed]
    for name in names or ():
        if name not in known:
            raise OptionError(f"backend '{name}' is not installed here; installed: {', '.join(known)}")
    if not installed:
        raise OptionError("no engine is installed")
    return [info for info in installed if info.name in (names or known)]


def machine() -> dict[str, Any]:
    """What figures depend on: the processor and the versions."""
    versions = {info.name: info.version for info in installed_engines()}
    facts = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    return facts | versions


def command_line() -> str:
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def as_rgb(picture: Any) -> Array:
    """Any picture as uint8 HWC of 3 channels."""
    colours, _ = split(open_picture(picture).array)
    planes = np.broadcast_to(colours, (3, *colours.shape[1:]))
    return np.ascontiguousarray(quantise(planes, np.dtype(np.uint8)).transpose(1, 2, 0))


def _cases(
    model: str,
    ncnn: str | None,
    width: int,
    height: int,
    engines: Sequence[BackendInfo],
    ours: Sequence[dict[str, Any]],
) -> dict[str, dict[str, Any]]:
    base = {"width": width, "height": height, "model": model}
    loop = base | {"kind": "loop", "tile": 200}
    cases = {}
    for info in engines:
        if "ncnn" in info.formats and ncnn is not None:
            for precision in info.precisions:
                case = loop | {"model": ncnn, "backend": info.name, "precision": precision}
                cases[f"{info.name} {precision}, tiles of 200 + 10"] = case
        if ("ncnn" in info.formats) != model.endswith(".param"):
            continue
        for precision in info.precisions:
            case = base | {"backend": info.name, "precision": precision}
            for settings in ours:
                name = f"anysize {info.name} {precision}"
                name += f", {settings['method']}" if settings["method"] != "auto" else ""
                name += f", {settings['threads']} threads" if settings["threads"] else ""
                cases[name] = case | settings | {"kind": "anysize"}
            cases[f"{info.name} {precision} alone, tile 128"] = case | {"kind": "raw"}
            if info.name == "onnxruntime":
                cases[f"{info.name} {precision}, tiles of 200 + 10"] = case | loop
    if find_spec("torch") is not None and not model.endswith((".onnx", ".xml", ".param")):
        cases[COMMON] = base | {"kind": "torch", "tile": 200, "precision": "f32"}
        cases[f"{COMMON}, channels_last"] = cases[COMMON] | {"channels_last": True}
    return cases


def _ceilings(engines: Sequence[BackendInfo]) -> dict[str, float]:
    """The best of a few runs: here the machine's limit is asked for, not its average."""
    wanted = {"copy of memory": {"what": "copy"}}
    for info in engines:
        if info.name == "openvino":
            for precision in (p for p in info.precisions if p != "int8"):
                wanted[f"matrix product {precision}"] = {"what": "product", "precision": precision}
    found = {}
    with Workers() as workers:
        for name, what in wanted.items():
            worker = workers.add(name, {"kind": "ceiling", **what})
            if worker is not None:
                best = min(worker.run() for _ in range(7))
                found[name] = (worker.facts.get("operations") or worker.facts["bytes"]) / best
    return found


def _size(model: str, engines: Sequence[BackendInfo], left_out: dict[str, str]) -> tuple[int, int]:
    """A 16:9 picture that takes the first engine that runs about a second."""
    with Workers() as workers:
        for info in engines:
            case = {"kind": "raw", "model": model, "width": 128, "height": 128, "backend": info.name}
            worker = workers.add(info.name, case | {"precision": "f32"})
            if worker is not None:
                pixels = 128**2 / min(worker.run() for _ in range(5)) * _RUN_SECONDS
                unit = (min(max(pixels, _LEAST), _MOST) / (16 * 9)) ** 0.5 / 4
                return 64 * max(1, round(unit)), 36 * max(1, round(unit))
    left_out |= workers.left_out
    raise ExecutionError(f"no engine runs this model: {workers.left_out}", backend="", shape=None)


def _measure(
    workers: Workers,
    rounds: int,
    quick: bool,
    ceilings: dict[str, float],
    say: Callable[[str], Any],
) -> list[Row]:
    rows = {name: Row(name, worker.case, worker.facts) for name, worker in workers.ready.items()}
    started = time.perf_counter()
    for i in range(rounds):
        if quick and i >= 2 and time.perf_counter() - started > _QUICK_SECONDS:
            break
        say(f"round {i + 1} of {rounds}")
        seconds = {name: row.seconds for name, row in rows.items()}
        slow = {name for name in rows if i >= _SLOW_ROUNDS and _is_slow(rows, name)}
        workers.turn(seconds, slow)
        rows = {name: row for name, row in rows.items() if name in seconds}
    pictures = {n: np.load(w.result, "r") for n, w in workers.ready.items() if w.result.exists()}
    reference = next(
        (pictures[n] for n, r in rows.items() if n in pictures and r.case["precision"] == "f32"), None
    )
    work = next((r.facts for r in rows.values() if "operations_per_pixel" in r.facts), {})
    for name, row in rows.items():
        pixels = row.facts.get("pixels", row.case["height"] * row.case["width"])
        speeds = pixels / 1e6 / np.array(row.seconds)
        row.mpx_per_second, *spread = (float(q) for q in np.quantile(speeds, (0.5, 0.1, 0.9)))
        row.spread = spread[0], spread[1]
        if COMMON in rows:
            common = rows[COMMON]
            pixels = common.case["height"] * common.case["width"]
            ratios = speeds / (pixels / 1e6 / np.array(common.seconds[: len(speeds)]))
            median, low, high = (float(q) for q in np.quantile(ratios, (0.5, 0.1, 0.9)))
            row.ratio = median, low, high
        row.facts = {k: work[k] for k in ("operations_per_pixel", "bytes_per_pixel") if k in work} | row.facts
        peak = ceilings.get(f"matrix product {row.case['precision']}")
        if peak and work:
            row.of_peak = row.mpx_per_second * 1e6 * work["operations_per_pixel"] / peak
        picture = pictures.get(name)
        if picture is None or reference is None or picture is reference:
            continue
        if picture.shape != reference.shape:
            row.facts["note"] = f"its result is of {picture.shape}, not {reference.shape}: another model"
        else:
            row.decibels = _decibels(picture, reference)
            row.decibels_8bit = _decibels(_rounded(picture), _rounded(reference))
    return list(rows.values())


def _is_slow(rows: dict[str, Row], name: str) -> bool:
    """Slower than what is commonly done, in every round so far."""
    if name == COMMON or COMMON not in rows:
        return False
    case = rows[name].case
    pixels = rows[name].facts.get("pixels", case["height"] * case["width"])
    best = pixels / min(rows[name].seconds)
    common = rows[COMMON]
    return bool(best < common.case["height"] * common.case["width"] / max(common.seconds))


def _decibels(got: Array, want: Array) -> float:
    square = float(np.square(got - want).mean(dtype=np.float64))
    return float(-10 * np.log10(square)) if square else math.inf


def _rounded(values: Array) -> Array:
    rounded: Array = np.rint(values * np.float32(255)) / np.float32(255)
    return rounded
