"""What every policy would have done on a trace: counts, predicted speed with its interval, and regret."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import polars as pl

from tracekit.policy.rule import Policy, rule
from tracekit.replay import kernel
from tracekit.replay.arrays import Positions
from tracekit.replay.arrays import positions as positions_of
from tracekit.replay.clairvoyant import clairvoyant_us
from tracekit.replay.costs import CostModel
from tracekit.replay.serving import Serving
from tracekit.trace.store import TraceFile

_LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class League:
    """Positions and costs made ready: the bootstrap draws, and the three references every policy is held against.

    ``cost`` may come from another trace than the positions (*what if this workload ran there?*). ``trace``: where the
    positions come from, None for made-up ones. ``serving``: over how many slots, which ``cost`` must be fitted for.
    With several there is no clairvoyant optimum.
    """

    def __init__(
        self,
        positions: Positions,
        cost: CostModel,
        trace: TraceFile | None = None,
        seed: int = 0,
        serving: Serving | None = None,
    ):
        self.positions, self.cost, self.trace = positions, cost, trace
        self.serving = serving or Serving()
        rng = np.random.default_rng(seed)
        n = self.positions.n_requests
        self._draws = rng.multinomial(n, np.full(n, 1 / n), len(self.cost.boot))  # [n_boot, n_requests]
        self.tokens = self.serving.tokens(self.positions)
        self._off = self._counts([rule("off")()])[0]
        self.clairvoyant_us = clairvoyant_us(self.positions, self.cost) if self.serving.n_slots == 1 else None

    @classmethod
    def of(
        cls,
        trace: TraceFile,
        times: TraceFile | None = None,
        n_slots: int | None = None,
        queue: Sequence[str] | None = None,
        wave: int | None = None,
    ) -> League:
        """The league of a trace, served over ``n_slots`` slots, or as it was recorded; at its own costs, or those of
        ``times``, another trace or a calibration. ``queue``: prompt ids in the order they are served; None: as
        recorded; ``wave``: :class:`~tracekit.replay.serving.Serving`'s. Raises
        :class:`~tracekit.errors.TracekitError` where the times do not tell enough.
        """
        found, priced = positions_of(trace), times or trace
        found = found if queue is None else found.queued(queue)
        serving = Serving.of(priced, Serving.of(trace, n_slots).n_slots, wave)
        return cls(found, serving.fit(priced, found.n_max), trace, serving=serving)

    def _counts(self, policies: Sequence[Policy], positions: Positions | None = None) -> np.ndarray:
        return self.serving.counts(policies, positions or self.positions)

    def times(self, policies: Sequence[Policy]) -> np.ndarray:
        """Predicted microseconds of every request under every policy: float64 ``[n_policies, n_requests]``."""
        return self.serving.times(policies, self.answerable, self.cost.prices)

    def counts(self, policies: Sequence[Policy]) -> np.ndarray:
        """What the cost model prices, of every policy and request: ``[n_policies, n_requests, n_counts]``."""
        return self._counts(policies, self.answerable)

    @property
    def no_mtp_us(self) -> np.ndarray:
        """Predicted time of each request without MTP, microseconds; with several slots its share of the machine."""
        return self._off @ self.cost.no_mtp

    def no_mtp_speed(self) -> Interval:
        """Tokens per second without MTP."""
        return self._speed(self._off, self.cost.no_mtp, self.cost.boot_no_mtp)

    def clairvoyant_speed(self) -> float | None:
        """Tokens per second of the clairvoyant optimum, a bound; None with several slots."""
        return None if self.clairvoyant_us is None else float(1e6 * self.tokens.sum() / self.clairvoyant_us.sum())

    def static_policies(self) -> list[Policy]:
        """``static`` at every recorded draft length."""
        return [rule("static")(n_max=n) for n in range(1, self.positions.n_max + 1)]

    def usual_policies(self) -> list[Policy]:
        """What one looks at first: ``off``, fixed lengths and the seed's fallback, as far as drafts were recorded."""
        n_max = self.positions.n_max
        lengths = sorted({1, 2, 4, n_max} & set(range(1, n_max + 1)))
        return [rule("off")(), *(rule("static")(n_max=n) for n in lengths), rule("fallback")(n_max=n_max)]

    def table(self, policies: Sequence[Policy]) -> pl.DataFrame:
        """One row per policy, in order; speeds in tokens per second of generation, with 95 % intervals.

        ``speedup`` is against no MTP. ``exact_fraction``: share of steps whose outcome the trace determines; where it
        is below 1 the interval spans what lies between no and every unknown draft being right. ``regret``: time lost
        against the clairvoyant optimum, over its time; None with several slots.
        """
        known = self._counts(policies)
        guesses = {fill: self._counts(policies, self.positions.guess(fill)) for fill in self._guesses(known)}
        return pl.DataFrame([self._row(p, i, known, guesses) for i, p in enumerate(policies)])

    @staticmethod
    def _guesses(known: np.ndarray) -> tuple[str, ...]:
        return ("mean", "all") if known[:, :, kernel.INEXACT].any() else ()

    def _row(self, policy: Policy, i: int, known: np.ndarray, guesses: dict[str, np.ndarray]) -> dict:
        inexact = known[i, :, kernel.INEXACT].any()
        best = guesses["mean"][i] if inexact else known[i]
        speed, gain = self.speed(best), self.gain(best)
        if inexact:
            bounds = [self.speed(x) for x in (known[i], guesses["all"][i])]
            gains = [self.gain(x) for x in (known[i], guesses["all"][i])]
            speed = Interval(speed.value, min(b.low for b in bounds), max(b.high for b in bounds))
            gain = Interval(gain.value, min(g.low for g in gains), max(g.high for g in gains))
        total = best.sum(0)
        steps, drafted, accepted = (int(total[c]) for c in (kernel.STEPS, kernel.DRAFTED, kernel.ACCEPTED))
        verifications = int(total[kernel.VERIFICATIONS])
        tokens = self.tokens.sum()
        return {
            "policy": policy.label,
            **_columns(speed, gain),
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

    @cached_property
    def answerable(self) -> Positions:
        """The positions with what a live trace does not know filled in as it is where it does; a probe trace's own."""
        return self.positions.guess("mean")

    def inexact_fraction(self, policy: Policy) -> float:
        """Share of the policy's steps that the trace does not determine."""
        known = self.counts([policy])[0]
        return float(known[:, kernel.INEXACT].sum() / known[:, kernel.STEPS].sum())

    def by_category(self, policy: Policy) -> pl.DataFrame:
        """One row per prompt category: tokens per second and speed-up against no MTP, each with its 95 % interval."""
        known = self.counts([policy])[0]
        rows = []
        for category, member in self.members.items():
            speed, gain, total = self.speed(known, member), self.gain(known, member), known[member].sum(0)
            drafted = int(total[kernel.DRAFTED])
            rows.append(
                {
                    "category": category,
                    "n_requests": int(member.sum()),
                    **_columns(speed, gain),
                    "acceptance_ratio": int(total[kernel.ACCEPTED]) / drafted if drafted else None,
                }
            )
        return pl.DataFrame(rows)

    def speed(self, known: np.ndarray, member: np.ndarray | None = None) -> Interval:
        """Tokens per second of requests with counts ``known`` (int64 ``[n_requests, n_counts]``), of all or of
        ``member`` ones.
        """
        return self._speed(known, self.cost.prices, self.cost.boot, member)

    def speed_of_these(self, policy: Policy | None) -> Interval:
        """Tokens per second of exactly these requests under ``policy`` (None: no MTP); the interval is the cost
        model's alone.
        """
        known = self._off if policy is None else self.counts([policy])[0]
        prices, boot = (
            (self.cost.no_mtp, self.cost.boot_no_mtp) if policy is None else (self.cost.prices, self.cost.boot)
        )
        total, tokens = known.sum(0), 1e6 * self.tokens.sum()
        return Interval(
            float(tokens / (total @ prices)), *(float(q) for q in np.quantile(tokens / (boot @ total), _LEVELS))
        )

    def gain(self, known: np.ndarray, member: np.ndarray | None = None) -> Interval:
        """Speed-up against no MTP, as above; numerator and denominator share every draw."""
        chosen = slice(None) if member is None else member
        value = self.no_mtp_us[chosen].sum() / (known[chosen] @ self.cost.prices).sum()
        time = self._drawn_us(known, self.cost.boot, chosen)
        ratio = self._drawn_us(self._off, self.cost.boot_no_mtp, chosen) / time
        return Interval(float(value), *(float(q) for q in np.quantile(ratio, _LEVELS)))

    def _speed(
        self, known: np.ndarray, prices: np.ndarray, boot: np.ndarray, member: np.ndarray | None = None
    ) -> Interval:
        chosen = slice(None) if member is None else member
        value = 1e6 * self.tokens[chosen].sum() / (known[chosen] @ prices).sum()
        drawn = 1e6 * (self._drawn(chosen) @ self.tokens[chosen]) / self._drawn_us(known, boot, chosen)
        return Interval(float(value), *(float(q) for q in np.quantile(drawn, _LEVELS)))

    def _drawn(self, chosen: np.ndarray | slice) -> np.ndarray:
        """How often each chosen request is in each draw; a draw without any of them counts them once each."""
        draws = self._draws[:, chosen].astype(float)
        draws[draws.sum(1) == 0] = 1.0
        return draws

    def _drawn_us(self, known: np.ndarray, boot: np.ndarray, chosen: np.ndarray | slice) -> np.ndarray:
        """Total time of each draw's requests under that draw's cost model."""
        return ((self._drawn(chosen) @ known[chosen]) * boot).sum(1)


def _columns(speed: Interval, gain: Interval) -> dict[str, float]:
    """The six columns of a speed and a speed-up."""
    return {
        f"{name}{end}": value
        for name, of in (("tokens_per_second", speed), ("speedup", gain))
        for end, value in (("", of.value), ("_low", of.low), ("_high", of.high))
    }
