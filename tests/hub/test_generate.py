"""`generate` of transformers: whatever way a text is read, and whoever is beside it, it is continued the same."""

from __future__ import annotations

import copy
import logging
import warnings
from typing import Any

import pytest
import torch
from hope_models import MIXERS, padded, small_model, text
from torch import Tensor
from transformers import DynamicCache, TextIteratorStreamer

from cache_name import CACHE
from nestlearn.hub import HopeCache, HopeForCausalLM, cache_to_state, state_to_cache, to_transformers
from nestlearn.training.tokenizers import ByteTokenizer

ROWS = [text(5, seed=1), text(11, seed=2), text(8, seed=3), text(1, seed=4)]


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    # Right padding, which is tested here, is warned of as if it did harm.
    caplog.set_level(logging.ERROR, logger="transformers")


def go_on(model: HopeForCausalLM, ids: Tensor, mask: Tensor | None = None, **settings: Any) -> Tensor:
    """The tokens that follow."""
    settings = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0, **settings}
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]


@pytest.mark.parametrize("mixer", MIXERS)
def test_greedy_is_the_same_however_the_text_is_read(mixer: str) -> None:
    model = small_model(mixer)
    prompt = text(2, 7)
    cached = go_on(model, prompt)
    assert torch.equal(cached, go_on(model, prompt, use_cache=False))
    assert torch.equal(cached, go_on(model, prompt, cache=HopeCache(), prefill_chunk_size=1))
    with torch.no_grad():
        state, token, found = None, prompt[:, 0], []
        for place in range(prompt.shape[1] + cached.shape[1] - 1):
            logits, state = model.lm.decode_step(token, state)
            token = prompt[:, place + 1] if place + 1 < prompt.shape[1] else logits.argmax(-1)
            found.append(token)
    assert torch.equal(cached, torch.stack(found, 1)[:, prompt.shape[1] - 1 :])
    assert len(set(cached.flatten().tolist())) > 2, "a model that repeats itself shows nothing"


@pytest.mark.parametrize("mixer", MIXERS)
def test_beams_are_the_same_however_the_text_is_read(mixer: str) -> None:
    model = small_model(mixer)
    prompt = text(2, 7)
    cached = go_on(model, prompt, num_beams=3)
    assert torch.equal(cached, go_on(model, prompt, num_beams=3, use_cache=False))
    assert torch.equal(cached, go_on(model, prompt, num_beams=3, cache=HopeCache(), prefill_chunk_size=1))


def test_beams_find_what_greedy_misses() -> None:
    # Otherwise the test above could pass with beams that are all the same.
    differ = 0
    for mixer in MIXERS:
        model = small_model(mixer)
        differ += not torch.equal(*(go_on(model, ROWS[1][None], num_beams=beams) for beams in (1, 4)))
    assert differ > 2


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mixer", MIXERS)
def test_each_row_of_a_padded_batch_goes_on_as_if_alone(mixer: str, side: str) -> None:
    model = small_model(mixer)
    ids, mask = padded(ROWS, side)
    for beams in (1, 2):
        alone = torch.cat([go_on(model, row[None], num_beams=beams) for row in ROWS])
        assert torch.equal(alone, go_on(model, ids, mask, num_beams=beams))
    assert torch.equal(go_on(model, ids, mask), go_on(model, ids, mask, use_cache=False))


@pytest.mark.parametrize("mixer", MIXERS)
def test_logits_of_a_padded_batch_are_those_of_each_row_alone(mixer: str) -> None:
    model = small_model(mixer).double()
    rows = [text(length, seed=length) for length in (3, 13, 8)]
    for side in ("left", "right"):
        ids, mask = padded(rows, side)
        cut = 6  # a row may have nothing but padding before it
        with torch.no_grad():
            first = model(ids[:, :cut], attention_mask=mask[:, :cut])
            second = model(ids[:, cut:], attention_mask=mask, cache=getattr(first, CACHE))
            logits = torch.cat([first.logits, second.logits], 1)
            for row, got, held in zip(rows, logits, mask, strict=True):
                torch.testing.assert_close(got[held.bool()], model(row[None]).logits[0], rtol=0, atol=1e-10)


def test_what_stands_at_padding_does_not_matter() -> None:
    model = small_model("self_modifying_titans")
    ids, mask = padded(ROWS, "left")
    filled = torch.where(mask.bool(), ids, 10**6)
    assert torch.equal(model(ids, attention_mask=mask).logits, model(filled, attention_mask=mask).logits)


