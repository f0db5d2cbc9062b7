"""Files that are there whole or not at all, and that replace nothing unasked."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TextIO

from tracekit.errors import TracekitError

try:
    import fcntl
except ImportError:  # not on Windows, where nobody can delete what another has open
    fcntl = None


def check_new(path: Path, force: bool, others: Iterable[Path | None] = ()) -> None:
    """Raise :class:`TracekitError` where there is no place for a file ``path``, where it would replace one without
    ``force``, or ever one of ``others``, which the same command reads or writes.
    """
    if not path.absolute().parent.is_dir():
        raise TracekitError(f"{path}: {path.parent} is no folder; make it first")
    if path.exists() and not path.is_file():
        raise TracekitError(f"{path}: exists, and is no file; choose another name")
    if any(other is not None and path.resolve() == other.resolve() for other in others):
        raise TracekitError(f"{path}: this command has another use for that file; choose another name")
    if path.exists() and not force:
        raise TracekitError(f"{path}: exists; choose another name or give --force")


def partial_of(path: Path) -> Path:
    """A new name beside ``path``, for what takes its place once it is whole: nobody else who writes there has it."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def claimed(path: Path) -> Iterator[Path]:
    """A new file beside ``path`` for something large, this process's while the block runs, and gone after it. Those of
    writers that were killed, which are nobody's any more, go first. Raises ``OSError``.
    """
    for old in path.absolute().parent.iterdir():
        if old.name.startswith(f"{path.name}.") and old.suffix == ".partial":
            with suppress(OSError), old.open("rb") as file:
                _lock(file)
                old.unlink()
    partial = partial_of(path)
    try:
        with partial.open("wb") as file:
            _lock(file)
            yield partial
    finally:
        partial.unlink(missing_ok=True)


def _lock(file: IO) -> None:
    """Raise ``OSError`` where another open file has the lock. It goes with the process, however that ends."""
    if fcntl is not None:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def written(path: Path) -> Iterator[TextIO]:
    """A file beside ``path``, to write text to (UTF-8), that takes its place when the block ends and is gone when the
    block, or writing, raises. A link stays one: what it leads to is written.
    """
    path = Path(os.path.realpath(path))
    partial = partial_of(path)
    try:
        with partial.open("w", encoding="utf-8") as file:
            yield file
        os.replace(partial, path)
    finally:
        with suppress(OSError):
            partial.unlink()
