"""Create a trace file and append to it, in column batches: a commit is on disk when :meth:`TraceWriter.append`
returns.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from tracekit.errors import TracekitError
from tracekit.trace import schema
from tracekit.trace.files import SMALL, delete, first_line, held_by
from tracekit.trace.journal import files_of

_ARROW = {
    "SMALLINT": pa.int16(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "REAL": pa.float32(),
    "BOOLEAN": pa.bool_(),
    "VARCHAR": pa.string(),
    "JSON": pa.string(),
    "TIMESTAMPTZ": pa.timestamp("us", "UTC"),
    "INTEGER[]": pa.list_(pa.int32()),
    "REAL[]": pa.list_(pa.float32()),
}

Rows = Sequence[tuple] | pa.Table  # of one table: tuples in column order, or columns by name


@cache
def columns(table: str) -> dict[str, pa.DataType]:
    """Column names and Arrow types of ``table``, in order, as :data:`tracekit.trace.schema.TABLES` declares them."""
    body = re.search(rf"CREATE TABLE {table} \((.*?)\n\);", schema.TABLES, re.DOTALL)[1]
    found = re.findall(r"^    (\w+) ([A-Z]+(?:\[\])?)", body, re.MULTILINE)
    return {name: _ARROW[kind] for name, kind in found if name != "PRIMARY"}


def _transposed(table: str, rows: Sequence[tuple]) -> pa.Table:
    kinds = columns(table)
    arrays = [pa.array(values, kind) for values, kind in zip(zip(*rows, strict=True), kinds.values(), strict=True)]
    return pa.Table.from_arrays(arrays, list(kinds))


def _plain(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, Mapping) else value


class Taken(TracekitError):
    """A trace, or something that a recording has left, is where a new trace should be."""


def check_free(path: Path) -> None:
    """Raise :class:`Taken` where there is something at ``path``, or left beside it by another recording;
    :class:`TracekitError` where a folder is.
    """
    if path.is_dir():
        raise TracekitError(f"{path}: a folder; choose another name")
    there = [file for file in files_of(path) if file.exists()]
    if there:
        raise Taken(f"{there[0]}: exists; nothing recorded is overwritten without --force")


class TraceWriter:
    """The trace at ``path``, open for appending. Raises ``duckdb.Error``."""

    def __init__(self, path: Path):
        self.path = path
        # the cores are the engine's
        self._con = duckdb.connect(str(path), config=SMALL | {"threads": 1})
        self._con.execute("PRAGMA disable_optimizer")  # a plain insert has nothing to optimise

    @classmethod
    def create(cls, path: str | Path, run: Mapping[str, Any] | None = None) -> TraceWriter:
        """A new trace, with ``run`` its provenance row (``settings`` and ``machine`` may be mappings).

        Raises :class:`Taken` where ``path`` exists or is being recorded (what another recording left beside it counts
        too), :class:`TracekitError` where it cannot be written, ``KeyError`` for a column that ``run`` has not.
        """
        path = Path(path)
        check_free(path)
        rows = [] if run is None else [tuple(_plain(run[name]) for name in columns("runs"))]
        writer = None
        try:
            writer = cls(path)
            writer._con.begin()  # a process that is killed leaves tables with their run, or nothing
            writer._con.execute(schema.TABLES + schema.VIEWS)
            if rows:
                writer._insert("runs", _transposed("runs", rows))
            writer._con.commit()
        except (duckdb.Error, OSError) as error:
            if held := held_by(error):  # of two that come at once, one is first
                raise Taken(f"{path}: {held}") from None
            if writer is not None:
                writer._con.close()
            with contextlib.suppress(OSError):
                if path.exists():  # DuckDB makes a file before it knows whether there is room for anything in it
                    delete(path)
            raise TracekitError(f"{path}: cannot be written ({first_line(error)})") from None
        return writer

    def n_rows(self, tables: Sequence[str]) -> int:
        """Rows in ``tables`` together. Raises ``duckdb.Error``."""
        counts = " + ".join(f"(SELECT count(*) FROM {table})" for table in tables)
        return self._con.execute(f"SELECT {counts}").fetchone()[0]

    def trace_id(self) -> str:
        """Identity of what is recorded in it; empty before there is a run. Raises ``duckdb.Error``."""
        return self._con.execute("SELECT coalesce(string_agg(trace_id, '+' ORDER BY run), '') FROM runs").fetchone()[0]

    def append(self, batches: Mapping[str, Rows]) -> None:
        """Append to each named table, in one transaction. Raises ``duckdb.Error``."""
        self._con.begin()
        try:
            for table, rows in batches.items():
                if len(rows):
                    self._insert(table, rows if isinstance(rows, pa.Table) else _transposed(table, rows))
            self._con.commit()
        except duckdb.Error:
            with contextlib.suppress(duckdb.Error):  # past use; the file keeps what was committed
                self._con.rollback()
            raise

    def _insert(self, table: str, batch: pa.Table) -> None:
        """DuckDB finds ``batch`` by its name: registering it would take as long again as inserting it."""
        self._con.execute(f"INSERT INTO {table} FROM batch")

    def close(self) -> None:
        """Write the log back into the file and let go of it. Raises ``duckdb.Error`` where it cannot be written back:
        then the rows stay in the log.
        """
        try:
            self._con.execute("CHECKPOINT")  # closing would not say that the disk is full
        finally:
            self._con.close()

    def discard(self) -> None:
        """Close it and delete it: nothing came of it. Raises ``OSError``."""
        self._con.close()
        delete(self.path)
