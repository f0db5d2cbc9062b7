"""The least time any policy could have taken on a trace: a dynamic programme over positions, knowing every outcome.

At each position the best draft length is chosen with hindsight, no graph is ever built again, and the caches are always
the target's. Catch-up is the only cost that remembers the past; its rows are all rows up to the last round that drafts,
so "will draft again" and "will not" are the two states. It is priced by a line that lies under the measured prices,
hence the result bounds every policy from below, and a regret against it from above.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from tracekit.replay import kernel
from tracekit.replay.arrays import Positions
from tracekit.replay.costs import CostModel, layout
from tracekit.replay.kernel import KV_BLOCK


def clairvoyant_us(positions: Positions, cost: CostModel) -> np.ndarray:
    """Least time in microseconds for each request, float64 ``[n_requests]``."""
    n_max = positions.n_max
    prices = cost.prices
    width, catchup = (prices[of] for of in layout(n_max))
    row_us, round_us = _line_under(catchup, prices[kernel.LONG_CATCHUPS], prices[kernel.LONG_CATCHUP_ROWS])
    row_us = min(row_us, prices[kernel.PROMPT_CATCHUP_ROWS])
    terms = np.array(
        [
            prices[kernel.STEPS] + width[1] + prices[kernel.TOKENS],
            prices[kernel.STEPS],
            prices[kernel.TOKENS],
            prices[kernel.DRAFT_ROUNDS] + round_us,
            prices[kernel.DRAFT_DECODES],
            row_us,
            min(prices[kernel.OVER], 0.0),
            *prices[[kernel.KV, kernel.KV_WIDTH, kernel.KV_ONE, kernel.KV_DRAFT]],
            *prices[[kernel.PAST_WIDTH, kernel.PAST_DRAFT]],
        ]
    )
    p = positions
    out = np.zeros(p.n_requests)
    _compiled()(
        p.first, p.n_generated, p.n_prompt, p.max_tokens, p.n_ctx, p.match, np.asarray(width), terms, n_max, out
    )
    steps = p.n_generated - 1
    plain = steps * (
        prices[kernel.STEPS] + prices[kernel.TOKENS] + width[1] + prices[kernel.OVER] + prices[kernel.BARE]
    )
    kv = kernel.n_kv_sum(p.n_prompt + steps) - kernel.n_kv_sum(p.n_prompt)
    plain = plain + prices[kernel.RESHAPES_ONE] + (steps > 1) * prices[kernel.CAPTURES_ONE]
    plain = plain + kv * prices[kernel.KV_ONE]
    past = steps * p.n_prompt + steps * (steps - 1) // 2
    plain = plain + past * prices[kernel.PAST_WIDTH]
    settling = np.minimum(steps, kernel.CALM)
    plain = plain + prices[kernel.SETTLING] * (settling * kernel.CALM - settling * (settling - 1) // 2)
    return np.minimum(out, plain) + prices[kernel.FIRSTS] * (steps > 0)


def _line_under(catchup: np.ndarray, long_us: float, long_row_us: float) -> tuple[float, float]:
    """Slope and intercept of a line that is at most the price of every catch-up size, and equal to it for one row."""
    rows = np.arange(len(catchup))
    slopes = (catchup[2:] - catchup[1]) / (rows[2:] - 1)
    beyond = len(catchup)
    slope = max(0.0, min(*slopes, long_row_us, (long_us + long_row_us * beyond - catchup[1]) / (beyond - 1)))
    return slope, catchup[1] - slope


def solve(first, n_generated, n_prompt, max_tokens, n_ctx, match, width, terms, n_max, out):
    """The programme itself, compiled on first use; see :func:`clairvoyant_us`."""
    plain_us, step_us, token_us, round_us, decode_us, row_us, over_us = terms[:7]
    kv_us, kv_width_us, kv_one_us, kv_draft_us, past_us, past_draft_us = terms[7:]
    for r in range(len(first)):
        n = n_generated[r]
        never = np.zeros(n + 1)
        again = np.full(n + 1, np.inf)
        for g in range(n - 1, 0, -1):
            past = n_prompt[r] + g - 1
            kv = (past + KV_BLOCK) & -KV_BLOCK  # kernel.n_kv
            plain = plain_us + kv * kv_one_us + past * past_us
            never[g] = plain + over_us + never[g + 1]
            best = plain + row_us + again[g + 1]
            right = match[first[r] + g - 1]
            for k in range(1, min(n_max, n_ctx[r] - past - 2, max_tokens[r] - g - 1) + 1):
                emitted = min(min(k, right) + 1, n - g)
                time = step_us + round_us + width[k + 1] + decode_us * k + token_us * emitted
                kv = (past + k + KV_BLOCK) & -KV_BLOCK
                time += kv * (kv_us + kv_width_us * (k + 1) + kv_draft_us * k)
                time += past * (past_us * (k + 1) + past_draft_us * k)
                best = min(best, time + min(never[g + emitted], row_us * emitted + again[g + emitted]))
            again[g] = best
        out[r] = min(never[1], row_us * (n_prompt[r] + 1) + again[1])


@cache
def _compiled():
    from numba import njit

    return njit(solve, cache=True)
