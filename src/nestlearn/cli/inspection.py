"""`nestlearn inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from nestlearn.cli.shared import OpenedModel, open_model, output, teaching, use_threads
from nestlearn.inspect import (
    describe_memories,
    levels_table,
    memories_table,
    plot_levels,
    plot_memories,
)
from nestlearn.layers import SelfModifyingTitans, Titans
from nestlearn.models import HopeLM
from nestlearn.training.data import read_documents


@teaching
def inspect(
    model: Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint), or a checkpoint file.")],
    text: Annotated[
        str | None, typer.Option(help="A text to read, as in 'nestlearn train', to see what the memories do with it.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens of it to read.")] = 2048,
    out: Annotated[
        Path | None, typer.Option(help="Folder for levels.png and memories.png; default: none drawn.")
    ] = None,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as torch chooses.")] = 0,
) -> None:
    """Show which part of a model changes how often, and what its memories do while it reads."""
    use_threads(threads)
    opened, console = open_model(model), output()
    for table in levels_table(opened.model):
        console.print(table)
    if out is not None:
        plot_levels(opened.model, out / "levels.png")
        console.print(f"picture of the levels: {out / 'levels.png'}", markup=False, soft_wrap=True)
    if text is not None:
        tokens = first_tokens(opened, "".join(read_documents(text, max_bytes=64 * max_tokens)), max_tokens)
        record = describe_memories(opened.model, tokens)
        console.print(memories_table(record))
        if out is not None:
            plot_memories(record, out / "memories.png")
            console.print(f"picture of the memories: {out / 'memories.png'}", markup=False, soft_wrap=True)


def first_tokens(opened: OpenedModel, text: str, count: int) -> torch.Tensor:
    """The first tokens of a text, (T,) int64 with T at most `count`."""
    return torch.from_numpy(opened.tokenizer.encode(text)[:count].astype("int64"))


def has_memories(model: HopeLM) -> bool:
    """Whether `describe_memories` has something to say of the model."""
    return all(isinstance(block.mixer, SelfModifyingTitans | Titans) for block in model.blocks)
