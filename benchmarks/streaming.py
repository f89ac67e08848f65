"""Streaming against the whole picture, tiles and the raw engine: results, speed, memory, and a gigapixel.

    make bench-streaming                       all parts
    python benchmarks/streaming.py speed       some of: results speed memory gigapixel

Reads the weights in ../shared/assets, prints each figure with its bound, and writes out/streaming.json and
out/streaming.png. Exit code 1 if a figure is outside its bound. Speeds are medians of ratios of runs that
take turns; memory is measured in processes of their own.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anysize
import numpy as np
from acceptance import ASSETS, OUT, Table
from anysize import Tiling, Upscaler, upscale_file
from anysize.bench_worker import picture

MODELS = {
    "Compact-16": str(ASSETS / "weights" / "realesr-animevideov3.pth"),
    "bundled": "default",
    "RRDBNet-6": str(ASSETS / "weights" / "rrdbnet6-trained.pth"),
}
WIDTHS, HEIGHTS, BANDS = (33, 220, 1023), (1, 5, 17, 64, 65, 230, 257, 333, 401), (8, 16, 32)
ROUNDS, WIDTH = 7, 1024


def results(table: Table) -> None:
    """Bands against the whole picture, for all widths, heights and bands."""
    from anysize.pixels import to_float

    # bf16 last: only Compact, where the whole picture in bf16 is the reference
    kinds = [(m, e, "f32") for m, e in itertools.product(MODELS, ("openvino", "onnxruntime"))]
    for name, engine, precision in [*kinds, ("Compact-16", "openvino", "bf16")]:
        options = anysize.Options(max_live=1)
        session = anysize.load(MODELS[name], backend=engine, precision=precision, options=options)
        radius = session.spec.radius or 0
        worst, share, steps, other = 0.0, 0.0, 0, 0
        for width, height in itertools.product(WIDTHS, HEIGHTS):
            pixels = to_float(picture(height, width))
            whole = Upscaler(session, tiling=Tiling("whole"))(pixels)
            levels = np.rint(whole * 255)
            for rows in BANDS:
                upscale = Upscaler(session, tiling=Tiling("stream", rows))
                got = upscale(pixels)
                assert upscale.report is not None
                if height > 2 * radius + rows:
                    other += upscale.report.method != "stream"
                worst = max(worst, float(np.abs(got - whole).max()))
                off = np.abs(np.rint(got * 255) - levels)
                steps, share = max(steps, int(off.max())), max(share, float((off > 0).mean()))
        what = f"{name} {engine} {precision}: bands against whole"
        if precision == "f32":
            table.add(f"{what}: max|d|", worst, 1e-5)
            table.add(f"{what}: share of uint8 values that differ", share, 1e-4)
        table.add(f"{what}: uint8 steps", steps, 1)
        table.add(f"{what}: tall pictures that did not stream", other, 0)
        session.close()


SPEED_CASES = tuple(itertools.product((("Compact-16", 512), ("RRDBNet-6", 256)), ("f32", "bf16")))


def speed(table: Table, cases: Any = SPEED_CASES) -> dict[str, dict[str, float]]:
    """Mpx of input per second at width 1024, taking turns; and the ratios the project promises."""
    chart: dict[str, dict[str, float]] = {}
    for (name, height), precision in cases:
        session = anysize.load(MODELS[name], backend="openvino", precision=precision)
        photo = picture(height, WIDTH)
        tile = np.random.default_rng(0).random((1, 3, 128, 128), np.float32)
        tiles = height * WIDTH // 128**2

        def raw(session: Any = session, tile: np.ndarray = tile, tiles: int = tiles) -> None:
            for _ in range(tiles):
                session(tile)

        ways: dict[str, Callable[[], Any]] = {"raw engine, tile 128": raw}
        for label, tiling in (
            ("bands", Tiling("stream")),
            ("whole", Tiling("whole")),
            ("tiles 128, exact halo", Tiling("tile", 128, "exact")),
            ("tiles 128, overlap 16", Tiling("tile", 128, 16)),
        ):
            if name == "Compact-16" or label != "whole":
                upscale = Upscaler(session, tiling=tiling)
                ways[label] = lambda upscale=upscale, photo=photo: (upscale(photo), upscale)[1]
        if name == "RRDBNet-6":  # its exact halo of 94 is not what anyone would take
            del ways["tiles 128, exact halo"]
        seconds: dict[str, list[float]] = {label: [] for label in ways}
        for turn in range(ROUNDS + 1):
            for label, way in ways.items():
                started = time.perf_counter()
                done = way()
                spent = time.perf_counter() - started
                if label == "tiles 128, overlap 16":  # without measuring its error, which other tilers do not
                    spent = done.report.engine_seconds
                if turn:  # the first compiles
                    seconds[label].append(spent)
        pixels = height * WIDTH / 1e6
        chart[f"{name} {precision}"] = {k: pixels / statistics.median(v) for k, v in seconds.items()}

        def ratio(slow: str, fast: str = "bands", seconds: dict[str, list[float]] = seconds) -> float:
            return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

        label = f"{name} {precision} at width {WIDTH}: bands /"
        table.at_least(f"{label} raw engine", ratio("raw engine, tile 128"), 0.85)
        if name == "Compact-16":
            table.at_least(f"{label} exact-halo tiles", ratio("tiles 128, exact halo"), 1.35)
        else:
            table.at_least(f"{label} overlap-16 tiles", ratio("tiles 128, overlap 16"), 1.25)
        session.close()
    return chart


def make_picture(path: Path, width: int, height: int) -> None:
    """A large picture file made by libvips, in bands: noise at two scales and waves; always the same one."""
    import pyvips

    planes = [
        pyvips.Image.perlin(width, height, cell_size=64, seed=1),
        pyvips.Image.sines(width, height, hfreq=50, vfreq=70),
        pyvips.Image.perlin(width, height, cell_size=16, seed=2),
    ]
    image = planes[0].bandjoin(planes[1:]).linear(127.5, 127.5).cast("uchar").copy(interpretation="srgb")
    image.write_to_file(str(path), compression=1)


def child(width: int, height: int, suffix: str, precision: str) -> None:
    """In a process of its own: upscale a made picture from file to file; print seconds and peak MiB."""
    source = OUT / f"large-{width}x{height}.png"
    tiling = Tiling("stream")
    upscale = Upscaler(MODELS["Compact-16"], backend="openvino", precision=precision, tiling=tiling)
    report = upscale_file(source, OUT / f"large{suffix}", upscale)
    # not ru_maxrss, which a child takes over from its parent
    status = Path("/proc/self/status").read_text().splitlines()
    peak = int(next(line for line in status if line.startswith("VmHWM:")).split()[1]) / 1024
    print(json.dumps({"peak_mib": peak, **report.to_dict()}))


def measured(width: int, height: int, suffix: str, precision: str) -> dict[str, Any]:
    source = OUT / f"large-{width}x{height}.png"
    command = [sys.executable, __file__, "child", str(width), str(height), suffix, precision]
    subprocess.run([*command[:2], "make", *command[3:5]], check=True)
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    source.unlink()
    figures: dict[str, Any] = json.loads(done.stdout)
    seconds, peak = figures["seconds"], figures["peak_mib"]
    print(f"     {width} x {height} {precision}: {seconds:.0f} s, peak {peak:.0f} MiB, {figures['reason']}")
    return figures


def memory(table: Table) -> None:
    """Peak resident memory does not grow with the height."""
    short, tall = (measured(1024, h, ".png", "f32")["peak_mib"] for h in (4096, 16384))
    table.add("peak memory at height 16384 / 4096, width 1024", tall / short, 1.1)


def gigapixel(table: Table) -> None:
    """8192 x 8192 becomes 32768 x 32768; a part of it equals the same part done alone."""
    import pyvips

    size, scale = 8192, 4
    made = measured(size, size, ".tif", "bf16")
    table.add("8192 x 8192 to 32768 x 32768 bf16: peak MiB", made["peak_mib"], 2048)
    make_picture(OUT / "again.png", size, size)
    source = pyvips.Image.new_from_file(str(OUT / "again.png"))
    result = pyvips.Image.new_from_file(str(OUT / "large.tif"))
    session = anysize.load(MODELS["Compact-16"], backend="openvino", precision="bf16")
    halo = session.spec.radius or 0
    worst = 0
    for left, top in ((0, 0), (4000, 4000), (1000, 7000), (size - 256, size - 256)):
        x0, y0 = max(0, left - halo), max(0, top - halo)
        x1, y1 = min(size, left + 256 + halo), min(size, top + 256 + halo)
        part = Upscaler(session, tiling=Tiling("whole"))(source.crop(x0, y0, x1 - x0, y1 - y0).numpy())
        inner = part[(top - y0) * scale :, (left - x0) * scale :][: 256 * scale, : 256 * scale]
        got = result.crop(left * scale, top * scale, 256 * scale, 256 * scale).numpy()
        worst = max(worst, int(np.abs(got.astype(int) - inner).max()))
    table.add("8192 x 8192 bf16: parts against themselves alone, uint8 steps", worst, 1)
    (OUT / "again.png").unlink()
    (OUT / "large.tif").unlink()


def draw(chart: dict[str, dict[str, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(chart), figsize=(4 * len(chart), 4))
    for axis, (title, bars) in zip(axes, chart.items(), strict=True):
        best = bars["raw engine, tile 128"]
        axis.bar(range(len(bars)), [value / best for value in bars.values()], color="#4477aa")
        axis.set_xticks(range(len(bars)), [label.replace(", ", "\n") for label in bars], fontsize=7)
        axis.set_title(f"{title}: 1 = {best:.3f} Mpx/s", fontsize=9)
        axis.axhline(0.85, color="grey", linewidth=0.5)
    axes[0].set_ylabel("speed, of the raw engine's")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main(parts: list[str]) -> None:
    if not ASSETS.is_dir():
        sys.exit(f"{ASSETS} is missing: it holds the weights this measures")
    OUT.mkdir(exist_ok=True)
    table, chart = Table(), {}
    started = time.time()
    for part in parts or ["results", "speed", "memory", "gigapixel"]:
        if part == "speed":
            chart = speed(table)
            draw(chart, OUT / "streaming.png")
        else:
            {"results": results, "memory": memory, "gigapixel": gigapixel}[part](table)
    written = {"rows": table.rows, "mpx_per_second": chart}
    (OUT / f"streaming{'-' + '-'.join(parts) if parts else ''}.json").write_text(
        json.dumps(written, indent=1)
    )
    bad = [row for row in table.rows if not row["ok"]]
    print(f"{len(table.rows) - len(bad)} of {len(table.rows)} within bounds, {time.time() - started:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
    elif sys.argv[1:2] == ["make"]:
        make_picture(OUT / f"large-{sys.argv[2]}x{sys.argv[3]}.png", int(sys.argv[2]), int(sys.argv[3]))
    else:
        main(sys.argv[1:])
