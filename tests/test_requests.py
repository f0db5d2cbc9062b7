"""Requests that share an engine: each gets what is its own, however it or another one ends."""

from __future__ import annotations

import gc
import threading
from dataclasses import replace

import pytest

from tracekit.engine import Engine, Probe, Request
from tracekit.errors import TracekitError
from tracekit.policy.rule import rule
from tracekit.policy.spec import parse_one
from tracekit.trace.store import open_trace


@pytest.fixture(scope="module")
def two(models, settings):
    """An engine with two slots in one memory."""
    wanted = replace(settings, n_slots=2, kv_unified=True, threads=1)
    with Engine(models["plain"], "static:n_max=1", wanted) as engine:
        yield engine


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_engine_goes_on_after_a_failed_step(two, monkeypatch, error):
    """Whatever is raised after a step's decode: every request is dropped, and later ones are served right."""
    wanted = two.generate("def f(x):\n", max_tokens=20).tokens
    for name in ("_verify", "_learn"):
        two.submit(Request("import os\n", max_tokens=50))
        stream = two.stream("class A:\n", max_tokens=50)
        next(stream)
        two.submit(Request("waiting", max_tokens=8))
        real, calls = getattr(two._loop, name), []

        def broken(slot, real=real, calls=calls):
            calls.append(slot)
            if len(calls) == 6:
                raise error
            real(slot)

        monkeypatch.setattr(two._loop, name, broken)
        with pytest.raises(error):
            two.generate("def f(x):\n", max_tokens=20, policy="static:n_max=3")
        monkeypatch.undo()
        assert two.idle
        with pytest.raises(TracekitError, match="dropped"):
            next(stream)
        assert two.generate("def f(x):\n", max_tokens=20, policy="static:n_max=3").tokens == wanted
        assert two.step() == []


def test_everyone_gets_his_own_completions(two):
    """Requests submitted by hand, streamed, run and generated at once: each is returned once, to who asked."""
    by_hand = two.submit(Request("import os\n", max_tokens=3))
    stream = two.stream("class A:\n", max_tokens=4)
    parts = [next(stream)]
    run = two.run([Request(p, 3, prompt_id=p) for p in ("x = 1", "y = 2", "z = 3")])
    assert next(run).request.prompt_id == "x = 1"
    assert two.generate("def main(", max_tokens=9).request.prompt == "def main("
    *others, done = stream
    assert "".join(parts + others) == done.text
    assert sorted(d.request.prompt_id for d in run) == ["y = 2", "z = 3"]
    assert not two.idle
    assert [d.number for d in two.step()] == [by_hand]
    assert two.idle


def test_who_leaves_early_takes_his_requests_along(two):
    """An iterator that is closed, or whose next request is refused, cancels its own requests and no others."""
    number = two.submit(Request("import os\n", max_tokens=30))
    run = two.run([Request("class A:\n", 2)] + [Request("import sys\n", 30)] * 3)
    next(run)
    run.close()
    with pytest.raises(TracekitError, match="empty"):
        list(two.run([Request("x", 5), Request("")]))
    assert [s.number for s in two._loop.slots if s is not None] == [number]
    assert not two._loop.queue
    two.cancel(number)
    assert two.idle


def test_cancelled_stream_ends(engine):
    """A stream cancelled by its number ends with what was generated; in the queue, with one clear line."""
    stream = engine.stream("import os\n", max_tokens=50)
    text = next(stream)
    late = engine._serve([Request("import sys\n")])
    assert next(late) == [], "it waits in the queue"
    waiting = engine._loop.queue[0].number
    assert engine.cancel(engine._loop.slots[0].number).stop == "cancelled"
    *rest, done = stream
    assert text + "".join(rest) == done.text
    assert done.stop == "cancelled"
    assert engine.cancel(waiting) is None
    with pytest.raises(TracekitError, match="cancelled in the queue"):
        next(late)


