"""AnimeGANv2's figures: engines against each other, batches, exact tiles and their memory, sizes.

`make bench-styles` reads pictures from `../shared/assets`, has random weights of the real size, and writes
docs/animegan-measured.md with its charts; exit code 1 if a figure is outside its bound. Takes minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import anysize
import numpy as np
import torch
from acceptance import ASSETS, OUT, Table
from anysize import MemoryBudgetError, SizePolicy, Stylizer, Tiling
from anysize.bench import machine
from anysize.exporters import export
from anysize.files import read_picture
from anysize.memory import available, measure, peak
from anysize.models.animegan import AnimeGANv2
from anysize.sweep import sweep
from anysize.tuning import Tuned

DOCS = Path("docs")
SIZES = ((256, 256), (250, 333), (512, 384), (1080, 720))  # height, width
LARGE = (1536, 2048)
HUGE = (4000, 3000)
#: pictures with a face, and where it is: left, top, width, height
FACES = {"woman": (48, 60, 120, 130), "baby": (75, 90, 340, 330)}
GRAPHS = ("openvino", "onnxruntime")


def mirrored(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """The picture continued by its mirror images."""
    beyond = [(0, max(0, want - has)) for want, has in zip((height, width), picture.shape[:2], strict=True)]
    return np.ascontiguousarray(np.pad(picture, [*beyond, (0, 0)], "symmetric")[:height, :width])


def photograph() -> np.ndarray:
    return read_picture(ASSETS / "images" / "OST_009.png").array[..., :3]


def name(align_corners: bool) -> str:
    return f"align_corners={align_corners}"


def agreement(table: Table, files: dict[bool, Path], modules: dict[bool, AnimeGANv2]) -> None:
    """Each engine against eager PyTorch, in the model's own values, -1 to 1."""
    for mode, module in modules.items():
        for engine in (*GRAPHS, "torch"):
            source = module if engine == "torch" else files[mode]
            with anysize.load(source, backend=engine) as session:
                for height, width in SIZES:
                    planes = mirrored(photograph(), height, width).transpose(2, 0, 1)[None]
                    x = planes.astype(np.float32) / 127.5 - 1
                    with torch.inference_mode():
                        want = module(torch.from_numpy(x)).numpy()
                    got = session(x)
                    assert got.shape == want.shape
                    what = f"{name(mode)}, {height} x {width}, {engine} against eager: largest difference"
                    table.add(what, float(np.abs(got - want).max()), 1e-4)


def batches(table: Table, file: Path, module: AnimeGANv2) -> None:
    pictures = [mirrored(photograph(), *size) / 255 for size in (*SIZES[:3], *SIZES[:3], SIZES[0])]
    for engine in (*GRAPHS, "torch"):
        with anysize.load(module if engine == "torch" else file, backend=engine) as session:
            stylize = Stylizer(session)
            alone = [stylize(picture) for picture in pictures]
            calls = session.stats.calls
            together = stylize.batch(pictures)
            print(f"     {len(pictures)} pictures in {session.stats.calls - calls} calls")
            pairs = zip(alone, together, strict=True)
            error = max(float(np.abs(a - b).max()) for a, b in pairs)
            table.add(f"{engine}, a batch of mixed sizes against one by one: largest difference", error, 1e-5)


def child(file: str, engine: str, method: str, result: str) -> None:
    """In a process of its own: restyle the large picture; print seconds and the peak in bytes."""
    picture = mirrored(photograph(), *LARGE).astype(np.float32) / 255
    stylize = Stylizer(file, backend=engine, tiling=Tiling(method))  # type: ignore[arg-type]
    started = time.perf_counter()
    styled = stylize(picture)
    seconds, most = time.perf_counter() - started, peak()
    np.save(result, styled)
    print(json.dumps({"seconds": seconds, "peak": most}))


def lockstep(table: Table, files: dict[bool, Path]) -> list[str]:
    lines = ["| lockstep and whole | peak, MiB | seconds, with compiling |", "|---|---|---|"]
    for mode, file in files.items():
        for engine in GRAPHS:
            figures: dict[str, Any] = {}
            results = {}
            for method in ("whole", "lockstep"):
                result = OUT / f"styles-{method}.npy"
                command = [sys.executable, __file__, "child", str(file), engine, method, str(result)]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                figures[method] = json.loads(done.stdout.splitlines()[-1])
                results[method] = np.load(result)
                result.unlink()
            what = f"{name(mode)}, {LARGE[0]} x {LARGE[1]}, {engine}: lockstep against whole"
            error = 2 * float(np.abs(results["lockstep"] - results["whole"]).max())  # of values in -1..1
            table.add(f"{what}: largest difference", error, 1e-4)
            whole, tiled = figures["whole"], figures["lockstep"]
            table.add(f"{what}: peak memory", tiled["peak"] / whole["peak"], 0.5)
            peaks = f"{tiled['peak'] / 2**20:.0f} and {whole['peak'] / 2**20:.0f}"
            seconds = f"{tiled['seconds']:.1f} and {whole['seconds']:.1f}"
            lines.append(f"| {name(mode)}, {engine} | {peaks} | {seconds} |")
            print(f"     {peaks} MiB, {seconds} s")
    return lines


