"""`bisect`: the operator that was made wrong is the one that is named, in a network of 90 convolutions."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import onnx
import pytest
import torch
from anysize import Dim, ModelSpec, Rule, TensorSpec
from anysize.backends import SPEC_KEY, EngineOptions, Model, registry
from anysize.backends.base import Array, Executable, Feeds, Shapes
from anysize.backends.onnxruntime import OnnxRuntimeBackend
from anysize.cli import main
from anysize.exporters import export
from conftest import BF16, ENGINES
from onnx import helper
from torch import nn

GRAPHS = [name for name in ENGINES if name != "torch"]
SIZES = [(9, 14), (16, 8)]


class Deep(nn.Module):
    """90 convolutions in 30 blocks, mirrored at the border, with norms and skips."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 6, 1)
        blocks = []
        for _ in range(30):
            convolutions = [nn.Conv2d(6, 6, 3, padding=1, padding_mode="reflect") for _ in range(3)]
            norm = nn.BatchNorm2d(6)
            norm.running_var.uniform_(0.02, 0.05)
            blocks.append(nn.Sequential(*convolutions, norm, nn.LeakyReLU(0.2)))
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return x[:, :3]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep")
    return export(Deep(), folder / "deep.onnx", inputs=[("n", 3, "h", "w")])


def edited(file: Path, kind: str, which: int, change: Callable[[Any], None]) -> tuple[Path, str]:
    """A copy whose operator number `which` of this kind is changed, and that operator's name."""
    proto = onnx.load(file)
    node = [n for n in proto.graph.node if n.op_type == kind][which]
    change(node)
    path = file.with_name(f"{kind}-{which}.onnx")
    onnx.save(proto, path)
    return path, node.name


def attribute(name: str, value: Any) -> Callable[[Any], None]:
    def change(node: Any) -> None:
        for old in [a for a in node.attribute if a.name == name]:
            node.attribute.remove(old)
        node.attribute.append(onnx.helper.make_attribute(name, value))

    return change


