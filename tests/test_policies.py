"""Policies: the conformance suite, the seed's rule case by case, and how they are written."""

from __future__ import annotations

import os
import random

import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from tracekit.errors import TracekitError
from tracekit.policy.file import PolicyFile, read
from tracekit.policy.interface import NEVER, Now, Outcome
from tracekit.policy.llama_cpp import server_advice, server_options
from tracekit.policy.rule import rule, shipped
from tracekit.policy.spec import parse, parse_one
from tracekit.replay import link
from tracekit.replay.simulate import counts, rounds
from tracekit.testing import check_policy, random_positions
from tracekit.tune.space import default_space

OWN = '''
"""Back off by one after a miss, go up by one after a full accept."""
from __future__ import annotations
from typing import NamedTuple

SPACE = {"n_max": "2,4,6", "floor": "0,1"}

class Params(NamedTuple):
    n_max: int = 6
    floor: int = 1

class State(NamedTuple):
    n: int

def clamp(value, low, high):
    return min(max(value, low), high)

def begin(params):
    return State(params.n_max)

def decide(params, state, now):
    return state.n, 0.0

def learn(params, state, now, seen):
    step = 1 if seen.n_accepted == seen.n_drafted else -1
    return State(clamp(state.n + step, params.floor, params.n_max))
'''

ONCE = '''
"""Draft once, then never again in the request."""
from typing import NamedTuple

from tracekit.policy.interface import NEVER

class Params(NamedTuple):
    n_max: int = 2

class State(NamedTuple):
    used: bool

def begin(params):
    return State(False)

def decide(params, state, now):
    return (NEVER if state.used else params.n_max), 0.0

def learn(params, state, now, seen):
    if state.used:
        raise RuntimeError("told after NEVER")
    return State(True)
'''


@pytest.fixture
def own(tmp_path):
    """A user's policy, in a file of its own, registered nowhere."""
    path = tmp_path / "backoff.py"
    path.write_text(OWN)
    return path


@pytest.fixture
def edited(tmp_path):
    """Write :data:`OWN` with pieces replaced to a file; returns its path."""

    def write(*changes):
        source = OWN
        for piece, replacement in changes:
            assert piece in source
            source = source.replace(piece, replacement)
        (tmp_path / "edited.py").write_text(source)
        return tmp_path / "edited.py"

    return write


@pytest.mark.parametrize("name", [of.name for of in shipped()])
@examples(max_examples=2)
@given(seed=st.integers(0, 10**6))
def test_shipped_policies_conform(name, seed):
    """Every shipped policy passes the public conformance suite, whatever the requests."""
    check_policy(rule(name), n_variants=4, seed=seed)


def test_own_policy_conforms(own):
    """So does a user's, helper function and all, named in any way."""
    for named in (rule(own), own, str(own)):
        check_policy(named, n_variants=2)


DECIDE, BEGIN, LEARN = "return state.n, 0.0", "return State(params.n_max)", "State(clamp(state.n + step,"


@pytest.mark.parametrize(
    ("piece", "replacement", "says"),
    [
        (BEGIN, "calls.append(1)\n    return State(len(calls))", "step 0: begin is not pure"),
        (DECIDE, "calls.append(1)\n    return len(calls) % 3, 0.0", "decide is not pure"),
        ("    step = 1", "    calls.append(1)\n    return State(len(calls))\n    step = 1", "learn is not pure"),
        (DECIDE, "return state.n % (now.n_generated - 3), 0.0", "step 2: decide raises ZeroDivisionError"),
        (DECIDE, "return state.m, 0.0", "decide raises AttributeError"),
        (DECIDE, "return None", "decide returns None"),
        (DECIDE, "return state.n, 0.0, 0", "decide returns .*not \\(n_draft, p_min"),
        (DECIDE, "return (2 if now.n_active < 12 else -2), 0.0", "-2 drafts"),
        (DECIDE, "return float(state.n), 0.0", "6.0 drafts"),
        (DECIDE, "return state.n > 2, 0.0", "True drafts"),
        (DECIDE, "return state.n + now.n_active // 12, 0.0", "7 drafts are more than its n_max 6"),
        (DECIDE, "return state.n, 1.5", "p_min 1.5 is no probability"),
        (DECIDE, "return state.n, None", "p_min None is no probability"),
        (BEGIN, "return (params.n_max,)", "begin returns .*no State"),
        (LEARN, "(clamp(state.n + step,", "learn returns 5, no State"),
        (LEARN, "State(clamp(state.n + step / 2,", "learn returns State.n = 5.5, declared int"),
        (BEGIN, "return State(params.n_max > 2)", "begin returns State.n = True, declared int"),
        (DECIDE, "return state.n * 6364136223846793005 % 7, 0.0", "compiled and interpreted differ"),
        (DECIDE, "return (now.n_active - 1) * 4611686018427387904 * 6 % 5, 0.0", "over 3 slots.*not the policy's own"),
    ],
)
def test_conformance_catches_a_wrong_policy(edited, piece, replacement, says):
    """Everything the suite asserts fails for some policy, and names it and the step."""
    path = edited(("SPACE", "calls = []\nSPACE"), (piece, replacement))
    with pytest.raises(AssertionError, match=says) as error:
        check_policy(path)
    assert str(path) in str(error.value)


