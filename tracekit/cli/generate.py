"""``tracekit generate``: one prompt, under a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tracekit.cli import lengths, options, out
from tracekit.words import counted


@options.with_engine
def generate(
    model: options.ModelFile,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads standard input.")],
    policy: Annotated[
        str, typer.Option("--policy", metavar="POLICY", help="A policy, or a policy file (policy.toml).")
    ] = "off",
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End at this text (may be given again).")
    ] = None,
    trace: Annotated[Path | None, typer.Option("--trace", metavar="FILE", help="Also record it (DuckDB).")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Most tokens to generate.")] = 128,
    n_max: Annotated[
        int | None, typer.Option("--n-max", help="Most tokens that may be drafted at once [default: 8].")
    ] = None,
    *,
    sampling_options: options.SamplingOptions,
    engine_options: options.EngineOptions,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Generate text for one prompt with the live engine."""
    import sys
    from dataclasses import asdict, replace

    from tracekit.cli.tuned import read, warn, warn_of_settings
    from tracekit.errors import TracekitError

    tuned = read(policy)
    chosen = tuned.policy

    from tracekit.engine import Engine

    mtp = not chosen.is_off
    if not mtp and not policy.endswith(".toml"):  # what a file says may change; the command line stays
        _refuse_options_of_drafts(engine_options, recorded=trace is not None)
    if n_max is None:
        engine_options = replace(engine_options, n_max=options.EngineOptions.n_max)
    settings, sampling = engine_options.settings(), sampling_options.sampling()
    if prompt == "-" and sys.stdin is None:
        raise TracekitError("PROMPT: - reads standard input, which is closed")
    try:
        text = sys.stdin.read() if prompt == "-" else prompt
        text.encode()
    except UnicodeError:
        raise TracekitError("PROMPT: not UTF-8 text") from None
    if force and trace is None:
        raise TracekitError("--force needs --trace, the file that it overwrites")
    if "" in (stop or ()):
        raise TracekitError("--stop '': an empty text is everywhere; leave it out")
    wanted = {"max_tokens": max_tokens, "sampling": sampling, "stop": tuple(stop or ())}
    warn(tuned, policy, model, settings.n_slots)
    warn_of_settings(tuned, policy, settings.as_dict() | asdict(sampling))
    out.show_log()
    with Engine(model, chosen, settings, engine_options.draft_model, mtp=mtp, trace=trace, force=force) as engine:
        recorder, trained = engine.recorder, engine.model.facts.n_ctx_train
        if json:
            done = engine.generate(text, **wanted)
        else:
            for part in engine.stream(text, **wanted):
                if isinstance(part, str):
                    print(part, end="", flush=True)
                else:
                    done = part
            print()
    facts = {
        "policy": chosen.label,
        "stop": done.stop,
        "n_prompt": done.n_prompt,
        "n_generated": len(done.tokens),
        "tokens_per_second": round(done.tokens_per_second, 2),
        "verifications": done.verifications,
        "drafted": done.drafted,
        "accepted": done.accepted,
        "trips": done.trips,
    }
    if json:
        out.print_json(facts | {"text": done.text, "tokens": done.tokens})
    else:
        out.say(
            f"{counted(facts['n_generated'], 'token')} after a prompt of {facts['n_prompt']}, "
            f"{facts['tokens_per_second']} tokens/s "
            f"(one run), {facts['accepted']} of {facts['drafted']} drafts accepted in "
            f"{counted(facts['verifications'], 'verification')}"
        )
    if done.stop == "context":
        out.say(
            f"stopped where the context of {settings.n_ctx} ends, before --max-tokens {max_tokens}: raise --ctx-size"
        )
    lengths.warn_of_training([done], trained)
    if recorder is not None:
        recorder.demand()
        out.wrote(recorder.path)


def _refuse_options_of_drafts(given: options.EngineOptions, recorded: bool) -> None:
    """Raise :class:`~tracekit.errors.TracekitError` for what changes nothing where nothing is drafted. A trace, where
    the text is ``recorded``, has its own ``--n-max``.
    """
    from tracekit.errors import TracekitError

    names = ["spec_draft_backend_sampling", "draft_model"] + ([] if recorded else ["n_max"])
    for name in names:
        if (value := getattr(given, name)) is not None:
            no = "no-" if value is False else ""
            raise TracekitError(f"--{no}{name.replace('_', '-')}: policy off drafts nothing; add --policy")
