"""SDXL inpainting: diffusers' own pipeline, its UNet and autoencoder run by another engine, at any size.

    python examples/sdxl_inpaint.py [PIPELINE PICTURE MASK PROMPT]

PIPELINE: a folder in the published layout (unet/, vae/, text_encoder/, ...). Without, small models of the
same classes with random weights stand in, which shows that everything works, not what comes out. Writes
out/sdxl-inpaint.png. Needs the extras `diffusion` and `openvino`.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import torch
from anysize.inpaint import color_shift, composite, match_color
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLInpaintPipeline,
    UNet2DConditionModel,
)
from diffusers.utils import logging
from PIL import Image


def stand_ins() -> tuple[StableDiffusionXLInpaintPipeline, dict[str, Any]]:
    """A pipeline of small random models, and embeddings in place of its text encoders."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=9,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        latent_channels=4,
        norm_num_groups=8,
    )
    none = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = StableDiffusionXLInpaintPipeline(vae=vae, unet=unet, scheduler=EulerDiscreteScheduler(), **none)
    texts = {
        f"{sign}{kind}": torch.randn(shape)
        for sign in ("", "negative_")
        for kind, shape in (("prompt_embeds", (1, 7, 32)), ("pooled_prompt_embeds", (1, 32)))
    }
    return pipe, texts


def main() -> None:
    out = Path("out")
    out.mkdir(exist_ok=True)
    logging.set_verbosity_error()
    if len(sys.argv) > 1:
        folder, picture, masked, prompt = sys.argv[1:]
        pipe = StableDiffusionXLInpaintPipeline.from_pretrained(folder, local_files_only=True)
        text: dict[str, Any] = {"prompt": prompt}
        image, mask = Image.open(picture).convert("RGB"), Image.open(masked).convert("L")
    else:
        pipe, text = stand_ins()
        y, x = np.mgrid[0:1:105j, 0:1:153j]
        image = Image.fromarray((np.stack((x, y, 1 - x), -1) * 255).astype(np.uint8))
        mask = Image.fromarray((((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.05) * 255).astype(np.uint8))
    pipe.set_progress_bar_config(disable=len(sys.argv) == 1)

    # The sizes that the pipeline takes, and back: the picture and its mask by one plan.
    plan = anysize.SizePolicy.preset("sdxl").plan((image.height, image.width))
    print(plan)
    fitted, fitted_mask = plan.apply(np.asarray(image)), plan.apply_mask(np.asarray(mask))

    def inpaint() -> np.ndarray:
        return pipe(
            **text,
            image=Image.fromarray(fitted),
            mask_image=Image.fromarray(fitted_mask),
            height=plan.target[0],
            width=plan.target[1],
            num_inference_steps=4 if len(sys.argv) == 1 else 30,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
        ).images[0]

    by_torch = inpaint()
    # The swap: nothing of the pipeline's code changes.
    unet = anysize.load(pipe.unet, backend="openvino")
    coders = {name: anysize.load(part, backend="openvino") for name, part in anysize.parts(pipe.vae).items()}
    pipe.unet = anysize.as_module(unet, like=pipe.unet)
    pipe.vae = anysize.as_module(coders, like=pipe.vae)
    generated = inpaint()
    print(f"{unet.backend} against torch: {np.abs(generated - by_torch).max() * 255:.3f} of 255")
    print(f"UNet: {unet.stats.calls} calls, {unet.stats.compiles} compiles, sizes:", *unet.spec.dims.values())

    generated = np.rint(generated * 255).astype(np.uint8)
    matched = match_color(fitted, generated, fitted_mask)
    for name, made in (("as generated", generated), ("colours matched", matched)):
        print(f"kept pixels, {name}: dE2000 {color_shift(fitted, made, fitted_mask).delta_e:.2f}")
    result = composite(np.asarray(image), plan.invert(matched), np.asarray(mask))
    Image.fromarray(result).save(out / "sdxl-inpaint.png")
    print(out / "sdxl-inpaint.png")


if __name__ == "__main__":
    main()
