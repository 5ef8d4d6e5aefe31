"""`nestlearn train` and `nestlearn eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from nestlearn.cli.harness import run_tasks, show_tasks
from nestlearn.cli.shared import open_model, output, print_json, refuse, say, teaching, text_source, use_threads
from nestlearn.training import loop
from nestlearn.training.config import RunConfig, parse_value
from nestlearn.training.data import PackedTokens, read_documents, split_documents
from nestlearn.training.stages import next_stage

# A first model of one's own on a CPU: small, and done within the hour.
DEFAULT_PRESET = "tiny"

Threads = Annotated[int, typer.Option(help="CPU threads; 0: as many as torch chooses.")]


@teaching
def train(
    out: Annotated[Path, typer.Option(help="Folder of the run: its configuration, log, loss plot and checkpoints.")],
    text: Annotated[
        str | None,
        typer.Option(
            help="What to learn from: a text file, a folder, a .jsonl(.gz) with a field 'text', the name of a "
            "data set, or 'stdlib' for the source text of Python's standard library (the default)."
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A run as a TOML file; the options here go before what it says.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    start: Annotated[
        Path | None,
        typer.Option(
            "--from",
            help="A later stage: start from the weights of this run's folder or checkpoint and keep its settings, but "
            "for --steps (needed), the options here, and the order of the text. --set may change settings of the "
            "model that no parameter depends on, such as model.local_chunk_sizes of the mixer tnt.",
        ),
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(help="Text of its own to evaluate on; otherwise a part of --text is held out.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="'bytes' (the default), a tokenizer.json, or a folder or name of transformers.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Size: tiny (about 1M parameters, the default), small, 340M, 760M or 1.3B.")
    ] = None,
    mixer: Annotated[
        str | None,
        typer.Option(
            help="The sequence layer: self_modifying_titans (Hope, the default), tnt, titans, "
            "gated_delta_net, delta_net, linear_attention, attention or plain_attention."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences per step.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens per sequence.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="What moves matrices: adamw (the default), m3 or dgd; AdamW moves the rest.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate after warm-up.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the initial weights and the order of the data.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 or mps.")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; 0: as many as torch chooses.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="SECTION.KEY=VALUE",
            help="Any other setting of the TOML file, for example --set model.depth=6; may be given many times.",
        ),
    ] = None,
) -> None:
    """Train a language model on text.

    Ctrl-C saves; --resume goes on from there, to the same losses bit for bit. A folder that already holds a run is
    never overwritten. A later stage, for example the fine-tuning of TNT with smaller chunks, is a run of its own that
    starts --from another.
    """
    if resume and not out.is_dir():
        refuse(f"--resume: there is no run in {out}; without --resume one is started there")
    if resume and preset is not None:
        refuse("--preset: a run that goes on keeps its model; leave it out, or start another run without --resume")
    if start is not None and (resume or config is not None or preset is not None):
        other = "--resume" if resume else "--config" if config is not None else "--preset"
        refuse(f"--from: a later stage has the settings of the run that it starts from; leave {other} out")
    if start is not None and steps is None:
        refuse("--from: say how long with --steps; the second stage of TNT takes about a twentieth of the first one's")
    begun = out / "config.toml"
    if resume and config is None and begun.is_file():
        tables = RunConfig.load(begun).to_dict()
    else:
        tables = {"model": {}, "data": {}, "training": {}}
        if config is not None:
            tables |= RunConfig.load(config).to_dict()
        if start is not None and steps is not None:
            tables |= next_stage(start, steps=max(1, steps)).to_dict()
    if not tables["model"]:
        tables["model"] = {"preset": DEFAULT_PRESET}
    given: dict[str, dict[str, Any]] = {
        "data": {
            "text": None if text is None else text_source(text),
            "held_out": None if held_out is None else text_source(held_out),
            "tokenizer": tokenizer,
        },
        "model": {"preset": preset, "mixer": mixer},
        "training": {
            "steps": steps,
            "batch_size": batch_size,
            "sequence_length": sequence_length,
            "optimizer": optimizer,
            "lr": lr,
            "seed": seed,
            "device": device,
            "threads": threads,
        },
    }
    for section, options in given.items():
        tables[section] |= {key: value for key, value in options.items() if value is not None}
    for setting in settings or []:
        section, key, value = _setting(setting)
        tables.setdefault(section, {})[key] = value
    result = loop.train(RunConfig.from_dict(tables), out, resume=resume)
    if result.interrupted:
        raise typer.Exit(130)
    console = output()
    if result.held_out is not None:
        console.print(
            f"held-out text: [bold]{result.held_out.bits_per_byte:.4f} bits per byte[/] "
            f"({result.parameters:,} parameters, {result.step:,} steps, {result.seconds:,.0f} s)"
        )
    console.print(f"checkpoint  {result.checkpoint}", markup=False, soft_wrap=True)
    console.print(f"loss plot   {out / 'loss.png'}", markup=False, soft_wrap=True)
    console.print(f'next        nestlearn generate {out} --prompt "..."', markup=False, soft_wrap=True)


@teaching
def evaluate(
    model: Annotated[Path, typer.Argument(help="A run's folder (its newest checkpoint), or a checkpoint file.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text to evaluate on, as in 'nestlearn train'; default: what the run itself held out."),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens per window, each read from an empty state; default: as in training.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Evaluate at most this many tokens, evenly spaced over the text; 0: all.")
    ] = 0,
    batch_size: Annotated[int, typer.Option(help="Windows at a time.")] = 8,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Instead: tasks of lm-evaluation-harness, with commas: lambada,piqa,arc_easy,novels or others."
        ),
    ] = None,
    limit: Annotated[int, typer.Option(help="With --tasks: only the first documents of each; 0: all.")] = 0,
    carry: Annotated[
        bool, typer.Option("--carry", help="With --tasks: one memory for all windows of a document.")
    ] = False,
    include_path: Annotated[
        Path | None, typer.Option(help="With --tasks: a folder with further tasks in YAML.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")] = "cpu",
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how well a model predicts a text, in bits per byte (lower is better), or how it does on tasks."""
    use_threads(threads)
    if tasks is not None:
        names = [name.strip() for name in tasks.split(",") if name.strip()]
        report = run_tasks(
            model,
            names,
            limit=limit,
            carry=carry,
            window=sequence_length,
            batch_size=batch_size,
            include_path=include_path,
            device=device,
        )
        show_tasks(report, as_json=as_json)
        return
    opened = open_model(model, device)
    if text is None and opened.run is None:
        refuse(f"--text: {model} lies in no run's folder, so say what to evaluate on")
    documents = _held_out(opened.run) if text is None and opened.run is not None else read_documents(str(text))
    if max_tokens < 0:
        refuse(f"--max-tokens: expected 0 (all) or more, got {max_tokens}")
    length = sequence_length or (512 if opened.run is None else opened.run.training.sequence_length)
    data = PackedTokens.from_texts(documents, opened.tokenizer, sequence_length=length)
    if not as_json:
        say(f"evaluating on {len(documents):,} documents, {data.documents.num_tokens:,} tokens")
    found = loop.evaluate(opened.model, data, batch_size=batch_size, max_tokens=max_tokens or None)
    report = {"model": str(model), "text": text, "sequence_length": length, **dataclasses.asdict(found)}
    if as_json:
        print_json(report)
        return
    output().print(
        f"[bold]{found.bits_per_byte:.4f} bits per byte[/], loss {found.loss:.4f} nats per token, "
        f"over {found.targets:,} tokens ({found.bytes:,} bytes) in windows of {length:,}"
    )


def _held_out(run: RunConfig) -> list[str]:
    """The documents that a run held out."""
    if run.data.held_out:
        return read_documents(run.data.held_out)
    documents = read_documents(run.data.text, max_bytes=run.data.max_bytes or None)
    return split_documents(documents, held_out_fraction=run.data.held_out_fraction, seed=run.data.split_seed).held_out


def _setting(text: str) -> tuple[str, str, Any]:
    """Section, key and value of --set; the value as in TOML, or a plain word."""
    name, equals, value = text.partition("=")
    section, dot, key = name.strip().partition(".")
    if not (equals and dot and key):
        raise ValueError(f"--set: expected SECTION.KEY=VALUE, for example model.depth=6, got {text!r}")
    return section, key, parse_value(value)
