"""Several recordings as one trace: nothing lost, nothing counted twice, and replay answers for all of them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace

import duckdb
import numpy as np
import pytest

import tracekit
from tracekit.engine import Engine, Probe
from tracekit.engine.record import record
from tracekit.errors import TracekitError
from tracekit.policy.spec import parse
from tracekit.replay.arrays import positions
from tracekit.replay.league import League
from tracekit.trace.merge import TABLES, merge
from tracekit.trace.store import open_trace

from .conftest import N_MAX, requests
from .test_cli import tracekit as cli


@pytest.fixture(scope="module")
def halves(models, settings, tmp_path_factory):
    """Two probe recordings of other prompts each, the second with another seed."""
    folder, wanted = tmp_path_factory.mktemp("halves"), requests(per_category=2)
    paths = []
    for i in (0, 1):
        paths.append(folder / f"{i}'s.duckdb")
        with Engine(models["plain"], settings=settings, trace=paths[i], probe=Probe(N_MAX, seed=i)) as engine:
            record(engine, wanted[i::2], baseline=True)
    return paths


@pytest.fixture(scope="module")
def merged(halves, tmp_path_factory):
    """Both in one."""
    return merge(halves, tmp_path_factory.mktemp("merged") / "all.duckdb")


def test_every_row_is_there(halves, merged):
    """All tables hold the rows of both, unchanged but for the number of the run."""
    parts = [open_trace(path) for path in halves]
    assert merged.runs["run"].to_list() == [0, 1]
    assert merged.trace_id == "+".join(part.trace_id for part in parts)
    for table in TABLES:
        found = merged.frame(f"SELECT * FROM {table} ORDER BY ALL")
        for n, part in enumerate(parts):
            own = part.frame(f"SELECT * REPLACE ({n}::SMALLINT AS run) FROM {table} ORDER BY ALL")
            assert found.filter(found["run"] == n).equals(own), table
        assert table == "gpu_readings" or found["run"].n_unique() == 2
    assert "tau" in merged.frame("FROM summary").columns


def test_replay_answers_for_all(halves, merged):
    """Positions are those of the parts one after another; every policy's counts add up; prices come from both."""
    parts = [positions(open_trace(path)) for path in halves]
    both = positions(merged)
    for name in ("n_generated", "n_prompt", "match", "known", "probs"):
        assert np.array_equal(getattr(both, name), np.concatenate([getattr(p, name) for p in parts]))
    assert both.prompt_ids == parts[0].prompt_ids + parts[1].prompt_ids
    policies = parse("static:n_max=1..6/1,fallback:n_max=6,static:n_max=6,p_min=0.6")
    tables = [League.of(open_trace(path)).table(policies) for path in halves]
    league = League.of(merged)
    for name in ("verifications", "drafted", "accepted", "trips", "n_requests", "n_tokens"):
        assert (league.table(policies)[name] == tables[0][name] + tables[1][name]).all()
    assert league.cost.n_steps == sum(League.of(open_trace(path)).cost.n_steps for path in halves)
    evidence = tracekit.open(merged.path).tune().evidence
    assert evidence.n_requests == both.n_requests
    assert evidence.trace_id == merged.trace_id


def test_merged_traces_merge(halves, merged, live_trace, tmp_path):
    """A merged trace is a trace: with a third one it makes three runs; with one of its own parts it is refused."""
    third = tmp_path / "third.duckdb"
    shutil.copy(halves[0], third)
    with duckdb.connect(str(third)) as con:
        con.execute("UPDATE runs SET trace_id = 'another'")
    assert merge([merged.path, third], tmp_path / "three.duckdb").runs["run"].to_list() == [0, 1, 2]
    with pytest.raises(TracekitError, match="holds a recording that .* holds too"):
        merge([merged.path, halves[1]], tmp_path / "twice.duckdb")
    with pytest.raises(TracekitError, match=r"live.duckdb: mode live, in .* probe"):
        merge([halves[0], live_trace], tmp_path / "modes.duckdb")


