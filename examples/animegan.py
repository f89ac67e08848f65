"""AnimeGANv2: pictures of mixed sizes restyled at their own sizes, in batches, and kept.

    python examples/animegan.py [WEIGHTS [PICTURE...]]

WEIGHTS: a published .pt file of the generator. Without, it is run with random weights of its real size, which
shows that everything works, not what the style is like. Writes out/animegan-*.png, and keeps its results in
out/results, from where a second run takes them. Needs the extra `export`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import anysize
import numpy as np
import pyvips
import torch
from anysize.models.animegan import AnimeGANv2


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours with a few discs."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    image = np.stack((x, y, 1 - x), -1)
    for cy, cx, r in ((0.3, 0.3, 0.2), (0.5, 0.6, 0.1), (0.2, 0.7, 0.05)):
        image[(y - cy) ** 2 + (x - cx) ** 2 < r**2] = (cy, r, cx)
    return (image * 255).astype(np.uint8)


def main() -> None:
    out = Path("out")
    out.mkdir(exist_ok=True)
    weights = Path(sys.argv[1]) if len(sys.argv) > 1 else out / "animegan.safetensors"
    if len(sys.argv) == 1:
        from safetensors.torch import save_file

        torch.manual_seed(0)
        save_file(AnimeGANv2().state_dict(), weights)
    files = [pyvips.Image.new_from_file(name).colourspace("srgb")[0:3].numpy() for name in sys.argv[2:]]
    pictures = files or [picture(*size) for size in ((300, 401), (256, 256), (256, 256), (511, 333))]

    stylize = anysize.Stylizer(weights, "animegan", cache=anysize.ResultCache(out / "results"))
    print(
        f"{stylize.session.backend}, sizes the model takes:",
        *stylize.session.spec.dims.values(),
        sep="\n    ",
    )
    for said in ("run", "again, from the cache"):
        started = time.perf_counter()
        results = stylize.batch(pictures)
        seconds, calls = time.perf_counter() - started, stylize.session.stats.calls
        print(f"{said}: {seconds:.2f} s, {calls} calls of the engine")
    for i, result in enumerate(results):
        path = out / f"animegan-{i}.png"
        pyvips.Image.new_from_array(result).write_to_file(str(path))
        plan = stylize.policy.plan(result.shape[:2])
        print(f"{path}: {plan}")


if __name__ == "__main__":
    main()
