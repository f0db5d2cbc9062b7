"""Printing: tables and JSON to standard output, progress and messages to standard error."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import TextIO

    from rich.table import Table

    from tracekit.study import Finding, Teller


def print_table(table: Table, file: TextIO | None = None) -> None:
    """Print a table, to standard output or ``file``, as wide as it needs to be: a number that is cut is another."""
    from rich.console import Console

    plain = {"file": file, "markup": False, "emoji": False, "highlight": False}
    needed = Console(width=1_000_000, **plain).measure(table).maximum
    Console(width=max(needed, 1), **plain).print(table)


def print_finding(finding: Finding, title: str, file: TextIO | None = None) -> None:
    """Print what a study came to: the arms, the categories, the verdict and the advice."""
    from tracekit.report import tables

    print_table(tables.verdict_table(finding.verdict, title=title), file)
    print_table(tables.categories_table(finding.verdict), file)
    print(finding.verdict.sentence, file=file)
    print(finding.tuned.evidence.advice, file=file)
    print(file=file)


def finding_json(finding: Finding) -> dict[str, Any]:
    """What a study came to, as plain values."""
    tuned = {"policy": finding.tuned.policy.label} | finding.tuned.evidence.model_dump(mode="json")
    return {"name": finding.name, "tuned": tuned, "verdict": finding.verdict.as_json()}


def print_json(content: Any) -> None:
    """Print JSON on standard output; Polars and NumPy values as plain ones."""
    sys.stdout.write(json.dumps(_finite(content), indent=2, default=_plain, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """``value`` without what JSON cannot say: null for numbers that are none."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):  # also DuckDB's sums of integers
        return int(value) if value == int(value) else float(value)
    if isinstance(value, bytes):
        return value.hex()
    return value.item() if hasattr(value, "item") else str(value)


def say(message: str) -> None:
    """A line for the person watching, on standard error."""
    print(message, file=sys.stderr, flush=True)


def wrote(path: Path) -> None:
    """The last line of a verb that wrote a file."""
    print(f"Wrote {path}", file=sys.stderr, flush=True)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with the time left, on a terminal; elsewhere a line every ten seconds. Yields ``update(done,
    total)``.
    """
    import time

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    started = said = time.monotonic()

    def update(done: int, total: int) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= 10 and 0 < done < total:
            said = now
            say(f"{what}: {done}/{total}, {(now - started) / done * (total - done):.0f} s left")

    yield update


def teller() -> Teller:
    """How long work keeps a person informed."""
    from tracekit.study import Teller

    return Teller(say, progress)


def show_log() -> None:
    """Show the engine's messages (a tripped policy, a recording that stopped) on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("tracekit.engine")
    logger.handlers = [handler]
    logger.setLevel(logging.INFO)
    logger.propagate = False
