"""How far a pixel reaches: the receptive radius, measured by running the model and then checked."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from anysize.backends.base import Array, Feeds
from anysize.backends.spec import Dim, ModelSpec, Rule

Run = Callable[[Feeds], dict[str, Array]]
_LONGEST = 2048  # of the strips that measure the radius


def measure_radius(run: Run, spec: ModelSpec, rng: np.random.Generator) -> int | None:
    """The receptive radius in input pixels, or None if unbounded or the model is not shift-invariant.

    A row (then a column) of NaN spreads through every operator that reads it, whatever the weights, so
    the rows that come out different are the structural reach, not the one that rounding hides. Some
    engines swallow NaN in ReLU: huge values of both signs are tried too, and the union counts.
    The result is then checked: a tile with that halo must equal the whole.
    """
    radii = [_axis_radius(run, spec, axis, rng) for axis in (2, 3)]
    if any(r is None for r in radii):
        return None
    radius = max(r for r in radii if r is not None)
    if all(_tile_equals_whole(run, spec, axis, radius, rng) for axis in (2, 3)):
        return radius
    return None


def image_step(spec: ModelSpec, axis: int) -> int:
    """Sizes and tile origins along an image axis must be multiples of this for whole output pixels."""
    size, out = spec.inputs[0].shape[axis], spec.outputs[0].shape[axis]
    multiple = size.multiple_of if isinstance(size, Dim) else 1
    return math.lcm(multiple, out.div if isinstance(out, Rule) else 1)


def _strip(spec: ModelSpec, axis: int, length: int, rng: np.random.Generator) -> Array | None:
    """A random input, `length` or a little more along `axis` and as thin as allowed across."""
    shape = []
    for i, size in enumerate(spec.inputs[0].shape):
        if isinstance(size, Rule):
            return None  # tied axes: the strip cannot be thin, nor a tile a free rectangle
        step = image_step(spec, i) if i >= 2 else 1
        wanted = length if i == axis else 1
        got = size if isinstance(size, int) else size.ceil(step * math.ceil(max(wanted, size.min) / step))
        if isinstance(size, Dim) and not size.allows(got):
            return None
        shape.append(got)
    if shape[axis] < length:
        return None
    low, high = spec.value_range
    return (low + (high - low) * rng.random(shape)).astype(spec.inputs[0].dtype)


def _axis_radius(run: Run, spec: ModelSpec, axis: int, rng: np.random.Generator) -> int | None:
    name, out, scale = spec.inputs[0].name, spec.outputs[0].name, spec.scale or 1
    length = 64
    while length <= _LONGEST:
        x = _strip(spec, axis, length, rng)
        if x is None:
            return None
        length = x.shape[axis]
        middle = length // 2
        plain = run({name: x})[out]
        reach: int | None = 0
        for at in range(middle, middle + image_step(spec, axis)):
            changed = np.zeros(plain.shape[axis], bool)
            for value in (np.nan, 1e30, -1e30):
                poked = x.copy()
                poked[(slice(None),) * axis + (at,)] = value
                different = run({name: poked})[out] != plain  # NaN differs from everything
                changed |= different.any(axis=tuple(i for i in range(4) if i != axis))
            rows = np.flatnonzero(changed)
            if not rows.size:
                return None  # the model ignores this pixel, or the engine hid it: nothing is known
            first, last = int(rows[0]) // scale, int(rows[-1]) // scale
            if first == 0 or last == length - 1:
                reach = None  # may go on beyond the strip
                break
            reach = max(reach or 0, at - first, last - at)
        if reach is not None:
            return reach
        length *= 2
    return None


def _tile_equals_whole(run: Run, spec: ModelSpec, axis: int, radius: int, rng: np.random.Generator) -> bool:
    """Whether tiles at both ends and in the middle of a strip give the whole strip's pixels.

    The middle tells absolute positions, the ends padding that looks at the other side of the picture.
    """
    name, out, scale = spec.inputs[0].name, spec.outputs[0].name, spec.scale or 1
    step = image_step(spec, axis)
    halo = step * math.ceil(radius / step)
    tile = _strip(spec, axis, 2 * halo + step * math.ceil(16 / step), rng)
    if tile is None:
        return False
    extent = tile.shape[axis]
    whole = _strip(spec, axis, 2 * extent + step * math.ceil(7 / step), rng)
    if whole is None:
        return False
    length = whole.shape[axis]
    want = run({name: whole})[out]
    limit = 1e-4 * max(1.0, float(np.abs(want).max()))
    for start in (0, step * math.ceil(extent / 2 / step), length - extent):
        first = start + halo if start else 0
        last = start + extent - (halo if start + extent < length else 0)
        got = run({name: whole.take(range(start, start + extent), axis)})[out]
        got = got.take(range((first - start) * scale, (last - start) * scale), axis)
        if not np.abs(got - want.take(range(first * scale, last * scale), axis)).max() <= limit:
            return False
    return True
