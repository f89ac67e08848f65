"""Do the engines agree? The same inputs through each, held against one reference."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from anysize.backends import ModelSpec, available_backends
from anysize.backends.base import Array
from anysize.backends.errors import AnysizeError, ExportError, ModelLoadError, OptionError, TimedOut
from anysize.exporters.exporting import random_feeds, verification_sizes
from anysize.session import Session, load
from anysize.sources import Source, takers

#: whose results the others are held against: the first that takes the source
_REFERENCES = ("torch", "onnxruntime", "openvino")


@dataclass(frozen=True)
class ParityRow:
    """One engine at one size.

    `max_abs`, `psnr` (dB, over the value range): against the reference, of the worst output.
    `worst_at`: the element that differs most, and both values. `error` says what went wrong where there is no
    result; `ok` is the verdict at the report's tolerance.
    """

    backend: str
    precision: str
    size: dict[str, int]
    ok: bool
    max_abs: float | None = None
    psnr: float | None = None
    finite: bool | None = None
    shapes_match: bool | None = None
    worst_at: str | None = None
    error: str | None = None

    @property
    def size_text(self) -> str:
        """The free axes' sizes in order, such as "1x29x23"."""
        return "x".join(map(str, self.size.values())) or "fixed"


@dataclass(frozen=True)
class ParityReport:
    """All rows; `atol` is relative to max(1, max|reference|)."""

    reference: str
    atol: float
    rows: tuple[ParityRow, ...]

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """As JSON types; an infinite PSNR (identical results) is null."""
        rows: list[dict[str, Any]] = [asdict(row) for row in self.rows]
        for row in rows:
            if row["psnr"] is not None and not math.isfinite(row["psnr"]):
                row["psnr"] = None
        return {"reference": self.reference, "atol": self.atol, "ok": self.ok, "rows": rows}

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    def __str__(self) -> str:
        lines = [f"reference: {self.reference}, tolerance {self.atol:g}"]
        for row in self.rows:
            figures = row.error
            if row.max_abs is not None:
                figures = f"max|d| {row.max_abs:.3g}, PSNR {row.psnr:.1f} dB"
                figures += "" if row.ok else f", worst at {row.worst_at}"
            lines.append(
                f"{'ok  ' if row.ok else 'FAIL'} {row.backend} {row.precision} {row.size_text}: {figures}"
            )
        return "\n".join(lines)


def assert_parity(
    source: Source,
    *,
    backends: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    precision: str = "f32",
    atol: float = 1e-4,
) -> ParityReport:
    """`compare` for tests: raises `AssertionError` where an engine is outside the tolerance.

    Its text has every engine and size: the precision that ran, the largest difference, the PSNR, and the
    element that differs most. Arguments and other errors are those of `compare`.
    """
    __tracebackhide__ = True  # pytest shows the line of the test
    report = compare(source, backends=backends, sizes=sizes, precision=precision, atol=atol)
    if not report.ok:
        raise AssertionError(f"engines differ\n{report}")
    return report


def compare(
    source: Source,
    *,
    backends: Sequence[str] | None = None,
    sizes: Sequence[tuple[int, int]] | None = None,
    precision: str = "f32",
    atol: float = 1e-4,
) -> ParityReport:
    """Run `source` on each backend at each (height, width) and compare with the reference.

    The reference is eager PyTorch in f32 where it takes the source, else ONNX Runtime, else OpenVINO.
    `backends`: names, by default all installed that take the source. `sizes`: by default those that an
    export is verified at. `precision`: "f32" or "bf16". Inputs are seeded noise in the contract's value
    range. Raises what `load` raises, `TimedOut` within a `time_limit`, and `OptionError` where there is
    nothing to compare.
    """
    check_atol(atol)
    if precision not in ("f32", "bf16"):
        raise OptionError(f"parity compares engines in f32 or bf16, not in {precision}")
    wanted = list(backends) if backends is not None else takers(source) or available_backends()
    if not wanted:
        raise OptionError("no backend to compare")
    sessions: dict[str, Session] = {}
    failed: dict[str, str] = {}
    for name in wanted:
        try:
            sessions[name] = load(source, backend=name, precision=precision)
        except ExportError as error:  # it cannot be converted for this engine
            failed[name] = str(error)
        except ModelLoadError as error:
            if backends is not None:  # asked for by name, so its refusal is a finding
                failed[name] = str(error)
            if not sessions and name == wanted[-1]:
                raise
    reference_name, reference = _reference(source)
    if precision == "f32" and backends is None and not failed and list(sessions) == [reference_name]:
        raise OptionError(
            f"only {reference_name} takes this model here: a second engine is needed to compare"
        )
    chosen = chosen_sizes(reference.spec, sizes)
    rows = []
    for size in chosen:
        feeds = random_feeds(reference.spec, size)
        want = reference.run(feeds)
        for name, session in sessions.items():
            try:
                got = session.run(feeds)
            except TimedOut:  # nothing of the engine's: the caller's limit is over
                raise
            except AnysizeError as error:
                rows.append(ParityRow(name, session.precision, size, False, error=str(error)))
                continue
            rows.append(_row(name, session.precision, size, got, want, reference.spec, atol))
        rows += [ParityRow(name, precision, size, False, error=error) for name, error in failed.items()]
    for session in (*sessions.values(), reference):
        session.close()
    return ParityReport(f"{reference_name} f32", atol, tuple(rows))


