"""`nestlearn chat`: a conversation that the model learns from."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nestlearn.cli.adaptation import Device, How, Model, Periods, Rank, Rate, RuleName, Threads, Window, open_learner
from nestlearn.cli.shared import say, teaching, use_threads
from nestlearn.continual.learner import ContinualLearner, encode
from nestlearn.models.hope import HopeLM
from nestlearn.models.stacking import describe
from nestlearn.training.corpus import read_documents

HELP = """/learn FILE   read a file and learn from it
/levels       what each level has learnt
/forget [N]   return all levels, or some (0 the fastest), to where they began
/undo         take back the last thing that was learnt or forgotten
/save         write the memory now
/quit         save and leave"""


@teaching
def chat(
    model: Model,
    memory: Annotated[Path, typer.Option(help="The file of what is learnt; gone on with if it is there.")],
    periods: Periods = "512,2048,8192",
    strategy: How = "last_quarter",
    rank: Rank = 0,
    lr: Rate = "0.1",
    rule: RuleName = "gd",
    window: Window = 0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer in tokens.")] = 200,
    still: Annotated[bool, typer.Option("--still", help="Do not learn from what is said, only by /learn.")] = False,
    device: Device = "cpu",
    threads: Threads = 0,
) -> None:
    """Talk with a model that learns from the conversation. /help lists what else it does; Ctrl-C saves."""
    use_threads(threads)
    learner = open_learner(model, memory, periods, strategy, rank, lr, rule, window, device)
    say(describe(learner.model))
    say("Say something; /help for help, /quit to leave.")
    talk = Conversation(learner, memory, max_tokens=max_tokens, learns=not still)
    try:
        while True:
            sys.stdout.write("> ")
            sys.stdout.flush()
            line = sys.stdin.readline()
            if not line or line.strip() == "/quit":
                break
            answer = talk.take(line.strip())
            if answer:
                print(answer, flush=True)
    finally:
        talk.save()


class Conversation:
    """Turns of a user and a model.

    Args:
        learner: that answers.
        memory: where it is saved.
        max_tokens: longest answer.
        learns: whether it learns from each turn.
    """

    def __init__(self, learner: ContinualLearner, memory: Path, *, max_tokens: int, learns: bool) -> None:
        self.learner, self.memory = learner, memory
        self.max_tokens, self.learns = max_tokens, learns
        self.messages: list[dict[str, str]] = []

    def take(self, line: str) -> str:
        """The answer to a line, which may be a command; mistakes are answers too."""
        if not line:
            return ""
        if not line.startswith("/"):
            return self.reply(line)
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            return f"{line}: {error}"
        commands = {"/learn": self.learn, "/levels": self.levels, "/forget": self.forget, "/undo": self.undo,
                    "/save": self.save, "/help": lambda: HELP}  # fmt: skip
        if name not in commands:
            return f"{name}: no such command.\n{HELP}"
        try:
            return str(commands[name](*words) or "")
        except (ValueError, OSError, TypeError) as error:
            return f"{line}: {error}"

    def reply(self, text: str) -> str:
        """What the model says to a text; it learns from both."""
        self.messages.append({"role": "user", "content": text})
        ids = self.prompt()
        kept = max(1, self.learner.window - self.max_tokens)
        settings: dict[str, Any] = {} if isinstance(self.learner.model.base, HopeLM) else {"do_sample": True}
        new = self.learner.generate(ids[-kept:], min(self.max_tokens, self.learner.window - 1), **settings)
        answer = self.learner.decode(new[0].tolist())
        if not self._has_template():
            answer = answer.split("\nuser:")[0]
        answer = answer.strip()
        self.messages.append({"role": "assistant", "content": answer})
        if self.learns:
            self.learner.observe(self._ids(self.messages[-2:], answers=False))
        return answer

    def prompt(self) -> list[int]:
        """All that was said, as the model's own template has it, or else a line for each turn."""
        return self._ids(self.messages, answers=True)

    def learn(self, *files: str) -> str:
        if not files:
            raise ValueError("expected a file, for example /learn notes.txt")
        found = [self.learner.observe(text) for name in files for text in read_documents(name, notice=say)]
        return "\n".join(map(str, found))

    def levels(self) -> str:
        return self.learner.report()

    def forget(self, *levels: str) -> str:
        self.learner.forget([int(level) for level in levels] or None)
        return self.learner.report()

    def undo(self) -> str:
        self.learner.undo()
        return self.learner.report()

    def save(self) -> str:
        self.memory.parent.mkdir(parents=True, exist_ok=True)
        self.learner.save(self.memory)
        return f"saved to {self.memory}"

    def _has_template(self) -> bool:
        return bool(getattr(self.learner.tokenizer, "chat_template", None))

    def _ids(self, messages: list[dict[str, str]], *, answers: bool) -> list[int]:
        """Ids of turns, and of the beginning of an answer if one is to come."""
        if self._has_template():
            text = self.learner.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answers)
        else:
            text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
            text += "assistant:" if answers else ""
        return encode(self.learner.tokenizer, text)
