"""`Upscaler`: a picture in, the picture `scale` times as large out, whole or in tiles, never wrong."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from anysize.backends import Backend, Dim, ModelSpec
from anysize.backends.base import Array
from anysize.backends.errors import Cancelled, ModelLoadError, OptionError
from anysize.exporters.radius import image_step
from anysize.pixels import Picture, constant_runs, open_picture, quantise, resize, split
from anysize.report import Report
from anysize.session import Options, Session, load
from anysize.sources import Source
from anysize.tiling import Grid, Tiling, grid, measured_error, round_up, run_grid

#: "auto" runs pictures up to this many pixels whole
WHOLE_PIXELS = 512 * 512
#: "auto" takes an exact halo while it costs less than this many times the picture's own pixels
MAX_EXACT_WORK = 2.5
#: ... and otherwise the smallest of these halos whose measured error stays below the bound
HALOS = (16, 32, 48, 64, 96, 128)
HALO_ERROR = 0.5 / 255
_LARGEST_TILE = 640
_PIXEL_LIMIT = 2**33
_UNKNOWN_REACH = 256

Progress = Callable[[int, int], Any]
#: a flag such as `threading.Event`, or a function that says whether to stop
Cancel = threading.Event | Callable[[], bool]


@dataclass(frozen=True)
class _Plan:
    cut: Grid
    method: str
    tile: int | None
    overlap: int | None
    exact: bool
    max_error: float | None


class Upscaler:
    """Upscale pictures of any size with one model on one engine. Thread-safe.

    `source`, `backend`, `precision`, `options` as `load` takes them; `source` may also be a `Session`.
    `tiling`: a `Tiling`. Raises `ModelLoadError` for a model that is not picture in, picture out.
    """

    def __init__(
        self,
        source: Source | Session = "default",
        *,
        backend: str | Backend = "auto",
        precision: str = "f32",
        tiling: Tiling | None = None,
        options: Options | None = None,
    ) -> None:
        if isinstance(source, Session):
            self.session = source
        else:
            self.session = load(source, backend=backend, precision=precision, options=options)
        self.tiling = Tiling() if tiling is None else tiling
        if not isinstance(self.tiling, Tiling):
            raise OptionError(f"tiling must be a Tiling, not {tiling!r}")
        self.scale = _image_scale(self.session.spec)
        self._last = threading.local()

    @property
    def report(self) -> Report | None:
        """What ran in the last finished call of this thread; None before the first."""
        return getattr(self._last, "report", None)

    def __call__(
        self,
        image: Any,
        *,
        outscale: float | None = None,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Any:
        """Upscale one picture and return the same kind: array (HW or HWC; uint8, uint16, float) or PIL image.

        `outscale`: the result is this many times the input instead of the model's scale. `progress` is
        called with (tiles done, tiles in all). `cancel` is looked at before each tile.
        Raises `ImageError`, `OptionError`, `ExecutionError`, `IntegrityError`, `Cancelled`.
        """
        started = time.perf_counter()
        picture = open_picture(image)
        size = _target(picture.array, outscale, self.scale)
        before = self.session.stats
        self.session.ran_here(reset=True)
        work = _Work(self, picture, progress, _cancelled(cancel))
        result = work.run(size)
        after = self.session.stats
        self._last.report = Report(
            width=result.shape[1],
            height=result.shape[0],
            scale=float(outscale or self.scale),
            model_scale=self.scale,
            **self._ran(),
            method=work.plan.method,
            tile=work.plan.tile,
            overlap=work.plan.overlap,
            exact=work.plan.exact,
            max_error=work.plan.max_error,
            compiles=after.compiles - before.compiles,
            engine_seconds=work.engine_seconds,
            seconds=time.perf_counter() - started,
            fallbacks=after.fallbacks[len(before.fallbacks) :],
        )
        return picture.restore(result)

    def _ran(self) -> dict[str, str]:
        """What this thread's runs really used; more than one engine only after a fallback."""
        stats = self.session.ran_here()
        names = ("backend", "device", "precision")
        return {name: "+".join(dict.fromkeys(getattr(s, name) for s in stats)) for name in names}

    def close(self) -> None:
        """Free the session."""
        self.session.close()


