"""Memory: what the machine has left, what this process holds, and what a model takes, measured.

A model is measured in processes of its own, one for each of two sizes: memory that an engine has once taken
it seldom gives back, so that in one process the second would hide in what is left of the first.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from anysize.backends import get_backend
from anysize.backends.errors import BackendNotFoundError
from anysize.exporters.exporting import random_feeds, sizes_near
from anysize.guard import ShapeGuard, log

if TYPE_CHECKING:
    from anysize.session import Session

#: bytes of tensors alive at once, beyond those of the smallest size, that the two measured sizes have
_POINTS = (2**27, 2**29)
#: less keeps the sizes of light models so near each other that how an engine's blocks fit tells the slope
_LARGEST_SIDE = 8192
_TIMEOUT = 120.0
#: the third runs of larger sizes were seen to take 0.94 to 1.20 times what two small ones foretell
_MARGIN = 1.25
#: times a child runs its size: memory falls to pieces, and the third run was seen to take 10 % more
_RUNS = 3
#: limit, usage, counts, and which of them are of files that the system lets go when it needs the memory
_CGROUPS = (
    ("memory.max", "memory.current", "memory.stat", ("inactive_file", "active_file")),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        ("total_inactive_file", "total_active_file"),
    ),
)


@dataclass(frozen=True)
class Held:
    """What a program was seen to take: `factor` times the tensors alive at once, and `fixed` bytes."""

    factor: float
    fixed: int

    def bytes(self, alive: int) -> int:
        """For so many bytes of tensors alive at once (`Session.working_bytes`), on the safe side."""
        return int(_MARGIN * (self.factor * alive + self.fixed))


def resident() -> int:
    """Bytes of memory this process holds now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak() -> int:
    """The most bytes this process has held at a time."""
    with suppress(OSError):
        # not ru_maxrss, which a child takes over from its parent
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return int(info.peak_wset)
    import resource

    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def available(root: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that can be taken before the machine, or the container this runs in, has none left."""
    import psutil

    free = int(psutil.virtual_memory().available)
    for limit, usage, stat, reclaimable in _CGROUPS:
        with suppress(OSError, ValueError, KeyError):  # not this kind of container, or "max"
            counts = dict(line.split() for line in (root / stat).read_text().splitlines())
            used = int((root / usage).read_text()) - sum(int(counts[name]) for name in reclaimable)
            free = min(free, int((root / limit).read_text()) - used)
    return max(free, 0)


def measure(session: Session) -> Held | None:
    """What the session's first engine takes for its model; None where that cannot be measured, and logged.

    Takes a few seconds, in two processes beside this one.
    """
    guard = session._guards[0]
    points = []
    try:
        if get_backend(guard.backend.name) is not guard.backend:
            return None
        for sizes, alive in _sizes(session):
            job = pickle.dumps(
                (guard.model, guard.backend.name, replace(guard.options, cache=None), guard.strategy, sizes)
            )
            command = [sys.executable, "-P", "-m", "anysize.memory"]
            done = subprocess.run(command, input=job, capture_output=True, timeout=_TIMEOUT, check=False)
            if done.returncode:
                last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
                log.warning("the memory that the model takes was not measured: %s", last)
                return None
            points.append((alive, int(done.stdout.split()[-1])))
    except BackendNotFoundError:
        return None
    except (pickle.PicklingError, AttributeError, TypeError, OSError, subprocess.TimeoutExpired) as error:
        log.warning("the memory that the model takes was not measured: %s", error)
        return None
    if len(points) < 2:
        log.warning("the memory that the model takes was not measured: its graph does not tell enough")
        return None
    (alive, taken), (more, took) = points
    factor = max(0.0, (took - taken) / (more - alive))
    return Held(factor, max(0, round(taken - factor * alive)))


def _sizes(session: Session) -> list[tuple[dict[str, int], int]]:
    """Two sizes that differ enough, each with the bytes alive at once; fewer where they cannot be told."""
    found: list[tuple[dict[str, int], int]] = []
    side, least = 32, None
    while len(found) < len(_POINTS) and side <= _LARGEST_SIDE:
        sizes = sizes_near(session.spec, side)
        alive = session.working_bytes(sizes)
        if alive is None:
            break
        least = alive if least is None else least
        side = side * 5 // 4
        enough = alive - least >= _POINTS[len(found)] or (found and side > _LARGEST_SIDE)
        if enough and (not found or alive > 1.5 * found[-1][1]):
            found.append((sizes, alive))
    return found


def main() -> None:
    """The child: a job on stdin, bytes on stdout."""
    model, name, options, strategy, sizes = pickle.load(sys.stdin.buffer)
    backend = get_backend(name)
    feeds = random_feeds(model.spec, sizes)
    before = resident()
    guard = ShapeGuard(backend, model, options, strategy, 1)
    for _ in range(_RUNS):
        guard.run(feeds, finite=False)
    print(peak() - before)  # noqa: T201


if __name__ == "__main__":
    main()
