"""Rows that wait to be written, packed into flat buffers: whole columns come out.

A queue of tuples would keep Python's garbage collector busy, and have every field looked at again for its column, when
it has long left the processor's cache.
"""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa

from tracekit.trace.rows import Moments, RequestEnd, RequestRow, Verification
from tracekit.trace.writer import Rows, columns

# of a verification: the run, these whole numbers, the reason, three lists
_N_WHOLE = Verification._fields.index("stop") - 1
_pack_step = struct.Struct(f"{len(Moments._fields)}q").pack
_pack_verification = struct.Struct(f"{_N_WHOLE + 3}q").pack


class Pending:
    """Rows of one run, appended to by one thread and taken by another.

    Nothing is locked: every ``+=`` and ``append`` adds all of a row or nothing. What a row refers to is added before it
    and taken after it.
    """

    def __init__(self, run: int):
        self.run = run
        self.wall_us = self.record_us = 0  # of the steps taken: end of the newest, time spent recording
        self._epoch_ns = 0
        self._requests: list[RequestRow] = []
        self._request_ends: list[RequestEnd] = []
        self._steps = bytearray()
        self._verifications = bytearray()
        self._stops: list[str] = []
        self._draft_ids: list[int] = []  # of all rows, one after another
        self._draft_probs: list[float] = []
        self._tokens: list[int] = []

    def __bool__(self) -> bool:
        """Whether any row waits."""
        return bool(self._requests or self._steps or self._verifications or self._request_ends)

    def began(self, request: RequestRow) -> None:
        """Append a request."""
        self._requests.append(request)

    def stepped(self, *moments: int) -> None:
        """Append a step: the fields of :class:`Moments`."""
        self._steps += _pack_step(*moments)

    def verified(
        self, numbers: tuple[int, ...], stop: str, draft_ids: list[int], draft_probs: list[float], tokens: list[int]
    ) -> None:
        """Append a verification; ``numbers``: the fields of :class:`Verification` from ``request`` to ``n_decodes``."""
        self._draft_ids += draft_ids
        self._draft_probs += draft_probs
        self._tokens += tokens
        self._stops.append(stop)
        self._verifications += _pack_verification(*numbers, len(draft_ids), len(draft_probs), len(tokens))

    def ended(self, request: RequestEnd) -> None:
        """Append the end of a request."""
        self._request_ends.append(request)

    def take(self) -> dict[str, Rows]:
        """What has come in since the last call, for :meth:`~tracekit.trace.writer.TraceWriter.append`.

        Raises ``pa.ArrowInvalid`` for a number too large for its column.
        """
        ends = _taken(self._request_ends, len(self._request_ends))
        verifications = self._take_verifications()
        steps = self._take_steps()
        requests = _taken(self._requests, len(self._requests))
        return {"requests": requests, "steps": steps, "verifications": verifications, "request_ends": ends}

    def _take_verifications(self) -> pa.Table:
        kinds = list(columns("verifications").values())
        whole = _numbers(self._verifications, _N_WHOLE + 3)
        n, lists = whole.shape[1], (self._draft_ids, self._draft_probs, self._tokens)
        numbers = np.full(n, self.run), *whole[:_N_WHOLE]
        arrays = [pa.array(c).cast(kind) for c, kind in zip(numbers, kinds, strict=False)]
        arrays.append(pa.array(_taken(self._stops, n), pa.string()))
        arrays += [_lists(*column) for column in zip(lists, whole[_N_WHOLE:], kinds[-3:], strict=True)]
        return pa.Table.from_arrays(arrays, list(columns("verifications")))

    def _take_steps(self) -> pa.Table:
        m = Moments(*_numbers(self._steps, len(Moments._fields)))
        if len(m.step) and not self._epoch_ns:
            self._epoch_ns = m.began_ns[0]
        spent_us = m.record_ns // 1000
        found = m._asdict() | {
            "run": np.full(len(m.step), self.run),
            "t_us": (m.began_ns - self._epoch_ns) // 1000,
            "catchup_us": m.ahead_us + m.catchup_us,
            "target_us": (m.decoded_ns - m.filled_ns) // 1000,
            "sample_us": (m.sampled_ns - m.decoded_ns) // 1000 - m.ahead_us,
            "policy_us": (m.decided_ns - m.began_ns + m.learned_ns - m.sampled_ns) // 1000,
            "record_us": np.diff(spent_us, prepend=self.record_us),
            "wall_us": (m.learned_ns - m.began_ns) // 1000,
        }
        if len(m.step):
            self.record_us = int(spent_us[-1])
            self.wall_us = int(found["t_us"][-1] + found["wall_us"][-1])
        return pa.table({name: pa.array(found[name]).cast(kind) for name, kind in columns("steps").items()})


def _taken(values: list | bytearray, n: int) -> list | bytearray:
    """The first ``n`` of ``values``, taken out of it."""
    first = values[:n]
    del values[:n]
    return first


def _numbers(packed: bytearray, n_fields: int) -> np.ndarray:
    """``[n_fields, rows]`` int64 of the rows in ``packed``, taken out of it."""
    return np.frombuffer(_taken(packed, len(packed)), np.int64).reshape(-1, n_fields).T


def _lists(values: list, lengths: np.ndarray, kind: pa.DataType) -> pa.Array:
    """A list column of ``values``, one list after another, taken out of it."""
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths, out=ends[1:])
    return pa.ListArray.from_arrays(ends, pa.array(_taken(values, ends[-1]), kind.value_type), type=kind)
