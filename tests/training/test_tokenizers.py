"""Ids, text and bytes agree for every kind of tokenizer."""

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.training import tokenizers as subject
from nestlearn.training.data import ByteTokenizer, Tokenizer, check_vocabulary, load_tokenizer

TEXT = "Nested learning — naïve café, 東京 🙂.\n\n  def f(x):\treturn x\n" * 3


def trained(kind: str) -> tokenizers.Tokenizer:
    if kind == "byte_level":
        result = tokenizers.Tokenizer(tokenizers.models.BPE())
        result.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        result.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    else:
        result = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
        result.normalizer = tokenizers.normalizers.BertNormalizer()
        result.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        trainer = tokenizers.trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=["[UNK]", "[CLS]", "[SEP]"], show_progress=False
        )
    result.train_from_iterator(["nested learning nested def return x " * 5], trainer)
    if kind == "word_piece":
        # Adds special tokens by itself and cuts at 4 tokens, unless told not to.
        result.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
        result.enable_truncation(4)
    return result


@pytest.fixture(params=["byte_level", "word_piece"])
def file_tokenizer(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    path = tmp_path / "tokenizer.json"
    trained(request.param).save(str(path))
    return load_tokenizer(path)


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids, widths = tokenizer.encode_with_bytes(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.uint8
    assert len(ids) == widths.sum() == tokenizer.num_bytes(text) == len(text.encode())


def test_bytes_of_broken_text() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0xE6, 0x9D]) == "\ufffd"
    assert tokenizer.num_bytes("a\ud800") == len(tokenizer.encode("a\ud800")) == 2
    with pytest.raises(ValueError, match="token id 256: expected 0 to 255"):
        tokenizer.decode([65, 256])


@given(
    text=st.text(alphabet=st.sampled_from("ab é東🙂 "), min_size=1, max_size=20),
    cuts=st.lists(st.integers(0, 20), max_size=5),
)
def test_bytes_of_contiguous_tokens_are_those_of_their_characters(text: str, cuts: list[int]) -> None:
    ends = sorted({min(cut, len(text)) for cut in cuts} - {0} | {len(text)})
    offsets = list(zip([0, *ends[:-1]], ends, strict=True))
    expected = [len(text[start:end].encode()) for start, end in offsets]
    assert subject._bytes_per_token(text, offsets).tolist() == expected


def test_bytes_of_tokens_that_share_skip_or_repeat_characters() -> None:
    # "é" in two tokens, a skipped space, a special token without a place, a skipped end.
    offsets = [(0, 1), (0, 1), (2, 3), (0, 0), (3, 4)]
    assert subject._bytes_per_token("é ab  ", offsets).tolist() == [2, 0, 2, 0, 3]
    assert subject._bytes_per_token("", []).tolist() == []


def test_file_tokenizer(file_tokenizer: Tokenizer) -> None:
    ids, widths = file_tokenizer.encode_with_bytes(TEXT)
    assert isinstance(file_tokenizer, Tokenizer)
    assert np.array_equal(ids, file_tokenizer.encode(TEXT))
    assert widths.sum() == file_tokenizer.num_bytes(TEXT) == len(TEXT.encode())
    assert widths.min() >= 0
    assert len(ids) > 20
    assert ids.max() < file_tokenizer.vocab_size
    assert "nested" in file_tokenizer.decode(ids).lower().replace(" ", "")
    empty, none = file_tokenizer.encode_with_bytes("")
    assert len(empty) == len(none) == 0


def test_byte_level_file_is_lossless(tmp_path: Path) -> None:
    trained("byte_level").save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    ids, widths = tokenizer.encode_with_bytes(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert ids.dtype == np.uint16
    # At character borders, the bytes so far are those of the text so far.
    for count in range(len(ids)):
        prefix = tokenizer.decode(ids[:count])
        if "\ufffd" not in prefix:
            assert widths[:count].sum() == len(prefix.encode())
    assert tokenizer.num_bytes("a\ud800") == tokenizer.encode_with_bytes("a\ud800")[1].sum()


def test_saved_tokenizer_is_the_same(file_tokenizer: Tokenizer, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    again = load_tokenizer(file_tokenizer.save(folder), folder=folder)
    assert np.array_equal(again.encode(TEXT), file_tokenizer.encode(TEXT))
    assert load_tokenizer(ByteTokenizer().save(folder), folder=folder).spec == "bytes"


def test_transformers_folder(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    PreTrainedTokenizerFast(tokenizer_object=trained("byte_level")).save_pretrained(tmp_path / "model")
    tokenizer = load_tokenizer(tmp_path / "model")
    ids, widths = tokenizer.encode_with_bytes(TEXT)
    assert isinstance(tokenizer, subject.HubTokenizer)
    assert tokenizer.decode(ids) == TEXT
    assert np.array_equal(ids, tokenizer.encode(TEXT))
    assert widths.sum() == len(TEXT.encode())
    assert tokenizer.vocab_size == len(trained("byte_level").get_vocab())
    again = load_tokenizer(tokenizer.save(tmp_path / "checkpoint"), folder=tmp_path / "checkpoint")
    assert np.array_equal(again.encode(TEXT), ids)


def test_slow_tokenizer_spreads_the_bytes() -> None:
    class Slow:
        is_fast = False

        def __call__(self, text: str, **kwargs: object) -> dict[str, list[int]]:
            assert kwargs["add_special_tokens"] is False
            assert not kwargs.get("return_offsets_mapping")
            return {"input_ids": [1, 2, 3]}

    tokenizer = subject.HubTokenizer.__new__(subject.HubTokenizer)
    tokenizer._tokenizer, tokenizer.vocab_size = Slow(), 4
    ids, widths = tokenizer.encode_with_bytes("0123456é")
    assert ids.tolist() == [1, 2, 3]
    assert widths.tolist() == [3, 3, 3]


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"a": 1}))
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json of the tokenizers library"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(FileNotFoundError, match=r"no such tokenizer .*did you mean .*tokenizer\.json"):
        load_tokenizer(tmp_path / "tokeniser.json")
    (tmp_path / "model").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer could be loaded from .*needs a tokenizer\.json"):
        load_tokenizer(tmp_path / "model")


def test_vocabulary_has_to_fit() -> None:
    check_vocabulary(ByteTokenizer(), 256)
    check_vocabulary(ByteTokenizer(), 300)
    with pytest.raises(ValueError, match=r"'bytes' has 256 ids, the model has 255. Give HopeConfig\(vocab_size=256\)"):
        check_vocabulary(ByteTokenizer(), 255)
