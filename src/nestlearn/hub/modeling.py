"""`HopeLM` with the interface of `transformers`."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from nestlearn.hub.cache import HopeCache, cache_to_state, state_to_cache
from nestlearn.hub.configuration import HopeConfig
from nestlearn.models.cache_names import NAMES, cache_name, one_cache
from nestlearn.models.hope import HopeLM, State

# What the installed transformers calls a cache.
_CACHE = cache_name(CausalLMOutputWithPast)

# What the loss of transformers may be told.
_FOR_THE_LOSS = ("num_items_in_batch", "shift_labels")

# What other models take, and what would change the result if it were left out silently. The rest may pass by: generate
# hands on all that it was given.
_NOT_TAKEN = ("inputs_embeds", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx", "encoder_hidden_states", "head_mask")


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of `HopeConfig` for `generate`, `Trainer`, pipelines and servers.

    Its parameters have the names of `HopeLM`'s. Padding may be anywhere: a row's memories see its own tokens alone, one
    after another, and the logits at a place without a token are those of the row's last token before it.

    Args:
        config: what it is made of.
    """

    config_class = HopeConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _input_embed_layer = "embedding"
    _no_split_modules = ("HopeBlock",)
    _tied_weights_keys = {"head.weight": "embedding.weight"}  # noqa: RUF012  (as transformers declares it)
    _supports_sdpa = True
    # A memory cannot take tokens back, so assisted decoding is refused.
    _is_stateful = True

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        lm = HopeLM(config.architecture())
        for name, module in lm.named_children():
            self.add_module(name, module)
        # One set of modules with two owners: what replaces one of them here is seen there, and no name is doubled.
        lm._modules = self._modules
        object.__setattr__(self, "lm", lm)
        self.gradient_checkpointing = False
        self.post_init()

    lm: HopeLM

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_starts: Tensor | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Reads tokens and predicts the next ones.

        Args:
            input_ids: (B, T) int64.
            attention_mask: (B, T) or (B, tokens read before + T), 0 at padding, on either side or in between.
            cache: a `HopeCache` to go on from; it is changed, unless `use_cache` is off.
            labels: (B, T), the tokens themselves, -100 where none is to be predicted.
            use_cache: whether to return a cache; by default as the configuration says, but not in training.
            logits_to_keep: logits of the last so many places alone, or of these places; 0 for all.
            document_starts: (B, T) bool, tokens before which a row's state is reset; `position_ids` that return to 0
                say the same.
            return_dict: False for a tuple.
            past_key_values: another name of `cache`, the only one before transformers 5.24.
            **others: for the loss, such as `num_items_in_batch`.

        Returns:
            `loss` (None without labels), `logits` (B, T or fewer, V), and the cache under the name that the installed
            transformers has for it: `cache`, or `past_key_values` before 5.24.

        Raises:
            ValueError: if shapes do not fit, or for what this model cannot give.
        """
        cache = one_cache(cache, past_key_values)
        positions = others.pop("position_ids", None)
        for_the_loss = _checked(others)
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(
                f"input_ids: expected at least one token, as (B, T), got shape {tuple(input_ids.shape)}; the model "
                f"continues a text and cannot begin one"
            )
        if document_starts is None:
            document_starts = _returns_to_zero(input_ids, positions, cache)
        keeps = use_cache if use_cache is not None else self.config.use_cache and not self.training
        padding = _padding(input_ids, attention_mask)
        state = cache_to_state(cache)
        # The step for one token may write into the state that it is given.
        alone = input_ids.shape[1] == 1 and padding is None and document_starts is None
        if alone and (keeps or state is None) and not torch.is_grad_enabled():
            logits, state = self.lm.decode_step(input_ids[:, 0], state)
            logits = logits[:, None]
        else:
            logits, state = self._read(input_ids, state, padding, document_starts, logits_to_keep)
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            if padding is not None:  # before a row's first token nothing was read that could tell it
                labels = labels.masked_fill(padding.first, -100)
                if for_the_loss.get("shift_labels") is not None:
                    before_first = F.pad(padding.first[:, 1:], (0, 1))
                    for_the_loss["shift_labels"] = for_the_loss["shift_labels"].masked_fill(before_first, -100)
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **for_the_loss)
        after = None
        if keeps:
            read = input_ids.shape[1] + (cache.get_seq_length() if cache is not None else 0)
            known = cache if isinstance(cache, HopeCache) else None
            after = state_to_cache(state, read, known)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **{_CACHE: after})
        return output.to_tuple() if return_dict is False else output

    def _read(
        self,
        input_ids: Tensor,
        state: State | None,
        padding: Padding | None,
        starts: Tensor | None,
        logits_to_keep: int | Tensor,
    ) -> tuple[Tensor, State]:
        """Logits at the places that are kept, and the state."""
        if padding is None:
            features, state = self.lm.features(input_ids, state, document_starts=starts)
        else:
            starts = None if starts is None else starts.gather(1, padding.token) & padding.holds
            tokens = input_ids.gather(1, padding.token)
            # Whatever number padding has, the vocabulary need not know it.
            tokens = torch.where(padding.holds, tokens, 0)
            features, state = self.lm.features(tokens, state, lengths=padding.lengths, document_starts=starts)
            features = features.gather(1, padding.place[..., None].expand(-1, -1, features.shape[-1]))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return self.lm.head(features[:, kept]), state

    def generate(self, *args: Any, **settings: Any) -> Any:
        """As `GenerationMixin.generate`, with the cache under either name.

        By itself it knows only the installed version's, and would read a text a second time that a cache under the
        other one holds.

        Raises:
            ValueError: for two caches.
        """
        cache = one_cache(**{name: settings.pop(name, None) for name in NAMES})
        return super().generate(*args, **settings, **({} if cache is None else {_CACHE: cache}))

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **settings: Any) -> Any:
        """As `PreTrainedModel.from_pretrained`, from safetensors alone, and from whole files alone.

        Raises:
            ValueError: if a file is damaged, or weights are missing or do not fit: they would be left at random.
        """
        wants_info = settings.pop("output_loading_info", False)
        settings |= {"use_safetensors": True, "ignore_mismatched_sizes": True}  # refused below, with what to look at
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, *args, output_loading_info=True, **settings
            )
        except SafetensorError as error:
            raise ValueError(
                f"the weights of {os.fspath(pretrained_model_name_or_path)} are damaged ({error}); fetch or export "
                f"them again"
            ) from error
        wrong = sorted({*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])})
        if wrong:
            raise ValueError(
                f"{os.fspath(pretrained_model_name_or_path)} does not hold all weights of this model: "
                f"{', '.join(wrong[:3])}{' and others' if len(wrong) > 3 else ''} are missing or of another shape; "
                f"does its config.json belong to its weights?"
            )
        return (model, info) if wants_info else model

    def resize_token_embeddings(self, *args: Any, **settings: Any) -> Any:
        """As `PreTrainedModel.resize_token_embeddings`."""
        embedding = super().resize_token_embeddings(*args, **settings)
        self.lm.config = self.config.architecture()
        return embedding

    def level_parameters(self) -> dict[int, list[tuple[str, torch.nn.Parameter]]]:
        """As `HopeLM.level_parameters`: what `nestlearn.optim.LevelOptimizer.for_model` asks for."""
        return self.lm.level_parameters()

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm.head

    def set_output_embeddings(self, new_embeddings: torch.nn.Module) -> None:
        self.head = new_embeddings

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing: `HopeLM` starts its weights itself, and `from_pretrained` takes no file that lacks one."""

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        self.gradient_checkpointing = enable
        self.lm.set_activation_checkpointing(enable)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        # generate then leaves the cache to forward, which makes a HopeCache.
        return False


