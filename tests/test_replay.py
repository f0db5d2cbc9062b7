"""The simulator: compiled equals interpreted, counts add up, and nobody beats the clairvoyant."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student

from tracekit.errors import TracekitError
from tracekit.policy.rule import rule
from tracekit.policy.spec import parse, parse_one
from tracekit.replay import kernel, link, lockstep
from tracekit.replay.arrays import ANY
from tracekit.replay.clairvoyant import clairvoyant_us
from tracekit.replay.costs import CostModel, layout
from tracekit.replay.league import Interval, League
from tracekit.replay.serving import Serving
from tracekit.replay.simulate import arrays_of, counts, rounds, times
from tracekit.testing import random_positions

POLICIES = parse(
    "off,static:n_max=1,3,8,static:n_max=8,p_min=0.3,0.7,fallback,fallback:n_max=4,min_ratio=0.2,0.6,resume_after=0,7,"
    "fallback:n_max=8,min_ratio=0.5,scope=engine,resume_after=11"
)


DEEP = """
from typing import NamedTuple

class Params(NamedTuple):
    most: int = 12

class State(NamedTuple):
    nothing: int

def begin(params):
    return State(0)

def decide(params, state, now):
    return params.most, 0.45

def learn(params, state, now, seen):
    return state
"""


def made_up(seed, probe=True):
    """Positions of eight requests from a seed."""
    return random_positions(random.Random(seed), 8, 8, probe)


def made_up_cost(seed, n_max=8):
    """Prices as a machine might have them: monotone, all positive."""
    rng = np.random.default_rng(seed)
    prices = np.zeros(kernel.n_counts(n_max))
    prices[[kernel.STEPS, kernel.TOKENS, kernel.DRAFT_ROUNDS, kernel.DRAFT_DECODES]] = rng.uniform(1, 100, 4)
    prices[[kernel.KV, kernel.KV_WIDTH, kernel.KV_ONE, kernel.KV_DRAFT, kernel.PAST_WIDTH]] = rng.uniform(0, 0.1, 5)
    prices[kernel.PAST_DRAFT] = prices[kernel.PAST_WIDTH] / 2
    prices[[kernel.SETTLING, kernel.FIRSTS, kernel.CAPTURES, kernel.CAPTURES_ONE]] = rng.uniform(0, 50, 4)
    widths, catchups = layout(n_max)
    prices[widths][1:] = np.sort(rng.uniform(100, 5000, n_max + 1))
    prices[catchups][1:] = np.sort(rng.uniform(10, 500, n_max + 1))
    prices[[kernel.RESHAPES, kernel.RESHAPES_ONE]] = rng.uniform(0, 50, 2)
    slope = rng.uniform(0, 50)
    prices[kernel.LONG_CATCHUP_ROWS] = slope
    prices[kernel.LONG_CATCHUPS] = prices[catchups][-1] - slope * (n_max + 1)
    prices[kernel.BARE] = -0.1 * prices[kernel.STEPS] - prices[kernel.TOKENS] - 0.01 * prices[widths][1]
    prices[[kernel.PROMPT_CATCHUPS, kernel.PROMPT_CATCHUP_ROWS]] = rng.uniform(0, 50, 2)
    prices[[kernel.DRAFT_RESHAPES, kernel.DRAFT_CAPTURES]] = rng.uniform(0, 50, 2)
    return CostModel(n_max, prices, prices[None], None, 0.0, 0, 1 << 20, 2)


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.booleans())
def test_compiled_equals_interpreted(seed, probe):
    """The compiled walk counts exactly what the interpreted twin counts, for every policy, probe and live."""
    p = made_up(seed, probe)
    compiled = counts(POLICIES, p)
    for policy, ours in zip(POLICIES, compiled, strict=True):
        detail = np.zeros((1, p.n_requests, kernel.n_counts(8)), np.int64)
        rows, shared = np.array([policy.row() or [0.0]]), np.array([policy.scope == "engine"])
        no_times = np.zeros((0, 0))
        link.interpreted(policy.rule).run(rows, shared, arrays_of(p), np.zeros(detail.shape[-1]), no_times, detail)
        assert (ours == detail[0]).all(), policy


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_counts_add_up(seed):
    """llama.cpp's accounting identity and the histograms: every token comes from a step or an accepted draft."""
    p = made_up(seed)
    c = counts(POLICIES, p)
    widths, catchups = (c[:, :, of] for of in layout(8))
    tokens, steps, accepted = c[:, :, kernel.TOKENS], c[:, :, kernel.STEPS], c[:, :, kernel.ACCEPTED]
    assert (tokens == p.n_generated - 1).all()
    # a request may end inside a verification, on a draft: then that step has no token of its own
    assert ((tokens - accepted - steps == 0) | (tokens - accepted - steps == -1)).all()
    assert (widths.sum(-1) == steps).all()
    assert (c[:, :, kernel.RESHAPES] <= widths[:, :, 2:].sum(-1)).all()
    assert (c[:, :, kernel.RESHAPES_ONE] <= widths[:, :, 1]).all()
    assert ((widths * np.arange(10)).sum(-1) == steps + c[:, :, kernel.DRAFTED]).all()
    assert (catchups.sum(-1) + c[:, :, kernel.LONG_CATCHUPS] == c[:, :, kernel.DRAFT_ROUNDS]).all()
    assert (c[:, :, kernel.ACCEPTED] <= c[:, :, kernel.DRAFTED]).all()
    rows = (catchups * np.arange(10)).sum(-1) + c[:, :, kernel.LONG_CATCHUP_ROWS]
    assert (rows <= p.n_prompt + p.n_generated).all()
    assert (c[0, :, kernel.DRAFTED] == 0).all()


