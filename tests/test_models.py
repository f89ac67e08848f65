"""Weights files: recognised from their keys alone, or refused with what was found."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from pathlib import Path

import anysize
import numpy as np
import pytest
import torch
from anysize import BackendUnavailableError, ModelLoadError
from anysize.models import BUNDLED, bundled_file, load_weights
from anysize.models.architectures import LumaCompact, RRDBNet, SRVGGNetCompact, space_to_depth
from conftest import ENGINES
from safetensors.torch import save_file
from torch.nn import functional as F

State = dict[str, torch.Tensor]


def tiny_rrdb(**kw: int) -> RRDBNet:
    torch.manual_seed(0)
    return RRDBNet(**{"features": 8, "growth": 4, "blocks": 2} | kw)


def to_old_names(state: State, upsamplings: int) -> State:
    """The first ESRGAN release: a numbered top level."""
    order = ["conv_first", None, *(f"conv_up{i + 1}" for i in range(upsamplings)), "conv_hr", "conv_last"]
    last = 2 + 3 * upsamplings
    numbers = dict(
        zip([n for n in order if n], [0, *range(3, 3 * upsamplings + 1, 3), last, last + 2], strict=True)
    )
    renamed = {}
    for key, value in state.items():
        head, _, tail = key.partition(".")
        if head == "body":
            block, dense, conv, kind = tail.split(".")
            renamed[f"model.1.sub.{block}.{dense.upper()}.{conv}.0.{kind}"] = value
        elif head == "conv_body":
            renamed[f"model.1.sub.2.{tail}"] = value
        else:
            renamed[f"model.{numbers[head]}.{tail}"] = value
    return renamed


def to_middle_names(state: State) -> State:
    """The second: RRDB_trunk, trunk_conv, upconv1, HRconv."""
    names = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    renamed = {}
    for key, value in state.items():
        head, _, tail = key.partition(".")
        if head == "body":
            block, dense, rest = tail.split(".", 2)
            renamed[f"RRDB_trunk.{block}.{dense.upper()}.{rest}"] = value
        else:
            renamed[f"{names.get(head, head)}.{tail}"] = value
    return renamed


def roundtrip(
    path: Path, module: torch.nn.Module, rename: Callable[[State], State] = dict, wrap: str = ""
) -> None:
    state = rename(module.state_dict())
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({wrap: state} if wrap else state, path)
    loaded = load_weights(path)
    x = torch.rand(1, loaded.in_channels, 8, 12)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), module.eval()(x))
    assert loaded.architecture == type(module).__name__
    assert len(loaded.sha256) == 64


@pytest.mark.parametrize("wrap", ["", "params", "params_ema", "state_dict"])
def test_wrappers(tmp_path: Path, wrap: str) -> None:
    roundtrip(tmp_path / "m.pth", tiny_rrdb(), wrap=wrap)


def test_params_ema_is_preferred(tmp_path: Path) -> None:
    good, other = tiny_rrdb(), tiny_rrdb(blocks=1)
    torch.save({"params": other.state_dict(), "params_ema": good.state_dict()}, tmp_path / "m.pth")
    assert len(load_weights(tmp_path / "m.pth").module.body) == 2


@pytest.mark.parametrize("blocks", [1, 2, 6, 11])
def test_any_block_count(tmp_path: Path, blocks: int) -> None:
    roundtrip(tmp_path / "m.safetensors", tiny_rrdb(blocks=blocks))


@pytest.mark.parametrize("upsamplings", [0, 1, 2, 3])
def test_old_key_names(tmp_path: Path, upsamplings: int) -> None:
    module = tiny_rrdb(upsamplings=upsamplings)
    roundtrip(tmp_path / "m.pth", module, lambda s: to_old_names(s, upsamplings))


def test_middle_key_names(tmp_path: Path) -> None:
    roundtrip(tmp_path / "m.pth", tiny_rrdb(), to_middle_names)


def test_data_parallel_prefix(tmp_path: Path) -> None:
    roundtrip(tmp_path / "m.pth", tiny_rrdb(), lambda s: {f"module.{k}": v for k, v in s.items()})


@pytest.mark.parametrize(("unshuffle", "scale"), [(1, 4), (2, 2), (4, 1)])
def test_real_esrgan_scales(tmp_path: Path, backend: str, unshuffle: int, scale: int) -> None:
    module = tiny_rrdb(unshuffle=unshuffle, blocks=1)
    torch.save({"params_ema": module.state_dict()}, tmp_path / "m.pth")
    session = anysize.load(tmp_path / "m.pth", backend=backend)
    assert session.spec.scale == scale
    assert session.spec.dims["h"].multiple_of == unshuffle
    x = np.random.default_rng(0).random((1, 3, 5 * unshuffle, 7 * unshuffle), np.float32)
    with torch.no_grad():
        want = module.eval()(torch.from_numpy(x)).numpy()
    assert np.abs(session(x) - want).max() <= 1e-5


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
@pytest.mark.parametrize("convolutions", [1, 5])
def test_compact(tmp_path: Path, scale: int, convolutions: int) -> None:
    torch.manual_seed(0)
    roundtrip(tmp_path / "m.pth", SRVGGNetCompact(3, 8, convolutions, scale), wrap="params")


@pytest.mark.parametrize("scale", [2, 4])
def test_luma_compact(tmp_path: Path, backend: str, scale: int) -> None:
    """Its detail is of light alone: grey stays grey, to the bit."""
    torch.manual_seed(0)
    roundtrip(tmp_path / "m.pth", LumaCompact(8, 3, scale))
    grey = np.random.default_rng(0).random((1, 1, 9, 13), np.float32).repeat(3, 1)
    result = anysize.load(tmp_path / "m.pth", backend=backend)(grey)
    assert result.shape == (1, 3, 9 * scale, 13 * scale)
    assert np.ptp(result) > 0.5
    assert not np.ptp(result, axis=1).any()


def test_grey_models(tmp_path: Path) -> None:
    roundtrip(tmp_path / "m.pth", tiny_rrdb(in_channels=1, out_channels=1))
    roundtrip(tmp_path / "c.pth", SRVGGNetCompact(1, 8, 2, 4))


def test_half_precision_weights_run_in_f32(tmp_path: Path) -> None:
    torch.save(tiny_rrdb().half().state_dict(), tmp_path / "m.pth")
    module = load_weights(tmp_path / "m.pth").module
    assert all(p.dtype == torch.float32 for p in module.parameters())


def test_space_to_depth_is_pixel_unshuffle() -> None:
    x = torch.rand(2, 3, 8, 12)
    for factor in (1, 2, 4):
        assert torch.equal(space_to_depth(x, factor), F.pixel_unshuffle(x, factor))


class Bomb:
    """Unpickling this would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (open, (str(self.path), "w"))


