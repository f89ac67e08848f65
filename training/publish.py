"""Turn `models/default.safetensors` into `models/default.onnx`, verified: `python -m training.publish`."""

from __future__ import annotations

from pathlib import Path

from anysize.exporters import export
from anysize.models import load_weights

MODELS = Path(__file__).parent.parent / "models"
LIMIT = 1_500_000


def main() -> None:
    weights = load_weights(MODELS / "default.safetensors")
    written = export(
        weights.module, MODELS / "default.onnx", inputs=[("n", 3, "h", "w")], source_sha256=weights.sha256
    )
    size = written.stat().st_size
    if size > LIMIT:
        raise SystemExit(f"{written} has {size} bytes, more than the {LIMIT} allowed in the wheel")
    print(f"{written}: {size} bytes, from sha256 {weights.sha256}")


if __name__ == "__main__":
    main()