EDITS = {
    "padding mode": ("Pad", 47, attribute("mode", "edge"), "mode is b'edge', not b'reflect'"),
    "epsilon": ("BatchNormalization", 17, attribute("epsilon", 1e-3), "epsilon is 0.001"),
    "padding": ("Conv", 88, attribute("pads", [0, 1, 0, 1]), r"pads is \[0, 1, 0, 1\], not \[0, 0, 0, 0\]"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_the_planted_operator_is_found(deep: Path, edit: str, tmp_path: Path) -> None:
    kind, which, change, text = EDITS[edit]
    path, name = edited(deep, kind, which, change)
    report = anysize.bisect(path, reference=deep, sizes=SIZES, folder=tmp_path / "saved")
    assert not report.ok
    assert [row.backend for row in report.rows] == GRAPHS
    for row in report.rows:
        assert row.departure is not None, row.error
        found = row.departure
        assert (found.operator, found.node) == (kind, name)
        assert found.seen == report.inputs == 4
        assert not found.fused
        assert re.search(text, found.edited)
        assert f"departs first at {kind} '{name}', operator {found.place} of" in str(report)
        if edit == "padding":
            assert found.max_abs is None
            assert "its shape is" in str(report)
        else:
            assert found.max_abs > 3 * found.allowed
            assert found.alone == pytest.approx(found.max_abs, rel=1e-3)
        script = tmp_path / "saved" / row.backend / "reproduce.py"
        ran = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        assert ("largest difference" in ran.stdout) == (edit != "padding")
        if edit == "padding":
            continue
        assert float(ran.stdout.rpartition(":")[2]) == pytest.approx(found.alone, rel=1e-3)
    assert json.loads(report.to_json())["rows"][0]["departure"]["node"] == name


def test_what_agrees_is_left_alone(deep: Path, tmp_path: Path) -> None:
    report = anysize.bisect(deep, sizes=SIZES, folder=tmp_path / "saved")
    assert report.ok
    assert str(report).count(f"all {report.operators} operators agree") == len(GRAPHS)
    assert not (tmp_path / "saved").exists()


def test_weights_are_the_reference_of_what_was_exported_from_them(tmp_path: Path) -> None:
    """Tensors pair up by name, which the exporter gives again; engines are held against NumPy."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.LeakyReLU(0.2), nn.Conv2d(4, 3, 3, padding=1))
    file = export(net, tmp_path / "net.onnx", inputs=[("n", 3, "h", "w")])
    assert anysize.bisect(net, sizes=SIZES).ok
    path, name = edited(file, "LeakyRelu", 0, attribute("alpha", 0.1))
    report = anysize.bisect(path, reference=net, sizes=SIZES)
    assert {row.departure.node for row in report.rows if row.departure} == {name}


def test_one_input_may_not_show_it(tmp_path: Path) -> None:
    """Only the darkest of all pixels become negative, and so few of the inputs show a wrong slope."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LeakyReLU(0.5), nn.Conv2d(3, 3, 1))
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
        net[0].bias.fill_(-0.02)
    file = export(net, tmp_path / "net.onnx", inputs=[("n", 3, "h", "w")])
    path, name = edited(file, "LeakyRelu", 0, attribute("alpha", 0.1))
    report = anysize.bisect(path, reference=file, sizes=[(1, 2), (2, 1), (40, 40)])
    for row in report.rows:
        assert row.departure is not None
        assert row.departure.node == name
        assert 0 < row.departure.seen < report.inputs == 6
        assert row.departure.size["h"] == 40


class Merging(OnnxRuntimeBackend):
    """ONNX Runtime that is wrong where it may merge: where a LeakyRelu's result is not asked for."""

    name = "merging"

    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        program = super().compile(model, shapes, options)
        proto = onnx.load_from_string(model.data)
        shown = {value.name for value in proto.graph.output}
        kinds = [n.op_type for n in proto.graph.node if not shown & set(n.output)]
        real = program.run

        def run(feeds: Feeds) -> dict[str, Array]:
            return {n: v + 0.01 * ("LeakyRelu" in kinds) for n, v in real(feeds).items()}

        program.run = run  # type: ignore[method-assign]
        return program


@pytest.fixture
def merging(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(registry.BUILTIN, "merging", f"{__name__}:Merging")
    return "merging"


def test_what_only_shows_when_merged(deep: Path, merging: str) -> None:
    """Asking for every result keeps the engine from merging; beginnings of the graph show it."""
    report = anysize.bisect(deep, backends=[merging], sizes=SIZES[:1])
    (row,) = report.rows
    assert row.departure is not None, row.error
    assert row.departure.fused
    nodes = list(onnx.load(deep).graph.node)
    relu = next(n for n in nodes if n.op_type == "LeakyRelu")
    assert nodes[row.departure.place - 1].name == row.departure.node
    taker = next(n for n in nodes if relu.output[0] in n.input)  # the first that it could be merged with
    assert row.departure.node == taker.name
    assert "only while the engine may merge operators" in str(report)


def graph(path: Path, nodes: list[Any], weights: dict[str, Any], inputs: tuple[str, ...] = ("x",)) -> Path:
    """Pictures in, and a result y out; the contract as it was probed for the first graph of this folder."""
    values = [helper.make_tensor_value_info(name, 1, (1, 3, "h", "w")) for name in inputs]
    made = helper.make_graph(
        nodes,
        "graph",
        values,
        [helper.make_tensor_value_info("y", 1, None)],
        [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in weights.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    spec = ModelSpec(
        tuple(TensorSpec(name, np.dtype(np.float32), (1, 3, Dim("h"), Dim("w"))) for name in sorted(inputs)),
        (TensorSpec("y", np.dtype(np.float32), (1, 3, Rule("h"), Rule("w"))),),
    )
    helper.set_model_props(proto, {SPEC_KEY: spec.to_json()})
    onnx.save(proto, path)
    return path


def convolution(given: str, result: str, name: str, pads: tuple[int, ...] = (1, 1, 1, 1)) -> Any:
    return helper.make_node("Conv", [given, "kernel"], [result], name=name, pads=pads)


def branches(pads: tuple[int, ...] = (1, 1, 1, 1)) -> list[Any]:
    """A short branch, whose first operator may be wrong, listed before a long one."""
    short = [convolution("x", "a0", "A0", pads), convolution("a0", "a1", "A1")]
    ends = ["x", *(f"b{i}" for i in range(6))]
    long = [convolution(ends[i], ends[i + 1], f"B{i}") for i in range(6)]
    return [*short, *long, helper.make_node("Add", ["a1", "b5"], ["y"], name="Merge")]


KERNEL = {"kernel": np.random.default_rng(0).normal(0, 0.3, (3, 3, 3, 3)).astype(np.float32)}


def first_of(report: anysize.BisectReport) -> set[str]:
    return {row.departure.node if row.departure else str(row.error) for row in report.rows}


def test_a_branch_that_no_engine_runs(tmp_path: Path) -> None:
    good = graph(tmp_path / "good.onnx", branches(), KERNEL)
    bad = graph(tmp_path / "bad.onnx", branches((0, 1, 0, 1)), KERNEL)
    assert anysize.bisect(good, sizes=SIZES).ok
    assert first_of(anysize.bisect(bad, reference=good, sizes=SIZES)) == {"A0"}


def test_an_operator_that_the_reference_has_not(tmp_path: Path) -> None:
    nodes = [convolution("x", "a", "A"), helper.make_node("Sigmoid", ["a"], ["y"], name="S")]
    good = graph(tmp_path / "good.onnx", nodes, KERNEL)
    nodes[1:] = [
        helper.make_node("Sigmoid", ["a"], ["inner"], name="S"),
        helper.make_node("Mul", ["inner", "k"], ["y"], name="Inserted"),
    ]
    bad = graph(tmp_path / """a'""\"b.onnx""", nodes, {**KERNEL, "k": np.float32(1.2)})
    report = anysize.bisect(bad, reference=good, sizes=SIZES, folder=tmp_path)
    assert first_of(report) == {"Inserted"}
    assert "it is Mul, not Sigmoid" in str(report)
    for engine in GRAPHS:
        script = tmp_path / engine / "reproduce.py"
        assert subprocess.run([sys.executable, str(script)], capture_output=True).returncode == 0


def test_whole_numbers_and_what_is_chosen_by_them(tmp_path: Path) -> None:
    """The operator that chose wrongly is named, not the one that took its choice."""

    def nodes(kind: str) -> list[Any]:
        return [
            convolution("x", "a", "A"),
            helper.make_node(kind, ["a", "zero"], ["mask"], name="Choice"),
            helper.make_node("Where", ["mask", "a", "x"], ["y"], name="Where"),
        ]

    weights = {**KERNEL, "zero": np.float32(0)}
    good = graph(tmp_path / "good.onnx", nodes("Greater"), weights)
    bad = graph(tmp_path / "bad.onnx", nodes("Less"), weights)
    assert first_of(anysize.bisect(bad, reference=good, sizes=SIZES)) == {"Choice"}
    assert anysize.bisect(good, sizes=SIZES).ok


def test_inputs_pair_up_by_name(tmp_path: Path) -> None:
    nodes = [helper.make_node("Sub", ["a", "b"], ["y"], name="S")]
    one = graph(tmp_path / "one.onnx", nodes, {}, ("a", "b"))
    other = graph(tmp_path / "other.onnx", nodes, {}, ("b", "a"))
    assert anysize.bisect(one, reference=other, sizes=SIZES).ok
    fewer = graph(tmp_path / "fewer.onnx", [helper.make_node("Neg", ["a"], ["y"])], {}, ("a",))
    with pytest.raises(anysize.ModelLoadError, match="the reference takes a; the contract says a, b"):
        anysize.bisect(one, reference=fewer, sizes=SIZES)


def test_an_engine_that_cannot_read_the_graph(tmp_path: Path) -> None:
    """It is told by its operator, whichever engine comes first; what a branch captures is saved with it."""
    inner = helper.make_graph(
        [helper.make_node("Mul", ["a", "a"], ["inner"])],
        "g",
        [],
        [helper.make_tensor_value_info("inner", 1, None)],
    )
    nodes = [
        convolution("x", "a", "A"),
        helper.make_node("If", ["yes"], ["y"], name="Branch", then_branch=inner, else_branch=inner),
    ]
    good = graph(tmp_path / "good.onnx", nodes, {**KERNEL, "yes": np.array(True)})
    nodes[1].attribute[0].g.node[0].op_type = "Add"
    nodes[1].attribute[1].g.node[0].op_type = "Add"
    bad = graph(tmp_path / "bad.onnx", nodes, {**KERNEL, "yes": np.array(True)})
    report = anysize.bisect(bad, reference=good, sizes=SIZES, folder=tmp_path)
    assert first_of(report) == {"Branch"}
    for row in report.rows:
        assert row.departure is not None
        assert row.departure.alone == pytest.approx(row.departure.max_abs, rel=1e-3)
    nodes = [
        convolution("x", "a", "A"),
        helper.make_node("MaxPool", ["a"], ["half", "from"], kernel_shape=[2, 2], strides=[2, 2]),
        helper.make_node(
            "MaxUnpool", ["half", "from"], ["y"], name="Back", kernel_shape=[2, 2], strides=[2, 2]
        ),
    ]
    file = graph(tmp_path / "unpool.onnx", nodes, KERNEL)
    for order in (GRAPHS, GRAPHS[::-1]):
        rows = {row.backend: row for row in anysize.bisect(file, backends=order, sizes=[(16, 8)]).rows}
        assert rows["onnxruntime"].departure is None
        assert rows["onnxruntime"].error is None
        assert rows["openvino"].departure.node == "Back"


def test_what_cannot_be_taken_apart(deep: Path, tmp_path: Path) -> None:
    other = export(nn.Conv2d(3, 3, 1), tmp_path / "other.onnx", inputs=[("n", 3, "h", "w")])
    renamed = onnx.load(other)
    for node in renamed.graph.node:
        node.output[:] = [f"another_{name}" for name in node.output]
    renamed.graph.output[0].name = f"another_{renamed.graph.output[0].name}"
    onnx.save(renamed, tmp_path / "renamed.onnx")
    (tmp_path / "net.xml").write_text("<net/>")
    (tmp_path / "file").touch()
    path, _ = edited(deep, *EDITS["epsilon"][:3])
    with pytest.raises(anysize.OptionError, match="no tensor of the same name"):
        anysize.bisect(tmp_path / "renamed.onnx", reference=other)
    with pytest.raises(anysize.OptionError, match="atol must be"):
        anysize.bisect(deep, atol=float("nan"))
    with pytest.raises(anysize.OptionError, match="torch: runs no ONNX graphs"):
        anysize.bisect(deep, backends=["torch"])
    with pytest.raises(anysize.ModelLoadError, match="takes weights and"):
        anysize.bisect(tmp_path / "net.xml")
    for folder in (tmp_path / "file", tmp_path / "file" / "below", "a\0b", 3):
        with pytest.raises(anysize.OptionError, match="cannot be written"):
            anysize.bisect(path, reference=deep, sizes=SIZES[:1], folder=folder)  # type: ignore[arg-type]
    for sizes in ([], 9):
        with pytest.raises(anysize.OptionError, match="no size"):
            anysize.bisect(deep, sizes=sizes)  # type: ignore[arg-type]
    with pytest.raises(anysize.OptionError, match="no engine"):
        anysize.bisect(deep, backends=[])
    rows = anysize.bisect(deep, precision="bf16", sizes=SIZES[:1]).rows if "openvino" in BF16 else ()
    assert {row.backend for row in rows} == {"openvino"}.intersection(BF16)


def test_the_command(deep: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, name = edited(deep, *EDITS["padding mode"][:3])
    command = ["parity", str(path), "--bisect", "--sizes", "9x14", "-o", str(tmp_path / "saved")]
    for arguments, code in (
        ([*command, "--reference", str(deep)], 1),
        ([*command, "--reference", str(deep), "--json"], 1),
        (["parity", str(deep), *command[2:]], 0),
        (["parity", str(deep), "--reference", str(deep)], 2),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == code
        text = capsys.readouterr().out
        if code == 1:
            assert name in text
            with suppress(json.JSONDecodeError):
                assert not json.loads(text)["ok"]
    assert (tmp_path / "saved" / GRAPHS[0] / "inputs.npz").is_file()
