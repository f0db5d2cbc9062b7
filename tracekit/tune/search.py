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
_MOST_TIMES = 1 << 24  # of single requests that are held at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Search:
    """What a search found. ``chosen``: index of the winner in ``policies``, ``off`` is 0; ``total_us`` float64
    ``[n_policies]``: predicted microseconds of all requests.

    ``held_out``: the policy index chosen, for each request, without it. ``allowed``: the slowdown the selection
    allowed in the end. ``refused``: what was chosen at first, and the category of held-out requests that choices like
    it slowed by more than allowed, and by how much; None where they did not.
    """

    policies: list[Policy]
    total_us: np.ndarray
    chosen: int
    held_out: np.ndarray
    allowed: float
    refused: tuple[Policy, str, float] | None = None

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
    policies, everything = grid(space, league.positions.n_max), np.ones(folds, bool)
    fold = _folds(league.positions.categories, folds, seed)
    times = _Times(league, fold)
    times.add(policies, progress)
    for fraction in _FRACTIONS:
        best = times.ranked(everything, max_slowdown)[:_REFINED]
        known = set(policies)
        beside = neighbours([policies[i] for i in best], space, league.positions.n_max, fraction)
        fresh = [p for p in beside if p not in known]
        if fresh:
            policies = policies + fresh
            times.add(fresh, None)
    allowed, refused = max_slowdown, None
    for _ in range(_STRICTER):
        best, closest = np.zeros(folds, int), -np.inf
        for k in range(folds):
            seen = np.arange(folds) != k
            best[k] = times.ranked(seen, allowed)[0]
            closest = max(closest, times.slowdowns(np.full(folds, best[k]), seen).max())
        chosen = int(times.ranked(everything, allowed)[0])
        slowed = times.slowdowns(best, everything)
        excess = slowed.max() - max_slowdown
        if excess <= 0 or chosen == 0:
            return Search(policies, times.total_us, chosen, best[fold], allowed, refused)
        refused = refused or (policies[chosen], list(league.members)[slowed.argmax()], float(slowed.max()))
        allowed = min(allowed - excess, closest - 1e-6)  # so that some fold selects another
    return Search(policies, times.total_us, 0, np.zeros(n, int), allowed, refused)


class _Times:
    """Predicted microseconds of policies on the requests of each category and fold, ``off`` being no MTP: sums, float64
    ``[n_policies, n_categories, n_folds]``, so that memory does not grow with policies times requests.
    """

    def __init__(self, league: League, fold: np.ndarray):
        members = list(league.members.values())
        self._league, self._shape = league, (len(members), int(fold.max()) + 1)
        self._cells = np.argmax(members, 0) * self._shape[1] + fold
        self._sums = np.zeros((0, *self._shape))
        self._no_mtp = self._summed(league.no_mtp_us[None])[0]

    def _summed(self, times: np.ndarray) -> np.ndarray:
        sums = np.array([np.bincount(self._cells, of, self._shape[0] * self._shape[1]) for of in times])
        return sums.reshape(-1, *self._shape)

    def add(self, policies: Sequence[Policy], progress: Progress | None) -> None:
        """Predict more policies."""
        chunk = int(np.clip(_MOST_TIMES // self._league.positions.n_requests, 1, 512))
        for start in range(0, len(policies), chunk):
            some = policies[start : start + chunk]
            times = self._league.times(some)
            times[[p == rule("off")() for p in some]] = self._league.no_mtp_us
            self._sums = np.concatenate((self._sums, self._summed(times)))
            if progress:
                progress(min(start + chunk, len(policies)), len(policies))

    @property
    def total_us(self) -> np.ndarray:
        """Of all requests: float64 ``[n_policies]``."""
        return self._sums.sum((1, 2))

    def ranked(self, seen: np.ndarray, allowed: float) -> np.ndarray:
        """Indices of the policies that keep every category of the requests in the ``seen`` folds within ``allowed``,
        fastest first; never empty.
        """
        times = self._sums[:, :, seen].sum(2)
        safe = (times <= (1 + allowed) * self._no_mtp[:, seen].sum(1) + 1e-6).all(1)
        safe[0] = True
        return np.argsort(np.where(safe, times.sum(1), np.inf), kind="stable")[: int(safe.sum())]

    def slowdowns(self, chosen: np.ndarray, seen: np.ndarray) -> np.ndarray:
        """Each category's slowdown against no MTP, float64 ``[n_categories]``, of the requests in the ``seen`` folds,
        each fold under the policy that is ``chosen`` for it: int ``[n_folds]``. -1 for a category without requests.
        """
        folds = np.flatnonzero(seen)
        times, no_mtp = self._sums[chosen[folds], :, folds].sum(0), self._no_mtp[:, folds].sum(1)
        return np.divide(times, no_mtp, out=np.zeros(len(times)), where=no_mtp > 0) - 1


def _folds(categories: Sequence[str], folds: int, seed: int) -> np.ndarray:
    """A fold for every request, each category spread evenly."""
    rng = np.random.default_rng(seed)
    fold, next_fold = np.zeros(len(categories), int), 0
    names = np.array(categories)
    for category in sorted(set(categories)):
        members = rng.permutation(np.flatnonzero(names == category))
        fold[members] = (next_fold + np.arange(len(members))) % folds
        next_fold += len(members)
    return fold


def worst_slowdown(league: League, time: np.ndarray) -> float:
    """The largest slowdown against no MTP over the categories, of times float64 ``[n_requests]``."""
    return max(float(time[m].sum() / league.no_mtp_us[m].sum() - 1) for m in league.members.values())


def held_out_counts(league: League, found: Search) -> list[np.ndarray]:
    """Counts of each request under the policy chosen without it, in each of the positions' fills: int64 ``[n_requests,
    n_counts]``; where that is ``off``, those of the baseline.
    """
    used = sorted(set(found.held_out.tolist()))
    chosen = np.searchsorted(used, found.held_out), np.arange(league.positions.n_requests)
    filled = [counts[chosen] for counts in league.filled_counts([found.policies[i] for i in used])]
    for counts in filled:
        counts[found.held_out == 0] = league.no_mtp_counts[found.held_out == 0]
    return filled
