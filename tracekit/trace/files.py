"""A trace's files on disk: who holds them, and how they are deleted."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb

from tracekit.errors import TracekitError
from tracekit.trace.journal import files_of

# of a new file: a block is the least that a column of a table takes, and in smaller ones DuckDB packs no numbers
SMALL = {"default_block_size": "65536"}
_ALONE = {"autoload_known_extensions": "false", "autoinstall_known_extensions": "false"}  # no other kinds of database
_OTHER = "not a trace; --force replaces traces only, choose another name"


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
        return f"held by {who}; wait until it has finished, or stop it (nothing recorded is lost)"
    if "different configuration" in message:
        return "being written by this process; close its engine first"
    return ""


def head_of(file: Path) -> bytes:
    """The first twelve bytes of ``file``, the last four of them DUCK in a DuckDB file. Not for one that this process
    may have open: closing it lets go of the lock on it (POSIX), and another would take the recording for cut off.
    """
    with file.open("rb") as opened:
        return opened.read(12)


def check_replaceable(trace: Path) -> None:
    """Raise :class:`TracekitError` where ``trace`` is being recorded, or is another kind of file (a database without
    tables, or one that cannot be read, may have been a trace), a folder, a device or a pipe; or one of these has the
    name of what lies beside it.
    """
    if trace.is_dir():
        raise TracekitError(f"{trace}: a folder; choose another name")
    for file in files_of(trace):
        if file.exists() and not file.is_file():
            raise TracekitError(f"{file}: {_OTHER}")
    if trace.is_file():
        try:
            with duckdb.connect(str(trace.resolve()), read_only=True, config=_ALONE) as con:
                tables = con.execute("SELECT table_name FROM information_schema.tables").fetchall()
                ours = ("runs",) in tables or not tables
        except duckdb.Error as error:
            if held := held_by(error):
                raise TracekitError(f"{trace}: {held}") from None
            ours = (head := head_of(trace))[8:] == b"DUCK" or not head
        if not ours:
            raise TracekitError(f"{trace}: {_OTHER}")


def delete(trace: Path) -> None:
    """Delete ``trace`` and what its recording has left beside it, unasked. Raises ``OSError``."""
    for file in files_of(trace):
        file.unlink(missing_ok=True)


def move(trace: Path, to: Path) -> None:
    """Rename ``trace`` and what its recording has left beside it. Raises ``OSError``."""
    for old, new in zip(files_of(trace), files_of(to), strict=True):
        if old.exists():
            old.rename(new)


def free_path(wanted: str | Path) -> Path:
    """``wanted``, or the first of ``wanted-2``, ``wanted-3`` ... that does not exist."""
    path, n = Path(wanted), 1
    while any(file.exists() for file in files_of(path)):
        n += 1
        path = Path(wanted).with_stem(f"{Path(wanted).stem}-{n}")
    return path


def replaced_of(trace: Path) -> Path:
    """Where a recording that takes the place of ``trace`` keeps what was there, until it holds something itself."""
    return trace.with_stem(f"{trace.stem}-replaced")


class Replaced:
    """What was at ``trace`` (nothing, maybe), as ``NAME-replaced`` beside it until the recording that takes its place
    holds something. Raises as :func:`check_replaceable` does, and ``OSError``.
    """

    def __init__(self, trace: Path):
        self._trace = trace
        check_replaceable(trace)
        self._kept = free_path(replaced_of(trace))
        move(trace, self._kept)

    def put_back(self) -> None:
        """Undo it: the place must be free."""
        move(self._kept, self._trace)

    def remove(self) -> None:
        """Delete it."""
        delete(self._kept)
