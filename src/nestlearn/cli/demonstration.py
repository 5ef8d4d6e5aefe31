"""`nestlearn demo`: from nothing to a trained small Hope, beside a Transformer of its size and beside xz."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from nestlearn.cli.generation import continue_text
from nestlearn.cli.inspection import first_tokens, has_memories
from nestlearn.cli.shared import open_model, output, refuse, say, teaching, text_source
from nestlearn.evaluation.compression import Compression, xz_bits_per_byte
from nestlearn.evaluation.matching import count_parameters, match_parameters
from nestlearn.inspect import describe_memories, levels_table, plot_levels, plot_memories
from nestlearn.io import atomic_write_json
from nestlearn.models import HopeConfig
from nestlearn.models.generation import Sampling
from nestlearn.training.config import DataConfig, RunConfig, TrainingConfig
from nestlearn.training.data import (
    IGNORED,
    ByteTokenizer,
    PackedTokens,
    read_documents,
    split_documents,
)
from nestlearn.training.loop import TrainingResult, build_model, train
from nestlearn.training.plots import plot_losses
from nestlearn.training.progress import duration

PROMPT = 'def read_lines(path):\n    """'
CONTINUATION = 400  # tokens
LOOK = 1024  # tokens of held-out text that the picture of the memories shows


def demo_run(text: str = "stdlib", *, steps: int = 768, seed: int = 0, threads: int = 0) -> RunConfig:
    """The run of the demo, the same as configs/demo.toml. Its size is a number of tokens, not a time, so that it
    learns the same on every machine: about four minutes on two cores, and at most ten on slow ones."""
    return RunConfig(
        model={"preset": "tiny", "depth": 2},
        data=DataConfig(text=text),
        training=TrainingConfig(
            steps=steps,
            batch_size=4,
            sequence_length=256,
            lr=3e-3,
            warmup=60,
            eval_every=192,
            eval_tokens=65_536,
            checkpoint_every=192,
            seed=seed,
            threads=threads,
        ),
    )


@teaching
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("runs/demo"),
    text: Annotated[
        str, typer.Option(help="What to learn from, as in 'nestlearn train'; default: Python's own source text.")
    ] = "stdlib",
    prompt: Annotated[str, typer.Option(help="The text to continue.")] = PROMPT,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each model.")] = demo_run().training.steps,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: as many as torch chooses.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the weights and the order of the text.")] = 0,
) -> None:
    """Train a small Hope on real text and show what it learnt, in a few minutes on a CPU.

    Beside it a Transformer of equal size is trained on the same tokens, and xz compresses the same text. Stopped with
    Ctrl-C, the same command goes on where it was.
    """
    if (out / "config.toml").exists():
        refuse(f"{out} already holds a run of 'nestlearn train'; give another --out")
    hope = demo_run(text_source(text), steps=steps, seed=seed, threads=threads)
    transformer, size = same_size_transformer(hope)

    sides = _read(hope)
    _announce(hope, sides, size)
    results = {
        "Hope": _train("Hope", hope, out / "hope"),
        "Transformer": _train("Transformer", transformer, out / "transformer"),
    }
    say("xz: compressing the same text")
    xz = compress_same_text(hope, sides)

    console = output()
    console.print()
    console.print(_comparison(results, xz))
    console.print(
        f"All three are measured on the same {xz.bytes:,} bytes of text that was held out. The models read them in "
        f"windows of {hope.training.sequence_length} bytes and begin each anew; xz also learns from what it has "
        "compressed of them so far. Both models learn at the same rate, which was chosen for Hope."
    )
    opened = open_model(out / "hope")
    console.print("\n[bold]Hope continues a prompt[/]\n")
    _show_prompt(prompt)
    continuation = continue_text(opened, prompt, CONTINUATION, Sampling(temperature=0.7), show=True)
    console.print("\n")
    for table in levels_table(opened.model):
        console.print(table)

    pictures = {"loss plot": out / "loss.png", "picture of the levels": out / "levels.png"}
    plot_losses(
        out / "hope" / "log.jsonl",
        pictures["loss plot"],
        label="Hope",
        baselines={"Transformer": out / "transformer" / "log.jsonl"},
    )
    plot_levels(opened.model, pictures["picture of the levels"], title="The levels of the demo's Hope")
    if has_memories(opened.model):
        pictures["picture of the memories"] = out / "memories.png"
        record = describe_memories(opened.model, first_tokens(opened, "".join(sides[1]), LOOK))
        plot_memories(record, pictures["picture of the memories"], title="Its memories while it reads held-out text")
    checkpoint = results["Hope"].checkpoint
    atomic_write_json(out / "report.json", _report(hope, results, xz, prompt, continuation))
    console.print()
    for name, path in {**pictures, "checkpoint": checkpoint, "all numbers": out / "report.json"}.items():
        console.print(f"{name:24}{path}", markup=False, soft_wrap=True)
    console.print(f'{"next":24}nestlearn generate {out / "hope"} --prompt "class "', markup=False, soft_wrap=True)


