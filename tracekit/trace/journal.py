"""The journal: a file beside a trace being recorded, to which what came in is appended as it is.

Writing an entry costs next to nothing, a commit of DuckDB's some 15 ms however few its rows. So a recorder appends to
the journal every second and folds it into the trace now and then (:mod:`tracekit.trace.fold`). What a killed process
has appended stays in the journal, and is folded when the trace is next opened.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from tracekit.errors import TracekitError
from tracekit.trace.rows import STOPS, GpuReading, Moments, RequestEnd, RequestRow, Verification


class Entry(NamedTuple):
    """What came in during one interval. From ``steps`` on packed columns: the fields of :class:`Moments` and those of
    :class:`Verification` from ``request`` to ``n_decodes`` as rows of int64; an index into :data:`STOPS` as uint8; the
    lengths of a verification's three lists as rows of int32; those lists, of all verifications one after another, as
    int32, float32 and int32.
    """

    run: int
    epoch_ns: int  # when the run's first step began
    record_us: int  # spent recording in all entries before
    requests: list[RequestRow]
    request_ends: list[RequestEnd]
    gpu_readings: list[GpuReading]
    steps: bytes
    verifications: bytes
    stops: bytes
    lengths: bytes
    draft_ids: bytes
    draft_probs: bytes
    tokens: bytes

    @property
    def n_verifications(self) -> int:
        """Verifications in it."""
        return len(self.stops)

    @property
    def n_rows(self) -> int:
        """Rows of a trace's tables that the entry makes."""
        rows = self.requests, self.request_ends, self.gpu_readings
        n_steps = len(self.steps) // (8 * len(Moments._fields))
        return sum(map(len, rows)) + n_steps + self.n_verifications


_PARTS = Entry, RequestRow, RequestEnd, GpuReading, Moments, Verification
_FIELDS = [part._fields for part in _PARTS], STOPS
MARK = b"TKJ2" + zlib.crc32(repr(_FIELDS).encode()).to_bytes(
    4, "little"
)  # of every entry; a journal of another is refused
_HEAD = struct.Struct("<8sIQ")  # the mark, the checksum of what follows, and its bytes
_N_PLAIN = Entry._fields.index("steps")


def journal_of(trace: Path) -> Path:
    """Where the journal of ``trace`` is. It exists while the trace is recorded, and after a recording was cut off."""
    return trace.with_name(trace.name + ".journal")


def files_of(trace: Path) -> list[Path]:
    """Where a trace may be on disk: the file, DuckDB's own log of it, and the journal. Raises :class:`TracekitError`
    for a folder that nothing lies beside: the current one, which an empty name is, too, or the root.
    """
    if not trace.name:
        raise TracekitError(f"{trace}: a folder; choose another name")
    return [trace, trace.with_name(trace.name + ".wal"), journal_of(trace)]


class Foreign(ValueError):
    """A journal that another version of tracekit wrote, or no journal."""


class Journal:
    """The journal of ``trace``, empty, for appending what comes in during the recording ``trace_id``. Every method
    raises ``OSError`` where the disk is full.
    """

    def __init__(self, trace: Path, trace_id: str = ""):
        self.path = journal_of(trace)
        self._file = self.path.open("wb", buffering=0)
        self._seed, self._n_rows = zlib.crc32(trace_id.encode()), 0

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return self._file.tell()

    def append(self, entry: Entry) -> None:
        """Append ``entry``: a line of JSON, which says its place in the run and the lengths of the packed parts, then
        these.
        """
        packed = entry[_N_PLAIN:]
        line = json.dumps([self._n_rows, [len(part) for part in packed], *entry[:_N_PLAIN]])
        body = b"".join((line.encode(), b"\n", *packed))
        left = memoryview(_HEAD.pack(MARK, zlib.crc32(body, self._seed), len(body)) + body)
        while left:
            left = left[self._file.write(left) :]
        self._n_rows += entry.n_rows

    def clear(self) -> None:
        """Forget all entries, which are in the trace now."""
        self._file.seek(0)
        self._file.truncate()

    def close(self) -> None:
        """Let go of the file, and keep it: it is folded when the trace is opened."""
        self._file.close()

    def remove(self) -> None:
        """Delete the file."""
        self.close()
        self.path.unlink(missing_ok=True)


def entries(path: Path, n_known: int, trace_id: str = "") -> tuple[list[Entry], int]:
    """The entries in the journal at ``path`` that come after the first ``n_known`` rows of the recording ``trace_id``;
    and how many bytes from the first that is damaged, or of another recording, on. One that was cut off in the middle,
    at the end, is left out. Raises :class:`Foreign`.
    """
    found, seed = [], zlib.crc32(trace_id.encode())
    with path.open("rb") as file:
        n_left = os.fstat(file.fileno()).st_size
        whole = n_left
        while head := file.read(_HEAD.size):
            mark, checksum, size = _HEAD.unpack(head.ljust(_HEAD.size))
            if mark[: len(head)] != MARK[: len(head)]:
                if n_left == whole:
                    raise Foreign("it is of another version of tracekit, or no journal")
                return found, n_left
            body = file.read(min(size, n_left))
            if len(body) < size:  # cut off, unless another entry comes after it
                return found, n_left if MARK in body else 0
            if zlib.crc32(body, seed) != checksum:
                return found, n_left
            n_left -= len(head) + size
            line, _, rest = body.partition(b"\n")
            n_before, lengths, *plain = json.loads(line)
            ends = list(accumulate(lengths))
            packed = (rest[end - n : end] for n, end in zip(lengths, ends, strict=True))
            if n_before >= n_known:
                found.append(Entry(*plain, *packed))
    return found, 0
