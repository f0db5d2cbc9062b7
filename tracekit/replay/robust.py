"""Estimators for times measured on a busy machine: most of them right, some far off, in few cells of equal work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.linalg import solve_triangular
from scipy.optimize import isotonic_regression, nnls
from scipy.special import ndtri, stdtrit
from scipy.stats import theilslopes

LEAST = 5  # measurements that make a cell
_MOST = 5  # times the median of its like: whatever took longer did other things as well
_TAIL = 0.5  # of a median: as far from it an ordinary slow step may be, where others share the machine
_PAIRED = 500  # values whose pairs a line goes by, of more every so-many-th
_ITERATIONS = 100  # per price: SciPy's default of a few is an error where prices trade places
_FURTHEST = 1e3  # times an estimate, in a draw of it: hardly anything is known then
_PIECES = 10  # of a stretch of time that is the only one


def median(values: np.ndarray) -> float:
    """That of ``np.median``, which takes six times as long for the few numbers of a cell."""
    half, odd = divmod(len(values), 2)
    if odd:
        return np.partition(values, half)[half]
    below, above = np.partition(values, (half - 1, half))[half - 1 : half + 1]
    return (below + above) / 2


def deviation(values: np.ndarray) -> float:
    """Median absolute deviation from the median."""
    return float(median(np.abs(values - median(values))))


def pulled_in(values: np.ndarray, tail: float = 0.0) -> np.ndarray:
    """``values`` with those far off (a descheduled process, not the work) pulled in to eight median deviations, or to
    the share ``tail`` of the median where that is farther.
    """
    middle = median(values)
    reach = max(8 * median(np.abs(values - middle)), tail * abs(middle)) + 1e-9
    return np.clip(values, middle - reach, middle + reach)


def robust_mean(values: np.ndarray) -> float:
    """Mean of ``values`` with those far off pulled in.

    A median would be sturdier, but a total is a sum: what counts is the mean, an ordinary slow tail included.
    """
    return float(pulled_in(values, _TAIL).mean())


def cell_means(times: np.ndarray, keys: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Robust mean of ``times`` for each key below ``size``, and its standard error; NaN and infinite where fewer than
    :data:`LEAST` were measured.
    """
    cells, errors = np.full(size, np.nan), np.full(size, np.inf)
    for key in range(1, size):
        here = times[keys == key]
        if len(here) >= LEAST:
            cells[key], errors[key] = robust_mean(here), pulled_in(here, _TAIL).std() / np.sqrt(len(here))
    return cells, errors


