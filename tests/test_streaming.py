"""Bands against the whole picture: random networks, fixed topologies, every height, and what is refused."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from anysize import (
    Cancelled,
    Dim,
    ExecutionError,
    IntegrityError,
    MemoryBudgetError,
    ModelSpec,
    NotStreamable,
    OptionError,
    Rule,
    TensorSpec,
    Tiling,
    Upscaler,
    load,
)
from anysize.backends import EngineOptions, Executable, Model, get_backend
from anysize.exporters import export
from anysize.exporters.bands import band_model
from anysize.guard import ShapeGuard
from anysize.planning import _ENGINE
from anysize.session import Session
from anysize.stale import RepeatedError
from anysize.streaming import BandRun, BandRunner
from anysize.tiling import parse_bytes, spans
from conftest import ENGINES, ToyBox, needs_bf16
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

GRAPH_ENGINES = [e for e in ENGINES if e != "torch"]


class Net:
    """An ONNX graph grown operator by operator; tensors are (name, channels, rows per picture row)."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self.pool: list[tuple[str, int, Fraction]] = [("x", 3, Fraction(1))]
        self.coarsest = 1

    def add(self, kind: str, inputs: list[str], channels: int, rate: Fraction, **attributes: Any) -> None:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], **attributes))
        self.pool.append((name, channels, rate))
        self.coarsest = math.lcm(self.coarsest, rate.denominator)

    def weight(self, values: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def conv(
        self,
        source: tuple[str, int, Fraction],
        out: int,
        kernel: int = 3,
        dilation: int = 1,
        stride: int = 1,
        padding: str | None = None,
    ) -> None:
        """`padding`: the mode of a Pad in front of it."""
        name, channels, rate = source
        values = self.rng.normal(size=(out, channels, kernel, kernel)) / math.sqrt(channels * kernel**2)
        pad = dilation * (kernel - 1) // 2
        if padding is not None:
            pads = [self.weight(np.array([0, 0, pad, pad] * 2))]
            pads += [self.weight(np.array(0.3, np.float32))] if padding == "constant" else []
            self.add("Pad", [name, *pads], channels, rate, mode=padding)
            name, pad = self.pool.pop()[0], 0  # what only a convolution may read
        self.add(
            "Conv",
            [
                name,
                self.weight(values.astype(np.float32)),
                self.weight(self.rng.normal(size=out).astype("f")),
            ],
            out,
            rate / stride,
            pads=[pad] * 4,
            dilations=[dilation] * 2,
            strides=[stride] * 2,
            kernel_shape=[kernel] * 2,
        )

    def grow(self, kind: int, which: int, other: int) -> None:
        """Apply the operator number `kind` to a tensor of the pool, if it can take it."""
        source = self.pool[-1 - which % len(self.pool)]
        name, channels, rate = source
        partners = [p for p in self.pool if p[1:] == (channels, rate)]
        partner = partners[other % len(partners)][0]
        joinable = [p for p in self.pool if p[2] == rate and p[1] + channels <= 16]
        down, up = rate > Fraction(1, 4), rate < 4
        if kind == 0:
            self.conv(source, 1 + other % 6, (1, 3, 5)[other % 3], 1 + other % 2)
        elif kind == 1 and down:
            self.conv(source, 1 + other % 4, stride=2)
        elif kind == 2:
            simple = ("Relu", "Sigmoid", "Tanh", "Abs", "HardSwish")
            self.add(simple[other % len(simple)], [name], channels, rate)
        elif kind == 3:
            self.add("LeakyRelu", [name], channels, rate, alpha=0.1)
        elif kind == 4:
            slope = self.weight(self.rng.normal(size=(channels, 1, 1)).astype("f"))
            self.add("PRelu", [name, slope], channels, rate)
        elif kind == 5:
            self.add(("Add", "Mul", "Max", "Sub")[other % 4], [name, partner], channels, rate)
        elif kind == 6 and joinable:
            second = joinable[other % len(joinable)]
            self.add("Concat", [name, second[0]], channels + second[1], rate, axis=1)
        elif kind == 7 and up:
            factor = 2 if rate > 1 else 2 + other % 2
            if rate * factor == int(rate * factor) or rate < 1:
                scales = self.weight(np.array([1, 1, factor, factor], np.float32))
                self.add(
                    "Resize",
                    [name, "", scales],
                    channels,
                    rate * factor,
                    mode="nearest",
                    nearest_mode="floor",
                    coordinate_transformation_mode="asymmetric",
                )
        elif kind == 8 and up:
            scales = self.weight(np.array([1, 1, 2, 2], np.float32))
            self.add("Resize", [name, "", scales], channels, rate * 2, mode="linear")
        elif kind == 9 and up and channels % 4 == 0:
            mode = ("CRD", "DCR")[other % 2]
            self.add("DepthToSpace", [name], channels // 4, rate * 2, blocksize=2, mode=mode)
        elif kind == 10 and down and channels <= 4:
            self.add("SpaceToDepth", [name], channels * 4, rate / 2, blocksize=2)
        elif kind == 11 and channels > 1:
            bounds = [self.weight(np.array([v], np.int64)) for v in (other % channels, channels, 1)]
            self.add("Slice", [name, *bounds], channels - other % channels, rate)
        elif kind == 13 and rate <= 2:
            kernel, stride, pad, more = ((4, 2, 1, 0), (3, 2, 1, 1), (2, 2, 0, 0), (3, 1, 1, 0))[other % 4]
            out = 1 + other % 3
            values = self.rng.normal(size=(channels, out, kernel, kernel)) / math.sqrt(4 * channels)
            self.add("ConvTranspose", [name, self.weight(values.astype(np.float32))], out, rate * stride,
                     kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[pad] * 4,
                     output_padding=[more] * 2)  # fmt: skip
        elif kind == 14:
            padding = ("edge", "constant")[other % 2]
            stride = 2 if down and other > 3 else 1
            self.conv(source, 1 + other % 3, (3, 5)[other % 2], 1 + other % 2, stride, padding)
        elif kind == 12:
            low, high = (self.weight(np.array(v, np.float32)) for v in (-0.5, 0.7))
            self.add("Clip", [name, low, high], channels, rate)

    def model(self) -> Model:
        """Close with a convolution to three channels at a whole scale."""
        name, channels, rate = self.pool[-1]
        while rate.denominator > 1:
            scales = self.weight(np.array([1, 1, 2, 2], np.float32))
            self.add("Resize", [name, "", scales], channels, rate * 2, mode="nearest", nearest_mode="floor",
                     coordinate_transformation_mode="asymmetric")  # fmt: skip
            name, channels, rate = self.pool[-1]
        self.conv(self.pool[-1], 3)
        self.nodes[-1].output[0] = "y"
        return graph_model(self.nodes, self.weights, int(rate), self.coarsest)


def graph_model(nodes: list[Any], weights: list[Any], scale: int = 1, step: int = 1) -> Model:
    """An ONNX model with its contract from nodes that turn `x` into `y`."""
    free = ["n", 3, "h", "w"]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, free)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, "oh", "ow"])],
        weights,
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    dtype = np.dtype(np.float32)
    dims = (Dim("h", step, None, step), Dim("w", step, None, step))
    ins = TensorSpec("x", dtype, (Dim("n"), 3, *dims))
    outs = TensorSpec("y", dtype, (Rule("n"), 3, Rule("h", mul=scale), Rule("w", mul=scale)))
    return Model("onnx", made.SerializeToString(), ModelSpec((ins,), (outs,)))


