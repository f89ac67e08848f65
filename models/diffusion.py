"""Diffusers' models as parts that run by themselves: what each takes, gives and is made of, as data.

A *part* is a whole model, or a chain of its submodules such as an autoencoder's decoder. The table names the
classes of diffusers as published in its version 0.42; nothing here imports it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from anysize.backends.errors import BackendUnavailableError, ExportError, ModelLoadError, OptionError
from anysize.backends.spec import Dim, TensorSpec

if TYPE_CHECKING:
    from anysize.models.modules import Part

Positions = Literal["computed", "fixed", "interpolated"]
_POSITIONS = ("computed", "fixed", "interpolated")
#: keys under which a file holds a table of positions
_TABLES = ("pos_embed", "patch_embed.pos_embed")
#: what the names of diffusers' files of weights begin with
_WEIGHTS = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Recipe:
    """How to run a part.

    `inputs`: from the model's config, the tensors in order. A name is that of the argument of the model's
    `forward`; "argument.key" is an entry of a dict. `gives`: its output's channels, and how many times the
    first input's height and width. `chain`: the submodules that it runs one after another; none: the model
    itself. `values`: the range of its images or latents. `result`: "module:class" of what the model returns
    when it returns no tuple. `absent`: what an input is filled with where the host gives none, which must
    change nothing.
    """

    inputs: Callable[[Any], tuple[TensorSpec, ...]]
    gives: Callable[[Any], tuple[int, Fraction]]
    chain: tuple[str, ...] = ()
    values: tuple[float, float] = (-3.0, 3.0)
    result: str = ""
    absent: Mapping[str, float] | None = None


def _tensor(
    name: str, *axes: int | str, values: tuple[float, float] | None = None, dtype: type = np.float32
) -> TensorSpec:
    shape = tuple(Dim(axis) if isinstance(axis, str) else axis for axis in axes)
    return TensorSpec(name, np.dtype(dtype), shape, values)


def _image(name: str, channels: str) -> Callable[[Any], tuple[TensorSpec, ...]]:
    return lambda config: (_tensor(name, "n", getattr(config, channels), "h", "w"),)


_TIMESTEP = _tensor("timestep", "n", values=(0, 999))


def _unet(config: Any) -> tuple[TensorSpec, ...]:
    none = dict.fromkeys(("class_embed_type", "encoder_hid_dim_type", "num_class_embeds"), (None,))
    for name, values in {**none, "addition_embed_type": (None, "text_time")}.items():
        if getattr(config, name) not in values:
            raise ExportError(f"a UNet with {name} = {getattr(config, name)!r} has inputs that are not known")
    width = config.cross_attention_dim
    taken = [
        _tensor("sample", "n", config.in_channels, "h", "w"),
        _TIMESTEP,
        _tensor("encoder_hidden_states", "n", "tokens", width if isinstance(width, int) else width[0]),
    ]
    if config.time_cond_proj_dim is not None:
        taken.append(_tensor("timestep_cond", "n", config.time_cond_proj_dim))
    if config.addition_embed_type == "text_time":
        # six numbers (sizes and crops), each embedded, and the pooled text beside them
        text = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        taken.append(_tensor("added_cond_kwargs.text_embeds", "n", text))
        taken.append(_tensor("added_cond_kwargs.time_ids", "n", 6, values=(0, 1024)))
    return tuple(taken)


def _sana(config: Any) -> tuple[TensorSpec, ...]:
    guidance = (_tensor("guidance", "n", values=(0, 10)),) if config.guidance_embeds else ()
    return (
        _tensor("hidden_states", "n", config.in_channels, "h", "w"),
        _tensor("encoder_hidden_states", "n", "tokens", config.caption_channels),
        _TIMESTEP,
        *guidance,
        _tensor("encoder_attention_mask", "n", "tokens", values=(0, 1), dtype=np.int64),
    )


def _same_size(config: Any) -> tuple[int, Fraction]:
    return config.out_channels or config.in_channels, Fraction(1)


def _factor(levels: Sequence[int]) -> int:
    """Pixels a side for one of an autoencoder's latents: it halves between its levels."""
    return int(2 ** (len(levels) - 1))


