"""Open a trace file for reading, with one clear line for everything that can be wrong with it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from tracekit.errors import TracekitError
from tracekit.trace import schema
from tracekit.trace.files import first_line, head_of, held_by, replaced_of
from tracekit.trace.journal import journal_of

_COSTLY = "threads", "gpu_layers", "cache_type_k", "cache_type_v", "flash_attn"
_NEEDED = "n_slots", "n_max", "n_batch", "n_ubatch", "kv_unified", "memory", *_COSTLY  # of a run's settings
PATIENCE_S = 2.0  # with another process that holds the file: a reader that completes it is done by then


@dataclass(frozen=True)
class TraceFile:
    """A trace on disk. Every read opens the file, reads and lets go of it, so that a recorder may follow."""

    path: Path

    def frame(self, sql: str, **parameters: Any) -> pl.DataFrame:
        """The result of ``sql`` (``$name`` for parameters) as a Polars frame."""
        with connect(self.path) as con:
            try:
                return con.sql(sql, params=parameters or None).pl()
            except duckdb.Error as error:
                raise TracekitError(f"{self.path}: {_reason(error)}") from None

    @cached_property
    def runs(self) -> pl.DataFrame:
        """The recording sessions, one row each, with their provenance."""
        return self.frame("SELECT * FROM runs LEFT JOIN run_ends USING (run) ORDER BY run")

    @property
    def is_calibration(self) -> bool:
        """Whether all of it is a cost surface: what was drafted and accepted on its random prompts says nothing."""
        return bool((self.runs["mode"] == "calibration").all())

    @property
    def trace_id(self) -> str:
        """Identity of what was recorded: the trace ids of all runs."""
        return "+".join(self.runs["trace_id"])


class NoRun(TracekitError):
    """A trace in which nothing is: its recording stopped before its first step."""


def recorded_with(trace: TraceFile, priced: TraceFile) -> dict[str, Any]:
    """What acceptance in ``trace`` and costs in ``priced`` depend on beside model and machine: the sampling of requests
    as far as all were sampled alike, and settings of the engine.
    """
    settings = json.loads(priced.runs["settings"][-1])
    found = {name: settings[name] for name in _COSTLY}
    sampled = trace.frame("SELECT DISTINCT temp, top_k, top_p, min_p FROM requests WHERE arm IN ('probe', 'live')")
    alike = {name: round(sampled[name][0], 6) for name in sampled.columns if sampled[name].n_unique() == 1}  # REALs
    return found | (alike if alike.get("temp") else {name: alike[name] for name in alike if name == "temp"})


def open_trace(path: str | Path) -> TraceFile:
    """The trace at ``path``, checked. Raises :class:`TracekitError` for what is no trace of this schema, :class:`NoRun`
    for one that holds nothing.
    """
    trace = TraceFile(Path(path).resolve())  # what lies beside it lies where a link leads
    with connect(trace.path) as con:
        tables = {row[0] for row in con.execute("SELECT table_name FROM information_schema.tables").fetchall()}
        if tables and "runs" not in tables:
            raise TracekitError(
                f"{path}: a DuckDB file, but no trace (it has no table runs); `tracekit record` writes one"
            )
        try:
            query = "SELECT DISTINCT schema_version FROM runs"
            versions = {row[0] for row in con.execute(query).fetchall()} if tables else set()
            known = versions == {schema.VERSION}
            empty = known and con.execute("SELECT step FROM steps LIMIT 1").fetchone() is None
        except duckdb.Error as error:
            raise TracekitError(f"{path}: {_reason(error)}") from None
    if not versions:
        replaced = _replaced(trace.path)
        raise NoRun(f"{path}: holds no run; the recording stopped before its first step; record again{replaced}")
    if not known:
        other = ", ".join(str(v) for v in sorted(versions - {schema.VERSION}))
        raise TracekitError(
            f"{path}: trace of schema version {other}, this tracekit reads {schema.VERSION}; record again, or "
            "use the tracekit that wrote it"
        )
    if empty and (replaced := _replaced(trace.path)):
        raise NoRun(f"{path}: holds no step; the recording stopped before its first; record again{replaced}")
    for settings in map(json.loads, trace.frame("SELECT DISTINCT settings FROM runs")["settings"]):
        if missing := [name for name in _NEEDED if not isinstance(settings, dict) or name not in settings]:
            raise TracekitError(f"{path}: damaged (the settings of a run have no {missing[0]})")
    return trace


def connect(path: Path) -> duckdb.DuckDBPyConnection:
    """A read-only connection to ``path``, which is completed first if its recording was cut off.

    Waits a little for another reader that is doing so. Raises :class:`TracekitError` where DuckDB cannot give one.
    """
    if not path.is_file():
        raise TracekitError(
            f"{path}: no such file; `tracekit record` writes traces, `tracekit calibrate` costs{_replaced(path)}"
        )
    late = time.monotonic() + PATIENCE_S
    while True:
        try:
            con = duckdb.connect(str(path), read_only=True)
            if not journal_of(path).exists():
                return con
            con.close()  # no process holds the file: a recording was cut off
            from tracekit.trace.fold import finish

            finish(path)
        except duckdb.Error as error:
            if not (held := held_by(error)):
                raise _unreadable(path, error) from None
            if time.monotonic() > late:
                raise TracekitError(f"{path}: {held}") from None
            time.sleep(0.05)


def _unreadable(path: Path, error: duckdb.Error) -> TracekitError:
    if (head := head_of(path))[8:] == b"DUCK":
        return TracekitError(f"{path}: {_reason(error)}")
    if head:
        return TracekitError(f"{path}: not a DuckDB file")
    return NoRun(f"{path}: not a DuckDB file (it is empty){_replaced(path)}")


def _replaced(path: Path) -> str:
    """Where what a recording should have replaced is, which was killed before it did; empty for nothing."""
    if not path.name:
        return ""
    first = replaced_of(path)
    beside = sorted(first.parent.glob(f"{escape(first.stem)}*{escape(first.suffix)}"))
    kept = " or ".join(str(file) for file in beside if file.is_file())
    return f"; what it should have replaced is {kept}" if kept else ""


def _reason(error: duckdb.Error) -> str:
    if "different version" in str(error) or "newer version" in str(error):
        return "written by a newer DuckDB; upgrade duckdb"
    return f"damaged or truncated ({first_line(error)})"
