"""Fold a journal's entries into the trace beside it: while it is recorded, or when it is opened after a recording was
cut off.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa

from tracekit.errors import TracekitError
from tracekit.trace.journal import Entry, entries, journal_of
from tracekit.trace.pending import N_MOMENTS, N_WHOLE
from tracekit.trace.rows import STOPS, Moments
from tracekit.trace.writer import Rows, TraceWriter, columns

_PLAIN = "requests", "request_ends", "gpu_readings"
TABLES = *_PLAIN, "steps", "verifications"


def fold(writer: TraceWriter) -> None:
    """Append to the trace, in one transaction, what its journal has and it has not.

    Each entry says how many rows came before it, and every fold ends with an entry: an entry that the file's number of
    rows goes beyond is in it, whenever a process was killed. Raises ``duckdb.Error``, ``OSError``, and ``ValueError``
    for a number too large for its column.
    """
    found = entries(journal_of(writer.path), writer.n_rows(TABLES))
    if found:
        writer.append(batches(found))


def finish(trace: Path) -> None:
    """Fold the journal that a recording which was cut off has left, and delete it.

    Raises :class:`TracekitError` where the trace cannot be written.
    """
    try:
        with closing(TraceWriter(trace)) as writer:
            fold(writer)
        journal_of(trace).unlink(missing_ok=True)
    except (duckdb.Error, OSError, ValueError) as error:
        raise TracekitError(
            f"{trace}: its recording was cut off, and the last rows, in {journal_of(trace).name}, cannot be added "
            f"({str(error).splitlines()[0]}); move both files to where they can be written, or "
            f"delete {journal_of(trace).name} to go without them"
        ) from None


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