def test_threads_share_an_engine(two):
    """Generating from several threads gives each its own text."""
    prompts = ["import os\n", "class A:\n", "def f(x):\n"]
    wanted, found = {p: two.generate(p, max_tokens=20).tokens for p in prompts}, {}

    def generate(prompt):
        found[prompt] = [two.generate(prompt, max_tokens=20, policy="static:n_max=2").tokens for _ in range(3)]

    threads = [threading.Thread(target=generate, args=(p,)) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {p: [tokens] * 3 for p, tokens in wanted.items()}


def test_closed_engine_says_so(models, settings):
    """Closing drops what is under way; whatever is asked of the engine afterwards is answered with one clear line."""
    engine = Engine(models["plain"], "static:n_max=2", settings)
    assert repr(engine) == "<Engine plain.gguf, static:n_max=2: 0 requests, 1 slots>"
    stream = engine.stream("import os\n", max_tokens=50)
    next(stream)
    number = engine.submit(Request("import os\n"))
    engine.close()
    engine.close()
    asks = (
        lambda: next(stream), engine.step, lambda: engine.generate("x"), lambda: engine.submit(Request("x")),
        engine.set_arm, lambda: list(engine.run([Request("x")])),
    )  # fmt: skip
    for ask in asks:
        with pytest.raises(TracekitError, match="the engine is closed"):
            ask()
    assert engine.cancel(number) is None
    assert engine.idle
    assert repr(engine) == "<Engine, closed>"


def test_forgotten_engine_finishes_its_trace(models, settings, tmp_path):
    """An engine that nobody closed is closed when nobody holds it any more: its trace is whole."""
    path = tmp_path / "t.duckdb"
    engine = Engine(models["plain"], settings=settings, trace=path)
    next(engine.stream("import os\n", max_tokens=8))
    del engine
    gc.collect()
    assert [p.name for p in tmp_path.iterdir()] == ["t.duckdb"]
    assert open_trace(path).frame("SELECT stop FROM request_ends")["stop"].to_list() == ["cancelled"]


def test_engine_forgotten_while_its_trace_is_written(models, settings, tmp_path):
    """Collected on the very thread that writes its trace, amid that: the trace is whole all the same."""
    path = tmp_path / "t.duckdb"
    engine = Engine(models["plain"], settings=settings, trace=path)
    engine.itself = engine  # so that the collector finds it, whoever calls that
    recorder, n_found = engine.recorder, []
    recorder._sensors = lambda *_: n_found.append(gc.collect()) or []
    gc.disable()
    try:
        engine.generate("import os\n", max_tokens=8)
        del engine
        recorder._thread.join(timeout=20)
    finally:
        gc.enable()
    for thread in threading.enumerate():
        if thread.name == "tracekit-recorder-end":
            thread.join(timeout=20)
    assert n_found
    assert [p.name for p in tmp_path.iterdir()] == ["t.duckdb"]
    assert open_trace(path).runs["wall_us"].is_not_null().all()
    assert open_trace(path).frame("SELECT n_generated FROM request_ends")["n_generated"].to_list() == [8]


def test_finished_slot_leaves_the_memory(two):
    """A slot's tokens are out of both memories when its request ends, however: attention reads what lies there."""
    from tracekit.engine.lib import llama

    prompt = "import os\n" * 40
    numbers = [two.submit(Request(prompt, n, policy=parse_one("static:n_max=2"))) for n in (2, 60)]
    while two.reading or not two.step():
        two.step()
    two.cancel(numbers[1])
    for context in (two._target, two._drafter._context):
        assert [llama.llama_memory_seq_pos_max(context._memory, i) for i in range(2)] == [-1, -1]


def test_rows_that_wait_are_given_back(two, tmp_path):
    """Hidden rows kept for drafts that may come go with the request, or once the policy says that none will."""
    path = tmp_path / "late.py"
    idle = "return 0 if now.n_generated < 150 else -1, 0.0"
    path.write_text(rule("static").source.replace("return params.n_max, params.p_min", idle))
    sizes = []
    two.submit(Request("def f(x):\n", max_tokens=180, ignore_eos=True, policy=path))
    while not two.idle:
        two.step()
        sizes.append(two._drafter._lags[0]._data.nbytes)
    assert max(sizes) > 2 * sizes[0]
    assert sizes[155] == sizes[0]
    two.submit(Request("def f(x):\n", max_tokens=140, ignore_eos=True, policy=path))
    while not two.idle:
        two.step()
    assert two._drafter._lags[0]._data.nbytes == sizes[0]


def test_cancelled_while_its_prompt_is_read(models, settings, tmp_path):
    """Cancelled before its first token, a request has a time that makes sense, and its trace can be read."""
    path = tmp_path / "t.duckdb"
    small = replace(settings, n_batch=16, n_ubatch=16)
    with Engine(models["plain"], settings=small, trace=path, probe=Probe(settings.n_max)) as engine:
        number = engine.submit(Request("import os\n" * 20))
        engine.step()
        done = engine.cancel(number)
        assert engine.recorder.failed == ""
    assert (done.tokens, done.generate_us, done.tokens_per_second) == ([], 0, 0.0)
    assert 0 < done.prompt_us < 60e6
    assert open_trace(path).frame("SELECT prompt_us FROM request_ends")["prompt_us"].to_list() == [done.prompt_us]


def test_probe_settles_what_a_cancelled_request_drafted(models, settings, tmp_path):
    """Every token of a cancelled probe is in the trace, also those whose drafts guessed beyond its end."""
    path, probe = tmp_path / "t.duckdb", Probe(settings.n_max)
    with Engine(models["plain"], settings=settings, trace=path, probe=probe) as engine:
        number = engine.submit(Request("import os\n", max_tokens=60))
        for _ in range(20):
            engine.step()
        done = engine.cancel(number)
        assert not probe._pending
    (tokens,) = open_trace(path).frame("SELECT flatten(list(tokens ORDER BY n_generated)) AS t FROM verifications")["t"]
    assert tokens.to_list() == done.tokens


def test_catching_up_unrecorded_leaves_nothing(models, settings, tmp_path):
    """Prompts caught up in runs that are not recorded do not count in the next recorded step."""
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], settings=settings, trace=path) as engine:
        engine.set_arm(recording=False)
        engine.generate("import os\n" * 20, max_tokens=3, policy="static:n_max=2")
        engine.set_arm(mtp=False)
        engine.generate("import os\n", max_tokens=3)
    assert open_trace(path).frame("SELECT sum(n_ahead) AS n FROM steps")["n"].to_list() == [0]


