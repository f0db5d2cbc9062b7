"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO


def partial_of(path: Path) -> Path:
    """A new name beside ``path``, for what takes its place once it is whole: nobody else who writes there has it."""
    return path.with_name(f"{path.name}.{secrets.token_hex(4)}.partial")


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