def bad_files(folder: Path) -> dict[str, str]:
    """Name -> what the error must say."""
    (folder / "text.pth").write_text("weights")
    (folder / "text.safetensors").write_text("weights")
    (folder / "empty.pth").write_bytes(b"")
    with (folder / "bomb.pth").open("wb") as file:
        pickle.dump({"params": Bomb(folder / "exploded")}, file)
    torch.save(torch.rand(3), folder / "tensor.pth")
    torch.save({"params": {"a": 1}}, folder / "numbers.pth")
    torch.save({}, folder / "nothing.pth")
    torch.save({"layer.weight": torch.rand(4, 4), "layer.bias": torch.rand(4)}, folder / "linear.pth")
    state = tiny_rrdb().state_dict()
    torch.save(state | {"extra.weight": torch.rand(1)}, folder / "extra.pth")
    state.pop("body.1.rdb3.conv5.bias")
    torch.save(state, folder / "missing.pth")
    compact = SRVGGNetCompact(3, 8, 2, 4).state_dict()
    torch.save({k: v for k, v in compact.items() if v.ndim == 4 or ".0." in k}, folder / "relu.pth")
    luma = LumaCompact(8, 2, 4).state_dict()
    torch.save({k: v for k, v in luma.items() if k != "luma.1.weight"}, folder / "luma.pth")
    torch.save(luma | {"body.0.weight": luma["luma.0.weight"]}, folder / "both.pth")
    torch.save(luma | {"luma.0.weight": torch.zeros(8, 1, 3, 3)}, folder / "grey.pth")
    conv = torch.zeros(3, 3, 3, 3)
    torch.save({"body.0.weight": torch.zeros(4, 0, 3, 3), "body.2.weight": conv}, folder / "none.pth")
    torch.save({f"body.{i}.weight": conv for i in (0, 1, 30_000_000)}, folder / "huge.pth")
    conv = compact["body.0.weight"]
    save_file(
        {"body.0.weight": conv, "body.07.weight": torch.zeros(3, 8, 3, 3)}, folder / "number.safetensors"
    )
    odd = {
        "complex.pth": conv + 0j,
        "sparse.pth": conv.to_sparse(),
        "quantised.pth": torch.quantize_per_tensor(conv, 1.0, 0, torch.qint8),
        "nested.pth": torch.nested.nested_tensor([torch.zeros(3), torch.zeros(4)]),
        "meta.pth": conv.to("meta"),
    }
    for name, tensor in odd.items():
        torch.save(compact | {"body.0.weight": tensor}, folder / name)
    torch.save(compact | {"body.\ud800\n": conv}, folder / "key.pth")
    return {
        **dict.fromkeys(odd, "'body.0.weight' is no dense tensor of real numbers"),
        "number.safetensors": "is none of RRDBNet",
        "key.pth": r"a key that is no name: 'body.\\ud800\\n'",
        "none.pth": "none.pth",
        "huge.pth": "huge.pth",
        "text.pth": "text.pth",
        "text.safetensors": "not a readable weights file",
        "empty.pth": "not a readable weights file",
        "bomb.pth": "never code",
        "tensor.pth": "holds Tensor",
        "numbers.pth": "'a' is no tensor",
        "nothing.pth": "not a state dict",
        "linear.pth": r"2 tensors \(layer.weight\[4, 4\]",
        "extra.pth": "looks like RRDBNet, but .*extra.weight",
        "missing.pth": "looks like RRDBNet, but .*body.1.rdb3.conv5.bias",
        "relu.pth": "SRVGGNetCompact with .* activation cannot be told",
        "luma.pth": "LumaCompact with .* activation cannot be told",
        "both.pth": "is none of RRDBNet",
        "grey.pth": "looks like LumaCompact, but .*luma.0.weight",
    }