@pytest.mark.parametrize(
    "what", ["model", "settings", "alone", "twice", "exists", "input", "folder", "nowhere", "nameless"]
)
def test_what_cannot_be_merged(what, models, settings, halves, tmp_path):
    """Each is one line that names the file, nothing is left behind and nothing is overwritten."""
    output, paths = tmp_path / "out.duckdb", list(halves)
    if what in ("model", "settings"):
        paths[1] = tmp_path / "other.duckdb"
        name, threads = ("misaligned", settings.threads) if what == "model" else ("plain", settings.threads + 1)
        with Engine(models[name], settings=replace(settings, threads=threads), trace=paths[1], probe=Probe(N_MAX)) as e:
            e.generate("import", max_tokens=4)
    elif what == "alone":
        paths = paths[:1]
    elif what == "twice":
        paths[1] = paths[0]
    elif what == "exists":
        output.write_text("precious")
    elif what == "input":
        paths[0] = output
        shutil.copy(halves[0], output)
    elif what == "folder":
        output.mkdir()
    elif what == "nowhere":
        output = tmp_path / "no" / "out.duckdb"
    elif what == "nameless":
        output = ""
    before = {name: os.stat(tmp_path / name).st_size for name in os.listdir(tmp_path)}
    expected = {
        "model": "model_sha256", "settings": "threads", "alone": "two or more", "twice": "give it once",
        "exists": "--force", "input": "choose another name", "folder": "folder|exists",
        "nowhere": "cannot be written", "nameless": "a folder; choose another name",
    }  # fmt: skip  # what, and what is said
    with pytest.raises(TracekitError, match=expected[what]) as error:
        merge(paths, output)
    assert "\n" not in str(error.value)
    assert {name: os.stat(tmp_path / name).st_size for name in os.listdir(tmp_path)} == before


def test_variables_that_llama_cpp_heeds(halves, tmp_path):
    """What was recorded without CUDA's graphs, say, is not merged with what was recorded with them; runs of before
    these were noted are as ones without.
    """
    paths = [shutil.copy(half, tmp_path / f"{i}.duckdb") for i, half in enumerate(halves)]

    def noted(path, patch):
        with duckdb.connect(path) as db:
            db.execute("UPDATE runs SET machine = json_merge_patch(machine, ?)", [json.dumps(patch)])

    noted(paths[0], {"environment": {}})
    noted(paths[1], {"environment": None})
    merge(paths, tmp_path / "all.duckdb")
    noted(paths[1], {"environment": {"GGML_CUDA_DISABLE_GRAPHS": "1"}})
    with pytest.raises(TracekitError, match="environment {'GGML_CUDA_DISABLE_GRAPHS': '1'}, in .* None"):
        merge(paths, tmp_path / "more.duckdb")


def test_force_replaces_traces_only(halves, tmp_path):
    """With --force an old trace makes room once the new one is complete; another kind of file stays."""
    output = tmp_path / "out.duckdb"
    shutil.copy(halves[0], output)
    assert merge(halves, output, force=True).runs.height == 2
    assert os.listdir(tmp_path) == ["out.duckdb"]
    output.write_text("precious words")
    with pytest.raises(TracekitError, match="not a trace"):
        merge(halves, output, force=True)
    assert output.read_text() == "precious words"


def test_on_the_command_line(models, settings, halves, tmp_path):
    """What servers have left is put together, and said; prompts recorded twice count once where it matters."""
    output = tmp_path / "all.duckdb"
    result = cli("merge", *halves, "-o", output)
    assert result.stdout.startswith("2 runs, ")
    assert result.stderr.strip() == f"Wrote {output}"
    again = tmp_path / "again.duckdb"
    with Engine(models["plain"], settings=settings, trace=again, probe=Probe(N_MAX, seed=5)) as engine:
        again_with = [replace(r, sampling=replace(r.sampling, seed=99)) for r in requests(per_category=2)[:3]]
        record(engine, again_with, baseline=True)  # greedy: another seed is the same request
    result = cli("merge", output, again, "-o", tmp_path / "more.duckdb", "--json")
    assert json.loads(result.stdout)["runs"] == 3
    n = len(requests(per_category=2))
    told = cli("replay", tmp_path / "more.duckdb", "--policy", "static:n_max=1").stdout
    assert f"{n + 3} requests ({n} prompts)" in " ".join(told.split())
    assert f"{n} requests of" in " ".join(cli("replay", output, "--policy", "static:n_max=1").stdout.split())
    assert cli("merge", output, output, "-o", output, code=2).stderr.startswith("tracekit: error: ")
