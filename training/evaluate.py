"""The bundled models' figures, from the shipped files: `make eval-model`.

Reads pictures and realesr-animevideov3 from `../shared/assets`, writes docs/bundled-models.md and sheets of
crops, out/eval-NAME.png (input, bicubic, ours, truth); exit code 1 if a figure is outside its bound.
"""

from __future__ import annotations

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import anysize
import numpy as np
from anysize.backends import describe_backends
from anysize.bench import machine
from anysize.models import BUNDLED, bundled_file, load_weights
from PIL import Image, ImageDraw
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from benchmarks.acceptance import ASSETS, OUT, Table
from training.pictures import picture

Array = np.ndarray
PAGE = Path(__file__).parent.parent / "docs" / "bundled-models.md"
#: by name: scale
MODELS = {name: bundled.scale for name, bundled in BUNDLED.items()}
PEER = ASSETS / "weights" / "realesr-animevideov3.pth"
#: seeds that no recipe reaches, a drawing and a text of each; so many because a model gains much on some and
#: little on others, and the mean of twelve is known to more than half a dB only
HELD_OUT = range(10**15, 10**15 + 50)
#: of a set's mean PSNR on luma, in dB: at least so much, or so much above bicubic
AT_LEAST = {("default", "Set5"): 30.9, ("default-x2", "Set5"): 36.6}
ABOVE = {
    ("default", "comic"): 0.8,
    ("default", "line art and text"): 4.0,
    ("default-x2", "line art and text"): 4.0,
}
#: at most so much of bicubic's: hues are enlarged bilinearly, not sharpened into what they were not
HUES = 1.25
#: at most so much may the light of what is flat be off, in 1/255; a model that had learned bf16's rounding of
#: its input had 0.5
LIGHT = 0.1
#: at most so much of a step's height may be beyond it: a hard edge next to white looks like that of an
#: outlined shape, so that a dark line of a pixel may come out
BEYOND = 1.0
#: places on the sheet: set, picture, left and top of the enlarged picture
SHOWN = (
    ("Set5", "butterfly", 90, 60),
    ("Set5", "woman", 70, 20),
    ("Set5", "baby", 180, 180),
    ("comic", "comic", 60, 90),
    ("line art and text", "lines-11", 90, 20),
    ("line art and text", "lines-18", 100, 70),
    ("line art and text", "text-6", 64, 64),
)
CROP, ZOOM = 96, 2


def ycbcr(rgb: Array, border: int) -> Array:
    """BT.601 luma in 16..235 and chroma in 16..240, HWC float64, of HWC uint8 RGB, `border` pixels cropped on
    each side."""
    height, width = rgb.shape[:2]
    return np.asarray(rgb2ycbcr(rgb)[border : height - border, border : width - border])


def psnr(a: Array, b: Array, border: int) -> float:
    """PSNR in dB of two HWC uint8 pictures, on luma, `border` pixels cropped on each side."""
    one, other = (ycbcr(picture, border)[..., 0] for picture in (a, b))
    return float(peak_signal_noise_ratio(one, other, data_range=255))


def ssim(a: Array, b: Array, border: int) -> float:
    """SSIM as `psnr`, with a Gaussian window of deviation 1.5 (Wang et al. 2004)."""
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    one, other = (ycbcr(picture, border)[..., 0] for picture in (a, b))
    return float(structural_similarity(one, other, data_range=255, **gaussian))


def chroma(a: Array, b: Array, border: int) -> float:
    """Root of the mean squared difference of chroma, in 1/255; no PSNR, as grey pictures have none."""
    return float(np.sqrt(np.mean((ycbcr(a, border) - ycbcr(b, border))[..., 1:] ** 2)))


def enlarged(low: Array, scale: int, how: Image.Resampling) -> Array:
    height, width = low.shape[:2]
    return np.asarray(Image.fromarray(low).resize((width * scale, height * scale), how))


def read(file: Path) -> Array:
    return np.asarray(Image.open(file).convert("RGB"))


@lru_cache
def drawn(kind: str, number: int) -> Array:
    return picture(HELD_OUT[number], 256, kind)


