"""The simulator for several slots: requests queue for them, and every step is one target decode for all.

As in :mod:`tracekit.replay.kernel`, another policy's source takes the place of the line that imports it, and a walk
counts. A step's counts are divided evenly among its requests: a request's time is its share of the machine, and shares
add up to the run. The order of work is the engine's (:mod:`tracekit.engine.loop`), whose steps do not depend on time.

Counts of one request, float64 ``[N_COUNTS]``: first some of the kernel's own scalars (its steps, drafts, tokens,
trips), then its share of the parts of steps named below, then how much of each stretch between :data:`KNOTS` the rows
of target batches and of MTP batches filled: prices per stretch make a price per row count that is piecewise linear.
"""

import numpy as np

from tracekit.policy.interface import Now, Outcome
from tracekit.policy.shipped.off import Params, begin, decide, learn  # the policy
from tracekit.replay.kernel import ACCEPTED, DRAFTED, INEXACT, N_SCALARS, STEPS, TOKENS, TRIPS, VERIFICATIONS, n_kv

HOST = N_SCALARS  # steps
HOST_SLOTS = HOST + 1  # slots that generated, summed over steps
HOST_TOKENS = HOST + 2  # tokens they emitted
HOST_MTP = HOST + 3  # steps with hidden states extracted: some slot may still draft
HOST_MTP_SLOTS = HOST + 4
HOST_ROUNDS = HOST + 5  # steps with drafts
HOST_DRAFTERS = HOST + 6  # slots that drafted
BATCHES = HOST + 7  # passes of the target over its weights
BATCHES_MTP = HOST + 8  # of these, with hidden states extracted
ROWS_MTP = HOST + 9
BATCHES_LOADED = HOST + 10  # passes without hidden states, but with snapshots of a recurrent memory's state
ROWS_LOADED = HOST + 11
OUTPUTS = HOST + 12  # rows whose logits were wanted
RESHAPES = HOST + 13  # narrow passes of another shape than the one before: llama.cpp builds its graph again
CAPTURES = HOST + 14  # narrow passes of the shape of the one before, which was new: CUDA captures the graph
KV = HOST + 15  # cells that attention reads, summed over passes of fewer than TILE rows of a memory
KV_ROWS = HOST + 16  # the same times the rows that read them
PAST_ROWS = HOST + 17  # tokens in memory times rows of these passes: of the cells, those that flash attention reads
KV_TILED = HOST + 18  # cells, summed over passes of more rows
KV_ROWS_TILED = HOST + 19
RESHAPES_WIDE = HOST + 20  # the same of passes of more than WIDE rows
CAPTURES_WIDE = HOST + 21
BATCHES_NARROW = HOST + 22  # of the passes, those of no more
DRAFT_FIRSTS = HOST + 23  # steps whose drafting began: the batch is put together
DRAFT_DECODES = HOST + 24  # of the MTP context
DRAFT_OUTPUTS = HOST + 25
DRAFT_PROBS = HOST + 26  # of these outputs, with the draft's probability measured
DRAFT_RESHAPES = HOST + 27
DRAFT_CAPTURES = HOST + 28
KV_DRAFT = HOST + 29  # cells of the MTP context's memory, which slots that never draft again have left
AHEADS = HOST + 30  # prompts caught up as they were read
AHEAD_ROWS = HOST + 31
KV_AHEAD = HOST + 32  # cells times the rows that read them
ROWS = HOST + 33  # stretches of target rows
KNOTS = np.array([*range(1, 8), *range(8, 17, 2), 17, *range(20, 32, 4), *range(32, 65, 8), 80, 96, 128, 160, 192, 256])
N_KNOTS = len(KNOTS)
DRAFT_ROWS = ROWS + N_KNOTS  # stretches of MTP rows
N_COUNTS = DRAFT_ROWS + N_KNOTS

TILE = 64  # rows from which on a processor's flash attention takes them together: ggml-cpu, common.h, GGML_FA_TILE_Q
WIDE = 16  # rows of half precision that one kernel of CUDA's takes: ggml-cuda, mmf.cu, ggml_cuda_should_use_mmf
FREE = -1
NOTHING = (-1, False)  # the shape of a decode, and whether the one before had another; here: of none


