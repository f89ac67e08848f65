"""Broken and hostile graphs: a typed error or a picture, soon; no engine takes its caller along."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import onnx
import pytest
from anysize import AnysizeError, ModelLoadError, TimedOut, time_limit
from anysize.backends import get_backend
from anysize.files import write_picture
from conftest import ENGINES, ToyBox
from fuzzing import EDITS, LIMIT, Tally, cases, edited
from hypothesis import given
from hypothesis import strategies as st
from onnx import AttributeProto, TensorProto, helper

GRAPHS = [name for name in ENGINES if name in ("onnxruntime", "openvino")]
BIG = [0, -1, 1, 7, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63)]
OPERATORS = ["Conv", "Resize", "Reshape", "Loop", "If", "Pad", "Expand", "ConstantOfShape", "Gather", "Tile"]
OPERATORS += ["Scan", "TopK", "Concat", "Split", "Slice", "DepthToSpace", "NoSuchOperator", "Cast", "Einsum"]

Change = Callable[[onnx.ModelProto, int, int], None]


def initialiser(model: onnx.ModelProto, i: int) -> TensorProto:
    if not model.graph.initializer:
        model.graph.initializer.append(helper.make_tensor("more", TensorProto.FLOAT, [1], [0.0]))
    return model.graph.initializer[i % len(model.graph.initializer)]


def node(model: onnx.ModelProto, i: int) -> onnx.NodeProto:
    if not model.graph.node:
        model.graph.node.append(helper.make_node("Identity", ["x"], ["more"]))
    return model.graph.node[i % len(model.graph.node)]


def other_type(model: onnx.ModelProto, i: int, k: int) -> None:
    initialiser(model, i).data_type = k % 25


def declared_size(model: onnx.ModelProto, i: int, k: int) -> None:
    """More values than there are, by far."""
    initialiser(model, i).dims[:] = [[BIG[k % len(BIG)]], [2**40, 2**40], [2**31], [3, -1]][i % 4]


def cut_values(model: onnx.ModelProto, i: int, k: int) -> None:
    tensor = initialiser(model, i)
    tensor.raw_data = tensor.raw_data[: k % (1 + len(tensor.raw_data))]


def outside(model: onnx.ModelProto, i: int, k: int) -> None:
    """Values in a file: of another folder, none, this one, a device."""
    tensor = initialiser(model, i)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    places = [
        "../secret",
        "/etc/passwd",
        "missing",
        "x.onnx",
        "",
        "..",
        "/dev/zero",
        "a/../../secret",
        "link",
    ]
    for key, value in (
        ("location", places[k % len(places)]),
        ("offset", str(BIG[i % len(BIG)])),
        ("length", str(BIG[k % len(BIG)])),
    ):
        tensor.external_data.add(key=key, value=value)


def cyclic(model: onnx.ModelProto, i: int, k: int) -> None:
    wanted = node(model, i)
    if wanted.input:
        wanted.input[k % len(wanted.input)] = node(model, i + k % 4).output[0]


def other_operator(model: onnx.ModelProto, i: int, k: int) -> None:
    node(model, i).op_type = OPERATORS[k % len(OPERATORS)]


def other_attribute(model: onnx.ModelProto, i: int, k: int) -> None:
    wanted = node(model, i)
    if not wanted.attribute:
        wanted.attribute.append(helper.make_attribute("axis", 1))
    attribute = wanted.attribute[k % len(wanted.attribute)]
    value = BIG[k % len(BIG)]
    if attribute.type == AttributeProto.INTS and attribute.ints:
        attribute.ints[k % len(attribute.ints)] = value
    elif attribute.type == AttributeProto.INT:
        attribute.i = value
    elif attribute.type == AttributeProto.STRING:
        attribute.s = b"\xff" * (k % 9)
    else:
        attribute.type = k % 15


def other_port(model: onnx.ModelProto, i: int, k: int) -> None:
    ports = [*model.graph.input, *model.graph.output]
    port = ports[i % len(ports)].type.tensor_type
    if k % 3 == 0 or not port.shape.dim:
        port.elem_type = k % 25
    elif k % 3 == 1:
        port.shape.dim[k % len(port.shape.dim)].dim_value = BIG[k % len(BIG)]
    else:
        del port.shape.dim[k % len(port.shape.dim) :]


def other_name(model: onnx.ModelProto, i: int, k: int) -> None:
    wanted = node(model, i)
    names = wanted.output if k % 2 else wanted.input
    if names:
        names[k % len(names)] = ["", "x", "nowhere", "y", "a" * 10_000][k % 5]


def other_versions(model: onnx.ModelProto, i: int, k: int) -> None:
    model.ir_version = [*BIG, 3, 10][i % (len(BIG) + 2)] % 2**63
    for opset in model.opset_import:
        opset.version = [-(2**63), -1, 0, 1, 7, 9, 30, 1000][k % 8]  # larger ones: see below


def twice(model: onnx.ModelProto, i: int, k: int) -> None:
    for _ in range(1 + k % 3):
        model.graph.node.append(node(model, i))


def deep(model: onnx.ModelProto, i: int, k: int) -> None:
    """Graphs within graphs."""
    inner = helper.make_graph([], "inner", [], [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])])
    for level in range(k % 40):  # each holds the one within it twice
        branch = helper.make_node("If", ["c"], [f"o{level}"], then_branch=inner, else_branch=inner)
        inner = helper.make_graph([branch], "inner", [], inner.output)
        if inner.ByteSize() > 2**14:
            break
    model.graph.node.append(helper.make_node("If", ["c"], ["deep"], then_branch=inner, else_branch=inner))


CHANGES: list[Change] = [
    *(other_type, declared_size, cut_values, outside, cyclic, other_operator, other_attribute),
    *(other_port, other_name, other_versions, twice, deep),
]
STRUCTURE = st.lists(
    st.tuples(st.sampled_from(CHANGES), st.integers(0, 63), st.integers(0, 1023)), min_size=1, max_size=3
)


class Opener:
    """The process that opens files (tests/opener.py)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "opener.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def open(self, file: Path, engine: str, limit: float) -> tuple[str, float]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(file), engine, limit]) + "\n")
        self.process.stdin.flush()
        outcome, seconds = json.loads(self.process.stdout.readline())
        return outcome, seconds


