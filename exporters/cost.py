"""What a graph tells without being run: shapes, the memory held at once, the arithmetic."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from anysize.backends.base import Array, Model
from anysize.backends.errors import BackendUnavailableError, NotStreamable
from anysize.backends.spec import Dim

_SMALL = 4096  # numbers in a weight that may be part of a computation of sizes


def working_bytes(model: Model, sizes: Mapping[str, int]) -> int | None:
    """Bytes of weights and of the tensors alive at once, at worst, for these sizes of the free axes.

    A program keeps its weights and a packed copy, and the tensors from where they are made to where they
    are last read. None where the graph cannot be read: external data, or a format other than ONNX and torch.
    """
    assert model.spec is not None
    shapes = model.spec.input_shapes(sizes)
    if model.format == "module":
        try:
            return _module_bytes(model.data, shapes)
        except Exception:  # one that does not run without data
            return None
    graph = _read(model)
    if graph is None:
        return None
    onnx, proto = graph
    known = infer_shapes(proto, shapes)
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


def _read(model: Model) -> tuple[Any, Any] | None:
    """onnx itself and the model as it reads it; None where there is no onnx or nothing for it."""
    if model.format != "onnx" or isinstance(model.data, Path):
        return None
    try:
        import onnx
    except ImportError:
        return None
    return onnx, onnx.load_model_from_string(model.data)


def picture_graph(model: Model, parts: str, opset: int) -> tuple[Any, Any]:
    """onnx itself and the graph of a model that takes and gives one picture, to be taken apart into `parts`.

    CastLike, which the exporter writes for the zeros of a convolution without offsets, is Cast in it, where
    the type can be told.

    Raises `NotStreamable` where it is none, or of an opset before `opset`; `BackendUnavailableError` without
    onnx.
    """
    try:
        import onnx
        import onnx.reference
    except ImportError as error:
        text = f"{parts} are made from the model with onnx: pip install onnx ({error})"
        raise BackendUnavailableError(text, name="onnx") from error
    spec = model.spec
    assert spec is not None
    if model.format == "module":
        text = "torch runs modules, and only a graph can be taken apart into"
        raise NotStreamable(f"{text} {parts}; use openvino or onnxruntime")
    if model.format != "onnx" or isinstance(model.data, Path):
        raise NotStreamable(f"{parts} are made from an .onnx file of one piece, not from others")
    if spec.scale is None or not all(isinstance(s, Dim) for s in spec.inputs[0].shape[2:]):
        raise NotStreamable("not a model of one picture of any size to one picture")
    try:
        proto = onnx.load_model_from_string(model.data)
    except Exception as error:  # protobuf's own classes; an engine may read what this onnx cannot
        raise NotStreamable(f"onnx cannot read this model: {error}") from error
    if any(i.domain in ("", "ai.onnx") and i.version < opset for i in proto.opset_import):
        raise NotStreamable(f"the graph is of an ONNX opset before {opset}; export it again")
    known = infer_shapes(proto, spec.input_shapes({n: dim.ceil(dim.min) for n, dim in spec.dims.items()}))
    for node in proto.graph.node:  # it reads nothing but the type of what may be a picture
        if node.op_type == "CastLike" and node.output[0] in known:
            node.op_type = "Cast"
            del node.input[1:]
            node.attribute.append(onnx.helper.make_attribute("to", known[node.output[0]][1]))
    return onnx, proto


def operations(model: Model, sizes: Mapping[str, int]) -> tuple[int, int] | None:
    """Arithmetic and traffic of one run: operations, two for each multiply-add of a convolution or a matrix
    product, and bytes that its operators read and write. None where the graph cannot be read.
    """
    assert model.spec is not None
    graph = _read(model)
    if graph is None:
        return None
    onnx, proto = graph
    known = infer_shapes(proto, model.spec.input_shapes(sizes))
    done = moved = 0
    for node in proto.graph.node:
        if any(name not in known for name in (*node.input, *node.output) if name):
            continue
        ends = [known[name][0] for name in node.input if name]
        if node.op_type == "Conv":
            done += 2 * math.prod(known[node.output[0]][0]) * math.prod(ends[1][1:])
        elif node.op_type == "ConvTranspose":
            done += 2 * math.prod(ends[0]) * math.prod(ends[1][1:])
        elif node.op_type in ("MatMul", "Gemm"):
            done += 2 * math.prod(known[node.output[0]][0]) * ends[0][-1]
        if node.op_type not in ("Shape", "Constant"):
            moved += sum(_bytes(onnx, *known[name]) for name in (*node.input, *node.output) if name)
    return done, moved


def infer_shapes(proto: Any, inputs: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and element type of every tensor that can be told for inputs of these shapes.

    Sizes that a graph computes from its input's are computed too, which onnx's own inference over a whole
    graph does for a few operators only.
    """
    import onnx

    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=1)
    types: dict[str, Any] = {}
    values: dict[str, Array] = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type.elem_type
        if value.name in inputs:
            types[value.name] = onnx.helper.make_tensor_type_proto(kind, inputs[value.name])
    for weight in proto.graph.initializer:
        types[weight.name] = onnx.helper.make_tensor_type_proto(weight.data_type, weight.dims)
        if math.prod(weight.dims) <= _SMALL:
            values[weight.name] = onnx.numpy_helper.to_array(weight)
    for node in proto.graph.node:
        present = [name for name in node.input if name]
        if node.op_type == "Shape" and node.input[0] in types:
            ends = {a.name: a.i for a in node.attribute}
            shape = _shape(types[node.input[0]])
            values[node.output[0]] = np.array(shape[ends.get("start", 0) : ends.get("end")], np.int64)
        else:
            values.update(computed(node, values, math.inf))
        known = {name: values[name] for name in node.output if name in values}
        for name, array in known.items():
            kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
            types[name] = onnx.helper.make_tensor_type_proto(kind, array.shape)
        if len(known) < len(node.output) and all(name in types for name in present):
            with contextlib.suppress(Exception):
                types.update(
                    onnx.shape_inference.infer_node_outputs(
                        onnx.defs.get_schema(node.op_type, opset, node.domain),
                        node,
                        {name: types[name] for name in present},
                        {n: onnx.numpy_helper.from_array(values[n]) for n in present if n in values},
                        opset_imports=list(proto.opset_import),
                        ir_version=proto.ir_version,
                    )
                )
    return {
        name: (_shape(kind), kind.tensor_type.elem_type) for name, kind in types.items() if _is_fixed(kind)
    }


def computed(node: Any, values: Mapping[str, Array], most: float = 64) -> dict[str, Array]:
    """What a node gives; nothing where that cannot be told from `values` that are `most` numbers or fewer.

    By default enough for axes, scales and padding, and too few for weights.
    """
    import onnx.reference

    feeds = {name: values.get(name) for name in node.input if name}
    if any(value is None or value.size > most for value in feeds.values()):
        return {}
    with contextlib.suppress(Exception):
        results = onnx.reference.ReferenceEvaluator(node).run(None, feeds)
        if all(isinstance(result, np.ndarray | np.generic) for result in results):
            return dict(zip(node.output, map(np.asarray, results), strict=True))
    return {}


def _is_fixed(kind: Any) -> bool:
    tensor = kind.tensor_type
    return tensor.HasField("shape") and all(d.HasField("dim_value") for d in tensor.shape.dim)


def _shape(kind: Any) -> tuple[int, ...]:
    return tuple(dim.dim_value for dim in kind.tensor_type.shape.dim)


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
