"""Traces: the schema says what it is, rows fit it, and a bad file gets one clear line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tracekit.errors import TracekitError
from tracekit.trace import rows, schema
from tracekit.trace.files import Replaced, free_path
from tracekit.trace.fold import batches, fold, storable
from tracekit.trace.journal import MARK, Journal, entries, journal_of
from tracekit.trace.pending import Pending
from tracekit.trace.store import _NEEDED, NoRun, open_trace
from tracekit.trace.writer import TraceWriter, columns

TABLES = {
    "run_ends": rows.RunEnd,
    "requests": rows.RequestRow,
    "request_ends": rows.RequestEnd,
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


def _journal(folder, events, run=3, trace_id=""):
    """A trace that nothing was folded into, and its journal: an entry ends at each None."""
    path = Path(folder) / "t.duckdb"
    writer, journal, pending = TraceWriter.create(path), Journal(path, trace_id), Pending(run)
    for row in [*events, None]:
        if row is None:
            journal.append(pending.take())
        else:
            pending.verified(row[1:])
    journal.close()
    return writer, journal.path


def _verifications(writer):
    return writer._con.execute("SELECT * FROM verifications").fetchall()


@settings(max_examples=30)
@given(st.lists(st.none() | _VERIFICATIONS, max_size=20))
def test_rows_come_out_of_the_journal_as_they_went_in(events):
    """Rows leave their buffers whole and in order, however often they are taken out."""
    with tempfile.TemporaryDirectory() as folder:
        writer, _ = _journal(folder, events)
        fold(writer)
        assert _verifications(writer) == [tuple(row) for row in events if row is not None]
        writer.close()


@settings(max_examples=30)
@given(st.lists(st.none() | _VERIFICATIONS, min_size=1, max_size=12), st.data())
def test_no_row_is_folded_twice_and_none_left_out(events, data):
    """A process may be killed after folding, before the journal is cleared, or in the middle of an entry."""
    with tempfile.TemporaryDirectory() as folder:
        writer, path = _journal(folder, events)
        whole = path.read_bytes()
        path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
        found, n_damaged = entries(path, 0)
        kept = sum(entry.n_verifications for entry in found)
        assert n_damaged == 0
        fold(writer)
        assert len(_verifications(writer)) == kept
        path.write_bytes(whole)
        fold(writer)
        fold(writer)
        assert _verifications(writer) == [tuple(row) for row in events if row is not None]
        writer.close()


_ROW = rows.Verification(3, 1, 0, 0, 2, 2, 2, 1, 1, 0, 2, "n_max", [5, 6], [0.5, 0.25], [5, 7])
_RUN = (
    "INSERT INTO runs SELECT 3, 'id', {version}, 'probe', now(), '0', NULL, 8, 'm', 'h', 'a', 'd', 1, 1, 1, NULL, 'l', "
    "'d', NULL, '" + json.dumps(dict.fromkeys(_NEEDED, 1)).replace("{", "{{").replace("}", "}}") + "', '{{}}'"
)


def _cut_off(folder, *events, trace_id="id"):
    writer, journal = _journal(folder, events, trace_id=trace_id)
    writer._con.execute(_RUN.format(version=schema.VERSION))
    writer.close()
    return writer.path, journal


def test_recording_that_was_cut_off_is_completed_when_opened(tmp_path):
    """Opening a trace with a journal beside it adds the journal's rows, and deletes it."""
    path, _ = _cut_off(tmp_path, _ROW)
    assert open_trace(path).frame("SELECT * FROM verifications").rows() == [tuple(_ROW)]
    assert list(tmp_path.iterdir()) == [path]


