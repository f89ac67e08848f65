"""Whether what an engine returned is new: not an earlier result again, nor in memory that still holds one.

Both have a right result's shape, dtype and finite values. Engines were seen to return the last result again
after a size they could not take (one-threaded OpenVINO), and to write results over those they gave before
(openvino#70).
"""

from __future__ import annotations

import threading
import weakref
import zlib
from collections import OrderedDict, deque
from collections.abc import Iterable

import numpy as np
from anysize.backends.base import Array, Feeds
from anysize.backends.errors import IntegrityError

#: results that are remembered by their digests, and whose memory is, while somebody holds it
_LATELY, _HELD = 1024, 64


class RepeatedError(IntegrityError):
    """A band's result is an earlier one's. In tiles, a run can be made again to see which is right."""


class Results:
    """What a model returned lately, and for what. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: by digest of a result, that of what it was for
        self._for: OrderedDict[int, int] = OrderedDict()
        #: those that are right for several
        self._several: OrderedDict[int, None] = OrderedDict()
        self._held: deque[weakref.ref[Array]] = deque(maxlen=_HELD)

    def earlier(self, given: int, result: int) -> bool:
        """Whether the same was returned for something else; notes it if not. Of both their digests."""
        with self._lock:
            known = self._for.setdefault(result, given)
            self._for.move_to_end(result)
            while len(self._for) > _LATELY:
                self._for.popitem(last=False)
            return known != given

    def is_usual(self, result: int) -> bool:
        """Whether it was found to be right for several."""
        with self._lock:
            return result in self._several

    def confirm(self, result: int) -> None:
        """It is right for several."""
        with self._lock:
            self._several[result] = None
            while len(self._several) > _LATELY:
                self._several.popitem(last=False)

    def shares_memory(self, outputs: Feeds, feeds: Feeds) -> str | None:
        """The name of an output in memory of a feed, or of an earlier output that somebody still holds."""
        owners = {name: _owner(array) for name, array in outputs.items() if array.size}
        with self._lock:
            held = [array for ref in self._held if (array := ref()) is not None]
            for name, owner in owners.items():
                if any(np.may_share_memory(owner, array) for array in (*held, *feeds.values())):
                    return name
            self._held.extend(map(weakref.ref, owners.values()))
        return None


def digest_of_feeds(feeds: Feeds) -> int:
    """Of names, shapes and values."""
    return hash(tuple((name, feeds[name].shape, digest(feeds[name])) for name in sorted(feeds)))


def digest(array: Array) -> int:
    """Of the bytes in their order."""
    return zlib.crc32(np.ascontiguousarray(array).data)


def digest_of_results(outputs: Iterable[Array]) -> int:
    """Of shapes and sums, as quick as memory is; two results may share it, though hardly by chance."""
    return hash(tuple((array.shape, _sum(array)) for array in outputs))


def _sum(array: Array) -> int:
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    whole = len(data) // 8 * 8
    return hash((int(data[:whole].view(np.uint64).sum()), data[whole:].tobytes()))


def _owner(array: Array) -> Array:
    """The array that its views, and theirs, hold on to."""
    return array.base if isinstance(array.base, np.ndarray) else array