def test_conformance_compares_with_the_file_itself(edited, monkeypatch):
    """Both twins are handed a parameter that has lost its last digit; the policy's own functions are not."""
    monkeypatch.setattr("tracekit.policy.rule._MOST", 1 << 54)
    path = edited(("floor: int = 1", "floor: int = 9007199254740993"), (DECIDE, "return params.floor % 2, 0.0"))
    with pytest.raises(AssertionError, match="request 0: simulated .* are not the policy's own"):
        check_policy(path)


def test_state_keeps_fractions(edited):
    """A field declared float is one in the simulators too, however the file writes its annotations."""
    check_policy(edited(("n: int\n", "n: float\n"), ("else -1", "else -0.25"), (DECIDE, "return int(state.n), 0.0")))


def test_an_edit_is_another_policy(edited):
    """A file edited while the process runs is read again, and one edited back is the same policy as before."""
    before = rule(edited())
    after = rule(edited((DECIDE, "return 1, 0.0")))
    assert after.sha256 != before.sha256
    assert after.decide(None, before.begin(before().params), None) == (1, 0.0)
    assert rule(edited()) is before


def asked(policy, *outcomes):
    """What the policy asks for before each outcome and after the last."""
    state, found, generated = policy.rule.begin(policy.params), [], 1
    for drafted, accepted in outcomes:
        now = Now(generated, 10 + generated, 1000, 1)
        found.append(policy.rule.decide(policy.params, state, now)[0])
        state = policy.rule.learn(policy.params, state, now, Outcome(found[-1], drafted, accepted, accepted + 1))
        generated += accepted + 1
    return [*found, policy.rule.decide(policy.params, state, Now(generated, 10 + generated, 1000, 1))[0]]


def test_seed_defaults_trip_after_a_poor_first_verification():
    """PR 22931: after the first verification, off when accepted < 0.75 * drafted, for the rest of the request."""
    seed = rule("fallback")()
    assert asked(seed, (8, 5)) == [8, NEVER]
    assert asked(seed, (8, 6), (8, 1)) == [8, 8, 8]


def test_seed_trips_after_any_verification_without_accepts():
    """PR 22931, follow-up: off after any single verification with 0 useful accepts."""
    seed = rule("fallback")()
    assert asked(seed, (8, 8), (8, 3), (8, 0)) == [8, 8, 8, NEVER]


def test_conformance_accepts_never_and_ends_there(tmp_path):
    """After NEVER a policy is neither asked nor told anything more in that request."""
    path = tmp_path / "once.py"
    path.write_text(ONCE)
    check_policy(rule(path))
    for steps in rounds(rule(path)(), random_positions(random.Random(0), n_requests=8, n_max=4)):
        assert not any(drafted for drafted, _ in steps[1:])


def test_ratio_is_judged_once():
    """Later verifications are judged by the zero-accept rule alone."""
    assert asked(rule("fallback")(zero_trip=False), (8, 7), (8, 0), (8, 0)) == [8, 8, 8, 8]


