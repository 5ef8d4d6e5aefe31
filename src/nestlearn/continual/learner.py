"""A learner: a stacked model, what its levels have learnt, and what one does with both."""

from __future__ import annotations

import copy
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.continual.memory_file import describe_memory, load_memory, save_memory
from nestlearn.memory.adaptation import LearningRule, Rule
from nestlearn.models.generation import Sampling, generate
from nestlearn.models.hope import HopeLM
from nestlearn.models.in_context import LevelMemory, read, segments
from nestlearn.models.stacking import StackedModel, is_linear
from nestlearn.training.checkpoint import checkpoint_path, save_checkpoint

# Of a context, unless another is asked for: each segment pays for the attention to all of it.
LONGEST_WINDOW = 1024


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What came of reading a text.

    Attributes:
        loss: nats per predicted token, mean over rows, each predicted with what was learnt before its segment; NaN for
            a text of one token, of which nothing is predicted.
        tokens: read in each row.
        seconds: that it took.
        updates: how often each level changed.
        sizes: mean norm of each level's changes, over rows and updates; 0 where there was none.
    """

    loss: float
    tokens: int
    seconds: float
    updates: tuple[int, ...]
    sizes: tuple[float, ...]

    @property
    def tokens_per_second(self) -> float:
        """Of all rows' tokens, those of one row."""
        return self.tokens / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        levels = ", ".join(f"level {i}: {n} x {size:.2g}" for i, (n, size) in enumerate(zip(self.updates, self.sizes)))  # noqa: B905
        return f"{self.tokens:,} tokens, loss {self.loss:.3f}, {self.tokens_per_second:,.0f} tokens/s; {levels}"


