"""Delta gradient descent: the argmin of Eq. 56, found by other means, under every way to reach a step."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestlearn.optim import DeltaGradientDescent, LevelOptimizer, delta_step
from nestlearn.optim.delta_gradient_descent import gram_matrix


def argmin_of_equation_56(weight: Tensor, x: Tensor, u: Tensor, lr: float) -> Tensor:
    """argmin_W mean_n 1/2 |W x_n - u_n|^2 + 1/(2 lr) |W - W_t|^2, by least squares on the stacked residuals."""
    rows = torch.cat([x / len(x) ** 0.5, torch.eye(x.shape[1], dtype=x.dtype) / lr**0.5])
    targets = torch.cat([u / len(x) ** 0.5, weight.mT / lr**0.5])
    return torch.linalg.lstsq(rows, targets, driver="gelsd").solution.mT


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones_like(x[:, :1])], 1)


def mlp(bias: bool = True, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 3, bias=bias)).double()


def data(rows: int = 12, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, width, generator=generator, dtype=torch.float64) for width in (5, 3))  # type: ignore[return-value]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().sum(-1).mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, accumulate: int = 1) -> nn.Module:
    for step in range(steps):
        x, y = data(seed=step)
        optimizer.zero_grad()
        for part_x, part_y in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            (loss_of(model, part_x, part_y) / accumulate).backward()
        optimizer.step()
    return model


def assert_same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


@pytest.mark.parametrize("norm", [0.01, 1.0, 1.7, 100.0])
@pytest.mark.parametrize("lr", [0.1, 10.0])
def test_one_input_of_any_norm_equals_the_argmin_and_the_closed_form(norm: float, lr: float) -> None:
    torch.manual_seed(0)
    weight, x, u = torch.randn(3, 5).double(), torch.randn(1, 5).double(), torch.randn(1, 3).double()
    x = norm * x / x.norm()
    found = delta_step(weight, -u.mT @ x, x.mT @ x, lr=lr)
    torch.testing.assert_close(found, argmin_of_equation_56(weight, x, u, lr), rtol=1e-9, atol=1e-10)
    step = lr / (1 + lr * norm**2)  # Eq. 57 with the step that is exact for any norm
    expected = weight @ (torch.eye(5).double() - step * x.mT @ x) + step * u.mT @ x
    rounding = 1e-15 * 4 * (1 + lr * norm**2)  # the condition of the system
    torch.testing.assert_close(found, expected, rtol=1e-12 + rounding, atol=1e-13 + rounding)
    printed = lr / (1 + lr)
    literal = weight @ (torch.eye(5).double() - printed * x.mT @ x) + printed * u.mT @ x
    assert torch.allclose(found, literal, rtol=1e-6) == (norm == 1.0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_every_layer_of_a_model_becomes_its_argmin(bias: bool, scale: float) -> None:
    model, (x, y), lr = mlp(bias), data(), 0.3
    x = scale * x
    optimizer = DeltaGradientDescent(model, lr=lr)
    hidden = torch.tanh(model[0](x)).detach()
    before = [
        torch.cat([layer.weight, layer.bias[:, None]], 1).detach() if bias else layer.weight.detach().clone()
        for layer in (model[0], model[2])
    ]
    outputs: list[Tensor] = []
    handles = [layer.register_forward_hook(lambda m, i, out: outputs.append(out)) for layer in (model[0], model[2])]
    loss = loss_of(model, x, y)
    for handle in handles:
        handle.remove()
    u = [-len(x) * gradient for gradient in torch.autograd.grad(loss, outputs, retain_graph=True)]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    for layer, start, inputs, target in zip((model[0], model[2]), before, (x, hidden), u, strict=True):
        keys = with_one(inputs) if bias else inputs
        expected = argmin_of_equation_56(start, keys, target, lr)
        torch.testing.assert_close(layer.weight.detach(), expected[:, : inputs.shape[1]], rtol=1e-9, atol=1e-9)
        if bias:
            torch.testing.assert_close(layer.bias.detach(), expected[:, -1], rtol=1e-9, atol=1e-9)


def test_the_delta_rule_is_the_argmin_for_the_change() -> None:
    torch.manual_seed(0)
    weight, x, u = torch.randn(3, 5).double(), torch.randn(9, 5).double(), torch.randn(9, 3).double()
    found = delta_step(weight, -u.mT @ x / 9, x.mT @ x / 9, lr=0.7, rule="delta")
    change = argmin_of_equation_56(torch.zeros_like(weight), x, u, 0.7)
    torch.testing.assert_close(found, weight + change, rtol=1e-10, atol=1e-10)


def test_gram_matrices_of_wide_inputs_are_computed_in_blocks() -> None:
    x = torch.randn(11, 259, dtype=torch.float64)
    torch.testing.assert_close(gram_matrix(x), x.mT @ x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rule", ["dgd", "delta"])
def test_gradient_accumulation_equals_one_pass(rule: str) -> None:
    models = [mlp(), mlp()]
    whole, parts = (
        train(model, DeltaGradientDescent(model, lr=0.2, momentum=0.5, weight_decay=0.1, rule=rule), accumulate=n)
        for model, n in zip(models, (1, 4), strict=True)
    )
    assert_same(whole, parts, rtol=1e-11, atol=1e-12)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.model, self.reentrant = model, reentrant

    def forward(self, x: Tensor) -> Tensor:
        # The reentrant form needs an input that requires a gradient.
        return checkpoint(self.model, x.requires_grad_(), use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_activation_checkpointing_counts_no_input_twice(reentrant: bool, accumulate: int) -> None:
    plain, recomputed = mlp(), Checkpointed(mlp(), reentrant)
    optimizer = DeltaGradientDescent(recomputed, lr=0.2)
    train(plain, DeltaGradientDescent(plain, lr=0.2), accumulate=accumulate)
    train(recomputed, optimizer, accumulate=accumulate)
    assert_same(plain, recomputed, rtol=1e-12, atol=1e-13)
    loss_of(recomputed, *data()).backward()
    assert {layer.seen.count for layer in optimizer._layers.values()} == {12}


def test_what_is_not_differentiated_is_not_counted() -> None:
    model, (x, y) = mlp(), data()
    optimizer = DeltaGradientDescent(model, lr=0.2)
    expected = train(mlp(), DeltaGradientDescent(other := mlp(), lr=0.2), steps=0) and other
    train(other, DeltaGradientDescent(other, lr=0.2), steps=1)
    optimizer.zero_grad()
    with torch.no_grad():
        model(3 * x)  # an evaluation
    model(5 * x)  # its gradient is never asked for
    loss_of(model, 7 * x, y).backward()
    optimizer.zero_grad()  # that gradient is dropped, and so are its inputs
    x, y = data(seed=0)
    loss_of(model, x, y).backward()
    optimizer.step()
    assert_same(model, expected, rtol=0, atol=0)


def test_layers_that_read_one_tensor_share_its_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(
        "nestlearn.optim.delta_gradient_descent.gram_matrix", lambda x: calls.append(1) or gram_matrix(x)
    )

    a, b = nn.Linear(5, 3).double(), nn.Linear(5, 3, bias=False).double()
    optimizer = DeltaGradientDescent(nn.ModuleList([a, b]), lr=0.1)
    x, _ = data()
    before = x.clone()
    (a(x) + b(x)).sum().backward()
    x.mul_(2.0)  # changed in place: another input
    a(x).sum().backward()
    assert len(calls) == 2
    seen = optimizer._layers[a.weight].seen
    assert seen.count == 24
    torch.testing.assert_close(seen.gram, 5 * before.mT @ before, rtol=1e-12, atol=1e-12)


def test_momentum_and_weight_decay_compose() -> None:
    model, lr, mu, decay = mlp(bias=False), 0.2, 0.6, 0.3
    weights = [model[0].weight, model[2].weight]
    optimizer = DeltaGradientDescent(model, lr=lr, momentum=mu, weight_decay=decay)
    momenta = [torch.zeros_like(w) for w in weights]
    for step in range(4):
        x, y = data(seed=step)
        hidden = torch.tanh(x @ weights[0].mT).detach()
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        expected = []
        for i, inputs in enumerate((x, hidden)):
            momenta[i] = mu * momenta[i] + weights[i].grad
            system = torch.eye(inputs.shape[1]).double() + lr * inputs.mT @ inputs / len(x)
            expected.append(((1 - lr * decay) * weights[i].detach() - lr * momenta[i]) @ torch.linalg.inv(system))
        optimizer.step()
        for weight, value in zip(weights, expected, strict=True):
            torch.testing.assert_close(weight.detach(), value, rtol=1e-11, atol=1e-12)


def test_under_levels_a_slow_layer_is_the_argmin_over_its_whole_period() -> None:
    model, x, y = mlp(), *data(rows=12)
    reference = copy.deepcopy(model)
    inner = DeltaGradientDescent(model, lr=0.2)
    for group in inner.param_groups:
        group["period"] = 3
    optimizer = LevelOptimizer(inner)
    for i in range(3):
        optimizer.zero_grad()
        loss_of(model, x[4 * i : 4 * i + 4], y[4 * i : 4 * i + 4]).backward()
        if i == 1:  # stop and resume within the period
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer.load_state_dict(saved)
        optimizer.step()
    once = DeltaGradientDescent(reference, lr=0.2)
    loss_of(reference, x, y).backward()
    once.step()
    assert_same(model, reference, rtol=1e-11, atol=1e-12)


def test_groups_follow_the_levels_of_a_model() -> None:
    from nestlearn.models import HopeConfig, HopeLM

    model = HopeLM(HopeConfig(vocab_size=16, dim=16, depth=1, heads=2, cms_periods=(1, 4)))
    optimizer = LevelOptimizer(DeltaGradientDescent(model, lr=0.1, others="adamw", others_lr=1e-3))
    slow = {name for g in optimizer.param_groups if g["period"] == 4 for name in g["param_names"]}
    assert slow == {name for name, _ in model.level_parameters()[4]}
    tokens = torch.randint(16, (2, 9))
    losses = []
    for _ in range(12):
        logits, _ = model(tokens[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


class Untreatable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.conv = nn.Conv1d(1, 2, 3)
        self.norm = nn.LayerNorm(3)
        self.gain = nn.Parameter(torch.ones(3))
        self.linear = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 4, bias=False)
        self.tied.weight = self.embedding.weight

    def forward(self, i: Tensor) -> Tensor:
        return self.tied(self.linear(self.norm(self.embedding(i)) * self.gain))


def test_what_cannot_be_treated_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"gain \(Untreatable\), embedding\.weight \(Embedding, shared with tied\)"
    ) as e:
        DeltaGradientDescent(Untreatable())
    for part in ("conv.weight (Conv1d)", "norm.weight (LayerNorm)", "others='adamw'", "requires_grad_(False)"):
        assert part in str(e.value)
    assert "linear.weight" not in str(e.value)
    with pytest.raises(TypeError, match="takes the model, not its parameters"):
        DeltaGradientDescent(mlp().parameters())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        DeltaGradientDescent(nn.LayerNorm(3), others="sgd")
    frozen = Untreatable().requires_grad_(False)
    frozen.linear.requires_grad_(True)
    DeltaGradientDescent(frozen)


@pytest.mark.parametrize("others", ["adamw", "sgd"])
def test_others_move_as_under_their_own_optimizer(others: str) -> None:
    torch.manual_seed(0)
    model = Untreatable()
    reference = copy.deepcopy(model)
    optimizer = DeltaGradientDescent(model, lr=0.2, others=others, others_lr=0.01)
    rest = [p for name, p in reference.named_parameters() if not name.startswith("linear")]
    make = {
        "adamw": lambda: torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
        "sgd": lambda: torch.optim.SGD(rest, lr=0.01),
    }[others]
    own = make()
    i = torch.tensor([0, 1, 3])
    optimizer.zero_grad()
    model(i).square().mean().backward()
    optimizer.step()
    reference(i).square().mean().backward()
    own.step()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        assert torch.equal(a, b) != name.startswith("linear")


def test_a_layer_that_is_used_behind_its_back_is_named() -> None:
    model = mlp()
    optimizer = DeltaGradientDescent(model, lr=0.1)
    x, _ = data()
    model[2](torch.tanh(nn.functional.linear(x, model[0].weight))).sum().backward()
    with pytest.raises(ValueError, match=r"0\.weight has a gradient, but its layer's forward was never called"):
        optimizer.step()


def test_a_dropped_optimizer_leaves_no_hooks() -> None:
    model = mlp()
    optimizer = DeltaGradientDescent(model, lr=0.1)
    assert model[0]._forward_hooks
    del optimizer
    gc.collect()
    assert not model[0]._forward_hooks


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"momentum": 1.0}, r"momentum: expected a number in \[0, 1\)"),
        ({"rule": "gd"}, "rule: expected 'dgd' or 'delta', got 'gd'"),
        ({"others": "lion"}, "others: expected 'adamw', 'sgd' or None, got 'lion'"),
        ({"lr": -0.1}, "lr: expected at least 0"),
    ],
)
def test_settings_out_of_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeltaGradientDescent(mlp(), **settings)


def test_inputs_by_name_and_empty_batches() -> None:
    model = nn.Linear(5, 3).double()
    named = copy.deepcopy(model)
    x, y = data()
    for layer in (model, named):
        optimizer = DeltaGradientDescent(layer, lr=0.1)
        loss_of(layer, x, y).backward()
        if layer is named:
            optimizer.zero_grad()
            layer(x[:0]).sum().backward()
            optimizer.step()  # nothing to learn from
            optimizer.zero_grad()
            (layer(input=x) - y).square().sum(-1).mean().backward()
        optimizer.step()
    assert_same(model, named)


@pytest.mark.parametrize("rule", ["dgd", "delta"])
@pytest.mark.parametrize("frozen", [True, False])
def test_a_bias_without_its_weight_is_a_memory_of_its_own(rule: str, frozen: bool) -> None:
    """Its weight is frozen after the start, or moves with another group; its only key is 1."""
    model = nn.Linear(5, 3).double()
    optimizer = DeltaGradientDescent(model, lr=0.5, rule=rule)
    if frozen:
        model.weight.requires_grad_(False)
    else:
        (group,) = optimizer.param_groups
        group |= {"params": [model.weight], "param_names": ["weight"]}
        optimizer.add_param_group({"params": [("bias", model.bias)], "rule": rule})
    before = copy.deepcopy(model)
    loss_of(model, *data()).backward()
    gradient = model.bias.grad.clone()
    optimizer.step()
    start = before.bias.detach()
    expected = (start - 0.5 * gradient) / 1.5 if rule == "dgd" else start - 0.5 * gradient / 1.5
    torch.testing.assert_close(model.bias.detach(), expected, rtol=1e-13, atol=1e-13)
    assert torch.equal(model.weight, before.weight) == frozen


def test_a_shared_bias_is_left_to_others() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5))
    model[1].bias = model[0].bias
    with pytest.raises(ValueError, match=r"0\.bias \(Linear, shared with 1\)"):
        DeltaGradientDescent(model)
    groups = DeltaGradientDescent(model, others="sgd").param_groups
    assert [g["param_names"] for g in groups] == [["0.weight", "1.weight"], ["0.bias"]]


@pytest.mark.parametrize("rule", ["dgd", "delta"])
def test_rates_at_which_rounding_spoils_the_gram_matrix(rule: str) -> None:
    """In fp32 I + lr G has negative eigenvalues; where there are inputs, the step is still the exact one."""
    weight, x, error = (random(*shape, seed=i) for i, shape in enumerate([(8, 64), (32, 64), (32, 8)]))
    x = 30 * x
    update, gram = error.mT @ x / 32, x.mT @ x / 32
    assert bool(torch.linalg.cholesky_ex(torch.eye(64) + 1e4 * gram.float()).info)
    expected = delta_step(weight, update, gram, lr=1e4, rule=rule)
    found = delta_step(weight.float(), update.float(), gram.float(), lr=1e4, rule=rule).double()
    torch.testing.assert_close(found @ x.mT, expected @ x.mT, rtol=0, atol=0.01 * float((weight @ x.mT).abs().max()))


def test_copies_go_on_by_themselves() -> None:
    model = mlp()
    optimizer = DeltaGradientDescent(model, lr=0.1, momentum=0.5)
    train(model, optimizer)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer)
    for other, own in copies:
        assert_same(train(other, own), model, rtol=0, atol=0)
        del own
    del copies
    gc.collect()
    assert not other[0]._forward_hooks
    assert model[0]._forward_hooks


def test_torch_func_leaves_nothing_behind() -> None:
    model, reference = mlp(), mlp()
    optimizer, plain = (DeltaGradientDescent(one, lr=0.1) for one in (model, reference))
    x, y = data()
    for one in (model, reference):
        loss_of(one, x, y).backward()
    torch.func.vmap(
        torch.func.grad(lambda own, z: torch.func.functional_call(model, own, (z,)).square().sum()), (None, 0)
    )(dict(model.named_parameters()), x)
    optimizer.step()
    plain.step()
    assert_same(model, reference)


def test_gradients_of_something_else_count_no_input() -> None:
    """As a memory that learns in context asks for them, between zero_grad and the backward pass."""
    model, reference = mlp(), mlp()
    optimizer, plain = (DeltaGradientDescent(one, lr=0.1) for one in (model, reference))
    x, y = data(seed=5)
    inner = x.clone().requires_grad_()
    torch.autograd.grad(loss_of(model, inner, y), inner)
    torch.autograd.backward(loss_of(model, inner, y), inputs=[inner])
    for one, own in ((model, optimizer), (reference, plain)):
        loss_of(one, *data()).backward()
        own.step()
    assert_same(model, reference, rtol=0, atol=0)


@pytest.mark.parametrize("inputs", [False, True])
def test_gradients_that_are_asked_for_count(inputs: bool) -> None:
    model, reference = mlp(), mlp()
    optimizer, plain = (DeltaGradientDescent(one, lr=0.1) for one in (model, reference))
    params = list(model.parameters())
    if inputs:
        torch.autograd.backward(loss_of(model, *data()), inputs=params)
    else:
        for parameter, gradient in zip(params, torch.autograd.grad(loss_of(model, *data()), params), strict=True):
            parameter.grad = gradient
    loss_of(reference, *data()).backward()
    optimizer.step()
    plain.step()
    assert_same(model, reference, rtol=0, atol=0)


def test_under_levels_a_skipped_step_gathers_nothing() -> None:
    model, reference = mlp(), mlp()
    both = []
    for one in (model, reference):
        inner = DeltaGradientDescent(one, lr=0.1, nonfinite="skip")
        inner.param_groups[0]["period"] = 2
        both.append(LevelOptimizer(inner))
    for step in range(4):
        for one, optimizer in zip((model, reference), both, strict=True):
            train(one, optimizer, steps=1)
            if one is model and step % 2 == 0:
                optimizer.zero_grad()
                (loss_of(one, *data()) * float("nan")).backward()
                with pytest.warns(RuntimeWarning, match="step skipped"):
                    optimizer.step()
    assert both[0].steps == both[1].steps == 4
    assert_same(model, reference)
