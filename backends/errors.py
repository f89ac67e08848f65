"""Every error this library raises on purpose.

```text
AnysizeError
├── OptionError (ValueError)                an argument or setting that cannot be meant
├── ImageError (ValueError)                 a picture that cannot be read, held or written
├── BackendNotFoundError                    no engine of that name is known
├── BackendUnavailableError (ImportError)   known, but not installed or broken; says what to install
├── ModelLoadError                          not a model, or not one this engine can take
├── NotStreamable                           a model that cannot run in bands of rows
├── ExportError                             a module whose contract or graph could not be established
├── ShapeError (ValueError)                 an input the model's contract excludes; the engine never saw it
├── MemoryBudgetError                       the work does not fit the memory allowed
├── ExecutionError                          the engine failed
├── IntegrityError                          the engine returned something that cannot be right
├── TimedOut                                the time limit ended
└── Cancelled
```
"""

from __future__ import annotations


class AnysizeError(Exception):
    """Root of all errors raised on purpose by anysize."""


class OptionError(AnysizeError, ValueError):
    """An argument or setting is out of range, contradictory, or unknown."""


class ImageError(AnysizeError, ValueError):
    """A picture cannot be read, represented or written."""


class BackendNotFoundError(AnysizeError):
    """No backend of this name is registered."""


class BackendUnavailableError(AnysizeError, ImportError):
    """The backend is known but its engine cannot be imported; the message names the install line."""


class ModelLoadError(AnysizeError):
    """The source is not a model we know, or not one the chosen engine can take."""


class NotStreamable(AnysizeError):
    """The model cannot be run in bands of rows; the message names the operator and why."""


class ExportError(AnysizeError):
    """A module's contract could not be probed, its graph not exported, or the export is not equal to it."""


class ShapeError(AnysizeError, ValueError):
    """A feed violates the model's contract. Raised before the engine is called.

    Attributes: `input` (tensor name), `axis` (int, or None when it is not about one axis), `got`
    (size, rank or shape), `rule` (what must hold, as text), `nearest` (valid sizes next to `got`).
    """

    def __init__(
        self, input: str, axis: int | None, got: object, rule: str, nearest: tuple[int, ...] = ()
    ) -> None:
        self.input, self.axis, self.got, self.rule, self.nearest = input, axis, got, rule, nearest
        where = f"input '{input}'" + ("" if axis is None else f", axis {axis}")
        hint = f"; nearest valid: {' or '.join(map(str, nearest))}" if nearest else ""
        super().__init__(f"{where}: got {got}, but {rule}{hint}")


class MemoryBudgetError(AnysizeError):
    """The work does not fit the memory allowed; raised before it starts."""


class _RunError(AnysizeError):
    """Common part of the errors that happen while a model runs: where it happened."""

    def __init__(
        self,
        message: str,
        *,
        backend: str,
        shape: object = None,
        tile: tuple[int, int] | None = None,
    ) -> None:
        self.message, self.backend, self.shape, self.tile = message, backend, shape, tile
        super().__init__(message)

    def __str__(self) -> str:
        if not self.backend:
            return self.message
        where = f"{self.backend}, input {self.shape}"
        if self.tile is not None:
            where += f", tile (row {self.tile[0]}, column {self.tile[1]})"
        return f"{self.message} [{where}]"


class ExecutionError(_RunError):
    """The engine raised. `backend`, `shape` (of the feeds), `tile` (row, column); the cause is chained."""


class IntegrityError(_RunError):
    """An output has the wrong shape, name or dtype, is not finite, or not new. `got` and `want` say which."""

    def __init__(
        self,
        message: str,
        *,
        backend: str,
        shape: object = None,
        tile: tuple[int, int] | None = None,
        got: object = None,
        want: object = None,
    ) -> None:
        super().__init__(message, backend=backend, shape=shape, tile=tile)
        self.got, self.want = got, want


class TimedOut(_RunError):
    """The work did not finish in the time allowed. Where in it, as of the other two, if it had begun."""


class Cancelled(AnysizeError):
    """The caller asked to stop; nothing was written."""
