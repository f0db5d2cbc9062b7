"""A trace's files on disk: who holds them, and how they are deleted."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb

from tracekit.errors import TracekitError
from tracekit.trace.journal import files_of


def first_line(error: BaseException) -> str:
    """What ``error`` says, in one line."""
    return str(error).partition("\n")[0] or type(error).__name__


def held_by(error: duckdb.Error) -> str:
    """What holds the file that DuckDB has refused to open, and what to do; empty where it was refused for another
    reason.
    """
    message = str(error)
    if "Could not set lock on file" in message:
        owner = re.search(r"PID (\d+)", message)
        who = f"process {owner[1]}" if owner else "another process"
        return f"being written by {who}; wait until it has finished, or stop it (nothing recorded is lost)"
    if "different configuration" in message:
        return "being written by this process; close its engine first"
    return ""


def remove(trace: Path) -> None:
    """Delete ``trace`` and what its recording has left beside it, where there is anything.

    Raises :class:`TracekitError` for one that is being recorded or for another kind of file, ``OSError`` where it
    cannot be deleted.
    """
    if trace.is_file():
        with trace.open("rb") as file:
            if (head := file.read(12)) and head[8:] != b"DUCK":
                raise TracekitError(f"{trace}: not a trace; --force replaces traces only, choose another name")
        try:
            duckdb.connect(str(trace), read_only=True).close()
        except duckdb.Error as error:
            if held := held_by(error):
                raise TracekitError(f"{trace}: {held}") from None
    for file in files_of(trace):
        file.unlink(missing_ok=True)
