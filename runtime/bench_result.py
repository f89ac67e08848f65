"""What `anysize bench` found: tables, advice, files and charts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from anysize.precision import LEAST_DB, LEAST_INT8_DB

#: the case that all others are compared with: what programs commonly do
COMMON = "torch, tiles of 200 + 10"


@dataclass
class Row:
    """One case at one size. `spread`: 10th and 90th percentile of `mpx_per_second`, which is the median.
    `ratio`: of speeds, over the common case: median, 10th and 90th percentile.

    `of_peak`: of the operations a second that a large matrix product gets in this precision; None where the
    graph cannot be read. `decibels`: PSNR of the result against the first engine's in f32, as `precision`
    judges it, before the rounding to 8 bits; `decibels_8bit`: after it, which by itself costs some where the
    two are close. Infinite where they are identical, None for that engine itself and for cases without a
    picture.
    """

    name: str
    case: dict[str, Any]
    facts: dict[str, Any]
    seconds: list[float] = field(default_factory=list)
    mpx_per_second: float = 0.0
    spread: tuple[float, float] = (0.0, 0.0)
    ratio: tuple[float, float, float] | None = None
    of_peak: float | None = None
    decibels: float | None = None
    decibels_8bit: float | None = None


@dataclass
class Benchmark:
    """What was measured. `tables`: rows by "width x height"; `ceilings`: operations or bytes per second."""

    command: str
    machine: dict[str, Any]
    model: str
    ceilings: dict[str, float]
    tables: dict[str, list[Row]]
    left_out: dict[str, str]

    def advice(self) -> list[str]:
        """What to use here, and why; from the largest size."""
        rows = list(self.tables.values())[-1]
        ours = [r for r in rows if r.case["kind"] == "anysize"]
        lines = []
        for precision in dict.fromkeys(r.case["precision"] for r in ours):
            fit = [r for r in ours if r.case["precision"] == precision]
            least = LEAST_INT8_DB if precision == "int8" else LEAST_DB
            good = [r for r in fit if precision == "f32" or (r.decibels or 0) >= least]
            if fit and not good:
                lines.append(f"not {precision}: {max(r.decibels or 0 for r in fit):.1f} dB from f32")
            if good:
                # ratios are taken within rounds, so they outlast a machine that slows down in between
                best = max(good, key=lambda r: r.ratio[0] if r.ratio else r.mpx_per_second)
                against = f", {best.ratio[0]:.2f} x {COMMON}" if best.ratio else ""
                peak = f", {best.of_peak:.0%} of a large matrix product's speed" if best.of_peak else ""
                quality = f", {best.decibels:.1f} dB from f32" if precision != "f32" and best.decibels else ""
                flags = "".join(
                    f" --{name} {best.case[name]}"
                    for name in ("backend", "precision", "method", "threads")
                    if best.case[name] not in (None, "auto")
                )
                flags += " --calibration PICTURES" if precision == "int8" else ""
                facts = best.facts
                how = {"stream": f"bands of {facts['tile']} rows", "tile": f"tiles of {facts['tile']}"}
                lines.append(
                    f"{precision}:{flags}: {best.mpx_per_second:.3f} Mpx/s{against}{peak}{quality}; "
                    f"{how.get(facts['method'], 'whole')}, {facts['streams']} at a time"
                )
        return lines

    def markdown(self) -> str:
        """The tables as Markdown."""
        about = [f"{key}: {value}" for key, value in self.machine.items()]
        lines = [f"`{self.command}`", "", "; ".join(about), ""]
        lines += [f"* {name}: {_giga(name, value)}" for name, value in self.ceilings.items()]
        for size, rows in self.tables.items():
            lines += ["", f"## {Path(self.model).name}, {size}", ""]
            ratios = f"times {COMMON} (10th to 90th percentile)"
            lines += [f"| case | input Mpx/s | {ratios} | of the matrix product | dB (in 8 bits) | method |"]
            lines += ["|---|---|---|---|---|---|"]
            for row in rows:
                ratio = "" if row.ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*row.ratio)
                peak = "" if row.of_peak is None else f"{row.of_peak:.0%}"
                decibels = "" if row.decibels is None else f"{row.decibels:.1f} ({row.decibels_8bit:.1f})"
                method = row.facts.get("method", "") or row.facts.get("note", "")
                lines.append(
                    f"| {row.name} | {row.mpx_per_second:.4f} | {ratio} | {peak} | {decibels} | {method} |"
                )
        lines += ["", "What to use here:", "", *(f"* {line}" for line in self.advice())]
        lines += ["", *(f"Left out: {name}: {why}" for name, why in self.left_out.items())]
        return "\n".join(lines).rstrip() + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types; an infinite PSNR (identical results) is null."""
        made = asdict(self) | {"advice": self.advice()}
        for row in (row for rows in made["tables"].values() for row in rows):
            for key in ("decibels", "decibels_8bit"):
                row[key] = None if row[key] == math.inf else row[key]
        return made

    def write(self, folder: Path) -> list[Path]:
        """Write bench.json, bench.md and, where matplotlib is installed, bench.png."""
        folder.mkdir(parents=True, exist_ok=True)
        made = [folder / "bench.json", folder / "bench.md"]
        made[0].write_text(json.dumps(self.to_dict(), indent=1))
        made[1].write_text(self.markdown())
        return made + drawn(folder / "bench.png", self._draw)

    def _draw(self, pyplot: Any) -> Any:
        figure, (left, right) = pyplot.subplots(1, 2, figsize=(15, 6))
        rows = list(self.tables.values())[-1]
        names = list(dict.fromkeys(row.name for table in self.tables.values() for row in table))
        shades = pyplot.get_cmap("tab20")
        colours = {name: shades(i % shades.N) for i, name in enumerate(names)}
        if len(self.tables) == 1:
            for row in rows:
                spread = [abs(q - row.mpx_per_second) for q in row.spread]
                left.barh(row.name, row.mpx_per_second, color=colours[row.name], xerr=[[s] for s in spread])
            left.invert_yaxis()
            left.set(xlabel=f"Mpx of input per second, {next(iter(self.tables))}")
        else:
            for name in names:
                points = [
                    (row.case["height"] * row.case["width"] / 1e6, row.mpx_per_second)
                    for table in self.tables.values()
                    for row in table
                    if row.name == name
                ]
                left.plot(*zip(*points, strict=True), marker="o", color=colours[name], label=name)
            left.set(xscale="log", xlabel="Mpx of input", ylabel="Mpx of input per second", ylim=(0, None))
            left.legend(fontsize=7)
        bandwidth = self.ceilings.get("copy of memory")
        intensities = np.logspace(-1, 3, 100)
        for name, peak in self.ceilings.items():
            if bandwidth and name != "copy of memory":
                roof = np.minimum(peak, intensities * bandwidth) / 1e9
                right.plot(intensities, roof, linestyle="--", label=name)
        for row in rows:
            work = row.facts.get("operations_per_pixel")
            if work:
                x, y = work / row.facts["bytes_per_pixel"], row.mpx_per_second * work / 1e3
                right.plot([x], [y], "o", color=colours[row.name], label=row.name)
        right.set(xscale="log", yscale="log", xlabel="operations per byte, without caches", ylabel="GFLOP/s")
        right.legend(fontsize=7)
        return figure


def drawn(path: Path, draw: Callable[[Any], Any]) -> list[Path]:
    """The chart that `draw` makes with pyplot, written; nothing where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = draw(pyplot)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return [path]


def _giga(name: str, value: float) -> str:
    return f"{value / 1e9:.1f} GB/s" if "copy" in name else f"{value / 1e9:.0f} GFLOP/s"
