"""Sessions as `torch.nn.Module`s, for hosts whose own code calls the model."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from importlib import import_module
from typing import Any, NoReturn

import numpy as np
import torch
from anysize.backends.base import Feeds
from anysize.backends.errors import OptionError, ShapeError
from anysize.backends.pytorch import flatten_outputs
from anysize.backends.spec import Dim, TensorSpec
from anysize.exporters.exporting import private_copy, random_feeds
from anysize.exporters.probing import clip
from anysize.models.diffusion import Recipe, recipes_of
from anysize.models.modules import Part
from anysize.session import Session
from torch.utils import _pytree as pytree

#: a side that all factors of autoencoders divide
_LARGE = 2048
#: the sides at which a model is held against its session: small, odd and even, square, wide and high
_PROBED = ((1, 1), (17, 22), (22, 17))
#: how far a session of the same model may be off, by its largest value: in f32 by rounding, else by
#: hundredths; and by how much more, for models that give nearly nothing
_SAME_MODEL, _SAME_ROUNDED, _NOTHING = 0.01, 0.1, 1e-5
#: methods of models of diffusers that save or change weights or layers, which a stand-in has not
_REFUSED = re.compile("save_pretrained|push_to_hub|enable_freeu|qkv_projections|attn_proc|adapter|lora")


class SessionModule(torch.nn.Module):
    """Stands in for the module a session was made from: same call signature, tensors in and out.

    Positional arguments follow the contract's inputs, keywords their names. Results have the dtype
    (where it is floating) and device of the first argument; several come as a tuple. Gradients do not flow:
    a backward pass through it raises `OptionError`. Thread-safe, like the session.
    """

    def __init__(self, session: Session, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: what hosts that ask for the module's are told."""
        super().__init__()
        self.session = session
        self.anysize_placeholder = _placeholder(dtype)

    def __deepcopy__(self, memo: dict[int, Any]) -> SessionModule:
        return SessionModule(self.session, self.anysize_placeholder.dtype)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        names = [t.name for t in self.session.spec.inputs]
        if len(args) > len(names):
            raise TypeError(f"the model takes {len(names)} tensors ({', '.join(names)}), got {len(args)}")
        tensors = dict(zip(names, args, strict=False))
        if twice := set(tensors) & set(kwargs):
            raise TypeError(f"got several values for {', '.join(sorted(twice))}")
        results = _run(self.session, _tensors(self.session, tensors | kwargs))
        return results[0] if len(results) == 1 else results


def module(session: Session | Mapping[str, Session], like: torch.nn.Module | None) -> torch.nn.Module:
    """See `anysize.as_module`."""
    given = session.values() if isinstance(session, Mapping) else [session]
    for one in given:
        if not isinstance(one, Session):
            raise OptionError(f"as_module takes sessions, as load() makes them, not {type(one).__name__}")
    if like is not None and not isinstance(like, torch.nn.Module):
        raise OptionError(f"like is the model, a torch.nn.Module, not {type(like).__name__}")
    like = getattr(like, "_orig_mod", like)  # of torch.compile
    if isinstance(like, torch.jit.ScriptModule):
        raise OptionError("like is the model as it was before torch.jit.script or trace")
    recipes = None if like is None else recipes_of(like)
    if like is not None and recipes is not None:
        return _of_parts(session, like, recipes)
    if not isinstance(session, Session):
        raise OptionError("sessions by name need the model of diffusers whose parts they are: like=...")
    return SessionModule(session) if like is None else _of_one(session, like)


def _of_one(session: Session, like: torch.nn.Module) -> torch.nn.Module:
    """A twin of any module, whose results are put together as runs at small sizes show."""
    kind, names = type(like).__name__, [t.name for t in session.spec.inputs]
    signature = inspect.signature(type(like).forward.__get__(like))
    if others := [name for name in names if name not in signature.parameters]:
        raise OptionError(f"the session takes {', '.join(others)}, and {kind}'s forward does not")
    original = private_copy(like, share=True)
    with session.alone() as trial:  # whose programs for these sizes go again
        results = [_empty_result(original, trial, sides, _dtype(like)) for sides in _PROBED]
    if others := [other for other in results if other != results[0]]:
        given = f"{results[0]}, {others[0]}"
        raise OptionError(f"what {kind} returns beside tensors depends on the input: {given}")
    twin = copy.deepcopy(like, {id(parameter): None for parameter in like.parameters()})
    for name, module in twin.named_modules():
        if name and any(True for _ in like.get_submodule(name).parameters(recurse=False)):
            module.forward = partial(_refuse, kind, f"{name}.forward")
    twin.anysize_placeholder = _placeholder(_dtype(like))
    twin.forward = _Arguments(session, signature, results[0])
    _without_hooks(twin)
    return twin