def test_resumption_starts_afresh():
    """With resume_after the policy drafts again after that many plain tokens, and judges its next verification anew."""
    policy = rule("fallback")(resume_after=2)
    assert asked(policy, (8, 0), (0, 0), (0, 0), (8, 1), (0, 0)) == [8, 0, 0, 8, 0, 0]


def test_min_drafts_collects_evidence_first():
    """With min_drafts the ratio is judged over as many drafts as that."""
    policy = rule("fallback")(n_max=4, min_drafts=8, min_ratio=0.5, zero_trip=False)
    assert asked(policy, (4, 1), (4, 2)) == [4, 4, NEVER]
    assert asked(policy, (4, 1), (4, 3)) == [4, 4, 4]


def test_by_slots_drafts_less_in_a_crowd():
    """Few slots draft n_max, more n_crowded, which is never more than n_max."""
    policy = rule("by_slots")(n_max=4, max_slots=2, n_crowded=1)
    state, decide = policy.rule.begin(policy.params), policy.decide
    assert [decide(state, Now(1, 10, 99, n))[0] for n in (1, 2, 3, 16)] == [4, 4, 1, 1]
    assert rule("by_slots")(n_max=2, n_crowded=8).decide(state, Now(1, 10, 99, 2))[0] == 2


def test_a_bucket_fills_and_empties():
    """PR 27210: full accepts add what was accepted but one, others take out what is missing; 20 above where it began
    the draft grows, at nothing it shrinks, and begins anew; at either end the bucket stays as it is.
    """
    one = rule("bucket")(n_min=1, n_max=8)
    assert asked(one, *[(1, 1)] * 20) == [1] * 20 + [2]  # +1 each
    assert asked(one, *[(1, 1)] * 20, (2, 1), *[(2, 2)] * 21) == [1] * 20 + [2] * 22 + [3]  # -1, then +1 each
    three = rule("bucket")()
    assert asked(three, *[(3, 3)] * 10, *[(4, 4)] * 7) == [3] * 10 + [4] * 7 + [5]  # +2, then +3 each
    assert asked(three, *[(3, 0)] * 50, *[(3, 3)] * 20)[-2:] == [3, 4]  # from nothing it takes all 40
    deep = rule("bucket")(n_min=6)
    state = asked(deep, *[(6, 6)] * 4, *[(7, 0)] * 4)
    assert state == [6] * 4 + [7] * 4 + [6]  # 24 + 4 * 5 is full at 44; 28 - 4 * 7 is nothing
    pinned = rule("bucket")(n_max=3)
    assert asked(pinned, *[(3, 3)] * 99, *[(3, 0)] * 99) == [3] * 199
    assert asked(three, (0, 0), (2, 2)) == [3, 3, 3]  # nothing tried; cut short, one is missing


def test_streaks_take_as_many_as_asked():
    """PR 25726: a length is changed by an unbroken row of full accepts, or of others; bias says how many may miss."""
    three = rule("streaks")(n_max=3, n_streak=2)
    assert asked(three, (1, 1), (1, 1), (2, 2), (2, 1), (2, 2), (2, 2)) == [1, 1, 2, 2, 2, 2, 3]
    assert asked(three, *[(1, 1)] * 2, (2, 1), (2, 0), (1, 0), (1, 0)) == [1, 1, 2, 2, 1, 1, 1]
    assert asked(three, *[(1, 1)] * 2, *[(2, 2)] * 2, *[(3, 3)] * 4)[-1] == 3
    assert asked(rule("streaks")(n_min=4, n_streak=2, bias=1), (4, 3), (4, 3)) == [4, 4, 5]
    assert asked(rule("streaks")(), *[(1, 1)] * 11) == [1] * 11 + [2]


def test_the_heuristic_adds_two_or_takes_one():
    """transformers: two more after all were accepted, however many that were, one less otherwise; never none."""
    assert asked(rule("heuristic")(), (8, 8), (8, 7), (7, 0), (6, 6), (4, 4)) == [8, 8, 7, 6, 8, 8]
    assert asked(rule("heuristic")(n_start=2), (2, 0), (1, 0), (1, 1), (0, 0)) == [2, 1, 1, 3, 3]