class Padding(NamedTuple):
    """Where the tokens of rows with padding are.

    Attributes:
        lengths: (B,) tokens of each row.
        token: (B, T) the place of each row's i-th token; behind its last one, anything.
        holds: (B, T) whether there is an i-th token.
        place: (B, T) the number of the token at each place, or of the last one before it; 0 before the first.
        first: (B, T) whether a row's first token is at this place.
    """

    lengths: Tensor
    token: Tensor
    holds: Tensor
    place: Tensor
    first: Tensor


def _padding(input_ids: Tensor, attention_mask: Tensor | None) -> Padding | None:
    """None if there is no padding."""
    if attention_mask is None:
        return None
    batch, tokens = input_ids.shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < tokens:
        raise ValueError(
            f"attention_mask: expected one number a token, {tuple(input_ids.shape)} or with those read before, got "
            f"shape {tuple(attention_mask.shape)}; for documents in one row give document_starts or position_ids"
        )
    mask = attention_mask[:, attention_mask.shape[1] - tokens :].to(input_ids.device).bool()
    if bool(mask.all()):
        return None
    lengths = mask.sum(1)
    token = (~mask).to(torch.int8).argsort(dim=1, stable=True)
    holds = torch.arange(tokens, device=mask.device) < lengths[:, None]
    count = mask.cumsum(1)
    return Padding(lengths, token, holds, (count - 1).clamp_min(0), mask & (count == 1))


def _returns_to_zero(input_ids: Tensor, position_ids: Tensor | None, cache: Cache | None) -> Tensor | None:
    """(B, T) bool, where the positions of packed documents begin again; None if nowhere."""
    if position_ids is None:
        return None
    try:
        starts = (position_ids == 0).expand(input_ids.shape)
    except RuntimeError:
        shapes = f"{tuple(input_ids.shape)}, got shape {tuple(position_ids.shape)}"
        raise ValueError(f"position_ids: expected one number a token, {shapes}") from None
    if cache is None:
        starts = starts & (torch.arange(starts.shape[1], device=starts.device) > 0)
    return starts if bool(starts.any()) else None


def _checked(others: dict[str, Any]) -> dict[str, Any]:
    """What is for the loss; refuses what would be left out silently."""
    for name in ("output_attentions", "output_hidden_states"):
        if others.pop(name, None):
            raise ValueError(f"{name}: Hope records none; look into it with nestlearn.inspect instead")
    for name, given in others.items():
        # A cache under yet another name would be left out too, and the text before it forgotten.
        if given is not None and (name in _NOT_TAKEN or isinstance(given, Cache)):
            raise ValueError(f"HopeForCausalLM takes no {name}; see its forward for what it takes")
    return {name: others[name] for name in _FOR_THE_LOSS if name in others}
