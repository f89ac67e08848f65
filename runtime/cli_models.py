"""The commands about models and engines: export, parity, backends, models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from anysize.backends.errors import ModelLoadError, OptionError
from anysize.cli_options import FAILED, OK, AsJson, Debug, err, names, out, sizes_of
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table


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
    from anysize.backends import available_backends, get_backend
    from anysize.exporters import export as export_module
    from anysize.exporters.exporting import declared_inputs, folder_of
    from anysize.models import BUNDLED, bundled_file, is_checkpoint, load_weights, parts
    from anysize.sources import located, open_source, source_format

    path = bundled_file(model, ".safetensors") if model in BUNDLED else Path(str(located(model)))
    folder_of(output)  # before anything is read
    if source_format(path) != "module":
        raise OptionError(f"{path}: export takes weights: .pth, .pt, .safetensors or a folder of diffusers")
    if is_checkpoint(path):
        sizes = sizes_of(latents, "--latents") or []
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
        inputs = None if declared_inputs(weights.module) else [("n", weights.in_channels, "h", "w")]
        written = export_module(weights.module, output, inputs=inputs, source_sha256=weights.sha256)

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


def parity(
    model: Annotated[str, typer.Argument(help="A model file, or a name that `anysize models` shows.")],
    backends: Annotated[str | None, typer.Option("--backends", help="Names, separated by commas.")] = None,
    sizes: Annotated[str | None, typer.Option(help="HxW, separated by commas.")] = None,
    precision: Annotated[str, typer.Option(help="f32 or bf16.")] = "f32",
    atol: Annotated[float, typer.Option(help="Allowed max|d|, times max(1, max|reference|).")] = 1e-4,
    bisect: Annotated[
        bool, typer.Option("--bisect", help="Find the first operator at which each engine departs.")
    ] = False,
    reference: Annotated[
        str | None,
        typer.Option(help="With --bisect: the file that MODEL was edited from.", show_default=False),
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="With --bisect: where a departing operator is saved.")
    ] = Path("bisect"),
    as_json: AsJson = False,
    debug: Debug = False,
) -> int:
    """Compare the engines on a model at several sizes; exit code 1 outside the tolerance."""
    from anysize.departure import bisect as find
    from anysize.parity import compare

    engines, pairs = names(backends), sizes_of(sizes)
    if bisect:
        found = find(
            model,
            reference=reference,
            backends=engines,
            sizes=pairs,
            precision=precision,
            atol=atol,
            folder=output,
        )
        if as_json:
            print(found.to_json())  # noqa: T201
        else:
            out.print(str(found), markup=False, highlight=False, soft_wrap=True)
        return OK if found.ok else FAILED
    if reference is not None:
        raise OptionError("--reference goes with --bisect")
    report = compare(model, backends=engines, sizes=pairs, precision=precision, atol=atol)
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


def models(context: typer.Context, as_json: AsJson = False, debug: Debug = False) -> int:
    """Show bundled models and known weights, where these are published, and whether they are here."""
    from dataclasses import asdict

    from anysize.models.registry import BUNDLED, KNOWN, Bundled, Known, bundled_file, local

    if context.invoked_subcommand is not None:
        return OK
    models: list[Bundled | Known] = [*BUNDLED.values(), *KNOWN.values()]
    shown = list[str]()
    for model in models:
        try:
            file = local(model) if isinstance(model, Known) else bundled_file(model.name)
        except ModelLoadError:  # damaged
            file = None
        if as_json:
            print(json.dumps({**asdict(model), "file": str(file) if file else None}))  # noqa: T201
            continue
        facts = f"{model.name}: {model.architecture} x{model.scale}, {model.licence}"
        if isinstance(model, Known):
            here = "here" if file else "not here"
            shown += [f"{facts}, {model.size / 1e6:.1f} MB, {here}", f"    {model.url}"]
        else:
            shown += [f"{facts}, {'bundled' if file else 'damaged: install anysize again'}"]
        shown += [f"    sha256 {model.sha256}"]
    for line in shown:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
    return OK


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
