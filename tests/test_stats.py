"""What `stats` says of a trace, against the trace itself."""

from __future__ import annotations

from dataclasses import replace

import polars as pl
import pytest

from tracekit.engine import Engine, Probe
from tracekit.engine.record import record
from tracekit.report.stats import acceptance_by_position
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
    told = acceptance_by_position(stopped).filter(pl.col("category") == "all")
    assert told["n"].to_list() == n[1:]
    assert told["ratio"].to_list() == pytest.approx([r / of for r, of in zip(right[1:], n[1:], strict=True)])
