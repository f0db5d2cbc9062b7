"""Calibration: what decodes cost on a machine, and nothing else; random prompts, so that no workload is needed.

A block goes once through every context, in random order. There the prompts of 1, 4, ... slots are read, and with each
number of slots every draft length is verified some steps in a row (the first builds llama.cpp's graph again, the second
is captured by CUDA), in random order and behind a random number of rows caught up again; without drafts it is more
steps, until nothing of those before is left in the caches. Last, drafting is over and the same slots take plain
steps: the baseline without MTP, for which nothing needs to be read again. A recurrent target takes snapshots of its
state in these too, so its baseline is read and measured again where MTP is not loaded. What drifts from block to block,
drifts for all.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from tracekit.engine.drafter import Drafter
from tracekit.engine.engine import Engine
from tracekit.engine.probe import Probe
from tracekit.engine.sampling import Sampling
from tracekit.engine.slot import Request
from tracekit.errors import TracekitError
from tracekit.policy.interface import NEVER

Progress = Callable[[int, int], None]
CALM = 16  # further steps without drafts: as many as a processor's caches take to be the target's again


@dataclass(frozen=True)
class Plan:
    """What to measure: every number of ``slots`` at every one of ``contexts`` (tokens of prompt), drafts up to
    ``n_max``; ``steps`` in a row at each draft length, in each of ``blocks``. Raises :class:`TracekitError` for what
    cannot be measured.
    """

    slots: tuple[int, ...] = (1, 4, 16)
    contexts: tuple[int, ...] = (512, 2048, 8192)
    n_max: int = 16
    steps: int = 4
    blocks: int = 3

    def __post_init__(self):
        for name, least in (("slots", 1), ("contexts", 1), ("n_max", 1), ("steps", 2), ("blocks", 1)):
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,), default=0) < least:
                given = ",".join(map(str, value)) if isinstance(value, tuple) else value
                raise TracekitError(f"--{name.replace('_', '-')} {given}: {least} or more")
            if isinstance(value, tuple):
                object.__setattr__(self, name, tuple(sorted(set(value))))

    @property
    def n_cell(self) -> int:
        """Steps of one number of slots in one context and block, at every draft length."""
        return (self.n_max + 1) * self.steps + CALM

    @property
    def n_plain(self) -> int:
        """Plain steps after these: everything is held against them, and they are the cheapest. Never fewer than it
        takes to judge the last drafts.
        """
        return self.n_cell // 2

    def n_steps(self, context: int, n_batch: int) -> int:
        """Decodes that one context takes in one block, the reading of its prompts included."""
        return self.n_reading(context, n_batch) + len(self.slots) * (self.n_cell + self.n_plain)

    def n_bare(self, context: int, n_batch: int) -> int:
        """Decodes that its baseline takes where that is measured apart."""
        return self.n_reading(context, n_batch) + len(self.slots) * self.n_plain

    def n_reading(self, context: int, n_batch: int) -> int:
        """Decodes that read the prompts of all slots; those that generate take a row each of the next one's batch."""
        return sum(-(-context // (n_batch - active)) for active in range(self.slots[-1]))

    def n_ctx(self, n_batch: int) -> int:
        """Context that a slot needs: the longest prompt, a token for each step, and the drafts of the last."""
        return max(c + self.n_steps(c, n_batch) for c in self.contexts) + self.n_max + 2


class Sweep(Probe):
    """The probe of a calibration: ``n_max`` drafts in the next step, all verified, after ``again`` rows caught up
    again; the same for every slot, so that a step has one shape.
    """

    arm = "calibration"
    again = 0

    def rewind(self, seq: int, drafter: Drafter) -> None:
        """See :meth:`Probe.rewind`."""
        drafter.rewind(seq, self.again)

    def width(self, n_proposed: int) -> int:
        """See :meth:`Probe.width`."""
        return n_proposed


def calibrate(
    engine: Engine, sweep: Sweep, plan: Plan, sampling: Sampling | None = None, progress: Progress | None = None
) -> None:
    """Run ``plan`` on an engine that records, made with ``sweep`` as its probe. ``progress(done, total)`` counts
    decodes.
    """
    run = _Calibration(engine, sweep, plan, sampling or Sampling(), progress)
    if engine.snapshots:  # where memory does not suffice for its second context, now rather than later
        engine.set_arm(mtp=False)
        engine.set_arm(probing=True)
    for block in range(plan.blocks):
        run.read_prompts(block)
        for context in run.rng.sample(plan.contexts, len(plan.contexts)):
            run.measure(block, context)
            if engine.snapshots:
                run.measure_bare(block, context)


class _Calibration:
    """One run of a plan."""

    def __init__(self, engine: Engine, sweep: Sweep, plan: Plan, sampling: Sampling, progress: Progress | None):
        self.engine, self.sweep, self.plan = engine, sweep, plan
        self.rng = random.Random(sweep.seed)
        self._sampling, self._progress = sampling, progress
        n_batch = engine.settings.n_batch
        self._short = [n for i in range(5, 12) if (n := 1 << i) <= min(n_batch, engine.settings.n_ctx - 1)]
        self._n_done = 0
        self._n_all = plan.blocks * (len(self._short) + sum(plan.n_steps(c, n_batch) for c in plan.contexts))
        if engine.snapshots:
            self._n_all += plan.blocks * sum(plan.n_bare(c, n_batch) for c in plan.contexts)

    def read_prompts(self, block: int) -> None:
        """Prompts of one batch each: what catching up many rows at once costs."""
        for n_tokens in self._short:
            self._read(block, n_tokens, max_tokens=1)

    def measure(self, block: int, context: int) -> None:
        """One context: every number of slots with MTP, fewest first, then without, fewest last."""
        numbers: list[int] = []
        for n_slots in self.plan.slots:
            self._fill(numbers, n_slots, block, context)
            self._draft()
        for n_slots in reversed(self.plan.slots):
            self._cancel(numbers, n_slots)
            self._plain()
        self._cancel(numbers, 0)

    def measure_bare(self, block: int, context: int) -> None:
        """One context where MTP is not loaded: every number of slots, fewest first."""
        self.engine.set_arm(mtp=False)
        numbers: list[int] = []
        for n_slots in self.plan.slots:
            self._fill(numbers, n_slots, block, context)
            self._plain()
        self._cancel(numbers, 0)
        self.engine.set_arm(probing=True)

    def _fill(self, numbers: list[int], n_slots: int, block: int, context: int) -> None:
        while len(numbers) < n_slots:
            numbers.append(self._read(block, context, max_tokens=self.engine.settings.n_ctx))

    def _cancel(self, numbers: list[int], n_left: int) -> None:
        while len(numbers) > n_left:
            self.engine.cancel(numbers.pop())

    def _plain(self) -> None:
        for _ in range(self.plan.n_plain):
            self._step(NEVER)

    def _read(self, block: int, n_tokens: int, max_tokens: int) -> int:
        """Submit a random prompt and read it to its end; the request's number."""
        n_vocab = self.engine.model.facts.n_vocab
        request = Request(
            [self.rng.randrange(n_vocab) for _ in range(n_tokens)],
            max_tokens=max_tokens,
            sampling=self._sampling,
            ignore_eos=True,
            prompt_id=f"block {block}",
            category=f"context {n_tokens}",
        )
        number = self.engine.submit(request)
        while self.engine.reading:
            self._step(0)
        return number

    def _draft(self) -> None:
        """Every draft length, some steps in a row."""
        lengths = self.rng.sample(range(self.plan.n_max + 1), self.plan.n_max + 1)
        again: list[int] = []
        for length in lengths:
            for i in range(self.plan.steps + (0 if length else CALM)):
                if not again:
                    again = self.rng.sample(range(self.plan.n_max + 1), self.plan.n_max + 1)
                # a lone draft decode has the shape of the one before where rows repeat: both kinds are wanted
                self._step(length, 0 if i >= self.plan.steps else i // 2 % 2 if length == 1 else again.pop())

    def _step(self, n_drafts: int, again: int = 0) -> None:
        self.sweep.n_max, self.sweep.again = n_drafts, again
        self.engine.step()
        self._n_done += 1
        if self._progress:
            self._progress(self._n_done, self._n_all)