def memory(table: Table, file: Path, weights: Path) -> list[str]:
    """What was measured of each engine, what it says of a huge picture, and that this never begins."""
    lines = []
    picture = mirrored(photograph(), *HUGE)
    for engine in (*GRAPHS, "torch"):
        with anysize.load(weights if engine == "torch" else file, backend=engine) as session:
            held = measure(session)
            assert held is not None
            session.tuned = Tuned((), 4, held)
            alive = session.working_bytes({"n": 1, "h": HUGE[0], "w": HUGE[1]})
            assert alive is not None
            estimate = held.bytes(alive) / 2**30
            lines.append(f"| {engine} | {held.factor:.2f} | {estimate:.1f} GiB at {HUGE[1]} x {HUGE[0]} |")
            print(f"     {engine}: {estimate:.1f} GiB, of {available() / 2**30:.1f} GiB left here")
            tiling, refused = Tiling("whole", memory="8GiB"), False
            try:
                Stylizer(session, tiling=tiling)(picture)
            except MemoryBudgetError as error:
                found = re.search(r"about (\d+) MiB more", str(error))
                refused = found is not None and abs(int(found[1]) / 1024 - estimate) < 0.1
            what = f"{engine}, {HUGE[1]} x {HUGE[0]} within 8 GiB"
            table.at_least(f"{what}: refused, with the estimate", float(refused), 1)
            table.add(f"{what}: runs of the engine before that", session.stats.calls, 0)
            rows = Stylizer(session, SizePolicy(max_side=1024), tiling=tiling)(picture).shape[0]
            table.at_least(f"{what}, brought to 1024: rows of the result", rows, HUGE[0])
    return lines


def main() -> None:
    if not ASSETS.is_dir():
        sys.exit(f"{ASSETS} is missing: it holds the pictures this measures")
    OUT.mkdir(exist_ok=True)
    started, table = time.time(), Table()
    modules, files = {}, {}
    for mode in (True, False):
        torch.manual_seed(0)
        modules[mode] = AnimeGANv2(mode).eval()
        path = OUT / f"animegan-{mode}.onnx"
        files[mode] = export(modules[mode], path, inputs=[("n", 3, "h", "w")])
    weights = OUT / "animegan.pt"
    torch.save(modules[True].state_dict(), weights)
    agreement(table, files, modules)
    batches(table, files[True], modules[True])
    tiled = lockstep(table, files)
    measured = memory(table, files[True], weights)
    about = "; ".join(f"{key}: {value}" for key, value in machine().items())
    lines = ["# AnimeGANv2, measured", "", "By `make bench-styles`, with random weights of the real size, on"]
    lines += [about, "", *table.markdown()]
    lines += [
        "",
        *tiled,
        "",
        "Memory, measured in processes of their own at two sizes: times the tensors alive at once.",
    ]
    lines += ["", "| engine | factor | estimate |", "|---|---|---|", *measured]
    for face, region in FACES.items():
        picture = read_picture(ASSETS / "images" / "set5" / "HR" / f"{face}.png").array
        found = sweep(str(weights), picture, region=region, rounds=3, say=print)
        made = found.write(OUT / f"sweep-{face}")
        made[-1].rename(DOCS / f"animegan-{face}.png")
        lines += ["", f"## By resolution: '{face}' of Set5", "", *found.markdown().splitlines()[6:]]
        lines += ["", f"![seconds, peak memory and SSIM by resolution](animegan-{face}.png)"]
    lines += [
        "",
        "With random weights, SSIM says what a size loses; with trained ones, also what style does.",
    ]
    (DOCS / "animegan-measured.md").write_text("\n".join(lines) + "\n")
    bad = [row for row in table.rows if not row["ok"]]
    print(f"{len(table.rows) - len(bad)} of {len(table.rows)} within bounds, {time.time() - started:.0f} s")
    sys.exit(bool(bad))


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        main()
