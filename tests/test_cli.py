"""The command line, as its users run it: every verb, JSON beside every table, one clear line for every mistake."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import t as student
from typer.main import get_command

import tracekit as package
from tracekit.cli import interrupted
from tracekit.cli.app import app
from tracekit.engine import Request
from tracekit.errors import TracekitError
from tracekit.model.build import REFERENCE, inspect
from tracekit.policy.file import PolicyFile
from tracekit.policy.spec import parse_one
from tracekit.verify import Arm, verify
from tracekit.words import counted

from .conftest import N_MAX

H200 = Path(__file__).parent.parent / "traces" / "h200"
FAST = ["--max-tokens", "24", "--n-max", str(N_MAX), "--threads", "1"]


def tracekit(*arguments, code=0, **options) -> subprocess.CompletedProcess:
    """Run the command line in a process of its own and check its exit code."""
    result = subprocess.run(
        [sys.executable, "-m", "tracekit", *map(str, arguments)], capture_output=True, text=True, timeout=300, **options
    )
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    return result


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    """A prompts file of three categories, six prompts."""
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    texts = [
        "import os\nimport sys\n",
        "def walk(tree):\n    ",
        "The method returns ",
        "class Queue:\n",
        "x = 1\nx = 1\nx = 1\n",
        "if a:\n",
    ]
    rows = [{"id": f"p{i}", "category": "abc"[i % 3], "prompt": t} for i, t in enumerate(texts)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.fixture(scope="module")
def recorded(models, prompts, tmp_path_factory):
    """A probe trace made on the command line."""
    path = tmp_path_factory.mktemp("cli") / "t.duckdb"
    result = tracekit("record", models["plain"], "--prompts", prompts, "-o", path, *FAST)
    assert result.stderr.strip().splitlines()[-1] == f"Wrote {path}"
    assert "6 requests" in result.stdout
    return path


@pytest.fixture(scope="module")
def tuned(recorded):
    """A policy file made on the command line."""
    path = recorded.parent / "policy.toml"
    result = tracekit("tune", recorded, "-o", path, "--max-slowdown", "0.5")
    assert result.stderr.strip().splitlines()[-1] == f"Wrote {path}"
    return path


VERBS = {
    "campaign",
    "doctor",
    "model",
    "record",
    "calibrate",
    "merge",
    "stats",
    "policies",
    "replay",
    "tune",
    "verify",
    "generate",
    "sql",
    "demo",
}


def commands() -> dict[str, Any]:
    """Every verb and subverb (``model build``) as the command line knows it."""
    found = {}
    for name, command in get_command(app).commands.items():
        below = getattr(command, "commands", None)
        found |= {f"{name} {sub}": of for sub, of in below.items()} if below else {name: command}
    return found


COMMANDS = commands()


def test_help_lists_every_verb():
    """Every verb is listed with a sentence, every argument and option says what it does, and every verb has --json."""
    listed = tracekit("--help").stdout
    assert all(re.search(rf"^  {verb} +\w", listed, re.MULTILINE) for verb in VERBS)
    assert "..." not in (listed + tracekit("model", "--help").stdout).replace("[ARGS]...", "")  # no sentence is cut
    assert {name.split()[0] for name in COMMANDS} == VERBS
    for name, command in COMMANDS.items():
        assert command.help, name
        for parameter in command.params:
            assert parameter.help, f"{name} {parameter.name}"
        printed = tracekit(*name.split(), "--help").stdout
        assert "--json" in printed
        assert not re.search(r"^ +-.*<list|\[\[|\.\.\.}", printed, re.MULTILINE), printed


def test_help_explains_what_is_printed():
    """What `replay` and `stats` print is told by their help: rows, columns, and where intervals come from."""
    replayed, happened = (" ".join(tracekit(verb, "--help").stdout.split()) for verb in ("replay", "stats"))
    assert "over prompts like these (Student's t) and over the fit of costs (bootstrap)" in replayed
    for row in ("no MTP", "MTP idle", "K = 1", "tau", "ampl.", "catchup"):
        assert row in happened


def test_one_is_not_many():
    """A single thing has no plural."""
    assert [counted(n, "interleaved repeat") for n in (0, 1, 2)] == [
        "0 interleaved repeats",
        "1 interleaved repeat",
        "2 interleaved repeats",
    ]


def test_help_of_the_reference_models_size_is_true():
    """What `model build` says of layers and channels is what the shipped model has."""
    facts, printed = inspect(REFERENCE), " ".join(tracekit("model", "build", "--help").stdout.split())
    for kind in ("n_layer", "n_embd"):
        assert f"ours has {facts[kind]}]" in printed


def test_every_engine_option_changes_the_settings():
    """No option of the engine is forgotten on its way into the settings; the sidecar goes to the engine itself."""
    from dataclasses import fields, replace

    from tracekit.cli.options import EngineOptions

    changed = {str: "q8_0", int: 9, bool: True}
    plain = EngineOptions(threads=1)
    for field in fields(EngineOptions):
        old = getattr(plain, field.name)
        new = {"flash_attn": "off", "batch_size": 256}.get(field.name, changed.get(type(old), True))
        same = replace(plain, **{field.name: new}).settings(2) == plain.settings(2)
        assert same == (field.name == "draft_model"), field.name


def test_every_sampling_option_changes_the_sampling():
    """None of these is forgotten either, and their defaults are the engine's."""
    from dataclasses import fields, replace

    from tracekit.cli.options import SamplingOptions
    from tracekit.engine import Sampling

    assert SamplingOptions().sampling() == Sampling()
    plain = SamplingOptions(temp=0.5)
    for field in fields(SamplingOptions):
        assert replace(plain, **{field.name: 1}).sampling() == replace(Sampling(temp=0.5), **{field.name: 1})


def test_a_seed_may_be_for_more_than_sampling():
    """At temperature 0 it changes what a probe and `verify` draw, but no text."""
    from tracekit.cli.options import SamplingOptions

    assert SamplingOptions(seed=3).sampling(seeded=True).seed == 3
    with pytest.raises(TracekitError, match="--seed: changes nothing at --temp 0"):
        SamplingOptions(seed=3).sampling()


def test_layers_for_a_gpu_that_is_not_there(models):
    """Scripts give them on any machine: a line of warning, and it runs; nothing is said of all layers, the default."""
    from tracekit.engine.lib import has_gpu

    says = "warning: --gpu-layers 99 changes nothing: llama.cpp sees no GPU"
    for verb in (["generate", models["plain"], "x", "--max-tokens", 1], ["doctor", models["plain"]]):
        assert (says in tracekit(*verb, "--gpu-layers", 99).stderr) == (not has_gpu())
        assert "--gpu-layers" not in tracekit(*verb).stderr