@settings(max_examples=25)
@given(st.integers(0, 10**6))
def test_nobody_beats_the_clairvoyant(seed):
    """No policy takes less time on any request than the clairvoyant optimum, whatever things cost."""
    p, cost = made_up(seed), made_up_cost(seed)
    least = clairvoyant_us(p, cost)
    assert (times(POLICIES, p, cost.prices) >= least * (1 - 1e-9)).all()
    assert (Serving().no_mtp_counts(p) @ cost.prices >= least * (1 - 1e-9)).all()


def perfect_drafts(seed):
    """Positions from a seed whose drafts are always right, and a step of any width as the only price."""
    p, cost = made_up(seed), made_up_cost(seed)
    perfect = p.match.copy()
    for r in range(p.n_requests):
        for g in range(1, p.n_generated[r]):
            perfect[p.first[r] + g - 1] = min(8, p.n_generated[r] - g)
    cost.prices[:] = 0.0
    cost.prices[layout(8)[0]] = 1.0
    return replace(p, match=perfect), cost


def test_clairvoyant_reaches_what_is_possible():
    """With drafts always right, decodes free and no room limit, the optimum is the longest draft throughout."""
    p, cost = perfect_drafts(3)
    best = min(times(parse("static:n_max=8"), p, cost.prices)[0])
    assert clairvoyant_us(p, cost).min() == pytest.approx(best)


def test_clairvoyant_catches_up_the_prompt():
    """Where one round drafts all that follows, the optimum pays for that step and once for every row before it."""
    p, cost = perfect_drafts(3)
    p = replace(p, n_generated=np.full(p.n_requests, 10), max_tokens=np.full(p.n_requests, 10))
    cost.prices[layout(8)[1]] = 0.01 * np.arange(10)
    cost.prices[[kernel.LONG_CATCHUP_ROWS, kernel.PROMPT_CATCHUP_ROWS]] = 0.01
    least = clairvoyant_us(p, cost)
    assert least == pytest.approx(1 + 0.01 * (p.n_prompt + 1))
    assert least == pytest.approx(times(parse("static:n_max=8"), p, cost.prices)[0])


def test_price_is_the_dot_product():
    """The time of a walk is its counts times the prices: nothing is added up on the side."""
    p, cost = made_up(5), made_up_cost(5)
    assert np.allclose(times(POLICIES, p, cost.prices), counts(POLICIES, p) @ cost.prices)


def test_chunks_change_nothing(monkeypatch):
    """Policies run in chunks; the size of a chunk is invisible."""
    from tracekit.replay import simulate

    p = made_up(7)
    whole = counts(POLICIES, p)
    monkeypatch.setattr(simulate, "_CHUNK_BYTES", 1)
    assert (counts(POLICIES, p) == whole).all()


def test_longer_drafts_than_recorded_are_refused():
    """A draft length that was never recorded, or timed, is an error and not an extrapolation."""
    with pytest.raises(TracekitError, match="--n-max 12"):
        counts([parse_one("static:n_max=12")], made_up(1))


