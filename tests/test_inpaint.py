"""Around an inpainting model: masks, the UNet's input, blending, compositing, colours."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anysize import ImageError, OptionError, ShapeError
from anysize.inpaint import blend_latents, color_shift, composite, latent_mask, match_color, unet_input
from PIL import Image
from toys import image_spec, nearest, numpy_session

RNG = np.random.default_rng(0)


def picture(height: int = 60, width: int = 90, seed: int = 0) -> np.ndarray:
    """Smooth colours of all kinds."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    waves = [np.sin(7 * x + 3 * k * y + k + seed) * 0.4 + 0.5 for k in range(3)]
    return np.rint(np.stack(waves, -1) * 255).astype(np.uint8)


def box(height: int = 60, width: int = 90) -> np.ndarray:
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 3 : width // 2] = 255
    return mask


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.uint16, np.float32])
def test_a_mask_of_one_pixel_is_never_lost(dtype: type) -> None:
    value = {np.uint16: 2, np.uint8: 2, np.float32: 1e-6}.get(dtype, True)
    for y, x in ((0, 0), (23, 17), (7, 8), (8, 7)):
        mask = np.zeros((24, 40), dtype)
        mask[y, x] = value
        reduced = latent_mask(mask)
        assert reduced.shape == (1, 1, 3, 5)
        assert reduced.dtype == np.float32
        assert np.flatnonzero(reduced).tolist() == [y // 8 * 5 + x // 8]
        by_torch = torch.nn.functional.interpolate(
            torch.from_numpy(np.asarray(mask, np.float64))[None, None], scale_factor=1 / 8
        )
        near = latent_mask(mask, reduce="nearest")
        assert np.array_equal(near > 0, by_torch.numpy() > 0)
    assert latent_mask(np.ones((8, 8), bool)).item() == 1
    assert latent_mask(Image.fromarray(box(64, 64)), 4).max() == 1


def test_masks_that_are_none() -> None:
    with pytest.raises(ShapeError, match=r"axis 1: got 33, .* multiple of 8; nearest valid: 32 or 40"):
        latent_mask(np.zeros((8, 33), bool))
    with pytest.raises(ShapeError, match=r"axis 0: got 3, .* nearest valid: 8"):
        latent_mask(np.zeros((3, 8), bool))
    with pytest.raises(ImageError, match="a mask has one channel, not 3"):
        latent_mask(np.zeros((8, 8, 3), np.uint8))
    for values in (np.full((8, 8), 2.0), np.full((8, 8), np.nan), np.full((8, 8), -1.0)):
        with pytest.raises(ImageError):
            latent_mask(values)
    for dtype, full in ((np.uint8, 255), (np.uint16, 65535)):
        with pytest.raises(ImageError, match=f"a mask of {np.dtype(dtype)} is full at {full}; for 0 and 1 "):
            latent_mask(np.eye(8, dtype=dtype))
    for arguments in ({"factor": 0}, {"factor": 2.0}, {"reduce": "mean"}):
        with pytest.raises(OptionError):
            latent_mask(np.zeros((8, 8), bool), **arguments)


def test_what_goes_into_a_unet() -> None:
    latents, masked = (RNG.standard_normal((2, 4, 17, 23)).astype(np.float32) for _ in range(2))
    mask = latent_mask(np.pad(box(64, 64), ((0, 72), (0, 120))))
    assert np.array_equal(unet_input(4, latents), latents)
    model = SimpleNamespace(config=SimpleNamespace(in_channels=9))
    nine = unet_input(model, latents, mask, masked[:1])
    assert nine.shape == (2, 9, 17, 23)
    assert np.array_equal(nine[:, :4], latents)
    assert np.array_equal(nine[1, 4], mask[0, 0])
    assert np.array_equal(nine[1, 5:], masked[0])
    assert np.array_equal(unet_input(9, torch.from_numpy(latents), mask, masked)[:, 5:], masked)
    with pytest.raises(OptionError, match=r"the session takes .* alone: it is no UNet's"):
        unet_input(numpy_session(nearest(1), image_spec(1)), latents)
    for count in (5, 8, 13, 0):
        with pytest.raises(OptionError, match=f"a UNet of {count} input channels is not for inpainting"):
            unet_input(count, latents, mask, masked)
    with pytest.raises(OptionError, match="the values of a mask are from 0 to 1"):
        unet_input(9, latents, np.full((1, 1, 17, 23), 255, np.uint8), masked)
    assert not np.shares_memory(unet_input(4, latents), latents)
    tensor = torch.from_numpy(latents).bfloat16().requires_grad_()
    same = unet_input(9, tensor, torch.from_numpy(mask), masked)
    assert (same.dtype, same.requires_grad) == (torch.bfloat16, False)
    assert torch.equal(same[:, :4], tensor)
    for wrong in (
        "abcd",
        [[1], [1, 2]],
        latents.astype(complex),
        torch.zeros(1, 4, 2, 2, dtype=torch.complex64),
    ):
        with pytest.raises(ShapeError, match="must be an array of numbers"):
            unet_input(4, wrong)
    with pytest.raises(ShapeError, match="'latents': got"):
        unet_input(4, latents[..., :0])
    with pytest.raises(OptionError, match="does not say how many"):
        unet_input("unet", latents)
    with pytest.raises(ShapeError, match="'masked': got nothing"):
        unet_input(9, latents, mask)
    with pytest.raises(ShapeError, match=r"'mask': got \(1, 1, 17, 22\), but must be \(2, 1, 17, 23\)"):
        unet_input(9, latents, mask[..., :-1], masked)
    with pytest.raises(ShapeError, match=r"'latents': got \(4, 17, 23\)"):
        unet_input(4, latents[0])
    with pytest.raises(ShapeError, match=r"'masked': got \(3, 4, 17, 23\)"):
        unet_input(9, latents, mask, np.zeros((3, 4, 17, 23), np.float32))


def test_blending_at_a_step_of_diffusers_schedulers() -> None:
    diffusers = pytest.importorskip("diffusers")
    original, new, noise = (RNG.standard_normal((2, 4, 5, 7)).astype(np.float32) for _ in range(3))
    mask = RNG.random((1, 1, 5, 7)).astype(np.float32).round(1)
    tensors = [torch.from_numpy(array) for array in (original, noise)]

    ddim = diffusers.DDIMScheduler()
    alpha = float(ddim.alphas_cumprod[400])
    euler = diffusers.EulerDiscreteScheduler()
    euler.set_timesteps(10)
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(10)
    sigma = float(flow.sigmas[3])
    cases = (
        (ddim.add_noise(*tensors, torch.tensor([400])), (alpha**0.5, (1 - alpha) ** 0.5)),
        (euler.add_noise(*tensors, euler.timesteps[3:4]), (1.0, float(euler.sigmas[3]))),
        (flow.scale_noise(tensors[0], flow.timesteps[3:4], tensors[1]), (1 - sigma, sigma)),
        (tensors[0], (1.0, 0.0)),
    )
    for noised, level in cases:
        got = blend_latents(original, new, mask, noise=noise, level=level)
        np.testing.assert_allclose(got, (1 - mask) * noised.numpy() + mask * new, rtol=1e-5, atol=1e-5)
    assert np.array_equal(blend_latents(original, new, np.ones_like(mask)), new)
    assert np.array_equal(blend_latents(original, new, np.zeros_like(mask)), original)
    got = blend_latents(original, torch.from_numpy(new).half(), mask)
    assert got.dtype == torch.float16
    np.testing.assert_allclose(got, (1 - mask) * original + mask * new, atol=1e-2)
    whole = torch.full((2, 4, 5, 7), 3)
    got = blend_latents(original, whole, mask)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got, (1 - mask) * original + mask * 3, atol=1e-5)
    with pytest.raises(OptionError, match="noise needs the step's level"):
        blend_latents(original, new, mask, noise=noise)
    for level in (
        1.0,
        "12",
        {1, 2},
        (1,),
        (1, 2, 3),
        ("a", "b"),
        (np.nan, 0),
        (np.inf, 0),
        (1, np.nan),
        (-1, 0),
    ):
        with pytest.raises(OptionError, match="level is two factors"):
            blend_latents(original, new, mask, noise=noise, level=level)
    for values in (mask * 255, mask - 2, mask * np.nan):
        with pytest.raises(OptionError, match="the values of a mask are from 0 to 1"):
            blend_latents(original, new, values)
    with pytest.raises(OptionError, match="needs the noise"):
        blend_latents(original, new, mask, level=(1.0, 0.5))
    for wrong in ((original[:, :3], new, mask), (original, new, mask[..., 1:]), (original, new[0], mask)):
        with pytest.raises(ShapeError):
            blend_latents(*wrong)
    with pytest.raises(ShapeError, match="'noise'"):
        blend_latents(original, new, mask, noise=noise[..., 1:], level=(1.0, 0.5))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_what_is_not_masked_is_the_original(dtype: type, channels: int) -> None:
    full = 1 if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max
    original, generated = ((RNG.random((30, 40, channels)) * full).astype(dtype) for _ in range(2))
    mask = box(30, 40).astype(np.float32) / 255
    mask[20:25] = 0.5
    result = composite(original, generated, mask)
    assert result.dtype == dtype
    assert np.array_equal(result[mask == 0], original[mask == 0])
    assert np.array_equal(result[mask == 1], generated[mask == 1])
    between = (original[20:25].astype(float) + generated[20:25]) / 2
    assert np.abs(result[20:25] - between).max() <= (1 if full > 1 else 1e-6)