def pairs(scale: int) -> Iterator[tuple[str, str, Array, Array]]:
    """Set, name, reduced picture and truth, HWC uint8; photographs first."""
    for high in sorted((ASSETS / "images" / "set5" / "HR").glob("*.png")):
        low = read(high.parent.parent / f"LRx{scale}" / f"{high.stem}x{scale}.png")
        yield "Set5", high.stem, low, read(high)[: low.shape[0] * scale, : low.shape[1] * scale]
    if scale == 4:
        low = read(ASSETS / "images" / "comic_lq.png")
        yield (
            "comic",
            "comic",
            low,
            read(ASSETS / "images" / "comic_gt.png")[: low.shape[0] * 4, : low.shape[1] * 4],
        )
    for number, kind in itertools.product(range(len(HELD_OUT)), ("lines", "text")):
        truth = drawn(kind, number)
        low = np.asarray(Image.fromarray(truth).resize((256 // scale,) * 2, Image.Resampling.BICUBIC))
        yield "line art and text", f"{kind}-{number}", low, truth


def quality(table: Table, name: str, backend: str = "openvino") -> list[str]:
    """Each set's mean PSNR, SSIM and error of chroma by each method, as lines of Markdown."""
    scale = MODELS[name]
    methods: dict[str, Callable[[Array], Array]] = {
        "bicubic": lambda low: enlarged(low, scale, Image.Resampling.BICUBIC),
        "Lanczos": lambda low: enlarged(low, scale, Image.Resampling.LANCZOS),
        name: anysize.Upscaler(name, backend=backend),
    }
    if scale == 4:
        methods[PEER.stem] = anysize.Upscaler(PEER, backend=backend)
    figures: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for group, _, low, truth in pairs(scale):
        of_set = figures.setdefault(group, {method: [] for method in methods})
        for method, run in methods.items():
            result = run(low)
            of_set[method].append(tuple(judge(result, truth, scale) for judge in (psnr, ssim, chroma)))
    means = {g: {m: np.mean(v, 0) for m, v in by.items()} for g, by in figures.items()}
    for (which, group), bound in AT_LEAST.items():
        if which == name:
            table.at_least(f"{name}, {group}: PSNR on luma, dB", means[group][name][0], bound)
    for (which, group), bound in ABOVE.items():
        if which == name:
            gain = means[group][name][0] - means[group]["bicubic"][0]
            table.at_least(f"{name}, {group}: above bicubic, dB", gain, bound)
    for group, by in means.items():
        ratio = by[name][2] / by["bicubic"][2]
        table.add(f"{name}, {group}: error of chroma, times that of bicubic", ratio, HUES)
    drawings = figures["line art and text"]
    gains = [ours[0] - theirs[0] for ours, theirs in zip(drawings[name], drawings["bicubic"], strict=True)]
    error = statistics.stdev(gains) / len(gains) ** 0.5
    lines = [f"| {name} (x{scale}) | {' | '.join(methods)} |", "|---" * (len(methods) + 1) + "|"]
    for group, by in means.items():
        cells = " | ".join(f"{db:.2f} dB, {similar:.4f}, {hue:.2f}" for db, similar, hue in by.values())
        lines.append(f"| {group} ({len(figures[group][name])}) | {cells} |")
    gain = f"{statistics.mean(gains):.2f} dB, standard error {error:.2f} dB"
    kinds = f"line art {statistics.mean(gains[::2]):.2f} dB, text {statistics.mean(gains[1::2]):.2f} dB"
    return [*lines, "", f"`{name}` above bicubic on line art and text: {gain}; {kinds}."]


def manners(table: Table, name: str, backend: str = "openvino") -> None:
    """What is flat stays flat, to the borders and of one pixel; light and colour stay. In floats: rounded to
    8 bits, half a step that all pixels are off would not be seen."""
    scale = MODELS[name]
    upscale = anysize.Upscaler(name, backend=backend)
    greys = np.arange(256) / np.float32(255)
    for size in ((40, 56), (3, 3), (1, 1)):
        flat = [np.full((*size, 3), grey, np.float32) for grey in greys]
        off = np.array([255 * (upscale(one) - one[0, 0]) for one in flat])
        assert off.shape[1:] == (size[0] * scale, size[1] * scale, 3)
        what = f"{name}: greys of {size[0]} x {size[1]}"
        table.add(f"{what}, largest difference / 255", np.abs(off).max(), 1)
        if size == (40, 56):
            table.add(f"{what}, a grey's mean off by / 255", np.abs(off.mean((1, 2, 3))).max(), LIGHT)
    mixed = [np.array(levels, np.float32) / 2 for levels in np.ndindex(3, 3, 3)]
    shift = max(np.abs(upscale(np.tile(c, (40, 56, 1))).mean((0, 1)) - c).max() for c in mixed)
    table.add(f"{name}: flat colours, a channel's mean off by / 255", 255 * shift, 0.5)
    shift = 0.0
    for group, _, low, truth in pairs(scale):
        if group != "line art and text":
            result = upscale(low.astype(np.float32) / 255) * 255
            shift = max(shift, float(np.abs(result.mean((0, 1)) - truth.mean((0, 1))).max()))
    table.add(f"{name}: photographs, a channel's mean off by / 255", shift, 0.5)


def strokes(table: Table, name: str, backend: str = "openvino") -> None:
    """Grey strokes on white, and white ones on grey, 2 to 3 pixels of the reduced picture wide, along both
    axes, on average over where they lie between its pixels: at one place some still come out hollow."""
    scale = MODELS[name]
    upscale = anysize.Upscaler(name, backend=backend)
    side, least = 24 * scale, np.inf
    cases = itertools.product((2, 2.5, 3), (64, 128, 192), (False, True), (False, True))
    for wide, grey, inverse, level in cases:
        width, gains = int(wide * scale), list[float]()
        for left in range(10 * scale, 11 * scale):
            truth = np.full((side, side, 3), grey if inverse else 255, np.uint8)
            truth[:, left : left + width] = 255 if inverse else grey
            truth = truth.swapaxes(0, 1) if level else truth
            low = np.asarray(Image.fromarray(truth).resize((24, 24), Image.Resampling.BICUBIC))
            plain = enlarged(low, scale, Image.Resampling.BICUBIC)
            gains.append(psnr(upscale(low), truth, scale) - psnr(plain, truth, scale))
        least = min(least, statistics.mean(gains))
    table.at_least(f"{name}: plain strokes, least above bicubic, dB", least, 0)


def edges(table: Table, name: str, backend: str = "openvino") -> None:
    """Hard edges, as screenshots have and bicubic reduction never gives: how dark or light lines beside them
    are."""
    upscale = anysize.Upscaler(name, backend=backend)
    worst = 0.0
    for one, other in itertools.permutations(np.linspace(0, 1, 9, dtype=np.float32), 2):
        step = np.full((24, 24, 3), one, np.float32)
        step[:, 12:] = other
        for low in (step, step.swapaxes(0, 1)):
            result = upscale(low)
            beyond = max(result.max() - max(one, other), min(one, other) - result.min())
            worst = max(worst, float(beyond / abs(one - other)))
    table.add(f"{name}: hard edges, beyond both sides, share of the step", worst, BEYOND)


def half(table: Table, name: str, backend: str = "openvino") -> None:
    """bf16 against f32, on crops of Set5, a drawing and a text: on the engine where it can, and on PyTorch,
    which always can."""
    import torch

    module = load_weights(bundled_file(name, ".safetensors")).module.bfloat16()

    def on_torch(x: Array) -> Array:
        with torch.inference_mode():
            result = module(torch.from_numpy(x).permute(2, 0, 1)[None].bfloat16())
        return np.asarray(result[0].permute(1, 2, 0).float().clamp(0, 1))  # as `Upscaler` does

    halves: dict[str, Callable[[Array], Array]] = {"torch": on_torch}
    if "bf16" in next(b.precisions for b in describe_backends() if b.name == backend):
        halves[backend] = anysize.Upscaler(name, backend=backend, precision="bf16")
    upscale = anysize.Upscaler(name, backend=backend)
    crops = [
        low[:64, :64].astype(np.float32) / 255
        for group, which, low, _ in pairs(MODELS[name])
        if group == "Set5" or which in ("lines-11", "text-6")
    ]
    for engine, run in halves.items():
        worst = max(float(np.mean((run(x) - upscale(x)) ** 2)) for x in crops)
        table.at_least(f"{name}: bf16 on {engine} against f32, lowest, dB", -10 * np.log10(worst), 50)


def work(table: Table, name: str) -> None:
    """Multiply-adds of a pixel of input."""
    from anysize.exporters.cost import operations

    model = anysize.load(name, backend="openvino")._guards[0].model
    done = operations(model, {"n": 1, "h": 100, "w": 100})
    assert done is not None
    table.add(f"{name}: multiply-adds of a pixel of input", done[0] / 2 / 100**2, 120e3)


def speed(name: str, backend: str = "openvino") -> str:
    """Its time beside realesr-animevideov3's, in turns."""
    x = np.random.default_rng(0).random((1, 3, 256, 256), np.float32)
    runs = [anysize.load(source, backend=backend) for source in (name, PEER)]
    times: list[list[float]] = [[], []]
    for turn in range(12):
        for run, taken in zip(runs, times, strict=True):
            started = time.perf_counter()
            run(x)
            if turn >= 2:
                taken.append(time.perf_counter() - started)
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    pixels = 0.256**2 / statistics.median(times[0])
    much = f"{pixels:.2f} megapixels of input a second (x{MODELS[name]})"
    return f"`{name}` takes {much}, {ratio:.1f} times {PEER.stem}."


def sheet(path: Path, name: str, backend: str = "openvino") -> None:
    """Crops of input, bicubic, ours and truth side by side, a row each."""
    scale = MODELS[name]
    methods: dict[str, Callable[[Array], Array]] = {
        "input": lambda low: enlarged(low, scale, Image.Resampling.NEAREST),
        "bicubic": lambda low: enlarged(low, scale, Image.Resampling.BICUBIC),
        name: anysize.Upscaler(name, backend=backend),
    }
    found = {(group, which): (low, truth) for group, which, low, truth in pairs(scale)}
    rows = []
    for group, which, left, top in SHOWN:
        if (group, which) in found:
            low, truth = found[group, which]
            shown = [*(run(low) for run in methods.values()), truth]
            cut = [one[top : top + CROP, left : left + CROP] for one in shown]
            rows.append(np.concatenate(cut, 1).repeat(ZOOM, 0).repeat(ZOOM, 1))
    drawn = Image.fromarray(np.concatenate(rows))
    draw = ImageDraw.Draw(drawn)
    for column, label in enumerate((*methods, "truth")):
        draw.text((column * CROP * ZOOM + 5, 3), label, fill="red")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(path)


def main() -> int:
    if not ASSETS.is_dir():
        sys.exit(f"{ASSETS} is missing: it holds the pictures this measures")
    table, load = Table(), os.getloadavg()[0]
    tables, speeds = list[str](), list[str]()
    for name in MODELS:
        tables += ["", *quality(table, name)]
        manners(table, name)
        strokes(table, name)
        edges(table, name)
        half(table, name)
        work(table, name)
        speeds += [speed(name)]
        sheet(OUT / f"eval-{name}.png", name)
    facts = machine()
    where = ", ".join(f"{key} {facts[key]}" for key in ("processor", "cores", "openvino"))
    lines = [
        "# Bundled models, measured",
        "",
        f"Made by `make eval-model` on {where}; load average at its start {load:.1f}.",
        "",
        "PSNR and SSIM on luma, then the error of chroma (root mean square, in 1/255), the scale cropped at",
        "each border, from the shipped ONNX files through OpenVINO. Line art and text are drawn from seeds",
        "that training does not reach. How and what for the models were made: `training/` of the repository.",
        *tables,
        "",
        *speeds,
        "",
        *table.markdown(),
    ]
    PAGE.write_text("\n".join(lines) + "\n")
    return int(not all(row["ok"] for row in table.rows))


if __name__ == "__main__":
    sys.exit(main())
