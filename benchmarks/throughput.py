"""Quick throughput of the bundled model: engines x methods, interleaved, as Markdown and out/throughput.json.

Rounds run A B C A B C ... in one process, and ratios are medians of ratios within a round, because
machines drift. Engines in one process slow each other a little; this is a first look, not a verdict.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import anysize
import numpy as np
from anysize import Tiling, Upscaler
from anysize.backends import describe_backends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="default")
    parser.add_argument("--size", default="360x480", help="height x width of the input")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("out/throughput.json"))
    args = parser.parse_args()
    height, width = map(int, args.size.split("x"))
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    tilings = {"whole": Tiling("whole"), "tile 128 exact": Tiling("tile", 128, "exact")}
    cases = {}
    for info in describe_backends():
        if info.problem is not None:
            continue
        try:
            session = anysize.load(args.model, backend=info.name)
        except anysize.ModelLoadError as error:
            print(f"left out {info.name}: {error}")
            continue
        for name, tiling in tilings.items():
            cases[f"{info.name} f32, {name}"] = Upscaler(session, tiling=tiling)
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_number in range(args.rounds + 1):  # the first compiles and is not counted
        for name, upscale in cases.items():
            started = time.perf_counter()
            upscale(picture)
            if round_number:
                seconds[name].append(time.perf_counter() - started)
    base = next(iter(seconds))
    rows = []
    print(f"| case | input Mpx/s | against {base} |\n|---|---|---|")
    for name, times in seconds.items():
        ratios = np.array(seconds[base]) / np.array(times)
        speed = height * width / 1e6 / np.median(times)
        low, middle, high = np.quantile(ratios, (0.1, 0.5, 0.9))
        rows.append({"case": name, "seconds": times, "mpx_per_s": speed, "ratio": middle})
        print(f"| {name} | {speed:.3f} | {middle:.2f} ({low:.2f} to {high:.2f}) |")
    versions = {i.name: i.version for i in describe_backends()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    machine = {"processor": platform.processor() or platform.machine(), "python": platform.python_version()}
    args.out.write_text(json.dumps({"versions": versions, "machine": machine, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
