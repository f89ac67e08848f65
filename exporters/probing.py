"""Find a model's contract by running it: valid sizes, tied axes, output rule.

Works on anything that maps named arrays to named arrays, so it knows neither architecture nor engine.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import numpy as np
from anysize.backends.base import Array
from anysize.backends.errors import ExportError
from anysize.backends.spec import Dim, ModelSpec, Rule, Size, TensorSpec
from anysize.exporters.radius import Run, measure_radius

#: the inputs; of their free axes (`Dim`), which sizes are worth a try
Templates = Sequence[TensorSpec]

_BASES = tuple(dict.fromkeys((16, 32, 64, 24, 48, 96, 128, 224, 256, 512, *range(1, 130))))
_RATIOS = (Fraction(1), Fraction(2), Fraction(1, 2), Fraction(4), Fraction(1, 4), Fraction(8), Fraction(1, 8))
_SCAN_LIMITS = (18, 36, 72, 144, 288, 576)
_LARGEST = 512


def probe(
    run: Run,
    templates: Templates,
    *,
    example: Mapping[str, int] | None = None,
    value_range: tuple[float, float] = (0.0, 1.0),
    radius: bool = True,
) -> ModelSpec:
    """Probe `run` at many sizes and return what it obeys.

    `example`: sizes of the named axes that are known to work (found by trial where not given).
    An axis that starts as free but works at one size only becomes fixed. Raises `ExportError` if no
    valid size is found or the sizes follow no rule the contract can hold.
    """
    return _Probe(run, templates, value_range).spec(dict(example or {}), radius)


class _Probe:
    def __init__(self, run: Run, templates: Templates, value_range: tuple[float, float]) -> None:
        self.run, self.templates, self.value_range = run, templates, value_range
        self.hints = {s.name: s for t in templates for s in t.shape if isinstance(s, Dim)}
        self.names = list(dict.fromkeys(name for t in templates for name in _free(t)))
        first_axes = {t.shape[0].name for t in templates if len(t.shape) > 1 and isinstance(t.shape[0], Dim)}
        self.batch = [n for n in self.names if n in first_axes]
        self.seen: dict[tuple[int, ...], dict[str, Array] | None] = {}
        self.ties: dict[str, Rule] = {}
        self.fixed: dict[str, int] = {}
        self.dtypes: dict[str, np.dtype[Any]] = {}
        self.error: Exception | None = None
        self.rng = np.random.default_rng(0)

    # -- running at one size

    def feeds(self, sizes: Mapping[str, int]) -> dict[str, Array]:
        return {t.name: noise(t, sizes, self.value_range, self.rng) for t in self.templates}

    def complete(self, sizes: Mapping[str, int]) -> dict[str, int] | None:
        """Add the tied axes' sizes; None if one would not be whole."""
        full = {**self.fixed, **sizes}
        for name, rule in self.ties.items():
            if full[rule.dim] % rule.div:
                return None
            full[name] = rule(full[rule.dim])
        return full

    def attempt(self, sizes: Mapping[str, int]) -> dict[str, Array] | None:
        """Output shapes (as arrays of ints) at these sizes, or None where the model does not work."""
        full = self.complete(sizes)
        if full is None:
            return None
        if not all(dim.allows(full[name]) for name, dim in self.hints.items()):
            return None
        key = tuple(full[n] for n in self.names)
        if key not in self.seen:
            self.seen[key] = self._attempt(full)
        return self.seen[key]

    def _attempt(self, sizes: Mapping[str, int]) -> dict[str, Array] | None:
        try:
            outputs = self.run(self.feeds(sizes))
        except Exception as error:  # whatever the model or its engine raises at a size it cannot take
            self.error = error
            return None
        if any(o.size == 0 or not np.isfinite(o).all() for o in outputs.values()):
            return None
        self.dtypes = {name: o.dtype for name, o in outputs.items()}
        return {name: np.array(o.shape) for name, o in outputs.items()}

    # -- the steps

    def spec(self, example: dict[str, int], radius: bool) -> ModelSpec:
        base = self.find_base(example)
        self.find_ties(base)
        free = {n: s for n, s in base.items() if n not in self.ties and n not in self.fixed}
        dims = {name: self.scan(name, free) for name in free}
        least = self.least(dims, free)
        dims = {name: replace(dim, min=least[name]) for name, dim in dims.items()}
        for name, dim in dims.items():
            if name not in self.batch:
                dims[name] = replace(dim, max=self.maximum(dim, free[name], least))
        outputs = self.fit_outputs(free, dims)
        inputs = tuple(
            replace(t, shape=tuple(self.size(s.name, dims) if isinstance(s, Dim) else s for s in t.shape))
            for t in self.templates
        )
        seen: set[str] = set()
        inputs = tuple(replace(t, shape=_repeats_as_rules(t.shape, seen)) for t in inputs)
        spec = ModelSpec(inputs, outputs, self.value_range)
        if radius and spec.scale is not None:
            try:
                reach = measure_radius(self.run, spec, self.rng)
            except Exception:  # it takes squares of a size, but no strips that long: then nothing is known
                reach = None
            spec = replace(spec, radius=reach, tileable=reach is not None)
        return spec

    def size(self, name: str, dims: Mapping[str, Dim]) -> Size:
        return self.fixed[name] if name in self.fixed else self.ties.get(name) or dims[name]

    def find_base(self, example: dict[str, int]) -> dict[str, int]:
        if set(example) >= set(self.names):
            if self.attempt(example) is None:
                raise ExportError(f"the model does not run at the example's sizes {example}: {self.error}")
            return {n: example[n] for n in self.names}
        # Axes of later inputs may be a ratio of the first one's: try the ratios once equal sizes failed.
        first, *later = map(_free, self.templates)
        for ratios in itertools.product(_RATIOS, repeat=min(len(later), 2)):
            for size in (*_BASES, *self.required()):
                sizes = dict.fromkeys(self.names, Fraction(size))
                for axes, ratio in zip(later, ratios, strict=False):
                    sizes.update({a: size * ratio for a in axes if a not in first})
                sizes.update(dict.fromkeys(self.batch, Fraction(1)))
                if any(s.denominator > 1 for s in sizes.values()):
                    continue
                trial = {n: int(s) for n, s in sizes.items()} | example
                if self.attempt(trial) is not None:
                    return trial
        raise ExportError(
            f"the model ran at none of the sizes tried; give an example input. Last error: {self.error}"
        )

    def required(self) -> list[int]:
        """The least sizes that were declared, where those that are always tried do not reach."""
        least = max((hint.ceil(hint.min) for hint in self.hints.values()), default=1)
        step = math.lcm(*(hint.multiple_of for hint in self.hints.values()))
        return [least, -(-least // step) * step]

    def find_ties(self, base: dict[str, int]) -> None:
        """Which axes cannot move alone: tied to an earlier one, or fixed."""
        for i, name in enumerate(self.names):
            # Moving a little alone proves nothing: a pooling may floor the difference away.
            if all(self.attempt(base | {name: base[name] * k}) is not None for k in (2, 3)):
                continue
            for other in self.names[:i]:
                if other in self.ties or other in self.fixed or (other in self.batch) != (name in self.batch):
                    continue
                joint = [base | {n: base[n] * k for n in (other, name)} for k in (2, 3)]
                if all(self.attempt(sizes) is not None for sizes in joint):
                    ratio = Fraction(base[name], base[other])
                    self.ties[name] = Rule(other, ratio.numerator, ratio.denominator)
                    break
        # An axis that moves neither alone nor as the leader of a tie is fixed.
        leaders = {rule.dim for rule in self.ties.values()}
        for name in self.names:
            if name in self.ties or name in leaders:
                continue
            others = self.other_sizes(name, base[name])
            if all(self.attempt({**base, **self.follow(base), name: s}) is None for s in others):
                self.fixed[name] = base[name]

    def follow(self, base: Mapping[str, int]) -> dict[str, int]:
        return {name: rule(base[rule.dim]) for name, rule in self.ties.items()}

    def other_sizes(self, name: str, size: int) -> list[int]:
        if name in self.batch:
            return [s for s in (1, 2, 3) if s != size]
        steps = (1, 2, 3, 4, 5, 7, 8, 16, 32, 64)
        near = [size + sign * step for step in steps for sign in (1, -1)]
        return [s for s in (*near, 2 * size, size // 2, 3 * size) if s > 0 and s != size]

    def scan(self, name: str, base: Mapping[str, int]) -> Dim:
        """Minimum and multiple of a free axis (of a batch axis also the maximum), the others at base."""

        def works(size: int) -> bool:
            return self.attempt({**base, name: size}) is not None

        if name in self.batch:
            sizes = [s for s in (1, 2, 3) if works(s)]
            return Dim(name, min=sizes[0], max=None if 3 in sizes else sizes[-1])
        hint = self.hints[name]
        enough = 3 if hint.multiple_of == 1 else 2
        for limit in _SCAN_LIMITS:
            valid = [s for s in range(1, limit + 1) if works(s)]
            tail = [s for s in valid if s > limit // 2]
            multiple = math.gcd(*tail) if tail else 0
            # Three in the upper half show the step, or two one that was declared; every multiple there that
            # is worth a try must be one of them.
            tried = [s for s in range(limit // 2 + 1, limit + 1) if hint.allows(s)]
            if len(tail) >= enough and tail == [s for s in tried if s % multiple == 0]:
                break
        else:
            raise ExportError(f"axis '{name}': the sizes that work follow no rule: {valid or 'none'}")
        least = tail[0]
        while least - multiple in valid:
            least -= multiple
        return Dim(name, least, None, multiple)

    def least(self, dims: Mapping[str, Dim], base: Mapping[str, int]) -> dict[str, int]:
        """The least sizes that work together: statistics over a picture may need more than a single pixel."""
        least = {name: dim.min for name, dim in dims.items()}
        while self.attempt(least) is None:
            free = [name for name in least if name not in self.batch]
            grown = least | {n: min(least[n] + dims[n].multiple_of, base[n]) for n in free}
            if grown == least:
                raise ExportError(f"the sizes that work depend on one another: {least} do not: {self.error}")
            least = grown
        return least

    def maximum(self, dim: Dim, base: int, least: Mapping[str, int]) -> int | None:
        """The largest size that works, by bisection; None if `_LARGEST` does. The others at their least."""

        def works(size: int) -> bool:
            return self.attempt({**least, dim.name: size}) is not None

        good, bad = max(base, dim.min), dim.ceil(_LARGEST)
        if works(bad):
            return None
        while bad - good > dim.multiple_of:
            middle = dim.ceil((good + bad) // 2)
            middle = middle if middle < bad else bad - dim.multiple_of
            if works(middle):
                good = middle
            else:
                bad = middle
        return good

    def fit_outputs(self, base: Mapping[str, int], dims: Mapping[str, Dim]) -> tuple[TensorSpec, ...]:
        for joint in _joint_sizes(dims, self.batch):
            self.attempt(joint)
        points = [
            (dict(zip(self.names, key, strict=True)), shapes)
            for key, shapes in self.seen.items()
            if shapes is not None and self.inside(dict(zip(self.names, key, strict=True)), dims)
        ]
        _, reference = points[0]
        outputs = []
        for name, shape in reference.items():
            if any(len(shapes[name]) != len(shape) for _, shapes in points):
                raise ExportError(f"output '{name}' changes its rank with the input's size")
            sizes = [
                _fit_axis(
                    [(at, int(shapes[name][axis])) for at, shapes in points],
                    dims,
                    f"output '{name}' axis {axis}",
                )
                for axis in range(len(shape))
            ]
            outputs.append(TensorSpec(name, self.dtypes[name], tuple(sizes)))
        return tuple(outputs)

    def inside(self, sizes: Mapping[str, int], dims: Mapping[str, Dim]) -> bool:
        return all(dim.allows(sizes[name]) for name, dim in dims.items())


def noise(
    tensor: TensorSpec, sizes: Mapping[str, int], value_range: tuple[float, float], rng: np.random.Generator
) -> Array:
    """Uniform noise for an input in its own range of values, or else in the model's."""
    low, high = tensor.values or value_range
    shape = tensor.sized(sizes)
    if tensor.dtype.kind in "biu":
        return rng.integers(int(low), int(high), shape, endpoint=True).astype(tensor.dtype)
    return (low + (high - low) * rng.random(shape, np.float32)).astype(tensor.dtype)


def _free(tensor: TensorSpec) -> list[str]:
    return [size.name for size in tensor.shape if isinstance(size, Dim)]


def _repeats_as_rules(shape: tuple[Size, ...], seen: set[str]) -> tuple[Size, ...]:
    """A Dim stands once in the contract, at its first axis; its later axes say they equal it."""
    sizes: list[Size] = []
    for size in shape:
        if isinstance(size, Dim):
            sizes.append(Rule(size.name) if size.name in seen else size)
            seen.add(size.name)
        else:
            sizes.append(size)
    return tuple(sizes)


def _joint_sizes(dims: Mapping[str, Dim], batch: Sequence[str]) -> list[dict[str, int]]:
    """A few valid sizes in which all axes differ from one another."""
    joints = []
    for k, start in enumerate((13, 22, 37)):
        wanted = {name: k + 1 if name in batch else start + 6 * i for i, name in enumerate(dims)}
        joints.append({name: clip(dim, wanted[name]) for name, dim in dims.items()})
    return joints


def batch_axis(spec: ModelSpec) -> str:
    """The name of the batch axis; "" where batches have a fixed size."""
    first = spec.inputs[0].shape
    return first[0].name if len(first) > 1 and isinstance(first[0], Dim) else ""


def clip(dim: Dim, size: int) -> int:
    """The valid size at or above `size`, or below it where there is none above."""
    above = dim.ceil(size)
    return above if dim.allows(above) else dim.floor(size) or dim.ceil(dim.min)


def _fit_axis(points: list[tuple[dict[str, int], int]], dims: Mapping[str, Dim], what: str) -> int | Rule:
    """The int or the `Rule` that gives every observed size of one output axis."""
    if len({size for _, size in points}) == 1:
        return points[0][1]
    for name, dim in dims.items():
        pairs = sorted({(at[name], size) for at, size in points})
        if len({s for s, _ in pairs}) == len(pairs) and (rule := _fit_rule(name, pairs, dim)):
            return rule
    raise ExportError(f"{what} follows no rule of one input axis: {[s for _, s in points[:8]]}")


def _fit_rule(name: str, pairs: list[tuple[int, int]], dim: Dim) -> Rule | None:
    """The simplest `Rule` through all (size, output size) pairs."""
    by_size = dict(pairs)
    for div in range(1, 65):
        steps = [(s, s + k * div) for s in by_size for k in range(1, 9) if s + k * div in by_size]
        slopes = {Fraction((by_size[b] - by_size[a]) * div, b - a) for a, b in steps}
        if len(slopes) != 1:
            continue
        (slope,) = slopes
        if slope.denominator > 1 or slope < 1:
            continue
        mul = int(slope)
        for pre in range(div):
            size, output = pairs[0]
            rule = Rule(name, mul, div, pre, output - mul * ((size + pre) // div))
            if all(rule(s) == o for s, o in pairs):
                return _simplest(rule, dim)
    return None


def _simplest(rule: Rule, dim: Dim) -> Rule:
    """The same sizes without a floor where the axis only takes multiples of the divisor."""
    if dim.multiple_of % rule.div == 0 and rule.mul % rule.div == 0:
        return Rule(rule.dim, rule.mul // rule.div, 1, 0, rule.add)
    return rule
