"""The whole loop, once with an aligned and once with a misaligned drafter: build, record, tune, verify.

Every stage leaves a file, and a run that was stopped goes on with the first stage whose file is missing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from tracekit.engine import Engine, Probe, Request, Sampling, Settings
from tracekit.engine.record import record
from tracekit.engine.recorder import free_path
from tracekit.errors import TracekitError
from tracekit.model.build import build
from tracekit.model.prompt_sets import Prompt, load
from tracekit.policy import file
from tracekit.policy.file import PolicyFile
from tracekit.replay.league import League
from tracekit.trace.store import open_trace
from tracekit.tune.evidence import tune
from tracekit.tune.space import default_space
from tracekit.verify import Verdict, standard_arms, verify

N_MAX = 8

Progress = Callable[[str], AbstractContextManager]


@dataclass(frozen=True)
class Plan:
    """What the demo runs. ``layers`` and ``width`` (0: as it is) of the expanded model; ``prompts`` per category to
    record (half as many, rounded up, are held out for verifying), 0 for all that ship.

    ``dtype`` ``f32`` computes in float32 throughout, so that rounding does not depend on the width of a batch and
    tokens can be compared; ``f16`` is what one would serve.
    """

    layers: int
    width: int
    dtype: str
    max_tokens: int
    temp: float
    repeats: int
    prompts: int
    seed: int
    threads: int


@dataclass(frozen=True)
class Head:
    """The result for one drafter."""

    name: str
    tuned: PolicyFile
    verdict: Verdict


@dataclass(frozen=True)
class Story:
    """Both results, and the files that were written."""

    heads: list[Head]
    files: list[Path]

    @property
    def frame(self) -> pl.DataFrame:
        """The arms of both heads in one frame, column ``head`` first."""
        return pl.concat([h.verdict.arms.select(pl.lit(f"{h.name} head").alias("head"), pl.all()) for h in self.heads])


def run(
    plan: Plan, folder: Path, say: Callable[[str], None], progress: Progress, force: bool = False, resume: bool = False
) -> Story:
    """The demo in ``folder``. ``say(line)`` and ``progress(what)`` (a context manager that yields ``update(done,
    total)``) keep a person informed.

    Raises :class:`TracekitError` for a folder in use: ``force`` starts again there, ``resume`` goes on.
    """
    _open(folder, plan, force, resume)
    heads = [_head(plan, folder, name, say, progress) for name in ("aligned", "misaligned")]
    endings = ("duckdb", "toml", "json")
    return Story(heads, [folder / f"{h.name}.{ending}" for h in heads for ending in endings])


def _open(folder: Path, plan: Plan, force: bool, resume: bool) -> None:
    """Make ``folder`` ready: empty, emptied of an earlier demo's files, or as an earlier demo of this plan left it."""
    path = folder / "plan.json"
    if folder.exists() and any(folder.iterdir()) and not force:
        if not resume:
            raise TracekitError(
                f"{folder}: not empty; choose another folder with -o, go on with --resume, or give --force"
            )
        if not path.is_file() or path.read_text() != _text(plan):
            raise TracekitError(f"{folder}: not of a demo with these options; give those it began with, or --force")
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("aligned", "misaligned"):
        for ending in ("gguf", "duckdb", "duckdb.wal", "toml", "json"):
            (folder / f"{name}.{ending}").unlink(missing_ok=True)
    path.write_text(_text(plan))


def _text(plan: Plan) -> str:
    return json.dumps(asdict(plan), indent=2) + "\n"


def _head(plan: Plan, folder: Path, name: str, say: Callable[[str], None], progress: Progress) -> Head:
    """Every stage for one drafter, those left out whose file is there."""
    model, trace, policy, result = (folder / f"{name}.{ending}" for ending in ("gguf", "duckdb", "toml", "json"))
    if not model.exists():
        say(f"[{name}] building the reference model, expanded: the same function at a bigger model's cost")
        with progress("tensors") as update:
            build(
                model, layers=plan.layers, width=plan.width or None, misaligned=name == "misaligned",
                dtype=plan.dtype, progress=update,
            )  # fmt: skip  # what is built, then how
    if not _complete(trace):
        say(
            f"[{name}] recording: {N_MAX} drafts at every position of {len(_some('tune', plan))} prompts, and baselines"
        )
        _record(plan, model, trace, progress)
    if not policy.exists():
        say(f"[{name}] tuning on the trace")
        with progress("policies") as update:
            tune(League.of(open_trace(trace)), default_space(), seed=plan.seed, progress=update).save(policy)
    tuned = file.read(policy)
    say(f"[{name}] {tuned.evidence.advice}")
    if not result.exists():
        say(f"[{name}] verifying on held-out prompts: predicted against live, {plan.repeats} interleaved repeats")
        with progress("runs") as update:
            verdict = verify(
                model, standard_arms(tuned.policy, N_MAX), _requests("heldout", plan), _settings(plan),
                repeats=plan.repeats, seed=plan.seed, progress=update,
            )  # fmt: skip  # what is run, then how
        verdict.save(result)
    return Head(name, tuned, Verdict.load(result))


def _complete(trace: Path) -> bool:
    """Whether ``trace`` was recorded to its end; one that was cut off is kept under another name."""
    if not trace.exists():
        return False
    if open_trace(trace).runs["wall_us"].is_not_null().all():
        return True
    kept, log = free_path(str(trace.with_stem(f"{trace.stem}-cut-off"))), trace.with_name(trace.name + ".wal")
    if log.exists():  # DuckDB's own log holds what was not yet written back
        log.rename(kept.with_name(kept.name + ".wal"))
    trace.rename(kept)
    return False


def _settings(plan: Plan) -> Settings:
    exact = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"} if plan.dtype == "f32" else {}
    return Settings(n_max=N_MAX, threads=plan.threads, **exact)


def _some(name: str, plan: Plan) -> list[Prompt]:
    kept: dict[str, list[Prompt]] = defaultdict(list)
    most = plan.prompts if name == "tune" else (plan.prompts + 1) // 2
    for prompt in load(name):
        if not most or len(kept[prompt.category]) < most:
            kept[prompt.category].append(prompt)
    return [p for prompts in kept.values() for p in prompts]


def _requests(name: str, plan: Plan) -> list[Request]:
    return [
        Request(
            p.prompt, plan.max_tokens, Sampling(temp=plan.temp, seed=plan.seed + i), prompt_id=p.id, category=p.category
        )
        for i, p in enumerate(_some(name, plan))
    ]


def _record(plan: Plan, model: Path, trace: Path, progress: Progress) -> None:
    with (
        Engine(model, None, _settings(plan), trace=trace, probe=Probe(N_MAX, plan.seed)) as engine,
        progress("tokens") as update,
    ):
        record(engine, _requests("tune", plan), baseline=True, progress=update)
