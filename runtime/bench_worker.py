"""One case of a benchmark, in a process of its own: engines that share a process slow each other.

Run as `python -m anysize.bench_worker '{"kind": ..., ...}'` by `anysize.bench`. It builds the case, runs it
once, answers with one line of JSON, and then, for every line it reads, runs it again and answers with the
seconds that took. Whatever engines print goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from anysize.backends.base import Array

Case = dict[str, Any]
#: runs once; returns the picture, where there is one
Run = Callable[[], Array | None]
#: made ready by a case: how to run it, and what there is to say about it; "picture" is its result, HWC,
#: float in 0..1, before it is rounded to bytes
Ready = tuple[Run, dict[str, Any]]

RAW_TILE = 128
_TILE_PAD = 10
_LEAST_CALIBRATED = 256
_MATRIX, _COPIED = 2048, 2**28


def picture(height: int, width: int) -> Array:
    """What is upscaled where no picture is given: waves at all scales and some noise, uint8 HWC."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    total = rng.normal(0, 0.1, (height, width, 3)).astype(np.float32)
    for i in range(18):
        a, b = rng.normal(0, 0.5 / 2 ** (i // 3), 2)
        total[..., i % 3] += np.sin(a * x + b * y + rng.uniform(0, 6))
    return np.clip(total * 40 + 128, 0, 255).astype(np.uint8)


def _pixels(case: Case, height: int | None = None, width: int | None = None) -> Array:
    """The picture of a case, or one of another size: the middle of the file it names, mirrored onward where
    that is too small.
    """
    height, width = height or case["height"], width or case["width"]
    if case.get("picture") is None:
        return picture(height, width)
    given: Array = np.load(case["picture"])
    beyond = [(0, max(0, want - has)) for want, has in zip((height, width), given.shape[:2], strict=True)]
    padded = np.pad(given, [*beyond, (0, 0)], "symmetric")
    top, left = (padded.shape[0] - height) // 2, (padded.shape[1] - width) // 2
    return np.ascontiguousarray(padded[top : top + height, left : left + width])


def _calibration(case: Case) -> tuple[Array, ...]:
    """int8 is calibrated on the picture itself, or on more of it where it is small."""
    if case["precision"] != "int8":
        return ()
    return (_pixels(case, *(max(case[side], _LEAST_CALIBRATED) for side in ("height", "width"))),)


def upscaler(case: Case) -> Ready:
    """A picture in bytes to a picture in bytes, as `anysize upscale` does between its files."""
    from anysize.pixels import to_float
    from anysize.session import Options
    from anysize.tiling import Tiling
    from anysize.upscale import Upscaler

    pixels = _pixels(case)
    upscale = Upscaler(
        case["model"],
        backend=case["backend"],
        precision=case["precision"],
        tiling=Tiling(case["method"]),
        options=Options(threads=case["threads"], tune=case["tune"], calibration=_calibration(case)),
    )
    result = upscale(to_float(pixels))  # makes the programs
    upscale(pixels)
    report = upscale.report
    assert report is not None
    facts = {name: getattr(report, name) for name in ("method", "reason", "tile", "streams")}
    facts["in_engine"] = report.engine_seconds / report.seconds
    return lambda: upscale(pixels), facts | {"picture": result}


def style(case: Case) -> Ready:
    """A picture in bytes restyled with its longest side at `resolution`, and back at its size."""
    from anysize.memory import peak
    from anysize.pixels import to_float
    from anysize.sizes import fit_longest
    from anysize.stylize import Stylizer
    from anysize.tiling import Tiling

    pixels: Array = np.load(case["picture"])
    policy = fit_longest(case["resolution"], upscale=True)
    stylize = Stylizer(case["model"], policy, backend=case["backend"], tiling=Tiling(case["method"]))
    started = time.perf_counter()
    result = stylize(to_float(pixels))
    facts: dict[str, Any] = {"first": time.perf_counter() - started, "peak": peak()}
    facts["height"], facts["width"] = policy.plan((pixels.shape[0], pixels.shape[1])).target
    assert stylize.report is not None
    facts["method"] = stylize.report.method
    return lambda: stylize(pixels), facts | {"picture": result}


def raw(case: Case) -> Ready:
    """The engine alone, on a quiet tile of fixed shape, for as many pixels as the picture has."""
    from anysize.session import Options, load

    session = load(
        case["model"],
        backend=case["backend"],
        precision=case["precision"],
        options=Options(shapes="static", calibration=_calibration(case)),
    )
    tile = _pixels(case, RAW_TILE, RAW_TILE).transpose(2, 0, 1)[None].astype(np.float32) / 255
    times = max(1, round(case["height"] * case["width"] / RAW_TILE**2))

    def run() -> None:
        for _ in range(times):
            session(tile)

    facts = {"pixels": times * RAW_TILE**2}
    sizes = session.spec.bind({session.spec.inputs[0].name: tile.shape})
    work = session.operations(sizes)
    if work is not None:
        facts |= {"operations_per_pixel": work[0] / RAW_TILE**2, "bytes_per_pixel": work[1] / RAW_TILE**2}
    run()
    return run, facts


def _looped(case: Case, infer: Callable[[Array], Array]) -> Ready:
    """The loop that upscalers commonly run: tiles with a fixed overlap, pasted into a picture of floats."""
    pixels, tile = _pixels(case), case["tile"]

    def floats() -> Array:
        x = pixels.transpose(2, 0, 1)[None].astype(np.float32) / 255
        height, width = x.shape[2:]
        scale, result = 0, np.empty(0)
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                bottom, right = min(top + tile, height), min(left + tile, width)
                first, begin = max(top - _TILE_PAD, 0), max(left - _TILE_PAD, 0)
                part = x[:, :, first : bottom + _TILE_PAD, begin : right + _TILE_PAD]
                y = infer(np.ascontiguousarray(part))
                if not scale:
                    scale = y.shape[2] // part.shape[2]
                    result = np.empty((1, 3, height * scale, width * scale), np.float32)
                inner = y[:, :, (top - first) * scale :, (left - begin) * scale :]
                rows, columns = slice(top * scale, bottom * scale), slice(left * scale, right * scale)
                result[:, :, rows, columns] = inner[:, :, : (bottom - top) * scale, : (right - left) * scale]
        clipped: Array = result[0].clip(0, 1).transpose(1, 2, 0)
        return clipped

    def run() -> Array:
        rounded: Array = (floats() * 255).round().astype(np.uint8)
        return rounded

    return run, {"picture": floats()}


def engine_loop(case: Case) -> Ready:
    """The same loop on an engine as it comes."""
    from anysize.session import Options, load

    session = load(
        case["model"],
        backend=case["backend"],
        precision=case["precision"],
        options=Options(shapes="dynamic"),
    )
    return _looped(case, session)


def torch_loop(case: Case) -> Ready:
    """Eager PyTorch as it comes (NCHW), or with `channels_last`."""
    from pathlib import Path

    import torch
    from anysize.models import BUNDLED, bundled_file, load_weights

    name = case["model"]
    path = bundled_file(name, ".safetensors") if name in BUNDLED else Path(name)
    module, layout = load_weights(path).module, torch.contiguous_format
    if case.get("channels_last"):
        layout = torch.channels_last
        module = module.to(memory_format=layout)

    def infer(x: Array) -> Array:
        with torch.inference_mode():
            result: Array = module(torch.from_numpy(x).contiguous(memory_format=layout)).numpy()
            return result

    return _looped(case, infer)


def ceilings(case: Case) -> Ready:
    """What the machine does at best: a large matrix product in `precision`, or a copy of memory."""
    if case["what"] == "copy":
        from concurrent.futures import ThreadPoolExecutor

        halves = [
            (np.ones(_COPIED // 2 // 4, np.float32), np.zeros(_COPIED // 2 // 4, np.float32))
            for _ in range(2)
        ]
        pool = ThreadPoolExecutor(2)

        def copy() -> None:
            list(pool.map(lambda half: np.copyto(half[1], half[0]), halves))

        return copy, {"bytes": 2 * _COPIED}  # read and written
    from anysize.backends.openvino import import_openvino

    openvino = import_openvino()
    from openvino import opset13 as ops

    a, b = (np.random.default_rng(i).random((_MATRIX, _MATRIX), np.float32) for i in range(2))
    x = ops.parameter(a.shape, openvino.Type.f32)
    graph = openvino.Model(
        [ops.reduce_max(ops.matmul(x, ops.constant(b), False, False), [0, 1])], [x], "product"
    )
    hint = {"INFERENCE_PRECISION_HINT": case["precision"], "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(graph, "CPU", hint).create_infer_request()

    def run() -> None:
        request.infer([a], share_inputs=True)

    return run, {"operations": 2 * _MATRIX**3}


KINDS: dict[str, Callable[[Case], Ready]] = {
    "anysize": upscaler,
    "style": style,
    "raw": raw,
    "loop": engine_loop,
    "torch": torch_loop,
    "ceiling": ceilings,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    case: Case = json.loads(sys.argv[1])
    run, facts = KINDS[case["kind"]](case)
    result = facts.pop("picture", None)
    if result is not None:
        np.save(case["result"], result)
    answers.write(json.dumps(facts) + "\n")
    for _ in sys.stdin:
        started = time.perf_counter()
        run()
        answers.write(f"{time.perf_counter() - started}\n")


if __name__ == "__main__":
    main()
