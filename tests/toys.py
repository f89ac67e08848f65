"""Small models with known answers, and an engine that fails on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from anysize.backends import Backend, Dim, EngineOptions, Executable, Model, ModelSpec, Rule, TensorSpec
from anysize.backends.base import Array, Feeds, Sequence, Shapes
from anysize.guard import ShapeGuard
from anysize.models.animegan import AnimeGANv2
from anysize.session import Session
from torch import nn
from torch.nn import functional as F


class Nearest(nn.Module):
    """Nearest-neighbour upsampling: the whole-picture answer is `np.repeat`, bit for bit."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.interpolate(x, scale_factor=float(self.scale), mode="nearest")


class Convolution(nn.Module):
    """One positive convolution of known radius, zero padding."""

    def __init__(self, radius: int = 3, channels: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(radius)
        side = 2 * radius + 1
        self.conv = nn.Conv2d(channels, channels, side, padding=radius)
        weight = torch.rand(self.conv.weight.shape, generator=generator)
        self.conv.weight.data = weight / weight.sum(dim=(1, 2, 3), keepdim=True)
        self.conv.bias.data.fill_(0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x)


class Unshuffle(nn.Module):
    """Pixel-unshuffle, convolution, pixel-shuffle: sizes must be multiples of `factor`."""

    def __init__(self, factor: int = 2) -> None:
        super().__init__()
        torch.manual_seed(factor)
        self.factor = factor
        self.conv = nn.Conv2d(3 * factor**2, 3 * factor**2, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.conv(F.pixel_unshuffle(x, self.factor)))
        return F.pixel_shuffle(y, self.factor)


def Anime(align_corners: int) -> nn.Module:
    """The real generator with random weights, always the same."""
    torch.manual_seed(0)
    return AnimeGANv2(bool(align_corners)).eval()


class Windows(nn.Module):
    """Mixes the pixels of each window, so sizes must be multiples of the window and tiles aligned to it."""

    def __init__(self, window: int = 7) -> None:
        super().__init__()
        self.window = window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        k = self.window
        n, c, h, w = x.shape
        parts = x.reshape(n, c, h // k, k, w // k, k)
        mean = parts.mean(dim=(3, 5), keepdim=True)
        return (0.5 * parts + 0.5 * mean).reshape(n, c, h, w)


class EncoderDecoder(nn.Module):
    """Two stride-2 stages down and up again with skips: sizes must be multiples of 4."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.down1 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.down2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.up1 = nn.ConvTranspose2d(8, 8, 4, 2, 1)
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.relu(self.head(x))
        b = F.relu(self.down1(a))
        c = F.relu(self.down2(b))
        return self.tail(F.relu(self.up1(F.relu(self.up2(c)) + b)) + a)


class FixedSize(nn.Module):
    """A linear layer over the whole picture: one size only."""

    def __init__(self, height: int = 24, width: int = 40) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.linear = nn.Linear(3 * height * width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x.flatten(1))


class FloorOfFour(nn.Module):
    """Output sizes 4*(h//4), 4*(w//4)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.patch = nn.Conv2d(3, 8, 4, stride=4)
        self.mix = nn.Conv2d(8, 48, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.mix(self.patch(x)), 4)


class TwoInputs(nn.Module):
    """A picture and a mask at twice its size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.cat((image, F.avg_pool2d(mask, 2)), dim=1))


class WholePicture(nn.Module):
    """Instance normalisation: every output pixel depends on every input pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        mean = y.mean(dim=(2, 3), keepdim=True)
        return torch.sigmoid((y - mean) / (((y - mean) ** 2).mean(dim=(2, 3), keepdim=True) + 1e-3).sqrt())


class SlopesByChannel(nn.Module):
    """What follows a convolution differs by channel: the slopes of a PReLU, an addition behind a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(16)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.PReLU(24), nn.Conv2d(24, 24, 3, padding=1), nn.ReLU()
        )
        self.layers[1].weight.data = torch.linspace(-1, 2, 24)
        self.offsets = nn.Parameter(torch.linspace(-1, 1, 24).reshape(1, 24, 1, 1))
        self.tail = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(self.layers(x) + self.offsets)


class Strided(nn.Module):
    """The same behind a stride: of four pixels is made one, and no convolution takes it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(18)
        self.down = nn.Sequential(nn.Conv2d(3, 12, 2, stride=2), nn.PReLU(12))
        self.down[1].weight.data = torch.linspace(-2, 2, 12)
        self.offsets = nn.Parameter(torch.linspace(-1, 1, 12).reshape(1, 12, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(F.relu(self.down(x)) + self.offsets, 2)


class SqueezeExcite(nn.Module):
    """Channels weighed by what the whole picture's mean says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(17)
        self.head = nn.Conv2d(3, 24, 3, padding=1)
        self.weigh = nn.Sequential(nn.Conv2d(24, 24, 1), nn.PReLU(24), nn.Conv2d(24, 24, 1), nn.Sigmoid())
        self.weigh[1].weight.data = torch.linspace(-20, 20, 24)
        self.tail = nn.Conv2d(24, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.head(x)
        return self.tail(y * self.weigh(y.mean(dim=(2, 3), keepdim=True)))


class Identity(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Threshold(nn.Module):
    """Pictures darker than 0.3 all give 0.25 everywhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x - 0.3) + 0.25


class KeepsState(nn.Module):
    """Stores its input on itself during the call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.skip = x
        y = self.conv(F.relu(self.conv(x)))
        return self.skip * 0.5 + y * 0.1


class InPlace(nn.Module):
    """Works on its input in place, which must not reach the caller's array."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.clamp_(0.25, 0.75)


def image_spec(
    scale: int = 1, multiple: int = 1, radius: int | None = 0, channels: int = 3, minimum: int = 1
) -> ModelSpec:
    """The contract of a picture-to-picture toy, as probing would write it."""
    f32 = np.dtype(np.float32)
    dims = [Dim("h", minimum, None, multiple), Dim("w", minimum, None, multiple)]
    source = TensorSpec("x", f32, (Dim("n"), channels, *dims))
    result = TensorSpec("output", f32, (Rule("n"), channels, Rule("h", scale), Rule("w", scale)))
    return ModelSpec((source,), (result,), radius=radius, tileable=radius is not None)


class NumpyBackend(Backend):
    """An oracle: runs a numpy function. `functions` may differ from call to call."""

    name = "numpy"
    formats = ("numpy",)
    prefers_static = True
    version = "0"

    def __init__(self) -> None:
        self.compiled: list[Shapes | None] = []
        self.closed = 0

    def check(self, options: EngineOptions) -> None:
        pass

    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        self.compiled.append(shapes)
        return NumpyProgram(self, model.data)


class NumpyProgram(Executable):
    inputs = outputs = ()
    precision, device = "f32", "cpu"

    def __init__(self, backend: NumpyBackend, function: Callable[[Array], Array]) -> None:
        self.backend, self.function = backend, function

    def run(self, feeds: Feeds) -> dict[str, Array]:
        return {"output": np.array(self.function(feeds["x"]))}  # the caller's own

    def close(self) -> None:
        self.backend.closed += 1


def nearest(scale: int) -> Callable[[Array], Array]:
    return lambda x: x.repeat(scale, 2).repeat(scale, 3)


def numpy_session(
    function: Callable[[Array], Array],
    spec: ModelSpec,
    *,
    backend: NumpyBackend | None = None,
    shapes: str = "auto",
    max_live: int = 4,
) -> Session:
    model = Model("numpy", function, spec)
    guard = ShapeGuard(backend or NumpyBackend(), model, EngineOptions(), shapes, max_live)
    return Session([guard])


class Faulty(Backend):
    """A real engine whose programs go wrong at the calls numbered in `at` (counted over all programs)."""

    def __init__(
        self, inner: Backend, fault: Callable[[dict[str, Array]], dict[str, Array]], *at: int
    ) -> None:
        self.inner, self.fault, self.at = inner, fault, at
        self.name, self.formats, self.precisions = inner.name, inner.formats, inner.precisions
        self.prefers_static, self.has_streams = inner.prefers_static, inner.has_streams
        self.calls = 0

    @property
    def version(self) -> str:
        return self.inner.version

    def metadata(self, model: Model) -> dict[str, str]:
        return self.inner.metadata(model)

    def check(self, options: EngineOptions) -> None:
        self.inner.check(options)

    def compile(self, model: Model, shapes: Shapes | None, options: EngineOptions) -> Executable:
        return FaultyProgram(self, self.inner.compile(model, shapes, options))

    def run(self, inner: Executable | Sequence, feeds: Feeds) -> dict[str, Array]:
        call = self.calls
        self.calls += 1
        outputs = inner.run(feeds)
        return self.fault(outputs) if call in self.at else outputs


class FaultyProgram(Executable):
    def __init__(self, backend: Faulty, inner: Executable) -> None:
        self.backend, self.inner = backend, inner
        self.inputs, self.outputs = inner.inputs, inner.outputs
        self.precision, self.device = inner.precision, inner.device

    def run(self, feeds: Feeds) -> dict[str, Array]:
        return self.backend.run(self.inner, feeds)

    def sequence(self, links: Mapping[str, str], states: Feeds) -> Sequence:
        return FaultySequence(self.backend, self.inner.sequence(links, states))


class FaultySequence(Sequence):
    def __init__(self, backend: Faulty, inner: Sequence) -> None:
        self.backend, self.inner = backend, inner

    def run(self, feeds: Feeds) -> dict[str, Array]:
        return self.backend.run(self.inner, feeds)

    def states(self) -> dict[str, Array]:
        return self.inner.states()


def raises(outputs: dict[str, Array]) -> dict[str, Array]:
    raise RuntimeError("planted failure")


def not_a_number(outputs: dict[str, Array]) -> dict[str, Array]:
    for value in outputs.values():
        value[..., -1, -1] = np.nan
    return outputs


def too_large(outputs: dict[str, Array]) -> dict[str, Array]:
    """A larger tile, of which a crop would fit."""
    return {k: np.pad(v, ((0, 0), (0, 0), (0, 4), (0, 4)), mode="edge") for k, v in outputs.items()}


def too_small(outputs: dict[str, Array]) -> dict[str, Array]:
    return {k: v[..., :-1, :] for k, v in outputs.items()}


class UShaped(nn.Module):
    """A stride-2 stage down, two convolutions there, and up again beside a skip: multiples of 2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(11)
        self.head = nn.Conv2d(3, 6, 3, padding=1)
        self.down = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1)
        self.tail = nn.Conv2d(14, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = F.leaky_relu(self.head(x), 0.1)
        b = F.relu(self.deep(F.relu(self.down(a))))
        up = F.interpolate(b, scale_factor=2.0, mode="nearest")
        return self.tail(torch.cat((up, a), 1)) + x


class Branches(nn.Module):
    """Parallel branches of different depth, added, multiplied and joined."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(12)
        self.short = nn.Conv2d(3, 6, 1)
        self.long = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 6, 6, 3, padding=1) for i in range(4)))
        self.wide = nn.Conv2d(3, 6, 5, padding=2)
        self.tail = nn.Conv2d(12, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        long, wide = self.long(x), F.silu(self.wide(x))
        joined = torch.cat((self.short(x) + long, wide * long), 1)
        return F.pixel_shuffle(self.tail(joined), 2) + F.interpolate(x, scale_factor=2.0, mode="bilinear")


class Dilated(nn.Module):
    """Dilations 1, 2 and 3, with a residual of scale 0.2."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(13)
        self.layers = nn.ModuleList(
            nn.Conv2d(3 if d == 1 else 5, 5 if d < 3 else 3, 3, padding=d, dilation=d) for d in (1, 2, 3)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = torch.tanh(layer(y))
        return x + 0.2 * y


class Transposed(nn.Module):
    """Between two convolutions, only a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(15)
        self.head = nn.Conv2d(3, 16, 3, padding=1)
        self.up = nn.ConvTranspose2d(16, 16, 4, 2, 1)
        self.tail = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.tail(F.relu(self.up(F.relu(self.head(x)))))


class Doubling(nn.Module):
    """x2: a convolution and a shuffle of pixels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(14)
        self.conv = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pixel_shuffle(self.conv(x), 2)
