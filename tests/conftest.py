"""Real models, real engines, real recordings, made once per session and shared."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from tracekit.engine import Engine, Probe, Request, Sampling, Settings
from tracekit.engine.record import record
from tracekit.model.build import build
from tracekit.model.prompt_sets import load

CATEGORIES = ("code", "prose", "repetitive", "random", "mixed")
POLICIES = (
    "off",
    "static:n_max=1",
    "static:n_max=3",
    "static:n_max=6",
    "static:n_max=6,p_min=0.6",
    "fallback:n_max=6",
    "fallback:n_max=6,min_ratio=0.3,resume_after=8",
    "fallback:n_max=4,min_ratio=0,zero_trip=true,p_min=0.4",
    "fallback:n_max=5,min_ratio=0.9,scope=engine,resume_after=20",
    "bucket:n_max=6,n_climb=4,n_drop=4",
    "streaks:n_max=6,n_streak=2",
    "heuristic:n_max=6",
    "sglang:n_max=5,n_warmup=2,n_interval=2",
)
N_MAX, MAX_TOKENS = 6, 40

hypothesis.settings.register_profile("shared machines", deadline=None)  # how long an example takes says nothing there
hypothesis.settings.load_profile("shared machines")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Compiled policies go to a folder of this test run unless one is given, so that a stale cache can never help."""
    os.environ.setdefault("TRACEKIT_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, Path]:
    """The reference model in float32 (batch widths then change no choice), misaligned, as a sidecar, and expanded."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "plain": build(folder / "plain.gguf", dtype="f32"),
        "misaligned": build(folder / "misaligned.gguf", dtype="f32", misaligned=True),
        "sidecar": build(folder / "sidecar.gguf", dtype="f32", sidecar=True),
        "misaligned sidecar": build(folder / "misaligned-sidecar.gguf", dtype="f32", sidecar=True, misaligned=True),
        "deep": build(folder / "deep.gguf", dtype="f32", layers=12),
        "wide": build(folder / "wide.gguf", dtype="f32", width=1024),
    }


@pytest.fixture(scope="session")
def settings() -> Settings:
    """Float32 throughout and no flash attention, whose float16 inside differs with the batch width: exactness is
    tested. One thread: several wait for each other all the time, which takes ages where others share the machine.
    """
    return Settings(n_max=N_MAX, n_ctx=512, threads=1, cache_type_k="f32", cache_type_v="f32", flash_attn="off")


@pytest.fixture(scope="session")
def engine(models, settings):
    """One live engine on the plain model, MTP loaded, nothing recorded."""
    with Engine(models["plain"], settings=settings) as engine:
        yield engine


def requests(temp: float = 0.0, max_tokens: int = MAX_TOKENS, per_category: int = 1) -> list[Request]:
    """Prompts of every category, sampled greedily or with a seed each."""
    kept: dict[str, int] = dict.fromkeys(CATEGORIES, 0)
    found = []
    for i, p in enumerate(load("tune")):
        if kept[p.category] < per_category:
            kept[p.category] += 1
            found.append(
                Request(p.prompt, max_tokens, Sampling(temp=temp, seed=i), prompt_id=p.id, category=p.category)
            )
    return found


@pytest.fixture(scope="session")
def probe_traces(models, settings, tmp_path_factory) -> dict[float, Path]:
    """Probe recordings of every category on the plain model, by temperature: greedy and sampled."""
    folder, traces = tmp_path_factory.mktemp("traces"), {}
    for temp in (0.0, 0.8):
        traces[temp] = folder / f"probe-{temp}.duckdb"
        with Engine(models["plain"], settings=settings, trace=traces[temp], probe=Probe(N_MAX, seed=1)) as engine:
            record(engine, requests(temp, per_category=2), baseline=True)
    return traces


@pytest.fixture(scope="session")
def live_trace(models, settings, tmp_path_factory) -> Path:
    """A live recording under the fallback, with baselines."""
    path = tmp_path_factory.mktemp("traces") / "live.duckdb"
    from tracekit.policy.spec import parse_one

    with Engine(models["plain"], parse_one("fallback:n_max=6,min_ratio=0.4"), settings, trace=path) as engine:
        record(engine, requests(per_category=2), baseline=True)
    return path