@pytest.fixture(scope="module")
def opener() -> Iterator[Opener]:
    found = Opener()
    yield found
    found.process.kill()
    found.process.communicate()


#: seconds for a model without a contract on OpenVINO, which compiles a hundred shapes of it
PROBED = 20.0
TOYS = ("Doubling", "Unshuffle", "SqueezeExcite", "Transposed")
#: few without a contract: each takes seconds
NAMES = [*TOYS * 20, *(f"{name}, foreign" for name in TOYS)]


@pytest.fixture(scope="module")
def models(toybox: ToyBox) -> dict[str, bytes]:
    """Small ones, with their contract and without."""
    found = {}
    for name in TOYS:
        found[name] = toybox.file(name).read_bytes()
        model = onnx.load_from_string(found[name])
        del model.metadata_props[:]
        found[f"{name}, foreign"] = model.SerializeToString()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a file outside of it that no model may read."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "secret").write_bytes(np.full(10_000, 0.25, np.float32).tobytes())
    (folder / "models").mkdir()
    (folder / "models" / "link").symlink_to(folder / "secret")
    return folder / "models"


def typed_where_it_is_alone(file: Path, engine: str) -> str:
    """What a caller of `Isolated` gets of a file that ends its process, or never comes to an end."""
    with time_limit(LIMIT - 5):
        try:
            alone = anysize.Isolated(file, backend=engine, options={"cache_dir": ""}, most="3GiB")  # type: ignore[arg-type]
            try:
                alone(np.zeros((12, 10, 3), np.uint8))
            finally:
                alone.close()
        except AnysizeError as error:
            return type(error).__name__
    return "taken"


