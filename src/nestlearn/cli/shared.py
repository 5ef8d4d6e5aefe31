"""What the commands share."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, ParamSpec, TypeVar

import torch
import typer
from rich.console import Console

from nestlearn.evaluation.jobs import JobsFailed
from nestlearn.io import missing_file
from nestlearn.models import HopeLM
from nestlearn.training.checkpoint import load_model
from nestlearn.training.config import RunConfig
from nestlearn.training.corpus import STDLIB
from nestlearn.training.loop import TrainingDiverged
from nestlearn.training.tokenizers import Tokenizer, check_vocabulary

USER_ERROR = 2
INTERRUPTED = 130

P = ParamSpec("P")
R = TypeVar("R")

# What is wrong with what the user gave, or with the machine; everything else is a bug and shows its traceback.
_TAUGHT = (ValueError, OSError, ImportError, TrainingDiverged, JobsFailed)


class OpenedModel(NamedTuple):
    """A trained model, its tokenizer, and the run that it comes from (None for a checkpoint file on its own)."""

    model: HopeLM
    tokenizer: Tokenizer
    run: RunConfig | None


def teaching(command: Callable[P, R]) -> Callable[P, R]:
    """A command whose errors are a sentence on standard error and exit code 2, not a traceback.

    With NESTLEARN_TRACEBACK=1 in the environment the traceback is shown.
    """

    @functools.wraps(command)
    def taught(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:
            # The reader of a pipe went away (`| head`): nothing is wrong and nobody is left to tell.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(0) from None
        except _TAUGHT as error:
            if os.environ.get("NESTLEARN_TRACEBACK") == "1":
                raise
            refuse(_sentence(error))

    return taught


def refuse(text: str) -> NoReturn:
    """Print what is wrong, and leave with the exit code of a user's error."""
    console = Console(stderr=True, highlight=False)
    console.print("[bold red]error:[/] ", end="")
    console.print(text, markup=False, soft_wrap=True)
    raise typer.Exit(USER_ERROR)


def output() -> Console:
    """Where results go: standard output, 100 columns where it is no terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def say(text: str) -> None:
    """A line about what is going on, on standard error."""
    Console(stderr=True, highlight=False).print(text, markup=False, soft_wrap=True)


def print_json(value: Any) -> None:
    """A value as JSON on standard output."""
    print(json.dumps(value, indent=2, allow_nan=False))


def use_threads(threads: int) -> None:
    """CPU threads of torch; 0 leaves its choice."""
    if threads < 0:
        raise ValueError(f"--threads: expected 0 (as torch chooses) or more, got {threads}")
    if threads:
        torch.set_num_threads(threads)


def open_model(path: Path, device: str = "cpu") -> OpenedModel:
    """The model of a run's folder or of a checkpoint file, checked against its tokenizer."""
    path = path.expanduser()
    if not path.exists():
        raise missing_file(path, what="run folder or checkpoint")
    model, tokenizer = load_model(path, device=device)
    check_vocabulary(tokenizer, model.config.vocab_size)
    folder = path if path.is_dir() else path.resolve().parent.parent
    config = folder / "config.toml"
    return OpenedModel(model, tokenizer, RunConfig.load(config) if config.is_file() else None)


def text_source(text: str) -> str:
    """A source of text as it is to be remembered: files and folders by their whole path, so that a run can be resumed
    from anywhere; names of data sets and "stdlib" as they are."""
    path = Path(text).expanduser()
    return str(path.resolve()) if text != STDLIB and path.exists() else text


def show_version(wanted: bool) -> None:
    """The callback of --version."""
    if wanted:
        print(f"nestlearn {importlib.metadata.version('nestlearn')}, torch {torch.__version__}")
        raise typer.Exit


def _sentence(error: BaseException) -> str:
    """What an error says, without the number that Python puts before the text of the system's."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error) or type(error).__name__
