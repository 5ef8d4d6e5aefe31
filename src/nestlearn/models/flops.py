"""How many floating-point operations a model needs: those of its matrix products, counted from its configuration.

A multiply-add is two operations. Products that are masked afterwards count whole, as they are computed; a triangular
solve counts half of a product with the square matrix, which is what it needs; causal attention counts the half that
its mask leaves. Elementwise work, short convolutions and norms are left out.
"""

from __future__ import annotations

from dataclasses import replace

from nestlearn.layers.chunked_memory import gate_hidden
from nestlearn.layers.tnt import segment_size
from nestlearn.models.config import HopeConfig


def mixer_flops(config: HopeConfig, sequence_length: int) -> float:
    """Operations of a mixer's forward pass for one token apart from its linear layers, the mean over a sequence.

    Args:
        config: of the model.
        sequence_length: T, tokens read in one call from an empty state, at least 1.
    """
    if config.mixer in ("attention", "plain_attention"):
        return attention_flops(config, (sequence_length + 1) / 2)
    if config.mixer in ("linear_attention", "delta_net", "gated_delta_net"):
        return config.heads * _matrix_memory(config, _segments(config.chunk_size, sequence_length)[0])
    chunk = config.chunk_size
    if config.mixer == "titans":
        return config.heads * _mlp_memories(replace(config, inner_rule="gd", momentum=True), chunk, sequence_length)
    memories = 6 if config.adaptive_query else 5
    if config.mixer == "self_modifying_titans":
        chunk = min(chunk, config.projection_chunk_size or chunk)
        return config.heads * _mlp_memories(config, chunk, sequence_length, memories=memories)
    # TNT: the global memories, each local memory, and queries projected on keys.
    width, stride = config.dim // config.heads, config.global_stride
    long, written = segment_size(config.global_chunk_size // stride), sequence_length // stride
    count = 0.0
    if written:
        count = _mlp_memories(replace(config, read="chunk"), long, written, memories=memories) * written
        count /= sequence_length
    if stride > 1:  # all tokens read, and those that are written read once more
        hidden = config.memory_hidden or width
        narrow = gate_hidden(hidden, config.gate_hidden_ratio)
        count += 4.0 * width * ((memories - 2) * hidden + 2 * narrow)
    shard = min(sequence_length, config.shard_length)
    count += sum(_mlp_memories(config, segment_size(size), shard, own=True) for size in config.local_chunk_sizes)
    if not config.project_queries:
        return config.heads * count
    chunk = min(64, shard)
    padded = -(-shard // chunk) * chunk / shard
    return config.heads * (count + padded * (4.0 * width * width + 4.0 * chunk * width))


def attention_flops(config: HopeConfig, seen: float) -> float:
    """Operations of softmax attention for one token that sees so many tokens, itself included: q K^T and p V."""
    return 4.0 * config.dim * seen


def _segments(chunk: int, tokens: int) -> tuple[float, float]:
    """Mean of the length of a token's segment, and of its square, where a sequence is cut every `chunk` tokens."""
    whole, rest = divmod(tokens, chunk)
    return (whole * chunk**2 + rest**2) / tokens, (whole * chunk**3 + rest**3) / tokens


def _matrix_memory(config: HopeConfig, length: float) -> float:
    """A head with one matrix: read, written, and with the delta rule corrected."""
    width = config.dim // config.heads
    across, within = 2.0 * width * width, 2.0 * length * width  # a product with a memory, a product with a segment
    count = 2 * across + 2 * within  # q M^T, writes^T K; q K^T, (decay * q K^T) writes
    if config.mixer != "linear_attention":
        count += across + within + (length - 1) * width  # K M^T, K K^T, the solve
    return count


def _mlp_memories(config: HopeConfig, chunk: int, tokens: int, *, memories: int = 1, own: bool = False) -> float:
    """A head's two-layer memories.

    Args:
        config: its rule, momentum, read and retention are counted.
        chunk: tokens computed at once.
        tokens: T.
        memories: M, of which all but the last make k, v and gates.
        own: whether a single memory makes its own targets, as several do.
    """
    length, squared = _segments(chunk, tokens)
    width = config.dim // config.heads
    hidden = config.memory_hidden or width
    modifying = own or memories > 1
    erasing, momentum = config.inner_rule != "gd", config.momentum
    across = 2.0 * width * hidden  # a product with one of a memory's two maps
    within, within_hidden = 2.0 * length * width, 2.0 * length * hidden  # products with a segment
    # Widths of all hidden layers together, in units of the main memory's; two of several make gates.
    narrow = gate_hidden(hidden, config.gate_hidden_ratio) / hidden
    maps = memories if memories == 1 else memories - 2 + 2 * narrow
    both = maps * within_hidden + memories * within  # a square matrix of the segment times the writes of both maps

    count = 2 * (maps - 1) * across  # the projections are read
    count += (3 if modifying else 2) * maps * across  # W2 k (and W2 v), W1 of the hidden features
    count += maps * across  # the error goes back through W1
    count += 2 * maps * across  # both maps are written
    if erasing:
        count += within + maps * within_hidden  # K K^T, shared by the inner maps, and one for each outer map
        count += 2 * maps * across * (2 if config.inner_rule == "delta" else 1)  # what is to be erased
        count += (length - 1) * (maps * hidden + memories * width)  # the solves
    if momentum:
        count += 2 * squared + 2 * length  # decay factors, shared by all memories
        count += 2 * maps * across  # the momentum of both maps is written
        if erasing:
            count += 2 * maps * across + both  # what momentum brought is erased too
    if config.read == "chunk":
        return count + 2 * across
    count += 2 * across * (2 if momentum else 1) + (2 * across if config.retain_to == "initial" else 0)
    count += within + within_hidden  # q K^T of both maps
    return count + (within + within_hidden) * (2 if erasing and momentum else 1)
