"""Choose a policy on a trace, safely: the fastest that slows no prompt category by more than allowed, as far as the
prompts of each can tell, judged on prompts it was not chosen on.

A category's slowdown is a ratio of sums over its prompts, with the standard error that leaving out each of them in turn
tells (jackknife). Safe is a policy whose slowdown stays below what is allowed with some *confidence*: among
thousands of policies that look safe, the fastest is one whose slowdown is underestimated. Student's t it is that says
how many standard errors that takes, since few prompts hardly tell their own spread, and one not at all. Requests that
repeat a prompt count as one: they are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from tracekit.errors import TracekitError
from tracekit.policy.rule import Policy
from tracekit.replay.arrays import Positions
from tracekit.replay.league import League
from tracekit.tune.space import grid, neighbours

FOLDS = 5  # of a trace with so many prompts

_REFINED = 8  # best policies whose neighbourhood is tried
_FRACTIONS = (0.5, 0.25)  # of a grid step
_CONFIDENCES = 0.95, 0.98, 0.995, 0.999  # of a one-sided bound; more, where choices turn out unsafe
_MEAN = 0.5  # the confidence of a bound that is the mean itself
_MOST_TIMES = 1 << 24  # of single requests that are held at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Search:
    """What a search found. ``chosen``: index of the winner in ``policies``, ``off`` is 0; ``total_us`` float64
    ``[n_policies]``: predicted microseconds of all requests.

    ``held_out``: the policy index chosen, for each request, without it. ``confidence``: with which slowdowns had to
    stay below what is allowed. Policies that were not chosen, each with a prompt category and its slowdown, or None:
    ``refused``, chosen at first, when choices like it slowed that category of held-out requests by more than
    allowed; ``doubted``, where ``off`` is chosen and none was refused: faster, and by its means safe, but not with
    enough confidence; its slowdown is infinite where a single prompt tells nothing.
    """

    policies: list[Policy]
    total_us: np.ndarray
    chosen: int
    held_out: np.ndarray
    confidence: float
    refused: tuple[Policy, str, float] | None = None
    doubted: tuple[Policy, str, float] | None = None

    @property
    def policy(self) -> Policy:
        """The policy chosen."""
        return self.policies[self.chosen]


def usual_folds(league: League) -> int:
    """Folds where nobody says how many: five, or as many as there are prompts."""
    return min(FOLDS, league.positions.n_prompts)


def search(
    league: League,
    space: Mapping[str, Mapping[str, str]],
    max_slowdown: float = 0.02,
    folds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
    refine: bool = True,
) -> Search:
    """Search ``space`` on the requests of ``league``, and between its values with ``refine``, else these alone. Raises
    :class:`TracekitError` with fewer prompts than folds.

    In every fold the selection sees the other requests only (what it selects from, the grid refined around the best of
    all requests, is common). Where the policies so chosen slow a category of held-out requests by more than
    ``max_slowdown``, the selection is repeated with more confidence; a search that finds nothing safe returns ``off``.
    On a live trace a request takes the longest time that what is not known allows.
    """
    n = league.positions.n_prompts
    if not 0 <= max_slowdown < 1:
        raise TracekitError(f"--max-slowdown {max_slowdown}: a fraction between 0 and 1 (0.02 is 2 %)")
    if not 2 <= folds <= n:
        few = n < 2 and "a single prompt tells nothing of others; record more"
        raise TracekitError(few or f"--folds {folds}: between 2 and the number of prompts in the trace, {n}")
    if seed < 0:
        raise TracekitError(f"--seed {seed}: 0 or more")
    policies, everything = grid(space, league.positions.n_max, not refine), np.ones(folds, bool)
    fold = _folds(league.positions, folds, seed)
    times = _Times(league, fold)
    times.add(policies, progress)
    for fraction in _FRACTIONS if refine else ():
        best = times.ranked(everything, max_slowdown, _CONFIDENCES[0])[:_REFINED]
        known = set(policies)
        beside = neighbours([policies[i] for i in best], space, league.positions.n_max, fraction)
        fresh = [p for p in beside if p not in known]
        if fresh:
            policies = policies + fresh
            times.add(fresh, None)
    categories, refused, doubted = list(league.members), None, None
    others = [np.arange(folds) != k for k in range(folds)]  # what the choice for each fold sees
    for confidence in _CONFIDENCES:
        best = np.array([times.ranked(seen, max_slowdown, confidence)[0] for seen in others])
        chosen = int(times.ranked(everything, max_slowdown, confidence)[0])
        slowed = times.slowdowns(best)
        if chosen == 0 or slowed.max() <= max_slowdown + 1e-9:
            break
        refused = refused or (policies[chosen], categories[slowed.argmax()], float(slowed.max()))
    else:
        chosen, best = 0, np.zeros(folds, int)
    if chosen == 0 and refused is None and (by_mean := int(times.ranked(everything, max_slowdown, _MEAN)[0])):
        bounds = times.bounds(everything, confidence)[by_mean]
        doubted = policies[by_mean], categories[bounds.argmax()], float(bounds.max())
    held_out = best[fold[league.positions.prompts]]
    return Search(policies, times.total_us, chosen, held_out, confidence, refused, doubted)


def safe(league: League, policies: Sequence[Policy], max_slowdown: float, confidence: float) -> np.ndarray:
    """Whether each of ``policies`` slows no category by more than allowed, with this confidence: bool
    ``[n_policies]``.
    """
    times = _Times(league, np.zeros(league.positions.n_prompts, int))
    times.add(policies, None)
    return times.safe(np.ones(1, bool), max_slowdown, confidence)


class _Times:
    """Predicted microseconds of policies on the prompts of each category and fold, ``off`` being no MTP: sums, and
    what the spread of their ratio to no MTP takes, float64 ``[n_policies, n_categories, n_folds]``, so that memory does
    not grow with policies times prompts. ``fold``: that of every prompt. The requests of a prompt count together.
    """

    def __init__(self, league: League, fold: np.ndarray):
        categories, first = np.array(list(league.members)), np.unique(league.positions.prompts, return_index=True)[1]
        self._league, self._shape = league, (len(categories), int(fold.max()) + 1)
        category = np.searchsorted(categories, np.array(league.positions.categories)[first])
        self._cells = category * self._shape[1] + fold
        self._sums = self._squares = self._products = np.zeros((0, *self._shape))
        no_mtp = self._no_mtp_us = self._of_prompts(league.no_mtp_us[None])[0]
        # residuals tell too little of a prompt that is most of its category, where the ratio is its own
        n, whole = np.bincount(category), np.bincount(category, no_mtp)
        own = (1 - 1 / n[category]) / np.maximum(1 - no_mtp / whole[category], 1e-9)
        self._weights, once = own**2, np.ones(len(no_mtp))
        self._n, self._no_mtp, self._no_mtp_squares = self._summed(np.array([once, no_mtp, self._weights * no_mtp**2]))

    def _of_prompts(self, times: np.ndarray) -> np.ndarray:
        return np.array([np.bincount(self._league.positions.prompts, of) for of in times])

    def _summed(self, times: np.ndarray) -> np.ndarray:
        sums = np.array([np.bincount(self._cells, of, self._shape[0] * self._shape[1]) for of in times])
        return sums.reshape(-1, *self._shape)

    def add(self, policies: Sequence[Policy], progress: Progress | None) -> None:
        """Predict more policies."""
        no_mtp = self._no_mtp_us
        chunk = int(np.clip(_MOST_TIMES // self._league.positions.n_requests, 1, 512))
        for start in range(0, len(policies), chunk):
            some = policies[start : start + chunk]
            times = self._of_prompts(self._league.times(some))
            times[[p.is_off for p in some]] = no_mtp
            self._sums = np.concatenate((self._sums, self._summed(times)))
            self._squares = np.concatenate((self._squares, self._summed(self._weights * times**2)))
            self._products = np.concatenate((self._products, self._summed(self._weights * times * no_mtp)))
            if progress:
                progress(min(start + chunk, len(policies)), len(policies))

    @property
    def total_us(self) -> np.ndarray:
        """Of all requests: float64 ``[n_policies]``."""
        return self._sums.sum((1, 2))

    def bounds(self, seen: np.ndarray, confidence: float) -> np.ndarray:
        """What each category's slowdown against no MTP is below, judged by the ``seen`` folds, with this confidence:
        float64 ``[n_policies, n_categories]``; -1 without requests. Student's t is that of all the category's prompts:
        folds are to choose as all of them do. Of a single one (but for the mean) nothing is known.
        """
        times, squares, products = (of[:, :, seen].sum(2) for of in (self._sums, self._squares, self._products))
        n, no_mtp, no_mtp_squares = (of[:, seen].sum(1) for of in (self._n, self._no_mtp, self._no_mtp_squares))
        no_mtp = np.maximum(no_mtp, 1e-9)
        ratio = times / no_mtp
        spread = np.maximum(squares - 2 * ratio * products + ratio**2 * no_mtp_squares, 0)
        errors = np.sqrt(spread * n / np.maximum(n - 1, 1)) / no_mtp
        in_all = self._n.sum(1)
        bounds = ratio - 1 + stdtrit(np.maximum(in_all - 1, 1), confidence) * errors
        bounds[:, (in_all == 1) & (n == 1) & (confidence > _MEAN)] = np.inf
        return bounds

    def safe(self, seen: np.ndarray, allowed: float, confidence: float) -> np.ndarray:
        """Which policies keep every category within ``allowed``, as :meth:`bounds` judges: bool ``[n_policies]``."""
        return (self.bounds(seen, confidence) <= allowed + 1e-9).all(1)

    def ranked(self, seen: np.ndarray, allowed: float, confidence: float) -> np.ndarray:
        """Indices of the policies that are safe on the requests in the ``seen`` folds, fastest first; never empty."""
        safe = self.safe(seen, allowed, confidence)
        safe[0] = True
        times = self._sums[:, :, seen].sum((1, 2))
        return np.argsort(np.where(safe, times, np.inf), kind="stable")[: int(safe.sum())]

    def slowdowns(self, chosen: np.ndarray) -> np.ndarray:
        """Each category's slowdown against no MTP, float64 ``[n_categories]``, each fold under the policy that is
        ``chosen`` for it: int ``[n_folds]``.
        """
        times = self._sums[chosen, :, np.arange(len(chosen))].sum(0)
        return times / self._no_mtp.sum(1) - 1


def _folds(positions: Positions, folds: int, seed: int) -> np.ndarray:
    """A fold for every prompt, each category spread evenly."""
    rng = np.random.default_rng(seed)
    fold, next_fold = np.zeros(positions.n_prompts, int), 0
    names = np.array(positions.categories)[np.unique(positions.prompts, return_index=True)[1]]
    for category in sorted(set(names)):
        members = rng.permutation(np.flatnonzero(names == category))
        fold[members] = (next_fold + np.arange(len(members))) % folds
        next_fold += len(members)
    return fold


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
