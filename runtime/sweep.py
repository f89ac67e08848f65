"""`anysize bench --sweep sizes`: one picture restyled at several resolutions, with time, memory and likeness.

Each resolution on each engine is a process of its own, whose peak memory is then its alone; the engines of a
resolution take turns.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import AnysizeError, BackendUnavailableError, ExecutionError, OptionError
from anysize.bench import Workers, as_rgb, command_line, installed_engines, machine
from anysize.bench_result import drawn
from anysize.stylize import Stylizer
from anysize.tiling import Tiling

#: longest sides
RESOLUTIONS = (256, 384, 512, 720, 1080)
#: (left, top, width, height) in pixels of the picture
Region = tuple[int, int, int, int]
#: SSIM looks at windows of this side
_LEAST_REGION = 11


@dataclass(frozen=True)
class SweepRow:
    """One engine at one resolution.

    `height`, `width`: the size it ran at. `first`: seconds of the first call, with the compilation;
    `seconds`: of the later ones, the median; `spread`: 10th and 90th percentile of them. `peak`: the most
    bytes the process held. `ssim`: of the result, at the picture's size again, to the picture; `ssim_region`:
    within the region, None without one.
    """

    resolution: int
    backend: str
    asked: str
    method: str
    height: int
    width: int
    first: float
    seconds: float
    spread: tuple[float, float]
    peak: int
    ssim: float
    ssim_region: float | None


@dataclass(frozen=True)
class Sweep:
    """What was measured, and of what."""

    command: str
    machine: dict[str, Any]
    model: str
    size: tuple[int, int]
    region: Region | None
    rows: list[SweepRow]
    left_out: dict[str, str]

    def markdown(self) -> str:
        """The table as Markdown."""
        about = [f"{key}: {value}" for key, value in self.machine.items()]
        height, width = self.size
        where = "" if self.region is None else "; region: {} px from the left, {} from the top, {} x {}"
        lines = [f"`{self.command}`", "", "; ".join(about), "", f"## {Path(self.model).name}, a picture of"]
        lines[-1] += f" {width} x {height}{where.format(*(self.region or ()))}"
        lines += [
            "",
            "| longest side | ran at | engine | method | s | 10th to 90th percentile | first call, s "
            "| peak, MiB | SSIM | SSIM of the region |",
            "|---|---|---|---|---|---|---|---|---|---|",
        ]
        for r in self.rows:
            region = "" if r.ssim_region is None else f"{r.ssim_region:.4f}"
            lines.append(
                f"| {r.resolution} | {r.width} x {r.height} | {r.backend} | {r.method} | {r.seconds:.3f} "
                f"| {r.spread[0]:.3f} to {r.spread[1]:.3f} | {r.first:.2f} | {r.peak / 2**20:.0f} "
                f"| {r.ssim:.4f} | {region} |"
            )
        lines += ["", *(f"Left out: {name}: {why}" for name, why in self.left_out.items())]
        return "\n".join(lines).rstrip() + "\n"

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON types."""
        return asdict(self)

    def write(self, folder: Path) -> list[Path]:
        """Write sweep.json, sweep.md and, where matplotlib is installed, sweep.png."""
        folder.mkdir(parents=True, exist_ok=True)
        made = [folder / "sweep.json", folder / "sweep.md"]
        made[0].write_text(json.dumps(self.to_dict(), indent=1))
        made[1].write_text(self.markdown())
        return made + drawn(folder / "sweep.png", self._draw)

    def _draw(self, pyplot: Any) -> Any:
        figure, (time, memory, likeness) = pyplot.subplots(1, 3, figsize=(15, 5))
        for name in dict.fromkeys(_name(r.backend, r.asked) for r in self.rows):
            rows = [r for r in self.rows if _name(r.backend, r.asked) == name]
            sides = [r.resolution for r in rows]
            ends = [[abs(r.spread[end] - r.seconds) for r in rows] for end in (0, 1)]
            time.errorbar(sides, [r.seconds for r in rows], yerr=ends, marker="o", label=name)
            memory.plot(sides, [r.peak / 2**20 for r in rows], marker="o", label=name)
            (line,) = likeness.plot(sides, [r.ssim for r in rows], marker="o", label=name)
            if self.region is not None:
                values = [r.ssim_region for r in rows]
                style = {"marker": "s", "linestyle": "--", "color": line.get_color()}
                likeness.plot(sides, values, label=f"{name}, region", **style)
        time.set(ylabel="seconds", ylim=(0, None))
        memory.set(ylabel="peak memory of the process, MiB", ylim=(0, None))
        likeness.set(ylabel="SSIM to the picture", ylim=(None, 1))
        for axes in (time, memory, likeness):
            axes.set(xlabel="longest side")
            axes.legend(fontsize=8)
        return figure


def _name(backend: str, method: str) -> str:
    return backend + (f", {method}" if method != "auto" else "")


