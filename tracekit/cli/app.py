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

app.command("doctor")(doctor.doctor)
app.add_typer(model.app, name="model")
app.command("record")(record.record)
app.command("calibrate")(calibrate.calibrate)
app.command("merge")(merge.merge)
app.command("stats")(stats.stats)
app.command("policies")(policies.policies)
app.command("replay")(replay.replay)
app.command("tune")(tune.tune)
app.command("verify")(verify.verify)
app.command("generate")(generate.generate)
app.command("sql")(sql.sql)
app.command("demo")(demo.demo)
app.command("campaign")(campaign.campaign)


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.", is_eager=True)) -> None:
    """Options before the verb."""
    if version:
        import tracekit

        typer.echo(f"tracekit {tracekit.__version__}")
        raise typer.Exit
