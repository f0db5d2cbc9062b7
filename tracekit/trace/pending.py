"""Rows that wait to be written: what the generating thread leaves, in the form that costs it least.

Between two steps a model has been through the processor's cache, so that whatever code or data recording touches comes
from memory: packing a row at once takes several times as long as appending a tuple, which packs quickly with all others
later. Tuples of numbers, unlike row objects and lists, do not keep Python's garbage collector busy.
"""

from __future__ import annotations

import struct
import threading
from array import array
from itertools import starmap

from tracekit.trace.journal import Entry
from tracekit.trace.rows import STOPS, Moments, RequestEnd, RequestRow, Verification

N_MOMENTS = len(Moments._fields)
N_WHOLE = Verification._fields.index("stop") - 1  # whole numbers of a verification, without the run
_pack_step = struct.Struct(f"{N_MOMENTS}q").pack
_pack_verification = struct.Struct(f"{N_WHOLE}q").pack
_STOP = {name: i for i, name in enumerate(STOPS)}


class Pending:
    """Rows of one run, appended to by one thread and taken by another.

    Nothing is locked where rows come in: every ``+=`` and ``append`` adds all of a row or nothing. What a row refers to
    is added before it and taken after it.
    """

    def __init__(self, run: int):
        self.run = run
        self.wall_us = self.record_us = 0  # of the steps taken: end of the newest, time spent recording
        self._epoch_ns = 0
        self._requests: list[RequestRow] = []
        self._request_ends: list[RequestEnd] = []
        self._steps: list[tuple[int, ...]] = []
        self._verifications: list[tuple[int, ...]] = []
        self._stops: list[str] = []
        self._lengths: list[int] = []  # of each verification's three lists
        self._draft_ids: list[int] = []  # of all verifications, one after another
        self._draft_probs: list[float] = []
        self._tokens: list[int] = []
        self._taking = threading.Lock()
        self.began, self.ended = self._requests.append, self._request_ends.append
        self.stepped = self._steps.append

    def __bool__(self) -> bool:
        """Whether any row waits."""
        return bool(self._requests or self._steps or self._verifications or self._request_ends)

    def verified(
        self, numbers: tuple[int, ...], stop: str, draft_ids: list[int], draft_probs: list[float], tokens: list[int]
    ) -> None:
        """Append a verification; ``numbers``: the fields of :class:`Verification` from ``request`` to ``n_decodes``."""
        self._draft_ids += draft_ids
        self._draft_probs += draft_probs
        self._tokens += tokens
        self._lengths += (len(draft_ids), len(draft_probs), len(tokens))
        self._stops.append(stop)
        self._verifications.append(numbers)

    def aborted(self) -> None:
        """An exception may have come between the lists of a verification and the verification itself: forget them, or
        they would be the next one's.
        """
        with self._taking:
            n = len(self._verifications)
            del self._stops[n:], self._lengths[3 * n :]
            for i, values in enumerate((self._draft_ids, self._draft_probs, self._tokens)):
                del values[sum(self._lengths[i::3]) :]

    def take(self) -> Entry:
        """What has come in since the last call. Raises ``OverflowError`` for a token too large for 32 bits."""
        with self._taking:
            return self._take()

    def _take(self) -> Entry:
        ends = _taken(self._request_ends, len(self._request_ends))
        verifications = _taken(self._verifications, len(self._verifications))
        steps = _taken(self._steps, len(self._steps))
        requests = _taken(self._requests, len(self._requests))
        lengths = _taken(self._lengths, 3 * len(verifications))
        record_us = self.record_us
        if steps:
            newest = Moments(*steps[-1])
            self._epoch_ns = self._epoch_ns or Moments(*steps[0]).began_ns
            self.record_us = newest.record_ns // 1000
            self.wall_us = (newest.began_ns - self._epoch_ns) // 1000 + (newest.learned_ns - newest.began_ns) // 1000
        return Entry(
            run=self.run,
            epoch_ns=self._epoch_ns,
            record_us=record_us,
            requests=requests,
            request_ends=ends,
            gpu_readings=[],
            steps=b"".join(starmap(_pack_step, steps)),
            verifications=b"".join(starmap(_pack_verification, verifications)),
            stops=bytes(map(_STOP.__getitem__, _taken(self._stops, len(verifications)))),
            lengths=array("i", lengths).tobytes(),
            draft_ids=array("i", _taken(self._draft_ids, sum(lengths[::3]))).tobytes(),
            draft_probs=array("f", _taken(self._draft_probs, sum(lengths[1::3]))).tobytes(),
            tokens=array("i", _taken(self._tokens, sum(lengths[2::3]))).tobytes(),
        )


def _taken(values: list, n: int) -> list:
    """The first ``n`` of ``values``, taken out of it."""
    first = values[:n]
    del values[:n]
    return first