@pytest.mark.parametrize("limit", ["max_tokens", "n_ctx"])
def test_longer_drafts_than_there_is_room_for_are_no_matter(limit):
    """Where requests end, or their context does, before drafts get longer, asking for more changes nothing."""
    p = random_positions(random.Random(3), 8, 3)
    most = np.full(8, 5)  # no more than three drafts
    p = replace(p, n_generated=most, max_tokens=most)
    if limit == "n_ctx":
        p = replace(p, max_tokens=most + 9, n_ctx=p.n_prompt + most)
    for serving in (Serving(), Serving(2)):
        known, more = serving.counts(parse("static:n_max=3,12"), p)
        assert (known == more).all()
    with pytest.raises(TracekitError, match="--n-max 12"):
        counts([parse_one("static:n_max=12")], replace(p, **{limit: getattr(p, limit) + 1}))


@pytest.mark.parametrize("n_slots", [1, 3])
@pytest.mark.parametrize("probe", [True, False])
def test_more_drafts_than_recorded_are_refused_whatever_a_policy_calls_them(tmp_path, probe, n_slots):
    """A policy without a parameter n_max is told, too, whether counted or timed; what it asks within is replayed."""
    path, p = tmp_path / "deep.py", made_up(1, probe)
    path.write_text(DEEP)
    deep, cost = rule(path), made_up_cost(1)
    if n_slots > 1:
        cost = replace(cost, prices=np.ones(lockstep.N_COUNTS))
    league = League(p, cost, serving=Serving(n_slots))
    assert league.times([deep(most=8)]).shape == (1, 8)
    assert league.filled_counts([deep(most=8)])[0].shape[:2] == (1, 8)
    for asked in (league.times, league.filled_counts):
        with pytest.raises(TracekitError, match=r"deep.py:most=9: asks for more drafts than the 8 .* --n-max"):
            asked([deep(most=8), deep(most=9)])
        more = "drafts than the 8 that the trace has; record with " + ("" if probe else "--mode probe ") + "--n-max 9"
        with pytest.raises(TracekitError, match=more):
            asked([parse_one("streaks:n_max=9,n_min=8,n_streak=1")])


@pytest.mark.parametrize("n_slots", [1, 3])
def test_fewer_drafts_than_never_are_refused(tmp_path, n_slots):
    """Only NEVER stands for no drafts any more: another negative number is refused by the simulators, as it is live."""
    path = tmp_path / "negative.py"
    path.write_text(DEEP.replace("params.most,", "(params.most if now.n_generated < 3 else -5),"))
    prices = np.zeros(kernel.n_counts(8) if n_slots == 1 else lockstep.N_COUNTS)
    for simulated in (Serving(n_slots).counts, lambda *of: Serving(n_slots).times(*of, prices)):
        with pytest.raises(TracekitError, match=r"negative.py: .*decide returned fewer drafts than NEVER, -1$"):
            simulated([rule(path)(most=1)], made_up(1))


def test_unknown_positions_are_counted():
    """On a trace with gaps, steps that the trace does not determine are counted, and guesses bracket the truth."""
    truth, gaps = made_up(11), made_up(11, probe=False)
    assert (gaps.known[gaps.known < ANY].size) > 0
    policy = parse("static:n_max=6")
    inexact = counts(policy, gaps)[0, :, kernel.INEXACT].sum()
    assert inexact > 0
    assert counts(policy, truth)[0, :, kernel.INEXACT].sum() == 0
    accepted = [counts(policy, gaps.guess(g))[0, :, kernel.ACCEPTED].sum() for g in ("none", "mean", "all")]
    assert accepted[0] <= accepted[1] <= accepted[2]


def test_best_estimate_is_as_right_as_what_is_known():
    """Where a trace has gaps, its best estimate makes drafts right there as often as elsewhere, at every place."""
    gaps = random_positions(random.Random(11), 400, 8, probe=False)
    unknown, filled = gaps.known == 0, gaps.guess("mean").match
    assert (filled[~unknown] >= gaps.match[~unknown]).all()
    for j in range(8):
        guessed, known = (filled[of & (filled >= j)] > j for of in (unknown, ~unknown))
        assert guessed.mean() == pytest.approx(known.mean(), abs=0.05)