def test_version():
    """The version is the package's."""
    assert tracekit("--version").stdout.strip() == f"tracekit {package.__version__}"


def test_policies_shows_parameters_defaults_and_sources():
    """`tracekit policies` shows every policy with its source; --json the same as data."""
    text = tracekit("policies").stdout
    assert "PR 22931" in text
    assert "min_ratio = 0.75" in text
    found = {p["policy"]: p for p in json.loads(tracekit("policies", "--json").stdout)}
    assert found["fallback"]["parameters"]["zero_trip"] is True
    assert list(found)[:2] == ["off", "static"]


def test_doctor_says_what_will_work(models):
    """Devices and build; for a model its NextN layers, memory and a verdict."""
    assert "llama-cpp-python" in tracekit("doctor").stdout
    facts = json.loads(tracekit("doctor", models["plain"], "--json").stdout)
    on_processor = facts["model"]["placement"]["flash_attn"] == "enabled" and not facts["model"]["placement"]["on_gpu"]
    assert any("--flash-attn off" in sentence for sentence in facts["model"]["advice"]) == on_processor
    assert facts["model"]["NextN layers"] == 1
    assert facts["model"]["memory"] == "partial"
    assert "works" in facts["model"]["verdict"]
    sidecar = tracekit("doctor", models["plain"], "--draft-model", models["sidecar"], "--json").stdout
    assert "works" in json.loads(sidecar)["model"]["verdict"]
    other = tracekit("doctor", models["plain"], "--draft-model", models["wide"], "--json").stdout
    assert "width or vocabulary" in json.loads(other)["model"]["verdict"]
    assert "no such model" in tracekit("doctor", models["plain"], "--draft-model", "no.gguf", code=2).stderr
    assert facts["devices"]


def test_model_build_and_inspect(tmp_path):
    """Build writes a file and says so; inspect shows what is in it."""
    path = tmp_path / "m.gguf"
    assert (
        tracekit("model", "build", "-o", path, "--layers", 7, "--misaligned").stderr.strip().endswith(f"Wrote {path}")
    )
    facts = json.loads(tracekit("model", "inspect", path, "--json").stdout)
    assert (facts["n_layer"], facts["n_layer_nextn"]) == (7, 1)
    assert "misaligned" in facts["notes"]
    assert "exists" in tracekit("model", "build", "-o", path, code=2).stderr
    path.write_bytes(b"")
    for _ in range(2):  # an empty file, then the model
        tracekit("model", "build", "-o", path, "--force")
    assert json.loads(tracekit("model", "inspect", path, "--json").stdout)["n_layer"] == 5


def test_replay_gives_one_object_per_policy(recorded):
    """`replay --json`: the promised fields, numbers with low and high, and sweeps expanded."""
    rows = json.loads(
        tracekit("replay", recorded, "--policy", f"off,static:n_max=1,{N_MAX},fallback:n_max={N_MAX}", "--json").stdout
    )
    assert [r["policy"] for r in rows] == ["off", "static:n_max=1", f"static:n_max={N_MAX}", f"fallback:n_max={N_MAX}"]
    for row in rows:
        assert row["tokens_per_second_low"] <= row["tokens_per_second"] <= row["tokens_per_second_high"]
        assert row["exact_fraction"] == 1.0
        assert row["regret"] >= 0
        assert {"speedup", "verifications", "drafted", "accepted", "amplification", "no_mtp_tokens_per_second"} <= set(
            row
        )


def test_replay_draws_and_sorts(recorded, tmp_path):
    """A picture beside the table, fastest first when asked."""
    path = tmp_path / "league.png"
    result = tracekit("replay", recorded, "--policy", f"static:n_max=1..{N_MAX}/1", "--sort", "--plot", path)
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert result.stderr.strip().splitlines()[-1] == f"Wrote {path}"
    speeds = [float(line.split()[1]) for line in result.stdout.splitlines() if line.startswith("static")]
    assert speeds == sorted(speeds, reverse=True)
    assert "(no MTP)" in result.stdout
    path.write_bytes(b"mine")
    again = ["replay", recorded, "--policy", "off", "--plot", path]
    assert tracekit(*again, code=2).stderr.endswith(f"{path}: exists; choose another name or give --force\n")
    assert path.read_bytes() == b"mine"
    tracekit(*again, "--force")
    assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_picture_never_replaces_what_it_is_made_from(recorded, models, tmp_path):
    """Whatever --force says, and before anything is done: the trace, its prices, the policy, the calibration itself."""
    trace, policy = tmp_path / "trace.png", tmp_path / "p.html"
    trace.write_bytes(recorded.read_bytes())
    policy.write_text("off")
    for command in (
        ["replay", trace, "--plot", trace],
        ["replay", recorded, "--cost", trace, "--plot", trace],
        ["verify", models["plain"], policy, "--plot", policy],
        ["calibrate", models["plain"], "-o", trace, "--plot", trace],
    ):
        said = tracekit(*command, "--force", code=2).stderr
        assert said.count("\n") == 1
        assert "another use for that file; choose another name" in said
    assert trace.read_bytes() == recorded.read_bytes()
    assert policy.read_text() == "off"


def test_cost_of_another_trace_changes_speed_only(recorded, probe_traces):
    """With --cost the counts stay and the speeds are the other trace's."""
    own, other = (
        json.loads(tracekit("replay", recorded, "--policy", "static:n_max=2", "--json", *cost).stdout)[0]
        for cost in ([], ["--cost", probe_traces[0.0]])
    )
    assert own["accepted"] == other["accepted"]
    assert own["cost_model"] != other["cost_model"]


def test_stats_tells_the_whole_story(recorded, live_trace):
    """Acceptance with intervals and n, requests, time, baselines: as tables and as JSON, for probe and live traces."""
    text = tracekit("stats", recorded).stdout
    for title in (
        "Acceptance by position",
        "Requests (exact)",
        "Where time went (exact)",
        "Baselines",
        "no MTP",
        "llama.cpp's order",
    ):
        assert title in text
    for trace in (recorded, live_trace):
        summary = json.loads(tracekit("stats", trace, "--json").stdout)
        assert all(r["low"] <= r["ratio"] <= r["high"] and r["n"] > 0 for r in summary["acceptance"])
        assert {b["baseline"] for b in summary["baselines"]} >= {"no MTP", "MTP idle"}


