"""Choosing the next token from the target's logits: llama.cpp's own sampler chain, per slot, seeded.

With backend sampling (llama.cpp's ``--backend-sampling``) the chain of an engine's only slot runs on the device, in the
target's own graph, and the logits stay there. A verification samples several rows at once; llama.cpp draws for all of
them and advances the seed's sequence by the tokens taken, so that rejected drafts use up no random numbers there
either. Greedy choices are the same arg-max. Sampled ones come from the same candidates, order and random numbers, their
sums in float32 instead of double: a draw must fall within rounding of the border between two tokens to choose another.
Nothing depends on the number of drafts.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from tracekit.engine.context import Context
from tracekit.engine.lib import llama
from tracekit.errors import TracekitError

TOP = 10  # llama.cpp's draft sampler is top-k 10, and the draft probability a soft-max over those ten

MOST = 100  # candidates that a device may draw from

log = logging.getLogger("tracekit.engine")


@dataclass(frozen=True)
class Sampling:
    """How a request samples, in llama.cpp's names and defaults; ``temp`` 0 is greedy."""

    temp: float = 0.0
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    seed: int = 0

    def __post_init__(self):
        for name, kind, high in (
            ("temp", float, 100),
            ("top_k", int, 1 << 30),
            ("top_p", float, 1),
            ("min_p", float, 1),
            ("seed", int, (1 << 32) - 2),  # the last one is llama.cpp's LLAMA_DEFAULT_SEED: another each time
        ):
            value = getattr(self, name)
            if not isinstance(value, (int, kind)) or not 0 <= value <= high:
                option = f"--{name.replace('_', '-')}"
                raise TracekitError(f"{option} {value}: a {'whole ' if kind is int else ''}number between 0 and {high}")


class Sampler:
    """Greedy, or a sampler chain that draws one random number per emitted token: a seed gives one text, with or without
    drafts.
    """

    def __init__(self, s: Sampling):
        self.sampling = s
        self._own = self._chain = _chain(_drawing(s)) if s.temp > 0 else None
        self._on_device = False

    def sample(self, context: Context, row: int) -> int:
        """The token for batch row ``row`` of the last decode; a chain takes note of it."""
        if self._chain is not None:
            return llama.llama_sampler_sample(self._chain, context.handle, row)
        return context.candidate(row) if self._on_device else context.best(row)

    def move_to(self, chain: object) -> None:
        """Leave sampling to ``chain``, which the device runs, with this one's random numbers."""
        self._on_device = True
        if self._own is not None:
            llama.llama_sampler_copy(self._own, chain)
            self._chain = chain

    def close(self) -> None:
        """Free the chain, but for one on the device."""
        if self._own:
            llama.llama_sampler_free(self._own)
            self._own = self._chain = None


class BackendSampling:
    """The target's chain on the device, for its only slot. It stays while requests sample alike, whatever their seeds:
    another one has llama.cpp plan its graphs anew.

    ``works`` is false, and there is no chain, where the device does not run every sampler of it, and for several slots:
    llama.cpp gives wrong tokens where a batch holds rows that the device samples beside rows that it does not.
    """

    def __init__(self, context: Context, n_slots: int):
        self._context = context
        self._on_device: tuple[Sampling, object] | None = None
        self.works = n_slots == 1 and self._attach(Sampling(temp=1.0)) and self._attach(Sampling())
        if not self.works:
            context.set_sampler(0, None)

    def place(self, sampler: Sampler) -> None:
        """Have the device sample for the request that the slot begins to serve.

        Left to the processor are requests whose seed would draw other tokens there (without ``top_p`` nothing sorts
        the candidates; sums of many, without ``top_k``, round too much in float32: one of 120 texts of 128 tokens
        differed), and chains that the device refuses.
        """
        s = replace(sampler.sampling, seed=0)
        if self._on_device is None or self._on_device[0] != s:
            if s.temp > 0 and (s.top_p == 1 or not 0 < s.top_k <= MOST):
                self._context.set_sampler(0, None)
                self._on_device = None
            elif not self._attach(s):
                log.warning("the device does not run %s; the processor samples", s)
        if self._on_device is not None:
            sampler.move_to(self._on_device[1])

    def _attach(self, s: Sampling) -> bool:
        # greedy: temperature 0 leaves one candidate, whose id is all that is copied; llama.cpp's greedy sampler would
        # have the logits copied too
        chain = _chain(_drawing(s) if s.temp > 0 else [llama.llama_sampler_init_temp(0)])
        taken = self._context.set_sampler(0, chain)
        self._on_device = (s, chain) if taken else None
        return taken


def _drawing(s: Sampling) -> list:
    return [
        llama.llama_sampler_init_top_k(s.top_k),
        llama.llama_sampler_init_top_p(s.top_p, 1),
        llama.llama_sampler_init_min_p(s.min_p, 1),
        llama.llama_sampler_init_temp(s.temp),
        llama.llama_sampler_init_dist(s.seed),
    ]


def _chain(samplers: list):
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    for sampler in samplers:
        llama.llama_sampler_chain_add(chain, sampler)
    return chain


def draft_chain(n_vocab: int):
    """The chain that llama.cpp's ``draft-mtp`` runs on the device: the :data:`TOP` most likely tokens."""
    return _chain([llama.llama_sampler_init_top_k(min(TOP, n_vocab))])
