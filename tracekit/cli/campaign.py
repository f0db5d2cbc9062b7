"""``tracekit campaign``: everything one wants from a machine that is there for an hour."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tracekit.cli import options, out

if TYPE_CHECKING:
    from tracekit.study import Finding

AGAIN = 3  # exit code: the time given is up, the same command goes on


def campaign(
    plan: Annotated[str, typer.Argument(metavar="PLAN", help="A shipped plan (cuda, smoke) or a plan file (TOML).")],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="FOLDER", help="What to bring home; goes on where it stopped.")
    ] = Path("campaign"),
    models: Annotated[
        Path | None,
        typer.Option("--models", metavar="FOLDER", help="Where the big models go [default: the cache folder]."),
    ] = None,
    minutes: Annotated[
        float,
        typer.Option("--minutes", help="Begin no stage after this; exit code 3: run it again. 0: no end."),
    ] = 0.0,
    gpu_layers: options.GpuLayers = -1,
    threads: options.Threads = 0,
    force: Annotated[
        bool, typer.Option("--force", help="Start again: delete what the folder's earlier campaign left.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Build models of production-like sizes here, calibrate, record, tune and verify them; leaves one small folder."""
    import time

    from tracekit.campaign import Campaign, Pause
    from tracekit.engine import Settings
    from tracekit.errors import TracekitError
    from tracekit.folders import cache_folder
    from tracekit.plans import read_plan
    from tracekit.study import Failed

    wanted, text = read_plan(plan)
    if not minutes >= 0:
        raise TracekitError(f"--minutes {minutes:g}: 0 or more")
    Settings(threads=threads, gpu_layers=gpu_layers)  # what cannot work is refused before anything is written
    options.warn_of_gpu_layers(gpu_layers)
    place = models or cache_folder("models")
    under_way = Campaign(wanted, output, place, out.teller(), gpu_layers, threads, minutes, time.monotonic())
    try:
        under_way.open(text, force)
    except OSError as error:
        raise TracekitError(f"{error.filename}: {error.strerror}; choose other folders with -o and --models") from None
    out.say(wanted.about)
    findings, paused, failed = [], False, None
    try:
        for finding in under_way.run():
            findings.append(finding)
            _tabulate(findings, output)  # now, as a campaign may be killed
            if not json:
                out.print_finding(finding, finding.name)
    except Pause:
        paused = True
    except Failed as error:
        failed = error
    if findings:
        _draw(findings, output)
    if json:
        out.print_json([out.finding_json(finding) for finding in findings])
    for path in under_way.files:
        out.wrote(path)
    if paused:
        out.say(f"{minutes:g} minutes are over; the same command goes on with the next stage")
        raise typer.Exit(AGAIN)
    if failed:
        raise failed


def _tabulate(findings: list[Finding], folder: Path) -> None:
    """Write the tables of all ``findings`` into ``folder``."""
    from tracekit import beside

    with beside.written(folder / "tables.txt") as file:
        for finding in findings:
            out.print_finding(finding, finding.name, file)


def _draw(findings: list[Finding], folder: Path) -> None:
    """Draw all ``findings`` in one picture into ``folder``."""
    from importlib.util import find_spec

    import polars as pl

    from tracekit.report import pictures

    if find_spec("vl_convert") is None:  # 22 MB that need not be carried to a machine without a network
        out.say("no picture of the verdicts: vl-convert-python is not installed")
        return
    frame = pl.concat([f.verdict.arms.select(pl.lit(f.name).alias("head"), pl.all()) for f in findings])
    pictures.save(pictures.verdict_chart(frame), folder / "verdict.png")
