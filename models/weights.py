"""Weights files -> modules: the architecture and its sizes are read off the state dict's keys and shapes."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anysize.backends.errors import BackendUnavailableError, ModelLoadError
from anysize.models.community import installed, recognise
from anysize.models.untrusted import check_pickles, limited, plain

StateDict = Mapping[str, Any]


@dataclass(frozen=True)
class Weights:
    """A loaded file: the module in f32 and eval mode, what it is, and the sha256 of the file."""

    module: Any
    architecture: str
    in_channels: int
    sha256: str


def load_weights(path: str | Path) -> Weights:
    """Load `.pth`, `.pt`, `.ckpt` (tensors only, no code is run) or `.safetensors` into their module.

    It is one of this package, or where spandrel is installed one of those that spandrel recognises.

    Raises `ModelLoadError` naming what was found, `BackendUnavailableError` where torch is missing.
    """
    path = Path(path)
    try:
        import torch  # noqa: F401 - the architectures and both readers below need it
    except ImportError as error:
        raise BackendUnavailableError(
            f'{path.suffix} weights need torch: pip install "anysize[torch]", or "anysize[export]" to run '
            "them on other engines",
            name="torch",
        ) from error
    loaded = plain(_read(path), path)
    try:
        with limited(path):
            module = _own(loaded, path)
        architecture = type(module).__name__
    except ModelLoadError as error:
        with limited(path):
            module = _communitys(loaded, error)
        architecture = module.architecture
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    module = module.float().eval().requires_grad_(False)
    return Weights(module, architecture, module.in_channels, sha256)


def _own(loaded: Any, path: Path) -> Any:
    """A module of this package. Raises `ModelLoadError`."""
    state = _state_dict(loaded, path)
    module = None
    for known in (_compact, _rrdbnet, _animegan):
        try:
            module = module or known(state, path)
        except (ZeroDivisionError, ValueError, RuntimeError) as error:
            raise ModelLoadError(f"{path}: {_describe(state)} has impossible sizes: {error}") from error
    if module is None:
        ours = "RRDBNet, SRVGGNetCompact, LumaCompact and AnimeGANv2"
        raise ModelLoadError(f"{path}: {_describe(state)} is none of {ours}")
    try:
        module.load_state_dict(_rename(state, type(module).__name__), strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelLoadError(f"{path}: looks like {type(module).__name__}, but {reason}") from error
    return module


def _communitys(loaded: Any, problem: ModelLoadError) -> Any:
    """A module of spandrel's, for what is none of this package's; `problem` says why not."""
    if not isinstance(loaded, Mapping):
        raise problem
    if not installed():
        more = 'for over 40 more architectures, pip install "anysize[archs]" (see docs/community.md)'
        raise ModelLoadError(f"{problem}; {more}") from problem
    try:
        module = recognise(loaded)
    except ModelLoadError as error:
        raise ModelLoadError(f"{problem}; spandrel: {error}") from error
    if module is None:
        raise ModelLoadError(f"{problem}, and spandrel does not know it either") from problem
    return module


def _read(path: Path) -> Any:
    import pickle

    import torch

    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        check_pickles(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise BackendUnavailableError(
            f'{path.suffix} weights need safetensors: pip install "anysize[torch]"', name="safetensors"
        ) from error
    except pickle.UnpicklingError as error:
        raise ModelLoadError(
            f"{path}: refused, it is not a plain file of tensors (only tensors are loaded, never code)"
        ) from error
    except Exception as error:  # each reader has its own classes for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelLoadError(f"{path}: not a readable weights file: {reason}") from error


def _state_dict(loaded: Any, path: Path) -> StateDict:
    """The tensors by key, out of the wrappers that trainers put around them."""
    import torch

    for wrapper in ("params_ema", "params", "state_dict"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(wrapper), Mapping):
            loaded = loaded[wrapper]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ModelLoadError(f"{path}: holds {type(loaded).__name__}, not a state dict")
    bad = [str(k) for k, v in loaded.items() if not isinstance(v, torch.Tensor)]
    if bad:
        raise ModelLoadError(f"{path}: not a state dict: '{bad[0]}' is no tensor")
    return {str(k).removeprefix("module."): v for k, v in loaded.items()}


def _describe(state: StateDict) -> str:
    keys = list(state)
    shown = ", ".join(f"{k[:80]}{list(state[k].shape)}" for k in keys[:3])
    return f"a state dict of {len(keys)} tensors ({shown}{', ...' if len(keys) > 3 else ''})"


def _is_conv3(tensor: Any) -> bool:
    return tensor.ndim == 4 and tuple(tensor.shape[2:]) == (3, 3) and tensor.numel() > 0


def _compact(state: StateDict, path: Path) -> Any | None:
    chain = "luma." if "luma.0.weight" in state else "body."
    if any(not key.startswith(chain) for key in state):
        return None
    layers = {key.removeprefix(chain): value for key, value in state.items()}
    indices = [int(m[1]) for k in layers if (m := re.fullmatch(r"(0|[1-9][0-9]{0,3})\.weight", k))]
    if len(indices) < 2 or max(indices) > 4 * len(indices):
        return None
    first, last = layers.get("0.weight"), layers[f"{max(indices)}.weight"]
    if first is None or not (_is_conv3(first) and _is_conv3(last)):
        return None
    from anysize.models.architectures import LumaCompact, SRVGGNetCompact

    features, channels = first.shape[:2]
    details = 1 if chain == "luma." else channels
    scale = math.isqrt(last.shape[0] // details)
    if details * scale**2 != last.shape[0] or max(indices) % 2:
        return None
    convolutions = max(indices) // 2 - 1
    name = "LumaCompact" if chain == "luma." else "SRVGGNetCompact"
    if "1.weight" not in layers:
        raise ModelLoadError(
            f"{path}: {name} with {convolutions} convolutions but no PReLU weights: "
            "its activation cannot be told from the file"
        )
    if chain == "luma.":
        return LumaCompact(features, convolutions, scale)
    return SRVGGNetCompact(channels, features, convolutions, scale)


# Three generations of key names. The oldest numbers its top level: 0 is the first convolution, 1 the
# trunk, then the upsampling convolutions in steps of 3, then the last two.
_MIDDLE_NAMES = {
    "trunk_conv": "conv_body",
    "upconv1": "conv_up1",
    "upconv2": "conv_up2",
    "upconv3": "conv_up3",
    "HRconv": "conv_hr",
}


def _rename(state: StateDict, architecture: str) -> dict[str, Any]:
    if architecture != "RRDBNet":
        return dict(state)
    top = sorted({int(m[1]) for k in state if (m := re.fullmatch(r"model\.(\d+)\.weight", k))})
    numbered = {}
    if len(top) >= 3:
        names = ["conv_first", *(f"conv_up{i + 1}" for i in range(len(top) - 3)), "conv_hr", "conv_last"]
        numbered = dict(zip(map(str, top), names, strict=True))
    renamed = {}
    for key, value in state.items():
        key = re.sub(r"^model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.", r"body.\1.rdb\2.conv\3.", key)
        key = re.sub(r"^model\.1\.sub\.\d+\.(weight|bias)$", r"conv_body.\1", key)
        key = re.sub(r"^model\.(\d+)\.", lambda m: f"{numbered.get(m[1], m[0][:-1])}.", key)
        key = re.sub(r"^RRDB_trunk\.(\d+)\.RDB(\d)\.", r"body.\1.rdb\2.", key)
        head, _, tail = key.partition(".")
        renamed[f"{_MIDDLE_NAMES.get(head, head)}.{tail}"] = value
    return renamed


def _animegan(state: StateDict, path: Path) -> Any | None:
    if not {"block_a.0.1.weight", "block_e.2.1.weight", "out_layer.0.weight"} <= set(state):
        return None
    from anysize.models.animegan import AnimeGANv2

    return AnimeGANv2()


def _rrdbnet(state: StateDict, path: Path) -> Any | None:
    state = _rename(state, "RRDBNet")
    first, last = state.get("conv_first.weight"), state.get("conv_last.weight")
    dense = state.get("body.0.rdb1.conv1.weight")
    if first is None or last is None or dense is None or not all(map(_is_conv3, (first, last, dense))):
        return None
    from anysize.models.architectures import RRDBNet

    out_channels, in_channels = last.shape[0], first.shape[1]
    # x2 and x1 models of Real-ESRGAN fold 2x2 or 4x4 input pixels into channels first
    unshuffle = {4 * out_channels: 2, 16 * out_channels: 4}.get(in_channels, 1)
    # counted, as a number in a key may be any: three times five convolutions, with weights and biases, each
    blocks = math.ceil(sum(k.startswith("body.") for k in state) / 30)
    return RRDBNet(
        in_channels=in_channels // unshuffle**2,
        out_channels=out_channels,
        features=first.shape[0],
        growth=dense.shape[0],
        blocks=blocks,
        upsamplings=sum(f"conv_up{i}.weight" in state for i in (1, 2, 3)),
        unshuffle=unshuffle,
    )
