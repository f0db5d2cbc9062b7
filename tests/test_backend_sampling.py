"""Backend samplers: what is chosen on the device is what is chosen on the host, and logits stay where they are."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tracekit.engine import Engine, Probe, Request, Sampling, drafter, lib, sampling
from tracekit.engine.lib import llama
from tracekit.policy.spec import parse_one
from tracekit.trace.store import open_trace

from .conftest import N_MAX, requests
from .test_cli import tracekit

ARMS = {
    "host": {"spec_draft_backend_sampling": False},
    "drafts": {"spec_draft_backend_sampling": True},
    "target": {"spec_draft_backend_sampling": False, "backend_sampling": True},
    "both": {"spec_draft_backend_sampling": True, "backend_sampling": True},
}
COLUMNS = "n_generated, n_asked, n_proposed, n_drafted, n_accepted, n_matched, n_decodes, stop, draft_ids, draft_probs"


@pytest.fixture(scope="module")
def start(models, settings):
    """Start an engine on the plain model in one of the arms; one thread, since nothing here is timed."""

    def engine(arm: str, n_slots: int = 1, **options) -> Engine:
        wanted = replace(settings, threads=1, n_slots=n_slots, **ARMS[arm])
        return Engine(models["plain"], settings=wanted, **options)

    return engine


def xtc() -> object:
    """A sampler that llama.cpp has for the host alone."""
    return llama.llama_sampler_init_xtc(0.5, 0.1, 1, 0)


def recorded(path: Path) -> dict[str, bool]:
    """What a trace says of both settings."""
    (text,) = open_trace(path).frame("SELECT settings::VARCHAR AS s FROM runs")["s"]
    return {name: json.loads(text)[name] for name in ARMS["both"]}


@pytest.mark.parametrize("n_slots", [1, 2])
def test_nothing_depends_on_where_tokens_are_chosen(start, n_slots):
    """Greedy and sampled, every policy drafts, accepts and generates the same with each setting, on 1 and 2 slots."""
    policies = [parse_one(p) for p in ("static:n_max=6", "fallback:n_max=4,p_min=0.5")]
    wanted = [replace(r, policy=p) for p in policies for temp in (0.0, 0.8) for r in requests(temp, 16)]
    found = {}
    for arm in ARMS:
        with start(arm, n_slots) as engine:
            found[arm] = {d.number: (d.tokens, d.rounds) for d in engine.run(wanted)}
    assert len(found["host"]) == len(wanted)
    assert any(accepted for _, rounds in found["host"].values() for _, accepted in rounds)
    for arm in ARMS:
        assert found[arm] == found["host"], arm


def test_probes_agree_to_the_last_bit(start, tmp_path):
    """At every position the same drafts with the same probabilities, and the same count of the target's choices that a
    wider batch changed."""
    traces, counts = {}, {}
    for arm in ARMS:
        probe = Probe(N_MAX, seed=3)
        with start(arm, trace=tmp_path / f"{arm}.duckdb", probe=probe) as engine:
            list(engine.run(requests(0.0, 20)))
            assert engine.recorder.failed == ""
        trace = open_trace(tmp_path / f"{arm}.duckdb")
        traces[arm] = trace.frame(f"SELECT request, {COLUMNS} FROM verifications ORDER BY request, n_generated")
        counts[arm] = probe.n_checked, probe.n_diverged
        assert dict.fromkeys(ARMS["both"], False) | ARMS[arm] == recorded(tmp_path / f"{arm}.duckdb")
    assert traces["host"]["draft_probs"].explode().len() > 300
    assert counts["host"][0] > 50
    for arm in ARMS:
        assert traces[arm].equals(traces["host"]), arm
        assert counts[arm] == counts["host"], arm


def test_sampling_alike_or_not(start):
    """Requests that sample in different ways follow each other in one slot: each text is the host's."""
    ways = [
        Sampling(temp=0.8, seed=1),
        Sampling(temp=0.8, seed=2),
        Sampling(),
        Sampling(temp=1.2, top_p=1.0, seed=3),
        Sampling(temp=1.2, top_k=0, seed=3),
        Sampling(temp=1.2, min_p=0.0, seed=3),
        Sampling(temp=1.2, top_k=5, seed=3),
        Sampling(),
        Sampling(temp=0.8, seed=1),
    ]
    policy = parse_one("static:n_max=3")
    wanted = [Request("import os\n\ndef main(", 32, s, policy=policy) for s in ways]
    texts = {}
    for arm in ("host", "both"):
        with start(arm) as engine:
            texts[arm] = [d.tokens for d in engine.run(wanted)]
    assert texts["both"] == texts["host"]
    assert texts["both"][0] == texts["both"][-1] != texts["both"][1]