def check_atol(atol: object) -> None:
    """Raise `OptionError` for what is no tolerance."""
    number = isinstance(atol, (int, float, np.floating)) and not isinstance(atol, bool)
    if not (number and 0 <= atol < math.inf):  # type: ignore[operator]
        raise OptionError(f"atol must be a number from 0, not {atol!r}")


def _reference(source: Source) -> tuple[str, Session]:
    problem: AnysizeError | None = None
    for name in _REFERENCES:
        try:
            return name, load(source, backend=name)
        except TimedOut:
            raise
        except AnysizeError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def chosen_sizes(spec: ModelSpec, sizes: Sequence[tuple[int, int]] | None) -> list[dict[str, int]]:
    """These sizes of the axes after the batch, or by default those that an export is verified at.

    Raises `OptionError`, `ShapeError`.
    """
    if sizes is None:
        return verification_sizes(spec)
    if not isinstance(sizes, Sequence) or not sizes:
        raise OptionError(f"no size to compare at: {sizes!r}")
    batch = getattr(spec.inputs[0].shape[0], "name", None)
    axes = [n for n in spec.dims if n != batch]
    chosen = []
    for size in sizes:
        whole = isinstance(size, (tuple, list)) and all(isinstance(side, (int, np.integer)) for side in size)
        if not whole or len(size) != len(axes):
            raise OptionError(f"size {size!r}: this model's free axes are {', '.join(axes) or 'none'}")
        fixed = {n: d.ceil(1) for n, d in spec.dims.items()}
        chosen.append(fixed | dict(zip(axes, map(int, size), strict=True)))
        spec.bind(spec.input_shapes(chosen[-1]))
    return chosen


def _row(
    name: str,
    precision: str,
    size: dict[str, int],
    got: dict[str, Array],
    want: dict[str, Array],
    spec: ModelSpec,
    atol: float,
) -> ParityRow:
    # Outputs pair up by place: each engine's file may name them its own way.
    pairs = [
        (g.astype(np.float64), w.astype(np.float64)) for g, w in zip(got.values(), want.values(), strict=True)
    ]
    names = list(want)
    shapes_match = all(g.shape == w.shape for g, w in pairs)
    if not shapes_match:
        shapes = [g.shape for g, _ in pairs]
        return ParityRow(name, precision, size, False, shapes_match=False, error=f"shapes {shapes}")
    finite = all(bool(np.isfinite(g).all()) for g, _ in pairs)
    largest = [float(np.abs(g - w).max()) for g, w in pairs]
    which = int(np.argmax(largest))  # what is not a number counts as the largest
    worst = largest[which]
    g, w = pairs[which]
    index = np.unravel_index(int(np.abs(g - w).argmax()), g.shape)
    worst_at = f"{names[which]}[{', '.join(map(str, index))}]: {g[index]:.6g}, not {w[index]:.6g}"
    square = max(float(np.mean((g - w) ** 2)) for g, w in pairs)
    span = spec.value_range[1] - spec.value_range[0]
    psnr = math.inf if square == 0 else 10 * math.log10(span**2 / square) if finite else math.nan
    limit = atol * max(1.0, *(float(np.abs(w).max()) for _, w in pairs))
    return ParityRow(name, precision, size, finite and worst <= limit, worst, psnr, finite, True, worst_at)
