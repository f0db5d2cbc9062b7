"""What things cost, fitted from a trace's timings: prices for the counts of a walk, with their uncertainty.

::

    step = host + draft(decodes, rows caught up) + target(batch width) + sampling(tokens)

Each decode is dearer with more context; one of another shape than the one before costs a new graph, and the next of
that shape what CUDA takes to capture it; the target's is dearer after drafts, the more so the more of them, and for
some plain steps after these or a prompt: the caches are others' then. One row is another kernel, with a price of its
own for context and for a new shape. Every part is fitted to its own measured times: a robust mean per batch width and
per number of rows, made monotone (isotonic regression) unless it is measured not to be, beside least squares for all
else. Baselines stay apart: *no MTP* (hidden states not even extracted, no snapshots taken), MTP loaded and off, MTP
idle, and each draft length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from tracekit.errors import TracekitError
from tracekit.replay import kernel
from tracekit.replay.robust import (
    LEAST,
    beside,
    cell_means,
    deviation,
    line,
    members,
    rising,
    robust_mean,
    slowness_of,
    too_narrow,
    trend,
    widened,
)
from tracekit.replay.steps import Steps
from tracekit.trace.store import TraceFile

N_BOOT = 100
Progress = Callable[[int, int], None]
_PLAIN = [kernel.STEPS, kernel.TOKENS, kernel.N_SCALARS + 1]  # of a step that decodes one token
_OCCASIONS = [  # of a target decode, whatever its width
    *(kernel.RESHAPES, kernel.RESHAPES_ONE, kernel.CAPTURES, kernel.CAPTURES_ONE, kernel.SETTLING, kernel.FIRSTS),
    *(kernel.KV, kernel.KV_WIDTH, kernel.KV_ONE, kernel.PAST_WIDTH),
]
_SETTLING = _OCCASIONS.index(kernel.SETTLING)
_DRAFT_OCCASIONS = [kernel.DRAFT_RESHAPES, kernel.DRAFT_CAPTURES, kernel.KV_DRAFT, kernel.PAST_DRAFT]
_FIXED = [kernel.LONG_CATCHUPS, kernel.LONG_CATCHUP_ROWS, kernel.PROMPT_CATCHUPS, kernel.PROMPT_CATCHUP_ROWS]


@dataclass(frozen=True)
class CostModel:
    """Microseconds per count of :mod:`tracekit.replay.kernel`, for drafts of up to ``n_max`` tokens.

    ``prices``: float64 ``[n_counts]``. ``boot``: the same fitted to resampled requests, ``[n_boot, n_counts]``.
    ``cells``: what was measured, how often, and its median. ``spread_ratio``: median absolute deviation of a step's
    measured time over its fitted one. ``most_tokens``: in memory, of the steps measured; beyond that context is
    extrapolated. ``n_blocks``: stretches of time; with one the machine's drift is not in ``boot``. ``wider``: how many
    times as far from ``prices`` as ``boot`` a time really spreads.
    """

    n_max: int
    prices: np.ndarray
    boot: np.ndarray
    cells: pl.DataFrame
    spread_ratio: float
    n_steps: int
    most_tokens: int
    n_blocks: int
    wider: float = 1.0

    def drawn_us(self, counts: np.ndarray) -> np.ndarray:
        """Time that ``counts``, ``[n_counts]``, take in every draw, as wide as it spreads: float64 ``[n_boot]``."""
        return widened(self.boot @ counts, float(self.prices @ counts), self.wider)

    @property
    def id(self) -> str:
        """Identity of the prices."""
        return hashlib.sha256(np.round(self.prices, 6).tobytes()).hexdigest()[:12]


def fit(
    trace: TraceFile, n_max: int, n_boot: int = N_BOOT, seed: int = 0, progress: Progress | None = None
) -> CostModel:
    """The cost model of ``trace``, from its steps with one slot active: of a recording or a calibration.
    ``progress(done, total)`` counts bootstrap draws. Raises :class:`TracekitError` where something that is needed was
    never measured.
    """
    steps, drift, prices, ratio = fit_steps(Steps.read(trace, n_max), n_max)
    _price_long_catchups(steps.prompt_line, prices, n_max)
    rng = np.random.default_rng(seed)
    boot = []
    for i in range(n_boot):
        drawn, level = steps.resampled(rng, drift)
        priced = prices_of(drawn, n_max, otherwise=prices)
        priced[_FIXED] = prices[_FIXED]  # a line through a few dozen prompts; its uncertainty is not drawn
        boot.append(priced * level)
        if progress:
            progress(i + 1, n_boot)
    return CostModel(
        n_max=n_max,
        prices=prices,
        boot=np.array(boot),
        cells=_measured(steps),
        spread_ratio=deviation(ratio),
        n_steps=len(steps.wall),
        most_tokens=int(steps.kv.max()),
        n_blocks=steps.n_blocks,
        wider=too_narrow(len(drift)),
    )


def fit_steps(steps: Steps, n_max: int) -> tuple[Steps, np.ndarray, np.ndarray, np.ndarray]:
    """The steadied steps, the drift (:func:`steadied`), the prices, and measured over fitted time.

    Attention reads whole blocks of cells or, as a processor's flash attention, the tokens in them. At a few contexts
    both fit, and part between these: so not a mixture is taken, but the one that comes nearer to what was measured.
    """
    found = []
    for by_tokens in (False, True):
        steady, drift = steadied(replace(steps, by_tokens=by_tokens), n_max)
        prices = prices_of(steady, n_max)
        found.append((steady, drift, prices, steady.wall / fitted(steady, prices, n_max)))
    return min(found, key=lambda fit: deviation(fit[-1]))


def layout(n_max: int) -> tuple[slice, slice]:
    """Where the prices of target widths and of catch-up rows (0 .. n_max + 1 each) are."""
    start, size = kernel.N_SCALARS, n_max + 2
    return slice(start, start + size), slice(start + size, start + 2 * size)


def steadied(steps: Steps, n_max: int) -> tuple[Steps, np.ndarray]:
    """The steps as if the machine had run at its mean speed throughout, and how slow each block was (mean 1 over
    steps).

    A shared machine's speed drifts by tens of per cent within minutes. Every block holds steps of many kinds, so
    its slowness is the median of measured over fitted time; fit and slowness are refined in turn. What goes with the
    length of a block's requests is no drift, but the price of context, of which there is little within one.
    """
    blocks, slowness = steps.block.astype(int), np.ones(int(steps.block.max()) + 1)
    of_block, steady = members(blocks, len(slowness)), steps
    length = np.bincount(blocks, steps.past) / np.maximum(np.bincount(blocks), 1)
    for _ in range(3):
        slowness *= slowness_of(steady.wall / fitted(steady, prices_of(steady, n_max), n_max), of_block)
        slowness /= np.exp(trend(length, np.log(slowness)))
        slowness /= slowness[blocks].mean()
        steady = steps.slowed(1 / slowness[blocks])
    return steady, slowness


def prices_of(steps: Steps, n_max: int, otherwise: np.ndarray | None = None) -> np.ndarray:
    """Prices of all counts; what these steps do not measure is taken from ``otherwise``, or refused without it."""
    prices, on = np.zeros(kernel.n_counts(n_max)), steps.take(steps.mtp == 1)
    after, each = _price_target(steps, prices, n_max, otherwise)
    _price_drafting(on, prices, n_max, otherwise, each)
    _price_host(on, prices)
    prices[kernel.DRAFT_ROUNDS] += after
    prices[kernel.DRAFT_DECODES] += each
    bare = _plain_us(steps.take((steps.mtp == 0) & (steps.loaded == 0)), prices)
    loaded = _plain_us(steps.take(steps.loaded == 1), prices)
    if otherwise is not None:
        bare = otherwise[[*_PLAIN, kernel.OVER, kernel.BARE]].sum() if bare is None else bare
        loaded = bare - otherwise[kernel.BARE] if loaded is None else loaded
    loaded = bare if loaded is None else loaded
    prices[kernel.OVER], prices[kernel.BARE] = loaded - prices[_PLAIN].sum(), bare - loaded
    return prices


def _occasions(steps: Steps) -> np.ndarray:
    """The counts :data:`_OCCASIONS` of every step, float64 ``[n, 10]``."""
    one, w = steps.width == 1, steps.width
    kv = steps.kv * ~one * (not steps.by_tokens)
    context = kv, kv * w, steps.kv * one, steps.past * w * steps.by_tokens
    shapes = (of * which for of in (steps.reshapes, steps.captures) for which in (~one, one))
    return np.column_stack((*shapes, steps.settling, steps.firsts, *context))


def _plain_us(steps: Steps, prices: np.ndarray) -> float | None:
    """What these steps, plain ones, take without context; None where there are none."""
    time = steps.wall - _occasions(steps) @ prices[_OCCASIONS]
    return max(0.0, robust_mean(time)) if len(time) else None


def _price_target(steps: Steps, prices: np.ndarray, n_max: int, before: np.ndarray | None) -> tuple[float, float]:
    """Prices the target's decodes; returns what it takes more after drafts, once and for each decode of them."""
    widths = layout(n_max)[0]
    counts = np.column_stack((_occasions(steps), steps.decodes > 0, steps.decodes))
    kind = np.where(steps.mtp == 1, steps.width, steps.loaded - 1)  # without MTP: levels of their own
    counts[~np.isin(kind, kind[steps.settling == 0]), _SETTLING] = 0  # never calm: level and slope cannot be told apart
    found = beside(counts, steps.target, kind)
    prices[_OCCASIONS], (after, each) = found[:-2], found[-2:]
    on = steps.mtp == 1
    time = (steps.target - counts @ found)[on]
    known = None if before is None else before[widths]
    prices[widths] = _cells(steps, time, steps.width[on], n_max, known, "target batches of width")
    return after, each