def in_bands(runner: BandRunner, x: np.ndarray, rows: int, strips: Any = None) -> np.ndarray:
    run = BandRun(runner, strips or spans(x.shape[3], x.shape[3], 0, 1))
    try:
        cut = runner.cut(x.shape[2], rows)
        return np.concatenate([run.push(b, x[0, :, b.top : b.bottom]) for b in cut], axis=1)[None]
    finally:
        run.close()


def runner_of(model: Model, engine: str) -> BandRunner:
    return BandRunner(ShapeGuard(get_backend(engine), model, EngineOptions(), "static", 4))


def whole(model: Model, engine: str, x: np.ndarray) -> np.ndarray:
    program = get_backend(engine).compile(model, {"x": x.shape}, EngineOptions())
    return program.run({"x": x})["y"]


def check_equal(net: Net, seed: int, extra: int, rows: int, width: int, engine: str) -> None:
    model = net.model()
    step = net.coarsest
    runner = runner_of(model, engine)
    x = np.random.default_rng(seed).random(
        (1, 3, runner.shortest() + extra * step, width * step), dtype=np.float32
    )
    want = whole(model, engine, x)
    limit = 1e-5 * max(1.0, float(np.abs(want).max()))
    try:
        got = in_bands(runner, x, rows * step)
    except RepeatedError:  # of dead neurons nothing but their offsets comes, so the whole repeats itself too
        lags = range(1, want.shape[2])  # bands are of any height: the first takes what is left over
        repeats = [np.abs(want[:, :, n:] - want[:, :, :-n]).max(axis=(0, 1, 3)).min() for n in lags]
        assert min(repeats) <= limit
        return
    assert got.shape == want.shape
    assert np.abs(got - want).max() <= limit, [n.op_type for n in net.nodes]


