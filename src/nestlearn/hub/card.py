"""The model card of an exported run: what it read, how well it does, what learns how fast, and what it is not for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from nestlearn.inspect import describe_levels
from nestlearn.models.hope import HopeLM
from nestlearn.training.checkpoint import Checkpoint

PAPER = "[Nested Learning: The Illusion of Deep Learning Architectures](https://arxiv.org/abs/2512.24695)"


def model_card(
    checkpoint: Checkpoint,
    model: HopeLM,
    *,
    name: str,
    version: str,
    commit: str | None = None,
    license: str | None = None,
    remote_code: bool = False,
) -> str:
    """A card in the Hub's format: metadata in YAML, then Markdown.

    Args:
        checkpoint: says what was read and measured.
        model: the same.
        name: of the model.
        version: of nestlearn.
        commit: of nestlearn that trained it, if known.
        license: of the weights, by the Hub's identifier ("apache-2.0", "cc-by-4.0", ...); None if it is not decided.
        remote_code: whether the folder brings its own code.
    """
    data = checkpoint.run.get("data", {})
    source = _source(data.get("text", ""))
    held_out = checkpoint.progress.get("held_out") if checkpoint.progress else None
    results = None
    if held_out:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name=f"held-out part of {source}",
                metric_type="bits_per_byte",
                metric_name="bits per byte",
                metric_value=round(held_out["bits_per_byte"], 4),
            )
        ]
    metadata = ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["hope", "nested-learning", "continual-learning", model.config.mixer.replace("_", "-")],
        model_name=name if results else None,
        eval_results=results,
    )
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {name}",
        f"A language model of {PAPER}: {model.num_parameters():,} parameters, mixer `{model.config.mixer}`, "
        f"{model.config.depth} blocks of width {model.config.dim}. Made with nestlearn {version}.",
        _use(remote_code),
        _training(checkpoint, source, commit),
        _results(held_out),
        _levels(model),
        _limits(checkpoint, model),
        "## Licence\n\n"
        + (f"The weights: {license}." if license else "The weights' licence is not stated; ask whoever made them.")
        + " The code of nestlearn: Apache-2.0. The text it was trained on has terms of its own.",
    ]
    return "\n\n".join(sections) + "\n"


def _use(remote_code: bool) -> str:
    begin = "" if remote_code else "import nestlearn  # Hope's classes: pip install nestlearn\n"
    trust = ", trust_remote_code=True" if remote_code else ""
    note = "\n\nThe folder brings its own code: read it before you trust it." if remote_code else ""
    return (
        f"## Use\n\n```python\n{begin}from transformers import pipeline\n\n"
        f'generator = pipeline("text-generation", "path/to/this/folder"{trust})\n'
        f'print(generator("It was a", max_new_tokens=50)[0]["generated_text"])\n```{note}'
    )


def _training(checkpoint: Checkpoint, source: str, commit: str | None) -> str:
    training = checkpoint.run.get("training")
    if not training:
        return f"## Training\n\n{checkpoint.step:,} optimizer steps; the file says no more."
    tokens = checkpoint.step * training["batch_size"] * training["sequence_length"]
    rows = {
        "text": source,
        "tokenizer": "bytes" if checkpoint.tokenizer == "bytes" else "word pieces, in this folder",
        "tokens read": f"{tokens:,}",
        "optimizer steps": f"{checkpoint.step:,} of {training['steps']:,}",
        "sequence length": f"{training['sequence_length']:,}",
        "learning rate": f"{training['lr']:g}",
        "seed": str(training["seed"]),
        "commit of nestlearn": commit or "not known",
    }
    return "## Training\n\n" + _table(("", ""), list(rows.items()))


def _results(held_out: dict[str, Any] | None) -> str:
    if not held_out:
        return "## Results\n\nNone were measured."
    return (
        f"## Results\n\n{held_out['bits_per_byte']:.4f} bits per byte ({held_out['loss']:.4f} nats a token) on "
        f"{held_out['targets']:,} tokens of text that was held out of training."
    )


def _levels(model: HopeLM) -> str:
    rows = [(f"`{part.name}`", part.rhythm, f"{part.parameters:,}") for part in describe_levels(model)]
    table = _table(("part", "changes", "parameters"), rows)
    return f"## Levels\n\nHow often each part changes; tokens are counted in a context, steps in training.\n\n{table}"


def _limits(checkpoint: Checkpoint, model: HopeLM) -> str:
    training = checkpoint.run.get("training")
    limits = [
        "It continues text. It was not trained to follow instructions, and what it says may be false or harmful.",
        "It knows no more than the text above, and has that text's biases.",
    ]
    if training:
        limits.append(
            f"It was trained on sequences of {training['sequence_length']:,} tokens; how well it uses longer contexts "
            f"was not measured here."
        )
    if model.config.mixer not in ("attention", "plain_attention"):
        limits.append(
            "Its memories are written by what it reads: a cache or saved state holds a trace of that text, and is as "
            "private as the text is."
        )
    if checkpoint.tokenizer == "bytes":
        limits.append(
            "It has no token that ends a text: generation stops at `max_new_tokens` or at a string that you name."
        )
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _source(text: str) -> str:
    """A source of text by its name alone: where it lies on somebody's machine is nobody else's business."""
    if text == "stdlib":
        return "the source text of Python's standard library"
    return Path(text).name or "a text that is not named"
