"""Results as pictures: Altair charts, saved as PNG or SVG without a browser, or as an HTML page."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from tracekit import beside
from tracekit.errors import TracekitError

if TYPE_CHECKING:
    import altair as alt

    from tracekit.replay.costs import CostModel
    from tracekit.replay.league import League

_FORMATS = (".png", ".svg", ".html")
_BLUE, _GREY, _RED, _GREEN = "#2f6f9f", "#9aa5b1", "#c0504d", "#4f9d69"


def check(path: Path | None, force: bool = True, others: Iterable[Path | None] = ()) -> None:
    """Raise :class:`TracekitError` where a picture could not be saved under this name, or should not:
    :func:`tracekit.beside.check_new`.
    """
    if path is None:
        return
    if path.suffix not in _FORMATS:
        raise TracekitError(f"{path}: a picture ends in {', '.join(_FORMATS)}")
    beside.check_new(path, force, others)


def save(chart: alt.TopLevelMixin, path: str | Path) -> Path:
    """Save ``chart``; PNG at twice the size."""
    path = Path(path)
    check(path)
    partial = beside.partial_of(path)
    try:
        chart.save(str(partial), format=path.suffix[1:], **({"scale_factor": 2} if path.suffix == ".png" else {}))
        partial.replace(path)
    except OSError as error:
        raise TracekitError(f"{path}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            partial.unlink()
    return path


def league_chart(frame: pl.DataFrame, league: League) -> alt.LayerChart:
    """Predicted speed of each policy with its interval, a policy given twice once; lines at no MTP and, where there is
    one, at the clairvoyant optimum.
    """
    import altair as alt

    rows = frame.unique("policy", keep="first", maintain_order=True).select(
        "policy", "tokens_per_second", "tokens_per_second_low", "tokens_per_second_high"
    )
    base = alt.Chart(rows).encode(y=alt.Y("policy:N", sort=None, title=None))
    bars = base.mark_bar(color=_BLUE).encode(
        x=alt.X("tokens_per_second:Q", title="tokens/s, predicted (95 % interval)")
    )
    errors = base.mark_errorbar(color="black").encode(
        x=alt.X("tokens_per_second_low:Q", title=""), x2="tokens_per_second_high:Q"
    )
    speeds = [league.no_mtp_speed().value, league.clairvoyant_speed()]
    lines = pl.DataFrame({"x": speeds, "reference": ["no MTP", "clairvoyant optimum"]}).drop_nulls()
    scale = alt.Scale(domain=lines["reference"].to_list(), range=[_RED, _GREEN])
    rules = (
        alt.Chart(lines)
        .mark_rule(strokeDash=[4, 3], size=2)
        .encode(x="x:Q", color=alt.Color("reference:N", scale=scale, title=None))
    )
    return (bars + errors + rules).properties(width=520, title=f"Policies on {league.trace.path.name}")


def acceptance_chart(acceptance: pl.DataFrame) -> alt.LayerChart:
    """How often the first k drafts are all right (:func:`tracekit.report.stats.acceptance_by_position`)."""
    import altair as alt

    colour = alt.Color("category:N", title=None, legend=alt.Legend(symbolOpacity=1))  # not the bands'
    base = alt.Chart(acceptance).encode(x=alt.X("position:O", title="draft"), color=colour)
    lines = base.mark_line(point=True).encode(
        y=alt.Y("ratio:Q", title="right, with all before it", scale=alt.Scale(domain=[0, 1]))
    )
    bands = base.mark_area(opacity=0.12).encode(y=alt.Y("low:Q", title=""), y2="high:Q")
    return (bands + lines).properties(width=380, height=260, title="Acceptance by position (95 %)")


def cost_chart(cost: CostModel) -> alt.Chart:
    """Median measured time of a target decode by batch width, and of a first MTP decode by rows caught up, as far as
    batches go.
    """
    import altair as alt

    widest = cost.cells.filter(pl.col("cost").str.starts_with("target"))["size"].max()
    cells = cost.cells.filter(pl.col("size") <= widest).with_columns(ms=pl.col("median_us") / 1000)
    return (
        alt.Chart(cells)
        .mark_line(point=True)
        .encode(
            x=alt.X("size:Q", title="batch width, or rows caught up", axis=alt.Axis(tickMinStep=1)),
            y=alt.Y("ms:Q", title="median ms"),
            color=alt.Color("cost:N", title=None),
            tooltip=["cost", "size", "n", "ms"],
        )
        .properties(width=380, height=260, title="What a decode costs")
    )


def verdict_chart(rows: pl.DataFrame) -> alt.FacetChart:
    """Predicted and measured speed of every arm, one panel per ``head`` (columns of :class:`tracekit.verify.Verdict`,
    and ``head``).
    """
    import altair as alt

    kinds = [
        rows.select(
            "head",
            "arm",
            pl.lit(kind).alias("kind"),
            value=pl.col(kind),
            low=pl.col(f"{kind}_low").cast(pl.Float64),
            high=pl.col(f"{kind}_high").cast(pl.Float64),
        )
        for kind in ("predicted", "measured")
    ]
    order = rows["arm"].unique(maintain_order=True).to_list()
    base = alt.Chart(pl.concat(kinds)).encode(
        y=alt.Y("arm:N", sort=order, title=None), yOffset=alt.YOffset("kind:N", sort=["predicted", "measured"])
    )
    scale = alt.Scale(domain=["predicted", "measured"], range=[_GREY, _BLUE])
    bars = base.mark_bar().encode(
        x=alt.X("value:Q", title="tokens/s (95 % interval)"), color=alt.Color("kind:N", scale=scale, title=None)
    )
    errors = base.mark_errorbar(color="black").encode(x=alt.X("low:Q", title="tokens/s (95 % interval)"), x2="high:Q")
    return (
        (bars + errors)
        .properties(width=340)
        .facet(column=alt.Column("head:N", sort=None, title=None))
        .properties(title="Should this model speculate? Predicted against measured")
    )
