"""`Upscaler`: a picture in, the picture `scale` times as large out, whole or in pieces, never wrong."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Generator
from typing import Any

import numpy as np
from anysize.backends import Backend
from anysize.backends.base import Array
from anysize.backends.errors import (
    AnysizeError,
    ExecutionError,
    IntegrityError,
    MemoryBudgetError,
    OptionError,
)
from anysize.guard import Stats
from anysize.pixels import open_picture, quantise, resize
from anysize.planning import make_plan, stream_plan
from anysize.precision import Precisions, busiest
from anysize.report import Report
from anysize.session import Options, Session, as_options, load
from anysize.sources import Source
from anysize.tiling import Tiling, as_tiling
from anysize.tracing import span
from anysize.verify import Verifier
from anysize.work import ArrayRows, Cancel, Progress, Rows, Work, as_check, image_scale

_PIXEL_LIMIT = 2**33


class Upscaler:
    """Upscale pictures of any size with one model on one engine. Thread-safe.

    `source`, `backend`, `precision`, `options` as `load` takes them; `source` may also be a `Session`.
    `precision` "auto" compares bf16 with f32 on crops of each picture, and runs it in bf16 from 50 dB on.
    `tiling`: a `Tiling`. `verify`: compute random places of each picture once more, alone, with an exact
    halo, by another program, and raise `IntegrityError` where they differ; about a twentieth of the work, and
    the time to compile that program. Raises `ModelLoadError` for what is not picture in, picture out, and
    `OptionError` where a model cannot be verified.
    """

    #: pictures of a batch in work at the same time: one is encoded while the next is decoded and run
    at_once = 2

    def __init__(
        self,
        source: Source | Session = "default",
        *,
        backend: str | Backend = "auto",
        precision: str = "f32",
        tiling: Tiling | None = None,
        options: Options | None = None,
        verify: bool = False,
    ) -> None:
        self._precisions: Precisions | None = None
        self.tiling = as_tiling(tiling)
        if self.tiling.memory is not None and as_options(options).tune:
            raise OptionError("tuning would not keep to the memory limit; run `anysize tune` once before")
        if isinstance(source, Session):
            self.session = source
        elif precision == "auto":
            self._precisions = Precisions(source, backend, as_options(options))
            self.session = self._precisions.precise
        else:
            self.session = load(source, backend=backend, precision=precision, options=options)
        self.scale = image_scale(self.session.spec)
        if not isinstance(verify, bool):
            raise OptionError(f"verify must be True or False, not {verify!r}")
        #: by session, of which there are two with precision "auto"
        self._verifiers: dict[Session, Verifier] = {}
        self.verify = verify
        if verify:
            self._verifier(self.session)
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
        called with (bands or tiles done, in all). `cancel` is looked at before each band or tile.
        Raises `ImageError`, `OptionError`, `NotStreamable`, `MemoryBudgetError`, `ExecutionError`,
        `IntegrityError`, `Cancelled`.
        """
        with span("upscale") as note:
            picture = open_picture(image)
            note(picture=picture.array.shape)
            try:
                result = self._upscale(picture.array, outscale, progress, cancel)
            except MemoryError as error:
                raise MemoryBudgetError(f"there is not enough memory for this picture: {error}") from error
            note(**self._last.report.to_dict())
        return picture.restore(result)

    def _upscale(
        self, array: Array, outscale: float | None, progress: Progress | None, cancel: Cancel | None
    ) -> Array:
        """Of a picture (H, W, C), and note the report."""
        rows = ArrayRows(array)
        size = result_size(rows.height, rows.width, outscale, self.scale)
        native = size == (rows.height * self.scale, rows.width * self.scale)
        # Straight into the result's dtype, unless it has to be resized from unrounded values.
        dtype = rows.dtype if native else np.dtype(np.float32)
        shape = (rows.height * self.scale, rows.width * self.scale, rows.channels)
        started = time.perf_counter()
        session, why = self._choose(rows)
        before = self._begin(session)
        work = Work(session, rows, dtype, progress, as_check(cancel))
        # pixels are held as they came, as the result, and as planes while tiles are cut from them
        held = math.prod(shape) * dtype.itemsize + 8 * math.prod(array.shape)
        if not native:  # resized, as libvips holds it, and rounded
            held += 3 * dtype.itemsize * math.prod(size) * rows.channels
        work.plan = make_plan(session, self.tiling, *work.padded, held, work.inputs)
        if self.verify:
            work.verification = self._verifier(session).begin(None)
        result = np.empty(shape, dtype)
        done = False
        if work.plan.bands is not None or work.plan.stages is not None:
            try:
                if work.plan.stages is not None:
                    work.lockstep(result)
                else:
                    for top, band in work.stream():
                        result[top : top + len(band)] = band
                done = True
            except (ExecutionError, IntegrityError) as error:
                if not session.fall_back(error):
                    raise
                # the other engines run tiles, each of which falls back by itself
                again = Tiling("tile" if session.spec.tileable else "whole", memory=self.tiling.memory)
                work.plan = make_plan(session, again, *work.padded, held, work.inputs)
        if not done:
            if self.verify:
                work.verification = self._verifier(session).begin(work.plan.max_error)
            work.tiles(result)
        if not native:
            result = quantise(resize(result, *size), rows.dtype)
        self._finish(work, result.shape, float(outscale or self.scale), before, started, why)
        return result

    def stream(
        self,
        rows: Rows,
        *,
        progress: Progress | None = None,
        cancel: Cancel | None = None,
    ) -> Generator[Array, None, None] | None:
        """Upscale a picture as it is read: yields the result's rows, (rows, W*scale, C), from the top down.

        Close it where not all rows are taken; the report is there once all have been. None where it cannot be
        done in bands (`Upscaler` on the whole picture says why and does otherwise). Raises as a call does;
        nothing falls back.
        """
        # what waits to be read, written or joined: a few bands
        held = 2**25
        result_size(rows.height, rows.width, None, self.scale)
        if rows.alpha_range is not None and rows.alpha_range[0] == 0 < rows.alpha_range[1]:
            return None  # colour under no alpha comes from its neighbours, wherever they are
        started = time.perf_counter()
        session, why = self._choose(rows)
        work = Work(session, rows, rows.dtype, progress, as_check(cancel))
        plan = stream_plan(session, self.tiling, *work.padded, held)
        if plan is None:
            return None
        work.plan = plan
        if self.verify:
            work.verification = self._verifier(session).begin(None)
        return self._streamed(work, started, why)

    def _streamed(self, work: Work, started: float, why: str | None) -> Generator[Array, None, None]:
        before = self._begin(work.session)
        for _, band in work.stream():
            yield band
        shape = (work.rows.height * self.scale, work.rows.width * self.scale)
        self._finish(work, shape, float(self.scale), before, started, why)

    def _choose(self, rows: Rows) -> tuple[Session, str | None]:
        """The session for this picture, and why where there is a choice."""
        if self._precisions is None:
            return self.session, self.session.precision_reason
        probes = busiest(rows.pieces(), rows.height, rows.width, self.session.spec)
        choice = self._precisions.choose(probes, "the picture's busiest crops" if probes else "the picture")
        return choice.session, choice.reason

    def fall_back(self, error: AnysizeError) -> bool:
        """After `stream` failed in this thread: whether the caller named another engine to go on with."""
        session: Session = getattr(self._last, "session", self.session)
        return session.fall_back(error)

    def _begin(self, session: Session) -> Stats:
        self._last.session = session
        session.ran_here(reset=True)
        return session.stats

    def _finish(
        self,
        work: Work,
        shape: tuple[int, ...],
        scale: float,
        before: Stats,
        started: float,
        why: str | None,
    ) -> None:
        after, plan = work.session.stats, work.plan
        apart = plan.bands or plan.stages
        verified = work.verification
        if verified is not None and not verified.places:
            raise OptionError("this picture cannot be verified: the model takes no part of it alone")
        # more than one engine only after a fallback
        ran = work.session.ran_here() if apart is None else apart.stats()[:1]
        names = ("backend", "device", "precision")
        self._last.report = Report(
            width=shape[1],
            height=shape[0],
            scale=scale,
            model_scale=self.scale,
            **{name: "+".join(dict.fromkeys(getattr(s, name) for s in ran)) for name in names},
            method=plan.method,
            tile=plan.tile,
            overlap=plan.overlap,
            streams=plan.streams,
            exact=plan.exact,
            max_error=plan.max_error,
            reason=plan.reason,
            precision_reason=why,
            verified=verified.places if verified else 0,
            verify_seconds=verified.seconds if verified else 0.0,
            compiles=after.compiles - before.compiles,
            engine_seconds=work.engine_seconds,
            seconds=time.perf_counter() - started,
            fallbacks=[*work.session.skipped, *after.fallbacks[len(before.fallbacks) :]],
        )

    def _verifier(self, session: Session) -> Verifier:
        if session not in self._verifiers:
            self._verifiers[session] = Verifier(session)
        return self._verifiers[session]

    def identity(self) -> tuple[str, ...]:
        """What results follow from beside the picture and `tiling`. Raises as `Session.identity` does."""
        return (*self.session.identity(), "chosen for each picture" if self._precisions else "")

    def close(self) -> None:
        """Free the session."""
        for verifier in self._verifiers.values():
            verifier.close()
        (self._precisions or self.session).close()


def result_size(height: int, width: int, outscale: float | None, scale: int) -> tuple[int, int]:
    """Height and width of the result. Raises `OptionError` for no scale, and for a result too large."""
    check_outscale(outscale)
    height, width = (max(1, round(n * (outscale or scale))) for n in (height, width))
    if height * width > _PIXEL_LIMIT:
        raise OptionError(f"the result would be {width} x {height} pixels, more than {_PIXEL_LIMIT}")
    return height, width


def check_outscale(outscale: float | None) -> None:
    """Raise `OptionError` unless None or a positive number."""
    number = isinstance(outscale, (int, float)) and not isinstance(outscale, bool)
    if outscale is not None and not (number and 0 < outscale <= sys.float_info.max):
        raise OptionError(f"outscale must be a positive number, not {outscale!r}")
