"""`compare` and `as_module`: what hosts build their own tests and swaps on."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import pytest
import torch
import toys
from anysize import ModelLoadError, OptionError, ShapeError
from anysize.exporters import export
from conftest import BF16, ENGINES, ToyBox
from torch.fx.experimental.proxy_tensor import make_fx


def test_engines_agree_on_a_module() -> None:
    report = anysize.compare(toys.EncoderDecoder(), sizes=[(8, 12), (40, 4)])
    assert report.ok
    assert report.reference == "torch f32"
    assert {r.backend for r in report.rows} == set(ENGINES)
    assert all(r.max_abs <= 1e-5 and r.psnr > 90 and r.finite and r.shapes_match for r in report.rows)
    assert json.loads(report.to_json())["ok"]
    assert str(report).count("ok  ") == len(report.rows) == 2 * len(ENGINES)


def test_a_difference_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from anysize import parity

    real = parity.load

    def load(source: object, *, backend: str, **kw: object) -> anysize.Session:
        session = real(source, backend=backend, **kw)
        if backend == "onnxruntime":
            run = session.run
            session.run = lambda feeds, **k: {n: v + 0.01 for n, v in run(feeds, **k).items()}
        return session

    monkeypatch.setattr(parity, "load", load)
    report = anysize.compare("default", sizes=[(9, 9)])
    assert not report.ok
    (bad,) = [r for r in report.rows if not r.ok]
    assert bad.backend == "onnxruntime"
    assert bad.max_abs == pytest.approx(0.01, abs=1e-4)
    assert bad.psnr == pytest.approx(40, abs=0.2)
    assert "FAIL onnxruntime f32 1x9x9" in str(report)
    at, got, want = re.fullmatch(r"output(\[.*\]): (\S+), not (\S+)", bad.worst_at).groups()
    assert len(json.loads(at)) == 4
    assert float(got) - float(want) == pytest.approx(0.01, abs=1e-4)
    with pytest.raises(
        AssertionError, match=r"(?s)engines differ.*FAIL onnxruntime f32 1x9x9: .* worst at out"
    ):
        anysize.assert_parity("default", sizes=[(9, 9)])
    assert anysize.assert_parity("default", sizes=[(9, 9)], backends=["openvino"]).ok


def test_a_backend_that_refuses_is_a_finding(toybox: ToyBox) -> None:
    file = toybox.file("Nearest")
    assert {r.backend for r in anysize.compare(file).rows} == set(ENGINES) - {"torch"}
    report = anysize.compare(file, backends=["torch", "openvino"])
    assert not report.ok
    assert "'torch' takes module" in report.rows[-1].error
    for arguments in (
        {"backends": []},
        {"sizes": []},
        *({"sizes": [size]} for size in ((1, 2, 3), 5, "ab", (5.7, 6))),
        *({"atol": atol} for atol in ("x", -1, float("nan"), float("inf"))),
    ):
        with pytest.raises(anysize.OptionError):
            anysize.compare(file, **arguments)
    with pytest.raises(ShapeError):
        anysize.compare(toybox.file("EncoderDecoder"), sizes=[(5, 8)])


def test_module_has_the_originals_signature(backend: str) -> None:
    original = toys.EncoderDecoder().eval()
    module = anysize.as_module(anysize.load(original, backend=backend))
    assert isinstance(module, torch.nn.Module)
    for height, width in ((8, 12), (12, 8), (4, 4), (40, 16)):
        x = torch.rand(2, 3, height, width)
        with torch.no_grad():
            want = original(x)
        for got in (module(x), module(x=x), module(x.to(torch.float64)).float()):
            assert got.dtype == torch.float32
            assert torch.allclose(got, want, atol=1e-5)
    half = module(torch.rand(1, 3, 8, 8, dtype=torch.bfloat16))
    assert half.dtype == torch.bfloat16
    leaf = torch.rand(1, 3, 8, 8, requires_grad=True)
    with pytest.raises(OptionError, match="no gradient goes back through it"):
        (module(leaf) + leaf).sum().backward()  # leaf's own share alone would be wrong
    with torch.no_grad():
        assert module(leaf).requires_grad is False
    strided = torch.rand(1, 8, 12, 3).permute(0, 3, 1, 2)
    assert torch.allclose(module(strided), original(strided), atol=1e-5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(module(x), want, atol=1e-5)  # a host's autocast does not change what runs


@dataclass
class Answer:
    """As hosts' models give it: not registered with PyTorch."""

    picture: torch.Tensor
    rest: dict[str, Any]
    note: str = "kept"


