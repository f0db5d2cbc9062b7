"""Recording never hurts: off without a word, crash-safe, quiet about a full disk, and honest about its cost."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import numpy as np
import pytest

from tracekit.engine import Engine, Probe, Request
from tracekit.engine.provenance import run_facts
from tracekit.engine.record import record
from tracekit.engine.recorder import Recorder
from tracekit.engine.sampling import Sampling
from tracekit.errors import TracekitError
from tracekit.policy.rule import SHIPPED
from tracekit.policy.spec import parse_one
from tracekit.report.stats import summarise
from tracekit.report.tables import stats_tables
from tracekit.trace.journal import Journal, journal_of
from tracekit.trace.store import open_trace


def test_off_by_default(models, settings, tmp_path, monkeypatch):
    """Without being asked the engine records nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRACEKIT_TRACE", raising=False)
    with Engine(models["plain"], parse_one("static:n_max=2"), settings) as engine:
        engine.generate("import", max_tokens=8)
        assert engine.recorder is None
    assert os.listdir(tmp_path) == []


def test_environment_variable_records_and_never_overwrites(models, settings, tmp_path, monkeypatch):
    """TRACEKIT_TRACE records every engine, each into a file of its own."""
    monkeypatch.setenv("TRACEKIT_TRACE", str(tmp_path / "t.duckdb"))
    for _ in range(2):
        with Engine(models["plain"], parse_one("static:n_max=2"), settings) as engine:
            done = engine.generate("import", max_tokens=8)
    assert sorted(os.listdir(tmp_path)) == ["t-2.duckdb", "t.duckdb"]
    frame = open_trace(tmp_path / "t-2.duckdb").frame(
        "SELECT flatten(list(tokens ORDER BY n_generated)) AS t FROM verifications"
    )
    assert frame["t"][0].to_list() == done.tokens


def test_file_that_exists_is_refused(models, settings, tmp_path):
    """Recording into a file that exists is refused before the model runs, and the file is left alone."""
    path = tmp_path / "t.duckdb"
    path.write_text("precious")
    with pytest.raises(TracekitError, match="--force"):
        Engine(models["plain"], settings=settings, trace=path)
    assert path.read_text() == "precious"


def _full(*_):
    raise OSError("disk full")


def test_force_replaces_a_trace_only_when_there_is_something_to_replace_it(models, settings, tmp_path, monkeypatch):
    """The old trace stays where nothing is served, or the new one cannot be made; it goes with the first steps."""
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], settings=settings, trace=path) as engine:
        engine.generate("import", max_tokens=8)
    old = path.read_bytes()
    forced = {"settings": settings, "trace": path, "force": True}
    with Engine(models["plain"], **forced) as engine, pytest.raises(TracekitError, match="the prompt is empty"):
        record(engine, [Request("import", max_tokens=8, prompt_id="a"), Request("", prompt_id="b")], baseline=False)
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], old)
    with monkeypatch.context() as full:
        full.setattr(Journal, "__init__", _full)
        with pytest.raises(TracekitError, match="cannot be written .disk full"):
            Engine(models["plain"], **forced)
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], old)
    with monkeypatch.context() as full:
        full.setattr(Journal, "append", _full)
        with Engine(models["plain"], **forced) as engine:
            engine.generate("class", max_tokens=9)
    assert (engine.recorder, list(tmp_path.iterdir()), path.read_bytes()) == (None, [path], old)
    with Engine(models["plain"], **forced) as engine:
        monkeypatch.setattr(engine._target, "decode", _full)
        with pytest.raises(OSError, match="disk full"):
            engine.generate("import", max_tokens=8)
        engine.recorder._flush()  # a request whose first decode never came back is not yet anything
        assert path.with_stem("t-replaced").read_bytes() == old
    assert (list(tmp_path.iterdir()), path.read_bytes()) == ([path], old)
    with Engine(models["plain"], **forced) as engine:
        engine.generate("class", max_tokens=9)
    assert list(tmp_path.iterdir()) == [path]
    assert open_trace(path).frame("SELECT n_generated FROM request_ends")["n_generated"].to_list() == [9]


