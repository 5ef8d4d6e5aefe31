"""The momentum family: each memory against autograd on its own objective, torch.optim where it has the same, Adam."""

import pytest
import torch
from torch import Tensor, nn

from nestlearn.functional import associative_update
from nestlearn.optim import (
    DeepMomentum,
    DeltaMomentum,
    HigherOrderMomentum,
    Muon,
    PreconditionedMomentum,
    ReadoutMomentum,
)
from nestlearn.optim.deep_momentum import deep_memory_read
from nestlearn.optim.momentum import remember_by_delta_rule, signed_power, whitening

SHAPES = [(4, 6), (6, 4), (3, 2, 5, 4)]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def run(optimizer, params, steps: int) -> None:
    for step in range(steps):
        for i, parameter in enumerate(params):
            parameter.grad = random(*parameter.shape, seed=100 * i + step).to(parameter.dtype)
        optimizer.step()


def descend(objective, memory: tuple[Tensor, ...], *, decay: float, rate: float) -> tuple[Tensor, ...]:
    """alpha m - zeta grad L(m), the gradient by autograd."""
    leaves = tuple(m.detach().requires_grad_() for m in memory)
    gradients = torch.autograd.grad(objective(*leaves), leaves)
    return tuple(decay * m.detach() - rate * g for m, g in zip(leaves, gradients, strict=True))


def plain(memory, w, steps, i, objective, *, decay, rate, lr, read=lambda m, g: m[0]):
    """The two levels of Eq. 35-37: the memory descends its own objective, the weight follows what it says."""
    for step in range(steps):
        g = random(*w.shape, seed=100 * i + step)
        memory = descend(lambda *m, g=g: objective(*m, g), memory, decay=decay, rate=rate)
        w = w + lr * read(memory, g)
    return w


def check(make, objective, *, decay=0.9, rate=0.1, lr=0.3, read=lambda m, g: m[0], steps=10) -> None:
    params = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    before = [p.detach().clone() for p in params]
    run(make(params, lr=lr, momentum=decay, rate=rate), params, steps)
    for i, (parameter, w) in enumerate(zip(params, before, strict=True)):
        memory = (torch.zeros_like(w),)
        expected = plain(memory, w, steps, i, objective, decay=decay, rate=rate, lr=lr, read=read)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-12, atol=1e-12)


def test_delta_momentum_descends_its_objective() -> None:
    """Eq. 48 with P = I: 1/2 |m g^T + I|^2."""

    def objective(m: Tensor, g: Tensor) -> Tensor:
        return 0.5 * (m @ g.mT + torch.eye(g.shape[-2], dtype=g.dtype)).square().sum()

    check(lambda params, **own: DeltaMomentum(params, form="explicit", **own), objective, rate=0.02)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 100.0])
def test_implicit_delta_momentum_is_the_argmin(shape: tuple[int, ...], scale: float) -> None:
    """argmin_m 1/2 |m g^T + P|^2 + 1/(2 zeta) |m - alpha m_t|^2 has slope zero, whatever the gradient's size."""
    m, g, p = random(*shape), scale * random(*shape, seed=1), random(*shape[:-1], shape[-2], seed=2)
    new = remember_by_delta_rule(m, g, -(p @ g), decay=0.8, rate=0.5).requires_grad_()
    loss = 0.5 * (new @ g.mT + p).square().sum() + (new - 0.8 * m).square().sum() / (2 * 0.5)
    (slope,) = torch.autograd.grad(loss, new)
    assert float(slope.abs().max()) < 1e-10 * max(1.0, scale**2)


def test_delta_momentum_is_the_rule_of_all_memories() -> None:
    """`associative_update` with the rows of g as keys and those of -P g's preconditioner as values."""
    m, g, p = random(4, 6), random(4, 6, seed=1), random(4, 4, seed=2)
    found = remember_by_delta_rule(m, g, -(p @ g), decay=0.9, rate=0.05, form="explicit")
    expected = associative_update(m, g, -p.mT, retain=0.9, erase=0.05, write=0.05)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_preconditioned_momentum_descends_its_objective() -> None:
    """Eq. 46: <m g^T, P>."""

    def objective(m: Tensor, g: Tensor) -> Tensor:
        return (m @ g.mT * whitening(g)).sum()

    check(PreconditionedMomentum, objective)


def test_whitening_is_an_inverse_root() -> None:
    g = random(3, 4, 9)
    gram = g @ g.mT
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    root = whitening(g, eps=1e-2)
    eye = torch.eye(4, dtype=g.dtype).expand(3, -1, -1)
    torch.testing.assert_close(root @ root @ (gram / mean + 1e-2 * eye), eye, rtol=1e-9, atol=1e-9)
    assert bool(whitening(torch.zeros(2, 3)).isfinite().all())


