"""Associative memories written by gradient descent: one rule for all of them.

A memory M (V x K) holds pairs of a key k (K) and a value v (V). Writing them one after another is the recurrence

    S_t = momentum_t S_{t-1} + write_t v_t k_t^T
    M_t = retain_t M_{t-1} - erase_t ((M_{t-1} - R) k_t) k_t^T + S_t
    o_t = M_t q_t

with the reference R zero unless given. Linear attention (Eq. 15), the delta rule (Eq. 65), delta gradient descent
(Eq. 57) and the memories of self-modifying Titans (Eq. 88, 90) are instances. Since every value is known at the start
of a chunk, a chunk of C tokens is a few matrix products and one unit-triangular solve, with or without momentum.

Shapes: B batch, T tokens, C chunk, K key width, V value width; `...` any leading dimensions.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Form = Literal["chunked", "recurrent"]
ReadTiming = Literal["token", "previous"]


class AssociativeOutput(NamedTuple):
    """What `associative_recurrence` returns.

    Attributes:
        outputs: (..., T, V), or None without queries.
        memory: (..., V, K), the memory after the last token.
        momentum_state: (..., V, K), S after the last token, or None without momentum.
    """

    outputs: Tensor | None
    memory: Tensor
    momentum_state: Tensor | None


class Decay(NamedTuple):
    """How much of each write is left later in a chunk. All factors follow from the gates alone, so memories that
    share their gates share them. `*_before` is the same row one token earlier (row 0: what stood before the chunk).

    Attributes:
        retain: R^a (..., C, C), lower triangular: what is left at t of a change made to M at s.
        retained: g^a (..., C): what is left at t of the memory before the chunk.
        write: R^w (..., C, C): the weight in M_t of the write at s; R^a itself without momentum.
        carry: c (..., C): the weight in M_t of the momentum S before the chunk; None without momentum.
        momentum_last: (..., C): the weight of the write at s in the last S; None without momentum.
        momentum_carried: (..., 1): the weight of the old S in the last S; None without momentum.
    """

    retain: Tensor
    retained: Tensor
    retain_before: Tensor
    retained_before: Tensor
    write: Tensor
    write_before: Tensor
    carry: Tensor | None = None
    carry_before: Tensor | None = None
    momentum_last: Tensor | None = None
    momentum_carried: Tensor | None = None


def associative_update(
    memory: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    retain: float | Tensor = 1.0,
    erase: float | Tensor = 0.0,
    write: float | Tensor = 1.0,
) -> Tensor:
    """Writes N pairs AT ONCE against the old memory: a mini-batch, a CMS chunk (Eq. 71).

        M' = retain M - sum_i erase_i (M k_i) k_i^T + sum_i write_i v_i k_i^T

    Args:
        memory: (..., V, K).
        keys: (..., N, K).
        values: (..., N, V).
        retain: what is kept of the old memory; a number, or a tensor (...).
        erase: how strongly the old value at each key is removed; a number, or a tensor (..., N).
        write: how strongly each new value is written; a number, or a tensor (..., N).

    Returns:
        The new memory (..., V, K). Nothing is changed in place.
    """
    _check_pairs(memory, keys, values)
    update = values * _column(write)
    if isinstance(erase, Tensor) or erase != 0.0:
        update = update - _column(erase) * (keys @ memory.mT)
    kept = retain[..., None, None] * memory if isinstance(retain, Tensor) else retain * memory
    return kept + update.mT @ keys


def associative_recurrence(
    memory: Tensor,
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None = None,
    *,
    log_retain: Tensor,
    erase: Tensor,
    write: Tensor,
    log_momentum: Tensor | None = None,
    momentum_state: Tensor | None = None,
    reference: Tensor | None = None,
    read: ReadTiming = "token",
    form: Form = "chunked",
    chunk_size: int = 64,
) -> AssociativeOutput:
    """Writes T pairs ONE AFTER another and reads the memory at every token (module docstring).

    Args:
        memory: M before the first token, (..., V, K).
        keys: (..., T, K).
        values: (..., T, V).
        queries: (..., T, K), or None if nothing is to be read.
        log_retain: natural logarithm of the retention, (..., T), finite, at most 0 for a memory that does not grow.
        erase: (..., T).
        write: (..., T).
        log_momentum: natural logarithm of the momentum, (..., T); None for no momentum.
        momentum_state: S before the first token, (..., V, K); zeros if None. Only with `log_momentum`.
        reference: R (..., V, K), what the erase term leaves untouched; None for zero.
        read: "token", o_t = M_t q_t, or "previous", o_t = M_{t-1} q_t (Eq. 83).
        form: "recurrent" is the specification, a plain loop over tokens; "chunked" equals it and is fast.
        chunk_size: tokens a chunk, at least 1. It changes the speed, not the result.

    Returns:
        AssociativeOutput(outputs, memory, momentum_state), differentiable in every input.

    Raises:
        ValueError: if shapes do not fit, an argument is out of its range, or the memory is not in fp32 or fp64.
    """
    _check_pairs(memory, keys, values)
    for name, gate in (("log_retain", log_retain), ("erase", erase), ("write", write), ("log_momentum", log_momentum)):
        if gate is not None and gate.shape[-1:] != keys.shape[-2:-1]:
            raise ValueError(f"{name}: expected one number a token, (..., T={keys.shape[-2]}), got {tuple(gate.shape)}")
    if queries is not None and queries.shape[-2:] != keys.shape[-2:]:
        raise ValueError(f"queries: expected the keys' {tuple(keys.shape[-2:])} at the end, got {tuple(queries.shape)}")
    if momentum_state is not None and log_momentum is None:
        raise ValueError("momentum_state was given without log_momentum: pass both, or neither")
    for name, like in (("momentum_state", momentum_state), ("reference", reference)):
        if like is not None and like.shape[-2:] != memory.shape[-2:]:
            raise ValueError(
                f"{name}: expected the memory's (V, K) = {tuple(memory.shape[-2:])}, got {tuple(like.shape)}"
            )
    if memory.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"memory: expected fp32 or fp64, got {memory.dtype}; convert all inputs, for example .float()")
    if read not in ("token", "previous"):
        raise ValueError(f'read: expected "token" or "previous", got {read!r}')
    if chunk_size < 1:
        raise ValueError(f"chunk_size: expected at least 1, got {chunk_size}")
    if log_momentum is not None and momentum_state is None:
        momentum_state = torch.zeros_like(memory)
    if form == "recurrent":
        return _recurrent(
            memory, keys, values, queries, log_retain, erase, write, log_momentum, momentum_state, reference, read
        )
    if form != "chunked":
        raise ValueError(f'form: expected "chunked" or "recurrent", got {form!r}')
    outputs = []
    for start in range(0, keys.shape[-2], chunk_size):
        chunk = slice(start, start + chunk_size)
        decay = chunk_decay(log_retain[..., chunk], None if log_momentum is None else log_momentum[..., chunk])
        output, memory, momentum_state = associative_chunk(
            memory,
            keys[..., chunk, :],
            values[..., chunk, :] * write[..., chunk, None],
            decay,
            erase=erase[..., chunk],
            momentum_state=momentum_state,
            reference=reference,
            queries=None if queries is None else queries[..., chunk, :],
            read=read,
        )
        outputs.append(output)
    read_out = torch.cat(outputs, dim=-2) if outputs and queries is not None else _nothing_read(queries, values)  # type: ignore[arg-type]
    return AssociativeOutput(read_out, memory, momentum_state)


def _recurrent(
    memory: Tensor,
    keys: Tensor,
    values: Tensor,
    queries: Tensor | None,
    log_retain: Tensor,
    erase: Tensor,
    write: Tensor,
    log_momentum: Tensor | None,
    momentum_state: Tensor | None,
    reference: Tensor | None,
    read: ReadTiming,
) -> AssociativeOutput:
    outputs = []
    for t in range(keys.shape[-2]):
        k, v = keys[..., t, :, None], values[..., t, :, None]
        before = memory
        change = write[..., t, None, None] * v * k.mT
        if log_momentum is not None and momentum_state is not None:
            change = momentum_state = log_momentum[..., t, None, None].exp() * momentum_state + change
        erased = memory if reference is None else memory - reference
        memory = (
            log_retain[..., t, None, None].exp() * memory - erase[..., t, None, None] * (erased @ k) * k.mT + change
        )
        if queries is not None:
            q = queries[..., t, :, None]
            outputs.append(((memory if read == "token" else before) @ q)[..., 0])
    read_out = torch.stack(outputs, dim=-2) if outputs else _nothing_read(queries, values)
    return AssociativeOutput(read_out, memory, momentum_state)


def chunk_decay(log_retain: Tensor, log_momentum: Tensor | None = None, active: Tensor | None = None) -> Decay:
    """The decay factors of one chunk.

    Args:
        log_retain: (..., C).
        log_momentum: (..., C), or None.
        active: (..., C) bool, False where there is no token: such a position leaves memory and momentum as they are
            (its writes and erasures must be zero too). None if all are tokens.
    """
    if active is not None:
        log_retain = log_retain * active
    retain, retained = _cumulative(log_retain)
    retain_before, retained_before = _shift(retain), _shift(retained.unsqueeze(-1), first=1.0).squeeze(-1)
    if log_momentum is None:
        return Decay(retain, retained, retain_before, retained_before, retain, retain_before)
    if active is not None:
        log_momentum = log_momentum * active
    momentum, momentum_kept = _cumulative(log_momentum)
    # S enters M at every token, but never at a position that holds none.
    entering = retain if active is None else retain * active[..., None, :]
    write, carry = entering @ momentum, (entering @ momentum_kept[..., None]).squeeze(-1)
    return Decay(
        retain,
        retained,
        retain_before,
        retained_before,
        write,
        _shift(write),
        carry,
        _shift(carry.unsqueeze(-1)).squeeze(-1),
        momentum[..., -1, :],
        momentum_kept[..., -1:],
    )


class Written(NamedTuple):
    """What a chunk wrote, for the reads inside it.

    Attributes:
        writes: (..., C, V). Without momentum what each token really changed, with it the values as they entered.
        erased: E (..., C, V), what was erased at each token; None where `writes` holds it, or nothing was erased.
    """

    writes: Tensor
    erased: Tensor | None


def associative_chunk(
    memory: Tensor,
    keys: Tensor,
    writes: Tensor,
    decay: Decay,
    *,
    erase: Tensor | None,
    momentum_state: Tensor | None = None,
    reference: Tensor | None = None,
    queries: Tensor | None = None,
    read: ReadTiming = "token",
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """One chunk of the recurrence in closed form: `write_chunk`, then `read_chunk` if there are queries.

    Returns:
        (outputs or None, memory, momentum_state or None) after the chunk.
    """
    written, new_memory, new_momentum_state = write_chunk(
        memory, keys, writes, decay, erase=erase, momentum_state=momentum_state, reference=reference
    )
    outputs = None
    if queries is not None:
        outputs = read_chunk(memory, queries, keys, written, decay, momentum_state=momentum_state, read=read)
    return outputs, new_memory, new_momentum_state


def write_chunk(
    memory: Tensor,
    keys: Tensor,
    writes: Tensor,
    decay: Decay,
    *,
    erase: Tensor | None,
    momentum_state: Tensor | None = None,
    reference: Tensor | None = None,
) -> tuple[Written, Tensor, Tensor | None]:
    """Writes one chunk. Memories with the same keys and gates may lie side by side in V: they share K K^T and the
    triangular factor.

    Args:
        memory: (..., V, K).
        keys: (..., C, K).
        writes: G, the values times their write strength, (..., C, V).
        decay: of this chunk, see `chunk_decay`.
        erase: (..., C); None erases nothing and solves nothing.
        momentum_state: S (..., V, K), or None without momentum.
        reference: R (..., V, K), or None for zero.

    Returns:
        (what was written, memory, momentum_state or None) after the chunk.
    """
    erased = None
    new_momentum_state = None
    if erase is not None:
        products = keys @ keys.mT
        factor = erase[..., None] * decay.retain_before * products
        old = decay.retained_before[..., None] * (keys @ memory.mT)
        if reference is not None:
            old = old - keys @ reference.mT
        if momentum_state is None:
            # U = G - E solves the same system as E, and spares the product (shift(R^w) * K K^T) G.
            writes = _solve(factor, writes - erase[..., None] * old)
        else:
            assert decay.carry_before is not None
            old = old + decay.carry_before[..., None] * (keys @ momentum_state.mT)
            old = old + (decay.write_before * products) @ writes
            erased = _solve(factor, erase[..., None] * old)
    change = decay.write[..., -1, :, None] * writes
    if erased is not None:
        change = change - decay.retain[..., -1, :, None] * erased
    new_memory = decay.retained[..., -1:, None] * memory + change.mT @ keys
    if momentum_state is not None:
        assert decay.carry is not None and decay.momentum_last is not None and decay.momentum_carried is not None
        new_memory = new_memory + decay.carry[..., -1:, None] * momentum_state
        fresh = (decay.momentum_last[..., None] * writes).mT @ keys
        new_momentum_state = decay.momentum_carried[..., None] * momentum_state + fresh
    return Written(writes, erased), new_memory, new_momentum_state


def read_chunk(
    memory: Tensor,
    queries: Tensor,
    keys: Tensor,
    written: Written,
    decay: Decay,
    *,
    momentum_state: Tensor | None = None,
    read: ReadTiming = "token",
) -> Tensor:
    """Reads M_t q_t ("token") or M_{t-1} q_t ("previous") for every t of a chunk, (..., C, V).

    `memory` and `momentum_state` are those before the chunk.
    """
    before = read == "previous"
    attention = queries @ keys.mT
    outputs = (decay.retained_before if before else decay.retained)[..., None] * (queries @ memory.mT)
    outputs = outputs + ((decay.write_before if before else decay.write) * attention) @ written.writes
    if momentum_state is not None:
        carry = decay.carry_before if before else decay.carry
        assert carry is not None
        outputs = outputs + carry[..., None] * (queries @ momentum_state.mT)
    if written.erased is not None:
        outputs = outputs - ((decay.retain_before if before else decay.retain) * attention) @ written.erased
    return outputs


def _solve(factor: Tensor, right: Tensor) -> Tensor:
    """(I + the part of `factor` below the diagonal)^{-1} right."""
    return torch.linalg.solve_triangular(factor, right, upper=False, unitriangular=True)


def _cumulative(log_gate: Tensor) -> tuple[Tensor, Tensor]:
    """prod_{s<j<=t} gate_j as a lower-triangular matrix, and prod_{j<=t} gate_j."""
    total = log_gate.cumsum(-1)
    above = torch.ones(log_gate.shape[-1], log_gate.shape[-1], dtype=torch.bool, device=log_gate.device).triu(1)
    # Masked before exp: above the diagonal the exponent is positive and may overflow.
    between = (total[..., :, None] - total[..., None, :]).masked_fill(above, -torch.inf).exp()
    return between, total.exp()


def _shift(rows: Tensor, first: float = 0.0) -> Tensor:
    """Row t-1 in place of row t; row 0 is filled with `first`."""
    return torch.nn.functional.pad(rows[..., :-1, :], (0, 0, 1, 0), value=first)


def _column(gate: float | Tensor) -> float | Tensor:
    return gate[..., None] if isinstance(gate, Tensor) else gate


def _nothing_read(queries: Tensor | None, values: Tensor) -> Tensor | None:
    return None if queries is None else values.new_zeros((*values.shape[:-2], 0, values.shape[-1]))


def _check_pairs(memory: Tensor, keys: Tensor, values: Tensor) -> None:
    if keys.ndim < 2 or values.ndim < 2 or memory.ndim < 2:
        raise ValueError(
            f"expected memory (..., V, K), keys (..., T, K), values (..., T, V); "
            f"got {tuple(memory.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}"
        )
    if keys.shape[-2] != values.shape[-2] or memory.shape[-2:] != (values.shape[-1], keys.shape[-1]):
        raise ValueError(
            f"memory (..., V, K), keys (..., T, K) and values (..., T, V) must agree in T, K and V; "
            f"got {tuple(memory.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}"
        )