def test_tuned_policy_carries_its_evidence(tuned, recorded):
    """The policy file holds the policy, where it comes from, and what it beat."""
    from tracekit.policy.file import read
    from tracekit.trace.store import open_trace

    evidence = read(tuned).evidence
    trace = open_trace(recorded)
    assert evidence.trace_id == trace.trace_id
    assert evidence.model_sha256 == trace.runs["model_sha256"][0]
    assert evidence.n_requests == 6
    assert {"no MTP", "static:n_max=1", f"static:n_max={N_MAX}"} <= {a.policy for a in evidence.alternatives} | {
        read(tuned).policy.label
    }
    assert evidence.tokens_per_second_low <= evidence.tokens_per_second <= evidence.tokens_per_second_high


def test_tune_replaces_nothing_but_a_policy(recorded, tmp_path):
    """Other TOML is refused whatever --force says, and before the search."""
    other = tmp_path / "pyproject.toml"
    other.write_text("[project]")
    result = tracekit("tune", recorded, "-o", other, "--force", code=2)
    assert result.stderr.strip() == f"tracekit: error: {other}: exists, and is no policy file; choose another name"
    assert other.read_text() == "[project]"


def test_tune_with_a_space_of_ones_own(recorded, tmp_path):
    """--space restricts the search; --json prints the evidence."""
    space = tmp_path / "space.toml"
    space.write_text("[static]\nn_max = [1, 2]\n")
    found = json.loads(tracekit("tune", recorded, "--space", space, "--json", "--max-slowdown", "0.9").stdout)
    assert found["n_policies"] == 3
    assert found["policy"] in ("off", "static:n_max=1", "static:n_max=2")


def test_tune_on_few_requests(recorded, models, prompts, tmp_path):
    """Unless told how many, there are no more folds than prompts, as the evidence tells; of one, more are needed."""
    lines = prompts.read_text().splitlines(keepends=True)
    few, one, trace = tmp_path / "few.jsonl", tmp_path / "one.jsonl", tmp_path / "t.duckdb"
    few.write_text("".join(lines[:3]))
    one.write_text(lines[0])
    tracekit("record", models["plain"], "--prompts", few, "-o", trace, *FAST)
    assert json.loads(tracekit("tune", trace, "--json").stdout)["folds"] == 3
    assert package.open(trace).tune(space={"static": {"n_max": 1}}).evidence.folds == 3
    says = "--folds 5: between 2 and the number of prompts in the trace, 3"
    assert says in tracekit("tune", trace, "--folds", 5, code=2).stderr
    tracekit("record", models["plain"], "--prompts", one, "-o", trace, "--force", *FAST)
    said = tracekit("tune", trace, "--cost", recorded, code=2).stderr.strip()
    assert said == "tracekit: error: a single prompt tells nothing of others; record more"


def test_generate_applies_a_tuned_policy(models, tuned):
    """Generation under a policy file prints the text, and only the text, on standard output."""
    plain = tracekit("generate", models["plain"], "def walk(tree):\n", "--max-tokens", 20, "--flash-attn", "off")
    result = tracekit(
        "generate", models["plain"], "def walk(tree):\n", "--max-tokens", 20, "--policy", tuned, "--flash-attn", "off"
    )
    assert result.stdout == plain.stdout
    assert "tokens/s" in result.stderr
    facts = json.loads(
        tracekit(
            "generate", models["plain"], "-", "--max-tokens", 5, "--policy", "static:n_max=2", "--json", input="x = "
        ).stdout
    )
    assert facts["n_generated"] == 5
    assert facts["drafted"] > 0


def test_generate_with_a_drafter_whatever_a_policy_file_says(models, tmp_path):
    """The same command line serves a file that says off, as `tune` may, and one that drafts."""
    for policy, drafts in (("off", False), ("static:n_max=2", True)):
        path = PolicyFile(parse_one(policy)).save(tmp_path / "policy.toml")
        options = ["--policy", path, "--draft-model", models["sidecar"], "--n-max", 4, "--max-tokens", 8, "--json"]
        facts = json.loads(tracekit("generate", models["plain"], "import os\n", *options).stdout)
        assert (facts["policy"], facts["drafted"] > 0) == (policy, drafts)


def test_generate_prints_what_a_terminal_cannot_show(models):
    """A character that standard output's encoding has not is a question mark, and no reason to end."""
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii:strict"}
    options = ["--temp", 100, "--top-k", 0, "--top-p", 1, "--min-p", 0, "--max-tokens", 60]  # any bytes
    told = tracekit("generate", models["plain"], "x", *options, env=ascii_only).stdout
    utf8 = os.environ | {"PYTHONIOENCODING": "utf-8"}
    whole = tracekit("generate", models["plain"], "x", *options, env=utf8, encoding="utf-8").stdout
    assert not whole.isascii()
    assert told == whole.encode("ascii", "replace").decode()


def test_generate_records_when_asked(models, tmp_path):
    """--trace records what the policy did."""
    path = tmp_path / "t.duckdb"
    tracekit(
        "generate", models["plain"], "import os", "--policy", "static:n_max=3", "--max-tokens", 30, "--trace", path
    )
    assert json.loads(tracekit("sql", path, "SELECT count(*) AS n FROM verifications", "--json").stdout)[0]["n"] > 5


def test_verify_compares_prediction_and_measurement(models, tuned, prompts, tmp_path):
    """Every arm predicted and measured, steps exactly as predicted, tokens equal, a picture, and the ranking."""
    plot = tmp_path / "v.svg"
    common = [
        models["plain"],
        tuned,
        "--prompts",
        prompts,
        *FAST,
        "--cache-type-k",
        "f32",
        "--cache-type-v",
        "f32",
        "--flash-attn",
        "off",
    ]
    verdict = json.loads(tracekit("verify", *common, "--repeats", 2, "--json").stdout)
    assert [a["arm"] for a in verdict["arms"]] == ["no MTP", f"naive n_max={N_MAX}", "n_max=1", "fallback", "tuned"]
    assert verdict["lossless"]
    for arm in verdict["arms"]:
        assert arm["equal_requests"] == arm["n_requests"] == 6
        assert arm["measured_low"] <= arm["measured"] <= arm["measured_high"]
        assert arm["predicted_low"] <= arm["predicted"] <= arm["predicted_high"]
        for gain in ("measured_speedup", "predicted_speedup"):
            assert arm[f"{gain}_low"] <= arm[gain] <= arm[f"{gain}_high"]
            if arm["arm"] == "no MTP":
                assert arm[f"{gain}_low"] == arm[f"{gain}_high"] == 1
    speedups = {(c["arm"], c["category"]): c["measured_speedup"] for c in verdict["categories"]}
    assert len(speedups) == 5 * 3
    assert all(speedups["no MTP", category] == 1 for category in "abc")
    for c in verdict["categories"]:
        assert c["measured_speedup_low"] <= c["measured_speedup"] <= c["measured_speedup_high"]
    again = ["--also", "static:n_max=2,4", "--also", "static:n_max=4"]  # once
    text = tracekit("verify", *common, "--repeats", 1, "--plot", plot, *again)
    assert text.stdout.count("\nstatic:n_max=4") == 2  # an arm, and its categories
    assert "ranking agreement" in text.stdout
    assert "static:n_max=4" in text.stdout
    assert "c, n = 2" in text.stdout
    assert "(once)" in text.stdout
    assert "recorded with cache_type_k f16 (here f32), cache_type_v f16 (here f32), flash_attn auto" in text.stderr
    assert plot.read_text().startswith("<svg")


