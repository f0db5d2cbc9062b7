"""Prices from few, torn or lopsided times: right, or refused in one line, and never negative."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import pytest

from tracekit.errors import TracekitError
from tracekit.policy.spec import parse, parse_one
from tracekit.replay import costs, kernel
from tracekit.replay.costs import _PLAIN, _cells, fit, fit_steps, layout
from tracekit.replay.league import League
from tracekit.replay.robust import drawn, too_narrow, widened
from tracekit.replay.steps import Steps
from tracekit.trace.store import open_trace

SHIPPED = Path(__file__).parent.parent / "traces" / "reference-aligned-probe.duckdb"


@pytest.fixture(scope="module")
def steps() -> Steps:
    """The steps of a shipped trace."""
    return Steps.read(open_trace(SHIPPED), 8)


def cut(path, *statements):
    """A copy of the shipped trace at ``path`` with two of its prompts, after ``statements``."""
    shutil.copy(SHIPPED, path)
    with duckdb.connect(str(path)) as con:
        con.execute(
            """CREATE TEMP TABLE kept AS SELECT run, request FROM requests JOIN
                   (SELECT DISTINCT prompt_id FROM requests JOIN request_ends USING (run, request)
                    WHERE arm = 'probe' AND n_generated > 60 ORDER BY prompt_id LIMIT 2) USING (prompt_id)
               WHERE arm IN ('probe', 'no_mtp')"""
        )
        for table in ("verifications", "request_ends", "requests"):
            con.execute(f"DELETE FROM {table} WHERE (run, request) NOT IN (SELECT (run, request) FROM kept)")
        con.execute("DELETE FROM steps WHERE (run, step) NOT IN (SELECT (run, step) FROM verifications)")
        for statement in statements:
            con.execute(statement)
    return open_trace(path)


def test_a_slow_baseline_moves_no_other_price(steps):
    """Steps without MTP that take half as long again leave what those with MTP take where it was, to 1 %."""
    more = 2500.0 * ((steps.mtp == 0) & (steps.loaded == 0))
    found = []
    for of in (steps, replace(steps, target=steps.target + more, wall=steps.wall + more)):
        prices = fit_steps(of, 8)[2]
        plain = prices[[*_PLAIN, kernel.OVER, kernel.BARE]].sum()
        found.append(np.array([*prices[layout(8)[0]][1:], plain]) + 256 * prices[kernel.KV_ONE])
    assert found[1][:-1] == pytest.approx(found[0][:-1], rel=0.01)
    assert found[1][-1] == pytest.approx(found[0][-1] + 2500, rel=0.02)


@pytest.mark.parametrize("few", [1, 2])
def test_requests_without_names_may_be_few(tmp_path, few):
    """A request with MTP and one without, or two of each, each a block of its own: some draws of blocks would lack one
    kind, and none does.
    """
    one = "DELETE FROM requests WHERE prompt_id <> (SELECT min(prompt_id) FROM requests)"
    rest = [
        f"DELETE FROM {table} WHERE (run, request) NOT IN (SELECT (run, request) FROM requests)"
        for table in ("verifications", "request_ends")
    ]
    steps = "DELETE FROM steps WHERE (run, step) NOT IN (SELECT (run, step) FROM verifications)"
    trace = cut(tmp_path / "t.duckdb", *[one, *rest, steps] * (few == 1), "UPDATE requests SET prompt_id = ''")
    league = League.of(trace)
    assert (league.positions.n_requests, league.cost.n_blocks) == (few, 2 * few)
    assert np.isfinite(league.cost.boot).all()
    table = league.table(parse("off,static:n_max=1,8"))
    assert (table["tokens_per_second"] > 0).all()
    assert table["speedup_low"].is_null().all() == (few == 1)


def test_a_request_of_one_token_is_no_stretch_of_time(tmp_path):
    """It has no step that is priced, so that intervals are not drawn from it."""
    first = "(SELECT min(prompt_id) FROM requests)"
    trace = cut(
        tmp_path / "t.duckdb",
        f"""DELETE FROM verifications WHERE n_generated > 0
            AND (run, request) IN (SELECT (run, request) FROM requests WHERE prompt_id = {first})""",
    )
    assert fit(trace, 8).n_blocks == 1


def test_no_price_is_negative(steps):
    """Times that are less than nothing, what else there was to do taken off, are none at all; a size that was hardly
    measured is refused at an end.
    """
    sizes = np.repeat(np.arange(1, 10), 6).astype(float)
    time = 100 * sizes + np.tile([-1, 0, 1], 18)
    torn = _cells(steps, np.where(sizes == 1, -50.0, time), sizes, 8, None, "target batches of width")
    assert torn[1:] == pytest.approx([0, *range(200, 1000, 100)])
    with pytest.raises(TracekitError, match="width 1 measured fewer than 5 times"):
        _cells(steps, time[3:], sizes[3:], 8, None, "target batches of width")


def test_steps_that_took_no_time_are_refused(tmp_path):
    """A trace that was tampered with gets one line, not the solver's."""
    with pytest.raises(TracekitError, match="damaged: steps that took no time"):
        fit(cut(tmp_path / "t.duckdb", "UPDATE steps SET wall_us = 0"), 8)


