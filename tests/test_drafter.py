"""What drafts and their judging rest on, apart from any model: the ten best logits, and a probe's choices."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracekit.engine import Probe
from tracekit.engine.drafter import _largest
from tracekit.trace.rows import Verification


@given(
    n=st.sampled_from([9, 10, 2048, 16384, 16385, 151936]),
    levels=st.sampled_from([1, 2, 30, 2**20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_ten_largest_are_those_of_a_sort(n, levels, seed):
    """Of vocabularies on both sides of the shortcut for large ones, whole in its parts or not, ties included."""
    logits = np.random.default_rng(seed).integers(0, levels, n).astype(np.float32) - np.float32(levels / 2)
    before = logits.copy()
    assert _largest(logits) == np.sort(logits)[-10:].tolist()
    assert (logits == before).all()


@pytest.mark.parametrize("choices", [[6, 7, 8], [6, 9, 8]])
def test_a_choice_that_differs_in_another_width_is_counted(choices):
    """A probe compares what the target chose at every verified draft with what it then chose in a step of its own."""
    probe = Probe(3)
    row = Verification(0, 0, 0, 1, 3, 3, 3, 0, 0, 0, 3, "n_max", [5, 6, 7], [], [5])
    assert probe.settle(row, choices, [4, 5, 6, 7]) == [], "the token after the last draft is not known"
    later = row._replace(step=1, n_generated=2, n_proposed=0, n_drafted=0, draft_ids=[])
    assert probe.settle(later, [], [4, 5, 6, 7, 8])[0] == row._replace(n_matched=3, n_accepted=3)
    assert (probe.n_checked, probe.n_diverged) == (3, int(choices != [6, 7, 8]))
