"""What every policy would have done on a trace: counts, predicted speed with its interval, and regret."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from tracekit.policy.rule import Policy, rule
from tracekit.replay import kernel, simulate
from tracekit.replay.arrays import Positions
from tracekit.replay.arrays import positions as positions_of
from tracekit.replay.clairvoyant import clairvoyant_us
from tracekit.replay.costs import CostModel, Progress
from tracekit.replay.robust import reach_of_ratio
from tracekit.replay.serving import Serving
from tracekit.trace.store import TraceFile, recorded_with

_LEVELS = (0.025, 0.975)
_BUSY = 0.15  # spread of a step's time around its fit; 0.01 to 0.05 where nothing else runs
_MOST_BYTES = 256 << 20  # of counts that are held at once
_REFUSED_US = 1e18  # price of a step that goes beyond the trace: no sum of real ones is as much


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval. Where it rests on a single prompt, or on one queue of requests, that spans only
    what the trace does not know, and is None where it knows everything.
    """

    value: float
    low: float | None
    high: float | None

    def columns(self, name: str, digits: int | None = None) -> dict[str, float | None]:
        """``name``, ``name_low`` and ``name_high``, rounded to ``digits`` where they are given."""
        found = {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}
        return found if digits is None else {k: None if v is None else round(v, digits) for k, v in found.items()}

    def around(self, others: Sequence[Interval], alone: bool = False) -> Interval:
        """The same value, in an interval that holds the ``others`` too; ``alone``: it has none of its own."""
        every = self, *others
        if not alone and self.low is not None:
            return Interval(self.value, min(i.low for i in every), max(i.high for i in every))
        low, high = min(i.value for i in every), max(i.value for i in every)
        return Interval(self.value, None, None) if low == high else Interval(self.value, low, high)


