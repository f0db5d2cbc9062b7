"""What things cost, fitted from a trace's timings: prices for the counts of a walk, with their uncertainty.

::

    step = host + draft(decodes, rows caught up) + target(batch width) + sampling(tokens)

Each decode is dearer with more context; one of another shape than the one before costs a new graph, and the next of
that shape what CUDA takes to capture it; the target's is
dearer after drafts, the more so the more of them: the caches are the drafter's then. Every part is
fitted to its own measured times: a robust mean per batch width and per number of rows, made monotone (isotonic
regression) unless it is measured not to be, over slopes in context. Baselines stay apart: *no MTP* (hidden states not
even extracted, no snapshots taken), MTP loaded and off, MTP idle, and each draft length.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import polars as pl
from scipy.stats import theilslopes

from tracekit.errors import TracekitError
from tracekit.replay import kernel
from tracekit.replay.robust import (
    LEAST,
    blocks_of,
    cell_means,
    deviation,
    line,
    members,
    rising,
    robust_mean,
    slopes,
    slowness_of,
    step_up,
    widened,
    within,
)
from tracekit.trace.store import TraceFile

N_BOOT = 100
_OR = "or take the times of another trace with --cost"
_MORE = {"record": f"record more prompts or tokens, {_OR}", "calibrate": "calibrate with more --blocks or --steps"}
_PLAIN = [kernel.STEPS, kernel.TOKENS, kernel.N_SCALARS + 1]  # of a step that decodes one token
_FIXED = [kernel.LONG_CATCHUPS, kernel.LONG_CATCHUP_ROWS, kernel.PROMPT_CATCHUPS, kernel.PROMPT_CATCHUP_ROWS]


@dataclass(frozen=True)
class CostModel:
    """Microseconds per count of :mod:`tracekit.replay.kernel`, for drafts of up to ``n_max`` tokens.

    ``prices``: float64 ``[n_counts]``. ``boot``: the same fitted to resampled requests, ``[n_boot, n_counts]``.
    ``cells``: what was measured, how often, and its median. ``spread_ratio``: median absolute deviation of a step's
    measured time over its fitted one. ``most_tokens``: in memory, of the steps measured; beyond that context is
    extrapolated. ``n_blocks``: stretches of time; with one the machine's drift is not in ``boot``.
    """

    n_max: int
    prices: np.ndarray
    boot: np.ndarray
    cells: pl.DataFrame
    spread_ratio: float
    n_steps: int
    most_tokens: int
    n_blocks: int

    @property
    def id(self) -> str:
        """Identity of the prices."""
        return hashlib.sha256(np.round(self.prices, 6).tobytes()).hexdigest()[:12]


def fit(trace: TraceFile, n_max: int, n_boot: int = N_BOOT, seed: int = 0) -> CostModel:
    """The cost model of ``trace``, from its steps with one slot active: of a recording or a calibration. Raises
    :class:`TracekitError` where something that is needed was never measured.
    """
    steps, drift = _Steps.read(trace, n_max).steadied(n_max)
    prices = steps.prices(n_max)
    _price_long_catchups(steps.prompt_line, prices, n_max)
    rng = np.random.default_rng(seed)
    boot = []
    for _ in range(n_boot):
        drawn, level = steps.resampled(rng, drift)
        priced = drawn.prices(n_max, otherwise=prices)
        priced[_FIXED] = prices[_FIXED]  # a line through a few dozen prompts; its uncertainty is not drawn
        boot.append(priced * level)
    ratio = steps.wall / steps.fitted(prices, n_max)
    return CostModel(
        n_max=n_max,
        prices=prices,
        boot=widened(np.array(boot), prices, len(drift)),
        cells=steps.cells(),
        spread_ratio=deviation(ratio),
        n_steps=len(steps.wall),
        most_tokens=int(steps.kv.max()),
        n_blocks=steps.n_blocks,
    )


def _layout(n_max: int) -> tuple[slice, slice]:
    """Where the prices of target widths and of catch-up rows (0 .. n_max + 1 each) are."""
    start, size = kernel.N_SCALARS, n_max + 2
    return slice(start, start + size), slice(start + size, start + 2 * size)


@dataclass(frozen=True)
class _Steps:
    """The generating steps of one slot as columns (float64 ``[n]``; microseconds, tokens), none wider, in target
    tokens or rows caught up, than the cost model has prices for.
    """

    path: str
    advice: str  # where something is missing
    prompt_line: tuple[float, float] | None  # microseconds of a prompt's catch-up in one batch: fixed, and per row
    n_blocks: int  # stretches of time
    block: np.ndarray  # consecutive requests of one prompt: close together in time
    mtp: np.ndarray
    loaded: np.ndarray  # without MTP, where it was loaded and snapshots of the state were taken all the same
    kv: np.ndarray  # cells that attention read
    width: np.ndarray
    width_before: np.ndarray  # of the target decode before
    new_before: np.ndarray  # whether that was of another width than the one before it
    emitted: np.ndarray
    decodes: np.ndarray
    rows: np.ndarray  # of the first MTP decode
    rows_before: np.ndarray  # of the MTP decode before that
    draft_new_before: np.ndarray  # whether that was of another shape than the one before it
    target: np.ndarray
    first: np.ndarray
    draft: np.ndarray
    catchup: np.ndarray
    sample: np.ndarray
    wall: np.ndarray

    @classmethod
    def read(cls, trace: TraceFile, n_max: int) -> _Steps:
        calibration = (trace.runs["mode"] == "calibration").all()
        verb = "calibrate" if calibration else "record"
        if trace.runs["n_max"].max() < n_max:
            raise TracekitError(
                f"{trace.path}: its times are of up to {trace.runs['n_max'].max()} drafts, {n_max} are wanted; {verb} "
                f"it with --n-max {n_max}"
            )
        alone = "calibrate with 1 among --slots" if calibration else "record with --parallel 1"
        frame = trace.frame(
            """WITH drafted AS (
                   SELECT run, step, n_draft_decodes AS n, CASE WHEN n_draft_decodes > 0 THEN n_catchup ELSE n_ahead END
                          AS rows, lag(CASE WHEN n > 1 THEN 1 ELSE rows END) OVER (PARTITION BY run ORDER BY step)
                          AS rows_before
                   FROM steps WHERE n_draft_decodes > 0 OR n_ahead > 0),
               mtp AS (
                   SELECT run, step, rows_before,
                          lag(CASE WHEN n > 1 THEN n = 2 AND rows <> 1 ELSE rows IS DISTINCT FROM rows_before END)
                          OVER (PARTITION BY run ORDER BY step) AS draft_new_before
                   FROM drafted),
               blocks AS (
                   SELECT run, request, count(*) FILTER (WHERE new) OVER (ORDER BY run, request) - 1 AS block
                   FROM (SELECT *, prompt_id = '' OR prompt_id IS DISTINCT FROM
                                   lag(prompt_id) OVER (PARTITION BY run ORDER BY request) AS new FROM requests)),
               target AS (
                   SELECT *, lag(n_tokens) OVER before AS width_before, lag(n_tokens, 2) OVER before AS width_earlier
                   FROM steps WINDOW before AS (PARTITION BY run ORDER BY step))
               SELECT block, mtp, n_past,
                      NOT mtp AND arm <> 'no_mtp' AND settings->>'memory' = 'snapshot' AS loaded,
                      n_tokens AS width, coalesce(width_before, 0) AS width_before,
                      width_before IS DISTINCT FROM width_earlier AS new_before, len(v.tokens) AS emitted,
                      n_draft_decodes AS decodes, n_catchup AS rows, coalesce(rows_before, 0) AS rows_before,
                      coalesce(draft_new_before, true) AS draft_new_before,
                      target_us AS target, first_draft_us AS first, draft_us AS draft, catchup_us AS catchup,
                      sample_us AS sample, wall_us AS wall
               FROM target s JOIN verifications v USING (run, step) JOIN runs USING (run)
                    JOIN requests USING (run, request) JOIN blocks USING (run, request) LEFT JOIN mtp USING (run, step)
               WHERE s.n_slots = 1 AND s.n_prompt = 0 AND v.n_generated > 0
                     AND n_tokens <= $most AND n_catchup <= $most ORDER BY run, step""",
            most=n_max + 1,
        )
        if frame.is_empty():
            raise TracekitError(f"{trace.path}: no step of one slot alone, whose costs are wanted; {alone}")
        frame = frame.with_columns(kv=pl.Series(kernel.n_kv((frame["n_past"] + frame["width"]).to_numpy()))).drop(
            "n_past"
        )
        several = trace.frame("SELECT max((settings->>'n_slots')::INT) AS n FROM runs")["n"][0] > 1
        advice = alone if several and not calibration else _MORE[verb]
        columns = {c: frame[c].cast(pl.Float64).to_numpy() for c in frame.columns}
        columns["block"], n_blocks = blocks_of(columns["block"])
        found = cls(str(trace.path), advice, _prompt_line(trace), n_blocks, **columns)
        if ((found.mtp == 0) & (found.loaded == 0)).sum() < LEAST:
            baseline = alone if several else f"record with --baseline, {_OR}"
            raise TracekitError(f"{trace.path}: the baseline without MTP was not recorded; {baseline}")
        return found

    def take(self, chosen: np.ndarray) -> _Steps:
        """The steps at ``chosen`` (a mask or indices)."""
        columns = (getattr(self, f.name)[chosen] for f in fields(self)[4:])
        return _Steps(self.path, self.advice, self.prompt_line, self.n_blocks, *columns)

    def steadied(self, n_max: int) -> tuple[_Steps, np.ndarray]:
        """The steps as if the machine had run at its mean speed throughout, and how slow each block was (mean 1 over
        steps).

        A shared machine's speed drifts by tens of per cent within minutes. Every block holds steps of many kinds, so
        its slowness is the median of measured over fitted time; fit and slowness are refined in turn.
        """
        blocks, slowness = self.block.astype(int), np.ones(int(self.block.max()) + 1)
        of_block, steady = members(blocks, len(slowness)), self
        for _ in range(3):
            slowness *= slowness_of(steady.wall / steady.fitted(steady.prices(n_max), n_max), of_block)
            slowness /= slowness[blocks].mean()
            steady = self.slowed(1 / slowness[blocks])
        return steady, slowness

    def slowed(self, by: np.ndarray) -> _Steps:
        """All times multiplied by ``by``, float64 ``[n]``."""
        times = {name: getattr(self, name) * by for name in ("target", "first", "draft", "catchup", "sample", "wall")}
        return replace(self, **times)

    def resampled(self, rng: np.random.Generator, slowness: np.ndarray) -> tuple[_Steps, float]:
        """As many blocks, drawn with replacement, with all their steps (neighbours are not independent); their mean
        slowness.
        """
        blocks, n = self.block.astype(int), len(slowness)
        times = np.bincount(rng.integers(0, n, n), minlength=n)
        chosen = np.repeat(np.arange(len(blocks)), times[blocks])
        return self.take(chosen), float(slowness[blocks[chosen]].mean())

    @property
    def host(self) -> np.ndarray:
        """What a step takes beside decoding and sampling."""
        return self.wall - self.target - self.draft - self.catchup - self.sample

    @property
    def reshapes(self) -> np.ndarray:
        """Whether the target's batch had another width than the one before."""
        return (self.width != self.width_before).astype(float)

    @property
    def captures(self) -> np.ndarray:
        """Whether it had the width of the one before, which was new."""
        return ((self.width == self.width_before) & (self.new_before == 1)).astype(float)

    @property
    def draft_reshapes(self) -> tuple[np.ndarray, np.ndarray]:
        """How many MTP decodes were of another shape than the one before: of the first, and of the others."""
        return (self.rows != self.rows_before).astype(float), ((self.decodes > 1) & (self.rows != 1)).astype(float)

    @property
    def draft_captures(self) -> tuple[np.ndarray, np.ndarray]:
        """How many had the shape of the one before, which was new: of the first, and of the others."""
        other = self.rows != self.rows_before
        later = np.where(self.rows == 1, other & (self.decodes > 1), self.decodes > 2)
        return (~other & (self.draft_new_before == 1)).astype(float), later.astype(float)

    def prices(self, n_max: int, otherwise: np.ndarray | None = None) -> np.ndarray:
        """Prices of all counts; what these steps do not measure is taken from ``otherwise``, or refused without it."""
        prices, on = np.zeros(kernel.n_counts(n_max)), self.take(self.mtp == 1)
        after, each = on._price_target(prices, n_max, otherwise)
        on._price_drafting(prices, n_max, otherwise, each)
        on._price_host(prices)
        prices[kernel.DRAFT_ROUNDS] += after
        prices[kernel.DRAFT_DECODES] += each
        bare = self.take((self.mtp == 0) & (self.loaded == 0))._plain_us(prices)
        loaded = self.take(self.loaded == 1)._plain_us(prices)
        if otherwise is not None:
            bare = otherwise[[*_PLAIN, kernel.OVER, kernel.BARE]].sum() if bare is None else bare
            loaded = bare - otherwise[kernel.BARE] if loaded is None else loaded
        loaded = bare if loaded is None else loaded
        prices[kernel.OVER], prices[kernel.BARE] = loaded - prices[_PLAIN].sum(), bare - loaded
        return prices

    def _plain_us(self, prices: np.ndarray) -> float | None:
        """What these steps, plain ones, take without context; None where there are none."""
        per_kv = prices[kernel.KV] + prices[kernel.KV_WIDTH]
        time = self.wall - per_kv * self.kv - prices[kernel.RESHAPES] * self.reshapes
        time = time - prices[kernel.CAPTURES] * self.captures
        return robust_mean(time) if len(time) else None

    def _price_target(self, prices: np.ndarray, n_max: int, before: np.ndarray | None) -> tuple[float, float]:
        """Prices the target's decodes; returns what it takes more after drafts, once and for each decode of them."""
        widths = _layout(n_max)[0]
        steps = self.take(self.width_before <= n_max + 1)  # the first after a prompt is dearer still
        shapes, cells = (steps.reshapes, steps.captures), (steps.kv, steps.kv * steps.width)
        beside = np.column_stack((*shapes, steps.decodes > 0, steps.decodes, *cells))
        reshape, capture, after, each = within(beside, steps.target, steps.width)[:4]
        time = self.target - reshape * self.reshapes - capture * self.captures
        time = time - after * (self.decodes > 0) - each * self.decodes
        prices[kernel.CAPTURES] = capture
        level, slope = slopes(self.kv, time, self.width)
        prices[kernel.RESHAPES], prices[kernel.KV], prices[kernel.KV_WIDTH] = reshape, level, slope
        time = time - self.kv * (level + slope * self.width)
        known = None if before is None else before[widths]
        prices[widths] = self._cells(time, self.width, n_max, known, "target batches of width")
        return after, each

    def _price_drafting(self, prices: np.ndarray, n_max: int, before: np.ndarray | None, each: float) -> None:
        rounds, catchups = self.take(self.decodes > 0), _layout(n_max)[1]
        if not len(rounds.wall):
            if before is not None:
                for price in (catchups, kernel.DRAFT_RESHAPES, kernel.DRAFT_CAPTURES, kernel.KV_DRAFT, kernel.DRAFT_DECODES):
                    prices[price] = before[price]
            return
        more = rounds.take(rounds.decodes > 1)
        reshape, capture = rounds._draft_shapes_us()
        changed, captured = rounds.draft_reshapes[0], rounds.draft_captures[0]
        per_kv = slopes(rounds.kv, rounds.first, rounds.rows)[0]
        prices[kernel.DRAFT_RESHAPES], prices[kernel.DRAFT_CAPTURES] = reshape, capture
        prices[kernel.KV_DRAFT] = per_kv
        if len(more.wall):
            beside = reshape * more.draft_reshapes[1] + capture * more.draft_captures[1]
            time = (more.draft - more.first - beside) / (more.decodes - 1)
            prices[kernel.DRAFT_DECODES] = robust_mean(time - per_kv * more.kv)
        known = None if before is None else before[catchups] + before[kernel.DRAFT_DECODES] - each
        time = rounds.first - per_kv * rounds.kv - reshape * changed - capture * captured
        prices[catchups] = self._cells(time, rounds.rows, n_max, known, "catch-ups of rows", self.prompt_line)
        prices[catchups] -= prices[kernel.DRAFT_DECODES]

    def _draft_shapes_us(self) -> tuple[float, float]:
        """What an MTP decode of another shape takes more, and the next of that shape: from the first of each round
        among rounds of equal rows, and from the mean of the others among rounds of as many.
        """
        more = self.take(self.decodes > 1)
        n = more.decodes - 1
        flags = (self.draft_reshapes, self.draft_captures), (more.draft_reshapes, more.draft_captures)
        firsts, others = ([flag[i] for flag in of] for i, of in enumerate(flags))
        x = np.vstack((np.column_stack((*firsts, self.kv)), np.column_stack((*(f / n for f in others), more.kv))))
        y = np.concatenate((self.first, (more.draft - more.first) / n))
        reshape, capture, _ = within(x, y, np.concatenate((self.rows, -n)))
        return reshape, capture

    def _price_host(self, prices: np.ndarray) -> None:
        drafting = self.decodes > 0
        idle = robust_mean(self.host[~drafting]) if (~drafting).any() else robust_mean(self.host)
        per_step, per_token = line(self.emitted, self.sample)
        prices[kernel.STEPS], prices[kernel.TOKENS] = idle + per_step, per_token
        prices[kernel.DRAFT_ROUNDS] = robust_mean(self.host[drafting]) - idle if drafting.any() else 0.0

    def _cells(
        self,
        time: np.ndarray,
        sizes: np.ndarray,
        n_max: int,
        otherwise: np.ndarray | None,
        what: str,
        beyond: tuple[float, float] | None = None,
    ) -> np.ndarray:
        """Mean ``time`` of every size from 1 to ``n_max + 1``, gaps closed between neighbours, made non-decreasing
        (:func:`rising`). An end must have been measured; the upper one may lie before sizes on the line ``beyond``.
        """
        cells, errors = cell_means(time, sizes, n_max + 2)
        counts = np.bincount(sizes.astype(int), minlength=n_max + 2)
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
                raise TracekitError(f"{self.path}: {what} {missing} measured fewer than {LEAST} times; {self.advice}")
            cells[empty] = np.interp(np.flatnonzero(empty), np.flatnonzero(known), cells[known])
        cells[1:] = rising(cells[1:], errors[1:], np.maximum(counts[1:], 1))
        return cells

    def fitted(self, prices: np.ndarray, n_max: int) -> np.ndarray:
        """Fitted time of every step, microseconds."""
        widths, catchups = _layout(n_max)
        width, rows = self.width.astype(int), self.rows.astype(int)
        time = prices[kernel.STEPS] + prices[kernel.TOKENS] * self.emitted + prices[kernel.KV] * self.kv
        time += prices[kernel.KV_WIDTH] * self.kv * self.width + prices[kernel.RESHAPES] * self.reshapes
        time += prices[kernel.CAPTURES] * self.captures
        time += prices[widths][width]
        drafting = prices[catchups][rows] + self.decodes * (
            prices[kernel.DRAFT_DECODES] + prices[kernel.KV_DRAFT] * self.kv
        )
        drafting += prices[kernel.DRAFT_ROUNDS] + prices[kernel.DRAFT_RESHAPES] * sum(self.draft_reshapes)
        drafting += prices[kernel.DRAFT_CAPTURES] * sum(self.draft_captures)
        off = prices[kernel.OVER] + prices[kernel.BARE] * (self.loaded == 0)
        return time + np.where(self.decodes > 0, drafting, 0.0) + np.where(self.mtp == 0, off, 0.0)

    def cells(self) -> pl.DataFrame:
        """How often each batch width and each number of rows was measured, with its plain median time."""
        on, off = self.take(self.mtp == 1), self.take((self.mtp == 0) & (self.loaded == 0))
        rounds = self.take(self.decodes > 0)
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


