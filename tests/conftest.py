"""Fixtures: every installed engine, toy models on it, and the folder of real weights where it is there."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Two workers share the processors: threads that spin while they wait for work were seen to make PyTorch fifty
# times as slow. Read as it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import anysize
import numpy as np
import pytest
import toys
from anysize.backends import Backend, EngineOptions, Model, ModelSpec, describe_backends, get_backend
from anysize.exporters.exporting import input_templates, private_copy, probe_module, to_onnx
from anysize.guard import ShapeGuard
from anysize.session import Session
from fuzzing import Tally

ASSETS = Path(__file__).parent.parent.parent / "shared" / "assets"
#: engines that run any model here; ncnn has its own files only, and the conformance suite
ENGINES = [name for name in anysize.available_backends() if name != "ncnn"]
#: engines that run bf16 on this processor
BF16 = [info.name for info in describe_backends() if "bf16" in info.precisions]
needs_bf16 = pytest.mark.skipif("openvino" not in BF16, reason="needs openvino and bf16 arithmetic")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache for this run alone: the user's may hold what other code made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ANYSIZE_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=ENGINES)
def backend(request: pytest.FixtureRequest) -> str:
    """Each installed engine's name in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def assets() -> Path:
    if not ASSETS.is_dir():
        pytest.skip("needs the folder ../shared/assets with real weights and pictures")
    return ASSETS


class ToyBox:
    """Toy modules, each probed and exported once a test run, opened on any engine.

    `folder`: where all workers of the run find what one has exported; `own`: of this worker.
    """

    def __init__(self, folder: Path, own: Path) -> None:
        self.folder, self.own = folder, own
        self.made: dict[str, tuple[Any, Model]] = {}

    def make(self, name: str, **arguments: int) -> tuple[Any, Model]:
        """The module and its ONNX model."""
        key = name + "".join(f"-{k}{v}" for k, v in arguments.items())
        if key not in self.made:
            module = private_copy(getattr(toys, name)(**arguments))
            file, contract = self.folder / f"{key}.onnx", self.folder / f"{key}.json"
            if not file.exists():
                spec = probe_module(module, input_templates(module, [("n", 3, "h", "w")])[0])
                exported = to_onnx(module, spec, self.own / file.name)[0].spec
                assert exported is not None
                (self.own / contract.name).write_text(exported.to_json())
                for made in (contract, file):
                    os.replace(self.own / made.name, made)
            spec = ModelSpec.from_json(contract.read_text())
            self.made[key] = module, Model("onnx", file.read_bytes(), spec)
        return self.made[key]

    def file(self, name: str, **arguments: int) -> Path:
        """Its ONNX file."""
        self.make(name, **arguments)
        return self.folder / (name + "".join(f"-{k}{v}" for k, v in arguments.items()) + ".onnx")

    def model(self, name: str, engine: Backend, **arguments: int) -> Model:
        """In the form this engine takes."""
        module, onnx = self.make(name, **arguments)
        if "onnx" in engine.formats:
            return onnx
        return Model("module", module, onnx.spec) if "module" in engine.formats else self._ncnn(name, module)

    def _ncnn(self, name: str, module: Any) -> Model:
        import pnnx
        import torch

        folder = self.own / f"{name}-ncnn"
        path, onnx = folder / "model.ncnn.param", self.made[name][1]
        if not path.exists():
            folder.mkdir()
            examples = {"inputs": torch.rand(1, 3, 16, 16), "inputs2": torch.rand(1, 3, 24, 20)}
            pnnx.export(module, str(folder / "model.pt"), fp16=False, **examples)
            if name == "Identity":  # made a net without layers, whose input is called as its output
                path.write_text("7767517\n2 2\nInput in 0 1 in0\nNoop none 1 1 in0 out0\n")
            path.write_text(re.sub(r"\bin0\b", "x", re.sub(r"\bout0\b", "output", path.read_text())))
        spec = onnx.spec
        tensors = (replace(t, shape=(1, *t.shape[1:])) for t in (*spec.inputs, *spec.outputs))
        first, last = tensors
        return Model("ncnn", path, replace(spec, inputs=(first,), outputs=(last,)))

    def session(
        self,
        name: str,
        backend: str | Backend,
        *,
        shapes: str = "auto",
        max_live: int = 4,
        precision: str = "f32",
        threads: int | None = None,
        **arguments: int,
    ) -> Session:
        engine = get_backend(backend) if isinstance(backend, str) else backend
        model = self.model(name, engine, **arguments)
        options = EngineOptions(precision, "cpu", threads)
        return Session([ShapeGuard(engine, model, options, shapes, max_live)])

    def upscaler(
        self, name: str, backend: str | Backend, tiling: anysize.Tiling | None = None, **arguments: Any
    ) -> anysize.Upscaler:
        return anysize.Upscaler(self.session(name, backend, **arguments), tiling=tiling)


@pytest.fixture(scope="session")
def toybox(tmp_path_factory: pytest.TempPathFactory) -> ToyBox:
    own = tmp_path_factory.mktemp("toys")
    # a worker's folders lie in one of the whole run
    folder = own.parent.parent / "toys" if "PYTEST_XDIST_WORKER" in os.environ else own.parent / "shared"
    folder.mkdir(exist_ok=True)
    return ToyBox(folder, own)


@pytest.fixture
def picture() -> Callable[..., np.ndarray]:
    """picture(h, w, channels, dtype, seed): random but smooth enough to look like one."""

    def make(height: int, width: int, channels: int = 3, dtype: Any = np.uint8, seed: int = 0) -> np.ndarray:
        values = np.random.default_rng(seed).random((height, width, channels))
        if np.dtype(dtype).kind == "f":
            return values.astype(dtype)
        return (values * np.iinfo(dtype).max).astype(dtype)

    return make


@pytest.fixture
def tally(record_property: Callable[[str, object], None]) -> Iterator[Tally]:
    counts = Tally(record_property)
    yield counts
    counts.close()
