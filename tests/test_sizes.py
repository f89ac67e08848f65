"""Size policies: the sizes that programs are known for, the way back, and what is tied to a picture."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import product

import anysize
import numpy as np
import pytest
import toys
from anysize import ImageError, OptionError, ShapeError, SizePolicy, fit_longest
from anysize.sizes import PRESETS
from hypothesis import given, settings
from hypothesis import strategies as st

SIZES = st.tuples(st.integers(1, 700), st.integers(1, 700))


def noise(size: tuple[int, int], *channels: int, dtype: type = np.uint8) -> np.ndarray:
    values = np.random.default_rng(sum(size)).random((*size, *channels))
    return values.astype(dtype) if np.dtype(dtype).kind == "f" else (values * 255).astype(dtype)


@pytest.mark.parametrize(
    ("given_size", "wanted"),
    [
        ((551, 754), (512, 704)),
        ((768, 768), (768, 768)),
        ((767, 767), (704, 704)),
        ((511, 511), (448, 448)),
        ((1000, 751), (768, 576)),
        ((3000, 4000), (576, 768)),
    ],
)
def test_anytext(given_size: tuple[int, int], wanted: tuple[int, int]) -> None:
    """Width x height, as the program's own rule has it."""
    size, target = given_size[::-1], wanted[::-1]
    plan = SizePolicy.preset("anytext").plan(size)
    picture = noise(size, 3)
    fitted = plan.apply(picture)
    assert plan.target == fitted.shape[:2] == target
    assert fitted.dtype == np.uint8
    assert plan.scale_x == wanted[0] / given_size[0]
    assert plan.scale_y == wanted[1] / given_size[1]
    assert plan.aspect_error == pytest.approx(plan.scale_x / plan.scale_y - 1)
    restored = plan.invert(fitted)
    assert restored.shape == picture.shape
    if size == target:
        assert fitted is picture
        assert restored is picture


@pytest.mark.parametrize(
    ("preset", "size", "target"),
    [
        ("animegan", (100, 333), (256, 320)),
        ("animegan", (256, 257), (256, 256)),
        ("animegan-face", (600, 800), (512, 512)),
        ("animegan-face", (300, 200), (512, 512)),
        ("sdxl", (1023, 1025), (1016, 1024)),
        ("sana", (3000, 4000), (832, 1152)),
        ("sana", (500, 500), (1024, 1024)),
        ("sana", (10, 1000), (512, 2048)),
        ("pad-square", (30, 50), (50, 50)),
        ("cap-2048", (3000, 4000), (1536, 2048)),
        ("cap-2048", (2048, 11), (2048, 11)),
    ],
)
def test_presets(preset: str, size: tuple[int, int], target: tuple[int, int]) -> None:
    plan = SizePolicy.preset(preset).plan(size)
    fitted = plan.apply(noise(size, 3))
    assert plan.target == fitted.shape[:2] == target
    assert plan.invert(fitted).shape[:2] == (target if preset == "animegan-face" else size)


