"""Turn what `training.train` made into the package's models: `python -m training.publish default`.

Exports and verifies `models/NAME.onnx`, copies the weights beside it and the card to `training/`, and writes
the digests to `models/bundled.json`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

from anysize.exporters import export
from anysize.files import replacing
from anysize.models import load_weights

from training.train import RECIPES, STATE

CARDS = Path(__file__).parent
MODELS = CARDS.parent / "models"
#: bytes of an .onnx file that the wheel takes
LIMIT = 1_500_000


def publish(name: str, folder: Path) -> None:
    """Nothing but `folder` is changed where a file is missing, the export fails or is too large."""
    if not all((folder / file).exists() for file in ("card.md", "weights.safetensors")):
        raise SystemExit(f"{folder}: holds no model with its card; finish the training first")
    card = (folder / "card.md").read_text()
    weights = load_weights(folder / "weights.safetensors")
    if weights.sha256 not in card:
        raise SystemExit(f"{folder}: its card is of other weights; finish the training first")
    written = export(
        weights.module, folder / f"{name}.onnx", inputs=[("n", 3, "h", "w")], source_sha256=weights.sha256
    )
    if written.stat().st_size > LIMIT:
        raise SystemExit(f"{written} has {written.stat().st_size} bytes, more than the {LIMIT} of the wheel")
    index = MODELS / "bundled.json"
    known = {facts["name"]: facts for facts in json.loads(index.read_text())}
    known[name] = {
        "name": name,
        "architecture": weights.architecture,
        "scale": RECIPES[name].scale,
        "licence": "Apache-2.0",
        "sha256": hashlib.sha256(written.read_bytes()).hexdigest(),
        "weights_sha256": weights.sha256,
    }
    listed = json.dumps([known[name] for name in sorted(known)], indent=1) + "\n"
    weights_file = (folder / "weights.safetensors").read_bytes()
    for path, content in (
        (MODELS / f"{name}.onnx", written.read_bytes()),
        (MODELS / f"{name}.safetensors", weights_file),
        (CARDS / f"{name}.md", card.encode()),
        (index, listed.encode()),
    ):
        with replacing(path) as part:
            part.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=RECIPES)
    name = parser.parse_args().name
    publish(name, STATE / name)


if __name__ == "__main__":
    main()