def test_rounds_agree_with_counts():
    """The list of (drafted, accepted) per step adds up to the compiled counts, and gives the ratios of a league."""
    p = made_up(13)
    table = League(p, made_up_cost(13)).table(POLICIES)
    for policy, c, row in zip(POLICIES, counts(POLICIES, p), table.iter_rows(named=True), strict=True):
        found = rounds(policy, p)
        for r, steps in enumerate(found):
            assert len(steps) == c[r, kernel.STEPS]
            assert sum(s[0] for s in steps) == c[r, kernel.DRAFTED]
            assert sum(s[1] for s in steps) == c[r, kernel.ACCEPTED]
        drafted, accepted = (np.array([step[i] for steps in found for step in steps]) for i in (0, 1))
        verified = drafted > 0
        if verified.any():
            assert row["acceptance_ratio"] == pytest.approx(accepted.sum() / drafted.sum())
            assert row["tau"] == pytest.approx((1 + accepted[verified]).mean())
        else:
            assert (row["acceptance_ratio"], row["tau"]) == (None, None)
        assert row["amplification"] == pytest.approx((1 + drafted).sum() / (p.n_generated - 1).sum())


def test_intervals_are_those_of_a_bootstrap():
    """At 95 %, of requests and costs drawn together, and as much wider for few requests as Student's t is."""
    p, cost, policy = random_positions(random.Random(5), 40, 8), made_up_cost(5), rule("static")(n_max=3)
    rng = np.random.default_rng(1)
    cost = replace(cost, boot=cost.prices * rng.normal(1, 0.05, (100, 1)))
    league = League(p, cost)
    row, plain, ours = league.table([policy]).row(0, named=True), league.no_mtp_counts, league.counts([policy])[0]
    draws = [(rng.integers(0, 40, 40), cost.boot[rng.integers(0, 100)]) for _ in range(4000)]
    wider = np.sqrt(40 / 39) * student.ppf(0.975, 39) / norm.ppf(0.975)

    def bounds(of):
        value = of(np.arange(40), cost.prices)
        told = [of(i, b) / value * (of(i, cost.prices) / value) ** (wider - 1) for i, b in draws]
        return [value, *(value * np.quantile(told, (0.025, 0.975)))]

    speed = bounds(lambda i, b: 1e6 * league.tokens[i].sum() / (ours[i] @ b).sum())
    gain = bounds(lambda i, b: (plain[i] @ b).sum() / (ours[i] @ b).sum())
    for name, expected in (("tokens_per_second", speed), ("speedup", gain)):
        told = [row[f"{name}{end}"] for end in ("", "_low", "_high")]
        assert told[0] == pytest.approx(expected[0])
        assert np.log(told) == pytest.approx(np.log(expected), abs=0.1 * np.log(expected[2] / expected[1]))
    low, high = (np.quantile(1e6 * league.tokens.sum() / (cost.boot @ ours.sum(0)), q) for q in (0.025, 0.975))
    of_these = league.speed_of_these(policy)
    assert (of_these.low, of_these.high) == (pytest.approx(low), pytest.approx(high))
    gains = (cost.boot @ plain.sum(0)) / (cost.boot @ ours.sum(0))
    of_these = league.gain_of_these(policy)
    assert of_these.value == pytest.approx(row["speedup"])
    assert (of_these.low, of_these.high) == tuple(pytest.approx(np.quantile(gains, q)) for q in (0.025, 0.975))
    assert league.gain_of_these(None) == Interval(1.0, 1.0, 1.0)


def test_requests_that_repeat_a_prompt_tell_no_more():
    """Every request twice has the intervals of each once, and one prompt twice has none; where no prompt has a name
    nobody knows that they are alike.
    """
    p, cost = random_positions(random.Random(5), 20, 8), made_up_cost(5)
    once, twice = (League(p.at([*range(20)] * n), cost) for n in (1, 2))
    policies = [rule("static")(n_max=3), rule("fallback")(n_max=8)]
    names = [f"{of}{end}" for of in ("tokens_per_second", "speedup") for end in ("", "_low", "_high")]
    for of in (lambda league: league.table(policies), lambda league: league.by_category(policies[0])):
        rows, again = of(once), of(twice)
        assert again["n_requests"].to_list() == [2 * n for n in rows["n_requests"]]
        assert again["n_prompts"].to_list() == rows["n_prompts"].to_list() == rows["n_requests"].to_list()
        for name in names:
            assert again[name].to_list() == pytest.approx(rows[name].to_list())
    nameless = League(replace(twice.positions, prompt_ids=("",) * 40), cost).table(policies)
    assert nameless["n_prompts"].to_list() == [40, 40]
    assert (nameless["speedup_low"] > once.table(policies)["speedup_low"]).all()
    one = League(p.at([3, 3]), cost).table(policies)
    assert one["n_requests"].to_list() == [2, 2]
    assert one["speedup_low"].is_null().all()