@pytest.mark.parametrize("mixer", MIXERS)
def test_sampling_is_reproducible_by_its_seed(mixer: str) -> None:
    model = small_model(mixer)

    def sample(seed: int, **settings: Any) -> Tensor:
        torch.manual_seed(seed)
        return go_on(model, text(2, 7), do_sample=True, temperature=1.5, top_k=0, **settings)

    assert torch.equal(sample(3), sample(3))
    assert torch.equal(sample(3), sample(3, use_cache=False))
    assert not torch.equal(sample(3), sample(4))


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "tnt", "attention"])
def test_eight_conversations_of_twenty_turns_in_one_batch_answer_as_if_alone(mixer: str) -> None:
    model = small_model(mixer)
    lengths = torch.randint(1, 6, (20, 8), generator=torch.Generator().manual_seed(5)).tolist()
    said = [[text(n, seed=100 * turn + row) for row, n in enumerate(line)] for turn, line in enumerate(lengths)]
    cache, ids, mask = HopeCache(), torch.zeros(8, 0, dtype=torch.long), torch.zeros(8, 0, dtype=torch.long)
    together = []
    for turn, rows in enumerate(said):
        new, held = padded(rows, "left" if turn % 2 else "right")
        ids, mask = torch.cat([ids, new], 1), torch.cat([mask, held], 1)
        answer = go_on(model, ids, mask, cache=cache, max_new_tokens=3)
        ids, mask = torch.cat([ids, answer], 1), torch.cat([mask, torch.ones_like(answer)], 1)
        together.append(answer)
    for row in range(8):
        own, alone = torch.zeros(1, 0, dtype=torch.long), HopeCache()
        for turn, rows in enumerate(said):
            own = torch.cat([own, rows[row][None]], 1)
            answer = go_on(model, own, cache=alone, max_new_tokens=3)
            own = torch.cat([own, answer], 1)
            assert torch.equal(answer[0], together[turn][row]), f"turn {turn} of conversation {row}"
    # The cache held all there was: the last answer follows from the whole text too.
    before = own[:, : -answer.shape[1]]
    assert torch.equal(answer, go_on(model, before, max_new_tokens=3, use_cache=False))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_cache_does_not_grow_except_with_attention(mixer: str) -> None:
    model = small_model(mixer)
    sizes = []
    for count in (10, 100):
        cache = HopeCache()
        go_on(model, text(1, 5), cache=cache, max_new_tokens=count)
        state = cache_to_state(cache)
        assert state is not None
        sizes.append(sum(tensor.nbytes for tensor in state.values()))
        assert cache.get_seq_length() == 5 + count - 1
    assert (sizes[0] == sizes[1]) == ("attention" not in mixer or mixer == "linear_attention")


def test_a_copied_cache_is_continued_twice() -> None:
    model = small_model("self_modifying_titans")
    prompt = text(2, 9)
    cache = HopeCache()
    with torch.no_grad():
        model(prompt, cache=cache)
    for seed in (1, 2):
        more = torch.cat([prompt, text(2, 4, seed=seed)], 1)
        assert torch.equal(go_on(model, more, cache=copy.deepcopy(cache)), go_on(model, more))
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("mixer", MIXERS)
def test_a_cache_stays_as_it_is_where_none_is_to_be_kept(mixer: str, tokens: int) -> None:
    model = small_model(mixer)
    with torch.no_grad():
        cache = getattr(model(text(2, 12)), CACHE)
        before = {name: tensor.clone() for name, tensor in (cache_to_state(cache) or {}).items()}
        model(text(2, tokens, seed=1), cache=cache, use_cache=False)
    after = cache_to_state(cache) or {}
    assert cache.get_seq_length() == 12
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("mixer", MIXERS)
def test_cache_and_state_are_the_same_thing(mixer: str) -> None:
    model = small_model(mixer)
    with torch.no_grad():
        logits, state = model.lm(text(3, 9))
        output = model(text(3, 9))
        back = cache_to_state(state_to_cache(state, 9))
        assert back is not None
        assert list(back) == list(state)
        assert all(back[name] is tensor for name, tensor in state.items())
        theirs = cache_to_state(getattr(output, CACHE))
        assert theirs is not None
        assert all(torch.equal(theirs[name], tensor) for name, tensor in state.items())
        assert torch.equal(output.logits, logits)
        again = model(text(3, 4, seed=7), cache=state_to_cache(state, 9)).logits
        torch.testing.assert_close(again, model.lm(text(3, 4, seed=7), state)[0], rtol=0, atol=0)
    rows = torch.tensor([2, 0, 0])
    cache = state_to_cache(state, 9)
    cache.reorder_cache(rows)
    moved = cache_to_state(cache)
    assert moved is not None
    assert all(torch.equal(moved[name], tensor[rows]) for name, tensor in state.items())


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_cache_may_come_under_either_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: logging.Logger, message: str, *args: Any) -> None:
        raise AssertionError(f"transformers complains: {message}")

    monkeypatch.setattr(logging.Logger, "warning_once", refuse)
    model = small_model("self_modifying_titans")
    prompt = text(2, 9)
    whole, expected = model(prompt).logits, go_on(model, prompt)
    begun = getattr(model(prompt[:, :5]), CACHE)
    torch.testing.assert_close(model(prompt[:, 5:], **{name: copy.deepcopy(begun)}).logits, whole[:, 5:])
    assert torch.equal(go_on(model, prompt, **{name: copy.deepcopy(begun)}), expected)
    assert torch.equal(go_on(model, prompt, cache=None, past_key_values=None), expected)
    assert torch.equal(go_on(model, prompt, cache=begun, past_key_values=begun), expected)
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="got another one as past_key_values"):
            call(prompt, cache=begun, past_key_values=HopeCache())
    with pytest.raises(ValueError, match="takes no cache_params"):
        model(prompt, cache_params=begun)


