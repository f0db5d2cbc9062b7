"""Predicted against live: the loop closes, or shows where it does not.

Every prompt is probed amid live runs of it under every arm, in random order and several times over: a machine that
drifts drifts for prediction and measurement alike. Replaying the probes predicts each arm's steps and its speed.
Over several slots it is a wave of prompts that is probed and run at once; of these there are few, so each is probed as
often as it is run.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import kendalltau

from tracekit import beside
from tracekit.engine import Completion, Engine, Probe, Request, Settings
from tracekit.engine.record import record, wave_of
from tracekit.errors import TracekitError
from tracekit.policy.rule import Policy, rule
from tracekit.replay.league import Interval, League
from tracekit.replay.robust import too_narrow, widened
from tracekit.replay.serving import Serving
from tracekit.trace.store import TraceFile, open_trace
from tracekit.words import counted

Progress = Callable[[int, int], None]
_N_DRAWS = 400  # of repeats, for intervals
_SAME = Interval(1.0, 1.0, 1.0)  # no MTP against itself
Runs = dict[tuple[int, int, int], tuple[Completion, float]]  # by arm, request and repeat; the time in microseconds


@dataclass(frozen=True)
class Arm:
    """One way of running the model. ``policy`` None: without MTP."""

    name: str
    policy: Policy | None

    @property
    def label(self) -> str:
        """The policy as one writes it."""
        return "no MTP" if self.policy is None else self.policy.label


@dataclass(frozen=True)
class Verdict:
    """What was predicted and what was measured.

    ``arms``: one row per arm: ``arm, policy, predicted, measured`` (tokens/s), ``predicted_speedup,
    measured_speedup`` (against no MTP), each with ``_low`` and ``_high`` (95 %), ``error_ratio`` (predicted over
    measured, minus 1), ``spread_ratio`` (half the range of whole repeats over their median: the measurement's own
    noise; None, as are the measured intervals, where nothing was repeated),
    ``equal_requests`` of ``n_requests`` whose steps were exactly the predicted ones, ``equal_tokens`` of them whose
    tokens were those without MTP, both in every repeat. ``categories``: measured (with ``_low`` and ``_high``) and
    predicted speed-up of every arm in every prompt category. ``ranking_tau``: Kendall's tau between predicted and
    measured order. ``warning``: what one should know before trusting the prices of the prediction; empty where there is
    nothing.
    """

    arms: pl.DataFrame
    categories: pl.DataFrame
    ranking_tau: float
    repeats: int
    n_tokens: int
    warning: str = ""

    def as_json(self) -> dict[str, Any]:
        """Plain values of everything above."""
        return {
            "arms": self.arms.to_dicts(),
            "categories": self.categories.to_dicts(),
            "median_error_ratio": self.median_error_ratio,
            "ranking_tau": self.ranking_tau,
            "lossless": self.lossless,
            "repeats": self.repeats,
            "n_tokens": self.n_tokens,
            "warning": self.warning,
        }

    def save(self, path: Path) -> None:
        """Write :meth:`as_json` to ``path``, complete or not at all."""
        with beside.written(path) as file:
            file.write(json.dumps(self.as_json(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Verdict:
        """What :meth:`save` wrote. Raises :class:`TracekitError` for another file."""
        try:
            content = json.loads(path.read_text())
            arms, categories = pl.DataFrame(content["arms"]), pl.DataFrame(content["categories"])
            rest = (content[name] for name in ("ranking_tau", "repeats", "n_tokens"))
            return cls(arms, categories, *rest, content.get("warning", ""))
        except (ValueError, KeyError, TypeError) as error:
            raise TracekitError(f"{path}: not a verdict ({error!r}); remove it to verify again") from None

    @property
    def median_error_ratio(self) -> float:
        """Median absolute relative error of the predicted speeds over the arms."""
        return float(self.arms["error_ratio"].abs().median())

    @property
    def lossless(self) -> bool:
        """Whether every arm generated the tokens that no MTP generates."""
        return bool((self.arms["equal_tokens"] == self.arms["n_requests"]).all())

    @property
    def sentence(self) -> str:
        """The verdict in one line."""
        equal, same, n = (self.arms[c].sum() for c in ("equal_requests", "equal_tokens", "n_requests"))
        reason = (
            ""
            if self.lossless
            else "; the others met a near tie that rounding decides, and rounding depends on the batch width: less so "
            "with --cache-type-k f32 --cache-type-v f32 --flash-attn off"
        )
        noise = (
            f"repeats of a measurement differ by {100 * self.arms['spread_ratio'].median():.1f} %"
            if self.repeats > 1
            else "each measured once: its noise is not known"
        )
        return (
            f"median |predicted - measured| {100 * self.median_error_ratio:.1f} % over {self.arms.height} arms "
            f"({noise}), ranking "
            f"agreement tau = {self.ranking_tau:.2f}, "
            f"steps exactly as predicted in {equal} of {counted(n, 'request')}, tokens those without MTP in {same} of "
            f"{n} ({counted(self.repeats, 'repeat')}, {counted(self.n_tokens, 'token')} per arm{reason})"
        )


def standard_arms(tuned: Policy | None, n_max: int) -> list[Arm]:
    """No MTP, the naive fixed lengths, the fallback of PR 22931, and the tuned policy where there is one."""
    arms = [
        Arm("no MTP", None),
        Arm(f"naive n_max={n_max}", rule("static")(n_max=n_max)),
        Arm("n_max=1", rule("static")(n_max=1)),
        Arm("fallback", rule("fallback")(n_max=n_max)),
    ]
    if tuned is not None:
        arms.append(Arm("tuned", None if tuned.is_off else tuned))
    return arms


def verify(
    model: str | Path,
    arms: Sequence[Arm],
    requests: Sequence[Request],
    settings: Settings,
    draft_model: str | Path | None = None,
    repeats: int = 3,
    times: TraceFile | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Verdict:
    """Run ``requests`` (with distinct prompt ids) under ``arms``, predicted and live, over the slots of ``settings``.

    ``times``: the trace that prices the prediction; without it the probes' own timings do. The first arm must be the
    one without MTP. ``progress(done, total)`` counts live runs of a request. With several slots a request's time is its
    share of the machine, and speeds are of whole runs, prompts included (:class:`tracekit.replay.serving.Serving`).
    """
    n_slots, n = settings.n_slots, len(requests)
    if n < n_slots:
        raise TracekitError(f"{n_slots} slots (--parallel) need {n_slots} prompts or more; there are {n}")
    for arm in arms:  # all of this before hours of live runs
        if arm.policy is not None:
            settings.check(arm.policy)
    if times is not None:
        serving = Serving.of(times, n_slots)
        if unlike := serving.unlike(settings):
            raise TracekitError(f"{times.path}: its times are of {unlike}; record it as it is served here")
        serving.fit(times, settings.n_max)
    rng, runs = random.Random(seed), {}
    states = defaultdict(dict)  # of policies with scope=engine: every repeat of an arm is a run of its own
    requests = rng.sample(list(requests), len(requests))
    with tempfile.TemporaryDirectory(prefix="tracekit-") as folder:
        path, probe = Path(folder) / "probe.duckdb", Probe(settings.n_max, seed)
        with Engine(model, None, settings, draft_model, trace=path, probe=probe) as engine:
            recorder = engine.recorder
            update = recorder.demanding(progress or (lambda done, total: None))
            for request in requests:
                engine.prepare(request)
            wave, n_recorded, every = wave_of(n_slots), 0, n_slots > 1 and times is None
            for start in range(0, n, wave):
                chosen = range(start, min(start + wave, n))
                these = [requests[r] for r in chosen]
                for repeat in range(repeats):
                    if every or repeat == repeats // 2:  # in the middle, for the machine drifts
                        record(engine, these, baseline=times is None, turn=n_recorded)
                        n_recorded += 1
                    for a in rng.sample(range(len(arms)), len(arms)):
                        done = _run(engine, these, arms[a].policy, states[a, repeat])
                        times_us = [done[0].speculated_us] if n_slots == 1 else _shares_us(done)
                        runs |= {(a, r, repeat): run for r, *run in zip(chosen, done, times_us, strict=True)}
                        update(len(runs), repeats * n * len(arms))
        recorder.demand()
        try:
            league = League.of(open_trace(path), times, n_slots, [r.prompt_id for r in requests], wave)
        except TracekitError as error:
            reason = str(error).partition(": ")[2].partition(";")[0]
            raise TracekitError(
                f"the probes of these prompts do not tell what things cost ({reason}); give more --prompts or "
                "--max-tokens, or the times of a recorded trace with --cost"
            ) from None
        return _judge(league, arms, requests, runs, repeats)


def _run(engine: Engine, requests: Sequence[Request], policy: Policy | None, shared: dict) -> list[Completion]:
    """Serve ``requests``, unrecorded; their completions, in order."""
    engine.set_arm(mtp=policy is not None, recording=False, shared=shared)
    done = engine.run([replace(r, policy=policy or rule("off")()) for r in requests])
    return sorted(done, key=lambda completion: completion.number)


def _shares_us(done: Sequence[Completion]) -> np.ndarray:
    """Each request's share of the machine, microseconds: time is divided evenly among those under way."""
    end = np.array([d.ended_ns for d in done]) / 1000
    start = end - [d.prompt_us + d.catchup_us + d.generate_us for d in done]
    moments = np.unique((start, end))
    under_way = (start[:, None] <= moments[:-1]) & (end[:, None] >= moments[1:])
    return (under_way * (np.diff(moments) / np.maximum(under_way.sum(0), 1))).sum(1)


