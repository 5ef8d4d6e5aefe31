"""Hope (Eq. 94-97) and, with other mixers, Hope-Attention, the Transformer and the baselines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestlearn.functional.rms_norm import RMSNorm
from nestlearn.layers import (
    TNT,
    Attention,
    DeltaNet,
    GatedDeltaNet,
    LinearAttention,
    PlainAttention,
    SelfModifyingTitans,
    Titans,
)
from nestlearn.layers.self_modifying_titans import PROJECTIONS
from nestlearn.levels import EVERY_READ, Level
from nestlearn.memory.continuum import ContinuumMemory
from nestlearn.models.config import HopeConfig
from nestlearn.models.flops import attention_flops, mixer_flops

State = dict[str, Tensor]


# Settings of memories that mixers take as they are.
OF_TITANS = ("read", "retain_to", "write_bound", "memory_hidden", "initial_gate", "detach_every", "backend")
OF_MEMORIES = (
    *OF_TITANS,
    "projection_chunk_size",
    "inner_rule",
    "momentum",
    "retention",
    "negative_eigenvalues",
    "adaptive_query",
    "static_projections",
    "residual_memory",
    "empty_memory",
    "slowest_gate",
    "write_scale",
    "projection_write_scale",
    "gate_hidden_ratio",
)


class HopeBlock(nn.Module):
    """x + mixer(norm(x)), then the continuum memory system with its own residuals (Eq. 97).

    Args:
        config: of the model.
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.dim, eps=1e-5)
        self.mixer = build_mixer(config)
        self.memory_system = ContinuumMemory(
            config.dim,
            periods=config.cms_periods,
            expansion=config.cms_expansion,
            variant=config.cms_variant,
            kind=config.cms_level,
        )
        self.activation_checkpointing = False

    def forward(
        self, x: Tensor, state: State | None, lengths: Tensor | None, document_starts: Tensor | None
    ) -> tuple[Tensor, State]:
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        mixed, state = self.mixer(self.norm(x), state, lengths=lengths, document_starts=document_starts)
        x = x + mixed
        x = checkpoint(self.memory_system, x, use_reentrant=False) if recompute else self.memory_system(x)
        return x, state

    def decode_step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token, x (B, D), by the mixer's own fast path where it has one."""
        mixer = self.mixer
        step = getattr(mixer, "decode_step", mixer)
        mixed, state = step(self.norm(x).unsqueeze(1), state)
        return getattr(self.memory_system, "decode_step", self.memory_system)(x + mixed[:, 0]), state