class ContinualLearner:
    """A model that goes on learning from what it reads, at several speeds, and forgets only what it is told to.

    What it learns is a change of its levels' weights, for each row of a batch on its own; the base model is never
    changed, and several learners may share one. A learner begins with nothing learnt.

    Args:
        model: from `nestlearn.stack_levels`.
        tokenizer: turns text into ids and back: of Hugging Face, or of `nestlearn.training.data.load_tokenizer`.
            None if only ids are given.
        lr: learning rate of all levels, or one for each. Where a gradient exceeds the clip, as it mostly does by
            default, it is the length of a step of "gd".
        rule: "gd", "dgd" or "momentum"; see `nestlearn.memory.adaptation.LearningRule`.
        window: longest attention context in tokens; None for the base's own, at most 1,024.
        nested: whether a level returns to its initial weights when the next slower one changes (Eq. 72).
        others: momentum, clip and retention of the rule.

    Raises:
        ValueError: for numbers out of range, or another number of learning rates than levels.
    """

    def __init__(
        self,
        model: StackedModel,
        tokenizer: Any = None,
        *,
        lr: float | Sequence[float] = 0.1,
        rule: Rule = "gd",
        window: int | None = None,
        nested: bool = False,
        **others: Any,
    ) -> None:
        rates = [lr] * len(model.levels) if isinstance(lr, int | float) else list(lr)
        if len(rates) != len(model.levels):
            raise ValueError(f"lr: expected a number, or one for each of the {len(model.levels)} levels; got {rates}")
        self.model = model
        self.tokenizer = tokenizer
        self.rules = tuple(LearningRule(lr=rate, rule=rule, **others) for rate in rates)
        self.window = _window(model, window)
        self.nested = nested
        self.memory = LevelMemory(model.fresh(1, self.rules), 1, 0)
        self.updates = (0,) * len(model.levels)
        self._before: tuple[LevelMemory, tuple[int, ...]] | None = None

    @classmethod
    def resume(cls, path: str | os.PathLike[str], base: nn.Module, tokenizer: Any = None) -> ContinualLearner:
        """A learner that goes on with a file, with the levels and rules that it names.

        Args:
            path: from `save`.
            base: the model it was learnt on, not stacked.
            tokenizer: of the base.

        Raises:
            FileNotFoundError, ValueError: as `load`.
        """
        found = describe_memory(path)
        known = dict(base.named_modules())
        missing = [n for level in found.levels for n in level.weights if n not in known or not is_linear(known[n])]
        if missing:
            raise ValueError(
                f"{os.fspath(path)}: learnt on another base model ({found.base}); this one has no layer {missing[0]}"
            )
        learner = cls(StackedModel(base, found.levels, rank=found.rank), tokenizer, lr=0.0)
        learner.load(path)
        return learner

    @property
    def rows(self) -> int:
        """Rows that learn, each on its own."""
        return self.memory.rows

    def observe(
        self, text: str | Tensor | Sequence[int], *, progress: Callable[[int, float], None] | None = None
    ) -> Observation:
        """Reads a text and learns from it.

        It begins with an empty attention context, and levels change when they are due; what has been gathered for
        levels that are not waits for the next text. Interrupted (Ctrl-C), it keeps what it learnt until then.

        Args:
            text: a text, or ids (T,) or (B, T), one row for each row of the learner. A learner that has read nothing
                yet takes any number of rows.
            progress: called after each segment with the tokens read and the loss so far.

        Raises:
            ValueError: for an empty text, or another number of rows.
        """
        tokens = self._tokens(text)
        memory = self.memory
        if len(tokens) != self.rows:
            if memory.tokens:
                raise ValueError(
                    f"text: this learner has read {memory.tokens:,} tokens in {self.rows} rows, got {len(tokens)} "
                    "rows; every row learns on its own, so give as many, or make another learner"
                )
            memory = LevelMemory(self.model.fresh(len(tokens), self.rules), len(tokens), 0)
        before = (self.memory, self.updates)
        counts, sizes = [0] * len(self.rules), [0.0] * len(self.rules)
        nats, predicted, done, started = 0.0, 0, 0, time.perf_counter()
        parts = segments(self.model, tokens, memory, self.rules, window=self.window, nested=self.nested)
        for part in parts:
            nats, predicted, done = nats + part.nats.mean().item(), predicted + part.predicted, done + part.tokens
            for update in part.updates:
                counts[update.level] += 1
                sizes[update.level] += update.size.mean().item()
            # Segment by segment, so that whoever is interrupted keeps what was learnt until then.
            self.memory, self._before = part.memory, before
            self.updates = tuple(old + new for old, new in zip(before[1], counts, strict=True))
            if progress is not None:
                progress(done, nats / max(predicted, 1))
        return Observation(
            loss=nats / predicted if predicted else math.nan,
            tokens=done,
            seconds=time.perf_counter() - started,
            updates=tuple(counts),
            sizes=tuple(size / max(count, 1) for size, count in zip(sizes, counts, strict=True)),
        )

    def undo(self) -> None:
        """Takes back the last `observe` or `forget`. Once: a second call has nothing to take back.

        Raises:
            ValueError: if nothing was observed or forgotten since the start, a load, or the last undo.
        """
        if self._before is None:
            raise ValueError("undo: nothing was observed or forgotten since the start, the last load or the last undo")
        (self.memory, self.updates), self._before = self._before, None

    @torch.no_grad()
    def loss(self, text: str | Tensor | Sequence[int]) -> float:
        """Nats per token of a text, with what was learnt, without learning from it."""
        tokens = self._tokens(text)
        if tokens.shape[1] < 2:
            raise ValueError("loss: expected at least two tokens, of which the second is predicted; got one")
        found = read(self.model, tokens, self.memory, self.rules, window=self.window, learn=False)
        return found.nats.mean().item() / found.predicted

    @torch.no_grad()
    def generate(self, prompt: str | Tensor | Sequence[int], max_new_tokens: int = 50, **settings: Any) -> Any:
        """Goes on with a prompt, reading with what was learnt. Nothing is learnt from it.

        Args:
            prompt: a text, or ids (T,) or (B, T).
            max_new_tokens: at most.
            settings: of `transformers`' generate, or of `nestlearn.models.generation.Sampling` for our own models.

        Returns:
            a text if the prompt is one, otherwise ids (B, new); both without the prompt.
        """
        tokens = self._tokens(prompt)
        base = self.model.base
        with self.model.reading(self.memory.weights):
            if isinstance(base, HopeLM):
                made = list(generate(base, tokens, max_new_tokens, Sampling(**settings)))
                new = torch.stack(made, dim=1) if made else tokens[:, :0]
            else:
                whole = base.generate(  # type: ignore[operator]
                    tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=max_new_tokens, **settings
                )
                new = whole[:, tokens.shape[1] :]
        return self.decode(new[0].tolist()) if isinstance(prompt, str) else new

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what was learnt, and nothing of the base but its fingerprint; `load` goes on exactly here.

        Raises:
            OSError: if it cannot be written; an earlier file is whole.
            ValueError: if a value is not finite.
        """
        manner = {"window": self.window, "nested": self.nested}
        save_memory(path, self.model, self.memory, self.rules, self.updates, manner)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Takes what a file holds in place of what was learnt, with the rules, the window and the variant (nested or
        not) by which it was learnt.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: naming the file and what is wrong with it; the learner is as before.
        """
        learnt = load_memory(path, self.model, device=next(self.model.parameters()).device)
        self.memory, self.rules, self.updates, self.window, self.nested = learnt
        self._before = None

    def forget(self, levels: Sequence[int] | None = None) -> None:
        """Returns levels to their initial weights; what they have gathered goes too.

        Args:
            levels: numbers, 0 the fastest; None for all.

        Raises:
            ValueError: for a level that there is not.
        """
        chosen = range(len(self.rules)) if levels is None else levels
        unknown = [i for i in chosen if i not in range(len(self.rules))]
        if unknown:
            raise ValueError(f"levels: expected some of {list(range(len(self.rules)))}, got {unknown}")
        names = {name for i in chosen for name in self.model.levels[i].weights}
        fresh = self.model.fresh(self.rows, self.rules)
        weights = {name: fresh[name] if name in names else weight for name, weight in self.memory.weights.items()}
        self._before = (self.memory, self.updates)
        self.memory = LevelMemory(weights, self.rows, self.memory.tokens)

    def export(self, folder: str | os.PathLike[str], *, row: int = 0) -> None:
        """Writes a plain model whose weights hold what a row has learnt: a folder of `transformers`, or of a
        nestlearn run.

        Raises:
            ValueError: for a row that there is not.
            OSError: if it cannot be written.
        """
        if row not in range(self.rows):
            raise ValueError(f"row: expected one of {list(range(self.rows))}, got {row}")
        whole = self.model.merged(self.memory.weights, row)
        base = self.model.base
        if isinstance(base, HopeLM):
            plain = copy.deepcopy(base)
            plain.load_state_dict(whole)
            spec = getattr(self.tokenizer, "spec", "bytes" if base.config.vocab_size == 256 else "none")
            path = checkpoint_path(Path(folder), 0)
            path.parent.mkdir(parents=True, exist_ok=True)
            if spec == "none" and hasattr(self.tokenizer, "save_pretrained"):
                spec = "tokenizer"
                self.tokenizer.save_pretrained(str(Path(folder) / spec))
            save_checkpoint(path, model=plain, step=0, model_config=base.config.to_dict(), tokenizer=spec)
            return
        base.save_pretrained(folder, state_dict=whole)  # type: ignore[operator]
        if hasattr(self.tokenizer, "save_pretrained"):
            self.tokenizer.save_pretrained(folder)

    def report(self) -> str:
        """What was read, and a line for each level: period, updates, and how far its weights have gone."""
        lines = [f"{self.memory.tokens:,} tokens read in {self.rows} row{'s' if self.rows > 1 else ''}"]
        for number, (level, count) in enumerate(zip(self.model.levels, self.updates, strict=True)):
            own = [self.memory.weights[name] for name in level.weights if name in self.memory.weights]
            gone = math.sqrt(sum(weight.change.square().sum().item() for weight in own) / self.rows)
            whole = math.sqrt(sum(self.model.weight(name).detach().square().sum().item() for name in level.weights))
            lines.append(
                f"level {number}: every {level.period:,} tokens, {count:,} updates, its weights are {gone / whole:.2%} "
                "of their norm from where they began"
            )
        return "\n".join(lines)

    def _tokens(self, text: str | Tensor | Sequence[int]) -> Tensor:
        """Ids (B, T) on the model's device."""
        if isinstance(text, str):
            if self.tokenizer is None:
                raise ValueError("text: this learner has no tokenizer; give it one, or give ids (T,) or (B, T)")
            text = encode(self.tokenizer, text)
        tokens = torch.as_tensor(text)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point():
            raise ValueError(f"text: expected at least one token, ids (T,) or (B, T); got shape {tuple(tokens.shape)}")
        known = self.model.vocab_size
        if not 0 <= int(tokens.min()) <= int(tokens.max()) < known:
            raise ValueError(
                f"text: expected ids from 0 to {known - 1}, the base's vocabulary, got {int(tokens.min())} to "
                f"{int(tokens.max())}; is it the base's own tokenizer?"
            )
        return tokens.to(next(self.model.parameters()).device, torch.long)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        if callable(self.tokenizer):
            return str(self.tokenizer.decode(ids, skip_special_tokens=True))
        return str(self.tokenizer.decode(ids))


def _window(model: StackedModel, wanted: int | None) -> int:
    """The longest context: what is wanted, if the base has positions for it."""
    positions = getattr(getattr(model.base, "config", None), "max_position_embeddings", None) or math.inf
    if wanted is not None and not 2 <= wanted <= positions:
        raise ValueError(f"window: expected 2 to {positions} tokens, the positions of the base; got {wanted}")
    return int(min(positions, LONGEST_WINDOW)) if wanted is None else wanted


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text without special tokens, from a tokenizer of Hugging Face or of nestlearn."""
    if callable(tokenizer):
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer.encode(text).tolist())
