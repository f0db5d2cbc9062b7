"""Requests that end too early, or go on too long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tracekit.cli import out
from tracekit.words import counted

if TYPE_CHECKING:
    from tracekit.engine import Completion


def warn_of_training(done: Sequence[Completion], n_ctx_train: int) -> None:
    """Say how many requests went beyond the context that the model was trained on (0: not told)."""
    n = sum(len(c.tokens) + c.n_prompt > n_ctx_train for c in done)
    if n and n_ctx_train:
        out.say(
            f"warning: {n} of {counted(len(done), 'request')} went beyond the {n_ctx_train} tokens that the model was "
            "trained on, where its text and what is accepted may be worse"
        )
