"""Choose a policy on a trace, safely: the fastest that slows no prompt category by more than allowed, judged on
requests it was not chosen on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tracekit.errors import TracekitError
from tracekit.policy.rule import Policy, rule
from tracekit.replay.league import League
from tracekit.tune.space import grid, neighbours

_REFINED = 8  # best policies whose neighbourhood is tried
_FRACTIONS = (0.5, 0.25)  # of a grid step
_STRICTER = 20  # times that the selection is made stricter

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Search:
    """What a search found. ``times`` float64 ``[n_policies, n_requests]``: predicted microseconds; ``chosen``: index
    of the winner, ``off`` is 0.

    ``held_out``: the policy index chosen, for each request, without it. ``allowed``: the slowdown the selection
    allowed in the end.
    """

    policies: list[Policy]
    times: np.ndarray
    chosen: int
    held_out: np.ndarray
    allowed: float

    @property
    def policy(self) -> Policy:
        """The policy chosen."""
        return self.policies[self.chosen]


def search(
    league: League,
    space: Mapping[str, Mapping[str, str]],
    max_slowdown: float = 0.02,
    folds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> Search:
    """Search ``space`` on the requests of ``league``. Raises :class:`TracekitError` with fewer requests than folds.

    In every fold the selection sees the other requests only (what it selects from, the grid refined around the best of
    all requests, is common). Where the policies so chosen slow a category of held-out requests by more than
    ``max_slowdown``, the selection is made stricter and repeated; a search that finds nothing safe returns ``off``.
    On a live trace a request takes the longest time that what is not known allows.
    """
    n = league.positions.n_requests
    if not 0 <= max_slowdown < 1:
        raise TracekitError(f"--max-slowdown {max_slowdown}: a fraction between 0 and 1 (0.02 is 2 %)")
    if not 2 <= folds <= n:
        raise TracekitError(f"--folds {folds}: between 2 and the number of requests in the trace, {n}")
    if seed < 0:
        raise TracekitError(f"--seed {seed}: 0 or more")
    policies = grid(space, league.positions.n_max)
    times = _times(league, policies, progress)
    fold = _folds(league.positions.categories, folds, seed)
    for fraction in _FRACTIONS:
        best = _ranked(league, times, np.ones(n, bool), max_slowdown)[:_REFINED]
        known = set(policies)
        beside = neighbours([policies[i] for i in best], space, league.positions.n_max, fraction)
        fresh = [p for p in beside if p not in known]
        if fresh:
            policies = policies + fresh
            times = np.concatenate((times, _times(league, fresh, None)))
    allowed = max_slowdown
    for _ in range(_STRICTER):
        held_out, closest = np.zeros(n, int), -np.inf
        for k in range(folds):
            best = _ranked(league, times, fold != k, allowed)[0]
            held_out[fold == k] = best
            closest = max(closest, worst_slowdown(league, times[best], fold != k))
        chosen = int(_ranked(league, times, np.ones(n, bool), allowed)[0])
        excess = worst_slowdown(league, times[held_out, np.arange(n)]) - max_slowdown
        if excess <= 0 or chosen == 0:
            return Search(policies, times, chosen, held_out, allowed)
        allowed = min(allowed - excess, closest - 1e-6)  # so that some fold selects another
    return Search(policies, times, 0, np.zeros(n, int), allowed)


def _times(league: League, policies: Sequence[Policy], progress: Progress | None) -> np.ndarray:
    """Predicted time of every policy on every request; ``off`` means not loading MTP at all."""
    out = np.empty((len(policies), league.positions.n_requests))
    for start in range(0, len(policies), 512):
        out[start : start + 512] = league.times(policies[start : start + 512])
        if progress:
            progress(min(start + 512, len(policies)), len(policies))
    off = [i for i, p in enumerate(policies) if p == rule("off")()]
    out[off] = league.no_mtp_us
    return out


def _folds(categories: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """A fold for every request, each category spread evenly."""
    rng = np.random.default_rng(seed)
    fold, next_fold = np.zeros(len(categories), int), 0
    for category in sorted(set(categories)):
        members = rng.permutation([i for i, c in enumerate(categories) if c == category])
        fold[members] = (next_fold + np.arange(len(members))) % folds
        next_fold += len(members)
    return fold


def _ranked(league: League, times: np.ndarray, seen: np.ndarray, allowed: float) -> np.ndarray:
    """Indices of the policies that keep every category of the ``seen`` requests within ``allowed``, fastest first;
    never empty.
    """
    safe = np.ones(len(times), bool)
    for member in league.members.values():
        here = member & seen
        safe &= times[:, here].sum(1) <= (1 + allowed) * league.no_mtp_us[here].sum() + 1e-6
    safe[0] = True
    total = np.where(safe, times[:, seen].sum(1), np.inf)
    return np.argsort(total, kind="stable")[: int(safe.sum())]


def worst_slowdown(league: League, time: np.ndarray, seen: np.ndarray | bool = True) -> float:
    """The largest slowdown against no MTP over the categories, of times float64 ``[n_requests]``; of the ``seen``
    requests.
    """
    here = [m & seen for m in league.members.values() if (m & seen).any()]
    return max(float(time[m].sum() / league.no_mtp_us[m].sum() - 1) for m in here)


def held_out_counts(league: League, found: Search) -> list[np.ndarray]:
    """Counts of each request under the policy chosen without it, in each of the positions' fills: int64 ``[n_requests,
    n_counts]``.
    """
    used = sorted(set(found.held_out.tolist()))
    chosen = np.searchsorted(used, found.held_out), np.arange(league.positions.n_requests)
    return [counts[chosen] for counts in league.filled_counts([found.policies[i] for i in used])]
