"""What a trace is: the tables of a DuckDB file, with a comment on every column.

Rows are only ever appended, and what is known at the end of a run or a request has a table of its own, so
a recording that was cut off is a complete trace of what happened until then. Times are whole microseconds of
a monotonic clock; ``run`` numbers the recording sessions of one file.
"""

from __future__ import annotations

VERSION = 2

TABLES = """
CREATE TABLE runs (                      -- one row per recording session: where everything below comes from
    run SMALLINT PRIMARY KEY,
    trace_id VARCHAR NOT NULL,           -- random; identifies the recording for ever, also after a merge
    schema_version INTEGER NOT NULL,
    mode VARCHAR NOT NULL,               -- probe: drafts at every position; live: what a policy did; calibration:
                                         -- what decodes cost, on random prompts: no acceptance to learn from
    started_at TIMESTAMPTZ NOT NULL,
    tracekit_version VARCHAR NOT NULL,
    policy VARCHAR,                      -- live: the policy that decides for requests that bring none
    n_max SMALLINT NOT NULL,             -- probe: drafts at every position; otherwise: most that may be drafted
    model_path VARCHAR NOT NULL,
    model_sha256 VARCHAR NOT NULL,
    model_arch VARCHAR NOT NULL,
    model_desc VARCHAR NOT NULL,         -- llama.cpp's description: size class and quantisation
    model_bytes BIGINT NOT NULL,
    model_n_params BIGINT NOT NULL,
    n_layer_nextn SMALLINT NOT NULL,
    draft_sha256 VARCHAR,                -- of the sidecar, where the drafter has its own file
    llama_cpp VARCHAR NOT NULL,          -- llama-cpp-python's version and llama.cpp's system information
    device VARCHAR NOT NULL,             -- device names, or the processor's
    driver VARCHAR,
    settings JSON NOT NULL,              -- every engine setting: n_ctx, n_batch, n_threads, cache types, ...; memory:
                                         -- partial or snapshot, how the target forgets; probe: its seed; live: text
                                         -- and sha256 of a policy file of one's own
    machine JSON NOT NULL                -- operating system, processor, cores, Python; GPUs with driver, CUDA and
                                         -- limits; cuda_graphs, cublas; placement: layers by device, buffers, ...
);
CREATE TABLE run_ends (                  -- absent for a run that was cut off
    run SMALLINT PRIMARY KEY,
    wall_us BIGINT NOT NULL,             -- from the first to the last step
    record_us BIGINT NOT NULL,           -- spent recording in the generating thread
    writer_us BIGINT NOT NULL,           -- processor time of the writing thread, while there was something to record
    n_checked BIGINT NOT NULL,           -- probe, greedy: choices computed again in a batch of another width ...
    n_diverged BIGINT NOT NULL           -- ... and how many came out differently (floating point, near ties)
);
CREATE TABLE requests (
    run SMALLINT NOT NULL,
    request INTEGER NOT NULL,
    prompt_id VARCHAR NOT NULL,
    category VARCHAR NOT NULL,
    arm VARCHAR NOT NULL,                -- probe; live; no_mtp: the baseline, hidden states not even extracted;
                                         -- calibration: idle, a fixed draft length, or a cost surface, run for
                                         -- its timings
    slot SMALLINT NOT NULL,
    n_prompt INTEGER NOT NULL,           -- tokens
    max_tokens INTEGER NOT NULL,
    n_ctx INTEGER NOT NULL,              -- context of the slot, tokens
    temp REAL NOT NULL,                  -- 0: greedy
    seed BIGINT NOT NULL,
    top_k INTEGER NOT NULL,
    top_p REAL NOT NULL,
    min_p REAL NOT NULL,
    policy VARCHAR NOT NULL,             -- that decided, as on the command line; probe: empty, none does
    PRIMARY KEY (run, request)
);
CREATE TABLE request_ends (
    run SMALLINT NOT NULL,
    request INTEGER NOT NULL,
    n_generated INTEGER NOT NULL,        -- tokens
    stop VARCHAR NOT NULL,               -- eos, length, stop, context or cancelled
    prompt_us BIGINT NOT NULL,           -- from the first prompt batch to the first token, without catchup_us
    catchup_us BIGINT NOT NULL,          -- what drafting added to reading the prompt
    PRIMARY KEY (run, request)
);
CREATE TABLE steps (                     -- one llama_decode of the target, and what was done around it
    run SMALLINT NOT NULL,
    step INTEGER NOT NULL,
    t_us BIGINT NOT NULL,                -- since the run's first step
    mtp BOOLEAN NOT NULL,                -- hidden states extracted (false: as if without MTP)
    n_slots SMALLINT NOT NULL,           -- slots that generated
    n_tokens SMALLINT NOT NULL,          -- target batch tokens, prompts' included
    n_prompt SMALLINT NOT NULL,          -- of these, prompts'
    n_past INTEGER NOT NULL,             -- tokens in memory before the step, over the slots that generated
    n_draft_decodes SMALLINT NOT NULL,   -- decodes of the MTP context that yielded a draft
    n_draft_slots SMALLINT NOT NULL,     -- slots that drafted
    n_catchup SMALLINT NOT NULL,         -- rows of the first of them (caught up and drafting, fused)
    first_draft_us INTEGER NOT NULL,     -- that first decode, with its arg-max
    draft_us INTEGER NOT NULL,           -- all of drafting, the first decode included
    n_ahead SMALLINT NOT NULL,           -- rows of prompts caught up in the MTP context as they were read
    catchup_us INTEGER NOT NULL,         -- that; and rows ahead of a draft that did not fit into one batch with it
    target_us INTEGER NOT NULL,
    sample_us INTEGER NOT NULL,
    policy_us INTEGER NOT NULL,
    record_us INTEGER NOT NULL,          -- of the step before
    wall_us INTEGER NOT NULL             -- the whole step
);
CREATE TABLE gpu_readings (              -- what NVIDIA GPUs were doing, every 0.9 s; -1: not told. Read, never set
    run SMALLINT NOT NULL,
    t_us BIGINT NOT NULL,                -- end of the newest step then, since the run's first step
    gpu SMALLINT NOT NULL,
    sm_clock_mhz INTEGER NOT NULL,
    mem_clock_mhz INTEGER NOT NULL,
    power_w REAL NOT NULL,
    temperature_c SMALLINT NOT NULL,
    utilization_ratio REAL NOT NULL,     -- share of the last moments in which a kernel ran
    memory_used_bytes BIGINT NOT NULL
);
CREATE TABLE verifications (             -- one slot's share of one step
    run SMALLINT NOT NULL,
    request INTEGER NOT NULL,
    step INTEGER NOT NULL,
    n_generated INTEGER NOT NULL,        -- tokens emitted before; 0: the token that the prompt's last batch gave
    n_asked SMALLINT NOT NULL,           -- drafts the policy asked for
    n_proposed SMALLINT NOT NULL,        -- drafts made
    n_drafted SMALLINT NOT NULL,         -- drafts verified (probe: a random number of those proposed)
    n_accepted SMALLINT NOT NULL,        -- of those verified, equal to the target's own choice
    n_matched SMALLINT NOT NULL,         -- of those proposed, known to be; right-censored at n_drafted when live
    n_redecoded SMALLINT NOT NULL,       -- tokens decoded twice after a checkpoint was restored
    n_decodes SMALLINT NOT NULL,         -- decodes of the MTP context that drafting took
    stop VARCHAR NOT NULL,               -- why drafting stopped: n_max, p_min, room, or off
    draft_ids INTEGER[] NOT NULL,
    draft_probs REAL[] NOT NULL,         -- soft-max over the ten best logits; one more than drafts after a p_min
                                         -- stop; empty: not measured
    tokens INTEGER[] NOT NULL            -- emitted
);
"""

VIEWS = """
CREATE VIEW summary AS                   -- one row per request: what speculation did for it
SELECT r.run, r.request, r.category, r.arm, r.policy, r.prompt_id, r.n_prompt,
       sum(len(v.tokens)) AS n_generated,
       count(*) FILTER (v.n_drafted > 0) AS verifications,
       sum(v.n_drafted) AS drafted,
       sum(v.n_accepted) AS accepted,
       sum(v.n_accepted) / nullif(sum(v.n_drafted), 0) AS acceptance_ratio,
       1 + sum(v.n_accepted) / nullif(count(*) FILTER (v.n_drafted > 0), 0) AS tau,
       sum(v.n_drafted + 1 + v.n_redecoded) FILTER (v.n_generated > 0)
           / nullif(sum(len(v.tokens)) FILTER (v.n_generated > 0), 0) AS amplification
FROM requests r JOIN verifications v USING (run, request)
GROUP BY ALL ORDER BY r.run, r.request;
"""
