"""ncnn on the CPU, for its own .param and .bin files: any size with one program, pictures one at a time."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends.base import Array, Backend, EngineOptions, Executable, Feeds, Model, Port, Shapes
from anysize.backends.errors import ModelLoadError, OptionError

_MAGIC = "7767517"
_JOINING = ("BinaryOp", "Eltwise", "Concat")
_REMEMBERED_SHAPES = 1024
#: where a convolution's numbers stand in its line: outputs, kernel width and height, size of its weights
_OUTPUTS, _WIDE, _TALL, _WEIGHTS = "0", "1", "11", "6"


class NcnnBackend(Backend):
    name = "ncnn"
    formats = ("ncnn",)
    precisions = ("f32", "bf16")

    def __init__(self) -> None:
        import ncnn

        self._ncnn = ncnn

    @property
    def version(self) -> str:
        return str(self._ncnn.__version__)

    def check(self, options: EngineOptions) -> None:
        if options.precision not in self.precisions:
            raise OptionError(f"ncnn runs {' or '.join(self.precisions)}, not {options.precision}")
        if options.device != "cpu":
            raise OptionError(f"ncnn runs on the cpu here, not on '{options.device}'")

    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        """One program for all sizes; `shapes` only says which will come."""
        net = self._ncnn.Net()
        if options.threads is not None:
            net.opt.num_threads = options.threads
        net.opt.use_bf16_storage = options.precision == "bf16"
        # f16 is used silently otherwise, where the processor has it
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        if model.format != "ncnn":
            raise ModelLoadError(f"ncnn takes .param files, not {model.format}")
        param = Path(model.data)
        layers = _layers(param)
        channels = _input_channels(param, layers)
        if model.spec is not None:
            channels = {t.name: t.shape[1] for t in model.spec.inputs if isinstance(t.shape[1], int)}
        weights = param.with_suffix(".bin")
        if not weights.is_file():
            raise ModelLoadError(f"{weights}: no such file; ncnn keeps a model's weights beside its .param")
        # the engine reads the files itself, at every compilation: they must still be those that were opened
        if model.spec is not None and model.spec.source_sha256 not in ("", digest(param)):
            raise ModelLoadError(f"{param} or {weights} has changed since it was opened")
        if net.load_param(str(param)) or net.load_model(str(weights)):
            raise ModelLoadError(f"ncnn cannot load {param} with {weights}")
        if any(name not in channels for name in net.input_names()):
            raise ModelLoadError(f"{param}: no convolution reads the input, so its channels are unknown")
        return _Program(self._ncnn, net, channels, _joints(layers))


def digest(param: Path) -> str:
    """The sha256 of both files."""
    try:
        return hashlib.sha256(param.read_bytes() + param.with_suffix(".bin").read_bytes()).hexdigest()
    except OSError as error:
        raise ModelLoadError(f"{param}: cannot be read: {error.strerror}") from error


def _layers(param: Path) -> list[list[str]]:
    """The file's lines in words: kind, name, counts of what it reads and makes, their names, its numbers.

    Checked against the counts of the first lines: ncnn has been seen to end the process otherwise.
    """
    try:
        lines = [line.split() for line in param.read_text("ascii").splitlines() if line.strip()]
        if lines[0] == [_MAGIC] and int(lines[1][0]) == len(lines[2:]):
            return lines[2:]
    except OSError as error:
        raise ModelLoadError(f"{param}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, ValueError, IndexError) as error:
        raise ModelLoadError(f"{param}: not an ncnn .param file") from error
    raise ModelLoadError(f"{param}: not an ncnn .param file, or cut short")


def _input_channels(param: Path, layers: list[list[str]]) -> dict[str, int]:
    """Channels of each input that says them, or that a convolution reads."""
    channels: dict[str, int] = {}
    origin: dict[str, str] = {}  # the input that a tensor is a copy of
    try:
        for kind, _, reads, makes, *rest in layers:
            sources, made = rest[: int(reads)], rest[int(reads) : int(reads) + int(makes)]
            facts = dict(item.split("=", 1) for item in rest[int(reads) + int(makes) :])
            if kind == "Input" and int(facts.get("2", 0)) > 0:
                channels |= dict.fromkeys(made, int(facts["2"]))
            if kind in ("Input", "Split"):
                origin |= {name: origin.get(sources[0], "") if sources else name for name in made}
            elif kind == "Convolution" and origin.get(sources[0]):
                kernel = int(facts[_WIDE]) * int(facts.get(_TALL, facts[_WIDE]))
                channels[origin[sources[0]]] = int(facts[_WEIGHTS]) // (int(facts[_OUTPUTS]) * kernel)
    except (ValueError, IndexError, KeyError, ZeroDivisionError) as error:
        raise ModelLoadError(f"{param}: not an ncnn .param file") from error
    return channels


def _joints(layers: list[list[str]]) -> list[list[str]]:
    """The tensors that layers take together, which have to be of one size."""
    return [line[4 : 4 + int(line[2])] for line in layers if line[0] in _JOINING and int(line[2]) > 1]


class _Program(Executable):
    def __init__(self, ncnn: Any, net: Any, channels: dict[str, int], joints: list[list[str]]) -> None:
        self._ncnn, self._net, self._joints = ncnn, net, joints
        self._checked: OrderedDict[tuple[tuple[int, ...], ...], None] = OrderedDict()
        self._lock = threading.Lock()
        self._outputs = list(net.output_names())
        self.inputs = tuple(
            Port(name, np.dtype(np.float32), (1, channels[name], None, None)) for name in net.input_names()
        )
        self.outputs = tuple(
            Port(name, np.dtype(np.float32), (1, None, None, None)) for name in self._outputs
        )
        self.precision = "bf16" if net.opt.use_bf16_storage else "f32"
        self.device = "cpu"

    def run(self, feeds: Feeds) -> dict[str, Array]:
        extractor = self._net.create_extractor()  # one for each run: it holds what was computed
        for port in self.inputs:
            value = feeds[port.name]
            if value.ndim != 4 or value.shape[0] != 1 or value.shape[1] != port.shape[1]:
                raise ValueError(f"'{port.name}' must be of shape {port.shape}, not {value.shape}")
            # a copy in ncnn's own memory: layers that work in place end the process on anyone else's
            mat = self._ncnn.Mat(np.ascontiguousarray(value[0], np.float32)).clone()
            if extractor.input(port.name, mat):
                raise RuntimeError(f"ncnn does not take the input '{port.name}'")
        self._check(extractor, tuple(feeds[port.name].shape for port in self.inputs))
        outputs = {}
        for name in self._outputs:
            status, result = extractor.extract(name)
            if status:
                raise RuntimeError(f"ncnn cannot compute '{name}' (status {status})")
            outputs[name] = np.array(result, np.float32, order="C")[None]
        return outputs

    def _check(self, extractor: Any, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Raise for sizes that do not fit somewhere in the net, which ncnn computes with all the same.

        Once for each size not seen lately; what is computed for it here serves the run.
        """
        with self._lock:
            if shapes in self._checked:
                return
        extractor.set_light_mode(False)
        for names in self._joints:
            sizes = []
            for name in names:
                status, value = extractor.extract(name)
                if status:
                    raise RuntimeError(f"ncnn cannot compute '{name}' (status {status})")
                if value.dims == 3:  # others are numbers for each channel
                    sizes.append((value.w, value.h))
            if len(set(sizes) - {(1, 1)}) > 1:
                raise ValueError(f"tensors {names} of (width, height) {sizes} do not fit together")
        with self._lock:
            self._checked[shapes] = None
            while len(self._checked) > _REMEMBERED_SHAPES:
                self._checked.popitem(last=False)
