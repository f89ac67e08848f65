"""What ran for one picture, as callers, the log and `--json` see it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """What ran for one picture.

    `width`, `height`: of the result, in pixels. `scale`: result over input; `model_scale`: the model's own
    (for another `scale` its result is resized: Lanczos, bicubic where it grows). `tile`: side of a tile or
    rows of a band; `overlap`: input pixels, 0 for bands of the full width; both None where the picture ran
    whole. `streams`: strips or tiles that ran at the same time. `exact`: the result is that of the whole
    picture run at once. `max_error`: where it is not, the largest difference measured on this picture, in
    0..1; None where it could not be measured. `reason`: why this method. `verified`: places that were
    computed once more and found the same; `verify_seconds`: in how long. `compiles`: of the session during
    this call. `fallbacks`: engines that did not run this, when the model was loaded or in this call, and why.
    `precision_reason`: why this precision, where that was measured.
    """

    status: str = "ok"
    error: str | None = None
    input: str | None = None
    output: str | None = None
    width: int | None = None
    height: int | None = None
    scale: float | None = None
    model_scale: int | None = None
    backend: str | None = None
    device: str | None = None
    precision: str | None = None
    method: str | None = None
    tile: int | None = None
    overlap: int | None = None
    streams: int | None = None
    exact: bool | None = None
    max_error: float | None = None
    reason: str | None = None
    precision_reason: str | None = None
    verified: int = 0
    verify_seconds: float = 0.0
    compiles: int = 0
    engine_seconds: float = 0.0
    seconds: float = 0.0
    fallbacks: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON types."""
        return asdict(self)
