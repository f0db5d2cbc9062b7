"""Results as tables for a terminal and as plain rows for JSON. Every number has its interval or is exact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import polars as pl
from rich.table import Table

from tracekit.words import counted_requests

if TYPE_CHECKING:
    from tracekit.policy.file import PolicyFile
    from tracekit.replay.league import League
    from tracekit.report.stats import Summary
    from tracekit.verify import Verdict


_SHOWN = {"calibration": "baselines"}  # what an arm is called in tables; a calibration is another thing to its reader


def interval(row: dict[str, Any], name: str, digits: int) -> str:
    """``12.3 (11.9 - 12.8)`` from the columns ``name``, ``name_low`` and ``name_high``; without them what was seen
    once.
    """
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if low is None:
        return f"{row[name]:.{digits}f} (once)"
    return f"{row[name]:.{digits}f} ({low:.{digits}f} - {high:.{digits}f})"


def _gain(row: dict[str, Any], name: str, digits: int = 3) -> str:
    """A speed-up; alone where it is no MTP against itself, or of an older file, which tells no interval."""
    exact = f"{name}_low" not in row or row[f"{name}_low"] == row[f"{name}_high"] is not None
    return f"{row[name]:.{digits}f}" if exact else interval(row, name, digits)


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(columns: list[str], rows: list[list[str]], left: int = 1, title: str | None = None) -> Table:
    """A plain table: the first ``left`` columns flush left, the others right."""
    made = Table(title=title, box=None, pad_edge=False, title_justify="left", title_style="bold", header_style="bold")
    for i, name in enumerate(columns):
        made.add_column(name, justify="left" if i < left else "right", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


def league_table(frame: pl.DataFrame, league: League) -> Table:
    """Policies against each other and against the three references of their trace."""
    columns = [
        "policy",
        "tokens/s (95 %)",
        "x no MTP (95 %)",
        "drafted",
        "accepted",
        "ratio",
        "tau",
        "ampl.",
        "trips",
        "exact",
        "regret",
    ]
    rows = []
    for row in frame.iter_rows(named=True):
        rows.append(
            [
                row["policy"],
                interval(row, "tokens_per_second", 1),
                interval(row, "speedup", 3),
                str(row["drafted"]),
                str(row["accepted"]),
                _cell(row["acceptance_ratio"], 3),
                _cell(row["tau"], 2),
                _cell(row["amplification"], 2),
                str(row["trips"]),
                f"{100 * row['exact_fraction']:.1f} %",
                *([] if row["regret"] is None else [f"{100 * row['regret']:.1f} %"]),
            ]
        )
    if league.clairvoyant_us is None:
        columns.remove("regret")
    for name, speed, gain in _references(league):
        rows.append([name, speed, gain, *[""] * (len(columns) - 3)])
    return table(columns, rows)


def _references(league: League) -> list[tuple[str, str, str]]:
    plain = league.no_mtp_speed()
    best = _best_static(league)
    row = {"s": plain.value, "s_low": plain.low, "s_high": plain.high}
    references = [
        ("(no MTP)", interval(row, "s", 1), "1"),
        (
            f"(best fixed length: {best['policy']})",
            interval(best, "tokens_per_second", 1),
            interval(best, "speedup", 3),
        ),
    ]
    optimum = league.clairvoyant_speed()
    if optimum is not None:
        references.append(("(clairvoyant optimum: a bound)", f"{optimum:.1f}", f"{optimum / plain.value:.3f}"))
    return references


def _best_static(league: League) -> dict[str, Any]:
    return league.table(league.static_policies()).sort("tokens_per_second", descending=True).row(0, named=True)


def with_references(frame: pl.DataFrame, league: League) -> list[dict[str, Any]]:
    """One object per policy, the trace's three references in each, and what one should know of the prices."""
    plain, best = league.no_mtp_speed(), _best_static(league)
    same = {
        "no_mtp_tokens_per_second": plain.value,
        "best_static": best["policy"],
        "best_static_tokens_per_second": best["tokens_per_second"],
        "clairvoyant_tokens_per_second": league.clairvoyant_speed(),
        "trace_id": league.trace.trace_id,
        "cost_model": league.cost.id,
        "warning": league.warning,
    }
    return [row | same for row in frame.iter_rows(named=True)]


def league_note(league: League) -> str:
    """What the table's numbers rest on."""
    p, n_slots = league.positions, league.serving.n_slots
    ended, counted_from = "", ""
    if n_slots == 1:
        ended, counted_from = " of two tokens or more", " after the first of each, which comes with its prompt"
    together = (
        f" Served over {n_slots} slots from one queue: tokens/s are of the whole run, reading prompts included."
        if n_slots > 1
        else ""
    )
    return (
        f"{counted_requests(p.n_requests, p.n_prompts)}{ended}, {int(league.tokens.sum())} tokens{counted_from}; "
        f"{p.mode} trace; times from {league.cost.n_steps} steps (cost model {league.cost.id}), in the median "
        f"{100 * league.cost.spread_ratio:.1f} % from what is fitted; counts are exact where 'exact' says 100 %."
        + together
        + (f" Warning: {league.warning}." if league.warning else "")
    )


