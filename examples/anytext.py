"""AnyText's size rule: a picture, its mask, glyphs, position map and latents through one plan, and back.

    python examples/anytext.py [PICTURE]

AnyText (Tuo et al., 2023, arXiv:2311.03054) edits text in pictures with a latent diffusion model whose sizes
must be multiples of 64. Its weights are large, so a small network with the same rule stands in for it.
Writes out/anytext.png. Needs the extra `torch`.
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path

import anysize
import numpy as np
import pyvips
import torch
from torch import nn


class Editor(nn.Module):
    """Six halvings down and up again, as the model's autoencoder and U-Net together: multiples of 64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down = nn.ModuleList(nn.Conv2d(3, 3, 3, 2, 1) for _ in range(6))
        self.up = nn.ModuleList(nn.ConvTranspose2d(3, 3, 4, 2, 1) for _ in range(6))

    def forward(self, picture: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        y, kept = picture, []
        for layer in self.down:
            kept.append(y)
            y = torch.tanh(layer(y))
        for layer in self.up:
            y = kept.pop() + 0.1 * torch.tanh(layer(y))
        return picture * (1 - mask) + y.clamp(0, 1) * mask


def planes(image: np.ndarray) -> np.ndarray:
    """HW or HWC uint8 -> NCHW float32 in 0..1."""
    return np.atleast_3d(image).transpose(2, 0, 1)[None].astype(np.float32) / 255


def main() -> None:
    if len(sys.argv) > 1:
        picture = pyvips.Image.new_from_file(sys.argv[1]).colourspace("srgb")[0:3].numpy()
    else:
        picture = np.random.default_rng(0).integers(0, 256, (754, 551, 3), np.uint8)
    height, width = picture.shape[:2]
    mask = np.zeros((height, width), np.uint8)
    mask[height // 3 : height // 2, width // 4 : 3 * width // 4] = 255

    plan = anysize.SizePolicy.preset("anytext").plan((height, width))
    print(plan)
    tied = {
        "picture": plan.apply(picture),
        "mask": plan.apply_mask(mask),
        "glyphs, drawn at twice the size": plan.apply(mask.repeat(2, 0).repeat(2, 1), 2),
        "position map": plan.apply_mask(mask),
        "mask of the latents": plan.apply_mask(mask[::8, ::8], Fraction(1, 8)),
    }
    for name, array in tied.items():
        print(f"{name}: {array.shape[1]} x {array.shape[0]}")

    out = Path("out")
    out.mkdir(exist_ok=True)
    example = {"picture": torch.rand(1, 3, 128, 192), "mask": torch.rand(1, 1, 128, 192)}
    model = anysize.exporters.export(Editor(), out / "anytext.onnx", inputs=example)
    with anysize.load(model) as session:
        print("sizes the model takes, found by running it:", *session.spec.dims.values(), sep="\n    ")
        try:
            session.run({"picture": planes(picture), "mask": planes(mask)})
        except anysize.ShapeError as error:
            print(f"without a plan: {error}")
        result = session.run({"picture": planes(tied["picture"]), "mask": planes(tied["mask"])})["output"]
    edited = (result[0].transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
    restored = plan.invert(edited)
    pyvips.Image.new_from_array(restored).write_to_file(str(out / "anytext.png"))
    print(f"restored to {restored.shape[1]} x {restored.shape[0]}: {out / 'anytext.png'}")


if __name__ == "__main__":
    main()
