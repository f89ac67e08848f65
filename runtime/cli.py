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
)
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
#: faults of an engine or a conversion, as opposed to a wrong request
_FAULTS = (ExecutionError, IntegrityError, ExportError)

if TYPE_CHECKING:
    from anysize.tiling import Method as TilingMethod

app = typer.Typer(
    name="anysize",
    help="Run image models at any size, on any engine, and never get a wrong pixel because of a shape.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
out, err = Console(), Console(stderr=True)

Model = Annotated[str, typer.Option("--model", "-m", help="A model file or the name of a bundled model.")]
BackendName = Annotated[str, typer.Option("--backend", "-b", help="auto, openvino, onnxruntime, torch, ...")]
Precision = Annotated[
    str, typer.Option("--precision", help="f32, bf16, int8, or auto: bf16 where it is as good.")
]
Calibration = Annotated[
    list[Path] | None,
    typer.Option("--calibration", help="For int8: pictures, or a folder of them; repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and debug logs.")]


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
    sys.exit(code or OK)


def _code(error: AnysizeError) -> int:
    if isinstance(error, Cancelled):
        return INTERRUPTED
    return FAILED if isinstance(error, _FAULTS) else USAGE


def _complain(error: Exception, debug: bool) -> None:
    if debug:
        err.print_exception()
    err.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)


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
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Upscale pictures. A folder's results are named {stem}_x{scale}.png."""
    from anysize.batch import plan_jobs, run_jobs
    from anysize.session import Options
    from anysize.tiling import Tiling
    from anysize.upscale import Upscaler, check_outscale

    if not output_name:
        raise OptionError("--output is empty")
    output = Path(output_name)
    check_outscale(outscale)
    tiling = Tiling(_literal(method), tile, _overlap(overlap), memory)
    if len(inputs) == 1 and not inputs[0].exists():
        raise ImageError(f"{inputs[0]}: no such file")
    options = Options(device=device, threads=threads, calibration=tuple(calibration or ()))
    upscaler = Upscaler(model, backend=backend, precision=precision, tiling=tiling, options=options)
    jobs = plan_jobs(inputs, output, outscale or upscaler.scale)
    single = len(jobs) == 1 and jobs[0].dst == output
    cancel = threading.Event()
    signal.signal(signal.SIGINT, lambda *_: _interrupt(cancel))
    failures: list[AnysizeError] = []
    with ExitStack() as stack:
        stack.callback(_remove_empty, [] if single else _make_folder(output))
        bar = stack.enter_context(_bar()) if err.is_terminal and not as_json else None

        def progress(job: Any) -> Any:
            if bar is None:
                return None
            task = bar.add_task(job.src.name)
            return lambda done, total: bar.update(task, completed=done, total=total)

        for report, error in run_jobs(jobs, upscaler, outscale=outscale, progress=progress, cancel=cancel):
            if as_json:
                print(json.dumps(report.to_dict()), flush=True)  # noqa: T201
            if error is not None:
                failures.append(error)
                _complain(error, debug)
            elif not as_json:
                out.print(_summary(report, method), markup=False, highlight=False, soft_wrap=True)
    if len(jobs) > 1:
        err.print(f"{len(jobs) - len(failures)} of {len(jobs)} pictures done", highlight=False)
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


