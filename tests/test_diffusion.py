"""Parts of diffusers' models, small ones with random weights: engines against eager PyTorch, at any size."""

from __future__ import annotations

import copy
import itertools
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anysize
import diffusers_toys as small
import numpy as np
import pytest
import torch
from anysize import ExportError, ModelLoadError, OptionError, ShapeError, as_module, load, parts
from anysize.cli import main
from anysize.exporters import export
from anysize.integrations.diffusers import swap
from conftest import ENGINES
from diffusers_toys import eager, feeds_of
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
GRAPHS = [name for name in ENGINES if name in ("onnxruntime", "openvino")]
#: name -> model, and the latents or pictures (n, h, w) it is tried at, none of them used in its export
MODELS: dict[str, tuple[Any, tuple[tuple[int, int, int], ...]]] = {
    "unet 4": (lambda: small.unet(4), ((1, 17, 23), (2, 16, 12), (1, 9, 40), (1, 1, 5))),
    "unet 9": (lambda: small.unet(9), ((1, 17, 23), (2, 16, 12), (1, 9, 40), (1, 1, 5))),
    "encoder": (small.vae, ((1, 136, 184), (2, 64, 48), (1, 75, 101), (1, 8, 9))),
    "decoder": (small.vae, ((1, 17, 23), (2, 8, 6), (1, 9, 13), (1, 1, 2))),
    "transformer": (small.sana, ((1, 32, 32), (1, 48, 40), (2, 20, 44), (1, 1, 40), (1, 40, 1), (1, 32, 32))),
    "dc encoder": (small.deep_vae, ((1, 68, 92), (2, 64, 48), (1, 4, 40), (1, 24, 8))),
    "dc decoder": (small.deep_vae, ((1, 17, 23), (2, 16, 12), (1, 9, 10), (1, 1, 3))),
}