def _prompt_line(trace: TraceFile) -> tuple[float, float] | None:
    """Fixed and per-row microseconds of prompts caught up while they were read, alone and in one batch; None where too
    few were.
    """
    rows = trace.frame(
        """SELECT n_ahead AS rows, catchup_us AS us
           FROM steps s JOIN verifications v USING (run, step) JOIN requests r USING (run, request)
           WHERE s.n_slots = 0 AND v.n_generated = 0 AND n_ahead = r.n_prompt"""
    )
    if rows.height < LEAST or rows["rows"].n_unique() < 2:
        return None
    fitted = theilslopes(rows["us"].to_numpy(), rows["rows"].to_numpy())
    return max(float(fitted.intercept), 0.0), max(float(fitted.slope), 0.0)


def _price_long_catchups(prompt_line: tuple[float, float] | None, prices: np.ndarray, n_max: int) -> None:
    """Rows beyond the table: the line of prompts' catch-ups or, without it, the table's slope."""
    edge = n_max + 1
    first = prices[_layout(n_max)[1]] + prices[kernel.DRAFT_DECODES]
    fixed, per_row = prompt_line or (first[1], (first[-1] - first[1]) / n_max)
    prices[kernel.PROMPT_CATCHUPS], prices[kernel.PROMPT_CATCHUP_ROWS] = fixed, per_row
    prices[kernel.LONG_CATCHUP_ROWS] = per_row
    prices[kernel.LONG_CATCHUPS] = first[-1] - per_row * edge - prices[kernel.DRAFT_DECODES]
