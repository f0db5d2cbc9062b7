"""The exactness argument on real runs: a probe trace tells, step by step, what the engine will do under any policy."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tracekit.engine import Engine, Probe, Request
from tracekit.errors import TracekitError
from tracekit.policy.spec import parse_one
from tracekit.replay import kernel
from tracekit.replay.arrays import ANY, positions
from tracekit.replay.costs import layout
from tracekit.replay.league import League
from tracekit.replay.simulate import counts, rounds
from tracekit.replay.steps import Steps
from tracekit.report.tables import verdict_table
from tracekit.trace.store import open_trace
from tracekit.verify import Arm, Verdict, _judge

from .conftest import POLICIES, requests


@pytest.mark.parametrize("temp", [0.0, 0.8])
@pytest.mark.parametrize("text", POLICIES)
def test_replay_equals_live(engine, probe_traces, temp, text):
    """For every policy and prompt set, greedy and sampled: the replayed (drafted, accepted) of every step is the live
    one.
    """
    policy = parse_one(text)
    p = positions(open_trace(probe_traces[temp]))
    replayed = dict(zip(p.prompt_ids, rounds(policy, p), strict=True))
    wanted = sorted(requests(temp, per_category=2), key=lambda r: p.prompt_ids.index(r.prompt_id))  # as recorded
    with Engine(engine.model.path, policy, engine.settings) as fresh:
        for done in fresh.run(wanted):
            assert done.rounds == replayed[done.request.prompt_id], done.request.prompt_id
    assert counts([policy], p)[0][:, kernel.INEXACT].sum() == 0


HALVES = """
from typing import NamedTuple

class Params(NamedTuple):
    n_max: int = 6

class State(NamedTuple):
    level: int
    lucky: bool

def begin(params):
    return State(2.5, 3)

def decide(params, state, now):
    return (params.n_max if state.level >= 0.6 else 1 if state.lucky == 1 else 2), 0.0

def learn(params, state, now, seen):
    return (state.level * 0.5 + 0.5 * seen.n_accepted, seen.n_accepted * 0.5)
