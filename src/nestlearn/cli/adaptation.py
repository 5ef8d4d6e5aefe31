"""`nestlearn stack` and `nestlearn learn`: a pretrained model that goes on learning from what it reads."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from nestlearn.cli.shared import output, print_json, say, teaching, use_threads
from nestlearn.continual.learner import ContinualLearner, encode
from nestlearn.continual.pretraining import pretrain
from nestlearn.memory.adaptation import Rule
from nestlearn.models.stacking import Strategy, describe, stack_levels
from nestlearn.training.checkpoint import load_model
from nestlearn.training.corpus import read_documents
from nestlearn.training.progress import TrainingProgress

Model = Annotated[
    str, typer.Argument(help="A run's folder or checkpoint, or a model of Hugging Face (name or folder).")
]
Periods = Annotated[str, typer.Option(help="Tokens between two updates of each level, the fastest first.")]
How = Annotated[str, typer.Option(help="Which MLP goes where: last_quarter, whole_depth or interleaved.")]
Rank = Annotated[int, typer.Option(help="Directions of each weight's input that learn; 0: all.")]
Rate = Annotated[str, typer.Option(help="Learning rate, or one for each level: 0.1,0.1,0.05.")]
RuleName = Annotated[str, typer.Option(help="gd, dgd or momentum.")]
Window = Annotated[int, typer.Option(help="Longest attention context in tokens; 0: the model's own, at most 1,024.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 or mps.")]
Threads = Annotated[int, typer.Option(help="CPU threads; 0: as many as torch chooses.")]


@teaching
def stack(
    model: Model,
    periods: Periods = "512,2048,8192",
    strategy: How = "last_quarter",
    rank: Rank = 0,
    lr: Rate = "0.1",
    rule: RuleName = "gd",
    memory: Annotated[
        Path | None, typer.Option(help="Write an empty memory here; `learn` and `chat` then take its levels.")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option("--from", help="Train the model on this with its levels at work, into --out; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the model that --from trains.")] = None,
    steps: Annotated[int, typer.Option(help="Training steps of --from.")] = 200,
    rows: Annotated[int, typer.Option(help="Stretches of text a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a stretch; levels with longer periods stay still.")] = 2048,
    training_lr: Annotated[float, typer.Option(help="Learning rate of the training (AdamW).")] = 1e-3,
    order: Annotated[int, typer.Option(help="1: what was learnt is constant; 2: through the updates.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the stretches.")] = 0,
    device: Device = "cpu",
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show which MLP blocks of a model go on which level, and what a memory takes, before any of it is spent.

    With --from and --out the model is then trained with its levels at work, so that it learns to be adapted (continual
    pre-training); Ctrl-C keeps what was trained. The model itself stays as it is.
    """
    use_threads(threads)
    if memory is not None and memory.exists():
        raise FileExistsError(f"{memory} exists already; choose another name, or go on with it by `nestlearn learn`")
    if (source is None) != (out is None):
        raise ValueError("--from and --out belong together: what to train on, and where the trained model goes")
    if out is not None and out.exists():
        raise FileExistsError(f"{out} exists already; choose another folder")
    learner = _new(model, periods, strategy, rank, lr, rule, 0, device)
    stacked = learner.model
    floats = stacked.floats_per_row(learner.rules)
    if source is not None and out is not None:
        say(describe(stacked))
        settings: dict[str, Any] = {
            "steps": steps,
            "rows": rows,
            "length": length,
            "lr": training_lr,
            "order": order,
            "seed": seed,
        }
        _pretrain(learner, source, out, **settings)
    if memory is not None:
        learner.save(memory)
    if as_json:
        levels = [
            {"period": level.period, "blocks": level.blocks, "weights": level.weights} for level in stacked.levels
        ]
        print_json({"levels": levels, "rank": stacked.rank, "memory_floats": floats})
        return
    output().print(describe(stacked), markup=False, soft_wrap=True)
    output().print(f"in all {4 * floats / 2**20:,.1f} MiB of memory in fp32" + (f", in {memory}" if memory else ""))
    if out is not None:
        output().print(f"the trained model: {out}", markup=False, soft_wrap=True)


def _pretrain(learner: ContinualLearner, source: list[str], out: Path, *, steps: int, **settings: Any) -> None:
    """Trains the base of a learner that has read nothing, and writes it; interrupted, what there is until then."""
    texts = [encode(learner.tokenizer, text) for name in source for text in read_documents(name, notice=say)]
    tokens = torch.tensor([token for ids in texts for token in ids])
    done, started, read = 0, time.perf_counter(), settings["rows"] * settings["length"]
    with TrainingProgress(total=steps) as progress:

        def show(step: int, loss: float) -> None:
            nonlocal done
            done = step
            progress.update(step, loss=loss, tokens_per_second=step * read / (time.perf_counter() - started))

        try:
            pretrain(
                learner.model, tokens, learner.rules, steps=steps, window=learner.window, progress=show, **settings
            )
        finally:
            if done:
                learner.export(out)


