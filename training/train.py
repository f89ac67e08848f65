"""Train a bundled model on procedural pictures: `python -m training.train default`.

Data are drawn meanwhile (training/pictures.py) and reduced, most with antialiased bicubic. Kernels are taught
by Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon), which needs half the steps that Adam
does here, the rest by Adam. A run that was stopped goes on where it last kept its state, and gives what it
would have given in one go.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import torch
from anysize.backends import describe_backends
from anysize.bench import machine
from anysize.models import load_weights
from anysize.models.architectures import LumaCompact
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel

from training.pictures import picture

#: where runs keep what they have, a folder each
STATE = Path(".cache/training")
#: steps between two states that are kept
KEPT = 250
#: seeds that a recipe's own seed has for its pictures
_SEEDS = 10**8


@dataclass(frozen=True)
class Recipe:
    """What a model is determined by, beside this code, `pictures.py` and the versions of what computes.

    `patch`: side of the reduced patches, in pixels; `batch` of them a step. `pictures` of `size` pixels are
    at hand at any step, and after `every` steps the oldest gives way to a new one. `rate`: the highest of the
    learning rates. `averaged`: how many of a step's patches are averaged down; bicubic's edges overshoot, and
    a hard one, as in screenshots, would be taken for one with a dark line beside it. `flats`: weight in the
    last quarter's loss of pictures of one colour.
    """

    scale: int
    features: int = 32
    convolutions: int = 12
    steps: int = 8_000
    batch: int = 16
    patch: int = 40
    rate: float = 3e-3
    pictures: int = 384
    size: int = 256
    every: int = 2
    averaged: int = 2
    flats: float = 30.0
    seed: int = 0


RECIPES = {"default": Recipe(scale=4), "default-x2": Recipe(scale=2)}


# -- data --------------------------------------------------------------------------------------------------


def pictures(recipe: Recipe, start: int) -> Iterator[list[Tensor]]:
    """The pictures at hand at step `start` and the following, each (3, size, size) uint8.

    Step s has those of the seeds s // every to s // every + pictures, so that a step's do not depend on
    where the run began.
    """
    if start == recipe.steps:
        return
    seeds = iter(range(start // recipe.every, 10**9))
    first = recipe.seed * _SEEDS
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), initializer=_end_with_parent) as pool:
        ordered: deque[Future[Any]] = deque()

        def drawn() -> Tensor:
            while len(ordered) < 16:
                ordered.append(pool.submit(picture, first + next(seeds), recipe.size))
            return torch.from_numpy(ordered.popleft().result()).permute(2, 0, 1)

        try:
            at_hand = deque((drawn() for _ in range(recipe.pictures)), recipe.pictures)
            for step in range(start, recipe.steps):
                if step % recipe.every == 0 and step > start:
                    at_hand.append(drawn())
                yield list(at_hand)
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Else those that draw would wait for ever for one that was killed."""
    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def patches(recipe: Recipe, at_hand: list[Tensor], step: int) -> tuple[Tensor, Tensor]:
    """A step's reduced patches and what they were, NCHW float32 in 0..1; turned, mirrored, recoloured."""
    rng = np.random.default_rng([recipe.seed, step])
    side = recipe.patch * recipe.scale
    cut = []
    for _ in range(recipe.batch):
        whole = at_hand[int(rng.integers(len(at_hand)))]
        y, x = rng.integers(0, recipe.size - side + 1, 2)
        patch = whole[torch.from_numpy(rng.permutation(3)), y : y + side, x : x + side].float() / 255
        patch = torch.rot90(patch, int(rng.integers(4)), (1, 2))
        cut.append(patch.flip(2) if rng.random() < 0.5 else patch)
    target = torch.stack(cut).contiguous()
    low = F.interpolate(target, scale_factor=1 / recipe.scale, mode="bicubic", antialias=True)
    low[: recipe.averaged] = F.avg_pool2d(target[: recipe.averaged], recipe.scale)
    return (low.clamp(0, 1) * 255).round() / 255, target


def flats(recipe: Recipe, step: int) -> Tensor:
    """A step's twelve pictures of one colour each, NCHW float32 in 0..1, of 1 to 31 pixels a side: three of
    channels that are 0 or 1, five grey, four of any colour. They must stay flat up to the borders."""
    rng = np.random.default_rng([recipe.seed, step, 1])
    height, width = (int(32 ** rng.random()) for _ in range(2))
    colours = torch.from_numpy(rng.integers(0, 256, (12, 3, 1, 1)).astype(np.float32) / 255)
    colours[:3] = colours[:3].round()
    colours[3:8] = colours[3:8, :1]
    return colours.expand(-1, -1, height, width)