def _empty_result(
    original: torch.nn.Module, session: Session, sides: tuple[int, int], dtype: torch.dtype
) -> Any:
    """What the model returns, without its tensors; which have to be those of the session."""
    sizes = _sizes(session, sides)
    feeds = random_feeds(session.spec, sizes)
    tensors = {name: torch.tensor(array) for name, array in feeds.items()}  # it may write to them
    # in order where that names them, as hosts and their hooks have it
    ordered = list(inspect.signature(original.forward).parameters)[: len(tensors)] == list(tensors)
    result = _original(
        partial(original, *tensors.values()) if ordered else partial(original, **tensors), original, sizes
    )
    want = flatten_outputs(result)
    _hold(session, feeds, want, original, sizes, dtype)
    return _emptied(result, len(want))


def _sizes(session: Session, sides: tuple[int, int]) -> dict[str, int]:
    """Of the batch 1, and of the axes after it these in turn."""
    batch = getattr(session.spec.inputs[0].shape[0], "name", "")
    free = [name for name in session.spec.dims if name != batch]
    wanted = {name: sides[i % 2] for i, name in enumerate(free)}
    return {name: clip(dim, wanted.get(name, 1)) for name, dim in session.spec.dims.items()}


def _original(run: Callable[[], Any], model: torch.nn.Module, sizes: Mapping[str, int]) -> Any:
    try:
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            return run()
    except Exception as error:  # whatever the module raises
        text = f"the session is not of this {type(model).__name__}, which does not run at {sizes}: {error}"
        raise OptionError(text) from error


def _hold(
    session: Session,
    feeds: Feeds,
    results: Sequence[torch.Tensor],
    model: torch.nn.Module,
    sizes: Mapping[str, int],
    dtype: torch.dtype,
) -> None:
    """Raise `OptionError` unless the session gives what the model, whose weights are of `dtype`, gave."""
    want = [result.detach().cpu().double().numpy() for result in results]
    got = [array.astype(np.float64) for array in session.run(feeds).values()]
    exact = session.precision == "f32" and dtype in (torch.float32, torch.float64)
    shapes = [[array.shape for array in arrays] for arrays in (got, want)]
    text = f"the session is not of this {type(model).__name__}: at {sizes} it "
    if shapes[0] != shapes[1]:
        raise OptionError(f"{text}gives {shapes[0]}, not {shapes[1]}")
    for a, b in zip(got, want, strict=True):
        off, largest = float(np.abs(a - b).max()), float(np.abs(b).max())
        if not off <= (_SAME_MODEL if exact else _SAME_ROUNDED) * largest + _NOTHING:
            raise OptionError(f"{text}is off by {off:.2g}, of values up to {largest:.2g}")


def _without_hooks(module: torch.nn.Module) -> None:
    """They run in the session, with the module that it was made from."""
    for hooks in (module._forward_hooks, module._forward_pre_hooks):
        hooks.clear()