def test_what_a_request_brought_of_its_own_is_in_the_trace(models, settings, tmp_path):
    """Requests of several policies and samplings beside each other: the trace tells which was which, and stats do."""
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], parse_one("static:n_max=2"), settings, trace=path) as engine:
        engine.generate("import", max_tokens=8)
        engine.generate("import", max_tokens=8, policy="fallback:n_max=4", sampling=Sampling(0.8, 20, 0.9, 0.1, 7))
        engine.set_arm(mtp=False)
        engine.generate("import", max_tokens=8)
    trace = open_trace(path)
    found = trace.frame("SELECT policy, temp, top_k, top_p, min_p, seed, arm FROM requests ORDER BY request").rows()
    greedy = 0.0, 40, *map(np.float32, (0.95, 0.05)), 0
    assert found[0] == ("static:n_max=2", *greedy, "live")
    assert found[1] == ("fallback:n_max=4", np.float32(0.8), 20, *map(np.float32, (0.9, 0.1)), 7, "live")
    assert found[2] == ("off", *greedy, "no_mtp")
    summary = summarise(trace)
    assert summary.requests["policy"].to_list() == ["fallback:n_max=4", "static:n_max=2", None]
    assert [c.header for c in stats_tables(summary)[1].columns][:3] == ["arm", "policy", "category"]


def test_every_number_of_a_completion_is_in_the_trace(models, settings, tmp_path):
    """Requests, verifications and steps add up to what the engine returned."""
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], parse_one("fallback:n_max=5,min_ratio=0.3,p_min=0.2"), settings, trace=path) as engine:
        done = list(
            engine.run([Request(p, max_tokens=30, prompt_id=p) for p in ("import os\n", "class A:\n", "def f(")])
        )
    trace = open_trace(path)
    for d in done:
        row = trace.frame("SELECT * FROM summary WHERE prompt_id = $p", p=d.request.prompt_id).row(0, named=True)
        assert (row["n_generated"], row["verifications"], row["drafted"], row["accepted"]) == (
            len(d.tokens),
            d.verifications,
            d.drafted,
            d.accepted,
        )
        end = trace.frame("SELECT * FROM request_ends WHERE request = $r", r=d.number).row(0, named=True)
        assert (end["n_generated"], end["stop"], end["prompt_us"]) == (len(d.tokens), d.stop, d.prompt_us)
    steps = trace.frame("SELECT * FROM steps ORDER BY step")
    parts = sum(steps[c] for c in ("draft_us", "catchup_us", "target_us", "sample_us", "policy_us"))
    assert (parts <= steps["wall_us"] + 5).all()
    stops = set(trace.frame("SELECT DISTINCT stop FROM verifications")["stop"])
    assert stops <= {"off", "n_max", "p_min", "room"}
    after_p_min = trace.frame("SELECT * FROM verifications WHERE stop = 'p_min'")
    assert (after_p_min["draft_probs"].list.len() == after_p_min["n_drafted"] + 1).all()
    assert (after_p_min["draft_probs"].list.last() < 0.2).all()


def test_provenance_is_complete(models, settings, tmp_path):
    """A trace says which model, build, machine and settings it came from, and what recording it cost."""
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], settings=settings, trace=path, probe=Probe(settings.n_max, seed=7)) as engine:
        record(engine, [Request("import os\n", max_tokens=200, prompt_id="p")], baseline=True)
        sha = engine.model.sha256
    run = open_trace(path).runs.row(0, named=True)
    assert run["model_sha256"] == sha
    assert run["mode"] == "probe"
    assert all(
        run[c] for c in ("trace_id", "llama_cpp", "device", "model_arch", "model_desc", "tracekit_version", "wall_us")
    )
    assert '"flash_attn": "off"' in run["settings"]
    assert '"probe_seed": 7' in run["settings"]
    assert "processor" in run["machine"]
    assert 0 < run["record_us"] < run["wall_us"]
    assert any("recording took" in note for note in summarise(open_trace(path)).notes) == (run["wall_us"] > 100_000)


def test_policy_file_of_ones_own_is_in_the_provenance(models, settings, tmp_path):
    """The trace keeps the text of the policy that decided; a shipped one comes with its version of tracekit."""
    mine, path = tmp_path / "mine.py", tmp_path / "t.duckdb"
    mine.write_text((SHIPPED / "static.py").read_text() + "# mine\n")
    for policy, text in ((f"{mine}:n_max=2", mine.read_text()), ("static:n_max=2", None)):
        with Engine(models["plain"], policy, settings, trace=path, force=True) as engine:
            engine.generate("import", max_tokens=4)
            sha = engine.policy.rule.sha256 if text else None
        kept = json.loads(open_trace(path).runs["settings"][0])
        assert (kept.get("policy_source"), kept.get("policy_sha256")) == (text, sha)


_GENERATE = """
    import sys, time
    from tracekit.engine import Engine, Settings
    engine = Engine(sys.argv[1], "static:n_max=3", Settings(n_max=6, n_ctx=4096, threads=1), trace=sys.argv[2])
    for i in range(10000):
        done = engine.generate("import os", max_tokens=50)
        print(i, len(done.tokens), flush=True)
"""


def test_kill_loses_at_most_the_last_second(models, tmp_path):
    """After kill -9 in mid-recording the file opens and holds everything but the last second (and a half: the machine
    may be busy).
    """
    path = tmp_path / "t.duckdb"
    command = [sys.executable, "-c", textwrap.dedent(_GENERATE), str(models["plain"]), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        started = None
        for line in process.stdout:
            started = started or time.monotonic()
            before_last_second = time.monotonic() - started
            finished = int(line.split()[0])
            if before_last_second > 1.5 and "kept" not in locals():
                kept = finished
            if before_last_second > 3.0:
                break
        process.send_signal(signal.SIGKILL)
    assert journal_of(path).exists()
    trace = open_trace(path)
    assert list(tmp_path.iterdir()) == [path]
    requests = trace.frame("SELECT count(*) AS n FROM request_ends")["n"][0]
    assert requests >= kept > 0
    assert trace.runs["wall_us"][0] is None
    assert "cut off" in summarise(trace).headline


def test_journal_waits_less_than_a_second(models, settings, tmp_path):
    """Between its entries a recorder lets less pass than the second that a kill may cost, writing included."""
    with Engine(models["plain"], settings=settings, trace=tmp_path / "t.duckdb") as engine:
        assert engine.recorder._interval_s <= 0.9


@pytest.mark.parametrize("verb", ["record", "verify"])
def test_a_verb_asked_to_end_tidies_up(models, tmp_path, verb):
    """SIGTERM in mid-run: what was recorded is folded into the trace, and a line says so; nothing temporary is left."""
    trace, temporary = tmp_path / "t.duckdb", tmp_path / "tmp"
    temporary.mkdir()
    wanted = ["record", "--prompts", "tune", "-o", trace] if verb == "record" else ["verify", "static:n_max=2"]
    options = ["--max-tokens", "400", "--threads", "1"]
    command = [sys.executable, "-m", "tracekit", wanted[0], models["plain"], *wanted[1:], *options]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True, env=environment) as process:
        late = time.monotonic() + 60
        while not any(p.stat().st_size > 10_000 for p in tmp_path.rglob("*.journal")) and time.monotonic() < late:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert "tracekit: terminated" in said.splitlines()
    assert "Traceback" not in said
    assert (f"what was recorded until then is in {trace}" in said) == (verb == "record")
    assert list(temporary.iterdir()) == []
    if verb == "record":
        assert sorted(tmp_path.iterdir()) == [trace, temporary]
        recorded = open_trace(trace)
        assert recorded.frame("SELECT count(*) AS n FROM steps")["n"][0] > 10
        assert recorded.runs["wall_us"][0] is None