class Shelf:
    """Each part exported once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: dict[str, Path] = {}
        self.models: dict[Any, Any] = {}

    def model(self, name: str) -> Any:
        make = MODELS[name][0]
        return self.models.setdefault(make, make()) if make not in self.models else self.models[make]

    def session(self, name: str, engine: str) -> anysize.Session:
        if name not in self.made:
            found = parts(self.model(name))
            part = found[name.split()[-1]] if len(found) > 1 else next(iter(found.values()))
            self.made[name] = export(part, self.folder / f"{name}.onnx")
        return load(self.made[name], backend=engine)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("parts"))


@pytest.mark.parametrize("name", MODELS)
def test_every_engine_agrees_at_any_size(shelf: Shelf, name: str) -> None:
    allowed = 1e-5 if name == "transformer" else 1e-4
    for engine in GRAPHS:
        session = shelf.session(name, engine)
        for seed, size in enumerate(MODELS[name][1]):
            feeds = feeds_of(session, *size, seed)
            (got,) = session.run(feeds).values()
            want = eager(shelf.model(name), feeds)
            assert got.shape == want.shape
            assert np.abs(got - want).max() <= allowed, (engine, size)


def test_contracts(shelf: Shelf) -> None:
    spec = shelf.session("unet 9", GRAPHS[0]).spec
    assert list(map(str, spec.inputs)) == [
        "sample: float32[n, 9, h, w]",
        "timestep: float32[n]",
        "encoder_hidden_states: float32[n, tokens, 32]",
        "added_cond_kwargs.text_embeds: float32[n, 32]",
        "added_cond_kwargs.time_ids: float32[n, 6]",
    ]
    assert spec.inputs[1].values == (0, 999)
    assert anysize.ModelSpec.from_json(spec.to_json()) == spec
    assert spec.output_rule["output"] == ("n", "4", "h", "w")
    encoder = shelf.session("encoder", GRAPHS[0]).spec
    assert encoder.output_rule["output"] == ("n", "8", "h//8", "w//8")
    assert (encoder.radius, encoder.tileable, encoder.value_range) == (None, False, (-1, 1))
    deep = shelf.session("dc encoder", GRAPHS[0]).spec
    assert deep.dims["h"] == anysize.Dim("h", 4, None, 4)
    with pytest.raises(ShapeError, match="nearest valid: 64 or 68"):
        shelf.session("dc encoder", GRAPHS[0])(np.zeros((1, 3, 66, 64), np.float32))


def test_modules_are_loaded_directly() -> None:
    """One part: the model itself; torch runs it as it is. Several: named."""
    model = small.sana()
    session = load(model, backend="torch")
    feeds = feeds_of(session, 1, 7, 9)
    (got,) = session.run(feeds).values()
    np.testing.assert_allclose(got, eager(model, feeds), atol=1e-6)
    with pytest.raises(ModelLoadError, match=r"several parts; .*encoder, decoder"):
        load(small.vae())
    with pytest.raises(ModelLoadError, match="Linear is none of UNet2DConditionModel, "):
        parts(torch.nn.Linear(3, 3))
    for nothing in (None, 5, {}, b"x"):
        with pytest.raises(ModelLoadError, match="is none of"):
            parts(nothing)
    with pytest.raises(OptionError, match="does not say what it takes"):
        export(model, "sana.onnx")
    odd = small.unet(4)
    odd.register_to_config(class_embed_type="timestep")
    with pytest.raises(ExportError, match="class_embed_type = 'timestep' has inputs that are not known"):
        parts(odd)


# -- a pipeline that does not know


@pytest.fixture
def quiet() -> Iterator[None]:
    """The pipeline casts its autoencoder to and fro, and says so each time."""
    logger = logging.getLogger("diffusers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("channels", [4, 9])
def test_an_inpainting_pipeline_gives_the_same_picture(shelf: Shelf, channels: int) -> None:
    unet, vae = shelf.model(f"unet {channels}"), shelf.model("encoder")
    pipe, run = small.inpainting(unet, vae)
    sizes = ((128, 96), (136, 104), (152, 72))
    want = {size: run(*size) for size in sizes}
    for engine in GRAPHS:
        session = shelf.session(f"unet {channels}", engine)
        coders = {name: shelf.session(name, engine) for name in ("encoder", "decoder")}
        with swap(pipe, unet=session, vae=coders):
            for size in sizes:
                calls = [s.stats.calls for s in (session, *coders.values())]
                assert np.abs(run(*size) - want[size]).max() <= 2 / 255
                after = [s.stats.calls for s in (session, *coders.values())]
                # three steps, each of both guidances; the picture, and what is left of it; the result
                assert [b - a for a, b in zip(calls, after, strict=True)] == [3, 2, 1]
        assert pipe.unet is unet
        assert pipe.vae is vae
    assert np.array_equal(run(*sizes[0]), want[sizes[0]])


def test_all_models_of_a_pipeline_are_swapped_or_none(shelf: Shelf) -> None:
    unet, vae = shelf.model("unet 4"), shelf.model("encoder")
    pipe, _ = small.inpainting(unet, vae)
    session = shelf.session("unet 4", GRAPHS[0])
    for wrong, text in (
        ({"unet": session, "transformer": session}, "has no transformer"),
        ({}, "nothing to swap"),
        ({"unet": session, "vae": session}, "AutoencoderKL has several parts"),
    ):
        with pytest.raises(OptionError, match=text):
            swap(pipe, **wrong)
        assert pipe.unet is unet
    swapped = swap(pipe, unet=session)
    assert isinstance(pipe.unet, type(unet))
    assert pipe.unet is not unet
    swapped.undo()
    swapped.undo()
    assert pipe.unet is unet
    for order in itertools.permutations(range(3)):
        swaps = [swap(pipe, unet=session) for _ in order]
        for left, i in enumerate(order, 1):
            swaps[i].undo()
            assert (pipe.unet is unet) == (left == len(order))
    swapped = swap(pipe, unet=session)
    pipe.unet = other = as_module(session, like=unet)
    swapped.undo()  # somebody has put another in its place
    assert pipe.unet is other


def test_a_stand_in_is_what_its_host_knows(shelf: Shelf) -> None:
    unet, vae, sana = (shelf.model(name) for name in ("unet 4", "encoder", "transformer"))
    session = shelf.session("unet 4", GRAPHS[0])
    module = as_module(session, like=unet)
    assert isinstance(module, type(unet))
    assert module.config == unet.config
    assert (module.dtype, module.device) == (torch.float32, torch.device("cpu"))
    assert module.add_embedding.linear_1.in_features == 6 * 8 + 32
    assert sum(p.numel() for p in module.parameters()) == 1  # the weights are the engine's
    assert sum(p.numel() for p in unet.parameters()) > 10**5
    feeds = feeds_of(session, 2, 6, 5)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    added = {n.partition(".")[2]: tensors.pop(n) for n in list(tensors) if "." in n}
    tensors["timestep"] = torch.tensor(981)  # as schedulers give it: one whole number for all
    want = unet(**tensors, added_cond_kwargs=added).sample.detach()
    for timestep in (981, 981.0, torch.tensor(981), torch.tensor([981]), torch.tensor([981.0, 981.0])):
        got = module(tensors["sample"], timestep, tensors["encoder_hidden_states"], added_cond_kwargs=added)
        assert type(got) is type(unet(**tensors, added_cond_kwargs=added))
        torch.testing.assert_close(got.sample, want, atol=1e-4, rtol=0)
    half = module(
        tensors["sample"].bfloat16(),
        981,
        tensors["encoder_hidden_states"].half(),
        added_cond_kwargs=added,
        cross_attention_kwargs=None,
        return_dict=False,
    )
    assert isinstance(half, tuple)
    assert half[0].dtype == torch.bfloat16
    with pytest.raises(
        OptionError, match=r"'added_cond_kwargs.image_embeds' is given, and the session takes"
    ):
        module(**tensors, added_cond_kwargs={**added, "image_embeds": torch.zeros(1)})
    with pytest.raises(OptionError, match=r"'down_block_additional_residuals' is given"):
        module(**tensors, added_cond_kwargs=added, down_block_additional_residuals=(torch.zeros(1),))
    with pytest.raises(ShapeError, match=r"'added_cond_kwargs.text_embeds': got nothing"):
        module(**tensors, added_cond_kwargs={"time_ids": added["time_ids"]})
    with pytest.raises(TypeError, match="unexpected keyword"):
        module(**tensors, nonsense=1)
    text = tensors["encoder_hidden_states"]
    wrong: dict[str, Any]
    for wrong in (
        {"encoder_hidden_states": torch.tensor(1.0)},
        {"encoder_hidden_states": text[0]},
        {"encoder_hidden_states": text.numpy()},
        {"sample": torch.tensor(1.0)},
        {"sample": tensors["sample"].to(torch.complex64)},
        {"sample": tensors["sample"].to("meta")},
        {"sample": (tensors["sample"] * 9).to(torch.uint8)},
        {"sample": tensors["sample"].to_sparse()},
        {"timestep": "a"},
        {"timestep": torch.tensor([1, 2, 3])},
        {"timestep": torch.tensor([[981]])},
        {"timestep": 2**24 + 1},
    ):
        with pytest.raises(ShapeError):
            module(**{**tensors, **wrong}, added_cond_kwargs=added)
    for method in ("save_pretrained", "enable_freeu", "set_default_attn_processor", "fuse_qkv_projections"):
        with pytest.raises(
            OptionError, match=f"{method}: an engine runs this UNet2DConditionModel; its weights"
        ):
            getattr(module, method)("anything")
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(unet.state_dict())
    for again in (copy.deepcopy(module), as_module(session, like=module)):
        got = again(**tensors, added_cond_kwargs=added).sample
        torch.testing.assert_close(got, want, atol=1e-4, rtol=0)

    # tiles and slices are the host's own code, around the session
    decoder = as_module({"decoder": shelf.session("decoder", GRAPHS[0])}, like=vae)
    decoder.half()  # as pipelines do; what is left of the original is a copy
    assert decoder.encoder.conv_in.weight.dtype == torch.float16
    assert {p.dtype for p in vae.parameters()} == {torch.float32}
    decoder.float()
    assert decoder.decoder.conv_in.in_channels == vae.decoder.conv_in.in_channels
    with pytest.raises(ModelLoadError, match="stands in for one that an engine runs"):
        parts(decoder)
    assert decoder.decode.__func__ is vae.decode.__func__
    latent = torch.randn(2, 4, 9, 17, generator=torch.Generator().manual_seed(0))
    for model in (vae, decoder):
        model.enable_tiling()
        model.enable_slicing()
    try:
        with torch.inference_mode():
            torch.testing.assert_close(
                decoder.decode(latent).sample, vae.decode(latent).sample, atol=1e-4, rtol=0
            )
    finally:
        vae.disable_tiling()
        vae.disable_slicing()

    # what the host leaves out changes nothing
    session = shelf.session("transformer", GRAPHS[0])
    stands = as_module(session, like=sana)
    x, text, step = torch.randn(1, 4, 6, 7), torch.randn(1, 5, 8), torch.tensor([500])
    with torch.inference_mode():
        torch.testing.assert_close(
            stands(x, text, step).sample, sana(x, text, step).sample, atol=1e-5, rtol=0
        )
        for kind in (torch.bool, torch.int64, torch.float32):
            mask = torch.tensor([[1, 1, 0, 1, 0]]).to(kind)
            got = stands(x, text, step, encoder_attention_mask=mask, attention_kwargs={}, return_dict=False)[
                0
            ]
            torch.testing.assert_close(
                got, sana(x, text, step, encoder_attention_mask=mask).sample, atol=1e-5, rtol=0
            )
    with pytest.raises(ShapeError, match="the dtype must be int64"):
        stands(x, text, step, encoder_attention_mask=torch.full((1, 5), 0.5))


def test_sessions_that_are_not_of_the_model_are_refused(shelf: Shelf) -> None:
    vae, unet = shelf.model("encoder"), shelf.model("unet 9")
    four, decoder = shelf.session("unet 4", GRAPHS[0]), shelf.session("decoder", GRAPHS[0])
    with pytest.raises(OptionError, match="not of UNet2DConditionModel's unet: it takes sample"):
        as_module(four, like=unet)
    with pytest.raises(OptionError, match="AutoencoderKL has several parts; give a session by name"):
        as_module(decoder, like=vae)
    with pytest.raises(OptionError, match="AutoencoderKL has the parts encoder, decoder, not"):
        as_module({"unet": four}, like=vae)
    with pytest.raises(OptionError, match="not of AutoencoderKL's encoder"):
        as_module({"encoder": decoder}, like=vae)
    other = small.sana(out_channels=8)
    with pytest.raises(OptionError, match=r"not .* and 8 channels of 1 times the size"):
        as_module(shelf.session("transformer", GRAPHS[0]), like=other)
    deep = shelf.session("dc decoder", GRAPHS[0])
    with pytest.raises(OptionError, match=r"not .* and 3 channels of 8 times the size"):
        as_module({"decoder": deep}, like=vae)
    with pytest.raises(OptionError, match=r"the session takes sample, .*, and Linear's forward does not"):
        as_module(four, like=torch.nn.Linear(3, 3))
    with pytest.raises(OptionError, match="need the model of diffusers whose parts they are"):
        as_module({"decoder": decoder})
    for other in ("unet.onnx", unet, {"unet": unet}, None):
        with pytest.raises(OptionError, match="as_module takes sessions, as load"):
            as_module(other, like=unet)


def test_what_was_set_on_a_model_after_its_export_is_not_lost(shelf: Shelf) -> None:
    """Other weights, FreeU: a swap would lose them in silence."""
    unet, session = copy.deepcopy(shelf.model("unet 4")), shelf.session("unet 4", GRAPHS[0])
    as_module(session, like=unet)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    with pytest.raises(OptionError, match=r"not of this UNet2DConditionModel: at .* it is off by"):
        as_module(session, like=unet)
    unet.disable_freeu()
    half = copy.deepcopy(unet).bfloat16()
    assert as_module(session, like=half).dtype == torch.bfloat16
    with torch.no_grad():
        unet.conv_out.weight *= 1.05
    with pytest.raises(OptionError, match=r"not of this UNet2DConditionModel: at .* it is off by"):
        as_module(session, like=unet)
    vae = copy.deepcopy(shelf.model("encoder"))
    with torch.no_grad():
        vae.decoder.conv_out.bias += 0.1
    coders = {name: shelf.session(name, GRAPHS[0]) for name in ("encoder", "decoder")}
    with pytest.raises(OptionError, match=r"not of this AutoencoderKL: at .* it is off by"):
        as_module(coders, like=vae)
    as_module({"encoder": coders["encoder"]}, like=vae)
    as_module(coders, like=vae.to("meta"))  # without weights there is nothing to hold it against


# -- positions


def test_fixed_positions_take_one_size(tmp_path: Path) -> None:
    model = small.sana(sample_size=8)
    (part,) = parts(model, positions="fixed").values()
    file = export(part, tmp_path / "fixed.onnx")
    for engine in ENGINES:
        session = load(part if engine == "torch" else file, backend=engine)
        assert str(session.spec.inputs[0]) == "hidden_states: float32[n, 4, 8, 8]"
        feeds = feeds_of(session, 2, 8, 8)
        (got,) = session.run(feeds).values()
        np.testing.assert_allclose(got, eager(model, feeds), atol=1e-5)
        calls = session.stats.calls
        for size in ((4, 16), (16, 4), (16, 16), (8, 9)):
            feeds["hidden_states"] = np.zeros((2, 4, *size), np.float32)
            with pytest.raises(ShapeError, match="must be 8; nearest valid: 8"):
                session.run(feeds)
        assert session.stats.calls == calls
    for size in ((16, 16), (4, 16)):  # eager, the class itself takes them, with other positions
        assert (
            model(torch.zeros(1, 4, *size), torch.zeros(1, 2, 8), torch.tensor([1])).sample.shape[2:] == size
        )


def command(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["export", *map(str, arguments)])
    return int(caught.value.code or 0)


def published(model: Any, folder: Path, table: torch.Tensor | None = None) -> Path:
    """A checkpoint folder as diffusers writes it, with a table of positions in its file."""
    model.save_pretrained(folder)
    if table is not None:
        file = folder / "diffusion_pytorch_model.safetensors"
        save_file({**load_file(file), "patch_embed.pos_embed": table}, file, {"format": "pt"})
    return folder


def test_a_checkpoint_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vae = small.vae()
    folder = published(vae, tmp_path / "vae")
    part = parts(folder)["decoder"]
    latent = torch.randn(1, 4, 3, 5)
    with torch.inference_mode():
        torch.testing.assert_close(part(latent), vae.decode(latent).sample, atol=1e-6, rtol=0)
    assert command(folder, "-o", tmp_path / "d.onnx") == 2
    assert "--part encoder or --part decoder" in capsys.readouterr().err
    assert command(folder, "--part", "decoder", "-o", tmp_path / "d.onnx") == 0
    assert "z: float32[n, 4, h, w] -> output: float32[n, 3, 8*h, 8*w]" in " ".join(
        capsys.readouterr().out.split()
    )
    assert load(tmp_path / "d.onnx")(latent.numpy()).shape == (1, 3, 24, 40)
    for arguments, reason in (
        (("-o", tmp_path / "d.png"), "the suffix must be .onnx or .xml"),
        (("-o", tmp_path / "no" / "d.onnx"), "the folder does not exist"),
        (("-o", tmp_path / "d.onnx", "--latents", "40x24,33x65"), "one size, such as 64x48"),
        (("-o", tmp_path / "d.onnx", "--latents", "40"), "must look like 64x48, not '40'"),
    ):
        assert command(folder, "--part", "decoder", *arguments) == 2
        assert reason in " ".join(capsys.readouterr().err.split())

    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ModelLoadError, match=r"a pipeline; name the folder of one of its models: vae"):
        parts(tmp_path)
    with pytest.raises(ModelLoadError, match="not a folder as diffusers publishes"):
        parts(tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderTiny"}))
    with pytest.raises(ModelLoadError, match="AutoencoderTiny is none of UNet2DConditionModel, "):
        load(folder)
    (folder / "config.json").write_text(json.dumps({**config, "norm_num_groups": 8, "layers_per_block": 2}))
    with pytest.raises(ModelLoadError, match=r"weights that are missing for AutoencoderKL: \S+, \d+ in all"):
        parts(folder)
    for name in (["x"], {}, None, 5):
        (folder / "config.json").write_text(json.dumps({**config, "_class_name": name}))
        with pytest.raises(ModelLoadError, match="not a folder as diffusers publishes"):
            parts(folder)
    (folder / "config.json").write_text("[" * 100000)
    with pytest.raises(ModelLoadError, match="not a folder as diffusers publishes"):
        parts(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="not a folder as diffusers publishes"):
        parts(folder)
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match=r"vae: "):
        parts(folder)


def test_a_folder_with_other_files_of_weights(tmp_path: Path) -> None:
    """In several files, or in one variant alone, as many keep it."""
    vae, latent = small.vae(), torch.randn(1, 4, 3, 5)
    with torch.inference_mode():
        want = vae.decode(latent).sample
        for name, arguments, error in (
            ("shards", {"max_shard_size": "50KB"}, 1e-6),
            ("fp16", {"variant": "fp16"}, 0.02),
            ("shards-fp16", {"variant": "fp16", "max_shard_size": "50KB"}, 0.02),
        ):
            stored = copy.deepcopy(vae).half() if "fp16" in name else vae
            stored.save_pretrained(tmp_path / name, **arguments)
            assert len(list((tmp_path / name).glob("*.safetensors"))) == 1 or "shards" in name
            part = parts(tmp_path / name)["decoder"]
            assert {p.dtype for p in part.parameters()} == {torch.float32}
            torch.testing.assert_close(part(latent), want, atol=error, rtol=0)
    shard = next(iter((tmp_path / "shards").glob("*.safetensors")))
    shard.unlink()
    with pytest.raises(ModelLoadError, match=f"shards: .*{shard.name}"):
        parts(tmp_path / "shards")
    file = tmp_path / "fp16" / "diffusion_pytorch_model.fp16.safetensors"
    file.with_name("diffusion_pytorch_model.bf16.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(ModelLoadError, match="weights of several variants, bf16, fp16; keep one"):
        parts(tmp_path / "fp16")
    for there in tmp_path.glob("fp16/*.safetensors"):
        there.unlink()
    with pytest.raises(ModelLoadError, match="only its config; other kinds of weights are not read"):
        parts(tmp_path / "fp16")
    (tmp_path / "fp16" / "diffusion_pytorch_model.bin").touch()
    with pytest.raises(
        ModelLoadError, match=r"beside its config only diffusion_pytorch_model.bin; other kinds"
    ):
        parts(tmp_path / "fp16")
    (tmp_path / "fp16" / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"a folder without config\.json"):
        load(tmp_path / "fp16")
    with pytest.raises(ModelLoadError, match="no such model or file"):
        load(tmp_path / "nowhere")


def test_a_table_that_does_not_fit_says_what_would(tmp_path: Path) -> None:
    small_table = small.sana(sample_size=8).patch_embed.pos_embed
    fits = published(small.sana(sample_size=8), tmp_path / "fits", small_table)
    assert list(parts(fits)) == ["transformer"]

    # of another size
    other = published(small.sana(sample_size=16), tmp_path / "other", small_table)
    expected = (
        r"positions for latents of 8x8, which do not fit SanaTransformer2DModel: its config says "
        r"sample_size = 16. What fits: SanaTransformer2DModel with sample_size = 8 and interpolation_scale = "
        r"1 in its config, for any size; positions='fixed', for latents of 8x8 only. An approximation"
    )
    with pytest.raises(ModelLoadError, match=expected):
        load(other)
    assert parts(other, positions="fixed")["transformer"].inputs[0].shape[2:] == (8, 8)

    # for a class that has none, and would run without them
    none = published(small.sana(positions=False, sample_size=8), tmp_path / "none", small_table)
    with pytest.raises(ModelLoadError, match=r"no positions and would ignore them. What fits: .*_scale = 1 "):
        parts(none)
    fixed = parts(none, positions="fixed")["transformer"]
    feeds = [
        torch.randn(1, 4, 8, 8),
        torch.randn(1, 5, 8),
        torch.ones(1),
        torch.ones(1, 5, dtype=torch.int64),
    ]
    with_positions = small.sana(sample_size=8)
    without = small.sana(positions=False, sample_size=8)
    with torch.inference_mode():
        want, plain = (m(*feeds[:3]).sample for m in (with_positions, without))
        torch.testing.assert_close(fixed(*feeds), want, atol=1e-6, rtol=0)
        assert (want - plain).abs().max() > 1e-3

    # learned, or of another formula
    learned = torch.randn(1, 64, 32, generator=torch.Generator().manual_seed(0))
    folder = published(small.sana(sample_size=8), tmp_path / "learned", learned)
    with pytest.raises(
        ModelLoadError, match=r"computes others, which differ by up to .* fits: positions='fixed'"
    ):
        parts(folder)
    # written in bf16
    folder = published(small.sana(sample_size=8), tmp_path / "short", small_table.bfloat16())
    assert list(parts(folder)) == ["transformer"]
    # of another file beside it, which diffusers does not read
    save_file({"pos_embed": torch.full((1, 64, 32), 7.0)}, folder / "zz.safetensors")
    assert parts(folder, positions="fixed")["transformer"].steps[0].patch_embed.pos_embed.max() <= 1
    spoilt = small_table.clone()
    spoilt[0, 3, 3] = torch.nan
    folder = published(small.sana(sample_size=8), tmp_path / "spoilt", spoilt)
    for positions in ("computed", "fixed"):
        with pytest.raises(ModelLoadError, match="not finite numbers"):
            parts(folder, positions=positions)
    # of a model that has no such thing
    folder = published(small.vae(), tmp_path / "vae")
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "pos_embed": small_table}, file, {"format": "pt"})
    with pytest.raises(ModelLoadError, match="weights that are unexpected for AutoencoderKL: pos_embed, 1"):
        parts(folder)
    for shape, reason in (
        ((1, 63, 32), "not for a square"),
        ((1, 64, 30), "have 30 features"),
        ((64,), "square"),
    ):
        folder = published(small.sana(sample_size=8), tmp_path / "wrong", torch.zeros(shape))
        for positions in ("computed", "fixed"):
            with pytest.raises(ModelLoadError, match=reason):
                parts(folder, positions=positions)


def test_interpolated_positions_say_how_far_they_are_off(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    model = small.sana(sample_size=16)
    (part,) = parts(model, positions="interpolated", size=(20, 24)).values()
    assert 0.001 < part.positions_error < 1
    assert "off by up to" in caplog.text
    assert part.inputs[0].shape[2:] == (20, 24)
    feeds = [
        torch.randn(1, 4, 20, 24),
        torch.randn(1, 5, 8),
        torch.ones(1),
        torch.ones(1, 5, dtype=torch.int64),
    ]
    with torch.inference_mode():  # the class computes them for that size: close, not equal
        off = (part(*feeds) - model(*feeds[:3]).sample).abs().max()
        assert 1e-5 < off < 0.5
        # of the very size of the table nothing is interpolated
        (same,) = parts(model, positions="interpolated", size=(16, 16)).values()
        assert same.positions_error < 1e-5
    folder = published(model, tmp_path / "sana")
    options = ["--positions", "interpolated", "--latents", "20x24"]
    assert command(folder, "-o", tmp_path / "s.onnx", *options) == 0
    assert "positions interpolated, off by up to" in " ".join(capsys.readouterr().out.split())
    session = load(tmp_path / "s.onnx", backend=GRAPHS[0])
    assert "positions interpolated, off by up to" in session.spec.producer

    # a learned table: measured on itself, at twice the distance
    smooth = torch.linspace(0, 1, 16)[:, None, None] * torch.ones(1, 16, 32)
    folder = published(
        small.sana(positions=False, sample_size=16), tmp_path / "smooth", smooth.reshape(1, 256, 32)
    )
    (part,) = parts(folder, positions="interpolated", size=(32, 32)).values()
    assert part.positions_error < 0.1
    for size in ((0, 4), (4,), 4, (4.0, 4)):
        with pytest.raises(OptionError, match="size must be"):
            parts(model, positions="interpolated", size=size)
    for arguments in ({"positions": "interpolated"}, {"size": (4, 4)}, {"positions": "guessed"}):
        with pytest.raises(OptionError, match="positions"):
            parts(model, **arguments)
    with pytest.raises(OptionError, match="neither the class"):
        parts(small.sana(positions=False), positions="fixed")
    with pytest.raises(OptionError, match="AutoencoderKL has no table of positions"):
        parts(small.vae(), positions="fixed")


def test_no_nan_where_attention_divides_by_nothing(tmp_path: Path) -> None:
    """relu(query) of zero: 0 / (0 + 1e-15), which exporters and engines have been seen to make 0 / 0."""
    model = small.sana(sample_size=8)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.attn1.to_q.weight)
    file = export(parts(model)["transformer"], tmp_path / "nothing.onnx")
    for engine in GRAPHS:
        session = load(file, backend=engine)
        for size in ((1, 1), (8, 8), (5, 9)):
            feeds = feeds_of(session, 1, *size)
            (got,) = session.run(feeds, finite=True).values()
            np.testing.assert_allclose(got, eager(model, feeds), atol=1e-5)
