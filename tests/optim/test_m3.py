"""M3: equal to plain transcriptions of Algorithm 1 and of its averaged form, and what follows from them."""

import pytest
import torch
from torch import Tensor, nn

from nestlearn.functional import newton_schulz
from nestlearn.models import HopeConfig, HopeLM
from nestlearn.optim import M3, LevelOptimizer

STEPS = 50
SETTINGS = {"betas": (0.9, 0.8, 0.7), "alpha": 0.6, "period": 7, "ns_steps": 4, "eps": 1e-3}
SHAPES = [(6, 6), (4, 9), (9, 4), (4, 9), (3, 2, 5, 4)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_newton_schulz(x: Tensor, steps: int) -> Tensor:
    """One matrix, as it is printed; on either side."""
    x = x / torch.linalg.matrix_norm(x) if bool(x.any()) else x
    for _ in range(steps):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


def algorithm_1(w: Tensor, gradients: list[Tensor], lr: float, *, betas, alpha, period, ns_steps, eps) -> Tensor:
    """Algorithm 1 line by line, loops over k and t; line 3 without the gradient that it counts twice."""
    m1, m2, v = torch.zeros_like(w), torch.zeros_like(w), torch.zeros_like(w)
    for k in range(-(-len(gradients) // period)):
        m2 = m2 + betas[2] * sum(gradients[max(0, k - 1) * period : k * period], torch.zeros_like(w))
        o2 = plain_newton_schulz(m2, ns_steps)
        for g in gradients[k * period : (k + 1) * period]:
            m1 = m1 + betas[0] * g
            v = v + betas[1] * g**2
            o1 = plain_newton_schulz(m1, ns_steps)
            w = w - lr * (o1 + alpha * o2) / (v.sqrt() + eps)
    return w


def averaged(w: Tensor, gradients: list[Tensor], lr: float, *, betas, alpha, period, ns_steps, eps) -> Tensor:
    """The "ema" form with all its bias corrections, of which `m3_step` says that they cancel."""
    m1, m2, v, o2 = (torch.zeros_like(w) for _ in range(4))
    for t, g in enumerate(gradients, start=1):
        if t > 1 and (t - 1) % period == 0:
            mean = torch.stack(gradients[t - 1 - period : t - 1]).mean(0)
            m2 = betas[2] * m2 + (1 - betas[2]) * mean
            o2 = plain_newton_schulz(m2 / (1 - betas[2] ** ((t - 1) // period)), ns_steps)
        m1 = betas[0] * m1 + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g**2
        o1 = plain_newton_schulz(m1 / (1 - betas[0] ** t), ns_steps)
        relative = v / (1 - betas[1] ** t)
        u = (o1 + alpha * o2) / ((relative / relative.mean()).sqrt() + eps)
        noise = ((1 - betas[0]) / (1 + betas[0])) ** 0.5
        present = (m1 / (1 - betas[0] ** t)).abs().max() / relative.max().sqrt()
        w = w - lr * 0.2 * min(1.0, float(present / (0.1 * noise))) * u / u.square().mean().sqrt()
    return w


def by_matrix(function, w: Tensor, gradients: list[Tensor], lr: float, **settings) -> Tensor:
    matrices = w.reshape(-1, *w.shape[-2:])
    each = [
        function(matrix, [g.reshape(matrices.shape)[i] for g in gradients], lr, **settings)
        for i, matrix in enumerate(matrices)
    ]
    return torch.stack(each).reshape(w.shape)


def run(optimizer, params, gradients, start=0, stop=STEPS) -> None:
    for step in range(start, stop):
        for parameter, own in zip(params, gradients, strict=True):
            parameter.grad = own[step].to(parameter.dtype)
        optimizer.step()


@pytest.mark.parametrize(("form", "specification"), [("paper", algorithm_1), ("ema", averaged)])
def test_both_forms_equal_their_transcriptions(form, specification) -> None:
    params = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    gradients = [[random(*p.shape, seed=100 * i + t) for t in range(STEPS)] for i, p in enumerate(params)]
    before = [p.detach().clone() for p in params]
    run(M3(params, lr=0.1, form=form, weight_decay=0.0, **SETTINGS), params, gradients)
    for parameter, start, own in zip(params, before, gradients, strict=True):
        expected = by_matrix(specification, start, own, 0.1, **SETTINGS)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(expected, start)


def test_a_matrix_whose_gradients_vanish_stops_as_under_adamw() -> None:
    """Some matrices of a stack get gradients no more, as experts that are chosen no more."""
    parameter = nn.Parameter(random(2, 6, 5, seed=0))
    start = parameter.detach().clone()
    gradients = [random(2, 6, 5, seed=t) * torch.tensor([1.0, float(t < 5)]).view(2, 1, 1) for t in range(300)]
    optimizer = M3([parameter], lr=0.1, weight_decay=0.0)
    moved = []
    for stop in (5, 45, 200, 300):
        before = parameter.detach().clone()
        run(optimizer, [parameter], [gradients], start=int(optimizer.state[parameter].get("step", 0)), stop=stop)
        moved.append((parameter.detach() - before).square().mean((-2, -1)).sqrt() / 0.1)
    assert float(moved[1][1]) < 8.0
    assert float(moved[2][1]) < 3.0  # 155 steps of 0.2 would be 31
    assert float(moved[3][1]) < 1e-4
    assert float(moved[3][0]) > 0.1  # its neighbour goes on
    one = nn.Parameter(start[1].clone())
    run(M3([one], lr=0.1, weight_decay=0.0), [one], [[g[1] for g in gradients]], stop=300)
    torch.testing.assert_close(parameter.detach()[1], one.detach(), rtol=1e-12, atol=1e-12)
    expected = averaged(start[1], [g[1] for g in gradients[:60]], 0.1, betas=(0.9, 0.95, 0.5), alpha=0.2, period=16,
                        ns_steps=5, eps=1.0)  # fmt: skip
    some = nn.Parameter(start[1].clone())
    run(M3([some], lr=0.1, weight_decay=0.0), [some], [[g[1] for g in gradients]], stop=60)
    torch.testing.assert_close(some.detach(), expected, rtol=1e-12, atol=1e-12)


def test_transcriptions_differ_where_the_forms_do() -> None:
    w, gradients = random(4, 9, seed=0), [random(4, 9, seed=t) for t in range(20)]
    a, b = (function(w, gradients, 0.1, **SETTINGS) for function in (algorithm_1, averaged))
    no_slow = averaged(w, gradients, 0.1, **{**SETTINGS, "alpha": 0.0})
    assert not torch.allclose(a, b, rtol=1e-2)
    assert not torch.allclose(b, no_slow, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_averaged_step_does_not_depend_on_the_scale_of_the_gradient(dtype) -> None:
    found = []
    for scale in (1.0, 2.0**-40, 2.0**40):
        parameter = nn.Parameter(random(8, 5, seed=0).to(dtype))
        optimizer = M3([parameter], lr=0.1, period=3)
        run(optimizer, [parameter], [[scale * random(8, 5, seed=t) for t in range(10)]], stop=10)
        found.append(parameter.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("form", ["ema", "paper"])
@pytest.mark.parametrize("scale", [1e-42, 1e-38, 1e-30, 1e-22, 1e15, 1e20, 1e30])
def test_gradients_whose_squares_vanish_or_overflow_break_nothing(form, scale) -> None:
    parameter = nn.Parameter(random(8, 5, seed=0).float())
    before = parameter.detach().clone()
    gradients = [(scale * random(8, 5, seed=t)).float() for t in range(10)]
    run(M3([parameter], lr=0.1, form=form, period=3, weight_decay=0.0), [parameter], [gradients], stop=10)
    assert bool(parameter.isfinite().all())
    if form == "ema" and scale > 1e-38:
        assert float((parameter.detach() - before).square().mean().sqrt()) > 0.02


def test_gradients_that_become_zero_stop_a_matrix_in_the_end() -> None:
    """The averages decay through all numbers that are too small to be squared."""
    parameter = nn.Parameter(random(8, 5, seed=0).float())
    optimizer = M3([parameter], lr=1e-3, weight_decay=0.0, alpha=0.0)
    run(optimizer, [parameter], [[random(8, 5, seed=0)] + [torch.zeros(8, 5)] * 999], stop=1000)
    before = parameter.detach().clone()
    run(optimizer, [parameter], [[torch.zeros(8, 5)] * 5], stop=5)
    assert torch.equal(parameter, before)
    assert bool(before.isfinite().all())


def test_eps_is_that_of_the_groups_own_form() -> None:
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], **own} for own in ({}, {"form": "paper"}, {"eps": 0.5})]
    assert [group["eps"] for group in M3(groups).param_groups] == [1.0, 1e-8, 0.5]


def test_an_averaged_step_has_the_size_of_adamws() -> None:
    parameter = nn.Parameter(random(32, 48, seed=0))
    before = parameter.detach().clone()
    run(M3([parameter], lr=0.5, weight_decay=0.0), [parameter], [[random(32, 48, seed=1)]], stop=1)
    assert float((parameter.detach() - before).square().mean().sqrt()) == pytest.approx(0.5 * 0.2, rel=1e-9)


def test_weight_decay_is_decoupled() -> None:
    with_decay, without = (nn.Parameter(random(4, 5, seed=0)) for _ in range(2))
    gradient = [[random(4, 5, seed=1)]]
    start = with_decay.detach().clone()
    run(M3([with_decay], lr=0.1, weight_decay=0.3), [with_decay], gradient, stop=1)
    run(M3([without], lr=0.1, weight_decay=0.0), [without], gradient, stop=1)
    torch.testing.assert_close(with_decay, without - 0.03 * start, rtol=1e-13, atol=1e-13)


def test_the_slow_direction_is_computed_once_a_period(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(matrix: Tensor, **settings) -> Tensor:
        calls.append(len(matrix))
        return newton_schulz(matrix, **settings)

    monkeypatch.setattr("nestlearn.optim.m3.newton_schulz", counting)
    params = [nn.Parameter(random(*shape, seed=0)) for shape in ((4, 6), (6, 4), (5, 4, 6))]
    run(M3(params, lr=0.1, period=4), params, [[random(*p.shape, seed=t) for t in range(8)] for p in params], stop=8)
    assert calls == [7, 7, 7, 7, 7] * 2  # eight steps and two periods; shapes that lie or stand go together


@pytest.mark.parametrize("shape", [(300, 129), (129, 300)])
def test_matrices_that_go_alone_equal_those_that_go_together(shape) -> None:
    """Above a size each is treated by itself on a CPU."""
    stack = nn.Parameter(random(2, *shape, seed=0))
    alone = [nn.Parameter(stack.detach()[i].clone()) for i in range(2)]
    gradients = [random(2, *shape, seed=t) for t in range(3)]
    run(M3([stack], lr=0.1, period=2), [stack], [gradients], stop=3)
    run(M3(alone, lr=0.1, period=2), alone, [[g[i] for g in gradients] for i in range(2)], stop=3)
    torch.testing.assert_close(stack, torch.stack(alone), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", ["m3", "adamw"])
def test_what_is_no_matrix_moves_as_under_adamw(rule) -> None:
    shape = (5,) if rule == "m3" else (4, 5)
    own, torchs = (nn.Parameter(random(*shape, seed=0).float()) for _ in range(2))
    gradients = [[random(*shape, seed=t).float() for t in range(9)]]
    settings = {"lr": 0.1, "weight_decay": 0.2}
    group = {"params": [own], "rule": rule}
    run(M3([group], adamw_betas=(0.8, 0.95), adamw_eps=1e-6, **settings), [own], gradients, stop=9)
    run(torch.optim.AdamW([torchs], betas=(0.8, 0.95), eps=1e-6, **settings), [torchs], gradients, stop=9)
    assert torch.equal(own, torchs)


def test_zero_gradients_move_nothing() -> None:
    parameter = nn.Parameter(random(4, 5, seed=0))
    before = parameter.detach().clone()
    run(M3([parameter], lr=0.1, weight_decay=0.0, period=2), [parameter], [[torch.zeros(4, 5)] * 5], stop=5)
    assert torch.equal(parameter, before)


def test_four_numbers_a_parameter() -> None:
    model = HopeLM(HopeConfig(vocab_size=32, dim=32, depth=1, heads=2))
    optimizer = M3.for_model(model, notice=lambda text: None)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = sum(x.numel() for name, x in optimizer.state[parameter].items() if name != "step")
            assert held == (4 if group["rule"] == "m3" else 2) * parameter.numel()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.patches = nn.Conv2d(1, 8, 3)
        self.first = nn.Linear(8, 16)
        self.norm = nn.LayerNorm(16)
        self.readout = nn.Parameter(torch.randn(2, 16))
        self.stack = nn.Parameter(torch.randn(3, 8, 8))
        self.extra = nn.Linear(16, 8, bias=False)
        self.head = nn.Linear(16, 16)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def test_for_model_sorts_parameters_and_says_how() -> None:
    said: list[str] = []
    model = Model()
    optimizer = M3.for_model(model, lr=0.01, weight_decay=0.3, adamw=["extra"], notice=said.append)
    found = {(g["rule"], g["weight_decay"]): set(g["param_names"]) for g in optimizer.param_groups}
    assert found == {
        ("m3", 0.3): {"first.weight", "stack"},
        ("adamw", 0.3): {"patches.weight", "head.weight", "extra.weight"},
        ("adamw", 0.0): {
            *("embedding.weight", "patches.bias", "first.bias", "norm.weight", "norm.bias", "readout", "head.bias"),
        },
    }
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}
    for kind in ("matrix", "embedding", "convolution", "norm", "bias", "thin", "head", "as asked"):
        assert kind in said[0]
    with pytest.raises(ValueError, match=r"'nowhere'.*embedding\.weight"):
        M3.for_model(model, adamw=["nowhere"])
    with pytest.raises(ValueError, match="nothing to train"):
        M3.for_model(nn.Linear(2, 2).requires_grad_(False))


def test_for_model_finds_the_head_of_a_pretrained_model() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    optimizer = M3.for_model(GPT2LMHeadModel(config), notice=lambda text: None)
    adamw = {name for g in optimizer.param_groups if g["rule"] == "adamw" for name in g["param_names"]}
    m3 = {name for g in optimizer.param_groups if g["rule"] == "m3" for name in g["param_names"]}
    assert {"lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"} <= adamw
    assert {name.split(".")[-2] for name in m3} == {"c_attn", "c_proj", "c_fc"}


def test_memories_are_stacks_of_matrices_and_levels_keep_their_periods() -> None:
    model = HopeLM(HopeConfig(vocab_size=32, dim=32, depth=1, heads=2, cms_periods=(1, 4)))
    optimizer = LevelOptimizer(M3.for_model(model, notice=lambda text: None))
    by_period: dict[int, set[str]] = {}
    for group in optimizer.param_groups:
        by_period.setdefault(group["period"], set()).update(group["param_names"])
        if any(".memory." in name for name in group["param_names"]):
            assert (group["rule"], group["weight_decay"]) == ("m3", 0.0)
    slow = {name for name, _ in model.level_parameters()[4]}
    assert by_period[4] == slow
    assert all(group["slow_period"] == 16 for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "sum"}, "form: expected 'ema' or 'paper', got 'sum'"),
        ({"betas": (0.9, 0.9)}, "betas: expected three numbers"),
        ({"betas": (0.9, 0.9, 1.0)}, "betas: expected three numbers"),
        ({"alpha": -1.0}, "alpha: expected at least 0"),
        ({"alpha": float("inf")}, "alpha: expected at least 0 and finite"),
        ({"adamw_betas": (0.9, 1.0)}, "adamw_betas: expected two numbers in"),
        ({"adamw_eps": -1.0}, "adamw_eps: expected at least 0"),
        ({"period": 0}, "period: expected an integer of at least 1, got 0"),
        ({"ns_steps": 2.0}, "ns_steps: expected an integer"),
        ({"eps": -1e-3}, "eps: expected at least 0"),
        ({"lr": -1.0}, "lr: expected at least 0"),
        ({"weight_decay": float("inf")}, "weight_decay: expected at least 0 and finite"),
    ],
)
def test_settings_out_of_range(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        M3([nn.Parameter(torch.zeros(2, 2))], **settings)
    with pytest.raises(ValueError, match="rule: expected 'm3' or 'adamw', got 'muon'"):
        M3([{"params": [nn.Parameter(torch.zeros(2, 2))], "rule": "muon"}])


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
def test_parameters_of_several_dtypes_move_as_each_of_them_alone(order: list[int]) -> None:
    torch.manual_seed(0)
    given = [torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 3)]
    gradients = [torch.randn(4, 6, dtype=torch.float64), torch.zeros(5, 3)]

    def moved(chosen: list[int]) -> list[torch.Tensor]:
        parameters = [torch.nn.Parameter(given[i].clone()) for i in chosen]
        optimizer = M3(parameters, lr=0.01)
        for _ in range(3):
            for i, parameter in zip(chosen, parameters, strict=True):
                parameter.grad = gradients[i].clone()
            optimizer.step()
        return [parameter.detach() for parameter in parameters]

    for i, together in zip(order, moved(order), strict=True):
        assert together.isfinite().all()
        assert torch.equal(together, moved([i])[0])
