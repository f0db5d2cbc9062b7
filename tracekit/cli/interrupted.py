"""What is left of a recording that somebody ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tracekit.cli import out


@contextmanager
def told(trace: Path) -> Iterator[None]:
    """While ``trace`` is recorded inside: after Ctrl-C, or where asked to end, say that it holds what there was until
    then, if anything.
    """
    from tracekit.errors import interrupted

    before = _version(trace)
    try:
        yield
    except BaseException as error:
        asked = isinstance(error, (KeyboardInterrupt, SystemExit)) or interrupted(error)
        if asked and _version(trace) not in (None, before):  # a trace to be replaced is back where nothing was recorded
            out.say(f"what was recorded until then is in {trace}; `tracekit stats {trace}` shows it")
        raise


def _version(path: Path) -> tuple[int, int] | None:
    if not path.is_file():
        return None
    about = path.stat()
    return about.st_ino, about.st_mtime_ns