def evidence_table(found: PolicyFile) -> Table:
    """The tuned policy, predicted on requests its choice did not see, above what it was compared with."""
    e = found.evidence
    rows = [
        [
            f"{found.policy} (cross-validated)",
            interval(e.model_dump(), "tokens_per_second", 1),
            _gain(e.model_dump(), "speedup"),
            _yes(e.safe),
        ]
    ]
    for other in e.alternatives:
        rows.append(
            [
                other.policy,
                interval(other.model_dump(), "tokens_per_second", 1),
                _gain(other.model_dump(exclude_none=True), "speedup"),
                _yes(other.safe),
            ]
        )
    judged = f"slows no category by > {100 * e.max_slowdown:g} % (one-sided {100 * e.confidence:g} %, in sample)"
    return table(["policy", "tokens/s (95 %)", "x no MTP (95 %)", judged], rows)


def _yes(safe: bool) -> str:
    return "yes" if safe else "no"


def verdict_table(verdict: Verdict, title: str | None = None) -> Table:
    """Predicted against measured, one row per arm."""
    columns = [
        "arm",
        "policy",
        "predicted tokens/s (95 %)",
        "measured tokens/s (95 %)",
        "error",
        "x no MTP predicted (95 %)",
        "x no MTP measured (95 %)",
        "same steps",
        "same tokens",
    ]
    rows = []
    for row in verdict.arms.iter_rows(named=True):
        rows.append(
            [
                row["arm"],
                row["policy"],
                interval(row, "predicted", 1),
                interval(row, "measured", 1),
                f"{100 * row['error_ratio']:+.1f} %",
                _gain(row, "predicted_speedup"),
                _gain(row, "measured_speedup"),
                f"{row['equal_requests']}/{row['n_requests']}",
                f"{row['equal_tokens']}/{row['n_requests']}",
            ]
        )
    return table(columns, rows, left=2, title=title)


def categories_table(verdict: Verdict) -> Table:
    """Measured speed-up against no MTP of every arm in every prompt category, the predicted one in brackets."""
    sizes = dict(verdict.categories.select("category", "n_requests").rows())
    columns = ["measured x no MTP (95 %) [predicted]", *(f"{c}, n = {n}" for c, n in sizes.items())]
    rows = [
        [
            arm,
            *(f"{_gain(r, 'measured_speedup', 2)} [{r['predicted_speedup']:.2f}]" for r in of.iter_rows(named=True)),
        ]
        for (arm,), of in verdict.categories.group_by("arm", maintain_order=True)
    ]
    return table(columns, rows)


def stats_tables(summary: Summary) -> list[Table]:
    """The tables of ``tracekit stats``."""
    accept = [
        [r["category"], str(r["position"]), interval(r, "ratio", 3), str(r["n"])]
        for r in summary.acceptance.rename({"low": "ratio_low", "high": "ratio_high"}).iter_rows(named=True)
        if r["position"] in (1, 2, 3, 4, 6, 8, 12, 16)
    ]
    by = ["arm", "policy", "category"]
    if summary.requests["policy"].drop_nulls().n_unique() < 2:
        by.remove("policy")
    requests = [
        [
            *(_SHOWN.get(r[c], r[c]) or "-" for c in by),
            *(str(r[c]) for c in ("requests", "tokens", "verifications", "drafted", "accepted")),
            _cell(r["tau"], 2),
            _cell(r["amplification"], 2),
        ]
        for r in summary.requests.iter_rows(named=True)
    ]
    parts = ("draft", "catchup", "target", "sample", "policy", "record")
    time = [
        [
            _SHOWN.get(r["arm"], r["arm"]),
            str(r["steps"]),
            f"{r['wall_us'] / 1e6:.2f}",
            *(f"{100 * r[f'{p}_ratio']:.1f} %" for p in parts),
        ]
        for r in summary.time.iter_rows(named=True)
    ]
    baselines = [
        [
            r["baseline"],
            f"{r['median_us'] / 1000:.3f} ({r['low_us'] / 1000:.3f} - {r['high_us'] / 1000:.3f})",
            str(r["steps"]),
        ]
        for r in summary.baselines.iter_rows(named=True)
    ]
    return [
        table(
            ["category", "draft", "right (95 %)", "n"],
            accept,
            title="Acceptance by position (n: drafts tried; intervals over prompts)",
        ),
        table(
            [*by, "requests", "tokens", "verifications", "drafted", "accepted", "tau", "ampl."],
            requests,
            len(by),
            "Requests (exact)",
        ),
        table(["arm", "steps", "seconds", *parts], time, title="Where time went (exact)"),
        table(["baseline", "ms per step (quartiles)", "steps"], baselines, title="Baselines"),
    ]


def frame_table(frame: pl.DataFrame) -> Table:
    """Any frame, as it is."""
    rows = [["" if v is None else str(v) for v in row] for row in frame.iter_rows()]
    return table(frame.columns, rows, left=len(frame.columns))
