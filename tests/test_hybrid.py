"""Recurrent memories, as in Qwen 3.5: rejected drafts are taken back through snapshots of the state."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from itertools import pairwise

import pytest

from tracekit.engine import Engine, Probe, Request, lib
from tracekit.engine.calibrate import Plan, Sweep, calibrate
from tracekit.engine.doctor import examine
from tracekit.engine.model import sha256_of
from tracekit.engine.record import record
from tracekit.errors import TracekitError
from tracekit.policy.spec import parse, parse_one
from tracekit.replay import kernel
from tracekit.replay.arrays import positions
from tracekit.replay.league import League
from tracekit.replay.serving import Serving
from tracekit.report import surface
from tracekit.report.stats import summarise
from tracekit.trace.store import open_trace

from . import hybrid
from .conftest import N_MAX, POLICIES, requests


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small ``qwen35``."""
    return hybrid.write(tmp_path_factory.mktemp("models") / "hybrid.gguf")


@pytest.fixture(scope="module")
def plain(model, settings):
    """What the model says without MTP, by prompt: tokens."""
    with Engine(model, settings=settings, mtp=False) as engine:
        return {c.request.prompt_id: c.tokens for c in engine.run(requests())}


def test_doctor_knows_snapshots(model, models):
    """A hybrid model is told from one with attention only, and both work."""
    assert examine(model)["memory"] == "snapshot"
    assert examine(models["plain"])["memory"] == "partial"
    assert examine(model)["verdict"] == "MTP drafting works with this model"


def test_what_was_read_long_before_matters(plain):
    """The memory is no ornament: the same last token is followed by several others."""
    following: dict[int, set[int]] = {}
    for tokens in plain.values():
        for last, token in pairwise(tokens):
            following.setdefault(last, set()).add(token)
    assert sum(len(each) > 1 for each in following.values()) >= 10


@pytest.mark.parametrize(("n_slots", "kv_unified"), [(1, False), (2, False), (2, True)])
def test_drafting_changes_no_token(model, settings, plain, n_slots, kv_unified):
    """Under every policy, on one slot and on several that draft beside each other, tokens are those without MTP; drafts
    are accepted and rejected.
    """
    with Engine(model, settings=replace(settings, n_slots=n_slots, kv_unified=kv_unified)) as engine:
        for text in POLICIES:
            done = list(engine.run([replace(r, policy=text) for r in requests()]))
            assert {c.request.prompt_id: c.tokens for c in done} == plain, text
            if text == "static:n_max=6":
                drafted, accepted = (sum(getattr(c, what) for c in done) for what in ("drafted", "accepted"))
                assert 50 < accepted < drafted - 50


def test_replay_is_live(model, settings, plain, tmp_path):
    """A probe, which goes back after every token, answers every policy step for step."""
    path = tmp_path / "probe.duckdb"
    with Engine(model, settings=settings, trace=path, probe=Probe(N_MAX, seed=1)) as engine:
        done = record(engine, requests(), baseline=True)
    assert {c.request.prompt_id: c.tokens for c in done} == plain
    trace = open_trace(path)
    p = positions(trace)
    wanted = sorted(requests(), key=lambda r: p.prompt_ids.index(r.prompt_id))  # as recorded
    with Engine(model, settings=settings) as engine:
        for text in POLICIES:
            live = {c.request.prompt_id: c.rounds for c in engine.run([replace(r, policy=text) for r in wanted])}
            for prompt_id, rounds in zip(p.prompt_ids, Serving.of(trace).rounds(parse_one(text), p), strict=True):
                assert live[prompt_id] == rounds, (text, prompt_id)
    assert Serving.of(trace).tail == N_MAX + 1
    names = summarise(trace).baselines["baseline"].to_list()
    assert names[:3] == ["no MTP", "off, MTP loaded", "MTP idle"]
    assert League.of(trace).cost.prices[kernel.BARE] != 0  # no MTP takes no snapshots: a price of its own


def test_a_model_in_shards_is_one_model(model, settings, plain, tmp_path):
    """Its NextN block lies in the last shard and is found; its hash is of all shards; a missing one is one line."""
    hybrid.write(tmp_path / "m.gguf", split=25)
    first, *_, last = sorted(tmp_path.iterdir())
    assert last.name.endswith(f"-of-{last.name[-10:-5]}.gguf")
    assert not any(".nextn." in name for name in lib.tensor_names(first))
    with Engine(first, "static:n_max=3", settings) as engine:
        done = {c.request.prompt_id: c.tokens for c in engine.run(requests())}
    assert done == plain
    before = sha256_of(first)
    with last.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    assert sha256_of(first) != before
    last.unlink()
    with pytest.raises(TracekitError, match="llama.cpp cannot load it"):
        Engine(first, settings=settings)


