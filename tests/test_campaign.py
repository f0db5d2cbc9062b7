"""A campaign on the processor: the stages that a borrowed GPU will run, small, stopped half-way and gone on with."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import duckdb
import pytest

from tracekit import campaign
from tracekit.cli.campaign import _draw
from tracekit.cli.campaign import campaign as verb
from tracekit.engine import Engine, lib
from tracekit.engine.doctor import demand_gpu, examine, surroundings
from tracekit.engine.gpu import GpuSensors, gpus
from tracekit.engine.placement import Placement
from tracekit.engine.recorder import Recorder
from tracekit.errors import TracekitError
from tracekit.model.build import REFERENCE
from tracekit.plans import PLANS, Plan, Studied, read_plan, shipped_plans
from tracekit.policy import file
from tracekit.report.stats import summarise
from tracekit.study import Failed, Finding, Study, Teller, Workload, complete, conduct, recording
from tracekit.trace.journal import Journal
from tracekit.trace.rows import GpuReading
from tracekit.trace.store import open_trace
from tracekit.trace.writer import TraceWriter
from tracekit.verify import Verdict

CUDA_LOG = """\
load_tensors: layer   0 assigned to device CUDA0, is_swa = 0
load_tensors: layer   1 assigned to device CUDA0, is_swa = 0
load_tensors: offloaded 2/2 layers to GPU
load_tensors:   CPU_Mapped model buffer size =     1.00 MiB
load_tensors:        CUDA0 model buffer size =   100.50 MiB
llama_context: flash_attn            = auto
llama_kv_cache:      CUDA0 KV buffer size =    16.00 MiB
resolve_fused_ops: Flash Attention enabled
"""


def run(*arguments: object, code: int = 0) -> subprocess.CompletedProcess:
    """`tracekit campaign` with ``arguments``, from outside."""
    command = [sys.executable, "-m", "tracekit", "campaign", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, result.stderr
    assert "Traceback" not in result.stderr
    return result


def test_a_campaign_goes_on_where_it_stopped(tmp_path):
    """Without time nothing begins; the same command then does it all, a third time nothing; cut short it tells of the
    studies that are done; another plan is refused.
    """
    folder, models = tmp_path / "out", tmp_path / "models"
    options = ["-o", folder, "--models", models, "--threads", 1]
    assert "goes on" in run("smoke", *options, "--minutes", 1e-9, code=3).stderr
    result = run("smoke", *options)
    plan = read_plan("smoke")[0]
    heads = ("aligned", "aligned-2-slots", "misaligned")
    traces = {f"tiny-{name}.duckdb" for name in (*heads, "calibration", *(v.name for v in plan.live))}
    studies = {f"tiny-{head}.{ending}" for head in heads for ending in ("toml", "json")}
    assert {p.name for p in folder.iterdir()} == traces | studies | {
        "plan.toml", "environment.json", "tables.txt", "verdict.png",
    }  # fmt: skip  # what every campaign leaves
    assert all(f"tiny-{head}" in result.stdout for head in heads)
    assert result.stdout.strip() == (folder / "tables.txt").read_text().strip()
    for name in traces:
        ends = open_trace(folder / name).runs["wall_us"]
        assert ends.is_not_null().all(), name
    assert file.read(folder / "tiny-misaligned.toml").evidence.trace == "tiny-misaligned.duckdb"
    assert file.read(folder / "tiny-aligned-2-slots.toml").evidence.n_slots == 2
    live = open_trace(folder / f"tiny-{plan.live[0].name}.duckdb").frame("SELECT max(n_slots) AS n FROM steps")
    assert live["n"][0] == plan.live[0].slots

    before = {p: p.stat().st_mtime_ns for p in folder.glob("*.duckdb")}
    run("smoke", *options)
    assert before == {p: p.stat().st_mtime_ns for p in folder.glob("*.duckdb")}

    (folder / "tiny-misaligned.json").unlink()
    cut_short = run("smoke", *options, "--minutes", 1e-9, code=3)
    assert cut_short.stdout.strip() == (folder / "tables.txt").read_text().strip()
    assert "tiny-aligned" in cut_short.stdout
    assert "tiny-misaligned" not in cut_short.stdout
    assert "not of a campaign with this plan" in run("cuda", *options, code=2).stderr
    other = run("smoke", "-o", folder, "--models", models, "--threads", 2, code=2)
    assert "the campaign began with threads 1, here it would go on with 2" in other.stderr
    assert len(other.stderr.splitlines()) == 1


@contextmanager
def _watching(_):
    yield lambda done, total: None


QUIET = Teller(lambda line: None, _watching)


def test_a_plan_may_be_for_one_thing(tmp_path):
    """Without studies and calibration a campaign records what is left, and has no tables to tell."""
    text = (PLANS / "smoke.toml").read_text()
    head, _, rest = text.partition("[[studies]]")
    live = rest[rest.index("[[live]]") : rest.rindex("[[live]]")]
    (tmp_path / "plan.toml").write_text(head + live)
    folder = tmp_path / "out"
    result = run(tmp_path / "plan.toml", "-o", folder, "--models", tmp_path / "models", "--threads", 1, "--json")
    assert json.loads(result.stdout) == []
    names = {p.name for p in folder.iterdir()}
    assert names == {"plan.toml", "environment.json", "tiny-live-aligned-static-n-max-2-2x512.duckdb"}


def test_a_study_that_cannot_be_tuned_does_not_end_a_campaign(tmp_path):
    """Too few probes to tell what things cost are a line, what comes after goes on, and the end names the study."""
    text = (PLANS / "smoke.toml").read_text()
    for key, value in {"n_max": 8, "prompts": 1, "max_tokens": 12}.items():
        text = re.sub(rf"^{key} = .*", f"{key} = {value}", text, count=1, flags=re.MULTILINE)
    head, _, rest = text.partition("[[studies]]")
    live = rest[rest.index("[[live]]") : rest.rindex("[[live]]")]
    (tmp_path / "plan.toml").write_text(head + '[[studies]]\nhead = "aligned"\n' + live)
    command = [
        tmp_path / "plan.toml",
        "-o",
        tmp_path / "out",
        "--models",
        tmp_path / "models",
        "--threads",
        1,
        "--json",
    ]
    for _ in range(2):
        result = run(*command, code=2)
        said = result.stderr.splitlines()
        assert any(line.startswith("[tiny-aligned] failed, going on: ") for line in said)
        assert "not tuned or verified, for the reasons told above: tiny-aligned; all else is done" in said[-1]
        assert json.loads(result.stdout) == []
        assert complete(tmp_path / "out" / "tiny-live-aligned-static-n-max-2-2x512.duckdb")


def _study(models, settings, folder):
    """A study that is over soon."""
    return Study(folder, "s", models["plain"], None, replace(settings, n_max=2), Workload(4, 0.0, 1, 1, 0))


def test_a_study_that_was_interrupted_records_anew(models, settings, tmp_path):
    """What is left of an interrupted recording, and what was made of it, is kept beside and rested on no more."""

    @contextmanager
    def interrupted(what):
        def update(done, total):
            raise KeyboardInterrupt

        yield update

    study, trace = _study(models, settings, tmp_path), tmp_path / "s.duckdb"
    with pytest.raises(KeyboardInterrupt):
        conduct(study, Teller(lambda line: None, interrupted))
    trace.with_suffix(".toml").write_text("stale")
    trace.with_suffix(".json").write_text("stale")
    assert not complete(trace)
    assert {p.name for p in tmp_path.iterdir()} == {"s-cut-off.duckdb", "s-cut-off.toml", "s-cut-off.json"}
    assert open_trace(tmp_path / "s-cut-off.duckdb").frame("SELECT count(*) AS n FROM steps")["n"][0] > 0
    with recording(QUIET, "tokens", study.model, settings=study.settings, trace=trace) as (engine, _):
        engine.generate("import", max_tokens=8)
    assert complete(trace)


def test_what_a_cut_off_recording_left_stays_together(engine, tmp_path):
    """DuckDB's log, where it holds what the trace has not, is set aside with it."""
    trace = tmp_path / "s.duckdb"
    writer = TraceWriter.create(trace, facts_of(engine))
    writer._con.execute("PRAGMA disable_checkpoint_on_shutdown")  # as if the process had been killed
    writer._con.close()
    assert not complete(trace)
    assert {p.name for p in tmp_path.iterdir()} == {"s-cut-off.duckdb", "s-cut-off.duckdb.wal"}
    assert open_trace(tmp_path / "s-cut-off.duckdb").runs.height == 1


