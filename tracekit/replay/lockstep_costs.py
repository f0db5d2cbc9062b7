"""What steps of several slots cost, fitted from a trace's timings: prices for the counts of
:mod:`tracekit.replay.lockstep`.

Every measured part of a step (target, drafting, prompts' catch-up, the rest) is a sum of its counts times prices that
are not negative: a price per row that may change at the knots, so that time never falls with rows, and prices for
what happens beside. Non-negative least squares finds them, on relative errors, far-off measurements pulled in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl

from tracekit.errors import TracekitError
from tracekit.policy.rule import rule
from tracekit.replay import link, lockstep
from tracekit.replay.costs import N_BOOT, CostModel, Progress, measured_cells
from tracekit.replay.robust import (
    LEAST,
    blocks_of,
    deviation,
    drawn,
    members,
    not_negative,
    pulled_in,
    slowness_of,
    too_narrow,
)
from tracekit.trace.store import TraceFile

Sizes = tuple[int, int, int, bool, int, int]  # tracekit.replay.serving.Serving.sizes
_BARE = ~pl.col("mtp") & ~pl.col("snapshots")  # steps without MTP, or as if
_ROWS = np.arange(lockstep.ROWS, lockstep.DRAFT_ROWS)
_DRAFT_ROWS = np.arange(lockstep.DRAFT_ROWS, lockstep.N_COUNTS)
_PARTS = {  # what was measured, and the counts it is made of
    "target": np.r_[lockstep.BATCHES : lockstep.DRAFT_FIRSTS, _ROWS],
    "draft": np.r_[lockstep.DRAFT_FIRSTS : lockstep.AHEADS, _DRAFT_ROWS],
    "catchup": np.array([lockstep.AHEADS, lockstep.AHEAD_ROWS, lockstep.KV_AHEAD]),
    "host": np.arange(lockstep.HOST, lockstep.BATCHES),
}


def fit(
    trace: TraceFile, n_max: int, sizes: Sizes, n_boot: int = N_BOOT, seed: int = 0, progress: Progress | None = None
) -> CostModel:
    """The cost model of ``trace`` for several slots, from all of its steps. ``progress`` and what it raises: as for one
    slot (:func:`tracekit.replay.costs.fit`).
    """
    steps, fitted, prices, slowness, ratio = fit_steps(_Steps.read(trace, n_max, sizes))
    rng, boot = np.random.default_rng(seed), []
    n_steps = np.bincount(steps.block, minlength=len(slowness))
    for i in range(n_boot):
        times = drawn(rng, steps.block, steps.kinds)
        level = (times * n_steps * slowness).sum() / (times * n_steps).sum()
        boot.append(level * _prices([np.tensordot(times, g, 1) for g in fitted], steps))
        if progress:
            progress(i + 1, n_boot)
    return CostModel(
        n_max=n_max,
        prices=prices,
        boot=np.array(boot),
        cells=steps.cells(),
        spread_ratio=deviation(ratio),
        n_steps=len(steps.wall),
        most_tokens=int((steps.frame["n_past"] + steps.frame["n_tokens"]).max()),
        n_blocks=steps.n_blocks,
        wider=too_narrow(len(slowness)),
    )


def fit_steps(steps: _Steps) -> tuple[_Steps, list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
    """The steps, their products (:meth:`_Steps.grams`), the prices, how slow every block was (mean 1 over steps), and
    measured over fitted time. Either the cells or the tokens that rows read have a price, whichever comes nearer
    (:func:`tracekit.replay.costs.fit_steps` says why).
    """
    of_block, found = members(steps.block, int(steps.block.max()) + 1), []
    for other in (lockstep.PAST_ROWS, lockstep.KV_ROWS):
        tried, slowness = steps.without(other), np.ones(len(of_block))
        for _ in range(3):
            fitted = tried.slowed(1 / slowness).grams()
            prices = _prices([g.sum(0) for g in fitted], tried)
            ratio = tried.wall / (tried.counts @ prices)
            slowness = slowness_of(ratio, of_block)
            slowness /= slowness[tried.block].mean()
        found.append((tried, fitted, prices, slowness, ratio / slowness[tried.block]))
    return min(found, key=lambda fit: deviation(fit[-1]))


def recorded_counts(trace: TraceFile, sizes: Sizes) -> np.ndarray:
    """What a walk would have counted of every recorded step: float64 ``[n_steps, N_COUNTS]``."""
    return _counts(*_read(trace, sizes[0]), sizes)


@dataclass(frozen=True)
class _Steps:
    """The recorded steps: their counts (float64 ``[n, N_COUNTS]``), the block each belongs to (consecutive requests of
    the same prompts, up to their probe: close together in time; ``n_blocks`` in truth), and what was measured (float64
    ``[n]``, microseconds).

    ``alike``: for each count the one whose price is its own, and which counts for both.
    """

    frame: pl.DataFrame
    alike: np.ndarray
    counts: np.ndarray
    block: np.ndarray
    n_blocks: int
    measured: dict[str, np.ndarray]

    @classmethod
    def read(cls, trace: TraceFile, n_max: int, sizes: Sizes) -> _Steps:
        n_slots, unified, snapshots = sizes[0], sizes[3], sizes[4] > 0
        frame, slots = _read(trace, n_slots)
        frame = frame.with_columns(snapshots=pl.col("loaded") & snapshots)
        recorded = trace.runs["settings"].str.json_path_match("$.kv_unified") == "true"
        if (recorded.fill_null(False) != unified).any():
            raise TracekitError(
                f"{trace.path}: mixes runs with --kv-unified and without, whose steps of several slots cost differently"
            )
        calibration = trace.is_calibration
        advice = f"calibrate with {n_slots} among --slots" if calibration else f"record with --parallel {n_slots}"
        or_cost = "" if calibration else f", or give --cost a calibration with {n_slots} among --slots"
        full = frame.filter((pl.col("n_slots") == n_slots) & (pl.col("n_prompt") == 0))
        widest = full["n_tokens"].max() or 0
        if full.height < LEAST:
            raise TracekitError(f"{trace.path}: fewer than {LEAST} steps of {n_slots} slots at once; {advice}{or_cost}")
        if 2 * widest < n_slots * (n_max + 1):
            raise TracekitError(
                f"{trace.path}: its widest step of {n_slots} slots has {widest} tokens, {n_slots * (n_max + 1)} are "
                f"wanted; {advice} and --n-max {n_max}"
            )
        if (frame["n_draft_decodes"] > 0).sum() < LEAST:
            raise TracekitError(f"{trace.path}: fewer than {LEAST} of its steps drafted; {advice}")
        as_recorded = str(n_slots) in trace.runs["settings"].str.json_path_match("$.n_slots").to_list()
        missing = "record with --baseline" if as_recorded and not calibration else advice
        if full.filter(_BARE).height < LEAST:
            raise TracekitError(f"{trace.path}: no baseline of {n_slots} slots without MTP was recorded; {missing}")
        if snapshots and full.filter(~pl.col("mtp") & pl.col("loaded")).height < LEAST:
            raise TracekitError(
                f"{trace.path}: what snapshots cost {n_slots} slots that draft nothing was not recorded; {missing}"
            )
        times = {name: frame[f"{name}_us"].to_numpy().astype(float) for name in ("target", "draft", "catchup", "wall")}
        times["host"] = times["wall"] - times["target"] - times["draft"] - times["catchup"]
        counts = _counts(frame, slots, sizes)
        if (counts[:, lockstep.DRAFT_PROBS] == counts[:, lockstep.DRAFT_OUTPUTS]).all():
            counts[:, lockstep.DRAFT_PROBS] = 0.0  # measured of every draft, as in a calibration: of each, its price
        alike = _alike(counts)
        wide = (frame["n_prompt"] == 0) & (frame["n_tokens"] > lockstep.WIDE)
        cuda = trace.runs["machine"].str.json_path_match("$.cuda_graphs").is_not_null().all()
        if not cuda or (wide.to_numpy() & (counts[:, lockstep.RESHAPES_WIDE] == 0)).sum() < LEAST:
            counts[:, lockstep.BATCHES_NARROW] = 0.0  # one kind of pass, or what the wide ones cost was not measured
            alike[[lockstep.RESHAPES_WIDE, lockstep.CAPTURES_WIDE]] = lockstep.RESHAPES, lockstep.CAPTURES
        joined = np.zeros_like(counts)
        np.add.at(joined.T, alike, counts.T)
        return cls(frame, alike, joined, *blocks_of(frame["block"].to_numpy()), times)

    @property
    def wall(self) -> np.ndarray:
        """Whole steps."""
        return self.measured["wall"]

    @property
    def kinds(self) -> list[np.ndarray]:
        """Which steps drafted, and which had no MTP, with snapshots and without: bool ``[n]`` each, none all false."""
        bare = self.frame["mtp"].not_()
        found = self.frame["n_draft_decodes"] > 0, bare & self.frame["snapshots"], bare & ~self.frame["snapshots"]
        return [kind.to_numpy() for kind in found if kind.any()]

    def slowed(self, by: np.ndarray) -> _Steps:
        """All times multiplied by ``by``, float64 ``[n_blocks]``."""
        times = {name: time * by[self.block] for name, time in self.measured.items()}
        return replace(self, measured=times)

    def without(self, count: int) -> _Steps:
        """The same, as if this were counted nowhere."""
        counts = self.counts.copy()
        counts[:, count] = 0.0
        return replace(self, counts=counts)

    def grams(self) -> list[np.ndarray]:
        """For every part the products that least squares needs, of each block: float64 ``[n_blocks, n + 1, n]``,
        ``X'X`` and, last, ``X'y``, in relative errors.
        """
        return [self._gram(part, columns) for part, columns in _PARTS.items()]

    def _gram(self, part: str, columns: np.ndarray) -> np.ndarray:
        x, y = self.counts[:, columns], self.measured[part]
        here = x.any(1)
        x, y, block = x[here], y[here], self.block[here]
        out = np.zeros((int(self.block.max()) + 1, len(columns) + 1, len(columns)))
        if not len(y):
            return out
        fitted, pulled = np.full(len(y), np.median(y)), y
        for _ in range(4):
            w = 1 / np.maximum(fitted, 1e-3 * np.median(y) + 1e-9)
            weighted, aim = x * w[:, None], pulled * w
            fitted = x @ not_negative(weighted.T @ weighted, aim @ weighted)
            pulled = fitted * pulled_in(y / np.maximum(fitted, 1e-9))
        for b, rows in enumerate(members(block, len(out))):
            out[b, :-1], out[b, -1] = weighted[rows].T @ weighted[rows], aim[rows] @ weighted[rows]
        return out

    def cells(self) -> pl.DataFrame:
        """How often each number of target rows and of rows caught up was measured, with its plain median time."""
        plain = self.frame.filter(pl.col("n_prompt") == 0)
        parts = (
            ("no MTP", plain.filter(_BARE), "n_tokens", "target_us"),
            ("target rows", plain.filter("mtp"), "n_tokens", "target_us"),
            ("catch-up rows", plain.filter(pl.col("n_draft_decodes") > 0), "n_catchup", "first_draft_us"),
        )
        return measured_cells([(what, of[size].to_numpy(), of[time].to_numpy()) for what, of, size, time in parts])


def _read(trace: TraceFile, n_slots: int) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Steps in order, and the generating slots of each; steps whose slots are not all known are left out."""
    slots = trace.frame(
        """SELECT run, step, slot, n_drafted + 1 AS rows, n_prompt + v.n_generated - 1 AS past, n_decodes,
                  len(draft_probs) > 0 AS probed, len(tokens)::INT AS emitted,
                  last_value(CASE WHEN n_decodes > 0 THEN past END IGNORE NULLS) OVER (served ORDER BY step) AS drafted,
                  CASE WHEN step > max(CASE WHEN n_asked > 0 THEN step ELSE -1 END) OVER served THEN 0
                       ELSE coalesce(drafted, CASE WHEN catchup_us > 0 THEN n_prompt ELSE 0 END) END AS held
           FROM verifications v JOIN requests USING (run, request) LEFT JOIN request_ends USING (run, request)
           WHERE v.n_generated > 0 WINDOW served AS (PARTITION BY run, request) ORDER BY run, step, slot"""
    )
    frame = trace.frame(
        """WITH prompts AS (SELECT *, CASE WHEN prompt_id = '' THEN request END AS own FROM requests),
               firsts AS (SELECT run, prompt_id, own, min(request) AS first FROM prompts GROUP BY ALL),
               ranks AS (SELECT *, row_number() OVER (PARTITION BY run ORDER BY first) - 1 AS rank FROM firsts),
               of_request AS (
                   SELECT p.run, request, arm, rank, n_prompt,
                          count(*) FILTER (arm = 'probe') OVER (
                              PARTITION BY p.run, rank ORDER BY request ROWS UNBOUNDED PRECEDING EXCLUDE CURRENT ROW
                          ) AS turn
                   FROM prompts p JOIN ranks r
                   ON p.run = r.run AND p.prompt_id = r.prompt_id AND p.own IS NOT DISTINCT FROM r.own),
               started AS (
                   SELECT run, step, count(*) AS n, sum(n_prompt) AS read
                   FROM verifications JOIN of_request USING (run, request) WHERE n_generated = 0 GROUP BY ALL),
               served AS (
                   SELECT run, step, min(rank) AS rank, min(turn) AS turn, bool_or(arm <> 'no_mtp') AS loaded,
                          count(*) FILTER (n_generated > 0) AS known
                   FROM verifications JOIN of_request USING (run, request) GROUP BY ALL)
           SELECT s.*, coalesce(started.n, 0) AS n_started, rank, turn, loaded, coalesce(known, 0) AS known,
                  sum(s.n_prompt) OVER so_far - s.n_prompt - coalesce(sum(started.read) OVER before, 0) AS n_read
           FROM steps s LEFT JOIN started USING (run, step) LEFT JOIN served USING (run, step)
           WINDOW so_far AS (PARTITION BY s.run ORDER BY s.step ROWS UNBOUNDED PRECEDING),
                  before AS (PARTITION BY s.run ORDER BY s.step ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)
           ORDER BY s.run, s.step"""
    )
    together = 1 if trace.is_calibration else 2 * n_slots  # prompts of one block: a wave
    frame = frame.with_columns(
        pl.col("rank", "turn").backward_fill().over("run").forward_fill().over("run").cast(pl.Int64),
        first=pl.col("run") != pl.col("run").shift(1, fill_value=-1),
        loaded=pl.col("loaded").backward_fill().over("run").forward_fill().over("run").fill_null(True),
    ).filter(pl.col("known") == pl.col("n_slots"))
    block = pl.struct("run", pl.col("rank") // together, "turn").rle_id().cast(pl.Int64)
    frame = frame.with_columns(block=block)
    return frame, slots.join(frame.select("run", "step"), on=["run", "step"], how="semi", maintain_order="left")


def _counts(frame: pl.DataFrame, slots: pl.DataFrame, sizes: Sizes) -> np.ndarray:
    most = max(sizes[0], int(slots["slot"].max()) + 1)

    def whole(of: pl.DataFrame, *columns: str) -> np.ndarray:
        return np.ascontiguousarray(of.select(pl.col(columns).cast(pl.Int64)).to_numpy())

    counts = np.zeros((frame.height, lockstep.N_COUNTS))
    link.compiled_module(rule("off"), lockstep).book_steps(
        np.concatenate(([0], np.cumsum(frame["n_slots"].to_numpy().astype(np.int64)))),
        whole(slots, "slot", "rows", "past", "n_decodes", "probed", "emitted", "held"),
        whole(frame, "n_prompt", "n_read", "n_ahead", "n_started"),
        whole(frame, "n_catchup", "mtp", "first", "loaded"),
        (most, *sizes[1:]),
        counts,
    )
    return counts


def _alike(counts: np.ndarray) -> np.ndarray:
    """Stretches of rows that too few batches end in have no price of their own: neighbours share one, so that a time
    between two sizes measured lies on the line between theirs, and one beyond all of them on the last line.
    """
    alike = np.arange(lockstep.N_COUNTS)
    for stretches in (_ROWS, _DRAFT_ROWS):
        reached = counts[:, stretches] > 0
        ends = (reached & ~np.c_[reached[:, 1:], np.zeros(len(counts), bool)]).sum(0)
        first, n = stretches[0], 0
        starts = []
        for stretch, n_ends in zip(stretches, ends, strict=True):
            if n == 0:
                first = stretch
                starts.append(first)
            alike[stretch] = first
            n = n + n_ends if n + n_ends < LEAST else 0
        if n > 0 and len(starts) > 1:  # the rest: too few to end a line
            alike[alike == starts[-1]] = starts[-2]
    return alike


def _prices(grams: list[np.ndarray], steps: _Steps) -> np.ndarray:
    """Prices of all counts from the products of all parts. More rows in an MTP batch than were measured cost what
    prompts' rows do there.
    """
    prices = np.zeros(lockstep.N_COUNTS)
    for gram, columns in zip(grams, _PARTS.values(), strict=True):
        prices[columns] = not_negative(gram[:-1], gram[-1])
    prices = prices[steps.alike]
    beyond = steps.frame["n_catchup"].max() <= lockstep.KNOTS
    prices[_DRAFT_ROWS[beyond]] = prices[lockstep.AHEAD_ROWS]
    return prices