def test_sglang_follows_the_mean():
    """SGLang: after 10 verifications every fifth decides, down several lengths or up several, by the mean of what was
    accepted; from none at all it tries one.
    """
    usual = rule("sglang")()
    assert asked(usual, *[(5, 5)] * 15) == [5] * 15 + [7]
    assert asked(usual, *[(5, 0)] * 15) == [5] * 15 + [1]  # 4 * 0.8 ** 15 = 0.14, at most 0.25
    assert asked(usual, *[(5, 0)] * 15, *[(1, 1)] * 5) == [5] * 15 + [1] * 5 + [3]  # 0.72 is more than 0.5
    assert asked(usual, *[(5, 3)] * 15, (0, 0)) == [5] * 17  # 3.04, more than 2.25; nothing tried is no verification
    eight = rule("sglang")(n_max=3, n_min=0, down_hysteresis=0, n_start=3)
    found = asked(eight, *[(3, 0)] * 15, *[(0, 0)] * 5, *[(1, 0)] * 5)
    assert found == [3] * 15 + [0] * 5 + [1] * 5 + [0]
    begins = [asked(rule("sglang")(n_start=n, n_min=2, n_max=most))[0] for n, most in ((1, 7), (4, 7), (6, 6), (0, 0))]
    assert begins == [3, 5, 5, 0]  # 1, 3, 5 and 7 are all there are, and none below n_min


def test_what_llama_server_takes():
    """Policies that llama.cpp has too, in its own options; of the others it is said that it has none."""
    assert server_options(parse_one("static:n_max=8,p_min=0.425")) == [
        *("--spec-type", "draft-mtp", "--spec-draft-n-max", "8", "--spec-draft-p-min", "0.425")
    ]
    assert server_advice(parse_one("static:n_max=1")).endswith("--spec-draft-n-max 1 --spec-draft-p-min 0")
    for never in ("off", "static:n_max=0"):
        assert server_options(parse_one(never)) == []
        assert server_advice(parse_one(never)) == ""
    for own in ("fallback", "by_slots", "bucket"):
        assert server_options(parse_one(own)) is None
        assert "no options" in server_advice(parse_one(own))


def test_default_space_holds_only_what_matters_over_so_many_slots():
    """max_slots is searched below the number of slots; with one slot by_slots would be static again."""
    assert "by_slots" not in default_space()
    assert default_space(4)["by_slots"]["max_slots"] == "1,2"
    assert default_space(16)["by_slots"] == rule("by_slots").space
    others = {"bucket", "heuristic", "sglang", "streaks"}  # of other engines: searched where they are named
    assert {r.name for r in shipped()} - set(default_space(2)) == {"off"} | others


def test_sweeps_expand_lists_and_ranges():
    """Commas are lists, low..high/step is a range with both ends, and a comma may start the next policy."""
    labels = [p.label for p in parse("fallback:n_max=4,8,min_ratio=0.5..0.7/0.1,static:n_max=1,2,off")]
    assert len(labels) == 6 + 2 + 1
    assert labels[0] == "fallback:n_max=4,min_ratio=0.5"
    assert labels[-3:] == ["static:n_max=1", "static:n_max=2", "off"]
    assert [p.scope for p in parse("fallback:scope=engine,request,off")] == ["engine", "request", "request"]


