"""Small models of diffusers with random weights, of the published classes, and how to run them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from anysize import Session


def unet(channels: int, **changes: Any) -> Any:
    """SDXL's, with its text and time embeddings; the latent is halved once. `changes`: of its config."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    config: dict[str, Any] = dict(  # noqa: C408 - as its class takes them
        sample_size=16,
        in_channels=channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(2, 4),
        norm_num_groups=8,
        cross_attention_dim=32,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
    )
    return UNet2DConditionModel(**(config | changes)).eval()


def vae() -> Any:
    """SDXL's: three halvings, attention in the middle."""
    from diffusers import AutoencoderKL

    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 16, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.13025,
    ).eval()


def sana(positions: bool = True, sample_size: int = 32, out_channels: int = 4, layers: int = 2) -> Any:
    """Sana's transformer, with linear attention."""
    from diffusers import SanaTransformer2DModel

    torch.manual_seed(2)
    return SanaTransformer2DModel(
        in_channels=4,
        out_channels=out_channels,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=layers,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=8,
        sample_size=sample_size,
        interpolation_scale=1 if positions else None,
        qk_norm="rms_norm_across_heads",
    ).eval()


def deep_vae() -> Any:
    """Sana's autoencoder: residual blocks, then attention at the coarser levels."""
    from diffusers import AutoencoderDC

    torch.manual_seed(3)
    return AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 16, 16),
        decoder_block_out_channels=(8, 16, 16),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        encoder_qkv_multiscales=((), (), (5,)),
        decoder_qkv_multiscales=((), (), (5,)),
        upsample_block_type="interpolate",
        downsample_block_type="stride_conv",
    ).eval()


def feeds_of(session: Session, n: int, h: int, w: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Latents and embeddings of the normal distribution; whole numbers where the contract has a range."""
    rng = np.random.default_rng(seed)
    feeds = {}
    for tensor in session.spec.inputs:
        shape = tensor.sized({"n": n, "h": h, "w": w, "tokens": 5})
        if tensor.values is None:
            feeds[tensor.name] = rng.standard_normal(shape).astype(tensor.dtype)
        else:
            feeds[tensor.name] = rng.integers(0, int(tensor.values[1]) + 1, shape).astype(tensor.dtype)
    return feeds


def eager(model: Any, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """By the class's own public methods."""
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with torch.inference_mode():
        if "x" in tensors:
            encoded = model.encode(tensors["x"])
            latent = encoded.latent_dist.parameters if hasattr(encoded, "latent_dist") else encoded.latent
            return latent.numpy()
        if "z" in tensors:
            return model.decode(tensors["z"]).sample.numpy()
        added = {n.partition(".")[2]: tensors.pop(n) for n in list(tensors) if "." in n}
        return model(**tensors, **({"added_cond_kwargs": added} if added else {})).sample.numpy()


def inpainting(unet: Any, vae: Any) -> tuple[Any, Callable[[int, int], np.ndarray]]:
    """A pipeline with embeddings for its text, and what makes its picture of (width, height)."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline

    pipe = StableDiffusionXLInpaintPipeline(
        vae=vae,
        unet=unet,
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", steps_offset=1),
        **dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")),
    )
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    width = unet.config.cross_attention_dim
    texts = {
        f"{sign}{kind}": torch.randn(shape, generator=generator)
        for sign in ("", "negative_")
        for kind, shape in (("prompt_embeds", (1, 7, width)), ("pooled_prompt_embeds", (1, 32)))
    }

    def run(width: int, height: int) -> np.ndarray:
        mask = torch.zeros(1, 1, height, width)
        mask[..., height // 4 : height // 2, width // 3 : width // 2] = 1
        return pipe(
            image=torch.rand((1, 3, height, width), generator=torch.Generator().manual_seed(height)),
            mask_image=mask,
            height=height,
            width=width,
            num_inference_steps=4,
            strength=0.9,
            generator=torch.Generator().manual_seed(1),
            output_type="np",
            **texts,
        ).images

    return pipe, run