def params_of(row):
    """The policy's parameters from their numbers, float64 ``[n_params]``."""
    return Params()


def stretch(counts, at, rows):
    """Add a batch of ``rows`` to the stretches of ``counts`` from ``at`` on; the last one has no end."""
    for i in range(N_KNOTS):
        if rows <= KNOTS[i]:
            break
        end = KNOTS[i + 1] if i + 1 < N_KNOTS else rows
        counts[at + i] += min(rows, end) - KNOTS[i]


def book_pass(counts, rows, seqs, cells, read, shape, before, mtp, loaded):
    """One pass of the target over ``rows`` rows of ``seqs`` memories with ``cells`` cells each, after ``before``; its
    shape, to which the cells belong, and whether that is new. ``read``: tokens in memory, summed over the rows.
    """
    shape = (shape << 24) + cells
    counts[BATCHES] += 1
    counts[BATCHES_MTP] += mtp
    counts[ROWS_MTP] += rows * mtp
    counts[BATCHES_LOADED] += loaded
    counts[ROWS_LOADED] += rows * loaded
    new, wide = shape != before[0], rows > WIDE
    counts[BATCHES_NARROW] += not wide
    counts[RESHAPES_WIDE if wide else RESHAPES] += new
    counts[CAPTURES_WIDE if wide else CAPTURES] += before[1] and not new
    tiled = rows >= TILE * seqs
    counts[KV_TILED if tiled else KV] += cells * seqs
    counts[KV_ROWS_TILED if tiled else KV_ROWS] += cells * rows
    counts[PAST_ROWS] += 0 if tiled else read
    stretch(counts, ROWS, rows)
    return shape, new


