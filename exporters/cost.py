"""How much memory running a model will take: what must be held at once, read off its graph."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends.base import Model


def working_bytes(model: Model, sizes: Mapping[str, int]) -> int | None:
    """Bytes of weights and of the tensors alive at once, at worst, for these sizes of the free axes.

    A program keeps its weights and a packed copy, and the tensors from where they are made to where they
    are last read. None where the graph cannot be read: external data, or a format other than ONNX and torch.
    """
    assert model.spec is not None
    shapes = model.spec.input_shapes(sizes)
    if model.format == "module":
        return _module_bytes(model.data, shapes)
    if model.format != "onnx" or isinstance(model.data, Path):
        return None
    try:
        import onnx
    except ImportError:
        return None
    proto = onnx.load_model_from_string(model.data)
    known = infer_shapes(onnx, proto, shapes)
    weights = {w.name: _bytes(onnx, tuple(w.dims), w.data_type) for w in proto.graph.initializer}
    held = {name: _bytes(onnx, *value) for name, value in known.items() if name not in weights}
    last_read = {name: i for i, node in enumerate(proto.graph.node) for name in node.input}
    kept = {output.name for output in proto.graph.output}
    alive = sum(held.get(name, 0) for name in shapes)
    most = alive
    for i, node in enumerate(proto.graph.node):
        alive += sum(held.get(name, 0) for name in node.output)
        most = max(most, alive)
        over = {n for n in (*node.input, *node.output) if last_read.get(n, i) == i and n not in kept}
        alive -= sum(held.get(name, 0) for name in over)
    return most + 2 * sum(weights.values())


def infer_shapes(
    onnx: Any, proto: Any, inputs: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and element type of every tensor that inference can tell, for inputs of these shapes.

    Raises whatever onnx raises for a graph it cannot infer.
    """
    fixed = onnx.ModelProto()
    fixed.CopyFrom(proto)
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        if value.name in inputs:
            dims = value.type.tensor_type.shape.dim
            for dim, size in zip(dims, inputs[value.name], strict=True):
                dim.dim_value = size
    for output in fixed.graph.output:
        output.type.tensor_type.ClearField("shape")
    graph = onnx.shape_inference.infer_shapes(fixed, data_prop=True).graph
    known = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape") and all(d.HasField("dim_value") for d in kind.shape.dim):
            known[value.name] = (tuple(d.dim_value for d in kind.shape.dim), kind.elem_type)
    for weight in graph.initializer:
        known[weight.name] = (tuple(weight.dims), weight.data_type)
    return known


def _bytes(onnx: Any, shape: tuple[int, ...], kind: int) -> int:
    dtype: np.dtype[Any] = onnx.helper.tensor_dtype_to_np_dtype(kind)
    return math.prod(shape) * dtype.itemsize


def _module_bytes(module: Any, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The same for a torch module, from what its leaves read and make in a run without data."""
    from copy import deepcopy

    import torch

    sizes: list[int] = []

    def note(_: Any, inputs: Any, output: Any) -> None:
        tensors = [t for t in (*inputs, output) if isinstance(t, torch.Tensor)]
        sizes.append(sum(t.numel() * t.element_size() for t in tensors))

    weights: int = sum(p.numel() * p.element_size() for p in module.parameters())
    ghost = deepcopy(module).to("meta")  # shapes without memory
    hooks = [leaf.register_forward_hook(note) for leaf in ghost.modules() if not list(leaf.children())]
    with torch.inference_mode():
        ghost(*(torch.empty(shape, device="meta") for shape in shapes.values()))
    for hook in hooks:
        hook.remove()
    # between leaves lie sums, products and joints, which hold about as much again
    most: int = max(sizes, default=0)
    return 2 * most + 2 * weights