def test_higher_order_momentum_descends_its_objective() -> None:
    """Eq. 51 with P = I: <m, phi(g)>."""
    g = random(3, 5, 4)
    feature = signed_power(g, 2.0)
    torch.testing.assert_close(feature.square().mean((-2, -1)), g.square().mean((-2, -1)))
    ratio = feature / (g.sign() * g.square())
    torch.testing.assert_close(ratio, ratio[:, :1, :1].expand_as(ratio))
    torch.testing.assert_close(signed_power(g, 1.0), g)
    check(
        lambda params, **own: HigherOrderMomentum(params, power=2.0, **own),
        lambda m, g: (m * signed_power(g, 2.0)).sum(),
    )


@pytest.mark.parametrize("make", [
    lambda params: PreconditionedMomentum(params, lr=0.1, momentum=0.8, preconditioner="identity", weight_decay=0.0),
    lambda params: HigherOrderMomentum(params, lr=0.1, momentum=0.8, power=1.0),
    lambda params: ReadoutMomentum(params, lr=0.1, momentum=0.8, readout="identity"),
])  # fmt: skip
def test_the_plain_memory_is_torchs_momentum(make) -> None:
    """Eq. 33."""
    own, torchs = ([nn.Parameter(random(*shape)) for shape in [*SHAPES, (5,), ()]] for _ in range(2))
    run(make(own), own, 10)
    run(torch.optim.SGD(torchs, lr=0.1, momentum=0.8), torchs, 10)
    for a, b in zip(own, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_sign_readout_is_signed_momentum() -> None:
    parameter = nn.Parameter(random(4, 6))
    before = parameter.detach().clone()
    run(ReadoutMomentum([parameter], lr=0.1, readout="sign"), [parameter], 1)
    torch.testing.assert_close(parameter.detach(), before - 0.1 * random(4, 6, seed=0).sign())


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_muon_is_torchs_in_fp32(nesterov: bool, adjust: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon rounds to bf16 before its iteration; without that rounding its own code gives our steps."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    own, torchs = ([nn.Parameter(random(*shape).float()) for shape in [(6, 6), (4, 9), (9, 4)]] for _ in range(2))
    settings = {"lr": 0.1, "weight_decay": 0.2, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
    run(Muon(own, **settings), own, 20)
    run(torch.optim.Muon(torchs, **settings), torchs, 20)
    for a, b in zip(own, torchs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)
        assert float((a - random(*a.shape).float()).detach().abs().max()) > 0.1


def test_muon_is_torchs_to_the_precision_of_bf16() -> None:
    own, torchs = ([nn.Parameter(random(8, 16).float())] for _ in range(2))
    run(Muon(own, lr=1.0, weight_decay=0.0), own, 1)
    run(torch.optim.Muon(torchs, lr=1.0, weight_decay=0.0), torchs, 1)
    moved = (own[0] - random(8, 16).float()).detach()
    assert float((own[0] - torchs[0]).detach().norm() / moved.norm()) < 0.03


@pytest.mark.parametrize("objective", ["dot", "regression"])
def test_deep_momentum_descends_its_objective(objective: str) -> None:
    """Eq. 50: an MLP whose objective autograd differentiates."""
    decay, rate, lr, hidden = 0.95, 0.2, 0.3, 7
    params = [nn.Parameter(random(*shape, seed=i)) for i, shape in enumerate(SHAPES)]
    before = [p.detach().clone() for p in params]
    optimizer = DeepMomentum(params, lr=lr, momentum=decay, rate=rate, hidden=hidden, objective=objective)
    first = [torch.zeros_like(p) for p in params]
    for parameter, zero in zip(params, first, strict=True):
        parameter.grad = zero  # only makes the memories
    optimizer.step()
    memories = [(optimizer.state[p]["outer"].clone(), optimizer.state[p]["inner"].clone()) for p in params]
    run(optimizer, params, 10)

    def loss(outer: Tensor, inner: Tensor, u: Tensor) -> Tensor:
        said = deep_memory_read(outer, inner, u)
        each = said if objective == "dot" else 0.5 * (said + u).square()
        return each.sum() / u.shape[-2]

    for i, (parameter, w, memory) in enumerate(zip(params, before, memories, strict=True)):
        for step in range(10):
            g = random(*w.shape, seed=100 * i + step)
            u = g / g.square().sum(-1, keepdim=True).mean(-2, keepdim=True).sqrt()
            memory = descend(lambda a, b, u=u: loss(a, b, u), memory, decay=decay, rate=rate)
            w = w + lr * w.shape[-1] ** 0.5 * deep_memory_read(*memory, u)
        torch.testing.assert_close(parameter.detach(), w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-22, 1e22, 1e30])
def test_deep_momentum_does_not_depend_on_the_scale_of_the_gradient(scale: float) -> None:
    found = []
    for factor in (1.0, scale):
        parameter = nn.Parameter(random(4, 6).float())
        optimizer = DeepMomentum([parameter], lr=0.1)
        for step in range(5):
            parameter.grad = (factor * random(4, 6, seed=step)).float()
            optimizer.step()
        found.append(parameter.detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


def test_a_deep_memory_learns_to_go_downhill() -> None:
    parameter = nn.Parameter(random(6, 8))
    optimizer = DeepMomentum([parameter], lr=0.02)
    target, losses = random(6, 8, seed=9), []
    for _ in range(300):
        loss = (parameter - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.05 * losses[0]


def adam_memory(g: Tensor, weights: Tensor, regularisation: float) -> Tensor:
    """Eq. 101-102 element by element: argmin_m sum_i w_i (m g_i - P)^2 + lambda m^2, P the root of Eq. 105."""
    p = ((weights[:, None] * g.square()).sum(0) / weights.sum()).sqrt()
    found = []
    for j in range(g.shape[1]):
        rows = torch.cat([weights.sqrt() * g[:, j], torch.tensor([regularisation**0.5], dtype=g.dtype)])
        targets = torch.cat([weights.sqrt() * p[j], torch.zeros(1, dtype=g.dtype)])
        found.append(torch.linalg.lstsq(rows[:, None], targets[:, None], driver="gelsd").solution[0, 0])
    return torch.stack(found)


def test_adam_is_the_optimal_elementwise_memory() -> None:
    """Eq. 100-105: with gradients weighted by beta^age, the memory that best maps gradients to P is Adam's step."""
    beta, lr, steps = 0.9, 0.1, 12
    parameter = nn.Parameter(random(5))
    w = parameter.detach().clone()
    adam = torch.optim.Adam([parameter], lr=lr, betas=(beta, beta), eps=1e-30)
    for step in range(1, steps + 1):
        parameter.grad = random(5, seed=step)
        adam.step()
        g = torch.stack([random(5, seed=t) for t in range(1, step + 1)])
        ages = torch.arange(step - 1, -1, -1, dtype=g.dtype)
        w = w - lr * adam_memory(g, beta**ages, 1e-30)
        torch.testing.assert_close(parameter.detach(), w, rtol=1e-10, atol=1e-10)


def test_the_optimal_memory_without_decay_is_adagrad_with_momentum() -> None:
    """Eq. 102 and 105 as printed, sums instead of averages: m* = (H + lambda)^-1 M P."""
    g = torch.stack([random(5, seed=t) for t in range(7)])
    h, m = g.square().sum(0), g.sum(0)
    p = (h / len(g)).sqrt()
    found = adam_memory(g, torch.ones(len(g), dtype=g.dtype), 0.3)
    torch.testing.assert_close(found, m * p / (h + 0.3), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(adam_memory(g, torch.ones(7, dtype=g.dtype), 1e-30), m / h.sqrt() / 7**0.5)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (DeltaMomentum, {"form": "exact"}, "form: expected 'implicit' or 'explicit', got 'exact'"),
        (DeltaMomentum, {"rate": 0.0}, "rate: expected more than 0"),
        (DeltaMomentum, {"momentum": 1.1}, "momentum: expected a number from 0 to 1"),
        (PreconditionedMomentum, {"preconditioner": "adam"}, "preconditioner: expected 'identity' or 'whitening'"),
        (HigherOrderMomentum, {"power": -1.0}, "power: expected more than 0"),
        (ReadoutMomentum, {"readout": "tanh"}, "readout: expected one of identity, newton_schulz, sign, got 'tanh'"),
        (ReadoutMomentum, {"ns_steps": 0}, "ns_steps: expected an integer of at least 1"),
        (Muon, {"adjust_lr_fn": "none"}, "adjust_lr_fn: expected 'original' or 'match_rms_adamw'"),
        (DeepMomentum, {"hidden": 0}, "hidden: expected an integer of at least 1"),
        (DeepMomentum, {"objective": "l2"}, "objective: expected 'regression' or 'dot'"),
    ],
)  # fmt: skip
def test_settings_out_of_range(make, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        make([nn.Parameter(torch.zeros(2, 2))], **settings)


def test_muon_takes_no_vectors() -> None:
    with pytest.raises(ValueError, match=r"give vectors to torch\.optim\.AdamW"):
        Muon([nn.Parameter(torch.zeros(3))])