def test_verify_warns_about_another_model(models, tuned, prompts):
    """A policy tuned on another file runs, with a warning that says so."""
    result = tracekit("verify", models["deep"], tuned, "--prompts", prompts, *FAST, "--repeats", 1)
    assert "warning" in result.stderr
    assert "hash differs" in result.stderr


def test_generate_warns_of_what_a_policy_was_not_tuned_on(models):
    """Another model, of the same description or not, more slots, another device, other settings: a line each."""
    text = tracekit("generate", models["plain"], "x", "--policy", H200 / "8b-aligned-4-slots.toml", "--max-tokens", 2)
    for part in ("its hash differs", "tuned for 4 slots, here it is 1", "tuned on CUDA0", "threads 16 (here "):
        assert part in text.stderr


def test_generate_says_where_the_context_ends(models):
    """A text that stops for want of context is not taken for a whole one; nothing is said where it is whole."""
    short = ["generate", models["plain"], "x = ", "--ctx-size", 32, "--max-tokens"]
    assert "context of 32 ends, before --max-tokens 5000: raise --ctx-size" in tracekit(*short, 5000).stderr
    assert "--ctx-size" not in tracekit(*short, 4).stderr


def test_requests_beyond_what_the_model_was_trained_on(models, tmp_path):
    """Positions that it has never seen are told, in `generate` and `record`; nothing is said within them."""
    prompts, trace = tmp_path / "p.jsonl", tmp_path / "t.duckdb"
    prompts.write_text(json.dumps({"prompt": "x = 1\n" * 200}))
    says = "warning: 1 of 1 request went beyond the 512 tokens that the model was trained on"
    long = ["generate", models["plain"], "x = 1\n" * 200, "--max-tokens", 2]
    assert says in tracekit(*long).stderr
    assert says in tracekit("record", models["plain"], "--prompts", prompts, "-o", trace, *FAST).stderr
    assert "warning" not in tracekit(*long[:2], "x = 1", *long[3:]).stderr


def test_a_closed_standard_input_is_one_line(models):
    """`-` with nothing to read from."""
    command = f"exec {sys.executable} -m tracekit generate {models['plain']} - <&-"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "tracekit: error: PROMPT: - reads standard input, which is closed\n"


def test_verify_warns_of_times_from_elsewhere(models, prompts):
    """--cost of another model on another device: errors would look like the prediction's."""
    cost = H200 / "8b-aligned.duckdb"
    text = tracekit("verify", models["plain"], "off", "--cost", cost, "--prompts", prompts, *FAST, "--repeats", 1)
    assert "are of another model (its hash differs); of CUDA0: NVIDIA H200" in text.stderr
    assert "recorded with threads 16 (here 1)" in text.stderr


@pytest.mark.parametrize(
    ("policy", "prompt", "says"),
    [("static:n_max=20", "x", "n_max 20 is more than the engine's 6"), ("off", "x = 1\n" * 900, "do not fit into a")],
)
def test_verify_looks_at_everything_before_it_runs_anything(models, settings, policy, prompt, says):
    """A policy or a prompt that the engine refuses ends it before the first live run, not amid hours of them."""
    arms = [Arm("no MTP", None), Arm("other", parse_one(policy))]
    requests = [Request(text, 4, prompt_id=str(i)) for i, text in enumerate(["x", "y", prompt])]
    with pytest.raises(TracekitError, match=says):
        verify(models["plain"], arms, requests, settings, progress=lambda *_: pytest.fail("it ran"))


def test_sql_answers_and_explains(recorded):
    """A query gives a table or JSON; without one the commented schema is printed."""
    assert "acceptance_ratio" in tracekit("sql", recorded).stdout
    assert "p0" in tracekit("sql", recorded, "SELECT prompt_id FROM requests ORDER BY 1 LIMIT 1").stdout
    assert json.loads(tracekit("sql", recorded, "SELECT 1 AS one", "--json").stdout) == [{"one": 1}]


def test_live_recording(models, prompts, tmp_path):
    """--mode live records what a policy does; replaying that policy from it is exact."""
    path = tmp_path / "live.duckdb"
    tracekit(
        "record",
        models["plain"],
        "--prompts",
        prompts,
        "-o",
        path,
        "--mode",
        "live",
        "--policy",
        "static:n_max=3",
        "--baseline",
        *FAST,
    )
    row = json.loads(tracekit("replay", path, "--policy", "static:n_max=3", "--json").stdout)[0]
    assert row["exact_fraction"] == 1.0
    guess = json.loads(tracekit("replay", path, "--policy", "static:n_max=2", "--json").stdout)[0]
    assert 0 < guess["exact_fraction"] < 1
    assert guess["tokens_per_second_low"] < guess["tokens_per_second"] < guess["tokens_per_second_high"]


def test_slots_record_together(models, prompts, tmp_path):
    """With --parallel one decode serves several slots, the trace says so, and replay predicts as many."""
    path = tmp_path / "t.duckdb"
    tracekit("record", models["plain"], "--prompts", prompts, "-o", path, "--parallel", 3, *FAST)
    rows = json.loads(
        tracekit(
            "sql", path, "SELECT max(n_slots) AS slots, max(n_draft_slots) AS drafting FROM steps", "--json"
        ).stdout
    )
    assert rows == [{"slots": 3, "drafting": 3}]
    replayed = tracekit("replay", path, "--policy", "static:n_max=2", "--json").stdout
    assert [row["n_slots"] for row in json.loads(replayed)] == [3]
    assert "--parallel 1" in tracekit("replay", path, "--parallel", 1, code=2).stderr
    assert "--parallel 9" in tracekit("tune", path, "--parallel", 9, code=2).stderr