def test_longest_side() -> None:
    fit = fit_longest(512)
    assert all(fit.plan((n, n)).target == (512, 512) for n in range(513, 5001))
    assert all(max(fit.plan((n, 2 * n // 3)).target) == 512 for n in range(513, 5001))
    assert all(fit.plan((n, n)).target == (n, n) for n in range(1, 513))
    assert fit_longest(512, upscale=True).plan((100, 50)).target == (512, 256)
    # through the resizing itself, where a size is rounded again
    for n in (513, 517, 769, 1023, 1537, 2001, 4999):
        assert fit.plan((n, 7)).apply(noise((n, 7))).shape == (512, max(1, round(7 * 512 / n)))


@settings(max_examples=150, deadline=None)
@given(SIZES, st.sampled_from([*PRESETS.values(), SizePolicy(8, "nearest"), SizePolicy(16, mode="crop")]))
def test_any_size_comes_back(size: tuple[int, int], policy: SizePolicy) -> None:
    """Or is refused, where a side would be 0."""
    policy = replace(policy, restore=True)
    picture = noise(size, 3)
    try:
        plan = policy.plan(size)
    except ShapeError:
        assert min(size) < policy.multiple
        return
    fitted = plan.apply(picture)
    assert fitted.shape == (*plan.target, 3)
    assert not any(side % policy.multiple for side in plan.target)
    assert plan.invert(fitted).shape == picture.shape
    assert plan.invert(fitted.repeat(2, 0).repeat(2, 1)).shape == (2 * size[0], 2 * size[1], 3)
    mask = noise(size) // 100 * 100
    assert set(np.unique(plan.apply_mask(mask))) <= set(np.unique(mask))
    if policy.mode == "pad":
        np.testing.assert_array_equal(plan.invert(fitted), picture)
    if policy.mode in ("pad", "crop", "bin"):
        # by rounding alone, which is all of half a pixel
        assert abs(plan.aspect_error) <= 0.6 / min(*plan.box, *plan.content)


@pytest.mark.parametrize("multiple", [2, 7, 64])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32, np.float64])
def test_padding_is_undone_bit_for_bit(multiple: int, dtype: type) -> None:
    policy = SizePolicy(multiple, rounding="ceil", mode="pad")
    for size in product((1, 2, 63, 64, 65, 130), repeat=2):
        plan = policy.plan(size)
        picture = noise(size, 3, dtype=dtype)
        padded = plan.apply(picture)
        assert padded.dtype == dtype
        np.testing.assert_array_equal(plan.invert(padded), picture)
        np.testing.assert_array_equal(plan.invert(padded.repeat(4, 0).repeat(4, 1))[::4, ::4], picture)


def test_padding_after_scaling() -> None:
    """The longest side fitted, the rest filled up, as a detector's letterbox."""
    plan = SizePolicy(mode="pad", square=True, max_side=100).plan((400, 150))
    assert (plan.content, plan.target) == ((100, 38), (100, 100))
    assert plan.invert(plan.apply(noise((400, 150), 3))).shape == (400, 150, 3)


@pytest.mark.parametrize(
    "policy",
    [
        SizePolicy.preset("anytext"),
        SizePolicy(64, "ceil"),
        SizePolicy(64, "ceil", mode="pad"),
        SizePolicy(64, mode="crop"),
        SizePolicy(64, mode="crop", max_side=256),
        SizePolicy(mode="bin", bins=((256, 384), (384, 256))),
    ],
    ids=lambda policy: f"{policy.mode}-{policy.rounding}-{policy.max_side}",
)
def test_what_is_tied_to_a_picture_stays_where_it_is(policy: SizePolicy) -> None:
    """Ramps over the picture, drawn at each ratio, agree in the middle of every pixel of the result."""
    size = (450, 600)
    plan = policy.plan(size)

    def ramp(sides: tuple[int, int], at: Fraction) -> np.ndarray:
        """Where in the picture each pixel's middle is, in pixels of the picture."""
        rows, columns = ((np.arange(n) + 0.5) / float(at) for n in sides)
        return np.stack(np.broadcast_arrays(rows[:, None], columns), -1).astype(np.float32)

    want = plan.apply(ramp(size, Fraction(1)))
    for at in (Fraction(1), Fraction(2), Fraction(1, 2), Fraction(1, 8)):
        drawn = ramp(tuple(round(n * at) for n in size), at)
        smooth, mask = plan.apply(drawn, at), plan.apply_mask(drawn, at)
        assert smooth.shape[:2] == mask.shape[:2] == plan.shape(at)
        step = np.maximum(1, 1 / np.array((plan.scale_y, plan.scale_x)) / float(at))
        exact = want
        if at < 1:  # the mean of the block of pixels that one pixel stands for
            n = at.denominator
            rows, columns = plan.shape(at)
            exact = want.reshape(rows, n, columns, n, 2).mean((1, 3))
        elif at > 1:
            exact = want.repeat(int(at), 0).repeat(int(at), 1)
        inner = slice(2, -2), slice(2, -2)
        if policy.mode == "pad":  # of what is the picture; beyond it is mirrored
            inner = tuple(slice(2, int(n * at) - 3) for n in size)
        # half a pixel for a size that is not whole at this ratio, and one more for the nearest of them
        assert (abs(smooth - exact)[inner] <= 0.75 * step).all()
        assert (abs(mask - exact)[inner] <= 1.25 * step).all()


def test_a_middle_that_begins_at_an_odd_pixel() -> None:
    """At twice the size it begins at twice the pixel, not at the middle of twice the size."""
    plan = SizePolicy(8, mode="crop").plan((755, 1001))
    picture = noise((755, 1001))
    twice = picture.repeat(2, 0).repeat(2, 1)
    np.testing.assert_array_equal(plan.apply(twice, 2), plan.apply(picture).repeat(2, 0).repeat(2, 1))
    np.testing.assert_array_equal(plan.apply_mask(twice, 2), plan.apply(twice, 2))


@settings(max_examples=300, deadline=None)
@given(SIZES, st.sampled_from([20, 100, 512]), st.booleans(), st.booleans())
def test_padding_never_cuts(size: tuple[int, int], most: int, upscale: bool, square: bool) -> None:
    policy = SizePolicy(16, "ceil", mode="pad", max_side=most, upscale=upscale, square=square)
    try:
        plan = policy.plan(size)
    except ShapeError:
        assert min(size) * most < max(size)  # it would be less than half a pixel
        return
    assert all(content <= target for content, target in zip(plan.content, plan.target, strict=True))
    assert max(plan.content) == (most if upscale or max(size) > most else max(size))
    assert max(plan.target) < max(plan.content) + 16


def test_there_and_back_is_in_place() -> None:
    """No shift by part of a pixel, whichever way it is scaled; a mask goes the same way."""
    places = np.mgrid[:300, :200].transpose(1, 2, 0).astype(np.float32)
    for policy in (
        SizePolicy(max_side=128),
        SizePolicy(max_side=600, upscale=True),
        SizePolicy(64, "ceil"),
        SizePolicy(mode="bin", bins=((450, 300), (300, 450))),
        SizePolicy(mode="pad", square=True, max_side=97),
    ):
        plan = policy.plan((300, 200))
        inner = slice(20, -20), slice(20, -20)
        assert np.abs(plan.invert(plan.apply(places)) - places)[inner].max() < 0.1
        back = plan.invert_mask(plan.apply_mask(places))
        assert np.abs(back - places)[inner].max() <= max(1, 300 / min(plan.content))
        assert abs((back - places)[inner].mean()) <= 0.5


def test_masks_come_back_as_masks() -> None:
    plan = SizePolicy.preset("anytext").plan((551, 754))
    labels = (noise((551, 754)) // 100 * 7).astype(np.int64)
    back = plan.invert_mask(plan.apply_mask(labels))
    assert back.shape == labels.shape
    assert back.dtype == np.int64
    assert set(np.unique(back)) <= {0, 7, 14}
    with pytest.raises(OptionError, match="not int64"):
        plan.invert(plan.apply_mask(labels))


def test_each_channel_keeps_to_its_own_values() -> None:
    mixed = np.zeros((100, 131, 2), np.float32)
    mixed[40:60, 40:60, 0] = 1
    mixed[..., 1] = noise((100, 131), dtype=np.float32) * 10 - 5
    for side in (70, 200):
        fitted = SizePolicy(max_side=side, upscale=True).plan((100, 131)).apply(mixed)
        assert (fitted[..., 0].min(), fitted[..., 0].max()) == (0, 1)
    mixed[3, 3, 1] = np.nan
    with pytest.raises(ImageError, match="NaN"):
        SizePolicy(max_side=70).plan((100, 131)).apply(mixed)


def test_latents_are_no_pictures() -> None:
    """Any number of channels, any values; and no more overshoot than there was."""
    plan = SizePolicy.preset("anytext").plan((551, 754))
    latent = (noise((69, 94), 16, dtype=np.float32) - 0.5) * 20
    fitted = plan.apply(latent, Fraction(1, 8))
    assert fitted.shape == (64, 88, 16)
    assert fitted.dtype == np.float32
    assert latent.min() <= fitted.min() < -1
    assert 1 < fitted.max() <= latent.max()
    assert plan.apply(latent[:68], np.float32(1 / 8)).shape == fitted.shape
    labels = np.arange(551 * 754, dtype=np.int64).reshape(551, 754)
    assert plan.apply_mask(labels).dtype == np.int64
    assert plan.apply_mask(labels > 9).dtype == bool


def test_refused() -> None:
    plan = SizePolicy.preset("anytext").plan((551, 754))
    picture = noise((551, 754), 3)
    for preset, size in (("anytext", (63, 700)), ("anytext", (4000, 100)), ("sdxl", (7, 8))):
        with pytest.raises(ShapeError, match=r"multiple=(64, max_side=768|8)\) would make it \d+ x \d+"):
            SizePolicy.preset(preset).plan(size)
    with pytest.raises(ShapeError):
        fit_longest(512).plan((5000, 1))
    for policy in (fit_longest(512), SizePolicy.preset("sana")):
        with pytest.raises(ShapeError, match="got 5 x 0, but must have at least one pixel a side"):
            policy.plan((0, 5))
    for wrong in ((754, 551), (551,), (551, 754, 3, 1), (552, 754)):
        with pytest.raises(ShapeError, match="551"):
            plan.apply(np.zeros(wrong, np.uint8))
    with pytest.raises(ShapeError, match="whole"):
        plan.apply(picture, 1 / 7)
    with pytest.raises(ShapeError):
        plan.invert(plan.apply(picture)[:-1])
    with pytest.raises(ShapeError):
        plan.invert(np.zeros(5))
    for at in (0, -1, float("nan"), float("inf"), "x", "1/0", None):
        with pytest.raises(OptionError, match="positive"):
            plan.apply(picture, at)
    for kind in (np.int32, bool, complex):
        for way in (plan.apply, plan.invert):
            with pytest.raises(OptionError, match="_mask takes any"):
                way(picture.astype(kind))
    for way in (plan.apply, plan.apply_mask, plan.invert, plan.invert_mask):
        with pytest.raises(OptionError, match="arrays, HW or HWC, not list"):
            way([[1, 2]])
        with pytest.raises(ShapeError, match="must be"):
            way(picture[:, :, :0])
    for size in (5, (1, 2, 3), (2.5, 3), ("a", "b"), (-1, 5), (True, 3)):
        with pytest.raises(OptionError, match="height, width"):
            plan.policy.plan(size)
    assert plan.policy.plan(np.array((551, 754))).size == (551, 754)
    assert str(plan) == "754 x 551 -> 704 x 512, resize, scale 0.9337 x 0.9292, aspect error +0.48%"


@pytest.mark.parametrize(
    "settings",
    [
        {"multiple": 0},
        {"multiple": 1.5},
        {"rounding": "up"},
        {"mode": "stretch"},
        {"min_side": 0},
        {"max_side": "big"},
        {"square": 1},
        {"mode": "bin"},
        {"bins": ((1, 2),)},
        {"mode": "bin", "bins": ((1, 2),), "multiple": 8},
        {"mode": "bin", "bins": ((1,),)},
        {"mode": "bin", "bins": ((0, 4),)},
        {"mode": "bin", "bins": 5},
        {"mode": "bin", "bins": ((1, 2),), "rounding": "ceil"},
        {"min_side": 512, "max_side": 256},
        {"mode": "pad", "multiple": 8},
        {"upscale": True},
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant(settings: dict) -> None:
    with pytest.raises(OptionError):
        SizePolicy(**settings)


def test_unknown_preset() -> None:
    for name in ("anytxt", ["anytext"]):
        with pytest.raises(OptionError, match="anytext, animegan"):
            SizePolicy.preset(name)


def test_a_size_without_a_policy_is_refused_before_the_engine_runs(backend: str) -> None:
    """A model of multiples of 64, as a latent diffusion model's U-Net makes them, at the sizes of AnyText."""
    with anysize.load(toys.Windows(64), backend=backend) as session:
        x = noise((551, 754), 3, dtype=np.float32)
        with pytest.raises(ShapeError) as caught:
            session(x.transpose(2, 0, 1)[None])
        assert caught.value.nearest == (512, 576)
        assert session.stats.calls == session.stats.compiles == 0
        plan = SizePolicy.preset("anytext").plan(x.shape[:2])
        y = session(plan.apply(x).transpose(2, 0, 1)[None])[0].transpose(1, 2, 0)
        assert plan.invert(y).shape == x.shape