class League:
    """Positions and costs made ready, and the three references every policy is held against.

    ``cost`` may come from another trace than the positions (*what if this workload ran there?*). ``trace``: where the
    positions come from, and ``priced``: where the costs do, None for made-up ones. ``serving``: over how many slots,
    which ``cost`` must be fitted for. With several there is no clairvoyant optimum.

    Counts of policies are of the best estimate, or of each of the positions' fills where a method takes or returns
    several: what a live trace does not know is bracketed.
    """

    def __init__(
        self,
        positions: Positions,
        cost: CostModel,
        trace: TraceFile | None = None,
        priced: TraceFile | None = None,
        serving: Serving | None = None,
    ):
        self.positions, self.cost, self.trace, self.priced = positions, cost, trace, priced
        self.serving = serving or Serving()
        self.tokens = self.serving.tokens(self.positions)
        self.no_mtp_counts = self.serving.no_mtp_counts(self.positions)
        self.clairvoyant_us = clairvoyant_us(self.positions.fills[-1], self.cost) if self.serving.n_slots == 1 else None

    @classmethod
    def of(
        cls,
        trace: TraceFile,
        times: TraceFile | None = None,
        n_slots: int | None = None,
        queue: Sequence[str] | None = None,
        wave: int | None = None,
        progress: Progress | None = None,
    ) -> League:
        """The league of a trace, served over ``n_slots`` slots, or as it was recorded; at its own costs, or those of
        ``times``, another trace or a calibration. ``queue``: prompt ids in the order they are served; None: as
        recorded; ``wave``: :class:`~tracekit.replay.serving.Serving`'s. ``progress(done, total)`` counts draws of the
        costs. Raises :class:`~tracekit.errors.TracekitError` where the times do not tell enough.
        """
        priced = times or trace
        serving = Serving.of(priced, Serving.of(trace, n_slots).n_slots, wave)
        found = positions_of(trace, serving.shortest)
        found = found if queue is None else found.queued(queue)
        return cls(found, serving.fit(priced, found.n_max, progress), trace, priced, serving=serving)

    def times(self, policies: Sequence[Policy]) -> np.ndarray:
        """Predicted microseconds of every request under every policy, the longest over the fills: float64
        ``[n_policies, n_requests]``. Raises as :meth:`counts`.
        """
        filled = []
        for fill in self.positions.fills:
            prices = self.cost.prices.copy()
            prices[kernel.INEXACT] = _REFUSED_US * (fill.mode == "probe")
            filled.append(self.serving.times(policies, fill, prices))
        longest = np.max(filled, 0)
        self._refuse(policies, longest >= _REFUSED_US)
        return longest

    def counts(self, policies: Sequence[Policy], fill: int = 0) -> np.ndarray:
        """What the cost model prices, of every policy and request: ``[n_policies, n_requests, n_counts]``. Raises
        :class:`~tracekit.errors.TracekitError` for a policy that asks for more drafts than were recorded.
        """
        filled = self.positions.fills[fill]
        found = self.serving.counts(policies, filled)
        if filled.mode == "probe":
            self._refuse(policies, found[:, :, kernel.INEXACT] > 0)
        return found

    def _refuse(self, policies: Sequence[Policy], beyond: np.ndarray) -> None:
        """Raise for the first of ``policies`` with a request that goes ``beyond``, bool ``[n_policies, n_requests]``,
        what was recorded: a probe knows everything up to there.
        """
        if beyond.any():
            raise simulate.beyond(policies[int(beyond.any(1).argmax())], self.positions)

    def filled_counts(self, policies: Sequence[Policy]) -> list[np.ndarray]:
        """:meth:`counts` in each of the positions' fills."""
        return [self.counts(policies, fill) for fill in range(len(self.positions.fills))]

    @property
    def no_mtp_us(self) -> np.ndarray:
        """Predicted time of each request without MTP, microseconds; with several slots its share of the machine."""
        return self.no_mtp_counts @ self.cost.prices

    def no_mtp_speed(self) -> Interval:
        """Tokens per second without MTP."""
        return self._speed(self.no_mtp_counts)

    @cached_property
    def warning(self) -> str:
        """What one should know before trusting the prices; empty where there is nothing."""
        found, n_slots = [], self.serving.n_slots
        if self.cost.spread_ratio > _BUSY:
            found.append(f"steps spread by {100 * self.cost.spread_ratio:.0f} % around their fit, as on a busy machine")
        if self.cost.n_blocks == 1:
            found.append("all times are of one stretch: how much the machine drifts is not in the intervals")
        if self.trace and self.priced:
            its, here = (of.runs["model_sha256"][-1] for of in (self.priced, self.trace))
            if its != here:
                found.append("times are of another model than the trace's: their hashes differ")
            its, here = (recorded_with(self.trace, of) for of in (self.priced, self.trace))
            unlike = [f"{name} {its[name]} and not {here[name]}" for name in here if its[name] != here[name]]
            unlike += filter(None, [self.serving.unlike(Serving.of(self.trace, n_slots))])
            if unlike:
                found.append(f"times are of other settings than the trace's: {', '.join(unlike)}")
        longest, known = int((self.positions.n_prompt + self.positions.n_generated).max()), self.cost.most_tokens
        if n_slots == 1 and longest > known:
            reach = f"requests reach {longest} tokens, times were measured up to {known}"
            found.append(f"{reach}: beyond, context is extrapolated")
        return "; ".join(found)

    def clairvoyant_speed(self) -> float | None:
        """Tokens per second of the clairvoyant optimum, a bound; None with several slots."""
        return None if self.clairvoyant_us is None else float(1e6 * self.tokens.sum() / self.clairvoyant_us.sum())

    def static_policies(self) -> list[Policy]:
        """``static`` at every recorded draft length."""
        return [rule("static")(n_max=n) for n in range(1, self.positions.n_max + 1)]

    def usual_policies(self) -> list[Policy]:
        """What one looks at first: ``off``, fixed lengths and the fallback, as far as drafts were recorded."""
        n_max = self.positions.n_max
        lengths = sorted({1, 2, 4, n_max} & set(range(1, n_max + 1)))
        return [rule("off")(), *(rule("static")(n_max=n) for n in lengths), rule("fallback")(n_max=n_max)]

    def table(self, policies: Sequence[Policy]) -> pl.DataFrame:
        """One row per policy, in order; speeds in tokens per second of generation, with 95 % intervals.

        ``speedup`` is against no MTP. A single prompt tells nothing of others, nor do requests of a policy whose state
        outlives one: all together are one then, and an interval is of what is not known. ``exact_fraction``: share of
        steps whose outcome the trace determines; where it is below 1 the interval spans the guesses of what is not
        known (:meth:`tracekit.replay.arrays.Positions.guess`). ``regret``: time lost against the clairvoyant optimum,
        over its time; None with several slots.
        """
        rows, chunk = [], max(1, _MOST_BYTES // self.no_mtp_counts.nbytes)
        for start in range(0, len(policies), chunk):
            some = policies[start : start + chunk]
            rows += [self._row(*of) for of in zip(some, *self.filled_counts(some), strict=True)]
        return pl.DataFrame(rows, infer_schema_length=None)

    def _row(self, policy: Policy, *filled: np.ndarray) -> dict:
        best, alone = filled[0], policy.scope == "engine"
        speed, gain = self.speed(filled, alone=alone), self.gain(filled, alone=alone)
        total = best.sum(0)
        steps, drafted, accepted = (int(total[c]) for c in (kernel.STEPS, kernel.DRAFTED, kernel.ACCEPTED))
        verifications = int(total[kernel.VERIFICATIONS])
        tokens = self.tokens.sum()
        return {
            "policy": policy.label,
            **speed.columns("tokens_per_second"),
            **gain.columns("speedup"),
            "verifications": verifications,
            "drafted": drafted,
            "accepted": accepted,
            "acceptance_ratio": accepted / drafted if drafted else None,
            "tau": 1 + accepted / verifications if verifications else None,
            "amplification": (steps + drafted) / int(total[kernel.TOKENS]),
            "trips": int(total[kernel.TRIPS]),
            "exact_fraction": 1 - best[:, kernel.INEXACT].sum() / steps,
            "regret": self._regret(best),
            "n_slots": self.serving.n_slots,
            "n_requests": self.positions.n_requests,
            "n_prompts": self.positions.n_prompts,
            "n_tokens": int(tokens),
        }

    def _regret(self, known: np.ndarray) -> float | None:
        if self.clairvoyant_us is None:
            return None
        return float((known @ self.cost.prices).sum() / self.clairvoyant_us.sum() - 1)

    @cached_property
    def members(self) -> dict[str, np.ndarray]:
        """Which requests belong to each prompt category: bool ``[n_requests]``."""
        names = np.array(self.positions.categories)
        return {c: names == c for c in sorted(set(self.positions.categories))}

    def inexact_fraction(self, policy: Policy) -> float:
        """Share of the policy's steps that the trace does not determine."""
        known = self.counts([policy])[0]
        return float(known[:, kernel.INEXACT].sum() / known[:, kernel.STEPS].sum())

    def by_category(self, policy: Policy) -> pl.DataFrame:
        """One row per prompt category: tokens per second and speed-up against no MTP, each with its 95 % interval."""
        filled, alone = [counts[0] for counts in self.filled_counts([policy])], policy.scope == "engine"
        rows = []
        for category, member in self.members.items():
            speed, gain = self.speed(filled, member, alone), self.gain(filled, member, alone)
            total = filled[0][member].sum(0)
            drafted = int(total[kernel.DRAFTED])
            rows.append(
                {
                    "category": category,
                    "n_requests": int(member.sum()),
                    "n_prompts": len(np.unique(self.positions.prompts[member])),
                    **speed.columns("tokens_per_second"),
                    **gain.columns("speedup"),
                    "acceptance_ratio": int(total[kernel.ACCEPTED]) / drafted if drafted else None,
                }
            )
        return pl.DataFrame(rows, infer_schema_length=None)

    def speed(self, filled: Sequence[np.ndarray], member: np.ndarray | None = None, alone: bool = False) -> Interval:
        """Tokens per second of requests whose counts, int64 ``[n_requests, n_counts]``, are ``filled`` in each of the
        fills, of all or of ``member`` ones. ``alone``: they are one queue, of which there are no others to compare.
        """
        first, *others = (self._speed(known, member) for known in filled)
        return first.around(others, alone)

    def speed_of_these(self, policy: Policy | None) -> Interval:
        """Tokens per second of exactly these requests under ``policy`` (None: no MTP); the interval is the cost
        model's alone.
        """
        known = self.no_mtp_counts if policy is None else self.counts([policy])[0]
        total, tokens = known.sum(0), 1e6 * self.tokens.sum()
        low, high = np.quantile(tokens / self.cost.drawn_us(total), _LEVELS)
        return Interval(float(tokens / (total @ self.cost.prices)), float(low), float(high))

    def gain_of_these(self, policy: Policy | None) -> Interval:
        """Speed-up against no MTP of exactly these requests, as above; both share every draw."""
        if policy is None:
            return Interval(1.0, 1.0, 1.0)
        total, plain = self.counts([policy])[0].sum(0), self.no_mtp_counts.sum(0)
        low, high = np.quantile(self.cost.drawn_us(plain) / self.cost.drawn_us(total), _LEVELS)
        return Interval(float((plain @ self.cost.prices) / (total @ self.cost.prices)), float(low), float(high))

    def gain(self, filled: Sequence[np.ndarray], member: np.ndarray | None = None, alone: bool = False) -> Interval:
        """Speed-up against no MTP, as above; numerator and denominator share every draw."""
        first, *others = (self._gain(known, member) for known in filled)
        return first.around(others, alone)

    def _gain(self, known: np.ndarray, member: np.ndarray | None) -> Interval:
        chosen = slice(None) if member is None else member
        return self._interval(chosen, self.no_mtp_us[chosen], known[chosen], self.no_mtp_counts[chosen])

    def _speed(self, known: np.ndarray, member: np.ndarray | None = None) -> Interval:
        chosen = slice(None) if member is None else member
        return self._interval(chosen, 1e6 * self.tokens[chosen], known[chosen])

    def _interval(
        self, chosen: slice | np.ndarray, parts: np.ndarray, known: np.ndarray, against: np.ndarray | None = None
    ) -> Interval:
        """The sum of ``parts`` over the time of the ``chosen`` requests, whose counts are ``known``, and its 95 %
        interval: how it differs between prompts, and with the costs, those of the counts ``against`` it included.
        """
        times = known @ self.cost.prices
        value = float(parts.sum() / times.sum())
        prompt = np.unique(self.positions.prompts[chosen], return_inverse=True)[1]
        if prompt.max() == 0:
            return Interval(value, None, None)
        of_prompts = reach_of_ratio(np.bincount(prompt, parts), np.bincount(prompt, times))
        total = self.cost.drawn_us(known.sum(0))
        drawn = (parts.sum() if against is None else self.cost.drawn_us(against.sum(0))) / total
        low, high = np.quantile(np.log(drawn / value), _LEVELS)
        reach = np.hypot(of_prompts, max(-low, 0.0)), np.hypot(of_prompts, max(high, 0.0))
        return Interval(value, float(value * np.exp(-reach[0])), float(value * np.exp(reach[1])))
