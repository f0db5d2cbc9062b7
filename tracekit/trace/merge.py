"""Several recordings as one trace: every process and every start of a server leaves a file of its own, and a decision
should rest on all of them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import duckdb

from tracekit.errors import TracekitError
from tracekit.trace import schema
from tracekit.trace.files import SMALL, Replaced, check_replaceable, delete, first_line
from tracekit.trace.store import TraceFile, open_trace
from tracekit.trace.writer import check_free, columns

TABLES = "runs", "run_ends", "requests", "request_ends", "steps", "gpu_readings", "verifications"
# else positions, or prices, are of two kinds
_ALIKE = "model_sha256", "draft_sha256", "mode", "n_max", "llama_cpp", "device", "driver"
_MACHINE = "processor", "cuda_graphs", "placement", "environment"
_ASKED = "probe_seed", "policy_sha256", "policy_source"  # settings that may differ


def merge(paths: Sequence[str | Path], output: str | Path, force: bool = False) -> TraceFile:
    """Write ``output``, a trace of all runs in the traces ``paths``, in that order, and open it; they stay as they are.
    A run keeps its ``trace_id`` and gets a new number.

    Raises :class:`TracekitError` where there are fewer than two traces, where one of them is of another model, mode,
    machine, build or settings than the first, or holds a run that another one holds; and where ``output`` exists
    (without ``force``) or cannot be written. What is there goes when the new trace is complete.
    """
    output, traces = Path(output).resolve(), [open_trace(path) for path in paths]
    if len(traces) < 2:
        raise TracekitError("one trace has nothing to be merged with; give two or more")
    _check(traces)
    if any(output == trace.path for trace in traces):
        raise TracekitError(f"{output}: is one of those to be merged; choose another name")
    if not force:
        check_free(output)
    check_replaceable(output)
    partial = output.with_name(f".partial-{output.name}")
    check_replaceable(partial)  # of a merge that was killed; one under way holds it
    try:
        delete(partial)
        with duckdb.connect(str(partial), config=SMALL) as con:
            _fill(con, traces)
            con.execute("CHECKPOINT")  # closing would not say that the disk is full
        open_trace(partial)
        replaced = Replaced(output)
        try:
            partial.rename(output)
        except OSError:
            replaced.put_back()
            raise
        replaced.remove()
    except (duckdb.Error, OSError) as error:
        raise TracekitError(f"{output}: cannot be written ({first_line(error)})") from None
    finally:
        with contextlib.suppress(OSError):
            delete(partial)
    return open_trace(output)


def _check(traces: Sequence[TraceFile]) -> None:
    first, seen = traces[0], {}
    for trace in traces:
        for run in trace.runs.iter_rows(named=True):
            if (other := seen.setdefault(run["trace_id"], trace)) is not trace:
                raise TracekitError(f"{trace.path}: holds a recording that {other.path} holds too; give it once")
            for name, value, wanted in _differences(run, first.runs.row(0, named=True)):
                raise TracekitError(
                    f"{trace.path}: {name} {value}, in {first.path} {wanted}; traces of the same model, machine and "
                    "settings can be merged"
                )


def _differences(run: dict[str, Any], first: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """What is not alike in two runs, with both values."""
    found = [(name, run[name], first[name]) for name in _ALIKE if run[name] != first[name]]
    for table in ("settings", "machine"):
        mine, its = (json.loads(of[table]) for of in (run, first))
        names = _MACHINE if table == "machine" else [name for name in mine | its if name not in _ASKED]
        pairs = [(name, mine.get(name) or None, its.get(name) or None) for name in names]  # an older run has fewer
        found += [(name, *pair) for name, *pair in pairs if pair[0] != pair[1]]
    return found


def _fill(con: duckdb.DuckDBPyConnection, traces: Sequence[TraceFile]) -> None:
    con.execute(schema.TABLES + schema.VIEWS)
    n_runs = 0
    for trace in traces:
        con.execute(f"ATTACH '{str(trace.path).replace(chr(39), chr(39) * 2)}' AS part (READ_ONLY)")
        for table in TABLES:
            names = ", ".join(f"{name} + {n_runs}" if name == "run" else name for name in columns(table))
            con.execute(f"INSERT INTO {table} SELECT {names} FROM part.{table}")
        con.execute("DETACH part")
        n_runs += trace.runs["run"].max() + 1
