"""Docs, notebook, shipped traces and command line, checked against each other."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import tracekit
from tracekit.policy import file
from tracekit.policy.rule import shipped
from tracekit.policy.spec import parse, parse_one
from tracekit.replay import kernel, lockstep
from tracekit.replay.league import League
from tracekit.report import surface
from tracekit.verify import Verdict

from .test_cli import COMMANDS, VERBS

ROOT = Path(__file__).parent.parent
TRACES = sorted((ROOT / "traces").glob("*.duckdb"))
H200 = ROOT / "traces" / "h200"
README = (ROOT / "README.md").read_text()


def test_readme_names_every_verb_and_policy():
    """Every verb and every policy is in the README, and nothing that does not exist."""
    named = set(re.findall(r"\btracekit ([a-z]+)\b", README))
    assert named - {"is", "decides"} <= VERBS
    assert named >= VERBS
    assert all(f"`{rule.name}`" in README for rule in shipped())


def test_documented_options_exist():
    """Every option that a command in the docs gives is one of its verb's."""
    found = 0
    for path in (ROOT / "README.md", *ROOT.glob("*/*.md")):
        text = path.read_text().replace("\\\n", " ")
        for verb, given in re.findall(r"\btracekit ((?:model )?[a-z]+)([^\n`#|]*)", text):
            if verb in COMMANDS:
                known = {o for p in COMMANDS[verb].params for o in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
                options = re.findall(r"(?<=\s)--?[a-z][a-z-]*", given)
                assert set(options) <= known, f"{path.name}: tracekit {verb}{given}"
                found += len(options)
    assert found > 30


def _commands(kind: str) -> list[str]:
    blocks = re.findall(rf"```{kind}\n(.*?)```", README, re.DOTALL)
    return [
        line.strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")
    ]


@pytest.mark.parametrize("line", [c for c in _commands("console") if c.startswith("tracekit ")])
def test_readme_commands_run_as_written(line):
    """The README's analysis commands run as they are written, from the root of a clone."""
    command = shlex.split(line, comments=True)
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


def test_readme_python_runs_as_written(tmp_path, monkeypatch, models):
    """So does its Python, up to the engine, which gets a model here."""
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    monkeypatch.chdir(ROOT)
    code = code.replace('"model.gguf"', repr(str(models["plain"]))).replace(
        '"policy.toml"', repr(str(tmp_path / "p.toml"))
    )
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "p.toml").exists()


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.name)
def test_shipped_traces_are_whole(path):
    """Each under 5 MB, finished, with provenance, and named in traces/README.md."""
    trace = tracekit.open(path)
    run = trace.file.runs.row(0, named=True)
    assert path.stat().st_size < 5_000_000
    assert not path.with_name(path.name + ".wal").exists()
    assert run["wall_us"] is not None
    assert run["mode"] in path.name
    assert run["llama_cpp"].startswith("llama-cpp-python")
    assert path.name in (ROOT / "traces" / "README.md").read_text()


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.name)
def test_shipped_traces_replay(path):
    """At its own costs, that of a drafter that is hardly ever right too, every usual policy has a speed, exact in a
    probe; a live trace's own policy comes out as it ran.
    """
    trace = tracekit.open(path)
    rows = trace.replay(trace.league.usual_policies())
    assert (rows["tokens_per_second_low"] > 0).all()
    if trace.file.runs["mode"][0] == "probe":
        assert (rows["exact_fraction"] == 1).all()
        return
    assert rows["exact_fraction"][0] == 1  # off
    row = trace.replay(trace.file.runs["policy"][0]).row(0, named=True)
    assert row["exact_fraction"] == 1
    ran = trace.sql("SELECT sum(drafted)::INT, sum(accepted)::INT FROM summary WHERE arm = 'live'").row(0)
    assert (row["drafted"], row["accepted"]) == ran


def test_five_traces_ship():
    """Aligned and misaligned, probe and live; and a probe of the model that was trained on a GPU."""
    assert {p.stem for p in TRACES} == {"trained-probe"} | {
        f"reference-{head}-{mode}" for head in ("aligned", "misaligned") for mode in ("probe", "live")
    }


def test_one_traces_acceptance_at_anothers_prices():
    """The model trained on a GPU, recorded whole on a CPU and briefly on the GPU: what it accepts on the one costs what
    it took on the other, which is said; a fixed length that loses on the CPU pays there.
    """
    here = tracekit.open(ROOT / "traces" / "trained-probe.duckdb")
    there = tracekit.open(H200 / "3b-trained.duckdb")
    league = League.of(here.file, there.file)
    assert "times are of another model" in league.warning
    five = [parse_one("static:n_max=5")]
    row, own, briefly = (of.table(five).row(0, named=True) for of in (league, here.league, there.league))
    assert row["speedup_low"] > 1 > own["speedup_high"]
    assert briefly["speedup"] == pytest.approx(row["speedup"], rel=0.1)


