"""Titans against its own equations, one token after another."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nestlearn.layers.titans import Titans

State = dict[str, Tensor]


def matvec(matrix: Tensor, x: Tensor) -> Tensor:
    return (matrix @ x[..., None])[..., 0]


def specify(layer: Titans, x: Tensor, state: State) -> tuple[Tensor, State]:
    """S_t = mu S_{t-1} - (1 - mu) theta grad_t;  M_t = alpha M_{t-1} - erasure + S_t, the gradient at the snapshot.

    The gradient of 1/2 |M(k) - v|^2 for each linear map is (error at its output) (its input)^T, here by autograd.
    """
    initial = {"inner": layer.memory.inner[:, 0], "outer": layer.memory.outer[:, 0]}
    fixed = initial if layer.retain_to == "initial" else {name: torch.zeros_like(w) for name, w in initial.items()}
    running = {name: state[name][:, :, 0] for name in initial}
    snapshot = {name: state[f"{name}_snapshot"][:, :, 0] for name in initial}
    momentum = {
        n: state[f"{n}_momentum"][:, :, 0] if layer.momentum else torch.zeros_like(w) for n, w in running.items()
    }
    position, window = state["position"], state["convolution"]
    outputs = []
    for t in range(x.shape[1]):
        window = torch.cat([window, x[:, t : t + 1] @ layer.streams.projection.weight.T], dim=1)
        u = F.silu((window * layer.streams.convolution.weight).sum(1)).unflatten(-1, (3, layer.heads, -1))
        window = window[:, 1:]
        q, k, v = (s / (s.square().sum(-1, keepdim=True) + 1e-12).sqrt() for s in u.unbind(1))
        logits = (x[:, t] @ layer.gates.weight.T).unflatten(-1, (-1, layer.heads))
        gate = 0.99 * torch.sigmoid(logits[:, 0] + layer.gate_bias)
        alpha = torch.sigmoid(logits[:, 1] + layer.retain_bias)[..., None, None]
        mu = torch.sigmoid(logits[:, 2] + layer.momentum_bias) if layer.momentum else torch.zeros_like(gate)

        inner, outer = (fixed[name] + snapshot[name] for name in ("inner", "outer"))
        z = matvec(inner, k)
        read = matvec(outer, F.silu(z))
        loss = (read - v).square().sum() / 2
        (error,) = torch.autograd.grad(loss, read, create_graph=True)
        if layer.write_bound is not None:
            error = error * (layer.write_bound / error.norm(dim=-1, keepdim=True).clamp_min(layer.write_bound))
        (image,) = torch.autograd.grad(read, z, error, create_graph=True)
        if layer.write_bound is not None:
            image = image * (layer.write_bound / image.norm(dim=-1, keepdim=True).clamp_min(layer.write_bound))
        fraction = layer.write_scale / (layer.chunk_size if layer.inner_rule == "gd" else 1)
        error, image = fraction * error, fraction * image

        before = dict(running)
        for name, key, written in (("inner", k, image), ("outer", F.silu(z), error)):
            step = gate / (1 - gate + gate * key.square().sum(-1))
            gradient = written[..., :, None] * key[..., None, :]
            momentum[name] = mu[..., None, None] * momentum[name] - ((1 - mu) * step)[..., None, None] * gradient
            target = {"dgd": before[name], "delta": before[name] - snapshot[name], "gd": torch.zeros_like(gradient)}
            erased = matvec(target[layer.inner_rule], key)[..., :, None] * key[..., None, :]
            running[name] = alpha * before[name] - step[..., None, None] * erased + momentum[name]
        memory = {"token": running, "previous": before, "chunk": snapshot}[layer.read]
        hidden = F.silu(matvec(fixed["inner"] + memory["inner"], q))
        outputs.append(matvec(fixed["outer"] + memory["outer"], hidden))
        position = position + 1
        ended = (position % layer.chunk_size == 0)[:, None, None, None]
        snapshot = {name: torch.where(ended, running[name], snapshot[name]) for name in running}
    o = torch.stack(outputs, dim=1)
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6) * layer.readout.norm.weight
    y = (o.flatten(2) * F.silu(x @ layer.readout.gate.weight.T)) @ layer.readout.output.weight.T
    after = {"position": position % layer.chunk_size, "convolution": window}
    after |= {name: w.unsqueeze(2) for name, w in running.items()}
    after |= {f"{name}_snapshot": w.unsqueeze(2) for name, w in snapshot.items()}
    return y, after | ({f"{n}_momentum": w.unsqueeze(2) for n, w in momentum.items()} if layer.momentum else {})


@pytest.mark.parametrize("write_bound", [None, 0.3])
@pytest.mark.parametrize("retain_to", ["initial", "zero"])
@pytest.mark.parametrize("read", ["token", "previous", "chunk"])
@pytest.mark.parametrize("momentum", [False, True])
@pytest.mark.parametrize("rule", ["gd", "dgd", "delta"])
def test_equals_its_equations(rule: str, momentum: bool, read: str, retain_to: str, write_bound: float | None) -> None:
    layer = Titans(
        8,
        2,
        inner_rule=rule,  # type: ignore[arg-type]
        momentum=momentum,
        read=read,  # type: ignore[arg-type]
        retain_to=retain_to,  # type: ignore[arg-type]
        write_bound=write_bound,
        chunk_size=4,
        memory_hidden=5,
        write_scale=0.6,
    ).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.7 * torch.randn_like(parameter))
    state = {
        name: value if name == "position" else (value + 0.3 * torch.randn_like(value)).detach().requires_grad_()
        for name, value in layer.init_state(2, dtype=torch.float64).items()
    }
    state["position"] = torch.tensor([1, 2])
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters(), *(value for value in state.values() if value.requires_grad)]
    found = []
    for y, after in (layer(x, state), specify(layer, x, state)):
        results = {"y": y, **after}
        generator = torch.Generator().manual_seed(2)
        total = torch.zeros((), dtype=torch.float64)
        for name in sorted(results):
            if name != "position":
                drawn = torch.randn(results[name].shape, dtype=torch.float64, generator=generator)
                total = total + (results[name] * drawn).sum()
        gradients = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        found.append([results[name] for name in sorted(results)] + list(gradients))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max().clamp_min(1e-3)