@pytest.mark.parametrize(
    "make", [Path.touch, lambda path: duckdb.connect(path).close(), lambda path: TraceWriter.create(path).close()]
)
def test_a_trace_that_was_hardly_begun_is_recorded_anew(tmp_path, make):
    """A file that a killed process left empty, without tables or without a run, is set aside as any other cut off."""
    make(tmp_path / "s.duckdb")
    assert not complete(tmp_path / "s.duckdb")
    assert [p.name for p in tmp_path.iterdir()] == ["s-cut-off.duckdb"]


def test_a_recording_that_fails_stops_a_study(models, settings, tmp_path, monkeypatch):
    """Nothing is tuned on what a full disk has left: one line says what happened, at once, and it concerns the whole
    campaign.
    """

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(TracekitError, match=r"s\.duckdb: recording stopped \(No space left on device\)") as error:
        conduct(_study(models, settings, tmp_path), QUIET)
    assert not isinstance(error.value, Failed)
    assert not (tmp_path / "s.toml").exists()
    assert not complete(tmp_path / "s.duckdb")


def test_models_of_another_seed_or_source_have_another_name(tmp_path, monkeypatch):
    """A plan with another seed does not take up the models of the first; nor does one whose source only has the name
    of another's, or was trained again.
    """
    monkeypatch.setattr(campaign, "build", lambda path, *_, **__: path.touch())
    monkeypatch.setattr(campaign, "examine", lambda *_: {})
    plan = read_plan("smoke")[0]
    for seed in (0, 1):
        run = campaign.Campaign(plan.model_copy(update={"seed": seed}), tmp_path, tmp_path, QUIET)
        run._ready(plan.sizes[0], "aligned")
    assert len(list(tmp_path.glob("*.gguf"))) == 4
    source = tmp_path / "mine"
    for text in ("one", "trained again"):
        source.write_text(text)
        size = plan.sizes[0].model_copy(update={"source": source})
        campaign.Campaign(plan, tmp_path, tmp_path, QUIET)._ready(size, "aligned")
    assert len(list(tmp_path.glob("*.gguf"))) == 8


