"""The `anysize` command.

Exit codes: 0 all done; 1 some pictures failed, or an engine did, or parity is outside its tolerance;
2 the request or the input is wrong and nothing was written; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from anysize.backends.errors import (
    AnysizeError,
    Cancelled,
    ExecutionError,
    ExportError,
    ImageError,
    IntegrityError,
    OptionError,
    TimedOut,
)
from anysize.cli_measure import bench, tune
from anysize.cli_models import backends, export, get, models, parity
from anysize.cli_options import (
    FAILED,
    INTERRUPTED,
    OK,
    USAGE,
    AsJson,
    BackendName,
    Calibration,
    Debug,
    Model,
    Precision,
    err,
    make_folder,
    out,
    remove_empty,
)
from anysize.limit import runs_left
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

#: faults of an engine or a conversion, as opposed to a wrong request
_FAULTS = (ExecutionError, IntegrityError, ExportError, TimedOut)

if TYPE_CHECKING:
    from anysize.tiling import Method as TilingMethod

app = typer.Typer(
    name="anysize",
    help="Run image models at any size, on any engine, and never get a wrong pixel because of a shape.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def start(context: typer.Context) -> None:
    # PyTorch's threads spin while they wait; many small runs beside another busy process took fifty times as
    # long. Read as it is imported. What is commonly done, which `bench` measures, has them as they are.
    if context.invoked_subcommand != "bench":
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: list[str] | None = None) -> None:
    """Entry point; exits with one of the codes above."""
    debug = "--debug" in (sys.argv[1:] if arguments is None else arguments)
    if debug:
        logging.basicConfig(
            level=logging.DEBUG, format="%(name)s: %(message)s", handlers=[RichHandler(console=err)]
        )
    try:
        code = app(arguments, standalone_mode=False)
        if code == INTERRUPTED:  # which typer makes of a KeyboardInterrupt
            raise KeyboardInterrupt
    except AnysizeError as error:
        code = _code(error)
        _complain(error, debug)
    except (OSError, UnicodeError) as error:
        code = USAGE
        _complain(error, debug)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
        err.print("interrupted")
    except Exception as error:
        show = getattr(error, "show", None)
        if show is not None:  # the command line itself was wrong
            show()
            code = USAGE
        elif debug:
            raise
        else:
            code = FAILED
            text = f"internal error: {type(error).__name__}: {error}; --debug shows more"
            err.print(text, markup=False, soft_wrap=True)
    if arguments is None and runs_left():  # the process is the command's own, and what hangs may not keep it
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # nobody reads any more, or ever did
                stream.flush()
        os._exit(code or OK)
    sys.exit(code or OK)


def _code(error: AnysizeError) -> int:
    if isinstance(error, Cancelled):
        return INTERRUPTED
    return FAILED if isinstance(error, _FAULTS) else USAGE


def _complain(error: Exception, debug: bool, about: str = "") -> None:
    if debug:  # of an error that is handled no longer, `print_exception` would know nothing
        from rich.traceback import Traceback  # brings Pygments

        err.print(Traceback.from_exception(type(error), error, error.__traceback__))
    about = "" if str(error).startswith(about) else about
    err.print(f"error: {about}{error}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def upscale(
    inputs: Annotated[list[Path], typer.Argument(metavar="IN...", help="Pictures or folders of pictures.")],
    output_name: Annotated[
        str, typer.Option("--output", "-o", help="A file for one picture, else a folder.")
    ],
    model: Model = "default",
    backend: BackendName = "auto",
    precision: Precision = "f32",
    calibration: Calibration = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda with torch.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
    method: Annotated[str, typer.Option(help="auto, stream, tile, whole or lockstep.")] = "auto",
    tile: Annotated[int | None, typer.Option(help="Side of a tile, or rows of a band.")] = None,
    overlap: Annotated[str, typer.Option(help="exact, or a number of pixels.")] = "exact",
    outscale: Annotated[float | None, typer.Option(help="Resize the result to this scale.")] = None,
    memory: Annotated[str | None, typer.Option(help="The most to hold in memory, such as 2GiB.")] = None,
    verify: Annotated[bool, typer.Option(help="Compute some places of each picture twice.")] = False,
    timeout: Annotated[
        float | None, typer.Option(help="The most seconds for each picture, and to open the model.")
    ] = None,
    isolate: Annotated[bool, typer.Option(help="Run the model in a process of its own.")] = False,
    resume: Annotated[bool, typer.Option(help="Leave results that an earlier run finished.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Upscale pictures. A folder's results are named {stem}_x{scale}.png, and listed in its anysize.jsonl."""
    from anysize.batch import open_manifest, plan_jobs, run_jobs
    from anysize.isolate import Isolated
    from anysize.limit import check_seconds, time_limit
    from anysize.session import Options
    from anysize.tiling import Tiling
    from anysize.upscale import Upscaler, check_outscale

    if not output_name:
        raise OptionError("--output is empty")
    output = Path(output_name)
    check_outscale(outscale)
    check_seconds(timeout)
    tiling = Tiling(_literal(method), tile, _overlap(overlap), memory)
    if len(inputs) == 1 and not inputs[0].exists():
        raise ImageError(f"{inputs[0]}: no such file")
    options = Options(device=device, threads=threads, calibration=tuple(calibration or ()))
    kind = Isolated if isolate else Upscaler
    with time_limit(timeout):
        upscaler = kind(
            model, backend=backend, precision=precision, tiling=tiling, options=options, verify=verify
        )
    jobs = plan_jobs(inputs, output, outscale or upscaler.scale)
    single = len(jobs) == 1 and jobs[0].dst == output
    if resume and single:
        raise OptionError("--resume is for a folder of results")
    cancel = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: _interrupt(cancel))
    failures: list[AnysizeError] = []
    with ExitStack() as stack:
        stack.callback(upscaler.close)
        stack.callback(remove_empty, [] if single else make_folder(output))
        manifest = None if single else open_manifest(output, upscaler, outscale, resume)
        bar = stack.enter_context(_bar()) if err.is_terminal and not as_json else None

        def progress(job: Any) -> Any:
            if bar is None:
                return None
            task = bar.add_task(job.src.name)
            return lambda done, total: bar.update(task, completed=done, total=total)

        kept = 0
        for report, error in run_jobs(
            jobs,
            upscaler,
            outscale=outscale,
            manifest=manifest,
            resume=resume,
            timeout=timeout,
            progress=progress,
            cancel=cancel,
        ):
            kept += report.status == "kept"
            if as_json:
                print(json.dumps(report.to_dict()), flush=True)  # noqa: T201
            if error is not None:
                failures.append(error)
                _complain(error, debug, "" if single else f"{report.input}: ")
            elif not as_json:
                text = f"{report.input} -> {report.output}: {report.reason}"
                text = text if report.status == "kept" else _summary(report, method)
                out.print(text, markup=False, highlight=False, soft_wrap=True)
    if len(jobs) > 1:
        before = f", {kept} of them before" if kept else ""
        err.print(f"{len(jobs) - len(failures)} of {len(jobs)} pictures done{before}", highlight=False)
    if not failures:
        return OK
    return max(map(_code, failures)) if len(failures) == len(jobs) == 1 else FAILED