@pytest.mark.parametrize("engine", GRAPHS)
@given(name=st.sampled_from(NAMES), changes=STRUCTURE | EDITS)
@cases(60, 20_000 // max(1, len(GRAPHS)))
def test_broken_graphs(
    models: dict[str, bytes], folder: Path, opener: Opener, tally: Tally, engine: str, name: str, changes: Any
) -> None:
    if isinstance(changes[0][0], float):
        data = edited(models[name], changes)
    else:
        model = onnx.load_from_string(models[name])
        for change, i, k in changes:
            change(model, i, k)
        data = model.SerializeToString()
    file = folder / f"{engine}-{os.getpid()}.onnx"
    file.write_bytes(data)
    limit = PROBED if (engine, name.endswith("foreign")) == ("openvino", True) else LIMIT
    opens(file, engine, opener, tally, limit)


def opens(file: Path, engine: str, opener: Opener, tally: Tally, limit: float = LIMIT) -> None:
    """Count what becomes of a file: here, and where that is not typed, in an `Isolated`."""
    outcome, seconds = opener.open(file, engine, limit)
    if seconds >= limit:  # just
        outcome = "no end"
    if outcome.startswith("SIG") or outcome == "no end":
        shutil.copy(file, file.with_name(f"{engine}-{outcome}{file.suffix}"))
        started = time.monotonic()
        outcome = f"{outcome}, alone {typed_where_it_is_alone(file, engine)}"
        seconds = time.monotonic() - started
    assert not outcome.startswith(("untyped", "another", "exit")), outcome
    tally.add(outcome, seconds, limit)


@pytest.mark.skipif("ncnn" not in anysize.available_backends(), reason="needs ncnn")
@given(
    name=st.sampled_from(TOYS),
    edits=EDITS,
    which=st.sampled_from([".param", ".bin", "numbers"]),
    numbers=st.lists(st.tuples(st.integers(0, 255), st.sampled_from([*BIG, 2, 3, 64, 10**5]))),
)
@cases(60)
def test_broken_nets(
    toybox: ToyBox,
    tmp_path: Path,
    opener: Opener,
    tally: Tally,
    name: str,
    edits: Any,
    which: str,
    numbers: list[tuple[int, int]],
) -> None:
    """ncnn's files: the graph as text, of which numbers are changed too, and weights without any frame."""
    net = Path(toybox.model(name, get_backend("ncnn")).data)
    for suffix in (".param", ".bin"):
        data = net.with_suffix(suffix).read_bytes()
        (tmp_path / f"x{suffix}").write_bytes(edited(data, edits) if suffix == which else data)
    if which == "numbers":
        text = net.read_text()
        places = list(re.finditer(r"(?<==)-?\d+(?=\s)", text))
        for i, value in numbers:
            place = places[i % len(places)]
            text = text[: place.start()] + str(value) + text[place.end() :]
            places = list(re.finditer(r"(?<==)-?\d+(?=\s)", text))
        (tmp_path / "x.param").write_text(text)
    opens(tmp_path / "x.param", "ncnn", opener, tally)


@pytest.mark.parametrize("engine", GRAPHS)
@pytest.mark.parametrize("place", ["../secret", "a/../../secret", "absolute", "link"])
@pytest.mark.parametrize("name", ["Doubling", "Doubling, foreign"])
def test_no_values_from_outside_of_its_folder(
    models: dict[str, bytes], folder: Path, engine: str, place: str, name: str
) -> None:
    """They would be an input of a picture that the caller may send on: whatever its user can read."""
    (folder / "a").mkdir(exist_ok=True)
    model = onnx.load_from_string(models[name])
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    length = len(tensor.raw_data)
    assert length > 0
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    where = str(folder.parent / "secret") if place == "absolute" else place
    for key, value in (("location", where), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    (folder / "values.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelLoadError, match=r"(?i)external data|outside"):
        anysize.load(folder / "values.onnx", backend=engine, options={"cache_dir": ""})


@pytest.mark.parametrize("engine", GRAPHS)
def test_a_graph_of_a_version_far_ahead(models: dict[str, bytes], folder: Path, engine: str) -> None:
    """One engine counts up to it."""
    model = onnx.load_from_string(models["Doubling"])
    for opset in model.opset_import:
        opset.version = 2**62
    (folder / "ahead.onnx").write_bytes(model.SerializeToString())
    started = time.monotonic()
    with pytest.raises((ModelLoadError, TimedOut)), time_limit(3):
        anysize.Isolated(folder / "ahead.onnx", backend=engine)
    assert time.monotonic() - started < 5
    write_picture(folder / "x.png", np.zeros((9, 9, 3), np.uint8))
    line = ["upscale", folder / "x.png", "-o", folder / "y.png", "-m", folder / "ahead.onnx", "-b", engine]
    for more in ([], ["--isolate"]):
        command = [sys.executable, "-m", "anysize.cli", *line, "--timeout", "3", *more]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode in (1, 2)
        assert done.stderr.startswith("error: ")


def test_an_engine_that_divides_by_nothing(models: dict[str, bytes], folder: Path) -> None:
    """A stride of zero: ONNX Runtime refuses it, or ends its process by a signal; typed in both cases."""
    model = onnx.load_from_string(models["Doubling"])
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "strides":
                attribute.ints[:] = [0, 0]
    (folder / "zero.onnx").write_bytes(model.SerializeToString())
    assert typed_where_it_is_alone(folder / "zero.onnx", "onnxruntime") in (
        "ModelLoadError",
        "ExecutionError",
    )
