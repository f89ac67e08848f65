"""A session as a `torch.nn.Module`, for hosts whose own code calls the model."""

from __future__ import annotations

from typing import Any

import torch
from anysize.backends.errors import ShapeError
from anysize.session import Session


class SessionModule(torch.nn.Module):
    """Stands in for the module a session was made from: same call signature, tensors in and out.

    Positional arguments follow the contract's inputs, keywords their names. Results have the dtype
    (where it is floating) and device of the first argument; several come as a tuple. Gradients do not flow.
    Thread-safe, like the session.
    """

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

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
        feeds = {n: _to_numpy(t) for n, t in tensors.items()}
        outputs = self.session.run(feeds)
        like = next(iter(tensors.values()))
        results = tuple(_like(torch.from_numpy(outputs[t.name]), like) for t in self.session.spec.outputs)
        return results[0] if len(results) == 1 else results


def _to_numpy(tensor: torch.Tensor) -> Any:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _like(result: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    floating = result.is_floating_point() and like.is_floating_point()
    return result.to(device=like.device, dtype=like.dtype if floating else None)
