"""Parts of diffusers' models as modules that an exporter can run: named tensors in, one tensor out."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from typing import Any

import torch
from anysize.backends.errors import ModelLoadError, OptionError
from anysize.backends.spec import Dim, TensorSpec
from anysize.models.diffusion import Recipe
from torch import nn

log = logging.getLogger("anysize")

#: two tables of positions that differ by no more are the same: values of -1..1, written in bf16 perhaps
_SAME_TABLE = 2**-8
_LEAST_TABLE = 4
#: spacings of positions that published checkpoints were made with
_SCALES = (0.5, 1.0, 2.0, 4.0)


class Part(nn.Module):
    """A part of a model, as `recipe` says; its weights are the model's own.

    `inputs` are what `forward` takes, in order. `size`: the one size (height, width) of latents that it
    takes. `positions_error`: how far the table of positions is off, of values in -1..1, where it was made by
    interpolation; `note` says so in words.
    """

    #: attention, and norms of groups, look at all of the picture
    tileable = False

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        size: tuple[int, int] | None = None,
        error: float | None = None,
    ) -> None:
        """Raises `ExportError` where the model's config asks for inputs that the recipe does not know."""
        super().__init__()
        chain = [getattr(model, name) for name in recipe.chain]
        self.steps = nn.ModuleList([step for step in chain if step is not None] or [model])
        if any(hasattr(vars(step).get("forward"), "session") for step in self.steps):
            raise ModelLoadError(f"this {type(model).__name__} stands in for one that an engine runs")
        self.whole = not chain
        self.inputs = recipe.inputs(model.config)
        self.value_range = recipe.values
        self.positions_error = error
        self.note = ""
        if error is not None:
            self.note = f"positions interpolated, off by up to {error:.2g} (of values in -1..1)"
            log.warning("contract of %s: %s", type(model).__name__, self.note)
        if size is not None:
            sizes = dict(zip("hw", size, strict=True))
            self.inputs = tuple(_fixed(tensor, sizes) for tensor in self.inputs)

    def forward(self, *tensors: torch.Tensor) -> Any:
        if not self.whole:
            (x,) = tensors
            for step in self.steps:
                x = step(x)
            return x
        arguments: dict[str, Any] = {}
        for tensor, spec in zip(tensors, self.inputs, strict=True):
            name, _, key = spec.name.partition(".")
            if key:
                arguments.setdefault(name, {})[key] = tensor
            else:
                arguments[name] = tensor
        return self.steps[0](**arguments, return_dict=False)[0]


def _fixed(tensor: TensorSpec, sizes: dict[str, int]) -> TensorSpec:
    shape = tuple(sizes.get(s.name, s) if isinstance(s, Dim) else s for s in tensor.shape)
    return replace(tensor, shape=shape)


def check_table(model: Any, table: torch.Tensor) -> None:
    """Raise `ModelLoadError` unless a file's table of positions is what the model's class computes."""
    stored = _square(model, table)
    side, patch = stored.shape[0], model.patch_embed.patch_size
    own = model.patch_embed.pos_embed
    if own is None:
        reason = "its config (interpolation_scale = null) has no positions and would ignore them"
    elif own.numel() != stored.numel():
        reason = f"its config says sample_size = {model.config.sample_size}"
    elif (error := float((_square(model, own) - stored).abs().max())) > _SAME_TABLE:
        reason = f"it computes others, which differ by up to {error:.2g} (of values in -1..1)"
    else:
        return
    size, name = side * patch, type(model).__name__
    fits = [f"positions='fixed', for latents of {size}x{size} only"]
    if (scale := _scale_of(model, stored)) is not None:
        config = f"sample_size = {size} and interpolation_scale = {scale:g}"
        fits.insert(0, f"{name} with {config} in its config, for any size")
    raise ModelLoadError(
        f"the checkpoint holds positions for latents of {size}x{size}, which do not fit {name}: {reason}. "
        f"What fits: {'; '.join(fits)}. An approximation for another size is positions='interpolated'"
    )