@pytest.mark.parametrize(
    ("verb", "options"),
    [
        ("record", ["--prompts", "tune", "--max-tokens", "200"]),
        ("calibrate", ["--slots", "1", "--contexts", "16", "--blocks", "1000"]),
    ],
)
def test_full_disk_stops_a_verb_that_records(models, tmp_path, verb, options):
    """Nothing is generated that is not recorded: one line says so at once, and there are no results of a part."""
    path = tmp_path / "t.duckdb"
    code = """if True:
        import os, resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        os.execv(sys.executable, [sys.executable, "-m", "tracekit", *sys.argv[1:]])
    """
    command = [sys.executable, "-c", code, verb, models["plain"], "-o", path, *options, "--threads", "1", "--json"]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (2, "")
    said = [line for line in result.stderr.splitlines() if not re.match(r"(tokens|decodes): ", line)]  # progress
    assert len(said) == 1
    assert re.match(r"tracekit: error: .*t\.duckdb: recording stopped \(.*too large", said[0])
    (counts,) = json.loads(tracekit("sql", path, "SELECT count(*) AS n FROM steps", "--json").stdout)
    assert 0 < counts["n"] < 10_000


def test_full_disk_stops_verify(models, tmp_path):
    """Probes that cannot be recorded end it at once: there is nothing to compare with."""
    code = """if True:
        import os, resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        os.execv(sys.executable, [sys.executable, "-m", "tracekit", *sys.argv[1:]])
    """
    options = ["--prompts", "tune", "--max-tokens", "200", "--threads", "1", "--repeats", "1"]
    command = [sys.executable, "-c", code, "verify", str(models["plain"]), "static:n_max=2", *options]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert (result.returncode, result.stdout) == (2, "")
    (said,) = (line for line in result.stderr.splitlines() if not line.startswith("live runs: "))
    assert re.match(r"tracekit: error: .*probe\.duckdb: recording stopped \(.*too large", said)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("verb", "options"),
    [("record", ["--prompts", "tune"]), ("calibrate", ["--slots", "1", "--contexts", "16", "--blocks", "1000"])],
)
def test_ctrl_c_says_where_the_recording_is(models, tmp_path, verb, options):
    """What was recorded until then is kept, and two lines say so."""
    path = tmp_path / "t.duckdb"
    command = [sys.executable, "-m", "tracekit", verb, models["plain"], "-o", path, *options, "--threads", "1"]
    running = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    journal, until = Path(f"{path}.journal"), time.monotonic() + 60
    while time.monotonic() < until and not (journal.exists() and journal.stat().st_size > 100_000):
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    told = running.communicate(timeout=60)[1].splitlines()
    assert running.returncode == 130
    assert told[-2:] == [
        f"what was recorded until then is in {path}; `tracekit stats {path}` shows it",
        "tracekit: interrupted",
    ]
    assert tracekit("stats", path).stdout


def test_ctrl_c_says_nothing_of_a_recording_that_is_not(tmp_path, capsys):
    """Before anything is recorded there is no trace, or the one that should have been replaced."""
    there = tmp_path / "there.duckdb"
    there.write_bytes(b"old")
    for path in (there, tmp_path / "none.duckdb"):
        with pytest.raises(KeyboardInterrupt), interrupted.told(path):
            raise KeyboardInterrupt
    assert capsys.readouterr().err == ""


def test_requests_that_the_context_ends_are_counted(models, prompts, tmp_path):
    """Fewer tokens than were asked for, for lack of context, are no silent matter."""
    wanted = ["record", models["plain"], "--prompts", prompts, "--no-baseline", *FAST]
    result = tracekit(*wanted, "-o", tmp_path / "a.duckdb", "--ctx-size", "16", "--json")
    assert json.loads(result.stdout)["ended_at_context"] == 6
    says = "6 of 6 requests ended where the context of 16 tokens did; raise --ctx-size"
    assert result.stderr.count(says) == 1
    result = tracekit(*wanted, "-o", tmp_path / "b.duckdb", "--json")
    assert json.loads(result.stdout)["ended_at_context"] == 0
    assert "--ctx-size" not in result.stderr