def test_long_recording_is_folded_on_the_way(models, settings, tmp_path):
    """However often the journal is folded into the trace while it grows, every row is there once."""
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], "static:n_max=3", settings, trace=tmp_path / "other.duckdb") as engine:
        facts = run_facts(engine.model, None, engine.settings, engine.policy, None, engine.placement, "partial")
        recorder = Recorder(path, facts, interval_s=0.001, journal_bytes=2000)
        kept, engine._loop.observer = engine.recorder, recorder
        done = [engine.generate(p, max_tokens=60) for p in ("import os\n", "class A:\n", "def f(") * 3]
        late = time.monotonic() + 30
        while recorder._pending or recorder._journal.n_bytes > 2000:  # of some 80,000
            assert time.monotonic() < late
            time.sleep(0.01)
        engine._loop.observer = kept
        recorder.close(n_checked=5)
    assert not recorder.failed
    trace = open_trace(path)
    tokens = trace.frame(
        "SELECT flatten(list(tokens ORDER BY n_generated)) AS t FROM verifications GROUP BY request ORDER BY request"
    )
    assert tokens["t"].to_list() == [d.tokens for d in done]
    steps = trace.frame("SELECT step, record_us, wall_us FROM steps")
    assert steps["step"].to_list() == list(range(steps.height))
    assert (steps["record_us"] >= 0).all()
    run = trace.runs.row(0, named=True)
    assert run["record_us"] == steps["record_us"].sum()
    assert run["wall_us"] >= steps["wall_us"].sum()
    assert run["n_checked"] == 5


_FOLD_ALWAYS = """
    import sys
    from tracekit.engine import Engine, Settings
    from tracekit.engine.provenance import run_facts
    from tracekit.engine.recorder import Recorder
    engine = Engine(sys.argv[1], "static:n_max=3", Settings(n_max=6, threads=1))
    facts = run_facts(engine.model, None, engine.settings, engine.policy, None, engine.placement, "partial")
    engine._loop.observer = Recorder(sys.argv[2], facts, interval_s=0.005, journal_bytes=20_000)
    while True:
        engine.generate("import os", max_tokens=50)
        print("recording", flush=True)
"""


