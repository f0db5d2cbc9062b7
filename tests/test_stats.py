"""What `stats` says of a trace, against the trace itself."""

from __future__ import annotations

import shutil
from dataclasses import replace

import duckdb
import polars as pl
import pytest

from tracekit.engine import Engine, Probe
from tracekit.engine.record import record
from tracekit.report.stats import TOTAL, acceptance_by_position, summarise
from tracekit.trace.store import TraceFile, open_trace

from .conftest import N_MAX, requests


@pytest.fixture(scope="module", params=["probe", "live"])
def stopped(request, models, settings, tmp_path_factory) -> TraceFile:
    """A recording whose texts all end at a stop string, long before they are as long as they may be."""
    path = tmp_path_factory.mktemp("stats") / f"{request.param}.duckdb"
    probe = Probe(N_MAX, seed=1) if request.param == "probe" else None
    with Engine(models["plain"], f"static:n_max={N_MAX}", settings, trace=path, probe=probe) as engine:
        record(engine, [replace(r, stop=("\n",)) for r in requests(max_tokens=200)], baseline=False)
    return open_trace(path)


def test_no_draft_beyond_the_end_of_a_text_counts(stopped):
    """Where a text ended at a stop string, nobody knows what would have followed: only drafts inside it count."""
    rows = stopped.frame(
        "SELECT request, n_generated, n_drafted, draft_ids, tokens FROM verifications ORDER BY request, n_generated"
    )
    probing = stopped.runs["mode"][0] == "probe"
    n, right = [0] * (N_MAX + 1), [0] * (N_MAX + 1)
    for _, of in rows.group_by("request"):
        text = [token for tokens in of["tokens"] for token in tokens]
        for row in of.iter_rows(named=True):
            drafts, following = row["draft_ids"], text[row["n_generated"] :]
            drafts = drafts if probing else drafts[: row["n_drafted"]]
            for k in range(1, min(len(drafts), len(following)) + 1):
                n[k] += 1
                right[k] += drafts[:k] == following[:k]
    told = acceptance_by_position(stopped).filter(pl.col("category") == TOTAL)
    assert told["n"].to_list() == n[1:]
    assert told["ratio"].to_list() == pytest.approx([r / of for r, of in zip(right[1:], n[1:], strict=True)])


def test_a_category_may_be_called_all(probe_traces, tmp_path):
    """What is told of all categories together is not mixed with one of that name."""
    path = tmp_path / "t.duckdb"
    shutil.copy(probe_traces[0.0], path)
    with duckdb.connect(str(path)) as db:
        db.execute("UPDATE requests SET category = CASE WHEN category = 'code' THEN 'code' ELSE 'all' END")
    told = acceptance_by_position(open_trace(path))
    assert set(told["category"]) == {TOTAL, "all", "code"}
    assert not told.select("category", "position").is_duplicated().any()


def test_acceptance_of_a_repeated_prompt_is_no_surer(probe_traces, tmp_path):
    """The same requests in a second run: twice the drafts, the same ratios, the same intervals."""
    once, path = open_trace(probe_traces[0.8]), tmp_path / "twice.duckdb"
    shutil.copy(once.path, path)
    with duckdb.connect(path) as db:
        for table in ("requests", "request_ends", "verifications"):
            db.execute(f"INSERT INTO {table} SELECT * REPLACE (run + 1 AS run) FROM {table}")
    told, again = (acceptance_by_position(of) for of in (once, open_trace(path)))
    assert again["n"].to_list() == [2 * n for n in told["n"]]
    assert told.filter(pl.col("ratio").is_between(0.01, 0.99))["low"].is_not_null().any()
    wider = told["high"] - told["low"] > 2.1 * 1.96 * (told["ratio"] * (1 - told["ratio"]) / told["n"]).sqrt()
    assert wider.any()
    for name in ("ratio", "low", "high"):
        assert again.filter(wider)[name].to_list() == pytest.approx(told.filter(wider)[name].to_list())


@pytest.mark.parametrize(
    ("readings", "told"),
    [
        (["-1, -1, -1, -1"], []),
        (["-1, -1, 71.5, -1", "-1, -1, 70, -1"], ["GPU 0: 71 W (at most 72)"]),
        (["1980, 9, 380, 41", "-1, 9, 390, 43"], ["GPU 0: 1980 MHz (1980 - 1980), 385 W (at most 390), at most 43 C"]),
    ],
)
def test_what_a_gpu_did_not_tell_is_left_out(live_trace, tmp_path, readings, told):
    """Readings that are not there are no numbers, in no median and in no range; a GPU that told nothing has no note."""
    path = tmp_path / "t.duckdb"
    shutil.copy(live_trace, path)
    with duckdb.connect(path) as con:
        for values in readings:
            con.execute(f"INSERT INTO gpu_readings SELECT 0, 0, 0, {values}, 0.5, -1")
    notes = [note for note in summarise(open_trace(path)).notes if note.startswith("GPU")]
    assert notes == [f"{note} (medians and ranges of n = {len(readings)} readings)" for note in told]
