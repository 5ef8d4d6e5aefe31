"""The commands under one name, and what they share: errors that teach, where to print, how to find a model."""

from __future__ import annotations

import typer

from nestlearn.cli import (
    adaptation,
    benchmarking,
    conversation,
    demonstration,
    exporting,
    generation,
    inspection,
    learning,
    reproduction,
    serving,
)
from nestlearn.cli.shared import show_version

app = typer.Typer(
    name="nestlearn",
    help="Nested Learning: language models whose parts learn at several speeds. "
    "Begin with [bold]nestlearn demo[/], or train on a text of your own with [bold]nestlearn train[/].",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _everything(
    version: bool = typer.Option(False, "--version", callback=show_version, is_eager=True, help="Print the version."),
) -> None:
    pass


app.command("demo")(demonstration.demo)
app.command("train")(learning.train)
app.command("eval")(learning.evaluate)
app.command("generate")(generation.generate)
app.command("stack")(adaptation.stack)
app.command("learn")(adaptation.learn)
app.command("chat")(conversation.chat)
app.command("export")(exporting.export)
app.command("serve")(serving.serve)
app.command("inspect")(inspection.inspect)
app.command("reproduce")(reproduction.reproduce_table)
bench = typer.Typer(help="Measure speed. Run it on a quiet machine.", no_args_is_help=True)
bench.command("train")(benchmarking.bench_train)
bench.command("prefill")(benchmarking.bench_prefill)
bench.command("decode")(benchmarking.bench_decode)
bench.command("optimizer")(benchmarking.bench_optimizer)
app.add_typer(bench, name="bench")


def main() -> None:
    """The entry point of the command."""
    app(prog_name="nestlearn")
