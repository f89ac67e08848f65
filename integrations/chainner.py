"""chaiNNer: what its `auto_split` and `convenient_upscale` call, in its layout of pixels.

chaiNNer has no way for others to add nodes; its tilers take any function. Follows
docs/02--Data-Representation.md, nodes/impl/upscale/auto_split.py and convenient_upscale.py there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from anysize import ImageError, Upscaler
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

        What else the host passes (the region of a tile, a progress) is not needed. Raises `ImageError` for
        what is no such picture, and what a call of `anysize.Upscaler` raises.
        """
        if not isinstance(img, np.ndarray) or img.dtype.kind != "f" or img.ndim not in (2, 3):
            what = f"{img.dtype} of shape {img.shape}" if hasattr(img, "shape") else type(img).__name__
            raise ImageError(f"a picture of chaiNNer's is floats of shape (H, W) or (H, W, C), not {what}")
        result: Array = self.upscaler(_turned(img.astype(np.float32, copy=False)))
        return np.ascontiguousarray(_turned(result))


def _turned(picture: Array) -> Array:
    """BGR(A) as RGB(A), and back; grey as it is."""
    if picture.ndim == 3 and picture.shape[2] in (3, 4):
        return picture[..., [2, 1, 0, 3][: picture.shape[2]]]
    return picture
