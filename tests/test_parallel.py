"""Several slots: the lockstep simulator makes the engine's steps, its prices are found again, and live agrees."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import duckdb
import llama_cpp
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from scipy.stats import norm
from scipy.stats import t as student

import tracekit
from tracekit.engine import Engine, Probe, lib
from tracekit.engine.record import record
from tracekit.errors import TracekitError
from tracekit.policy.spec import parse, parse_one
from tracekit.replay import kernel, link, lockstep, lockstep_costs, simulate
from tracekit.replay.arrays import positions
from tracekit.replay.league import Interval, League
from tracekit.replay.serving import Serving
from tracekit.testing import random_positions
from tracekit.trace.store import open_trace
from tracekit.verify import Arm, _Drawn, _judge, _shares_us, verify

from . import hybrid
from .conftest import N_MAX, POLICIES, requests
from .test_cli import tracekit as cli
from .test_replay import POLICIES as SWEPT

N_SLOTS = 3
H200 = Path(__file__).parent.parent / "traces" / "h200"
SAME = ("STEPS", "VERIFICATIONS", "DRAFTED", "ACCEPTED", "TOKENS", "TRIPS", "INEXACT")


@pytest.fixture(scope="module", params=["attention", "attention, one", "recurrent", "recurrent, one"])
def memory(request):
    """What memory a model has, and whether it is one for all slots."""
    kind, *one = request.param.split(", ")
    return kind, bool(one)


@pytest.fixture(scope="module")
def model(memory, models, tmp_path_factory):
    """The reference model, or a small one with a recurrent memory."""
    if memory[0] == "attention":
        return models["plain"]
    return hybrid.write(tmp_path_factory.mktemp("models") / "hybrid.gguf")


@pytest.fixture(scope="module")
def several(memory, model, settings, tmp_path_factory):
    """Settings of several slots, and a probe recorded with them; their prompts are read in chunks beside generation."""
    n_slots = 2 if memory[0] == "recurrent" else N_SLOTS
    chosen = replace(settings, n_slots=n_slots, n_batch=64, n_ubatch=64, kv_unified=memory[1])
    path = tmp_path_factory.mktemp("several") / "probe.duckdb"
    with Engine(model, settings=chosen, trace=path, probe=Probe(N_MAX, seed=1)) as engine:
        record(engine, requests(per_category=2), baseline=True)
    return chosen, path


@examples(max_examples=15)
@given(st.integers(0, 10**6), st.booleans())
def test_one_slot_in_lockstep_is_the_walk(seed, probe):
    """The two simulators share no step: with one slot they count the same, request by request, round by round."""
    p = random_positions(random.Random(seed), 8, 8, probe)
    walked = simulate.counts(SWEPT, p)
    for policy, counted in zip(SWEPT, walked, strict=True):
        out, rounds = np.zeros((1, p.n_requests, lockstep.N_COUNTS)), np.zeros((len(p.match), 2), np.int16)
        rows, shared = simulate.rows_of([policy]), np.array([policy.scope == "engine"])
        run = link.compiled(policy.rule, lockstep)
        run(rows, shared, (1, 512, 512, False, -1, 99), simulate.arrays_of(p), out, rounds)
        for name in SAME:
            index = getattr(kernel, name)
            assert (out[0, :, index] == counted[:, index]).all(), (policy, name)
        for first, steps in zip(p.first, simulate.rounds(policy, p), strict=True):
            assert [tuple(r) for r in rounds[first : first + len(steps)]] == steps


@examples(max_examples=5)
@given(st.integers(0, 10**6), st.integers(1, 5), st.booleans(), st.sampled_from([-1, 0, 9]))
def test_compiled_equals_interpreted_in_lockstep(seed, n_slots, unified, tail):
    """The compiled lockstep walk counts exactly what the interpreted twin counts."""
    p = random_positions(random.Random(seed), 8, 8)
    for policy in SWEPT:
        found = []
        for run in (link.compiled(policy.rule, lockstep), link.interpreted(policy.rule, lockstep).run):
            out = np.zeros((1, p.n_requests, lockstep.N_COUNTS))
            sizes = (n_slots, 48, 48, unified, tail, 5)
            run(
                simulate.rows_of([policy]), np.array([policy.scope == "engine"]), sizes, simulate.arrays_of(p), out,
                np.zeros((0, 2), np.int16),
            )  # fmt: skip  # what is run, then where to
            found.append(out)
        assert (found[0] == found[1]).all(), policy


@pytest.mark.parametrize(
    ("rows", "unified", "tail", "passes"),
    [
        ([9, 9, 9, 9], False, -1, [(36, 4)]),
        ([9, 1, 1, 1], False, -1, [(4, 4), (8, 1)]),
        ([9, 3, 0, 1], False, -1, [(6, 2), (6, 1), (1, 1)]),
        ([0, 2, 2, 0], False, -1, [(4, 2)]),
        ([9, 1, 1, 1], True, -1, [(12, 1)]),
        ([40, 40, 0, 0], True, -1, [(64, 1), (16, 1)]),
        ([40, 40, 0, 0], False, -1, [(64, 2), (16, 2)]),
        ([9, 1, 1, 1], False, 9, [(9, 1), (3, 3)]),
        ([1, 1, 9, 1], False, 9, [(2, 2), (9, 1), (1, 1)]),
        ([1, 1, 9, 1], True, 9, [(2, 1), (9, 1), (1, 1)]),
        ([3, 0, 3, 3], True, 9, [(9, 1)]),
        ([3, 0, 3, 3], False, 9, [(3, 1), (6, 2)]),
        ([9, 3, 0, 1], True, 0, [(3, 1), (4, 1), (6, 1)]),
    ],
)
def test_passes_over_the_weights(rows, unified, tail, passes):
    """A batch is split into passes as llama.cpp splits it: by hand from src/llama-batch.cpp. Where attention does not
    take rows together the tokens that they read are counted.
    """
    counts, past = np.zeros(lockstep.N_COUNTS), np.array([10, 20, 30, 40])
    lockstep.book_target(counts, np.array(rows), past, 0, 0, 64, unified, tail, True, lockstep.NOTHING)
    assert counts[lockstep.BATCHES] == len(passes)
    wide = [n > 16 for n, _ in passes]
    assert counts[lockstep.BATCHES_NARROW] == counts[lockstep.RESHAPES] == len(wide) - sum(wide)
    assert counts[lockstep.RESHAPES_WIDE] == sum(wide)
    assert counts[lockstep.ROWS_MTP] == counts[lockstep.OUTPUTS] == sum(n for n, _ in passes)
    tiled = [n >= 64 * memories for n, memories in passes]
    cells = [256 * memories for _, memories in passes]
    assert counts[lockstep.KV_TILED] == sum(c for c, together in zip(cells, tiled, strict=True) if together)
    assert counts[lockstep.KV] + counts[lockstep.KV_TILED] == sum(cells)
    assert counts[lockstep.PAST_ROWS] == (0 if any(tiled) else np.array(rows) @ past)
    stretches = np.diff([*lockstep.KNOTS, 10**6])
    filled = sum(np.clip(n - lockstep.KNOTS, 0, stretches) for n, _ in passes)
    assert (counts[lockstep.ROWS : lockstep.DRAFT_ROWS] == filled).all()


@pytest.mark.parametrize("mtp", [True, False], ids=["drafting", "without MTP"])
def test_passes_are_those_that_llama_cpp_makes(several, model, monkeypatch, mtp):
    """What llama.cpp logs of every batch, slots drafting unequal lengths in any order, is what the simulator counts."""
    chosen, path = several
    tail = Serving.of(open_trace(path)).tail if mtp else 0 if model.name == "hybrid.gguf" else -1
    monkeypatch.setenv("LLAMA_BATCH_DEBUG", "1")  # read when a context is made
    found, taken = [], []
    monkeypatch.setattr(lockstep, "book_pass", lambda _counts, rows, *_: taken.append(int(rows)))
    lengths = ["static:n_max=6", "static:n_max=1", "static:n_max=6,p_min=0.4", "fallback:n_max=3", "off"]
    chosen = replace(chosen, n_batch=512, n_ubatch=512)
    with Engine(model, settings=chosen, mtp=mtp) as engine, lib.listening() as heard:
        loop = engine._loop
        decode = loop.target.decode

        def overheard(batch):
            heard.clear()
            decode(batch)
            _whole, *passes = [int(line.split("=")[1]) for line in heard if " n_tokens     = " in line]
            if all(slot is None or slot.generating for slot in loop.slots):
                found.append(([0 if s is None else s.n_rows for s in loop.slots], passes))

        monkeypatch.setattr(loop.target, "decode", overheard)
        wanted = requests(per_category=2)
        policies = [lengths[i % len(lengths)] if mtp else None for i in range(len(wanted))]
        list(engine.run([replace(r, policy=p) for r, p in zip(wanted, policies, strict=True)]))
    assert len(found) > 50
    for rows, passes in found:
        taken.clear()
        counts, past = np.zeros(lockstep.N_COUNTS), np.zeros(chosen.n_slots, int)
        lockstep.book_target(counts, np.array(rows), past, 0, 0, 512, chosen.kv_unified, tail, mtp, lockstep.NOTHING)
        assert taken == passes, rows
    assert mtp == any(len({*rows} - {0}) > 1 for rows, _ in found)


def test_steps_equal_the_live_engines(several, model, tmp_path):
    """For every policy: each request's (drafted, accepted) and everything that is counted of the run's steps equal what
    the live engine did and recorded, with chunks of prompts beside generation, states that slots share, and a request
    that ends with its first token.
    """
    chosen, path = several
    trace = open_trace(path)
    wanted = requests(per_category=2)
    p = positions(trace, shortest=1).queued([r.prompt_id for r in wanted])
    assert p.n_requests == len(wanted)
    wanted[2] = replace(wanted[2], max_tokens=1)
    p.n_generated[2] = p.max_tokens[2] = 1
    serving = Serving.of(trace)
    tail = N_MAX + 1 if model.name == "hybrid.gguf" else -1
    assert serving == Serving(chosen.n_slots, 64, 64, chosen.kv_unified, tail=tail)
    for i, text in enumerate((*POLICIES, "by_slots:n_max=6,max_slots=1,n_crowded=2")):
        policy = parse_one(text)
        live = tmp_path / f"live-{i}.duckdb"
        with Engine(model, policy, chosen, trace=live) as engine:
            done = {c.request.prompt_id: c for c in engine.run(wanted)}
        for prompt_id, rounds in zip(p.prompt_ids, serving.rounds(policy, p), strict=True):
            assert done[prompt_id].rounds == rounds, (text, prompt_id)
        walked = serving.counts([policy], p)[0].sum(0)
        recorded = lockstep_costs.recorded_counts(open_trace(live), serving.sizes).sum(0)
        same = np.r_[lockstep.HOST : lockstep.N_COUNTS]
        if "resume" in text:  # a trace does not tell how many rows went ahead of a draft that did not fit
            same = np.setdiff1d(same, [lockstep.AHEADS, lockstep.AHEAD_ROWS, lockstep.KV_AHEAD])
        assert np.allclose(walked[same], recorded[same]), (text, np.flatnonzero(~np.isclose(walked, recorded)))


def test_drafting_reads_what_the_mtp_context_holds(several, model, tmp_path):
    """What llama.cpp says the drafter's memory holds of the slots that generate, some of which have tripped and left
    it, is what the trace's drafts are priced by.
    """
    chosen, path = several
    lengths, held = ["fallback:n_max=6", "static:n_max=2", "off", "fallback:n_max=4,zero_trip=false,min_ratio=0.4"], {}
    wanted = [replace(r, policy=lengths[i % 4]) for i, r in enumerate(requests(per_category=2))]
    live = tmp_path / "live.duckdb"
    with Engine(model, settings=chosen, trace=live) as engine:
        loop, memory, draft = engine._loop, engine._drafter._context._memory, engine._drafter.draft

        def watched(asks, probs):
            draft(asks, probs)
            slots = [slot.index for slot in loop.active if slot.generating]
            held[loop._n_step] = sum(max(llama_cpp.llama_memory_seq_pos_max(memory, s), 0) for s in slots)

        engine._drafter.draft = watched
        list(engine.run(wanted))
    frame, slots = lockstep_costs._read(open_trace(live), chosen.n_slots)
    told = slots.group_by("step").agg(pl.col("held", "past").sum()).filter(pl.col("step").is_in(list(held)))
    assert dict(told.select("step", "held").rows()) == held
    assert (told["held"] < told["past"]).sum() > 20
    counts = lockstep_costs.recorded_counts(open_trace(live), Serving.of(open_trace(path)).sizes)
    cells = [kernel.n_kv(held.get(step, 0)) for step in frame["step"]]
    assert (counts[:, lockstep.KV_DRAFT] == frame["n_draft_decodes"].to_numpy() * cells).all()


def test_other_slots_than_recorded_are_to_be_recorded():
    """A trace of four slots has a baseline of four: what is missing for three is a recording of three."""
    four = open_trace(H200 / "8b-aligned-4-slots.duckdb")
    with pytest.raises(TracekitError, match=r"3 slots.*; record with --parallel 3"):
        League.of(four, n_slots=3)


def test_shares_add_up(several):
    """Every step belongs to somebody: the shares of the requests are the steps of the run."""
    p = positions(open_trace(several[1]))
    counts = Serving.of(open_trace(several[1])).counts(parse("off,static:n_max=4"), p)
    assert np.allclose(counts[:, :, lockstep.HOST].sum(1), np.round(counts[:, :, lockstep.HOST].sum(1)))
    assert (counts[:, :, lockstep.HOST_TOKENS].sum(1) == (p.n_generated - 1).sum()).all()
    assert (counts[0, :, lockstep.HOST_MTP] == 0).all()  # off is no MTP


def test_prices_are_found_again(several):
    """Times made from known prices give these times back, also under policies that were not recorded."""
    trace = open_trace(several[1])
    serving = Serving.of(trace)
    steps = lockstep_costs._Steps.read(trace, N_MAX, serving.sizes)
    rng = np.random.default_rng(0)
    prices = np.r_[np.zeros(lockstep.HOST), rng.uniform(10, 50, lockstep.N_COUNTS - lockstep.HOST)]
    prices[lockstep.KV : lockstep.KV_ROWS_TILED + 1] = rng.uniform(0, 0.01, 5)
    prices[lockstep.KV_DRAFT] = rng.uniform(0, 0.01)
    prices[lockstep.BATCHES_NARROW] = 0  # of a GPU
    prices = prices[steps.alike]
    made = {part: steps.counts[:, columns] @ prices[columns] for part, columns in lockstep_costs._PARTS.items()}
    steps = replace(steps, measured=made | {"wall": sum(made.values())})
    found = lockstep_costs._prices([g.sum(0) for g in steps.grams()], steps)
    assert np.allclose(steps.counts @ found, steps.wall, rtol=1e-3)
    policies = parse("off,static:n_max=1..6/1,fallback:n_max=6")
    p = positions(trace)
    times = serving.times(policies, p, found).sum(1), serving.times(policies, p, prices).sum(1)
    assert np.allclose(*times, rtol=0.01)


def test_kernels_of_wide_passes_have_prices_of_their_own():
    """On a GPU passes of more than sixteen rows take another kernel: cheaper once its graph is repeated, dearer until
    then. Times made from such prices are found again, and measured ones fitted.
    """
    trace = open_trace(H200 / "8b-aligned-4-slots.duckdb")
    steps = lockstep_costs._Steps.read(trace, 8, Serving.of(trace).sizes)
    names = "BATCHES", "BATCHES_NARROW", "RESHAPES", "RESHAPES_WIDE", "CAPTURES", "CAPTURES_WIDE"
    at, true = [getattr(lockstep, name) for name in names], [5000, 1000, 2000, 4000, 5000, 14000]
    made = replace(steps, measured=steps.measured | {"target": steps.counts[:, at] @ true})
    found, part = lockstep_costs._prices([g.sum(0) for g in made.grams()], made), lockstep_costs._PARTS["target"]
    assert steps.counts[:, part] @ found[part] == pytest.approx(made.measured["target"], rel=0.01)
    assert found[at[2:]] == pytest.approx(true[2:], rel=0.02)
    _, _, prices, _, ratio = lockstep_costs.fit_steps(steps)
    assert prices[lockstep.CAPTURES_WIDE] > 2 * prices[lockstep.CAPTURES]
    wide = (steps.frame["n_prompt"] == 0).to_numpy() & (steps.counts[:, lockstep.BATCHES_NARROW] == 0)
    again = wide & (steps.counts[:, [lockstep.RESHAPES_WIDE, lockstep.CAPTURES_WIDE]] == 0).all(1)
    assert again.sum() >= 10
    for some in (again, steps.counts[:, lockstep.CAPTURES_WIDE] > 0):
        assert np.median(ratio[some]) == pytest.approx(1, abs=0.05)


def test_a_processors_passes_are_of_one_kind(several):
    """However many rows they have."""
    trace = open_trace(several[1])
    steps = lockstep_costs._Steps.read(trace, N_MAX, Serving.of(trace).sizes)
    assert not steps.counts[:, lockstep.BATCHES_NARROW].any()
    assert not steps.counts[:, [lockstep.RESHAPES_WIDE, lockstep.CAPTURES_WIDE]].any()
    assert steps.alike[lockstep.RESHAPES_WIDE] == lockstep.RESHAPES


@pytest.mark.parametrize("by_tokens", [False, True])
def test_what_rows_read_is_found_out(several, by_tokens):
    """Whether a backend reads whole blocks of cells or the tokens in them is told from the times, and priced alone."""
    trace = open_trace(several[1])
    steps = lockstep_costs._Steps.read(trace, N_MAX, Serving.of(trace).sizes)
    read, other = lockstep.PAST_ROWS, lockstep.KV_ROWS
    if not by_tokens:
        read, other = other, read
    target = 300 + steps.counts[:, lockstep.BATCHES : lockstep.KV] @ np.full(lockstep.KV - lockstep.BATCHES, 10.0)
    target += 2 * steps.counts[:, read]
    target *= 1 + 0.02 * np.random.default_rng(0).standard_normal(len(target))
    made = steps.measured | {"target": target}
    made["wall"] = sum(made[part] for part in lockstep_costs._PARTS)
    chosen, _, prices, _, _ = lockstep_costs.fit_steps(replace(steps, measured=made))
    assert not chosen.counts[:, other].any()
    assert prices[read] == pytest.approx(2, rel=0.1)
    assert prices[other] == 0


def test_tune_over_several_slots(several, tmp_path):
    """Tuning works as with one slot, says over how many, and never recommends what it predicts to be slower."""
    trace = tracekit.open(several[1])
    table = trace.replay("off,static:n_max=2,4")
    n_slots = several[0].n_slots
    assert (table["n_slots"] == n_slots).all()
    snapshots = Serving.of(trace.file).tail > 0
    assert (table["speedup"][0] == 1) == (not snapshots)  # with them off is not no MTP
    assert table["amplification"][0] == 1
    assert table["regret"].is_null().all()
    best = trace.tune(space={"static": {"n_max": "1..6/1"}})
    assert f"over {n_slots} slots" in best.evidence.advice
    assert best.evidence.n_slots == n_slots
    assert best.evidence.speedup >= 1
    best.save(tmp_path / "policy.toml")


def test_shares_of_completions(engine, models, several):
    """Measured shares add up to the time from the first request's start to the last one's end."""
    with Engine(models["plain"], settings=several[0]) as fresh:
        done = list(fresh.run([replace(r, max_tokens=8) for r in requests()]))
    start = min(d.ended_ns / 1000 - d.prompt_us - d.catchup_us - d.generate_us for d in done)
    whole = max(d.ended_ns for d in done) / 1000 - start
    assert _shares_us(done).sum() == pytest.approx(whole, rel=0.01)
    assert (_shares_us(done) > 0).all()


def test_what_was_not_measured_is_refused(several, probe_traces):
    """Costs of more slots than were ever active, or without the baseline, are an error that says what to record."""
    single, some, n_slots = open_trace(probe_traces[0.0]), open_trace(several[1]), several[0].n_slots
    with pytest.raises(TracekitError, match="--parallel 4"):
        League.of(single, n_slots=4)
    with pytest.raises(TracekitError, match="--parallel 4"):
        League.of(some, n_slots=4)
    with pytest.raises(TracekitError, match="1 or more"):
        League.of(some, n_slots=0)
    assert League.of(single, some, n_slots).table(parse("static:n_max=2"))["tokens_per_second"][0] > 0


@pytest.mark.parametrize("n_slots", [1, 3])
def test_one_stretch_of_time_has_an_interval_and_a_warning(models, settings, tmp_path, n_slots):
    """Costs of a single wave, or prompt, do not claim to be exact; that drift is not in their intervals is said."""
    path = tmp_path / "t.duckdb"
    chosen = replace(settings, n_slots=n_slots)
    with Engine(models["plain"], settings=chosen, trace=path, probe=Probe(N_MAX, seed=1)) as engine:
        record(engine, [replace(r, max_tokens=120) for r in requests()][:: 1 if n_slots > 1 else 5], baseline=True)
    league = League.of(open_trace(path))
    assert league.cost.n_blocks == 1
    assert "how much the machine drifts" in league.warning
    speed = league.speed_of_these(parse_one("static:n_max=2"))
    assert speed.low < speed.value < speed.high


def test_costs_of_other_batches_are_a_warning(models, settings, several, tmp_path):
    """A trace priced by one whose batches are made otherwise says so; verify refuses such times."""
    chosen = several[0]
    assert League.of(open_trace(several[1])).warning == ""
    other = tmp_path / "other.duckdb"
    shutil.copy(several[1], other)
    changed = json.dumps(json.loads(open_trace(other).runs["settings"][0]) | {"n_ubatch": 32})
    with duckdb.connect(str(other)) as con:
        con.execute("UPDATE runs SET settings = ?", [changed])
    assert "n_ubatch 32 and not 64" in League.of(open_trace(several[1]), open_trace(other)).warning
    with pytest.raises(TracekitError, match="n_ubatch 32 and not 64"):
        verify(models["plain"], [], requests(), chosen, times=open_trace(other))


def test_what_is_served_together_shares_the_machines_moods():
    """Three waves of eight, one repeat of each a tenth slower: a request's own spread averages out, a wave's does not,
    and of so few Student's t says how far off they are. Arms share the draws, and what is not repeated has no interval.
    """
    slow = np.array([1.0, 1.1, 1.0])
    times = 100.0 * np.tile(slow, (24, 1))
    alone, waves = (_Drawn.of(times, together) for together in (np.arange(24), np.arange(24) // 8))
    assert alone.us == waves.us == 2400
    assert alone.wider == pytest.approx(1.5**0.5 * student.ppf(0.975, 48) / norm.ppf(0.975))
    assert waves.wider == pytest.approx(1.5**0.5 * student.ppf(0.975, 6) / norm.ppf(0.975))
    reach = [np.log(i.high / i.low) for i in (alone.speed(1), waves.speed(1))]
    assert reach[1] > 1.5 * reach[0]
    assert waves.speed(1).low < waves.speed(1).value == 1e6 / 2400
    same = waves.speedup(_Drawn.of(2 * times, np.arange(24) // 8))
    assert (same.low, same.value, same.high) == pytest.approx((2, 2, 2))
    assert _Drawn.of(times[:, :1], np.arange(24)).speed(1) == Interval(1e6 / 2400, None, None)


def test_waves_are_probed_as_often_as_they_are_run(models, settings, monkeypatch, tmp_path):
    """Of several slots there are few waves, each probed in every repeat, and every time a stretch of its own; on one
    slot every prompt is probed once, as are waves whose times are another trace's.
    """
    turns, blocks = [], []

    def counted(*of, turn, **more):
        turns.append(turn)
        return record(*of, turn=turn, **more)

    def judged(league, *of):
        blocks.append(league.cost.n_blocks)
        return _judge(league, *of)

    monkeypatch.setattr("tracekit.verify.record", counted)
    monkeypatch.setattr("tracekit.verify._judge", judged)
    arms = [Arm("no MTP", None), Arm("two", parse_one("static:n_max=2"))]
    wanted = [replace(r, max_tokens=60) for r in requests(per_category=1)]
    for n_slots, n in ((1, len(wanted)), (2, 2 * -(-len(wanted) // 4))):
        turns.clear()
        verdict = verify(models["plain"], arms, wanted, replace(settings, n_slots=n_slots), repeats=2)
        assert turns == list(range(n))
        assert blocks.pop() == n
        assert verdict.arms["equal_requests"][0] == len(wanted)
    turns.clear()
    times = tmp_path / "times.duckdb"
    chosen = replace(settings, n_slots=2)
    with Engine(models["plain"], settings=chosen, trace=times, probe=Probe(N_MAX, seed=1)) as engine:
        record(engine, wanted, baseline=True)
    verify(models["plain"], arms, wanted, chosen, times=open_trace(times), repeats=2)
    assert turns == list(range(-(-len(wanted) // 4)))


def test_verify_over_several_slots(models):
    """`verify --parallel` serves all prompts at once, makes the predicted steps and the tokens without MTP."""
    found = cli(  # in a process of its own
        "verify", models["plain"], "static:n_max=3", "--parallel", "2", "--kv-unified", "--max-tokens", "16",
        "--repeats", "1", "--n-max", "4", "--ctx-size", "512", "--cache-type-k", "f32", "--cache-type-v", "f32",
        "--flash-attn", "off", "--json",
    )  # fmt: skip  # option and value
    verdict = json.loads(found.stdout)
    assert verdict["lossless"]
    for arm in verdict["arms"]:
        assert arm["equal_requests"] == arm["n_requests"], arm["arm"]
        assert min(arm["predicted"], arm["measured"]) > 0