def _make_folder(folder: Path) -> list[Path]:
    """Make the folder; return those that were missing, deepest first."""
    try:
        missing = [f for f in (folder, *folder.parents) if not f.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageError(f"{folder}: cannot be made: {error.strerror}") from error
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Those that hold a result stay. `folders`: deepest first."""
    for folder in folders:
        with suppress(OSError):  # it holds something, or somebody has removed it
            folder.rmdir()


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
    return (
        f"{report.input} -> {report.output}: {report.width} x {report.height} (x{report.scale:g}), "
        f"{report.backend} {report.precision} on {report.device}, {how}, {report.seconds:.2f} s{why}"
    )


@app.command()
def bench(
    model: Model = "default",
    size: Annotated[
        list[str] | None, typer.Option(help="WIDTHxHEIGHT of the picture; may be given several times.")
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Its middle is upscaled, or more, mirrored, if --size is larger.")
    ] = None,
    ncnn: Annotated[str | None, typer.Option(help="The same model as a .param file, as a peer.")] = None,
    backends: Annotated[str | None, typer.Option("--backends", help="Names, separated by commas.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="auto, stream, tile or whole; repeatable.")] = None,
    threads: Annotated[list[int] | None, typer.Option(help="Threads of the engine; repeatable.")] = None,
    rounds: Annotated[int, typer.Option(help="Rounds in which the cases take turns.")] = 7,
    quick: Annotated[bool, typer.Option(help="Three rounds at most, and 100 seconds.")] = False,
    sweep: Annotated[
        str | None, typer.Option(help="'sizes': restyle --picture at 256 to 1080: time, memory, SSIM.")
    ] = None,
    region: Annotated[
        str | None, typer.Option(help="LEFT,TOP,WIDTH,HEIGHT, such as a face, for an SSIM of its own.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A folder for the tables.")] = Path("out"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Measure engines and precisions on this machine, beside what is commonly done; say what to use."""
    from anysize.bench import bench as measure
    from anysize.files import read_picture
    from anysize.sweep import sweep as measure_sizes

    sizes = [_size(text) for text in size or ()]
    if sweep not in (None, "sizes"):
        raise OptionError(f"--sweep takes 'sizes', not '{sweep}'")
    if sweep is None and region is not None:
        raise OptionError("--region is for --sweep sizes")
    if sweep is not None and (picture is None or size or ncnn or threads):
        raise OptionError("--sweep sizes takes a --picture, and no --size, --ncnn or --threads")
    with ExitStack() as stack:
        stack.callback(_remove_empty, _make_folder(output))
        status = stack.enter_context(err.status("bench"))
        given = read_picture(picture).array if picture else None
        result: Any
        if sweep is not None:
            result = measure_sizes(
                model,
                given,
                region=_region(region),
                backends=_names(backends),
                methods=method or ["auto"],
                rounds=min(rounds, 3) if quick else rounds,
                say=status.update,
            )
        else:
            result = measure(
                model,
                picture=given,
                ncnn=ncnn,
                backends=_names(backends),
                sizes=sizes,
                methods=method or ["auto"],
                threads=threads or [None],
                rounds=rounds,
                quick=quick,
                say=status.update,
            )
        made = result.write(output)
    if as_json:
        print(json.dumps(result.to_dict()))  # noqa: T201
    else:
        out.print(result.markdown(), markup=False, highlight=False, soft_wrap=True)
    if not as_json:
        out.print(f"written: {', '.join(map(str, made))}", markup=False, highlight=False, soft_wrap=True)
    return OK


def _names(text: str | None) -> list[str] | None:
    return [name.strip() for name in text.split(",")] if text else None


def _region(text: str | None) -> tuple[int, int, int, int] | None:
    if text is None:
        return None
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError:
        raise OptionError(f"--region must be LEFT,TOP,WIDTH,HEIGHT, not '{text}'") from None
    return left, top, width, height


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise OptionError(f"--size must be WIDTHxHEIGHT, not '{text}'")
    return int(width), int(height)


@app.command()
def tune(
    model: Model = "default",
    backend: BackendName = "auto",
    precision: Annotated[str, typer.Option(help="f32 or bf16.")] = "f32",
    device: Annotated[str, typer.Option(help="cpu, or another that the engine has.")] = "cpu",
    threads: Annotated[int | None, typer.Option(help="Threads of the engine.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Measure on this machine what runs a model fastest, and keep it for later runs; half a minute."""
    from anysize.session import Options, load
    from anysize.tuning import is_kept
    from anysize.tuning import tune as measure

    if precision not in ("f32", "bf16"):
        raise OptionError(f"--precision must be f32 or bf16 here, not '{precision}'")
    with (
        err.status("tune") as status,
        load(
            model, backend=backend, precision=precision, options=Options(device=device, threads=threads)
        ) as session,
    ):
        tuned = measure(session, status.update)
        engine, kept = session.backend, is_kept(session)
    if as_json:
        print(tuned.to_json())  # noqa: T201
        return OK
    memory = f"{tuned.held.factor:.2f} x the tensors alive at once" if tuned.held else "not measured"
    title = f"{model} on {engine} {precision}; {tuned.max_live} programs may stay alive; memory: {memory}"
    table = Table(title=title)
    for column in ("method", "at a time", "pixels each", "input Mpx/s without halos"):
        table.add_column(column, justify="right")
    for s in sorted(tuned.speeds, key=lambda s: -s.per_second):
        table.add_row(s.method, str(s.streams), str(s.pixels), f"{s.per_second / 1e6:.4f}")
    out.print(table)
    out.print("later runs go by it" if kept else "not kept: there is no cache (ANYSIZE_CACHE_DIR is empty)")
    return OK


@app.command()
def export(
    model: Annotated[
        str,
        typer.Argument(
            help="Weights: a .pth, .pt or .safetensors file, a bundled model, or the folder of a model of "
            "diffusers."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .onnx or .xml file to write.")],
    part: Annotated[
        str | None, typer.Option(help="Of a folder with several: encoder or decoder.", show_default=False)
    ] = None,
    positions: Annotated[
        Literal["computed", "fixed", "interpolated"], typer.Option(help="Of a folder's transformer.")
    ] = "computed",
    latents: Annotated[
        str | None, typer.Option(help="HxW to interpolate positions for.", show_default=False)
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Convert weights to ONNX or OpenVINO IR, with the probed contract inside, verified on every engine."""
    # PyTorch's threads spin while they wait; many small runs beside another busy process took fifty times as
    # long. Read as it is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from anysize.backends import available_backends, get_backend
    from anysize.exporters import export as export_module
    from anysize.exporters.exporting import folder_of
    from anysize.models import BUNDLED, bundled_file, is_checkpoint, load_weights, parts
    from anysize.sources import located, open_source, source_format

    path = bundled_file(model, ".safetensors") if model in BUNDLED else Path(str(located(model)))
    folder_of(output)  # before anything is read
    if source_format(path) != "module":
        raise OptionError(f"{path}: export takes weights: .pth, .pt, .safetensors or a folder of diffusers")
    if is_checkpoint(path):
        sizes = _sizes(latents, "--latents") or []
        if len(sizes) > 1:
            raise OptionError(f"--latents is one size, such as 64x48, not '{latents}'")
        found = parts(path, positions=positions, size=next(iter(sizes), None))
        if part not in found and (part is not None or len(found) > 1):
            raise OptionError(f"{path}: name one of its parts: --part {' or --part '.join(found)}")
        written = export_module(found[part or next(iter(found))], output)
    else:
        if part or latents or positions != "computed":
            raise OptionError("--part, --positions and --latents are for folders of diffusers")
        weights = load_weights(path)
        shape = ("n", weights.in_channels, "h", "w")
        written = export_module(weights.module, output, inputs=[shape], source_sha256=weights.sha256)

    form = "onnx" if written.suffix == ".onnx" else "xml"
    takers = [get_backend(n) for n in available_backends()]
    takers = [b for b in takers if form in b.formats]
    spec = open_source(written, takers[0]).spec if takers else None
    verified = [b.name for b in takers]
    if as_json:
        contract = json.loads(spec.to_json()) if spec else None
        print(json.dumps({"output": str(written), "verified": verified, "spec": contract}))  # noqa: T201
    else:
        out.print(
            f"{written}: verified on {', '.join(verified) or 'no engine (none installed)'}", markup=False
        )
        if spec is not None:
            taken, given = (", ".join(map(str, tensors)) for tensors in (spec.inputs, spec.outputs))
            radius = f", receptive radius {spec.radius}" if spec.radius is not None else ""
            note = spec.producer.partition("; ")[2]
            out.print(f"{taken} -> {given}{radius}" + (f"; {note}" if note else ""), markup=False)
    return OK


@app.command()
def parity(
    model: Annotated[str, typer.Argument(help="A model file or the name of a bundled model.")],
    backends: Annotated[str | None, typer.Option("--backends", help="Names, separated by commas.")] = None,
    sizes: Annotated[str | None, typer.Option(help="HxW, separated by commas.")] = None,
    precision: Annotated[str, typer.Option(help="f32 or bf16.")] = "f32",
    atol: Annotated[float, typer.Option(help="Allowed max|d|, times max(1, max|reference|).")] = 1e-4,
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Compare the engines on a model at several sizes; exit code 1 outside the tolerance."""
    from anysize.parity import compare

    report = compare(model, backends=_names(backends), sizes=_sizes(sizes), precision=precision, atol=atol)
    if as_json:
        print(report.to_json())  # noqa: T201
        return OK if report.ok else FAILED
    table = Table(title=f"{model} against {report.reference}, tolerance {atol:g}")
    for column in ("backend", "precision", "size", "max |d|", "PSNR", "finite", "verdict"):
        table.add_column(column)
    for row in report.rows:
        figures = [f"{row.max_abs:.3g}", f"{row.psnr:.1f} dB"] if row.max_abs is not None else ["-", "-"]
        verdict = "ok" if row.ok else f"FAIL {row.error or ''}"
        table.add_row(row.backend, row.precision, row.size_text, *figures, str(row.finite), verdict)
    out.print(table)
    return OK if report.ok else FAILED


def _sizes(text: str | None, option: str = "--sizes") -> list[tuple[int, int]] | None:
    if text is None:
        return None
    try:
        pairs = [part.lower().split("x") for part in text.split(",")]
        return [(int(h), int(w)) for h, w in pairs]
    except ValueError:
        raise OptionError(f"{option} must look like 64x48, not '{text}'") from None


@app.command()
def backends(as_json: AsJson = False, debug: Debug = False) -> int:
    """Show the engines: version, what each can do, and how to install those missing."""
    from dataclasses import asdict

    from anysize.backends import describe_backends

    found = describe_backends()
    if as_json:
        for info in found:
            print(json.dumps(asdict(info)))  # noqa: T201
        return OK
    table = Table()
    for column in ("backend", "version", "takes", "precisions"):
        table.add_column(column, overflow="fold")
    for info in found:
        version = info.version or "not usable"
        table.add_row(info.name, version, ", ".join(info.formats), ", ".join(info.precisions))
    out.print(table)
    for info in found:
        if info.problem is not None:
            out.print(info.problem, markup=False, highlight=False, soft_wrap=True)
    return OK


models_app = typer.Typer(invoke_without_command=True)
app.add_typer(models_app, name="models")


@models_app.callback()
def models(context: typer.Context, as_json: AsJson = False, debug: Debug = False) -> int:
    """Show known weights, where they are published, and whether they are here."""
    from dataclasses import asdict

    from anysize.models.registry import KNOWN, local

    if context.invoked_subcommand is not None:
        return OK
    if as_json:
        for known in KNOWN.values():
            file = local(known)
            print(json.dumps({**asdict(known), "file": str(file) if file else None}))  # noqa: T201
        return OK
    for known in KNOWN.values():
        here = "here" if local(known) else "not here"
        facts = f"{known.architecture} x{known.scale}, {known.licence}, {known.size / 1e6:.1f} MB, {here}"
        for line in (f"{known.name}: {facts}", f"    {known.url}", f"    sha256 {known.sha256}"):
            out.print(line, markup=False, highlight=False, soft_wrap=True)
    return OK


@models_app.command()
def get(
    name: Annotated[str, typer.Argument(help="A name that `anysize models` shows.")], debug: Debug = False
) -> int:
    """Download known weights into ANYSIZE_HOME, or go on where a download stopped; prints the file's path."""
    from anysize.models.registry import fetch

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=err, transient=True) as progress:
        task = progress.add_task(name, total=None)
        path = fetch(name, progress=lambda have, size: progress.update(task, completed=have, total=size))
    print(path)  # noqa: T201
    return OK


if __name__ == "__main__":
    main()
