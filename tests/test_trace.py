"""Traces: the schema says what it is, rows fit it, and a bad file gets one clear line."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import duckdb
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import TracekitError
from tracekit.trace import rows, schema
from tracekit.trace.pending import Pending
from tracekit.trace.store import open_trace
from tracekit.trace.writer import TraceWriter, columns

TABLES = {
    "run_ends": rows.RunEnd,
    "requests": rows.RequestRow,
    "request_ends": rows.RequestEnd,
    "steps": rows.Step,
    "verifications": rows.Verification,
    "gpu_readings": rows.GpuReading,
}


@pytest.mark.parametrize("table", TABLES)
def test_rows_have_the_columns_of_their_table(table):
    """Row tuples and table declarations cannot drift apart."""
    assert TABLES[table]._fields == tuple(columns(table))


_SMALL = st.integers(0, 2**15 - 1)
_VERIFICATIONS = st.builds(
    rows.Verification,
    run=st.just(3),
    **dict.fromkeys(rows.Verification._fields[1:11], _SMALL),
    stop=st.sampled_from(["off", "n_max", "p_min", "room"]),
    draft_ids=st.lists(_SMALL, max_size=3),
    draft_probs=st.lists(st.floats(0, 1, width=32), max_size=3),
    tokens=st.lists(_SMALL, max_size=3),
)


@given(st.lists(st.none() | _VERIFICATIONS))
def test_pending_rows_come_out_as_they_went_in(events):
    """Rows leave their buffers whole and in order, however often they are taken out (at each None)."""
    pending, batches = Pending(run=3), []
    for row in [*events, None]:
        if row is None:
            batches.append(pending.take()["verifications"])
        else:
            pending.verified(row[1:-4], *row[-4:])
    found = [rows.Verification(*row.values()) for batch in batches for row in batch.to_pylist()]
    assert found == [row for row in events if row is not None]


def test_a_step_is_worked_out_of_its_moments():
    """Spans are whole microseconds, their parts fit into the whole, and rounding loses no time spent recording."""
    pending = Pending(run=3)
    names = dict.fromkeys(rows.Moments._fields, 0) | {"ahead_us": 2, "catchup_us": 1}
    for step, began in enumerate((5_000_000_900, 5_000_100_900, 5_000_200_900)):
        times = (began + t for t in (0, 1_900, 10_000, 60_000, 67_000, 70_100))
        pending.stepped(
            *rows.Moments(**names | dict(zip(names, times, strict=False), step=step, record_ns=1_600 * step))
        )
    found = [rows.Step(*row.values()) for row in pending.take()["steps"].to_pylist()]
    assert [s.t_us for s in found] == [0, 100, 200]
    assert [s.record_us for s in found] == [0, 1, 2]
    assert {s[12:] for s in (s._replace(record_us=0) for s in found)} == {(0, 0, 3, 50, 5, 5, 0, 70)}
    assert (pending.wall_us, pending.record_us) == (270, 3)


def test_schema_is_what_duckdb_makes_of_it(tmp_path):
    """Every declared column exists, in order; every one has a comment; times and ratios have their unit in the name."""
    writer = TraceWriter(tmp_path / "t.duckdb")
    writer.close()
    with duckdb.connect(str(tmp_path / "t.duckdb")) as con:
        for table in ("runs", *TABLES):
            names = [
                r[0]
                for r in con.execute(
                    f"SELECT column_name FROM information_schema.columns WHERE table_name = '{table}' ORDER "
                    "BY ordinal_position"
                ).fetchall()
            ]
            assert names == list(columns(table))
    for name in re.findall(r"^    (\w+) .*microseconds", schema.TABLES, re.MULTILINE):
        assert name.endswith("_us")
    assert "UINTEGER" not in schema.TABLES  # an unsigned difference below zero is an error in SQL


def test_file_that_exists_is_never_overwritten(tmp_path):
    """Without force an existing file stays as it is."""
    path = tmp_path / "t.duckdb"
    TraceWriter(path).close()
    with pytest.raises(TracekitError, match="--force"):
        TraceWriter(path)
    TraceWriter(path, force=True).close()


def _file(tmp_path, kind):
    path = tmp_path / "t.duckdb"
    if kind == "missing":
        return path
    if kind == "foreign file":
        path.write_text("this is no database, but it is long enough to have a header " * 20)
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "foreign database":
        with duckdb.connect(str(path)) as con:
            con.execute("CREATE TABLE birds (name VARCHAR)")
    elif kind == "no run":
        TraceWriter(path).close()
    elif kind in ("other version", "truncated"):
        TraceWriter(path).close()
        with duckdb.connect(str(path)) as con:
            con.execute(
                "INSERT INTO runs SELECT 0, 'id', 99, 'probe', now(), '0', NULL, 8, 'm', 'h', 'a', 'd', 1, "
                "1, 1, NULL, 'l', 'd', NULL, '{}', '{}'"
            )
            con.execute("CREATE TABLE filler AS SELECT range AS i, hash(range) AS h FROM range(300000)")
    if kind == "truncated":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 3])
    return path


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("missing", "no such file"),
        ("foreign file", "not a DuckDB file"),
        ("empty file", "empty"),
        ("foreign database", "no table runs"),
        ("no run", "holds no run"),
        ("other version", "schema version 99"),
        ("truncated", "damaged or truncated|schema version"),
    ],
)
def test_bad_files_get_one_clear_line(tmp_path, kind, hint):
    """Missing, foreign, empty, truncated, or of another schema: each is named, with what to do."""
    path = _file(tmp_path, kind)
    with pytest.raises(TracekitError, match=hint) as error:
        open_trace(path)
    assert "\n" not in str(error.value)


def test_file_being_written_names_its_writer(tmp_path):
    """While another process records into a file, opening it says which process that is."""
    path = tmp_path / "t.duckdb"
    TraceWriter(path).close()
    code = f"import duckdb, sys; con = duckdb.connect({str(path)!r}); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        writer.stdout.readline()
        with pytest.raises(TracekitError, match=f"being written by process {writer.pid}"):
            open_trace(path)
        writer.stdin.close()
