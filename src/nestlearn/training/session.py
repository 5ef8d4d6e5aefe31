"""The steps of a run, from where it starts to where it ends."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from nestlearn.io import atomic_write_text
from nestlearn.optim.leveled import LevelOptimizer
from nestlearn.training.checkpoint import checkpoint_path, prune_checkpoints, save_checkpoint
from nestlearn.training.config import RunConfig, TrainingConfig, to_toml
from nestlearn.training.data import IGNORED, Batch, PackedTokens, Tokenizer
from nestlearn.training.distributed import Processes, data_parallel, synchronised, without_data_parallel
from nestlearn.training.held_out import Evaluation, evaluate_loss
from nestlearn.training.plots import plot_losses
from nestlearn.training.progress import TrainingProgress, duration
from nestlearn.training.record import RunLog, describe_environment, write_metadata

__all__ = ["Session", "TrainingDiverged", "TrainingResult", "learning_rate", "resume_command"]

# Drawing takes as long as several steps of a small model: it is done at the end, and with a checkpoint this often.
_PLOT_SECONDS = 60.0

Event = Callable[[dict[str, Any]], None]
Notice = Callable[[str], None]


class TrainingDiverged(RuntimeError):
    """The loss or its gradient is not a finite number."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What `train` returns.

    Args:
        folder: The run's folder.
        step: Optimizer steps taken in all.
        loss: Training loss of the last line of the log, nats per token; None before the first.
        held_out: The last evaluation; None if the run was interrupted before the first.
        checkpoint: The newest checkpoint; None if there was nothing to do.
        interrupted: Whether a signal ended the run before its last step.
        parameters: Of the model.
        seconds: Time spent in steps, over all sessions.
    """

    folder: Path
    step: int
    loss: float | None
    held_out: Evaluation | None
    checkpoint: Path | None
    interrupted: bool
    parameters: int
    seconds: float


@dataclass(kw_only=True)
class Session:
    """One call of `nestlearn.training.loop.train`, from the step it starts at to its last.

    Args:
        run: The run, with its model's settings resolved.
        folder: Where everything is written.
        step: Optimizer steps taken so far.
        progress: What a checkpoint carries for the loop: the seconds spent, the sum and count of the losses since the
            last line of the log and that line's loss, the last evaluation and its step, the corpus's fingerprint.
        model, optimizer, loss: What is trained, by what, and `SummedLoss` of the model.
        training_side, held_out_side: The corpus.
        tokenizer: Saved beside the checkpoints.
        processes: Those that train together.
        notice, on_event: Called with sentences for people, and with lines of the log.
    """

    run: RunConfig
    folder: Path
    step: int
    progress: dict[str, Any]
    model: nn.Module
    optimizer: LevelOptimizer
    loss: nn.Module
    training_side: PackedTokens
    held_out_side: PackedTokens
    tokenizer: Tokenizer
    processes: Processes
    notice: Notice
    on_event: Event

    def __post_init__(self) -> None:
        self.config = self.run.training
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.size = sum(p.numel() for p in self.model.parameters())
        self.saved = checkpoint_path(self.folder, self.step) if self.step else None
        self.recent: deque[float] = deque(maxlen=self.config.log_every)  # seconds of the last steps
        self.log: RunLog | None = None
        self.plotted = time.monotonic()
        if self.processes.is_main:
            self._write_description()
        find_unused = self.processes.world_size > 1 and self._some_unused()
        if self.config.compile:
            self.loss = torch.compile(self.loss)  # type: ignore[assignment]
        self.loss = data_parallel(self.loss, self.processes, find_unused=find_unused)

    def run_to_end(self) -> TrainingResult:
        """Train until the last step or a signal."""
        config, main = self.config, self.processes.is_main
        with contextlib.ExitStack() as stack:
            if main:
                self.log = stack.enter_context(RunLog(self.folder / "log.jsonl", step=self.step))
            bar = TrainingProgress(total=config.steps, done=self.step, silent=not main)
            self.bar = stack.enter_context(bar)
            if main:
                self.notice = bar.note
            stop = stack.enter_context(_stop_on_signal(announce=main))
            self.model.train()
            # An evaluation that was due when the run was stopped: its line belongs to the log like any other.
            if self.step and self._evaluation_due() and self.progress["evaluated"] != self.step:
                self._evaluate()
            stopped = False
            while self.step < config.steps and not stopped:
                stopped = self._train_step(stop)
                finished = self.step == config.steps
                if self._evaluation_due() and (finished or not stopped):
                    self._evaluate()
                if finished or stopped or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self._save(final=finished or stopped)
            interrupted = self.step < config.steps
            if interrupted:
                self.notice(f"stopped after step {self.step:,}, saved {self.saved}\n{resume_command(self.folder)}")
        return TrainingResult(
            folder=self.folder,
            step=self.step,
            loss=self.progress["loss"],
            held_out=Evaluation(**self.progress["held_out"]) if self.progress["held_out"] else None,
            checkpoint=self.saved,
            interrupted=interrupted,
            parameters=self.size,
            seconds=self.progress["seconds"],
        )

    def _train_step(self, stop: dict[str, bool]) -> bool:
        """One optimizer step; returns whether any process was told to stop."""
        config, processes, begin = self.config, self.processes, time.perf_counter()
        _seed(config.seed, self.step, processes.rank)
        batch = self.training_side.batch(self.step, config.batch_size, processes.rank, processes.world_size)
        (valid,) = processes.sum(int((batch.targets != IGNORED).sum()))
        if not valid:
            raise ValueError(
                f"step {self.step + 1}: no token of the batch has a target, every document seems to have one token; "
                "check the source of the text"
            )
        rate = learning_rate(self.step, config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("lr_ratio", 1.0)
        self.optimizer.zero_grad()
        total = torch.zeros((), dtype=torch.float64)
        micro = _split(batch.to(processes.device), config.accumulate)
        for i, rows in enumerate(micro):
            with synchronised(self.loss, last=i == len(micro) - 1):
                summed = self.loss(*rows)
                # DDP takes the mean over processes, so each one's sum counts world_size times: together this is the
                # sum over all valid targets of the whole step, divided by their number.
                (summed * (processes.world_size / valid)).backward()
            total += summed.detach().cpu().double()
        loss, stopped = processes.sum(float(total), float(stop["now"]))
        loss /= valid
        norm = float(nn.utils.clip_grad_norm_(self.parameters, config.clip or math.inf))
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._diverged(loss, norm)
        self.optimizer.step()
        self.step += 1
        self._count(loss, norm, rate, time.perf_counter() - begin)
        return stopped > 0

    def _count(self, loss: float, norm: float, rate: float, seconds: float) -> None:
        """Add a step to the line of the log that is being gathered, and write the line when it is full."""
        progress, config = self.progress, self.config
        progress["seconds"] += seconds
        progress["losses"] += loss
        progress["count"] += 1
        self.recent.append(seconds)
        speed = config.tokens_per_step * len(self.recent) / max(sum(self.recent), 1e-9)
        self.bar.update(self.step, loss=loss, tokens_per_second=speed)
        if self.step % config.log_every == 0 or self.step == config.steps:
            progress["loss"] = progress["losses"] / progress["count"]
            row = {
                "event": "train",
                "step": self.step,
                "tokens": self.step * config.tokens_per_step,
                "loss": progress["loss"],
                "lr": rate,
                "grad_norm": norm,
                "tokens_per_second": round(speed, 1),
                "seconds": round(progress["seconds"], 3),
            }
            progress["losses"], progress["count"] = 0.0, 0
            self._emit(row)

    def _evaluate(self) -> None:
        config = self.config
        found = evaluate_loss(
            without_data_parallel(self.loss),
            self.held_out_side,
            batch_size=max(1, config.batch_size // config.accumulate // self.processes.world_size),
            max_tokens=config.eval_tokens or None,
            processes=self.processes,
        )
        self.progress["held_out"], self.progress["evaluated"] = asdict(found), self.step
        place = {"event": "eval", "step": self.step, "tokens": self.step * config.tokens_per_step}
        self._emit({**place, **asdict(found), "seconds": round(self.progress["seconds"], 3)})
        self.notice(
            f"step {self.step:,}: held-out loss {found.loss:.4f} nats per token, "
            f"{found.bits_per_byte:.4f} bits per byte, after {duration(self.progress['seconds'])}"
        )

    def _save(self, *, final: bool) -> None:
        path = checkpoint_path(self.folder, self.step)
        if self.processes.is_main:
            save_checkpoint(
                path,
                model=self.model,
                optimizer=self.optimizer,
                step=self.step,
                model_config=self.run.model,
                tokenizer=self.tokenizer_spec,
                run=self.run.to_dict(),
                progress=self.progress,
            )
            prune_checkpoints(self.folder, self.config.keep_checkpoints)
            if final or time.monotonic() - self.plotted > _PLOT_SECONDS:
                plot_losses(self.folder / "log.jsonl", self.folder / "loss.png")
                self.plotted = time.monotonic()
            self.on_event({"event": "checkpoint", "step": self.step, "path": str(path)})
        self.processes.wait()
        self.saved = path

    def _emit(self, row: dict[str, Any]) -> None:
        if self.log is not None and self.log.write(row):
            self.on_event(row)

    def _evaluation_due(self) -> bool:
        every = self.config.eval_every
        return self.step == self.config.steps or bool(every and self.step % every == 0)

    def _diverged(self, loss: float, norm: float) -> None:
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the norm of the gradient is {norm}"
        kept = f"the last checkpoint is {self.saved}" if self.saved else "there is no checkpoint yet"
        raise TrainingDiverged(
            f"step {self.step + 1}: {what}; training stopped and nothing was overwritten, {kept}. Try a smaller "
            f"learning rate (lr = {self.config.lr}), a longer warm-up (warmup = {self.config.warmup}) or clipping "
            f"(clip = {self.config.clip}), in another folder"
        )

    def _some_unused(self) -> bool:
        """Whether a parameter gets no gradient, which DDP must be told; one row of the first batch shows it."""
        batch = self.training_side.batch(0, self.config.batch_size).to(self.processes.device)
        self.loss(*(part[:1] for part in batch)).backward()
        unused = any(p.grad is None for p in self.parameters)
        self.optimizer.zero_grad()
        return self.processes.sum(float(unused))[0] > 0

    def _write_description(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer_spec = self.tokenizer.save(self.folder)
        atomic_write_text(self.folder / "config.toml", to_toml(self.run.to_dict()))
        flops = getattr(self.model, "flops_per_token", None)
        facts = {
            "parameters": self.size,
            "forward_flops_per_token": None if flops is None else flops(self.config.sequence_length),
            "corpus": {
                "training_tokens": self.training_side.documents.num_tokens,
                "training_bytes": self.training_side.documents.num_bytes,
                "held_out_tokens": self.held_out_side.documents.num_tokens,
                "held_out_bytes": self.held_out_side.documents.num_bytes,
            },
            "seed": self.config.seed,
        }
        if self.progress.get("started_from"):
            facts["started_from"] = self.progress["started_from"]
        environment = {"from_step": self.step, **describe_environment(self.processes)}
        write_metadata(self.folder / "run.json", facts, environment)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The learning rate of step `step`, counted from 0: linear warm-up, then a cosine to ``lr * min_lr_ratio``."""
    warmup = min(config.warmup, config.steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - 1 - warmup)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * min(done, 1))))