@teaching
def learn(
    model: Model,
    source: Annotated[
        list[str], typer.Option("--from", help="What to read: a file, a folder, .jsonl(.gz), a data set; repeatable.")
    ],
    memory: Annotated[Path, typer.Option(help="The file of what is learnt; gone on with if it is there.")],
    periods: Periods = "512,2048,8192",
    strategy: How = "last_quarter",
    rank: Rank = 0,
    lr: Rate = "0.1",
    rule: RuleName = "gd",
    window: Window = 0,
    passes: Annotated[int, typer.Option(help="How often everything is read.")] = 1,
    device: Device = "cpu",
    threads: Threads = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON when it is done.")] = False,
) -> None:
    """Let a model read, and keep what it learnt in a small file. Ctrl-C saves.

    A memory that is there already says itself which levels it has and how they learn.
    """
    use_threads(threads)
    if passes < 1:
        raise ValueError(f"--passes: expected at least 1, got {passes}")
    documents = [text for name in source for text in read_documents(name, notice=say)]
    learner = open_learner(model, memory, periods, strategy, rank, lr, rule, window, device)
    say(describe(learner.model))
    read = [encode(learner.tokenizer, text) for text in documents] * passes
    read = [ids for ids in read if ids]
    memory.parent.mkdir(parents=True, exist_ok=True)
    losses: list[dict[str, Any]] = []
    done, started = 0, time.perf_counter()
    total = sum(map(len, read))
    with TrainingProgress(total=total, doing="reading", unit="token") as progress:

        def show(tokens: int, loss: float) -> None:
            now = done + tokens
            progress.update(now, loss=loss, tokens_per_second=now / (time.perf_counter() - started))

        try:
            for ids in read:
                found = learner.observe(ids, progress=show)
                done += found.tokens
                losses.append({"tokens": found.tokens, "loss": found.loss if len(ids) > 1 else None})
        finally:
            learner.save(memory)
    if as_json:
        print_json({"memory": str(memory), "tokens": done, "texts": losses, "updates": learner.updates})
        return
    output().print(learner.report(), markup=False, soft_wrap=True)
    output().print(f"{memory}: {memory.stat().st_size / 2**20:,.1f} MiB", markup=False, soft_wrap=True)


def open_learner(
    model: str,
    memory: Path,
    periods: str,
    strategy: str,
    rank: int,
    lr: str,
    rule: str,
    window: int,
    device: str,
) -> ContinualLearner:
    """A learner that goes on with a memory, or a new one if there is none."""
    if not memory.exists():
        return _new(model, periods, strategy, rank, lr, rule, window, device)
    base, tokenizer = load_base(model, device)
    learner = ContinualLearner.resume(memory, base, tokenizer)
    say(f"{memory} says which levels there are and how they learn; --periods, --lr and so on are for new ones")
    return learner


def _new(
    model: str, periods: str, strategy: str, rank: int, lr: str, rule: str, window: int, device: str
) -> ContinualLearner:
    spans, rates = _numbers("--periods", periods, int), _numbers("--lr", lr, float)
    base, tokenizer = load_base(model, device)
    how: Strategy = strategy  # type: ignore[assignment]
    named: Rule = rule  # type: ignore[assignment]
    stacked = stack_levels(base, spans, strategy=how, rank=rank or None, notice=None)
    given = rates[0] if len(rates) == 1 else rates
    return ContinualLearner(stacked, tokenizer, lr=given, rule=named, window=window or None)


def _numbers(option: str, text: str, kind: type[Any]) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{option}: expected numbers separated by commas, got {text!r}") from None


def load_base(model: str, device: str) -> tuple[nn.Module, Any]:
    """A model and its tokenizer: a run or checkpoint of nestlearn, or what `transformers` knows by this name.

    Raises:
        OSError, ValueError: if it is neither; no code of the model's own is run.
    """
    path = Path(model).expanduser()
    if path.is_file() or (path / "checkpoints").is_dir():
        return load_model(path, device=device)
    from transformers import AutoModelForCausalLM

    from nestlearn.hub.loading import tokenizer_beside

    base = AutoModelForCausalLM.from_pretrained(model).to(device).eval()
    return base, tokenizer_beside(model)