@given(st.integers(0, 40), st.floats(0, 1), st.booleans(), st.integers(0, 99), st.sampled_from(["request", "engine"]))
def test_labels_parse_back(n_max, ratio, zero, resume, scope):
    """A policy's label names the same policy again."""
    policy = rule("fallback")(n_max=n_max, min_ratio=ratio, zero_trip=zero, resume_after=resume, scope=scope)
    assert parse_one(policy.label) == policy


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nonsense", "shipped: "),
        ("off:n_max=3", "policy off takes no parameters; leave out n_max"),
        ("static:n_mux=3", "did you mean n_max"),
        ("static:n_max=three", "not key=value|not a whole number"),
        ("static:n_max=-1", "0 or more"),
        ("fallback:min_drafts=9007199254740993", "min_drafts=9007199254740993: 9007199254740992 or less"),
        ("static:p_min=1.5", "between 0 and 1"),
        ("static:p_min=nan", "between 0 and 1|not key=value"),
        ("fallback:scope=galaxy", "request, engine|not key=value"),
        ("fallback:zero_trip=maybe", "true or false"),
        ("static:n_max=1..5", "low..high/step"),
        ("static:n_max=5..1/1", "high >= low"),
        ("static:n_max=1,n_max=2", "given twice"),
        ("fallback:n_max=1..8/1,min_ratio=0..1/0.001,p_min=0..1/0.001", "8,016,008 combinations; 200,000 at most"),
        ("", "a policy is"),
        ("./missing.py", "no such policy file"),
        ("missing.toml", "no such policy file"),
    ],
)
def test_bad_policies_get_one_clear_line(text, hint):
    """What is wrong, where, and what would be right."""
    with pytest.raises(TracekitError, match=hint) as error:
        parse(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "replacement", "hint"),
    [
        ("def decide", "def decides", "decide missing"),
        ("def decide", "@staticmethod\ndef decide", "decide must be a function"),
        ("def decide(params, state, now)", "def decide(params, state)", "2 parameters, not 3: params, state, now"),
        ("def begin(params)", "def begin()", "begin takes 0 parameters, not 1: params"),
        ("def learn(params", "def learn(more, params", "learn takes 5 parameters, not 4: params, state, now, seen"),
        ("class Params(NamedTuple)", "class Params", "Params must be"),
        ("class State(NamedTuple)", "class State", "State must be"),
        ("n: int\n", "n: list\n", "field n of State must be int, float or bool"),
        ("n: int\n", "n: integer\n", "State: NameError"),
        ("    n_max: int = 6\n    floor: int = 1", "    n_max: int\n    floor: int", "needs a default"),
        ("n_max: int = 6", "n_max: int = 4.0", "n_max=4.0: not a whole number"),
        ("floor: int = 1", "floor: str = 'x'", "must be int, float or bool"),
        ('"floor": "0,1"', '"flour": "0,1"', "no parameter"),
        ('"floor": "0,1"', '"floor": 1', "SPACE must be"),
        ('SPACE = {"n_max": "2,4,6", "floor": "0,1"}', 'SPACE = "n_max"', "SPACE must be"),
        ("from typing import NamedTuple", "from typing import NoSuchName", "line"),
    ],
)
def test_bad_policy_files_get_one_clear_line(edited, change, replacement, hint):
    """A user's file that is no policy says why, and where."""
    path = edited((change, replacement))
    with pytest.raises(TracekitError, match=hint) as error:
        rule(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_spaces_may_be_lists(edited):
    """The values of a search space may be a list: it is read as the text would be."""
    assert rule(edited(('"2,4,6"', "[2, 4, 6]"), ('"0,1"', '("0", 1)'))).space == {"n_max": "2,4,6", "floor": "0,1"}


@pytest.mark.parametrize(
    "taken",
    [
        "STEPS, OVER = 2, 5",
        "STEPS: int = 2",
        "for ROWS in range(2): KV = 7",
        "from math import floor as price",
        "class Outcome: pass",
        "def run(): pass",
        "def max(a, b): return a",
    ],
)
def test_names_of_the_simulator_are_refused(edited, taken):
    """However a policy binds a name that the simulator also has, it is told so; sharing an import is no clash."""
    with pytest.raises(TracekitError, match="is the simulator's; choose another"):
        link.interpreted(rule(edited(("SPACE =", taken + "\nSPACE ="))))
    link.interpreted(
        rule(edited(("SPACE =", "import numpy as np\nfrom tracekit.policy.interface import Now\nSPACE =")))
    )


@pytest.mark.parametrize(
    ("decision", "reason"),
    [
        ('int(f"{state.n:>3}"), 0.0', "line 23: cannot be compiled .*format spec"),
        ("state.m, 0.0", "line 23: cannot be compiled .*Unknown attribute 'm'"),
        ("table[2], 0.0", "line 23: cannot be compiled .*Untyped global name 'table'"),
        ("(1 if state.n else 'a'), 0.0", "cannot be compiled .*unify"),
        ("state.n // (state.n - state.n), 0.0", "raises ZeroDivisionError"),
    ],
)
def test_policy_that_the_simulator_cannot_run_says_so(edited, decision, reason):
    """A policy outside what Numba compiles, or one that raises, gets one line that names the file and the reason."""
    path = edited(("SPACE =", "table = {2: 3}\nSPACE ="), (DECIDE, "return " + decision))
    with pytest.raises(TracekitError, match=reason) as error:
        counts([rule(path)()], random_positions(random.Random(0), 2, 8))
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_policy_that_looks_beside_itself_says_so_every_time(edited):
    """The simulator's copy lies elsewhere: one line, the second time too, when a part of it had been imported."""
    path = edited(
        ("SPACE =", "from pathlib import Path\nTEXT = Path(__file__).with_name('t.txt').read_text()\nSPACE =")
    )
    path.with_name("t.txt").write_text("3")
    for _ in range(2):
        with pytest.raises(TracekitError, match="joined with the simulator, in another folder, it raises FileNotFound"):
            link.interpreted(rule(path))


def test_own_policy_may_be_called_off(edited):
    """What never drafts is the shipped `off`, and not whatever has its name."""
    path = edited()
    path = path.rename(path.with_name("off.py"))
    assert not rule(path)().is_off
    assert rule("off")().is_off


def test_policy_file_round_trip(tmp_path, own):
    """A policy file names the same policy again, shipped or a user's own, wherever it is read from."""
    for policy in (rule("fallback")(n_max=3, resume_after=5), rule(own)(n_max=4)):
        path = PolicyFile(policy).save(tmp_path / "policy.toml")
        assert read(path).policy == policy


@pytest.mark.parametrize(("name", "reason"), [("run.duckdb", "ends in .toml"), ("pyproject.toml", "no policy file")])
def test_a_policy_replaces_nothing_but_a_policy(tmp_path, name, reason):
    """A trace or whatever else has the name is left as it is."""
    (tmp_path / name).write_text("[project]")
    with pytest.raises(TracekitError, match=reason):
        PolicyFile(rule("off")()).save(tmp_path / name)
    assert (tmp_path / name).read_text() == "[project]"
    assert [p.name for p in tmp_path.iterdir()] == [name]


def _full(*_):
    raise OSError(28, "No space left on device")


def test_a_policy_that_does_not_fit_leaves_nothing(tmp_path, monkeypatch):
    """Where the disk is full no half of a file stays, and a pipe is no policy to be replaced."""
    with monkeypatch.context() as disk:
        disk.setattr(os, "replace", _full)
        with pytest.raises(TracekitError, match="No space left"):
            PolicyFile(rule("off")()).save(tmp_path / "p.toml")
    assert list(tmp_path.iterdir()) == []
    os.mkfifo(tmp_path / "p.toml")
    with pytest.raises(TracekitError, match="no policy file"):
        PolicyFile(rule("off")()).save(tmp_path / "p.toml")


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("not toml = = 1", "not TOML"),
        ("[polcy]\nname = 'off'", "unknown table"),
        ("[policy]\nname = 'off'\ncolour = 1", "unknown key policy.colour"),
        ("[policy]\n", "needs name"),
        ("policy = 3", "policy must be a table"),
        ("[policy]\nfile = 3", "policy.file must be a text"),
        ("[policy]\nname = 'static'\nparams = 3", "policy.params must be a table"),
        ("[policy]\nname = 'static'\n[policy.params]\nn_max = 'many'", "not a whole number"),
        ("[policy]\nname = 'static'\nsha256 = 'abc'", "has changed"),
        ("[policy]\nname = 'off'\n[evidence]\nspeedup = 1.0", "evidence"),
    ],
)
def test_bad_policy_tomls_get_one_clear_line(tmp_path, content, hint):
    """Unknown keys are errors, and a policy whose source changed is not run as if it had been tuned."""
    path = tmp_path / "policy.toml"
    path.write_text(content)
    with pytest.raises(TracekitError, match=hint) as error:
        read(path)
    assert "\n" not in str(error.value)
