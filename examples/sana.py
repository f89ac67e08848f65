"""Sana: its transformer with positions computed from the size, or fixed; its autoencoder; sizes and back.

    python examples/sana.py [PIPELINE]

PIPELINE: a folder in the published layout, of which transformer/ and vae/ are used. Without, small models of
the same classes with random weights stand in. The text is random numbers either way. Writes out/sana.png.
Needs the extras `diffusion` and `openvino`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import anysize
import numpy as np
from anysize.exporters import export
from diffusers import AutoencoderDC, SanaTransformer2DModel
from PIL import Image


def stand_ins(out: Path) -> Path:
    """Small random models, in folders as diffusers publishes them."""
    SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=8,
        sample_size=32,
        interpolation_scale=1,
    ).save_pretrained(out / "sana" / "transformer")
    AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        decoder_block_types=("ResBlock",) * 5 + ("EfficientViTBlock",),
        encoder_block_out_channels=(8,) * 5 + (16,),
        decoder_block_out_channels=(8,) * 5 + (16,),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        encoder_qkv_multiscales=((),) * 6,
        decoder_qkv_multiscales=((),) * 6,
        upsample_block_type="interpolate",
    ).save_pretrained(out / "sana" / "vae")
    return out / "sana"


def main() -> None:
    out = Path("out")
    out.mkdir(exist_ok=True)
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else stand_ins(out)

    # Positions computed in the graph: one file for every size. A table of one size: a contract of one size.
    files = {}
    for positions in ("computed", "fixed"):
        part = anysize.parts(folder / "transformer", positions=positions)["transformer"]
        files[positions] = export(part, out / f"sana-{positions}.onnx")
        print(f"positions {positions}:", anysize.load(files[positions]).spec.inputs[0])
    transformer = anysize.load(files["computed"], backend="openvino")
    decoder = anysize.load(anysize.parts(folder / "vae")["decoder"], backend="openvino")
    factor = decoder.spec.outputs[0].shape[2].mul

    def run(height: int, width: int, session: anysize.Session) -> np.ndarray:
        """One step from noise, as an example: latents (1, C, height, width)."""
        rng = np.random.default_rng(0)
        sizes = {"n": 1, "h": height, "w": width, "tokens": 12}
        inputs = transformer.spec.inputs
        feeds = {t.name: rng.standard_normal(t.sized(sizes)).astype(t.dtype) for t in inputs}
        feeds |= {
            "timestep": np.full(1, 999, np.float32),
            "encoder_attention_mask": np.ones((1, 12), np.int64),
        }
        return next(iter(session.run(feeds).values()))

    # A picture of any size is made at the bin of its aspect, and brought to exactly its size.
    for width, height in ((1023, 577), (400, 1001)):
        plan = anysize.SizePolicy.preset("sana").plan((height, width))
        rows, columns = (side // factor for side in plan.target)
        latents = run(rows, columns, transformer)
        picture = decoder(latents)[0].transpose(1, 2, 0)
        result = plan.invert(np.clip(picture / 2 + 0.5, 0, 1))
        print(f"{plan}: latents {columns} x {rows}, result {result.shape[1]} x {result.shape[0]}")
    Image.fromarray(np.rint(result * 255).astype(np.uint8)).save(out / "sana.png")
    print(f"{transformer.stats.calls} calls, {transformer.stats.compiles} compiles; {out / 'sana.png'}")

    fixed = anysize.load(files["fixed"], backend="openvino")
    side = fixed.spec.inputs[0].shape[2]
    try:
        run(side // 2, 2 * side, fixed)  # as many tokens, and other places
    except anysize.ShapeError as error:
        print(f"fixed positions: {error}")


if __name__ == "__main__":
    main()