def test_several_slots_sample_on_the_host(models, settings, caplog):
    """llama.cpp mixes up rows that the device samples with others': with several slots the target's stay on the host,
    the engine says so once, and each of unlike requests side by side gets the text it gets alone.
    """
    host = Sampling(temp=0.7, top_p=1.0, seed=1)
    wanted = [
        Request("import os\n", 2),
        Request("class Foo:\n", 100, host, policy="static:n_max=2", ignore_eos=True),
        Request("class Bar:\n", 100, ignore_eos=True),
        *(Request(r.prompt, 3) for r in requests(per_category=3)),
    ]
    few = replace(settings, n_batch=64, n_ubatch=64, threads=1, **ARMS["both"])
    with Engine(models["plain"], settings=replace(few, backend_sampling=False)) as engine:
        alone = [d.tokens for d in engine.run(wanted)]
    with Engine(models["plain"], settings=replace(few, n_slots=3, kv_unified=True)) as engine:
        assert engine.settings.backend_sampling is False
        assert [d.tokens for d in sorted(engine.run(wanted), key=lambda d: d.number)] == alone
    assert sum("samplers for several slots" in m for m in caplog.messages) == 1


def test_logits_stay_on_the_device(start):
    """With both settings no decode writes a row of logits to the host; without them every one does."""
    for arm, stays in (("host", False), ("both", True)):
        with start(arm) as engine:
            policy = parse_one("static:n_max=3,p_min=0.1")
            engine.generate("import os", max_tokens=8, policy=policy)
            for context in (engine._target, engine._drafter._context):
                context.logits()[0] = np.nan
            engine.submit(Request("import os", max_tokens=20, policy=policy))
            for _ in range(5):
                engine.step()
            for context in (engine._target, engine._drafter._context):
                assert np.isnan(context.logits()[0, :100]).all() == stays, arm


@pytest.mark.parametrize("whole", [True, False])
def test_refused_draft_sampler(start, monkeypatch, caplog, tmp_path, whole):
    """Where llama.cpp refuses the drafter's chain, whole or from its second sampler on, the engine says so once, drafts
    on the host, and the trace says what was done."""
    monkeypatch.setattr(
        drafter, "draft_chain", lambda n: sampling._chain([] if whole else [llama.llama_sampler_init_top_k(10), xtc()])
    )
    caplog.set_level(logging.INFO, "tracekit.engine")
    policy = parse_one("static:n_max=4")
    with start("drafts", 2, trace=tmp_path / "t.duckdb") as engine:
        assert engine.settings.spec_draft_backend_sampling is False
        fell_back = engine.generate("def main(", max_tokens=20, policy=policy)
    assert sum("the device does not run the drafter's sampler" in m for m in caplog.messages) == 1
    assert recorded(tmp_path / "t.duckdb")["spec_draft_backend_sampling"] is False
    with start("host", 2) as engine:
        assert engine.generate("def main(", max_tokens=20, policy=policy).rounds == fell_back.rounds


def test_refused_target_sampler(start, monkeypatch, caplog, tmp_path):
    """The same for the target's: sampled on the host, logged once, recorded."""
    drawing = sampling._drawing
    monkeypatch.setattr(sampling, "_drawing", lambda s: [xtc(), *drawing(s)])
    caplog.set_level(logging.INFO, "tracekit.engine")
    with start("target", trace=tmp_path / "t.duckdb") as engine:
        assert engine.settings.backend_sampling is False
        tokens = engine.generate("def main(", max_tokens=20, policy=parse_one("static:n_max=4")).tokens
    assert sum("the device does not run the target's samplers" in m for m in caplog.messages) == 1
    assert recorded(tmp_path / "t.duckdb")["backend_sampling"] is False
    with start("host") as engine:
        assert engine.generate("def main(", max_tokens=20).tokens == tokens


def test_default_is_llama_cpps_beside_a_gpu(models, settings):
    """Left open, drafts are picked on the device where the output layer is on a GPU, and nowhere without MTP."""
    with Engine(models["plain"], settings=replace(settings, threads=1)) as engine:
        assert engine.settings.spec_draft_backend_sampling == lib.has_gpu()
        assert engine.settings.backend_sampling is False
    with Engine(models["plain"], settings=replace(settings, threads=1, **ARMS["both"]), mtp=False) as engine:
        assert engine.settings.spec_draft_backend_sampling is False
        assert engine.settings.backend_sampling is True


def test_on_the_command_line(models, tmp_path):
    """The flags, llama.cpp's own, reach the engine and the trace; one that would change nothing is refused."""
    flags = ["--spec-draft-backend-sampling", "--backend-sampling"]
    common = ["generate", models["plain"], "import os", "--max-tokens", "12", "--json", "--threads", "1"]
    plain = tracekit(*common, "--policy", "static:n_max=3")
    both = tracekit(*common, "--policy", "static:n_max=3", *flags, "--trace", tmp_path / "t.duckdb")
    assert json.loads(both.stdout)["tokens"] == json.loads(plain.stdout)["tokens"]
    assert recorded(tmp_path / "t.duckdb") == ARMS["both"]
    assert "policy off drafts nothing" in tracekit(*common, flags[0], code=2).stderr