"""


def test_state_is_what_it_is_declared_to_be_in_both(engine, probe_traces, tmp_path):
    """Fractions in a field declared int, and numbers in one declared bool, run as they are replayed."""
    (tmp_path / "halves.py").write_text(HALVES)
    test_replay_equals_live(engine, probe_traces, 0.0, str(tmp_path / "halves.py"))


@pytest.mark.parametrize(
    "text", ["static:n_max=1", "static:n_max=2", "static:n_max=6", "static:n_max=6,p_min=0.4", "fallback:n_max=6"]
)
def test_replay_counts_the_shapes_of_live_decodes(engine, probe_traces, tmp_path, text):
    """How often a decode has another shape than the one before, how often that shape comes up again right after it
    (CUDA captures a graph then), how many plain decodes followed upon drafts or a prompt, and how soon, what was
    decoded and caught up, and how many cells it attended to: the walk counts what a live trace of the policy holds.
    """
    policy, path = parse_one(text), tmp_path / "live.duckdb"
    p = positions(open_trace(probe_traces[0.0]))
    wanted = sorted(requests(0.0, per_category=2), key=lambda r: p.prompt_ids.index(r.prompt_id))
    with Engine(engine.model.path, policy, engine.settings, trace=path) as fresh:
        list(fresh.run(wanted))
        fresh.set_arm(mtp=False)
        list(fresh.run(wanted[:1]))  # costs without a baseline are refused
    trace = open_trace(path)
    steps = Steps.read(trace, engine.settings.n_max)
    live = steps.take(np.arange(len(steps.wall)) < len(steps.wall) - len(rounds(parse_one("off"), p)[0]))
    counted = counts([policy], p)[0].sum(0)
    widths, catchups = (counted[of] for of in layout(engine.settings.n_max))
    several, drafting = live.width > 1, live.decodes > 0
    assert counted[kernel.STEPS] == len(live.wall)
    assert counted[kernel.OVER] == (live.mtp == 0).sum()
    assert (widths == np.bincount(live.width.astype(int), minlength=len(widths))).all()
    assert (catchups == np.bincount(live.rows[drafting].astype(int), minlength=len(catchups))).all()
    assert counted[kernel.DRAFT_ROUNDS] == drafting.sum()
    assert counted[kernel.DRAFT_DECODES] == live.decodes.sum()
    assert counted[kernel.KV_ONE] == live.kv[~several].sum()
    assert counted[kernel.KV] == live.kv[several].sum()
    assert counted[kernel.KV_WIDTH] == (live.kv * live.width)[several].sum()
    assert counted[kernel.KV_DRAFT] == (live.kv * live.decodes).sum()
    ahead = trace.frame("SELECT count(*) AS n, sum(n_ahead) AS rows FROM steps WHERE n_ahead > 0").row(0)
    assert tuple(counted[[kernel.PROMPT_CATCHUPS, kernel.PROMPT_CATCHUP_ROWS]]) == ahead
    assert counted[kernel.RESHAPES] == live.reshapes[live.width > 1].sum()
    assert counted[kernel.RESHAPES_ONE] == live.reshapes[live.width == 1].sum()
    assert counted[kernel.CAPTURES] == live.captures[live.width > 1].sum()
    assert counted[kernel.CAPTURES_ONE] == live.captures[live.width == 1].sum()
    assert counted[kernel.DRAFT_RESHAPES] == sum(live.draft_reshapes).sum()
    assert counted[kernel.DRAFT_CAPTURES] == sum(live.draft_captures).sum()
    assert counted[kernel.PAST_WIDTH] == (live.past * live.width).sum()
    assert counted[kernel.PAST_DRAFT] == live.draft_past.sum()
    assert counted[kernel.SETTLING] == live.settling.sum()
    assert counted[kernel.FIRSTS] == live.firsts.sum() == len(wanted)
    assert min(counted[[kernel.CAPTURES, kernel.CAPTURES_ONE]].sum(), counted[kernel.DRAFT_RESHAPES]) > 0


def test_probe_generates_what_the_engine_generates(engine, probe_traces):
    """The tokens in a probe trace are the ones the model generates without speculation."""
    for temp, path in probe_traces.items():
        frame = open_trace(path).frame(
            """SELECT prompt_id, flatten(list(tokens ORDER BY n_generated)) AS tokens
               FROM requests JOIN verifications USING (run, request) WHERE arm = 'probe' GROUP BY ALL"""
        )
        tokens = dict(frame.iter_rows())
        for request in requests(temp, per_category=2):
            done = engine.generate(request.prompt, max_tokens=request.max_tokens, sampling=request.sampling)
            assert tokens[request.prompt_id] == done.tokens


def test_probe_verifies_every_width(probe_traces):
    """A probe times every batch width and every number of rows to catch up, and its target never chose differently in
    another width.
    """
    trace = open_trace(probe_traces[0.0])
    seen = trace.frame(
        "SELECT DISTINCT n_drafted AS n FROM requests JOIN verifications USING (run, request) WHERE arm = 'probe'"
    )
    assert set(seen["n"]) == set(range(7))
    rows = trace.frame("SELECT DISTINCT n_catchup AS n FROM steps WHERE n_draft_decodes > 0")
    assert set(range(1, 8)) <= set(rows["n"])
    end = trace.runs.row(0, named=True)
    assert end["n_checked"] > 100
    assert end["n_diverged"] == 0


def test_requests_of_one_token_ask_for_more_tokens(models, settings, tmp_path):
    """There is nothing to replay after a prompt's own token; what to change is said, and not to probe, as it did."""
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], settings=settings, trace=path, probe=Probe(2)) as engine:
        engine.generate("import os\n", max_tokens=1)
    with pytest.raises(TracekitError, match="fewer than 2 tokens; record with a higher --max-tokens"):
        positions(open_trace(path))


@pytest.mark.parametrize("repeat", [0, 1])
def test_steps_are_compared_in_every_repeat(probe_traces, repeat):
    """Whichever repeat has another step than predicted, its request is not one of those that were as predicted."""
    league = League.of(open_trace(probe_traces[0.0]))
    arms = [Arm("no MTP", None), Arm("two", parse_one("static:n_max=2"))]
    p, runs = league.positions, {}
    wanted = [Request("", prompt_id=prompt_id) for prompt_id in p.prompt_ids]
    for a, arm in enumerate(arms):
        for r, steps in enumerate(rounds(arm.policy or parse_one("off"), p)):
            for k in range(2):
                other = [*steps[:-1], (9, 0)] if (a, r, k) == (1, 3, repeat) else steps
                runs[a, r, k] = SimpleNamespace(tokens=[0] * int(p.n_generated[r]), rounds=other), 1000.0
    verdict = _judge(league, arms, wanted, runs, 2)
    assert verdict.arms["equal_requests"].to_list() == [len(wanted), len(wanted) - 1]


