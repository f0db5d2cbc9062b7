"""Numbers as one says them."""

from __future__ import annotations


def counted(n: int, what: str) -> str:
    """``1 request``, ``2 requests``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
