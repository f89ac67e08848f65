"""Broken input by the thousand: how many cases, what is changed in files, and what becomes of them."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

NIGHTLY = bool(os.environ.get("ANYSIZE_NIGHTLY"))
#: seconds that a case may take
LIMIT = 10.0


def cases(few: int, many: int = 20_000) -> Callable[[Any], Any]:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=many if NIGHTLY else few, deadline=None, suppress_health_check=checks)


#: changes to a file's bytes: where, as a part of its length, what kind, and with what
EDITS = st.lists(
    st.tuples(
        st.floats(0, 1, exclude_max=True),
        st.sampled_from(["set", "cut", "insert", "repeat", "number"]),
        st.binary(min_size=1, max_size=8),
    ),
    min_size=1,
    max_size=6,
)


def edited(data: bytes, edits: list[tuple[float, str, bytes]]) -> bytes:
    for where, kind, value in edits:
        at = int(where * len(data))
        match kind:
            case "set":
                data = data[:at] + value + data[at + len(value) :]
            case "cut":
                data = data[:at]
            case "insert":
                data = data[:at] + value + data[at:]
            case "repeat":
                data = data[:at] + data[at : at + 64] * (1 + value[0]) + data[at:]
            case "number":  # sizes and offsets, as large as they get
                data = data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :]
    return data


class Samples(dict[str, bytes]):
    """Whole files by suffix, which no message shows."""

    def __repr__(self) -> str:
        return "Samples"


class Tally:
    """What became of the cases."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self.record, self.outcomes, self.slowest = record, Counter[str](), 0.0

    @contextlib.contextmanager
    def case(self, *typed: type[BaseException]) -> Iterator[None]:
        started, outcome = time.monotonic(), "taken"
        try:
            yield
        except typed as error:
            outcome = f"exit code {error.code}" if isinstance(error, SystemExit) else type(error).__name__
        self.add(outcome, time.monotonic() - started)

    def add(self, outcome: str, seconds: float, limit: float = LIMIT) -> None:
        assert seconds < limit
        self.slowest = max(self.slowest, seconds)
        self.outcomes[outcome] += 1

    def close(self) -> None:
        self.record("cases", sum(self.outcomes.values()))
        self.record("outcomes", json.dumps(self.outcomes))
        self.record("slowest", round(self.slowest, 2))
