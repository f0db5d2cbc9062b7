"""The library's front, as one uses it in a notebook: what it takes, what it draws, and what it says of mistakes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import tracekit
from tracekit.engine import Engine, Probe, Settings
from tracekit.engine.calibrate import Plan, Sweep, calibrate
from tracekit.engine.record import record
from tracekit.errors import TracekitError
from tracekit.policy.file import PolicyFile
from tracekit.policy.rule import rule
from tracekit.report import pictures
from tracekit.tune.space import read_space

from .conftest import N_MAX, requests

SHIPPED = Path(__file__).parent.parent / "traces" / "reference-aligned-probe.duckdb"
SLOTS = 3


@pytest.fixture(scope="module")
def trace():
    """A shipped trace."""
    return tracekit.open(SHIPPED)


@pytest.fixture(scope="module")
def of_slots(models, tmp_path_factory):
    """A trace of several slots."""
    path = tmp_path_factory.mktemp("api") / "slots.duckdb"
    settings = Settings(n_slots=SLOTS, n_max=N_MAX, n_ctx=512, threads=1)
    with Engine(models["plain"], settings=settings, trace=path, probe=Probe(N_MAX)) as engine:
        record(engine, requests(per_category=2), baseline=True)
    return tracekit.open(path)


@pytest.fixture(scope="module")
def calibration(models, tmp_path_factory):
    """A calibration."""
    path = tmp_path_factory.mktemp("api") / "costs.duckdb"
    plan, sweep = Plan(slots=(1,), contexts=(64,), n_max=4, steps=3, blocks=1), Sweep(4, seed=0)
    settings = Settings(n_max=4, n_ctx=plan.n_ctx(512), threads=1)
    with Engine(models["plain"], settings=settings, trace=path, probe=sweep) as engine:
        calibrate(engine, sweep, plan)
    return tracekit.open(path)


def rows_of(chart) -> list[dict]:
    """Every row that a chart draws."""
    return [row for rows in chart.to_dict()["datasets"].values() for row in rows]


def test_policies_are_taken_in_every_form(trace, tmp_path):
    """Text with its sweeps, a policy, a rule, what tune found, a path, and lists of all of these."""
    best = PolicyFile(rule("static")(n_max=5))
    every = ["off", "static:n_max=1,2", rule("static")(n_max=4), best, best.save(tmp_path / "p.toml"), rule("fallback")]
    labels = ["off", *(f"static:n_max={n}" for n in (1, 2, 4, 5, 5)), "fallback:n_max=8"]
    assert trace.replay(every)["policy"].to_list() == labels
    for one in every:
        assert set(trace.replay(one)["policy"]) <= set(labels)


def test_a_search_space_is_a_dict_or_a_file(trace, tmp_path):
    """Lists, ranges and single values; the same in TOML."""
    path = tmp_path / "space.toml"
    path.write_text('[static]\nn_max = [1, 2]\np_min = "0..0.5/0.5"\n')
    found = trace.tune(space={"static": {"n_max": [1, 2], "p_min": "0..0.5/0.5"}})
    assert found == trace.tune(space=path) == trace.tune(space=str(path))
    assert found.evidence.n_policies == 5  # off, and nothing between the values
    assert trace.tune(space={"static": {"n_max": 1}}).evidence.n_policies == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("[static]\nn_max = []", r", \[static\]: n_max = \[\]: no values; leave it out, or give some"),
        ("[statik]\nn_max = 1", r", \[statik\]: no policy 'statik'; shipped: "),
        ("[off]\n[static]\nn_mux = 1", r", \[static\]: policy static has no parameter n_mux; did you mean n_max"),
        ("[static]\np_min = '0..2/1'", r", \[static\]: static: p_min=2: between 0 and 1"),
        (None, r": Is a directory; a search space is a TOML table per policy"),
    ],
)
def test_bad_search_spaces_are_named(tmp_path, content, says):
    """The file and its table are told with what is wrong there, before anything is searched."""
    path = tmp_path / "space.toml"
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(TracekitError, match=f"^{path}{says}"):
        read_space(path)


def test_a_search_space_is_searched_whole(tmp_path):
    """A policy without values brings its own; drafts longer than recorded are refused; and where nothing in it pays,
    what does outside of it is named.
    """
    trace, mine = tracekit.open(SHIPPED), tmp_path / "mine.py"
    mine.write_text(rule("static").source.replace("SPACE = {", 'SPACE = {"n_max": "1..3/1"}\n_ = {', 1))
    assert trace.tune(space={str(mine): {}}).evidence.n_policies == 4
    with pytest.raises(TracekitError, match="some static in the space drafts more than the 8"):
        trace.tune(space={"static": {"n_max": [2, 20]}})
    found = trace.tune(space={"static": {"n_max": [8]}})
    assert found.policy.label == "off"
    assert "Not in the space that was searched: static:n_max=2, 1.15 x." in found.evidence.advice


MISTAKES = {
    "no policies": (lambda trace: trace.replay([]), "no policy given"),
    "no bars": (lambda trace: trace.plot_policies([]), "no policy given"),
    "a number": (lambda trace: trace.replay([3]), "3: not a policy"),
    "nothing": (lambda trace: trace.replay(None), "not a policy"),
    "a path that is not there": (lambda trace: trace.replay(Path("no.toml")), "no such policy file"),
    "an empty space": (lambda trace: trace.tune(space={}), "a dict per policy"),
    "a space of text": (lambda trace: trace.tune(space={"static": "n_max=1"}), "a dict per policy"),
    "a space that is not there": (lambda trace: trace.tune(space="no.toml"), "no such file"),
    "not SQL": (lambda trace: trace.sql("nonsense"), "the query failed: Parser Error"),
    "an empty query": (lambda trace: trace.sql(""), "the query is empty"),
    "a query that writes": (lambda trace: trace.sql("DROP TABLE runs"), "would write"),
    "costs that are not there": (lambda _: tracekit.open(SHIPPED, cost="no.duckdb"), "no.duckdb: no such file"),
    "no slots": (lambda _: tracekit.open(SHIPPED, n_slots=0), "n_slots=0"),
    "slots in words": (lambda _: tracekit.open(SHIPPED, n_slots="four"), "n_slots='four'"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, trace):
    """Each says what is wrong, in one line, where it is made."""
    make, hint = MISTAKES[name]
    with pytest.raises(TracekitError) as caught:
        make(trace)
    assert hint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_policies_are_drawn_once(trace, tmp_path):
    """A policy given twice is one bar, at its own speed; the lines are the references, and the legend names them."""
    chart = trace.plot_policies(["static", "static:n_max=1..4/1", "static:n_max=2"])
    bars = [row for row in rows_of(chart) if "policy" in row]
    assert sorted(row["policy"] for row in bars) == [f"static:n_max={n}" for n in (1, 2, 3, 4)]
    bound = trace.league.clairvoyant_speed()
    assert all(row["tokens_per_second"] < bound for row in bars)
    assert {row["reference"] for row in rows_of(chart) if "reference" in row} == {"no MTP", "clairvoyant optimum"}
    assert pictures.save(chart, tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"


def test_the_legend_names_what_is_drawn(of_slots, tmp_path):
    """Over several slots there is no optimum, and nothing says there is."""
    svg = pictures.save(of_slots.plot_policies("off,static:n_max=2"), tmp_path / "p.svg").read_text()
    assert "no MTP" in svg
    assert "clairvoyant" not in svg


def test_a_picture_that_does_not_fit_leaves_nothing(trace, tmp_path, monkeypatch):
    """Where the disk is full no half of a picture stays; and a pipe is none to be replaced."""

    def full(*_):
        raise OSError(28, "No space left on device")

    chart = trace.plot_policies("off")
    with monkeypatch.context() as disk:
        disk.setattr(Path, "replace", full)
        with pytest.raises(TracekitError, match="No space left"):
            pictures.save(chart, tmp_path / "p.svg")
    assert list(tmp_path.iterdir()) == []
    os.mkfifo(tmp_path / "p.svg")
    with pytest.raises(TracekitError, match="is no file; choose another name"):
        pictures.save(chart, tmp_path / "p.svg")


def test_acceptance_is_drawn_with_a_legend_one_can_read(trace, tmp_path):
    """Every category at every position; the legend's colours are solid, the bands' are not."""
    chart = trace.plot_acceptance()
    rows = rows_of(chart)
    assert {row["position"] for row in rows} == set(range(1, 9))
    assert {row["category"] for row in rows} == {"(all)", "code", "mixed", "prose", "random", "repetitive"}
    assert chart.to_dict()["layer"][0]["encoding"]["color"]["legend"]["symbolOpacity"] == 1
    assert pictures.save(chart, tmp_path / "a.svg").read_text().startswith("<svg")


def test_costs_are_drawn_as_far_as_batches_go(trace, of_slots, calibration, tmp_path):
    """One slot's batches, several slots' batches, and a calibration's surface."""
    for of, widest, name in ((trace, 9, "target width"), (of_slots, SLOTS * (N_MAX + 1), "target rows")):
        assert max(row["size"] for row in rows_of(of.plot_cost()) if row["cost"] == name) == widest
    surface = calibration.plot_cost()
    assert {row["part"] for row in rows_of(surface) if "part" in row} >= {"target", "draft step"}
    for i, chart in enumerate((trace.plot_cost(), of_slots.plot_cost(), surface)):
        assert pictures.save(chart, tmp_path / f"c{i}.png").read_bytes()[:4] == b"\x89PNG"


def test_a_calibration_has_no_acceptance_to_draw(calibration):
    """Its prompts are random; one line says so, and nothing is drawn."""
    with pytest.raises(TracekitError, match="no drafts of prompts"):
        calibration.plot_acceptance()


def test_a_trace_shows_itself(trace, calibration):
    """Short as text, with what it was opened for; as HTML its headline and tables, a calibration's surface too."""
    assert repr(trace) == f"Trace({str(SHIPPED)!r})"
    assert repr(tracekit.open(SHIPPED, cost=SHIPPED, n_slots=1)).endswith(f", cost={str(SHIPPED)!r}, n_slots=1)")
    assert len(repr(trace.stats)) < 300
    assert trace.stats.headline in repr(trace.stats)
    assert "Acceptance by position" in trace._repr_html_()
    assert "Cost surface" in calibration._repr_html_()
    assert "Acceptance by position" not in calibration._repr_html_()


def test_star_import_leaves_open_alone():
    """Python's own `open` survives `from tracekit import *`; tracekit's is still listed."""
    names = {}
    exec("from tracekit import *", names)
    assert "Trace" in names
    assert "open" not in names
    assert "open" in dir(tracekit)
