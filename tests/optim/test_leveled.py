"""LevelOptimizer: each group at its own period, everything else as the wrapped optimizer does it."""

import copy
import pickle

import pytest
import torch
from torch import nn

from nestlearn.levels import order_by_frequency
from nestlearn.optim import LevelOptimizer

STEPS = 13


def parameters(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((3, 4), (4,), (2, 5))]


def gradients(step, params):
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in params]


def groups(params, periods=(1, 3, 4), **kwargs):
    return [{"params": [p], "period": k, **kwargs} for p, k in zip(params, periods, strict=True)]


def run(optimizer, params, start=0, stop=STEPS):
    for step in range(start, stop):
        for parameter, gradient in zip(params, gradients(step, params), strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "make",
    [
        lambda g: torch.optim.AdamW(g, lr=0.1, weight_decay=0.1),
        lambda g: torch.optim.SGD(g, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda g: torch.optim.Adagrad(g, lr=0.1),
        lambda g: torch.optim.Adam(g, lr=0.1, amsgrad=True, foreach=False),
    ],
)
def test_slow_groups_step_with_the_mean_gradient_when_due(make):
    leveled, plain = parameters(), parameters()
    periods = (1, 3, 4)
    run(LevelOptimizer(make(groups(leveled))), leveled)
    for i, period in enumerate(periods):
        alone = make([plain[i]])
        for end in range(period, STEPS + 1, period):
            plain[i].grad = torch.stack([gradients(step, plain)[i] for step in range(end - period, end)]).mean(0)
            alone.step()
        torch.testing.assert_close(leveled[i], plain[i], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_period_one_is_bitwise_the_plain_optimizer(dtype):
    leveled, plain = parameters(dtype), parameters(dtype)
    run(LevelOptimizer(torch.optim.AdamW(groups(leveled, (1, 5, 1)), lr=0.1)), leveled)
    run(torch.optim.AdamW(groups(plain, (1, 1, 1)), lr=0.1), plain)
    assert torch.equal(leveled[0], plain[0])
    assert torch.equal(leveled[2], plain[2])
    assert not torch.equal(leveled[1], plain[1])


def test_groups_that_are_not_due_do_not_move():
    params = parameters()
    optimizer = LevelOptimizer(torch.optim.AdamW(groups(params, (1, 1, 4)), lr=0.1, weight_decay=0.5))
    run(optimizer, params, 0, 4)
    before, moments = params[2].clone(), copy.deepcopy(optimizer.state[params[2]])
    run(optimizer, params, 4, 7)
    assert torch.equal(params[2], before)
    assert all(torch.equal(moments[key], optimizer.state[params[2]][key]) for key in moments)
    run(optimizer, params, 7, 8)
    assert not torch.equal(params[2], before)


def test_the_callers_gradient_is_neither_changed_nor_lost():
    params = parameters()
    optimizer = LevelOptimizer(torch.optim.SGD(groups(params, (2, 2, 2)), lr=0.1))
    for step in range(2):
        mine = gradients(step, params)
        for parameter, gradient in zip(params, mine, strict=True):
            parameter.grad = gradient
        optimizer.step()
        assert all(p.grad is g for p, g in zip(params, mine, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(mine, gradients(step, params), strict=True))


def test_zero_grad_keeps_what_was_gathered():
    params = parameters()
    optimizer = LevelOptimizer(torch.optim.SGD(groups(params, (1, 3, 4)), lr=1.0))
    before = params[1].clone()
    run(optimizer, params, 0, 3)
    mean = torch.stack([gradients(step, params)[1] for step in range(3)]).mean(0)
    torch.testing.assert_close(params[1], before - mean, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("cut", range(1, 8))
def test_resume_is_bitwise_at_every_point_of_a_period(cut, tmp_path):
    whole, first = parameters(torch.float32), parameters(torch.float32)
    run(LevelOptimizer(torch.optim.AdamW(groups(whole), lr=0.1)), whole)

    optimizer = LevelOptimizer(torch.optim.AdamW(groups(first), lr=0.1))
    run(optimizer, first, 0, cut)
    torch.save(optimizer.state_dict(), tmp_path / "state")
    second = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = LevelOptimizer(torch.optim.AdamW(groups(second, (1, 1, 1)), lr=9.0))
    resumed.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert resumed.steps == cut
    run(resumed, second, cut)
    assert all(torch.equal(a, b) for a, b in zip(whole, second, strict=True))


def test_a_loaded_state_dict_is_not_aliased():
    params, other = parameters(), parameters()
    optimizer = LevelOptimizer(torch.optim.SGD(groups(params, (4, 4, 4)), lr=0.1))
    run(optimizer, params, 0, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded = copy.deepcopy(saved)
    resumed = LevelOptimizer(torch.optim.SGD(groups(other, (4, 4, 4)), lr=0.1))
    resumed.load_state_dict(loaded)
    run(resumed, other, 1, 3)
    for i, mean in saved["levels"]["means"].items():
        assert torch.equal(mean, loaded["levels"]["means"][i])


def test_missing_gradients_are_skipped_as_torch_does():
    params = parameters()
    optimizer = LevelOptimizer(torch.optim.AdamW(groups(params, (1, 3, 3)), lr=0.1, weight_decay=0.5))
    never = params[2].clone()
    seen = params[1].clone()
    for step in range(3):
        params[0].grad = gradients(step, params)[0]
        params[1].grad = gradients(step, params)[1] if step != 1 else None
        params[2].grad = None
        optimizer.step()
    assert torch.equal(params[2], never)
    alone = nn.Parameter(seen)
    alone.grad = (gradients(0, params)[1] + gradients(2, params)[1]) / 2
    torch.optim.AdamW([alone], lr=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(params[1], alone, rtol=1e-13, atol=1e-13)


def test_half_precision_gradients_are_gathered_in_float32():
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = LevelOptimizer(torch.optim.SGD([{"params": [parameter], "period": 256}], lr=1.0))
    for step in range(256):
        parameter.grad = torch.full((1,), 1.0 if step == 0 else 2**-8, dtype=torch.bfloat16)
        optimizer.step()
    torch.testing.assert_close(parameter.float(), torch.tensor([-(1 + 255 / 256) / 256]), rtol=5e-3, atol=0)


def test_closure_runs_once_with_gradients_enabled():
    params = parameters()
    optimizer = LevelOptimizer(torch.optim.SGD(groups(params, (1, 2, 2)), lr=0.1))
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = sum((p**2).sum() for p in params)
        optimizer.zero_grad()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert calls == [True, True]
    assert second < first


def test_learning_rate_schedulers_work_and_their_rate_is_taken_when_due():
    params = parameters()
    optimizer = LevelOptimizer(torch.optim.SGD(groups(params, (1, 1, 3)), lr=1.0))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = params[2].clone()
    for step in range(3):
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        if step < 2:
            schedule.step()
    torch.testing.assert_close(params[2], before - 0.25, rtol=1e-13, atol=1e-13)


def test_grad_scaler_skips_a_step_with_infinite_gradients():
    params = parameters(torch.float32)
    optimizer = LevelOptimizer(torch.optim.SGD(groups(params, (1, 2, 2)), lr=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    start = [p.clone() for p in params]
    for value in (1.0, float("inf"), 3.0):
        optimizer.zero_grad()
        scaler.scale(sum((p * value).sum() for p in params)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.steps == 2
    torch.testing.assert_close(params[0], start[0] - 4.0)
    torch.testing.assert_close(params[1], start[1] - 2.0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.linear = nn.Linear(3, 3)
        self.slow = nn.Linear(3, 3)
        self.initial = nn.Parameter(torch.randn(2, 3))
        self.initial._no_weight_decay = True
        self.frozen = nn.Parameter(torch.zeros(2, 2), requires_grad=False)

    def level_parameters(self):
        named = list(self.named_parameters())
        slow = [(n, p) for n, p in named if n.startswith("slow")]
        return {1: [(n, p) for n, p in named if not n.startswith("slow")], 8: slow}


def test_for_model_decays_matrices_only():
    optimizer = LevelOptimizer.for_model(Model(), lr=0.01, weight_decay=0.2)
    found = {(g["period"], g["weight_decay"]): g["param_names"] for g in optimizer.param_groups}
    assert found == {
        (1, 0.2): ["linear.weight"],
        (1, 0.0): ["initial", "embedding.weight", "linear.bias"],
        (8, 0.2): ["slow.weight"],
        (8, 0.0): ["slow.bias"],
    }
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


def test_for_model_without_levels_trains_everything_at_every_step():
    optimizer = LevelOptimizer.for_model(nn.Linear(2, 2))
    assert [g["period"] for g in optimizer.param_groups] == [1, 1]


def test_for_model_refuses_levels_that_miss_or_repeat_a_parameter():
    model = Model()
    model.level_parameters = lambda: {1: [("linear.weight", model.linear.weight)] * 2}
    with pytest.raises(ValueError, match=r"1 more than once and misses \['initial'"):
        LevelOptimizer.for_model(model)
    with pytest.raises(ValueError, match="nothing to train"):
        LevelOptimizer.for_model(nn.Linear(2, 2).requires_grad_(False))


def test_parts_are_ordered_by_definition_2():
    params = parameters()
    optimizer = LevelOptimizer(torch.optim.AdamW(groups(params, (1, 4, 4)), lr=0.1))
    run(optimizer, params, 0, 4)
    order = {part.name: level for part, level in order_by_frequency(*optimizer.parts()).items()}
    assert order["group 0 exp_avg"] == order["group 0 exp_avg_sq"] == order["group 1 gradient mean"] == 0
    assert order["group 0 weights"] == 1
    assert order["group 1 exp_avg"] == order["group 2 exp_avg_sq"] == 2
    assert order["group 1 weights"] == order["group 2 weights"] == 3


def test_groups_can_be_added_later():
    params = parameters()
    optimizer = LevelOptimizer(torch.optim.SGD([params[0]], lr=1.0))
    optimizer.add_param_group({"params": [params[1]], "period": 2})
    before = params[1].clone()
    run(optimizer, params, 0, 1)
    assert torch.equal(params[1], before)
    run(optimizer, params, 1, 2)
    assert not torch.equal(params[1], before)


@pytest.mark.parametrize("period", [0, -1, 2.0, True, "4"])
def test_bad_periods(period):
    with pytest.raises(ValueError, match="must be an integer of at least 1"):
        LevelOptimizer(torch.optim.SGD([{"params": parameters(), "period": period}], lr=0.1))


def test_what_cannot_be_wrapped_and_what_cannot_be_loaded():
    params = parameters()
    with pytest.raises(TypeError, match="LBFGS cannot"):
        LevelOptimizer(torch.optim.LBFGS(params))
    with pytest.raises(TypeError, match=r"expected a torch\.optim\.Optimizer"):
        LevelOptimizer(params)
    optimizer = LevelOptimizer(torch.optim.SGD(groups(params), lr=0.1))
    with pytest.raises(ValueError, match="saved by a plain optimizer"):
        optimizer.load_state_dict(torch.optim.SGD(groups(params), lr=0.1).state_dict())
    state = optimizer.state_dict()
    state["levels"]["means"] = {1: torch.zeros(9)}
    with pytest.raises(ValueError, match=r"gradient mean 1 of shape \(9,\)"):
        optimizer.load_state_dict(state)


def test_sparse_gradients_of_a_slow_group_are_refused():
    embedding = nn.Embedding(4, 2, sparse=True)
    optimizer = LevelOptimizer(torch.optim.SGD([{"params": embedding.parameters(), "period": 2}], lr=0.1))
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


def test_a_copied_model_keeps_its_memories_from_decay() -> None:
    import copy

    from nestlearn.models import HopeConfig, HopeLM

    model = HopeLM(HopeConfig(vocab_size=7, dim=8, depth=1, heads=2))
    for one in (model, copy.deepcopy(model)):
        names = {id(parameter): name for name, parameter in one.named_parameters()}
        decayed = {
            names[id(parameter)]
            for group in LevelOptimizer.for_model(one, lr=0.1, weight_decay=0.5).param_groups
            for parameter in group["params"]
            if group["weight_decay"] > 0
        }
        assert decayed
        assert not [name for name in decayed if ".mixer.memory." in name or "embedding" in name]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_beside_a_scheduler_steps_itself(how) -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = LevelOptimizer(torch.optim.SGD([parameter], lr=0.5))
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    other = how(optimizer)
    (own,) = other.param_groups[0]["params"]
    own.grad = torch.ones(2)
    other.step()
    assert (optimizer.steps, other.steps) == (0, 1)
    assert own.tolist() == [0.5, 0.5]
    assert parameter.tolist() == [1.0, 1.0]
    called = []
    other.register_step_post_hook(lambda *_: called.append(1))
    other.step()
    assert called == [1]


def test_a_group_with_a_bad_period_is_not_added() -> None:
    optimizer = LevelOptimizer(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.5))
    with pytest.raises(ValueError, match="'period'"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "period": 0})
    assert len(optimizer.param_groups) == 1
