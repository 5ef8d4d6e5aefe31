"""Batches are a pure function of seed and step, and every token is learnt at its place."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.training.data import (
    IGNORED,
    Batch,
    ByteTokenizer,
    PackedTokens,
    TokenizedDocuments,
    tokenize_documents,
)


def numbered(lengths: list[int], *, token_bytes: bool = False) -> TokenizedDocuments:
    """Documents whose tokens are the numbers 0, 1, 2, ...: a token tells where it comes from."""
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.arange(starts[-1], dtype=np.uint16)
    return TokenizedDocuments(
        tokens=tokens, starts=starts, token_bytes=(tokens % 7).astype(np.uint8) if token_bytes else None
    )


def check_rows(batch: Batch, documents: TokenizedDocuments) -> None:
    """Every row holds runs of consecutive tokens that begin at a document's start or the row's."""
    begins = set(documents.starts[:-1].tolist())
    lasts = set((documents.starts[1:] - 1).tolist())
    for tokens, targets, document_starts in zip(*(tensor.tolist() for tensor in batch[:3]), strict=True):
        for place, (token, target, start) in enumerate(zip(tokens, targets, document_starts, strict=True)):
            assert start == (token in begins)
            assert target == (IGNORED if token in lasts else token + 1)
            if place and not start:
                assert token == tokens[place - 1] + 1


LENGTHS = st.lists(st.integers(1, 12), min_size=1, max_size=12)


@given(lengths=LENGTHS, sequence_length=st.integers(1, 9), seed=st.integers(0, 9), data=st.data())
def test_epoch_has_every_token_at_most_once(
    lengths: list[int], sequence_length: int, seed: int, data: st.DataObject
) -> None:
    documents = numbered(lengths)
    packed = PackedTokens(documents, sequence_length=sequence_length, seed=seed)
    windows = documents.num_tokens // sequence_length
    assert packed.windows_per_epoch == windows
    if windows == 0:
        return
    epoch = data.draw(st.integers(0, 3))
    rows = [packed.batch(step, 1) for step in range(epoch * windows, (epoch + 1) * windows)]
    for row in rows:
        assert row.tokens.shape == (1, sequence_length)
        check_rows(row, documents)
    tokens = Counter(token for row in rows for token in row.tokens.flatten().tolist())
    targets = Counter(token for row in rows for token in row.targets.flatten().tolist() if token != IGNORED)
    assert max(tokens.values()) == 1
    assert max(targets.values(), default=1) == 1
    assert sum(tokens.values()) == windows * sequence_length


@given(lengths=LENGTHS, per_rank=st.integers(1, 3), world_size=st.integers(1, 4), step=st.integers(0, 50))
def test_ranks_share_the_batch_of_one_process(lengths: list[int], per_rank: int, world_size: int, step: int) -> None:
    packed = PackedTokens(numbered(lengths), sequence_length=1, seed=3)
    size = per_rank * world_size
    whole = packed.batch(step, size)
    shares = [packed.batch(step, size, rank, world_size) for rank in range(world_size)]
    for field in range(3):
        assert torch.equal(whole[field], torch.cat([share[field] for share in shares]))


def test_batch_is_a_pure_function_of_seed_and_step() -> None:
    documents = numbered([5, 40, 3, 17, 90, 1, 30])
    packed = PackedTokens(documents, sequence_length=8, seed=1)
    in_order = [packed.batch(step, 3) for step in range(40)]
    assert packed.windows_per_epoch < 40, "several epochs"
    for step in reversed(range(40)):
        fresh = PackedTokens(documents, sequence_length=8, seed=1).batch(step, 3)
        for again in (fresh, packed.batch(step, 3)):
            assert all(torch.equal(a, b) for a, b in zip(again, in_order[step], strict=True))
    other = PackedTokens(documents, sequence_length=8, seed=2)
    assert any(not torch.equal(other.batch(step, 3).tokens, in_order[step].tokens) for step in range(5))


def test_rows_do_not_depend_on_how_they_are_batched() -> None:
    packed = PackedTokens(numbered([5, 40, 3, 17]), sequence_length=4, seed=1)
    rows = torch.cat([packed.batch(step, 1).tokens for step in range(48)])
    assert torch.equal(rows, torch.cat([packed.batch(step, 6).tokens for step in range(8)]))


def test_epochs_differ_in_documents_cuts_and_windows() -> None:
    packed = PackedTokens(numbered([101] * 5), sequence_length=10, seed=0)
    first, second = (torch.cat([packed.batch(epoch * 50 + step, 1).tokens for step in range(50)]) for epoch in range(2))
    assert not torch.equal(first, second)
    assert {tuple(row) for row in first.tolist()} != {tuple(row) for row in second.tolist()}
    # A batch is not ten neighbours from one document.
    documents_of_batch = {token // 101 for token in first[:10].flatten().tolist()}
    assert len(documents_of_batch) > 2
    # One document alone: the cuts move, so the same tokens are not left out for ever.
    alone = PackedTokens(numbered([109]), sequence_length=10, seed=0)
    seen = {token for step in range(200) for token in alone.batch(step, 1).tokens.flatten().tolist()}
    assert seen == set(range(109))


def test_batch_types_and_device() -> None:
    batch = PackedTokens.from_texts(["héllo", "wörld"], ByteTokenizer(), sequence_length=4).batch(0, 2)
    assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert batch.document_starts.dtype == torch.bool
    moved = batch.to("meta")
    assert isinstance(moved, Batch)
    assert all(tensor.device.type == "meta" for tensor in moved)
    assert int(batch.tokens.max()) < 256


@given(
    lengths=LENGTHS.filter(lambda lengths: max(lengths) > 1),
    sequence_length=st.integers(1, 20),
    batch_size=st.integers(1, 5),
    world_size=st.integers(1, 3),
    token_bytes=st.booleans(),
)
def test_evaluation_covers_every_target_once(
    lengths: list[int], sequence_length: int, batch_size: int, world_size: int, token_bytes: bool
) -> None:
    documents = numbered(lengths, token_bytes=token_bytes)
    packed = PackedTokens(documents, sequence_length=sequence_length, seed=5)
    batches = [
        batch
        for rank in range(world_size)
        for batch in packed.evaluation_batches(batch_size, rank=rank, world_size=world_size)
    ]
    targets: list[int] = []
    for batch in batches:
        assert batch.tokens.shape[0] <= batch_size
        found = [target for target in batch.targets.flatten().tolist() if target != IGNORED]
        assert batch.num_targets == len(found)
        assert batch.num_bytes == (sum(target % 7 for target in found) if token_bytes else len(found))
        targets += found
    assert sorted(targets) == sorted(set(range(documents.num_tokens)) - set(documents.starts[:-1].tolist()))


def test_evaluation_is_in_order_and_pads_the_end() -> None:
    packed = PackedTokens(numbered([3, 4]), sequence_length=5)
    first, second = packed.evaluation_batches(1)
    assert first.tokens.tolist() == [[0, 1, 2, 3, 4]]
    assert first.targets.tolist() == [[1, 2, IGNORED, 4, 5]]
    assert first.document_starts.tolist() == [[True, False, False, True, False]]
    assert second.tokens.tolist() == [[5, 6, 0, 0, 0]]
    assert second.targets.tolist() == [[6, IGNORED, IGNORED, IGNORED, IGNORED]]
    assert second.document_starts.tolist() == [[False, False, True, False, False]]
    assert (second.num_targets, second.num_bytes) == (1, 1)
    assert second.to("meta").num_bytes == 1
    (both,) = packed.evaluation_batches(8)
    assert both.tokens.tolist() == first.tokens.tolist() + second.tokens.tolist()


def test_evaluation_of_less_is_spread_over_the_corpus() -> None:
    packed = PackedTokens(numbered([1000]), sequence_length=10)
    starts = [int(row[0]) for batch in packed.evaluation_batches(3, max_tokens=59) for row in batch.tokens]
    assert starts == [0, 200, 400, 600, 800]
    assert sum(batch.num_targets for batch in packed.evaluation_batches(3, max_tokens=1)) == 10
    everything = sum(batch.num_targets for batch in packed.evaluation_batches(3, max_tokens=10**9))
    assert everything == 999


def test_bytes_of_all_targets_are_the_text_less_the_first_tokens() -> None:
    texts = ["naïve", "東京", "x"]
    packed = PackedTokens.from_texts(texts, ByteTokenizer(), sequence_length=4)
    total = sum(batch.num_bytes for batch in packed.evaluation_batches(2))
    assert packed.documents.num_bytes == sum(len(text.encode()) for text in texts)
    assert total == packed.documents.num_bytes - len(texts)


class Words:
    """Splits at blanks; ids above a byte's; each token owns its blank."""

    spec, vocab_size = "words", 70_000

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        words = text.split()
        ids = np.array([66_000 + len(word) for word in words], dtype=np.uint32)
        return ids, np.array([len(word.encode()) + 1 for word in words], dtype=np.int64)