class _Work:
    """One picture's way through the model."""

    def __init__(
        self, upscaler: Upscaler, picture: Picture, progress: Progress | None, cancelled: Callable[[], bool]
    ) -> None:
        self.session, self.scale, self.tiling = upscaler.session, upscaler.scale, upscaler.tiling
        self.picture, self.progress, self.cancelled = picture, progress, cancelled
        spec = self.session.spec
        self.steps = (image_step(spec, 2), image_step(spec, 3))
        self.engine_seconds = 0.0
        self.done = 0
        colour, self.alpha = split(picture.array)
        self.grey = colour.shape[0] == 1
        # What goes through the model one by one: colour, or its planes for a one-channel model; then alpha.
        parts = list(colour[:, None]) if spec.channels == 1 else [colour]
        if self.alpha is not None and not _constant(self.alpha):
            parts.append(self.alpha)
        self.parts = [self._pad(part) for part in parts]
        self.plan = self._plan(*self.parts[0].shape[1:])

    def run(self, size: tuple[int, int]) -> Array:
        """The result, (height, width, C) in the picture's dtype; `size` is (height, width)."""
        height, width = (n * self.scale for n in self.picture.array.shape[:2])
        native = size == (height, width)
        # Straight into the result's dtype, unless it has to be resized from unrounded values.
        dtype = self.picture.array.dtype if native else np.dtype(np.float32)
        canvases = [self._upscale(part, dtype)[:, :height, :width] for part in self.parts]
        alpha_in = self.alpha
        planes = []
        if alpha_in is not None:
            if _constant(alpha_in):
                alpha = np.full((1, height, width), quantise(alpha_in[:, :1, :1], dtype))
            else:
                alpha = canvases.pop()[:1]
                for value in (0.0, 1.0):  # what is wholly opaque or transparent stays so
                    keep = constant_runs(alpha_in, value).repeat(self.scale, 0).repeat(self.scale, 1)
                    alpha[0][keep] = quantise(np.full(1, value, np.float32), dtype)[0]
            planes.append(alpha)
        colour = canvases[0] if len(canvases) == 1 else np.concatenate(canvases)
        planes.insert(0, colour[:1] if self.grey else colour)
        result = np.concatenate(planes).transpose(1, 2, 0)
        if not native:
            result = quantise(resize(result, *size), self.picture.array.dtype)
        return np.ascontiguousarray(result)

    def _pad(self, planes: Array) -> Array:
        """Grow to the next valid size at the bottom and right; the result is cropped."""
        spec = self.session.spec
        pads = [(0, 0)]
        for axis, step in zip((2, 3), self.steps, strict=True):
            have = planes.shape[axis - 1]
            size = spec.inputs[0].shape[axis]
            want = size if isinstance(size, int) else round_up(max(have, spec.dims[_name(size)].min), step)
            if want < have or (not isinstance(size, int) and not spec.dims[_name(size)].allows(want)):
                raise OptionError(
                    f"the picture is {self.picture.array.shape[1]} x {self.picture.array.shape[0]}, but this "
                    f"model takes at most {spec.inputs[0]}"
                )
            pads.append((0, want - have))
        if not any(after for _, after in pads):
            return planes
        # reflect needs as many pixels as it adds; np.pad would repeat the reflection
        mode = "reflect" if all(p < n for (_, p), n in zip(pads, planes.shape, strict=True)) else "edge"
        return np.pad(planes, pads, mode=mode)  # type: ignore[call-overload,no-any-return]

    def _plan(self, height: int, width: int) -> _Plan:
        spec, tiling = self.session.spec, self.tiling
        method = tiling.method
        fixed = any(isinstance(s, int) for s in spec.inputs[0].shape[2:])
        if method == "tile" and fixed:
            raise OptionError(f"this model takes one size only ({spec.inputs[0]}), so it cannot be tiled")
        if method == "auto":
            small = height * width <= WHOLE_PIXELS
            asked = tiling.tile is not None or tiling.overlap != "exact"
            method = "whole" if fixed or not (spec.tileable or asked) or (small and not asked) else "tile"
        if method == "whole":
            return _Plan(
                grid(height, width, max(height, width), 0, self.steps), "whole", None, None, True, None
            )
        if tiling.overlap == "exact":
            if spec.radius is None or not spec.tileable:
                raise OptionError(
                    "this model has no known receptive radius (it looks at the whole picture), so exact "
                    "tiles are impossible; use method 'whole', or insist with an overlap in pixels"
                )
            halo = spec.radius
            core = tiling.tile or max(128, 512 - 2 * halo)
            cut = grid(height, width, core, halo, self.steps)
            if tiling.method == "auto" and tiling.tile is None:
                core = max(128, _LARGEST_TILE - 2 * halo)
                cut = grid(height, width, core, halo, self.steps)
                if cut.work > MAX_EXACT_WORK:
                    return self._cheapest(height, width)
        else:
            halo, core = tiling.overlap, tiling.tile or 256
            cut = grid(height, width, core, halo, self.steps)
        return self._tiled(cut, core, halo)

    def _tiled(self, cut: Grid, core: int, halo: int) -> _Plan:
        spec = self.session.spec
        single = len(cut.rows) == len(cut.columns) == 1
        known = spec.radius if spec.tileable else None
        exact = single or (known is not None and halo >= known)
        error = None
        if not exact:
            # Without a radius a much larger halo is the best reference there is.
            reach = known if known is not None else _UNKNOWN_REACH
            low, high = spec.value_range
            errors = [
                measured_error(self.session, self._model_input(part), cut, reach, self.steps)
                for part in self.parts
            ]
            error = max(errors) / (high - low)
        tile = max(round_up(core, step) for step in self.steps)
        return _Plan(cut, "tile", tile, max(round_up(halo, step) for step in self.steps), exact, error)

    def _cheapest(self, height: int, width: int) -> _Plan:
        """The smallest halo that is good enough on this picture's own busiest tiles."""
        for halo in HALOS:
            core = _LARGEST_TILE - 2 * halo
            plan = self._tiled(grid(height, width, core, halo, self.steps), core, halo)
            if plan.exact or (plan.max_error or 0.0) <= HALO_ERROR:
                break
        return plan

    def _model_input(self, planes: Array) -> Array:
        """In the model's value range and channels: grey runs as three equal ones."""
        low, high = self.session.spec.value_range
        if (low, high) != (0.0, 1.0):
            planes = planes * np.float32(high - low) + np.float32(low)
        return np.repeat(planes, 3, axis=0) if self.session.spec.channels != planes.shape[0] else planes

    def _upscale(self, planes: Array, dtype: np.dtype[Any]) -> Array:
        """One part through the model: (C, H, W) -> (C, H*scale, W*scale) of `dtype`."""
        cut = self.plan.cut
        low, high = self.session.spec.value_range
        total = len(self.parts) * len(cut.rows) * len(cut.columns)

        def store(part: Array) -> Array:
            if part.shape[0] != planes.shape[0]:  # grey comes back as one
                part = part.mean(axis=0, keepdims=True)
            if (low, high) != (0.0, 1.0):
                part = (part - np.float32(low)) / np.float32(high - low)
            return quantise(part, dtype)

        def step_done() -> None:
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, total)

        canvas = np.empty(
            (planes.shape[0], planes.shape[1] * self.scale, planes.shape[2] * self.scale), dtype
        )
        self.engine_seconds += run_grid(
            self.session, self._model_input(planes), cut, canvas, store, step_done, self.cancelled
        )
        if self.cancelled():
            raise Cancelled("cancelled after the last tile")
        return canvas


