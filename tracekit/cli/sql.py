"""``tracekit sql``: a query on a trace."""

from __future__ import annotations

from typing import Annotated

import typer

from tracekit.cli import options, out


def sql(
    trace: options.TraceArgument,
    query: Annotated[
        str | None, typer.Argument(metavar="QUERY", help="SQL; without it, the schema is printed.")
    ] = None,
    json: options.Json = False,
) -> None:
    """Query a trace (read only), or print its schema with a comment on every column."""
    from tracekit.errors import TracekitError
    from tracekit.report.query import query as ask
    from tracekit.report.tables import frame_table
    from tracekit.trace import schema
    from tracekit.trace.store import open_trace

    source = open_trace(trace)
    if query is None:
        if json:
            raise TracekitError("--json needs a query")
        print((schema.TABLES + schema.VIEWS).strip())
        return
    frame = ask(source, query)
    if json:
        out.print_json(frame.to_dicts())
    else:
        out.print_table(frame_table(frame))