steps = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=14)
sizes = (st.integers(0, 23), st.integers(1, 7), st.integers(1, 9))


@pytest.mark.skipif("onnxruntime" not in ENGINES, reason="needs onnxruntime")
@given(st.integers(0, 2**31), steps, *sizes)
@example(0, [(1, 0, 0), (2, 0, 0)], 1, 3, 1)  # dead, and lower than a band
@settings(max_examples=300, deadline=None)
def test_random_networks_in_bands_equal_the_whole(
    seed: int, grown: list[tuple[int, int, int]], extra: int, rows: int, width: int
) -> None:
    net = Net(seed)
    for step in grown:
        net.grow(*step)
    check_equal(net, seed, extra, rows, width, "onnxruntime")


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
@given(st.integers(0, 2**31), steps, *sizes)
@settings(max_examples=40, deadline=None)
def test_random_networks_with_states_inside_the_engine(
    seed: int, grown: list[tuple[int, int, int]], extra: int, rows: int, width: int
) -> None:
    net = Net(seed)
    for step in grown:
        net.grow(*step)
    check_equal(net, seed, extra, rows, width, "openvino")


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_state_joined_to_a_width_that_is_open_twice_streams(engine: str, picture: Any) -> None:
    """OpenVINO's converter refuses a state joined to a linear Resize after SpaceToDepth at an open width."""
    net = Net(0)
    for step in ((0, 0, 0), (10, 0, 0), (8, 0, 0)):
        net.grow(*step)
    session = Session([ShapeGuard(get_backend(engine), net.model(), EngineOptions(), "static", 4)])
    x = picture(300, 280)
    whole, bands = (Upscaler(session, tiling=Tiling(method)) for method in ("whole", "stream"))
    assert np.array_equal(bands(x), whole(x))


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize(
    "name", ["UShaped", "Branches", "Dilated", "Unshuffle", "Nearest", "Convolution", "EncoderDecoder"]
)
def test_fixed_topologies_stream_at_every_height(engine: str, name: str, toybox: ToyBox) -> None:
    session = toybox.session(name, engine, max_live=64)
    step = session.bands().model.step
    for height in range(1, 70, 3):
        x = np.random.default_rng(height).random((height, 17, 3), np.float32)
        bands = Upscaler(session, tiling=Tiling("stream", 8))
        got = bands(x)
        want = Upscaler(session, tiling=Tiling("whole"))(x)
        assert np.abs(got - want).max() <= 1e-5
        radius = session.spec.radius or 0
        if height > 2 * radius + 8 + step:
            assert bands.report.method == "stream"
            assert bands.report.exact


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_kinds_of_pictures_in_bands(engine: str, channels: int, dtype: Any, picture: Any) -> None:
    x = picture(75, 40, channels, dtype)
    if channels in (2, 4):
        x[20:40, 10:30, -1] = 0  # hidden colour, and edges of the transparent
        x[50:60, :, -1] = np.iinfo(dtype).max if np.dtype(dtype).kind == "u" else 1
    upscale = Upscaler("default", backend=engine, tiling=Tiling("stream", 8))
    got = upscale(x)
    assert upscale.report.method == "stream"
    want = Upscaler(upscale.session, tiling=Tiling("whole"))(x)
    assert got.dtype == want.dtype == x.dtype
    step = 0 if np.dtype(dtype).kind == "u" else 1e-6
    assert np.abs(got.astype(np.float64) - want.astype(np.float64)).max() <= step


