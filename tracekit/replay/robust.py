"""Estimators for times measured on a busy machine: most of them right, some far off, in few cells of equal work."""

from __future__ import annotations

import numpy as np
from scipy.optimize import isotonic_regression, nnls
from scipy.stats import theilslopes

LEAST = 5  # measurements that make a cell
_MOST = 5  # times the median of its like: whatever took longer did other things as well
_TAIL = 0.5  # of a median: as far from it an ordinary slow step may be, where others share the machine
_PAIRED = 500  # values whose pairs a line goes by, of more every so-many-th
_PIECES = 10  # of a stretch of time that is the only one


def deviation(values: np.ndarray) -> float:
    """Median absolute deviation from the median."""
    return float(np.median(np.abs(values - np.median(values))))


def pulled_in(values: np.ndarray, tail: float = 0.0) -> np.ndarray:
    """``values`` with those far off (a descheduled process, not the work) pulled in to eight median deviations, or to
    the share ``tail`` of the median where that is farther.
    """
    middle = np.median(values)
    reach = max(8 * deviation(values), tail * abs(middle)) + 1e-9
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
    return np.array([np.median(ratio[b]) if len(b) >= 4 * LEAST else 1.0 for b in blocks])


def trend(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A line through ``y`` over ``x``, at ``x``, that a few outliers do not turn (Theil and Sen); zero where ``x`` does
    not vary.
    """
    few = slice(None, None, -(-len(x) // _PAIRED))
    if np.ptp(x[few]) <= 1e-3 * np.abs(x).max():
        return np.zeros(len(x))
    return theilslopes(y[few], x[few]).slope * (x - np.median(x))


def widened(draws: np.ndarray, centre: np.ndarray | float, n: int) -> np.ndarray:
    """Bootstrap ``draws`` of something estimated from ``n`` independent parts, their spread as wide as that of the
    estimate: drawing from few parts has a variance too small by ``(n - 1) / n``. With one part it has none.
    """
    return centre + (draws - centre) * np.sqrt(n / max(1, n - 1))


def blocks_of(block: np.ndarray) -> tuple[np.ndarray, int]:
    """The blocks that intervals are drawn from, and how many stretches of time they are. One stretch alone is cut into
    interleaved pieces: what is drawn then has the spread of single steps, but not that of a machine that drifts.
    """
    n = int(block.max()) + 1
    return (np.arange(len(block)) % _PIECES if n == 1 else block), n


def within(x: np.ndarray, y: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """How ``y`` grows with each column of ``x``, float64 ``[n, n_columns]``, among equal ``keys``, none negative: least
    squares of the differences from each key's mean, what is far off pulled in, beginning with what took more than
    :data:`_MOST` times its key's median. A column that is constant for every key gets 0.
    """
    if not len(y):
        return np.zeros(x.shape[1])
    groups = np.unique(keys, return_inverse=True)[1]
    counts = np.bincount(groups)

    def apart(values: np.ndarray) -> np.ndarray:
        return values - (np.bincount(groups, values) / counts)[groups]

    columns = np.column_stack([apart(column) for column in x.T.astype(float)])
    scale = np.sqrt((columns**2).sum(0))
    columns = np.where(scale > 1e-9 * (1 + np.abs(x).max(0)), columns / np.maximum(scale, 1e-300), 0.0)
    every = members(groups, len(counts))
    medians = np.array([np.median(y[of]) for of in every])
    y = np.minimum(y, _MOST * np.maximum(medians, 0)[groups])
    aim, found = apart(y), np.zeros(x.shape[1])
    wanted = aim
    for _ in range(4):
        found = nnls(columns, wanted)[0]
        fitted = columns @ found
        left = aim - fitted
        for of in every:
            left[of] = pulled_in(left[of])
        wanted = fitted + left
    return found / np.maximum(scale, 1e-300)


def slopes(x: np.ndarray, y: np.ndarray, keys: np.ndarray) -> tuple[float, float]:
    """How ``y`` grows with ``x``, which has few values, as ``a + b * key``; neither is negative.

    In each cell of equal ``key`` the slope is a line's through the robust mean at every value of ``x``.
    """
    found, weight, most = {}, {}, {}
    for key in np.unique(keys):
        here = keys == key
        values, counts = np.unique(x[here], return_counts=True)
        values, counts = values[counts >= LEAST], counts[counts >= LEAST]
        if len(values) < 2:
            continue
        means = np.array([robust_mean(y[here & (x == v)]) for v in values])
        away = values - np.average(values, weights=counts)
        weight[key] = float((counts * away**2).sum())
        slope = float((counts * away * means).sum()) / weight[key]
        # context cannot cost more than everything there is: noise must not drive a cell's level below zero
        most[key] = 0.8 * float((means / values).min())
        found[key] = min(max(slope, 0.0), most[key])
    if not found:
        return 0.0, 0.0
    key, slope, w = np.array(list(found)), np.array(list(found.values())), np.array(list(weight.values()))
    mean_key, mean_slope = np.average(key, weights=w), np.average(slope, weights=w)
    variance = np.average((key - mean_key) ** 2, weights=w)
    b = np.average((key - mean_key) * (slope - mean_slope), weights=w) / variance if variance else 0.0
    b = float(np.clip(b, 0.0, mean_slope / mean_key))
    a = float(mean_slope - b * mean_key)
    share = min([1.0, *(most[k] / (a + b * k) for k in most if a + b * k > 0)])
    return share * a, share * b


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