MISTAKES = [
    (["replay", "missing.duckdb"], "no such file"),
    (["replay", "{trace}", "--policy", "static:n_max=40"], "record with --n-max 40"),
    (["replay", "{trace}", "--policy", "nonsense"], "shipped: "),
    (["replay", "{trace}", "--plot", "x.gif"], "a picture ends in"),
    (["replay", "{trace}", "--bogus"], "No such option"),
    (["tune", "{trace}", "--max-slowdown", "5"], "between 0 and 1"),
    (["tune", "{trace}", "--folds", "100"], "--folds 100"),
    (["tune", "{trace}", "--space", "missing.toml"], "no such file"),
    (["tune", "{trace}", "-o", "{tuned}"], "--force"),
    (["replay", "{trace}", "--policy", ""], "a policy is name"),
    (["replay", "{trace}", "--policy", "static:n_max=1..inf/1"], "high >= low"),
    (["replay", "{trace}", "--policy", "static:n_max=1..8/1e-9"], "widen the step"),
    (["replay", "{trace}", "--policy", "{tuned}:n_max=3"], "edit the file"),
    (["tune", "{trace}", "--seed", "-1"], "--seed -1: 0 or more"),
    (["tune", "{trace}", "-o", "x.txt"], "ends in .toml"),
    (["tune", "{trace}", "-o", "no/such/folder/x.toml"], "is no folder"),
    (["tune", "{trace}", "--space", "{space}"], "drafts more than the"),
    (["sql", "{trace}", "SELECT nonsense"], "the query failed"),
    (["sql", "{trace}", "COPY (SELECT 1) TO '{trace}'"], "would write"),
    (["sql", "{trace}", "EXPLAIN ANALYZE COPY runs TO '{trace}.csv'"], "would write"),
    (["sql", "{trace}", "/* é */ explain (analyze) /**/ copy runs to '{trace}.csv' -- select 1"], "would write"),
    (["sql", "{trace}", "explain analyze with a as (select 1) insert into runs select * from runs"], "would write"),
    (["sql", "{trace}", "ATTACH '{trace}.other'"], "would write"),
    (["sql", "{trace}", "EXPORT DATABASE '{trace}-folder'"], "would write"),
    (["sql", "{trace}", "INSTALL json"], "would write"),
    (["sql", "{trace}", "SET threads = 1"], "would write"),
    (["sql", "{trace}", "SELECT max(started_at) - min(started_at) AS d FROM runs"], "::VARCHAR"),
    (["sql", "{trace}", "--json"], "--json needs a query"),
    (["stats", "{prompts}"], "not a DuckDB file"),
    (["record", "{model}", "--prompts", "missing.jsonl", "-o", "x.duckdb"], "no such prompts file"),
    (["record", "{model}", "--prompts", "", "-o", "x.duckdb"], "--prompts '': no name; give a file, or a shipped set"),
    (["record", "{model}", "--prompts", "{trace}", "-o", "x.duckdb"], "not a text file"),
    (["record", "{model}", "--prompts", "{prompts}", "-o", "{trace}"], "--force"),
    (["record", "{model}", "--prompts", "{prompts}", "-o", "{prompts}", "--force"], "replaces traces only"),
    (["generate", "{model}", "x", "--trace", "{model}", "--force"], "replaces traces only"),
    (["record", "{model}", "--prompts", "{prompts}", "-o", "x.duckdb", "--mode", "dream"], "probe or live"),
    (["record", "{model}", "--prompts", "{prompts}", "-o", "x.duckdb", "--policy", "off"], "add --mode live"),
    (["record", "{model}", "--prompts", "{prompts}", "-o", "x.duckdb", "--mode", "live"], "needs --policy"),
    (["record", "missing.gguf", "--prompts", "{prompts}", "-o", "x.duckdb"], "no such model"),
    (["record", "{model}", "--prompts", "{prompts}", "-o", "no/such/folder/x.duckdb"], "cannot be written"),
    (
        ["record", "{model}", "--prompts", "heldout", "-o", "x.duckdb", "--ctx-size", "64", "--batch-size", "64"],
        "raise --ctx-size",
    ),
    (["record", "{model}", "--prompts", "{prompts}", "-o", ""], "a folder; choose another name"),
    (["calibrate", "{model}", "-o", ".", "--contexts", "8", "--slots", "1"], "a folder; choose another name"),
    (["generate", "{model}", "x", "--trace", "", "--force"], "a folder; choose another name"),
    (["model", "build", "-o", ".", "--force"], "is no file; choose another name"),
    (["model", "build", "-o", "{prompts}", "--force"], "replaces models only"),
    (["model", "build", "-o", "{prompts}", "--sidecar", "--force"], "replaces models only"),
    (["generate", "{prompts}", "x"], "not a GGUF file"),
    (["generate", "{model}", ""], "the prompt is empty"),
    (["generate", "{model}", "x", "--policy", "static:n_max=30"], "raise the engine's"),
    (["generate", "{model}", "x", "--policy", "static:n_max=2,4"], "one is wanted"),
    (["generate", "{model}", "x", "--cache-type-k", "f8"], "one of f32, f16, q8_0"),
    (["generate", "{model}", "x", "--threads", "1000000"], "512 or less"),
    (["generate", "{model}", "x", "--policy", "static", "--n-max", "255"], "--n-max 255: 254 or less"),
    (["generate", "{model}", "x", "--ctx-size", "0"], "--ctx-size 0 (n_ctx): 8 or more"),
    (["generate", "{model}", "x", "--batch-size", "8"], "raise --batch-size or lower --n-max"),
    (["generate", "{model}", "x", "--batch-size", "40000"], "--batch-size 40000 (n_batch): 32767 or less"),
    (["verify", "{model}", "static", "--parallel", "0"], "--parallel 0 (n_slots): 1 or more"),
    (["generate", "{model}", "x", "--draft-model", "{model}"], "add --policy"),
    (
        ["generate", "{model}", "x", "--policy", "static", "--draft-model", "s.gguf"],
        "`tracekit model build --sidecar -o s.gguf` writes the reference model's drafter",
    ),
    (["generate", "{model}", "x", "--n-max", "4"], "--n-max: policy off drafts nothing; add --policy"),
    (["generate", "{model}", "x", "--no-spec-draft-backend-sampling"], "--no-spec-draft-backend-sampling: policy off"),
    (["generate", "{model}", "x", "--temp", "-1"], "error: --temp -1.0: a number between 0 and 100"),
    (["generate", "{model}", "x", "--temp", "1", "--top-k", "-1"], "error: --top-k -1: a whole number between"),
    (["generate", "{model}", "x", "--seed", "-1"], "error: --seed -1: a whole number between"),
    (["generate", "{model}", "x", "--max-tokens", "0"], "error: --max-tokens 0: a whole number from 1"),
    (["generate", "{model}", "x", "--top-k", "40"], "--top-k: changes nothing at --temp 0"),
    (["generate", "{model}", "x", "--seed", "0"], "--seed: changes nothing at --temp 0"),
    (["verify", "{model}", "static", "--seed", "1", "--min-p", "0"], "--min-p: changes nothing at --temp 0"),
    (["generate", "{model}", "x", "--kv-unified"], "--kv-unified: a single slot has one KV cache anyway"),
    (["calibrate", "{model}", "-o", "x.duckdb", "--slots", "1", "--kv-unified"], "--kv-unified: a single slot"),
    (["record", "{model}", "--prompts", "{prompts}", "-o", "x.duckdb", "--top-p", "1"], "--top-p: changes nothing"),
    (["generate", "{model}", "x", "--stop", ""], "leave it out"),
    (["generate", "{model}", "x", "--stop", "\udcff"], "holds half of a surrogate pair"),
    (["record", "{model}", "--prompts", "{prompts}", "-o", "x.duckdb", "--parallel", "9"], "needs 9 prompts"),
    (["record", "{model}", "--prompts", "{prompts}/x", "-o", "x.duckdb"], "not a text file"),
    (["verify", "{model}", "static", "--n-max", "0"], "compares drafting"),
    (["verify", "{model}", "static", "--cost", "{prompts}"], "not a DuckDB file"),
    (["replay", "{trace}", "--force"], "--force needs --plot"),
    (["verify", "{model}", "static", "--force"], "--force needs --plot"),
    (["verify", "{model}", "static", "--plot", "{picture}"], "exists; choose another name or give --force"),
    (["calibrate", "{model}", "-o", "x.duckdb", "--plot", "{picture}"], "exists; choose another name or give --force"),
    (["verify", "{model}", "static", "--plot", "no/such/folder/v.png"], "is no folder"),
    (["model", "build", "-o", "x.gguf", "--layers", "8", "--seed", "-1"], "--seed -1: 0 or more"),
    (["model", "build", "-o", "no/such/folder/x.gguf"], "is no folder; make it first"),
    (["doctor", "--gpu-layers", "-7"], "-1 or more"),
    (["verify", "{model}", "missing.toml"], "no such policy file"),
    (["model", "build", "-o", "x.gguf", "--width", "300"], "exact only for"),
    (["doctor", "{prompts}"], "not a GGUF file"),
    (["demo", "-o", "d", "--resume"], "d: no demo to go on with (no plan.json); leave out --resume to begin one"),
    (["demo", "-o", "{prompts}", "--force"], "a file; choose a folder with -o"),
    (["demo", "-o", "{study}", "--force"], "aligned.json: of no demo (there is no plan.json beside it)"),
    (["replay", "{trace}", "--policy", "{folder}.toml"], "Is a directory"),
    (["replay", "{trace}", "--policy", "x" * 300], "no policy 'xxx"),
    (["replay", "{trace}", "--policy", "x" * 300 + ".py"], "File name too long"),
    (["campaign", "smoke", "-o", "c", "--threads", "-1"], "--threads -1: 0 or more"),
    (["campaign", "smoke", "-o", "c", "--gpu-layers", "-5"], "--gpu-layers -5: -1 or more"),
    (["demo", "-o", "d", "--layers", "3"], "--layers 3: the model has 5 already"),
    (["demo", "-o", "d", "--width", "300"], "--width 300: exact only for"),
    (["demo", "-o", "d", "--prompts", "-1"], "--prompts -1: 0 or more"),
    (["demo", "-o", "d", "--repeats", "0"], "--repeats 0: 1 or more"),
    (["demo", "-o", "d", "--max-tokens", "1"], "--max-tokens 1: 2 or more"),
    (["demo", "-o", "d", "--max-tokens", "5000"], "--max-tokens 5000: fewer than the 1024"),
    (["demo", "-o", "d", "--type", "f8"], "--type f8: one of"),
    (["demo", "-o", "d", "--threads", "-1"], "--threads -1: 0 or more"),
    (["verify", "{model}", "static:n_max=2", "--also", "static:n_max=20"], "policy static:n_max=20: n_max 20 is more"),
    (["tune", "{trace}", "-o", "{folder}.toml", "--force"], "is no file; choose another name"),
    (["tune", "{trace}", "-o", "x" * 300 + ".toml"], "File name too long"),
    (["doctor", "{folder}.toml"], "a folder; give a GGUF file in it"),
    (["model", "inspect", "{folder}.toml"], "a folder; give a GGUF file in it"),
    (["tune", "{trace}", "--force"], "--force needs -o"),
    (["generate", "{model}", "x", "--force"], "--force needs --trace"),
    (["doctor", "--gpu-layers", "3"], "--gpu-layers needs a MODEL"),
    (["model", "build", "-o", "x.gguf", "--seed", "7"], "--seed needs --layers, --width or --misaligned"),
    (["model", "build", "-o", "x.gguf", "--source", "{sidecar}"], "only a drafter (a sidecar)"),
    (["model", "inspect", "{cut}"], "truncated or damaged"),
    (["sql", "{trace}", "select 1; select 2"], "2 statements; ask one at a time"),
    (["nonsense"], "No such command"),
]


