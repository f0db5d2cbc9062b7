"""Rows that wait to be written, in flat buffers: cheap to append to in the middle of generation, and whole columns when
they are written.

A queue of tuples would keep Python's garbage collector busy, and every field would be looked at again for its column.
"""

from __future__ import annotations

import struct

import numpy as np
import pyarrow as pa

from tracekit.trace.rows import GpuReading, RequestEnd, RequestRow, Step, Verification
from tracekit.trace.writer import Rows, columns

_N_WHOLE = Verification._fields.index("stop")  # whole numbers come first, then the reason, then three lists
_STEP = struct.Struct(f"{len(Step._fields)}q").pack
_VERIFICATION = struct.Struct(f"{_N_WHOLE + 3}q").pack  # with the lengths of the lists


class Pending:
    """Rows of a trace's tables, by the moment at which they are known."""

    def __init__(self):
        self.requests: list[RequestRow] = []
        self.request_ends: list[RequestEnd] = []
        self.gpu_readings: list[GpuReading] = []
        self._steps = bytearray()
        self._verifications = bytearray()
        self._stops: list[str] = []
        self._draft_ids: list[int] = []
        self._draft_probs: list[float] = []
        self._tokens: list[int] = []

    def __bool__(self) -> bool:
        return bool(self._steps or self.requests or self.request_ends)

    def add(self, step: Step, verifications: list[Verification]) -> None:
        """Append a step and what it settled."""
        self._steps += _STEP(*step)
        for row in verifications:
            ids, probs, tokens = row[-3:]
            self._verifications += _VERIFICATION(*row[:_N_WHOLE], len(ids), len(probs), len(tokens))
            self._stops.append(row.stop)
            self._draft_ids += ids
            self._draft_probs += probs
            self._tokens += tokens

    def batches(self) -> dict[str, Rows]:
        """What :meth:`~tracekit.trace.writer.TraceWriter.append` takes; a request comes before what refers to it."""
        kinds = list(columns("verifications").values())
        whole = _numbers(self._verifications, [*kinds[:_N_WHOLE], *3 * [pa.int32()]])
        lists = (self._draft_ids, self._draft_probs, self._tokens)
        arrays = [*whole[:_N_WHOLE], pa.array(self._stops, pa.string()), *map(_lists, lists, whole[-3:], kinds[-3:])]
        return {
            "requests": self.requests,
            "steps": _table("steps", _numbers(self._steps, list(columns("steps").values()))),
            "verifications": _table("verifications", arrays),
            "request_ends": self.request_ends,
            "gpu_readings": self.gpu_readings,
        }


def _numbers(packed: bytearray, kinds: list[pa.DataType]) -> list[pa.Array]:
    """The columns of rows packed one after another. Raises ``pa.ArrowInvalid`` for a number too large for its kind."""
    fields = np.frombuffer(packed, np.int64).reshape(-1, len(kinds)).T
    return [pa.array(values).cast(kind) for values, kind in zip(fields, kinds, strict=True)]


def _lists(values: list, lengths: pa.Array, kind: pa.DataType) -> pa.Array:
    """A list column of ``values``, one list after another."""
    ends = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(lengths.to_numpy(), out=ends[1:])
    return pa.ListArray.from_arrays(ends, pa.array(values, kind.value_type), type=kind)


def _table(name: str, arrays: list[pa.Array]) -> pa.Table:
    return pa.Table.from_arrays(arrays, list(columns(name)))
