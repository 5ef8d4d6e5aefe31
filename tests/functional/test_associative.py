"""The rule itself: the chunked form against the token loop, and the methods of the paper as instances of it."""

from itertools import product

import pytest
import torch
from torch import Tensor

from nestlearn.functional import associative_recurrence, associative_update
from nestlearn.functional.associative import AssociativeOutput

LENGTHS = (1, 2, 63, 64, 65, 100, 1000)
CHUNKS = (1, 16, 64)
BATCH, KEY, VALUE = 2, 4, 3
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4}


def inputs(tokens: int, *, momentum: bool, reference: bool, strongest_decay: float, seed: int = 0) -> dict[str, Tensor]:
    """Random inputs in float64, retention spread from `strongest_decay` a token to nearly 1."""
    torch.manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(BATCH, tokens, dtype=torch.float64)

    keys = normal(tokens, KEY)
    lowest = torch.tensor(strongest_decay).double().log().item()
    tensors = {
        "memory": normal(VALUE, KEY),
        "keys": keys / keys.norm(dim=-1, keepdim=True),
        "values": normal(tokens, VALUE),
        "queries": normal(tokens, KEY),
        "log_retain": lowest * uniform(0, 1) ** 3,
        "erase": uniform(0, 1),
        "write": uniform(0, 1),
    }
    if momentum:
        tensors |= {"log_momentum": uniform(0.05, 0.98).log(), "momentum_state": normal(VALUE, KEY)}
    if reference:
        tensors |= {"reference": normal(VALUE, KEY)}
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def everything(tensors: dict[str, Tensor], row: int | None = None, **options: object) -> dict[str, Tensor]:
    """Outputs, memory, momentum, and the gradient of every input for cotangents that depend on the shape alone.

    row: with it, the tensors stand for this row of two.
    """
    result = associative_recurrence(**tensors, **options)  # type: ignore[arg-type]
    named = {name: value for name, value in result._asdict().items() if value is not None}
    generator = torch.Generator().manual_seed(5)
    cotangents = []
    for value in named.values():
        shape = value.shape if row is None else (2, *value.shape)
        drawn = torch.randn(shape, dtype=torch.float64, generator=generator).to(value.dtype)
        cotangents.append(drawn if row is None else drawn[row])
    gradients = torch.autograd.grad(
        list(named.values()), list(tensors.values()), cotangents, allow_unused=True, materialize_grads=True
    )
    return named | {f"gradient of {name}": g for name, g in zip(tensors, gradients, strict=True)}


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, reference in expected.items():
        assert found[name].shape == reference.shape
        assert reference.isfinite().all()
        largest = reference.abs().max().item()
        error = (found[name].double() - reference).abs().max().item() / (largest if largest > 1e-12 else 1.0)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("read", ["token", "previous"])
@pytest.mark.parametrize("momentum", [False, True])
def test_chunked_equals_recurrent(momentum: bool, read: str, tokens: int) -> None:
    """Outputs, memory, momentum and all gradients, with and without a reference, in both precisions.

    The slow loop runs once: (with and without reference, mild and strong decay) lie in two leading dimensions.
    """
    decays = [inputs(tokens, momentum=momentum, reference=True, strongest_decay=decay) for decay in (0.9, 0.01)]
    both = {name: torch.stack([d[name].detach() for d in decays]) for name in decays[0]}
    four = {name: torch.stack([value, value]) for name, value in both.items()}
    four["reference"][0] = 0
    expected = everything({name: value.requires_grad_() for name, value in four.items()}, read=read, form="recurrent")
    for with_reference, chunk_size, dtype in product((False, True), CHUNKS, TOLERANCE):
        if chunk_size == 1 and tokens == 1000 and not (with_reference and read == "token" and dtype == torch.float64):
            continue  # a thousand chunks of one token are as slow as the loop: once is enough
        tensors = {name: value.to(dtype).requires_grad_() for name, value in both.items()}
        if not with_reference:
            del tensors["reference"]
        found = everything(tensors, row=int(with_reference), read=read, chunk_size=chunk_size)
        assert all(value.dtype == dtype for value in found.values())
        assert_near(found, {name: expected[name][int(with_reference)] for name in found}, TOLERANCE[dtype])


