"""One step of the engine: decide, draft, verify, accept, learn.

One call of :meth:`Loop.step` is one ``llama_decode`` of the target for every slot at once. A policy decides each slot's
drafts, the drafter makes them, the target verifies them beside any prompt still being read, and each slot's sampler
walks its rows, accepting drafts while they are what it chose itself. The text is therefore the same under every policy.

A decode leaves nothing of Python in the processor's caches, so that what is called after it is slow; hence loops where
comprehensions, calls of their own in Python 3.11, would be shorter.
"""

from __future__ import annotations

import logging
from collections import deque
from time import perf_counter_ns
from typing import Protocol

from tracekit.engine.context import Batch, Context
from tracekit.engine.drafter import NOT_ASKED, Ask, Drafter, DraftTimes
from tracekit.engine.probe import Probe
from tracekit.engine.rollback import Rollback
from tracekit.engine.sampling import BackendSampling
from tracekit.engine.settings import Settings
from tracekit.engine.slot import Completion, Slot
from tracekit.errors import TracekitError
from tracekit.policy.interface import NEVER, Now, Outcome
from tracekit.policy.rule import Policy
from tracekit.trace.rows import RequestEnd, RequestRow, Verification, plain

log = logging.getLogger("tracekit.engine")

_NO_ROOM = Ask(0, [], 0, 0.0, stop="room")
_PLAIN = Outcome(0, 0, 0, 1)
_NO_TIMES = DraftTimes()


class Observer(Protocol):
    """Whoever wants to know what the engine did: the recorder. ``run`` is the number to put into the rows."""

    run: int

    def began(self, request: RequestRow) -> None:
        """A request was given a slot."""

    def stepped(self, moments: tuple[int, ...]) -> None:
        """A step is done: the fields of :class:`~tracekit.trace.rows.Moments`."""

    def verified(self, row: tuple) -> None:
        """A slot's share of a step is known, for a probe some steps later: the fields of
        :class:`~tracekit.trace.rows.Verification` from ``request`` on. Making a row object of them would take as long
        as all the rest of recording.
        """

    def plain(self, row: tuple[int, int, int, int]) -> None:
        """The same, of a slot that wanted no drafts: the arguments of :func:`~tracekit.trace.rows.plain` likewise."""

    def ended(self, request: RequestEnd) -> None:
        """A request is finished."""