def test_streaming_gives_the_text_that_is_returned() -> None:
    tokenizer = to_transformers(ByteTokenizer())
    model = small_model("self_modifying_titans", vocab_size=256)
    prompt = tokenizer("Ā text", return_tensors="pt")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = model.generate(**prompt, streamer=streamer, max_new_tokens=40, do_sample=False)
    pieces = list(streamer)
    assert "".join(pieces) == tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :])
    assert len(pieces) > 1


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "plain_attention"])
def test_assisted_decoding_is_refused(mixer: str) -> None:
    model = small_model(mixer)
    for settings in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": small_model(mixer)}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            go_on(model, text(1, 7), **settings)


def test_packed_documents_are_read_as_if_apart() -> None:
    model = small_model("self_modifying_titans").double()
    documents = [text(5, seed=1), text(9, seed=2), text(3, seed=3)]
    ids = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(document)) for document in documents])[None]
    apart = torch.cat([model(document[None]).logits[0] for document in documents])
    for told in ({"position_ids": positions}, {"document_starts": positions == 0}):
        torch.testing.assert_close(model(ids, **told).logits[0], apart, rtol=0, atol=1e-10)
        first, second = [{name: value[:, part] for name, value in told.items()} for part in (slice(7), slice(7, None))]
        begun = model(ids[:, :7], **first)
        rest = model(ids[:, 7:], cache=getattr(begun, CACHE), **second).logits
        torch.testing.assert_close(rest[0], apart[7:], rtol=0, atol=1e-10)


def test_only_the_logits_that_are_kept_are_made() -> None:
    model = small_model("gated_delta_net")
    ids, mask = padded(ROWS, "left")
    whole = model(ids, attention_mask=mask).logits
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=1).logits, whole[:, -1:])
    chosen = torch.tensor([4, 9])
    assert torch.equal(model(ids, attention_mask=mask, logits_to_keep=chosen).logits, whole[:, chosen])


def test_what_cannot_be_done_is_refused() -> None:
    model = small_model("delta_net")
    ids = text(1, 7)
    for settings, says in (
        ({"cache": DynamicCache()}, "expected a HopeCache, got DynamicCache"),
        ({"attention_mask": torch.ones(1, 5)}, "attention_mask: expected one number a token"),
        ({"attention_mask": torch.ones(1, 1, 7, 7)}, "document_starts or position_ids"),
        ({"output_attentions": True}, "output_attentions: Hope records none"),
        ({"inputs_embeds": torch.zeros(1, 7, 16)}, "takes no inputs_embeds"),
        ({"position_ids": torch.arange(5)}, "position_ids: expected one number a token"),
    ):
        with pytest.raises(ValueError, match=says):
            model(ids, **settings)
    with pytest.raises(ValueError, match="takes no inputs_embeds"):
        model.generate(inputs_embeds=torch.zeros(1, 7, 16), max_new_tokens=2)
    cache = HopeCache()
    model(ids, cache=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(2)
    cache.reset()
    assert cache_to_state(cache) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert getattr(model(ids, use_cache=False), CACHE) is None