#: class of diffusers -> its parts
RECIPES: dict[str, dict[str, Recipe]] = {
    "UNet2DConditionModel": {
        "unet": Recipe(
            _unet, _same_size, result="diffusers.models.unets.unet_2d_condition:UNet2DConditionOutput"
        ),
    },
    "SanaTransformer2DModel": {
        "transformer": Recipe(
            _sana,
            _same_size,
            result="diffusers.models.modeling_outputs:Transformer2DModelOutput",
            absent={"encoder_attention_mask": 1.0},
        ),
    },
    "AutoencoderKL": {
        # the moments of the latent's distribution; who runs it samples
        "encoder": Recipe(
            _image("x", "in_channels"),
            lambda c: (2 * c.latent_channels, Fraction(1, _factor(c.block_out_channels))),
            ("encoder", "quant_conv"),
            (-1.0, 1.0),
        ),
        "decoder": Recipe(
            _image("z", "latent_channels"),
            lambda c: (c.out_channels, Fraction(_factor(c.block_out_channels))),
            ("post_quant_conv", "decoder"),
        ),
    },
    "AutoencoderDC": {
        "encoder": Recipe(
            _image("x", "in_channels"),
            lambda c: (c.latent_channels, Fraction(1, _factor(c.encoder_block_out_channels))),
            ("encoder",),
            (-1.0, 1.0),
        ),
        "decoder": Recipe(
            _image("z", "latent_channels"),
            lambda c: (c.in_channels, Fraction(_factor(c.decoder_block_out_channels))),
            ("decoder",),
        ),
    },
}