def test_force_empties_a_folder_of_what_its_campaign_left_and_nothing_else(tmp_path):
    """Journals and logs go too, even those whose trace was moved, and what another plan's sizes made; a trace being
    recorded is refused and all stays, also where the plan cannot run here.
    """
    mine = {"notes.md", "tiny.toml", "paper.png", "pyproject.toml", "tiny-aligned-again.json", "b-aligned.duckdb"}
    made = {"tiny-aligned.duckdb", "tiny-aligned.duckdb.wal", "tiny-misaligned-2-slots.toml", "verdict.png"} | {
        "1.5b-calibration.duckdb.journal", "tiny-live-aligned-static-n-max-2-2x512.duckdb", "environment.json.partial",
        "verdict.png.0a1b2c3d.partial", "tiny-misaligned.toml.00112233.partial",
        "tiny-aligned-cut-off-2.duckdb", "tiny-aligned-cut-off-2.duckdb.journal.journal", "tables.txt",
    }  # fmt: skip  # what a campaign leaves
    left = mine | made | {"plan.toml"}
    for name in left:
        (tmp_path / name).touch()
    (tmp_path / "plan.toml").write_text('sizes = [{name = "tiny"}, {name = "1.5b"}]')
    if not lib.has_gpu():
        with pytest.raises(TracekitError, match="sees no GPU"):
            campaign.Campaign(read_plan("cuda")[0], tmp_path, tmp_path, QUIET).open("plan", force=True)
        assert {p.name for p in tmp_path.iterdir()} == left
    smoke = campaign.Campaign(read_plan("smoke")[0], tmp_path, tmp_path, QUIET)
    text = (PLANS / "smoke.toml").read_text()
    smoke.open(text, force=True)
    assert {p.name for p in tmp_path.iterdir()} == mine | {"plan.toml"}
    assert smoke.files == [tmp_path / "plan.toml"]
    writer = TraceWriter.create(tmp_path / "tiny-misaligned.duckdb")
    (tmp_path / "tiny-aligned.duckdb").touch()
    with pytest.raises(TracekitError, match=r"tiny-misaligned\.duckdb: being written by this process"):
        smoke.open(text, force=True)
    writer.close()
    assert all((tmp_path / f"tiny-{head}.duckdb").exists() for head in ("aligned", "misaligned"))


@pytest.mark.parametrize("plan", [None, "", "sizes = 3", "[[sizes]]\nlayers = 2", "no TOML"])
def test_force_is_for_the_folder_of_a_campaign(tmp_path, plan):
    """A folder that holds something, and no plan of a campaign, is refused and left as it is: one line, exit code 2."""
    (tmp_path / "tables.txt").write_text("mine")
    if plan is not None:
        (tmp_path / "plan.toml").write_text(plan)
    result = run("smoke", "-o", tmp_path, "--models", tmp_path / "models", "--force", code=2)
    assert "neither empty nor of a campaign" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "tables.txt").read_text() == "mine"
    assert not (tmp_path / "models").exists()


def test_environment_says_where_the_model_lies(models):
    """What the doctor finds is what llama.cpp said: here, every layer on the processor."""
    facts = surroundings() | {"model": examine(models["plain"])}
    placement = facts["model"]["placement"]
    assert set(placement["layers"]) == {"CPU"}
    assert sum(placement["layers"].values()) == facts["model"]["layers"] + facts["model"]["NextN layers"] + 1
    assert sum(placement["buffers"]["model"].values()) > 4 * facts["model"]["parameters"] * 0.9
    assert placement["flash_attn"] in ("enabled", "disabled")
    if not facts["machine"]["gpus"]:
        with pytest.raises(TracekitError, match="llama.cpp sees no GPU"):
            demand_gpu(facts)


