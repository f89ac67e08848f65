"""chaiNNer: what its `auto_split` and `convenient_upscale` call, in its layout of pixels.

chaiNNer has no way for others to add nodes; its tilers take any function. Follows
docs/02--Data-Representation.md, nodes/impl/upscale/auto_split.py and convenient_upscale.py there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from anysize import Upscaler
from anysize.backends.base import Array


class BgrUpscaler:
    """Pictures as chaiNNer holds them, by an `Upscaler`: float32 in 0..1, (H, W) or (H, W, C) in BGR(A).

    `scale`: pixels of the result per pixel. Thread-safe.
    """

    def __init__(self, upscaler: Upscaler) -> None:
        self.upscaler = upscaler
        self.scale = upscaler.scale

    def __call__(self, img: Array, *_: Any) -> Array:
        """The picture `scale` times as large, in a new array; `img` may be read-only, and a view.

        What else the host passes (the region of a tile, a progress) is not needed. Raises what a call of
        `anysize.Upscaler` raises.
        """
        result: Array = self.upscaler(_turned(img))
        return np.ascontiguousarray(_turned(result).clip(0, 1))


def _turned(picture: Array) -> Array:
    """BGR(A) as RGB(A), and back; grey as it is."""
    if picture.ndim == 2 or picture.shape[2] < 3:
        return picture
    return picture[..., [2, 1, 0, 3][: picture.shape[2]]]
