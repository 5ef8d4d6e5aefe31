"""Our tokenizers as tokenizers of `transformers`, which load anywhere without our code."""

from __future__ import annotations

import tempfile
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from nestlearn.training.tokenizers import ByteTokenizer, Tokenizer

# A line for each turn, as `nestlearn chat` has it for models that bring no template.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def to_transformers(tokenizer: Tokenizer) -> Any:
    """A tokenizer of `transformers` that gives the same ids for every text.

    It pads on the left, as generation wants it, adds no token of its own, and has the chat template of `nestlearn chat`
    where it brings none.

    Args:
        tokenizer: of a checkpoint.

    Returns:
        a `PreTrainedTokenizerBase`, to be used or saved.
    """
    if isinstance(tokenizer, ByteTokenizer):
        found = byte_tokenizer()
    else:
        with tempfile.TemporaryDirectory() as folder:
            spec = tokenizer.save(folder)
            if spec.endswith(".json"):
                found = PreTrainedTokenizerFast(tokenizer_file=f"{folder}/{spec}")
            else:
                found = AutoTokenizer.from_pretrained(f"{folder}/{spec}")
    found.padding_side = found.init_kwargs["padding_side"] = "left"
    found.model_input_names = ["input_ids", "attention_mask"]
    if found.chat_template is None:
        found.chat_template = CHAT_TEMPLATE
    return found


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of byte models: id b is byte b of the text's UTF-8. Byte 0, which no text has, is the padding.

    In the `tokenizers` library's own terms: a vocabulary of 256 characters that stand for bytes, and no merges.
    """
    letters = _letters()
    # A special token is looked for in the text itself, so it must be written as what it stands for.
    letters[0] = "\0"
    fast = FastTokenizer(models.BPE(vocab={letter: byte for byte, letter in enumerate(letters)}, merges=[]))
    # Pieces of a text are only for speed, as nothing is ever merged: long ones take quadratic time.
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\s\S]{1,64}"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    padding = AddedToken("\0", special=True, normalized=False)
    return PreTrainedTokenizerFast(tokenizer_object=fast, pad_token=padding, clean_up_tokenization_spaces=False)


def _letters() -> list[str]:
    """The character that the byte-level vocabulary of GPT-2 writes for each byte: itself where it prints, and those
    from U+0100 on for the rest."""
    prints = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(0x100, 0x200))
    return [chr(byte) if byte in prints else chr(next(rest)) for byte in range(256)]