def next_pass(left, n_ubatch, apart, tail):
    """The slots ``first`` to ``last``, ``seqs`` of them, that the next pass takes ``each`` rows of, where ``left``
    int64 ``[n_slots]`` rows of each are still to be taken: ``(first, last, seqs, each)``.

    Source: llama.cpp, src/llama-batch.cpp, split_equal: of all slots equally many rows; with memories ``apart`` of
    neighbours only. The last ``tail`` rows of a slot stay in one pass (0: they need not).
    """
    first, last, seqs, least, whole = -1, -1, 0, 0, 0
    for s in range(len(left)):
        if left[s] > 0 and (seqs == 0 or s == last + 1 or not apart):
            first = s if seqs == 0 else first
            least = left[s] if seqs == 0 else min(least, left[s])
            last = s
            seqs += 1
    each = min(least, max(1, n_ubatch // seqs))
    for s in range(first, last + 1):
        if left[s] > 0:
            if 0 < left[s] - each < tail:
                if whole == 0:
                    return s, s, 1, left[s]
                return first, s - 1, whole, each
            whole += 1
    return first, last, seqs, each


def book_target(counts, rows, past, n_prompt, n_read, n_ubatch, unified, tail, mtp, before):
    """The target's part of one step, ``before`` being the last pass of the one before; returns its own last.

    ``rows`` int64 ``[n_slots]``: of each slot that generates, 0 elsewhere; ``past``: tokens it has in memory.
    ``n_prompt``: rows of prompts, ``n_read``: those read before. In one memory of attention only (``unified``, ``tail``
    below 0) a batch is one pass, otherwise :func:`next_pass` splits it. Prompts' rows, whose slots a trace does not
    tell, count as a pass of their own there.
    """
    n = read = 0
    tokens = n_prompt + n_read
    for s in range(len(rows)):
        n += rows[s]
        read += rows[s] * past[s]
        tokens += rows[s] + past[s] * (rows[s] > 0)
    counts[OUTPUTS] += n
    loaded = tail > 0 and not mtp
    if unified and tail < 0:
        read += n_prompt * n_read
        for done in range(0, n + n_prompt, n_ubatch):
            size = min(n + n_prompt - done, n_ubatch)
            before = book_pass(counts, size, 1, n_kv(tokens), read * (done == 0), size, before, mtp, loaded)
        return before
    left_of = rows.copy()
    while n > 0:
        first, last, seqs, each = next_pass(left_of, n_ubatch, not unified, tail)
        longest = taken = read = 0
        for s in range(first, last + 1):
            if left_of[s] > 0:
                left_of[s] -= each
                read += each * past[s]
                longest = max(longest, past[s] + rows[s])
                taken = (taken * 257 + s + 1) % 1_000_003  # which slots: a graph is for these sequences
        n -= seqs * each
        shape = taken * 65536 + each
        memories, cells = (1, n_kv(tokens)) if unified else (seqs, n_kv(longest))
        before = book_pass(counts, seqs * each, memories, cells, read, shape, before, mtp, loaded)
    for done in range(0, n_prompt, n_ubatch):
        left = n_prompt - done
        size = min(left, n_ubatch)
        before = book_pass(counts, size, 1, n_kv(n_read + left), size * n_read, -size, before, mtp, loaded)
    return before


def book_drafts(counts, decodes, probed, n_rows, n_held, before):
    """The drafter's part of one step; returns the rows of its last decode, and whether the one before had others;
    ``before``: the same of the last decode of an earlier step.

    ``decodes`` int64 ``[n_slots]``: how many each slot took part in; ``probed``: whether it measured probabilities;
    ``n_rows``: of the first of them, caught up rows included; ``n_held``: tokens in memory, over slots that generate.
    """
    most = decodes.max()
    if most == 0:
        return before
    counts[DRAFT_PROBS] += np.sum(decodes * probed)
    counts[HOST_ROUNDS] += 1
    counts[HOST_DRAFTERS] += np.sum(decodes > 0)
    counts[DRAFT_FIRSTS] += 1
    for j in range(most):
        going = 0
        for s in range(len(decodes)):
            going += decodes[s] > j
        size = n_rows if j == 0 else going
        counts[DRAFT_DECODES] += 1
        counts[DRAFT_OUTPUTS] += going
        new = size != before[0]
        counts[DRAFT_RESHAPES] += new
        counts[DRAFT_CAPTURES] += before[1] and not new
        counts[KV_DRAFT] += n_kv(n_held)
        stretch(counts, DRAFT_ROWS, size)
        before = size, new
    return before


def book_ahead(counts, rows, finished, n_held):
    """``rows`` caught up ahead of a draft, mostly prompts' as they were read, by a policy that drafts right after;
    ``finished``: prompts read to their end; ``n_held``: tokens in memory. Returns what :func:`book_drafts` does.
    """
    counts[AHEADS] += max(1, finished)
    counts[AHEAD_ROWS] += rows
    counts[KV_AHEAD] += n_kv(n_held + rows) * rows
    return rows, True


def book_host(counts, n_generating, emitted, mtp):
    """What a step takes beside decoding."""
    counts[HOST] += 1
    counts[HOST_SLOTS] += n_generating
    counts[HOST_TOKENS] += emitted
    counts[HOST_MTP] += mtp
    counts[HOST_MTP_SLOTS] += n_generating * mtp


def drafts_of(asked, room, p_min, probs, n_max):
    """``(drafted, decodes, blind)`` for a wish of ``asked`` drafts at a position with draft probabilities ``probs``:
    drafting stops below ``p_min``; ``blind``: the trace does not tell where.
    """
    n = min(asked, room)
    if n <= 0:
        return 0, 0, False
    blind = n > n_max
    n = min(n, n_max)
    if p_min <= 0.0:
        return n, n, blind
    drafted = 0
    while drafted < n and (probs[drafted] >= p_min or probs[drafted] < 0.0):
        blind |= probs[drafted] < 0.0
        drafted += 1
    return drafted, min(drafted + 1, n), blind


def run_queue(params, is_shared, sizes, arrays, counts, rounds):
    """Every request under one policy, in order, over all slots; fills ``counts`` (zeroed, ``[n_requests, N_COUNTS]``).

    ``sizes``: slots, most rows of a batch, most of a pass, whether the slots share one memory, rows that it keeps
    together (:func:`book_target`), and requests of a wave: a wave waits for the one before to end. ``rounds`` int16
    ``[n_positions, 2]``, or empty, gets ``(drafted, accepted)`` of every step of each request from its first position.
    """
    n_slots, n_batch, n_ubatch, unified, tail, wave = sizes
    first, n_generated, n_prompt, max_tokens, n_ctx, match, known, probs = arrays
    n_max = probs.shape[1]
    common = begin(params)
    states = [begin(params) for _ in range(n_slots)]
    nows = [Now(0, 0, 0, 0) for _ in range(n_slots)]
    request = np.full(n_slots, FREE)
    generated, past, behind = np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64)
    asked, drafted, accepted = np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64)
    decodes, rows, chunk = np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64)
    held = np.zeros(n_slots, np.int64)  # tokens in the MTP context's memory
    over, ahead, probed = np.zeros(n_slots, np.bool_), np.zeros(n_slots, np.bool_), np.zeros(n_slots, np.bool_)
    of_step = np.zeros(N_COUNTS)
    shape = draft_rows = NOTHING
    waiting, admitted, n_left = 0, 0, len(first)
    while n_left > 0:
        of_step[:] = 0.0
        if n_left == len(first) - waiting:  # nobody is served
            admitted = min(len(first), waiting + wave)
        n_active = n_occupied = 0
        for s in range(n_slots):
            if request[s] == FREE and waiting < admitted:
                r = request[s] = waiting
                waiting += 1
                generated[s] = past[s] = asked[s] = held[s] = 0
                behind[s] = 1  # the row before the first position
                states[s] = common if is_shared else begin(params)
                wish, p_min = decide(params, states[s], Now(1, n_prompt[r], max_tokens[r] - 1, 1))
                over[s], ahead[s] = wish < 0, wish > 0
            n_occupied += request[s] != FREE
            n_active += request[s] != FREE and generated[s] > 0
        n_rows, n_held, mtp = 0, 0, False
        for s in range(n_slots):  # decide and draft
            rows[s] = decodes[s] = drafted[s] = accepted[s] = 0
            r = request[s]
            if r == FREE:
                continue
            if generated[s] == 0:
                mtp |= not over[s]
                continue
            wish, p_min = 0, 0.0
            position = first[r] + generated[s] - 1
            if not over[s]:
                states[s] = common if is_shared else states[s]
                nows[s] = Now(generated[s], past[s], max_tokens[r] - generated[s], n_active)
                wish, p_min = decide(params, states[s], nows[s])
                over[s], wish = wish < 0, max(wish, 0)
            mtp |= not over[s]
            counts[r, TRIPS] += wish == 0 and asked[s] > 0
            asked[s] = wish
            room = max(0, min(n_ctx[r] - past[s] - 2, max_tokens[r] - generated[s] - 1))
            probed[s] = p_min > 0.0
            drafted[s], decodes[s], blind = drafts_of(wish, room, p_min, probs[position], n_max)
            if decodes[s] > 0:
                accepted[s] = min(drafted[s], int(match[position]))
                counts[r, INEXACT] += blind or drafted[s] > known[position]
                n_rows += behind[s]
                behind[s] = 0
                held[s] = past[s]
            n_held += held[s] * (not over[s])
            rows[s] = 1 + drafted[s]
        if n_rows > n_batch:  # too much for one batch: all but the last row of each slot goes ahead
            drafters = np.sum(decodes > 0)
            book_ahead(of_step, n_rows - drafters, drafters, n_held)
            n_rows = drafters
        draft_rows = book_drafts(of_step, decodes, probed, n_rows, n_held, draft_rows)
        free_rows = n_batch - rows.sum()
        n_read = prompt_rows = 0
        for s in range(n_slots):  # what of the prompts fits beside the slots that generate
            chunk[s] = 0
            if request[s] != FREE and generated[s] == 0:
                n_read += past[s]
                chunk[s] = min(free_rows, n_prompt[request[s]] - past[s])
                free_rows -= chunk[s]
                prompt_rows += chunk[s]
        shape = book_target(of_step, rows, past, prompt_rows, n_read, n_ubatch, unified, tail, mtp, shape)
        n_emitted = ahead_rows = finished = 0
        for s in range(n_slots):  # verify, read, learn
            r = request[s]
            if chunk[s] > 0:
                past[s] += chunk[s]
                behind[s] += chunk[s]
                if ahead[s]:
                    ahead_rows += behind[s] - 1
                    behind[s] = 1
                    held[s] = past[s]
                generated[s] = past[s] == n_prompt[r]
                finished += generated[s]
                continue
            if rows[s] == 0:
                continue
            emitted = min(accepted[s] + 1, n_generated[r] - generated[s])
            n_emitted += emitted
            if not over[s]:
                states[s] = common if is_shared else states[s]
                seen = Outcome(asked[s], drafted[s], accepted[s], emitted)
                states[s] = learn(params, states[s], nows[s], seen)
                common = states[s] if is_shared else common
            if len(rounds):
                rounds[first[r] + int(counts[r, STEPS])] = drafted[s], accepted[s]
            counts[r, STEPS] += 1
            counts[r, VERIFICATIONS] += drafted[s] > 0
            counts[r, DRAFTED] += drafted[s]
            counts[r, ACCEPTED] += accepted[s]
            counts[r, TOKENS] += emitted
            generated[s] += emitted
            past[s] += emitted
            behind[s] += emitted
        if ahead_rows > 0:
            draft_rows = book_ahead(of_step, ahead_rows, finished, n_held + n_read)
        book_host(of_step, n_active, n_emitted, mtp)
        for s in range(n_slots):
            r = request[s]
            if r == FREE:
                continue
            for i in range(N_SCALARS, N_COUNTS):
                counts[r, i] += of_step[i] / n_occupied
            if generated[s] >= n_generated[r]:
                request[s] = FREE
                n_left -= 1