def _of_parts(
    sessions: Session | Mapping[str, Session], like: torch.nn.Module, recipes: Mapping[str, Recipe]
) -> torch.nn.Module:
    """A twin of a model of diffusers, whose parts run in sessions."""
    if isinstance(sessions, Session):
        if len(recipes) > 1:
            raise OptionError(f"{type(like).__name__} has several parts; give a session by name: {{...}}")
        sessions = dict.fromkeys(recipes, sessions)
    if not sessions or sessions.keys() - recipes:
        raise OptionError(f"{type(like).__name__} has the parts {', '.join(recipes)}, not {list(sessions)}")
    replaced = {name: _steps(like, recipes[name]) for name in sessions}
    for name, session in sessions.items():
        _check(session, recipes[name], like, name)
        _hold_part(session, recipes[name], like, replaced[name])
    # a copy, whose class, attributes and config hosts know; of what is replaced, without the weights
    memo: dict[int, Any] = {
        id(parameter): None
        for steps in replaced.values()
        for step in steps
        for parameter in like.get_submodule(step).parameters()
    }
    twin = copy.deepcopy(like, memo)
    dtype = _dtype(like)
    for name, session in sessions.items():
        first, *others = (twin.get_submodule(step) for step in replaced[name])
        first.anysize_placeholder = _placeholder(dtype)
        for step in (first, *others):
            _without_hooks(step)
        for step in others:
            step.forward = _same
        if recipes[name].chain:
            first.forward = _Step(session)
        else:
            bound = type(like).forward.__get__(like)
            first.forward = _Call(session, recipes[name], inspect.signature(bound))
    for method in dir(type(like)):
        if _REFUSED.search(method) and callable(getattr(type(like), method)):
            setattr(twin, method, partial(_refuse, type(like).__name__, method))
    return twin


def _hold_part(session: Session, recipe: Recipe, like: torch.nn.Module, steps: Sequence[str]) -> None:
    """Raise `OptionError` unless the session gives what the model does, with all that was set on it."""
    first = like.get_submodule(steps[0])
    weight = next(first.parameters())
    stands_in = hasattr(vars(first).get("forward"), "session")  # and was held when it was made
    fixed = not any(isinstance(size, Dim) for size in session.spec.inputs[0].shape[2:])
    if stands_in or weight.is_meta or (fixed and hasattr(like, "patch_embed")):  # other positions, on purpose
        return
    sizes = _sizes(session, _PROBED[1])
    feeds = random_feeds(session.spec, sizes)
    tensors = [torch.tensor(array, device=weight.device) for array in feeds.values()]
    tensors = [t.to(weight.dtype) if t.is_floating_point() else t for t in tensors]
    want = _original(partial(Part(like, recipe), *tensors), like, sizes)
    with session.alone() as trial:  # whose program for this size goes again
        _hold(trial, feeds, [want], like, sizes, weight.dtype)


def _steps(model: torch.nn.Module, recipe: Recipe) -> list[str]:
    """The submodules that a part is made of; "": the model itself."""
    return [step for step in recipe.chain if getattr(model, step) is not None] or [""]


def _refuse(kind: str, method: str, *_: Any, **__: Any) -> NoReturn:
    raise OptionError(
        f"{method}: an engine runs this {kind}; its weights and layers are not here to be saved or changed"
    )


def _same(x: torch.Tensor) -> torch.Tensor:
    """The `forward` of a submodule whose work is done by the session before it."""
    return x


