"""`compare` and `as_module`: what hosts build their own tests and swaps on."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import anysize
import numpy as np
import pytest
import torch
import toys
from anysize import OptionError, ShapeError
from conftest import ENGINES, ToyBox


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


def test_a_backend_that_refuses_is_a_finding(toybox: ToyBox) -> None:
    file = toybox.file("Nearest")
    assert {r.backend for r in anysize.compare(file).rows} == set(ENGINES) - {"torch"}
    report = anysize.compare(file, backends=["torch", "openvino"])
    assert not report.ok
    assert "'torch' takes module" in report.rows[-1].error
    for arguments in ({"backends": []}, {"sizes": [(1, 2, 3)]}):
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
    assert module(torch.rand(1, 3, 8, 8, requires_grad=True)).requires_grad is False
    strided = torch.rand(1, 8, 12, 3).permute(0, 3, 1, 2)
    assert torch.allclose(module(strided), original(strided), atol=1e-5)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(module(x), want, atol=1e-5)  # a host's autocast does not change what runs


def test_module_with_two_inputs(tmp_path: object) -> None:
    from anysize.exporters import export

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


def test_an_engine_alone_has_nothing_to_agree_with(toybox: ToyBox, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = next(name for name in ENGINES if name != "torch")
    monkeypatch.setattr("anysize.parity.available_backends", lambda: [engine])
    monkeypatch.setattr("anysize.parity._REFERENCES", (engine,))
    with pytest.raises(OptionError, match=f"only {engine} takes this model here: a second engine"):
        anysize.compare(toybox.file("Convolution"))
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
