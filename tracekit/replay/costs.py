"""What things cost, fitted from a trace's timings: prices for the counts of a walk, with their uncertainty.

    step = host + draft(decodes, rows caught up) + target(batch width) + sampling(tokens), each decode dearer with context

Every part is fitted to its own measured times: a robust mean per batch width and per number of rows, made monotone (isotonic
regression), over slopes in context. Three baselines stay apart: *no MTP* (hidden states not even extracted), MTP loaded but
idle, and each draft length.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import polars as pl
from scipy.optimize import isotonic_regression

from tracekit.errors import TracekitError
from tracekit.replay import kernel
from tracekit.trace.store import TraceFile

N_BOOT = 100
LEAST = 5  # measurements that make a cell


@dataclass(frozen=True)
class CostModel:
    """Microseconds per count of :mod:`tracekit.replay.kernel`, for drafts of up to ``n_max`` tokens.

    ``prices`` and ``no_mtp`` (the baseline without MTP): float64 ``[n_counts]``. ``boot`` and ``boot_no_mtp``: the same fitted to
    resampled requests, ``[n_boot, n_counts]``. ``cells``: what was measured, how often, and its median. ``spread_ratio``: median
    absolute deviation of a step's measured time over its fitted one.
    """

    n_max: int
    prices: np.ndarray
    no_mtp: np.ndarray
    boot: np.ndarray
    boot_no_mtp: np.ndarray
    cells: pl.DataFrame
    spread_ratio: float
    n_steps: int

    @property
    def id(self) -> str:
        """Identity of the prices."""
        return hashlib.sha256(np.round(np.concatenate((self.prices, self.no_mtp)), 6).tobytes()).hexdigest()[:12]


def fit(trace: TraceFile, n_max: int, n_boot: int = N_BOOT, seed: int = 0) -> CostModel:
    """The cost model of ``trace``. Raises :class:`TracekitError` where something that is needed was never measured."""
    steps = _Steps.read(trace)
    prices, no_mtp = steps.prices(n_max)
    rng = np.random.default_rng(seed)
    boot = [steps.resampled(rng).prices(n_max, otherwise=(prices, no_mtp)) for _ in range(n_boot)]
    ratio = steps.wall / steps.fitted(prices, no_mtp, n_max)
    return CostModel(
        n_max=n_max,
        prices=prices,
        no_mtp=no_mtp,
        boot=np.array([b[0] for b in boot]),
        boot_no_mtp=np.array([b[1] for b in boot]),
        cells=steps.cells(),
        spread_ratio=float(np.median(np.abs(ratio - np.median(ratio)))),
        n_steps=len(steps.wall),
    )


def _layout(n_max: int) -> tuple[slice, slice]:
    """Where the prices of target widths and of catch-up rows (0 .. n_max + 1 each) are."""
    start, size = kernel.N_SCALARS, n_max + 2
    return slice(start, start + size), slice(start + size, start + 2 * size)


@dataclass(frozen=True)
class _Steps:
    """The generating steps of one slot as columns (float64 ``[n]``; microseconds, tokens)."""

    path: str
    request: np.ndarray
    mtp: np.ndarray
    past: np.ndarray
    width: np.ndarray
    emitted: np.ndarray
    decodes: np.ndarray
    rows: np.ndarray
    target: np.ndarray
    first: np.ndarray
    draft: np.ndarray
    catchup: np.ndarray
    sample: np.ndarray
    wall: np.ndarray

    @classmethod
    def read(cls, trace: TraceFile) -> _Steps:
        frame = trace.frame(
            """SELECT dense_rank() OVER (ORDER BY run, request) - 1 AS request, mtp, n_past AS past, n_tokens AS width,
                      len(v.tokens) AS emitted, n_draft_decodes AS decodes, n_catchup AS rows, target_us AS target,
                      first_draft_us AS first, draft_us AS draft, catchup_us AS catchup, sample_us AS sample, wall_us AS wall
               FROM steps s JOIN verifications v USING (run, step)
               WHERE s.n_slots = 1 AND s.n_prompt = 0 AND v.n_generated > 0 ORDER BY run, step"""
        )
        if frame.is_empty():
            raise TracekitError(f"{trace.path}: no step of a single slot in it; costs need a recording with --parallel 1")
        found = cls(str(trace.path), **{c: frame[c].cast(pl.Float64).to_numpy() for c in frame.columns})
        if (found.mtp == 0).sum() < LEAST:
            raise TracekitError(f"{trace.path}: the baseline without MTP was not recorded; record with --baseline")
        return found

    def take(self, chosen: np.ndarray) -> _Steps:
        """The steps at ``chosen`` (a mask or indices)."""
        return _Steps(self.path, *(getattr(self, f.name)[chosen] for f in fields(self)[1:]))

    def resampled(self, rng: np.random.Generator) -> _Steps:
        """As many requests, drawn with replacement, with all their steps: neighbouring steps are not independent."""
        n = int(self.request.max()) + 1
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        return self.take(np.repeat(np.arange(len(self.request)), times[self.request.astype(int)]))

    @property
    def host(self) -> np.ndarray:
        """What a step takes beside decoding and sampling."""
        return self.wall - self.target - self.draft - self.catchup - self.sample

    def prices(self, n_max: int, otherwise: tuple[np.ndarray, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """``(prices, no_mtp)``; what these steps do not measure is taken from ``otherwise``, or refused without it."""
        prices, no_mtp = np.zeros(kernel.n_counts(n_max)), np.zeros(kernel.n_counts(n_max))
        before = otherwise or (None, None)
        on, off = self.take(self.mtp == 1), self.take(self.mtp == 0)
        on._price_target(prices, n_max, before[0])
        on._price_drafting(prices, n_max, before[0])
        on._price_host(prices)
        if not len(off.wall):
            return prices, before[1]
        per_token = prices[kernel.PAST] + prices[kernel.PAST_WIDTH]
        no_mtp[kernel.PAST] = per_token
        no_mtp[kernel.STEPS] = _robust_mean(off.wall - off.target)
        no_mtp[_layout(n_max)[0]][1] = _robust_mean(off.target - per_token * off.past)
        return prices, no_mtp

    def _price_target(self, prices: np.ndarray, n_max: int, before: np.ndarray | None) -> None:
        widths = _layout(n_max)[0]
        level, slope = _slopes(self.past, self.target, self.width)
        prices[kernel.PAST], prices[kernel.PAST_WIDTH] = level, slope
        cells = _cells(self.target - self.past * (level + slope * self.width), self.width, n_max + 2)
        prices[widths] = self._complete(cells, None if before is None else before[widths], "target batches of width")

    def _price_drafting(self, prices: np.ndarray, n_max: int, before: np.ndarray | None) -> None:
        rounds = self.take(self.decodes > 0)
        if not len(rounds.wall):
            return
        catchups, edge = _layout(n_max)[1], n_max + 1
        short, long = rounds.take(rounds.rows <= edge), rounds.take(rounds.rows > edge)
        more = rounds.take(rounds.decodes > 1)
        per_past = _slopes(short.past, short.first, short.rows)[0]
        prices[kernel.PAST_DRAFT] = per_past
        if len(more.wall):
            each = (more.draft - more.first) / (more.decodes - 1)
            prices[kernel.DRAFT_DECODES] = _robust_mean(each - per_past * more.past)
        known = None if before is None else before[catchups] + before[kernel.DRAFT_DECODES]
        first = self._complete(_cells(short.first - per_past * short.past, short.rows, n_max + 2), known, "catch-ups of rows")
        prices[catchups] = first - prices[kernel.DRAFT_DECODES]
        slope = (first[-1] - first[1]) / n_max
        if len(long.wall):
            beyond = long.first + long.catchup - per_past * long.past - first[-1]
            slope = max(0.0, _robust_mean(beyond / (long.rows - edge)))
        prices[kernel.LONG_CATCHUP_ROWS] = slope
        prices[kernel.LONG_CATCHUPS] = first[-1] - slope * edge - prices[kernel.DRAFT_DECODES]

    def _price_host(self, prices: np.ndarray) -> None:
        drafting = self.decodes > 0
        idle = _robust_mean(self.host[~drafting]) if (~drafting).any() else _robust_mean(self.host)
        per_step, per_token = _line(self.emitted, self.sample)
        prices[kernel.STEPS], prices[kernel.TOKENS] = idle + per_step, per_token
        prices[kernel.DRAFT_ROUNDS] = _robust_mean(self.host[drafting]) - idle if drafting.any() else 0.0

    def _complete(self, cells: np.ndarray, otherwise: np.ndarray | None, what: str) -> np.ndarray:
        """``cells`` from 1 on, gaps closed between neighbours and made non-decreasing; an end must have been measured."""
        cells = cells.copy()
        cells[0] = 0.0
        empty = np.isnan(cells)
        if otherwise is not None:
            cells[empty] = otherwise[empty]
        elif empty[1] or empty[-1]:
            missing = 1 if empty[1] else len(cells) - 1
            raise TracekitError(
                f"{self.path}: {what} {missing} measured fewer than {LEAST} times; record more, or replay with a smaller --n-max"
            )
        elif empty.any():
            cells[empty] = np.interp(np.flatnonzero(empty), np.flatnonzero(~empty), cells[~empty])
        cells[1:] = isotonic_regression(cells[1:]).x
        return cells

    def fitted(self, prices: np.ndarray, no_mtp: np.ndarray, n_max: int) -> np.ndarray:
        """Fitted time of every step, microseconds."""
        widths, catchups = _layout(n_max)
        on = self.mtp == 1
        width, rows = np.minimum(self.width, n_max + 1).astype(int), self.rows.astype(int)

        def price(index: int) -> np.ndarray:
            return np.where(on, prices[index], no_mtp[index])

        time = price(kernel.STEPS) + price(kernel.TOKENS) * self.emitted + price(kernel.PAST) * self.past
        time += price(kernel.PAST_WIDTH) * self.past * self.width
        time += np.where(on, prices[widths][width], no_mtp[widths][width])
        short = prices[catchups][np.minimum(rows, n_max + 1)]
        long = prices[kernel.LONG_CATCHUPS] + prices[kernel.LONG_CATCHUP_ROWS] * rows
        drafting = prices[kernel.DRAFT_ROUNDS] + self.decodes * (prices[kernel.DRAFT_DECODES] + prices[kernel.PAST_DRAFT] * self.past)
        return time + np.where(self.decodes > 0, drafting + np.where(rows <= n_max + 1, short, long), 0.0)

    def cells(self) -> pl.DataFrame:
        """How often each batch width and each number of rows was measured, with its plain median time."""
        parts = (
            ("no MTP", self.width, self.target, self.mtp == 0),
            ("target width", self.width, self.target, self.mtp == 1),
            ("catch-up rows", self.rows, self.first, self.decodes > 0),
        )
        frames = [
            pl.DataFrame({"size": size[chosen].astype(int), "us": time[chosen]})
            .group_by("size")
            .agg(n=pl.len(), median_us=pl.col("us").median())
            .sort("size")
            .select(pl.lit(what).alias("cost"), "size", "n", "median_us")
            for what, size, time, chosen in parts
        ]
        return pl.concat(frames)


def _robust_mean(values: np.ndarray) -> float:
    """Mean of ``values`` with those far off (a descheduled process, not the work) pulled in to eight median deviations.

    A median would be sturdier, but a total is a sum: what counts is the mean, an ordinary slow tail included.
    """
    middle = np.median(values)
    reach = 8 * np.median(np.abs(values - middle)) + 1e-9
    return float(np.clip(values, middle - reach, middle + reach).mean())


def _cells(times: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """Robust mean of ``times`` for each key below ``size``; NaN where fewer than :data:`LEAST` were measured."""
    cells = np.full(size, np.nan)
    for key in range(1, size):
        here = times[keys == key]
        if len(here) >= LEAST:
            cells[key] = _robust_mean(here)
    return cells


def _slopes(x: np.ndarray, y: np.ndarray, keys: np.ndarray) -> tuple[float, float]:
    """How ``y`` grows with ``x``, as ``a + b * key``; neither is negative.

    In each cell of equal ``key`` the slope is the difference of the medians of its upper and lower half in ``x``.
    """
    found, weight = {}, {}
    for key in np.unique(keys):
        here = keys == key
        if here.sum() < 4 * LEAST:
            continue
        order = np.argsort(x[here], kind="stable")
        low, high = np.array_split(order, 2)
        distance = x[here][high].mean() - x[here][low].mean()
        if distance > 0:
            rise = np.median(y[here][high]) - np.median(y[here][low])
            # context cannot cost more than everything there is: a noisy cell must not drive its level below zero
            found[key] = min(max(rise / distance, 0.0), 0.8 * np.median(y[here]) / max(x[here].mean(), 1.0))
            weight[key] = here.sum() * distance
    if not found:
        return 0.0, 0.0
    key, slope, w = np.array(list(found)), np.array(list(found.values())), np.array(list(weight.values()))
    mean_key, mean_slope = np.average(key, weights=w), np.average(slope, weights=w)
    variance = np.average((key - mean_key) ** 2, weights=w)
    b = np.average((key - mean_key) * (slope - mean_slope), weights=w) / variance if variance else 0.0
    b = float(np.clip(b, 0.0, mean_slope / mean_key))
    return float(mean_slope - b * mean_key), b


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Intercept and slope (not negative) of ``y`` over ``x``, through the robust mean at each value of ``x``."""
    values, counts = np.unique(x, return_counts=True)
    means = np.array([_robust_mean(y[x == v]) for v in values])
    if len(values) == 1:
        return float(means[0]), 0.0
    slope = max(0.0, float(np.polyfit(values, means, 1, w=np.sqrt(counts))[0]))
    return float(np.average(means - slope * values, weights=counts)), slope