def test_the_recurrent_form_is_the_written_recurrence() -> None:
    """One row, element by element, in plain numbers."""
    tensors = inputs(5, momentum=True, reference=True, strongest_decay=0.5)
    one = {name: tensor.detach()[0] for name, tensor in tensors.items()}
    found = associative_recurrence(**one, form="recurrent")  # type: ignore[arg-type]
    before = associative_recurrence(**one, form="recurrent", read="previous")  # type: ignore[arg-type]
    memory, moment = one["memory"].clone(), one["momentum_state"].clone()
    assert found.outputs is not None
    assert before.outputs is not None
    for t in range(5):
        k, v, q = one["keys"][t], one["values"][t], one["queries"][t]
        torch.testing.assert_close(before.outputs[t], memory.mv(q))
        erased = (memory - one["reference"]).mv(k)
        moment = one["log_momentum"][t].exp() * moment + one["write"][t] * torch.outer(v, k)
        memory = one["log_retain"][t].exp() * memory - one["erase"][t] * torch.outer(erased, k) + moment
        torch.testing.assert_close(found.outputs[t], memory.mv(q))
    torch.testing.assert_close(found.memory, memory)
    torch.testing.assert_close(found.momentum_state, moment)


@pytest.mark.parametrize("form", ["chunked", "recurrent"])
def test_no_tokens_and_no_queries(form: str) -> None:
    tensors = {name: t.detach() for name, t in inputs(6, momentum=True, reference=False, strongest_decay=0.9).items()}
    whole = associative_recurrence(**tensors, form=form)  # type: ignore[arg-type]
    unread = associative_recurrence(**{**tensors, "queries": None}, form=form)  # type: ignore[arg-type]
    assert unread.outputs is None
    torch.testing.assert_close(unread.memory, whole.memory)
    none = {n: t if n in ("memory", "momentum_state") else t[:, :0] for n, t in tensors.items()}
    empty = associative_recurrence(**none, form=form)  # type: ignore[arg-type]
    assert empty.outputs is not None
    assert empty.outputs.shape == (BATCH, 0, VALUE)
    assert torch.equal(empty.memory, tensors["memory"])
    assert empty.momentum_state is not None
    assert torch.equal(empty.momentum_state, tensors["momentum_state"])


def test_a_chunk_survives_total_decay() -> None:
    """exp(-60) a token: products of 64 of them underflow, their inverses would overflow; nothing may become NaN."""
    tensors = inputs(130, momentum=True, reference=False, strongest_decay=0.9)
    tensors["log_retain"] = torch.full((BATCH, 130), -60.0, dtype=torch.float64, requires_grad=True)
    tensors["log_momentum"] = torch.full((BATCH, 130), -60.0, dtype=torch.float64, requires_grad=True)
    expected = everything(tensors, form="recurrent")
    single = {name: tensor.detach().float().requires_grad_() for name, tensor in tensors.items()}
    for name, value in everything(single).items():
        assert value.isfinite().all(), name
    found = everything(tensors)
    for name in ("outputs", "memory", "momentum_state", "gradient of values", "gradient of keys"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-13)


def test_leading_dimensions_are_free() -> None:
    tensors = {n: t.detach() for n, t in inputs(7, momentum=True, reference=True, strongest_decay=0.5).items()}
    expected = associative_recurrence(**tensors, chunk_size=3)  # type: ignore[arg-type]
    wide = associative_recurrence(
        **{n: t[:, None].expand(-1, 3, *t.shape[1:]) for n, t in tensors.items()}, chunk_size=3
    )  # type: ignore[arg-type]
    row = associative_recurrence(**{n: t[1] for n, t in tensors.items()}, chunk_size=3)  # type: ignore[arg-type]
    for a, b, c in zip(expected, wide, row, strict=True):
        assert a is not None
        assert b is not None
        torch.testing.assert_close(b[:, 2], a)
        torch.testing.assert_close(c, a[1])


