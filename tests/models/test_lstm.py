"""The LSTM keeps HopeLM's promises: one sequence read in any way, rows that never meet, states that are values."""

import pytest
import torch
from torch import Tensor

from nestlearn.models.lstm import LSTMLM
from nestlearn.optim import LevelOptimizer

State = dict[str, Tensor]

VOCABULARY = 11
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def build() -> LSTMLM:
    torch.manual_seed(0)
    return LSTMLM(VOCABULARY, 6, 2, hidden=5).double()


def random_tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_state(batch: int, seed: int = 2) -> State:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, batch, 2, 5, generator=generator, dtype=torch.float64)
    return {"hidden": draw[0].tanh(), "cell": draw[1]}


def row_of(state: State, row: int) -> State:
    return {name: value[row : row + 1] for name, value in state.items()}


def assert_same(found: State, expected: State) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, **TOLERANCE)


def read_alone(model: LSTMLM, tokens: Tensor, state: State) -> tuple[Tensor, State]:
    """One row, token by token."""
    logits = [torch.zeros(0, VOCABULARY, dtype=torch.float64)]
    for token in tokens:
        out, state = model(token[None, None], state)
        logits.append(out[0])
    return torch.cat(logits), state


@torch.no_grad()
def test_one_step_is_the_textbook_lstm() -> None:
    """Gates i, f, g, o: c <- f c + i g, h <- o tanh(c), layer above layer."""
    model, state = build(), random_state(3)
    token = torch.tensor([4, 0, 10])
    x = model.embedding(token)
    cells, hiddens = [], []
    for layer in range(2):
        h, c = state["hidden"][:, layer], state["cell"][:, layer]
        weights = {
            name: getattr(model.layers, f"{name}_l{layer}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        gates = x @ weights["weight_ih"].T + h @ weights["weight_hh"].T + weights["bias_ih"] + weights["bias_hh"]
        i, f, g, o = gates.chunk(4, dim=1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        x = o.sigmoid() * c.tanh()
        cells.append(c)
        hiddens.append(x)
    logits, after = model.decode_step(token, state)
    assert_close(logits, x @ model.head.weight.T)
    assert_same(after, {"hidden": torch.stack(hiddens, 1), "cell": torch.stack(cells, 1)})


@torch.no_grad()
def test_whole_equals_splits_equals_tokens() -> None:
    model = build()
    tokens = random_tokens(3, 13)
    logits, state = model(tokens)
    begun, _ = model(tokens, model.init_state(3))
    assert_close(begun, logits)
    for cuts in ([1, 6, 12], [4, 4, 8], [3]):
        pieces, running = [], None
        for piece in tokens.tensor_split(cuts, dim=1):
            out, running = model(piece, running)
            pieces.append(out)
        assert_close(torch.cat(pieces, dim=1), logits)
        assert running is not None
        assert_same(running, state)
    steps, running = [], model.init_state(3)
    for token in tokens.unbind(1):
        out, running = model.decode_step(token, running)
        steps.append(out)
    assert_close(torch.stack(steps, dim=1), logits)
    assert_same(running, state)


@torch.no_grad()
def test_right_padded_rows_are_as_if_alone() -> None:
    model = build()
    for lengths in ([9, 4, 0, 1], [0, 0, 0, 0], [3, 3, 3, 3]):
        tokens, state = random_tokens(4, 9), random_state(4)
        logits, after = model(tokens, state, lengths=torch.tensor(lengths))
        assert logits.shape == (4, 9, VOCABULARY)
        assert logits.isfinite().all()
        for row, length in enumerate(lengths):
            alone, expected = read_alone(model, tokens[row, :length], row_of(state, row))
            assert_close(logits[row, :length], alone)
            assert_same(row_of(after, row), expected)


@torch.no_grad()
def test_document_starts_are_fresh_contexts() -> None:
    model = build()
    lengths = torch.tensor([9, 9, 6, 4, 0, 9])
    starts = torch.zeros(6, 9, dtype=torch.bool)
    starts[0, 3] = starts[1, 0] = starts[1, 3] = starts[1, 8] = starts[2, 5] = True
    starts[2, 6] = starts[3, 4] = starts[4, 0] = True  # at padding: nothing begins there
    tokens, state = random_tokens(6, 9), random_state(6)
    logits, after = model(tokens, state, lengths=lengths, document_starts=starts)
    for row, length in enumerate(lengths.tolist()):
        cuts = [place for place in range(length) if starts[row, place]]
        expected, pieces = row_of(state, row), []
        for begin, end in zip([0, *cuts], [*cuts, length], strict=True):
            expected = model.init_state(1) if begin in cuts else expected
            alone, expected = read_alone(model, tokens[row, begin:end], expected)
            pieces.append(alone)
        assert_close(logits[row, :length], torch.cat(pieces))
        assert_same(row_of(after, row), expected)


@torch.no_grad()
def test_no_output_depends_on_a_later_token_or_another_row() -> None:
    model = build()
    tokens = random_tokens(2, 10)
    logits, _ = model(tokens)
    for place in (1, 5, 9):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % VOCABULARY
        other, _ = model(changed)
        assert torch.equal(other[0, :place], logits[0, :place])
        assert torch.equal(other[1], logits[1])
        assert (other[0, place] - logits[0, place]).abs().max() > 1e-3


def test_no_gradient_crosses_rows_or_comes_from_padding() -> None:
    model = build()
    state = {name: value.requires_grad_() for name, value in random_state(3).items()}
    starts = torch.zeros(3, 7, dtype=torch.bool)
    starts[1, 2] = True
    logits, after = model(random_tokens(3, 7), state, lengths=torch.tensor([7, 5, 0]), document_starts=starts)
    (logits[1, 4].sum() + after["cell"][2].sum()).backward()
    hidden, cell = state["hidden"].grad, state["cell"].grad
    assert hidden is not None
    assert cell is not None
    assert not hidden.any()
    assert not cell[:2].any(), "a row's gradient reached another, or went past the start of a document"
    assert torch.equal(cell[2], torch.ones_like(cell[2])), "a row without tokens passes its state on"
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name


@torch.no_grad()
def test_calls_repeat_and_change_nothing() -> None:
    model, tokens, state = build(), random_tokens(2, 7), random_state(2)
    starts = torch.zeros(2, 7, dtype=torch.bool)
    starts[0, 2] = True
    arguments = {"tokens": tokens, "lengths": torch.tensor([7, 3]), "document_starts": starts}
    kept = {name: value.clone() for name, value in (arguments | state).items()}
    first, after = model(**arguments, state=state)
    model.decode_step(tokens[:, 0], state)
    second, again = model(**arguments, state=state)
    assert torch.equal(first, second)
    assert all(torch.equal(after[name], again[name]) for name in after)
    assert all(torch.equal(kept[name], value) for name, value in (arguments | state).items())


@torch.no_grad()
def test_an_empty_call_changes_nothing() -> None:
    model, state = build(), random_state(2)
    logits, after = model(random_tokens(2, 0), state, lengths=torch.zeros(2, dtype=torch.int64))
    assert logits.shape == (2, 0, VOCABULARY)
    assert_same(after, state)


@torch.no_grad()
@pytest.mark.parametrize("lengths", [None, torch.tensor([6, 6])])
def test_a_full_batch_is_one_call_of_the_layers(lengths: Tensor | None) -> None:
    model = build()
    calls = []
    model.layers.register_forward_hook(lambda *_: calls.append(1))
    model(random_tokens(2, 6), lengths=lengths, document_starts=torch.zeros(2, 6, dtype=torch.bool))
    assert len(calls) == 1


def test_sizes() -> None:
    model = LSTMLM(VOCABULARY, 6, 2)
    state = model.init_state(3)
    assert {name: tuple(value.shape) for name, value in state.items()} == {"hidden": (3, 2, 6), "cell": (3, 2, 6)}
    layer = 4 * 6 * (6 + 6) + 2 * 4 * 6
    assert model.num_parameters() == 2 * layer + 2 * VOCABULARY * 6


def test_the_level_optimizer_trains_it() -> None:
    torch.manual_seed(0)
    model = LSTMLM(VOCABULARY, 8, 1)
    optimizer = LevelOptimizer.for_model(model, lr=1e-2)
    tokens = random_tokens(4, 10)
    losses = []
    for _ in range(60):
        logits, _ = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, r"tokens: expected whole numbers of shape \(B, T\)"),
        ({"tokens": torch.zeros(2, 3)}, "tokens: expected whole numbers .*float32"),
        ({"lengths": torch.tensor([1])}, r"lengths: expected one number a row, \(2,\), got shape \(1,\)"),
        ({"lengths": torch.tensor([1, 4])}, r"lengths: expected numbers from 0 to T = 3, got \[1, 4\]"),
        ({"document_starts": torch.zeros(2, 2, dtype=torch.bool)}, r"document_starts: expected the tokens' shape"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()(**{"tokens": random_tokens(2, 3), **settings})
    with pytest.raises(ValueError, match="depth: expected a whole number of at least 1, got 0"):
        LSTMLM(VOCABULARY, 6, 0)
