"""Turn what `training.train` made into the package's models: `python -m training.publish default`.

Exports and verifies `models/NAME.onnx`, copies the weights beside it and the card to `training/`, and writes
the digests to `models/bundled.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from pathlib import Path

from anysize.exporters import export
from anysize.models import load_weights

from training.train import RECIPES, STATE

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "models"
#: bytes of an .onnx file that the wheel takes
LIMIT = 1_500_000


def publish(name: str, folder: Path) -> None:
    """Nothing is changed but the working files where the export fails or is too large."""
    weights = load_weights(folder / "weights.safetensors")
    written = export(
        weights.module, folder / f"{name}.onnx", inputs=[("n", 3, "h", "w")], source_sha256=weights.sha256
    )
    if written.stat().st_size > LIMIT:
        raise SystemExit(f"{written} has {written.stat().st_size} bytes, more than the {LIMIT} of the wheel")
    shutil.copyfile(written, MODELS / written.name)
    shutil.copyfile(folder / "weights.safetensors", MODELS / f"{name}.safetensors")
    shutil.copyfile(folder / "card.md", ROOT / "training" / f"{name}.md")
    index = MODELS / "bundled.json"
    known = {facts["name"]: facts for facts in json.loads(index.read_text())}
    known[name] = {
        "name": name,
        "architecture": weights.architecture,
        "scale": RECIPES[name].scale,
        "licence": "Apache-2.0",
        "sha256": _sha256(MODELS / f"{name}.onnx"),
        "weights_sha256": _sha256(MODELS / f"{name}.safetensors"),
    }
    index.write_text(json.dumps([known[name] for name in sorted(known)], indent=1) + "\n")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    name = parser.parse_args().name
    publish(name, STATE / name)


if __name__ == "__main__":
    main()
