"""``tracekit merge``: several recordings as one trace."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import options, out
from tracekit.words import counted


def merge(
    traces: Annotated[list[Path], typer.Argument(metavar="TRACE", help="Trace files of one model and machine.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The trace to write (DuckDB).")],
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Put several recordings, of several processes or days, into one trace to replay and tune on."""
    from tracekit.trace.merge import merge as put_together

    merged = put_together(traces, output, force)
    counts = merged.frame(
        """SELECT (SELECT count(*) FROM runs) AS runs, (SELECT count(*) FROM requests) AS requests,
                  (SELECT count(*) FROM verifications) AS verifications"""
    ).row(0, named=True)
    if json:
        out.print_json({"file": str(output), "bytes": output.stat().st_size} | counts)
    else:
        size = output.stat().st_size / 1e6
        print(f"{counted(counts['runs'], 'run')}, {counted(counts['requests'], 'request')}, {size:.1f} MB")
    out.wrote(output)
