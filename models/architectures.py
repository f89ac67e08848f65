"""The two Real-ESRGAN generators, with parameter names as in the published weight files, and our own.

All map NCHW float images in 0..1, `in_channels` deep, to images `scale` times as large.
Sources: RRDBNet: Wang et al., "ESRGAN", 2018 (arXiv:1809.00219) and "Real-ESRGAN", 2021
(arXiv:2107.10833, pixel-unshuffle inputs for x1 and x2). SRVGGNetCompact: the Real-ESRGAN release
notes of v0.2.3 / v0.3.0 (VGG-style, all convolutions at input resolution, pixel-shuffle at the end).
LumaCompact: that of the bundled models; networks for luma alone, beside interpolated hues, are as old as
SRCNN (Dong et al. 2014, arXiv:1501.00092).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _conv(in_channels: int, out_channels: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size=3, stride=1, padding=1)


def space_to_depth(x: Tensor, factor: int) -> Tensor:
    """Pixel-unshuffle, NCHW -> N(C*factor^2)(H/factor)(W/factor).

    Written as view + permute because exporters have been seen to give `F.pixel_unshuffle` the channel
    order of ONNX SpaceToDepth, which differs.
    """
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // factor, factor, w // factor, factor)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(n, c * factor**2, h // factor, w // factor)


class ResidualDenseBlock(nn.Module):
    """Five convolutions, each seeing all earlier features, scaled by 0.2 onto the input."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.conv1 = _conv(features, growth)
        self.conv2 = _conv(features + growth, growth)
        self.conv3 = _conv(features + 2 * growth, growth)
        self.conv4 = _conv(features + 3 * growth, growth)
        self.conv5 = _conv(features + 4 * growth, features)

    def forward(self, x: Tensor) -> Tensor:
        seen = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            seen = torch.cat((seen, F.leaky_relu(conv(seen), 0.2)), dim=1)
        residual: Tensor = self.conv5(seen)
        return x + 0.2 * residual


class RRDB(nn.Module):
    """Three dense blocks, scaled by 0.2 onto the input."""

    def __init__(self, features: int, growth: int) -> None:
        super().__init__()
        self.rdb1 = ResidualDenseBlock(features, growth)
        self.rdb2 = ResidualDenseBlock(features, growth)
        self.rdb3 = ResidualDenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.rdb3(self.rdb2(self.rdb1(x)))
        return x + 0.2 * residual


class RRDBNet(nn.Module):
    """Residual-in-residual dense network with `upsamplings` nearest x2 steps.

    `unshuffle` > 1 folds the input's pixels into channels first, so scale = 2**upsamplings / unshuffle.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        features: int = 64,
        growth: int = 32,
        blocks: int = 23,
        upsamplings: int = 2,
        unshuffle: int = 1,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.unshuffle = unshuffle
        self.upsamplings = upsamplings
        self.conv_first = _conv(in_channels * unshuffle**2, features)
        self.body = nn.Sequential(*(RRDB(features, growth) for _ in range(blocks)))
        self.conv_body = _conv(features, features)
        for i in range(upsamplings):
            setattr(self, f"conv_up{i + 1}", _conv(features, features))
        self.conv_hr = _conv(features, features)
        self.conv_last = _conv(features, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        if self.unshuffle > 1:
            x = space_to_depth(x, self.unshuffle)
        x = self.conv_first(x)
        x = x + self.conv_body(self.body(x))
        for i in range(self.upsamplings):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = F.leaky_relu(getattr(self, f"conv_up{i + 1}")(x), 0.2)
        x = self.conv_last(F.leaky_relu(self.conv_hr(x), 0.2))
        return x


def _chain(channels: int, features: int, convolutions: int, out_channels: int) -> nn.ModuleList:
    """`convolutions` between the first and the last, with PReLU between all."""
    body: list[nn.Module] = [_conv(channels, features), nn.PReLU(features)]
    for _ in range(convolutions):
        body += [_conv(features, features), nn.PReLU(features)]
    return nn.ModuleList([*body, _conv(features, out_channels)])


class SRVGGNetCompact(nn.Module):
    """A chain of 3x3 convolutions with PReLU, pixel-shuffle, added to the nearest-upsampled input."""

    def __init__(self, channels: int = 3, features: int = 64, convolutions: int = 16, scale: int = 4) -> None:
        super().__init__()
        self.in_channels = channels
        self.scale = scale
        self.body = _chain(channels, features, convolutions, channels * scale**2)

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for layer in self.body:
            y = layer(y)
        if self.scale == 1:
            return x + y
        base = F.interpolate(x, scale_factor=float(self.scale), mode="nearest")
        return F.pixel_shuffle(y, self.scale) + base


class LumaCompact(nn.Module):
    """The same chain for one channel of detail, added alike to R, G and B of the bilinearly upsampled input.

    So hues are the interpolation's until values are clipped to 0..1, and grey stays grey. Bilinear is a
    convolution here, of the picture with its border repeated: OpenVINO has been seen to prepare its own
    operator for every pixel of a size, for seconds.
    """

    bilinear: Tensor

    def __init__(self, features: int = 32, convolutions: int = 12, scale: int = 4) -> None:
        super().__init__()
        self.in_channels = 3
        self.scale = scale
        self.luma = _chain(3, features, convolutions, scale**2)
        self.register_buffer("bilinear", _bilinear(scale).repeat(3, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.detail(x) + self.base(x)

    def detail(self, x: Tensor) -> Tensor:
        """What is added, (N, 1, H * scale, W * scale)."""
        for layer in self.luma:
            x = layer(x)
        return F.pixel_shuffle(x, self.scale)

    def base(self, x: Tensor) -> Tensor:
        """What it is added to, (N, 3, H * scale, W * scale)."""
        padded = F.pad(x, (1, 1, 1, 1), mode="replicate")
        return F.pixel_shuffle(F.conv2d(padded, self.bilinear, groups=3), self.scale)


def _bilinear(scale: int) -> Tensor:
    """The kernels of bilinear upsampling before a pixel-shuffle, (scale**2, 1, 3, 3)."""
    centres = (torch.arange(scale) + 0.5) / scale - 0.5
    line = (1 - (centres[:, None] - torch.arange(-1, 2)).abs()).clamp(min=0)
    return torch.einsum("ay,bx->abyx", line, line).reshape(scale**2, 1, 3, 3)