def same_size_transformer(run: RunConfig) -> tuple[RunConfig, int]:
    """The run of a Transformer of the same width, depth and number of parameters; and that number of Hope."""
    config: HopeConfig = build_model(run.model, ByteTokenizer.vocab_size).config  # type: ignore[assignment]
    size = count_parameters(config)
    same_shape = HopeConfig.transformer(dim=config.dim, depth=config.depth, heads=config.heads)
    return dataclasses.replace(run, model=match_parameters(same_shape, size).to_dict()), size


def compress_same_text(run: RunConfig, sides: tuple[list[str], list[str]]) -> Compression:
    """What xz makes of the bytes that a run with byte tokens is evaluated on, primed with those that it is trained on.

    Args:
        run: says how many windows are read, in which order, and which are evaluated.
        sides: the training and the held-out documents.
    """
    config = run.training
    tokenizer = ByteTokenizer()
    training, held_out = (
        PackedTokens.from_texts(texts, tokenizer, sequence_length=config.sequence_length, seed=config.seed)
        for texts in sides
    )
    if config.steps * config.batch_size < training.windows_per_epoch:
        batches = (training.batch(step, config.batch_size).tokens for step in range(config.steps))
        seen = b"".join(bytes(batch.flatten().tolist()) for batch in batches)
    else:
        seen = training.documents.tokens.tobytes()
    targets = [batch.targets for batch in held_out.evaluation_batches(64, config.eval_tokens or None)]
    predicted = b"".join(bytes(rows[rows != IGNORED].tolist()) for rows in targets)
    return xz_bits_per_byte(seen, predicted)


def _read(run: RunConfig) -> tuple[list[str], list[str]]:
    """The two sides, as the run itself reads them; what is to be said about them is said when it does."""
    data = run.data
    documents = read_documents(data.text, notice=lambda text: None)
    return tuple(
        split_documents(
            documents, held_out_fraction=data.held_out_fraction, seed=data.split_seed, notice=lambda text: None
        )
    )  # type: ignore[return-value]


def _announce(run: RunConfig, sides: tuple[list[str], list[str]], size: int) -> None:
    source = "the source text of Python's standard library" if run.data.text == "stdlib" else run.data.text
    megabytes = [sum(len(text.encode("utf-8", errors="replace")) for text in side) / 1e6 for side in sides]
    config = run.training
    say(
        f"Learning from {source}: {len(sides[0]):,} documents with {megabytes[0]:.1f} MB to train on, "
        f"{len(sides[1]):,} with {megabytes[1]:.1f} MB held out.\n"
        f"Two models of {size:,} parameters read the same {config.steps * config.tokens_per_step:,} bytes of it, "
        f"{config.steps:,} steps of {config.batch_size} x {config.sequence_length}, and xz is primed with them. "
        "Ctrl-C saves; the same command goes on."
    )


def _train(name: str, run: RunConfig, folder: Path) -> TrainingResult:
    say(f"\n{name}")
    begun = (folder / "config.toml").exists()
    try:
        result = train(run, folder, resume=begun)
    except ValueError as error:
        if begun:
            raise ValueError(f"{error}. For a new demo give another --out, or remove {folder.parent}") from error
        raise
    if result.interrupted:
        say("The demo was stopped; the same command goes on with it.")
        raise typer.Exit(130)
    return result


def _comparison(results: dict[str, TrainingResult], xz: Compression) -> Table:
    table = Table(title="Held-out text, bits per byte (lower is better)", title_justify="left", title_style="bold")
    for column in ("", "bits per byte", "parameters", "training"):
        table.add_column(column, justify="left" if not column else "right")
    for name, result in results.items():
        assert result.held_out is not None
        table.add_row(
            name, f"{result.held_out.bits_per_byte:.3f}", f"{result.parameters:,}", f"{duration(result.seconds)} min"
        )
    table.add_row("xz, best preset", f"{xz.bits_per_byte:.3f}", "", f"primed with the same {xz.priming_bytes:,} bytes")
    return table


def _show_prompt(prompt: str) -> None:
    terminal = sys.stdout.isatty()
    sys.stdout.write(f"\033[4m{prompt}\033[0m" if terminal else prompt)


def _report(
    run: RunConfig, results: dict[str, TrainingResult], xz: Compression, prompt: str, continuation: str
) -> dict[str, Any]:
    models = {
        name: {
            "bits_per_byte": None if result.held_out is None else result.held_out.bits_per_byte,
            "parameters": result.parameters,
            "training_seconds": round(result.seconds, 1),
            "checkpoint": str(result.checkpoint),
        }
        for name, result in results.items()
    }
    return {
        "text": run.data.text,
        "training_tokens": run.training.steps * run.training.tokens_per_step,
        "models": models,
        "xz": dataclasses.asdict(xz),
        "prompt": prompt,
        "continuation": continuation,
    }