def rising(values: np.ndarray, errors: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """``values`` made non-decreasing, but for those that are measured to be otherwise, by three standard errors: there
    are sizes that a backend's kernels are made for, and those just below them can be dearer.
    """
    fit = isotonic_regression(values, weights=weights).x
    return np.where(np.abs(values - fit) > 3 * errors, values, fit)


def members(keys: np.ndarray, n: int) -> list[np.ndarray]:
    """Where each of the keys 0 .. ``n - 1`` is in ``keys``: indices, ascending."""
    order = np.argsort(keys, kind="stable")
    return np.split(order, np.cumsum(np.bincount(keys, minlength=n))[:-1])


def slowness_of(ratio: np.ndarray, blocks: list[np.ndarray]) -> np.ndarray:
    """Median of measured over fitted time in each of the ``blocks``; 1 where too few steps tell."""
    return np.array([median(ratio[b]) if len(b) >= 4 * LEAST else 1.0 for b in blocks])


def trend(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A line through ``y`` over ``x``, at ``x``, that a few outliers do not turn (Theil and Sen); zero where ``x`` does
    not vary.
    """
    few = slice(None, None, -(-len(x) // _PAIRED))
    if np.ptp(x[few]) <= 1e-3 * np.abs(x).max():
        return np.zeros(len(x))
    with np.errstate(invalid="ignore"):  # in the slope's interval, which nobody asks for
        return theilslopes(y[few], x[few]).slope * (x - np.median(x))


def too_narrow(n: int, groups: int = 1) -> float:
    """How many times wider an estimate from ``n`` independent parts of each of ``groups`` spreads than bootstrap draws
    of it tell: their variance is too small by ``(n - 1) / n``, and how far 95 % of estimates from few parts are off is
    Student's t to say, not the normal distribution. One part has no spread at all.

    Source: the expanded percentile interval of Hesterberg, What Teachers Should Know about the Bootstrap, arXiv
    1411.5279.
    """
    if n < 2:
        return 1.0
    return float(np.sqrt(n / (n - 1)) * stdtrit(groups * (n - 1), 0.975) / ndtri(0.975))


def widened(draws: np.ndarray, centre: float, by: float) -> np.ndarray:
    """``draws`` of something positive spread ``by`` times as wide around ``centre``: in logarithms, so that none is
    negative, and none further off than :data:`_FURTHEST` times.
    """
    ratio = np.maximum(draws / centre, 1 / _FURTHEST) ** by
    return centre * np.clip(ratio, 1 / _FURTHEST, _FURTHEST)


def reach_of_ratio(parts: np.ndarray, wholes: np.ndarray) -> float:
    """How far the 95 % interval of ``sum(parts) / sum(wholes)``, two or more entries, reaches to either side, over that
    ratio: its standard error, from leaving out each entry in turn (jackknife), times Student's t of as many. Residuals
    alone would tell too little where an entry is most of the whole: the ratio is its own then.
    """
    n, shares = len(parts), wholes / wholes.sum()
    left = (parts / parts.sum() - shares) / (1 - shares)
    return float(stdtrit(n - 1, 0.975) * np.sqrt((n - 1) / n * (left**2).sum()))


def blocks_of(block: np.ndarray) -> tuple[np.ndarray, int]:
    """The blocks that intervals are drawn from, numbered from 0, and how many stretches of time they are. One stretch
    alone is cut into interleaved pieces: what is drawn then has the spread of single steps, but not that of a machine
    that drifts.
    """
    names, numbered = np.unique(block, return_inverse=True)
    return (np.arange(len(block)) % _PIECES if len(names) == 1 else numbered), len(names)


def drawn(rng: np.random.Generator, block: np.ndarray, needed: Sequence[np.ndarray]) -> np.ndarray:
    """How often each block is drawn when as many are, with replacement, and there is a step of each kind that is
    ``needed`` (bool ``[n]`` like ``block``, not all false) in what is drawn.
    """
    n = int(block.max()) + 1
    holds = [np.bincount(block, kind, n) > 0 for kind in needed]
    while True:
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        if all(times[of].any() for of in holds):
            return times


def beside(x: np.ndarray, y: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """How ``y`` grows with each column of ``x``, float64 ``[n, n_columns]``, beside a level for every size, and not at
    the cost of the levels: least squares of both together, where nothing is negative and no level below that of a
    smaller size. What is below 1 is no size but a kind, with a level that has nothing to do with the others. A column
    that is constant for every size gets 0.

    What is far off for its size is pulled in, beginning with what took more than :data:`_MOST` times the median.
    """
    if not len(y):
        return np.zeros(x.shape[1])
    values, groups = np.unique(sizes, return_inverse=True)
    every = members(groups, len(values))
    told = np.array([np.ptp(x[of], axis=0) for of in every]).any(0)
    size = values[groups, None]
    levels = np.where(values < 1, size == values, size >= values)
    columns = np.column_stack((x * told, levels)).astype(float)
    products = columns.T @ columns
    medians = np.array([median(y[of]) for of in every])
    aim = np.minimum(y, _MOST * np.maximum(medians, 0)[groups])
    wanted, found = aim, np.zeros(columns.shape[1])
    for _ in range(4):
        found = not_negative(products, wanted @ columns)
        fitted = columns @ found
        left = aim - fitted
        for of in every:
            left[of] = pulled_in(left[of])
        wanted = fitted + left
    return found[: x.shape[1]]


def not_negative(products: np.ndarray, aim: np.ndarray) -> np.ndarray:
    """Non-negative least squares from ``X'X``, float64 ``[n, n]``, and ``X'y``; what is nowhere counted gets 0."""
    used = products.diagonal() > 0
    out = np.zeros(len(aim))
    if used.any():
        scale = np.sqrt(products.diagonal()[used])
        scaled = products[np.ix_(used, used)] / scale[:, None] / scale
        root = np.linalg.cholesky(scaled + 1e-9 * np.eye(len(scale)))
        found = nnls(root.T, solve_triangular(root, aim[used] / scale, lower=True), maxiter=_ITERATIONS * len(scale))[0]
        out[used] = found / scale
    return out


def line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Intercept and slope (not negative) of ``y`` over ``x``, through the robust mean at each value of ``x``; a single
    value is taken to be proportional.
    """
    values, counts = np.unique(x, return_counts=True)
    means = np.array([robust_mean(y[x == v]) for v in values])
    if len(values) == 1:
        return 0.0, float(means[0] / values[0])
    slope = max(0.0, float(np.polyfit(values, means, 1, w=np.sqrt(counts))[0]))
    return float(np.average(means - slope * values, weights=counts)), slope