@pytest.mark.parametrize(("arguments", "hint"), MISTAKES, ids=[" ".join(m[0])[:50] for m in MISTAKES])
def test_mistakes_get_one_clear_line(arguments, hint, recorded, tuned, prompts, models, tmp_path, tmp_path_factory):
    """Exit code 2, one line that names the fix, nothing on standard output, nothing half-written."""
    space = tmp_path_factory.mktemp("space") / "space.toml"
    space.write_text("[static]\nn_max = [9, 10]\n")
    folder, cut = space.parent / "folder", space.parent / "cut.gguf"
    folder.with_suffix(".toml").mkdir()
    (picture := space.parent / "p.png").write_bytes(b"mine")
    (study := space.parent / "study").mkdir()
    (study / "aligned.json").write_text("mine")
    cut.write_bytes(models["plain"].read_bytes()[:900_000])
    places = {
        "trace": recorded, "tuned": tuned, "prompts": prompts, "model": models["plain"], "sidecar": models["sidecar"],
        "space": space, "folder": folder, "cut": cut, "picture": picture, "study": study,
    }  # fmt: skip  # what there is, then what is made here
    before = {p: p.stat().st_mtime_ns for p in (recorded, tuned, prompts)}
    result = tracekit(*(a.format(**places) for a in arguments), code=2, cwd=tmp_path)
    lines = result.stderr.strip().splitlines()
    assert len([line for line in lines if line.startswith("tracekit: error:")]) == 1
    assert hint in lines[-1]
    assert result.stdout == ""
    assert not list(tmp_path.iterdir())
    assert before == {p: p.stat().st_mtime_ns for p in before}


def test_output_respects_pipes_and_no_color(recorded):
    """No colour codes and no cut-off columns in a pipe; a reader that leaves early is no error."""
    result = tracekit("replay", recorded, env={**os.environ, "NO_COLOR": "1"})
    assert "\x1b" not in result.stdout
    assert "…" not in result.stdout
    command = f"{sys.executable} -m tracekit policies | head -n 1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    command = f"{sys.executable} -m tracekit policies > /dev/full"
    full = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (full.returncode, full.stderr.count("\n")) == (2, 1)
    assert "No space left" in full.stderr


@pytest.mark.parametrize(("closed", "says"), [(">&-", "standard output is closed"), (">&- 2>&-", "")])
def test_closed_output_is_one_clear_line(recorded, tmp_path, closed, says):
    """Without standard output nothing is done, and nothing written elsewhere in its place."""
    plot = tmp_path / "p.html"
    command = f"{sys.executable} -m tracekit stats {recorded} --plot {plot} {closed}"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (2, bool(says))
    assert says in result.stderr
    assert not plot.exists()