class Loop:
    """The slots, and the step that moves them all. ``drafter`` None: nothing is ever drafted."""

    def __init__(self, target: Context, drafter: Drafter | None, rollback: Rollback, settings: Settings):
        self.target, self.drafter, self.rollback, self.settings = target, drafter, rollback, settings
        self.mtp = drafter is not None
        self._extracting: bool | None = False  # None: not known
        self.observer: Observer | None = None
        self.probe: Probe | None = None
        self.backend_sampling: BackendSampling | None = None
        self.queue: deque[Slot] = deque()
        self.slots: list[Slot | None] = [None] * settings.n_slots
        self.active: list[Slot] = []  # those with a request
        self._batch = Batch(settings.n_batch)
        self.shared: dict[Policy, object] = {}  # states of policies whose scope is the engine
        self._record_ns = self._ahead_rows = self._ahead_us = 0
        self._n_step = -1  # the number of the step under way

    @property
    def idle(self) -> bool:
        """No request is running or waiting."""
        return not self.queue and not self.active

    def step(self) -> list[Completion]:
        """One target decode for all slots; returns the requests it finished. Does nothing without requests. After an
        exception in it :meth:`abort`: what is half done cannot be continued.
        """
        began = perf_counter_ns()
        self._ahead_rows = self._ahead_us = 0
        if self.queue:
            self._admit()
        slots = self.active
        if not slots:
            return []
        self._n_step += 1
        generating = [s for s in slots if s.generating]
        asks = []
        for slot in generating:
            if not slot.over and (ask := self._decide(slot, len(generating))) is not None:
                asks.append(ask)
        self._extract(slots)
        decided = perf_counter_ns()
        if asks:
            self.drafter.draft(asks, probs=self.probe is not None)
        n_past, n_prompt = self._fill(generating, slots)
        filled = perf_counter_ns()
        self.target.decode(self._batch)
        decoded = perf_counter_ns()
        for slot in generating:
            self._verify(slot)
        started = self._read_prompts(slots) if n_prompt else []
        sampled = perf_counter_ns()
        if self.probe is None:
            for slot in generating:
                if not slot.over:
                    self._learn(slot)
        learned = perf_counter_ns()
        for slot in started:
            slot.first_token_ns = learned
        if self.observer is not None:
            times = self.drafter.times if asks else _NO_TIMES
            moments = (
                began, decided, filled, decoded, sampled, learned, self._n_step, self._extracting, len(generating),
                self._batch.n, n_prompt, n_past, times.n_decodes, len(asks), times.n_rows, times.first_us,
                times.total_us, self._ahead_rows, self._ahead_us, times.catchup_us, self._record_ns,
            )  # fmt: skip  # what happened when, then how much
            self.observer.stepped(moments)
            self._observe(generating, started)
            self._record_ns += perf_counter_ns() - learned
        done = []
        for slot in slots:
            if slot.stop:
                done.append(self.finish(slot, learned))
        return done

    def serve_from(self, target: Context, sampling: BackendSampling | None) -> None:
        """Between requests, go on with another context of the target, and what samples on the device there."""
        self.target, self.backend_sampling, self._extracting = target, sampling, None

    def abort(self) -> None:
        """Drop every request, queued or under way, without a completion."""
        for slot in self.queue:
            slot.sampler.close()
        self.queue.clear()
        for i, slot in enumerate(self.slots):
            if slot is not None:
                slot.sampler.close()
            self._vacate(i)
        if self.probe is not None:
            self.probe.forget()
        self._extracting = None

    def _admit(self) -> None:
        for i, occupant in enumerate(self.slots):
            if occupant is not None or not self.queue:
                continue
            slot = self.slots[i] = self.queue.popleft()
            self.active = [s for s in self.slots if s is not None]
            slot.index = i
            slot.started_ns = perf_counter_ns()
            slot.state = self._state(slot.policy)
            if self.backend_sampling is not None:
                self.backend_sampling.place(slot.sampler)
            slot.over = not self.mtp
            if self.mtp:
                self._look_ahead(slot)
            if self.observer is not None:
                self.observer.began(self._request_row(slot))

    def _look_ahead(self, slot: Slot) -> None:
        """Ask the policy, a pure function, what it will want right after the prompt: with drafts the prompt is caught
        up chunk by chunk as it is read, and not in one go when other slots are generating."""
        asked = 1
        if not self.probe:
            asked, _ = slot.policy.decide(slot.state, Now(1, slot.n_prompt, slot.max_tokens - 1, 1))
        slot.drafts_first, slot.over = asked > 0, asked == NEVER

    def _extract(self, slots: list[Slot]) -> None:
        """Have the target's hidden states copied out while a slot may still want drafts, and only then."""
        wanted = False
        for slot in slots:
            if not slot.over:
                wanted = True
        if wanted != self._extracting:
            self._extracting = wanted
            self.target.extract_hidden(wanted)

    def _request_row(self, slot: Slot) -> RequestRow:
        request, sampling, probing = slot.request, slot.request.sampling, self.probe is not None
        return RequestRow(
            run=self.observer.run,
            request=slot.number,
            prompt_id=request.prompt_id,
            category=request.category,
            arm=(self.probe.arm if probing else request.arm) if self.mtp else "no_mtp",
            slot=slot.index,
            n_prompt=slot.n_prompt,
            max_tokens=slot.max_tokens,
            n_ctx=slot.n_ctx,
            temp=sampling.temp,
            seed=sampling.seed,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            policy=("" if probing else slot.policy.label) if self.mtp else "off",
        )

    def _state(self, policy: Policy) -> object:
        if policy.scope == "engine":
            return self.shared.setdefault(policy, policy.begin())
        return policy.begin()

    def _decide(self, slot: Slot, n_active: int) -> Ask | None:
        """Ask the slot's policy; an :class:`Ask` where it wants drafts and there is room for them."""
        asked, p_min, policy = 0, 0.0, slot.policy
        if self.probe:
            asked = self.probe.n_max
        else:
            if slot.shares:
                slot.state = self.shared[policy]
            generated = len(slot.tokens) - slot.n_prompt
            slot.now = Now(generated, slot.n_past, slot.max_tokens - generated, n_active)
            asked, p_min = policy.decide(slot.state, slot.now)
            if asked > self.settings.n_max:
                raise TracekitError(
                    f"policy {policy} asked for {asked} drafts; the engine allows {self.settings.n_max} (--n-max)"
                )
        if asked == NEVER:
            slot.over, asked = True, 0
            self.drafter.forget(slot.index)
        if asked == 0 and slot.n_asked > 0:
            slot.trips += 1
            self._log_trip(slot)
        slot.n_asked = asked
        if asked == 0:
            slot.ask = NOT_ASKED
            return None
        n = min(asked, slot.room)
        if n == 0:
            slot.ask = _NO_ROOM
            return None
        slot.ask = Ask(slot.index, slot.tokens, n, p_min, stop="n_max" if n == asked else "room")
        if self.probe:
            self.probe.rewind(slot.index, self.drafter)
        return slot.ask

    def _fill(self, generating: list[Slot], slots: list[Slot]) -> tuple[int, int]:
        """The target's batch: every generating slot's last token and drafts, then as much of the prompts as fits.

        Returns the tokens that generating slots have in memory, and prompt rows.
        """
        batch = self._batch
        batch.n = n_past = 0
        for slot in generating:
            drafts = slot.ask.drafts
            n_past += slot.n_past
            slot.n_rows = 1 + (self.probe.width(len(drafts)) if self.probe else len(drafts))
            if slot.n_rows > 1:
                self.rollback.before(slot.index, slot.n_past)
                rows = [slot.tokens[-1], *drafts[: slot.n_rows - 1]]
                slot.first_row = batch.extend(rows, slot.n_past, slot.index, True)
            else:
                slot.first_row = batch.add(slot.tokens[-1], slot.n_past, slot.index, True)
        n_generating = batch.n
        if len(generating) == len(slots):
            return n_past, 0
        for slot in slots:
            if not slot.generating:
                chunk = slot.tokens[slot.n_past : slot.n_past + self.settings.n_batch - batch.n]
                slot.n_rows = len(chunk)
                slot.first_row = batch.extend(chunk, slot.n_past, slot.index, False)
                if slot.n_past + len(chunk) == slot.n_prompt:
                    batch.logits[batch.n - 1] = 1
        return n_past, batch.n - n_generating

    def _verify(self, slot: Slot) -> None:
        """Sample the slot's rows, accepting drafts while they are what was sampled."""
        drafts, last, first = slot.ask.drafts, 0 if self.probe else slot.n_rows - 1, slot.first_row
        sample, target = slot.sampler.sample, self.target
        emitted, accepted = 0, 0
        while True:
            token = sample(target, first + emitted)
            slot.emit(token)
            right = emitted < last and token == drafts[emitted]
            emitted += 1
            accepted += right
            if not right or slot.stop:
                break
        slot.rounds.append((slot.n_rows - 1, accepted))
        slot.n_past += emitted
        if slot.n_rows > 1:
            slot.n_redecoded = self.rollback.keep(slot.index, slot.n_past, slot.n_rows - emitted)
        else:
            slot.n_redecoded = 0
        if not slot.over:
            self.drafter.extend(slot.index, self.target.hidden(), slot.first_row, emitted)
        slot.n_emitted = emitted

    def _read_prompts(self, slots: list[Slot]) -> list[Slot]:
        """Book the prompt rows just decoded; returns the slots whose prompt is complete, their first token chosen."""
        started = []
        for slot in slots:
            if slot.generating or not slot.n_rows:
                continue
            slot.n_past += slot.n_rows
            if not slot.over:
                self.drafter.extend(slot.index, self.target.hidden(), slot.first_row, slot.n_rows)
            if slot.drafts_first:
                began = perf_counter_ns()
                self._ahead_rows += self.drafter.catch_up(slot.index, slot.tokens)
                took_us = (perf_counter_ns() - began) // 1000
                self._ahead_us += took_us
                slot.catchup_us += took_us
            if slot.n_past == slot.n_prompt:
                slot.emit(slot.sampler.sample(self.target, slot.first_row + slot.n_rows - 1))
                slot.generating = True
                started.append(slot)
        return started

    def _learn(self, slot: Slot) -> None:
        policy, asked, emitted = slot.policy, slot.n_asked, slot.n_emitted
        drafted, accepted = slot.rounds[-1]
        seen = Outcome(asked, drafted, accepted, emitted) if drafted or asked else _PLAIN
        if slot.shares:  # another slot of this step may have learnt since
            slot.state = self.shared[policy]
        slot.state = policy.learn(slot.state, slot.now, seen)
        if slot.shares:
            self.shared[policy] = slot.state

    def _log_trip(self, slot: Slot) -> None:
        if log.isEnabledFor(logging.INFO):
            verified = [r for r in slot.rounds if r[0]]
            drafted, accepted = verified[-1] if verified else (0, 0)
            log.info(
                "slot %d | request %d | %s: drafting off, actual draft acceptance %d/%d after %d verify batches",
                slot.index, slot.number, slot.policy, accepted, drafted, len(verified),
            )  # fmt: skip  # the message above, its values below

    def _observe(self, generating: list[Slot], started: list[Slot]) -> None:
        """Hand the slots' shares to the observer; a probe's wait until their drafts can be judged."""
        step, probing, observer = self._n_step, self.probe is not None and self.mtp, self.observer
        for slot in generating:
            ask, tokens = slot.ask, slot.tokens
            if ask is NOT_ASKED and not probing:
                observer.plain((slot.number, step, len(tokens) - slot.n_prompt - 1, tokens[-1]))
                continue
            n, drafts, (drafted, accepted) = slot.n_emitted, ask.drafts, slot.rounds[-1]
            row = (
                slot.number, step, len(tokens) - slot.n_prompt - n, slot.n_asked, len(drafts), drafted, accepted,
                accepted, slot.n_redecoded, ask.n_decodes, ask.stop, drafts, ask.probs, tokens[-n:],
            )  # fmt: skip  # what happened when, then how much, then what
            if probing:
                self._settle(slot, Verification(observer.run, *row))
            else:
                observer.verified(row)
        for slot in started:  # with a token that the prompt's last batch gave
            row = slot.number, step, 0, slot.tokens[-1]
            if probing:
                self._settle(slot, plain(observer.run, *row))
            else:
                observer.plain(row)

    def _settle(self, slot: Slot, row: Verification) -> None:
        """Give the probe ``row``, and the observer the rows of ``slot`` whose drafts can now be judged."""
        greedy = slot.request.sampling.temp == 0
        drafted = range(slot.first_row + 1, slot.first_row + 1 + row.n_drafted) if greedy else ()
        choices = [slot.sampler.sample(self.target, i) for i in drafted]
        self._judged(self.probe.settle(row, choices, slot.tokens[slot.n_prompt :]))

    def _judged(self, rows: list[Verification]) -> None:
        for row in rows:
            self.observer.verified(row[1:])

    def finish(self, slot: Slot, now_ns: int) -> Completion:
        """End ``slot``'s request: free the slot, tell the observer, return the completion."""
        slot.ended_ns = now_ns
        slot.first_token_ns = slot.first_token_ns or now_ns  # cancelled while its prompt was read
        done = slot.completion()
        slot.sampler.close()
        self._vacate(slot.index)
        if self.observer is not None:
            if self.probe is not None:
                self._judged(self.probe.end(slot.number, done.tokens))
            self.observer.ended(
                RequestEnd(self.observer.run, slot.number, slot.n_generated, slot.stop, done.prompt_us, done.catchup_us)
            )
        return done

    def _vacate(self, index: int) -> None:
        """Free a slot, and its memory at once: the others' attention reads whatever lies there."""
        self.slots[index] = None
        self.active = [s for s in self.slots if s is not None]
        self.target.remove(index, 0)
        if self.drafter is not None:
            self.drafter.forget(index)
