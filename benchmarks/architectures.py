"""Architectures of the community: what loads, with which contract, and which engine runs it like PyTorch.

`make bench-architectures` builds small networks of spandrel's classes with random weights, saves and loads
each as a file, and compares the engines at sizes that no export used. Writes docs/architectures.md; exit code
1 if an engine gives another result than PyTorch, or a file does not load.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent.parent / "out" / "architectures"
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
#: seconds for one of them on all engines
LIMIT = 600
BOUND = 1e-4
_WINDOWS: dict[str, Any] = {"img_size": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 8}
_SHUFFLE: dict[str, Any] = {"upscale": 2, "upsampler": "pixelshuffle"}
#: class -> its module in spandrel.architectures, and small sizes
NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "ATD": ("ATD", {**_WINDOWS, **_SHUFFLE, "embed_dim": 24, "category_size": 32, "num_tokens": 8}),
    "DAT": ("DAT", {"embed_dim": 60, "split_size": [8, 16], "depth": [2], "num_heads": [2], "upscale": 2}),
    "DITN": ("DITN", {"dim": 24, "ITL_blocks": 2, "SAL_blocks": 2, "upscale": 2}),
    "DnCNN": ("DnCNN", {"nc": 16, "nb": 5}),
    "DRCT": ("DRCT", {**_WINDOWS, **_SHUFFLE, "embed_dim": 24, "gc": 8}),
    "ESRGAN": ("ESRGAN", {"num_filters": 16, "num_blocks": 2, "plus": True}),
    "FDAT": ("FDAT", {"scale": 2, "embed_dim": 24, "num_groups": 1, "num_heads": 2, "mid_dim": 16}),
    "HAT": ("HAT", {**_WINDOWS, "depths": [1], "num_heads": [2], "embed_dim": 60, "upscale": 2}),
    "HVICIDNet": ("HVICIDNet", {}),
    "MMRealSR": ("MMRealSR", {"num_in_ch": 3, "num_out_ch": 3, "num_feat": 16, "num_block": 1}),
    "MoESR": ("MoESR", {"dim": 16, "n_blocks": 2, "n_block": 2, "scale": 2}),
    "MoSR": ("MoSR", {"n_block": 2, "dim": 16, "upscale": 2}),
    "NAFNet": ("NAFNet", {"width": 8, "enc_blk_nums": [1, 1], "dec_blk_nums": [1, 1]}),
    "OmniSR": ("OmniSR", {"num_feat": 24, "up_scale": 2}),
    "PLKSR": ("PLKSR", {"dim": 16, "n_blocks": 2, "upscaling_factor": 2}),
    "RCAN": ("RCAN", {"scale": 2, "n_resgroups": 2, "n_resblocks": 2, "n_feats": 16}),
    "RealPLKSR": ("PLKSR", {"dim": 16, "n_blocks": 2, "upscaling_factor": 2}),
    "RGT": ("RGT", {"img_size": 16, "embed_dim": 64, "depth": [2], "num_heads": [2]}),
    "SAFMN": ("SAFMN", {"dim": 16, "n_blocks": 2, "upscaling_factor": 2}),
    "SAFMNBCIE": ("SAFMNBCIE", {"dim": 16, "n_blocks": 2, "num_layers": 2}),
    "SeemoRe": ("SeemoRe", {"scale": 2, "num_layers": 2, "embedding_dim": 16}),
    "SPAN": ("SPAN", {"num_in_ch": 3, "num_out_ch": 3, "feature_channels": 16, "upscale": 2}),
    "Swin2SR": ("Swin2SR", {**_WINDOWS, **_SHUFFLE, "embed_dim": 24}),
    "SwinIR": ("SwinIR", {**_WINDOWS, **_SHUFFLE, "embed_dim": 24}),
    "SwiftSRGAN": ("SwiftSRGAN", {"num_channels": 16, "num_blocks": 2, "upscale_factor": 2}),
    "UpCunet2x": ("RealCUGAN", {}),
}


def one(name: str) -> dict[str, Any]:
    """Build, save, load and compare; in a process of its own."""
    import warnings

    warnings.simplefilter("ignore")
    import anysize
    import torch
    from anysize.models.community import import_spandrel
    from safetensors.torch import save_file

    import_spandrel()
    torch.manual_seed(0)
    home, arguments = NETWORKS[name]
    network = getattr(importlib.import_module(f"spandrel.architectures.{home}"), name)(**arguments)
    with torch.no_grad():
        for weight in network.parameters():  # what training begins at zero would hide what follows it
            if not weight.any():
                weight.normal_(0, 0.05)
    file = OUT / f"{name}.safetensors"
    save_file({key: value.contiguous().clone() for key, value in network.state_dict().items()}, file)
    try:
        spec = anysize.load(file, backend="torch").spec
    except anysize.AnysizeError as error:
        return {"error": str(error)}
    least = [dim.min for dim in spec.dims.values()]
    sizes = [
        (least[0], least[-1]),
        *(
            tuple(d.ceil(s) for d, s in zip(spec.dims.values(), pair, strict=True))
            for pair in ((43, 62), (80, 24))
        ),
    ]
    report = anysize.compare(file, sizes=sizes, atol=BOUND)
    engines: dict[str, Any] = {}
    for row in report.rows:
        kept = engines.setdefault(row.backend, {"max_abs": 0.0, "ok": True, "error": None})
        kept["ok"] &= row.ok
        kept["error"] = kept["error"] or row.error
        kept["max_abs"] = max(kept["max_abs"], row.max_abs or 0.0)
    return {
        "sizes": ", ".join(map(str, spec.dims.values())),
        "scale": spec.scale,
        "tiles": f"exact, radius {spec.radius}"
        if spec.tileable
        else spec.producer.partition("; ")[2] or "no: whole",
        "engines": engines,
    }


def in_a_process(name: str) -> dict[str, Any]:
    """What `one` found, or why it did not end."""
    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    environment["ANYSIZE_CACHE_DIR"] = tempfile.mkdtemp(dir=OUT)  # what other code made is none of this
    command = [sys.executable, __file__, name]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"not done within {LIMIT} s"}
    last = (ran.stdout if ran.returncode == 0 else ran.stderr).strip().splitlines()[-1:]
    facts: dict[str, Any] = json.loads(last[0]) if ran.returncode == 0 else {"error": " ".join(last)}
    return facts


def main() -> int:
    OUT.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    started = time.time()
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # nothing here is timed, and most of it has one thread
        for name, facts in zip(NETWORKS, pool.map(in_a_process, NETWORKS), strict=True):
            found[name] = facts
            print(f"{name}: {facts}", flush=True)
    wrong = write(found, time.time() - started)
    print(f"{len(found)} architectures, {wrong} wrong")
    return 1 if wrong else 0


def write(found: dict[str, Any], seconds: float) -> int:
    """The page; returns how many did not load, or are run by an engine with another result."""
    engines = list(dict.fromkeys(e for facts in found.values() for e in facts.get("engines", ())))
    rows, reasons, wrong = [], [], 0
    for name, facts in found.items():
        if "engines" not in facts:
            wrong += 1
            rows.append([name, "no", "", "", *[""] * len(engines)])
            reasons.append(f"* **{name}** does not load: {_short(facts['error'])}")
            continue
        cells = []
        for engine in engines:
            row = facts["engines"][engine]
            cells.append("refused" if row["error"] else f"{row['max_abs']:.1e}")
            wrong += not row["ok"] and not row["error"]
            if row["error"]:
                reasons.append(f"* **{name}** on {engine}: {_short(row['error'])}")
        rows.append([name, f"yes, x{facts['scale']}", facts["sizes"], facts["tiles"], *cells])
    head = ["architecture", "loads", "sizes", "tiles", *engines]
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    PAGE.write_text(
        "# Architectures, measured\n\n"
        f"Made by `make bench-architectures` in {seconds / 60:.0f} minutes on {_here()}.\n\n"
        "Small networks of spandrel's classes with random weights, each saved to a file and loaded by it. "
        "Sizes and tiles are\nthe contract as probed. The figures are the largest difference from PyTorch at "
        f"three sizes, of values about 1; {BOUND:g} is\nallowed. What an engine cannot run, or does not run "
        'like PyTorch, is refused when it is loaded, with the reason;\n`backend="auto"` then takes '
        "PyTorch.\n\n"
        f"{table}\n\n## Why some are refused\n\n" + "\n".join(reasons) + "\n"
    )
    return wrong


def _here() -> str:
    from anysize.bench import machine

    return ", ".join(f"{key} {value}" for key, value in machine().items())


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:297] + "..."


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(one(sys.argv[1])))
        sys.exit(0)
    sys.exit(main())