def test_tokenizing_keeps_small_types_and_drops_what_is_empty() -> None:
    tokenizer = Words()
    documents = tokenize_documents(["a bb", "", " ", "é " + "c" * 300], tokenizer)  # type: ignore[arg-type]
    assert documents.tokens.dtype == np.uint32
    assert documents.tokens.tolist() == [66_001, 66_002, 66_001, 66_300]
    assert documents.starts.tolist() == [0, 2, 4]
    assert documents.token_bytes is not None
    assert documents.token_bytes.dtype == np.uint16
    assert documents.token_bytes.tolist() == [2, 3, 3, 301]
    assert (documents.num_documents, documents.num_tokens, documents.num_bytes) == (2, 4, 309)
    plain = tokenize_documents(["ab", "", "é"], ByteTokenizer())
    assert plain.tokens.dtype == np.uint8
    assert plain.token_bytes is None
    assert plain.starts.tolist() == [0, 2, 4]


def test_fingerprint_tells_corpora_apart() -> None:
    texts = [["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "d"]]
    prints = [tokenize_documents(documents, ByteTokenizer()).fingerprint() for documents in texts]
    assert len(set(prints)) == 4
    assert tokenize_documents(texts[0], ByteTokenizer()).fingerprint() == prints[0]


def test_errors_teach() -> None:
    with pytest.raises(ValueError, match="the corpus is empty"):
        tokenize_documents(["", ""], ByteTokenizer())
    short = PackedTokens(numbered([3, 4]), sequence_length=8)
    with pytest.raises(ValueError, match=r"has 7 tokens, fewer than one sequence of 8\. Give more text or a smaller"):
        short.batch(0, 1)
    packed = PackedTokens(numbered([3, 40]), sequence_length=8)
    for call, message in [
        (lambda: PackedTokens(numbered([3]), sequence_length=0), "sequence_length: expected at least 1, got 0"),
        (lambda: PackedTokens(numbered([3]), sequence_length=1, seed=-1), "seed: expected at least 0, got -1"),
        (lambda: packed.batch(-1, 1), "step: expected at least 0, got -1"),
        (lambda: packed.batch(0, 0), "batch_size: expected a positive multiple of world_size 1, got 0"),
        (lambda: packed.batch(0, 3, 0, 2), "batch_size: expected a positive multiple of world_size 2, got 3"),
        (lambda: packed.batch(0, 2, 2, 2), "rank: expected 0 <= rank < world_size, got rank 2 of world_size 2"),
        (lambda: next(packed.evaluation_batches(0)), "batch_size: expected at least 1, got 0"),
        (lambda: next(packed.evaluation_batches(1, 0)), "max_tokens: expected at least 1, got 0"),
        (lambda: next(packed.evaluation_batches(1, rank=1)), "rank: expected 0 <= rank < world_size"),
        (
            lambda: next(PackedTokens(numbered([1, 1]), sequence_length=1).evaluation_batches(1)),
            "every document has one token",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("starts", [[0], [0, 2, 2, 4], [1, 4], [0, 3], [0, 5, 4]])
def test_tokenized_documents_are_checked(starts: list[int]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TokenizedDocuments(tokens=np.zeros(4, dtype=np.uint8), starts=np.array(starts, dtype=np.int64))
    with pytest.raises(ValueError, match="token_bytes: expected"):
        TokenizedDocuments(
            tokens=np.zeros(4, dtype=np.uint8), starts=np.array([0, 4]), token_bytes=np.ones(3, dtype=np.uint8)
        )