# -- the model ---------------------------------------------------------------------------------------------


def network(recipe: Recipe) -> LumaCompact:
    """The network untrained: nearly bilinear enlargement, to which it adds little."""
    net = LumaCompact(recipe.features, recipe.convolutions, recipe.scale)
    *inner, last = [module for module in net.modules() if isinstance(module, nn.Conv2d)]
    with torch.no_grad():
        for conv in (*inner, last):
            nn.init.zeros_(conv.bias)
            nn.init.kaiming_normal_(conv.weight, a=0.25)
            conv.weight *= 0.1 if conv is last else 0.5
        for conv in inner:  # what comes in goes on, the picture's three channels untouched
            conv.weight[:3] = 0
            for i in range(min(conv.weight.shape[:2])):
                conv.weight[i, i, 1, 1] += 1.0 if i < 3 else 0.5
    return net


# -- training ----------------------------------------------------------------------------------------------


def train(recipe: Recipe, folder: Path) -> Path:
    """Train, or go on from the state in `folder`, and return the file of the plain network's weights.

    The folder gets state.pt each `KEPT` steps, log.jsonl (a line each time: step, PSNR in dB of the luma of
    the steps' patches, seconds of work) and, at the end, weights.safetensors. Raises `ValueError` where its
    state is of another recipe, or of other pictures or versions than are here, or cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    net = network(recipe)
    kernels = [p for p in net.parameters() if p.ndim == 4]
    matrices = [nn.Parameter(kernel.detach().flatten(1)) for kernel in kernels]  # of the same memory
    muon = torch.optim.Muon(matrices, weight_decay=0, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.Adam([p for p in net.parameters() if p.ndim == 1], betas=(0.9, 0.99))
    average = AveragedModel(net, avg_fn=_average)
    parts = {"net": net, "average": average, "muon": muon, "adam": adam}
    state: dict[str, Any] = {"of": determined_by(recipe), "step": 0, "log": []}
    if (folder / "state.pt").exists():
        try:
            state = torch.load(folder / "state.pt", weights_only=True)
            of = state["of"]
        except (OSError, EOFError, RuntimeError, LookupError, TypeError, pickle.UnpicklingError) as error:
            raise ValueError(f"{folder}: its state cannot be read; remove it to begin again") from error
        if of != determined_by(recipe):
            raise ValueError(f"{folder}: its state is of another recipe; remove it to begin again")
        for name, part in parts.items():
            part.load_state_dict(state[name])
    done = state["step"]
    if done:
        print(folder.name, f"goes on from step {done}", flush=True)
    seconds = state["log"][-1]["seconds"] if done else 0

    half, began, squares = has_bf16(), time.monotonic() - seconds, list[float]()
    for at_hand in pictures(recipe, done):
        low, target = patches(recipe, at_hand, done)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            detail = net.detail(low)
        # of light, all that the network can mend; in bf16 the base would be brighter than the picture
        # (each k / 255 from 32 on is rounded up), and the network would learn to darken it
        light = detail.float() + luma(net.base(low) - target)
        loss = light.abs().mean()
        if done >= recipe.steps * 3 / 4:  # before, it would cost sharpness
            small = flats(recipe, done)
            loss = loss + recipe.flats * (net(small) - small[..., :1, :1]).square().mean()
        net.zero_grad()
        loss.backward()
        for matrix, kernel in zip(matrices, kernels, strict=True):
            assert kernel.grad is not None
            matrix.grad = kernel.grad.flatten(1)
        for optimiser in (muon, adam):
            for group in optimiser.param_groups:
                group["lr"] = rate(recipe, done)
            optimiser.step()
        average.update_parameters(net)
        squares.append(light.detach().square().mean().item())
        done += 1
        if done % KEPT == 0 or done == recipe.steps:
            psnr = -10 * math.log10(sum(squares) / len(squares))
            seconds = time.monotonic() - began
            state["log"].append({"step": done, "psnr": round(psnr, 3), "seconds": round(seconds)})
            print(folder.name, json.dumps(state["log"][-1]), flush=True)
            squares.clear()
            state |= {name: part.state_dict() for name, part in parts.items()}
            state |= {"step": done, "made on": made_on()}
            torch.save(state, folder / "state.part")
            os.replace(folder / "state.part", folder / "state.pt")
            lines = (json.dumps(line) + "\n" for line in state["log"])
            (folder / "log.jsonl").write_text("".join(lines))
    weights = folder / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in average.module.state_dict().items()}, weights)
    return weights


def luma(colours: Tensor) -> Tensor:
    """(N, 1, H, W) of (N, 3, H, W): BT.601's."""
    return (colours * colours.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _average(old: Tensor, new: Tensor, count: Tensor | int) -> Tensor:
    """A moving average of the last 500 steps, of fewer at the beginning: smoother weights for free."""
    return old.lerp(new, max(0.002, 10 / (int(count) + 10)))


def rate(recipe: Recipe, step: int) -> float:
    """The learning rate: a short rise, then half a cosine down to nothing."""
    return recipe.rate * min(1.0, (step + 1) / 200) * (0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))