def _price_drafting(steps: Steps, prices: np.ndarray, n_max: int, before: np.ndarray | None, each: float) -> None:
    rounds, catchups = steps.take(steps.decodes > 0), layout(n_max)[1]
    if not len(rounds.wall):
        if before is not None:
            for price in (catchups, _DRAFT_OCCASIONS, kernel.DRAFT_DECODES):
                prices[price] = before[price]
        return
    first, others = _draft_occasions(rounds)
    more = rounds.decodes > 1
    others, n_others = others[more], rounds.decodes[more] - 1
    other_us = (rounds.draft - rounds.first)[more] / n_others
    found = beside(
        np.vstack((first, others)),
        np.concatenate((rounds.first, other_us)),
        np.concatenate((rounds.rows, -n_others)),  # the others among rounds of as many
    )
    prices[_DRAFT_OCCASIONS] = found
    if more.any():
        prices[kernel.DRAFT_DECODES] = max(0.0, robust_mean(other_us - others @ found))
    known = None if before is None else before[catchups] + before[kernel.DRAFT_DECODES] - each
    time = rounds.first - first @ found
    prices[catchups] = _cells(steps, time, rounds.rows, n_max, known, "catch-ups of rows", steps.prompt_line)
    prices[catchups] -= prices[kernel.DRAFT_DECODES]