def test_batches_that_would_abort_llama_cpp_are_refused(model, settings):
    """A batch that cannot hold the rows of a snapshot is one line, not the end of the process."""
    for small in ({"n_ubatch": 8}, {"n_batch": 8}):
        with pytest.raises(TracekitError, match=r"must be more than n_max \+ 1, 8"):
            Engine(model, settings=replace(settings, n_max=7, **small))


def test_calibration_measures_the_baseline_without_snapshots(model, settings, plain, tmp_path):
    """A calibration prices such a model on one slot and on several: no MTP where no snapshots are taken, off where they
    are, and each draft length. Its plan knows every decode.
    """
    path, sweep, seen = tmp_path / "costs.duckdb", Sweep(N_MAX, seed=1), []
    plan = Plan(slots=(1, 2), contexts=(64, 200), n_max=N_MAX, steps=4, blocks=3)
    wanted = replace(settings, n_slots=2, n_ctx=plan.n_ctx(512))
    with Engine(model, settings=wanted, trace=path, probe=sweep) as engine:
        calibrate(engine, sweep, plan, progress=lambda done, total: seen.append((done, total)))
        assert engine.idle
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    trace = open_trace(path)
    assert trace.frame("SELECT count(*) AS n FROM steps")["n"][0] == len(seen)
    cells = surface.surface(trace)
    for part in (surface.NO_MTP, surface.LOADED):
        for slots, context in itertools.product(plan.slots, plan.contexts):
            n = cells.filter(part=part, slots=slots, context=context)["n"].sum()
            assert n >= plan.blocks * (plan.n_plain - 1), (part, slots, context)
    assert "off, MTP loaded" in [column.header for column in surface.surface_tables(cells)[0].columns]
    probe = tmp_path / "probe.duckdb"
    with Engine(model, settings=settings, trace=probe, probe=Probe(N_MAX, seed=1)) as engine:
        record(engine, requests(), baseline=False)
    for n_slots in plan.slots:
        table = League.of(open_trace(probe), trace, n_slots).table(parse("off,static:n_max=1..6/1"))
        assert (table["tokens_per_second"] > 0).all()


def test_slots_whose_states_llama_cpp_would_mix_up_are_refused(model, settings):
    """More than two slots, with drafts, are one line; without MTP they work."""
    for kv_unified in (False, True):
        three = replace(settings, n_slots=3, kv_unified=kv_unified)
        with pytest.raises(TracekitError, match="give --parallel 2 or less"):
            Engine(model, settings=three)
        with Engine(model, settings=three, mtp=False) as engine:
            assert engine.generate("import", max_tokens=4).tokens


@pytest.mark.parametrize("kv_unified", [False, True])
def test_two_slots_that_are_filled_again_and_again_keep_their_states(model, settings, kv_unified):
    """Requests of a few tokens, some drafting and some not, leave slots and states in every order: with three slots
    some of such runs gave other tokens.
    """
    rng = random.Random(5)
    short = [
        Request([rng.randrange(1, 2048) for _ in range(rng.choice((1, 2)))], rng.choice((1, 2, 3, 5, 8, 12)))
        for _ in range(120)
    ]
    short = [replace(r, prompt_id=str(i), policy=rng.choice(("static:n_max=4", "off"))) for i, r in enumerate(short)]
    with Engine(model, settings=settings, mtp=False) as engine:
        wanted = [engine.generate(r.prompt, max_tokens=r.max_tokens).tokens for r in short]
    with Engine(model, settings=replace(settings, n_slots=2, kv_unified=kv_unified)) as engine:
        done = {c.request.prompt_id: c.tokens for c in engine.run(short)}
    assert [done[r.prompt_id] for r in short] == wanted


def test_without_mtp_no_snapshots_are_taken(model, settings, plain):
    """The baseline is what a server without MTP does: another context, the same tokens; and back again."""
    with Engine(model, settings=settings) as engine:
        for mtp in (False, True, False, True):
            engine.set_arm(mtp=mtp)
            assert (engine._loop.target.n_snapshots > 0) == mtp
            done = engine.run([replace(r, policy="static:n_max=4" if mtp else "off") for r in requests()])
            assert {c.request.prompt_id: c.tokens for c in done} == plain
