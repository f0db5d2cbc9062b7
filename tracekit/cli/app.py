"""The verbs of ``tracekit``. What a verb needs is imported when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import typer

from tracekit.cli import (
    calibrate,
    campaign,
    demo,
    doctor,
    generate,
    merge,
    model,
    policies,
    record,
    replay,
    sql,
    stats,
    tune,
    verify,
)

app = typer.Typer(
    help="Decide, from real traces, whether and how a llama.cpp model should speculate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("doctor", short_help="Devices, the llama.cpp build, and what works with a model.")(doctor.doctor)
app.add_typer(model.app, name="model")
app.command("record", short_help="Record what was drafted, what was accepted, and the times.")(record.record)
app.command("calibrate", short_help="Measure what decodes cost here, without prompts.")(calibrate.calibrate)
app.command("merge", short_help="Put several recordings into one trace.")(merge.merge)
app.command("stats", short_help="What happened in a trace, and where time went.")(stats.stats)
app.command("policies", short_help="Every policy, its parameters, search space and source.")(policies.policies)
app.command("replay", short_help="What any policy would have done on a trace, and how fast.")(replay.replay)
app.command("tune", short_help="Find the best safe policy for a trace, with its evidence.")(tune.tune)
app.command("verify", short_help="Run held-out prompts live and compare with the prediction.")(verify.verify)
app.command("generate", short_help="Generate text for one prompt with the live engine.")(generate.generate)
app.command("sql", short_help="Query a trace (read only), or print its schema.")(sql.sql)
app.command("demo", short_help="Run the whole loop on the reference model.")(demo.demo)
app.command("campaign", short_help="Build, calibrate, record, tune and verify big models here.")(campaign.campaign)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    """Options before the verb."""
    if version:
        import tracekit

        typer.echo(f"tracekit {tracekit.__version__}")
        raise typer.Exit