def test_verdict_tells_what_its_prediction_rests_on(probe_traces, tmp_path):
    """What one should know before trusting prices, and that nothing was repeated; a file from before says neither."""
    league = League.of(open_trace(probe_traces[0.0]))
    busy = League(league.positions, replace(league.cost, spread_ratio=0.4), league.trace, league.priced)
    arms = [Arm("no MTP", None), Arm("off", parse_one("off"))]
    steps = enumerate(rounds(arms[1].policy, busy.positions))
    runs = {(a, r, 0): (SimpleNamespace(tokens=[0], rounds=of), 1000.0) for r, of in steps for a in range(2)}
    wanted = [Request("", prompt_id=prompt_id) for prompt_id in busy.positions.prompt_ids]
    verdict, path = _judge(busy, arms, wanted, runs, 1), tmp_path / "verdict.json"
    assert "as on a busy machine" in verdict.warning
    verdict.save(path)
    assert Verdict.load(path).warning == verdict.warning
    assert [list(verdict_table(Verdict.load(path)).columns[i].cells) for i in (3, 6)] == [
        [f"{verdict.arms['measured'][0]:.1f} (once)"] * 2,
        ["1.000", "1.000 (once)"],
    ]
    content = json.loads(path.read_text())
    content["arms"] = [{k: v for k, v in arm.items() if "speedup_" not in k} for arm in content["arms"]]
    path.write_text(json.dumps({k: v for k, v in content.items() if k != "warning"}))
    assert Verdict.load(path).warning == ""
    assert list(verdict_table(Verdict.load(path)).columns[6].cells) == ["1.000", "1.000"]


def test_live_trace_replays_its_own_policy_exactly(live_trace):
    """The policy that was recorded, and any that stays inside what it saw, replays exactly from a live trace."""
    trace = open_trace(live_trace)
    p = positions(trace)
    assert p.mode == "live"
    recorded = trace.frame(
        """SELECT prompt_id, list((n_drafted, n_accepted) ORDER BY n_generated) AS rounds
           FROM requests JOIN verifications USING (run, request) WHERE arm = 'live' AND n_generated > 0 GROUP BY ALL"""
    )
    recorded = {k: [tuple(x.values()) for x in v] for k, v in recorded.iter_rows()}
    policy = parse_one("fallback:n_max=6,min_ratio=0.4")
    assert dict(zip(p.prompt_ids, rounds(policy, p), strict=True)) == recorded
    stricter = parse_one("fallback:n_max=6,min_ratio=0.8")
    assert counts([policy, stricter, parse_one("off")], p)[:, :, kernel.INEXACT].sum() == 0


def test_live_trace_of_drafts_that_were_all_stopped_replays_its_policy(models, settings, tmp_path):
    """A policy whose improbable drafts never got as long as it asked is one that the trace knows all the same."""
    policy, path = parse_one("static:n_max=6,p_min=0.999"), tmp_path / "t.duckdb"
    with Engine(models["plain"], policy, settings, trace=path) as engine:
        done = engine.generate("The river was cold that night, and nobody", max_tokens=16, policy=policy)
    trace = open_trace(path)
    p = positions(trace)
    assert trace.frame("SELECT max(n_proposed) AS n FROM verifications")["n"][0] < 6 == p.n_max
    assert rounds(policy, p) == [done.rounds]
    assert counts([policy], p)[0][:, kernel.INEXACT].sum() == 0
    with pytest.raises(
        TracekitError, match="more drafts than the 6 that the trace has; record with --mode probe --n-max 7"
    ):
        counts([parse_one("static:n_max=7")], p)


def test_live_trace_brackets_what_it_does_not_know(live_trace, probe_traces):
    """Where a live trace has to guess it says so, and the truth lies between its guesses."""
    live, probe = positions(open_trace(live_trace)), positions(open_trace(probe_traces[0.0]))
    assert (live.known < ANY).any()
    policy = parse_one("static:n_max=3")
    order = [probe.prompt_ids.index(i) for i in live.prompt_ids]
    truth = counts([policy], probe)[0][order][:, kernel.ACCEPTED].sum()
    inexact = counts([policy], live)[0][:, kernel.INEXACT].sum()
    low, high = (counts([policy], live.guess(g))[0][:, kernel.ACCEPTED].sum() for g in ("none", "all"))
    assert inexact > 0
    assert low <= truth <= high
