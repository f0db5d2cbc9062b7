"""Where tracekit keeps what it can always make again."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder(purpose: str) -> Path:
    """The folder for ``purpose`` (``kernels``: compiled policies; ``models``: expanded ones): in ``TRACEKIT_CACHE``, or
    in the user's cache folder. It may not exist yet.
    """
    if ours := os.environ.get("TRACEKIT_CACHE"):
        return Path(ours) / purpose
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tracekit" / purpose