def determined_by(recipe: Recipe) -> dict[str, Any]:
    """The recipe and what draws and computes with it: a state is gone on with where they are the same."""
    drawn_by = Path(__file__).with_name("pictures.py").read_bytes()
    versions = {name: version(name) for name in ("numpy", "pillow", "matplotlib", "torch")}
    return {**asdict(recipe), **versions, "sha256 of pictures.py": hashlib.sha256(drawn_by).hexdigest()}


def made_on() -> dict[str, Any]:
    """What else last digits and time depend on; of a run in parts, where the last was made."""
    facts = machine()
    precision = "bf16" if has_bf16() else "f32"
    return {
        "precision": precision,
        **{key: facts[key] for key in ("processor", "cores", "python")},
        "threads": torch.get_num_threads(),
    }


def has_bf16() -> bool:
    """Whether this processor computes in bf16, which training then does."""
    return any("bf16" in backend.precisions for backend in describe_backends() if backend.name == "torch")


def card(name: str, recipe: Recipe, folder: Path) -> str:
    """What the model is, of what, and how it came about, as Markdown."""
    state = torch.load(folder / "state.pt", weights_only=True)
    last = state["log"][-1]
    made = {
        "command": f"`python -m training.train {name}`",
        **state["made on"],
        "minutes": round(last["seconds"] / 60),
        **state["of"],
        "PSNR of luma of the last steps' patches, dB": last["psnr"],
        "sha256 of the weights": load_weights(folder / "weights.safetensors").sha256,
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in made.items())
    return f"""# {name}

Enlarges pictures by {recipe.scale}. LumaCompact of {recipe.features} features and {recipe.convolutions} inner
convolutions; NCHW RGB in 0..1. Licence: Apache-2.0, that of the project.

It adds detail to light alone: grey stays grey, and hues are those of bilinear enlargement, except where a
channel would be below 0 or above 1.

* **For** pictures that were reduced cleanly: photographs, drawings, text.
* **Not for** JPEG's artefacts, noise or blur: it was taught antialiased reduction alone, bicubic and, an
  eighth of it, averaging, and sharpens what else is in a picture, noise too. Edges between strong colours
  gain less than those of light, and are often worse than bicubic's, as where a channel is cut at 0 or 1.
* **Guesses**: a grey line of up to three pixels may be a thinner one of more contrast, or an outline; a hard
  edge next to white or light grey, as in screenshots, may have had a thin outline; texture finer than the
  pixels may be any.
* **Data**: no one's; drawn by `training/pictures.py` from seeds: dead leaves, line art, textures, and text in
  DejaVu, STIX and Aileron, which are free fonts.
* **Figures**: docs/bundled-models.md.

| made by | |
|---|---|
{rows}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    name = parser.parse_args().name
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else those that draw would be left behind
    torch.set_num_threads(1)  # the result is that of any number of cores; several models make use of them
    recipe, folder = RECIPES[name], STATE / name
    try:
        train(recipe, folder)
    except KeyboardInterrupt:
        sys.exit(f"{name}: stopped; begun again, it goes on from its last state, kept each {KEPT} steps")
    except ValueError as error:
        sys.exit(str(error))
    (folder / "card.md").write_text(card(name, recipe, folder))


if __name__ == "__main__":
    main()