def test_a_journal_that_could_not_be_deleted_adds_nothing_twice(tmp_path, monkeypatch):
    """Where folding succeeds and deleting fails, the rows are there once however often the trace is opened."""
    path, journal = _cut_off(tmp_path, _ROW, None, _ROW._replace(step=1))
    with monkeypatch.context() as killed:
        killed.setattr(Path, "unlink", _no_space)
        with pytest.raises(TracekitError, match="cannot be added"):
            open_trace(path)
    assert journal.exists()
    assert open_trace(path).frame("SELECT step FROM verifications ORDER BY step").rows() == [(0,), (1,)]
    assert list(tmp_path.iterdir()) == [path]


def test_rows_that_cannot_be_stored_are_left_out_one_by_one():
    """A request with a number too large, a step of an hour: the rows beside them stay; names that are no text fit."""
    pending = Pending(run=3)
    good = rows.RequestRow(3, 0, 7, None, "live", 0, 1, np.int64(9), 64, 0.5, 1, 40, 0.5, 0.25, "off")
    pending.began(good)
    pending.began(good._replace(request=1, max_tokens=1 << 40))
    moments = rows.Moments(**dict.fromkeys(rows.Moments._fields, 0))
    for step, learned in enumerate((10_000, 3 << 40, 20_000)):
        pending.stepped(moments._replace(step=step, learned_ns=learned))
    pending.verified(_ROW[1:])
    entry, why = storable(pending.take())
    assert entry.requests == [(3, 0, "7", "None", "live", 0, 1, 9, 64, 0.5, 1, 40, 0.5, 0.25, "off")]
    assert batches([entry])["steps"]["step"].to_pylist() == [0, 2]
    assert (entry.n_verifications, len(why)) == (1, 2)


def test_rows_that_do_not_fit_on_the_disk_stay_in_the_journal(tmp_path):
    """Where what was folded cannot be written back into the trace, the journal is not deleted, and a line says so."""
    path, journal = _cut_off(tmp_path, _ROW)
    code = f"""
        import resource
        from tracekit.trace.store import open_trace
        resource.setrlimit(resource.RLIMIT_FSIZE, ({path.stat().st_size}, {path.stat().st_size}))
        open_trace({str(path)!r})
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert "cut off, and the last rows, in t.duckdb.journal, cannot be added" in result.stderr
    assert journal.exists()
    assert open_trace(path).frame("SELECT * FROM verifications").rows() == [tuple(_ROW)]


def test_a_trace_has_its_run_or_nothing(tmp_path):
    """A process that is killed while it makes a trace leaves no tables without a run."""
    path = tmp_path / "t.duckdb"
    code = f"""
        import os
        from tracekit.trace.writer import TraceWriter, columns
        TraceWriter._insert = lambda *_: os._exit(0)
        TraceWriter.create({str(path)!r}, dict.fromkeys(columns("runs")))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)
    with pytest.raises(NoRun, match="holds no run"):
        open_trace(path)
    with duckdb.connect(str(path)) as con:
        assert con.execute("SELECT count(*) FROM information_schema.tables").fetchone() == (0,)


def test_recording_that_cannot_be_completed_says_why(tmp_path, monkeypatch):
    """Where the trace cannot be written its rows stay in the journal, and one line says what to do."""
    path, journal = _cut_off(tmp_path, _ROW)
    with monkeypatch.context() as full:
        full.setattr(TraceWriter, "append", _no_space)
        with pytest.raises(TracekitError, match=r"cut off.*t\.duckdb\.journal.*No space.*move .* away") as error:
            open_trace(path)
    assert "\n" not in str(error.value)
    assert journal.exists()
    assert open_trace(path).frame("SELECT count(*) AS n FROM verifications")["n"][0] == 1


def _no_space(*_, **__):
    raise OSError("No space left on device")


_OPEN = """
    import sys, time
    from tracekit.trace.store import open_trace
    print("ready", flush=True)
    time.sleep(max(0, float(sys.stdin.readline()) - time.time()))
    print(open_trace(sys.argv[1]).frame("SELECT count(*) AS n FROM verifications")["n"][0])
"""