def _judge(league: League, arms: Sequence[Arm], requests: Sequence[Request], runs: Runs, repeats: int) -> Verdict:
    order = {prompt_id: i for i, prompt_id in enumerate(league.positions.prompt_ids)}
    known = [r for r, request in enumerate(requests) if request.prompt_id in order]
    places = np.array([order[requests[r].prompt_id] for r in known])
    wanted, together = league.tokens[places], np.array(known) // wave_of(league.serving.n_slots)
    tokens = float(wanted.sum())
    rows, shares, draws, plain = [], [], [], None
    for a, arm in enumerate(arms):
        times = np.array([[runs[a, r, k][1] for k in range(repeats)] for r in known], float)
        lengths = [[len(runs[a, r, k][0].tokens) + 1 - league.serving.shortest for k in range(repeats)] for r in known]
        times *= wanted[:, None] / np.maximum(lengths, 1)  # other tokens, where rounding decided a near tie
        predicted, gain = league.speed_of_these(arm.policy), league.gain_of_these(arm.policy)
        steps = league.serving.rounds(arm.policy or rule("off")(), league.positions)
        whole = 1e6 * tokens / times.sum(0)
        draws.append(_Drawn.of(times, together))
        speed = draws[a].speed(tokens)
        speedup = draws[a].speedup(draws[0]) if a else _SAME
        rows.append(
            {
                "arm": arm.name,
                "policy": arm.label,
                **predicted.columns("predicted"),
                **gain.columns("predicted_speedup"),
                **speed.columns("measured"),
                **speedup.columns("measured_speedup"),
                "spread_ratio": float((whole.max() - whole.min()) / 2 / np.median(whole)) if repeats > 1 else None,
                "equal_requests": sum(
                    all(runs[a, r, k][0].rounds == steps[order[requests[r].prompt_id]] for k in range(repeats))
                    for r in known
                ),
                "equal_tokens": sum(
                    all(runs[a, r, k][0].tokens == runs[0, r, 0][0].tokens for k in range(repeats)) for r in known
                ),
                "n_requests": len(known),
            }
        )
        drawn = {c: _Drawn.of(times[of[places]], together[of[places]]) for c, of in league.members.items()}
        shares += _by_category(arm, league, drawn, plain)
        plain = plain or drawn
    frame = pl.DataFrame(rows, infer_schema_length=None).with_columns(
        error_ratio=pl.col("predicted") / pl.col("measured") - 1
    )
    categories = pl.DataFrame(shares, infer_schema_length=None)
    distinct = frame.unique("policy", keep="first", maintain_order=True)  # no MTP, tuned to be off, is no second rank
    tau = float(kendalltau(distinct["predicted"], distinct["measured"]).statistic)
    return Verdict(frame, categories, tau, repeats, int(tokens), league.warning)


