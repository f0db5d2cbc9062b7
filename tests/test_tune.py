"""The search: every choice is the fastest safe one of what it saw, checked against a search without shortcuts."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.stats import t as student

from tracekit.errors import TracekitError
from tracekit.policy.evidence import Evidence
from tracekit.policy.rule import rule
from tracekit.replay import kernel
from tracekit.replay.league import Interval, League
from tracekit.report.tables import evidence_table
from tracekit.testing import random_positions
from tracekit.trace.store import open_trace
from tracekit.tune.evidence import _doubt, _why_off, tune
from tracekit.tune.search import Search, _folds, held_out_counts, safe, search
from tracekit.tune.space import grid

from .test_replay import made_up_cost

SPACE = {"static": {"n_max": "1..4/1", "p_min": "0,0.5"}, "fallback": {"n_max": "2,4", "min_ratio": "0.3,0.8"}}
SHIPPED = Path(__file__).parent.parent / "traces" / "reference-aligned-probe.duckdb"
DOUBTED, REFUSED = (14, 0.02), (9, 0.0)  # seed and slowdown allowed where a policy is


def _league(seed: int) -> League:
    return League(random_positions(random.Random(seed), 24, 8), made_up_cost(seed))


def _is_safe(league: League, times: np.ndarray, seen: np.ndarray, max_slowdown: float, confidence: float) -> bool:
    """Category by category: the slowdown and its standard error, from the residuals of every request, more of one that
    is more of the category than others, and Student's t of as many.
    """
    for member in league.members.values():
        here, no_mtp = times[member & seen], league.no_mtp_us[member & seen]
        if n := len(here):
            ratio = here.sum() / no_mtp.sum()
            in_all, whole = int(member.sum()), league.no_mtp_us[member].sum()
            left = (here - ratio * no_mtp) * (1 - 1 / in_all) / np.maximum(1 - no_mtp / whole, 1e-9)
            error = np.sqrt((left**2).sum() * n / max(1, n - 1)) / no_mtp.sum()
            errors = student.ppf(confidence, in_all - 1) if in_all > 1 else 0.0 if confidence == 0.5 else np.inf
            if errors == np.inf or ratio - 1 + errors * error > max_slowdown + 1e-9:
                return False
    return True


@examples(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.02, 0.3]))
@example(*DOUBTED)
@example(*REFUSED)
def test_every_choice_is_the_fastest_safe_one(seed, max_slowdown):
    """Of all requests, and of those outside each fold: no category slower than allowed, and nothing safe is faster.
    What the choices come to on requests they have not seen keeps within what was asked.
    """
    league = _league(seed)
    found = search(league, SPACE, max_slowdown, folds=4, seed=seed)
    times = league.times(found.policies)
    times[0] = league.no_mtp_us
    assert found.policies[0] == rule("off")()
    assert np.allclose(found.total_us, times.sum(1))
    fold = _folds(league.positions, 4, seed)

    def best(seen: np.ndarray) -> float:
        are_safe = [_is_safe(league, of, seen, max_slowdown, found.confidence) for of in times]
        return min(of[seen].sum() for of, good in zip(times, [True, *are_safe[1:]], strict=True) if good)

    for k in range(4):
        (chosen,) = set(found.held_out[fold == k].tolist())
        if found.chosen:
            assert times[chosen, fold != k].sum() == pytest.approx(best(fold != k))
    if found.chosen:
        assert times[found.chosen].sum() == pytest.approx(best(np.ones(len(fold), bool)))
        unseen = times[found.held_out, np.arange(len(fold))]
        worst = max(unseen[m].sum() / league.no_mtp_us[m].sum() for m in league.members.values())
        assert worst <= 1 + max_slowdown + 1e-9
    if found.refused:
        policy, category, slowed = found.refused
        assert (policy != rule("off")(), category in league.members, slowed > max_slowdown) == (True, True, True)
        assert times[found.policies.index(policy)].sum() < times[0].sum()
    if found.doubted:
        policy, category, bound = found.doubted
        of, member = times[found.policies.index(policy)], league.members[category]
        assert (found.chosen, _is_safe(league, of, np.ones(len(fold), bool), max_slowdown, 0.5)) == (0, True)
        assert of.sum() < times[0].sum()
        assert bound > max(max_slowdown, of[member].sum() / times[0][member].sum() - 1)


@pytest.mark.parametrize("seed", [9, 12, 14, 21])
def test_a_prompt_is_never_judged_on_itself(seed):
    """Requests that repeat a prompt are in one fold, and choices are those of each prompt once, as surely."""
    once = _league(seed)
    twice = League(once.positions.at([*range(24), *range(23, -1, -1)]), once.cost)
    found, again = (search(league, SPACE, 0.02, seed=seed) for league in (once, twice))
    assert again.held_out.tolist() == [*found.held_out, *found.held_out[::-1]]
    for name in ("policies", "chosen", "confidence", "refused"):
        assert getattr(again, name) == getattr(found, name)
    assert np.allclose(again.total_us, 2 * found.total_us)
    some = found.policies[:40]
    assert (safe(twice, some, 0.02, 0.95) == safe(once, some, 0.02, 0.95)).all()
    with pytest.raises(TracekitError, match="between 2 and the number of prompts in the trace, 24"):
        search(twice, SPACE, folds=30)


@pytest.mark.parametrize("seed", [3, 4])
def test_a_prompt_that_is_most_of_its_category_makes_nothing_surer(seed):
    """A slowdown is as sure as leaving out each prompt in turn makes it, however often one of them is repeated."""
    once = _league(seed)
    first = once.positions.categories.index(once.positions.categories[0])
    league = League(once.positions.at([*range(24), *[first] * 49]), once.cost)
    policies = search(once, SPACE, 0.02, refine=False).policies[1:]
    for policy, of in zip(policies, league.times(policies), strict=True):
        prompts = league.positions.prompts
        ours, no_mtp = np.bincount(prompts, of), np.bincount(prompts, league.no_mtp_us)
        bounds = []
        for member in once.members.values():
            here = np.flatnonzero(member)
            n, ratio = len(here), ours[here].sum() / no_mtp[here].sum()
            without = [np.delete(here, i) for i in range(n)]
            spread = sum((ours[i].sum() / no_mtp[i].sum() - ratio) ** 2 for i in without)
            bounds.append(ratio - 1 + student.ppf(0.95, n - 1) * np.sqrt((n - 1) / n * spread))
        for allowed in (max(bounds) - 1e-6, max(bounds) + 1e-6):
            assert safe(league, [policy], allowed, 0.95).tolist() == [allowed > max(bounds)]


def test_off_is_not_always_a_matter_of_course():
    """The examples above are of a policy that is doubted and of one that is refused, and confidence starts at 95 %."""
    doubted, refused = (search(_league(s), SPACE, allowed, folds=4, seed=s) for s, allowed in (DOUBTED, REFUSED))
    assert (doubted.chosen, doubted.doubted is None, doubted.confidence) == (0, False, 0.95)
    assert (refused.chosen, refused.refused is None, refused.confidence > 0.95) == (0, False, True)


@pytest.mark.parametrize(("seed", "speculates"), [(9, False), (16, True), (21, True)])
def test_what_is_recommended_is_faster_with_its_whole_interval(seed, speculates):
    """On requests that the choice was not made on, which is what the evidence tells; else it is off, and says why."""
    made, shipped = _league(seed), open_trace(SHIPPED)
    league = League(made.positions, made.cost, shipped, shipped)
    found = search(league, SPACE, 0.02)
    gain, sure = league.gain(held_out_counts(league, found)), tune(league, SPACE, 0.02)
    assert gain.value > 1
    assert (gain.low > 1) == speculates
    if speculates:
        assert sure.policy == found.policy
        assert (sure.evidence.speedup, sure.evidence.speedup_low) == (round(gain.value, 4), round(gain.low, 4))
        assert seed == 21 or gain.value < league.gain([league.counts([found.policy])[0]]).value
    else:
        assert sure.policy == rule("off")()
        assert "more prompts would tell" in sure.evidence.advice


def test_table_tells_with_which_confidence_policies_are_safe():
    """The one that the search came to, and each policy's own answer, the chosen one's too; an old file has neither."""
    made, shipped = _league(21), open_trace(SHIPPED)
    league = League(made.positions, made.cost, shipped, shipped)
    tuned = tune(league, SPACE, 0.02)
    found, e = search(league, SPACE, 0.02, refine=False), tuned.evidence
    assert (e.confidence, e.safe) == (found.confidence, True)
    told = replace(tuned, evidence=e.model_copy(update={"confidence": 0.995, "safe": False}))
    for other in e.alternatives:
        assert other.speedup_low <= other.speedup <= other.speedup_high
        assert (other.speedup_low < other.speedup_high) == (other.policy != "no MTP")
    columns = evidence_table(told).columns
    assert list(columns[2].cells)[:2] == [f"{e.speedup:.3f} ({e.speedup_low:.3f} - {e.speedup_high:.3f})", "1.000"]
    assert columns[-1].header == "slows no category by > 2 % (one-sided 99.5 %, in sample)"
    assert list(columns[-1].cells) == ["no", *("yes" if a.safe else "no" for a in e.alternatives)]
    old = {k: v for k, v in e.model_dump().items() if k not in ("confidence", "safe")}
    assert Evidence.parse(SHIPPED, old).confidence == 0.95


def test_a_category_that_may_be_slowed_is_named():
    """Not only the one of the lowest mean: few prompts may be far slower than many that are known."""
    of = {"known": Interval(1.1, 0.985, 1.2), "few": Interval(1.2, 0.9, 1.6), "one": Interval(1.0, None, None)}
    assert _doubt(of, 0.02).startswith(" That few prompts are slowed by up to 10 % is not excluded")
    assert _doubt(of, 0.1) == _doubt({"one": of["one"]}, 0.02) == ""


def test_one_prompt_of_a_category_makes_nothing_safe():
    """It does not tell what others like it do; what else was faster is named, and why it is not recommended."""
    made = _league(21)
    league = League(replace(made.positions, categories=("alone", *("others",) * 23)), made.cost)
    found = search(league, SPACE, 0.3, folds=2)
    assert (found.chosen, found.doubted[1:]) == (0, ("alone", np.inf))
    assert "a single alone prompt tells nothing" in _why_off(found, Interval(1.0, 1.0, 1.0))


def test_a_space_is_limited_as_a_whole(monkeypatch):
    """Not each of its tables: two of three policies are more than five with `off`."""
    monkeypatch.setattr("tracekit.tune.space.MOST", 5)
    tables = {"static": {"n_max": "1,2,3"}, "fallback": {"n_max": "1,2,3"}}
    assert len(grid({"static": tables["static"]}, 8)) == 4
    with pytest.raises(TracekitError, match="the space has more than 5 policies, fallback among them"):
        grid(tables, 8)


def test_a_policy_of_one_queue_is_not_tuned():
    """Where all requests share a state none of them tells whether the policy is safe on others."""
    with pytest.raises(TracekitError, match=r"scope=engine all requests are one queue, .* give it scope=request"):
        search(_league(3), {"fallback": {"scope": "request,engine"}})


def test_off_says_what_it_was_chosen_instead_of():
    """A policy that only looked faster is named, with what spoke against it; a matter of course has no more to say."""
    static = rule("static")(n_max=2)
    nothing = Search([rule("off")(), static], np.array([2.0, 1.0]), 0, np.zeros(3, int), 0.95)
    assert _why_off(nothing, Interval(1.0, 1.0, 1.0)) == ""
    said = _why_off(replace(nothing, chosen=1), Interval(1.1, 0.9, 1.3))
    assert "static:n_max=2" in said
    assert "1.10 x no MTP (0.90 to 1.30" in said
    said = _why_off(replace(nothing, doubted=(static, "code", 0.031)), Interval(1.0, 1.0, 1.0))
    assert "slows code prompts by up to 3.1 %" in said
    said = _why_off(replace(nothing, doubted=(static, "", np.inf)), Interval(1.0, 1.0, 1.0))
    assert "a single prompt without a category tells nothing" in said
    said = _why_off(replace(nothing, refused=(static, "", 0.054)), Interval(1.0, 1.0, 1.0))
    assert "slow prompts without a category that they were not made on" in said
    said = _why_off(replace(nothing, refused=(static, "prose", 0.054)), Interval(1.0, 1.0, 1.0))
    assert "slow prose prompts that they were not made on by 5.4 %" in said


def test_folds_without_drafts_are_the_baseline():
    """Where a choice is not to speculate, its requests are priced without MTP, whatever loading it costs."""
    league = _league(3)
    league.cost.prices[kernel.BARE] -= 50.0
    found = search(league, SPACE, folds=4)
    off = np.arange(24) % 2 == 0
    mixed = type(found)(found.policies, found.total_us, found.chosen, np.where(off, 0, 1), found.confidence)
    (counts,) = held_out_counts(league, mixed)
    assert np.allclose((counts @ league.cost.prices)[off], league.no_mtp_us[off])
    assert np.allclose((counts @ league.cost.prices)[~off], league.times([found.policies[1]])[0][~off])


def test_memory_does_not_grow_with_policies_times_requests(monkeypatch):
    """However few times are held at once, the search finds the same."""
    whole = search(_league(5), SPACE, folds=4)
    monkeypatch.setattr("tracekit.tune.search._MOST_TIMES", 30)
    monkeypatch.setattr("tracekit.replay.league._MOST_BYTES", 1)
    league = _league(5)
    pieces = search(league, SPACE, folds=4)
    assert (pieces.policies, pieces.chosen, pieces.confidence) == (whole.policies, whole.chosen, whole.confidence)
    assert league.table(pieces.policies).equals(_league(5).table(pieces.policies))


def test_safe_is_judged_by_the_spread_of_requests():
    """Whether a policy is safe, whatever slowdown is allowed and with any confidence, is what the residuals of its
    requests say one by one.
    """
    league = _league(7)
    policies, whole = [rule("static")(n_max=n) for n in (1, 2, 3, 4)], np.ones(24, bool)
    found = {}
    for allowed, confidence in itertools.product(np.arange(0, 2, 0.1), (0.5, 0.95, 0.999)):
        found[allowed, confidence] = safe(league, policies, allowed, confidence).tolist()
        expected = [_is_safe(league, of, whole, allowed, confidence) for of in league.times(policies)]
        assert found[allowed, confidence] == expected
    assert len({tuple(of) for of in found.values()}) > 3
