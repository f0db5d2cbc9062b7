"""Choosing the next token from the target's logits: llama.cpp's own sampler chain, per slot, seeded."""

from __future__ import annotations

from dataclasses import dataclass

from tracekit.engine.context import Context
from tracekit.engine.lib import llama
from tracekit.errors import TracekitError


@dataclass(frozen=True)
class Sampling:
    """How a request samples, in llama.cpp's names and defaults; ``temp`` 0 is greedy."""

    temp: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0

    def __post_init__(self):
        for name, low, high in (
            ("temp", 0, 100),
            ("top_k", 0, 1 << 30),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
            ("seed", 0, (1 << 32) - 1),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise TracekitError(f"{name} {value}: between {low} and {high}")


class Sampler:
    """A sampler chain. Draws one random number per emitted token, so a seed gives one text, with or without drafts."""

    def __init__(self, s: Sampling):
        self._chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        add = llama.llama_sampler_chain_add
        if s.temp == 0:
            add(self._chain, llama.llama_sampler_init_greedy())
            return
        add(self._chain, llama.llama_sampler_init_top_k(s.top_k))
        add(self._chain, llama.llama_sampler_init_top_p(s.top_p, 1))
        add(self._chain, llama.llama_sampler_init_min_p(s.min_p, 1))
        add(self._chain, llama.llama_sampler_init_temp(s.temp))
        add(self._chain, llama.llama_sampler_init_dist(s.seed))

    def sample(self, context: Context, row: int) -> int:
        """The token for batch row ``row`` of the last decode; the chain takes note of it."""
        return llama.llama_sampler_sample(self._chain, context.handle, row)

    def close(self) -> None:
        """Free the chain."""
        if self._chain:
            llama.llama_sampler_free(self._chain)
            self._chain = None