def recipes_of(model: object) -> dict[str, Recipe] | None:
    """The recipes for a model of diffusers or a subclass of one; None for anything else."""
    for kind in type(model).__mro__:
        if kind.__module__.partition(".")[0] == "diffusers" and kind.__name__ in RECIPES:
            return RECIPES[kind.__name__]
    return None


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder as diffusers publishes models or pipelines."""
    return (path / "config.json").is_file() or (path / "model_index.json").is_file()


def parts(
    source: Any, *, positions: Positions = "computed", size: tuple[int, int] | None = None
) -> dict[str, Part]:
    """The parts of a model of diffusers, each a module with named tensors in and one tensor out.

    `source`: the model, or its folder in the published layout (`config.json` and safetensors, such as
    `unet/` or `vae/` of a pipeline), which is read without any network. UNet2DConditionModel has the part
    "unet", SanaTransformer2DModel "transformer", AutoencoderKL and AutoencoderDC have "encoder" and
    "decoder". `load` and `exporters.export` take a part, or the model itself where it has but one. A folder
    with weights of one variant only, such as fp16, is read as that; all run in float32.

    `positions`, of a transformer with a table of them: "computed", as its class does it, from the actual
    size; "fixed": the stored table, or else the class's own, for the one size it was made for;
    "interpolated": for the latents' `size` (height, width), bicubic between the positions of that table. That
    is an approximation: its error is logged, is the part's `positions_error`, and stands in the contract.

    Raises `ModelLoadError` (no such model, damaged, or a table that does not fit its class or size: what
    would fit is said), `ExportError` (a UNet with inputs that are not known), `OptionError`,
    `BackendUnavailableError` without torch or diffusers.
    """
    if not isinstance(positions, str) or positions not in _POSITIONS:
        raise OptionError(f"positions must be one of {', '.join(_POSITIONS)}, not {positions!r}")
    if (size is not None) != (positions == "interpolated"):
        raise OptionError("positions='interpolated' needs the latents' size, and nothing else takes one")
    try:
        from anysize.models.modules import Part, check_table, with_table
    except ImportError as error:
        raise _missing("torch", error) from error
    if isinstance(source, (str, os.PathLike)):
        model, table = _open_checkpoint(Path(source))
    else:
        model, table = source, None
    recipes = recipes_of(model)
    if recipes is None:
        raise ModelLoadError(f"{type(model).__name__} is none of {', '.join(RECIPES)} of diffusers")
    if positions != "computed":
        model, fixed, off = with_table(model, table, size)
        return {name: Part(model, recipe, fixed, off) for name, recipe in recipes.items()}
    if table is not None:
        check_table(model, table)
    return {name: Part(model, recipe) for name, recipe in recipes.items()}


def _open_checkpoint(folder: Path) -> tuple[Any, Any]:
    """The model, all of its weights there, and the table of positions that its file holds too, or None."""
    if (folder / "model_index.json").is_file():
        models = sorted(path.parent.name for path in folder.glob("*/config.json"))
        raise ModelLoadError(
            f"{folder}: a pipeline; name the folder of one of its models: {', '.join(models)}"
        )
    try:
        config = json.loads((folder / "config.json").read_text())
        name = config["_class_name"]
        if not isinstance(name, str):
            raise TypeError(f"its config's _class_name is {name!r}")
    except KeyError as error:
        raise ModelLoadError(f"{folder}: its config.json says no {error.args[0]}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ModelLoadError(f"{folder}: not a folder as diffusers publishes models: {error}") from error
    if name not in RECIPES:
        raise ModelLoadError(f"{folder}: {name} is none of {', '.join(RECIPES)} of diffusers")
    try:
        import diffusers
        import torch
        from safetensors import safe_open
    except ImportError as error:
        raise _missing("diffusers", error) from error
    variant = _variant(folder)
    try:
        model, info = getattr(diffusers, name).from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,  # the other kind runs code
            variant=variant,
            torch_dtype=torch.float32,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
        table = None
        for key in info["unexpected_keys"]:
            if key in _TABLES and hasattr(model, "patch_embed"):
                with safe_open(_file_of(folder, key, variant), "pt") as weights:
                    table = weights.get_tensor(key)
    except Exception as error:  # diffusers' and safetensors' own, of many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(f"{folder}: {reason}") from error
    # diffusers goes on with random numbers for what is missing
    wrong = {kind: info[f"{kind}_keys"] for kind in ("missing", "mismatched", "unexpected")}
    wrong["unexpected"] = [key for key in wrong["unexpected"] if table is None or key not in _TABLES]
    for kind, keys in wrong.items():
        if keys:
            raise ModelLoadError(
                f"{folder}: weights that are {kind} for {name}: {keys[0]}, {len(keys)} in all"
            )
    return model, table


def _names(variant: str | None) -> tuple[str, str]:
    """Of the file of a model's weights, and of the list of their files where they have several."""
    infix = f".{variant}" if variant else ""
    return f"{_WEIGHTS}{infix}.safetensors", f"{_WEIGHTS}.safetensors.index{infix}.json"


def _variant(folder: Path) -> str | None:
    """Of the weights to read: the plain ones (None), or else the only variant that is there."""
    found = {path.name for path in folder.iterdir()}
    if not found.isdisjoint(_names(None)):
        return None
    pattern = re.compile(rf"{_WEIGHTS}\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)")
    matches = filter(None, map(pattern.fullmatch, found))
    variants = sorted({match[1] or match[2] for match in matches})
    if len(variants) == 1:
        return variants[0]
    if variants:
        raise ModelLoadError(f"{folder}: weights of several variants, {', '.join(variants)}; keep one")
    others = sorted(found - {"config.json"})
    beside = f"beside its config only {', '.join(others)}" if others else "only its config"
    raise ModelLoadError(f"{folder}: no {_names(None)[0]}, {beside}; other kinds of weights are not read")


def _file_of(folder: Path, key: str, variant: str | None) -> Path:
    """The file that diffusers reads a weight from."""
    file, index = (folder / name for name in _names(variant))
    return folder / json.loads(index.read_text())["weight_map"][key] if index.is_file() else file


def _missing(name: str, error: ImportError) -> BackendUnavailableError:
    return BackendUnavailableError(
        f'models of diffusers need torch and diffusers: pip install "anysize[diffusion]" ({error})', name=name
    )
