"""Filler is as long as it should be, begins and ends where it should, and comes from where it should."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from nestlearn.evaluation.tasks import IGNORED, Noise, Texts, WordVocabulary
from nestlearn.evaluation.tasks.haystacks import examples, fill, find_data_root, hide
from nestlearn.training.tokenizers import ByteTokenizer

# Every sentence has words of its own, so that a token tells where it comes from.
TALES = [
    "Alpha beta gamma.  Delta\nepsilon! Mr. Zeta told J. Eta of theta... “Iota kappa?” he said. Lambda mu (nu.) "
    "Xi omicron.",
    "Red orange yellow. Green blue indigo violet! Black white?",
]
SENTENCES = [
    ["alpha beta gamma .", "delta epsilon !", "mr . zeta told j . eta of theta . . .", "“ iota kappa ? ” he said .",
     "lambda mu ( nu . )", "xi omicron ."],
    ["red orange yellow .", "green blue indigo violet !", "black white ?"],
]  # fmt: skip


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def words() -> WordVocabulary:
    return WordVocabulary.count([*TALES, Noise.text], size=200)


def test_sentences_follow_each_other_and_end_where_the_reader_says() -> None:
    vocabulary = words()
    starts = set()
    generator = seeded()
    for _ in range(300):
        pieces = [vocabulary.decode(vocabulary.encode(s)) for s in islice(Texts(TALES).sentences(generator), 4)]
        starts.add(pieces[0])
        place = 0
        while place < len(pieces):
            tale = next(tale for tale in SENTENCES if pieces[place] in tale)
            rest = tale[tale.index(pieces[place]) :]
            # It reads on to the end of the document, and then goes somewhere else.
            assert pieces[place : place + len(rest)] == rest[: len(pieces) - place]
            place += len(rest)
    # A first sentence of a document has no end before it to start after.
    assert starts == {sentence for tale in SENTENCES for sentence in tale[1:]}


def test_every_character_is_as_likely_a_place() -> None:
    long, short = "Long here. " * 300, "Brief here. " * 30
    generator = seeded()
    firsts = [next(Texts([long, short]).sentences(generator)) for _ in range(400)]
    share = sum(sentence == "Brief here." for sentence in firsts) / 400
    assert 0.04 < share < 0.16  # 360 of 3660 characters


def test_noise_is_rulers_five_sentences() -> None:
    assert list(islice(Noise().sentences(seeded()), 7)) == [
        "The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.",
        "The grass is green.", "The sky is blue.",
    ]  # fmt: skip


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 17, 100])
@pytest.mark.parametrize("encoder", [words(), ByteTokenizer()], ids=["words", "bytes"])
def test_filler_has_the_wanted_tokens_and_ends_with_a_sentence(
    tokens: int, encoder: WordVocabulary | ByteTokenizer
) -> None:
    for seed in range(20):
        for haystack in (Noise(), Texts(TALES)):
            pieces = fill(haystack, encoder, tokens, seeded(seed))
            assert sum(map(len, pieces)) == tokens
            assert all(len(piece) for piece in pieces)
            whole = islice(haystack.sentences(seeded(seed)), 200)
            encoded = [encoder.encode(" " + s).tolist() for s in whole]
            # All but the first are whole sentences that follow each other; the first is the end of one.
            if pieces:
                assert any(
                    [p.tolist() for p in pieces[1:]] == encoded[begin + 1 : begin + len(pieces)]
                    and encoded[begin][-len(pieces[0]) :] == pieces[0].tolist()
                    for begin in range(len(encoded) - len(pieces) + 1)
                )


def test_filler_is_a_function_of_the_seed() -> None:
    def once(seed: int) -> list[int]:
        return np.concatenate(fill(Texts(TALES), words(), 40, seeded(seed))).tolist()

    assert once(1) == once(1)
    assert len({tuple(once(seed)) for seed in range(10)}) > 5


def test_refused_sentences_are_passed_over() -> None:
    vocabulary = words()
    kappa = int(vocabulary.encode("kappa")[0])
    for seed in range(20):
        pieces = fill(Texts(TALES), vocabulary, 60, seeded(seed), refuse=lambda ids: kappa in ids)
        assert kappa not in np.concatenate(pieces)
        assert sum(map(len, pieces)) == 60
    with pytest.raises(ValueError, match="empty or refused"):
        fill(Texts(TALES), vocabulary, 60, seeded(), refuse=lambda ids: True)


def test_hidden_pieces_keep_order_and_place() -> None:
    filler = [np.array([number]) for number in range(3)]
    pieces = [np.array([number]) for number in (10, 11, 12)]
    assert [int(x[0]) for x in hide(filler, pieces, [0, 2, 2])] == [10, 0, 1, 11, 12, 2]
    assert [int(x[0]) for x in hide(filler, pieces, [3, 3, 3])] == [0, 1, 2, 10, 11, 12]
    assert [int(x[0]) for x in hide([], pieces, [0, 0, 0])] == [10, 11, 12]


def test_answers_are_due_one_token_earlier() -> None:
    rows = [
        [(np.array([5, 6]), False), (np.array([7]), True), (np.array([8]), False), (np.array([9, 4]), True)],
        [(np.array([1, 2, 3, 4, 5]), False), (np.array([6]), True)],
    ]
    found = examples(rows, 6)
    assert found.tokens.tolist() == [[5, 6, 7, 8, 9, 4], [1, 2, 3, 4, 5, 6]]
    no = IGNORED
    assert found.targets.tolist() == [[no, 7, no, 9, 4, no], [no, no, no, no, 6, no]]
    assert found.lengths is None


def test_texts_without_sentences_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one with two sentences, got 2 without"):
        Texts(["no mark here", "one sentence."])


def test_text_is_read_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "tale.txt").write_text(TALES[1], encoding="utf-8")
    assert Texts.read(tmp_path / "tale.txt").documents == (TALES[1],)
    with pytest.raises(FileNotFoundError, match="tale"):
        Texts.read(tmp_path / "tail.txt")


def test_folder_of_data_is_the_argument_or_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLEARN_DATA", str(tmp_path))
    assert find_data_root() == tmp_path
    (tmp_path / "own").mkdir()
    assert find_data_root(tmp_path / "own") == tmp_path / "own"
    with pytest.raises(FileNotFoundError, match="folder of data sets"):
        find_data_root(tmp_path / "none")
    monkeypatch.delenv("NESTLEARN_DATA")
    with pytest.raises(FileNotFoundError, match="set NESTLEARN_DATA"):
        find_data_root()
    with pytest.raises(ValueError, match="side: expected 'train' or 'test', got 'valid'"):
        Texts.novels("valid", tmp_path)  # type: ignore[arg-type]


def test_sides_of_the_novels_share_no_novel(data_dir: Path) -> None:
    train, test = (Texts.novels(side, data_dir) for side in ("train", "test"))
    assert (len(train.documents), len(test.documents)) == (91, 4)
    assert not set(train.documents) & set(test.documents)


def test_filler_of_novels_holds_no_needle(data_dir: Path) -> None:
    novels = Texts.novels("test", data_dir)
    vocabulary = WordVocabulary.count(novels.documents, size=4000, also=["special magic"])
    pieces = fill(novels, vocabulary, 50_000, seeded())
    assert sum(map(len, pieces)) == 50_000
    assert "special magic" not in vocabulary.decode(np.concatenate(pieces).tolist())
    lengths = [len(piece) for piece in pieces]
    assert 8 < np.mean(lengths) < 40  # about what sentences of novels have
