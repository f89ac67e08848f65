"""Adapters for hosts, called as the hosts call them; diffusers is in tests/test_diffusion.py.

ComfyUI and the web UIs cannot be installed as packages; tests/hosts.py has doubles of them.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anysize
import hosts
import numpy as np
import pytest
import torch
from anysize.integrations.chainner import BgrUpscaler
from anysize.integrations.service import Service
from anysize.models import BUNDLED
from conftest import ToyBox, needs_bf16
from PIL import Image

Picture = Callable[..., np.ndarray]


# -- ComfyUI


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return hosts.comfyui(monkeypatch, tmp_path)


def test_comfyui_upscales(comfyui: Any, toybox: ToyBox, picture: Picture) -> None:
    own = comfyui.models / "anysize"
    own.mkdir()
    (own / "nearest.onnx").write_bytes(toybox.file("Nearest").read_bytes())
    (own / "readme.txt").touch()
    (comfyui.models / "upscale_models" / "net.pth").touch()
    names, backends, precisions = (
        comfyui.nodes["AnysizeModelLoader"].INPUT_TYPES()["required"][name][0]
        for name in ("model_name", "backend", "precision")
    )
    assert names == [*BUNDLED, "net.pth", "nearest.onnx"]
    assert {"auto", "openvino", "torch"} <= set(backends)
    assert precisions == ["f32", "auto", "bf16"]
    assert set(comfyui.names) == set(comfyui.nodes)
    (model,) = comfyui.execute(
        "AnysizeModelLoader", model_name="nearest.onnx", backend="onnxruntime", precision="f32"
    )
    assert (model.session.backend, model.session.precision) == ("onnxruntime", "f32")
    images = torch.from_numpy(np.stack([picture(33, 41, 3, np.float32, seed) for seed in range(2)]))
    for method in comfyui.nodes["AnysizeUpscale"].INPUT_TYPES()["required"]["method"][0]:
        if method == "lockstep":
            continue
        (result,) = comfyui.execute("AnysizeUpscale", model=model, image=images, method=method)
        want = images.repeat_interleave(2, 1).repeat_interleave(2, 2)
        assert result.dtype == torch.float32
        assert torch.equal(result, want)
        assert hosts.Bar.made[-1].seen == sorted(hosts.Bar.made[-1].seen)
        assert hosts.Bar.made[-1].seen[-1] == hosts.Bar.made[-1].total
    assert model.tiling == anysize.Tiling()  # nodes share the model
    for changed in (images[..., :1], torch.cat([images, images[..., :1]], -1), images * 3 - 1, images[:0]):
        (result,) = comfyui.execute("AnysizeUpscale", model=model, image=changed, method="whole")
        assert result.shape == (len(changed), 66, 82, changed.shape[-1])
        assert not len(result) or (0 <= result.min() <= result.max() <= 1)


@needs_bf16
def test_comfyui_takes_the_choices(comfyui: Any, picture: Picture) -> None:
    """In the engine's own precision, by the method that was asked for, and the host's own folder first."""
    for folder in ("anysize", "upscale_models"):
        (comfyui.models / folder).mkdir(exist_ok=True)
        (comfyui.models / folder / "same.onnx").touch()
    with pytest.raises(anysize.ModelLoadError, match=r"upscale_models.same\.onnx"):
        comfyui.nodes["AnysizeModelLoader"]().load("same.onnx", "openvino", "f32")
    (model,) = comfyui.execute(
        "AnysizeModelLoader", model_name="default", backend="openvino", precision="bf16"
    )
    assert (model.session.backend, model.session.precision) == ("openvino", "bf16")
    image = torch.from_numpy(picture(40, 50, 3, np.float32))[None].requires_grad_()
    for method in ("tile", "whole", "stream"):
        comfyui.execute("AnysizeUpscale", model=model, image=image, method=method)
        assert model.report.method == method


def test_comfyui_refuses_what_is_no_image(comfyui: Any) -> None:
    node, model = comfyui.nodes["AnysizeUpscale"](), anysize.Upscaler()
    for wrong in (
        torch.ones(1, 5, 6, 3, dtype=torch.uint8),
        torch.ones(5, 6, 3),
        np.ones((1, 5, 6, 3)),
        None,
    ):
        with pytest.raises(anysize.ImageError, match="images are floats of shape"):
            node.upscale(model=model, image=wrong, method="auto")
    vast = torch.zeros(1, 1, 1, 3).expand(1, 2**20, 2**20, 3)
    with pytest.raises(anysize.MemoryBudgetError, match="do not fit"):
        node.upscale(model=model, image=vast, method="auto")


def test_comfyui_is_interrupted(comfyui: Any, picture: Picture) -> None:
    (model,) = comfyui.execute("AnysizeModelLoader", model_name="default", backend="auto", precision="f32")
    image = torch.from_numpy(picture(20, 20, 3, np.float32))[None]
    comfyui.interrupted = True
    with pytest.raises(hosts.Interrupted):
        comfyui.execute("AnysizeUpscale", model=model, image=image, method="auto")
    assert not comfyui.interrupted
    assert comfyui.execute("AnysizeUpscale", model=model, image=image, method="auto")[0].shape[1] == 80


def test_comfyui_says_what_is_missing(comfyui: Any) -> None:
    loader = comfyui.nodes["AnysizeModelLoader"]()
    with pytest.raises(anysize.ModelLoadError, match=r"gone\.pth: no such model"):
        loader.load(model_name="gone.pth", backend="auto", precision="f32")


# -- SD.Next and AUTOMATIC1111's web UI


@pytest.fixture(params=["SD.Next", "AUTOMATIC1111"])
def webui(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    return hosts.webui(monkeypatch, tmp_path, request.param)


def test_webui_upscales(webui: Any, toybox: ToyBox, picture: Picture) -> None:
    bundled = [f"anysize {name}" for name in BUNDLED]
    assert [data.name for data in webui.scalers()] == bundled
    folder = webui.models / "anysize"
    folder.mkdir()
    (folder / "nearest.onnx").write_bytes(toybox.file("Nearest").read_bytes())
    (folder / "notes.txt").touch()
    default, *_, nearest = webui.scalers()
    assert (default.name, nearest.name) == ("anysize default", "anysize nearest")
    image = Image.fromarray(picture(24, 32))
    assert webui.run(default, image, 2).size == (64, 48)
    want = np.asarray(image).repeat(4, 0).repeat(4, 1)
    assert np.array_equal(np.asarray(webui.run(nearest, image, 4)), want)  # twice by 2
    assert nearest.scaler.load_model(nearest.name) is nearest.scaler.load_model(nearest.data_path)
    webui.shared.state.interrupted = True
    assert nearest.scaler.do_upscale(image, nearest.data_path) is image
    with pytest.raises(anysize.ModelLoadError, match="no model is called 'other'"):
        nearest.scaler.do_upscale(image, "other")
    for spelled in (str(folder), f"{folder}/", f"{folder}/../anysize"):
        assert len(webui.scalers(spelled)) == len(bundled) + 1  # not twice


def test_webui_models_of_one_name_are_told_apart(webui: Any, toybox: ToyBox) -> None:
    """SD.Next has nothing but a name to choose by."""
    folder, other = webui.models / "anysize", webui.models / "other"
    for home, name, factor in ((folder, "m.onnx", 2), (folder, "default.onnx", 3), (other, "m.onnx", 3)):
        home.mkdir(exist_ok=True)
        (home / name).write_bytes(toybox.file("Nearest", scale=factor).read_bytes())
    (folder / "m.pth").touch()
    found = {data.name: data for data in webui.scalers(str(other))}
    assert list(found) == [f"anysize {name}" for name in (*BUNDLED, "default.onnx", "m", "m.pth", "m.onnx")]
    image = Image.new("RGB", (9, 9))
    for name, factor in (("default", 4), ("default.onnx", 3), ("m", 2), ("m.onnx", 3)):
        data = found[f"anysize {name}"]
        assert data.scaler.do_upscale(image, data.name).size == (9 * factor, 9 * factor)


@needs_bf16
def test_webui_takes_the_settings(webui: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    default = webui.scalers()[0]
    monkeypatch.setattr(type(default.scaler), "backend", "openvino")
    monkeypatch.setattr(type(default.scaler), "precision", "bf16")
    session = default.scaler.load_model("default").session
    assert (session.backend, session.precision) == ("openvino", "bf16")


# -- chaiNNer


def split(
    img: np.ndarray, upscale: Callable[..., np.ndarray], tile: int, overlap: int, scale: int
) -> np.ndarray:
    """Tiles as chaiNNer makes them: read-only views, and an exact scale asserted of each result.

    Follows backend/src/nodes/impl/upscale/auto_split.py of chaiNNer-org/chaiNNer at
    2a028ec199ddcf84b0333112ca7983cfeb27aef8.
    """
    height, width = img.shape[:2]
    result = np.empty((height * scale, width * scale, *img.shape[2:]), np.float32)
    img.setflags(write=False)
    for top in range(0, height, tile):
        for left in range(0, width, tile):
            y, x = max(0, top - overlap), max(0, left - overlap)
            bottom, right = min(height, top + tile + overlap), min(width, left + tile + overlap)
            region = SimpleNamespace(x=x, y=y, width=right - x, height=bottom - y)
            made = upscale(img[y:bottom, x:right], region)
            assert made.dtype == np.float32
            assert made.shape[:2] == ((bottom - y) * scale, (right - x) * scale)
            inner = made[(top - y) * scale :, (left - x) * scale :][: tile * scale, : tile * scale]
            result[top * scale : top * scale + len(inner), left * scale :][:, : inner.shape[1]] = inner
    return result


def test_chainner_upscales(picture: Picture) -> None:
    upscaler = anysize.Upscaler()
    adapter = BgrUpscaler(upscaler)
    for shape in ((45, 61, 3), (45, 61, 4)):
        image = picture(*shape, np.float32)
        want = upscaler(image)
        bgr = [2, 1, 0, 3][: shape[2]]
        turned = np.ascontiguousarray(image[..., bgr])
        assert np.abs(adapter(turned)[..., bgr] - want.clip(0, 1)).max() <= 1e-6
        assert adapter(turned, None).flags.writeable
    image = picture(45, 61, 3, np.float32)
    tiled = split(image[..., ::-1], adapter, 20, 16, adapter.scale)[..., ::-1]
    assert np.abs(tiled - upscaler(image).clip(0, 1)).max() < 1 / 255
    grey = picture(20, 30, 1, np.float32)[..., 0]
    assert adapter(grey).shape == (80, 120)
    assert adapter(np.pad(image, ((0, 0), (0, 0), (0, 1))).astype(np.float64)).dtype == np.float32
    assert adapter(np.ones((9, 9, 3), np.float32)).max() <= 1  # which the model overshoots
    for wrong in (
        np.full((8, 8, 3), 200, np.uint8),
        np.zeros((8, 8, 5), np.float32),
        image[None],
        [[0.5]],
        None,
    ):
        with pytest.raises(anysize.ImageError):
            adapter(wrong)  # type: ignore[arg-type]


# -- web services


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.fromarray(image).save(data, form)
    return data.getvalue()


def test_a_service_takes_and_gives_bytes(picture: Picture) -> None:
    upscaler = anysize.Upscaler()
    service = Service(upscaler, most_pixels=40 * 50, at_once=2)
    images = [picture(17 + i, 23, 3, np.uint8, i) for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(service, map(encoded, images)))
    for image, data in zip(images, results, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), upscaler(image))
    assert Image.open(io.BytesIO(service(encoded(images[0]), outscale=2))).size == (46, 34)
    jpeg = Service(upscaler, format="jpg")
    assert Image.open(io.BytesIO(jpeg(encoded(images[0], "JPEG")))).format == "JPEG"
    with pytest.raises(anysize.Cancelled):
        service(encoded(images[0]), cancel=lambda: True)


def test_a_service_refuses(picture: Picture) -> None:
    service = Service(anysize.Upscaler(), format="jpg", most_pixels=400)
    whole = encoded(picture(20, 20))
    for data, text in (
        (b"", "bytes are needed"),
        ("text", "bytes are needed"),
        (b"GIF89a, or not", "input: not a readable picture"),
        (
            b'<svg xmlns="http://www.w3.org/2000/svg" width="4" height="4"/>',
            "not a readable picture; .png, .jpg",
        ),
        (b"2 2\n1 2\n3 4\n", "not a readable picture; .png, .jpg"),
        (whole[: len(whole) // 2], "input: "),
        (encoded(picture(20, 21)), "input: 21 x 20 pixels, more than the limit of 400"),
        (encoded(picture(20, 20, 4)), "transparency"),
    ):
        with pytest.raises(anysize.ImageError, match=text) as caught:
            service(data)  # type: ignore[arg-type]
        assert "anysize-" not in str(caught.value)
    for wrong in ({"format": "exe"}, {"most_pixels": 0}, {"at_once": 1.5}):
        with pytest.raises(anysize.OptionError):
            Service(anysize.Upscaler(), **wrong)
    with pytest.raises(anysize.OptionError, match=r"an anysize\.Upscaler, not str"):
        Service("default")  # type: ignore[arg-type]


def test_a_service_works_on_so_many_at_a_time(picture: Picture, monkeypatch: pytest.MonkeyPatch) -> None:
    running, most, lock = [0], [0], threading.Lock()

    def counted(*given: Any, **named: Any) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        anysize.upscale_file(*given, **named)
        with lock:
            running[0] -= 1

    monkeypatch.setattr("anysize.integrations.service.upscale_file", counted)
    service = Service(anysize.Upscaler(), at_once=2)
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(service, [encoded(picture(20, 20))] * 12))
    assert most[0] == 2
