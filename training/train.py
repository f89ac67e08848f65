"""Train the bundled x4 model on procedural pictures: `python -m training.train`.

Writes `models/default.safetensors`; `python -m training.publish` turns that into `models/default.onnx`.
The reduction is antialiased bicubic, the loss L1, everything seeded. About ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from training.deadleaves import picture

SCALE = 4


def pictures(count: int, size: int, cache: Path) -> Tensor:
    """`count` pictures as one uint8 NCHW tensor, drawn once and kept in `cache`."""
    file = cache / f"deadleaves-{count}-{size}.npy"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(picture, range(count), [size] * count, chunksize=8))
        np.save(file, (np.stack(drawn) * 255 + 0.5).astype(np.uint8))
    return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2).contiguous()


def batch(high: Tensor, size: int, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Random (low, high) patches, flipped and rotated; low is `size` px, float NCHW in 0..1."""
    side = size * SCALE
    patches = []
    for _ in range(count):
        i = int(rng.integers(high.shape[0]))
        y, x = rng.integers(0, high.shape[2] - side + 1, 2)
        patch = high[i, :, y : y + side, x : x + side]
        patch = torch.rot90(patch, int(rng.integers(4)), (1, 2))
        patches.append(patch.flip(2) if rng.random() < 0.5 else patch)
    target = torch.stack(patches).float() / 255
    low = F.interpolate(target, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    low = (low.clamp(0, 1) * 255).round() / 255
    return low, target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--pictures", type=int, default=700)
    parser.add_argument("--features", type=int, default=32)
    parser.add_argument("--convolutions", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("models/default.safetensors"))
    parser.add_argument("--cache", type=Path, default=Path(".cache/training"))
    args = parser.parse_args()

    from anysize.models.architectures import SRVGGNetCompact

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    high = pictures(args.pictures, 256, args.cache)
    model = SRVGGNetCompact(3, args.features, args.convolutions, SCALE)
    # Keep the variance through the chain (PReLU starts at slope 0.25); torch's default shrinks it by
    # 3 per layer. The last layer starts small: training begins near the nearest-neighbour picture.
    for layer in model.body:
        if isinstance(layer, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(layer.weight, a=0.25)
            torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    last = model.body[-1]
    torch.nn.init.normal_(last.weight, std=1e-2)  # type: ignore[arg-type]
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = {k: v.clone() for k, v in model.state_dict().items()}
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.99))
    warmup = 200
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser,
        lambda s: min(1.0, (s + 1) / warmup) * max(0.005, 0.5 + 0.5 * math.cos(math.pi * s / args.steps)),
    )
    started = time.time()
    for step in range(1, args.steps + 1):
        low, target = batch(high, 40, 16, rng)
        with torch.autocast("cpu", torch.bfloat16):
            output = model(low.to(memory_format=torch.channels_last))
        loss = F.l1_loss(output.float(), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():  # exponential moving average: smoother weights for free
            for key, value in model.state_dict().items():
                average[key].lerp_(value, max(0.001, 10 / (step + 10)))
        if step % 250 == 0:
            base = F.l1_loss(F.interpolate(low, scale_factor=SCALE, mode="bicubic").clamp(0, 1), target)
            seconds = time.time() - started
            print(f"step {step} loss {loss:.4f} (bicubic {base:.4f}) {seconds:.0f} s", flush=True)
            save_file({k: v.contiguous() for k, v in average.items()}, args.out)
    save_file({k: v.contiguous() for k, v in average.items()}, args.out)


if __name__ == "__main__":
    main()