def sweep(
    model: str,
    picture: Any,
    *,
    region: Region | None = None,
    backends: Sequence[str] | None = None,
    methods: Sequence[str] = ("auto",),
    resolutions: Sequence[int] = RESOLUTIONS,
    rounds: int = 5,
    say: Callable[[str], Any] = lambda text: None,
) -> Sweep:
    """Restyle a picture at several resolutions, in f32.

    `model`: one that gives back the size it takes. `picture`: an HW or HWC array (uint8, uint16, or float in
    0..1) or a PIL image, made 8-bit RGB; its longest side is brought to each of `resolutions`, and the result
    back to its size. `region`: (left, top, width, height) in its pixels, such as a face, for an SSIM of its
    own. `backends`, `methods`: as in `anysize.bench.bench`.

    SSIM is that of Wang et al. (2004), "Image quality assessment: from error visibility to structural
    similarity": Gaussian windows of sigma 1.5, on each channel of values in 0..1, averaged.
    Raises `ImageError`, `OptionError`, `ModelLoadError`, `BackendUnavailableError` without scikit-image,
    `ExecutionError` where nothing runs.
    """
    given = as_rgb(picture)
    size = (given.shape[0], given.shape[1])
    if min(size) < _LEAST_REGION:
        raise OptionError(f"SSIM takes pictures of {_LEAST_REGION} pixels at least a side, not {size}")
    if region is not None:
        _check(region, size)
    for method in methods:
        Tiling(method)  # type: ignore[arg-type]  # which checks it
    if rounds < 1 or not resolutions or min(resolutions) < 1:
        raise OptionError("rounds and resolutions must be at least 1")
    _ssim(given[:16, :16] / 255, given[:16, :16] / 255)  # whether it can be computed at all
    engines = [info for info in installed_engines(backends) if "ncnn" not in info.formats]
    if not engines:
        raise OptionError("no engine for this is installed")
    errors: dict[str, AnysizeError] = {}
    for info in engines:  # whether it is a model for this; and conversions are not what shall be measured
        try:
            Stylizer(model, backend=info.name).close()
        except AnysizeError as error:
            errors[info.name] = error
    engines = [info for info in engines if info.name not in errors]
    if not engines:
        raise next(iter(errors.values()))
    rows: list[SweepRow] = []
    left_out = {name: str(error) for name, error in errors.items()}
    for resolution in resolutions:
        with Workers(given) as workers:
            for info in engines:
                for method in methods:
                    case = {"kind": "style", "model": model, "backend": info.name, "method": method}
                    name = f"{resolution}: {_name(info.name, method)}"
                    say(name)
                    workers.add(name, case | {"resolution": resolution})
            seconds: dict[str, list[float]] = {name: [] for name in workers.ready}
            for i in range(rounds):
                say(f"{resolution}: round {i + 1} of {rounds}")
                workers.turn(seconds)
            for name, worker in workers.ready.items():
                rows.append(
                    _row(worker.case, worker.facts, seconds[name], np.load(worker.result), given, region)
                )
            left_out |= workers.left_out
    if not rows:
        raise ExecutionError(f"nothing ran: {left_out}", backend="", shape=None)
    return Sweep(command_line(), machine(), model, size, region, rows, left_out)


def _check(region: Region, size: tuple[int, int]) -> None:
    left, top, width, height = region
    least = _LEAST_REGION
    if min(left, top) < 0 or min(width, height) < least or top + height > size[0] or left + width > size[1]:
        raise OptionError(
            f"a region is left,top,width,height within the picture of {size[1]} x {size[0]}, of {least} "
            f"pixels at least a side, not {','.join(map(str, region))}"
        )


def _row(
    case: dict[str, Any],
    facts: dict[str, Any],
    seconds: list[float],
    result: Array,
    given: Array,
    region: Region | None,
) -> SweepRow:
    similar = _ssim(result, given.astype(np.float32) / 255)
    within = None
    if region is not None:
        left, top, width, height = region
        within = float(similar[top : top + height, left : left + width].mean())
    low, high = (float(q) for q in np.quantile(seconds, (0.1, 0.9)))
    return SweepRow(
        resolution=case["resolution"],
        backend=case["backend"],
        asked=case["method"],
        method=facts["method"],
        height=facts["height"],
        width=facts["width"],
        first=facts["first"],
        seconds=statistics.median(seconds),
        spread=(low, high),
        peak=facts["peak"],
        ssim=float(similar.mean()),
        ssim_region=within,
    )


def _ssim(got: Array, want: Array) -> Array:
    """For each pixel and channel, of pictures HWC in 0..1."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise BackendUnavailableError(
            f"SSIM is computed with scikit-image: pip install 'anysize[bench]' ({error})", name="scikit-image"
        ) from error
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    values: Array = structural_similarity(got, want, channel_axis=2, data_range=1.0, full=True, **settings)[1]
    return values