def _draft_occasions(steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """The counts :data:`_DRAFT_OCCASIONS` of the first MTP decode of every step, and of one of the others, in their
    mean: float64 ``[n, 4]``.
    """
    n_others = np.maximum(steps.decodes - 1, 1)
    (reshape, reshapes), (capture, captures) = steps.draft_reshapes, steps.draft_captures
    past = steps.past * steps.by_tokens
    first = np.column_stack((reshape, capture, steps.kv, past * steps.rows))
    return first, np.column_stack((reshapes / n_others, captures / n_others, steps.kv, past))


def _price_host(steps: Steps, prices: np.ndarray) -> None:
    drafting = steps.decodes > 0
    idle = robust_mean(steps.host[~drafting]) if (~drafting).any() else robust_mean(steps.host)
    per_step, per_token = line(steps.emitted, steps.sample)
    prices[kernel.STEPS], prices[kernel.TOKENS] = idle + per_step, per_token
    prices[kernel.DRAFT_ROUNDS] = robust_mean(steps.host[drafting]) - idle if drafting.any() else 0.0


def _cells(
    steps: Steps,
    time: np.ndarray,
    sizes: np.ndarray,
    n_max: int,
    otherwise: np.ndarray | None,
    what: str,
    beyond: tuple[float, float] | None = None,
) -> np.ndarray:
    """Mean ``time`` of every size from 1 to ``n_max + 1``, gaps closed between neighbours, made non-decreasing
    (:func:`rising`). An end must have been measured; the upper one may lie before sizes on the line ``beyond``. None is
    negative, though all of a time may go with what else there was to do.
    """
    cells, errors = cell_means(time, sizes, n_max + 2)
    counts = np.bincount(sizes.astype(int), minlength=n_max + 2)
    cells = np.maximum(cells, 0.0)
    cells[0] = 0.0
    empty = np.isnan(cells)
    if otherwise is not None:
        cells[empty] = otherwise[empty]
    else:
        if empty[-1] and beyond is not None:
            cells[-1] = beyond[0] + beyond[1] * (n_max + 1)
        known = ~np.isnan(cells)
        if not (known[1] and known[-1]):
            missing = n_max + 1 if known[1] else 1
            raise TracekitError(f"{steps.path}: {what} {missing} measured fewer than {LEAST} times; {steps.advice}")
        cells[empty] = np.interp(np.flatnonzero(empty), np.flatnonzero(known), cells[known])
    cells[1:] = rising(cells[1:], errors[1:], np.maximum(counts[1:], 1))
    return cells


def fitted(steps: Steps, prices: np.ndarray, n_max: int) -> np.ndarray:
    """Fitted time of every step, microseconds."""
    widths, catchups = layout(n_max)
    width, rows = steps.width.astype(int), steps.rows.astype(int)
    time = prices[kernel.STEPS] + prices[kernel.TOKENS] * steps.emitted + prices[widths][width]
    time += _occasions(steps) @ prices[_OCCASIONS]
    drafting = prices[catchups][rows] + steps.decodes * (
        prices[kernel.DRAFT_DECODES] + prices[kernel.KV_DRAFT] * steps.kv
    )
    drafting += prices[kernel.DRAFT_ROUNDS] + prices[kernel.DRAFT_RESHAPES] * sum(steps.draft_reshapes)
    drafting += prices[kernel.DRAFT_CAPTURES] * sum(steps.draft_captures) + prices[kernel.PAST_DRAFT] * steps.draft_past
    off = prices[kernel.OVER] + prices[kernel.BARE] * (steps.loaded == 0)
    return time + np.where(steps.decodes > 0, drafting, 0.0) + np.where(steps.mtp == 0, off, 0.0)


def _measured(steps: Steps) -> pl.DataFrame:
    """How often each batch width and each number of rows was measured, with its plain median time."""
    on, off = steps.take(steps.mtp == 1), steps.take((steps.mtp == 0) & (steps.loaded == 0))
    rounds = steps.take(steps.decodes > 0)
    return measured_cells(
        [
            ("no MTP", off.width, off.target),
            ("target width", on.width, on.target),
            ("catch-up rows", rounds.rows, rounds.first),
        ]
    )


def measured_cells(parts: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> pl.DataFrame:
    """The ``cells`` of a cost model from what was measured of each part: its name, sizes, and microseconds."""
    frames = [
        pl.DataFrame({"size": size.astype(int), "us": time.astype(float)})
        .group_by("size")
        .agg(n=pl.len(), median_us=pl.col("us").median())
        .sort("size")
        .select(pl.lit(what).alias("cost"), "size", "n", "median_us")
        for what, size, time in parts
    ]
    return pl.concat(frames)


def _price_long_catchups(prompt_line: tuple[float, float] | None, prices: np.ndarray, n_max: int) -> None:
    """Rows beyond the table: the line of prompts' catch-ups or, without it, the table's slope."""
    edge = n_max + 1
    first = prices[layout(n_max)[1]] + prices[kernel.DRAFT_DECODES]
    fixed, per_row = prompt_line or (first[1], (first[-1] - first[1]) / n_max)
    prices[kernel.PROMPT_CATCHUPS], prices[kernel.PROMPT_CATCHUP_ROWS] = fixed, per_row
    prices[kernel.LONG_CATCHUP_ROWS] = per_row
    prices[kernel.LONG_CATCHUPS] = first[-1] - per_row * edge - prices[kernel.DRAFT_DECODES]
