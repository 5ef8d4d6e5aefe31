"""What holds for every optimizer here: exact resumption, untouched gradients, clear refusals, the tools of torch."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nestlearn.optim import (
    M3,
    DeepMomentum,
    DeltaGradientDescent,
    DeltaMomentum,
    HigherOrderMomentum,
    LevelOptimizer,
    Muon,
    PreconditionedMomentum,
    ReadoutMomentum,
)
from nestlearn.optim.shell import MemoryOptimizer

# A new optimizer joins all tests by a line here.
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "m3": lambda model: M3(model.parameters(), lr=0.01, period=3),
    "m3 paper": lambda model: M3(model.parameters(), lr=3e-4, period=3, form="paper"),
    "m3 sorted": lambda model: M3.for_model(model, lr=0.01, period=3, notice=lambda text: None),
    "dgd": lambda model: DeltaGradientDescent(model, lr=0.1, momentum=0.5, weight_decay=0.1),
    "dgd delta": lambda model: DeltaGradientDescent(model, lr=0.1, rule="delta"),
    "preconditioned": lambda model: PreconditionedMomentum(model.parameters(), lr=0.01),
    "delta momentum": lambda model: DeltaMomentum(model.parameters(), lr=0.01),
    "higher order": lambda model: HigherOrderMomentum(model.parameters(), lr=0.01),
    "readout": lambda model: ReadoutMomentum(model.parameters(), lr=0.01),
    "deep momentum": lambda model: DeepMomentum(model.parameters(), lr=0.01),
    "muon": lambda model: Muon([p for p in model.parameters() if p.ndim > 1], lr=0.01, weight_decay=0.1),
}
STEPS = 8


@pytest.fixture(params=OPTIMIZERS)
def make(request: pytest.FixtureRequest) -> Callable[[nn.Module], torch.optim.Optimizer]:
    return OPTIMIZERS[request.param]


def new_model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 10)).to(dtype)


def backward(model: nn.Module, step: int) -> Tensor:
    some = next(model.parameters())
    generator = torch.Generator().manual_seed(step)
    x, y = (torch.randn(16, width, generator=generator).to(some.dtype) for width in (9, 10))
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss.detach()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int = 0, stop: int = STEPS) -> list[Tensor]:
    losses = []
    for step in range(start, stop):
        optimizer.zero_grad()
        losses.append(backward(model, step))
        optimizer.step()
    return losses


def equal(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("cut", range(1, STEPS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resume_is_bitwise_at_every_step(make, cut, dtype, tmp_path) -> None:
    whole = new_model(dtype)
    train(whole, make(whole))
    first = new_model(dtype)
    optimizer = make(first)
    train(first, optimizer, 0, cut)
    torch.save((first.state_dict(), optimizer.state_dict()), tmp_path / "saved")
    second = new_model(dtype)
    weights, state = torch.load(tmp_path / "saved", weights_only=True)
    second.load_state_dict(weights)
    resumed = make(second)
    resumed.load_state_dict(state)
    train(second, resumed, cut)
    assert equal(whole, second)


def test_state_is_fp32_beside_bf16_parameters(make) -> None:
    model = new_model(torch.bfloat16)
    optimizer = make(model)
    train(model, optimizer)
    tensors = [v for state in optimizer.state.values() for v in state.values() if v.is_floating_point()]
    assert all(v.dtype == torch.float32 for v in tensors)


def test_a_loaded_state_is_not_aliased(make) -> None:
    model, other = new_model(), new_model()
    optimizer, second = make(model), make(other)
    train(model, optimizer, 0, 4)
    saved = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(saved)
    second.load_state_dict(saved)
    train(other, second, 0, 4)
    for number, state in kept["state"].items():
        assert all(torch.equal(v, saved["state"][number][name]) for name, v in state.items())


def test_gradients_are_not_changed(make) -> None:
    model = new_model()
    optimizer = make(model)
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        before = [p.grad.clone() for p in model.parameters()]
        optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_everything_learns(make) -> None:
    model = new_model()
    optimizer = make(model)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(backward(model, 0))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_missing_gradients_leave_parameters_alone(make) -> None:
    model = new_model()
    optimizer = make(model)
    before = [p.detach().clone() for p in model[2].parameters()]
    model[0](torch.ones(1, 9)).sum().backward()
    optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(model[2].parameters(), before, strict=True))
    optimizer.zero_grad()
    optimizer.step()  # no gradient at all


def test_closures_and_schedulers(make) -> None:
    model, plain = new_model(), new_model()
    optimizer, other = make(model), make(plain)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates = [group["lr"] for group in other.param_groups]
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            optimizer.zero_grad()
            return backward(model, step)

        found = optimizer.step(closure)
        schedule.step()
        for group, rate in zip(other.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5**step
        (expected,) = train(plain, other, step, step + 1)
        assert torch.equal(found, expected)
    assert equal(model, plain)


def test_a_learning_rate_may_be_a_tensor_and_zero(make) -> None:
    model = new_model()
    optimizer = make(model)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    train(model, optimizer)
    assert equal(model, new_model())


def test_grad_scaler_skips_infinite_gradients_and_takes_its_scale_out(make) -> None:
    model, plain = new_model(), new_model()
    optimizer, other = make(model), make(plain)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in (0, 1, 2):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        x, y = (torch.randn(16, width, generator=generator) for width in (9, 10))
        loss = (model(x) - y).square().mean()
        scaler.scale(loss * float("inf") if step == 1 else loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 1:
            train(plain, other, step, step + 1)
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_levels_with_every_optimizer_resume_within_a_period(make) -> None:
    def leveled(model: nn.Module) -> LevelOptimizer:
        inner = make(model)
        for group in inner.param_groups:
            group["period"] = 3
        return LevelOptimizer(inner)

    whole, first = new_model(), new_model()
    train(whole, leveled(whole))
    optimizer = leveled(first)
    train(first, optimizer, 0, 4)
    resumed = leveled(first)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(first, resumed, 4)
    assert equal(whole, first)
    assert not equal(whole, new_model())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_gradients_that_are_not_finite_are_raised_or_skipped(make, value) -> None:
    model = new_model()
    optimizer = make(model)
    train(model, optimizer, 0, 2)
    before, state = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    optimizer.zero_grad()
    backward(model, 2)
    model[2].weight.grad[1, 2] = value
    with pytest.raises(ValueError, match=r"is not finite, so nothing was moved; .*nonfinite='skip'"):
        optimizer.step()
    for group in optimizer.param_groups:
        group["nonfinite"] = "skip"
    with pytest.warns(RuntimeWarning, match="step skipped: the gradient of"):
        optimizer.step()
    assert equal(model, before)
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(v, after[n][name]) for n, own in state["state"].items() for name, v in own.items())
    train(model, optimizer, 3, 5)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_large_finite_gradient_is_no_reason_to_stop() -> None:
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.full((2, 2), 1e30)
    ReadoutMomentum([parameter], lr=0.1, readout="sign").step()
    torch.testing.assert_close(parameter.detach(), torch.full((2, 2), -0.1))


def test_sparse_and_complex_gradients_are_refused(make) -> None:
    model = new_model()
    optimizer = make(model)
    model[0].weight.grad = torch.zeros(12, 9).to_sparse()
    with pytest.raises(ValueError, match="has a sparse gradient, expected a dense real one; build its layer with"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
@pytest.mark.parametrize(
    "kind", [M3, PreconditionedMomentum, DeltaMomentum, HigherOrderMomentum, ReadoutMomentum, DeepMomentum]
)
def test_parameters_without_numbers_pass(kind, shape) -> None:
    empty, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.ones(3, 2))
    optimizer = kind([empty, other], lr=0.1)
    for _ in range(2):
        empty.grad, other.grad = torch.zeros(shape), torch.ones(3, 2)
        optimizer.step()
    assert bool(other.isfinite().all())
    assert not torch.equal(other.detach(), torch.ones(3, 2))


@pytest.mark.parametrize("kind", [M3, DeltaMomentum, DeepMomentum, Muon])
def test_complex_parameters_and_empty_groups_are_refused(kind) -> None:
    with pytest.raises(TypeError, match=r"takes real parameters, got one of dtype torch\.complex64 and shape \(2, 2\)"):
        kind([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])
    good = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="parameter group 1 is empty: expected one or more parameters"):
        kind([{"params": [good]}, {"params": []}])
    with pytest.raises(ValueError, match="empty parameter list"):
        kind([])
    optimizer = kind([good])
    with pytest.raises(ValueError, match="parameter group 1 is empty"):
        optimizer.add_param_group({"params": []})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="nonfinite: expected 'raise' or 'skip', got 'ignore'"):
        kind([good], nonfinite="ignore")


def test_the_state_of_another_optimizer_is_refused(make) -> None:
    model = new_model()
    optimizer = make(model)
    members = [p for group in optimizer.param_groups for p in group["params"]]
    other = torch.optim.AdamW(members)
    for p in members:
        p.grad = torch.zeros_like(p)
    other.step()
    with pytest.raises(
        ValueError, match=f"saved by another optimizer than {type(optimizer).__name__}: its groups have"
    ):
        optimizer.load_state_dict(other.state_dict())


def test_the_state_of_another_model_is_refused(make) -> None:
    model = new_model()
    wide = nn.Sequential(nn.Linear(9, 14), nn.Tanh(), nn.Linear(14, 10))
    optimizer, other = make(model), make(wide)
    train(wide, other, 0, 2)
    if not any(state for state in other.state.values()):
        return  # it has none, so none is foreign
    with pytest.raises(ValueError, match="the state belongs to another model"):
        optimizer.load_state_dict(other.state_dict())


def test_names_appear_in_messages() -> None:
    model = new_model()
    optimizer = M3.for_model(model, notice=lambda text: None)
    backward(model, 0)
    model[2].weight.grad[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"gradient of 2\.weight is not finite"):
        optimizer.step()


def test_all_are_shells() -> None:
    model = new_model()
    assert all(isinstance(make(model), MemoryOptimizer) for make in OPTIMIZERS.values())