def _name(size: Any) -> str:
    return str(getattr(size, "name", None) or size.dim)


def _constant(alpha: Array) -> bool:
    return bool(alpha.min() == alpha.max())


def _image_scale(spec: ModelSpec) -> int:
    """The probed scale of a picture-to-picture model. Raises `ModelLoadError` for any other."""
    scale = spec.scale
    out = spec.outputs[0].shape
    floats = all(t.dtype.kind == "f" for t in (*spec.inputs, *spec.outputs))
    batch = spec.inputs[0].shape[0]
    single = batch.allows(1) if isinstance(batch, Dim) else batch == 1
    if scale is None or not floats or not single or spec.channels not in (1, 3) or out[1] != spec.channels:
        found = "; ".join(map(str, (*spec.inputs, *spec.outputs)))
        raise ModelLoadError(
            "not a picture-to-picture model: expected one float NCHW input and output of 1 or 3 channels, in "
            f"a whole ratio of sizes; found {found}"
        )
    return scale


def _target(array: Array, outscale: float | None, scale: int) -> tuple[int, int]:
    check_outscale(outscale)
    height, width = (max(1, round(n * (outscale or scale))) for n in array.shape[:2])
    if height * width > _PIXEL_LIMIT:
        raise OptionError(f"the result would be {width} x {height} pixels, more than {_PIXEL_LIMIT}")
    return height, width


def check_outscale(outscale: float | None) -> None:
    """Raise `OptionError` unless None or a positive number."""
    number = isinstance(outscale, (int, float)) and not isinstance(outscale, bool)
    if outscale is not None and not (number and math.isfinite(outscale) and outscale > 0):
        raise OptionError(f"outscale must be a positive number, not {outscale!r}")


def _cancelled(cancel: Cancel | None) -> Callable[[], bool]:
    if cancel is None:
        return lambda: False
    if hasattr(cancel, "is_set"):
        return cancel.is_set
    if not callable(cancel):
        raise OptionError(f"cancel must be an event or a function, not {type(cancel).__name__}")
    return cancel