def good() -> dict[str, Tensor]:
    return {n: t.detach() for n, t in inputs(4, momentum=False, reference=False, strongest_decay=0.9).items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(BATCH, 5, VALUE)}, "must agree in T, K and V"),
        ({"memory": torch.zeros(BATCH, KEY, VALUE)}, "must agree in T, K and V"),
        ({"memory": torch.zeros(KEY)}, r"expected memory \(..., V, K\)"),
        ({"erase": torch.zeros(BATCH, 3)}, "erase: expected one number a token"),
        ({"log_momentum": torch.zeros(BATCH, 3)}, "log_momentum: expected one number a token"),
        ({"queries": torch.zeros(BATCH, 3, KEY)}, "queries: expected the keys'"),
        ({"momentum_state": torch.zeros(BATCH, VALUE, KEY)}, "momentum_state was given without log_momentum"),
        ({"chunk_size": 0}, "chunk_size: expected at least 1, got 0"),
        ({"read": "chunk"}, 'read: expected "token" or "previous"'),
        ({"form": "fast"}, 'form: expected "chunked" or "recurrent"'),
    ],
)
def test_wrong_arguments_are_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        associative_recurrence(**{**good(), **change})  # type: ignore[arg-type]


def test_update_equals_a_loop_over_pairs() -> None:
    torch.manual_seed(1)
    memory, keys, values = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 4), (2, 5, 4), (2, 5, 3)))
    retain, erase, write = (torch.rand(*s, dtype=torch.float64) for s in ((2,), (2, 5), (2, 5)))
    kept = memory.clone()
    found = associative_update(memory, keys, values, retain=retain, erase=erase, write=write)
    numbers = associative_update(memory, keys, values, retain=0.9, erase=0.3, write=0.2)
    assert torch.equal(memory, kept)
    for row in range(2):
        expected, constant = retain[row] * memory[row], 0.9 * memory[row]
        for i in range(5):
            k, v = keys[row, i], values[row, i]
            old = torch.outer(memory[row].mv(k), k)
            expected = expected - erase[row, i] * old + write[row, i] * torch.outer(v, k)
            constant = constant - 0.3 * old + 0.2 * torch.outer(v, k)
        torch.testing.assert_close(found[row], expected)
        torch.testing.assert_close(numbers[row], constant)
    with pytest.raises(ValueError, match="must agree"):
        associative_update(memory, keys, values[:, :4])


def one_after_another(**tensors: Tensor) -> AssociativeOutput:
    return associative_recurrence(**tensors, chunk_size=4)  # type: ignore[arg-type]


def test_linear_attention_is_an_instance() -> None:
    """Eq. 15-16: M_t = M_{t-1} + v_t k_t^T, so y_t = sum_{s<=t} <k_s, q_t> v_s."""
    keys, values, queries = (torch.randn(9, width, dtype=torch.float64) for width in (4, 3, 4))
    zero = torch.zeros(9, dtype=torch.float64)
    found = one_after_another(
        memory=torch.zeros(3, 4, dtype=torch.float64),
        keys=keys,
        values=values,
        queries=queries,
        log_retain=zero,
        erase=zero,
        write=zero + 1,
    )
    torch.testing.assert_close(found.outputs, (queries @ keys.T).tril() @ values)


