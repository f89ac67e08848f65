"""Parts of diffusion models: engines against eager PyTorch, a pipeline with sessions, positions, colours.

`make bench-diffusion` has random weights in the published classes of diffusers: SDXL's with its three levels
and Sana's, narrower than published. Writes docs/diffusion-measured.md; exit code 1 if a figure is outside its
bound. Takes minutes.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import anysize
import diffusers
import numpy as np
import torch
from acceptance import ASSETS, OUT, Table
from anysize.bench import machine
from anysize.exporters import export
from anysize.inpaint import color_shift, match_color
from anysize.memory import peak

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import diffusers_toys as small

GRAPHS = ("openvino", "onnxruntime")
#: batch, height and width of the latents; none was used in an export
LATENTS = ((1, 17, 23), (2, 16, 12), (1, 33, 40), (1, 1, 5))
PICTURES = ((1, 136, 184), (2, 64, 48), (1, 75, 101), (1, 8, 9))
DEEP_PICTURES = ((1, 68, 92), (2, 64, 48), (1, 4, 40), (1, 24, 8))
#: base, larger, not square, a row, a column, and base again
POSITIONS = ((1, 32, 32), (1, 64, 64), (2, 20, 44), (1, 1, 40), (1, 40, 1), (1, 32, 32))
PIPELINE = ((128, 96), (136, 104), (152, 72))  # width, height


def unet(channels: int) -> Any:
    """Three levels, as SDXL has; an eighth of its width."""
    return small.unet(
        channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(40, 80, 160),
        transformer_layers_per_block=(1, 1, 1),
        attention_head_dim=(2, 4, 8),
        cross_attention_dim=64,
    )


def agree(
    table: Table,
    name: str,
    model: Any,
    part: Any,
    sizes: tuple[tuple[int, int, int], ...],
    bound: float = 1e-4,
) -> dict[str, anysize.Session]:
    """Each engine on the exported part, against the model's own public methods in eager PyTorch."""
    started = time.time()
    file = export(part, OUT / f"{name.replace(' ', '-')}.onnx")
    print(f"{name}: exported in {time.time() - started:.0f} s", flush=True)
    sessions = {engine: anysize.load(file, backend=engine) for engine in GRAPHS}
    for engine, session in sessions.items():
        for seed, size in enumerate(sizes):
            feeds = small.feeds_of(session, *size, seed)
            (got,) = session.run(feeds, finite=True).values()
            what = f"{name}, {'x'.join(map(str, size))}, {engine} against eager: largest difference"
            table.add(what, float(np.abs(got - small.eager(model, feeds)).max()), bound)
    return sessions


def deep(table: Table) -> str:
    """SDXL's UNet, block by block, at half its width: what its export takes."""
    model = small.unet(
        9,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(160, 320, 640),
        layers_per_block=2,
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        norm_num_groups=32,
        cross_attention_dim=1024,
    )
    weights, started = sum(p.nbytes for p in model.parameters()), time.time()
    file = export(anysize.parts(model)["unet"], OUT / "unet-deep.onnx")
    seconds, most = time.time() - started, peak() / weights
    for engine in GRAPHS:
        with anysize.load(file, backend=engine) as session:
            for seed, size in enumerate(((1, 17, 23), (2, 16, 12))):
                feeds = small.feeds_of(session, *size, seed)
                (got,) = session.run(feeds, finite=True).values()
                what = f"UNet as deep as SDXL's, {'x'.join(map(str, size))}, {engine} against eager: "
                error = float(np.abs(got - small.eager(model, feeds)).max())
                table.add(what + "largest difference", error, 1e-4)
    for made in OUT.glob("unet-deep.onnx*"):
        made.unlink()
    return (
        f"SDXL's UNet, block by block, at half its width ({weights / 1e9:.1f} GB in 32 bits): exported "
        f"and verified on {' and '.join(GRAPHS)} in {seconds:.0f} s; memory: {most:.1f} times that."
    )


