"""diffusers: a pipeline's models run by sessions, in one call, and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import anysize
from anysize import OptionError, Session


class Swap:
    """The models of a pipeline that were swapped; `undo` puts them back, and so does leaving a `with`.

    It holds the originals; drop it, and every other name of theirs, to free their weights.
    """

    def __init__(self, pipeline: Any, originals: Mapping[str, Any], replacements: Mapping[str, Any]) -> None:
        self._pipeline, self._originals, self._replacements = pipeline, dict(originals), replacements
        _swaps.setdefault(pipeline, WeakSet()).add(self)

    def undo(self) -> None:
        """Put the originals back where the replacements still are; under a later swap, for that to put back.

        A second call puts back what the first could not, or does nothing.
        """
        for name in list(self._originals):
            ours = self._replacements[name]
            if getattr(self._pipeline, name) is ours:
                setattr(self._pipeline, name, self._originals.pop(name))
            elif above := [s for s in _swaps[self._pipeline] if s._originals.get(name) is ours]:
                above[0]._originals[name] = self._originals.pop(name)

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()


#: by pipeline, those of its swaps that somebody still holds
_swaps: WeakKeyDictionary[Any, WeakSet[Swap]] = WeakKeyDictionary()


def swap(pipeline: Any, **sessions: Session | Mapping[str, Session]) -> Swap:
    """Run models of a diffusers pipeline by sessions: `swap(pipe, unet=..., vae={"encoder": ..., ...})`.

    Each keyword is a name that the pipeline gives a model (`unet`, `vae`, `transformer`, ...), and its value
    what `anysize.as_module` takes for it: a session, or sessions by the model's parts (see `anysize.parts`).
    All are swapped or none. The sessions stay the caller's, who closes them.

    Raises `OptionError` for a name that the pipeline has no model for, and what `as_module` raises.
    """
    if not sessions:
        raise OptionError("nothing to swap: name a model, such as unet=session")
    originals = {name: getattr(pipeline, name, None) for name in sessions}
    if missing := [name for name, model in originals.items() if model is None]:
        raise OptionError(f"{type(pipeline).__name__} has no {', '.join(missing)}")
    made = {name: anysize.as_module(given, like=originals[name]) for name, given in sessions.items()}
    for name, module in made.items():
        setattr(pipeline, name, module)
    return Swap(pipeline, originals, made)