def test_placement_of_a_gpu_and_of_half_a_gpu():
    """From llama.cpp's own lines: everything on the GPU is accepted, one layer on the processor is not."""
    whole = Placement.of(CUDA_LOG.splitlines())
    assert (whole.on_gpu, whole.offloaded, whole.offloadable, whole.flash_attn) == (True, 2, 2, "enabled")
    assert whole.buffers["model"] == {"CPU_Mapped": 1 << 20, "CUDA0": round(100.5 * (1 << 20))}
    whole.demand_gpu("m.gguf")
    half = Placement.of(CUDA_LOG.replace("1 assigned to device CUDA0", "1 assigned to device CPU").splitlines())
    with pytest.raises(TracekitError, match="1 on CPU, 1 on CUDA0"):
        half.demand_gpu("m.gguf")


def test_a_trace_says_where_its_model_lay(models, settings, tmp_path):
    """Placement, GPUs and whether CUDA launches graphs are in the provenance of every trace."""
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], "static:n_max=2", settings, trace=path) as engine:
        engine.generate("import", max_tokens=8)
        lay = engine.placement
    machine = json.loads(open_trace(path).runs["machine"][0])
    assert machine["placement"] == lay.as_dict()
    assert machine["gpus"] == gpus()
    assert "cuda_graphs" in machine


def test_gpu_readings_are_recorded(models, settings, tmp_path):
    """Whatever the sensors read is in the trace; without an NVIDIA driver there is nothing to read."""
    assert all(isinstance(reading, GpuReading) for reading in GpuSensors()(0, 0))
    path = tmp_path / "t.duckdb"
    with Engine(models["plain"], "static:n_max=2", settings, trace=tmp_path / "other.duckdb") as engine:
        facts = facts_of(engine)
        reading = (0, 1980, 2619, 350.5, 60, 0.9, 7)
        recorder = Recorder(path, facts, sensors=lambda run, t_us: [GpuReading(run, t_us, *reading)])
        engine._loop.observer = recorder
        engine.generate("import", max_tokens=8)
        engine._loop.observer = engine.recorder
        recorder.close()
    found = open_trace(path).frame("SELECT * FROM gpu_readings")
    assert found.height >= 1
    assert found["sm_clock_mhz"].unique().to_list() == [1980]
    assert found["t_us"].max() > 0
    assert any("1980 MHz (1980 - 1980), 350 W" in note for note in summarise(open_trace(path)).notes)


def facts_of(engine: Engine) -> dict:
    """The provenance row of ``engine``."""
    from tracekit.engine.provenance import run_facts

    return run_facts(engine.model, None, engine.settings, engine.policy, None, engine.placement, "partial")


