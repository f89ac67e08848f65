"""Graphs that others wrote: names that a step took away, data in other files, axes called like ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anysize
import numpy as np
import onnx
import pytest
from anysize import NotStreamable, Tiling, Upscaler
from conftest import ENGINES
from onnx import TensorProto, helper, numpy_helper

GRAPH_ENGINES = [e for e in ENGINES if e != "torch"]


def write(path: Path, nodes: list[Any], outputs: list[str], axes: tuple[str, str] = ("h", "w")) -> Any:
    """A file without a contract: picture `x`, weights `w` of a 3x3 convolution from 3 to 3 channels."""
    weights = np.random.default_rng(0).normal(0, 0.2, (3, 3, 3, 3)).astype(np.float32)
    shape = [1, 3, *axes]
    graph = helper.make_graph(
        nodes,
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs],
        [numpy_helper.from_array(weights, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)
    return model


def conv(source: str, target: str) -> Any:
    return helper.make_node("Conv", [source, "w"], [target], pads=[1] * 4)


def step(kind: str, source: str, target: str) -> Any:
    return helper.make_node(kind, [source], [target])


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
@pytest.mark.parametrize("kind", ["Identity", "Dropout"])
@pytest.mark.parametrize("shapes", ["static", "dynamic"])
def test_names_are_those_that_the_file_declares(engine: str, kind: str, shapes: str, tmp_path: Path) -> None:
    """A step that does nothing at the ends leaves an engine free to call them after something else."""
    plain, path = tmp_path / "plain.onnx", tmp_path / "model.onnx"
    write(plain, [conv("x", "y")], ["y"])
    nodes = [step(kind, "x", "a"), conv("a", "c"), step("Identity", "c", "y"), step("Identity", "c", "z")]
    write(path, nodes, ["y", "z"])
    rng = np.random.default_rng(1)
    with (
        anysize.load(plain, backend=engine) as simple,
        anysize.load(path, backend=engine, options={"shapes": shapes}) as session,
    ):
        assert [t.name for t in session.spec.inputs] == ["x"]
        assert [t.name for t in session.spec.outputs] == ["y", "z"]
        for size in ((9, 8), (12, 31), (9, 8)):
            x = rng.random((1, 3, *size), np.float32)
            results = session.run({"x": x})
            assert list(results) == ["y", "z"]
            for result in results.values():
                assert np.array_equal(result, simple(x))


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_model_stays_the_one_that_was_loaded(engine: str, tmp_path: Path) -> None:
    """One whose weights lie in another file too, which may be replaced or go away."""
    path = tmp_path / "model.onnx"
    model = write(path, [conv("x", "y")], ["y"])
    onnx.save(model, path, save_as_external_data=True, location="weights", size_threshold=0)
    x = np.random.default_rng(2).random((1, 3, 16, 16), np.float32)
    with anysize.load(path, backend=engine) as session:
        want = session(x)
        weights = (tmp_path / "weights").read_bytes()
        for gone in (False, True):
            (tmp_path / "weights").unlink()
            if gone:
                path.unlink()
            else:
                (tmp_path / "weights").write_bytes(np.full(len(weights) // 4, 5, np.float32).tobytes())
            for size in (12, 13 + gone):
                assert np.allclose(session(x[:, :, :size])[:, :, :10], want[:, :, :10], atol=1e-6)


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_width_may_be_called_rows(engine: str, tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", [conv("x", "y")], ["y"], ("columns", "rows"))
    x = np.random.default_rng(3).random((40, 23, 3), np.float32)
    with anysize.load(tmp_path / "model.onnx", backend=engine) as session:
        bands, whole = (Upscaler(session, tiling=Tiling(method)) for method in ("stream", "whole"))
        assert np.array_equal(bands(x), whole(x))


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_tensors_called_as_bands_call_theirs_are_refused_and_auto_goes_on(
    engine: str, tmp_path: Path
) -> None:
    write(tmp_path / "model.onnx", [conv("x", "bands/0"), conv("bands/0", "y")], ["y"])
    x = np.random.default_rng(4).random((280, 300, 3), np.float32)
    with anysize.load(tmp_path / "model.onnx", backend=engine) as session:
        with pytest.raises(NotStreamable, match="named as those of bands"):
            Upscaler(session, tiling=Tiling("stream"))(x)
        auto, whole = Upscaler(session), Upscaler(session, tiling=Tiling("whole"))
        assert np.allclose(auto(x), whole(x), atol=1e-6)
        assert auto.report is not None
        assert "named as those of bands" in auto.report.reason


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
def test_bands_that_the_engine_refuses_do_not_end_auto(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from anysize.backends.openvino import OpenVINOBackend

    compile_ = OpenVINOBackend.compile

    def refuse(self: Any, model: Any, *rest: Any) -> Any:
        if b"bands/" in model.data:
            raise anysize.ExecutionError("no", backend="openvino")
        return compile_(self, model, *rest)

    def unread(self: Any, model: Any) -> Any:
        raise anysize.ModelLoadError("no")

    write(tmp_path / "model.onnx", [conv("x", "c"), conv("c", "y")], ["y"])
    x = np.random.default_rng(5).random((280, 300, 3), np.float32)
    with anysize.load(tmp_path / "model.onnx", backend="openvino") as session:
        want = Upscaler(session, tiling=Tiling("whole"))(x)
        monkeypatch.setattr(OpenVINOBackend, "compile", refuse)
        monkeypatch.setattr(OpenVINOBackend, "metadata", unread)
        auto = Upscaler(session)
        assert np.allclose(auto(x), want, atol=1e-6)
        assert auto.report is not None
        assert "in bands of rows" in auto.report.reason
