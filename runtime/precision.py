"""`precision="auto"`: bf16 where the engine has it and a probe shows that nothing visible is lost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from anysize.backends import Backend
from anysize.backends.base import Array
from anysize.backends.errors import ExecutionError, IntegrityError, OptionError, ShapeError
from anysize.backends.spec import ModelSpec
from anysize.exporters.exporting import random_feeds
from anysize.exporters.radius import image_step
from anysize.pixels import split
from anysize.session import Options, Session, load
from anysize.sources import Source
from anysize.tiling import round_up

#: bf16 is kept only above this: at 50 dB the root of the mean square difference is 0.8/255
LEAST_DB = 50.0
#: the probe: so many crops of about this side, those with the strongest edges
CROPS, SIDE = 3, 96
#: pictures with fewer pixels run in f32: the probe would cost more than bf16 gains
WORTH_PROBING = 256 * 256


@dataclass(frozen=True)
class Choice:
    """The session to run, and why."""

    session: Session
    reason: str


class Precisions:
    """One model in f32 and, where the engine can, in bf16."""

    def __init__(self, source: Source, backend: str | Backend, options: Options) -> None:
        """Raises what `load` raises."""
        self.precise = load(source, backend=backend, options=options)
        self.rough: Session | None = None
        self._missing = ""
        try:
            self.rough = load(source, backend=backend, precision="bf16", options=options)
        except OptionError as error:
            self._missing = str(error)

    def choose(self, probes: list[Array], where: str) -> Choice:
        """Compare the two on these inputs, (1, C, H, W) each; f32 if there are none."""
        if self.rough is None:
            return Choice(self.precise, self._missing)
        if not probes:
            return Choice(self.precise, f"{where} is too small for a probe to pay")
        low, high = self.precise.spec.value_range
        squares = []
        try:
            for probe in probes:
                want, got = (np.clip(s(probe), low, high) for s in (self.precise, self.rough))
                squares.append(np.square(got.astype(np.float64) - want).mean())
        except (ExecutionError, IntegrityError) as error:
            return Choice(self.precise, f"bf16 failed on the probe: {error}")
        worst = float(np.max(squares))  # NaN stays NaN, and is above no bound
        decibels = 10 * np.log10((high - low) ** 2 / worst) if worst != 0 else np.inf
        reason = f"bf16 is {decibels:.1f} dB from f32 on {where}; at least {LEAST_DB:g} dB are asked for"
        return Choice(self.rough if decibels >= LEAST_DB else self.precise, reason)

    def close(self, but: Session | None = None) -> None:
        """Free both, or the other one."""
        for session in (self.precise, self.rough):
            if session is not None and session is not but:
                session.close()


def noise(spec: ModelSpec) -> list[Array]:
    """Noise as a model input: harder to round than a picture."""
    sizes = {name: dim.floor(max(SIDE, dim.min)) for name, dim in spec.dims.items()}
    batch = spec.inputs[0].shape[0]
    return [random_feeds(spec, sizes | {getattr(batch, "name", ""): 1})[spec.inputs[0].name]]


def busiest(pixels: Array, spec: ModelSpec) -> list[Array]:
    """The busiest crops of HWC pixels as model inputs, (1, C, side, side); none of too small a picture."""
    rows, columns = (round_up(SIDE, image_step(spec, axis)) for axis in (2, 3))
    height, width = pixels.shape[:2]
    if height < rows or width < columns or height * width < WORTH_PROBING:
        return []
    try:
        spec.bind({spec.inputs[0].name: (1, spec.channels or 3, rows, columns)})
    except ShapeError:
        return []
    corners = [
        (top, left)
        for top in range(0, height - rows + 1, rows)
        for left in range(0, width - columns + 1, columns)
    ]

    def edges(corner: tuple[int, int]) -> float:
        top, left = corner
        crop = pixels[top : top + rows, left : left + columns].astype(np.float32)
        return float(np.abs(np.diff(crop, axis=0)).mean() + np.abs(np.diff(crop, axis=1)).mean())

    low, high = spec.value_range
    probes = []
    for top, left in sorted(corners, key=edges, reverse=True)[:CROPS]:
        planes, _ = split(pixels[top : top + rows, left : left + columns])
        if len(planes) != spec.channels:  # grey as three, or colour as one of its planes
            planes = np.repeat(planes[:1], spec.channels or 3, axis=0)
        probes.append(planes[None] * np.float32(high - low) + np.float32(low))
    return probes
