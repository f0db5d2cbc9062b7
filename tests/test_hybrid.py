"""Recurrent memories, as in Qwen 3.5: rejected drafts are taken back through snapshots of the state."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from tracekit.engine import Engine, Probe
from tracekit.engine.doctor import examine
from tracekit.engine.record import record
from tracekit.errors import TracekitError
from tracekit.policy.spec import parse_one
from tracekit.replay import kernel
from tracekit.replay.arrays import positions
from tracekit.replay.costs import _PLAIN as PLAIN
from tracekit.replay.league import League
from tracekit.replay.serving import Serving
from tracekit.report.stats import summarise
from tracekit.trace.store import open_trace

from . import hybrid
from .conftest import N_MAX, POLICIES, requests


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small ``qwen35``."""
    return hybrid.write(tmp_path_factory.mktemp("models") / "hybrid.gguf")


@pytest.fixture(scope="module")
def plain(model, settings):
    """What the model says without MTP, by prompt: tokens."""
    with Engine(model, settings=settings, mtp=False) as engine:
        return {c.request.prompt_id: c.tokens for c in engine.run(requests())}


def test_doctor_knows_snapshots(model, models):
    """A hybrid model is told from one with attention only, and both work."""
    assert examine(model)["memory"] == "snapshot"
    assert examine(models["plain"])["memory"] == "partial"
    assert examine(model)["verdict"] == "MTP drafting works with this model"


def test_what_was_read_long_before_matters(plain):
    """The memory is no ornament: the same last token is followed by several others."""
    following: dict[int, set[int]] = {}
    for tokens in plain.values():
        for last, token in pairwise(tokens):
            following.setdefault(last, set()).add(token)
    assert sum(len(each) > 1 for each in following.values()) >= 10


@pytest.mark.parametrize("n_slots", [1, 3])
def test_drafting_changes_no_token(model, settings, plain, n_slots):
    """Under every policy, on one slot and on several that draft beside each other, tokens are those without MTP; drafts
    are accepted and rejected.
    """
    with Engine(model, settings=replace(settings, n_slots=n_slots)) as engine:
        for text in POLICIES:
            done = list(engine.run([replace(r, policy=text) for r in requests()]))
            assert {c.request.prompt_id: c.tokens for c in done} == plain, text
            if text == "static:n_max=6":
                drafted, accepted = (sum(getattr(c, what) for c in done) for what in ("drafted", "accepted"))
                assert 50 < accepted < drafted - 50


def test_replay_is_live(model, settings, plain, tmp_path):
    """A probe, which goes back after every token, answers every policy step for step."""
    path = tmp_path / "probe.duckdb"
    with Engine(model, settings=settings, trace=path, probe=Probe(N_MAX, seed=1)) as engine:
        done = record(engine, requests(), baseline=True)
    assert {c.request.prompt_id: c.tokens for c in done} == plain
    trace = open_trace(path)
    p = positions(trace)
    wanted = sorted(requests(), key=lambda r: p.prompt_ids.index(r.prompt_id))  # as recorded
    with Engine(model, settings=settings) as engine:
        for text in POLICIES:
            live = {c.request.prompt_id: c.rounds for c in engine.run([replace(r, policy=text) for r in wanted])}
            for prompt_id, rounds in zip(p.prompt_ids, Serving.of(trace).rounds(parse_one(text), p), strict=True):
                assert live[prompt_id] == rounds, (text, prompt_id)
    assert Serving.of(trace).memory == "snapshot"
    names = summarise(trace).baselines["baseline"].to_list()
    assert names[:3] == ["no MTP", "off, MTP loaded", "MTP idle"]
    cost = League.of(trace).cost
    assert cost.no_mtp[PLAIN].sum() < (cost.prices[PLAIN].sum() + cost.prices[kernel.OVER])  # snapshots take time


def test_batches_that_would_abort_llama_cpp_are_refused(model, settings):
    """A batch that cannot hold the rows of a snapshot is one line, not the end of the process."""
    for small in ({"n_ubatch": 8}, {"n_batch": 8}):
        with pytest.raises(TracekitError, match=r"must be more than n_max \+ 1, 8"):
            Engine(model, settings=replace(settings, n_max=7, **small))


def test_without_mtp_no_snapshots_are_taken(model, settings, plain):
    """The baseline is what a server without MTP does: another context, the same tokens; and back again."""
    with Engine(model, settings=settings) as engine:
        for mtp in (False, True, False, True):
            engine.set_arm(mtp=mtp)
            assert (engine._loop.target.n_snapshots > 0) == mtp
            done = engine.run([replace(r, policy="static:n_max=4" if mtp else "off") for r in requests()])
            assert {c.request.prompt_id: c.tokens for c in done} == plain
