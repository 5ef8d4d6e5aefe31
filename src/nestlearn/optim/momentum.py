"""Momentum as an associative memory of gradients, and what it becomes with other objectives (Eq. 33, 46-49, 51-52).

A momentum m has the shape of its weight W (rows, columns). With g the gradient, alpha the momentum and zeta the rate:

    Eq. 33     m <- alpha m - zeta g                         gradient descent on <m, g>, with decay
    Eq. 46-47  m <- alpha m - zeta P g                       <m g^T, P>: the memory maps g to -P, a preconditioner
    Eq. 48-49  m <- m (alpha - zeta g^T g) - zeta P g        1/2 |m g^T + P|^2: the delta rule, which erases first
    Eq. 51     m <- alpha m - zeta P phi(g)                  features of the gradient are remembered
    Eq. 52     W <- W + lr sigma(m)                          read through a non-linearity; otherwise W <- W + lr m

With zeta = 1 and P = I the first is torch.optim.SGD's momentum. A stack (..., rows, columns) is many matrices, a vector
is a matrix of one row, a number one of one entry. The memory that is an MLP (Eq. 50) is in `deep_momentum`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nestlearn.functional.newton_schulz import newton_schulz
from nestlearn.optim.shell import MemoryOptimizer, NonFinite, apply_update, need, sharded_like, whole

DeltaForm = Literal["implicit", "explicit"]
Preconditioner = Literal["identity", "whitening"]
Readout = Literal["identity", "newton_schulz", "sign"]


def remember(momentum: Tensor, value: Tensor, *, decay: float, rate: float) -> Tensor:
    """alpha m + zeta value: the memory of a dot product (Eq. 33, 47, 51), value = -P phi(g).

    Args:
        momentum: m (..., rows, columns).
        value: of the same shape.
        decay: alpha.
        rate: zeta.
    """
    return decay * momentum + rate * value


def remember_by_delta_rule(
    momentum: Tensor, gradient: Tensor, value: Tensor, *, decay: float, rate: float, form: DeltaForm = "implicit"
) -> Tensor:
    """The delta rule on the memory of gradients (Eq. 48-49), value = -P g.

    The printed decay term lacks its zeta, and its last term's sign says that the target is -P; see the errata.

    Args:
        momentum: m (..., rows, columns).
        gradient: g, of the same shape.
        value: of the same shape.
        decay: alpha.
        rate: zeta.
        form: "explicit", one step of gradient descent, m (alpha - zeta g^T g) + zeta value, which diverges where
            zeta |g|^2 exceeds 2. "implicit", the argmin of the objective plus |m - alpha m_t|^2 / (2 zeta),
            (alpha m + zeta value) (I + zeta g^T g)^-1, which no gradient makes diverge. Rounding costs zeta |g|^2 times
            the precision, so that in fp32 sqrt(zeta) |g| should stay below 1000.
    """
    written = decay * momentum + rate * value
    if form == "explicit":
        return written - rate * (momentum @ gradient.mT) @ gradient
    # (I + zeta g^T g)^-1 = I - zeta g^T (I + zeta g g^T)^-1 g: solved on the side of the smaller Gram matrix.
    rows, columns = gradient.shape[-2:]
    eye = torch.eye(min(rows, columns), dtype=gradient.dtype, device=gradient.device)
    if rows >= columns:
        return torch.linalg.solve(eye + rate * gradient.mT @ gradient, written.mT).mT
    inner = torch.linalg.solve(eye + rate * gradient @ gradient.mT, gradient)
    return written - rate * (written @ gradient.mT) @ inner


def whitening(gradient: Tensor, eps: float = 1e-3) -> Tensor:
    """P = (g g^T / s + eps)^(-1/2), s the mean of the eigenvalues of g g^T: all directions of a gradient count alike.

    Args:
        gradient: (..., rows, columns).
        eps: relative to the mean eigenvalue.

    Returns:
        (..., rows, rows); zero gradients give a finite P.
    """
    gram = gradient @ gradient.mT
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp_min(0)
    mean = values.mean(-1, keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
    return (vectors * (values / mean + eps).rsqrt().unsqueeze(-2)) @ vectors.mT


def signed_power(gradient: Tensor, power: float) -> Tensor:
    """phi(g) = sign(g) |g|^power, scaled to keep the root mean square of g (Eq. 51)."""
    tiny = torch.finfo(gradient.dtype).tiny
    size = gradient.square().mean((-2, -1), keepdim=True).sqrt() + tiny
    feature = gradient.sign() * (gradient.abs() / size) ** power
    return feature * (size / (feature.square().mean((-2, -1), keepdim=True).sqrt() + tiny))


READOUTS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "identity": lambda m, steps: m,
    "newton_schulz": lambda m, steps: newton_schulz(m, steps=steps),
    "sign": lambda m, steps: m.sign(),
}


class _Momentum(MemoryOptimizer):
    """What the family shares: one memory a parameter, one number a weight."""

    def __init__(
        self,
        params: Any,
        lr: float,
        momentum: float,
        rate: float,
        weight_decay: float,
        nonfinite: NonFinite,
        **settings: Any,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "rate": rate, "weight_decay": weight_decay, **settings}
        super().__init__(params, defaults, nonfinite=nonfinite)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        need(0 <= group["momentum"] <= 1, "momentum", "a number from 0 to 1", group["momentum"])
        need(0 < group["rate"] < math.inf, "rate", "more than 0 and finite", group["rate"])

    def write(self, momentum: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """The memory after it has seen a gradient; both (..., rows, columns)."""
        return remember(momentum, -gradient, decay=group["momentum"], rate=group["rate"])

    def read(self, momentum: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        """What the weight is moved by, times lr."""
        return momentum

    def update_group(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        (momenta,) = self.buffers(parameters, "momentum")
        updates = []
        for held, gradient in zip(momenta, gradients, strict=True):
            # Shards are gathered: the products need whole matrices.
            g = as_matrix(whole(gradient).to(held.dtype))
            m = self.write(as_matrix(whole(held)), g, group)
            shape = gradient.shape
            held.copy_(sharded_like(m.reshape(shape), held))
            updates.append(sharded_like(self.read(m, g, group).reshape(shape), held))
        apply_update(parameters, updates, lr=float(group["lr"]), weight_decay=group["weight_decay"])


class PreconditionedMomentum(_Momentum):
    """Momentum of preconditioned gradients (Eq. 46-47), m <- alpha m - zeta P g, W <- W + lr m.

    Args:
        params: as `torch.optim` takes them.
        lr: learning rate.
        momentum: alpha, from 0 to 1.
        rate: zeta, of the memory; 1 - momentum makes it an average.
        preconditioner: "identity", with which it is torch.optim.SGD's momentum, or `whitening`.
        weight_decay: times `lr`, apart from the step.
        nonfinite: "raise" or "skip", for gradients that are not finite.

    Raises:
        ValueError: for a setting out of range or an empty group.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        rate: float = 1.0,
        preconditioner: Preconditioner = "whitening",
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, lr, momentum, rate, weight_decay, nonfinite, preconditioner=preconditioner)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        known = ("identity", "whitening")
        need(group["preconditioner"] in known, "preconditioner", "'identity' or 'whitening'", group["preconditioner"])

    def write(self, momentum: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        value = -gradient if group["preconditioner"] == "identity" else -(whitening(gradient) @ gradient)
        return remember(momentum, value, decay=group["momentum"], rate=group["rate"])


class DeltaMomentum(_Momentum):
    """Momentum by the delta rule (Eq. 48-49): what it holds in the directions of a new gradient is erased first.

    Args:
        params: as `torch.optim` takes them.
        lr: learning rate.
        momentum: alpha, from 0 to 1; 1 forgets by erasing alone.
        rate: zeta, of the memory: how strongly it erases and writes.
        form: "implicit" or "explicit", see `remember_by_delta_rule`.
        weight_decay: times `lr`, apart from the step.
        nonfinite: "raise" or "skip", for gradients that are not finite.

    Raises:
        ValueError: for a setting out of range or an empty group.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        rate: float = 1.0,
        form: DeltaForm = "implicit",
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, lr, momentum, rate, weight_decay, nonfinite, form=form)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        need(group["form"] in ("implicit", "explicit"), "form", "'implicit' or 'explicit'", group["form"])

    def write(self, momentum: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        decay, rate, form = group["momentum"], group["rate"], group["form"]
        return remember_by_delta_rule(momentum, gradient, -gradient, decay=decay, rate=rate, form=form)


class HigherOrderMomentum(_Momentum):
    """Momentum of features of the gradient (Eq. 51), here `signed_power`.

    Args:
        params: as `torch.optim` takes them.
        lr: learning rate.
        power: of the feature; 1 is plain momentum, below 1 small entries count more, above 1 large ones.
        momentum: alpha, from 0 to 1.
        rate: zeta, of the memory.
        weight_decay: times `lr`, apart from the step.
        nonfinite: "raise" or "skip", for gradients that are not finite.

    Raises:
        ValueError: for a setting out of range or an empty group.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        power: float = 0.5,
        momentum: float = 0.9,
        rate: float = 1.0,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        super().__init__(params, lr, momentum, rate, weight_decay, nonfinite, power=power)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        need(0 < group["power"] < math.inf, "power", "more than 0 and finite", group["power"])

    def write(self, momentum: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        value = -signed_power(gradient, group["power"])
        return remember(momentum, value, decay=group["momentum"], rate=group["rate"])


class ReadoutMomentum(_Momentum):
    """Momentum that is read through a non-linearity (Eq. 52), W <- W + lr sigma(m).

    Args:
        params: as `torch.optim` takes them.
        lr: learning rate.
        momentum: alpha, from 0 to 1.
        rate: zeta, of the memory.
        readout: sigma: "newton_schulz", "sign" or "identity".
        nesterov: whether the gradient enters once more before the memory is read.
        ns_steps: Newton-Schulz iterations.
        weight_decay: times `lr`, apart from the step.
        nonfinite: "raise" or "skip", for gradients that are not finite.

    Raises:
        ValueError: for a setting out of range or an empty group.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        momentum: float = 0.9,
        rate: float = 1.0,
        readout: Readout = "newton_schulz",
        nesterov: bool = False,
        ns_steps: int = 5,
        weight_decay: float = 0.0,
        nonfinite: NonFinite = "raise",
    ) -> None:
        own = {"readout": readout, "nesterov": nesterov, "ns_steps": ns_steps}
        super().__init__(params, lr, momentum, rate, weight_decay, nonfinite, **own)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        need(group["readout"] in READOUTS, "readout", f"one of {', '.join(READOUTS)}", group["readout"])
        steps = group["ns_steps"]
        need(type(steps) is int and steps >= 1, "ns_steps", "an integer of at least 1", steps)

    def read(self, momentum: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        m = momentum
        if group["nesterov"]:
            m = remember(m, -gradient, decay=group["momentum"], rate=group["rate"])
        return READOUTS[group["readout"]](m, group["ns_steps"])


class Muon(ReadoutMomentum):
    """Muon, the linear memory read through Newton-Schulz: torch.optim.Muon in fp32, or fp64, and for stacks too.

    Args:
        params: as `torch.optim` takes them; each with two axes or more.
        lr: learning rate.
        weight_decay: times `lr`, apart from the step.
        momentum: of the average of gradients.
        nesterov: as in `ReadoutMomentum`.
        ns_steps: Newton-Schulz iterations.
        adjust_lr_fn: "original", times sqrt(max(1, rows / columns)), or "match_rms_adamw", times
            0.2 sqrt(max(rows, columns)), as in torch.optim.Muon.
        nonfinite: "raise" or "skip", for gradients that are not finite.

    Raises:
        ValueError: for a setting out of range, a vector, or an empty group.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: Literal["original", "match_rms_adamw"] = "original",
        nonfinite: NonFinite = "raise",
    ) -> None:
        settings: dict[str, Any] = {"readout": "newton_schulz", "nesterov": nesterov, "ns_steps": ns_steps}
        settings |= {"adjust_lr_fn": adjust_lr_fn}
        _Momentum.__init__(self, params, lr, momentum, 1 - momentum, weight_decay, nonfinite, **settings)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        adjust = group["adjust_lr_fn"]
        need(adjust in ("original", "match_rms_adamw"), "adjust_lr_fn", "'original' or 'match_rms_adamw'", adjust)
        vectors = [tuple(p.shape) for p in group["params"] if p.ndim < 2]
        need(not vectors, "params", "matrices, or stacks of them (give vectors to torch.optim.AdamW)", vectors)

    def read(self, momentum: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Tensor:
        rows, columns = momentum.shape[-2:]
        scale = math.sqrt(max(1, rows / columns))
        if group["adjust_lr_fn"] == "match_rms_adamw":
            scale = 0.2 * math.sqrt(max(rows, columns))
        return scale * super().read(momentum, gradient, group)


def as_matrix(tensor: Tensor) -> Tensor:
    """A vector as one row, a number as one entry, anything else as it is."""
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor
