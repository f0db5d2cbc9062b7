"""The simulator: walks every request of a trace under a policy, one verification after another, and counts.

As it stands this module simulates ``off``: :mod:`tracekit.replay.link` puts another policy's source in the place of
the line that imports it, and compiles the result with Numba (or does not: the interpreted twin). A walk counts what
happened rather than adding up time, so its counts are exact and any cost model can price them afterwards.

Counts of one request, int64 ``[n_counts(n_max)]``: the scalars named below, then a histogram of target batch widths
(0 .. ``n_max + 1``), then one of rows in the first MTP decode of a round (0 .. ``n_max + 1``; longer ones are in
LONG_CATCHUPS and LONG_CATCHUP_ROWS).
"""

import numpy as np

from tracekit.policy.interface import Now, Outcome
from tracekit.policy.shipped.off import Params, begin, decide, learn  # the policy

STEPS = 0  # target decodes after the prompt
VERIFICATIONS = 1  # of these, with drafts
DRAFTED = 2
ACCEPTED = 3
TOKENS = 4  # emitted by these steps
DRAFT_ROUNDS = 5  # steps in which the drafter ran
DRAFT_DECODES = 6  # of the MTP context
TRIPS = 7  # times the policy went from drafting to not drafting
INEXACT = 8  # steps whose outcome the trace does not determine
KV = 9  # cells that the target's attention is given, whole blocks, summed over steps of more than one row
KV_WIDTH = 10  # the same times the batch width
KV_DRAFT = 11  # the same cells times MTP decodes
LONG_CATCHUPS = 12
LONG_CATCHUP_ROWS = 13
PROMPT_CATCHUPS = 14  # prompts caught up while they were read, because the policy drafts right after them
PROMPT_CATCHUP_ROWS = 15
DRAFT_RESHAPES = 16  # MTP decodes of another number of rows than the one before
OVER = 17  # steps after the policy's NEVER: no hidden states are copied out any more
BARE = 18  # of these, without MTP even loaded: no walk's, but the baseline's
CAPTURES = 19  # target decodes of several rows and the shape of the one before, which was new: CUDA captures the graph
CAPTURES_ONE = 20  # the same of one row
DRAFT_CAPTURES = 21  # the same for the MTP context (source: ggml-cuda.cu, ggml_backend_cuda_graph_compute)
SETTLING = 22  # over steps without drafts: how many of CALM steps are left until the caches are the target's again
FIRSTS = 23  # first target decodes after a prompt
PAST_WIDTH = 24  # tokens in memory times the batch width: of the cells, those that flash attention reads on a processor
KV_ONE = 25  # cells given in steps of one row, which backends have kernels of their own for
RESHAPES = 26  # target decodes of several rows, of another width or over more cells than the one before: a new graph
RESHAPES_ONE = 27  # the same of one row
PAST_DRAFT = 28  # tokens in memory times rows of MTP decodes; long catch-ups count as one row
N_SCALARS = 29
CALM = 16  # steps without drafts, after drafts or a prompt, by which that is over; measured on a processor
KV_BLOCK = 256  # cells are read in whole blocks: llama.cpp, src/llama-kv-cache.cpp, get_n_kv
_STEP = 1 << 42  # one step in a histogram, beside the tokens in memory that are summed below it until the walk is over


def n_kv(n_tokens):
    """Cells that attention reads with ``n_tokens`` in memory, those of the batch included."""
    return (n_tokens + KV_BLOCK - 1) & -KV_BLOCK