def resume_command(folder: str | os.PathLike[str]) -> str:
    """What to type to go on with the run in `folder`."""
    return f"go on with: nestlearn train --out {folder} --resume"


def _seed(seed: int, step: int, rank: int) -> None:
    """Random numbers of a step (dropout), different in each process: a function of the step, so nothing to save."""
    torch.manual_seed((seed * 1_000_003 + step) * 65_537 + rank)


def _split(batch: Batch, parts: int) -> list[Batch]:
    """Micro-batches of equal numbers of rows."""
    return [Batch(*rows) for rows in zip(*(tensor.chunk(parts) for tensor in batch), strict=True)]


@contextlib.contextmanager
def _stop_on_signal(*, announce: bool) -> Iterator[dict[str, bool]]:
    """Turn the first SIGINT or SIGTERM into a flag; a later SIGINT interrupts at once, without saving.

    torchrun passes on the signal that the terminal has already sent, so one within a second is not a second wish.
    """
    flag = {"now": False}
    since = 0.0

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal since
        if flag["now"]:
            if number == signal.SIGINT and time.monotonic() - since > 1.0:
                raise KeyboardInterrupt
            return
        flag["now"], since = True, time.monotonic()
        if announce:
            # Not print: a handler may run in the middle of one.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping: finishing this step and saving (Ctrl-C once more: at once, without saving)\n")

    previous = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            previous[number] = signal.signal(number, handle)
    try:
        yield flag
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