def test_a_prompt_repeated_most_makes_an_interval_no_narrower():
    """A value is as sure as leaving out each prompt in turn makes it, however often one of them is repeated."""
    p, cost, policy = random_positions(random.Random(5), 6, 8), made_up_cost(5), rule("static")(n_max=3)
    several = [0, 1, 2, 2, 3, 4, *[5] * 50]
    row, *without = (
        League(p.at([i for i in several if i != left_out]), cost).table([policy]).row(0, named=True)
        for left_out in (None, *range(6))
    )
    for name in ("tokens_per_second", "speedup"):
        value = row[name]
        error = np.sqrt(5 / 6 * sum((of[name] / value - 1) ** 2 for of in without))
        told = np.log([row[f"{name}_low"] / value, row[f"{name}_high"] / value])
        assert told == pytest.approx(student.ppf(0.975, 5) * error * np.array([-1, 1]))


def test_one_request_or_one_queue_has_no_interval():
    """Neither tells how others differ: a single request, nor requests of a policy whose state outlives each."""
    one = random_positions(random.Random(2), 1, 8)
    assert League(one, made_up_cost(2)).table([rule("static")(n_max=3)])["speedup_low"].is_null().all()
    league, policy = League(made_up(2), made_up_cost(2)), rule("fallback")(scope="engine")
    for frame in (league.table([policy]), league.by_category(policy)):
        assert frame["tokens_per_second_low"].is_null().all()
        assert frame["speedup_high"].is_null().all()
    assert league.table([rule("fallback")()])["speedup_low"].is_not_null().all()


def test_tables_of_many_rows_hold_what_only_the_last_has():
    """A hundred policies that verify nothing, or categories of one request, and then one that has all its numbers."""
    table = League(made_up(2), made_up_cost(2)).table([rule("off")()] * 100 + [rule("static")(n_max=3)])
    assert table["tau"].is_null().to_list() == [True] * 100 + [False]
    p = random_positions(random.Random(2), 103, 8)
    league = League(replace(p, categories=(*(f"a{i:03}" for i in range(101)), "b", "b")), made_up_cost(2))
    by = league.by_category(rule("static")(n_max=3))
    assert by["speedup_low"].is_null().to_list() == [True] * 101 + [False]


def test_edit_of_a_policy_is_never_answered_from_the_cache(tmp_path):
    """A compiled policy is cached by the hash of its source: an edit is another policy."""
    from tracekit.policy.rule import rule

    from .test_policies import OWN

    results = []
    for name, source in (("a.py", OWN), ("b.py", OWN.replace("else -1", "else -2"))):
        (tmp_path / name).write_text(source)
        results.append(counts([rule(tmp_path / name)()], made_up(17)))
    assert (results[0] != results[1]).any()


def test_no_cache_folder_gets_one_clear_line(tmp_path, monkeypatch):
    """A cache that cannot be written is named, with the variable that moves it."""
    from tracekit.policy.rule import rule

    from .test_policies import OWN

    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "mine.py").write_text(OWN + "\n# nowhere\n")
    monkeypatch.setenv("TRACEKIT_CACHE", str(tmp_path / "file"))
    with pytest.raises(TracekitError, match="TRACEKIT_CACHE"):
        counts([rule(tmp_path / "mine.py")()], made_up(1))


@given(st.integers(0, 5000))
def test_attended_cells_add_up(n):
    """The closed form for the plain steps after NEVER is the sum it stands for; cells come in whole blocks."""
    assert kernel.n_kv_sum(n) == sum(kernel.n_kv(i) for i in range(1, n + 1))
    assert kernel.n_kv(n) % kernel.KV_BLOCK == 0
    assert n <= kernel.n_kv(n) < n + kernel.KV_BLOCK


def test_a_step_is_inexact_once(tmp_path):
    """A step that several reasons leave open counts once: the share of exact steps never falls below none."""
    path = tmp_path / "long.py"
    path.write_text(Path(rule("static").path).read_text().replace("params.n_max, params.p_min", "20, 0.0"))
    c = counts([rule(path)()], made_up(2, probe=False))[0]
    assert c[:, kernel.INEXACT].any()
    assert (c[:, kernel.INEXACT] <= c[:, kernel.DRAFT_ROUNDS]).all()
