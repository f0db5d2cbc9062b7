"""A request, the slot that serves it, and what it came to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from tracekit.engine.drafter import NOT_ASKED
from tracekit.engine.model import Model
from tracekit.engine.sampling import Sampler, Sampling
from tracekit.errors import TracekitError
from tracekit.policy.interface import Now
from tracekit.policy.rule import Policy
from tracekit.policy.spec import PolicyLike, policy_of

MOST_TOKENS = 2**31 - 1  # a trace counts a request's in 32 bits


@dataclass(frozen=True)
class Request:
    """What to generate. ``prompt`` is text or token ids; generation ends at the end of text (unless ``ignore_eos``),
    at a ``stop`` string (one, or several; cut off the text), after ``max_tokens``, or with the context. ``policy`` is
    anything :func:`policy_of` takes; None: the engine's. ``arm`` labels it in a trace."""

    prompt: str | list[int]
    max_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    policy: PolicyLike | None = None
    prompt_id: str = ""
    category: str = ""
    arm: str = "live"
    ignore_eos: bool = False

    def __post_init__(self):
        if not isinstance(self.stop, str | Iterable):
            raise TracekitError(f"stop {self.stop!r}: a string, or several")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        if self.policy is not None:
            object.__setattr__(self, "policy", policy_of(self.policy))

    def check(self) -> None:
        """Raises :class:`TracekitError` for a value of the wrong kind."""
        for name, kind in (("prompt_id", str), ("category", str), ("arm", str), ("sampling", Sampling)):
            if not isinstance(getattr(self, name), kind):
                raise TracekitError(f"{name} {getattr(self, name)!r}: {kind.__name__} is wanted")
        if not isinstance(self.max_tokens, int) or not 1 <= self.max_tokens <= MOST_TOKENS:
            raise TracekitError(f"--max-tokens {self.max_tokens}: a whole number from 1 to {MOST_TOKENS}")
        for text in self.stop:
            if not isinstance(text, str) or not text:
                raise TracekitError(f"stop {text!r}: a string of one character or more")
            if any("\ud800" <= c <= "\udfff" for c in text):
                raise TracekitError(f"stop {text!r}: holds half of a surrogate pair, which is no text")


@dataclass(frozen=True)
class Completion:
    """What a request came to; ``tokens`` includes an end-of-text token.

    Microseconds: ``prompt_us`` to the first token, without ``catchup_us``, which drafting added to reading the
    prompt, and ``generate_us`` from there to the end, which was at ``ended_ns`` of the monotonic clock. ``rounds``:
    ``(drafted, accepted)`` of every step, plain ones included.
    """

    request: Request
    number: int
    text: str
    tokens: list[int]
    stop: str
    n_prompt: int
    prompt_us: int
    catchup_us: int
    generate_us: int
    ended_ns: int
    verifications: int
    drafted: int
    accepted: int
    trips: int
    rounds: list[tuple[int, int]] = field(repr=False, default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first per second of :attr:`speculated_us`."""
        return 1e6 * (len(self.tokens) - 1) / self.speculated_us if self.generate_us else 0.0

    @property
    def speculated_us(self) -> int:
        """Everything that depends on the policy: generation, and what drafting added to the prompt."""
        return self.generate_us + self.catchup_us


class Slot:
    """One sequence being generated: its tokens, its sampler and its policy's state."""

    def __init__(self, number: int, request: Request, policy: Policy, tokens: list[int], n_ctx: int, model: Model):
        self.number, self.request, self.policy = number, request, policy
        self.index = -1  # until a slot is free
        self.shares = policy.scope == "engine"  # its state with every request of the engine
        self.state: Any = None
        self.now: Now | None = None  # what the policy knew before the verification under way
        self.n_prompt = len(tokens)
        self.tokens = tokens
        self.n_past = 0  # tokens in the target's memory
        self.n_ctx = n_ctx
        self.max_tokens = request.max_tokens
        self._full = min(self.n_prompt + request.max_tokens, n_ctx + 1)  # tokens, the prompt's included
        self.sampler = Sampler(request.sampling)
        self.generating = False  # whether the prompt is decoded and a first token chosen
        self.ask = NOT_ASKED
        self.n_asked = 0
        self.first_row = self.n_rows = 0  # the slot's rows of the current target batch
        self.n_emitted = 0  # tokens, in the step under way
        self.n_redecoded = 0
        self.stop = ""
        self.rounds: list[tuple[int, int]] = []  # (drafted, accepted) of every step, plain ones included
        self.over = False  # nothing will be drafted any more: the engine has no MTP, or the policy said NEVER
        self.trips = 0
        self.drafts_first = False  # whether the policy will draft right after the prompt
        self.catchup_us = 0
        self.started_ns = self.first_token_ns = self.ended_ns = 0
        self._piece = model.piece
        self._end_tokens = frozenset() if request.ignore_eos else model.end_tokens
        self._bytes = bytearray()
        self._cut = -1

    @property
    def n_generated(self) -> int:
        """Tokens emitted so far."""
        return len(self.tokens) - self.n_prompt

    @property
    def room(self) -> int:
        """Most drafts that still make sense: llama.cpp's ``get_n_draft_max`` (tools/server)."""
        return max(0, min(self.n_ctx - self.n_past - 2, self.max_tokens - self.n_generated - 1))

    def emit(self, token: int) -> None:
        """Append ``token``; sets :attr:`stop` where it ends the request."""
        self.tokens.append(token)
        if token in self._end_tokens:
            self.stop = "eos"
            return
        if self.request.stop:
            self._find_stop(self._piece(token))
        if len(self.tokens) >= self._full and not self.stop:
            self.stop = "length" if self.n_generated >= self.max_tokens else "context"

    def _find_stop(self, piece: bytes) -> None:
        seen = len(self._bytes)
        self._bytes += piece
        for text in self.request.stop:
            raw = text.encode()
            at = self._bytes.find(raw, max(0, seen - len(raw) + 1))
            if at >= 0 and (self._cut < 0 or at < self._cut):
                self._cut, self.stop = at, "stop"

    @property
    def text(self) -> str:
        """What is generated so far, cut before a stop string."""
        pieces = b"".join(map(self._piece, self.tokens[self.n_prompt :]))
        return (pieces if self._cut < 0 else pieces[: self._cut]).decode("utf-8", errors="replace")

    def completion(self) -> Completion:
        """The finished request's record."""
        drafting = [r for r in self.rounds if r[0]]
        return Completion(
            request=self.request,
            number=self.number,
            text=self.text,
            tokens=self.tokens[self.n_prompt :],
            stop=self.stop,
            n_prompt=self.n_prompt,
            prompt_us=(self.first_token_ns - self.started_ns) // 1000 - self.catchup_us,
            catchup_us=self.catchup_us,
            generate_us=(self.ended_ns - self.first_token_ns) // 1000,
            ended_ns=self.ended_ns,
            verifications=len(drafting),
            drafted=sum(r[0] for r in drafting),
            accepted=sum(r[1] for r in drafting),
            trips=self.trips,
            rounds=self.rounds,
        )