def test_a_baseline_of_a_few_steps_is_told_from_none(tmp_path):
    """What was recorded, and is too little, is not said to be missing."""
    bare = "SELECT step FROM steps WHERE NOT mtp AND n_slots = 1 AND n_prompt = 0 ORDER BY step"
    few = f"UPDATE steps SET mtp = true WHERE NOT mtp AND step NOT IN ({bare} LIMIT 3)"
    with pytest.raises(TracekitError, match="3 steps without MTP, 5 are needed; record more prompts or tokens"):
        fit(cut(tmp_path / "few.duckdb", few), 8)
    with pytest.raises(TracekitError, match="the baseline without MTP was not recorded; record with --baseline"):
        fit(cut(tmp_path / "none.duckdb", "UPDATE steps SET mtp = true"), 8)


def test_a_busy_machine_is_said(steps, monkeypatch):
    """Where steps take now this long and now twice as long, the prices are called what they are."""
    assert "busy" not in League.of(open_trace(SHIPPED)).warning
    rng = np.random.default_rng(0)
    monkeypatch.setattr(costs.Steps, "read", lambda *_: steps.slowed(rng.choice([1, 2], len(steps.wall))))
    assert "as on a busy machine" in League.of(open_trace(SHIPPED)).warning


def test_draws_hold_every_kind():
    """A kind that one block of twenty has is in every draw, in which blocks are else drawn alike."""
    rng, block = np.random.default_rng(0), np.repeat(np.arange(20), 3)
    draws = np.array([drawn(rng, block, [block == 7, block != 7]) for _ in range(300)])
    assert (draws.sum(1) == 20).all()
    assert draws[:, 7].min() == 1
    assert draws.mean(0)[np.arange(20) != 7] == pytest.approx(np.full(19, 0.97), abs=0.2)


def test_few_blocks_are_drawn_wider():
    """Of three, draws are the square root of 1.5 too close, and 95 % of means as far off as Student's t says; however
    wide, a time stays one.
    """
    assert too_narrow(3) == pytest.approx(1.5**0.5 * 4.303 / 1.960, abs=1e-3)
    assert (too_narrow(1), too_narrow(10**6)) == (1.0, pytest.approx(1.0, abs=1e-5))
    assert too_narrow(3, groups=20) == pytest.approx(1.5**0.5 * 2.021 / 1.960, abs=1e-3)
    draws, far = np.random.default_rng(0).normal(5, 0.1, 100), widened(np.array([0.1, -1.0, 5.0, 99]), 5.0, 9.0)
    left, wide = np.log(draws / 5), np.log(widened(draws, 5.0, 3.0) / 5)
    assert wide == pytest.approx(3 * left)
    assert far == pytest.approx([5e-3, 5e-3, 5, 5e3])


def test_intervals_of_few_blocks_hold_the_mean():
    """Of 400 means of three measurements each, drawn like prices, 95 % intervals hold the truth in 93 %; without
    Student's t they would in 77 %.
    """
    rng, held, before = np.random.default_rng(0), 0, 0
    for blocks in np.exp(rng.normal(0, 0.05, (400, 3))):
        draws = blocks[rng.integers(0, 3, (100, 3))].mean(1)
        for by in (too_narrow(3), 1.5**0.5):
            low, high = np.quantile(widened(draws, blocks.mean(), by), (0.025, 0.975))
            held += by > 2 and low < 1 < high
            before += by < 2 and low < 1 < high
    assert held / 400 == pytest.approx(0.95, abs=0.03)
    assert before / 400 < 0.8


def test_draws_far_below_the_prices_make_no_speed_without_end():
    """Of two blocks, one much faster, intervals reach a thousand times as far, and not through zero."""
    league = League.of(open_trace(SHIPPED))
    prices = league.cost.prices
    cost = replace(league.cost, boot=prices * np.array([[0.1], [1.9]] * 20), wider=too_narrow(2))
    few = League(league.positions, cost)
    speed, policy = few.no_mtp_speed(), parse_one("static:n_max=2")
    assert speed.value < speed.high < 1001 * speed.value
    of_these = few.speed_of_these(policy)
    assert 0 < of_these.low < of_these.value < of_these.high < 1001 * of_these.value
    assert few.table([policy])["speedup_high"][0] < 2


def test_a_machine_that_drifts_is_in_the_interval(steps, monkeypatch):
    """Every other stretch of time 1.5 times as slow: prices are those of the mean, and their draws as far apart."""
    slow = steps.slowed(np.where(steps.block % 2, 1.5, 1.0))
    monkeypatch.setattr(costs.Steps, "read", lambda *_: slow)
    drifting = fit(open_trace(SHIPPED), 8, n_boot=40)
    monkeypatch.setattr(costs.Steps, "read", lambda *_: steps)
    steady = fit(open_trace(SHIPPED), 8, n_boot=40)
    width = layout(8)[0].start + 9
    spread = [of.boot[:, width].std() / of.prices[width] for of in (drifting, steady)]
    n = len(np.unique(steps.block))
    assert spread[0] == pytest.approx(0.2 / np.sqrt(n), rel=0.5)
    assert spread[0] > 1.5 * spread[1]