@pytest.mark.parametrize("name", shipped_plans())
def test_shipped_plans_are_whole(name):
    """Every shipped plan parses, names policies that exist, and asks for nothing the engine would refuse."""
    plan, text = read_plan(name)
    assert tomllib.loads(text)["about"]
    assert len({live.name for live in plan.live}) == len(plan.live)
    biggest = max(plan.calibrate.slots) * (plan.calibrate.n_max + 1)
    assert biggest <= 512
    assert (PLANS / f"{name}.toml").is_file()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text + "\nnonsense = 1\n", "extra inputs"),
        (lambda text: text.replace("n_max = 3", 'n_max = "three"', 1), "n_max"),
        (lambda text: text.replace("about", "about about", 1), "not TOML"),
        (lambda text: text.replace('tiny"', 'tiny"\nsource = "none.gguf"'), "source = none.gguf: path"),
        (lambda text: text.replace('"f32"', '"f8"'), "sizes.0.type = f8: input should be 'f16' or 'f32'"),
        (lambda text: text.replace("static:", "statik:"), "live.0.policy = statik:n_max=2: "),
        (lambda text: text.replace("n_max=2", "n_max=1,2"), "live.0.policy = static:n_max=1,2: "),
        (
            lambda text: text.replace("n_max=2", "n_max=4"),
            "live.0.policy = static:n_max=4: more drafts than the plan's",
        ),
        (lambda text: text.replace("n_max = 3", "n_max = 300"), "n_max = 300: 254 or less"),
        (lambda text: text.replace("[1, 2]", "[1, 200]"), "calibrate: --batch-size 512 (n_batch) cannot verify 4"),
        (lambda text: text.replace("steps = 2", "steps = 1"), "calibrate.steps = 1: 2 or more"),
        (lambda text: text.replace("blocks = 1", "blocks = 0"), "calibrate.blocks = 0: 1 or more"),
        (lambda text: text.replace("[1, 2]", "[0]"), "calibrate.slots = 0: 1 or more"),
        (lambda text: text.replace("[1, 2]", "[600]"), "calibrate: --parallel 600 (n_slots): 256 or less"),
        (lambda text: text.replace("[64, 300]", "[]"), "calibrate.contexts: tuple should have at least 1 item"),
        (lambda text: text.replace("n_max = 4", "n_max = 0"), "calibrate.n_max = 0: 1 or more"),
        (lambda text: text.replace("n_max = 3", "n_max = 0"), "n_max = 0: 1 or more; a study"),
        (lambda text: text.replace("prompts = 2", "prompts = -1"), "prompts = -1: 0 or more"),
        (lambda text: text.replace("max_tokens = 24", "max_tokens = 1"), "max_tokens = 1: 2 or more"),
        (
            lambda text: text.replace("max_tokens = 24", "max_tokens = 2000"),
            "max_tokens = 2000: fewer than the 1024 of",
        ),
        (lambda text: text.replace("width = 256", "width = 300"), "sizes.0.width = 300: exact only for 256, 1024"),
        (lambda text: text.replace('tiny"', f'tiny"\nsource = "{__file__}"'), f"sizes.0: {__file__}: not a GGUF file"),
        (lambda text: text.replace("layers = 6", "layers = 3"), "sizes.0.layers = 3: the model has 5 already"),
        (
            lambda text: text.replace('[[studies]]\nhead = "mis', '[[studies]]\nhead = "', 1),
            "studies: aligned of tiny is there twice",
        ),
        (lambda text: text.replace('"misaligned"\nslots', '"wrong"\nslots'), "studies.1.head = wrong: input should be"),
        (lambda text: text.replace("slots = 1", "slots = 99", 1), "studies.0.slots = 99: input should be less than"),
        (lambda text: text.split("[[studies]]")[0], "nothing to do: no studies, no calibrate, no live"),
        (
            lambda text: text.replace("slots = 2\ncontext", "slots = 0\ncontext"),
            "live.0.slots = 0, context = 512: --parallel 0 (n_slots): 1 or more",
        ),
        (
            lambda text: text.replace("context = 300", "context = 24"),
            "live.1.context = 24: no room for a prompt of",
        ),
        (
            lambda text: text.replace("context = 300", "context = 60"),
            "live.1.context = 60: no room for a prompt of",
        ),
        (lambda text: text.replace("repeats = 1", "repeats = 0"), "repeats = 0: 1 or more"),
        (
            lambda text: text.replace("[calibrate]", '[[sizes]]\nname = "tiny"\nwidth = 256\nlayers = 7\n[calibrate]'),
            "sizes: tiny is there twice",
        ),
        (
            lambda text: text.replace('"misaligned"\nslots', '"misaligned"\nsizes = ["8b"]\nslots'),
            "studies.1.sizes: no size 8b; there are tiny",
        ),
        (lambda text: text.replace("[calibrate]", "[calibrate]\nsizes = []"), "calibrate.sizes: tuple should have at"),
        (
            lambda text: re.sub(
                r"^(\[\[(?:studies|live)\]\]|\[calibrate\])",
                r'\1\nsizes = ["tiny"]',
                text.replace("[calibrate]", '[[sizes]]\nname = "b"\nwidth = 256\nlayers = 7\n[calibrate]'),
                flags=re.MULTILINE,
            ),
            "sizes: nothing is done with b",
        ),
    ],
)
def test_bad_plans_get_one_line(tmp_path, edit, message):
    """An unknown key, a wrong type, no TOML, a source that is not there, what a later stage could not run: one line
    that names it.
    """
    path = tmp_path / "plan.toml"
    path.write_text(edit((PLANS / "smoke.toml").read_text()))
    with pytest.raises(TracekitError, match=re.escape(message)) as error:
        read_plan(str(path))
    assert "\n" not in str(error.value)


def test_a_stage_may_be_for_some_sizes(tmp_path, monkeypatch):
    """A stage that names sizes is done with these, any other with all; recordings come before the surface."""
    text = (PLANS / "smoke.toml").read_text()
    text = text.replace("[calibrate]", '[[sizes]]\nname = "b"\nwidth = 256\nlayers = 7\n[calibrate]\nsizes = ["b"]')
    text = text.replace('head = "misaligned"\nslots = 1', 'head = "misaligned"\nslots = 1\nsizes = ["tiny"]', 1)
    (tmp_path / "plan.toml").write_text(text)
    plan, done = read_plan(str(tmp_path / "plan.toml"))[0], []
    for stage in ("_study", "_record", "_calibrate"):
        monkeypatch.setattr(
            campaign.Campaign,
            stage,
            lambda _, size, of: done.append(f"{size.name}-{getattr(of, 'name', 'calibration')}"),
        )
    assert len(list(campaign.Campaign(plan, tmp_path, tmp_path, QUIET).run())) == 5
    studies = [f"{size}-aligned{slots}" for slots in ("", "-2-slots") for size in ("tiny", "b")]
    studies.insert(2, "tiny-misaligned")
    recordings = [f"{size}-{live.name}" for live in plan.live for size in ("tiny", "b")]
    assert done == [*studies, *recordings, "b-calibration"]