def _by_category(arm: Arm, league: League, drawn: dict[str, _Drawn], plain: dict[str, _Drawn] | None) -> list[dict]:
    """One row per prompt category: predicted speed-up, and measured by the times ``drawn`` in each, without MTP
    ``plain`` (None: these are).
    """
    predicted = {} if arm.policy is None else dict(league.by_category(arm.policy).select("category", "speedup").rows())
    rows = []
    for category, member in league.members.items():
        measured = drawn[category].speedup(plain[category]) if plain else _SAME
        rows.append(
            {
                "arm": arm.name,
                "category": category,
                "n_requests": int(member.sum()),
                "predicted_speedup": predicted.get(category, 1.0),
                **measured.columns("measured_speedup"),
            }
        )
    return rows


@dataclass(frozen=True)
class _Drawn:
    """What some requests took, float64 microseconds: ``us``, each its median over the repeats, and ``drawn_us``
    ``[n_draws]`` with repeats drawn again for all that were served together, the same ones of every arm; none where
    nothing was repeated. ``wider``: how much wider than these a time really spreads.
    """

    us: float
    drawn_us: np.ndarray
    wider: float

    @classmethod
    def of(cls, times: np.ndarray, together: np.ndarray) -> _Drawn:
        """Of ``times``, float64 ``[n_requests, n_repeats]``; ``together``: which of them were served at once, int
        ``[n_requests]``, and shared the machine and its moods.
        """
        rng, (n, k) = np.random.default_rng(0), times.shape
        names, wave = np.unique(together, return_inverse=True)
        picks = (rng.integers(0, k, (len(names), k))[wave] for _ in range(_N_DRAWS if k > 1 else 0))
        drawn = np.array([np.median(times[np.arange(n)[:, None], pick], 1).sum() for pick in picks])
        return cls(float(np.median(times, 1).sum()), drawn, too_narrow(k, len(names)))

    def speed(self, tokens: float) -> Interval:
        """``tokens`` per second."""
        return self._interval(1e6 * tokens / self.us, 1e6 * tokens / self.drawn_us)

    def speedup(self, plain: _Drawn) -> Interval:
        """Against what the same requests took otherwise."""
        return self._interval(plain.us / self.us, plain.drawn_us / self.drawn_us)

    def _interval(self, value: float, drawn: np.ndarray) -> Interval:
        if not len(drawn):
            return Interval(value, None, None)
        low, high = np.quantile(widened(drawn, value, self.wider), (0.025, 0.975))
        return Interval(value, min(float(low), value), max(float(high), value))
