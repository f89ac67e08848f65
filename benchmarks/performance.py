"""Throughput against what anyone would use instead, start-up, ever new sizes, and cost by size.

    make bench-performance                       all parts
    python benchmarks/performance.py start       some of: speed start sizes linear

Reads the weights in ../shared/assets, prints each figure with its bound, and writes out/performance.json
and, after all parts, docs/performance.md. Exit code 1 if a figure is outside its bound.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import copyfile
from typing import Any

import anysize
import numpy as np
from acceptance import ASSETS, OUT, Table
from anysize import Upscaler
from anysize.bench import bench
from anysize.bench_result import COMMON, Row
from anysize.bench_worker import picture
from anysize.files import read_picture
from anysize.session import LIVE

COMPACT, RRDB = (ASSETS / "weights" / n for n in ("realesr-animevideov3.pth", "rrdbnet6-trained.pth"))
NCNN = ASSETS / "weights" / "realesr-animevideov3-x4.param"
#: bounds of the speed over the common loop, in f32 and bf16
CASES = {
    "Compact-16": (COMPACT, NCNN, (1280, 720), 2.0, 3.7),
    "RRDBNet-6": (RRDB, None, (640, 360), 2.2, 4.5),
}
#: a photograph, of which as much is taken, mirrored onward, as each case upscales
PICTURE = ASSETS / "images" / "OST_009.png"
ROUNDS = 5
#: beside the loops in torch: its modules in exact tiles take minutes for a picture
ENGINES = ("openvino", "onnxruntime", "ncnn")
DOCS = Path(__file__).parent.parent / "docs"
START = """
import sys, time
import numpy as np
import anysize
upscale = anysize.Upscaler(sys.argv[1], backend="openvino")
upscale(np.zeros((64, 64, 3), np.uint8))
print("torch" in sys.modules)
"""


def speed(table: Table) -> str:
    """Both models end to end beside their peers; the tables as Markdown."""
    texts = []
    for name, (weights, ncnn, size, f32, bf16) in CASES.items():
        result = bench(
            str(weights),
            picture=read_picture(PICTURE).array,
            ncnn=ncnn and str(ncnn),
            backends=ENGINES,
            sizes=[size],
            rounds=ROUNDS,
            say=print,
        )
        chart = result.write(OUT / f"bench-{name}")[-1]
        DOCS.mkdir(exist_ok=True)
        copyfile(chart, DOCS / f"{name}{chart.suffix}")
        texts.append(f"{result.markdown()}\n![Throughput and roofline]({name}{chart.suffix})\n")
        rows = {row.name: row for row in result.tables[f"{size[0]} x {size[1]}"]}

        def ratio(what: str, fast: str, slow: str, bound: float, rows: dict[str, Row] = rows) -> None:
            speeds = [
                np.array(r.facts.get("pixels", size[0] * size[1])) / np.array(r.seconds)  # noqa: B023
                for r in (rows[fast], rows[slow])
            ]
            median, low, high = (float(q) for q in np.quantile(speeds[0] / speeds[1], (0.5, 0.1, 0.9)))
            table.at_least(what, median, bound, (low, high))

        for precision, bound in (("f32", f32), ("bf16", bf16)):
            ours = f"anysize openvino {precision}"
            ratio(f"{name} {precision}: times {COMMON}", ours, COMMON, bound)
            alone = f"openvino {precision} alone, tile 128"
            ratio(f"{name} {precision}: end to end / raw engine", ours, alone, 0.85)
            inside = rows[ours].facts["in_engine"]
            table.at_least(f"{name} {precision}: part of the time in the engine", inside, 0.9)
        table.at_least(f"{name}: dB of bf16 to f32", rows["anysize openvino bf16"].decibels or 0, 55)
        if ncnn is not None:
            peers = [f"ncnn {precision}, tiles of 200 + 10" for precision in ("f32", "bf16")]
            ratio(f"{name} f32: times ncnn f32", "anysize openvino f32", peers[0], 1.0)
            better = max(peers, key=lambda peer: rows[peer].mpx_per_second)
            ratio(f"{name} bf16: times {better}", "anysize openvino bf16", better, 1.6)
    return "\n".join(texts)


def start(table: Table) -> None:
    """A process from nothing to a picture of 64 x 64, with an empty and with a filled cache."""
    with tempfile.TemporaryDirectory() as folder:
        onnx = Path(folder) / "model.onnx"
        model = anysize.load(COMPACT, backend="onnxruntime", options={"cache_dir": folder})._guards[0].model
        onnx.write_bytes(model.data)
        for source in (COMPACT, onnx):
            environment = os.environ | {"ANYSIZE_CACHE_DIR": str(Path(folder) / source.suffix)}
            seconds, torch = [], ""
            for _ in range(6):
                started = time.perf_counter()
                command = [sys.executable, "-c", START, str(source)]
                done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
                seconds.append(time.perf_counter() - started)
                torch = done.stdout.strip()
            warm = statistics.median(seconds[1:])
            print(f"     from {source.suffix}: first start {seconds[0]:.2f} s, then {warm:.2f} s")
            if source == COMPACT:
                table.add("second start / first start, .pth", warm / seconds[0], 0.3)
                table.add("torch imported in the second start", float(torch == "True"), 0)


def _resident() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024


def sizes(table: Table) -> None:
    """1,500 random sizes through one session, and a fixed size between them."""
    session = anysize.load(COMPACT, backend="openvino", options={"max_live": LIVE})
    fixed = anysize.load(COMPACT, backend="openvino", options={"shapes": "static"})
    rng = np.random.default_rng(0)
    side = 192  # as many pixels as the mean of those sizes
    still = rng.random((1, 3, side, side), np.float32)
    fixed(still)
    ratios, resident = [], {}
    for i in range(0, 1500, 50):
        seconds = pixels = 0.0
        for height, width in rng.integers(16, 301, (50, 2)):
            x = rng.random((1, 3, height, width), np.float32)
            started = time.perf_counter()
            session(x)
            seconds += time.perf_counter() - started
            pixels += height * width
        started = time.perf_counter()
        for _ in range(10):
            fixed(still)
        ratios.append((pixels / seconds) / (10 * side**2 / (time.perf_counter() - started)))
        resident[i + 50] = _resident()
    stats = session.stats
    print(f"     {stats.calls} calls, {stats.compiles} compiles, {stats.live} live programs")
    table.add("live programs after 1,500 sizes", stats.live, LIVE)
    table.add("resident memory after 1,500 sizes / after 500", resident[1500] / resident[500], 1.05)
    table.at_least("throughput at random sizes / at a fixed size", statistics.median(ratios), 0.85)


def linear(table: Table) -> None:
    """Seconds per megapixel at width 1024 and four heights."""
    upscale = Upscaler(COMPACT, backend="openvino")
    heights = (256, 1024, 4096, 16384)
    tall = picture(heights[-1], 1024)
    upscale(tall[:256])
    costs: dict[int, list[float]] = {height: [] for height in heights}
    for _ in range(3):
        for height in heights:
            for _ in range(max(1, 1024 // height)):
                started = time.perf_counter()
                upscale(tall[:height])
                costs[height].append((time.perf_counter() - started) / (height * 1024 / 1e6))
    medians = {height: statistics.median(values) for height, values in costs.items()}
    middle = statistics.median(medians.values())
    for height, cost in medians.items():
        what = f"1024 x {height}: seconds per megapixel / the median of the four"
        table.add(what, cost / middle, 1.15)
        table.at_least(what, cost / middle, 0.85)


PARTS = {"speed": speed, "start": start, "sizes": sizes, "linear": linear}


def main(parts: Sequence[str]) -> None:
    if not ASSETS.is_dir():
        sys.exit(f"needs {ASSETS}")
    OUT.mkdir(exist_ok=True)
    table, text = Table(), ""
    started = time.time()
    for part in parts or PARTS:
        text += PARTS[part](table) or ""
    suffix = "-" + "-".join(parts) if parts else ""
    written: dict[str, Any] = {"rows": table.rows}
    (OUT / f"performance{suffix}.json").write_text(json.dumps(written, indent=1))
    bad = [row for row in table.rows if not row["ok"]]
    if not parts:
        document(table, text)
    print(f"{len(table.rows) - len(bad)} of {len(table.rows)} within bounds, {time.time() - started:.0f} s")
    sys.exit(bool(bad))


def document(table: Table, text: str) -> None:
    """docs/performance.md: generated, never edited."""
    lines = ["# Performance", "", "Written by `make bench-performance`; do not edit.", ""]
    lines += ["| what | figure | 10th to 90th percentile | bound | met |", "|---|---|---|---|---|"]
    for r in table.rows:
        spread = "{:.3g} to {:.3g}".format(*r["spread"]) if r["spread"] else ""
        met = "yes" if r["ok"] else "no"
        lines.append(f"| {r['what']} | {r['figure']:.3g} | {spread} | {r['bound']:g} | {met} |")
    lines += ["", f"The picture: {PICTURE.name}, a photograph, mirrored onward."]
    (DOCS / "performance.md").write_text("\n".join(lines) + "\n\n" + text)


if __name__ == "__main__":
    main(sys.argv[1:])
