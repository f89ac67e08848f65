"""Spans of what takes time, for a program that traces itself with OpenTelemetry."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from anysize.sources import version_of


@contextmanager
def span(name: str, **known: object) -> Iterator[Callable[..., None]]:
    """A span `anysize.{name}` around this `with`; yields a function that adds attributes (None: left out).

    Nothing where the program has not imported OpenTelemetry, which is not imported for it. An error ends the
    span with status ERROR and the exception as its event, as OpenTelemetry does.
    """
    # of a module that another thread is importing, the function may still be missing
    get_tracer = getattr(sys.modules.get("opentelemetry.trace"), "get_tracer", None)
    if get_tracer is None:
        yield lambda **_: None
        return
    tracer = get_tracer("anysize", version_of("anysize"))
    with tracer.start_as_current_span(f"anysize.{name}") as current:

        def note(**attributes: object) -> None:
            for key, value in attributes.items():
                if value is not None:
                    plain = value if isinstance(value, (bool, int, float, str)) else str(value)
                    current.set_attribute(f"anysize.{key}", plain)

        note(**known)
        yield note
