"""The journal: a file beside a trace being recorded, to which what came in is appended as it is.

Writing an entry costs next to nothing, a commit of DuckDB's some 15 ms however few its rows. So a recorder appends to
the journal every second and folds it into the trace now and then (:mod:`tracekit.trace.fold`). What a killed process
has appended stays in the journal, and is folded when the trace is next opened.
"""

from __future__ import annotations

import json
import zlib
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
LAYOUT = zlib.crc32(repr(_FIELDS).encode())  # a journal of another is refused
_BEGIN = b"[%d, " % LAYOUT  # of every entry
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


class Journal:
    """The journal of ``trace``, empty, for appending what comes after ``n_rows`` rows of the run. Every method raises
    ``OSError`` where the disk is full.
    """

    def __init__(self, trace: Path, n_rows: int = 0):
        self.path = journal_of(trace)
        self._file = self.path.open("wb", buffering=0)
        self._n_rows = n_rows

    @property
    def n_bytes(self) -> int:
        """Its size."""
        return self._file.tell()

    def append(self, entry: Entry) -> None:
        """Append ``entry``: a line of JSON, then the packed parts, whose lengths and place in the run it says."""
        packed = entry[_N_PLAIN:]
        head = json.dumps([LAYOUT, self._n_rows, [len(part) for part in packed], *entry[:_N_PLAIN]])
        left = memoryview(b"".join((head.encode(), b"\n", *packed)))
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


def entries(path: Path, n_known: int) -> list[Entry]:
    """The entries in the journal at ``path`` that come after the first ``n_known`` rows of the run. One that was cut
    off in the middle, at the end, is left out. Raises ``ValueError`` for whatever else cannot be read, and for a
    journal of another layout.
    """
    found = []
    damaged = ValueError("it is damaged, or no journal")
    with path.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n") and line[: len(_BEGIN)] == _BEGIN[: len(line)]:
                break
            try:
                layout, n_before, lengths, *plain = json.loads(line)
                if known := layout == LAYOUT:
                    packed = [file.read(n) if n >= 0 else b"" for n in lengths]
                    entry = Entry(*plain, *packed)
            except (ValueError, TypeError):
                raise damaged from None
            if not known:
                raise ValueError("it is of another version of tracekit")
            if [len(part) for part in packed] != lengths:
                if min(lengths) < 0 or _BEGIN in b"".join(packed):  # not its end: another entry comes after it
                    raise damaged
                break
            if n_before >= n_known:
                found.append(entry)
    return found
