"""Tiles in lockstep: statistics of the whole picture, and its result, without ever holding it whole."""

from __future__ import annotations

import re
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import anysize
import numpy as np
import onnx
import pytest
import torch
import toys
from anysize import (
    Cancelled,
    ExecutionError,
    IntegrityError,
    MemoryBudgetError,
    NotStreamable,
    OptionError,
    Tiling,
    TimedOut,
    Upscaler,
    time_limit,
)
from anysize.backends import get_backend
from anysize.exporters import export
from anysize.lockstep import LockstepRun, LockstepRunner
from anysize.session import Session
from conftest import ENGINES, ToyBox, needs_bf16
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper
from test_faults import Stale
from torch import nn
from torch.nn import functional as F

GRAPHS = [name for name in ENGINES if name != "torch"]


class Everything(nn.Module):
    """Each kind of operator that stages know, between normalisations, at several rates."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.head = nn.Conv2d(3, 8, 5, padding=2)
        self.first = nn.InstanceNorm2d(8, affine=True)
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.second = nn.GroupNorm(4, 16)
        self.dilated = nn.Conv2d(16, 16, 3, padding=2, dilation=2, padding_mode="replicate")
        self.gate = nn.Conv2d(16, 16, 1)
        self.up = nn.Conv2d(24, 12, 3, padding=1, padding_mode="reflect")
        self.slopes = nn.PReLU(12)
        self.norm = nn.BatchNorm2d(12)
        self.tail = nn.Conv2d(18, 3, 7, padding=3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.leaky_relu(self.first(self.head(x)), 0.1)
        b = F.gelu(self.second(self.down(a)))
        b = b + self.dilated(b) * torch.sigmoid(self.gate(b.mean((2, 3), keepdim=True)))
        b = torch.maximum(F.max_pool2d(b, 3, 1, 1), b - b.amax((2, 3), keepdim=True))
        b = F.interpolate(b, x.shape[2:], mode="bilinear", align_corners=True)
        c = self.norm(self.slopes(self.up(torch.cat((a, b), 1))))
        d = F.avg_pool2d(F.pixel_shuffle(c, 2), 2, 2)
        e = F.interpolate(F.interpolate(d, scale_factor=2.0, mode="bilinear"), x.shape[2:], mode="nearest")
        return torch.tanh(self.tail(torch.cat((c, d, e), 1)))


def run(runner: LockstepRunner, x: np.ndarray, rows: int) -> np.ndarray:
    """The whole output of (C, H, W); every row is put once, from the top down."""
    shape = runner.model.shapes(*x.shape[1:])[runner.model.output][1:]
    result, puts = np.full(shape, np.nan, np.float32), []

    def put(top: int, values: np.ndarray) -> None:
        puts.append((top, top + values.shape[1]))
        result[:, top : top + values.shape[1]] = values

    lockstep = LockstepRun(runner, x, rows)
    lockstep.run(put)
    lockstep.close()
    assert [0, *(end for _, end in puts)] == [*(begin for begin, _ in puts), shape[1]]
    return result


@pytest.fixture(scope="module", params=GRAPHS)
def everything(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    file = tmp_path_factory.mktemp("lockstep") / "everything.onnx"
    export(Everything().eval(), file, inputs=[("n", 3, "h", "w")])
    session = anysize.load(file, backend=request.param, options=anysize.Options(shapes="dynamic"))
    return session, session.lockstep()


@settings(max_examples=25, deadline=None)
@given(size=st.tuples(st.integers(8, 120), st.integers(8, 60)), rows=st.integers(1, 130))
def test_equals_the_whole(everything: tuple, size: tuple[int, int], rows: int) -> None:
    session, runner = everything
    x = np.random.default_rng(size[0]).random((3, *size), np.float32)
    want = session(x[None])[0]
    assert np.abs(run(runner, x, rows) - want).max() <= 2e-5


@pytest.mark.parametrize("align_corners", [0, 1])
def test_animegan(align_corners: int, toybox: ToyBox) -> None:
    file = toybox.file("Anime", align_corners=align_corners)
    picture = np.random.default_rng(0).random((203, 150, 3), np.float32)
    engine = GRAPHS[align_corners % len(GRAPHS)]  # all pairs, on larger pictures: benchmarks/styles.py
    whole = anysize.Stylizer(file, backend=engine, tiling=Tiling("whole"))
    tiled = anysize.Stylizer(whole.session, tiling=Tiling("lockstep", tile=32))
    assert np.abs(tiled(picture) - whole(picture)).max() <= 1e-5
    assert (tiled.report.method, tiled.report.tile, tiled.report.exact) == ("lockstep", 32, True)
    assert "each stage of the model together" in tiled.report.reason
    ran = (tiled.report.backend, tiled.report.device, tiled.report.precision)
    assert ran == (engine, "cpu", "f32")


def test_alpha_and_progress(toybox: ToyBox) -> None:
    upscale = Upscaler(toybox.file("WholePicture"), backend=GRAPHS[0], tiling=Tiling("lockstep", 8))
    picture = np.random.default_rng(0).integers(0, 256, (61, 40, 4), np.uint8)
    steps: list[tuple[int, int]] = []
    result = upscale(picture, progress=lambda *step: steps.append(step))
    np.testing.assert_allclose(result, Upscaler(upscale.session, tiling=Tiling("whole"))(picture), atol=1)
    assert [done for done, _ in steps] == list(range(1, steps[0][1] + 1))
    with pytest.raises(Cancelled, match="before tile 0 of stage 0"):
        upscale(picture, cancel=lambda: True)


def test_memory_decides(toybox: ToyBox) -> None:
    """With a limit that the whole does not fit, "auto" runs in lockstep, and "whole" is refused."""
    file = toybox.file("WholePicture")
    picture = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    session = anysize.load(file, backend="onnxruntime")
    want = Upscaler(session, tiling=Tiling("whole"))(picture)
    with pytest.raises(MemoryBudgetError) as caught:
        Upscaler(session, tiling=Tiling("whole", memory=2**20))(picture)
    held, need, _ = (int(n) for n in re.findall(r"(\d+) MiB", str(caught.value))[1:])
    limit = (held + need // 2) * 2**20  # lockstep takes a quarter
    upscale = Upscaler(session, tiling=Tiling(memory=limit))
    np.testing.assert_allclose(upscale(picture), want, atol=1)
    assert upscale.report.method == "lockstep"
    assert "is too little for this picture" in upscale.report.reason
    with pytest.raises(MemoryBudgetError, match="MiB more; allow"):
        Upscaler(session, tiling=Tiling("whole", memory=limit))(picture)
    with pytest.raises(MemoryBudgetError, match="MiB more; allow"):
        Upscaler(session, tiling=Tiling(memory=2**20))(picture)


def test_refused(toybox: ToyBox) -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat = x.flatten(2)
            return ((flat @ flat.transpose(1, 2)).softmax(-1) @ flat).reshape(x.shape)

    class Turned(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x - x.mean((2, 3), keepdim=True) + F.interpolate(x, scale_factor=0.5).sum()

    for module, reason in ((Attention(), "operator"), (Turned(), "operator")):
        session = anysize.load(module.eval(), backend=GRAPHS[0])
        with pytest.raises(NotStreamable, match=reason):
            Upscaler(session, tiling=Tiling("lockstep"))(np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(NotStreamable, match="use openvino or onnxruntime"):
        anysize.load(Attention(), backend="torch").lockstep()
    with pytest.raises(OptionError, match="leave overlap at 'exact'"):
        Tiling("lockstep", overlap=4)
    with pytest.raises(OptionError, match="or 'lockstep'"):
        Upscaler(toybox.file("WholePicture"), tiling=Tiling("tile"))(np.zeros((64, 64, 3), np.uint8))


@pytest.mark.parametrize("fault", [toys.raises, toys.not_a_number, toys.too_large, toys.too_small])
def test_a_fault_at_any_call_is_an_error(toybox: ToyBox, fault: Callable) -> None:
    """Never a picture: each run of a stage is checked, and the error names stage and tile."""
    engine = get_backend(GRAPHS[0])
    session = anysize.load(toybox.file("WholePicture"), backend=engine)
    places = [(i, j) for i in range(len(session.lockstep().model.stages)) for j in range(4)]
    verifying = toys.Faulty(engine, fault)
    anysize.load(toybox.file("WholePicture"), backend=verifying).lockstep()
    before = verifying.calls
    picture = np.random.default_rng(0).random((64, 40, 3))
    for calls, place in enumerate(places):
        faulty = anysize.load(toybox.file("WholePicture"), backend=toys.Faulty(engine, fault, before + calls))
        with pytest.raises((ExecutionError, IntegrityError)) as caught:
            Upscaler(faulty, tiling=Tiling("lockstep", 16))(picture)
        assert caught.value.tile == (place[1], 0)
        assert f"in stage {place[0]} of " in str(caught.value)
    beyond = toys.Faulty(engine, fault, before + len(places))
    Upscaler(anysize.load(toybox.file("WholePicture"), backend=beyond), tiling=Tiling("lockstep", 16))(
        picture
    )
    assert beyond.calls == before + len(places)


def test_an_earlier_result_is_never_taken_for_a_new_one(toybox: ToyBox) -> None:
    engine, file = get_backend(GRAPHS[0]), toybox.file("WholePicture")
    session = anysize.load(file, backend=engine)
    tiling, count = Tiling("lockstep", 16), 4 * len(session.lockstep().model.stages)
    picture = np.random.default_rng(0).random((64, 40, 3), np.float32)
    want = Upscaler(session, tiling=tiling)(picture)
    verifying = toys.Faulty(engine, toys.raises)
    anysize.load(file, backend=verifying).lockstep()
    found = 0
    for call in range(count):
        stale = toys.Faulty(engine, Stale(verifying.calls + call), *range(10**4))
        try:
            got = Upscaler(anysize.load(file, backend=stale), tiling=tiling)(picture)
        except IntegrityError as error:
            found += "returned an earlier result again" in str(error)
        else:  # of the verification before, another size
            np.testing.assert_array_equal(got, want)
    assert found >= count - len(session.lockstep().model.stages)


def test_time_is_up_in_a_stage(toybox: ToyBox) -> None:
    go_on = threading.Event()

    def hangs(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        go_on.wait(60)
        return outputs

    engine = toys.Faulty(get_backend(GRAPHS[0]), hangs)
    upscale = Upscaler(
        anysize.load(toybox.file("WholePicture"), backend=engine), tiling=Tiling("lockstep", 16)
    )
    upscale.session.lockstep()
    engine.at = (engine.calls + 5,)
    try:
        with pytest.raises(TimedOut, match="in stage") as caught, time_limit(0.5):
            upscale(np.zeros((64, 40, 3), np.uint8))
    finally:
        go_on.set()
    assert caught.value.tile is not None


def test_no_room_for_what_waits(toybox: ToyBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    upscale = Upscaler(toybox.file("WholePicture"), backend=GRAPHS[0], tiling=Tiling("lockstep", 16))
    with pytest.raises(MemoryBudgetError, match=r"No such file.*; the environment variable TMPDIR"):
        upscale(np.zeros((64, 40, 3), np.uint8))


@pytest.mark.skipif(len(GRAPHS) < 2, reason="needs two engines that take graphs")
def test_another_engine_goes_on(toybox: ToyBox) -> None:
    first, second = (get_backend(name) for name in GRAPHS[:2])
    file = toybox.file("WholePicture")
    verifying = toys.Faulty(first, toys.raises)
    anysize.load(file, backend=verifying).lockstep()
    faulty = anysize.load(file, backend=toys.Faulty(first, toys.raises, verifying.calls + 5))
    session = Session([*faulty._guards, *anysize.load(file, backend=second)._guards])
    picture = np.random.default_rng(0).random((64, 40, 3), np.float32)
    upscale = Upscaler(session, tiling=Tiling("lockstep", 16))
    np.testing.assert_allclose(upscale(picture), Upscaler(file, backend=second)(picture), atol=1e-5)
    assert upscale.report.method == "whole"
    assert len(session.stats.fallbacks) == 1
    assert session.stats.calls >= 5


# -- graphs that a file may hold: the whole picture's result, or a refusal before anything runs

RNG = np.random.default_rng(0)
WEIGHT = (RNG.normal(size=(3, 3, 3, 3)) * 0.2).astype(np.float32)
AXES = {"axes": np.array([2, 3], np.int64)}
MEAN = [
    helper.make_node("ReduceMean", ["x", "axes"], ["mean"], keepdims=1),
    helper.make_node("Sub", ["x", "mean"], ["a"]),
]


def saved(path: Path, nodes: list, constants: dict[str, np.ndarray], batch: str | int = "n") -> Path:
    """A model of x, (batch, 3, h, w), to y."""
    ends = [
        helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 3, "h", "w"]),
        helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None),
    ]
    weights = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def wrapping() -> tuple[list, dict]:
    pads = {"pads": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64), "W": WEIGHT}
    wrap = helper.make_node("Pad", ["a", "pads"], ["p"], mode="wrap")
    return [*MEAN, wrap, helper.make_node("Conv", ["p", "W"], ["y"])], {**AXES, **pads}


def scales_of_sizes() -> tuple[list, dict]:
    nodes = [
        helper.make_node("Conv", ["x", "W"], ["c"], pads=[1] * 4, strides=[3, 3]),
        helper.make_node("ReduceMean", ["c", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["c", "mean"], ["a"]),
        *(helper.make_node("Shape", [of], [f"{of}s"]) for of in "xa"),
        *(helper.make_node("Cast", [f"{of}s"], [f"{of}f"], to=1) for of in "xa"),
        helper.make_node("Div", ["xf", "af"], ["k"]),
        helper.make_node("Resize", ["a", "", "k"], ["y"], mode="linear"),
    ]
    return nodes, {**AXES, "W": WEIGHT}


def graphs_inside() -> tuple[list, dict]:
    def branch(name: str, operator: str) -> onnx.GraphProto:
        axes = numpy_helper.from_array(AXES["axes"])
        nodes = [helper.make_node("Constant", [], [name + "a"], value=axes)]
        nodes.append(helper.make_node(operator, ["x", name + "a"], [name], keepdims=1))
        return helper.make_graph(nodes, name, [], [helper.make_tensor_value_info(name, 1, [1, 3, 1, 1])])

    branches = {"then_branch": branch("p", "ReduceMean"), "else_branch": branch("q", "ReduceMax")}
    nodes = [helper.make_node("If", ["c"], ["m"], **branches), helper.make_node("Sub", ["x", "m"], ["y"])]
    return nodes, {"c": np.array(True)}


def all_axes() -> tuple[list, dict]:
    nodes = [helper.make_node("ReduceMean", ["x", "none"], ["m"], keepdims=1)]
    return [*nodes, helper.make_node("Sub", ["x", "m"], ["y"])], {"none": np.array([], np.int64)}


def deep_padding() -> tuple[list, dict]:
    sizes = {"K": (3, 3, 1, 1), "Q": (3, 3, 11, 11)}
    kernels = {name: RNG.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    padded = helper.make_node("Conv", ["a", "K"], ["b"], pads=[5] * 4)
    return [*MEAN, padded, helper.make_node("Conv", ["b", "Q"], ["y"])], {**AXES, **kernels}


def other_numbers() -> tuple[list, dict]:
    nodes = [
        helper.make_node("Cast", ["x"], ["d"], to=onnx.TensorProto.DOUBLE),
        helper.make_node("ReduceMean", ["d", "axes"], ["m"], keepdims=1),
        helper.make_node("Cast", ["m"], ["f"], to=onnx.TensorProto.FLOAT),
        helper.make_node("Sub", ["x", "f"], ["y"]),
    ]
    return nodes, AXES


def several_outputs() -> tuple[list, dict]:
    """Of a value of the whole picture, of which the second is read."""
    nodes = [
        *MEAN,
        helper.make_node("Abs", ["a"], ["b"]),
        helper.make_node("ReduceMean", ["b", "axes"], ["m2"], keepdims=1),
        helper.make_node("Conv", ["m2", "K"], ["g"]),
        helper.make_node("Split", ["g"], ["s", "t"], axis=1, num_outputs=2),
        helper.make_node("Add", ["x", "t"], ["y"]),
    ]
    return nodes, {**AXES, "K": RNG.normal(size=(6, 3, 1, 1)).astype(np.float32)}


def very_deep() -> tuple[list, dict]:
    """A reach of 96 rows, with skips."""
    nodes, constants, last = list(MEAN), dict(AXES), "a"
    for i in range(48):
        for j in "pq":
            constants[f"w{i}{j}"] = WEIGHT * np.float32(0.1)
        nodes += [
            helper.make_node("Conv", [last, f"w{i}p"], [f"c{i}"], pads=[1] * 4),
            helper.make_node("Relu", [f"c{i}"], [f"r{i}"]),
            helper.make_node("Conv", [f"r{i}", f"w{i}q"], [f"d{i}"], pads=[1] * 4),
            helper.make_node("Add", [last, f"d{i}"], [f"b{i}"]),
        ]
        last = f"b{i}"
    return [*nodes, helper.make_node("Tanh", [last], ["y"])], constants


def small_inside() -> tuple[list, dict]:
    """A sixteenth of the rows, of which small pictures have fewer than tiles."""
    nodes, last = [], "x"
    for i in range(4):
        nodes.append(helper.make_node("Conv", [last, "W"], [f"c{i}"], pads=[1] * 4, strides=[2, 2]))
        last = f"c{i}"
    nodes += [
        helper.make_node("ReduceMean", [last, "axes"], ["m"], keepdims=1),
        helper.make_node("Sub", [last, "m"], ["a"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Resize", ["a", "", "", "s"], ["y"], mode="linear"),
    ]
    return nodes, {**AXES, "W": WEIGHT}


@pytest.mark.parametrize("batch", ["n", 1])
@pytest.mark.parametrize("graph", [very_deep, several_outputs, small_inside])
def test_graphs_that_run(graph: Callable, batch: str | int, tmp_path: Path) -> None:
    session = anysize.load(saved(tmp_path / "m.onnx", *graph(), batch), backend=GRAPHS[-1])
    for rows in (1, 16, 100):
        picture = np.random.default_rng(rows).random((200, 30, 3), np.float32)
        tiled, whole = (
            Upscaler(session, tiling=tiling) for tiling in (Tiling("lockstep", rows), Tiling("whole"))
        )
        np.testing.assert_allclose(tiled(picture), whole(picture), atol=1e-5)


@pytest.mark.parametrize("batch", ["n", 1])
@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (wrapping, "mode wrap"),
        (scales_of_sizes, "its scales are computed"),
        (graphs_inside, "graphs inside"),
        (all_axes, "names no axes|do not stay"),
        (deep_padding, "padded by more than it reaches"),
        (other_numbers, "not 32-bit floats"),
    ],
)
def test_graphs_that_are_refused(graph: Callable, says: str, batch: str | int, tmp_path: Path) -> None:
    session = anysize.load(saved(tmp_path / "m.onnx", *graph(), batch), backend=GRAPHS[-1])
    with pytest.raises(NotStreamable, match=says):
        session.lockstep()


def test_nearest_rows_that_rounding_decides_are_refused(tmp_path: Path) -> None:
    """26 rows of every third one of 78, to 61: row 30 lies on the border, and engines pick differently."""
    nodes = [
        helper.make_node("MaxPool", ["x"], ["p"], kernel_shape=[1, 1], strides=[3, 1]),
        helper.make_node("ReduceMean", ["p", "axes"], ["mean"], keepdims=1),
        helper.make_node("Sub", ["p", "mean"], ["a"]),
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Resize", ["a", "", "", "s"], ["y"], mode="nearest"),
    ]
    session = anysize.load(saved(tmp_path / "m.onnx", nodes, AXES), backend=GRAPHS[-1])
    refused = 0
    for height in range(70, 100):
        picture = np.random.default_rng(height).random((height, 12, 3), np.float32)
        want = Upscaler(session, tiling=Tiling("whole"))(picture)
        try:
            got = Upscaler(session, tiling=Tiling("lockstep", 16))(picture)
        except NotStreamable:
            refused += 1
        else:
            np.testing.assert_allclose(got, want, atol=1e-5)
    assert 0 < refused < 20


def test_stages_are_held_against_the_whole(toybox: ToyBox, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator that is read wrongly is found before the first picture."""
    monkeypatch.setattr("anysize.lockstep._OVER", {"mean": lambda rows, **axes: np.mean(rows, **axes) + 0.1})
    session = anysize.load(toybox.file("WholePicture"), backend=GRAPHS[0])
    with pytest.raises(NotStreamable, match="gives something else than in one"):
        session.lockstep()


@needs_bf16
def test_a_precision_that_the_engine_cannot_is_refused_before_it_begins(toybox: ToyBox) -> None:
    """OpenVINO has no bf16 where sizes are open; should that change, the result is as near as the whole's."""
    file = toybox.file("WholePicture")
    picture = np.random.default_rng(0).random((120, 90, 3), np.float32)
    want = Upscaler(file, backend="openvino", tiling=Tiling("whole"))(picture)
    upscale = Upscaler(file, backend="openvino", precision="bf16", tiling=Tiling("lockstep", 32))
    try:
        assert np.abs(upscale(picture) - want).max() <= 0.02
    except NotStreamable as error:
        says = str(error)
    else:
        return
    assert "does not run its stages in bf16" in says