@needs_bf16
def test_bands_in_bf16_round_where_the_whole_picture_does(picture: Any) -> None:
    """A state that leaves the first graph in f32 made its rows differ by two steps of 8 bits."""
    session = load("default", backend="openvino", precision="bf16")
    x = picture(75, 40, 3, np.float32)
    bands = Upscaler(session, tiling=Tiling("stream", 8))
    got = bands(x)
    assert bands.report.method == "stream"
    assert np.abs(got - Upscaler(session, tiling=Tiling("whole"))(x)).max() <= 1e-4


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_strips_of_columns_are_exact(engine: str, toybox: ToyBox) -> None:
    session = toybox.session("Convolution", engine)  # radius 3
    runner = session.bands()
    x = np.random.default_rng(0).random((1, 3, 40, 61), np.float32)
    want = session.run({"x": x})["output"]
    for core in (5, 16, 40):
        strips = spans(61, core, 3, 1)
        assert len(strips[1]) > 1
        assert np.abs(in_bands(runner, x, 8, strips) - want).max() <= 1e-6


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("WholePicture", "ReduceMean|GlobalAveragePool|InstanceNormalization|Reshape"),
        ("Windows", "Reshape"),
    ],
)
def test_what_cannot_stream_is_named_and_auto_goes_on(name: str, operator: str, toybox: ToyBox) -> None:
    engine = GRAPH_ENGINES[0]
    session = toybox.session(name, engine)
    with pytest.raises(NotStreamable, match=operator):
        Upscaler(session, tiling=Tiling("stream"))(np.zeros((28, 28, 3), np.float32))
    automatic = Upscaler(session)
    automatic(np.zeros((280, 280, 3), np.float32))
    assert automatic.report.method in ("whole", "tile")
    assert "cannot run in bands" in automatic.report.reason


@pytest.mark.parametrize(
    ("kind", "inputs", "attributes", "why"),
    [
        ("GlobalAveragePool", ["x"], {}, "whole picture"),
        ("InstanceNormalization", ["x", "c", "c"], {}, "statistics"),
        ("Softmax", ["x"], {"axis": 2}, "normalises"),
        ("Conv", ["x", "k"], {"kernel_shape": [3, 3]}, "do not keep the picture's size"),
        ("Conv", ["x", "k"], {"auto_pad": "SAME_UPPER"}, "automatic"),
        ("Resize", ["x", "", "s"], {"mode": "cubic"}, "cubic"),
        ("Resize", ["x", "", "s"], {"nearest_mode": "ceil"}, "does not repeat"),
        (
            "Resize",
            ["x", "", "s"],
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            "al",
        ),
        ("Add", ["x", "rows"], {}, "values for each row"),
        ("Resize", ["x", "", "odd"], {"mode": "nearest"}, "whole factors"),
        ("Transpose", ["x"], {"perm": [0, 1, 3, 2]}, "axes"),
        ("Concat", ["x", "x"], {"axis": 2}, "another axis"),
        ("MaxPool", ["x"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]}, "not known"),
        ("BatchNormalization", ["x", "c", "c", "c", "c"], {"training_mode": 1}, "statistics"),
        ("Add", ["x", "two"], {}, "not an NCHW picture"),
    ],
)
def test_operators_that_look_too_far_are_refused(
    kind: str, inputs: list[str], attributes: dict[str, Any], why: str
) -> None:
    arrays = {
        "c": np.ones(3, np.float32),
        "k": np.ones((3, 3, 3, 3), np.float32),
        "s": np.array([1, 1, 2, 2], np.float32),
        "rows": np.ones((1, 1, 240, 1), np.float32),
        "two": np.ones((2, 1, 1, 1), np.float32),
        "odd": np.array([1, 1, 2.004, 2.004], np.float32),
    }
    weights = [numpy_helper.from_array(v, k) for k, v in arrays.items()]
    model = graph_model([helper.make_node(kind, inputs, ["y"], name="culprit", **attributes)], weights)
    with pytest.raises(NotStreamable, match=why):
        band_model(model)


