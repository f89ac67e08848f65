"""int8 by NNCF: the same ONNX graph, whose inner convolutions run in eight bits.

Run as `python -m anysize.exporters.quantizing FOLDER` by `quantize`. NNCF is kept in a process of its own: it
draws progress bars on the standard output, changes the class of everybody's loggers, and reports its use over
the network.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from anysize.backends.base import Array, Model
from anysize.backends.errors import BackendUnavailableError, ExportError, ModelLoadError

_MODEL, _FEEDS, _RESULT = "model.onnx", "feeds.npz", "int8.onnx"


def quantize(model: Model, feeds: Sequence[Array]) -> bytes:
    """The model as ONNX with int8 convolutions between quantizing and dequantizing steps.

    `feeds`: its one input, NCHW, as often as it shall be calibrated on; ranges of values and the rounding of
    weights follow from them. The first and the last convolution stay as they are: what they round reaches
    every pixel. The result is not judged: compare it with the model. Raises `ModelLoadError` for what is no
    ONNX file of one piece, `ExportError` where there are no inner convolutions, `BackendUnavailableError`.
    """
    if model.format != "onnx" or isinstance(model.data, Path):
        raise ModelLoadError("int8 is made from weights, or from an .onnx file of one piece")
    check_installed()
    with tempfile.TemporaryDirectory(prefix="anysize-") as name:
        folder = Path(name)
        (folder / _MODEL).write_bytes(model.data)
        np.savez(folder / _FEEDS, *feeds)
        # -P: no module is taken from the folder that happens to be the current one
        command = [sys.executable, "-P", "-m", "anysize.exporters.quantizing", name]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            raise ExportError(f"this model cannot be quantized: {lines[-1] if lines else done.returncode}")
        return (folder / _RESULT).read_bytes()


def check_installed() -> None:
    """Raises `BackendUnavailableError`, with what to install, where something that makes int8 is missing."""
    missing = [name for name in ("nncf", "onnx", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise BackendUnavailableError(f'int8 needs {missing[0]}: pip install "anysize[int8]"', name="int8")


def main(folder: Path) -> None:
    """The part in a process of its own."""
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    import nncf
    import onnx

    proto = onnx.load(folder / _MODEL)
    for i, node in enumerate(proto.graph.node):
        node.name = str(i)  # a file's own names may be missing or the same
    convolutions = [n.name for n in proto.graph.node if n.op_type in ("Conv", "ConvTranspose")]
    if len(convolutions) < 3:
        sys.exit("its first and last convolution stay in f32, and it has no other")
    name = next(i.name for i in proto.graph.input if i.name not in {w.name for w in proto.graph.initializer})
    with np.load(folder / _FEEDS) as stored:
        feeds = [{name: stored[key]} for key in stored.files]
    made = nncf.quantize(
        proto,
        nncf.Dataset(feeds),
        # activations behind a ReLU of a slope have two signs, and their ranges are not alike
        preset=nncf.QuantizationPreset.MIXED,
        subset_size=len(feeds),
        # sums stay in f32, as a chain of residuals adds up what is rounded: with them in int8 one of 18 dense
        # blocks came out at 11.7 dB from f32 instead of 28.7
        ignored_scope=nncf.IgnoredScope(
            names=[convolutions[0], convolutions[-1]], types=["Add"], validate=False
        ),
    )
    onnx.save(made, folder / _RESULT)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
