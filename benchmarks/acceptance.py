"""Engines against each other and tiles against the whole, on real weights and whole pictures.

`make acceptance` reads `../shared/assets`, prints a table and writes out/acceptance.json; exit code 1 if a
figure is outside its bound. Takes minutes: RRDBNet on full pictures, three engines, whole and tiled.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import anysize
import numpy as np
from anysize import Options, Tiling, Upscaler
from anysize.files import read_picture, write_picture
from anysize.pixels import to_float

ASSETS = Path(__file__).parent.parent.parent / "shared" / "assets"
WEIGHTS = ("realesr-animevideov3.pth", "rrdbnet6-trained.pth")
PICTURES = ("0030.jpg", "children-alpha.png")
SIZES = ((146, 400), (400, 146), (147, 401), (53, 67))  # height, width
OUT = Path("out")
Spread = tuple[float, float] | None


class Table:
    """Rows of (what, figure, bound), printed as they come."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def add(self, what: str, figure: float, bound: float) -> None:
        self._row(what, figure, bound, None, figure <= bound, "at most")

    def at_least(self, what: str, figure: float, bound: float, spread: Spread = None) -> None:
        self._row(what, figure, bound, spread, figure >= bound, "at least")

    def _row(self, what: str, figure: float, bound: float, spread: Spread, ok: bool, how: str) -> None:
        ok = bool(ok)  # numpy's is not JSON's
        row = {"what": what, "figure": figure, "spread": spread, "bound": bound, "how": how, "ok": ok}
        self.rows.append(row)
        print(f"{'ok  ' if ok else 'FAIL'} {what}: {figure:.4g} ({how} {bound:g})", flush=True)

    def markdown(self) -> list[str]:
        lines = ["| what | figure | bound | met |", "|---|---|---|---|"]
        for row in self.rows:
            bound = f"{'<=' if 'at least' not in row['how'] else '>='} {row['bound']:g}"
            lines.append(
                f"| {row['what']} | {row['figure']:.4g} | {bound} | {'yes' if row['ok'] else 'no'} |"
            )
        return lines


def agreement(table: Table, weights: str) -> None:
    """Three engines whole, in float and as PNG; tiles of 64 against the whole on each."""
    engines = [name for name in anysize.available_backends() if name != "ncnn"]
    for name in PICTURES:
        array = read_picture(ASSETS / "images" / name).array
        floats, files = {}, {}
        for engine in engines:
            session = anysize.load(ASSETS / "weights" / weights, backend=engine)
            whole = Upscaler(session, tiling=Tiling("whole"))
            floats[engine] = whole(to_float(array))
            write_picture(OUT / "acceptance.png", whole(array))
            files[engine] = read_picture(OUT / "acceptance.png").array.astype(int)
            exact = Upscaler(session, tiling=Tiling("tile", 64, "exact"))
            difference = float(np.abs(exact(to_float(array)) - floats[engine]).max())
            what = f"{weights} {name} {engine}"
            table.add(f"{what}: tile 64 exact against whole", difference, 1e-5)
            assert exact.report is not None
            table.add(f"{what}: reported as not exact", float(not exact.report.exact), 0)
            rough = Upscaler(session, tiling=Tiling("tile", 64, 10))
            error = float(np.abs(rough(to_float(array)) - floats[engine]).max())
            assert rough.report is not None
            table.add(f"{what}: overlap 10 reported as exact", float(rough.report.exact or False), 0)
            reported = (rough.report.max_error or 0.0) * 255
            print(f"     overlap 10: error {error * 255:.3f}/255, reported {reported:.3f}/255")
            session.close()
        first = engines[0]
        for engine in engines[1:]:
            what = f"{weights} {name} {engine} against {first}"
            table.add(f"{what}: before rounding", float(np.abs(floats[engine] - floats[first]).max()), 1e-4)
            table.add(f"{what}: PNG values", int(np.abs(files[engine] - files[first]).max()), 1)


def interleaved(table: Table, weights: str) -> None:
    """Regression 1 on the real model: sizes twice each, interleaved, one process, OpenVINO."""
    picture = read_picture(ASSETS / "images" / "OST_009.png").array[..., :3]
    options = Options(max_live=8, shapes="static")
    for tiling in (Tiling("tile", 64, "exact"), Tiling("tile", 64, 10), Tiling("whole")):
        upscale = Upscaler(ASSETS / "weights" / weights, backend="openvino", tiling=tiling, options=options)
        overlap = upscale.session.spec.radius if tiling.overlap == "exact" else tiling.overlap
        limit = 64 + 2 * int(overlap or 0) if tiling.method == "tile" else 10**6
        digests: dict[tuple[int, int], set[str]] = {size: set() for size in SIZES}
        for size in SIZES * 2:
            crop = np.ascontiguousarray(picture[: size[0], : size[1]])
            assert crop.shape[:2] == size
            digests[size].add(hashlib.sha256(upscale(crop).tobytes()).hexdigest())
        what = f"{weights} {tiling.method} overlap {tiling.overlap}"
        table.add(f"{what}: hashes per picture", max(map(len, digests.values())), 1)
        shapes = {(min(h, limit), min(w, limit)) for h, w in SIZES}
        if tiling.overlap == 10:  # its error is measured, in windows of one more shape per picture
            window = 32 + 2 * int(upscale.session.spec.radius or 0)
            tiled = [(h, w) for h, w in SIZES if h > limit or w > limit]
            shapes |= {(min(h, window), min(w, window)) for h, w in tiled}
        table.add(f"{what}: compiles", upscale.session.stats.compiles, len(shapes))
        upscale.close()


def main() -> None:
    if not ASSETS.is_dir():
        sys.exit(f"{ASSETS} is missing: it holds the weights and pictures this measures")
    OUT.mkdir(exist_ok=True)
    started = time.time()
    table = Table()
    for weights in WEIGHTS:
        interleaved(table, weights)
        agreement(table, weights)
    (OUT / "acceptance.json").write_text(json.dumps(table.rows, indent=1))
    bad = [row for row in table.rows if not row["ok"]]
    print(f"{len(table.rows) - len(bad)} of {len(table.rows)} within bounds, {time.time() - started:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
