"""The live engine: a model, its drafter, and the requests it serves.

The work of a step is in :mod:`tracekit.engine.loop`; this is what users hold.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from time import perf_counter_ns

from tracekit.engine import lib
from tracekit.engine.context import Context
from tracekit.engine.drafter import Drafter, MtpDrafter
from tracekit.engine.loop import Loop
from tracekit.engine.model import Model
from tracekit.engine.placement import Placement
from tracekit.engine.probe import Probe
from tracekit.engine.provenance import run_facts
from tracekit.engine.recorder import Recorder, record_beside
from tracekit.engine.rollback import PartialRollback
from tracekit.engine.sampling import BackendSampling
from tracekit.engine.settings import CACHE_TYPES, FLASH_ATTN, Settings
from tracekit.engine.slot import Completion, Request, Slot
from tracekit.errors import TracekitError
from tracekit.policy.rule import Policy, rule
from tracekit.policy.spec import parse_one

log = logging.getLogger("tracekit.engine")


class Engine:
    """A model being served. Use as a context manager, or :meth:`close` it.

    ``policy`` (a policy, a tuned one, or its text) decides for requests that bring none; the default is ``off``.
    ``draft_model`` is a sidecar GGUF for models whose NextN block has a file of its own. With ``mtp`` false no NextN
    block is loaded and nothing is ever drafted. ``trace`` records into that new DuckDB file (so does the environment
    variable ``TRACEKIT_TRACE``); ``probe`` turns every request into a measurement. ``placement`` says where layers and
    buffers came to lie. Raises :class:`TracekitError` for a model without NextN layers where ``mtp`` is wanted.
    """

    def __init__(
        self,
        model: str | Path,
        policy: Policy | str | None = None,
        settings: Settings | None = None,
        draft_model: str | Path | None = None,
        mtp: bool = True,
        trace: str | Path | None = None,
        probe: Probe | None = None,
        force: bool = False,
    ):
        self.policy = (
            parse_one(policy) if isinstance(policy, str) else getattr(policy, "policy", policy) or rule("off")()
        )
        self.settings = settings or Settings()
        self.model: Model | None = None
        self.draft_model: Model | None = None
        self.recorder: Recorder | None = None
        self._target: Context | None = None
        self._drafter: Drafter | None = None
        self._probe = probe
        self._n_requests = 0
        try:
            with lib.listening() as heard:
                self.model = Model(model, self.settings.gpu_layers, mtp and draft_model is None)
                self._target = self._context(self.model)
                if mtp:
                    self._drafter = self._make_drafter(draft_model)
            self.placement = Placement.of(heard)
            self._check(self.policy)
            backend_sampling = self._backend_sampling()
            self._loop = Loop(self.model, self._target, self._drafter, PartialRollback(self._target), self.settings)
            self._loop.probe = probe
            self._loop.backend_sampling = backend_sampling
            if path := trace or os.environ.get("TRACEKIT_TRACE"):
                facts = run_facts(self.model, self.draft_model, self.settings, self.policy, probe, self.placement)
                self.recorder = Recorder(path, facts, force=force) if trace else record_beside(path, facts)
                self._loop.observer = self.recorder
        except BaseException:
            self.close()
            raise

    def _context(self, model: Model, target: Context | None = None) -> Context:
        s = self.settings
        kinds = CACHE_TYPES[s.cache_type_k], CACHE_TYPES[s.cache_type_v], FLASH_ATTN[s.flash_attn], s.kv_unified
        n_sampled = s.n_max + 1 if s.backend_sampling and target is None else 1
        return Context(model, s.n_slots, s.n_ctx, s.n_batch, s.n_ubatch, s.threads, *kinds, target, n_sampled)

    def _backend_sampling(self) -> BackendSampling | None:
        """The target's, where it is wanted and works; afterwards :attr:`settings` say what both really are."""
        found = BackendSampling(self._target, self.settings.n_slots) if self.settings.backend_sampling else None
        if found is not None and not found.works:
            log.warning("the device does not run the target's samplers; its logits are copied, the processor samples")
            found = None
        drafts = getattr(self._drafter, "backend_sampling", False)
        self.settings = replace(self.settings, backend_sampling=found is not None, spec_draft_backend_sampling=drafts)
        return found

    def _make_drafter(self, draft_model: str | Path | None) -> Drafter:
        source = self.model
        if draft_model is not None:
            source = self.draft_model = Model(draft_model, self.settings.gpu_layers)
            if (source.facts.n_embd, source.facts.n_vocab) != (self.model.facts.n_embd, self.model.facts.n_vocab):
                raise TracekitError(
                    f"{draft_model}: its width or vocabulary is not that of {self.model.path}; a sidecar "
                    "belongs to one model"
                )
        nextn = source.facts.n_layer_nextn
        if nextn == 0:
            raise TracekitError(
                f"{source.path}: no MTP (NextN) layers in this GGUF (architecture {source.facts.arch}); use "
                "one converted with them, or --no-mtp"
            )
        if nextn > 1:
            raise TracekitError(
                f"{source.path}: {nextn} chained NextN layers; the engine drafts with models that have one"
            )
        wanted = self.settings.spec_draft_backend_sampling
        return MtpDrafter(
            self._context(source, self._target),
            self.settings.n_slots,
            self.model.facts.n_embd,
            keep=self.settings.n_max + 1,
            backend_sampling=self.settings.gpu_layers != 0 and lib.has_gpu() if wanted is None else wanted,
        )

    def _check(self, policy: Policy) -> None:
        wanted = getattr(policy.params, "n_max", 0)
        if wanted > self.settings.n_max:
            raise TracekitError(
                f"policy {policy}: n_max {wanted} is more than the engine's {self.settings.n_max}; raise the "
                "engine's (--n-max)"
            )
        if self._drafter is None and policy.name != "off":
            raise TracekitError(f"policy {policy} drafts, but the engine was started without MTP")

    @property
    def mtp(self) -> bool:
        """Whether drafting is possible now."""
        return self._loop.mtp

    def set_arm(
        self, mtp: bool = True, probing: bool = False, recording: bool = True, shared: dict | None = None
    ) -> None:
        """Between requests, switch MTP off (the baseline: hidden states are not even extracted) or on, probing with it,
        and recording.

        ``probing`` is for engines made with a probe, ``recording`` for those with a trace; elsewhere they change
        nothing. ``shared``: where states of policies with ``scope=engine`` are kept from now on; None: where they were.
        Raises :class:`TracekitError` with requests under way.
        """
        if not self.idle:
            raise TracekitError("MTP and probing can be switched only with no request under way")
        if mtp and self._drafter is None:
            raise TracekitError("the engine was started without MTP")
        self._loop.mtp = mtp
        self._loop.probe = self._probe if probing and mtp else None
        self._loop.observer = self.recorder if recording else None
        self._loop.shared = self._loop.shared if shared is None else shared

    @property
    def idle(self) -> bool:
        """No request is running or waiting."""
        return not self._loop.queue and all(s is None for s in self._loop.slots)

    @property
    def reading(self) -> bool:
        """A prompt is waiting or still being read."""
        return bool(self._loop.queue) or any(s is not None and not s.generating for s in self._loop.slots)

    def prepare(self, request: Request) -> list[int]:
        """The prompt's tokens. Raises :class:`TracekitError` for a request that cannot be served."""
        tokens = self.model.tokenize(request.prompt) if isinstance(request.prompt, str) else list(request.prompt)
        name = f"prompt {request.prompt_id}: " if request.prompt_id else ""
        if not tokens or request.prompt == "":
            raise TracekitError(f"{name}the prompt is empty")
        if request.max_tokens < 1:
            raise TracekitError(f"{name}max_tokens {request.max_tokens}: 1 or more")
        bad = next((t for t in tokens if not 0 <= t < self.model.facts.n_vocab), None)
        if bad is not None:
            raise TracekitError(f"{name}token {bad} is not in the vocabulary of {self.model.facts.n_vocab}")
        if len(tokens) >= self._target.n_ctx:
            raise TracekitError(
                f"{name}{len(tokens)} tokens do not fit into a context of {self._target.n_ctx}; "
                "raise --ctx-size or shorten it"
            )
        self._check(request.policy or self.policy)
        return tokens

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number. Raises as :meth:`prepare` does."""
        tokens = self.prepare(request)
        slot = Slot(self._n_requests, request, request.policy or self.policy, tokens, self._target.n_ctx)
        self._n_requests += 1
        self._loop.queue.append(slot)
        return slot.number

    def step(self) -> list[Completion]:
        """One target decode for every slot; returns the requests it finished."""
        return self._loop.step()

    def cancel(self, number: int) -> Completion | None:
        """Stop request ``number``; what it has generated so far, or None where it never started."""
        for slot in self._loop.queue:
            if slot.number == number:
                self._loop.queue.remove(slot)
                slot.sampler.close()
                return None
        for slot in self._loop.slots:
            if slot is not None and slot.number == number:
                slot.stop = "cancelled"
                return self._loop.finish(slot, perf_counter_ns())
        return None

    def generate(self, prompt: str | list[int], **options) -> Completion:
        """Generate for one prompt; ``options`` are :class:`Request`'s. Requests under way go on beside it."""
        number = self.submit(Request(prompt, **options))
        while True:
            for done in self.step():
                if done.number == number:
                    return done

    def run(self, requests: list[Request]) -> Iterator[Completion]:
        """Serve ``requests`` over all slots, yielding each when it is finished."""
        for request in requests:
            self.submit(request)
        while not self.idle:
            yield from self.step()

    def stream(self, prompt: str | list[int], **options) -> Iterator[str | Completion]:
        """Generate for one prompt, yielding its text as it comes and, last, the completion."""
        number = self.submit(Request(prompt, **options))
        longest = max((len(s) for s in options.get("stop", ())), default=1) - 1
        sent = 0
        while True:
            done = next((d for d in self.step() if d.number == number), None)
            if done:
                yield done.text[sent:]
                yield done
                return
            for slot in self._loop.slots:
                if slot is not None and slot.number == number:
                    ready = len(text := self._loop.text(slot).rstrip("\ufffd")) - longest
                    if ready > sent:
                        yield text[sent:ready]
                        sent = ready

    def close(self, cut_off: bool = False) -> None:
        """Finish the trace, as one that was ``cut_off`` before its end if so; free contexts and models."""
        try:
            if self.recorder is not None:
                probe = self._probe
                self.recorder.close(*((probe.n_checked, probe.n_diverged) if probe else ()), cut_off=cut_off)
        finally:
            for part in (self._drafter, self._target, self.draft_model, self.model):
                if part is not None:
                    part.close()
            self.recorder = self._drafter = self._target = self.draft_model = self.model = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cut_off=kind is not None)
