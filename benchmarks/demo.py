"""`make demo`: draw a small picture, upscale it by 4 with the bundled model, lay it beside bicubic.

Writes input.png, output.png and sheet.png (left bicubic, right anysize) to the folder given, and prints the
PSNR of both against the same drawing rasterised at four times the size.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import anysize
import numpy as np
import pyvips
from anysize.pixels import quantise, resize, to_float

WIDTH, HEIGHT, SCALE = 200, 150, 4


def drawing() -> str:
    """A seaside scene as SVG: gradients, thin lines, curves, hatching and small details; no fonts needed."""
    rng = np.random.default_rng(7)
    stars = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r:.2f}" fill="#fff8e0" opacity="0.8"/>'
        for x, y, r in rng.random((26, 3)) * (200, 55, 0.9)
    )
    rays = "".join(
        f'<line x1="150" y1="38" x2="{150 + 40 * math.cos(a):.1f}" y2="{38 + 40 * math.sin(a):.1f}" '
        'stroke="#ffe9a8" stroke-width="0.7" opacity="0.6"/>'
        for a in np.linspace(0, 2 * math.pi, 28)
    )
    waves = "".join(
        f'<path d="M0 {y} q 6 {-2.5 - i * 0.3:.1f} 12 0 {"t 12 0 " * 17}" fill="none" stroke="#bfe3ee" '
        f'stroke-width="{0.5 + i * 0.12:.2f}" opacity="0.7"/>'
        for i, y in enumerate(range(98, 150, 7))
    )
    hatching = "".join(
        f'<line x1="{x}" y1="95" x2="{x + 26}" y2="58" stroke="#20303c" stroke-width="0.5"/>'
        for x in range(-6, 90, 4)
    )
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 200 150">
    <defs>
      <linearGradient id="sky" x2="0" y2="1">
        <stop stop-color="#1f2f63"/><stop offset="1" stop-color="#f2a65e"/></linearGradient>
      <linearGradient id="sea" x2="0" y2="1">
        <stop stop-color="#5b9db5"/><stop offset="1" stop-color="#10384f"/></linearGradient>
      <clipPath id="hill"><path d="M0 95 C 20 60 45 50 60 70 S 90 88 110 95 Z"/></clipPath>
    </defs>
    <rect width="200" height="96" fill="url(#sky)"/>{stars}{rays}
    <circle cx="150" cy="38" r="15" fill="#ffdf80"/>
    <path d="M0 95 C 20 60 45 50 60 70 S 90 88 110 95 Z" fill="#3f6a5a"/>
    <g clip-path="url(#hill)">{hatching}</g>
    <rect y="95" width="200" height="55" fill="url(#sea)"/>{waves}
    <path d="M112 118 h46 l-9 13 h-29 z" fill="#7a2f24" stroke="#2b120e" stroke-width="0.8"/>
    <line x1="134" y1="118" x2="134" y2="60" stroke="#2b120e" stroke-width="1.4"/>
    <path d="M136 64 Q 160 88 158 113 H 136 Z" fill="#f6efe2" stroke="#8a8173" stroke-width="0.6"/>
    <path d="M132 70 Q 116 92 113 113 H 132 Z" fill="#e8c9b4" stroke="#8a8173" stroke-width="0.6"/>
    <path d="M134 60 l10 3 l-10 4 z" fill="#d43c3c"/>
    <circle cx="123" cy="124" r="1.6" fill="#f4d9a0"/><circle cx="134" cy="124" r="1.6" fill="#f4d9a0"/>
    <circle cx="145" cy="124" r="1.6" fill="#f4d9a0"/>
    </svg>"""


def rasterise(svg: str, width: int) -> np.ndarray:
    """HWC uint8 at `width` pixels, from four times as many for a clean reduction."""
    image = pyvips.Image.svgload_buffer(svg.encode(), scale=4 * width / WIDTH).flatten(background=255)
    return image.colourspace("srgb").resize(0.25, kernel="cubic").numpy()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b.astype(float)) ** 2)))


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "out")
    folder.mkdir(parents=True, exist_ok=True)
    svg = drawing()
    pyvips.Image.new_from_array(rasterise(svg, WIDTH)).write_to_file(str(folder / "input.png"))
    report = anysize.upscale_file(folder / "input.png", folder / "output.png")
    small, large = (pyvips.Image.new_from_file(str(folder / n)) for n in ("input.png", "output.png"))
    # libvips' own enlarging is half a pixel off
    enlarged = resize(to_float(small.numpy()), HEIGHT * SCALE, WIDTH * SCALE)
    bicubic = pyvips.Image.new_from_array(quantise(enlarged, np.dtype(np.uint8)))
    bicubic.join(large, "horizontal", shim=8, background=255).write_to_file(str(folder / "sheet.png"))
    truth = rasterise(svg, WIDTH * SCALE)
    print(
        f"{WIDTH} x {HEIGHT} -> {report.width} x {report.height} on {report.backend} {report.precision}, "
        f"{report.seconds:.2f} s\nPSNR against the drawing at that size: "
        f"bicubic {psnr(bicubic.numpy(), truth):.2f} dB, anysize {psnr(large.numpy(), truth):.2f} dB\n"
        f"wrote {folder / 'output.png'} and {folder / 'sheet.png'} (left bicubic, right anysize)"
    )


if __name__ == "__main__":
    main()