@pytest.mark.parametrize(
    ("pad", "conv", "why"),
    [
        ({"mode": "reflect"}, {}, "border's pixels"),
        ({"also": "Relu"}, {}, "border's pixels"),
        ({"also": "Conv"}, {}, "border's pixels"),
        ({}, {"pads": [1] * 4}, "border's pixels"),
        ({"pads": [0, 1, 1, 1] * 2}, {}, "border's pixels"),
        ({"pads": [0, 0, -1, 1] * 2}, {}, "negative"),
        ({"pads": [0, 0, 2, 1] * 2}, {}, "keep the picture's size"),
        ({"inputs": ["pads", "", "axes"]}, {}, "of some axes only"),
        ({"inputs": ["follows"]}, {}, "computed from the picture"),
        ({"inputs": ["pads", "size"]}, {}, "computed from the picture"),
        ({}, {"inputs": ["wide", "k", "sizes"]}, "weights are computed from the picture"),
        ({"of": "k"}, {"inputs": ["x", "wide"]}, "keep the picture's size"),
    ],
)
def test_padding_that_is_not_one_convolutions_is_refused(
    pad: dict[str, Any], conv: dict[str, Any], why: str
) -> None:
    read = pad.get("inputs", ["pads"])
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Mul", ["shape", "none"], ["more"]),
        helper.make_node("Concat", ["more", "more"], ["follows"], axis=0),
        helper.make_node("Pad", [pad.get("of", "x"), *read], ["wide"], mode=pad.get("mode", "edge")),
        helper.make_node("Slice", ["shape", "one", "four"], ["end"]),  # after the Pad, before what it pads
        helper.make_node("Cast", ["end"], ["sizes"], to=TensorProto.FLOAT),
        helper.make_node("Conv", conv.get("inputs", ["wide", "k"]), ["y"], pads=conv.get("pads", [0] * 4)),
    ]
    if "size" in read:
        nodes.insert(3, helper.make_node("ReduceMax", ["shape"], ["most"], keepdims=0))
        nodes.insert(4, helper.make_node("Cast", ["most"], ["size"], to=TensorProto.FLOAT))
    if "also" in pad:
        nodes.append(helper.make_node(pad["also"], ["wide", "k"][: 1 + (pad["also"] == "Conv")], ["other"]))
    arrays = {
        "pads": np.array(pad.get("pads", [0, 0, 1, 1] * 2)),
        "axes": np.arange(4),
        "none": np.zeros(4, np.int64),
        "one": np.array([1]),
        "four": np.array([4]),
        "k": np.ones((3, 3, 3, 3), np.float32),
    }
    weights = [numpy_helper.from_array(v, k) for k, v in arrays.items()]
    with pytest.raises(NotStreamable, match=why):
        band_model(graph_model(nodes, weights))


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_padding_by_numbers_that_constants_give_streams(engine: str) -> None:
    """As PyTorch's older exporter writes it, which many files are of."""
    nodes = [
        helper.make_node("Constant", [], ["sides"], value_ints=[1, 1, 1, 1]),
        helper.make_node("ConstantOfShape", ["four"], ["none"], value=numpy_helper.from_array(np.array([0]))),
        helper.make_node("Concat", ["sides", "none"], ["torchs"], axis=0),
        helper.make_node("Reshape", ["torchs", "pairs"], ["columns"]),
        helper.make_node("Slice", ["columns", "last", "before", "rows", "back"], ["turned"]),
        helper.make_node("Transpose", ["turned"], ["rows_first"], perm=[1, 0]),
        helper.make_node("Reshape", ["rows_first", "flat"], ["pads"]),
        helper.make_node("Pad", ["x", "pads"], ["wide"], mode="edge"),
        helper.make_node("Conv", ["wide", "k"], ["y"]),
    ]
    numbers = {"four": [4], "pairs": [-1, 2], "last": [-1], "before": [-(2**63) + 1], "rows": [0]}
    numbers |= {"back": [-1], "flat": [-1]}
    weights = [numpy_helper.from_array(np.array(v), k) for k, v in numbers.items()]
    kernel = np.random.default_rng(0).normal(size=(3, 3, 3, 3)).astype("f")
    model = graph_model(nodes, [*weights, numpy_helper.from_array(kernel, "k")])
    x = np.random.default_rng(1).random((1, 3, 23, 9), np.float32)
    got = in_bands(runner_of(model, engine), x, 4)
    assert np.abs(got - whole(model, engine, x)).max() <= 1e-5


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_convolutions_without_offsets_stream_as_they_are_exported(engine: str, tmp_path: Path) -> None:
    """The exporter writes zeros for the offsets, of the type of the picture."""
    import torch

    torch.manual_seed(0)
    net = torch.nn.Conv2d(3, 3, 3, padding=1, padding_mode="replicate", bias=False)
    session = load(export(net, tmp_path / "net.onnx", inputs=[("n", 3, "h", "w")]), backend=engine)
    x = np.random.default_rng(0).random((40, 9, 3), np.float32)
    got, want = (Upscaler(session, tiling=Tiling(method, 8))(x) for method in ("stream", "whole"))
    assert np.abs(got - want).max() <= 1e-6


def test_a_size_that_follows_the_picture_is_refused_where_it_is_used_as_a_value() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "two"], ["rows"]),
        helper.make_node("Cast", ["rows"], ["number"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "number"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.array(2, np.int64), "two")]
    with pytest.raises(NotStreamable, match="depends on the picture's size"):
        band_model(graph_model(nodes, weights))