@pytest.mark.parametrize("seconds", [0.2, 0.5, 0.8])
def test_kill_in_the_middle_of_folding_keeps_every_row_once(models, tmp_path, seconds):
    """Whenever a recorder that folds all the time is killed, its steps and tokens are there without a gap, and once."""
    path = tmp_path / "t.duckdb"
    command = [sys.executable, "-c", textwrap.dedent(_FOLD_ALWAYS), str(models["plain"]), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
    trace = open_trace(path)
    steps = trace.frame("SELECT step FROM steps ORDER BY step")["step"].to_list()
    assert steps == list(range(len(steps)))
    assert len(steps) > 10
    tokens = trace.frame(
        "SELECT sum(len(tokens)) AS there, max(n_generated + len(tokens)) AS emitted FROM verifications "
        "GROUP BY request"
    )
    assert tokens["there"].to_list() == tokens["emitted"].to_list()
    assert list(tmp_path.iterdir()) == [path]


def test_when_llama_cpp_ends_the_process(models, tmp_path):
    """An assertion of llama.cpp's, or a CUDA error, ends the process: one line says which, and the trace is there."""
    path = tmp_path / "t.duckdb"
    code = """
        import sys, time
        from tracekit.engine import Engine, Settings, lib
        with Engine(sys.argv[1], "static:n_max=3", Settings(n_max=6, threads=1), trace=sys.argv[2]) as engine:
            engine.generate("import os", max_tokens=20)
            time.sleep(1.5)
            lib._ggml().ggml_abort(b"/home/x/ggml-cuda.cu", 109, b"CUDA error: %s/%s", b"a", b"b")
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(models["plain"]), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == -signal.SIGABRT
    assert result.stderr == (
        "tracekit: error: llama.cpp ends this process: CUDA error: a/b, ggml-cuda.cu:109; "
        "a trace that was being recorded keeps all but its last second\n"
    )
    assert len(open_trace(path).frame("SELECT tokens FROM verifications").explode("tokens")) == 20


def test_full_disk_stops_recording_and_nothing_else(models, tmp_path):
    """When the file cannot grow, one message says so, generation goes on, and what was committed stays readable."""
    path = tmp_path / "t.duckdb"
    code = """
        import logging, resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        from tracekit.engine import Engine, Settings
        with Engine(sys.argv[1], "static:n_max=3", Settings(n_max=6, threads=1), trace=sys.argv[2]) as engine:
            n = 0
            while not engine.recorder.failed:
                engine.generate("import os", max_tokens=200)
                n += 1
                assert n < 2000
            print(len(engine.generate("import os", max_tokens=20).tokens))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(models["plain"]), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "20"
    assert result.stderr.count("recording into") == 1
    assert "Traceback" not in result.stderr
    assert open_trace(path).frame("SELECT count(*) AS n FROM verifications")["n"][0] > 100


def test_disk_that_fills_up_at_the_end_is_told(models, tmp_path):
    """Where the trace cannot be written back into its file the recording has failed and says so; its rows are in what
    lies beside it, and back in the file once there is room.
    """
    path = tmp_path / "t.duckdb"
    code = """
        import logging, resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        logging.basicConfig(level=logging.ERROR, format="%(message)s")
        from tracekit.engine import Engine, Settings
        with Engine(sys.argv[1], "static:n_max=3", Settings(n_max=6, threads=1), trace=sys.argv[2]) as engine:
            recorder = engine.recorder
            engine.generate("import os", max_tokens=20)
        print(bool(recorder.failed))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(models["plain"]), str(path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout.strip()) == (0, "True"), result.stderr
    assert result.stderr.count("recording into") == 1
    assert open_trace(path).frame("SELECT count(*) AS n FROM request_ends")["n"][0] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_one_bad_request_costs_the_trace_that_request(models, settings, tmp_path, caplog, monkeypatch):
    """A number that no column holds (the engine refuses those it knows of) is left out, once said so; every other
    request is there, and the run counts as complete.
    """
    monkeypatch.setattr(Request, "check", lambda request: None)
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], "static:n_max=2", replace(settings, n_ctx=64), trace=path) as engine:
        for name, n in (("a", 8), ("too many", 1 << 40), (7, 8), ("far too many", 1 << 70), ("b", 8)):
            engine.generate("import", max_tokens=n, prompt_id=name)
    trace = open_trace(path)
    assert trace.frame("SELECT prompt_id FROM requests ORDER BY request")["prompt_id"].to_list() == ["a", "7", "b"]
    assert trace.frame("SELECT count(*) AS n FROM request_ends")["n"][0] == 5
    assert trace.runs["wall_us"][0] > 0
    assert ["leaves out" in record.message for record in caplog.records] == [True]


def _recording(engine, path, **options):
    """A recorder of ``engine`` beside its own, which is left out of it."""
    facts = run_facts(engine.model, None, engine.settings, engine.policy, None, engine.placement, "partial")
    engine._loop.observer = recorder = Recorder(path, facts, interval_s=0.01, **options)
    return recorder


def test_whatever_breaks_the_writer_is_told_and_nothing_piles_up(models, settings, tmp_path, caplog):
    """When the writing thread meets what nobody thought of, recording stops with one message, and counts as cut off."""

    def sensors(run, t_us):
        raise RuntimeError("the driver has gone")

    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], "static:n_max=2", settings) as engine:
        recorder = _recording(engine, path, sensors=sensors)
        engine.generate("import", max_tokens=8)
        late = time.monotonic() + 30
        while not recorder.failed:
            assert time.monotonic() < late
            time.sleep(0.01)
        assert len(engine.generate("import", max_tokens=8).tokens) == 8
        assert not recorder._pending
        with pytest.raises(TracekitError, match="the driver has gone"):
            recorder.demand()
        recorder.close()
    assert open_trace(path).runs["wall_us"][0] is None
    assert ["the driver has gone" in record.message for record in caplog.records] == [True]


def test_engine_lets_go_of_everything_however_recording_ends(models, settings, tmp_path, monkeypatch):
    """Contexts and models are freed, too, when closing the recorder fails."""
    engine = Engine(models["plain"], settings=settings, trace=tmp_path / "t.duckdb")
    target, recorder = engine._target, engine.recorder

    def fails(**_):
        recorder_close()
        raise KeyboardInterrupt

    recorder_close = recorder.close
    monkeypatch.setattr(recorder, "close", fails)
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert (engine.model, engine._target) == (None, None)
    assert not target.handle


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_leaving_with_an_exception_leaves_a_trace_that_says_so(models, settings, tmp_path, error):
    """Interrupted half-way the file is whole and closed, and its run counts as cut off."""
    path = tmp_path / "t.duckdb"

    def leave():
        with Engine(models["plain"], settings=settings, trace=path) as engine:
            engine.generate("import", max_tokens=8)
            raise error

    with pytest.raises(error):
        leave()
    assert list(tmp_path.iterdir()) == [path]
    trace = open_trace(path)
    assert trace.frame("SELECT n_generated FROM request_ends")["n_generated"].to_list() == [8]
    assert "cut off" in summarise(trace).headline


def test_environment_variable_never_stops_an_engine(models, settings, tmp_path, monkeypatch, caplog):
    """Where TRACEKIT_TRACE cannot be written, one line says so and the engine runs; asked for by name it is refused."""
    path = tmp_path / "missing" / "t.duckdb"
    monkeypatch.setenv("TRACEKIT_TRACE", str(path))
    with Engine(models["plain"], settings=settings) as engine:
        assert len(engine.generate("import", max_tokens=8).tokens) == 8
        assert engine.recorder is None
    assert ["nothing is recorded" in record.message for record in caplog.records] == [True]
    with pytest.raises(TracekitError, match="cannot be written"):
        Engine(models["plain"], settings=settings, trace=path)


def test_name_that_is_taken_meanwhile_is_left_to_whoever_took_it(models, settings, tmp_path, monkeypatch):
    """Of two engines that begin with one TRACEKIT_TRACE together, the later takes the next name."""
    monkeypatch.setenv("TRACEKIT_TRACE", str(tmp_path / "t.duckdb"))
    names = ["t.duckdb", "t.duckdb", "t-2.duckdb"]  # the second: as found free before the first was made
    monkeypatch.setattr("tracekit.engine.recorder.free_path", lambda wanted: tmp_path / names.pop(0))
    with Engine(models["plain"], settings=settings) as one, Engine(models["plain"], settings=settings) as two:
        assert (one.recorder.path.name, two.recorder.path.name) == ("t.duckdb", "t-2.duckdb")


_FORK = """
    import os, sys
    from tracekit.engine import Engine, Settings
    from tracekit.errors import TracekitError
    with Engine(sys.argv[1], "static:n_max=3", Settings(n_max=6, threads=1), trace=sys.argv[2]) as engine:
        engine.generate("import os", max_tokens=20, prompt_id="before")
        if (child := os.fork()) == 0:
            try:
                engine.generate("import os", max_tokens=20, prompt_id="child")  # waits for ever, or says why not
            except TracekitError as error:
                assert "started in another process" in str(error)
                engine.close()
                os._exit(0)
            os._exit(1)
        assert os.waitpid(child, 0)[1] == 0
        assert os.path.exists(sys.argv[2] + ".journal")
        engine.generate("import os", max_tokens=20, prompt_id="after")
"""


def test_a_forked_process_leaves_its_parents_trace_alone(models, tmp_path):
    """A child that ends, and closes what it has inherited, takes nothing out of the trace and adds nothing."""
    path = tmp_path / "t.duckdb"
    command = [sys.executable, "-c", textwrap.dedent(_FORK), str(models["plain"]), str(path)]
    subprocess.run(command, check=True, timeout=120)
    assert list(tmp_path.iterdir()) == [path]
    trace = open_trace(path)
    requests = trace.frame("SELECT prompt_id FROM requests ORDER BY request")["prompt_id"]
    assert requests.to_list() == ["before", "after"]
    assert trace.runs["wall_us"][0] > 0


def test_probe_of_cut_off_requests_is_usable(models, settings, tmp_path):
    """A cancelled request leaves a trace that can still be replayed."""
    from tracekit.replay.arrays import positions

    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], settings=settings, trace=path, probe=Probe(settings.n_max)) as engine:
        engine.set_arm(probing=True)
        number = engine.submit(Request("def f(x):\n", max_tokens=500, prompt_id="p"))
        for _ in range(40):
            engine.step()
        engine.cancel(number)
    assert positions(open_trace(path)).n_generated[0] > 20


def test_recording_is_quiet_when_all_is_well(models, settings, tmp_path, caplog):
    """Nothing is logged by an engine that records without trouble."""
    with (
        caplog.at_level(logging.INFO, "tracekit.engine"),
        Engine(models["plain"], settings=settings, trace=tmp_path / "t.duckdb") as engine,
    ):
        engine.generate("import", max_tokens=8)
    assert not caplog.records
