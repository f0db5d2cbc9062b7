"""A query that a person wrote, on a trace."""

from __future__ import annotations

import duckdb
import polars as pl

from tracekit.errors import TracekitError
from tracekit.trace.store import TraceFile, connect


def query(trace: TraceFile, sql: str) -> pl.DataFrame:
    """The result of ``sql``. Raises :class:`TracekitError` where DuckDB refuses it, or where it asks for nothing."""
    with connect(trace.path) as con:
        try:
            found = con.sql(sql)
            if found is None:
                raise TracekitError("the query is empty; `tracekit sql TRACE` prints the tables it can ask")
            return found.pl()
        except duckdb.Error as error:
            raise TracekitError(f"the query failed: {str(error).splitlines()[0]}") from None
