"""Numbers as one says them."""

from __future__ import annotations


def counted(n: int, what: str) -> str:
    """``1 request``, ``2 requests``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def counted_requests(n_requests: int, n_prompts: int) -> str:
    """``40 requests``, or where prompts are repeated ``40 requests (20 prompts)``."""
    return counted(n_requests, "request") + (f" ({counted(n_prompts, 'prompt')})" if n_prompts < n_requests else "")