def test_pictures_that_do_not_match_are_refused() -> None:
    a, mask = picture(), box()
    for b, m in ((a[1:], mask), (a[..., :1], mask), (a.astype(np.uint16), mask), (a, mask[1:]), (a, mask.T)):
        for function in (composite, color_shift, match_color):
            with pytest.raises(ShapeError, match="as the original is"):
                function(a, b, m)
    for function in (color_shift, match_color):
        with pytest.raises(OptionError, match="no pixel is left"):
            function(a, a, np.full_like(mask, 255))
    assert np.array_equal(composite(a, a + 1, np.full_like(mask, 255)), a + 1)
    made = composite(Image.fromarray(a), Image.fromarray(a[::-1]), Image.fromarray(mask))
    assert isinstance(made, Image.Image)


def shifted(original: np.ndarray, saturation: float = 0.8, lift: float = 0.03) -> np.ndarray:
    """HSV saturation times a factor, then a constant on each channel."""
    from skimage.color import hsv2rgb, rgb2hsv

    hsv = rgb2hsv(original)
    hsv[..., 1] *= saturation
    return np.rint(np.clip(hsv2rgb(hsv) + lift, 0, 1) * 255).astype(np.uint8)


def test_colours_are_brought_back() -> None:
    original, mask = picture(), box()
    generated = shifted(original)
    generated[mask > 0] = shifted(picture(seed=2))[mask > 0]  # something new there, of the same tint
    before = color_shift(original, generated, mask)
    assert before.delta_e > 3
    assert before.saturation < -0.1
    matched = match_color(original, generated, mask)
    after = color_shift(original, matched, mask)
    assert after.delta_e <= before.delta_e / 3
    assert abs(after.saturation) < 0.02
    # what was made anew is of the right tint too, though nobody could compare it
    new = color_shift(picture(seed=2), matched, 255 - mask)
    assert new.delta_e <= color_shift(picture(seed=2), generated, 255 - mask).delta_e / 3
    assert color_shift(original, original, mask) == color_shift(
        original, composite(original, generated, mask), mask
    )
    assert color_shift(original, original, mask).delta_e == 0
    assert np.abs(match_color(original, original, mask).astype(int) - original).max() <= 1
    hidden = np.dstack([shifted(original), np.full((60, 90), 255, np.uint8)])
    hidden[50:, :, :3], hidden[50:, :, 3] = 7, 0  # not seen, whatever it is
    seen = color_shift(np.dstack([original, hidden[..., 3]]), hidden, mask).delta_e
    assert seen == pytest.approx(before.delta_e, rel=0.2)
    big = original.astype(">u2") * 257
    assert composite(big, big[::-1], mask).dtype == big.dtype
    alpha = np.dstack([generated, np.arange(1, 91, dtype=np.uint8)[None].repeat(60, 0)])
    with_alpha = match_color(np.dstack([original, alpha[..., 3]]), alpha, mask)
    assert np.array_equal(with_alpha[..., 3], alpha[..., 3])
    assert np.array_equal(with_alpha[..., :3], matched)
    grey = match_color(original[..., 0], np.clip(original[..., 0], 0, 200) // 2 + 50, mask)
    assert np.abs(grey.astype(int) - np.clip(original[..., 0], 0, 200))[mask == 0].mean() < 8


def test_colours_that_the_kept_pixels_do_not_tell_stay_as_they_are() -> None:
    """All that is kept is grey: nothing is known of red, and red does not change much."""
    original = np.full((20, 20, 3), 128, np.uint8)
    generated = original + RNG.integers(6, 10, original.shape).astype(np.uint8)
    mask = np.zeros((20, 20), bool)
    mask[:10] = True
    generated[:10] = (200, 40, 30)
    matched = match_color(original, generated, mask)
    assert np.abs(matched[10:].astype(int) - 128).max() <= 4
    assert np.abs(matched[:10].astype(int) - (192, 32, 22)).max() <= 16


def test_photographs(assets: Path) -> None:
    from anysize.files import read_picture

    original = read_picture(assets / "images" / "OST_009.png").array
    mask = box(*original.shape[:2])
    before = color_shift(original, shifted(original), mask)
    after = color_shift(original, match_color(original, shifted(original), mask), mask)
    assert after.delta_e <= before.delta_e / 3
