"""The contract as data."""

from __future__ import annotations

import json

import numpy as np
import pytest
from anysize import Dim, ModelLoadError, ModelSpec, Rule, ShapeError, TensorSpec
from hypothesis import given
from hypothesis import strategies as st
from toys import image_spec


@given(
    st.integers(1, 50), st.integers(1, 12), st.one_of(st.none(), st.integers(0, 100)), st.integers(-2, 300)
)
def test_dim_ceil_floor_nearest(least: int, multiple: int, extra: int | None, size: int) -> None:
    dim = Dim("h", least, None if extra is None else least + extra + multiple, multiple)
    valid = [
        s for s in range(1, 400) if s % multiple == 0 and s >= least and (dim.max is None or s <= dim.max)
    ]
    assert [s for s in range(-3, 400) if dim.allows(s)] == valid
    assert dim.floor(size) == max((s for s in valid if s <= size), default=0)
    assert dim.ceil(size) >= max(size, least)
    assert all(s in valid for s in dim.nearest(size))


@pytest.mark.parametrize(
    ("rule", "text", "pairs"),
    [
        (Rule("h"), "h", {5: 5}),
        (Rule("h", 4), "4*h", {5: 20}),
        (Rule("h", 4, 4), "4*(h//4)", {7: 4, 8: 8}),
        (Rule("h", 4, 4, 3), "4*((h+3)//4)", {7: 8, 8: 8, 9: 12}),
        (Rule("h", 1, 2, 1, -1), "(h+1)//2-1", {9: 4}),
    ],
)
def test_rules(rule: Rule, text: str, pairs: dict[int, int]) -> None:
    assert str(rule) == text
    assert {s: rule(s) for s in pairs} == pairs


def test_json_round_trip() -> None:
    spec = image_spec(scale=4, multiple=2, radius=18)
    assert ModelSpec.from_json(spec.to_json()) == spec
    assert spec.scale == 4
    assert spec.channels == 3


def damage(**changes: object) -> str:
    data = json.loads(image_spec().to_json())
    return json.dumps(data | changes)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "null",
        '{"version": 1}',
        damage(version=99),
        damage(inputs=[]),
        damage(value_range=[1, 0]),
        damage(value_range=[0, float("inf")]),
        damage(value_range=[-float("inf"), float("inf")]),
        damage(value_range=[float("nan"), 1]),
        damage(value_range=[-1.7e308, 1.7e308]),
        damage(value_range=[-3e38, 3e38]),
        damage(value_range=[0, 10**400]),
        damage(value_range=["0", "1"]),
        damage(value_range="01"),
        damage(value_range=[False, True]),
        damage(value_range=[1, 1 + 1e-12]),
        damage(source_sha256=[1]),
        damage(producer=5),
        damage(opset="17"),
        damage(inputs=[{"name": "x", "dtype": "float32", "shape": [1], "values": [-3e38, 3e38]}]),
        damage(radius="far"),
        damage(radius=-1),
        damage(tileable="yes"),
        damage(surprise=1),
        damage(outputs=[{"name": "y", "dtype": "float32", "shape": [{"Rule": {"dim": "z"}}]}]),
        damage(outputs=[{"name": "y", "dtype": "nonsense", "shape": [1]}]),
        damage(outputs=[{"name": "y", "dtype": "float32", "shape": [{"Rule": {"dim": "h", "div": 0}}]}]),
        damage(inputs=[{"name": "x", "dtype": "float32", "shape": [{"Dim": {"name": "h", "min": 0}}]}]),
        damage(inputs=[{"name": "x", "dtype": "float32", "shape": [True]}]),
        damage(inputs=[{"name": "x", "dtype": "float32", "shape": [0]}]),
        damage(inputs=[{"name": "x", "dtype": "float32", "shape": [{"Dim": {"name": "h", "min": 10**12}}]}]),
        damage(outputs=[{"name": "y", "dtype": "float32", "shape": [{"Rule": {"dim": "h", "mul": "2"}}]}]),
        damage(outputs=[{"name": "y", "dtype": "float32", "shape": [{"Rule": {"dim": "h", "mul": -1}}]}]),
        damage(radius=True),
        "[" * 100_000,
        damage(inputs=[{"name": "x", "dtype": "float32", "shape": [{"Dim": {"name": ["h"]}}]}]),
    ],
)
def test_damaged_json_is_a_load_error(text: str) -> None:
    with pytest.raises(ModelLoadError):
        ModelSpec.from_json(text)


def test_bind_names_the_axis_and_the_nearest_sizes() -> None:
    spec = image_spec(multiple=8)
    assert spec.bind({"x": (2, 3, 16, 24)}) == {"n": 2, "h": 16, "w": 24}
    for shape, axis, nearest in (
        ((1, 3, 20, 24), 2, (16, 24)),
        ((1, 3, 3, 24), 2, (8,)),
        ((1, 4, 16, 24), 1, (3,)),
        ((0, 3, 16, 24), 0, (1,)),
        ((1, 3, 16), None, ()),
    ):
        with pytest.raises(ShapeError) as caught:
            spec.bind({"x": shape})
        assert (caught.value.axis, caught.value.nearest) == (axis, nearest)
        assert isinstance(caught.value, ValueError)
    for shapes in ({}, {"y": (1, 3, 8, 8)}, {"x": (1, 3, 8, 8), "y": (1,)}):
        with pytest.raises(ShapeError):
            spec.bind(shapes)


def test_scale_is_only_that_of_pictures() -> None:
    f32 = np.dtype(np.float32)
    image = TensorSpec("x", f32, (1, 3, Dim("h"), Dim("w")))

    def scale(*sizes: object) -> int | None:
        return ModelSpec((image,), (TensorSpec("y", f32, sizes),)).scale

    assert scale(1, 3, Rule("h", 2), Rule("w", 2)) == 2
    assert scale(1, 3, Rule("h", 4, 4), Rule("w", 4, 4)) == 1
    assert scale(1, 3, Rule("h", 2), Rule("w", 3)) is None
    assert scale(1, 3, Rule("h", 1, 1, 0, -2), Rule("w", 1, 1, 0, -2)) is None
    assert scale(1, 3, Rule("h", 1, 2), Rule("w", 1, 2)) is None
    assert scale(1, 3, 8, 8) is None
    assert scale(1, 5) is None
