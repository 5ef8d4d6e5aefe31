"""Our tokenizers as those of transformers: the same ids for every text, and no code of ours to load them."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from nestlearn.hub import to_transformers
from nestlearn.training.tokenizers import ByteTokenizer, FileTokenizer, HubTokenizer

OURS = ByteTokenizer()
THEIRS = to_transformers(OURS)


@given(st.text())
def test_bytes_are_bytes(text: str) -> None:
    ids = THEIRS(text)["input_ids"]
    assert ids == OURS.encode(text).tolist()
    assert THEIRS.decode(ids) == OURS.decode(ids)


@pytest.mark.parametrize("text", ["", "a\0b", "ĀĠ\xa0\xad", " two  spaces \n", "日本 🎉", "x" * 1000, "é" * 999])
def test_bytes_that_other_vocabularies_trip_over(text: str) -> None:
    ids = THEIRS(text)["input_ids"]
    assert ids == list(text.encode())
    assert THEIRS.decode(ids) == text


def test_byte_tokenizer_survives_its_files(tmp_path: Path) -> None:
    THEIRS.save_pretrained(tmp_path)
    back = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(back), back.pad_token_id, back.padding_side, back.eos_token) == (256, 0, "left", None)
    assert back(["ab", "abcd"], padding=True)["input_ids"] == [[0, 0, 97, 98], [97, 98, 99, 100]]
    assert set(back("a")) == {"input_ids", "attention_mask"}
    assert back.decode([0, 97], skip_special_tokens=True) == "a"
    turn = [{"role": "user", "content": "hi"}]
    assert back.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) == "user: hi\nassistant:"
    ours = HubTokenizer(tmp_path)
    assert ours.vocab_size == 256
    assert ours.encode("né").tolist() == list("né".encode())


def test_half_a_character_becomes_the_replacement() -> None:
    assert THEIRS.decode([0xE6, 0x97]) == "\ufffd"


def test_word_pieces_keep_their_ids(tmp_path: Path) -> None:
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["the cat sat on the mat, the cat"] * 4, vocab_size=300, show_progress=False)
    file = tmp_path / "tokenizer.json"
    trained.save(str(file))
    ours = FileTokenizer(file)
    for source in (ours, None):
        if source is None:  # the same by way of a folder of transformers
            to_transformers(ours).save_pretrained(tmp_path / "folder")
            source = HubTokenizer(tmp_path / "folder")
        theirs = to_transformers(source)
        assert theirs("the cat, né 🎉")["input_ids"] == ours.encode("the cat, né 🎉").tolist()
        assert theirs.padding_side == "left"