def sdxl(table: Table) -> None:
    vae = small.vae()
    found = anysize.parts(vae)
    coders = {
        name: agree(table, f"AutoencoderKL {name}", vae, found[name], sizes)
        for name, sizes in (("encoder", PICTURES), ("decoder", LATENTS))
    }
    for channels in (4, 9):
        model = unet(channels)
        sessions = agree(table, f"UNet of {channels} channels", model, anysize.parts(model)["unet"], LATENTS)
        pipe, run = small.inpainting(model, vae)
        want = {size: run(*size) for size in PIPELINE}
        for engine, session in sessions.items():
            pipe.unet = anysize.as_module(session, like=model)
            pipe.vae = anysize.as_module({name: coders[name][engine] for name in coders}, like=vae)
            for width, height in PIPELINE:
                what = f"inpainting pipeline, {channels} channels, {width} x {height}, {engine}: of 255"
                error = np.abs(run(width, height) - want[width, height]).max() * 255
                table.add(what, float(error), 2.0)


def sana(table: Table) -> None:
    model = small.sana()
    agree(table, "Sana transformer", model, anysize.parts(model)["transformer"], POSITIONS, 1e-5)
    part = anysize.parts(model, positions="fixed")["transformer"]
    sessions = agree(table, "Sana transformer, fixed", model, part, ((1, 32, 32), (2, 32, 32)), 1e-5)
    for engine, session in sessions.items():
        feeds, taken = small.feeds_of(session, 1, 32, 32), 0
        calls = session.stats.calls
        for size in ((16, 64), (64, 16), (64, 64), (32, 33), (1, 1024)):
            try:
                session.run(feeds | {"hidden_states": np.zeros((1, 4, *size), np.float32)})
                taken += 1
            except anysize.ShapeError as error:
                taken += error.nearest != (32,)
        table.add(f"fixed positions, {engine}: of 5 others taken, or refused without the size", taken, 0)
        table.add(f"fixed positions, {engine}: calls of the engine for them", session.stats.calls - calls, 0)
    silent = small.sana()
    for block in silent.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.to_q.weight)
    part = anysize.parts(silent)["transformer"]
    agree(table, "Sana transformer, attention to nothing", silent, part, ((1, 8, 8), (1, 5, 9)), 1e-5)
    deep = small.deep_vae()
    for name, sizes in (("encoder", DEEP_PICTURES), ("decoder", LATENTS)):
        agree(table, f"AutoencoderDC {name}", deep, anysize.parts(deep)[name], sizes)
    policy, wrong, tried = anysize.SizePolicy.preset("sana"), 0, 0
    for height in range(200, 3000, 177):
        for width in range(200, 3000, 191):
            plan = policy.plan((height, width))
            wrong += plan.invert(np.zeros((*plan.target, 1), np.uint8)).shape[:2] != (height, width)
            tried += 1
    table.add(f"aspect bins: sizes of {tried} not restored exactly", wrong, 0)


def colours(table: Table) -> None:
    from anysize.files import read_picture
    from skimage.color import hsv2rgb, rgb2hsv

    for name in ("OST_009.png", "comic_gt.png", "set5/HR/woman.png", "set5/HR/bird.png"):
        original = read_picture(ASSETS / "images" / name).array[..., :3]
        hsv = rgb2hsv(original)
        hsv[..., 1] *= 0.8
        shifted = np.rint(np.clip(hsv2rgb(hsv) + 0.03, 0, 1) * 255).astype(np.uint8)
        height, width = original.shape[:2]
        mask = np.zeros((height, width), bool)
        mask[height // 4 : height // 2, width // 3 : 2 * width // 3] = True
        before = color_shift(original, shifted, mask).delta_e
        after = color_shift(original, match_color(original, shifted, mask), mask).delta_e
        table.add(
            f"{Path(name).stem}: dE2000 after match_color / before ({before:.2f})", after / before, 1 / 3
        )


def main() -> None:
    if not ASSETS.is_dir():
        sys.exit(f"{ASSETS} is missing: it holds the pictures this measures")
    OUT.mkdir(exist_ok=True)
    diffusers.utils.logging.set_verbosity_error()  # the pipeline says each time that it casts its autoencoder
    started, table = time.time(), Table()
    depth = deep(table)
    print(depth)
    sdxl(table)
    sana(table)
    colours(table)
    about = "; ".join(f"{key}: {value}" for key, value in machine().items())
    lines = ["# Diffusion parts, measured", ""]
    lines += ["By `make bench-diffusion`, with random weights in the published classes, on"]
    lines += [f"{about}; diffusers: {diffusers.__version__}", "", depth, "", *table.markdown()]
    Path("docs/diffusion-measured.md").write_text("\n".join(lines) + "\n")
    bad = [row for row in table.rows if not row["ok"]]
    print(f"{len(table.rows) - len(bad)} of {len(table.rows)} within bounds, {time.time() - started:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
