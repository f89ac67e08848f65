"""A model's shape contract as data: what goes in, what must come out, how far a pixel reaches.

Tensors are named; image tensors are NCHW. The contract travels with every artifact as one JSON text
under the key `SPEC_KEY` (ONNX metadata_props, OpenVINO rt_info).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from anysize.backends.errors import ModelLoadError, ShapeError

SPEC_KEY = "anysize.spec"
_VERSION = 1
_LARGEST = 2**31  # no size or factor of a contract reaches this
_F32 = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Dim:
    """A free axis: valid sizes are the multiples of `multiple_of` from `min` to `max` (None: unbounded)."""

    name: str
    min: int = 1
    max: int | None = None
    multiple_of: int = 1

    def __post_init__(self) -> None:
        if self.multiple_of < 1 or self.min < 1 or (self.max is not None and self.max < self.min):
            raise ValueError(f"impossible dimension {self}")

    def ceil(self, size: int) -> int:
        """The smallest valid size that is not below `size` (which may exceed `max`: then not valid)."""
        return self.multiple_of * math.ceil(max(size, self.min) / self.multiple_of)

    def floor(self, size: int) -> int:
        """The largest multiple not above `size` and `max`; below `min` there is none: returns 0."""
        top = size if self.max is None else min(size, self.max)
        value = top - top % self.multiple_of
        return value if value >= self.min else 0

    def allows(self, size: int) -> bool:
        return size >= 1 and self.floor(size) == size

    def nearest(self, size: int) -> tuple[int, ...]:
        """The valid sizes on either side of `size`."""
        above = self.ceil(size)
        return tuple(s for s in (self.floor(size), above) if s and self.allows(s))

    def __str__(self) -> str:
        parts = [f"{self.name} >= {self.min}"]
        if self.max is not None:
            parts.append(f"<= {self.max}")
        if self.multiple_of > 1:
            parts.append(f"a multiple of {self.multiple_of}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Rule:
    """A size that follows from a free axis: `mul * ((dim + pre) // div) + add`."""

    dim: str
    mul: int = 1
    div: int = 1
    pre: int = 0
    add: int = 0

    def __post_init__(self) -> None:
        if self.div < 1:
            raise ValueError(f"impossible rule {self!r}")

    def __call__(self, size: int) -> int:
        return self.mul * ((size + self.pre) // self.div) + self.add

    def __str__(self) -> str:
        inner = f"{self.dim}+{self.pre}" if self.pre else self.dim
        if self.div > 1:
            inner = f"({inner})//{self.div}" if self.pre else f"{inner}//{self.div}"
        if self.mul > 1:
            inner = f"{self.mul}*{inner}" if inner == self.dim else f"{self.mul}*({inner})"
        return f"{inner}{self.add:+d}" if self.add else inner


Size = int | Dim | Rule


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor. An input's free axes are `Dim`s; `Rule`s tie axes to them; ints are fixed.

    `values`: the least and the largest that an input is given, where those are not the model's `value_range`
    (a timestep, a mask of 0 and 1); engines are held against each other on such.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[Size, ...]
    values: tuple[float, float] | None = None

    def sized(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given sizes of the free axes."""
        return tuple(
            s if isinstance(s, int) else sizes[s.name] if isinstance(s, Dim) else s(sizes[s.dim])
            for s in self.shape
        )

    def __str__(self) -> str:
        sizes = ", ".join(s.name if isinstance(s, Dim) else str(s) for s in self.shape)
        return f"{self.name}: {self.dtype.name}[{sizes}]"


