"""Around an inpainting diffusion model: what goes into its UNet, and what of its picture is kept.

Pictures are HW or HWC arrays (uint8, uint16, or float in 0..1) or PIL images; latents and what goes with them
NCHW arrays, computed in float32, or PyTorch tensors, which give tensors of their dtype on their device. A
picture's mask is HW, and 1 (or the full value of its dtype, or True) where the picture is made anew, 0 where
it is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import BackendUnavailableError, ImageError, OptionError, ShapeError
from anysize.backends.spec import Dim
from anysize.pixels import Picture, open_picture, quantise, to_float
from anysize.session import Session

#: how firmly `match_color` stays with no change: as if each value varied by this more, squared, than it does
_RIDGE = 1e-4


@dataclass(frozen=True)
class ColorShift:
    """How colours differ on the kept pixels: mean CIEDE2000 (1 is about what is just seen), and the mean
    saturation (HSV, 0..1) of the generated picture less that of the original."""

    delta_e: float
    saturation: float


def latent_mask(mask: Any, factor: int = 8, *, reduce: Literal["max", "nearest"] = "max") -> Array:
    """A picture's mask (H, W) -> (1, 1, H/factor, W/factor) float32 in 0..1, for its latents.

    `reduce`: a latent pixel is the largest of its factor x factor pixels, so that what is masked stays masked
    however small; or the upper left one of them, as `nearest` interpolation in PyTorch takes it.
    Raises `ShapeError` for sides that are no multiples of `factor`, `ImageError`, `OptionError`.
    """
    if reduce not in ("max", "nearest"):
        raise OptionError(f"reduce must be max or nearest, not {reduce!r}")
    if type(factor) is not int or factor < 1:
        raise OptionError(f"factor must be a whole number from 1, not {factor!r}")
    values = _mask(mask)
    for axis, side in enumerate(values.shape):
        if side % factor:
            near = Dim("side", factor, None, factor).nearest(side)
            raise ShapeError("mask", axis, side, f"must be a multiple of {factor}", near)
    height, width = (side // factor for side in values.shape)
    blocks = values.reshape(height, factor, width, factor)
    return (blocks.max(axis=(1, 3)) if reduce == "max" else blocks[:, 0, :, 0].copy())[None, None]


def unet_input(model: Any, latents: Any, mask: Any = None, masked: Any = None) -> Any:
    """The `sample` of an inpainting UNet: (N, 4, h, w), or (N, 9, h, w) with the mask and the masked latents.

    `model`: the UNet, its `Session`, or its number of input channels; 4 take the latents alone, 9 need the
    `mask` (N or 1, 1, h, w) of the latents' size and `masked` (N or 1, 4, h, w), the latents of the picture
    with what is masked taken out. The result is what `latents` are. Raises `OptionError` for a model with
    other numbers of channels or that is no UNet, `ShapeError`.
    """
    count = _in_channels(model)
    if count not in (4, 9):
        raise OptionError(f"a UNet of {count} input channels is not for inpainting: those have 4 or 9")
    sample = _latents("latents", latents, 4)
    if count == 4:
        return _as_given(sample.copy(), latents)
    if mask is None or masked is None:
        missing = "mask" if mask is None else "masked"
        raise ShapeError(missing, None, "nothing", "required by a UNet of 9 input channels")
    rest = []
    for name, value, channels in (("mask", mask, 1), ("masked", masked, 4)):
        array = _latents(name, value, channels) if name == "masked" else _weights(value)
        wanted = (len(sample), channels, *sample.shape[2:])
        if array.shape[0] not in (1, len(sample)) or array.shape[2:] != sample.shape[2:]:
            raise ShapeError(name, None, array.shape, f"must be {wanted}, as the latents are {sample.shape}")
        rest.append(np.broadcast_to(array, wanted))
    return _as_given(np.concatenate([sample, *rest], axis=1), latents)


def blend_latents(
    original: Any,
    new: Any,
    mask: Any,
    *,
    noise: Any = None,
    level: tuple[float, float] | None = None,
) -> Any:
    """(1 - mask) * original + mask * new: a UNet of 4 channels keeps to the original where nothing is masked.

    Latents (N, 4, h, w) and their mask (N or 1, 1, h, w). `level`: the step's noise level, as factors of the
    original and of `noise`: (sqrt(a), sqrt(1 - a)) with the cumulative product a of DDPM's and DDIM's alphas,
    (1, sigma) for Euler's, (1 - sigma, sigma) for flow matching. Without noise: (1, 0), the end. The result
    is what `new` is. Raises `ShapeError` where shapes do not match, `OptionError`.
    """
    if level is None and noise is not None:
        raise OptionError("noise needs the step's level: level=(factor of the original, factor of the noise)")
    try:
        if not isinstance(level, (tuple, list, type(None))):
            raise TypeError
        signal, sigma = (1.0, 0.0) if level is None else map(float, level)
    except (TypeError, ValueError):
        signal = sigma = -1.0
    if not (0 <= signal < np.inf and 0 <= sigma < np.inf):
        raise OptionError(f"level is two factors from 0, of the original and of the noise, not {level!r}")
    if sigma and noise is None:
        raise OptionError("a level with noise needs the noise that the latents began with")
    parts = {"new": _latents("new", new, None)}
    shape = parts["new"].shape
    parts["original"] = _latents("original", original, None)
    parts["noise"] = parts["original"] if noise is None else _latents("noise", noise, None)
    for name in ("original", "noise"):
        found = parts[name].shape
        if found[0] not in (1, shape[0]) or found[1:] != shape[1:]:
            raise ShapeError(name, None, found, f"must be {shape}, as the new latents are")
    weight = _weights(mask)
    if weight.shape[0] not in (1, shape[0]) or weight.shape[2:] != shape[2:]:
        raise ShapeError("mask", None, weight.shape, f"must be {(shape[0], 1, *shape[2:])}")
    kept: Array = np.float32(signal) * parts["original"]
    if sigma:
        kept = kept + np.float32(sigma) * parts["noise"]
    return _as_given(np.asarray((1 - weight) * kept + weight * parts["new"], np.float32), new)


def composite(original: Any, generated: Any, mask: Any) -> Any:
    """The generated picture where masked, the original's own pixels, bit for bit, where not.

    In between, by the mask's value. The result is what `original` is. Raises `ShapeError` where the three
    differ in size, channels or dtype; `ImageError`.
    """
    kept, made, weight = _pictures(original, generated, mask)
    weight = weight[..., None]
    mixed = quantise((1 - weight) * to_float(kept.array) + weight * to_float(made.array), kept.array.dtype)
    mixed = np.where(weight == 1, made.array, np.where(weight == 0, kept.array, mixed))
    return kept.restore(mixed.astype(kept.array.dtype))  # in its order of bytes


def color_shift(original: Any, generated: Any, mask: Any) -> ColorShift:
    """How the generated picture's colours differ from the original's on the pixels that are kept (mask 0).

    For pictures in sRGB. Raises `ShapeError`, `ImageError`, `OptionError` where no pixel is kept,
    `BackendUnavailableError` without scikit-image.
    """
    try:
        from skimage.color import deltaE_ciede2000, rgb2hsv, rgb2lab
    except ImportError as error:
        raise BackendUnavailableError(
            f'colour differences need scikit-image: pip install "anysize[diffusion]" ({error})',
            name="skimage",
        ) from error
    before, after = _kept_colours(*_pictures(original, generated, mask))
    difference = deltaE_ciede2000(rgb2lab(before), rgb2lab(after))
    saturation = rgb2hsv(after)[:, 1] - rgb2hsv(before)[:, 1]
    return ColorShift(float(difference.mean()), float(saturation.mean()))


def match_color(original: Any, generated: Any, mask: Any) -> Any:
    """The generated picture with its colours brought to the original's, as fitted on the unmasked pixels.

    Each channel becomes a sum of the pixel's red, green, blue, largest and smallest value and a constant, by
    least squares: shifts of brightness, contrast, colour balance and saturation (HSV's or HSL's) are such
    sums. For pictures in sRGB; alpha stays. The result is what `generated` is. Raises `ShapeError`,
    `ImageError`, `OptionError` where no pixel is kept.
    """
    pictures = _pictures(original, generated, mask)
    before, after = (colours.astype(np.float64) for colours in _kept_colours(*pictures))
    known = _features(after)
    # towards no change, so that what the kept pixels do not tell stays as it is
    unchanged = np.eye(6, 3)
    normal = known.T @ known / len(known) + _RIDGE * np.eye(6)
    factors = unchanged + np.linalg.solve(normal, known.T @ (before - known @ unchanged) / len(known))
    picture = pictures[1]
    colours = _colours(to_float(picture.array))
    matched = (_features(colours.reshape(-1, 3)) @ factors).reshape(colours.shape)
    result = picture.array.copy()
    channels = _channels(result)
    grey = matched if channels == 3 else matched.mean(axis=2, keepdims=True)
    result[..., :channels] = quantise(np.ascontiguousarray(grey, np.float32), result.dtype)
    return picture.restore(result)


def _pictures(original: Any, generated: Any, mask: Any) -> tuple[Picture, Picture, Array]:
    kept, made, weight = open_picture(original), open_picture(generated), _mask(mask)
    if made.array.shape != kept.array.shape or made.array.dtype != kept.array.dtype:
        want = f"must be {kept.array.shape} {kept.array.dtype}, as the original is"
        raise ShapeError("generated", None, f"{made.array.shape} {made.array.dtype}", want)
    if weight.shape != kept.array.shape[:2]:
        raise ShapeError("mask", None, weight.shape, f"must be {kept.array.shape[:2]}, as the original is")
    return kept, made, weight


def _kept_colours(kept: Picture, made: Picture, weight: Array) -> tuple[Array, Array]:
    """The colours (pixels, 3) of both pictures where nothing is masked."""
    compared = weight == 0
    for array in (kept.array, made.array):
        if _channels(array) < array.shape[2]:
            compared &= array[..., -1] > 0  # what is not seen has no colour
    if not compared.any():
        raise OptionError("all of the picture is masked: no pixel is left to compare")
    before, after = (_colours(to_float(picture.array))[compared] for picture in (kept, made))
    return before, after


def _channels(array: Array) -> int:
    """Of colour, without alpha."""
    return int(array.shape[2] - (array.shape[2] % 2 == 0))


def _colours(array: Array) -> Array:
    """Float HWC -> its three colours; grey is three times the same."""
    return np.repeat(array[..., :1], 3, axis=2) if array.shape[2] < 3 else array[..., :3]


def _features(colours: Array) -> Array:
    top, bottom = colours.max(axis=1, keepdims=True), colours.min(axis=1, keepdims=True)
    return np.concatenate([colours, top, bottom, np.ones_like(top)], axis=1)


def _mask(mask: Any) -> Array:
    """(H, W) float32 in 0..1."""
    if isinstance(mask, np.ndarray) and mask.dtype == bool:
        mask = mask.astype(np.uint8) * np.uint8(255)
    opened = open_picture(mask).array
    if opened.dtype.kind == "u" and opened.max() == 1:
        raise ImageError(
            f"a mask of {opened.dtype} is full at {np.iinfo(opened.dtype).max}; for 0 and 1 take bool"
        )
    array = to_float(opened)
    if array.shape[2] != 1:
        raise ImageError(f"a mask has one channel, not {array.shape[2]}")
    if not ((array >= 0) & (array <= 1)).all():
        raise ImageError("the values of a mask are from 0 to 1")
    return array[..., 0]


def _latents(name: str, value: Any, channels: int | None) -> Array:
    try:
        if hasattr(value, "detach"):  # a tensor, of a dtype perhaps that numpy does not have
            value = value.detach().cpu().float() if not value.is_complex() else value
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"dtype {array.dtype}")
    except (TypeError, ValueError, RuntimeError) as error:
        raise ShapeError(
            name, None, type(value).__name__, f"must be an array of numbers ({error})"
        ) from error
    if array.ndim != 4 or 0 in array.shape or (channels is not None and array.shape[1] != channels):
        raise ShapeError(name, None, array.shape, f"must be (N, {channels or 'C'}, h, w)")
    return array.astype(np.float32, copy=False)


def _as_given(result: Array, given: Any) -> Any:
    """An array; for a tensor one on its device, of its dtype, or float32 where that is of whole numbers."""
    if not hasattr(given, "new_tensor"):
        return result
    import torch

    return given.new_tensor(result, dtype=given.dtype if given.is_floating_point() else torch.float32)


def _weights(mask: Any) -> Array:
    array = _latents("mask", mask, 1)
    if not ((array >= 0) & (array <= 1)).all():
        raise OptionError("the values of a mask are from 0 to 1; latent_mask() makes them so")
    return array


def _in_channels(model: Any) -> int:
    if isinstance(model, Session):
        if len(model.spec.inputs) == 1:
            raise OptionError(f"the session takes {model.spec.inputs[0]} alone: it is no UNet's")
        return model.spec.channels or 0
    count = model if isinstance(model, int) else getattr(getattr(model, "config", None), "in_channels", None)
    if type(count) is not int:
        raise OptionError(f"{type(model).__name__} does not say how many input channels it has")
    return count
