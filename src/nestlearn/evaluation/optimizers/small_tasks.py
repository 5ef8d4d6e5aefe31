"""A small vision Transformer on digits and a small language model on novels, as the comparisons train them."""

from __future__ import annotations

import gzip
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.evaluation.tasks import IGNORED
from nestlearn.evaluation.tasks.haystacks import find_data_root
from nestlearn.io import missing_file
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.training.data import PackedTokens, load_tokenizer, read_documents, tokenize_documents

# Images that are held out: the last fifth.
HELD_OUT = 2000


class SmallTask(ABC):
    """What is learnt.

    Attributes:
        model: untrained.
        unit: of the loss.
    """

    model: nn.Module
    unit: str

    @abstractmethod
    def __init__(self, settings: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def loss(self, step: int) -> Tensor:
        """The loss of the batch of a step."""

    @abstractmethod
    def held_out(self) -> float:
        """The mean loss on data that are never trained on."""


class VisionTransformer(nn.Module):
    """Patches of an image, a position each, pre-norm blocks, the mean over patches.

    Args:
        side: of the square images, pixels.
        patch: side of a patch; divides `side`.
        dim: D.
        depth: blocks.
        heads: divides `dim`.
        classes: of the output.
    """

    def __init__(self, *, side: int, patch: int, dim: int, depth: int, heads: int, classes: int) -> None:
        super().__init__()
        self.patch = patch
        self.embedding = nn.Linear(patch * patch, dim)
        self.position = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, dim))
        self.blocks = nn.ModuleList([_Block(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, side, side) -> logits (B, classes)."""
        pieces = images.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch).flatten(3).flatten(1, 2)
        x = self.embedding(pieces) + self.position
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x).mean(1))
        return out


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2)])
        self.query, self.key, self.value, self.output = (nn.Linear(dim, dim) for _ in range(4))
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        streams = (self.query(h), self.key(h), self.value(h))
        q, k, v = (stream.unflatten(-1, (self.heads, -1)).transpose(1, 2) for stream in streams)
        x = x + self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        out: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return out


class Digits(SmallTask):
    """A vision Transformer on MNIST's 10,000 test images, 8,000 of them for training."""

    unit = "nats an image"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        images, labels = read_digits()
        self._training = (images[:-HELD_OUT], labels[:-HELD_OUT])
        self._rest = (images[-HELD_OUT:], labels[-HELD_OUT:])
        self._batch, self._seed = settings["batch_size"], settings["seed"]
        torch.manual_seed(self._seed)
        sizes = {name: settings[name] for name in ("dim", "depth", "heads")}
        self.model = VisionTransformer(side=28, patch=4, classes=10, **sizes)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        chosen = torch.randint(len(self._training[0]), (self._batch,), generator=generator)
        return F.cross_entropy(self.model(self._training[0][chosen]), self._training[1][chosen])

    @torch.no_grad()
    def held_out(self) -> float:
        images, labels = self._rest
        parts = zip(images.split(500), labels.split(500), strict=True)
        return float(torch.stack([F.cross_entropy(self.model(x), y) for x, y in parts]).mean())


class Novels(SmallTask):
    """A byte-level Transformer on ELTeC's English novels."""

    unit = "nats a byte"

    def __init__(self, settings: Mapping[str, Any]) -> None:
        length, size = settings["sequence_length"], settings["held_out_bytes"]
        sides = []
        # The held-out text is the same for every seed.
        for name, most, seed in (("train", settings["max_bytes"], settings["seed"]), ("valid", None, 0)):
            texts = read_documents(find_data_root() / f"eltec_eng/{name}.jsonl.gz", max_bytes=most)
            documents = tokenize_documents(texts, load_tokenizer("bytes"))
            sides.append(PackedTokens(documents, sequence_length=length, seed=seed))
        self._training, held_out = sides
        self._batch = settings["batch_size"]
        self._rest = held_out.batch(0, max(1, size // length))
        torch.manual_seed(settings["seed"])
        sizes = {name: settings[name] for name in ("dim", "depth", "heads")}
        self.model = HopeLM(HopeConfig.transformer(vocab_size=256, **sizes))

    def loss(self, step: int) -> Tensor:
        return self._loss(*self._training.batch(step, self._batch)[:2])

    @torch.no_grad()
    def held_out(self) -> float:
        parts = zip(self._rest[0].split(16), self._rest[1].split(16), strict=True)
        sums = [self._loss(x, y, reduction="sum") for x, y in parts]
        return float(torch.stack(sums).sum() / (self._rest[1] != IGNORED).sum())

    def _loss(self, inputs: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        logits, _ = self.model(inputs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction=reduction)


def read_digits() -> tuple[Tensor, Tensor]:
    """Images (10000, 28, 28), standardised, and labels (10000,).

    Raises:
        FileNotFoundError: if the files are not there.
    """
    folder = find_data_root() / "mnist_t10k"
    found = []
    for name, header in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8)):
        if not (folder / name).exists():
            raise missing_file(folder / name, what="digits")
        with gzip.open(folder / name) as file:
            found.append(torch.frombuffer(bytearray(file.read()[header:]), dtype=torch.uint8))
    images = found[0].view(-1, 28, 28).float() / 255
    return (images - images.mean()) / images.std(), found[1].long()


TASKS: Mapping[str, type[SmallTask]] = {"digits": Digits, "novels": Novels}