def test_a_size_that_is_rounded_on_the_way_is_refused() -> None:
    """Down to a multiple of 8 and back: in proportion at multiples of 8 only, and all sizes are taken."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Div", ["shape", "eight"], ["parts"]),
        helper.make_node("Mul", ["parts", "eight"], ["rounded"]),
        helper.make_node("Slice", ["rounded", "axis", "end"], ["sides"]),
        helper.make_node("Slice", ["shape", "start", "axis"], ["channels"]),
        helper.make_node("Concat", ["channels", "sides"], ["small"], axis=0),
        helper.make_node("Resize", ["x", "", "", "small"], ["down"], mode="nearest"),
        helper.make_node("Resize", ["down", "", "", "shape"], ["y"], mode="nearest"),
    ]
    numbers = {"eight": 8, "axis": [2], "end": [4], "start": [0]}
    weights = [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in numbers.items()]
    with pytest.raises(NotStreamable, match="proportion"):
        band_model(graph_model(nodes, weights))


def test_patches_that_are_not_pixels_again_are_refused() -> None:
    shapes = {"six": [1, 3, -1, 8, 3, 8], "three": [1, 192, -1], "four": [1, 3, -1, 24]}
    nodes = [
        helper.make_node("Reshape", ["x", "six"], ["a"]),
        helper.make_node("Transpose", ["a"], ["b"], perm=[0, 1, 3, 5, 2, 4]),
        helper.make_node("Reshape", ["b", "three"], ["c"]),
        helper.make_node("Reshape", ["c", "four"], ["y"]),
    ]
    weights = [numpy_helper.from_array(np.array(v, np.int64), k) for k, v in shapes.items()]
    with pytest.raises(NotStreamable):
        band_model(graph_model(nodes, weights, step=8))


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_alpha_at_the_borders_of_bands(engine: str, rows: int, low: float) -> None:
    """Without lag a band's last row comes out before the alpha below it has been read."""
    net = Net(0)
    net.conv(net.pool[0], 3, kernel=1)
    net.nodes[-1].output[0] = "y"
    model = graph_model(net.nodes, net.weights)
    model = replace(model, spec=replace(model.spec, value_range=(low, 1.0)))
    session = Session([ShapeGuard(get_backend(engine), model, EngineOptions(), "auto", 9)])
    x = np.random.default_rng(0).random((50, 9, 4), np.float32)
    x[..., 3] = np.array([0.3, 1.0, 0.0, 3e-9], np.float32)[np.arange(50) // 4 % 4][:, None]
    bands = Upscaler(session, tiling=Tiling("stream", rows))
    got = bands(x)
    assert bands.report.method == "stream"
    assert np.abs(got - Upscaler(session, tiling=Tiling("whole"))(x)).max() <= 1e-6


def test_a_closed_session_does_not_stream(picture: Any) -> None:
    upscale = Upscaler("default", backend=GRAPH_ENGINES[0], tiling=Tiling("stream", 8))
    upscale.close()
    with pytest.raises(OptionError, match="closed"):
        upscale(picture(60, 20))


def test_a_graph_that_chooses_at_run_time_is_refused() -> None:
    def branch(name: str) -> Any:
        """It reads the picture from outside, so the picture is not among the node's inputs."""
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node("ReduceMean", ["x"], [name], keepdims=1)], name, [], [out])

    nodes = [
        helper.make_node("If", ["yes"], ["mean"], then_branch=branch("a"), else_branch=branch("b")),
        helper.make_node("Sub", ["x", "mean"], ["y"]),
    ]
    with pytest.raises(NotStreamable, match="run time"):
        band_model(graph_model(nodes, [numpy_helper.from_array(np.array(True), "yes")]))


def test_batch_normalisation_at_inference_streams() -> None:
    net = Net(0)
    net.conv(net.pool[0], 5)
    values = [net.weight(net.rng.uniform(0.5, 1, 5).astype("f")) for _ in range(4)]
    net.add("BatchNormalization", [net.pool[-1][0], *values], 5, Fraction(1))
    check_equal(net, 0, 20, 4, 9, GRAPH_ENGINES[0])


def test_three_graphs_are_valid_and_carry_their_contract(toybox: ToyBox) -> None:
    _, model = toybox.make("UShaped")
    bands = band_model(model)
    for part in (bands.first, bands.middle, bands.last):
        onnx.checker.check_model(onnx.load_model_from_string(part.data), full_check=True)
    assert set(bands.middle.states) == {t.name for t in bands.middle.spec.inputs[1:]}
    assert set(bands.middle.states.values()) == {t.name for t in bands.middle.spec.outputs[1:]}
    assert bands.first.states == bands.middle.states
    assert not bands.last.states
    assert [t.name for t in bands.last.spec.outputs] == [model.spec.outputs[0].name]


@pytest.mark.parametrize("height", range(1, 90))
def test_bands_cover_a_height_once(height: int, toybox: ToyBox) -> None:
    runner = toybox.session("UShaped", GRAPH_ENGINES[0]).bands()
    step = runner.model.step
    height *= step
    if height < runner.shortest():
        return
    for rows in (step, 2 * step, 8 * step):
        cut = runner.cut(height, rows)
        assert [b.top for b in cut] == [0, *(b.bottom for b in cut[:-1])]
        assert cut[-1].bottom == height
        assert [b.part for b in cut] == ["first", *["middle"] * (len(cut) - 2), "last"]
        assert all(b.bottom - b.top == rows for b in cut[1:-1])
        assert cut[0].bottom >= runner.model.warm_up


def test_torch_says_why_it_does_not_stream(toybox: ToyBox) -> None:
    if "torch" not in ENGINES:
        pytest.skip("needs torch")
    session = toybox.session("Convolution", "torch")
    with pytest.raises(NotStreamable, match="use openvino or onnxruntime"):
        Upscaler(session, tiling=Tiling("stream"))(np.zeros((50, 50, 3), np.float32))


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_width_compiles_once(engine: str, picture: Any) -> None:
    upscale = Upscaler("default", backend=engine, tiling=Tiling("stream", 16))
    for _ in range(3):
        upscale(picture(93, 40))
    assert upscale.session.stats.compiles == 3  # first, middle and last
    upscale(picture(93 + 16, 40))
    assert upscale.report.compiles == 0
    upscale(picture(93, 41))
    assert upscale.report.compiles == (3 if get_backend(engine).prefers_static else 0)


# -- faults


class Faulty(Executable):
    """Passes everything on, except that the sequence's run number `at` is spoilt by `spoil`."""

    def __init__(self, inner: Executable, at: int, spoil: Any, calls: list[int]) -> None:
        self.inner, self.at, self.spoil = inner, at, spoil
        self.inputs, self.outputs = inner.inputs, inner.outputs
        self.precision, self.device = inner.precision, inner.device
        self.calls = calls

    def run(self, feeds: Any) -> Any:
        return self.inner.run(feeds)

    def sequence(self, links: Any, states: Any) -> Any:
        sequence = self.inner.sequence(links, states)
        run = sequence.run

        def faulty(feeds: Any) -> Any:
            self.calls[0] += 1
            outputs = run(feeds)
            return self.spoil(outputs) if self.calls[0] == self.at else outputs

        sequence.run = faulty
        return sequence


def faulty_session(engine: str, at: int, spoil: Any) -> Session:
    backend = get_backend(engine)
    calls = [0]

    class Backend(type(backend)):  # type: ignore[misc]
        def compile(self, model: Any, shapes: Any, options: Any) -> Any:
            program = super().compile(model, shapes, options)
            return Faulty(program, at, spoil, calls) if model.states else program

    from anysize.sources import open_source

    own = Backend()
    return Session([ShapeGuard(own, open_source("default", own), EngineOptions(), "auto", 4)])


def _nan(outputs: Any) -> Any:
    name = next(iter(outputs))
    spoilt = outputs[name].copy()
    spoilt[0, 0, -1, -1] = np.nan
    return {**outputs, name: spoilt}


def _short(outputs: Any) -> Any:
    name = next(iter(outputs))
    return {**outputs, name: outputs[name][:, :, 1:]}


def _raises(outputs: Any) -> Any:
    raise RuntimeError("the engine's own words")


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize("spoil", [_nan, _short, _raises])
def test_a_fault_in_any_band_is_an_error_and_the_next_call_is_right(
    engine: str, spoil: Any, picture: Any
) -> None:
    x = picture(95, 33)
    want = Upscaler("default", backend=engine, tiling=Tiling("whole"))(x)
    for at in range(1, 5):
        session = faulty_session(engine, at, spoil)
        upscale = Upscaler(session, tiling=Tiling("stream", 16))
        with pytest.raises((IntegrityError, ExecutionError), match="tile") as caught:
            upscale(x)
        assert caught.value.tile == (at, 0)
        assert session.stats.discarded == 1
        np.testing.assert_array_equal(upscale(x), want)
        assert session.stats.compiles == 4  # the program that failed was made anew


def test_cancel_takes_effect_within_a_band(picture: Any) -> None:
    done: list[int] = []
    upscale = Upscaler("default", backend=GRAPH_ENGINES[0], tiling=Tiling("stream", 8))
    with pytest.raises(Cancelled, match="band of rows"):
        upscale(picture(120, 30), progress=lambda a, b: done.append(a), cancel=lambda: len(done) >= 3)
    assert done == [1, 2, 3]


