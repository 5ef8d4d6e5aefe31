"""`nestlearn export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nestlearn.cli.shared import output, say, teaching


@teaching
def export(
    model: Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint), or a checkpoint file.")],
    folder: Annotated[Path, typer.Argument(help="Where to: a new or empty folder, or that of an earlier export.")],
    name: Annotated[str | None, typer.Option(help="The model's name on its card; default: the folder's.")] = None,
    weights_license: Annotated[
        str | None, typer.Option("--license", help="Licence of the weights for the card, for example apache-2.0.")
    ] = None,
    remote_code: Annotated[
        bool, typer.Option("--remote-code", help="Add the model's code, for machines without nestlearn.")
    ] = False,
) -> None:
    """Write a model as a folder of the Hugging Face ecosystem: weights, configuration, tokenizer, model card."""
    from nestlearn.hub.exporting import export as write

    say("exporting")
    done = write(model, folder, name=name, license=weights_license, remote_code=remote_code)
    console = output()
    for path in sorted(done.iterdir()):
        console.print(f"{path.name:28}{path.stat().st_size:>14,} bytes", markup=False, soft_wrap=True)
    trust = ", trust_remote_code=True" if remote_code else ""
    console.print(f'next        pipeline("text-generation", "{done}"{trust})', markup=False, soft_wrap=True)