def test_the_delta_rule_is_an_instance() -> None:
    """Eq. 65: one step of gradient descent on 1/2 |M k - v|^2 a token."""
    keys, values = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    beta = torch.rand(9, dtype=torch.float64)
    memory = start = torch.randn(3, 4, dtype=torch.float64)
    for k, v, b in zip(keys, values, beta, strict=True):
        leaf = memory.detach().requires_grad_()
        (gradient,) = torch.autograd.grad((leaf @ k - v).square().sum() / 2, leaf)
        memory = memory - b * gradient
    found = one_after_another(
        memory=start, keys=keys, values=values, log_retain=torch.zeros_like(beta), erase=beta, write=beta
    )
    torch.testing.assert_close(found.memory, memory)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_gradient_descent_on_a_linear_layer_is_an_instance(weight_decay: float) -> None:
    """Eq. 8, 54: key the layer's input, value -dL/dy, written at once with the learning rate."""
    torch.manual_seed(3)
    layer = torch.nn.Linear(4, 3, bias=False, dtype=torch.float64)
    x, target = torch.randn(7, 4, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    y = layer(x)
    y.retain_grad()
    ((y - target).tanh().square().sum()).backward()
    assert y.grad is not None
    expected = associative_update(layer.weight.detach(), x, -y.grad, retain=1 - 0.05 * weight_decay, write=0.05)
    torch.optim.SGD(layer.parameters(), lr=0.05, weight_decay=weight_decay).step()
    torch.testing.assert_close(layer.weight.detach(), expected)


def test_gradient_descent_with_momentum_is_an_instance() -> None:
    """Eq. 33: the value-less memory of gradients has the identity as its keys."""
    torch.manual_seed(4)
    weight = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    moment, expected = torch.zeros(3, 4, dtype=torch.float64), weight.detach().clone()
    optimizer = torch.optim.SGD([weight], lr=0.05, momentum=0.9)
    for _ in range(4):
        x = torch.randn(4, dtype=torch.float64)
        optimizer.zero_grad()
        (weight @ x).cos().sum().backward()
        assert weight.grad is not None
        optimizer.step()
        moment = associative_update(moment, torch.eye(4, dtype=torch.float64), -weight.grad.T, retain=0.9)
        expected = expected + 0.05 * moment
    torch.testing.assert_close(weight.detach(), expected)


def test_momentum_with_one_token_at_a_time_is_the_recurrence() -> None:
    """Eq. 33 with rank-one gradients: W_t = W_{t-1} + m_t, m_t = 0.9 m_{t-1} - 0.05 delta_t x_t^T."""
    torch.manual_seed(6)
    weight = torch.nn.Parameter(torch.randn(3, 4, dtype=torch.float64))
    start = weight.detach().clone()
    inputs_, errors = [], []
    optimizer = torch.optim.SGD([weight], lr=0.05, momentum=0.9)
    for _ in range(6):
        x = torch.randn(4, dtype=torch.float64)
        optimizer.zero_grad()
        y = weight @ x
        y.retain_grad()
        y.cos().sum().backward()
        assert y.grad is not None
        optimizer.step()
        inputs_.append(x)
        errors.append(y.grad)
    zero = torch.zeros(6, dtype=torch.float64)
    found = one_after_another(
        memory=start,
        keys=torch.stack(inputs_),
        values=-torch.stack(errors),
        log_retain=zero,
        erase=zero,
        write=zero + 0.05,
        log_momentum=(zero + 0.9).log(),
    )
    torch.testing.assert_close(found.memory, weight.detach())


@pytest.mark.parametrize("length", [0.1, 1.0, 1.7, 30.0])
def test_delta_gradient_descent_is_the_argmin(length: float) -> None:
    """Eq. 56-57: erase = write = eta / (1 + eta |x|^2) minimises 1/2 |W x - u|^2 + |W - W_t|^2 / (2 eta)."""
    torch.manual_seed(7)
    eta = 0.6
    weight, u = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    x = torch.nn.functional.normalize(torch.randn(4, dtype=torch.float64), dim=0) * length
    step = eta / (1 + eta * length**2)
    found = associative_update(weight, x[None], u[None], erase=step, write=step).requires_grad_()
    objective = (found @ x - u).square().sum() / 2 + (found - weight).square().sum() / (2 * eta)
    (gradient,) = torch.autograd.grad(objective, found)
    # The objective is strictly convex: a vanishing gradient is the minimum.
    assert gradient.abs().max() <= 1e-12 * (1 + length**2)
    wrong = eta / (1 + eta)  # as printed in Eq. 57
    printed = associative_update(weight, x[None], u[None], erase=wrong, write=wrong)
    assert torch.allclose(printed, found.detach()) == (length == 1.0)


def test_delta_momentum_is_an_instance() -> None:
    """Eq. 48-49 with its slips mended: m (alpha I - eta g^T g) - eta P g, keys the rows of the gradient."""
    torch.manual_seed(8)
    moment, gradient = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    target = torch.randn(3, 5, dtype=torch.float64)
    found = associative_update(moment, gradient, -target.T, retain=0.9, erase=0.1, write=0.1)
    identity = torch.eye(4, dtype=torch.float64)
    expected = moment @ (0.9 * identity - 0.1 * gradient.T @ gradient) - 0.1 * target @ gradient
    torch.testing.assert_close(found, expected)