class HopeLM(nn.Module):
    """A language model of `HopeConfig`. All rows of a batch are independent, and the state is the caller's:

        logits, state = model(tokens, state)

    Reading a sequence whole, in pieces or token by token gives the same logits and the same state.

    Args:
        config: what it is made of.
    """

    def __init__(self, config: HopeConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.dim)
        self.blocks = nn.ModuleList(HopeBlock(config) for _ in range(config.depth))
        self.norm = RMSNorm(config.dim, eps=1e-5)
        self.head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self._initialize()

    def _initialize(self) -> None:
        """Linear maps: normal, std 0.5 / sqrt(inputs), those that write into the residual stream divided by
        sqrt(2 depth) more. Embedding: std 0.02. The mixers initialise their streams, memories and gates."""
        writers = {"output", "down"}
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and not name.endswith("streams.projection"):
                std = 0.5 * module.in_features**-0.5
                if name.rsplit(".", 1)[-1] in writers:
                    std /= (2 * self.config.depth) ** 0.5
                nn.init.normal_(module.weight, std=std)
        nn.init.normal_(self.embedding.weight, std=0.02)

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
            lengths: (B,) int64, valid tokens of right-padded rows; a row's state is that at its own last token, and
                logits at padding mean nothing.
            document_starts: (B, T) bool, tokens before which a row's state is reset.

        Returns:
            logits (B, T, vocab_size) and the state after each row's last token.

        Raises:
            ValueError: if shapes do not fit or a token is not in the vocabulary.
        """
        features, new_state = self.features(tokens, state, lengths=lengths, document_starts=document_starts)
        logits: Tensor = self.head(features)
        return logits, new_state

    def features(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        lengths: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """What the head turns into logits: `forward` without its last product, with features (B, T, D) in their place.
        The logits of a few tokens of a long text then cost no more than those."""
        self._check(tokens, lengths, document_starts)
        lengths = None if lengths is None else lengths.to(tokens.device)
        document_starts = None if document_starts is None else document_starts.to(tokens.device)
        if state is not None:
            self._check_depth(state)
        x = self.embedding(tokens)
        new_state: State = {}
        for index, block in enumerate(self._blocks()):
            prefix = f"blocks.{index}."
            own = None if state is None else _with_prefix(state, prefix)
            x, own = block(x, own, lengths, document_starts)
            new_state |= {prefix + name: tensor for name, tensor in own.items()}
        features: Tensor = self.norm(x)
        return features, new_state

    def init_state(self, batch_size: int) -> State:
        """The state of fresh contexts, as named tensors (prefix "blocks.<i>."). Its size does not grow with the
        tokens read, except for attention."""
        parameter = self.embedding.weight
        state: State = {}
        for index, block in enumerate(self._blocks()):
            own = block.mixer.init_state(batch_size, device=parameter.device, dtype=parameter.dtype)  # type: ignore[operator]
            state |= {f"blocks.{index}.{name}": tensor for name, tensor in own.items()}
        return state

    @torch.no_grad()
    def decode_step(self, token: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Reads one token a row, without gradients: token (B,) int64 -> logits (B, vocab_size) and the new state.

        No state: a fresh context. It may overwrite the given state: go on with the one that it returns, and keep a
        clone of a state that is to be continued twice.
        """
        if token.ndim != 1:
            raise ValueError(f"token: expected one whole number a row, (B,), got shape {tuple(token.shape)}")
        try:
            x = self.embedding(token)
        except (IndexError, RuntimeError):  # the embedding looks at every number anyway; here only for what to say
            self._check(token[:, None], None, None)
            raise
        if state is None:
            state = self.init_state(len(token))
        self._check_depth(state)
        new_state: State = {}
        for index, block in enumerate(self._blocks()):
            prefix = f"blocks.{index}."
            x, own = block.decode_step(x, _with_prefix(state, prefix))
            for name, tensor in own.items():
                new_state[prefix + name] = tensor
        return self.head(self.norm(x)), new_state

    def _blocks(self) -> list[HopeBlock]:
        return list(self.blocks)  # type: ignore[arg-type]

    def set_activation_checkpointing(self, on: bool = True) -> None:
        """Recomputes activations in the backward pass, chunk by chunk in the memories, instead of keeping them."""
        for module in self.modules():
            if hasattr(module, "activation_checkpointing"):
                module.activation_checkpointing = on  # type: ignore[assignment]

    def num_parameters(self) -> int:
        """Learnt numbers, shared ones counted once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of the forward pass for one token of a sequence of this length, matrix products
        alone (`nestlearn.models.flops`). A training step costs about three times as much."""
        return self.linear_flops() + self.config.depth * mixer_flops(self.config, sequence_length)

    def decode_flops(self, context: int) -> float:
        """The same for one token that is read on its own after `context` others."""
        config = self.config
        attends = config.mixer in ("attention", "plain_attention")
        mixer = attention_flops(config, context + 1) if attends else mixer_flops(config, 1)
        return self.linear_flops() + config.depth * mixer

    def linear_flops(self) -> float:
        """Operations of all linear layers, the head included, for one token."""
        return sum(2.0 * m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def levels(self) -> list[Level]:
        """How often each part changes. Periods of memories are counted in tokens, those of CMS levels and of all
        other parameters in optimizer steps."""
        config = self.config
        levels = []
        learning = config.adaptive_query or len(config.static_projections) < len(PROJECTIONS)
        for index in range(config.depth):
            name = f"blocks.{index}.mixer"
            if config.mixer in ("attention", "plain_attention"):
                levels.append(Level(name, EVERY_READ, "token"))
            elif config.mixer == "self_modifying_titans":
                projection = config.projection_chunk_size or config.chunk_size
                main = config.chunk_size if config.read == "chunk" else 1
                levels += [Level(f"{name}.memory", main), *[Level(f"{name}.projections", projection)] * learning]
            elif config.mixer == "tnt":
                size = config.global_chunk_size
                levels += [Level(f"{name}.memory", size), *[Level(f"{name}.projections", size)] * learning]
                for number, size in enumerate(config.local_chunk_sizes):
                    main = size if config.read == "chunk" else 1
                    levels.append(Level(f"{name}.local_memories.{number}.memory", main))
            else:
                chunked = config.mixer == "titans" and config.read == "chunk"
                levels.append(Level(f"{name}.memory", config.chunk_size if chunked else 1))
        for number, period in enumerate(config.cms_periods):
            levels += [
                Level(f"blocks.{index}.memory_system.levels.{number}", period, "step") for index in range(config.depth)
            ]
        levels.append(Level("everything else", 1, "step"))
        unit_order = {"token": 0, "step": 1}
        return sorted(levels, key=lambda level: (unit_order[level.unit], level.period))

    def level_parameters(self) -> dict[int, list[tuple[str, nn.Parameter]]]:
        """Parameters by training period in optimizer steps: those of a CMS level at its period, all others at 1."""
        groups: dict[int, list[tuple[str, nn.Parameter]]] = {1: []}
        for name, parameter in self.named_parameters():
            period = 1
            if ".memory_system.levels." in name:
                period = self.config.cms_periods[int(name.split(".memory_system.levels.")[1].split(".")[0])]
            groups.setdefault(period, []).append((name, parameter))
        return groups

    def _check_depth(self, state: State) -> None:
        """Refuses what would be left unread: the state of a deeper model."""
        beyond = f"blocks.{self.config.depth}."
        if any(name.startswith(beyond) for name in state):
            raise ValueError(
                f"state: expected one of {self.config.depth} blocks, got one with {beyond}...; does it belong to a "
                f"deeper model?"
            )

    def _check(self, tokens: Tensor, lengths: Tensor | None, document_starts: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"tokens: expected whole numbers of shape (B, T), got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if lengths is not None and lengths.shape != tokens.shape[:1]:
            raise ValueError(
                f"lengths: expected one number a row, ({tokens.shape[0]},), got shape {tuple(lengths.shape)}"
            )
        on_cpu = lengths is not None and lengths.device.type == "cpu"
        if lengths is not None and on_cpu and not bool(((lengths >= 0) & (lengths <= tokens.shape[1])).all()):
            raise ValueError(f"lengths: expected numbers from 0 to T = {tokens.shape[1]}, got {lengths.tolist()}")
        if document_starts is not None and document_starts.shape != tokens.shape:
            raise ValueError(
                f"document_starts: expected the tokens' shape {tuple(tokens.shape)}, got {tuple(document_starts.shape)}"
            )
        # On a GPU the look would wait for the device; there the embedding's own check must do.
        if (
            tokens.device.type == "cpu"
            and tokens.numel()
            and not 0 <= int(tokens.min()) <= int(tokens.max()) < (self.config.vocab_size)
        ):
            raise ValueError(
                f"tokens: expected numbers from 0 to {self.config.vocab_size - 1} (vocab_size "
                f"{self.config.vocab_size}), got {int(tokens.min())} to {int(tokens.max())}; "
                f"does the tokenizer belong to this model?"
            )


def build_mixer(config: HopeConfig) -> nn.Module:
    """The sequence layer that a configuration names."""
    dim, heads = config.dim, config.heads
    if config.mixer == "plain_attention":
        return PlainAttention(dim, heads, rotary_base=config.rotary_base)
    if config.mixer == "attention":
        return Attention(dim, heads, conv_width=config.conv_width, rotary_base=config.rotary_base)
    if config.mixer == "tnt":
        sizes = ("global_chunk_size", "local_chunk_sizes", "shard_length", "conv_width")
        own = (*sizes, "global_stride", "project_queries")
        named = (*own, *(name for name in OF_MEMORIES if name != "projection_chunk_size"))
        return TNT(dim, heads, **{name: getattr(config, name) for name in named})
    chunked: dict[str, Any] = {"chunk_size": config.chunk_size, "conv_width": config.conv_width}
    simple = {"linear_attention": LinearAttention, "delta_net": DeltaNet, "gated_delta_net": GatedDeltaNet}
    if config.mixer in simple:
        return simple[config.mixer](dim, heads, **chunked)
    if config.mixer == "titans":
        return Titans(dim, heads, **chunked, **{name: getattr(config, name) for name in OF_TITANS})
    return SelfModifyingTitans(dim, heads, **chunked, **{name: getattr(config, name) for name in OF_MEMORIES})


def _with_prefix(state: State, prefix: str) -> State:
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not own:
        raise ValueError(
            f"state: nothing in it is named {prefix}...; expected a state from init_state or from an earlier call of "
            f"a model with the same configuration"
        )
    return own
