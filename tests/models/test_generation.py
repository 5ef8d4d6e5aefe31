"""Sampling and generation: what is drawn from, that the carried state changes nothing, and streaming of text."""

import pytest
import torch

from nestlearn import HopeConfig, HopeLM
from nestlearn.models.generation import Sampling, TextStream, generate, probabilities
from nestlearn.training.tokenizers import ByteTokenizer


def small_model(mixer: str = "self_modifying_titans") -> HopeLM:
    torch.manual_seed(0)
    model = HopeLM(HopeConfig(vocab_size=11, dim=16, depth=2, heads=2, mixer=mixer, chunk_size=4)).double()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 0.0}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 1.0}, [0.2, 0.4, 0.1, 0.3]),
        ({"temperature": 0.5}, [4 / 30, 16 / 30, 1 / 30, 9 / 30]),
        ({"temperature": 1.0, "top_k": 2}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"temperature": 1.0, "top_k": 9}, [0.2, 0.4, 0.1, 0.3]),
        ({"temperature": 1.0, "top_p": 0.39}, [0.0, 1.0, 0.0, 0.0]),
        ({"temperature": 1.0, "top_p": 0.41}, [0.0, 4 / 7, 0.0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.75}, [2 / 9, 4 / 9, 0.0, 3 / 9]),
        ({"temperature": 1.0, "top_k": 1, "top_p": 0.9}, [0.0, 1.0, 0.0, 0.0]),
    ],
    ids=str,
)
def test_probabilities(settings: dict, expected: list[float]) -> None:
    logits = torch.tensor([[0.2, 0.4, 0.1, 0.3]], dtype=torch.float64).log() + 3
    torch.testing.assert_close(probabilities(logits, Sampling(**settings)), torch.tensor([expected]).double())


def test_ties_at_a_border_are_broken_by_number() -> None:
    assert probabilities(torch.zeros(1, 4), Sampling(top_k=2)).tolist() == [[0.5, 0.5, 0.0, 0.0]]


@pytest.mark.parametrize("mixer", ["self_modifying_titans", "plain_attention", "delta_net"])
def test_greedy_equals_reading_the_whole_text_again(mixer: str) -> None:
    model, prompt = small_model(mixer), torch.tensor([[1, 2, 3, 4, 5], [7, 7, 1, 0, 2]])
    text = prompt
    for _ in range(9):
        logits, _ = model(text)
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    made = torch.stack(list(generate(model, prompt, 9, Sampling(temperature=0.0))), dim=1)
    assert made.tolist() == text[:, 5:].tolist()
    assert len(set(made.flatten().tolist())) > 1


def test_a_seed_gives_one_text_and_another_seed_another() -> None:
    model, prompt = small_model(), torch.tensor([[1, 2, 3]])

    def text(seed: int) -> list[int]:
        return [int(token) for token in generate(model, prompt, 20, Sampling(temperature=2.0, seed=seed))]

    assert text(3) == text(3)
    assert text(3) != text(4)
    assert len(text(3)) == 20


def test_samples_follow_the_probabilities() -> None:
    model, prompt = small_model(), torch.tensor([[1, 2, 3]]).expand(4000, 3)
    (drawn,) = generate(model, prompt, 1, Sampling(temperature=1.0, seed=1))
    expected = probabilities(model(prompt[:1])[0][0, -1], Sampling(temperature=1.0))
    # Four standard deviations of a frequency among 4,000.
    assert (torch.bincount(drawn, minlength=11) / 4000 - expected).abs().max() < 4 * (0.25 / 4000) ** 0.5


def test_nothing_to_generate() -> None:
    assert list(generate(small_model(), torch.tensor([[1]]), 0)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature.*got -1"),
        ({"temperature": float("nan")}, "temperature.*got nan"),
        ({"top_k": -1}, "top_k.*got -1"),
        ({"top_p": 0.0}, "top_p.*got 0"),
        ({"top_p": 1.5}, "top_p.*got 1.5"),
        ({"seed": -1}, "seed.*got -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**settings)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        next(generate(small_model(), torch.zeros(1, 0, dtype=torch.long), 3))
    with pytest.raises(ValueError, match="max_tokens"):
        next(generate(small_model(), torch.tensor([[1]]), -3))


TEXTS = ["plain", "naïve café", "日本語 text", "🙂🙃 mixed é\n", "e\u0301 combined"]


@pytest.mark.parametrize("text", TEXTS)
def test_stream_shows_whole_characters_only(text: str) -> None:
    tokenizer = ByteTokenizer()
    stream = TextStream(tokenizer.decode)
    pieces = [stream.push(int(token)) for token in tokenizer.encode(text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + stream.end() == text
    assert all(len(piece) <= 1 for piece in pieces)


def test_stream_of_bytes_that_are_no_text_ends() -> None:
    tokenizer = ByteTokenizer()
    ids = [0x61, *[0xFF] * 20, 0x62, 0xE2, 0x82]
    stream = TextStream(tokenizer.decode)
    text = "".join(stream.push(token) for token in ids) + stream.end()
    assert text == tokenizer.decode(ids)
    assert stream.end() == ""