class Host(torch.nn.Module):
    """A model with a config, an argument that is none of the graph's, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"scale": 2}
        self.up = toys.Nearest(2)
        self.tone = torch.nn.Conv2d(3, 3, 1)

    def forward(self, image: torch.Tensor, gain: torch.Tensor, mode: str | None = None) -> Answer:
        y = self.tone(image) * gain[:, :, None, None]
        return Answer(self.up(y), {"mean": y.mean((2, 3)), "pair": (y, [image + 1])})


def test_module_like_the_original(backend: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    original = Host()
    file = export(original, tmp_path / "m.onnx", inputs={"image": ("n", 3, "h", "w"), "gain": ("n", 3)})
    if backend == "torch":
        original.inputs = anysize.load(file).spec.inputs
    session = anysize.load(original if backend == "torch" else file, backend=backend)
    half = copy.deepcopy(original).train().half()
    module = anysize.as_module(session, like=half)
    assert half.training
    assert type(module) is Host
    assert (module.config, module.up.scale) == ({"scale": 2}, 2)
    assert [(p.dtype, p.numel()) for p in module.parameters()] == [(torch.float16, 1)]
    for again in (module, copy.deepcopy(module)):
        for size in ((5, 7), (7, 5), (1, 1), (32, 9)):
            image, gain = torch.rand(2, 3, *size), torch.rand(2, 3)
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                got = again(image, gain=gain)
            with torch.inference_mode():
                want = original(image, gain)
            assert type(got) is Answer
            assert (got.note, list(got.rest), type(got.rest["pair"][1])) == ("kept", ["mean", "pair"], list)
            torch.testing.assert_close(got.picture, want.picture, atol=1e-5, rtol=0)
            torch.testing.assert_close(got.rest, want.rest, atol=1e-5, rtol=0)
    assert module(image, gain, None).picture.shape == want.picture.shape
    with pytest.raises(OptionError, match="'mode' is given, and the session takes gain, image"):
        module(image, gain, "fast")
    with pytest.raises(TypeError, match="missing a required argument: 'gain'"):
        module(image)
    with pytest.raises(ShapeError, match=r"'gain': got int, but must be a torch\.Tensor"):
        module(image, 3)


@dataclass(frozen=True)
class Late:
    y: torch.Tensor
    twice: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "twice", self.y * 2)


@dataclass
class Mean:
    """With an attribute that is no field."""

    y: torch.Tensor

    def __post_init__(self) -> None:
        self.mean = self.y.mean()


class Returns(torch.nn.Module):
    """A convolution, and what is made of its result."""

    def __init__(self, put: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.put = put

    def forward(self, x: torch.Tensor, scale: float = 1.5) -> Any:
        return self.put(self.conv(x) * scale)


class Own(dict):
    """PyTorch does not look into it."""


def test_results_are_the_sessions_or_refused() -> None:
    x = torch.rand(1, 3, 6, 5)
    original = Returns(Late).eval()
    original.register_forward_hook(lambda module, given, made: Late(made.y + 1))
    module = anysize.as_module(anysize.load(original, backend="torch"), like=original)
    with torch.no_grad():
        got, want = module(x, scale=float("1.5")), original(x)
    torch.testing.assert_close(got.y, want.y)  # the hook ran once
    torch.testing.assert_close(got.twice, want.twice)
    with pytest.raises(OptionError, match="'scale' is given"):
        module(x, 2.0)
    with pytest.raises(OptionError, match=r"conv.forward: an engine runs this Returns; its weights"):
        module.conv(x)
    with pytest.raises(OptionError, match="a session cannot be traced"):
        torch.jit.trace(module, x)
    for wrong in (x.to_sparse(), x.to("meta")):
        with pytest.raises(ShapeError, match="must be dense"):
            module(wrong)
    for put, reason in (
        (lambda y: Own(y=y), "results in a Own cannot be put together again"),
        (lambda y: (y, {1, 2}), "results in a set cannot be put together again"),
        (lambda y: {"y": y, "size": y.shape[-1]}, "returns beside tensors depends on the input"),
        (lambda y: {"y": y, "odd": y.shape[-1] % 2}, "returns beside tensors depends on the input"),
        (
            lambda y: {"y": y, "wide": y.shape[-1] > y.shape[-2]},
            "returns beside tensors depends on the input",
        ),
        (lambda y: Mean(y), "a Mean with mean cannot be put together again"),
    ):
        made = Returns(put).eval()
        with pytest.raises(OptionError, match=reason):
            anysize.as_module(anysize.load(made, backend="torch"), like=made)
    with pytest.raises(OptionError, match="a session cannot be traced"):
        make_fx(module)(x)
    for scale in (1.03, -1):  # other weights, also where results are small
        made, other = (Returns(lambda y: y * 0.01).eval() for _ in range(2))
        with torch.no_grad():
            other.conv.weight *= scale
        with pytest.raises(OptionError, match=r"not of this Returns: at .* it is off by \S+, of values"):
            anysize.as_module(anysize.load(made, backend="torch"), like=other)


def test_a_hosts_autocast_does_not_change_what_is_loaded(backend: str) -> None:
    original, x = toys.EncoderDecoder().eval(), torch.rand(1, 3, 8, 12)
    with torch.autocast("cpu", torch.bfloat16):
        session = anysize.load(original, backend=backend)
    with torch.no_grad():
        np.testing.assert_allclose(session(x.numpy()), original(x).numpy(), atol=1e-5)


def test_a_module_that_is_not_like_the_session(toybox: ToyBox) -> None:
    session = toybox.session("Nearest", ENGINES[0], scale=2)
    for other, reason in (
        (toys.Nearest(3), r"gives \[\(1, 3, 2, 2\)\], not \[\(1, 3, 3, 3\)\]"),
        (toys.Convolution(channels=4), "does not run at"),
        (toys.TwoInputs(), "the session takes x, and TwoInputs's forward does not"),
    ):
        with pytest.raises(OptionError, match=reason):
            anysize.as_module(session, like=other)
    with pytest.raises(OptionError, match=r"like is the model, a torch\.nn\.Module, not str"):
        anysize.as_module(session, like="Nearest")
    with pytest.raises(OptionError, match="need the model of diffusers"):
        anysize.as_module({"x": session}, like=toys.Nearest(2))


def test_module_with_two_inputs(tmp_path: Path) -> None:
    original = toys.TwoInputs()
    file = export(
        original, tmp_path / "m.onnx", inputs={"image": ("n", 3, "h", "w"), "mask": ("n", 1, "a", "b")}
    )
    module = anysize.as_module(anysize.load(file))
    image, mask = torch.rand(1, 3, 6, 8), torch.rand(1, 1, 12, 16)
    with torch.no_grad():
        want = original(image, mask)
    for got in (module(image, mask), module(image, mask=mask), module(mask=mask, image=image)):
        assert torch.allclose(got, want, atol=1e-5)
    for args, kwargs, error in (
        ((image,), {}, ShapeError),
        ((), {}, ShapeError),
        ((image, mask, mask), {}, TypeError),
        ((image, mask), {"mask": mask}, TypeError),
        ((image, mask.numpy()), {}, ShapeError),
        ((image, mask[:, :, :-1]), {}, ShapeError),
    ):
        with pytest.raises(error):
            module(*args, **kwargs)


def test_module_from_several_threads(backend: str) -> None:
    original = toys.Convolution().eval()
    module = anysize.as_module(anysize.load(original, backend=backend))
    inputs = [torch.rand(1, 3, 10 + i, 30 - i) for i in range(16)]
    with torch.no_grad():
        want = [original(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            for got, right in zip(pool.map(module, inputs), want, strict=True):
                assert torch.allclose(got, right, atol=1e-5)


def test_the_plugin_of_pytest(tmp_path: Path) -> None:
    """A host's own tests, which import nothing of it."""
    (tmp_path / "test_host.py").write_text(
        """
import anysize, pytest

def test_each(backend):
    assert anysize.load("default", backend=backend).backend == backend

@pytest.mark.parametrize("backend", ["mine"])
def test_own_parameters(backend):
    assert backend == "mine"

@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_chosen(backend):
    assert backend == "torch"

@pytest.mark.parametrize(argnames="other,number", argvalues=[(1, 2)])
def test_by_keywords(other, number):
    assert (other, number) == (1, 2)

@pytest.mark.parametrize(argnames=["backend"], argvalues=[["mine"]])
def test_own_by_keywords(backend):
    assert backend == "mine"

def test_asked_for_late(request):
    with pytest.raises(pytest.fail.Exception, match="name it among the test's arguments"):
        request.getfixturevalue("backend")

def test_parity():
    anysize.assert_parity("default", sizes=[(9, 8)], atol=0)
"""
    )
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "conftest.py").write_text(
        "import pytest\n@pytest.fixture\ndef backend(): return 'theirs'\n"
    )
    (tmp_path / "own" / "test_own.py").write_text("def test_fixture(backend): assert backend == 'theirs'\n")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    passed = re.findall(r"::(\S+) PASSED", done.stdout)
    names = [f"test_each[{name}]" for name in ENGINES]
    assert sorted(passed) == sorted(
        [
            *names,
            "test_own_parameters[mine]",
            "test_chosen[torch]",
            "test_by_keywords[1-2]",
            "test_own_by_keywords[mine]",
            "test_asked_for_late",
            "test_fixture",
        ]
    ), done.stdout
    assert re.search(r"E +FAIL \w+ f32 1x9x8: max\|d\| \S+, PSNR \S+ dB, worst at output\[", done.stdout)
    assert "def compare" not in done.stdout


def test_what_is_wrong_with_a_file_is_said_by_an_engine_that_takes_it(tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(ModelLoadError) as caught:
        anysize.compare(tmp_path / "cut.onnx")
    assert "torch" not in str(caught.value)


def test_an_engine_alone_has_nothing_to_agree_with(toybox: ToyBox, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = next(name for name in ENGINES if name != "torch")
    monkeypatch.setattr("anysize.parity.takers", lambda _: [engine])
    monkeypatch.setattr("anysize.parity._REFERENCES", (engine,))
    with pytest.raises(OptionError, match=f"only {engine} takes this model here: a second engine"):
        anysize.compare(toybox.file("Convolution"))
    if engine in BF16:
        assert anysize.compare(toybox.file("Convolution"), precision="bf16", atol=0.1).rows


def test_psnr_is_over_the_value_range() -> None:
    from anysize.parity import _row

    spec = toys.image_spec()
    want = {"output": np.zeros((1, 3, 2, 2), np.float32)}
    row = _row("b", "f32", {}, {"output": want["output"] + 0.1}, want, spec, 1.0)
    assert row.psnr == pytest.approx(20, abs=1e-3)
    assert row.size_text == "fixed"
    assert not _row("b", "f32", {}, {"output": want["output"][:, :2]}, want, spec, 1.0).ok
    assert not _row("b", "f32", {}, {"output": want["output"] + np.nan}, want, spec, 1.0).ok