def n_kv_sum(n_tokens):
    """Sum of :func:`n_kv` over 1 .. ``n_tokens``."""
    blocks = n_tokens // KV_BLOCK
    rest = n_tokens - blocks * KV_BLOCK
    return KV_BLOCK * (KV_BLOCK * blocks * (blocks + 1) // 2 + rest * (blocks + 1))


def n_counts(n_max):
    """Length of the counts for drafts of up to ``n_max`` tokens."""
    return N_SCALARS + 2 * (n_max + 2)


def params_of(row):
    """The policy's parameters from their numbers, float64 ``[n_params]``."""
    return Params()


def walk(params, state, first, n_generated, n_prompt, max_tokens, n_ctx, match, known, probs, counts):
    """One request under one policy; fills ``counts`` (zeroed) and returns the policy's state.

    ``first`` is the request's first position in ``match``, ``known`` and ``probs``
    (:class:`tracekit.replay.arrays.Positions`). The rules are the engine's (:mod:`tracekit.engine.loop`): room,
    ``p_min``, acceptance, rows to catch up. Indices are unsigned where it counts: Numba then does not look for
    negative ones. Sums that change only with the batch width wait until it does: the loop has too many numbers for the
    registers, and is as fast as it does without some of them.
    """
    n_max = probs.shape[1]
    width_at = N_SCALARS
    catchup_at = N_SCALARS + n_max + 2
    generated = 1
    behind = n_prompt + 1  # rows the MTP context has not seen, the last token's included
    asked, p_min = decide(params, state, Now(1, n_prompt, max_tokens - 1, 1))
    if asked > 0:
        counts[PROMPT_CATCHUPS] = 1
        counts[PROMPT_CATCHUP_ROWS] = n_prompt
        behind = 1
    resting = True  # the policy wanted no drafts the last time it was asked
    shape_before = -1  # of the target's last decode, its cells and its drafts in one number; a prompt's, never equal
    rows_before = 0  # of the MTP context's last decode, likewise
    draft_new = steady = False  # whether that was another shape than the one before; whether it was one row again
    room = min(n_ctx - n_prompt - 1, max_tokens - 1)  # tokens generated before drafts stop fitting
    accepted = emitted = trips = inexact = kv_stopped = 0
    in_shape = 0  # steps since the shape of the target's batch last changed
    calm = settling = 0  # steps without drafts since the last with some, or since the prompt
    wide = 0  # steady rounds that caught up several rows: two other shapes and a capture each
    match, known = match[first : first + n_generated - 1], known[first : first + n_generated - 1]
    while generated < n_generated:
        past = n_prompt + generated - 1
        now = Now(generated, past, max_tokens - generated, 1)
        asked, p_min = decide(params, state, now)
        if asked < 0:
            break
        n = min(asked, room - generated)
        drafted = 0
        accepted = 0
        if n > 0:
            unsure = n > n_max
            n = min(n, n_max)
            drafted = n
            if p_min > 0.0:
                position = first + generated - 1
                drafted = 0
                blind = False
                while drafted < n and (probs[position, drafted] >= p_min or probs[position, drafted] < 0.0):
                    blind |= probs[position, drafted] < 0.0
                    drafted += 1
                if drafted < n:  # one more was decoded to see that it is improbable
                    counts[DRAFT_DECODES] += 1
                    counts[PAST_DRAFT] += past
                    kv_stopped += n_kv(past + 1)
                unsure |= blind
            accepted = min(drafted, int(match[np.uint64(generated - 1)]))
            inexact += unsure or drafted > known[np.uint64(generated - 1)]
            if behind < n_max + 2:
                counts[np.uint64(catchup_at + behind)] += _STEP + past
            else:
                counts[LONG_CATCHUPS] += 1
                counts[LONG_CATCHUP_ROWS] += behind
            more = n > 2 and drafted > 1  # at least two decodes of one row each follow; nearly always
            if steady and more:
                wide += behind != 1
            else:
                other = behind != rows_before
                counts[DRAFT_RESHAPES] += other
                counts[DRAFT_CAPTURES] += draft_new & (not other)
                draft_new = other
                rows_before = behind
                steady = False
                if n > 1 and drafted > 0:
                    counts[DRAFT_RESHAPES] += behind != 1
                    counts[DRAFT_CAPTURES] += other if behind == 1 else more
                    draft_new = behind != 1 and not more
                    rows_before = 1
                    steady = not draft_new
            behind = calm = 0
            resting = False
        else:
            trips += asked == 0 and not resting
            resting = asked == 0
            settling += max(CALM - calm, 0)
            calm += 1
        emitted = min(accepted + 1, n_generated - generated)
        counts[np.uint64(width_at + 1 + drafted)] += _STEP + past
        shape = n_kv(past + 1 + drafted) + drafted  # fewer than KV_BLOCK: tracekit.engine.settings.MOST_DRAFTS
        if shape != shape_before:
            counts[RESHAPES_ONE if drafted == 0 else RESHAPES] += 1
            one = shape_before & (KV_BLOCK - 1) == 0
            cells = in_shape * (shape_before & -KV_BLOCK)
            counts[CAPTURES_ONE if one else CAPTURES] += in_shape > 1
            counts[KV_ONE if one else KV] += cells
            counts[KV_DRAFT] += cells * (shape_before & (KV_BLOCK - 1))
            in_shape = 0
            shape_before = shape
        in_shape += 1
        state = learn(params, state, now, Outcome(asked, drafted, accepted, emitted))
        generated += emitted
        behind += emitted
    one = shape_before & (KV_BLOCK - 1) == 0
    cells = in_shape * (shape_before & -KV_BLOCK)
    counts[KV_ONE if one else KV] += cells
    counts[KV_DRAFT] += cells * (shape_before & (KV_BLOCK - 1))
    over = n_generated - generated
    if over > 0:  # plain steps to the end
        trips += not resting
        before, last = n_prompt + generated - 1, n_prompt + n_generated - 1
        kv = n_kv(before + 1)
        if shape_before != kv:
            counts[RESHAPES_ONE] += 1
            counts[CAPTURES_ONE if one else CAPTURES] += in_shape > 1
            in_shape = 0
        blocks = (n_kv(last) - kv) // KV_BLOCK  # entered on the way
        counts[RESHAPES_ONE] += blocks
        if blocks > 0:
            counts[CAPTURES_ONE] += (in_shape + kv - before > 1) + blocks - 1
            in_shape = last - (n_kv(last) - KV_BLOCK)
        else:
            in_shape += over
        counts[KV_ONE] += n_kv_sum(last) - n_kv_sum(before)
        counts[width_at + 1] += over * _STEP + over * before + over * (over - 1) // 2
        unsettled = min(over, max(CALM - calm, 0))
        settling += unsettled * (CALM - calm) - unsettled * (unsettled - 1) // 2
        accepted = 0
        emitted = 1
        one = True
    steps = drafted_all = rounds = past_width = past_drafted = 0  # the rest is in the histograms
    for n in range(n_max + 1):
        past_width += (counts[width_at + 1 + n] % _STEP) * (n + 1)
        past_drafted += (counts[width_at + 1 + n] % _STEP) * n + (counts[catchup_at + 1 + n] % _STEP) * n
        counts[width_at + 1 + n] //= _STEP
        steps += counts[width_at + 1 + n]
        drafted_all += counts[width_at + 1 + n] * n
        counts[catchup_at + 1 + n] //= _STEP
        rounds += counts[catchup_at + 1 + n]
    counts[STEPS] = steps
    counts[VERIFICATIONS] = steps - counts[width_at + 1]
    counts[DRAFTED] = drafted_all
    counts[ACCEPTED] = n_generated - 1 - steps + (accepted + 1 - emitted if steps else 0)  # with what the end cut off
    counts[TOKENS] = n_generated - 1
    counts[DRAFT_ROUNDS] = rounds + counts[LONG_CATCHUPS]
    counts[DRAFT_DECODES] += drafted_all
    counts[TRIPS] = trips
    counts[INEXACT] = inexact
    counts[KV_WIDTH] = counts[KV] + counts[KV_DRAFT]
    counts[KV_DRAFT] += kv_stopped
    counts[DRAFT_RESHAPES] += 2 * wide
    counts[OVER] = over
    counts[CAPTURES_ONE if one else CAPTURES] += in_shape > 1
    counts[DRAFT_CAPTURES] += wide
    counts[SETTLING] = settling
    counts[FIRSTS] = n_generated > 1
    counts[PAST_WIDTH] = past_width
    counts[PAST_DRAFT] += past_drafted
    return state


def price(counts, cost):
    """Time in microseconds that ``counts`` take under ``cost`` (float64, one price per count)."""
    total = 0.0
    for i in range(len(counts)):
        total += counts[i] * cost[i]
    return total


def walk_all(rows, shared, arrays, cost, times, detail):
    """Every request under every policy.

    ``rows`` float64 ``[n_policies, n_params]``; ``shared`` bool ``[n_policies]``: the state outlives its requests.
    ``arrays``: the eight of :class:`~tracekit.replay.arrays.Positions`, in order. ``times`` float64 ``[n_policies,
    n_requests]`` gets microseconds under ``cost``, ``detail`` int64 ``[n_policies, n_requests, n_counts]`` the counts;
    either may be empty.
    """
    first, n_generated, n_prompt, max_tokens, n_ctx, match, known, probs = arrays
    counts = np.zeros(len(cost), np.int64)
    for k in range(len(rows)):
        params = params_of(rows[k])
        state = begin(params)
        for r in range(len(first)):
            if not shared[k]:
                state = begin(params)
            counts[:] = 0
            state = walk(
                params,
                state,
                first[r],
                n_generated[r],
                n_prompt[r],
                max_tokens[r],
                n_ctx[r],
                match,
                known,
                probs,
                counts,
            )
            if times.size:
                times[k, r] = price(counts, cost)
            if detail.size:
                detail[k, r] = counts
