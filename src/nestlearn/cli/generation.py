"""`nestlearn generate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer

from nestlearn.cli.shared import OpenedModel, open_model, print_json, teaching, use_threads
from nestlearn.models.generation import Sampling, TextStream
from nestlearn.models.generation import generate as generate_tokens


@teaching
def generate(
    model: Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint), or a checkpoint file.")],
    prompt: Annotated[str, typer.Option(help="The text to continue; '-' reads it from standard input.")],
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 300,
    temperature: Annotated[float, typer.Option(help="0: always the likeliest token; 1: as the model believes.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Choose among the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Choose among the likeliest tokens that make up this probability.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as torch chooses.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON when it is done, instead of the text.")] = False,
) -> None:
    """Continue a text with a trained model."""
    use_threads(threads)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    opened = open_model(model, device)
    if prompt == "-":
        prompt = sys.stdin.read()
    if not as_json:
        sys.stdout.write(prompt)
        sys.stdout.flush()
    text = continue_text(opened, prompt, max_tokens, sampling, show=not as_json)
    if as_json:
        print_json({"prompt": prompt, "continuation": text, "tokens": max_tokens, "seed": seed})
    else:
        print()


def continue_text(opened: OpenedModel, prompt: str, max_tokens: int, sampling: Sampling, *, show: bool) -> str:
    """The continuation of a prompt, written to standard output as it comes if `show`."""
    device = next(opened.model.parameters()).device
    tokens = torch.from_numpy(opened.tokenizer.encode(prompt).astype("int64"))[None].to(device)
    stream = TextStream(opened.tokenizer.decode)
    pieces: list[str] = []

    def put(piece: str) -> None:
        pieces.append(piece)
        if show and piece:
            sys.stdout.write(piece)
            sys.stdout.flush()

    for token in generate_tokens(opened.model, tokens, max_tokens, sampling):
        put(stream.push(int(token)))
    put(stream.end())
    return "".join(pieces)
