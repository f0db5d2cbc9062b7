"""The steps of a trace in which one slot generated, as columns: what each took, and what there was to do.

llama.cpp builds a decode's graph again where its shape is another than the one before (src/llama-context.cpp). CUDA
launches such a graph kernel by kernel, captures it where the same shape follows, and repeats the capture from the third
time on (ggml/src/ggml-cuda/ggml-cuda.cu, ggml_backend_cuda_graph_compute): three prices of one decode.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from scipy.stats import theilslopes

from tracekit.errors import TracekitError
from tracekit.replay import kernel
from tracekit.replay.robust import LEAST, blocks_of, drawn
from tracekit.trace.store import TraceFile

_OR = "or take the times of another trace with --cost"
_MORE = {"record": f"record more prompts or tokens, {_OR}", "calibrate": "calibrate with more --blocks or --steps"}


@dataclass(frozen=True)
class Steps:
    """The generating steps of one slot as columns (float64 ``[n]``; microseconds, tokens), none wider, in target
    tokens or rows caught up, than the cost model has prices for.
    """

    path: str
    advice: str  # where something is missing
    prompt_line: tuple[float, float] | None  # microseconds of a prompt's catch-up in one batch: fixed, and per row
    n_blocks: int  # stretches of time
    by_tokens: bool  # whether drafts and their verification read the tokens in memory alone, not whole blocks of cells
    block: np.ndarray  # consecutive requests of one prompt: close together in time
    mtp: np.ndarray
    loaded: np.ndarray  # without MTP, where it was loaded and snapshots of the state were taken all the same
    kv: np.ndarray  # cells that attention was given, whole blocks
    past: np.ndarray  # tokens in memory
    width: np.ndarray
    reshapes: np.ndarray  # whether the target decode before had another shape: another width, or more or fewer cells
    captures: np.ndarray  # whether that had the same shape, but the one before it another
    settling: np.ndarray  # as the kernel's SETTLING
    firsts: np.ndarray  # whether a prompt was read in the step before
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
    def read(cls, trace: TraceFile, n_max: int) -> Steps:
        """The steps of ``trace`` that tell the costs of up to ``n_max`` drafts. Raises :class:`TracekitError` where it
        has none, or no baseline.
        """
        calibration = trace.is_calibration
        verb = "calibrate" if calibration else "record"
        if trace.runs["n_max"].max() < n_max:
            raise TracekitError(
                f"{trace.path}: its times are of up to {trace.runs['n_max'].max()} drafts, the trace to be priced has "
                f"up to {n_max}; {verb} it with --n-max {n_max}"
            )
        alone = "calibrate with 1 among --slots" if calibration else "record with --parallel 1"
        if calibration and trace.runs["wall_us"].is_null().any():
            alone = "it was cut off; calibrate again, with 1 among --slots"
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
               stretches AS (
                   SELECT *, n_draft_decodes > 0 OR n_prompt > 0 AS stirred,
                          count(*) FILTER (stirred) OVER (PARTITION BY run ORDER BY step) AS stretch FROM steps),
               calmer AS (
                   SELECT *, CASE WHEN stirred THEN 0 ELSE greatest(0, $calm + 1 - count(*) FILTER (NOT stirred)
                          OVER (PARTITION BY run, stretch ORDER BY step)) END AS settling FROM stretches),
               target AS (
                   SELECT *, (n_tokens, (n_past + n_tokens - 1) // $cells) AS shape,
                          shape IS DISTINCT FROM lag(shape) OVER before AS reshapes,
                          NOT reshapes AND shape IS DISTINCT FROM lag(shape, 2) OVER before AS captures,
                          coalesce(lag(n_prompt) OVER before, 1) > 0 AS firsts
                   FROM calmer WINDOW before AS (PARTITION BY run ORDER BY step))
               SELECT block, mtp,
                      NOT mtp AND arm <> 'no_mtp' AND settings->>'memory' = 'snapshot' AS loaded,
                      n_past AS past, n_tokens AS width, reshapes, captures, settling, firsts,
                      len(v.tokens) AS emitted,
                      n_draft_decodes AS decodes, n_catchup AS rows, coalesce(rows_before, 0) AS rows_before,
                      coalesce(draft_new_before, true) AS draft_new_before,
                      target_us AS target, first_draft_us AS first, draft_us AS draft, catchup_us AS catchup,
                      sample_us AS sample, wall_us AS wall
               FROM target s JOIN verifications v USING (run, step) JOIN runs USING (run)
                    JOIN requests USING (run, request) JOIN blocks USING (run, request) LEFT JOIN mtp USING (run, step)
               WHERE s.n_slots = 1 AND s.n_prompt = 0 AND v.n_generated > 0
                     AND n_tokens <= $most AND n_catchup <= $most ORDER BY run, step""",
            most=n_max + 1,
            cells=kernel.KV_BLOCK,
            calm=kernel.CALM,
        )
        if frame.is_empty():
            raise TracekitError(f"{trace.path}: no step of one slot alone, whose costs are wanted; {alone}")
        frame = frame.with_columns(kv=pl.Series(kernel.n_kv((frame["past"] + frame["width"]).to_numpy())))
        several = trace.frame("SELECT max((settings->>'n_slots')::INT) AS n FROM runs")["n"][0] > 1
        advice = alone if several and not calibration else _MORE[verb]
        columns = {c: frame[c].cast(pl.Float64).to_numpy() for c in frame.columns}
        columns["block"], n_blocks = blocks_of(columns["block"])
        found = cls(str(trace.path), advice, _prompt_line(trace), n_blocks, False, **columns)
        if (found.wall <= 0).any():
            raise TracekitError(f"{trace.path}: damaged: steps that took no time")
        n_bare = int(((found.mtp == 0) & (found.loaded == 0)).sum())
        if n_bare == 0:
            baseline = alone if several or calibration else f"record with --baseline, {_OR}"
            raise TracekitError(f"{trace.path}: the baseline without MTP was not recorded; {baseline}")
        if n_bare < LEAST:
            raise TracekitError(f"{trace.path}: {n_bare} steps without MTP, {LEAST} are needed; {advice}")
        return found

    def take(self, chosen: np.ndarray) -> Steps:
        """The steps at ``chosen`` (a mask or indices)."""
        columns = {name: of for name, of in vars(self).items() if isinstance(of, np.ndarray)}
        return replace(self, **{name: of[chosen] for name, of in columns.items()})

    def slowed(self, by: np.ndarray) -> Steps:
        """All times multiplied by ``by``, float64 ``[n]``."""
        times = {name: getattr(self, name) * by for name in ("target", "first", "draft", "catchup", "sample", "wall")}
        return replace(self, **times)

    def resampled(self, rng: np.random.Generator, slowness: np.ndarray) -> tuple[Steps, float]:
        """As many blocks, drawn with replacement, with all their steps (neighbours are not independent) and some with
        MTP and some without; their mean slowness.
        """
        blocks, bare = self.block.astype(int), (self.mtp == 0) & (self.loaded == 0)
        times = drawn(rng, blocks, [kind for kind in (bare, self.mtp == 1) if kind.any()])
        chosen = np.repeat(np.arange(len(blocks)), times[blocks])
        return self.take(chosen), float(slowness[blocks[chosen]].mean())

    @property
    def host(self) -> np.ndarray:
        """What a step takes beside decoding and sampling."""
        return self.wall - self.target - self.draft - self.catchup - self.sample

    @property
    def draft_past(self) -> np.ndarray:
        """Tokens in memory times rows of MTP decodes."""
        return np.where(self.decodes > 0, self.past * (self.rows + self.decodes - 1), 0.0)

    @property
    def draft_reshapes(self) -> tuple[np.ndarray, np.ndarray]:
        """How many MTP decodes were of another shape than the one before: of the first, and of the others."""
        other = (self.decodes > 0) & (self.rows != self.rows_before)
        return other.astype(float), ((self.decodes > 1) & (self.rows != 1)).astype(float)

    @property
    def draft_captures(self) -> tuple[np.ndarray, np.ndarray]:
        """How many had the shape of the one before, which was new: of the first, and of the others."""
        other = self.rows != self.rows_before
        first = (self.decodes > 0) & ~other & (self.draft_new_before == 1)
        others = np.where(self.rows == 1, other & (self.decodes > 1), self.decodes > 2)
        return first.astype(float), others.astype(float)


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
