"""What a live trace does not know: bracketed in every number, and never recommended on a guess."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import tracekit
from tracekit.engine import Engine
from tracekit.errors import TracekitError
from tracekit.policy.spec import parse, parse_one
from tracekit.replay import kernel
from tracekit.replay.arrays import Positions
from tracekit.replay.league import League
from tracekit.replay.simulate import counts, rounds
from tracekit.replay.steps import Steps
from tracekit.trace.store import open_trace
from tracekit.tune.evidence import tune
from tracekit.tune.space import default_space

from .conftest import requests

TRACES = Path(__file__).parent.parent / "traces"
RECORDED = ("fallback:n_max=8,min_ratio=0.3,resume_after=16", "static:n_max=4", "fallback:n_max=8,scope=engine")
POLICIES = parse(
    "off,static:n_max=1..4/1,static:n_max=4,p_min=0.3,0.6,fallback:n_max=4,min_ratio=0.3,0.75,"
    "fallback:n_max=1,4,min_ratio=0.15,0.6,zero_trip=true,false,p_min=0,0.35,0.65"
)


def seen_under(policy: str, probe: Positions) -> Positions:
    """What a live trace of ``policy`` knows of the requests in ``probe``."""
    match, known = np.zeros_like(probe.match), np.zeros_like(probe.known)
    for first, steps in zip(probe.first, rounds(parse_one(policy), probe), strict=True):
        at = first
        for drafted, accepted in steps:
            match[at], known[at] = accepted, 255 if accepted < drafted else drafted
            at += accepted + 1
            if at >= len(match):
                break
    return replace(probe, match=match, known=known, probs=np.full_like(probe.probs, -1.0), mode="live")


@pytest.fixture(scope="module")
def truth() -> League:
    """The league of a probe trace, which knows every position."""
    return tracekit.open(TRACES / "reference-aligned-probe.duckdb").league


@pytest.mark.parametrize("recorded", RECORDED)
def test_drafts_that_are_stopped_and_never_judged_are_in_the_interval(recorded):
    """Where drafts cost much, a fallback whose drafts are too improbable to be verified, so that it never trips, is
    slower than with none right or with all; its interval holds that, too.
    """
    truth = tracekit.open(TRACES / "h200" / "8b-aligned.duckdb").league
    live = League(seen_under(recorded, truth.positions), truth.cost, truth.trace, truth.priced)
    told, true = live.table(POLICIES), truth.table(POLICIES)
    assert (told["speedup_low"] <= true["speedup"] + 1e-9).all()
    assert (told["speedup_high"] >= true["speedup"] - 1e-9).all()


@pytest.mark.parametrize("recorded", RECORDED)
def test_intervals_hold_the_truth(truth, recorded):
    """Whatever policy was recorded live, every other's interval spans what a probe finds, ``p_min`` included."""
    live = League(seen_under(recorded, truth.positions), truth.cost, truth.trace, truth.priced)
    told, true = live.table(POLICIES), truth.table(POLICIES)
    assert (told["speedup_low"] <= true["speedup"] + 1e-9).all()
    assert (told["speedup_high"] >= true["speedup"] - 1e-9).all()
    assert (
        told.filter(told["exact_fraction"] == 1)["drafted"] == true.filter(told["exact_fraction"] == 1)["drafted"]
    ).all()
    assert (told["regret"] >= 0).all()
    assert live.clairvoyant_speed() >= truth.clairvoyant_speed()
    by = live.by_category(parse_one("static:n_max=3"))
    held = truth.by_category(parse_one("static:n_max=3"))["speedup"]
    assert ((by["speedup_low"] <= held) & (held <= by["speedup_high"])).all()


def test_a_policy_that_never_came_to_its_n_max_is_replayed(truth):
    """A trace answers every policy that stays within its drafts, however many it might have asked for."""
    recorded = parse_one("streaks:n_max=8,n_streak=200")  # at one draft throughout
    seen = seen_under(recorded.label, truth.positions)
    live = replace(seen, probs=seen.probs[:, :1])
    assert rounds(recorded, live) == rounds(recorded, truth.positions)
    assert counts([recorded], live)[:, :, kernel.INEXACT].sum() == 0
    with pytest.raises(
        TracekitError, match="more drafts than the 1 that the trace has; record with --mode probe --n-max 8"
    ):
        counts([parse_one("static:n_max=8")], live)


def test_an_interval_of_one_request_spans_what_is_not_known(truth):
    """A single request, and one queue of them, tell of no others, but not less of what the trace does not know."""
    live = League(seen_under("static:n_max=1", truth.positions), truth.cost, truth.trace, truth.priced)
    one, true_one = (League(of.positions.at([5]), of.cost) for of in (live, truth))
    queue, two = parse_one("fallback:n_max=2,zero_trip=false,scope=engine"), parse_one("static:n_max=2")
    for league, knowing, policy in ((live, truth, queue), (one, true_one, two)):
        told, true = (of.table([policy]).row(0, named=True) for of in (league, knowing))
        assert told["exact_fraction"] < 1
        for name in ("tokens_per_second", "speedup"):
            assert told[f"{name}_low"] < told[f"{name}_high"]
            assert told[f"{name}_low"] <= true[name] <= told[f"{name}_high"]
            assert true[f"{name}_low"] is None
    assert one.table([parse_one("static:n_max=1")])["speedup_low"].is_null().all()


def test_requests_without_names_are_apart_in_time(models, settings, tmp_path):
    """Where prompts have no ids, as in a server, every request is a block of its own for drift and intervals."""
    path, prose = tmp_path / "t.duckdb", requests()[1].prompt
    with Engine(models["plain"], settings=settings, trace=path) as engine:
        for policy in ("off", "static:n_max=0", "static:n_max=6") * 4:
            engine.set_arm(mtp=policy != "off")
            engine.generate(prose, max_tokens=60, policy=policy)
    steps = Steps.read(open_trace(path), 6)
    assert len(np.unique(steps.block)) == 12
    cost = League.of(open_trace(path)).cost
    assert (cost.boot.std(0)[cost.prices != 0] > 0).any()


@pytest.mark.parametrize("recorded", RECORDED)
def test_tune_recommends_no_guess(truth, recorded):
    """What is recommended on a live trace is faster than no MTP in truth, or it is ``off``."""
    live = League(seen_under(recorded, truth.positions), truth.cost, truth.trace, truth.priced)
    found = tune(live, default_space())
    if found.policy.name == "off":
        assert "--mode probe" in found.evidence.advice
        return
    assert truth.table([found.policy])["speedup"][0] > 1
    assert truth.by_category(found.policy)["speedup"].min() >= 1 / 1.02
    assert found.evidence.exact_fraction == 1 or "the interval spans the rest" in found.evidence.advice


def test_requests_that_never_drafted_belong_to_the_workload(truth):
    """A trip that outlives its request leaves others without a draft; they take their time all the same."""
    seen = seen_under("fallback:n_max=8,scope=engine", truth.positions)
    assert seen.n_requests == truth.positions.n_requests
    policy = parse_one("fallback:n_max=8,scope=engine")
    live = League(seen, truth.cost, truth.trace, truth.priced).table([policy])
    assert live.drop("regret").equals(truth.table([policy]).drop("regret"))


def test_context_beyond_what_was_timed_is_said(truth):
    """Prices of a short context applied to a long one: the league warns, and so does a recommendation."""
    long = replace(truth.positions, n_prompt=truth.positions.n_prompt + 60_000, n_ctx=truth.positions.n_ctx + 60_000)
    league = League(long, truth.cost, truth.trace, truth.priced)
    assert "times were measured up to 512" in league.warning
    assert not truth.warning
