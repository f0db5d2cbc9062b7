"""Fold a journal's entries into the trace beside it: while it is recorded, or when it is opened after a recording was
cut off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from tracekit.errors import TracekitError, interrupted
from tracekit.trace.files import first_line, free_path, held_by
from tracekit.trace.journal import Entry, Foreign, entries, journal_of
from tracekit.trace.pending import N_MOMENTS, N_WHOLE
from tracekit.trace.rows import STOPS, Moments
from tracekit.trace.writer import Rows, TraceWriter, columns

_PLAIN = "requests", "request_ends", "gpu_readings"
TABLES = *_PLAIN, "steps", "verifications"
_OF_VERIFICATIONS = Entry._fields[Entry._fields.index("verifications") :]
_UNFIT = TypeError, ValueError, OverflowError  # a value that is not of its column's type, or too large for it

log = logging.getLogger("tracekit.trace")


def fold(writer: TraceWriter) -> int:
    """Append to the trace, in one transaction, what its journal has and it has not; returns how many bytes of the
    journal are damaged, and left out.

    Each entry says how many rows came before it, and every fold ends with an entry: an entry that the file's number of
    rows goes beyond is in it, whenever a process was killed. Raises ``duckdb.Error``, ``OSError``, and ``ValueError``
    for what is no journal.
    """
    found, n_damaged = entries(journal_of(writer.path), writer.n_rows(TABLES), writer.trace_id())
    if found:
        writer.append(batches(found))
    return n_damaged


def finish(trace: Path) -> None:
    """Fold the journal that a recording which was cut off has left, and delete it; one that is damaged from somewhere
    on is kept under another name, and said so.

    Raises :class:`TracekitError` where the trace cannot be written, ``duckdb.Error`` where another process holds it.
    """
    journal = journal_of(trace)
    try:
        with closing(TraceWriter(trace)) as writer:
            n_damaged = fold(writer)
        if n_damaged:
            kept = free_path(journal.with_name(f"{journal.name}-damaged"))
            journal.rename(kept)
            log.error(
                "%s: the last %d bytes of its journal are damaged and left out; %s keeps them", trace, n_damaged, kept
            )
        else:
            journal.unlink(missing_ok=True)
    except FileNotFoundError:  # another process was faster
        return
    except Exception as error:  # whatever it is, the trace and its journal stay as they are
        if (isinstance(error, duckdb.Error) and held_by(error)) or interrupted(error):
            raise
        advice = "open it with the tracekit that recorded it"
        if not isinstance(error, Foreign):
            advice = "move the trace and what lies beside it to where they can be written"
        raise TracekitError(
            f"{trace}: its recording was cut off, and the last rows, in {journal.name}, cannot be added "
            f"({first_line(error)}); {advice}, or move {journal.name} away to go without them"
        ) from None


def storable(entry: Entry) -> tuple[Entry, list[str]]:
    """``entry`` as its tables can hold it, and why each row that they cannot is left out.

    Verifications, which only make sense in a row, are left out all together.
    """
    why: list[str] = []

    def fits(made: Callable[..., object], *of: object) -> bool:
        try:
            made(*of)
        except _UNFIT as error:
            why.append(first_line(error))
            return False
        return True

    plain = {name: [_row(name, row) for row in getattr(entry, name) if fits(_row, name, row)] for name in _PLAIN}
    entry = entry._replace(**plain)
    if not fits(_steps, [entry]):
        width = 8 * N_MOMENTS
        rows = [entry.steps[i : i + width] for i in range(0, len(entry.steps), width)]
        why.pop()
        entry = entry._replace(steps=b"".join(row for row in rows if fits(_steps, [entry._replace(steps=row)])))
    if not fits(_verifications, [entry]):
        entry = entry._replace(**dict.fromkeys(_OF_VERIFICATIONS, b""))
    return entry, why


def _row(table: str, row: Sequence) -> tuple:
    """``row`` in plain values of the columns' types; whatever should be text is."""
    kinds = columns(table).values()
    texts = (str(value) if kind == pa.string() else value for value, kind in zip(row, kinds, strict=True))
    return tuple(pa.scalar(value, kind).as_py() for value, kind in zip(texts, kinds, strict=True))


def batches(found: list[Entry]) -> dict[str, Rows]:
    """The rows of neighbouring entries of one run, for :meth:`~tracekit.trace.writer.TraceWriter.append`."""
    plain = {name: [tuple(row) for entry in found for row in getattr(entry, name)] for name in _PLAIN}
    return plain | {"steps": _steps(found), "verifications": _verifications(found)}


def _steps(found: list[Entry]) -> Rows:
    m = Moments(*_joined(found, "steps", np.int64).reshape(-1, N_MOMENTS).T)
    made = m._asdict() | {
        "run": np.full(len(m.step), found[0].run),
        "t_us": (m.began_ns - found[-1].epoch_ns) // 1000,
        "catchup_us": m.ahead_us + m.catchup_us,
        "target_us": (m.decoded_ns - m.filled_ns) // 1000,
        "sample_us": (m.sampled_ns - m.decoded_ns) // 1000 - m.ahead_us,
        "policy_us": (m.decided_ns - m.began_ns + m.learned_ns - m.sampled_ns) // 1000,
        "record_us": np.diff(m.record_ns // 1000, prepend=found[0].record_us),
        "wall_us": (m.learned_ns - m.began_ns) // 1000,
    }
    return pa.table({name: pa.array(made[name]).cast(kind) for name, kind in columns("steps").items()})


def _verifications(found: list[Entry]) -> Rows:
    names, kinds = map(list, zip(*columns("verifications").items(), strict=True))
    whole = _joined(found, "verifications", np.int64).reshape(-1, N_WHOLE).T
    numbers = np.full(whole.shape[1], found[0].run), *whole
    arrays = [pa.array(column).cast(kind) for column, kind in zip(numbers, kinds, strict=False)]
    arrays.append(pa.array(STOPS).take(pa.array(_joined(found, "stops", np.uint8))))
    lengths = _joined(found, "lengths", np.int32).reshape(-1, 3).T
    for name, kind, own in zip(names[-3:], kinds[-3:], lengths, strict=True):
        ends = np.concatenate(([0], np.cumsum(own))).astype(np.int32)
        values = _joined(found, name, kind.value_type.to_pandas_dtype())
        arrays.append(pa.ListArray.from_arrays(ends, pa.array(values, kind.value_type), type=kind))
    return pa.Table.from_arrays(arrays, names)


def _joined(found: list[Entry], part: str, dtype: type) -> np.ndarray:
    return np.frombuffer(b"".join(getattr(entry, part) for entry in found), dtype)
