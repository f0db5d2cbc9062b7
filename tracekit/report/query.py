"""A query that a person wrote, on a trace."""

from __future__ import annotations

from contextlib import suppress

import duckdb
import polars as pl

from tracekit.errors import TracekitError
from tracekit.trace.store import TraceFile, connect

_READING = (duckdb.StatementType.SELECT, duckdb.StatementType.PRAGMA)


def query(trace: TraceFile, sql: str) -> pl.DataFrame:
    """The result of ``sql``. Raises :class:`TracekitError` where DuckDB refuses it, or where it asks for nothing."""
    with connect(trace.path) as con:
        try:
            statements = con.extract_statements(sql)
            if any(_kind(con, s) not in _READING for s in statements):
                raise TracekitError(
                    "the query would write; a trace is only read: SELECT, DESCRIBE, SHOW, PRAGMA, EXPLAIN of these"
                )
            if len(statements) > 1:
                raise TracekitError(f"{len(statements)} statements; ask one at a time")
            found = con.sql(sql)
            if found is None:
                raise TracekitError("the query is empty; `tracekit sql TRACE` prints the tables it can ask")
            return found.pl()
        except pl.exceptions.PolarsError:
            raise TracekitError("the result is of a type that no table shows; cast it: x::VARCHAR") from None
        except duckdb.Error as error:
            reason = str(error).splitlines()[0]
            raise TracekitError(f"the query failed: {reason}; `tracekit sql TRACE` prints the tables") from None


def _kind(con: duckdb.DuckDBPyConnection, statement: duckdb.Statement) -> duckdb.StatementType:
    """What ``statement`` does, or what it explains, since EXPLAIN ANALYZE does that: what is explained begins at the
    first word from which on the text is a statement of another kind.
    """
    kind, raw = statement.type, statement.query.encode()
    for offset, _ in duckdb.tokenize(statement.query):
        if kind != duckdb.StatementType.EXPLAIN:
            break
        with suppress(duckdb.ParserException):
            kind = con.extract_statements(raw[offset:].decode())[0].type
    return kind