def test_a_stage_is_held_against_its_own_sizes_alone(tmp_path, monkeypatch):
    """The same study of two sizes may be two stages, and a recording has room for the prompts of the sizes it is of."""
    shutil.copy(REFERENCE, tmp_path / "other.gguf")
    text = (PLANS / "smoke.toml").read_text()
    text = text.replace("[calibrate]", '[[sizes]]\nname = "b"\nwidth = 256\nlayers = 7\nsource = "other"\n[calibrate]')
    text = text.replace('"other"', f'"{tmp_path / "other.gguf"}"').replace("[[live]]", '[[live]]\nsizes = ["tiny"]')
    text = text.replace(
        "[[studies]]", '[[studies]]\nsizes = ["b"]\nhead = "aligned"\n\n[[studies]]\nsizes = ["tiny"]', 1
    )
    path = tmp_path / "plan.toml"
    path.write_text(text)
    monkeypatch.setattr(Plan, "_longest", lambda _, source: 10_000 if source.stem == "other" else 10)
    plan = read_plan(str(path))[0]
    assert [[size.name for size in plan.sizes_of(study)] for study in plan.studies[:2]] == [["b"], ["tiny"]]
    path.write_text(text.replace('[[live]]\nsizes = ["tiny"]', '[[live]]\nsizes = ["tiny", "b"]', 1))
    with pytest.raises(TracekitError, match=r"live\.0\.context = .*: no room for a prompt of 10000 tokens"):
        read_plan(str(path))


def test_a_bad_plan_ends_a_campaign_before_it_begins(tmp_path):
    """One line, exit code 2, and no folder made; nor for a plan that is not there, or a file in the folder's place."""
    path = tmp_path / "plan.toml"
    path.write_text((PLANS / "smoke.toml").read_text().replace("static:", "statik:"))
    result = run(path, "-o", tmp_path / "out", code=2)
    assert "live.0.policy = statik:n_max=2" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert "no such plan" in run("nothing", "-o", tmp_path / "out", code=2).stderr
    assert "choose other folders" in run("smoke", "-o", path, code=2).stderr  # a file, not a folder


def test_a_gpu_that_is_demanded_and_missing_stops_the_campaign(tmp_path, monkeypatch):
    """A plan for a GPU ends with one line on a machine without, before anything is made."""
    if lib.has_gpu():
        pytest.skip("there is a GPU")
    path = tmp_path / "plan.toml"
    text = (PLANS / "smoke.toml").read_text().replace("require_gpu = false", "require_gpu = true")
    path.write_text(text)
    result = run(path, "-o", tmp_path / "out", "--models", tmp_path / "models", code=2)
    assert "llama.cpp sees no GPU" in result.stderr
    assert list(tmp_path.iterdir()) == [path]


def test_carried_scripts_are_sound(tmp_path):
    """`benchmarks/cuda.sh` parses, and without arguments says what it does."""
    script = Path(__file__).parent.parent / "benchmarks" / "cuda.sh"
    assert os.access(script, os.X_OK)
    result = subprocess.run(["sh", str(script)], capture_output=True, text=True)
    assert result.returncode == 2
    assert all(stage in result.stderr for stage in ("wheel FOLDER", "pack FOLDER", "install FOLDER", "run OUT"))
    assert campaign.MOST_BYTES <= 16 << 20


CUDA_SH = Path(__file__).parent.parent / "benchmarks" / "cuda.sh"
_PYTHON = f"""#!{sys.executable}
import os, pathlib, shutil, sys, time
words, here = sys.argv[1:], pathlib.Path(__file__).parent
if words[0] == "-c":
    os.execv(sys.executable, [sys.executable, *words])
if "campaign" in words:
    crashes = here / "crashes"
    if crashes.exists() and (left := int(crashes.read_text())):
        crashes.write_text(str(left - 1))
        time.sleep(1.1 * (words[-1] == "0.01"))  # minutes
        os.abort()
    (here / "told").write_text(os.environ["PYTHONPATH"] + "|" + os.environ["LD_LIBRARY_PATH"])
elif words[2:3] == ["wheel"]:
    folder = pathlib.Path(words[words.index("-w") + 1])
    folder.mkdir()
    (folder / "tracekit-9-py3-none-any.whl").touch()
elif words[2:3] == ["download"]:
    pathlib.Path(words[words.index("-d") + 1], "polars-2-py3-none-any.whl").touch()
    (here / "told").write_text(words[-1])
elif words[0].endswith("cuda_repack.py"):
    shutil.copy(*words[1:])
elif words[0].endswith(("overhead.py", "backend_sampling.py")):
    print(*words[1:])
    sys.exit(words[0].endswith("overhead.py") and (here / "broken").exists())
"""


