"""How far a pixel reaches: the receptive radius, measured by running the model and then checked."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from anysize.backends.base import Array, Feeds
from anysize.backends.spec import Dim, ModelSpec, Rule

Run = Callable[[Feeds], dict[str, Array]]

# A square shows reaches up to half of it, in all directions. Longer ones show in strips, whose width only
# has to be enough for reaches that are not straight.
_SQUARE = 96
_LONG = (256, 1024, 2048)
_ACROSS = 16


def measure_radius(run: Run, spec: ModelSpec, rng: np.random.Generator) -> int | None:
    """The receptive radius in input pixels, or None if unbounded or the model is not shift-invariant.

    A pixel of NaN spreads through every operator that reads it, whatever the weights, so the pixels that
    come out different are the structural reach, not the one that rounding hides. Modules may catch NaN,
    so huge values of both signs are tried too, and the union counts.
    The result is then checked: tiles with that halo must equal the whole, wherever they lie.
    """
    if any(t.dtype.kind != "f" for t in (*spec.inputs, *spec.outputs)):
        return None
    if not all(isinstance(size, Dim) for size in spec.inputs[0].shape[2:]):
        return None  # a fixed size cannot be cut; tied axes leave no free rectangle
    probe = _Reach(run, spec, rng)
    radius = probe.radius()
    if radius is not None and all(probe.tiles_equal_whole(axis, radius) for axis in (2, 3)):
        return radius
    return None


def image_step(spec: ModelSpec, axis: int) -> int:
    """Sizes and tile origins along an image axis must be multiples of this for whole output pixels."""
    size, out = spec.inputs[0].shape[axis], spec.outputs[0].shape[axis]
    multiple = size.multiple_of if isinstance(size, Dim) else 1
    return math.lcm(multiple, out.div if isinstance(out, Rule) else 1)


class _Reach:
    def __init__(self, run: Run, spec: ModelSpec, rng: np.random.Generator) -> None:
        self.name, self.out, self.scale = spec.inputs[0].name, spec.outputs[0].name, spec.scale or 1
        self.engine, self.spec, self.rng = run, spec, rng
        self.values: tuple[float, ...] = (np.nan, 1e30, -1e30)

    def run(self, x: Array) -> Array:
        return self.engine({self.name: x})[self.out]

    def image(self, height: int, width: int) -> Array | None:
        """A random input of at least this size, or None where the contract stops below it."""
        shape = []
        for axis, (size, wanted) in enumerate(
            zip(self.spec.inputs[0].shape, (1, 0, height, width), strict=True)
        ):
            if isinstance(size, int):
                shape.append(size)
                continue
            assert isinstance(size, Dim)
            step = image_step(self.spec, axis) if axis >= 2 else 1
            got = step * math.ceil(max(wanted, size.min) / step)
            if not size.allows(got):
                return None
            shape.append(got)
        low, high = self.spec.value_range
        return (low + (high - low) * self.rng.random(shape)).astype(self.spec.inputs[0].dtype)

    def radius(self) -> int | None:
        square = self.image(_SQUARE, _SQUARE)
        if square is None:
            return None
        radii = self.reach(square, (2, 3))
        for axis in (2, 3):
            for length in _LONG:
                if radii[axis] is not None:
                    break
                strip = self.image(*((length, _ACROSS) if axis == 2 else (_ACROSS, length)))
                if strip is None:
                    return None
                radii |= self.reach(strip, (axis,))
        found = [r for r in radii.values() if r is not None]
        return max(found) if len(found) == 2 and min(found) >= 0 else None

    def reach(self, x: Array, axes: tuple[int, ...]) -> dict[int, int | None]:
        """How far a poked pixel shows along each axis; None: up to the border of `x`; -1: not at all.

        Strips are poked across, at every phase of the model's grid.
        """
        plain = self.run(x)
        result: dict[int, int | None] = dict.fromkeys(axes, 0)
        nan_was_enough = True
        for phase in range(max(image_step(self.spec, axis) for axis in axes)):
            at = {a: x.shape[a] // 2 + phase % image_step(self.spec, a) for a in axes}
            where = tuple(at.get(axis, slice(None)) for axis in range(4))
            changed = np.zeros(plain.shape, bool)
            for value in self.values:
                poked = x.copy()
                poked[where] = value
                different = self.run(poked) != plain  # NaN differs from everything
                nan_was_enough &= bool(np.isnan(value) or not (different & ~changed).any())
                changed |= different
                reached = {axis: self.reached(changed, axis) for axis in axes}
                if all(r and (r[0] == 0 or r[1] == x.shape[a] - 1) for a, r in reached.items()):
                    return dict.fromkeys(axes, None)  # which no other value or phase would change
            for axis, span in reached.items():
                if span is None:
                    return dict.fromkeys(axes, -1)  # ignored, or caught: nothing is known
                first, last = span
                before = result[axis]
                if before is None or first == 0 or last == x.shape[axis] - 1:
                    result[axis] = None
                else:
                    result[axis] = max(before, at[axis] - first, last - at[axis])
        if nan_was_enough:
            self.values = (np.nan,)
        return result

    def reached(self, changed: Array, axis: int) -> tuple[int, int] | None:
        """The first and the last input line whose output changed; None if none did."""
        lines = np.flatnonzero(changed.any(axis=tuple(i for i in range(4) if i != axis)))
        return (int(lines[0]) // self.scale, int(lines[-1]) // self.scale) if lines.size else None

    def tiles_equal_whole(self, axis: int, radius: int) -> bool:
        """Whether tiles at both ends and at several places between give the whole picture's pixels.

        The places tell absolute positions and hidden grids, the ends padding that looks at the other side.
        """
        step = image_step(self.spec, axis)
        halo = step * math.ceil(radius / step)
        long = 2 * halo + step * math.ceil(16 / step)
        near = 2 * radius < _SQUARE
        across = _SQUARE // 2 if near else _ACROSS // 2
        whole = self.image(*((2 * long + 8 * step, across) if axis == 2 else (across, 2 * long + 8 * step)))
        if whole is None:
            return False
        length = whole.shape[axis]
        want = self.run(whole)
        limit = 1e-4 * max(1.0, float(np.abs(want).max()))
        middle = step * math.ceil(long / 2 / step)
        places = [middle + step * k for k in ((0, 1, 2, 3, 5, 8) if near else (0, 1))]
        for start in (0, *places, length - long):
            first = start + halo if start else 0
            last = start + long - (halo if start + long < length else 0)
            got = self.run(np.ascontiguousarray(whole.take(range(start, start + long), axis)))
            got = got.take(range((first - start) * self.scale, (last - start) * self.scale), axis)
            if not np.abs(got - want.take(range(first * self.scale, last * self.scale), axis)).max() <= limit:
                return False
        return True
