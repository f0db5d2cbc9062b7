"""The whole loop, once with an aligned and once with a misaligned drafter: build, record, tune, verify."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from tracekit.engine import Engine, Probe, Request, Sampling, Settings
from tracekit.engine.record import record
from tracekit.errors import TracekitError
from tracekit.model.build import build
from tracekit.model.prompt_sets import Prompt, load
from tracekit.policy.file import PolicyFile
from tracekit.replay.league import League
from tracekit.trace.store import open_trace
from tracekit.tune.evidence import tune
from tracekit.tune.space import default_space
from tracekit.verify import Verdict, standard_arms, verify

N_MAX = 8


@dataclass(frozen=True)
class Plan:
    """How the demo runs. ``layers`` of the expanded model; ``prompts`` per category to record (half as many, rounded
    up, are held out for verifying), 0 for all that ship.
    """

    folder: Path
    layers: int
    max_tokens: int
    temp: float
    repeats: int
    prompts: int
    seed: int
    threads: int
    force: bool


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


def run(plan: Plan, say: Callable[[str], None], progress: Callable[[str], AbstractContextManager]) -> Story:
    """The demo. ``say(line)`` and ``progress(what)`` (a context manager that yields ``update(done, total)``) keep a
    person informed.
    """
    if plan.folder.exists() and any(plan.folder.iterdir()) and not plan.force:
        raise TracekitError(f"{plan.folder}: not empty; choose another folder with -o or give --force")
    plan.folder.mkdir(parents=True, exist_ok=True)
    heads, files = [], []
    for name in ("aligned", "misaligned"):
        model = plan.folder / f"{name}.gguf"
        say(
            f"[{name}] building the reference model with {plan.layers} layers: the same function at a bigger "
            "model's cost"
        )
        with progress("tensors") as update:
            build(
                model, layers=plan.layers, misaligned=name == "misaligned", dtype="f32", force=plan.force,
                progress=update,
            )  # fmt: skip  # what is built, then how
        trace, policy = plan.folder / f"{name}.duckdb", plan.folder / f"{name}.toml"
        say(
            f"[{name}] recording: {N_MAX} drafts at every position of {len(_some('tune', plan))} prompts, and "
            "the baselines"
        )
        _record(plan, model, trace, progress)
        say(f"[{name}] tuning on the trace")
        league = League.of(open_trace(trace))
        with progress("policies") as update:
            tuned = tune(league, default_space(), seed=plan.seed, progress=update)
        tuned.save(policy)
        say(f"[{name}] {tuned.evidence.advice}")
        say(f"[{name}] verifying on held-out prompts: predicted against live, {plan.repeats} interleaved repeats")
        with progress("runs") as update:
            verdict = verify(
                model, standard_arms(tuned.policy, N_MAX), _requests("heldout", plan), _settings(plan),
                repeats=plan.repeats, seed=plan.seed, progress=update,
            )  # fmt: skip  # what is run, then how
        heads.append(Head(name, tuned, verdict))
        files += [trace, policy]
    return Story(heads, files)


def _settings(plan: Plan) -> Settings:
    """In float32 throughout, so that rounding does not depend on the width of a batch and tokens can be compared."""
    return Settings(n_max=N_MAX, threads=plan.threads, cache_type_k="f32", cache_type_v="f32", flash_attn="off")


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


def _record(plan: Plan, model: Path, trace: Path, progress: Callable[[str], AbstractContextManager]) -> None:
    settings = _settings(plan)
    with (
        Engine(model, None, settings, trace=trace, probe=Probe(N_MAX, plan.seed), force=plan.force) as engine,
        progress("tokens") as update,
    ):
        record(engine, _requests("tune", plan), baseline=True, progress=update)