def with_table(
    model: Any, table: torch.Tensor | None, size: tuple[int, int] | None
) -> tuple[Any, tuple[int, int], float | None]:
    """The model with `table` (None: its own) for the one size that it is for, or interpolated for `size`.

    Returns a twin of the model that shares its weights, the latents' height and width, and the error of the
    interpolation: against what the class computes, if it computes this table; else that of the table's
    every second position, interpolated from the others, which are twice as far apart.
    """
    embed = getattr(model, "patch_embed", None)
    if embed is None:
        raise OptionError(f"{type(model).__name__} has no table of positions")
    if table is None:
        if embed.pos_embed is None:
            raise OptionError("neither the class (interpolation_scale = null) nor its file has positions")
        table = embed.pos_embed
    stored, error = _square(model, table), None
    patch = embed.patch_size
    if size is not None:
        pair = isinstance(size, (tuple, list)) and len(size) == 2
        if not pair or any(type(side) is not int or side < 1 or side % patch for side in size):
            raise OptionError(f"size must be (height, width) of latents, multiples of {patch}, not {size!r}")
        if len(stored) < _LEAST_TABLE:
            raise OptionError(f"a table of {len(stored)}x{len(stored)} positions is too small to interpolate")
        height, width = (side // patch for side in size)
        wanted = _interpolated(stored, height, width)
        computed = None if embed.pos_embed is None else _computed(embed, *stored.shape[:2])
        if computed is not None and float((computed - stored).abs().max()) <= _SAME_TABLE:
            error = float((_computed(embed, height, width) - wanted).abs().max())
        else:
            even = stored[: stored.shape[0] // 2 * 2, : stored.shape[1] // 2 * 2]
            error = float((_interpolated(even[::2, ::2], *even.shape[:2]) - even).abs().max())
        stored = wanted
    twin, twin_embed = copy.copy(model), copy.copy(embed)
    twin._modules = {**model._modules, "patch_embed": twin_embed}
    twin_embed._buffers = {**embed._buffers, "pos_embed": stored.flatten(0, 1)[None]}
    vars(twin_embed).pop("pos_embed", None)  # None, of a class without positions
    twin_embed.height, twin_embed.width = stored.shape[:2]
    return twin, (stored.shape[0] * patch, stored.shape[1] * patch), error


def _square(model: Any, table: torch.Tensor) -> torch.Tensor:
    """A table of (1, positions, features) or (positions, features) as (rows, columns, features)."""
    count, features = table.shape[-2:] if table.ndim in (2, 3) else (0, 0)
    side = math.isqrt(count)
    if not count or side * side != count or table.numel() != count * features:
        raise ModelLoadError(f"a table of positions of shape {tuple(table.shape)} is not for a square")
    if table.is_complex() or not table.isfinite().all():
        raise ModelLoadError("a table of positions that are not finite numbers")
    width = model.patch_embed.proj.out_channels
    if features != width:
        raise ModelLoadError(
            f"the positions have {features} features, {type(model).__name__} here has {width}"
        )
    return table.float().reshape(side, side, features)


def _computed(embed: Any, rows: int, columns: int) -> torch.Tensor:
    """What the class adds for a picture of so many patches: its result less that without positions."""
    patch = embed.patch_size
    with torch.inference_mode():
        latent = embed.proj.weight.new_zeros((1, embed.proj.in_channels, rows * patch, columns * patch))
        plain = embed.proj(latent).flatten(2).transpose(1, 2)
        added: torch.Tensor = embed(latent) - plain
    return added.reshape(rows, columns, -1)


def _scale_of(model: Any, stored: torch.Tensor) -> float | None:
    """The `interpolation_scale` with which the class computes this table; None if with none that is known."""
    side, patch = stored.shape[0], model.patch_embed.patch_size
    for scale in _SCALES:
        embed = type(model.patch_embed)(
            height=side * patch,
            width=side * patch,
            patch_size=patch,
            in_channels=1,
            embed_dim=stored.shape[2],
            interpolation_scale=scale,
        )
        if float((embed.pos_embed.reshape(stored.shape) - stored).abs().max()) <= _SAME_TABLE:
            return scale
    return None


def _interpolated(stored: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Bicubic; position i of n lies where the multi-scale class puts it, at i * side / n of the table."""
    places = []
    for side, count in zip(stored.shape[:2], (rows, columns), strict=True):
        at = torch.arange(count) * side / count
        places.append(2 * at / max(side - 1, 1) - 1)
    y, x = torch.meshgrid(*places, indexing="ij")
    result = nn.functional.grid_sample(
        stored.permute(2, 0, 1)[None],
        torch.stack((x, y), -1)[None],
        mode="bicubic",
        padding_mode="border",
        align_corners=True,
    )
    return result[0].permute(1, 2, 0)
