"""The state of a `HopeLM` as a cache of `transformers`, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache

State = dict[str, Tensor]


class HopeCacheLayer:
    """The state of one block: named tensors with the batch in front, whatever its mixer keeps."""

    is_compileable = False
    is_croppable = False
    is_sliding = False
    supports_early_init = False

    def __init__(self, state: State) -> None:
        self.state = state

    @property
    def batch_size(self) -> int:
        return len(next(iter(self.state.values())))

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row beam_idx[i]."""
        self.state = {name: tensor.index_select(0, beam_idx.to(tensor.device)) for name, tensor in self.state.items()}

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row as many times, one after another."""
        self.state = {name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in self.state.items()}

    def crop(self, tokens_to_remove: int) -> None:
        """Refuses: a memory cannot take back what it read."""
        raise ValueError(
            "a cache of Hope cannot be cropped: its memories have been written by every token since. Keep a copy from "
            "before (copy.deepcopy), or read the text again"
        )


class HopeCache(Cache):
    """What a `HopeForCausalLM` remembers; it stays as large as it is, except with attention.

    It is changed in place when the model goes on from it. For two continuations of one text, take `copy.deepcopy`.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.layers: list[HopeCacheLayer] = []
        self.tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens read so far in each row, its padding counted."""
        return self.tokens

    def reset(self) -> None:
        """Forgets all."""
        self.layers, self.tokens = [], 0

    def __deepcopy__(self, memo: dict[int, Any]) -> HopeCache:
        # A cache from a call with gradients holds tensors that know their history; the copy begins anew.
        copy = HopeCache()
        copy.layers = [
            HopeCacheLayer({name: tensor.detach().clone() for name, tensor in layer.state.items()})
            for layer in self.layers
        ]
        copy.tokens = self.tokens
        return copy


def cache_to_state(cache: Cache | None) -> State | None:
    """The state of `HopeLM` in a cache, sharing its tensors; None for no cache, or one that has read nothing.

    Raises:
        ValueError: for a cache of another kind.
    """
    if cache is None:
        return None
    if not isinstance(cache, HopeCache):
        raise ValueError(
            f"cache: expected a HopeCache, got {type(cache).__name__}; Hope keeps memories, not keys and "
            f"values. Leave it out, or begin with an empty HopeCache()"
        )
    if not cache.layers:
        return None
    return {
        f"blocks.{index}.{name}": tensor
        for index, layer in enumerate(cache.layers)
        for name, tensor in layer.state.items()
    }


def state_to_cache(state: State, tokens: int, cache: HopeCache | None = None) -> HopeCache:
    """A cache that holds a state of `HopeLM` and shares its tensors.

    Args:
        state: named as `HopeLM` names it, "blocks.<i>.<name>".
        tokens: read so far in each row, padding counted.
        cache: takes it; a new one by default.
    """
    cache = HopeCache() if cache is None else cache
    blocks: dict[int, State] = {}
    for name, tensor in state.items():
        _, index, own = name.split(".", 2)
        blocks.setdefault(int(index), {})[own] = tensor
    cache.layers = [HopeCacheLayer(blocks[index]) for index in sorted(blocks)]
    cache.tokens = tokens
    return cache
