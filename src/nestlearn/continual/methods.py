"""Ways to go on learning, side by side: levels in context and what they are compared to, on one interface."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.continual.learner import ContinualLearner
from nestlearn.models.in_context import LevelMemory, read
from nestlearn.models.stacking import Context, StackedModel

Loss = Callable[[Tensor, Tensor], Tensor]


class Method(ABC):
    """Reads texts one after another and learns from them; can say at any time how well it knows another."""

    @abstractmethod
    def observe(self, tokens: Tensor) -> None:
        """Learns from a text, ids (T,), read once."""

    @abstractmethod
    def loss(self, tokens: Tensor) -> float:
        """Nats per predicted token of a text, ids (T,), from which nothing is learnt."""

    @abstractmethod
    def logits(self, tokens: Tensor, context: Context | None) -> tuple[Tensor, Context]:
        """What comes next, with what was learnt: ids (1, T) and a context -> logits (1, T, V), and the context then."""

    def begin(self) -> Context | None:
        """The context in which every text begins; None for an empty one. Caches in it are changed by reading on."""
        return None

    def end_domain(self) -> None:
        """A domain has ended. Only methods that must be told do anything; levels need not know."""
        return


class Levels(Method):
    """Level stacking: `ContinualLearner`."""

    def __init__(self, learner: ContinualLearner) -> None:
        self.learner = learner

    def observe(self, tokens: Tensor) -> None:
        self.learner.observe(tokens)

    def loss(self, tokens: Tensor) -> float:
        return self.learner.loss(tokens)

    def logits(self, tokens: Tensor, context: Context | None) -> tuple[Tensor, Context]:
        return self.learner.model(tokens, self.learner.memory.weights, context)


class Frozen(Method):
    """The base model as it is.

    Args:
        base: causal language model.
        window: longest context in tokens.
    """

    def __init__(self, base: nn.Module, *, window: int) -> None:
        self.reader = StackedModel(base, ())
        self.window = window

    def observe(self, tokens: Tensor) -> None:
        pass

    def loss(self, tokens: Tensor) -> float:
        return _read_loss(self.reader, tokens, self.window)

    def logits(self, tokens: Tensor, context: Context | None) -> tuple[Tensor, Context]:
        return self.reader(tokens, None, context)


class InContext(Frozen):
    """The base model with the last half window of all that was read before the text, and no other memory."""

    def __init__(self, base: nn.Module, *, window: int) -> None:
        super().__init__(base, window=window)
        self.recent = torch.zeros(0, dtype=torch.long)

    def observe(self, tokens: Tensor) -> None:
        self.recent = torch.cat([self.recent, tokens])[-(self.window // 2) :]

    def loss(self, tokens: Tensor) -> float:
        return _read_loss(self.reader, tokens, self.window, before=self.recent)

    @torch.no_grad()
    def begin(self) -> Context | None:
        return self.reader(self.recent[None])[1] if len(self.recent) else None


class FineTuning(Method):
    """An optimizer step on the mean loss of every `segment` tokens, on all weights of a copy of the base.

    Args:
        base: causal language model.
        optimizer: makes an optimizer of parameters.
        segment: tokens of a step; its context is the segment alone.
        window: longest context when a text is only asked about.
        trained: names of the weights that are trained, the others stay as they are; None for all.
    """

    def __init__(
        self,
        base: nn.Module,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        *,
        segment: int,
        window: int,
        trained: Collection[str] | None = None,
    ) -> None:
        self.model = self.prepare(copy.deepcopy(base))
        if trained is not None:
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name in trained)
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = optimizer(self.trained)
        self.reader = StackedModel(self.model, ())
        self.segment, self.window = segment, window

    def prepare(self, model: nn.Module) -> nn.Module:
        """The copy of the base that is trained."""
        return model.eval().requires_grad_(True)

    def observe(self, tokens: Tensor) -> None:
        for piece in pieces(tokens, self.segment):
            self.optimizer.zero_grad()
            self.objective(piece).backward()
            torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
            self.optimizer.step()

    def objective(self, piece: Tensor) -> Tensor:
        """What a step descends on."""
        return self.mean_loss(piece)

    def mean_loss(self, piece: Tensor) -> Tensor:
        """Nats per predicted token of ids (T,), with a gradient."""
        piece = piece.to(next(self.model.parameters()).device)
        logits = self.reader(piece[None, :-1])[0][0]
        return F.cross_entropy(logits.float(), piece[1:])

    def loss(self, tokens: Tensor) -> float:
        return _read_loss(self.reader, tokens, self.window)

    def logits(self, tokens: Tensor, context: Context | None) -> tuple[Tensor, Context]:
        return self.reader(tokens, None, context)


class EWC(FineTuning):
    """Fine-tuning that is held where earlier domains need it (Kirkpatrick et al., 1612.00796).

    At the end of a domain the diagonal of the Fisher information, the mean square of the gradients of its segments'
    mean losses (the empirical one), is added to that of earlier domains, around the weights of that moment.

    Args:
        strength: of the penalty strength / 2 sum F (w - w*)^2.
    """

    def __init__(self, base: nn.Module, optimizer: Any, *, strength: float, segment: int, window: int) -> None:
        super().__init__(base, optimizer, segment=segment, window=window)
        self.strength = strength
        self.fisher = [torch.zeros_like(parameter) for parameter in self.trained]
        self.anchor = [parameter.detach().clone() for parameter in self.trained]
        self._read: list[Tensor] = []

    def observe(self, tokens: Tensor) -> None:
        self._read += pieces(tokens, self.segment)
        super().observe(tokens)

    def objective(self, piece: Tensor) -> Tensor:
        loss = self.mean_loss(piece)
        for parameter, fisher, anchor in zip(self.trained, self.fisher, self.anchor, strict=True):
            loss = loss + self.strength / 2 * (fisher * (parameter - anchor).square()).sum()
        return loss

    def end_domain(self) -> None:
        for piece in self._read:
            gradients = torch.autograd.grad(self.mean_loss(piece), self.trained, allow_unused=True)
            for fisher, gradient in zip(self.fisher, gradients, strict=True):
                if gradient is not None:
                    fisher += gradient.square() / len(self._read)
        self.anchor = [parameter.detach().clone() for parameter in self.trained]
        self._read = []


class Replay(FineTuning):
    """Fine-tuning that reads an earlier segment again with every new one.

    Args:
        capacity: segments kept, a uniform sample of all that were read (reservoir sampling).
        seed: of what is kept and what is read again.
    """

    def __init__(
        self, base: nn.Module, optimizer: Any, *, capacity: int, segment: int, window: int, seed: int = 0
    ) -> None:
        super().__init__(base, optimizer, segment=segment, window=window)
        self.capacity = capacity
        self.kept: list[Tensor] = []
        self._seen = 0
        self._random = torch.Generator().manual_seed(seed)

    def objective(self, piece: Tensor) -> Tensor:
        loss = self.mean_loss(piece)
        if self.kept:
            loss = (loss + self.mean_loss(self.kept[self._draw(len(self.kept))])) / 2
        self._seen += 1
        if len(self.kept) < self.capacity:
            self.kept.append(piece)
        elif (place := self._draw(self._seen)) < self.capacity:
            self.kept[place] = piece
        return loss

    def _draw(self, count: int) -> int:
        return int(torch.randint(count, (), generator=self._random))


class LoRA(FineTuning):
    """Fine-tuning of low-rank additions to the MLP blocks alone (Hu et al., 2106.09685), by peft.

    Args:
        rank: of the additions.
        targets: names of the linear layers that get one.
    """

    def __init__(
        self, base: nn.Module, optimizer: Any, *, rank: int, targets: tuple[str, ...], segment: int, window: int
    ) -> None:
        self.rank, self.targets = rank, targets
        super().__init__(base, optimizer, segment=segment, window=window)

    def prepare(self, model: nn.Module) -> nn.Module:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError as error:
            raise ImportError("LoRA needs peft: pip install 'nestlearn[baselines]'") from error

        model = model.eval().requires_grad_(False)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.targets), bias="none")
        return inject_adapter_in_model(config, model)


def pieces(tokens: Tensor, length: int) -> list[Tensor]:
    """Stretches of so many predicted tokens, each beginning with the token before; the last may be shorter."""
    return [tokens[start : start + length + 1] for start in range(0, len(tokens) - 1, length)]


def domain_losses(method: Method, texts: list[list[Tensor]]) -> list[float]:
    """Mean loss per token on the texts of each domain."""
    found = []
    for domain in texts:
        counts = [len(text) - 1 for text in domain]
        total = math.fsum(method.loss(text) * count for text, count in zip(domain, counts, strict=True))
        found.append(total / sum(counts))
    return found


def run_stream(method: Method, training: list[list[Tensor]], tests: list[list[Tensor]]) -> Iterator[list[float]]:
    """Reads domains one after another and yields the losses on the texts of all of them, before and after each.

    Args:
        method: is changed.
        training: texts of each domain, in their order.
        tests: texts of domains, in the same order; there may be others behind them, such as the base model's own.
    """
    yield domain_losses(method, tests)
    for texts in training:
        for text in texts:
            method.observe(text)
        method.end_domain()
        yield domain_losses(method, tests)


@torch.no_grad()
def _read_loss(reader: StackedModel, tokens: Tensor, window: int, before: Tensor | None = None) -> float:
    """Nats per predicted token of a text, the tokens before it in the context."""
    if len(tokens) < 2:
        raise ValueError("loss: expected at least two tokens, of which the second is predicted; got one")
    device = next(reader.parameters()).device

    def nats(ids: Tensor) -> float:
        memory = LevelMemory({}, 1, 0)
        return float(read(reader, ids[None].to(device), memory, (), window=window, learn=False).nats.sum())

    if before is None or not len(before):
        return nats(tokens) / (len(tokens) - 1)
    # What stands before is read in both, so that its own loss falls out; the text's first token is not counted.
    whole, head = torch.cat([before, tokens]), torch.cat([before, tokens[:1]])
    return (nats(whole) - nats(head)) / (len(tokens) - 1)
