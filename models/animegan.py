"""AnimeGANv2's generator, with parameter names as in the published PyTorch weight files.

Source: Chen, Liu and Chen, "AnimeGAN", ISICA 2019, and its second version as published with weights: a
convolutional encoder, four inverted residual blocks (Sandler et al., arXiv:1801.04381), bilinear upsampling.
All but the last convolution are followed by a normalisation over all channels and pixels of the picture
(group norm with one group), so each output pixel depends on all of them.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ConvNormLReLU(nn.Sequential):
    """Reflection padding, convolution, normalisation over C x H x W, LeakyReLU(0.2).

    `padding` as `nn.ReflectionPad2d` takes it.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: int = 1,
        padding: int | tuple[int, int, int, int] = 1,
        groups: int = 1,
        bias: bool = False,
    ) -> None:
        super().__init__(
            nn.ReflectionPad2d(padding),
            nn.Conv2d(in_channels, out_channels, kernel, stride, groups=groups, bias=bias),
            nn.GroupNorm(1, out_channels),
            nn.LeakyReLU(0.2),
        )


class InvertedResBlock(nn.Module):
    """1x1 to `expansion` times the channels, depthwise 3x3, 1x1 back; added to the input if alike."""

    def __init__(self, in_channels: int, out_channels: int, expansion: int) -> None:
        super().__init__()
        self.added = in_channels == out_channels
        wide = in_channels * expansion
        self.layers = nn.Sequential(
            ConvNormLReLU(in_channels, wide, kernel=1, padding=0),
            ConvNormLReLU(wide, wide, groups=wide, bias=True),
            nn.Conv2d(wide, out_channels, 1, bias=False),
            nn.GroupNorm(1, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return x + y if self.added else y


class AnimeGANv2(nn.Module):
    """N x 3 x H x W in -1..1 -> the same, stylized.

    `align_corners` says how features are upsampled. True: to the sizes they were reduced from, so the output
    is H x W. False: by 2, twice, so it is 4 * (H // 4) x 4 * (W // 4). Weights go with either; the published
    program has both, and results differ slightly.
    """

    value_range = (-1.0, 1.0)

    def __init__(self, align_corners: bool = True) -> None:
        super().__init__()
        self.in_channels = 3
        self.align_corners = align_corners
        halved = (0, 1, 0, 1)
        self.block_a = nn.Sequential(
            ConvNormLReLU(3, 32, kernel=7, padding=3),
            ConvNormLReLU(32, 64, stride=2, padding=halved),
            ConvNormLReLU(64, 64),
        )
        self.block_b = nn.Sequential(
            ConvNormLReLU(64, 128, stride=2, padding=halved),
            ConvNormLReLU(128, 128),
        )
        self.block_c = nn.Sequential(
            ConvNormLReLU(128, 128),
            InvertedResBlock(128, 256, 2),
            *(InvertedResBlock(256, 256, 2) for _ in range(3)),
            ConvNormLReLU(256, 128),
        )
        self.block_d = nn.Sequential(ConvNormLReLU(128, 128), ConvNormLReLU(128, 128))
        self.block_e = nn.Sequential(
            ConvNormLReLU(128, 64), ConvNormLReLU(64, 64), ConvNormLReLU(64, 32, kernel=7, padding=3)
        )
        self.out_layer = nn.Sequential(nn.Conv2d(32, 3, 1, bias=False), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        a = self.block_a(x)
        c = self.block_c(self.block_b(a))
        d = self.block_d(self._up(c, a))
        y: Tensor = self.out_layer(self.block_e(self._up(d, x)))
        return y

    def _up(self, x: Tensor, like: Tensor) -> Tensor:
        if self.align_corners:
            return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=True)
        return F.interpolate(x, scale_factor=2.0, mode="bilinear", align_corners=False)