class _Step:
    """The `forward` of a chain of submodules. Not a module, and copies of its host share the session."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> _Step:
        return self

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        (result,) = _run(self.session, {self.session.spec.inputs[0].name: x})
        return result


class _Arguments(_Step):
    """The `forward` of any module: arguments as its class takes them, results as it gives them.

    `result`: what it returns, with `_HERE` in place of each tensor.
    """

    def __init__(self, session: Session, signature: inspect.Signature, result: Any) -> None:
        super().__init__(session)
        self.signature, self.result = signature, result

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        names, tensors = {t.name for t in self.session.spec.inputs}, {}
        for name, value in self.signature.bind(*args, **kwargs).arguments.items():
            if name in names:
                tensors[name] = value
            elif not _equal(value, self.signature.parameters[name].default):
                raise OptionError(f"'{name}' is given, and the session takes {', '.join(sorted(names))}")
        return _filled(self.result, iter(_run(self.session, _tensors(self.session, tensors))))


def _equal(value: Any, default: Any) -> bool:
    return value is default or (
        isinstance(value, _PLAIN) and type(value) is type(default) and value == default
    )


#: what a result may hold beside its tensors
_PLAIN = (type(None), bool, int, float, str, Enum)


class _Here:
    """Where a tensor belongs."""


_HERE = _Here()


def _emptied(result: Any, count: int) -> Any:
    """A result of so many tensors without them. Raises `OptionError` where it could not be filled again."""
    leaves: list[Any] = []

    def empty(leaf: Any) -> Any:
        leaves.append(_HERE if isinstance(leaf, torch.Tensor) else leaf)
        return leaves[-1]

    emptied = _mapped(empty, result)
    for leaf in leaves:
        if leaf is not _HERE and not isinstance(leaf, _PLAIN):
            raise OptionError(f"results in a {type(leaf).__name__} cannot be put together again")
    if leaves.count(_HERE) != count:
        raise OptionError("the tensors of the result cannot be put together again")
    return emptied


def _filled(result: Any, tensors: Iterator[torch.Tensor]) -> Any:
    return _mapped(lambda leaf: next(tensors) if leaf is _HERE else leaf, result)


def _mapped(change: Callable[[Any], Any], result: Any) -> Any:
    """In tuples, lists, dicts, and data classes, in the order of `flatten_outputs`."""

    def leaf(value: Any) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type):
            return change(value)
        made = copy.copy(value)
        fields = {field.name for field in dataclasses.fields(value)}
        if more := [name for name in getattr(value, "__dict__", ()) if name not in fields]:
            raise OptionError(f"a {type(value).__name__} with {', '.join(more)} cannot be put together again")
        for field in dataclasses.fields(value):  # as they are, frozen or not, and no `__post_init__`
            object.__setattr__(made, field.name, _mapped(change, getattr(value, field.name)))
        return made

    return pytree.tree_map(leaf, result)


class _Call(_Step):
    """The `forward` of a whole model: arguments as its class takes them, results as it gives them."""

    def __init__(self, session: Session, recipe: Recipe, signature: inspect.Signature) -> None:
        super().__init__(session)
        self.recipe, self.signature = recipe, signature
        home, _, name = recipe.result.partition(":")
        self.result = getattr(import_module(home), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = self.signature.bind(*args, **kwargs).arguments
        as_class = given.pop("return_dict", True)
        tensors: dict[str, Any] = {}
        for name, value in given.items():
            entries = value.items() if isinstance(value, Mapping) else ()
            tensors |= {f"{name}.{key}": v for key, v in entries} if entries else {name: value}
        inputs = self.session.spec.inputs
        known = {t.name for t in inputs}
        for name, value in list(tensors.items()):
            if value is None or (isinstance(value, (Mapping, list, tuple)) and not value):
                del tensors[name]
            elif name not in known:
                raise OptionError(f"'{name}' is given, and the session takes {', '.join(sorted(known))}")
        for tensor in inputs:
            if tensor.name in tensors:
                tensors[tensor.name] = _tensor(tensor, tensors[tensor.name])
            elif tensor.name not in (self.recipe.absent or {}):
                raise ShapeError(tensor.name, None, "nothing", "this input is required")
        sizes: dict[str, int] = {}
        for tensor in inputs:
            if tensor.name in tensors and tensors[tensor.name].ndim == len(tensor.shape):
                for axis, size in zip(tensor.shape, tensors[tensor.name].shape, strict=True):
                    if not isinstance(axis, int):
                        sizes.setdefault(axis.name if isinstance(axis, Dim) else axis.dim, size)
        for tensor in inputs:
            if tensor.name not in tensors:
                value = (self.recipe.absent or {})[tensor.name]
                dtype = getattr(torch, tensor.dtype.name)
                tensors[tensor.name] = torch.full(tensor.sized(sizes), value, dtype=dtype)
            elif tensors[tensor.name].ndim == 0 or tensors[tensor.name].shape == (1,):  # one for the batch
                tensors[tensor.name] = tensors[tensor.name].reshape(()).expand(tensor.sized(sizes))
        ordered = {tensor.name: tensors[tensor.name] for tensor in inputs}
        (result,) = _run(self.session, ordered)
        return self.result(result) if as_class else (result,)


def _tensor(wanted: TensorSpec, value: Any) -> torch.Tensor:
    """A tensor of as many axes as the contract's, or one number for an input of one by batch.

    Timesteps, sizes and masks, which have a range of values, come in whichever dtype hosts have them; here
    they come to the contract's, where that holds them.
    """
    if isinstance(value, (int, float)):
        value = torch.tensor(value)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
        raise ShapeError(wanted.name, None, type(value).__name__, "must be a torch.Tensor with its numbers")
    if value.ndim != len(wanted.shape) and not (value.ndim == 0 and len(wanted.shape) == 1):
        raise ShapeError(wanted.name, None, tuple(value.shape), f"expected {wanted}")
    dtype = getattr(torch, wanted.dtype.name)
    both_float = value.is_floating_point() and dtype.is_floating_point
    if wanted.values is None or value.is_complex() or both_float:
        return value  # what it is not, the session says
    converted = value.to(dtype)
    if (converted.double() != value.double()).any():
        raise ShapeError(wanted.name, None, f"{value.dtype}", f"the dtype must be {wanted.dtype}")
    return converted


def _tensors(session: Session, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """What is given, in the order of the contract. Raises `ShapeError` for what is no tensor, or nothing."""
    names = [t.name for t in session.spec.inputs]
    for name, tensor in given.items():
        if not isinstance(tensor, torch.Tensor):
            raise ShapeError(name, None, type(tensor).__name__, "must be a torch.Tensor")
    if not given:
        raise ShapeError(names[0], None, "nothing", "this input is required")
    return {name: given[name] for name in (*names, *given) if name in given}


class _NoGradient(torch.autograd.Function):
    """A result that depends on its inputs by a way that only the engine knows."""

    @staticmethod
    def forward(ctx: Any, result: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return result.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> NoReturn:
        raise OptionError("an engine ran this model; no gradient goes back through it")


#: PyTorch declares no types for it
_without_gradient: Callable[..., torch.Tensor] = _NoGradient.apply


def _run(session: Session, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    proxies = sys.modules.get("torch.fx.experimental.proxy_tensor")
    if torch._C._get_tracing_state() is not None or (proxies and proxies.get_proxy_mode() is not None):
        raise OptionError("a session cannot be traced: its result would be a constant")
    outputs = session.run({name: _to_numpy(tensor) for name, tensor in tensors.items()})
    like = next((t for t in tensors.values() if t.is_floating_point()), next(iter(tensors.values())))
    results = tuple(_like(torch.from_numpy(outputs[t.name]), like) for t in session.spec.outputs)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values()):
        return tuple(_without_gradient(result, *tensors.values()) for result in results)
    return results


def _to_numpy(tensor: torch.Tensor) -> Any:
    try:
        tensor = tensor.detach().cpu().resolve_neg().resolve_conj()
        return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    except (RuntimeError, TypeError, NotImplementedError) as error:  # sparse, quantised, without numbers
        raise ShapeError(
            "input", None, f"{tensor.layout} {tensor.dtype}", f"must be dense ({error})"
        ) from error


def _like(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    floating = result.is_floating_point() and like.is_floating_point()
    return result.to(device=like.device, dtype=like.dtype if floating else None)


def _dtype(like: torch.nn.Module) -> torch.dtype:
    return next((p.dtype for p in like.parameters()), torch.float32)


def _placeholder(dtype: torch.dtype) -> torch.nn.Parameter:
    """Hosts read a module's dtype and device off its parameters."""
    return torch.nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)


def _check(session: Session, recipe: Recipe, like: Any, name: str) -> None:
    """Raise `OptionError` unless the session takes and gives what this part of the model does."""
    found, wanted = session.spec.inputs, recipe.inputs(like.config)
    same = [t.name for t in found] == [t.name for t in wanted] and all(
        len(f.shape) == len(w.shape)
        and all(not isinstance(b, int) or a == b for a, b in zip(f.shape, w.shape, strict=True))
        for f, w in zip(found, wanted, strict=True)
    )
    channels, factor = recipe.gives(like.config)
    sizes = {n: clip(dim, _LARGE) for n, dim in session.spec.dims.items()}
    before = session.spec.input_shapes(sizes)[found[0].name]
    after = next(iter(session.spec.output_shapes(sizes).values()))
    given = (channels, *(int(side * factor) for side in before[2:]))
    if not same or len(session.spec.outputs) > 1 or after[1:] != given:
        taken, named = ("; ".join(map(str, tensors)) for tensors in (found, wanted))
        gives = session.spec.output_rule
        raise OptionError(
            f"the session is not of {type(like).__name__}'s {name}: it takes {taken} and gives {gives}, not "
            f"{named} and {channels} channels of {factor} times the size"
        )