def _carry(tmp_path, *arguments, **environment):
    """`cuda.sh` with a Python that notes what it is told."""
    python = tmp_path / "python"
    python.write_text(_PYTHON)
    python.chmod(0o755)
    (tmp_path / "models").mkdir()
    given = {"PYTHON": str(python), "MODELS": str(tmp_path / "models")} | environment
    own = "LD_LIBRARY_PATH", "PYTHONPATH", "HAVE", "SITE"
    kept = {name: value for name, value in os.environ.items() if name not in own}
    return subprocess.run(["sh", str(CUDA_SH), *map(str, arguments)], env=kept | given, capture_output=True, text=True)


def _carried(tmp_path, *arguments, **environment):
    """What it noted."""
    _carry(tmp_path, *arguments, **environment).check_returncode()
    return (tmp_path / "told").read_text()


def test_a_pack_holds_no_wheels_of_an_earlier_one(tmp_path):
    """Of two versions of a package pip would take neither, offline; a folder with a blank in its name is a URI."""
    folder = tmp_path / "to carry"
    folder.mkdir()
    for name in ("llama_cpp_python-1", "polars-1", "gone-1"):
        (folder / f"{name}-py3-none-any.whl").touch()
    asked = _carried(tmp_path, "pack", folder)
    assert asked == f"tracekit[engine] @ {(folder / 'all' / 'tracekit-9-py3-none-any.whl').as_uri()}"
    names = {wheel.name.removesuffix("-py3-none-any.whl") for wheel in folder.glob("*.whl")}
    assert names == {"llama_cpp_python-1", "polars-2", "tracekit-9"}


@pytest.mark.parametrize("site", ["", "/site"])
@pytest.mark.parametrize("libraries", ["", "/lib"])
def test_nothing_is_imported_from_the_current_folder(tmp_path, site, libraries):
    """An empty part of PYTHONPATH or LD_LIBRARY_PATH is the current folder: there is none, whatever is not set."""
    (tmp_path / "out").mkdir()
    told = _carried(tmp_path, "run", tmp_path / "out", SITE=site, LD_LIBRARY_PATH=libraries)
    for given, path in zip((site, libraries), told.split("|"), strict=True):
        parts = path.split(":") if path else []
        assert "" not in parts
        assert parts[:1] == [given] or not given
    assert str(CUDA_SH.parent.parent) in told


def test_what_the_user_has_set_up_is_kept(tmp_path):
    """Packages that PYTHONPATH leads to are still found, after ours; CDPATH leads no path astray."""
    (tmp_path / "out").mkdir()
    told = _carried(tmp_path, "run", tmp_path / "out", PYTHONPATH="/modules", CDPATH=f".:{tmp_path}")
    assert told.split("|")[0].endswith(f"{CUDA_SH.parent.parent}:/modules")


@pytest.mark.parametrize("minutes", ["6m", "abc", "1.2.3", "."])
def test_minutes_that_are_no_number_are_refused(tmp_path, minutes):
    """They had been taken for another number, or for no limit."""
    result = _carry(tmp_path, "run", tmp_path / "out", "cuda", minutes)
    assert (result.returncode, result.stderr) == (2, f"cuda.sh: {minutes}: minutes are a number\n")


def test_a_benchmark_that_fails_is_tried_again(tmp_path):
    """What it said is shown and kept apart; the next call has the rest."""
    (tmp_path / "out").mkdir()
    (tmp_path / "broken").touch()
    result = _carry(tmp_path, "run", tmp_path / "out")
    assert (result.returncode, "overhead.py failed" in result.stderr) == (1, True)
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"backend_sampling.txt", "overhead.partial"}
    (tmp_path / "broken").unlink()
    shutil.rmtree(tmp_path / "models")
    _carry(tmp_path, "run", tmp_path / "out").check_returncode()
    assert {f.name for f in (tmp_path / "out").iterdir()} == {"backend_sampling.txt", "overhead.txt"}


@pytest.mark.parametrize(("crashes", "minutes", "code"), [(2, "0", 0), (2, "6", 0), (3, "6", 134), (1, "0.01", 3)])
def test_a_campaign_that_llama_cpp_ended_goes_on(tmp_path, crashes, minutes, code):
    """The same command is given again, but not for ever, nor when its time is over."""
    (tmp_path / "out").mkdir()
    (tmp_path / "crashes").write_text(str(crashes))
    result = _carry(tmp_path, "run", tmp_path / "out", "cuda", minutes)
    assert result.returncode == code
    assert result.stderr.count("going on") == min(crashes, 2)
    assert (tmp_path / "told").exists() == (code == 0)


