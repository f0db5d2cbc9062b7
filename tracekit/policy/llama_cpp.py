"""A policy in llama.cpp's own options, where it has them."""

from __future__ import annotations

from tracekit.policy.rule import Policy, rule


def server_options(policy: Policy) -> list[str] | None:
    """What ``llama-server`` takes to draft as ``policy`` does, tokens and counts alike; None where it cannot.

    Source: llama.cpp, common/arg.cpp; ``benchmarks/llama_server.py`` compares the two.
    """
    if policy.is_off:
        return []
    if policy.rule != rule("static"):
        return None
    n_max, p_min = policy.params.n_max, policy.params.p_min
    options = ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(n_max), "--spec-draft-p-min", f"{p_min:.10g}"]
    return options if n_max else []


def server_advice(policy: Policy) -> str:
    """The same as a sentence; empty where there is nothing to do."""
    options = server_options(policy)
    if options is None:
        return "llama-server has no options for this policy: tracekit.Engine and `tracekit generate` run it."
    return f"llama-server drafts the same with {' '.join(options)}" if options else ""
