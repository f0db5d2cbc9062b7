"""Policies: the conformance suite, the seed's rule case by case, and how they are written."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.errors import TracekitError
from tracekit.policy.file import PolicyFile, read
from tracekit.policy.interface import NEVER, Now, Outcome
from tracekit.policy.rule import rule, shipped
from tracekit.policy.spec import parse, parse_one
from tracekit.replay.simulate import rounds
from tracekit.testing import check_policy, random_positions

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


@pytest.mark.parametrize("name", [r.name for r in shipped()])
def test_shipped_policies_conform(name):
    """Every shipped policy passes the public conformance suite."""
    check_policy(rule(name))


def test_own_policy_conforms(own):
    """So does a user's, helper function and all."""
    check_policy(rule(own))


def test_conformance_catches_an_impure_policy(tmp_path):
    """A policy that keeps state outside its State fails the suite."""
    path = tmp_path / "impure.py"
    path.write_text(
        OWN.replace("return state.n, 0.0", "calls.append(1)\n    return len(calls) % 3, 0.0").replace(
            "SPACE", "calls = []\nSPACE"
        )
    )
    with pytest.raises(AssertionError, match="not pure"):
        check_policy(rule(path))


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


def test_sweeps_expand_lists_and_ranges():
    """Commas are lists, low..high/step is a range with both ends, and a comma may start the next policy."""
    labels = [p.label for p in parse("fallback:n_max=4,8,min_ratio=0.5..0.7/0.1,static:n_max=1,2,off")]
    assert len(labels) == 6 + 2 + 1
    assert labels[0] == "fallback:n_max=4,min_ratio=0.5"
    assert labels[-3:] == ["static:n_max=1", "static:n_max=2", "off"]


@given(st.integers(0, 40), st.floats(0, 1), st.booleans(), st.integers(0, 99), st.sampled_from(["request", "engine"]))
def test_labels_parse_back(n_max, ratio, zero, resume, scope):
    """A policy's label names the same policy again."""
    policy = rule("fallback")(n_max=n_max, min_ratio=round(ratio, 4), zero_trip=zero, resume_after=resume, scope=scope)
    assert parse_one(policy.label) == policy


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("nonsense", "shipped: "),
        ("static:n_mux=3", "did you mean n_max"),
        ("static:n_max=three", "not key=value|not a whole number"),
        ("static:n_max=-1", "0 or more"),
        ("static:p_min=1.5", "between 0 and 1"),
        ("static:p_min=nan", "between 0 and 1|not key=value"),
        ("fallback:scope=galaxy", "request, engine|not key=value"),
        ("fallback:zero_trip=maybe", "true or false"),
        ("static:n_max=1..5", "low..high/step"),
        ("static:n_max=5..1/1", "high >= low"),
        ("static:n_max=1,n_max=2", "given twice"),
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
    ("change", "hint"),
    [
        ("def decide", "decide missing"),
        ("class Params(NamedTuple)", "Params must be"),
        ("n_max: int = 6", "needs a default"),
        ("floor: int = 1", "must be int, float or bool"),
        ('"floor": "0,1"', "no parameter"),
        ("from typing import NamedTuple", "line"),
    ],
)
def test_bad_policy_files_get_one_clear_line(tmp_path, change, hint):
    """A user's file that is no policy says why, and where."""
    replacement = {
        "def decide": "def decides",
        "class Params(NamedTuple)": "class Params",
        "n_max: int = 6": "n_max: int",
        "floor: int = 1": "floor: str = 'x'",
        '"floor": "0,1"': '"flour": "0,1"',
        "from typing import NamedTuple": "from typing import NoSuchName",
    }[change]
    source = OWN.replace(change, replacement)
    if change == "n_max: int = 6":
        source = source.replace("    floor: int = 1\n", "").replace('"floor": "0,1"', "").replace("params.floor", "0")
    path = tmp_path / "bad.py"
    path.write_text(source)
    with pytest.raises(TracekitError, match=hint) as error:
        rule(path)
    assert "\n" not in str(error.value)


def test_policy_that_cannot_be_compiled_says_so(tmp_path):
    """A policy outside what Numba compiles runs in the engine, and gets one line from the simulator."""
    import random as random_module

    from tracekit.replay.simulate import counts
    from tracekit.testing import random_positions

    path = tmp_path / "wordy.py"
    path.write_text(OWN.replace("return state.n, 0.0", 'return int(f"{state.n:>3}"), 0.0'))
    policy = rule(path)()
    assert asked(policy, (6, 6)) == [6, 6]
    with pytest.raises(TracekitError, match="cannot be compiled") as error:
        counts([policy], random_positions(random_module.Random(0), 2, 8))
    assert "\n" not in str(error.value)


def test_policy_file_round_trip(tmp_path, own):
    """A policy file names the same policy again, shipped or a user's own, wherever it is read from."""
    for policy in (rule("fallback")(n_max=3, resume_after=5), rule(own)(n_max=4)):
        path = PolicyFile(policy).save(tmp_path / "policy.toml")
        assert read(path).policy == policy


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ("not toml = = 1", "not TOML"),
        ("[polcy]\nname = 'off'", "unknown table"),
        ("[policy]\nname = 'off'\ncolour = 1", "unknown key policy.colour"),
        ("[policy]\n", "needs name"),
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