@dataclass(frozen=True)
class ModelSpec:
    """The contract of a model.

    `inputs` hold the free axes, `outputs` the output rule. `value_range`: what image inputs expect and
    image outputs are clipped to. `radius`: how many input pixels away a pixel can still change an output
    pixel, in any direction (None: unknown or unbounded). `tileable`: False when the model looks at the
    whole picture (statistics over HxW, global attention) or knows absolute positions.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    value_range: tuple[float, float] = (0.0, 1.0)
    radius: int | None = None
    tileable: bool = False
    source_sha256: str = ""
    opset: int | None = None
    producer: str = ""

    @property
    def dims(self) -> dict[str, Dim]:
        """The free axes by name."""
        return {s.name: s for t in self.inputs for s in t.shape if isinstance(s, Dim)}

    @property
    def output_rule(self) -> dict[str, tuple[str, ...]]:
        """Each output's sizes as text, such as `("n", "3", "4*h", "4*w")`."""
        return {t.name: tuple(map(str, t.shape)) for t in self.outputs}

    @property
    def channels(self) -> int | None:
        """Channels of the first input if it is an NCHW image, else None."""
        shape = self.inputs[0].shape
        return shape[1] if len(shape) == 4 and isinstance(shape[1], int) else None

    @property
    def scale(self) -> int | None:
        """Output pixels per input pixel along H and W for one image in, one image out; else None.

        Derived from the output rule, so it cannot disagree with it. Holds for sizes that are multiples
        of the rule's divisor.
        """
        if len(self.inputs) != 1 or len(self.outputs) != 1:
            return None
        ins, outs = self.inputs[0].shape, self.outputs[0].shape
        if len(ins) != 4 or len(outs) != 4:
            return None
        factors = set()
        for axis in (0, 2, 3):
            size, out = ins[axis], outs[axis]
            if isinstance(size, int) and isinstance(out, int) and size and out % size == 0:
                factor = out // size
            elif (
                not isinstance(out, Rule)
                or isinstance(size, int)
                or out.dim != (size.name if isinstance(size, Dim) else size.dim)
                or out.add
                or out.mul % out.div
            ):
                return None
            else:
                factor = out.mul // out.div if out.pre < out.div else 0
            if axis == 0 and factor != 1:
                return None
            factors |= {factor} if axis else set()
        return factors.pop() if len(factors) == 1 and min(factors) > 0 else None

    def bind(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Check the shapes of all inputs; return the size of every free axis. Raises `ShapeError`."""
        sizes: dict[str, int] = {}
        for tensor in self.inputs:
            if tensor.name not in shapes:
                given = ", ".join(map(str, shapes)) or "nothing"
                raise ShapeError(tensor.name, None, given, "this input is required")
        for name in shapes:
            if all(name != t.name for t in self.inputs):
                known = ", ".join(t.name for t in self.inputs)
                raise ShapeError(name, None, "a tensor", f"the model's inputs are {known}")
        for tensor in self.inputs:
            shape = shapes[tensor.name]
            if len(shape) != len(tensor.shape):
                raise ShapeError(tensor.name, None, tuple(shape), f"expected {tensor}")
            for axis, (got, size) in enumerate(zip(shape, tensor.shape, strict=True)):
                if isinstance(size, int) and got != size:
                    raise ShapeError(tensor.name, axis, got, f"must be {size}", (size,))
                if isinstance(size, Dim):
                    if not size.allows(got):
                        raise ShapeError(tensor.name, axis, got, f"must be {size}", size.nearest(got))
                    if sizes.setdefault(size.name, got) != got:
                        want = sizes[size.name]
                        raise ShapeError(tensor.name, axis, got, f"must equal {size.name}={want}", (want,))
        for tensor in self.inputs:
            for axis, (got, size) in enumerate(zip(shapes[tensor.name], tensor.shape, strict=True)):
                if isinstance(size, Rule) and got != (want := size(sizes[size.dim])):
                    rule = f"must be {size} = {want} where {size.dim} = {sizes[size.dim]}"
                    raise ShapeError(tensor.name, axis, got, rule, (want,))
        return sizes

    def input_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The inputs' shapes for given sizes of the free axes."""
        return {t.name: t.sized(sizes) for t in self.inputs}

    def output_shapes(self, sizes: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """The outputs' shapes for given sizes of the free axes (as `bind` returns them)."""
        return {t.name: t.sized(sizes) for t in self.outputs}

    def to_json(self) -> str:
        def tensor(t: TensorSpec) -> dict[str, Any]:
            shape = [s if isinstance(s, int) else {type(s).__name__: asdict(s)} for s in t.shape]
            values = {} if t.values is None else {"values": t.values}
            return {"name": t.name, "dtype": t.dtype.name, "shape": shape, **values}

        fields = {k: v for k, v in self.__dict__.items() if k not in ("inputs", "outputs")}
        tensors = {k: [tensor(t) for t in getattr(self, k)] for k in ("inputs", "outputs")}
        return json.dumps({"version": _VERSION, **tensors, **fields})

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Raises `ModelLoadError` for anything `to_json` could not have written."""
        try:
            data = json.loads(text)
            if data.pop("version") != _VERSION:
                raise ValueError(f"version is not {_VERSION}")
            data["inputs"] = tuple(map(_tensor, data["inputs"]))
            data["outputs"] = tuple(map(_tensor, data["outputs"]))
            data["value_range"] = low, high = bounds(data["value_range"])
            spec = cls(**data)
            if not spec.inputs or not spec.outputs or not np.float32(low) < np.float32(high):
                raise ValueError("no inputs, no outputs, or an empty value range")
            if spec.radius is not None and not (type(spec.radius) is int and 0 <= spec.radius < _LARGEST):
                raise ValueError(f"radius {spec.radius!r}")
            texts = (spec.source_sha256, spec.producer)
            if not all(type(t) is str for t in texts) or type(spec.opset) not in (int, type(None)):
                raise ValueError(f"source, producer or opset {(*texts, spec.opset)!r}")
            if not isinstance(spec.tileable, bool):
                raise ValueError(f"tileable {spec.tileable!r}")
            rules = {s.dim for t in (*spec.inputs, *spec.outputs) for s in t.shape if isinstance(s, Rule)}
            if unknown := rules - set(spec.dims):
                raise ValueError(f"rules on unknown dimensions {sorted(unknown)}")
            return spec
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ModelLoadError(f"the model's embedded contract is damaged: {error}") from error


def bounds(values: Any) -> tuple[float, float]:
    """The least and the largest of values that are computed in f32, as is their difference.

    Raises `ValueError` or `TypeError` for all else.
    """
    low, high = values
    if not {type(low), type(high)} <= {int, float} or not low <= high or not high - low <= _F32:
        raise ValueError(f"values {values!r}")
    if max(-low, high) > _F32:
        raise ValueError(f"values {values!r}")
    return float(low), float(high)


def _tensor(data: Mapping[str, Any]) -> TensorSpec:
    def size(value: Any) -> Size:
        if type(value) is int and 0 < value < _LARGEST:
            return value
        ((kind, fields),) = value.items()
        names = {k: v for k, v in fields.items() if k in ("name", "dim")}
        numbers = {k: v for k, v in fields.items() if k not in names and not (k == "max" and v is None)}
        signed = numbers.pop("add", 0)
        if not all(type(v) is str for v in names.values()) or type(signed) is not int:
            raise ValueError(f"size {value!r}")
        if not all(type(v) is int and 0 <= v < _LARGEST for v in (abs(signed), *numbers.values())):
            raise ValueError(f"size {value!r}")
        kinds: dict[str, type[Dim] | type[Rule]] = {"Dim": Dim, "Rule": Rule}
        return kinds[kind](**fields)

    values = data.get("values")
    if values is not None:
        values = bounds(values)
    return TensorSpec(str(data["name"]), np.dtype(data["dtype"]), tuple(map(size, data["shape"])), values)