def test_a_wheel_is_not_built_where_cmake_cannot(tmp_path):
    """A blank in the folder's name is one line, before anything is made."""
    result = subprocess.run(["sh", str(CUDA_SH), "wheel", "a b"], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 2
    assert "no path with blanks" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_wheels_are_sorted_into_trips(tmp_path):
    """Each trip holds as much as it may; a wheel that is too big for any is one line."""
    script = Path(__file__).parent.parent / "benchmarks" / "cuda_repack.py"
    for name, size in (("a", 600), ("b", 500), ("c", 450), ("d", 90)):
        (tmp_path / f"{name}-1-py3-none-any.whl").write_bytes(bytes(1000 * size))
    for most, code in ((1.1, 0), (0.5, 1)):
        command = [sys.executable, script, "--trips", str(most), tmp_path]
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert "Traceback" not in result.stderr
    trips = [sorted(w.name[0] for w in (tmp_path / f"trip-{i}").iterdir()) for i in (1, 2)]
    assert trips == [["a", "b"], ["c", "d"]]
    assert "a-1-py3-none-any.whl: 1 MB, but a trip takes 0.5" in result.stderr


H200 = Path(__file__).parent.parent / "traces" / "h200"


def _finding():
    return Finding("8b", file.read(H200 / "8b-aligned.toml"), Verdict.load(H200 / "8b-aligned.json"))


def test_a_finished_study_needs_no_model(tmp_path, monkeypatch):
    """What a study came to is read from its files: gigabytes are not written again to print a table."""
    monkeypatch.setattr(campaign, "build", None)
    for ending in ("duckdb", "toml", "json"):
        shutil.copy(H200 / f"8b-aligned.{ending}", tmp_path / f"tiny-aligned.{ending}")
    plan = read_plan("smoke")[0]
    found = campaign.Campaign(plan, tmp_path, tmp_path / "models", QUIET)._study(plan.sizes[0], Studied())
    assert found.verdict.as_json() == _finding().verdict.as_json()


def test_a_campaign_that_ends_in_an_error_has_its_tables(tmp_path, monkeypatch):
    """The tables of each study are written when it is done, whatever becomes of the next."""

    def cut_short(_):
        yield _finding()
        raise TracekitError("disk full")

    monkeypatch.setattr(campaign.Campaign, "run", cut_short)
    with pytest.raises(TracekitError, match="disk full"):
        verb("smoke", tmp_path / "out", tmp_path / "models")
    assert "8b" in (tmp_path / "out" / "tables.txt").read_text()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"gpu_layers": 3}, "began with gpu_layers 3, here it would go on with -1; choose another folder"),
        ({"devices": [{"name": "CUDA0", "description": "H200"}]}, r"began with devices CUDA0 \(H200\), here .* CPU"),
        ({"llama_cpp": "another"}, "began with llama_cpp another, "),
        ({"machine": {"environment": {"GGML_CUDA_PDL": "0"}}}, "began with environment {'GGML_CUDA_PDL': '0'}, here"),
        ({"models": 3}, r"environment.json: not JSON, or not of a campaign .*; remove it"),
        ({"machine": {"system": "Linux, a kernel later"}}, None),
    ],
)
def test_a_campaign_goes_on_where_it_began(tmp_path, edit, message):
    """Another machine, build or number of layers on the GPU is refused with a line that names it: timings of both would
    be mixed. Files of campaigns that noted less are read.
    """
    text = (PLANS / "smoke.toml").read_text()
    begun = campaign.Campaign(read_plan("smoke")[0], tmp_path / "out", tmp_path / "models", QUIET)
    begun.open(text)
    path = tmp_path / "out" / "environment.json"
    path.write_text(json.dumps(surroundings() | {"models": {}}))
    begun.open(text)
    path.write_text(json.dumps(begun._environment() | edit))
    if message is None:
        begun.open(text)
        return
    with pytest.raises(TracekitError, match=message) as error:
        begun.open(text)
    assert "\n" not in str(error.value)
    if "models" not in edit:
        begun.open(text, force=True)
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["plan.toml"]


def test_a_campaign_without_vl_convert_has_no_picture(tmp_path, monkeypatch, capsys):
    """Where the package that draws was not carried, the picture is left out, in a line."""
    finding = _finding()
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "vl_convert" else find_spec(name))
    _draw([finding], tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert "no picture" in capsys.readouterr().err
    monkeypatch.undo()
    _draw([finding], tmp_path)
    assert (tmp_path / "verdict.png").read_bytes()[:4] == b"\x89PNG"
