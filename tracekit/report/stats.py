"""What a trace says happened: acceptance, where time went, the baselines, and what to be wary of."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import beta

from tracekit.replay.arrays import prompt_numbers
from tracekit.replay.robust import reach_of_ratio
from tracekit.report.surface import as_json, surface, surface_notes
from tracekit.trace.store import TraceFile

TOTAL = "(all)"  # a category's name, where it is of all of them
_LEAST_US = 100_000  # of generating, of which recording's share is told
_ACCEPTANCE = {"category": pl.String, "position": pl.Int64, "n": pl.Int64} | dict.fromkeys(
    ("ratio", "low", "high"), pl.Float64
)
BROKEN = 0.05  # first-draft acceptance below which a drafter is called broken rather than unlucky


@dataclass(frozen=True)
class Summary:
    """A trace in numbers: every frame has its n, and every ratio its 95 % interval."""

    headline: str
    acceptance: pl.DataFrame
    requests: pl.DataFrame
    time: pl.DataFrame
    baselines: pl.DataFrame
    surface: pl.DataFrame | None = None  # of a calibration, whose other frames are empty
    notes: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """Plain values of everything above."""
        frames = {k: getattr(self, k).to_dicts() for k in ("acceptance", "requests", "time", "baselines")}
        costs = {} if self.surface is None else as_json(self.surface)
        return {"headline": self.headline} | frames | costs | {"notes": self.notes}

    def __repr__(self) -> str:
        return f"Summary({self.headline!r})"

    def _repr_html_(self) -> str:
        frames = {
            "Acceptance by position": self.acceptance,
            "Requests": self.requests,
            "Where time went": self.time,
            "Baselines": self.baselines,
            "Cost surface": self.surface,
        }
        shown = [f"<h4>{k}</h4>{f._repr_html_()}" for k, f in frames.items() if f is not None and not f.is_empty()]
        return "".join([f"<p>{escape(self.headline)}</p>", *shown, *(f"<p>{escape(note)}</p>" for note in self.notes)])


def summarise(trace: TraceFile) -> Summary:
    """The summary of ``trace``."""
    runs = trace.runs
    first = runs.row(0, named=True)
    costs_only = trace.is_calibration
    cut_off = runs["wall_us"].is_null().any()
    headline = (
        f"{trace.path}: {first['mode']} {'' if costs_only else 'trace '}of {first['model_desc']} "
        f"({first['model_arch']}), "
        f"{runs.height} run{'s' if runs.height > 1 else ''}, on {first['device']}"
        + (", cut off before its end" if cut_off else "")
    )
    acceptance = acceptance_by_position(trace)
    frames = {"requests": _by_category(trace), "time": _time(trace), "baselines": _baselines(trace)}
    notes = [*_notes(runs, acceptance), *_gpu_notes(trace)]
    if not costs_only:
        return Summary(headline, acceptance, **frames, notes=notes)
    cells = surface(trace)  # what was drafted and accepted on random prompts says nothing
    frames = {name: frame.clear() for name, frame in frames.items()}
    return Summary(headline, acceptance, **frames, surface=cells, notes=[*surface_notes(cells), *notes])


def acceptance_by_position(trace: TraceFile) -> pl.DataFrame:
    """``category, position, n, ratio, low, high``: how often draft ``position`` was right, given that it was tried; of
    category :data:`TOTAL`, and of each where there are several.

    In a probe every draft up to ``n_max`` is tried, whatever came before it; a draft counts as right where it and all
    before it were. Drafts beyond a text's end (an end token, a stop string, a cancelled request) are not counted:
    nobody knows what would have followed. The interval is over prompts: requests that repeat one are alike.
    """
    rows = trace.frame(
        """SELECT r.run, r.request, r.prompt_id, r.category, r.n_prompt, v.n_matched AS matched,
                  least(CASE r.arm WHEN 'probe' THEN v.n_proposed ELSE v.n_drafted END,
                        e.n_generated - v.n_generated) AS tried  -- no end, cut off: all that is there was judged
           FROM requests r JOIN verifications v USING (run, request) LEFT JOIN request_ends e USING (run, request)
           WHERE arm IN ('probe', 'live') AND v.n_proposed > 0 ORDER BY r.run, r.request"""
    )
    requests = rows.unique(["run", "request"], maintain_order=True)
    numbers = prompt_numbers(*requests.select("prompt_id", "category", "n_prompt"))
    numbered = requests.select("run", "request", prompt=pl.lit(pl.Series(numbers)))
    rows = rows.join(numbered, on=["run", "request"], maintain_order="left")
    found = []
    groups = [(TOTAL, rows), *((k[0], g) for k, g in sorted(rows.group_by("category"), key=lambda kg: kg[0]))]
    for category, group in groups if len(groups) > 2 else groups[:1]:
        for position in range(1, int(group["tried"].max() or 0) + 1):
            tried = group.filter(pl.col("tried") >= position)
            each = tried.group_by("prompt", maintain_order=True).agg(
                n=pl.len(), right=(pl.col("matched") >= position).sum()
            )
            interval = ratio_interval(each["right"].to_numpy(), each["n"].to_numpy())
            found.append((category, position, tried.height, *interval))
    return pl.DataFrame(found, schema=_ACCEPTANCE, orient="row")


def ratio_interval(part: np.ndarray, whole: np.ndarray) -> tuple[float, float | None, float | None]:
    """``sum(part) / sum(whole)`` and its 95 % interval over the entries (prompts), never narrower than were each of
    the ``whole`` independent; by the rule of three over entries where all or none happened, None with a single one.
    """
    n, ratio = len(whole), float(part.sum() / max(whole.sum(), 1))
    if n < 2:
        return ratio, None, None
    if ratio in (0.0, 1.0):
        reach = min(1.0, 3 / n)
    else:
        reach = max(ratio * reach_of_ratio(part, whole), 1.96 * (ratio * (1 - ratio) / whole.sum()) ** 0.5)
    return ratio, max(0.0, ratio - reach), min(1.0, ratio + reach)


def _by_category(trace: TraceFile) -> pl.DataFrame:
    """What was drafted and accepted, by arm and category; live also by the policy that decided."""
    return trace.frame(
        """SELECT arm, CASE arm WHEN 'live' THEN policy END AS policy, category, count(*)::INT AS requests,
                  sum(n_generated)::INT AS tokens,
                  sum(verifications)::INT AS verifications,
                  sum(drafted)::INT AS drafted, sum(accepted)::INT AS accepted,
                  1 + sum(accepted) / nullif(sum(verifications), 0) AS tau,
                  sum(amplification * (n_generated - 1)) / nullif(sum(n_generated - 1), 0) AS amplification
           FROM summary GROUP BY ALL ORDER BY arm, policy, category"""
    )


def _time(trace: TraceFile) -> pl.DataFrame:
    """Share of the time of generating steps by part and arm, exact sums."""
    return trace.frame(
        """WITH arms AS (SELECT DISTINCT v.run, v.step, r.arm FROM verifications v JOIN requests r USING (run, request))
           SELECT arm, count(*)::INT AS steps, sum(wall_us)::BIGINT AS wall_us,
                  sum(draft_us) / sum(wall_us) AS draft_ratio, sum(catchup_us) / sum(wall_us) AS catchup_ratio,
                  sum(target_us) / sum(wall_us) AS target_ratio, sum(sample_us) / sum(wall_us) AS sample_ratio,
                  sum(policy_us) / sum(wall_us) AS policy_ratio, sum(record_us) / sum(wall_us) AS record_ratio
           FROM steps JOIN arms USING (run, step) WHERE n_prompt = 0 GROUP BY arm ORDER BY arm"""
    )


def _baselines(trace: TraceFile) -> pl.DataFrame:
    """Median step of a single slot: without MTP, with MTP idle, and with K drafts; and K = 0 as llama.cpp runs it.

    llama.cpp decodes every token on the MTP context whether it drafts or not; that baseline is the idle step plus a
    catch-up of one row.
    """
    frame = trace.frame(
        """SELECT CASE WHEN NOT mtp AND arm = 'no_mtp' THEN 'no MTP' WHEN NOT mtp THEN 'off, MTP loaded'
                       WHEN n_draft_decodes = 0 THEN 'MTP idle' ELSE 'K = ' || n_drafted END AS baseline,
                  CASE WHEN NOT mtp THEN -2 - (arm = 'no_mtp')::INT
                       WHEN n_draft_decodes = 0 THEN -1 ELSE n_drafted END AS rank,
                  count(*)::INT AS steps, median(wall_us) AS median_us,
                  quantile_cont(wall_us, 0.25) AS low_us, quantile_cont(wall_us, 0.75) AS high_us
           FROM steps s JOIN verifications v USING (run, step) JOIN requests r USING (run, request)
           WHERE s.n_slots = 1 AND s.n_prompt = 0 AND v.n_generated > 0 AND r.arm <> 'probe'
           GROUP BY ALL ORDER BY rank"""
    ).drop("rank")
    one_row = trace.frame(
        "SELECT median(first_draft_us) AS us, count(*)::INT AS n FROM steps WHERE n_catchup = 1 AND n_slots = 1"
    ).row(0, named=True)
    idle = frame.filter(pl.col("baseline") == "MTP idle")
    if idle.is_empty() or not one_row["n"]:
        return frame
    eager = {"baseline": "MTP idle, caught up every step (llama.cpp's order; derived)", "steps": one_row["n"]}
    eager |= {c: idle[c][0] + one_row["us"] for c in ("median_us", "low_us", "high_us")}
    return pl.concat([frame, pl.DataFrame([eager], schema=frame.schema)])


def _notes(runs: pl.DataFrame, acceptance: pl.DataFrame) -> list[str]:
    notes = []
    if (runs["mode"] == "probe").any():
        notes.append(
            "tau and ampl. of the arm probe are what probing did; `tracekit replay` tells what a policy would do"
        )
    ended = runs.filter(pl.col("wall_us").is_not_null() & (pl.col("wall_us") > 0))
    wall_us, recording_us = ended["wall_us"].sum(), ended["record_us"].sum() + ended["writer_us"].sum()
    if wall_us > _LEAST_US:  # in less, opening and closing the file is most of it
        notes.append(
            f"recording took {100 * recording_us / wall_us:.2f} % of the time, "
            f"{ended['record_us'].sum() / 1000:.0f} ms of it in the generating thread (exact)"
        )
    checked, diverged = int(ended["n_checked"].sum()), int(ended["n_diverged"].sum())
    if checked:
        notes.append(
            f"choices that came out differently in a batch of another width: {diverged} of {checked} (at "
            f"most {at_most(diverged, checked):.2g} with 95 % confidence)"
        )
    if runs["wall_us"].is_null().any():
        notes.append("a run was cut off: its last request is incomplete, everything else is there")
    first = acceptance.filter((pl.col("category") == TOTAL) & (pl.col("position") == 1))
    if first.height and first["ratio"][0] < BROKEN:
        notes.append(
            f"only {100 * first['ratio'][0]:.1f} % of first drafts were right: this drafter looks broken or "
            "misaligned with its target, not merely slow"
        )
    return notes


def at_most(seen: int, n: int) -> float:
    """The share that ``seen`` of ``n`` leaves possible, 95 %, one-sided (Clopper and Pearson)."""
    return 1.0 if seen == n else float(beta.ppf(0.95, seen + 1, n - seen))


def _gpu_notes(trace: TraceFile) -> list[str]:
    """What each GPU was doing while the trace was recorded: medians and ranges of its readings under load, of what it
    told.
    """
    readings = trace.frame(
        """WITH told AS (SELECT gpu, nullif(sm_clock_mhz, -1) AS clock, nullif(power_w, -1) AS power,
                                nullif(temperature_c, -1) AS temperature FROM gpu_readings)
           SELECT gpu, count(*)::INT AS n, median(clock) AS clock, min(clock) AS low, max(clock) AS high,
                  median(power) AS power, max(power) AS peak, max(temperature) AS temperature
           FROM told GROUP BY gpu ORDER BY gpu"""
    )
    notes = []
    for r in readings.iter_rows(named=True):
        parts = []
        if r["clock"] is not None:
            parts.append(f"{r['clock']:.0f} MHz ({r['low']} - {r['high']})")
        if r["power"] is not None:
            parts.append(f"{r['power']:.0f} W (at most {r['peak']:.0f})")
        if r["temperature"] is not None:
            parts.append(f"at most {r['temperature']} C")
        if parts:
            notes.append(f"GPU {r['gpu']}: {', '.join(parts)} (medians and ranges of n = {r['n']} readings)")
    return notes
