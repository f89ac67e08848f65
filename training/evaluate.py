"""Set5 PSNR of a x4 model beside bicubic: `python -m training.evaluate SET5_FOLDER [MODEL]`.

PSNR is on luma (ITU-R BT.601, as the super-resolution literature computes it) with a border of 4 px cropped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import anysize
import numpy as np
from PIL import Image

SCALE = 4


def luma(rgb: np.ndarray) -> np.ndarray:
    """BT.601 luma in 16..235 from HWC uint8."""
    return rgb.astype(np.float64) @ (np.array([65.481, 128.553, 24.966]) / 255) + 16


def psnr(a: np.ndarray, b: np.ndarray, border: int = SCALE) -> float:
    """PSNR in dB of two HWC uint8 pictures, on luma, `border` pixels cropped on each side."""
    difference = (luma(a) - luma(b))[border:-border, border:-border]
    return float(10 * np.log10(255**2 / np.mean(difference**2)))


def set5(folder: Path, model: str, backend: str) -> dict[str, dict[str, float]]:
    upscale = anysize.Upscaler(model, backend=backend)
    rows = {}
    for high_file in sorted((folder / "HR").glob("*.png")):
        high = Image.open(high_file).convert("RGB")
        high = high.crop((0, 0, high.width // SCALE * SCALE, high.height // SCALE * SCALE))
        low = Image.open(folder / "LRx4" / f"{high_file.stem}x4.png").convert("RGB")
        truth = np.asarray(high)
        bicubic = np.asarray(low.resize(high.size, Image.Resampling.BICUBIC))
        rows[high_file.stem] = {
            "bicubic": psnr(bicubic, truth),
            "model": psnr(np.asarray(upscale(low)), truth),
        }
    rows["mean"] = {k: float(np.mean([r[k] for r in rows.values()])) for k in ("bicubic", "model")}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("model", nargs="?", default="default")
    parser.add_argument("--backend", default="openvino")
    args = parser.parse_args()
    print(json.dumps(set5(args.folder, args.model, args.backend), indent=1))


if __name__ == "__main__":
    main()
