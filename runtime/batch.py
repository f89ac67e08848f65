"""Pictures from file to file: one, a list, or a folder; one bad file does not end the batch."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, suppress
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from anysize.backends import Backend
from anysize.backends.errors import (
    AnysizeError,
    Cancelled,
    ExecutionError,
    ImageError,
    IntegrityError,
    OptionError,
)
from anysize.files import (
    check_destination,
    pictures_in,
    read_picture,
    remove_left_behind,
    replacing,
    save,
)
from anysize.guard import log
from anysize.limit import time_limit
from anysize.manifest import Manifest, digest, read
from anysize.report import Report
from anysize.rowfiles import RowReader, RowWriter
from anysize.session import Session
from anysize.sources import Source
from anysize.tiling import Tiling
from anysize.tracing import span
from anysize.upscale import Upscaler, check_outscale
from anysize.work import Cancel, Progress, as_check

#: takes the report and the finished file, before that gets its name
Written = Callable[[Report, Path], Any]
PathLike = str | os.PathLike[str]


def upscale_file(
    src: PathLike,
    dst: PathLike,
    source: Source | Session | Upscaler = "default",
    *,
    backend: str | Backend = "auto",
    precision: str = "f32",
    tiling: Tiling | None = None,
    outscale: float | None = None,
    progress: Progress | None = None,
    cancel: Cancel | None = None,
) -> Report:
    """Upscale the picture file `src` into `dst`, whose suffix chooses the format; return what ran.

    `source`: a model as `load` takes it, or an `Upscaler` to reuse (then backend, precision and tiling are
    its own). 8 and 16 bits, alpha, grey, ICC profile, EXIF and XMP survive; EXIF orientation is applied.
    `dst` is replaced atomically and never the input; after any error it is as it was.
    Raises `ImageError` for a picture or destination that cannot be used, and what `Upscaler` raises.
    """
    upscaler: Upscaler | Callable[[], Upscaler]
    if isinstance(source, Upscaler):
        upscaler = source
    else:
        upscaler = partial(Upscaler, source, backend=backend, precision=precision, tiling=tiling)
    return _upscale(Path(src), Path(dst), upscaler, outscale, progress, cancel)


def _upscale(
    src: Path,
    dst: Path,
    source: Upscaler | Callable[[], Upscaler],
    outscale: float | None,
    progress: Progress | None,
    cancel: Cancel | None,
    written: Written | None = None,
) -> Report:
    """From file to file. A model is opened when the picture has been found good."""
    started = time.perf_counter()

    def finish(temporary: Path) -> Report:
        assert upscaler.report is not None
        seconds = time.perf_counter() - started
        report = replace(upscaler.report, input=str(src), output=str(dst), seconds=seconds)
        if written is not None:
            written(report, temporary)
        return report

    with span("upscale_file", input=src, output=dst) as note:
        check_destination(dst, src)
        check_outscale(outscale)
        with closing(RowReader(src)) as rows:
            check_destination(dst, src, has_alpha=rows.channels in (2, 4))
            upscaler = source if isinstance(source, Upscaler) else source()
            native = outscale is None or outscale == upscaler.scale
            report = _stream(upscaler, rows, dst, progress, cancel, finish) if native else None
        if report is None:
            picture = read_picture(src)
            result = upscaler(picture.array, outscale=outscale, progress=progress, cancel=cancel)
            with replacing(dst) as temporary:
                save(temporary, result, picture.header, dst)
                report = finish(temporary)
        note(**report.to_dict())
    log.info("%s -> %s: %s", src, dst, report)
    return report


def _stream(
    upscaler: Upscaler,
    rows: RowReader,
    dst: Path,
    progress: Progress | None,
    cancel: Cancel | None,
    finish: Callable[[Path], Report],
) -> Report | None:
    """Upscale from file to file in bands; None if this picture has to be held whole."""
    bands = upscaler.stream(rows, progress=progress, cancel=cancel) if rows.upright else None
    if bands is None:
        return None
    width, height = rows.width * upscaler.scale, rows.height * upscaler.scale
    try:
        with (
            closing(bands),  # its programs and threads are let go at once, also where writing fails
            replacing(dst) as temporary,
        ):
            with RowWriter(temporary, width, height, rows.channels, rows.dtype, rows.header, dst) as writer:
                for band in bands:
                    writer.write(band)
            return finish(temporary)
    except (ExecutionError, IntegrityError) as error:
        if not upscaler.fall_back(error):
            raise
        return None


@dataclass(frozen=True)
class Job:
    """One picture to do."""

    src: Path
    dst: Path


def plan_jobs(inputs: Iterable[PathLike], output: PathLike, scale: float) -> list[Job]:
    """Pair inputs with destinations. Folders are taken with the pictures directly in them, by suffix.

    One input file and an output with a suffix: that file. Otherwise the output is a folder (made if need
    be) and each result is `{stem}_x{scale}.png`; in a folder that is among the inputs too, what its manifest
    names as results is not taken. Raises `ImageError`.
    """
    items, output = [Path(i) for i in inputs], Path(output)
    sources = []
    for item in items:
        results = read(output) if output.is_dir() and item.is_dir() and item.samefile(output) else {}
        sources += [picture for picture in pictures_in(item) if picture.name not in results]
    if len(items) == 1 and not items[0].is_dir() and output.suffix and not output.is_dir():
        return [Job(sources[0], output)]
    if output.suffix and not output.is_dir():
        raise ImageError(f"{output}: several pictures need a folder to go to, not a file name")
    if output.exists() and not output.is_dir():
        raise ImageError(f"{output}: exists and is not a folder")
    return [Job(source, output / f"{source.stem}_x{scale:g}.png") for source in sources]


def open_manifest(folder: Path, upscaler: Upscaler, outscale: float | None, resume: bool) -> Manifest:
    """The manifest of a folder of results; what runs that were killed left in the folder is removed.

    Raises `ImageError` where it cannot be read, and, to resume, `OptionError` for a model without identity.
    """
    remove_left_behind(folder)
    try:
        identity = upscaler.identity()
    except OptionError:
        if resume:
            raise
        identity = (secrets.token_hex(),)  # of no other run
    settings = (*identity, repr(upscaler.tiling), repr(float(outscale or upscaler.scale)))
    return Manifest(folder, settings, upscaler.verify)


def run_jobs(
    jobs: list[Job],
    upscaler: Upscaler,
    *,
    outscale: float | None = None,
    manifest: Manifest | None = None,
    resume: bool = False,
    timeout: float | None = None,
    progress: Callable[[Job], Progress | None] | None = None,
    cancel: Cancel | None = None,
) -> Iterator[tuple[Report, AnysizeError | None]]:
    """Do the jobs, yielding each one's report and error in order; only cancellation ends the batch.

    While one picture is encoded, the next is decoded and run; not with a limit of memory, which is of one.
    `manifest`: where the outcome of each is noted. `resume`: leave what it says is done, and still is.
    `timeout`: seconds that a picture may take.
    """
    check = as_check(cancel)
    ended = threading.Event()

    def stop() -> bool:
        return ended.is_set() or check()

    def do(job: Job) -> tuple[Report, AnysizeError | None]:
        error: AnysizeError
        started = time.perf_counter()
        try:
            if holders[job.dst] is not job:
                raise ImageError(f"{job.dst}: is taken by the result of {holders[job.dst].src} in this run")
            if (overwritten := sources.get(os.path.realpath(job.dst))) is not None:
                raise ImageError(f"{job.dst}: would overwrite {overwritten}, an input of this run")
            if resume and manifest is not None and (report := manifest.finished(job.src, job.dst)):
                return report, None
            written = None if manifest is None else partial(manifest.add, source=digest(job.src))
            shown = progress(job) if progress else None
            with time_limit(timeout):
                return _upscale(job.src, job.dst, upscaler, outscale, shown, stop, written), None
        except Cancelled:
            raise
        except AnysizeError as caught:
            error = caught
        except (OSError, MemoryError) as caught:
            error = ImageError(f"{job.src}: {caught or type(caught).__name__}")
            error.__cause__ = caught
        seconds = time.perf_counter() - started
        failed = Report(status="failed", error=str(error), input=str(job.src), seconds=seconds)
        if manifest is not None:
            with suppress(ImageError):  # which the caller gets to know anyhow, of this picture
                manifest.add(failed)
        return failed, error

    holders: dict[Path, Job] = {}
    for job in jobs:
        holders.setdefault(job.dst, job)
    sources = {os.path.realpath(job.src): job.src for job in jobs}
    at_once = 1 if upscaler.tiling.memory is not None else upscaler.at_once
    running: deque[Future[tuple[Report, AnysizeError | None]]] = deque()
    with ThreadPoolExecutor(at_once) as pool:
        try:
            for job in jobs:
                running.append(pool.submit(copy_context().run, do, job))
                if len(running) == at_once:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()
        finally:  # also where the caller takes no more
            ended.set()
            pool.shutdown(cancel_futures=True)
