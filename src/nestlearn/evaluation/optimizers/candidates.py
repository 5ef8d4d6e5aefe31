"""Optimizers by name, each ready to train a model: one rule for matrices or linear layers, AdamW for the rest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.functional import newton_schulz
from nestlearn.optim import M3, DeltaGradientDescent, Muon
from nestlearn.optim.groups import sorted_groups

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
MOMENTUM = 0.9
# Under SGD and delta gradient descent, whose rates are of another kind, what is in no linear layer keeps this one.
OTHERS_LR = 4e-3

Build = Callable[[nn.Module, float], "list[torch.optim.Optimizer]"]


class Together:
    """Several optimizers that step as one; their rates are scaled by a common factor.

    Args:
        optimizers: of one model; none shares a parameter with another.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        self.optimizers = optimizers
        self._groups = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]

    def step(self, factor: float) -> None:
        """One step at `factor` times each group's own rate."""
        for group, lr in self._groups:
            group["lr"] = lr * factor
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An optimizer of a comparison.

    Attributes:
        build: (model, learning rate) -> the optimizers that train it together.
        rates: learning rates to be tried.
    """

    build: Build
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)


def adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    groups = _groups(model, "adamw")
    return [torch.optim.AdamW([own for _, own in groups], lr=lr, betas=BETAS)]


def muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon with the size of AdamW's steps: torch.optim.Muon, in fp32."""
    groups = _groups(model, "muon")
    matrices = [own for rule, own in groups if rule == "muon"]
    rest = [own for rule, own in groups if rule == "adamw"]
    return [Muon(matrices, lr, adjust_lr_fn="match_rms_adamw"), torch.optim.AdamW(rest, lr=lr, betas=BETAS)]


def adamuon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """AdaMuon of the package pytorch_optimizer, with its iteration in fp32 like the others'."""
    try:
        from pytorch_optimizer import AdaMuon
    except ImportError:
        raise ModuleNotFoundError(
            "AdaMuon comes from the package pytorch_optimizer; install it with pip install 'nestlearn[baselines]'"
        ) from None
    own = {True: {}, False: {"betas": BETAS}}
    groups = [
        {"params": group["params"], "weight_decay": group["weight_decay"], "use_muon": matrix, "lr": lr, **own[matrix]}
        for rule, group in _groups(model, "muon")
        for matrix in [rule == "muon"]
    ]

    class Fp32AdaMuon(AdaMuon):
        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[Tensor]) -> list[Tensor]:
            return [newton_schulz(update.reshape(len(update), -1), steps=group["ns_steps"]) for update in updates]

    return [Fp32AdaMuon(groups)]


def sgd(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """SGD with momentum for the linear layers, as delta gradient descent has them without erasing."""
    held = [(p, module) for module in model.modules() for p in module.parameters(recurse=False)]
    shared = {p for p, count in Counter(p for p, _ in held).items() if count > 1}
    linear = {p for p, module in held if isinstance(module, nn.Linear)} - shared
    rest = [p for p in model.parameters() if p not in linear]
    return [
        torch.optim.SGD([p for p in model.parameters() if p in linear], lr=lr, momentum=MOMENTUM),
        torch.optim.AdamW(rest, lr=OTHERS_LR, betas=BETAS, weight_decay=0.0),
    ]


def m3(**settings: Any) -> Build:
    return lambda model, lr: [M3.for_model(model, lr=lr, weight_decay=WEIGHT_DECAY, notice=_silent, **settings)]


def dgd(**settings: Any) -> Build:
    return lambda model, lr: [
        DeltaGradientDescent(model, lr=lr, others="adamw", others_lr=OTHERS_LR, adamw_betas=BETAS, **settings)
    ]


CANDIDATES: Mapping[str, Candidate] = {
    "adamw": Candidate(build=adamw),
    "muon": Candidate(build=muon),
    "adamuon": Candidate(build=adamuon),
    "m3": Candidate(build=m3()),
    "m3 without slow": Candidate(build=m3(alpha=0.0)),
    "m3 paper": Candidate(build=m3(form="paper"), rates=(1e-4, 3e-4, 1e-3, 3e-3)),
    "sgd": Candidate(build=sgd, rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
    "dgd": Candidate(build=dgd(momentum=MOMENTUM), rates=(0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03)),
    "dgd delta": Candidate(build=dgd(rule="delta", momentum=MOMENTUM), rates=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3)),
    "dgd no momentum": Candidate(build=dgd(), rates=(0.0003, 0.001, 0.003, 0.01, 0.03, 0.1)),
}


def build(name: str, model: nn.Module, lr: float) -> Together:
    """The optimizers of a candidate.

    Raises:
        ValueError: if there is no such candidate.
    """
    if name not in CANDIDATES:
        raise ValueError(f"optimizers: expected some of {', '.join(CANDIDATES)}; got {name!r}")
    return Together(CANDIDATES[name].build(model, lr))


def _groups(model: nn.Module, rule: str) -> list[tuple[str, dict[str, Any]]]:
    """Rule, and a group of `torch.optim`."""
    return [
        (group["rule"], {"params": [p for _, p in group["params"]], "weight_decay": group["weight_decay"]})
        for group in sorted_groups(model, rule=rule, weight_decay=WEIGHT_DECAY, adamw=())
    ]


def _silent(text: str) -> None:
    pass