@pytest.mark.skipif(len(GRAPH_ENGINES) < 2, reason="needs two engines that take graphs")
def test_the_named_fallback_does_the_whole_picture_again(picture: Any) -> None:
    x = picture(95, 33)
    broken = faulty_session(GRAPH_ENGINES[0], 2, _raises)
    other = Upscaler("default", backend=GRAPH_ENGINES[1], tiling=Tiling("whole"))
    session = Session([broken._guards[0], other.session._guards[0]])
    upscale = Upscaler(session, tiling=Tiling("stream", 16))
    got = upscale(x)
    assert len(upscale.report.fallbacks) == 1
    assert "engine's own words" in upscale.report.fallbacks[0]
    assert np.abs(got.astype(int) - other(x)).max() <= 1


# -- memory


def test_memory_is_read_as_bytes_or_text() -> None:
    assert parse_bytes("2GiB") == 2**31
    assert parse_bytes("1.5 GB") == 1_500_000_000
    assert parse_bytes("500mb") == 500_000_000
    assert parse_bytes(4096) == 4096
    assert parse_bytes("1tib") == 2**40
    assert parse_bytes(None) is None
    for bad in ("", "2 pints", "-1", 0, "0.1", "GiB", 1.5, True, "9" * 400, "٣GiB"):
        with pytest.raises(OptionError, match="memory"):
            Tiling(memory=bad)


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_memory_limit_narrows_bands_and_then_cuts_strips(engine: str, picture: Any) -> None:
    import psutil

    x = picture(300, 1800)  # of which a strip takes little
    session = Upscaler("default", backend=engine).session
    session(np.zeros((1, 3, 8, 8), np.float32))
    free = Upscaler(session, tiling=Tiling("stream"))
    want = free(x)
    runner = session.bands()
    held = psutil.Process().memory_info().rss
    needs = runner.bytes(300, 1800, 8, 1)
    memory = held + needs // 2 + 16 * x.size + 8 * x.size + _ENGINE
    tight = Upscaler(session, tiling=Tiling("stream", memory=memory))
    np.testing.assert_array_equal(tight(x), want)
    assert tight.report.overlap == session.spec.radius
    assert "strips" in tight.report.reason
    for method in ("stream", "tile", "whole", "auto"):
        with pytest.raises(MemoryBudgetError, match=r"allow [0-9]+ MiB"):
            Upscaler(session, tiling=Tiling(method, memory=held // 2))(x)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize(
    ("method", "shape", "outscale"),
    [("whole", (150, 200, 3), None), ("tile", (400, 300, 4), None), ("tile", (2000, 400, 3), 2)],
)
def test_the_least_memory_that_is_allowed_is_enough(
    engine: str, method: str, shape: tuple[int, ...], outscale: float | None
) -> None:
    """What the refusal says to allow is kept, also where it is little beside what an engine itself takes."""
    code = f"""
import re, numpy as np
from anysize import MemoryBudgetError, Tiling, Upscaler, load
x = np.random.default_rng(0).integers(0, 256, {shape}, dtype=np.uint8)
session, limit, done = load("default", backend={engine!r}), 1, False
while not done:
    try:
        Upscaler(session, tiling=Tiling({method!r}, memory=limit))(x, outscale={outscale})
        done = True
    except MemoryBudgetError as error:
        limit = int(re.search(r"allow ([0-9]+) MiB", str(error))[1]) * 2**20
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(int(peak.split()[1]) * 1024, limit)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, limit = map(int, done.stdout.split())
    assert peak <= limit


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("method", ["auto", "stream", "tile"])
def test_a_memory_limit_is_kept(method: str, tmp_path: Path) -> None:
    """Peak resident memory of a process of its own, for a picture whose whole run would take gigabytes."""
    limit = 600 * 2**20
    code = f"""
from pathlib import Path
import numpy as np
from anysize import Tiling, Upscaler, upscale_file
from anysize.files import write_picture
rng = np.random.default_rng(0)
write_picture(Path({str(tmp_path / "in.png")!r}),
              rng.integers(0, 256, (700, 1900, 3), dtype=np.uint8))
report = upscale_file({str(tmp_path / "in.png")!r}, {str(tmp_path / "out.png")!r},
                      Upscaler(backend={GRAPH_ENGINES[0]!r}, tiling=Tiling({method!r}, memory={limit})))
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM:"))
print(report.method, report.exact, int(peak.split()[1]) * 1024)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    used, exact, peak = done.stdout.split()
    assert used == ("tile" if method == "tile" else "stream")
    assert exact == "True"
    assert int(peak) <= limit