def test_one_stop_string_needs_no_tuple(engine):
    """``stop`` may be one string."""
    done = [engine.generate("def f(x):\n", max_tokens=40, stop=stop) for stop in ("ret", ("ret",), ["ret"])]
    assert done[0].text == done[1].text == done[2].text
    assert done[0].request.stop == ("ret",)
    with pytest.raises(TracekitError, match="stop None: a string, or several"):
        Request("x", stop=None)


def test_policies_are_taken_in_every_form(engine, tmp_path):
    """Text, a policy, a rule, a tuned policy, and the file of either: the same request."""
    from tracekit.policy.file import PolicyFile

    policy = rule("static")(n_max=2)
    path = PolicyFile(policy).save(tmp_path / "policy.toml")
    for given in ("static:n_max=2", policy, PolicyFile(policy), path, str(path)):
        assert Request("x", policy=given).policy == policy
    for given in (rule("static"), rule("static").path):
        assert Request("x", policy=given).policy.params == rule("static")().params
    assert engine.generate("import os\n", max_tokens=8, policy="static:n_max=2").drafted > 0


def test_long_pieces_are_whole(tmp_path):
    """A token of more than 256 bytes keeps all of them."""
    from tracekit.engine.model import Model
    from tracekit.model import weights
    from tracekit.model.build import REFERENCE

    whole = weights.read(REFERENCE)
    tokens = (*whole.tokens[:2000], "Q" * 300, *whole.tokens[2001:])
    model = Model(weights.write(replace(whole, tokens=tokens), tmp_path / "long.gguf"))
    assert model.piece(2000) == b"Q" * 300
    model.close()


def test_policy_that_raises_is_named(two, tmp_path):
    """An exception out of a policy's file is one line with the file and the line; the engine goes on."""
    path = tmp_path / "mine.py"
    path.write_text(rule("static").source.replace("return params.n_max,", "return params.n_max // (now.n_past - 3),"))
    with pytest.raises(TracekitError, match=r"mine\.py, line \d+: ZeroDivisionError"):
        two.generate([1, 2, 3], max_tokens=8, policy=path)
    assert len(two.generate("def f(x):\n", max_tokens=4).tokens) == 4


@pytest.mark.parametrize(("function", "state"), [("begin", "State(0)"), ("learn", "state")])
@pytest.mark.parametrize("returned", ["None", "()", "7", "State('many')", "State(math.nan)"])
def test_policy_whose_state_is_none_is_named(two, tmp_path, function, state, returned):
    """What begin and learn must not return is one line that says what a State has; the engine goes on."""
    path = tmp_path / "mine.py"
    path.write_text("import math\n" + rule("static").source.replace(f"return {state}\n", f"return {returned}\n"))
    with pytest.raises(TracekitError, match=rf"mine\.py:n_max=3: {function} returned .*, which is no State; it has no"):
        two.generate([1, 2, 3], max_tokens=8, policy=path)
    assert len(two.generate("def f(x):\n", max_tokens=4).tokens) == 4


@pytest.mark.parametrize(
    "decision",
    [
        "None",
        "params.n_max",
        "(params.n_max, None)",
        "(params.n_max, 0.5, 1)",
        "('4', 0.0)",
        "(None, 0.0)",
        "(2.0, 0.0)",
        "(-2, 0.0)",
    ],
)
def test_policy_that_decides_nothing_is_named(two, tmp_path, decision):
    """What decide must not return is one line that says what it should have been; the engine goes on."""
    path = tmp_path / "mine.py"
    path.write_text(rule("static").source.replace("return params.n_max, params.p_min", f"return {decision}"))
    with pytest.raises(TracekitError, match=r"mine\.py:n_max=3: decide returned .*, which is no \(n_draft, p_min\)"):
        two.generate([1, 2, 3], max_tokens=8, policy=path)
    assert len(two.generate("def f(x):\n", max_tokens=4).tokens) == 4