def test_tuning_the_shipped_traces_gives_the_expected_advice():
    """From the aligned trace: speculate, faster than the best fixed length; from the misaligned one: do not."""
    aligned = tracekit.open(ROOT / "traces" / "reference-aligned-probe.duckdb").tune()
    assert aligned.evidence.speedup_low > 1
    assert aligned.policy.name != "off"
    misaligned = tracekit.open(ROOT / "traces" / "reference-misaligned-probe.duckdb").tune()
    assert misaligned.policy.name == "off"
    assert "Do not speculate" in misaligned.evidence.advice


@pytest.mark.parametrize("path", sorted(H200.glob("*.duckdb")), ids=lambda p: p.name)
def test_cuda_traces_are_of_a_gpu(path):
    """Small, named in traces/README.md, finished unless that says otherwise, with every layer on the GPU; replay is
    exact, and a graph that CUDA captures costs more than one that it launches or repeats.
    """
    trace = tracekit.open(path)
    run = trace.file.runs.row(0, named=True)
    machine = json.loads(run["machine"])
    assert path.stat().st_size < 5_000_000
    (told,) = (line for line in (ROOT / "traces" / "README.md").read_text().splitlines() if f"`{path.name}` |" in line)
    assert (run["wall_us"] is None) == ("cut off" in told)
    assert "CUDA0: NVIDIA H200" in run["device"]
    assert machine["placement"]["on_gpu"]
    assert machine["cuda_graphs"]
    assert trace.sql("SELECT count(*) FROM gpu_readings").item() > 10
    if run["mode"] == "calibration":
        return
    prices = trace.league.cost.prices
    if "slots" in path.name:
        captures, reshape = prices[lockstep.CAPTURES], prices[lockstep.RESHAPES]
    else:
        captures, reshape = prices[kernel.CAPTURES], prices[kernel.RESHAPES]
    assert captures > reshape > 1000
    assert (trace.replay(trace.league.usual_policies())["exact_fraction"] == 1).all()


def test_a_calibration_prices_a_study():
    """The GPU's cost surface, measured with random prompts at other contexts, prices the study's policies as its own
    times do, twelve hours older; and it jumps where the kernel changes, from one row to two and beyond sixteen.
    """
    study, calibration = tracekit.open(H200 / "1b-aligned.duckdb"), tracekit.open(H200 / "1b-calibration.duckdb")
    policies = list(parse("off,static:n_max=1,2,4,8,fallback:n_max=8"))
    priced, own = (of.table(policies) for of in (League.of(study.file, calibration.file), study.league))
    for column in ("speedup", "tokens_per_second"):
        assert priced[column].to_list() == pytest.approx(own[column].to_list(), rel=0.06)
    found = surface.jumps(surface.surface(calibration.file)).filter("beyond_noise").sort("ratio", descending=True)
    assert found["after_tokens"].head(5).to_list() == [1, 1, 1, 1, 16]
    assert found.filter(slots=1, context=512)["ratio"].max() > 0.6


@pytest.mark.parametrize("path", sorted(H200.glob("*d.json")), ids=lambda p: p.name)
def test_cuda_verdicts(path):
    """Live runs on the GPU were predicted within 2 % at the median, by a policy file that names its trace."""
    verdict, tuned = Verdict.load(path), file.read(path.with_suffix(".toml"))
    assert verdict.median_error_ratio < 0.02
    assert tuned.evidence.trace_id == tracekit.open(path.with_suffix(".duckdb")).file.runs["trace_id"][0]
    told = (H200 / "tables.txt").read_text()
    assert verdict.sentence in told
    assert tuned.evidence.advice in told


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.name)
def test_notebooks_run(path):
    """Every notebook runs from top to bottom where it lies, and is committed without output."""
    notebook = nbformat.read(path, 4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(path.parent)}}).execute()
    assert sum(bool(cell.get("outputs")) for cell in notebook.cells) >= 5


def test_library_front_matches_its_docstring():
    """Everything the package exports can be imported, and is documented."""
    for name in dir(tracekit):
        assert getattr(tracekit, name) is not None
        if name != "__version__":
            doc = getattr(tracekit, name).__doc__
            assert doc, name
            assert not doc.startswith(f"{name}("), f"{name}: a dataclass writes this itself where there is no docstring"
