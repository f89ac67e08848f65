"""The commands that measure: `anysize bench` and `anysize tune`."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from anysize.backends.errors import OptionError
from anysize.cli_options import (
    OK,
    AsJson,
    BackendName,
    Debug,
    Model,
    err,
    make_folder,
    names,
    out,
    region_of,
    remove_empty,
    size_of,
)
from rich.table import Table


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
    quick: Annotated[bool, typer.Option(help="Three rounds, the third only within 100 seconds.")] = False,
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

    sizes = [size_of(text) for text in size or ()]
    if sweep not in (None, "sizes"):
        raise OptionError(f"--sweep takes 'sizes', not '{sweep}'")
    if sweep is None and region is not None:
        raise OptionError("--region is for --sweep sizes")
    if sweep is not None and (picture is None or size or ncnn or threads):
        raise OptionError("--sweep sizes takes a --picture, and no --size, --ncnn or --threads")
    with ExitStack() as stack:
        stack.callback(remove_empty, make_folder(output))
        status = stack.enter_context(err.status("bench"))
        given = read_picture(picture).array if picture else None
        result: Any
        if sweep is not None:
            result = measure_sizes(
                model,
                given,
                region=region_of(region),
                backends=names(backends),
                methods=method or ["auto"],
                rounds=min(rounds, 3) if quick else rounds,
                say=status.update,
            )
        else:
            result = measure(
                model,
                picture=given,
                ncnn=ncnn,
                backends=names(backends),
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