def test_several_readers_open_a_cut_off_trace_at_once(tmp_path):
    """One of them completes it, the others wait for that, and all read every row."""
    path, _ = _cut_off(tmp_path, *[_ROW] * 20_000)
    command = [sys.executable, "-c", textwrap.dedent(_OPEN), str(path)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    readers = [subprocess.Popen(command, text=True, **pipes) for _ in range(4)]
    for reader in readers:
        reader.stdout.readline()
    at = f"{time.time() + 0.5}\n"
    results = [reader.communicate(at, timeout=60) for reader in readers]
    assert [out.strip() for out, _ in results] == ["20000"] * 4, results
    assert list(tmp_path.iterdir()) == [path]


def test_cut_off_trace_that_another_process_reads_names_it(tmp_path):
    """Who holds the file is named; nobody is told to delete the rows that wait in the journal."""
    path, journal = _cut_off(tmp_path, _ROW)
    code = "duckdb.connect({path!r}, read_only=True)"
    with (
        _holding(path, code) as reader,
        pytest.raises(TracekitError, match=f"held by process {reader.pid}; wait until") as error,
    ):
        open_trace(path)
    assert "away" not in str(error.value)
    assert journal.exists()
    assert open_trace(path).frame("SELECT count(*) AS n FROM verifications")["n"][0] == 1


@pytest.mark.parametrize("what", [b"[1234, 0, [8]]\n", b"junk", MARK[:4] + b"\0" * 20], ids=["old", "junk", "new"])
def test_journal_of_another_version_is_left_alone(tmp_path, what):
    """What an older or newer tracekit has left, or something else, is not guessed at; who can read it is said."""
    path, journal = _cut_off(tmp_path, _ROW)
    journal.write_bytes(what)
    with pytest.raises(TracekitError, match="another version.*open it with the tracekit that recorded it") as error:
        open_trace(path)
    assert "\n" not in str(error.value)
    assert (journal.read_bytes(), {p.name for p in tmp_path.iterdir()}) == (what, {path.name, journal.name})


def _flipped(at):
    return lambda entry: entry[:at] + bytes([entry[at] ^ 1]) + entry[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [*map(_flipped, (0, 9, 13, 40, -1)), lambda entry: entry[:-60] + b"\0" * 60, lambda entry: b"\0" * 100 + entry],
    ids=["mark", "checksum", "size", "line", "last byte", "zero tail", "zeros before"],
)
def test_what_comes_before_the_damage_is_added(tmp_path, caplog, damage):
    """Every entry has a checksum: those before the first that is wrong count, the journal stays, and a line says so."""
    rows = _ROW, None, _ROW._replace(step=1), None, _ROW._replace(step=2)
    path, journal = _cut_off(tmp_path, *rows)
    whole = journal.read_bytes()
    first, second, third = (MARK + entry for entry in whole.split(MARK)[1:])
    journal.write_bytes(broken := first + damage(second) + third)
    assert open_trace(path).frame("SELECT step FROM verifications").rows() == [(0,)]
    kept = journal.with_name("t.duckdb.journal-damaged")
    assert (kept.read_bytes(), journal.exists()) == (broken, False)
    assert f"the last {len(broken) - len(first)} bytes of its journal are damaged" in caplog.text


def test_a_journal_of_another_recording_is_kept_and_not_mixed_in(tmp_path, caplog):
    """A trace that was copied over one whose recording was cut off has not that one's rows."""
    path, journal = _cut_off(tmp_path, _ROW, trace_id="another")
    assert open_trace(path).frame("SELECT count(*) AS n FROM verifications")["n"][0] == 0
    assert "damaged" in caplog.text
    assert journal.with_name("t.duckdb.journal-damaged").exists()


def test_a_cut_off_trace_is_completed_through_a_link(tmp_path):
    """Its journal lies beside the file, not beside the link."""
    (tmp_path / "data").mkdir()
    _cut_off(tmp_path / "data", _ROW)
    link = tmp_path / "link.duckdb"
    link.symlink_to(tmp_path / "data" / "t.duckdb")
    assert open_trace(link).frame("SELECT count(*) AS n FROM verifications")["n"][0] == 1


def test_a_name_with_a_colon_is_a_name(tmp_path, monkeypatch):
    """DuckDB takes what comes before a colon for another kind of database."""
    path, _ = _cut_off(tmp_path, _ROW)
    path.rename(tmp_path / "at_12:30.duckdb")
    (tmp_path / "t.duckdb.journal").rename(tmp_path / "at_12:30.duckdb.journal")
    monkeypatch.chdir(tmp_path)
    assert open_trace("at_12:30.duckdb").frame("SELECT count(*) AS n FROM verifications")["n"][0] == 1
    Replaced(Path("at_12:30.duckdb")).remove()
    assert list(tmp_path.iterdir()) == []


def test_a_look_at_what_is_being_recorded_does_not_let_go_of_it(tmp_path):
    """Closing a file lets go of all of a process's locks on it; without them another process would take the recording
    for cut off, and fold its journal away.
    """
    path = tmp_path / "t.duckdb"
    writer = TraceWriter.create(path)
    for look in (open_trace, Replaced):
        with pytest.raises(TracekitError, match="being written by this process"):
            look(path)
        code = f"import duckdb; duckdb.connect({str(path)!r}, read_only=True)"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert "Could not set lock" in other.stderr
    writer.close()


@pytest.mark.parametrize("n_left", [1, 3, 40, -1])
def test_an_entry_that_was_cut_off_costs_no_other(tmp_path, n_left):
    """Wherever the last entry ends, those before it are added."""
    path, journal = _cut_off(tmp_path, _ROW)
    first = journal.read_bytes()
    journal.write_bytes(first + first[:n_left])
    assert open_trace(path).frame("SELECT count(*) AS n FROM verifications")["n"][0] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("settings", ["{}", "[]", '{"n_slots": 1}'])
def test_settings_that_are_not_there_are_told(tmp_path, settings):
    """Everything that reads a trace rests on how it was recorded: what is not told is a line, when it is opened."""
    path, _ = _cut_off(tmp_path, _ROW)
    open_trace(path)
    with duckdb.connect(str(path)) as con:
        con.execute("UPDATE runs SET settings = ?", [settings])
    with pytest.raises(TracekitError, match="damaged .the settings of a run have no n_"):
        open_trace(path)


def test_trace_being_recorded_by_this_process_says_so(tmp_path):
    """A trace is not read, nor its journal folded, before its recorder has let go of it."""
    writer, journal = _journal(tmp_path, [_ROW])
    with pytest.raises(TracekitError, match="being written by this process"):
        open_trace(writer.path)
    assert journal.exists()
    writer.close()


def test_a_step_is_worked_out_of_its_moments():
    """Spans are whole microseconds, their parts fit into the whole, and rounding loses no time spent recording."""
    pending = Pending(run=3)
    names = dict.fromkeys(rows.Moments._fields, 0) | {"ahead_us": 2, "catchup_us": 1}
    for step, began in enumerate((5_000_000_900, 5_000_100_900, 5_000_200_900)):
        times = (began + t for t in (0, 1_900, 10_000, 60_000, 67_000, 70_100))
        pending.stepped(
            rows.Moments(**names | dict(zip(names, times, strict=False), step=step, record_ns=1_600 * step))
        )
    found = batches([pending.take()])["steps"].to_pydict()
    assert list(found) == list(columns("steps"))
    assert found.pop("t_us") == [0, 100, 200]
    assert found.pop("record_us") == [0, 1, 2]
    spans = {"catchup_us": 3, "target_us": 50, "sample_us": 5, "policy_us": 5, "wall_us": 70}
    assert {name: set(found[name]) for name in spans} == {name: {span} for name, span in spans.items()}
    assert (pending.wall_us, pending.record_us) == (270, 3)


def test_schema_is_what_duckdb_makes_of_it(tmp_path):
    """Every declared column exists, in order; every one has a comment; times and ratios have their unit in the name."""
    writer = TraceWriter.create(tmp_path / "t.duckdb")
    writer.close()
    with duckdb.connect(str(tmp_path / "t.duckdb")) as con:
        for table in ("runs", "steps", *TABLES):
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


def test_no_trace_takes_more_room_than_in_blocks_of_duckdbs_own_size(tmp_path, monkeypatch):
    """A short one takes much less, and a long one no more."""
    shipped = open_trace(Path(__file__).parent.parent / "traces" / "reference-aligned-probe.duckdb")
    rows_of = {table: shipped.frame(f"SELECT * FROM {table}").to_arrow() for table in ("steps", "verifications")}

    def size(name: str, n: int) -> int:
        writer = TraceWriter.create(tmp_path / f"{name}-{n}.duckdb")
        for _ in range(n):
            writer.append(rows_of)
        writer.close()
        return writer.path.stat().st_size

    ours = [size("ours", n) for n in (1, 10)]
    monkeypatch.setattr("tracekit.trace.writer.SMALL", {})
    short, long = (size("usual", n) for n in (1, 10))
    assert ours[0] < 0.7 * short
    assert ours[1] < long


@pytest.mark.parametrize("ending", ["", ".wal", ".journal"])
def test_what_a_recording_left_is_never_overwritten(tmp_path, ending):
    """A trace, and a log or a journal whose trace was moved away, hold rows: without force they stay, and their name is
    not taken.
    """
    left = tmp_path / f"t.duckdb{ending}"
    left.write_bytes(b"rows")
    with pytest.raises(TracekitError, match=f"{re.escape(left.name)}: exists.*--force"):
        TraceWriter.create(tmp_path / "t.duckdb")
    assert left.read_bytes() == b"rows"
    assert free_path(str(tmp_path / "t.duckdb")) == tmp_path / "t-2.duckdb"


def test_folder_in_the_way_is_one_clear_line(tmp_path):
    """A folder where the trace should be is not deleted, with force neither, and says so."""
    (tmp_path / "t.duckdb").mkdir()
    with pytest.raises(TracekitError, match="a folder; choose another name"):
        Replaced(tmp_path / "t.duckdb")
    assert (tmp_path / "t.duckdb").is_dir()


@pytest.mark.parametrize("ending", ["", ".wal", ".journal"])
def test_force_replaces_no_pipe(tmp_path, ending):
    """What is neither a file nor a folder, as a pipe or a device, is no trace, and stays."""
    os.mkfifo(pipe := tmp_path / f"t.duckdb{ending}")
    with pytest.raises(TracekitError, match=f"{re.escape(pipe.name)}: not a trace; --force replaces traces only"):
        Replaced(tmp_path / "t.duckdb")
    assert list(tmp_path.iterdir()) == [pipe]
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", [".", "/"])
def test_what_is_no_name_for_a_trace_is_one_clear_line(name):
    """The current folder, which an empty name is, too, and the root have no name that another could lie beside."""
    for where in (TraceWriter.create, Replaced, free_path):
        with pytest.raises(TracekitError, match="a folder; choose another name"):
            where(Path(name))


def test_a_trace_that_cannot_be_made_leaves_nothing(tmp_path, monkeypatch):
    """Where the tables do not fit on the disk, no file without tables stays behind."""
    monkeypatch.setattr(schema, "VIEWS", "no SQL")
    with pytest.raises(TracekitError, match="cannot be written"):
        TraceWriter.create(tmp_path / "t.duckdb")
    assert list(tmp_path.iterdir()) == []


def test_a_trace_that_no_room_is_left_for_leaves_nothing(tmp_path):
    """Where DuckDB makes the file and then has no room for its header, the file goes: it would block the next try."""
    code = """
        import resource, signal, sys
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        from pathlib import Path
        from tracekit.errors import TracekitError
        from tracekit.trace.writer import TraceWriter
        try:
            TraceWriter.create(Path(sys.argv[1]))
        except TracekitError as error:
            print(error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "t.duckdb")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "t.duckdb: cannot be written" in result.stdout, result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["missing", "empty file", "no run", "no step"])
def test_what_a_killed_recording_should_have_replaced_is_named(tmp_path, kind):
    """Killed before it held something, a recording with --force has left the old trace under another name."""
    path, old = _file(tmp_path, kind), tmp_path / "clock-replaced.duckdb"
    if kind != "no step":
        with pytest.raises(TracekitError) as error:
            open_trace(path)
        assert old.name not in str(error.value)
    old.write_bytes(b"precious")
    with pytest.raises(TracekitError, match=f"; what it should have replaced is {re.escape(str(old))}$"):
        open_trace(path)
    older = old.rename(old.with_stem("clock-replaced-2"))  # a second try has set something else aside, now gone
    with pytest.raises(TracekitError, match=f"; what it should have replaced is {re.escape(str(older))}$"):
        open_trace(path)


def _file(tmp_path, kind):
    path = tmp_path / "clock.duckdb"  # not taken for a lock
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
        TraceWriter.create(path).close()
    elif kind == "no step":
        TraceWriter.create(path).close()
        with duckdb.connect(str(path)) as con:
            con.execute(_RUN.format(version=schema.VERSION))
    elif kind in ("other version", "truncated"):
        TraceWriter.create(path).close()
        with duckdb.connect(str(path)) as con:
            con.execute(_RUN.format(version=99))
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


@contextlib.contextmanager
def _holding(path, connect="duckdb.connect({path!r})"):
    """Another process that holds ``path``."""
    code = f"import duckdb, sys; con = {connect.format(path=str(path))}; print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        other.stdout.readline()
        yield other
        other.stdin.close()


def test_file_being_written_names_its_writer(tmp_path):
    """While another process records into a file, opening it says which process that is."""
    path = tmp_path / "t.duckdb"
    TraceWriter.create(path).close()
    with _holding(path) as writer, pytest.raises(TracekitError, match=f"held by process {writer.pid}"):
        open_trace(path)


def test_force_does_not_touch_what_another_process_records(tmp_path):
    """Overwriting is for what was recorded, not for what is being recorded: that is refused, and left as it is."""
    path = tmp_path / "t.duckdb"
    TraceWriter.create(path).close()
    journal_of(path).write_bytes(b"rows")
    with _holding(path) as writer, pytest.raises(TracekitError, match=f"held by process {writer.pid}"):
        Replaced(path)
    assert {p.name for p in tmp_path.iterdir()} >= {"t.duckdb", "t.duckdb.journal"}
    Replaced(path).remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "replaced"),
    [("foreign database", False), ("foreign file", False), ("empty file", True), ("no run", True), ("truncated", True)],
)
def test_force_replaces_traces_only(tmp_path, kind, replaced):
    """Another program's database is not touched; what may have been a trace, damaged or of nothing, is replaced."""
    path = _file(tmp_path, kind)
    if replaced:
        Replaced(path).remove()
    else:
        with pytest.raises(TracekitError, match="not a trace; --force replaces traces only"):
            Replaced(path)
    assert path.exists() != replaced


def test_what_is_replaced_can_be_opened_and_put_back(tmp_path):
    """Meanwhile it is a trace of another name, that of nothing else; put back, it is what it was."""
    path, taken = tmp_path / "t.duckdb", tmp_path / "t-replaced.duckdb"
    TraceWriter.create(path).close()
    journal_of(path).write_bytes(b"rows")
    taken.write_bytes(b"")
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    replaced = Replaced(path)
    names = {"t-replaced.duckdb", "t-replaced-2.duckdb", "t-replaced-2.duckdb.journal"}
    assert {p.name for p in tmp_path.iterdir()} == names
    replaced.put_back()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
