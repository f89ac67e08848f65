"""The cache: quick second starts, and never another model's pixels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import anysize
import anysize.backends
import anysize.exporters
import anysize.models
import anysize.session
import anysize.sources
import anysize.tuning
import numpy as np
import pytest
from anysize import OptionError, Options
from anysize.backends import EngineOptions, get_backend
from anysize.backends.cache import Cache
from anysize.models.architectures import SRVGGNetCompact
from conftest import ENGINES, ToyBox

GRAPH_ENGINES = [e for e in ENGINES if e != "torch"]
SCRIPT = """
import sys, numpy as np, anysize
session = anysize.load(sys.argv[1], backend=sys.argv[2], options={"cache_dir": sys.argv[3]})
x = np.linspace(0, 1, 3 * 20 * 20, dtype=np.float32).reshape(1, 3, 20, 20)
np.save(sys.argv[4], session(x))
print("torch" in sys.modules)
"""


def write_weights(path: Path, seed: int) -> Path:
    import torch

    torch.manual_seed(seed)
    torch.save({"params": SRVGGNetCompact(3, 8, 2, 2).state_dict()}, path)
    return path


def start(weights: Path, engine: str, cache: Path, result: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SCRIPT, weights, engine, cache, result]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> bool:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip() == "True"


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_second_start_from_weights_does_not_import_torch(engine: str, tmp_path: Path) -> None:
    weights, cache, result = write_weights(tmp_path / "a.pth", 0), tmp_path / "cache", tmp_path / "out.npy"
    assert finish(start(weights, engine, cache, result))
    first = np.load(result)
    assert not finish(start(weights, engine, cache, result))
    assert np.array_equal(np.load(result), first)
    write_weights(weights, 1)  # other weights under the same name
    assert finish(start(weights, engine, cache, result))
    assert not np.allclose(np.load(result), first)


@pytest.mark.skipif("torch" not in ENGINES, reason="needs torch")
def test_torch_probes_weights_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import anysize.exporters.exporting

    weights, options = write_weights(tmp_path / "a.pth", 0), Options(cache_dir=tmp_path / "cache")
    first = anysize.load(weights, backend="torch", options=options)
    monkeypatch.setattr(anysize.exporters.exporting, "probe_module", None)  # raises where it is called
    again = anysize.load(weights, backend="torch", options=options)
    assert again.spec == first.spec
    x = np.random.default_rng(0).random((1, 3, 11, 12), np.float32)
    assert np.array_equal(again(x), first(x))


@pytest.mark.parametrize("engine", GRAPH_ENGINES)
def test_a_foreign_graph_is_probed_once(
    engine: str, toybox: ToyBox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import anysize.sources
    import onnx

    proto = onnx.load(toybox.file("Convolution"))
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    options = Options(cache_dir=tmp_path / "cache")
    first = anysize.load(tmp_path / "foreign.onnx", backend=engine, options=options).spec
    monkeypatch.setattr(anysize.sources, "_probe_graph", None)  # raises where it is called
    assert anysize.load(tmp_path / "foreign.onnx", backend=engine, options=options).spec == first


def test_two_processes_at_once_on_an_empty_cache(tmp_path: Path) -> None:
    weights, cache = write_weights(tmp_path / "a.pth", 0), tmp_path / "cache"
    both = [start(weights, GRAPH_ENGINES[0], cache, tmp_path / f"{i}.npy") for i in range(2)]
    for process in both:
        finish(process)
    assert np.array_equal(np.load(tmp_path / "0.npy"), np.load(tmp_path / "1.npy"))
    assert not [f for f in cache.iterdir() if f.name.startswith(".")]


@pytest.fixture
def kept_always(monkeypatch: pytest.MonkeyPatch) -> None:
    import anysize.backends.openvino

    monkeypatch.setattr(anysize.backends.openvino, "_WORTH_KEEPING", 0)


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
@pytest.mark.usefixtures("kept_always")
@pytest.mark.parametrize("shapes", [None, {"x": (1, 3, 12, 14)}])
def test_a_compiled_program_is_taken_up_again(shapes: Any, toybox: ToyBox, tmp_path: Path) -> None:
    engine, model = get_backend("openvino"), toybox.make("Convolution")[1]
    options = EngineOptions(cache=Cache(tmp_path))
    feeds = {"x": np.random.default_rng(0).random((1, 3, 12, 14), np.float32)}
    first = engine.compile(model, shapes, options)
    want = first.run(feeds)["output"]
    (file,) = tmp_path.iterdir()
    written = file.stat().st_ino
    again = engine.compile(model, shapes, options)
    assert np.array_equal(again.run(feeds)["output"], want)
    assert (again.inputs, again.outputs) == (first.inputs, first.outputs)
    assert (again.precision, again.device) == (first.precision, first.device)
    assert [f.stat().st_ino for f in tmp_path.iterdir()] == [written]
    other = toybox.make("Dilated")[1]
    assert not np.allclose(engine.compile(other, shapes, options).run(feeds)["output"], want)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
@pytest.mark.usefixtures("kept_always")
def test_bands_from_the_cache_equal_the_whole(tmp_path: Path, picture: Any) -> None:
    x = picture(75, 40)
    want = anysize.Upscaler("default", backend="openvino", tiling=anysize.Tiling("whole"))(x)
    for _ in range(2):
        options = Options(cache_dir=tmp_path)
        bands = anysize.Upscaler(
            "default", backend="openvino", options=options, tiling=anysize.Tiling("stream", 8)
        )
        assert np.array_equal(bands(x), want)
        assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.skipif("openvino" not in ENGINES, reason="needs openvino")
@pytest.mark.usefixtures("kept_always")
@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:99], lambda b: b[:-9] + b"x" + b[-8:]])
def test_a_damaged_file_is_made_again(
    damage: Any, tmp_path: Path, picture: Any, caplog: pytest.LogCaptureFixture
) -> None:
    x = picture(20, 20)
    want = anysize.Upscaler("default", backend="openvino")(x)
    options = Options(cache_dir=tmp_path)
    anysize.Upscaler("default", backend="openvino", options=options)(x)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert np.array_equal(anysize.Upscaler("default", backend="openvino", options=options)(x), want)
    assert caplog.text.count("is damaged") == 1
    anysize.Upscaler("default", backend="openvino", options=options)(x)
    assert caplog.text.count("is damaged") == 1


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    import os

    cache = Cache(tmp_path, limit=1000)
    for i, name in enumerate("abc"):
        cache.put(bytes(250), name)
        os.utime(cache._path((name,)), (i, i))
    assert cache.get("a") == bytes(250)  # used now, so b is the oldest
    cache.put(bytes(250), "d")
    assert cache.get("b") is None
    assert all(cache.get(name) == bytes(250) for name in "acd")


def test_what_is_not_its_own_is_left_alone(tmp_path: Path) -> None:
    import os

    for name in ("thesis.txt", ".anysize-now", "a" * 63):
        (tmp_path / name).write_bytes(bytes(400))
    (tmp_path / ".anysize-long-ago").write_bytes(bytes(400))
    os.utime(tmp_path / ".anysize-long-ago", (0, 0))
    Cache(tmp_path, limit=1).put(b"12", "a")
    assert {f.name for f in tmp_path.iterdir()} == {"thesis.txt", ".anysize-now", "a" * 63}


def test_what_other_code_made_is_not_taken(tmp_path: Path) -> None:
    Cache(tmp_path, "one").put(b"12", "a")
    assert Cache(tmp_path, "other").get("a") is None
    assert Cache(tmp_path, "one").get("a") == b"12"


def test_a_file_under_another_key_is_not_taken(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put(b"one", "a")
    cache._path(("a",)).rename(cache._path(("b",)))
    assert cache.get("b") is None


def test_a_folder_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="cannot be a cache folder"):
        anysize.load("default", options={"cache_dir": tmp_path / "file"})
    with pytest.raises(OptionError, match="cannot be a cache folder"):
        anysize.load("default", options={"cache_dir": "a\0b"})
    with pytest.raises(OptionError, match="cache_dir must be a folder"):
        anysize.load("default", options={"cache_dir": 3})
    monkeypatch.setenv("ANYSIZE_CACHE_DIR", str(tmp_path / "file"))
    cache = Options().cache()
    assert cache is not None
    cache.put(b"one", "a")
    cache.put(b"one", "a")
    assert cache.get("a") is None
    assert caplog.text.count("cannot be written to") == 1
    monkeypatch.setenv("ANYSIZE_CACHE_DIR", "")
    assert Options().cache() is None
    monkeypatch.delenv("ANYSIZE_CACHE_DIR")
    cache = Options().cache()
    assert cache is not None
    assert cache.folder.name == "anysize"


def test_a_frozen_program_has_no_source_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """There the version tells what made a thing, and a model loads all the same."""
    here = anysize.session.code_digest()
    monkeypatch.setattr(anysize.session, "__file__", str(tmp_path / "session.pyc"))
    with monkeypatch.context() as frozen:
        for package in (anysize.backends, anysize.exporters, anysize.models):
            frozen.setattr(package, "__path__", [str(tmp_path)])
        code = anysize.session.code_digest.__wrapped__()
        frozen.setattr(anysize.session, "version_of", lambda name: "another")
        assert len({here, code, anysize.session.code_digest.__wrapped__()}) == 3
    for module in (anysize.tuning, anysize.sources):
        monkeypatch.setattr(module, "__file__", str(tmp_path / "none.pyc"))
    with anysize.load("default", options=anysize.Options(cache_dir=tmp_path / "cache")) as session:
        assert session.tuned is None
