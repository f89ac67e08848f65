"""What a weights file may not do: hide what it is, or take more memory or time than its size says."""

from __future__ import annotations

import pickletools
import zipfile
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import IO, Any

from anysize.backends.errors import ModelLoadError

#: values that a module may have beyond what its file can hold: buffers that are computed, not kept
_COMPUTED = 2**24
#: values' worth of memory of a tensor beside its values, and of the module that it is of
_TENSOR = 2**10
#: how deep in wrappers tensors are looked for, here and by spandrel
_WRAPPED = 4
#: pickles at the start of PyTorch's older format: a number, a version, the system, the tensors, their names
_OLD_PICKLES = 5
#: tuples within a tuple, one within another counted each time that it is held: doubling n times makes 2^n
_WITHIN = 2**12


def check_pickles(path: Path) -> None:
    """Raise `ValueError` for a file whose unpickling takes memory or time that its size does not say.

    PyTorch's unpickler runs no code, but makes byte arrays of any length, and hashes tuples.
    """
    with path.open("rb") as file:
        if not file.peek(4).startswith(b"PK\3\4"):
            for _ in range(_OLD_PICKLES):
                if file.peek(1):
                    _check_pickle(file)
            return
        with zipfile.ZipFile(file) as archive:
            parts = archive.infolist()
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
            # PyTorch's are not compressed, so that one whose parts are larger than it is made to fill memory
            if packed or sum(part.file_size for part in parts) > path.stat().st_size:
                raise ValueError("its parts are compressed, or larger than the file")
            for part in parts:
                if part.filename.endswith(".pkl"):
                    with archive.open(part) as pickle:
                        _check_pickle(pickle)


def _check_pickle(file: IO[bytes]) -> None:
    """As `check_pickles`, of one."""
    try:
        _follow(file)
    except IndexError as error:  # it takes more than it has given
        raise ValueError("it is damaged, or none") from error


def _follow(file: IO[bytes]) -> None:
    """Follows the stack, with how many tuples each thing on it is."""
    stack, memo = list[int | None](), dict[Any, int | None]()  # None is a mark
    for code, argument, _ in pickletools.genops(file):
        taken, name = code.stack_before, code.name
        if name == "GLOBAL" and str(argument).endswith(" bytearray"):
            raise ValueError("it makes byte arrays")
        if name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[argument] = stack[-1]
            continue
        parts: list[int | None] = []
        if pickletools.markobject in taken:
            while (one := stack.pop()) is not None:
                parts.append(one)
            taken = taken[: taken.index(pickletools.markobject)]
        parts += [stack.pop() for _ in taken]
        if name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"):
            made = 1 + sum(part or 0 for part in parts)
            if made > _WITHIN:
                raise ValueError("a tuple holds too many others")
            stack.append(made)
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo.get(argument, 0))
        elif name == "MARK":
            stack.append(None)
        else:
            stack += [0 for _ in code.stack_after]


def plain(loaded: Any, path: Path) -> Any:
    """Mappings as dicts, and tensors as dense ones of real numbers without attributes, or a refusal.

    The unpickler makes mappings and tensors whose methods are hidden by data, tensors of many kinds, and
    tensors of any size by repeating one value; as they are published, no value takes less than a byte.
    Raises `ModelLoadError`.
    """
    import torch

    dicts: dict[int, dict[Any, Any]] = {}
    room = path.stat().st_size

    def as_plain(value: Any, key: object, depth: int) -> Any:
        nonlocal room
        if isinstance(value, torch.Tensor):
            if (
                type(value) not in (torch.Tensor, torch.nn.Parameter)
                or value.layout is not torch.strided
                or value.device.type != "cpu"
                or value.is_nested
                or value.is_quantized
                or value.dtype.is_complex
            ):
                raise ModelLoadError(f"{path}: '{key}' is no dense tensor of real numbers")
            room -= torch.Tensor.numel(value)
            if room < 0:
                raise ModelLoadError(f"{path}: its tensors claim more values than the file has bytes")
            return torch.Tensor.detach(value)
        if not isinstance(value, dict) or depth > _WRAPPED:
            return value
        if id(value) not in dicts:  # it may hold itself
            made = dicts[id(value)] = {}
            for name in value:
                if type(name) not in (str, int):  # whose text may be endless
                    raise ModelLoadError(f"{path}: a key that is no name: a {type(name).__name__}")
                if not str(name).isprintable():  # it is in messages
                    raise ModelLoadError(f"{path}: a key that is no name: {ascii(name)[:80]}")
                made[name] = as_plain(value[name], name, depth + 1)
        return dicts[id(value)]

    return as_plain(loaded, "", 0)


def limited(path: Path) -> AbstractContextManager[Any]:
    """In it this thread holds no more values at a time than the file has bytes, or `ModelLoadError`.

    A module is built as large as a few shapes say, with tables that are computed from them, before all of
    them are compared with it. So each operator is asked first for the shape of its result.
    """
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves, tree_map_only

    weakly: Any = StorageWeakRef

    def shape_alone(tensor: Any) -> Any:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    def tensors(results: Any) -> list[Any]:
        return [leaf for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)]

    class Limited(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            #: memory that was made, and how many values it is counted as
            self.made: list[tuple[Any, int]] = []
            self.count, self.room = 0, path.stat().st_size + _COMPUTED

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function.is_view or function._schema.is_mutable:
                return function(*args, **kwargs)
            with suppress(NotImplementedError, RuntimeError):  # where the shape follows from values
                given, named = tree_map_only(torch.Tensor, shape_alone, (args, kwargs))
                if any(argument.name == "device" for argument in function._schema.arguments):
                    named = {**named, "device": "meta"}
                self._reserve(tensors(function(*given, **named)))
            results = function(*args, **kwargs)
            for tensor in self._reserve(tensors(results)):
                self.made.append((weakly(tensor.untyped_storage()), _TENSOR + tensor.numel()))
                self.count += self.made[-1][1]
            return results

        def _reserve(self, results: list[Any]) -> list[Any]:
            wanted = sum(_TENSOR + tensor.numel() for tensor in results)
            if self.count + wanted > self.room:
                self.made = [(memory, count) for memory, count in self.made if not memory.expired()]
                self.count = sum(count for _, count in self.made)
            if self.count + wanted > self.room:
                raise ModelLoadError(f"{path}: says of a larger model than a file of its size can hold")
            return results

    return Limited()
