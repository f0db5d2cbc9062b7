"""Rows that wait to be written: what the generating thread leaves, in the form that costs it least.

Between two steps a model has been through the processor's cache, so that whatever code or data recording touches comes
from memory: packing a row at once takes several times as long as appending a tuple, which packs quickly with all others
later.
"""

from __future__ import annotations

import struct
from array import array
from itertools import chain, starmap

from tracekit.trace.journal import Entry
from tracekit.trace.rows import STOPS, Moments, RequestEnd, RequestRow, Verification, plain

N_MOMENTS = len(Moments._fields)
N_WHOLE = Verification._fields.index("stop") - 1  # whole numbers of a verification, without the run
_pack_step = struct.Struct(f"{N_MOMENTS}q").pack
_pack_verification = struct.Struct(f"{N_WHOLE}q").pack
_STOP = {name: i for i, name in enumerate(STOPS)}
_NONE = ((),) * (N_WHOLE + 4)  # columns of no verifications


class Pending:
    """Rows of one run, appended to by one thread and taken by another.

    Nothing is locked where rows come in: ``append`` adds all of a row or nothing. What a row refers to is added before
    it and taken after it. ``stepped`` takes the fields of :class:`Moments`, ``verified`` those of :class:`Verification`
    from ``request`` on, ``plain`` the arguments of :func:`~tracekit.trace.rows.plain` likewise, all as a tuple.
    """

    def __init__(self, run: int):
        self.run = run
        self.wall_us = self.record_us = 0  # of the steps taken: end of the newest, time spent recording
        self._epoch_ns = 0
        self._requests: list[RequestRow] = []
        self._request_ends: list[RequestEnd] = []
        self._steps: list[tuple[int, ...]] = []
        self._verifications: list[tuple] = []
        self._plain: list[tuple[int, int, int, int]] = []
        self.began, self.ended = self._requests.append, self._request_ends.append
        self.stepped, self.verified, self.plain = self._steps.append, self._verifications.append, self._plain.append

    def __bool__(self) -> bool:
        """Whether any row waits."""
        return bool(self._requests or self._steps or self._verifications or self._plain or self._request_ends)

    def take(self) -> Entry:
        """What has come in since the last call. Raises ``OverflowError`` for a token too large for 32 bits."""
        ends = _taken(self._request_ends, len(self._request_ends))
        verifications = _taken(self._verifications, len(self._verifications))
        verifications += [plain(self.run, *row)[1:] for row in _taken(self._plain, len(self._plain))]
        steps = _taken(self._steps, len(self._steps))
        requests = _taken(self._requests, len(self._requests))
        *numbers, stops, draft_ids, draft_probs, tokens = zip(*verifications, strict=True) if verifications else _NONE
        lists = draft_ids, draft_probs, tokens
        lengths = zip(*(map(len, values) for values in lists), strict=True)
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
            verifications=b"".join(starmap(_pack_verification, zip(*numbers, strict=True))),
            stops=bytes(map(_STOP.__getitem__, stops)),
            lengths=array("i", chain.from_iterable(lengths)).tobytes(),
            draft_ids=array("i", chain.from_iterable(draft_ids)).tobytes(),
            draft_probs=array("f", chain.from_iterable(draft_probs)).tobytes(),
            tokens=array("i", chain.from_iterable(tokens)).tobytes(),
        )


def _taken(values: list, n: int) -> list:
    """The first ``n`` of ``values``, taken out of it."""
    first = values[:n]
    del values[:n]
    return first