def test_anything_else_is_refused_with_what_was_found(tmp_path: Path) -> None:
    for name, says in bad_files(tmp_path).items():
        with pytest.raises(ModelLoadError, match=says) as caught:
            load_weights(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "source", ["nonsense", "missing.pth", "missing.onnx", "picture.png", "", 5, None, b"x"]
)
def test_bad_sources(source: object) -> None:
    with pytest.raises((ModelLoadError, anysize.OptionError)):
        anysize.load(source)


@pytest.mark.parametrize("name", ["x.onnx", "x.xml"])
@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_bad_graph_files(tmp_path: Path, backend: str, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelLoadError):
        anysize.load(tmp_path / name, backend=backend)


def test_torch_says_that_it_takes_no_onnx_file() -> None:
    with pytest.raises(ModelLoadError, match="'torch' takes module, not onnx"):
        anysize.load(bundled_file("default", ".onnx"), backend="torch")


def test_a_five_channel_model_names_the_problem(tmp_path: Path) -> None:
    from anysize.exporters import export

    module = torch.nn.Conv2d(5, 5, 3, padding=1)
    file = export(module, tmp_path / "five.onnx", inputs=[("n", 5, "h", "w")])
    with pytest.raises(ModelLoadError, match=r"1 or 3 channels.*\[n, 5, h, w\]"):
        anysize.Upscaler(file)


def test_unknown_backend_names_the_known_ones() -> None:
    with pytest.raises(anysize.BackendNotFoundError, match=r"'tensorflow'.*openvino, onnxruntime, torch"):
        anysize.load("default", backend="tensorflow")


def test_auto_picks_the_fastest_that_takes_it() -> None:
    assert anysize.load("default").backend == ENGINES[0]
    assert anysize.load(bundled_file("default", ".safetensors"), backend="torch").backend == "torch"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_are_small_and_the_same_on_all_engines(name: str) -> None:
    digests = {".onnx": BUNDLED[name].sha256, ".safetensors": BUNDLED[name].weights_sha256}
    for suffix, digest in digests.items():
        data = bundled_file(name, suffix).read_bytes()
        assert len(data) <= 1_500_000
        assert hashlib.sha256(data).hexdigest() == digest
    x = np.random.default_rng(0).random((1, 3, 31, 22), np.float32)
    results = [anysize.load(name, backend=e)(x) for e in ENGINES]
    scale = BUNDLED[name].scale
    assert results[0].shape == (1, 3, 31 * scale, 22 * scale)
    for result in results[1:]:
        assert np.abs(result - results[0]).max() <= 1e-4


def test_missing_engines_are_named_with_their_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from anysize.backends import registry

    registry.get_backend.cache_clear()
    for name in registry.BUILTIN:
        monkeypatch.setitem(sys.modules, name, None)
    try:
        for name in ("openvino", "onnxruntime", "torch"):
            with pytest.raises(BackendUnavailableError, match=rf'pip install "anysize\[{name}\]"') as caught:
                anysize.load("default", backend=name)
            assert isinstance(caught.value, ImportError)
        with pytest.raises(BackendUnavailableError, match="no installed engine"):
            anysize.load("default")
        with pytest.raises(BackendUnavailableError, match="anysize\\[torch\\]"):
            load_weights(bundled_file("default", ".safetensors"))
        assert anysize.available_backends() == []
        problems = [info.problem for info in registry.describe_backends()]
        assert all(problems)
    finally:
        registry.get_backend.cache_clear()


def test_a_plugin_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    from anysize.backends import registry

    point = metadata.EntryPoint("numpy-oracle", "toys:NumpyBackend", registry.ENTRY_POINT_GROUP)

    def found(*, group: str) -> list[metadata.EntryPoint]:
        return [point] if group == registry.ENTRY_POINT_GROUP else []

    monkeypatch.setattr(metadata, "entry_points", found)
    registry._plugins.cache_clear()
    try:
        assert list(registry.known_backends()) == [*registry.BUILTIN, "numpy-oracle"]
        assert registry.get_backend("numpy-oracle").formats == ("numpy",)
        with pytest.raises(ModelLoadError, match="takes numpy, not bundled"):
            anysize.load("default", backend="numpy-oracle")
    finally:
        registry._plugins.cache_clear()
        registry.get_backend.cache_clear()