def test_closed_errors_are_no_mistake(recorded):
    """Without standard error a verb does what it does, and a mistake is the exit code."""
    command = f"{sys.executable} -m tracekit stats {recorded} --json 2>&-"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert result.returncode == 0
    assert json.loads(result.stdout)
    result = subprocess.run(command.replace("stats", "nonsense"), shell=True, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (2, "")


def test_tables_are_never_cut(monkeypatch):
    """In a narrow terminal, and where a cell looks like markup, every character is printed."""
    import io

    from tracekit.cli.out import print_table
    from tracekit.report.tables import table

    monkeypatch.setenv("COLUMNS", "20")
    printed = io.StringIO()
    print_table(table(["policy", "[b]"], [["static" * 40, "[/code] :smile:"]]), printed)
    assert "static" * 40 in printed.getvalue()
    assert "[/code] :smile:" in printed.getvalue()
    assert "[b]" in printed.getvalue()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            "DELETE FROM verifications WHERE request = (SELECT max(request) FROM requests WHERE arm = 'probe') "
            "AND n_generated = 2",
            "damaged",
        ),
        ("DROP VIEW summary; DROP TABLE steps", "damaged"),
        ("ALTER TABLE runs RENAME schema_version TO version", "damaged"),
        ("UPDATE verifications SET n_proposed = 300 WHERE n_generated = 2", "drafts of 300 tokens"),
    ],
)
def test_damaged_traces_are_named(recorded, tmp_path, damage, says):
    """Rows or tables that are not there, and drafts too long to be counted, are one line, not a number that is a
    little off.
    """
    import shutil

    import duckdb

    path = tmp_path / "damaged.duckdb"
    shutil.copy(recorded, path)
    with duckdb.connect(path) as con:
        con.execute(damage)
    result = tracekit("replay", path, code=2)
    assert says in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "query",
    [
        "EXPLAIN SELECT 'é' FROM runs",
        "/* é */ explain analyze with a as (select * from runs) select * from a",
        "explain (analyze, format json) (select 1) union (select 2)",
        "explain analyze from runs",
        "PRAGMA database_size",
        "DESCRIBE runs",
        "SHOW TABLES",
    ],
)
def test_queries_that_only_read_are_answered(recorded, query):
    """Also those that explain what they read, however that is written."""
    assert json.loads(tracekit("sql", recorded, query, "--json").stdout)


def test_numbers_of_a_query_are_numbers_in_json(recorded):
    """Sums of integers and decimals are numbers, however wide DuckDB makes them; bytes are hexadecimal text."""
    query = (
        "SELECT sum(n) AS sum, sum(n)::HUGEINT << 64 AS huge, 1.25 AS part, 2.00 AS whole, [sum(n)] AS list, "
        "'\\xAA'::BLOB AS blob, sum(n) FILTER (n > 9) AS none FROM range(7) of(n)"
    )
    (row,) = json.loads(tracekit("sql", recorded, query, "--json").stdout)
    wanted = {"sum": 21, "huge": 21 << 64, "part": 1.25, "whole": 2, "list": [21], "blob": "aa", "none": None}
    assert row == wanted
    assert {name: type(value) for name, value in row.items()} == {name: type(value) for name, value in wanted.items()}


def test_intervals_of_what_never_happened():
    """A share of none or all has an interval by the rule of three over requests; that of one request has none."""
    from tracekit.report.stats import ratio_interval

    assert ratio_interval(np.zeros(10), np.full(10, 9)) == (0.0, 0.0, 0.3)
    assert ratio_interval(np.full(10, 9), np.full(10, 9)) == (1.0, 0.7, 1.0)
    assert ratio_interval(np.array([3]), np.array([4])) == (0.75, None, None)
    assert ratio_interval(np.array([3, 1]), np.array([4, 4])) == (0.5, 0.0, 1.0)  # two tell next to nothing
    few, many = (
        ratio_interval(np.array([5, 4, 3]), np.full(3, 8)),
        ratio_interval(np.tile([6, 4, 2], 100), np.full(300, 8)),
    )
    assert few[1] == pytest.approx(0.5 - student.ppf(0.975, 2) * 0.125 / 3**0.5)
    assert many[2] == pytest.approx(0.5 + 1.96 * 0.25 * (2 / 3) ** 0.5 / 300**0.5, rel=0.01)


def test_intervals_of_equal_requests_have_a_width():
    """Requests that happen to have the same ratio tell no more than as many independent drafts."""
    from tracekit.report.stats import ratio_interval

    ratio, low, high = ratio_interval(np.array([8, 8]), np.array([11, 11]))
    assert (high - ratio, ratio - low) == pytest.approx((1.96 * (8 * 3 / 11**2 / 22) ** 0.5,) * 2)


@pytest.mark.parametrize(("seen", "n"), [(0, 100), (1, 100), (7, 100), (50, 50_000), (99, 100)])
def test_bound_of_what_differed_is_one_of_95_per_cent(seen, n):
    """Were the share as large as the bound, so few would be seen in one of twenty recordings."""
    from scipy.stats import binom

    from tracekit.report.stats import at_most

    assert binom.cdf(seen, n, at_most(seen, n)) == pytest.approx(0.05)
    assert at_most(n, n) == 1


def test_demo_runs_the_whole_loop(tmp_path):
    """`tracekit demo`, small: both heads, the table, advice, and the files it promises; and it goes on where it
    stopped.
    """
    folder = tmp_path / "demo"
    options = ["-o", folder, "--layers", 8, "--prompts", 1, "--max-tokens", 20, "--repeats", 1, "--threads", 1]
    result = tracekit("demo", *options)
    names = {p.name for p in folder.iterdir()}
    assert names == {f"{h}.{e}" for h in ("aligned", "misaligned") for e in ("gguf", "duckdb", "toml", "json")} | {
        "plan.json",
        "verdict.png",
    }
    for arm in ("no MTP", "naive n_max=8", "n_max=1", "fallback", "tuned"):
        assert result.stdout.count(arm) >= 2
    assert "Do not speculate" in result.stdout  # the misaligned head
    assert "not empty" in tracekit("demo", "-o", folder, code=2).stderr
    assert "with these options" in tracekit("demo", "-o", folder, "--resume", code=2).stderr

    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("*aligned.*")}
    (folder / "misaligned.json").write_text("[]")
    assert "not a verdict" in tracekit("demo", *options, "--resume", code=2).stderr
    (folder / "misaligned.json").unlink()
    again = tracekit("demo", *options, "--resume", "--json")
    assert "recording" not in again.stderr
    heads = json.loads(again.stdout)
    assert [head["name"] for head in heads] == ["aligned", "misaligned"]
    assert heads[1]["tuned"]["policy"] == "off"
    assert all(head["verdict"] == json.loads((folder / f"{head['name']}.json").read_text()) for head in heads)
    assert again.stderr.count("verifying") == 1
    changed = {name for name, at in before.items() if (folder / name).stat().st_mtime_ns != at}
    assert changed == {"misaligned.json"}
