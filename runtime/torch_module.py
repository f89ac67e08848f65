"""Sessions as `torch.nn.Module`s, for hosts whose own code calls the model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch
from anysize.backends.errors import OptionError, ShapeError
from anysize.backends.spec import Dim, TensorSpec
from anysize.models.diffusion import Recipe, recipes_of
from anysize.session import Session


class SessionModule(torch.nn.Module):
    """Stands in for the module a session was made from: same call signature, tensors in and out.

    Positional arguments follow the contract's inputs, keywords their names. Results have the dtype
    (where it is floating) and device of the first argument; several come as a tuple. Gradients do not flow.
    Thread-safe, like the session.
    """

    def __init__(self, session: Session, dtype: torch.dtype = torch.float32) -> None:
        """`dtype`: what hosts that ask for the module's are told."""
        super().__init__()
        self.session = session
        self.placeholder = _placeholder(dtype)

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        names = [t.name for t in self.session.spec.inputs]
        if len(args) > len(names):
            raise TypeError(f"the model takes {len(names)} tensors ({', '.join(names)}), got {len(args)}")
        tensors = dict(zip(names, args, strict=False))
        if twice := set(tensors) & set(kwargs):
            raise TypeError(f"got several values for {', '.join(sorted(twice))}")
        tensors |= kwargs
        for name, tensor in tensors.items():
            if not isinstance(tensor, torch.Tensor):
                raise ShapeError(name, None, type(tensor).__name__, "must be a torch.Tensor")
        if not tensors:
            raise ShapeError(names[0], None, "nothing", "this input is required")
        results = _run(self.session, tensors)
        return results[0] if len(results) == 1 else results


def module(session: Session | Mapping[str, Session], like: torch.nn.Module | None) -> torch.nn.Module:
    """See `anysize.as_module`."""
    if like is not None:
        return _stand_in(session, like)
    if not isinstance(session, Session):
        raise OptionError("sessions by name need the model whose parts they are: like=...")
    return SessionModule(session)


def _stand_in(sessions: Session | Mapping[str, Session], like: torch.nn.Module) -> torch.nn.Module:
    """A twin of `like`, a model of diffusers, whose parts run in sessions."""
    recipes = recipes_of(like)
    if recipes is None:
        raise OptionError(f"like: {type(like).__name__} is no model whose parts are known; leave it out")
    if isinstance(sessions, Session):
        if len(recipes) > 1:
            raise OptionError(f"{type(like).__name__} has several parts; give a session by name: {{...}}")
        sessions = dict.fromkeys(recipes, sessions)
    if not sessions or sessions.keys() - recipes:
        raise OptionError(f"{type(like).__name__} has the parts {', '.join(recipes)}, not {list(sessions)}")
    twin = like
    for name, session in sessions.items():
        recipe = recipes[name]
        _check(session, recipe.inputs(like.config), f"{type(like).__name__}'s {name}")
        dtype = next((p.dtype for p in like.parameters()), torch.float32)
        if not recipe.chain:
            twin = _without_weights(like)
            twin.placeholder = _placeholder(dtype)
            twin.forward = _Call(session, recipe, inspect.signature(like.forward))
            continue
        if twin is like:
            twin = copy.copy(like)
            twin._modules = dict(like._modules)
        first, *others = (step for step in recipe.chain if getattr(like, step) is not None)
        twin._modules[first] = SessionModule(session, dtype)
        for step in others:
            twin._modules[step] = torch.nn.Identity()
    return twin


class _Call:
    """The `forward` of a whole model: arguments as its class takes them, results as it gives them."""

    def __init__(self, session: Session, recipe: Recipe, signature: inspect.Signature) -> None:
        self.session, self.recipe, self.signature = session, recipe, signature
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
        sizes: dict[str, int] = {}
        for tensor in inputs:
            value = tensors.get(tensor.name)
            if isinstance(value, torch.Tensor) and value.ndim == len(tensor.shape):
                for axis, size in zip(tensor.shape, value.shape, strict=True):
                    if not isinstance(axis, int):
                        sizes.setdefault(axis.name if isinstance(axis, Dim) else axis.dim, size)
        for tensor in inputs:
            value = tensors.get(tensor.name, (self.recipe.absent or {}).get(tensor.name))
            if value is None:
                raise ShapeError(tensor.name, None, "nothing", "this input is required")
            value = torch.as_tensor(value)
            if value.ndim == 0 or (value.numel() == 1 and len(tensor.shape) == 1):  # one for the whole batch
                value = value.reshape(()).expand(tensor.sized(sizes))
            tensors[tensor.name] = value
        ordered = {tensor.name: tensors[tensor.name] for tensor in inputs}
        (result,) = _run(self.session, ordered)
        return self.result(result) if as_class else (result,)


def _run(session: Session, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    kinds = {t.name: t for t in session.spec.inputs}
    outputs = session.run({name: _to_numpy(tensor, kinds.get(name)) for name, tensor in tensors.items()})
    like = next(iter(tensors.values()))
    return tuple(_like(torch.from_numpy(outputs[t.name]), like) for t in session.spec.outputs)


def _to_numpy(tensor: torch.Tensor, wanted: TensorSpec | None) -> Any:
    """Floats as they are; whole numbers and truth values in the contract's dtype, where that holds them."""
    tensor = tensor.detach().cpu()
    array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    if wanted is None or array.dtype == wanted.dtype or array.dtype.kind == wanted.dtype.kind == "f":
        return array
    converted = array.astype(wanted.dtype)
    if (converted != array).any():
        raise ShapeError(wanted.name, None, f"dtype {array.dtype}", f"the dtype must be {wanted.dtype}")
    return converted


def _like(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    floating = result.is_floating_point() and like.is_floating_point()
    return result.to(device=like.device, dtype=like.dtype if floating else None)


def _placeholder(dtype: torch.dtype) -> torch.nn.Parameter:
    """Hosts read a module's dtype and device off its parameters."""
    return torch.nn.Parameter(torch.zeros((), dtype=dtype), requires_grad=False)


def _without_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy with its class, config and submodules' attributes, as hosts read them, and no parameters."""
    return copy.deepcopy(model, {id(parameter): None for parameter in model.parameters()})


def _check(session: Session, wanted: tuple[TensorSpec, ...], what: str) -> None:
    """Raise `OptionError` unless the session is of such a part."""
    found = session.spec.inputs
    names = [t.name for t in wanted]
    if [t.name for t in found] != names or any(
        len(f.shape) != len(w.shape)
        or any(isinstance(b, int) and a != b for a, b in zip(f.shape, w.shape, strict=True))
        for f, w in zip(found, wanted, strict=True)
    ):
        taken, named = ("; ".join(map(str, tensors)) for tensors in (found, wanted))
        raise OptionError(f"the session is not of {what}: it takes {taken}, not {named}")