def _interrupt(cancel: threading.Event) -> None:
    """Stop before the next tile; a second time at once, but for the tiles that run beside this thread."""
    if cancel.is_set():
        raise KeyboardInterrupt
    cancel.set()


def _literal(method: str) -> TilingMethod:
    return method  # type: ignore[return-value]  # Tiling checks it


def _overlap(text: str) -> Literal["exact"] | int:
    if text == "exact":
        return "exact"
    try:
        return int(text)
    except ValueError:
        raise OptionError(f"--overlap must be 'exact' or a number of pixels, not '{text}'") from None


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=err)


def _summary(report: Any, asked: str) -> str:
    how = report.method
    if report.method == "stream":
        how += f", bands of {report.tile} rows"
    elif report.tile is not None:
        how += f" {report.tile}, overlap {report.overlap}"
    if asked not in ("auto", report.method):
        how += f" instead of {asked} ({report.reason})"
    if report.exact:
        how += ", exact"
    elif report.max_error is None:
        how += f", not exact: {report.reason}"
    else:
        how += f", not exact: error up to {report.max_error * 255:.2f}/255 measured"
    why = f" ({report.precision_reason})" if report.precision_reason else ""
    if report.verified:
        places = f"{report.verified} place{'s' * (report.verified > 1)}"
        why += f", verified in {places} in {report.verify_seconds:.2f} s"
    return (
        f"{report.input} -> {report.output}: {report.width} x {report.height} (x{report.scale:g}), "
        f"{report.backend} {report.precision} on {report.device}, {how}, {report.seconds:.2f} s{why}"
    )


for command in (bench, tune, export, parity, backends):
    app.command()(command)
app.add_typer(known := typer.Typer(invoke_without_command=True), name="models")
known.callback()(models)
known.command()(get)


if __name__ == "__main__":
    main()
