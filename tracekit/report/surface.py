"""The cost surface of a calibration: what a decode costs by batch width, slots and context, and where it steps up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from rich.table import Table

from tracekit.errors import TracekitError
from tracekit.report.tables import table
from tracekit.trace.store import TraceFile

if TYPE_CHECKING:
    import altair as alt

TARGET, NO_MTP, LOADED, DRAFT, CATCHUP = "target", "no MTP", "off, MTP loaded", "draft step", "catch-up"
_SHOWN = (0, 1, 2, 4, 8, 16, 32)
_BEYOND = 3  # standard errors that make a step more than noise


def surface(trace: TraceFile) -> pl.DataFrame:
    """One row per cell: ``part, slots, context, size, tokens, n, median_us, low_us, high_us`` (quartiles).

    ``part`` and ``size``, per slot: ``target``, the decode that verifies ``size`` drafts (0: MTP loaded, idle), and
    ``no MTP``, a plain one; ``off, MTP loaded``, the same where snapshots of a recurrent state are taken in vain;
    ``draft step``, an MTP decode of one row; ``catch-up``, the first of a round, with ``size`` rows. ``tokens``: of
    the whole batch. ``step_us``: median of the whole step (not of a draft step alone), with quartiles. A target decode
    counts where the one before had the same width, and where CUDA launches whole graphs the one before that too, if
    any: what a policy that stays at a draft length pays. ``rebuilt_us`` is the median of those of a new width,
    ``captured_us`` of those that were captured. Raises :class:`TracekitError` for other traces.
    """
    if not trace.is_calibration:
        raise TracekitError(f"{trace.path}: not a calibration; `tracekit calibrate` writes one")
    cells = trace.frame(
        """WITH depth AS (SELECT run, step, min(n_prompt)::INT AS context,
                                 any_value(settings->>'memory' = 'snapshot' AND arm <> 'no_mtp') AS snapshots
                          FROM verifications JOIN requests USING (run, request) JOIN runs USING (run) GROUP BY ALL),
           before AS (SELECT steps.*, n_max, coalesce(lag(n_tokens) OVER earlier = n_tokens, false) AS same,
                             machine->>'cuda_graphs' IS DISTINCT FROM 'true' OR lag(n_tokens, 2) OVER earlier = n_tokens
                             AS repeated
                      FROM steps JOIN runs USING (run) WINDOW earlier AS (PARTITION BY run ORDER BY step)),
           plain AS (SELECT *, n_tokens // n_slots - 1 AS n_drafted FROM before JOIN depth USING (run, step)
                     WHERE n_prompt = 0),
           parts AS (
               SELECT CASE WHEN mtp THEN 'target' WHEN snapshots THEN 'off, MTP loaded' ELSE 'no MTP' END AS part,
                      n_slots, context, n_drafted AS size, n_tokens AS tokens, same, same AND repeated AS counts,
                      target_us AS us, wall_us AS step_us
               FROM plain
               UNION ALL
               SELECT 'draft step', n_slots, context, 1, n_slots, true, true,
                      (draft_us - first_draft_us) / (n_draft_decodes - 1), NULL
               FROM plain WHERE n_draft_decodes > 1
               UNION ALL
               SELECT 'catch-up', n_slots, context, n_catchup // n_slots, n_catchup, true, true, first_draft_us, NULL
               FROM plain
               WHERE n_draft_decodes > 0 AND n_catchup // n_slots <= n_max + 1 AND n_catchup % n_slots = 0),
           found AS (
               SELECT * REPLACE (counts OR same AND NOT bool_or(counts) OVER cell AS counts)
               FROM parts WINDOW cell AS (PARTITION BY part, n_slots, context, size))
           SELECT part, n_slots::INT AS slots, context, size::INT AS size, tokens::INT AS tokens,
                  count(*) FILTER (counts)::INT AS n, median(us) FILTER (counts) AS median_us,
                  quantile_cont(us, 0.25) FILTER (counts) AS low_us, quantile_cont(us, 0.75) FILTER (counts) AS high_us,
                  median(us) FILTER (NOT same) AS rebuilt_us,
                  median(us) FILTER (same AND NOT counts) AS captured_us, median(step_us) FILTER (counts) AS step_us,
                  quantile_cont(step_us, 0.25) FILTER (counts) AS step_low_us,
                  quantile_cont(step_us, 0.75) FILTER (counts) AS step_high_us
           FROM found GROUP BY ALL HAVING n > 0"""
    )
    order = pl.col("part").cast(pl.Enum([NO_MTP, LOADED, TARGET, DRAFT, CATCHUP]))
    return cells.sort(order, "slots", "context", "size")


def jumps(cells: pl.DataFrame) -> pl.DataFrame:
    """Batch widths after which a target decode's time jumps: where the backend goes on to another kernel.

    One row per width of each (slots, context), ``after_tokens`` and ``to_tokens`` its batch tokens and the next
    measured ones: ``jump_us``, the rise beyond what as many tokens cost elsewhere on the curve (the median rise per
    token); ``ratio``, of the time before; ``error_us``, its standard error, from the quartiles of both cells;
    ``beyond_noise``, more than three of them.
    """
    found = []
    target = cells.filter((pl.col("part") == TARGET) & (pl.col("n") > 1))
    for (slots, context), curve in target.group_by("slots", "context", maintain_order=True):
        tokens, us = curve["tokens"].to_numpy(), curve["median_us"].to_numpy()
        if len(us) < 4:
            continue
        error = _error(*(curve[c].to_numpy() for c in ("low_us", "high_us", "n")))
        rise, width = np.diff(us), np.diff(tokens)
        jump = rise - np.median(rise / width) * width
        errors = np.hypot(error[1:], error[:-1])
        found += [
            {
                "slots": slots,
                "context": context,
                "after_tokens": int(tokens[i]),
                "to_tokens": int(tokens[i + 1]),
                "jump_us": float(jump[i]),
                "ratio": float(jump[i] / us[i]),
                "error_us": float(errors[i]),
                "beyond_noise": bool(jump[i] > _BEYOND * errors[i]),
            }
            for i in range(len(rise))
        ]
    numbers = {"slots": pl.Int32, "context": pl.Int32, "after_tokens": pl.Int32, "to_tokens": pl.Int32}
    floats = {"jump_us": pl.Float64, "ratio": pl.Float64, "error_us": pl.Float64}
    return pl.DataFrame(found, schema=numbers | floats | {"beyond_noise": pl.Boolean})


def _error(low_us: Any, high_us: Any, n: Any) -> Any:
    """Standard error of a median of ``n`` normal times from their quartiles; the clock counts whole microseconds."""
    return np.maximum(1.253 * (high_us - low_us) / 1.349 / np.sqrt(n), 0.5)


def as_json(cells: pl.DataFrame) -> dict[str, Any]:
    """Plain values: ``cells`` of the surface, and its ``jumps``."""
    return {"cells": cells.to_dicts(), "jumps": jumps(cells).to_dicts()}


def surface_tables(cells: pl.DataFrame) -> list[Table]:
    """The surface for a terminal: verifications, what they must bring, drafting, and where the curve jumps."""
    where = cells.select("slots", "context").unique(maintain_order=True).rows()
    drafts, rows = _sizes(cells, TARGET), _sizes(cells, CATCHUP)
    at = {(r["part"], r["slots"], r["context"], r["size"]): r for r in cells.iter_rows(named=True)}

    def line(key: tuple[int, int], parts: list[tuple[str, int]]) -> list[str]:
        return [*map(str, key), *(_timing(at.get((part, *key, size))) for part, size in parts)]

    plain = [NO_MTP, *([LOADED] if (cells["part"] == LOADED).any() else [])]
    decodes = [*((part, 0) for part in plain), *((TARGET, k) for k in drafts)]
    drafting = [(DRAFT, 1), *((CATCHUP, r) for r in rows)]
    pays = [
        [*map(str, key), *(_ratio(at.get((TARGET, *key, k)), at.get((NO_MTP, *key, 0))) for k in drafts)]
        for key in where
    ]
    key = ["slots", "context"]
    found = jumps(cells).filter("beyond_noise").sort("ratio", descending=True)
    widths = [
        [
            *(str(r[c]) for c in ("slots", "context")),
            f"{r['after_tokens']} -> {r['to_tokens']}",
            f"{r['jump_us'] / 1000:.3f} (+- {2 * r['error_us'] / 1000:.3f})",
            f"{100 * r['ratio']:+.0f} %",
        ]
        for r in found.head(12).iter_rows(named=True)
    ]
    shown = [
        table(
            [*key, *plain, *(f"K = {k}" for k in drafts)],
            [line(k, decodes) for k in where],
            2,
            "Target decode that verifies K drafts per slot, ms: median (quartiles), n",
        ),
        table(
            [*key, *(f"K = {k}" for k in drafts)],
            pays,
            2,
            "Tokens per slot and step that K drafts must give to be as fast as no MTP (95 %)",
        ),
        table(
            [*key, "draft step", *(f"{r} rows" if r > 1 else "1 row" for r in rows)],
            [line(k, drafting) for k in where],
            2,
            "MTP decodes, ms: one more draft, and the first of a round by rows caught up per slot",
        ),
    ]
    if widths:
        columns = [*key, "batch tokens", "more than elsewhere, ms (95 %)", "of the time before"]
        more = f", {len(widths)} largest of {found.height}" if found.height > len(widths) else ""
        shown.append(table(columns, widths, 2, f"Jumps of the target decode beyond the noise{more}"))
    return shown


def surface_notes(cells: pl.DataFrame) -> list[str]:
    """What the tables rest on, and what is not in them."""
    captured = cells.filter(pl.col("captured_us").is_not_null())
    before = "two before had its width (CUDA repeats its graph then)" if captured.height else "one before had its width"
    notes = [
        f"a decode counts where the {before}; tokens to be as fast: medians of whole steps over those without MTP, "
        "rows caught up at random"
    ]
    if captured.height:
        new, capture = (
            captured.select((pl.col(us) - pl.col("median_us")).median() / 1000).item()
            for us in ("rebuilt_us", "captured_us")
        )
        notes.append(
            f"the first decode of a new width took {new:.1f} ms longer, the second, whose graph CUDA captures, "
            f"{capture:.1f} ms (medians of n = {captured.height} cells)"
        )
    found = jumps(cells)
    if found.height and not found["beyond_noise"].any():
        largest = found.sort("ratio", descending=True).row(0, named=True)
        notes.append(
            f"no jump of the target decode is beyond the noise; the largest, after {largest['after_tokens']} batch "
            f"tokens of {largest['slots']} slots: {largest['jump_us'] / 1000:.3f} ms (+- "
            f"{2 * largest['error_us'] / 1000:.3f})"
        )
    return notes


def _sizes(cells: pl.DataFrame, part: str) -> list[int]:
    """The sizes of ``part`` that tables show: powers of two and the largest."""
    sizes = sorted(cells.filter(pl.col("part") == part)["size"].unique())
    return [s for s in sizes if s in _SHOWN or s == sizes[-1]]


def _timing(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return "-"
    middle, low, high = (cell[c] / 1000 for c in ("median_us", "low_us", "high_us"))
    digits = 3 if middle < 1 else 2 if middle < 100 else 1
    if cell["n"] < 2:
        return f"{middle:.{digits}f} (once)"
    return f"{middle:.{digits}f} ({low:.{digits}f} - {high:.{digits}f}) {cell['n']}"


def _ratio(cell: dict[str, Any] | None, plain: dict[str, Any] | None) -> str:
    if not (cell and plain):
        return "-"
    ratio = cell["step_us"] / plain["step_us"]
    if min(cell["n"], plain["n"]) < 2:
        return f"{ratio:.2f} (once)"
    errors = [_error(c["step_low_us"], c["step_high_us"], c["n"]) / c["step_us"] for c in (cell, plain)]
    reach = 1.96 * ratio * np.hypot(*errors)
    return f"{ratio:.2f} ({ratio - reach:.2f} - {ratio + reach:.2f})"


def surface_chart(cells: pl.DataFrame) -> alt.HConcatChart:
    """Median time of a target decode by batch tokens, a line per (slots, context), jumps marked; beside it the MTP
    decodes.
    """
    import altair as alt

    shown = cells.with_columns(
        ms=pl.col("median_us") / 1000,
        low=pl.col("low_us") / 1000,
        high=pl.col("high_us") / 1000,
        slots=pl.col("slots").cast(pl.String),
        context=pl.col("context").cast(pl.String),
    )
    contexts = [str(c) for c in sorted(cells["context"].unique())]
    slots = [str(s) for s in sorted(cells["slots"].unique())]
    colour = alt.Color("context:N", sort=contexts, title="context, tokens")
    dash = alt.StrokeDash("slots:N", sort=slots, title="slots")
    shapes = {TARGET: "circle", NO_MTP: "diamond", LOADED: "square", CATCHUP: "circle", DRAFT: "triangle-right"}
    shapes = {part: shape for part, shape in shapes.items() if (cells["part"] == part).any()}
    shape = alt.Shape("part:N", title=None, scale=alt.Scale(domain=list(shapes), range=list(shapes.values())))
    tip = ["part", "slots", "context", "size", "tokens", "n", "ms", "low", "high"]

    def panel(parts: list[str], title: str, x: str) -> alt.LayerChart:
        rows = shown.filter(pl.col("part").is_in(parts))
        # linear for one number of slots; for several, a doubling is the same distance everywhere
        scale = alt.Scale(type="log", base=2, nice=False) if len(slots) > 1 else alt.Scale(zero=False)
        base = alt.Chart(rows).encode(x=alt.X("tokens:Q", title=x, scale=scale), color=colour)
        line = base.mark_line().encode(y=alt.Y("ms:Q", title="median ms (quartiles)"), strokeDash=dash)
        bars = base.mark_rule(opacity=0.5).encode(y=alt.Y("low:Q", title="median ms (quartiles)"), y2="high:Q")
        points = base.mark_point(filled=True, size=30).encode(y="ms:Q", shape=shape, tooltip=tip)
        return (line.transform_filter(alt.datum.part == parts[0]) + bars + points).properties(
            width=380, height=300, title=title
        )

    found = jumps(cells).filter("beyond_noise")
    ends = found.join(
        cells.filter(pl.col("part") == TARGET).select("slots", "context", "tokens", "median_us"),
        left_on=["slots", "context", "to_tokens"],
        right_on=["slots", "context", "tokens"],
    ).with_columns(ms=pl.col("median_us") / 1000, context=pl.col("context").cast(pl.String))
    marks = (
        alt.Chart(ends)
        .mark_point(shape="triangle-up", size=90, color="black", yOffset=12)
        .encode(x="to_tokens:Q", y="ms:Q", tooltip=["after_tokens", "to_tokens", "jump_us", "error_us"])
    )
    decodes = [TARGET, NO_MTP, LOADED]
    left = panel(decodes, "Target decode (triangles: jumps beyond the noise)", "batch tokens, all slots")
    right = panel([CATCHUP, DRAFT], "MTP decode: draft step, and first of a round", "rows, all slots")
    return alt.hconcat(left + marks, right)
