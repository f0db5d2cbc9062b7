"""One model and one drafter, from recording to verdict, in stages that each leave a file.

A study that was stopped goes on with the first stage whose file is missing: ``NAME.duckdb``, the probe trace;
``NAME.toml``, the tuned policy; ``NAME.json``, the verdict on held-out prompts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tracekit.engine import Engine, Probe, Request, Sampling, Settings
from tracekit.engine.record import as_requests, record
from tracekit.errors import TracekitError
from tracekit.model.prompt_sets import Prompt, load
from tracekit.policy import file
from tracekit.policy.file import PolicyFile
from tracekit.replay.league import League
from tracekit.replay.serving import Serving
from tracekit.trace import files
from tracekit.trace.store import NoRun, open_trace
from tracekit.tune.evidence import tune
from tracekit.verify import Verdict, standard_arms, verify
from tracekit.words import counted

Progress = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Teller:
    """How a person is kept informed: ``say(line)``, and ``progress(what)``, a context manager that yields
    ``update(done, total)``.
    """

    say: Callable[[str], None]
    progress: Progress


@dataclass(frozen=True)
class Workload:
    """What is generated. ``prompts`` per category to record (half as many, rounded up, are held out for verifying), 0
    for all that ship; ``temp`` 0 is greedy; ``repeats`` of every live run. Raises :class:`TracekitError` for values
    that cannot work.
    """

    max_tokens: int
    temp: float
    repeats: int
    prompts: int
    seed: int

    def __post_init__(self):
        shortest = Serving().shortest  # on one slot, where some of every study's requests run
        for name, value, least in (
            ("max-tokens", self.max_tokens, shortest),
            ("repeats", self.repeats, 1),
            ("prompts", self.prompts, 0),
        ):
            if value < least:
                raise TracekitError(f"--{name} {value}: {least} or more")
        Sampling(temp=self.temp, seed=self.seed)

    def check(self, settings: Settings) -> None:
        """Raise :class:`TracekitError` where an engine with ``settings`` can never generate as much, or never draft."""
        if settings.n_max < 1:
            raise TracekitError(f"--n-max {settings.n_max}: 1 or more; a study compares drafting")
        if self.max_tokens >= settings.n_ctx:
            raise TracekitError(f"--max-tokens {self.max_tokens}: fewer than the {settings.n_ctx} of a slot's context")

    def requests(self, name: str) -> list[Request]:
        """The requests of the shipped prompt set ``name``, ``tune`` or ``heldout``, as :func:`as_requests` makes
        them.
        """
        most = self.prompts if name == "tune" else (self.prompts + 1) // 2
        kept: dict[str, list[Prompt]] = defaultdict(list)
        for prompt in load(name):
            if not most or len(kept[prompt.category]) < most:
                kept[prompt.category].append(prompt)
        chosen = [p for prompts in kept.values() for p in prompts]
        return as_requests(chosen, self.max_tokens, Sampling(temp=self.temp, seed=self.seed))


@dataclass(frozen=True)
class Study:
    """``name`` in ``folder``: ``model`` (and ``draft_model``, a sidecar) under ``settings``, on ``workload``."""

    folder: Path
    name: str
    model: Path
    draft_model: Path | None
    settings: Settings
    workload: Workload


@dataclass(frozen=True)
class Finding:
    """What a study came to."""

    name: str
    tuned: PolicyFile
    verdict: Verdict


class Failed(TracekitError):
    """What was recorded could not be tuned, or the policy not verified: this study, and no other."""


@contextmanager
def _of_this_study() -> Iterator[None]:
    try:
        yield
    except TracekitError as error:
        raise Failed(str(error)) from error


def conduct(study: Study, tell: Teller, may_go_on: Callable[[], None] = lambda: None) -> Finding:
    """Every stage of ``study`` whose file is missing; ``may_go_on()`` is asked before each and may raise. Raises
    :class:`Failed` where it cannot be tuned or verified, other :class:`TracekitError` for what stops others as well.
    """
    trace, policy, result = paths_of(study.folder, study.name)
    n_max, work = study.settings.n_max, study.workload
    if not complete(trace):
        may_go_on()
        requests = work.requests("tune")
        what = f"{n_max} drafts at every position of {counted(len(requests), 'prompt')}, and baselines"
        tell.say(f"[{study.name}] recording: {what}")
        probe = Probe(n_max, work.seed)
        made = study.model, None, study.settings, study.draft_model
        with recording(tell, "tokens", *made, trace=trace, probe=probe) as (engine, update):
            record(engine, requests, baseline=True, progress=update)
    if not policy.exists():
        may_go_on()
        tell.say(f"[{study.name}] tuning on the trace")
        with _of_this_study(), tell.progress("policies") as update:
            best = tune(League.of(open_trace(trace)), seed=work.seed, progress=update)
        best.save(policy)
    tuned = file.read(policy)
    tell.say(f"[{study.name}] {tuned.evidence.advice}")
    if not result.exists():
        may_go_on()
        tell.say(
            f"[{study.name}] verifying on held-out prompts: predicted against live, "
            f"{counted(work.repeats, 'interleaved repeat')}"
        )
        with _of_this_study(), tell.progress("runs") as update:
            verdict = verify(
                study.model, standard_arms(tuned.policy, n_max), work.requests("heldout"), study.settings,
                study.draft_model, work.repeats, seed=work.seed, progress=update,
            )  # fmt: skip  # what is run, then how
        verdict.save(result)
    return Finding(study.name, tuned, Verdict.load(result))


def kept(folder: Path, name: str) -> Finding | None:
    """What the study ``name`` came to, where all its files are in ``folder``."""
    trace, policy, result = paths_of(folder, name)
    if complete(trace) and policy.exists() and result.exists():
        return Finding(name, file.read(policy), Verdict.load(result))
    return None


@contextmanager
def recording(
    tell: Teller, what: str, *made: Any, **options: Any
) -> Iterator[tuple[Engine, Callable[[int, int], None]]]:
    """An engine (``made`` and ``options`` are its) that records, and how to say how many of ``what`` are done.

    Raises :class:`TracekitError` as soon as recording fails, where the engine alone would go on without.
    """
    with Engine(*made, **options) as engine, tell.progress(what) as show:
        recorder = engine.recorder
        yield engine, recorder.demanding(show)
    recorder.demand()


def paths_of(folder: Path, name: str) -> list[Path]:
    """What the study ``name`` leaves in ``folder``: trace, policy and verdict."""
    return [folder / f"{name}.{ending}" for ending in ("duckdb", "toml", "json")]


def complete(trace: Path) -> bool:
    """Whether ``trace`` was recorded to its end; what is left of one that was not, and what was made of it, is kept
    under another name.
    """
    with suppress(NoRun):
        if trace.exists() and open_trace(trace).runs["wall_us"].is_not_null().all():
            return True
    kept = files.free_path(trace.with_stem(f"{trace.stem}-cut-off"))
    files.move(trace, kept)
    for old, new in zip(paths_of(trace.parent, trace.stem)[1:], paths_of(kept.parent, kept.stem)[1:], strict=True):
        if old.exists():
            old.rename(new)
    return False


def remove(folder: Path, names: Iterable[str]) -> None:
    """Delete what studies of these names have left in ``folder``. Raises :class:`TracekitError`, and deletes nothing,
    where one of their traces is being recorded, or is no trace.
    """
    studies = [paths_of(folder, name) for name in names]
    for trace, *_ in studies:
        files.check_replaceable(trace)
    for trace, *others in studies:
        files.delete(trace)
        for other in others:
            other.unlink(missing_ok=True)
