"""What an engine is made of: the model, its contexts and its drafter, made in order and freed together."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from tracekit.engine import lib
from tracekit.engine.context import Context
from tracekit.engine.drafter import Drafter, MtpDrafter
from tracekit.engine.model import Model, check_drafter
from tracekit.engine.placement import Placement
from tracekit.engine.rollback import PartialRollback
from tracekit.engine.sampling import BackendSampling
from tracekit.engine.settings import Settings
from tracekit.engine.watch import Watch

log = logging.getLogger("tracekit.engine")


class Parts:
    """The model in the file ``model``, a context that serves it and, with ``mtp``, a drafter, whose model is the
    sidecar ``draft_model`` where there is one; ``owned`` frees them all.

    ``settings`` are those given, but say what the devices really sample. ``backend_sampling``: the target's, None where
    the processor samples. Raises :class:`TracekitError` where one of them cannot be made.
    """

    def __init__(
        self, model: str | Path, draft_model: str | Path | None, mtp: bool, settings: Settings, owned: ExitStack
    ):
        self.settings, self._owned = settings, owned
        self._contexts: list[Context] = []
        self.draft_model: Model | None = None
        self.drafter: Drafter | None = None
        with lib.listening() as heard:
            self.model = self._own(Model(model, settings.gpu_layers, mtp and draft_model is None))
            self.target = self._own(self._context(self.model, n_snapshots=settings.n_max if mtp else 0))
            self.rollback = PartialRollback(self.target, settings)
            if mtp:
                self.drafter = self._own(self._make_drafter(draft_model))
        self.placement = Placement.of(heard)
        if self.placement.on_gpu:
            self._own(Watch(self._contexts))
        self.backend_sampling = self._sample_on_device()

    def without_snapshots(self) -> tuple[Context, BackendSampling | None]:
        """Another context of the target, which spends no time on snapshots, and what samples on the device there."""
        context = self._own(self._context(self.model))
        return context, self.backend_sampling and BackendSampling(context, self.settings.n_slots)

    def _own(self, part: Any) -> Any:
        """``part``, to be closed with the engine, or when that is forgotten."""
        self._owned.callback(part.close)
        return part

    def _context(self, model: Model, target: Context | None = None, n_snapshots: int = 0) -> Context:
        s = self.settings
        n_sampled = s.n_max + 1 if s.backend_sampling and target is None else 1
        made = Context(model, s, target, n_sampled, n_snapshots)
        self._contexts.append(made)
        return made

    def _make_drafter(self, draft_model: str | Path | None) -> Drafter:
        source, s = self.model, self.settings
        if draft_model is not None:
            source = self.draft_model = self._own(Model(draft_model, s.gpu_layers, sidecar=True))
        check_drafter(source, self.model)
        wanted = s.spec_draft_backend_sampling
        return MtpDrafter(
            self._context(source, self.target),
            s.n_slots,
            self.model.facts.n_embd,
            keep=s.n_max + 1,
            backend_sampling=s.gpu_layers != 0 and lib.has_gpu() if wanted is None else wanted,
        )

    def _sample_on_device(self) -> BackendSampling | None:
        """The target's device sampler, where it is wanted and works; the settings then say what both really do."""
        n_slots = self.settings.n_slots
        found = BackendSampling(self.target, n_slots) if self.settings.backend_sampling else None
        if found is not None and not found.works:
            what = "the target's samplers" + (" for several slots" if n_slots > 1 else "")
            log.warning("the device does not run %s; its logits are copied, the processor samples", what)
            found = None
        drafts = getattr(self.drafter, "backend_sampling", False)
        self.settings = replace(self.settings, backend_sampling=found is not None, spec_draft_backend_sampling=drafts)
        return found
