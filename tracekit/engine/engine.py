"""The live engine: a model, its drafter, and the requests it serves.

The work of a step is in :mod:`tracekit.engine.loop`; this is what users hold.
"""

from __future__ import annotations

import logging
import os
import reprlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from operator import index
from pathlib import Path
from time import perf_counter_ns

from tracekit.engine.context import Context
from tracekit.engine.loop import Loop
from tracekit.engine.model import Model
from tracekit.engine.parts import Parts
from tracekit.engine.probe import Probe
from tracekit.engine.provenance import run_facts
from tracekit.engine.recorder import Recorder, record_beside
from tracekit.engine.sampling import BackendSampling
from tracekit.engine.settings import Settings
from tracekit.engine.slot import Completion, Request, Slot
from tracekit.errors import TracekitError
from tracekit.policy.rule import Policy
from tracekit.policy.spec import PolicyLike, policy_of

log = logging.getLogger("tracekit.engine")


def _free(owned: ExitStack, pid: int) -> None:
    if os.getpid() == pid:  # and not in a fork, whose parent is still recording
        owned.close()


def _finish_trace(recorder: Recorder, probe: Probe | None) -> None:
    recorder.close(*((probe.n_checked, probe.n_diverged) if probe else ()))


class Engine:
    """A model being served. Use as a context manager, or :meth:`close` it. Threads may share it.

    ``policy`` (a policy, a tuned one, its text or its file) decides for requests that bring none; the default is
    ``off``. ``draft_model`` is a sidecar GGUF for models whose NextN block has a file of its own. With ``mtp`` false no
    NextN block is loaded and nothing is ever drafted. ``trace`` records into that new DuckDB file (so does the
    environment variable ``TRACEKIT_TRACE``); ``probe`` turns every request into a measurement. ``placement`` says where
    layers and buffers came to lie. Raises :class:`TracekitError` for a model without NextN layers where ``mtp`` is
    wanted.
    """

    def __init__(
        self,
        model: str | Path,
        policy: PolicyLike | None = None,
        settings: Settings | None = None,
        draft_model: str | Path | None = None,
        mtp: bool = True,
        trace: str | Path | None = None,
        probe: Probe | None = None,
        force: bool = False,
    ):
        self.policy = policy_of("off" if policy is None else policy)
        self.settings = settings or Settings()
        self.model: Model | None = None
        self.draft_model: Model | None = None
        self.recorder: Recorder | None = None
        self._parts = self._target = self._drafter = self._loop = None
        self._without_mtp: tuple | None = None
        self._probe, self._n_requests = probe, 0
        self._lock, self._stepping = threading.RLock(), False
        self._finished: list[Completion] = []  # for step(): requests that were submitted by hand
        self._boxes: dict[int, list] = {}  # where the completion of each request goes; None: it was dropped
        self._owned = ExitStack()
        self._process = os.getpid()
        self._free = weakref.finalize(self, _free, self._owned, self._process)
        try:
            if probe is not None and probe.n_max > self.settings.n_max:
                raise TracekitError(f"a probe of {probe.n_max} drafts: the engine's n_max is {self.settings.n_max}")
            parts = self._parts = Parts(model, draft_model, mtp, self.settings, self._owned)
            self.model, self.draft_model, self.settings = parts.model, parts.draft_model, parts.settings
            self._target, self._drafter, self.placement = parts.target, parts.drafter, parts.placement
            self._check(self.policy)
            self._loop = Loop(self._target, self._drafter, parts.rollback, self.settings)
            self._loop.probe = probe
            self._loop.backend_sampling = parts.backend_sampling
            self._owned.callback(self._loop.abort)
            if path := trace or os.environ.get("TRACEKIT_TRACE"):
                made = self.model, self.draft_model, self.settings, self.policy, probe, self.placement
                facts = run_facts(*made, parts.rollback.kind)
                self.recorder = Recorder(path, facts, force=force) if trace else record_beside(path, facts)
                self._loop.observer = self.recorder
            if self.recorder is not None:
                self._owned.callback(_finish_trace, self.recorder, probe)
        except BaseException:
            self.close()
            raise

    def _check(self, policy: Policy) -> None:
        self.settings.check(policy)
        if self._drafter is None and not policy.is_off:
            raise TracekitError(f"policy {policy} drafts, but the engine was started without MTP")

    def __repr__(self) -> str:
        if self.model is None:
            return "<Engine, closed>"
        under_way = len(self._loop.queue) + len(self._loop.active)
        return f"<Engine {self.model.path.name}, {self.policy}: {under_way} requests, {self.settings.n_slots} slots>"

    @property
    def mtp(self) -> bool:
        """Whether drafting is possible now."""
        return self._loop.mtp

    def set_arm(
        self, mtp: bool = True, probing: bool = False, recording: bool = True, shared: dict | None = None
    ) -> None:
        """Between requests, switch MTP off (the baseline: hidden states are not even extracted, nor snapshots taken) or
        on, probing with it, and recording.

        ``probing`` is for engines made with a probe, ``recording`` for those with a trace; elsewhere they change
        nothing. ``shared``: where states of policies with ``scope=engine`` are kept from now on; None: where they were.
        Raises :class:`TracekitError` with requests under way.
        """
        self._check_open()
        if not self._loop.idle:
            raise TracekitError("MTP and probing can be switched only with no request under way")
        if mtp and self._drafter is None:
            raise TracekitError("the engine was started without MTP")
        self._loop.mtp = mtp
        if self.snapshots:
            self._loop.serve_from(*self._target_of(mtp))
        self._loop.probe = self._probe if probing and mtp else None
        self._loop.observer = self.recorder if recording else None
        self._loop.shared = self._loop.shared if shared is None else shared

    @property
    def snapshots(self) -> bool:
        """Whether the target takes snapshots of its state, to take drafts back: a recurrent memory, with MTP."""
        return self._target.n_snapshots > 0

    def _target_of(self, mtp: bool) -> tuple[Context, BackendSampling | None]:
        """The target's context and device sampler; without MTP another, which spends no time on snapshots."""
        with_mtp = self._target, self._parts.backend_sampling
        if not mtp and self._without_mtp is None:
            self._without_mtp = self._parts.without_snapshots()
            self._owned.callback(self._loop.serve_from, *with_mtp)  # before that context goes
            self._owned.callback(self._loop.abort)
        return with_mtp if mtp else self._without_mtp

    @property
    def idle(self) -> bool:
        """No request is running or waiting, and :meth:`step` has none to return."""
        return self._loop.idle and not self._finished

    @property
    def reading(self) -> bool:
        """A prompt is waiting or still being read."""
        return bool(self._loop.queue) or not all(s.generating for s in self._loop.active)

    def _check_open(self) -> None:
        if self.model is None:
            raise TracekitError("the engine is closed; start another")
        if os.getpid() != self._process:  # llama.cpp's threads are not there: a decode would wait for them for ever
            raise TracekitError("the engine was started in another process, of which this is a fork; start one here")

    def prepare(self, request: Request) -> list[int]:
        """The prompt's tokens. Raises :class:`TracekitError` for a request that cannot be served."""
        self._check_open()
        try:
            return self._prepare(request)
        except TracekitError as error:
            if not request.prompt_id:
                raise
            raise TracekitError(f"prompt {request.prompt_id}: {error}") from None

    def _prepare(self, request: Request) -> list[int]:
        request.check()
        prompt, n_vocab = request.prompt, self.model.facts.n_vocab
        try:
            if isinstance(prompt, bytes):
                raise TypeError
            tokens = self.model.tokenize(prompt) if isinstance(prompt, str) else list(map(index, prompt))
        except (TypeError, UnicodeEncodeError):
            raise TracekitError(f"the prompt is neither text nor token ids: {reprlib.repr(prompt)}") from None
        if not tokens or (isinstance(prompt, str) and not prompt):
            raise TracekitError("the prompt is empty")
        bad = next((t for t in tokens if not 0 <= t < n_vocab), None)
        if bad is not None:
            raise TracekitError(f"token {bad} is not in the vocabulary of {n_vocab}")
        if len(tokens) >= self._target.n_ctx:
            raise TracekitError(
                f"{len(tokens)} tokens do not fit into a context of {self._target.n_ctx}; "
                "raise --ctx-size or shorten it"
            )
        self._check(request.policy or self.policy)
        return tokens

    def submit(self, request: Request) -> int:
        """Queue a request; returns its number. :meth:`step` will return it. Raises as :meth:`prepare` does."""
        return self._submit(request, self._finished)

    def _submit(self, request: Request, box: list) -> int:
        with self._lock:
            tokens = self.prepare(request)
            policy = request.policy or self.policy
            slot = Slot(self._n_requests, request, policy, tokens, self._target.n_ctx, self.model)
            self._n_requests += 1
            self._boxes[slot.number] = box
            self._loop.queue.append(slot)
            return slot.number

    def step(self) -> list[Completion]:
        """One target decode for every slot; returns the submitted requests that are finished. Those of
        :meth:`generate`, :meth:`run` and :meth:`stream` are theirs.

        An exception in a step, Ctrl-C or a policy's, drops every request under way; the engine then serves others.
        """
        with self._lock:
            self._step()
            done = self._finished[:]
            self._finished.clear()
            return done

    def _step(self) -> None:
        self._check_open()
        self._check_between_steps()
        self._stepping = True
        try:
            for done in self._loop.step():
                if done.number in self._boxes:
                    self._boxes.pop(done.number).append(done)
        except BaseException as error:
            policies = [slot.policy for slot in self._loop.active]
            self._loop.abort()
            self._drop()
            raise next(filter(None, (p.rule.blamed(error) for p in policies)), error) from None
        finally:
            self._stepping = False

    def _check_between_steps(self) -> None:
        if self._stepping:
            raise TracekitError("the engine is in a step, and this was called from inside it (a signal handler?)")

    def _drop(self) -> None:
        """Tell those that wait for a request that it will never be finished."""
        for box in self._boxes.values():
            if box is not self._finished:
                box.append(None)
        self._boxes.clear()

    def cancel(self, number: int) -> Completion | None:
        """Stop request ``number``; what it has generated so far, or None where it never started."""
        with self._lock:
            done, box = self._cancel(number), self._boxes.pop(number, self._finished)
            if box is not self._finished:
                box.append(done)
            return done

    def _cancel(self, number: int) -> Completion | None:
        for slot in self._loop.queue:
            if slot.number == number:
                self._loop.queue.remove(slot)
                slot.sampler.close()
                return None
        for slot in self._loop.active:
            if slot.number == number:
                slot.stop = "cancelled"
                if not self._stepping:  # else (an iterator collected as garbage) it ends with the step
                    return self._loop.finish(slot, perf_counter_ns())
        return None

    def _serve(self, requests: Iterable[Request]) -> Iterator[list[Completion]]:
        """Submit ``requests``; after every step, those of them that it finished. What is left when the caller goes is
        cancelled.
        """
        box: list[Completion | None] = []
        numbers: list[int] = []
        try:
            for request in requests:
                numbers.append(self._submit(request, box))
            n_left = len(numbers)
            while n_left:
                with self._lock:
                    if not box:  # another thread, or another's loop, may have finished some
                        self._step()
                    done = box[:]
                    box.clear()
                if None in done:
                    self._check_open()
                    raise TracekitError("the request was dropped: cancelled in the queue, or by another's failed step")
                n_left -= len(done)
                yield done
        finally:
            with self._lock:
                for number in numbers:
                    if self._boxes.pop(number, None) is not None:
                        self._cancel(number)

    def generate(self, prompt: str | list[int], **options) -> Completion:
        """Generate for one prompt; ``options`` are :class:`Request`'s. Requests under way go on beside it."""
        (done,) = self.run([Request(prompt, **options)])
        return done

    def run(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Serve ``requests`` over all slots, yielding each when it is finished."""
        for done in self._serve(requests):
            yield from done

    def stream(self, prompt: str | list[int], **options) -> Iterator[str | Completion]:
        """Generate for one prompt, yielding its text as it comes and, last, the completion."""
        request = Request(prompt, **options)
        longest = max(map(len, request.stop), default=1) - 1
        sent = 0
        for done in self._serve([request]):
            if done:
                yield done[0].text[sent:]
                yield done[0]
                return
            for slot in self._loop.active:
                if slot.request is request:
                    ready = len(text := slot.text.rstrip("\ufffd")) - longest
                    if ready > sent:
                        yield text[sent:ready]
                        sent = ready

    def close(self, cut_off: bool = False) -> None:
        """Finish the trace, as one that was ``cut_off`` before its end if so, and free contexts and models; requests
        under way are dropped.
        """
        with self._lock:
            self._check_between_steps()
            self._drop()
            if self.recorder is not None:
                self.recorder.cut_off = cut_off
            try:
                self._free()  # the loop's requests among the rest
            finally:
                self.recorder = self._drafter = self._target = self.draft_model = self.model = self._parts = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cut_off=kind is not None)