def walk_all(rows, shared, sizes, arrays, out, rounds):
    """Every policy: ``out`` float64 ``[n_policies, n_requests, N_COUNTS]``; the rest as in
    :func:`tracekit.replay.kernel.walk_all` and :func:`run_queue`.
    """
    out[:] = 0.0
    for k in range(len(rows)):
        run_queue(params_of(rows[k]), shared[k], sizes, arrays, out[k], rounds)


def book_steps(starts, slots, prompts, drafts, sizes, counts):
    """A recorded run's steps, counted as the walk counts them: ``counts`` float64 ``[n_steps, N_COUNTS]`` (zeroed).

    Step ``i`` has the rows ``starts[i]`` to ``starts[i + 1]`` of ``slots``, int64: slot, target rows, tokens in memory,
    MTP decodes, whether probabilities were measured, tokens emitted, tokens in the MTP context's memory. ``prompts``
    int64 ``[n_steps, 4]``: rows of prompts, rows read before, rows caught up meanwhile, prompts finished. ``drafts``
    int64 ``[n_steps, 4]``: rows of the first MTP decode, whether hidden states were extracted, whether the step is a
    run's first, and whether MTP was loaded: without, a recurrent memory takes no snapshots.
    """
    n_slots, _, n_ubatch, unified, tail, _ = sizes
    shape = draft_rows = NOTHING
    for i in range(len(counts)):
        of_step = counts[i]
        rows, past, decodes = np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64), np.zeros(n_slots, np.int64)
        probed, emitted, n_held = np.zeros(n_slots, np.bool_), 0, 0
        for j in range(starts[i], starts[i + 1]):
            s = slots[j, 0]
            rows[s], past[s], decodes[s], probed[s] = slots[j, 1], slots[j, 2], slots[j, 3], slots[j, 4] > 0
            emitted += slots[j, 5]
            n_held += slots[j, 6]
        if drafts[i, 2]:
            shape = draft_rows = NOTHING
        mtp = drafts[i, 1] > 0
        draft_rows = book_drafts(of_step, decodes, probed, drafts[i, 0], n_held, draft_rows)
        kept = tail if drafts[i, 3] else min(tail, 0)
        shape = book_target(of_step, rows, past, prompts[i, 0], prompts[i, 1], n_ubatch, unified, kept, mtp, shape)
        if prompts[i, 2] > 0:
            draft_rows = book_ahead(of_step, prompts[i, 2], prompts[i, 3], n_held + prompts[i, 1])
        book_host(of_step, starts[i + 1] - starts[i], emitted, mtp)
