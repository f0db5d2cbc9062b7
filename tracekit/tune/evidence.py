"""From a search to a policy file: the out-of-sample prediction, what it beat, and one sentence of advice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

import tracekit
from tracekit.policy.evidence import Alternative, Evidence
from tracekit.policy.file import PolicyFile
from tracekit.policy.rule import Policy, rule
from tracekit.replay.league import Interval, League
from tracekit.trace.store import recorded_with
from tracekit.tune.search import Progress, Search, held_out_counts, safe, search, usual_folds
from tracekit.tune.space import default_space
from tracekit.words import counted_requests


def tune(
    league: League,
    space: Mapping[str, Mapping[str, str]] | None = None,
    max_slowdown: float = 0.02,
    folds: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PolicyFile:
    """The best safe policy in ``space`` (None: that of every shipped policy, and between its values; where a policy
    has no values, its own ``SPACE``) on the trace of ``league``, with its evidence. ``folds`` None: as many as
    :func:`usual_folds` says.

    It is ``off`` unless the speed-up on requests the choice was not made on is above 1 with its whole 95 % interval,
    which on a live trace spans what is not known.
    """
    named = space is not None
    if named:
        space = {name: values or rule(name).space for name, values in space.items()}
    else:
        space = default_space(league.serving.n_slots)
    folds = usual_folds(league) if folds is None else folds
    found = search(league, space, max_slowdown, folds, seed, progress, refine=not named)
    filled = held_out_counts(league, found)
    gain = league.gain(filled)
    why = ""
    if found.chosen and gain.low > 1:
        speed, categories = league.speed(filled), {c: league.gain(filled, m) for c, m in league.members.items()}
    else:
        why = _why_off(found, gain)
        found = replace(found, chosen=0)
        speed, gain = league.no_mtp_speed(), Interval(1.0, 1.0, 1.0)
        categories = {c: gain for c in league.members}
    worst = min(categories, key=lambda c: categories[c].value)
    others = _alternatives(league, found, max_slowdown)
    beyond = [a for a in others if a.safe and a.speedup > 1 and a.policy not in {p.label for p in found.policies}]
    if named and not found.chosen and beyond:
        best = max(beyond, key=lambda a: a.speedup)
        why += f" Not in the space that was searched: {best.policy}, {best.speedup:.2f} x."
    run, priced = league.trace.runs.row(0, named=True), league.priced.runs.row(0, named=True)
    exact = 1 - league.inexact_fraction(found.policy)
    return PolicyFile(
        found.policy,
        Evidence(
            advice=_advice(found.policy, gain, worst, categories[worst], exact, league)
            + _doubt(categories, max_slowdown)
            + why,
            tracekit_version=tracekit.__version__,
            trace=Path(league.trace.path).name,
            trace_id=league.trace.trace_id,
            model_sha256=run["model_sha256"],
            model_desc=run["model_desc"],
            device=priced["device"],
            priced_by=Path(league.priced.path).name,
            cost_model=league.cost.id,
            recorded_with=recorded_with(league.trace, league.priced),
            n_slots=league.serving.n_slots,
            n_requests=league.positions.n_requests,
            n_prompts=league.positions.n_prompts,
            n_tokens=int(league.tokens.sum()),
            n_policies=len(found.policies),
            folds=folds,
            seed=seed,
            max_slowdown=max_slowdown,
            confidence=found.confidence,
            safe=found.policy.is_off or bool(safe(league, [found.policy], max_slowdown, found.confidence)[0]),
            **speed.columns("tokens_per_second", 3),
            **gain.columns("speedup", 4),
            worst_category=worst,
            **categories[worst].columns("worst_category_speedup", 4),
            exact_fraction=round(exact, 4),
            alternatives=others,
        ),
    )


def references(league: League) -> dict[str, Policy]:
    """The policies every tuned one is compared with: naive, one draft, the best fixed length, and the fallback
    of PR 22931.
    """
    n_max = league.positions.n_max
    fixed = league.table(league.static_policies())
    best = int(np.argmax(fixed["tokens_per_second"])) + 1
    return {
        "naive": rule("static")(n_max=n_max),
        "one draft": rule("static")(n_max=1),
        "best fixed length": rule("static")(n_max=best),
        "fallback": rule("fallback")(n_max=n_max),
    }


def _alternatives(league: League, found: Search, max_slowdown: float) -> tuple[Alternative, ...]:
    plain = league.no_mtp_speed()
    out = [_alternative("no MTP", plain, Interval(1.0, 1.0, 1.0), True)]
    runners_up = [found.policies[i] for i in np.argsort(found.total_us, kind="stable")[:3]]
    policies = [
        p for p in dict.fromkeys([*references(league).values(), *runners_up]) if p not in (found.policy, rule("off")())
    ]
    rows = league.table(policies).iter_rows(named=True)
    are_safe = safe(league, policies, max_slowdown, found.confidence)
    for policy, row, is_safe in zip(policies, rows, are_safe.tolist(), strict=True):
        speed, gain = (
            Interval(*(row[f"{name}{end}"] for end in ("", "_low", "_high")))
            for name in ("tokens_per_second", "speedup")
        )
        out.append(_alternative(policy.label, speed, gain, is_safe))
    return tuple(out)


def _alternative(label: str, speed: Interval, gain: Interval, is_safe: bool) -> Alternative:
    return Alternative(
        policy=label,
        **speed.columns("tokens_per_second", 3),
        **gain.columns("speedup", 4),
        safe=is_safe,
    )


def _why_off(found: Search, gain: Interval) -> str:
    """What ``off`` was recommended instead of, where that is no matter of course; empty where nothing was faster."""
    if found.chosen:
        return (
            f" {found.policy} is faster on these, but choices like it are {gain.value:.2f} x no MTP ({gain.low:.2f} to "
            f"{gain.high:.2f}, 95 %) on requests that they were not made on: more prompts would tell."
        )
    if found.refused is not None:  # measured on requests it had not seen, which says more than a doubt
        policy, category, slowed = found.refused
        those = _prompts(category)
        return (
            f" {policy} is faster on these and seems to slow no category by more than allowed, but choices like it "
            f"slow {those} that they were not made on by {100 * slowed:.1f} %: more of those would tell, or "
            "a larger --max-slowdown."
        )
    if found.doubted is not None:
        policy, category, slowdown = found.doubted
        those = _prompts(category)
        if slowdown == float("inf"):
            one = _prompts(category, "prompt")
            return f" {policy} is faster on these, but a single {one} tells nothing of others: more would."
        return (
            f" {policy} is faster on these, but they are too few, or too different, to exclude that it slows "
            f"{those} by up to {100 * slowdown:.1f} % (95 %): more of those would tell, or a larger "
            "--max-slowdown."
        )
    return ""


def _prompts(category: str, noun: str = "prompts") -> str:
    return f"{category} {noun}" if category else f"{noun} without a category"


def _doubt(categories: Mapping[str, Interval], max_slowdown: float) -> str:
    """Which category might, by its 95 % interval, be slowed by more than allowed, if any: the one that might most."""
    least = {c: of.low for c, of in categories.items() if of.low is not None}
    category = min(least, key=least.__getitem__, default="")
    if not least or least[category] >= 1 - max_slowdown:
        return ""
    slowed = f"{100 * (1 - least[category]):.0f} %"
    return f" That {_prompts(category)} are slowed by up to {slowed} is not excluded (95 %): more of them would tell."


def _span(of: Interval) -> str:
    return "" if of.low is None else f" ({of.low:.2f} to {of.high:.2f})"


def _advice(policy: Policy, gain: Interval, worst: str, worst_gain: Interval, exact: float, league: League) -> str:
    n_slots = league.serving.n_slots
    n = f"n = {counted_requests(league.positions.n_requests, league.positions.n_prompts)}"
    n += f"{f' over {n_slots} slots' if n_slots > 1 else ''}, cross-validated"
    live = league.positions.mode == "live"
    but = f" But {league.warning}." if league.warning else ""
    if policy.is_off:
        return (
            f"Do not speculate with this model on prompts like these: no policy was safely faster than no MTP ({n})."
            + (" A live trace knows little but its own policy; --mode probe records what answers every one." * live)
            + but
        )
    return (
        f"Speculate with {policy}: {gain.value:.2f} x the speed of no MTP ({gain.low:.2f} to {gain.high:.2f}, "
        f"95 %, {n}); "
        f"at worst {worst_gain.value:.2f} x{_span(worst_gain)}, on {_prompts(worst)}."
        + (f" The trace knows {100 * exact:.0f} % of its steps; the interval spans the rest." if exact < 1 else "")
        + but
    )
