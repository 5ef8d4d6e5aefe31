"""Batches of packed documents as a pure function of a seed and a step.

Text becomes batches in four steps: `read_documents`, `split_documents`, `tokenize_documents`, `PackedTokens`. Nothing
iterates: batch number n can be asked for at once, so a run resumes without having to replay or save a position, and
each process of a distributed run takes its own rows of the same batch.

Shapes: B rows of a batch, T tokens of a row (`sequence_length`), N tokens of the corpus.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nestlearn.training.corpus import STDLIB, TEXT_SUFFIXES, read_documents
from nestlearn.training.split import DocumentSplit, split_documents
from nestlearn.training.tokenized import TokenizedDocuments, tokenize_documents
from nestlearn.training.tokenizers import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "IGNORED",
    "STDLIB",
    "TEXT_SUFFIXES",
    "Batch",
    "ByteTokenizer",
    "DocumentSplit",
    "EvaluationBatch",
    "PackedTokens",
    "TokenizedDocuments",
    "Tokenizer",
    "check_vocabulary",
    "load_tokenizer",
    "read_documents",
    "split_documents",
    "tokenize_documents",
]

# The target that cross_entropy leaves out (its default ignore_index).
IGNORED = -100


class Batch(NamedTuple):
    """Rows to train on.

    tokens: (B, T) int64.
    targets: (B, T) int64, the token after each; -100 where that belongs to another document or there is none.
    document_starts: (B, T) bool, True at the first token of each document.
    """

    tokens: Tensor
    targets: Tensor
    document_starts: Tensor

    def to(self, device: str | torch.device) -> Batch:
        """Return the same rows on `device`."""
        return Batch(*_move(self, device))


class EvaluationBatch(NamedTuple):
    """Rows to evaluate on: a `Batch`, and how many targets it has and how many UTF-8 bytes of text these cover."""

    tokens: Tensor
    targets: Tensor
    document_starts: Tensor
    num_targets: int
    num_bytes: int

    def to(self, device: str | torch.device) -> EvaluationBatch:
        """Return the same rows on `device`."""
        tokens, targets, document_starts = _move(self[:3], device)
        return EvaluationBatch(tokens, targets, document_starts, self.num_targets, self.num_bytes)


class PackedTokens:
    """Documents packed into windows of `sequence_length` tokens.

    An epoch shuffles the documents, lays them end to end, cuts that stream into windows and shuffles the windows. A
    window goes on where another ended, so documents longer than T are learnt in pieces and no token is padding. Every
    token is a target at most once per epoch; those that never are: each document's first, and the fewer than T that
    no window holds (where the cuts fall changes from epoch to epoch, and so do these).

    Args:
        documents: from `tokenize_documents`.
        sequence_length: T, at least 1.
        seed: of every shuffle; at least 0. Default 0.
    """

    def __init__(self, documents: TokenizedDocuments, *, sequence_length: int, seed: int = 0) -> None:
        if sequence_length < 1:
            raise ValueError(f"sequence_length: expected at least 1, got {sequence_length}.")
        if seed < 0:
            raise ValueError(f"seed: expected at least 0, got {seed}.")
        self.documents = documents
        self.sequence_length = sequence_length
        self.seed = seed
        self._epochs: dict[int, _Epoch] = {}

    @classmethod
    def from_texts(
        cls, texts: Sequence[str], tokenizer: Tokenizer, *, sequence_length: int, seed: int = 0
    ) -> PackedTokens:
        """Tokenize and pack in one call."""
        return cls(tokenize_documents(texts, tokenizer), sequence_length=sequence_length, seed=seed)

    @property
    def windows_per_epoch(self) -> int:
        """Windows of T tokens in an epoch; 0 where the corpus is shorter than one."""
        return self.documents.num_tokens // self.sequence_length

    def batch(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Return the rows of optimizer step `step`, a pure function of the seed, `step` and the sizes.

        Args:
            step: at least 0; steps run on through the epochs.
            batch_size: rows of the whole batch, over all processes; a multiple of `world_size`.
            rank, world_size: this process takes the rows [rank, rank + 1) * batch_size / world_size of the batch, so
                that the ranks' rows, one after another, are the batch of a single process. Default: all rows.

        Returns: Batch of (batch_size / world_size, T).

        Raises: ValueError for a corpus shorter than one window, or sizes that do not fit.
        """
        rows = _share(batch_size, rank, world_size)
        if step < 0:
            raise ValueError(f"step: expected at least 0, got {step}.")
        windows = self.windows_per_epoch
        if windows == 0:
            raise ValueError(
                f"the corpus has {self.documents.num_tokens:,} tokens, fewer than one sequence of "
                f"{self.sequence_length:,}. Give more text or a smaller sequence_length."
            )
        places = []
        for row in rows:
            epoch, window = divmod(step * batch_size + row, windows)
            layout = self._epoch(epoch)
            places.append((layout, layout.offset + int(layout.windows[window]) * self.sequence_length))
        return Batch(*_stack([self._window(layout.stream, begin) for layout, begin in places]))

    def evaluation_batches(
        self, batch_size: int, max_tokens: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[EvaluationBatch]:
        """Yield windows over the documents in their given order, always the same ones.

        Every token but each document's first is a target of exactly one window; the last window is padded with
        token 0 as a document of its own, without targets. The last batch may have fewer rows.

        Args:
            batch_size: rows per batch at most.
            max_tokens: take only max_tokens // T windows (at least one), evenly spaced over the corpus. Default: all.
            rank, world_size: take every world_size-th window from number `rank` on; the sums over all ranks are those
                of a single process. A rank without a window yields nothing.

        Raises: ValueError for sizes that do not fit, or where no document has a second token (nothing to predict).
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}.")
        if max_tokens is not None and max_tokens < 1:
            raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}. Leave it out to evaluate everything.")
        _share(world_size, rank, world_size)
        if self.documents.num_tokens == self.documents.num_documents:
            raise ValueError("nothing to evaluate: every document has one token. Give longer held-out documents.")
        windows = -(-(self.documents.num_tokens - 1) // self.sequence_length)
        taken = windows if max_tokens is None else min(windows, max(1, max_tokens // self.sequence_length))
        numbers = [index * windows // taken for index in range(taken)][rank::world_size]
        stream = _Stream.in_order(self.documents)
        for first in range(0, len(numbers), batch_size):
            found = [
                self._window(stream, number * self.sequence_length) for number in numbers[first : first + batch_size]
            ]
            num_targets = sum(int((window.targets != IGNORED).sum()) for window in found)
            yield EvaluationBatch(*_stack(found), num_targets, sum(window.num_bytes for window in found))

    def _epoch(self, number: int) -> _Epoch:
        """The layout of an epoch; the last two are kept, as a batch may span a border."""
        if number not in self._epochs:
            while len(self._epochs) > 1:
                del self._epochs[next(iter(self._epochs))]
            random = np.random.default_rng([self.seed, number])
            stream = _Stream.of(self.documents, random.permutation(self.documents.num_documents))
            spare = self.documents.num_tokens % self.sequence_length
            offset = int(random.integers(spare + 1))
            self._epochs[number] = _Epoch(stream, offset, random.permutation(self.windows_per_epoch))
        return self._epochs[number]

    def _window(self, stream: _Stream, begin: int) -> _Window:
        """Read the tokens [begin, begin + T) of a stream and the one after, padded where the stream ends."""
        end = int(stream.begins[-1])
        positions = np.arange(begin, begin + self.sequence_length + 1)
        inside = positions < end
        place = np.searchsorted(stream.begins, np.minimum(positions, end - 1), side="right") - 1
        source = self.documents.starts[stream.order[place]] + np.minimum(positions, end - 1) - stream.begins[place]
        ids = np.where(inside, self.documents.tokens[source].astype(np.int64), 0)
        predicted = inside[1:] & (place[1:] == place[:-1])
        starts = inside & (positions == stream.begins[place])
        starts |= positions == end  # the padding is a document of its own
        widths = self.documents.token_bytes
        num_bytes = int(predicted.sum()) if widths is None else int(widths[source[1:]][predicted].sum(dtype=np.int64))
        return _Window(ids[:-1], np.where(predicted, ids[1:], IGNORED), starts[:-1], num_bytes)


class _Stream(NamedTuple):
    """Documents laid end to end in some order: order (documents,), and where each begins, begins (documents + 1,)."""

    order: np.ndarray
    begins: np.ndarray

    @classmethod
    def of(cls, documents: TokenizedDocuments, order: np.ndarray) -> _Stream:
        lengths = np.diff(documents.starts)[order]
        return cls(order, np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths)]))

    @classmethod
    def in_order(cls, documents: TokenizedDocuments) -> _Stream:
        return cls(np.arange(documents.num_documents), documents.starts)


class _Epoch(NamedTuple):
    """A shuffled stream, the position where its first window begins and the order of the windows."""

    stream: _Stream
    offset: int
    windows: np.ndarray


class _Window(NamedTuple):
    """One row of a batch, as numpy arrays (T,)."""

    tokens: np.ndarray
    targets: np.ndarray
    document_starts: np.ndarray
    num_bytes: int


def _stack(windows: Sequence[_Window]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, targets and document starts, (B, T) each."""
    tokens, targets, document_starts, _ = zip(*windows, strict=True)
    return (
        torch.from_numpy(np.stack(tokens)),
        torch.from_numpy(np.stack(targets)),
        torch.from_numpy(np.stack(document_starts)),
    )


def _move(tensors: tuple[Tensor, Tensor, Tensor], device: str | torch.device) -> tuple[Tensor, Tensor, Tensor]:
    tokens, targets, document_starts = (tensor.to(device, non_blocking=True) for tensor in tensors)
    return tokens, targets, document_starts


def _share(batch_size: int, rank: int, world_size: int) -> range:
    """The rows of a batch that belong to one of `world_size` processes."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise ValueError(f"rank: expected 0 <= rank < world_size, got rank {rank} of world_size {world_size}.")
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size: expected a positive multiple of world_size {world_size}, got {batch_size}. "
            "It counts the rows over all processes."
        )
    each = batch_size // world_size
    return range(rank * each, (rank + 1) * each)
