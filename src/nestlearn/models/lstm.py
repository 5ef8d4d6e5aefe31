"""The LSTM (Hochreiter and Schmidhuber, 1997) as a language model that is called like `HopeLM`: a baseline."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

State = dict[str, Tensor]


class LSTMLM(nn.Module):
    """Embedding, `depth` LSTM layers, output layer. The state is the caller's, as in `HopeLM`:

        logits, state = model(tokens, state)

    The parameters start as torch initialises those of its modules.

    Args:
        vocab_size: V, number of tokens.
        dim: D, width of the embedding.
        depth: number of layers.
        hidden: H, width of the layers; None for dim.
    """

    def __init__(self, vocab_size: int, dim: int, depth: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        for name, size in (("vocab_size", vocab_size), ("dim", dim), ("depth", depth), ("hidden", hidden)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {size!r}")
        self.embedding = nn.Embedding(vocab_size, dim)
        self.layers = nn.LSTM(dim, hidden, num_layers=depth, batch_first=True)
        self.head = nn.Linear(hidden, vocab_size, bias=False)

    def forward(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Reads tokens and predicts the next ones.

        Args:
            tokens: (B, T) int64.
            state: from `init_state` or an earlier call; None for a fresh context. It is not changed.
            lengths: (B,) int64, valid tokens of right-padded rows, 0 allowed; a row's state is that at its own last
                token, and logits at padding mean nothing.
            document_starts: (B, T) bool, tokens before which a row's state is reset.

        Returns:
            logits (B, T, vocab_size) and the state after each row's last token.

        Raises:
            ValueError: if shapes do not fit.
        """
        _check(tokens, lengths, document_starts)
        batch, length = tokens.shape
        x = self.embedding(tokens)
        state = self.init_state(batch) if state is None else state
        memory = tuple(state[name].transpose(0, 1).contiguous() for name in ("hidden", "cell"))
        # packing wants its lengths on the CPU
        ends = torch.full((batch,), length) if lengths is None else lengths.cpu()
        starts = torch.zeros(tokens.shape, dtype=torch.bool) if document_starts is None else document_starts.cpu()
        starts = starts & (torch.arange(length) < ends[:, None])
        # Inside a piece nobody is reset, so that it is one call of the layers.
        cuts = sorted({0, length, *starts.any(0).nonzero()[:, 0].tolist()})
        pieces = [x.new_zeros(batch, 0, self.layers.hidden_size)]
        for begin, end in pairwise(cuts):
            if bool(starts[:, begin].any()):
                fresh = starts[:, begin].to(x.device)[:, None]
                memory = tuple(part.masked_fill(fresh, 0.0) for part in memory)
            piece, memory = self._read(x[:, begin:end], memory, (ends - begin).clamp(0, end - begin))
            pieces.append(piece)
        logits: Tensor = self.head(torch.cat(pieces, dim=1))
        return logits, {name: part.transpose(0, 1) for name, part in zip(("hidden", "cell"), memory, strict=True)}

    def _read(self, x: Tensor, memory: tuple[Tensor, ...], lengths: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Rows x (B, T, D) of which `lengths` (B,) tokens count, memory (depth, B, H) before and after them."""
        if bool((lengths == x.shape[1]).all()):
            return self.layers(x, memory)
        # A packed row has at least one token: rows with none read one too, and keep the memory that they had.
        packed: PackedSequence = pack_padded_sequence(x, lengths.clamp(min=1), batch_first=True, enforce_sorted=False)
        packed, after = self.layers(packed, memory)
        y, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
        some = (lengths > 0).to(x.device)[:, None]
        return y, tuple(new.where(some, old) for new, old in zip(after, memory, strict=True))

    def init_state(self, batch_size: int) -> State:
        """The state of fresh contexts: "hidden" and "cell", zeros of shape (B, depth, H)."""
        like = self.embedding.weight
        return {
            name: like.new_zeros(batch_size, self.layers.num_layers, self.layers.hidden_size)
            for name in ("hidden", "cell")
        }

    @torch.no_grad()
    def decode_step(self, token: Tensor, state: State) -> tuple[Tensor, State]:
        """Reads one token a row, without gradients: token (B,) int64 -> logits (B, vocab_size) and the new state."""
        logits, state = self(token[:, None], state)
        return logits[:, 0], state

    def num_parameters(self) -> int:
        """Learnt numbers."""
        return sum(p.numel() for p in self.parameters())

    def level_parameters(self) -> dict[int, list[tuple[str, nn.Parameter]]]:
        """Parameters by training period in optimizer steps: all train at every step."""
        return {1: list(self.named_parameters())}


def _check(tokens: Tensor, lengths: Tensor | None, document_starts: Tensor | None) -> None:
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(
            f"tokens: expected whole numbers of shape (B, T), got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    batch, length = tokens.shape
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths: expected one number a row, ({batch},), got shape {tuple(lengths.shape)}")
    if lengths is not None and not bool(((lengths >= 0) & (lengths <= length)).all()):
        raise ValueError(f"lengths: expected numbers from 0 to T = {length}, got {lengths.tolist()}")
    if document_starts is not None and document_starts.shape != tokens.shape:
        raise ValueError(
            f"document_starts: expected the tokens' shape {(batch, length)}, got {tuple(document_starts.shape)}"
        )
