"""M3, multi-scale momentum Muon (Eq. 75, Algorithm 1): two momenta at two frequencies, orthogonalised and added.

The fast momentum learns from every gradient, the slow one speaks once in a period: a continuum memory of two levels.
Divided by an element-wise second moment, their sum is Adam and Muon in one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from nestlearn.functional.newton_schulz import newton_schulz
from nestlearn.optim.groups import describe_groups, sorted_groups
from nestlearn.optim.shell import MemoryOptimizer, NonFinite, alike, apply_update, need, sharded_like, whole

Form = Literal["ema", "paper"]

# The root mean square of an AdamW update is about this much of its learning rate.
ADAMW_RMS = 0.2
# On a CPU, products of matrices smaller than this gain from being done side by side; larger ones lose a copy.
_SMALL = 128
# Numbers that are orthogonalised at once: bounds the memory that a batch takes.
_BATCH = 1 << 25
# A second moment of the "ema" form is at most this part of the largest number: the mean of a matrix stays finite.
_MOST = 2.0**-30


# The part of noise's |M1| / sqrt(V) below which gradients have vanished.
_VANISHED = 0.1


def m3_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    fast: Sequence[Tensor],
    slow: Sequence[Tensor],
    variances: Sequence[Tensor],
    slow_directions: Sequence[Tensor],
    *,
    steps: Sequence[int],
    lr: float,
    form: Form = "ema",
    betas: tuple[float, float, float] = (0.9, 0.95, 0.5),
    alpha: float = 0.2,
    period: int = 16,
    ns_steps: int = 5,
    eps: float = 1.0,
    weight_decay: float = 0.0,
) -> None:
    """One step of M3 on matrices, in place.

    With g the gradient, NS Newton-Schulz, f the period, t the step counted from 1 (Algorithm 1, "paper"):

        M1 <- M1 + beta_1 g          V <- V + beta_2 g^2          M2 <- M2 + beta_3 g
        W  <- W - lr (NS(M1) + alpha O2) / (sqrt(V) + eps)        and every f-th step O2 <- NS(M2)

    so that O2 knows the gradients of all periods before the present one. In the "ema" form M1 and V are averages with
    decays beta_1 and beta_2, M2 is an average over periods with decay beta_3 of their mean gradients, and

        U = (NS(M1) + alpha O2) / (sqrt(V / mean(V)) + eps)       W <- W - lr 0.2 U / rms(U)

    with mean and root mean square over one matrix: bias corrections would cancel, and so does the gradient's scale (in
    fp32 between about 1e-18 and 1e14; beyond, V is zero or at its limit, and what remains is U = NS(M1) + alpha O2).
    Once gradients vanish, NS(M1) would keep its size long after M1 has lost its own. So where max |M1| / sqrt(max V),
    with bias corrections, is below a tenth of what mere noise has, sqrt((1 - beta_1) / (1 + beta_1)), the step shrinks
    with it, as AdamW's does.

    Args:
        parameters: each (..., rows, columns), a matrix or a stack of matrices, each of which is treated as if alone.
        gradients: their gradients, not changed.
        fast, slow, variances, slow_directions: M1, M2, V, O2 of the same shapes, zero before the first step.
        steps: t of each parameter.
        lr: learning rate; in the "ema" form in units of AdamW's.
        form: "ema" or "paper".
        betas: beta_1 of M1, beta_2 of V, beta_3 of M2.
        alpha: weight of the slow direction.
        period: f, in steps.
        ns_steps: Newton-Schulz iterations.
        eps: added to the root of V; in the "ema" form relative to the root of its mean.
        weight_decay: W shrinks by lr weight_decay, apart from the step.
    """
    # On a CPU one tensor after another goes through all that is done to its entries, while they are in the cache;
    # elsewhere all tensors go through each operation together.
    every = range(len(parameters))
    batches = [[i] for i in every] if all(p.device.type == "cpu" for p in parameters) else [list(every)]
    memories = _Memories(list(gradients), list(fast), list(slow), list(variances), list(slow_directions), steps)
    for batch in batches:
        _gather(memories.of(batch), form, betas, period)
    directions = _orthogonalize(fast, ns_steps)
    for batch in batches:
        updates = [directions[i] for i in batch]
        _divide(updates, memories.of(batch), form, betas, alpha, eps)
        apply_update([parameters[i] for i in batch], updates, lr=lr, weight_decay=weight_decay)

    due = [i for i, step in enumerate(steps) if step % period == 0]
    for i, direction in zip(due, _orthogonalize([slow[i] for i in due], ns_steps), strict=True):
        slow_directions[i].copy_(direction)


class _Memories(NamedTuple):
    """What `m3_step` is given of each parameter."""

    gradients: list[Tensor]
    fast: list[Tensor]
    slow: list[Tensor]
    variances: list[Tensor]
    slow_directions: list[Tensor]
    steps: Sequence[int]

    def of(self, batch: Sequence[int]) -> _Memories:
        return self._replace(**{name: [own[i] for i in batch] for name, own in self._asdict().items()})


def _gather(memories: _Memories, form: Form, betas: tuple[float, float, float], period: int) -> None:
    """Writes the gradients into M1, M2 and V."""
    gradients, fast, slow, variances, _, steps = memories
    g = [gradient.to(m.dtype) for gradient, m in zip(gradients, fast, strict=True)]
    if form == "ema":
        begins = [m for m, step in zip(slow, steps, strict=True) if (step - 1) % period == 0]
        torch._foreach_lerp_(fast, g, 1 - betas[0])
        if begins:
            torch._foreach_mul_(begins, betas[2])
        torch._foreach_add_(slow, g, alpha=(1 - betas[2]) / period)
        torch._foreach_mul_(variances, betas[1])
        torch._foreach_addcmul_(variances, g, g, value=1 - betas[1])
        for variance in variances:
            variance.clamp_(max=_MOST * torch.finfo(variance.dtype).max)
    else:
        torch._foreach_add_(fast, g, alpha=betas[0])
        torch._foreach_add_(slow, g, alpha=betas[2])
        torch._foreach_addcmul_(variances, g, g, value=betas[1])


def _divide(
    updates: list[Tensor],
    memories: _Memories,
    form: Form,
    betas: tuple[float, float, float],
    alpha: float,
    eps: float,
) -> None:
    """Makes of NS(M1), in place, what the parameters move by at a rate of 1."""
    torch._foreach_add_(updates, memories.slow_directions, alpha=alpha)
    roots = list(torch._foreach_sqrt(memories.variances))
    if form == "ema":
        for root, variance in zip(roots, memories.variances, strict=True):
            tiny = _tiny(root)
            root.div_(variance.mean((-2, -1), keepdim=True).sqrt() + tiny).add_(eps + tiny)
        torch._foreach_div_(updates, roots)
        for u, m, variance, step in zip(updates, memories.fast, memories.variances, memories.steps, strict=True):
            rms = torch.linalg.vector_norm(u, dim=(-2, -1), keepdim=True) / math.sqrt(u.shape[-2] * u.shape[-1])
            size = -ADAMW_RMS / (rms + _tiny(u))
            u.mul_(size * _presence(m, variance, step, betas))
    else:
        torch._foreach_add_(roots, eps)
        torch._foreach_div_(updates, roots)
        torch._foreach_neg_(updates)


def _presence(fast: Tensor, variance: Tensor, step: int, betas: tuple[float, float, float]) -> Tensor:
    """1 while there are gradients, towards 0 when they have vanished; (..., 1, 1)."""
    largest = _largest(fast) / (1 - betas[0] ** step)
    past = (variance.amax((-2, -1), keepdim=True) / (1 - betas[1] ** step)).sqrt()
    noise = math.sqrt((1 - betas[0]) / (1 + betas[0]))
    return (largest / (_VANISHED * noise * past + torch.finfo(past.dtype).tiny)).clamp_max(1.0)


def _orthogonalize(matrices: Sequence[Tensor], steps: int) -> list[Tensor]:
    """Newton-Schulz of each matrix or stack; those of one shape, lying or standing, go through it together.

    bf16 on a GPU, where the products are fast and the iteration bears it; as they are elsewhere. A process that holds a
    shard of a matrix needs the whole for it, and keeps its own part of the result.
    """
    found: dict[int, Tensor] = {}
    full = [whole(matrix) for matrix in matrices]
    batches: dict[Any, list[int]] = defaultdict(list)
    for i, x in enumerate(full):
        small, large = sorted(x.shape[-2:])
        alone = x.device.type == "cpu" and small > _SMALL
        place = sum(y.numel() for y in full[:i]) // _BATCH
        batches[small, large, x.dtype, x.device, i if alone else -1 - place].append(i)
    for (small, large, dtype, device, _), members in batches.items():
        lying = [full[i] if full[i].shape[-2] == small else full[i].mT for i in members]
        flat = [x.reshape(-1, small, large) for x in lying]
        stack = flat[0] if len(flat) == 1 else torch.cat(flat)
        # To a largest entry of 1, or the squares of its norm vanish or overflow. What has decayed below the normal
        # numbers is zero.
        size = _largest(stack)
        stack = stack * torch.where(size > _tiny(stack), size.reciprocal(), 0.0)
        if device.type == "cuda" and dtype == torch.float32:
            stack = stack.bfloat16()
        done = newton_schulz(stack, steps=steps, eps=_tiny(stack)).to(dtype)
        for i, x, part in zip(members, lying, done.split([len(x) for x in flat]), strict=True):
            part = part.view(x.shape)
            found[i] = sharded_like((part if part.shape == full[i].shape else part.mT).contiguous(), matrices[i])
    return [found[i] for i in range(len(matrices))]


def _largest(x: Tensor) -> Tensor:
    """The largest absolute entry of each matrix, (..., 1, 1); neither a norm nor absolute values in a tensor of their
    own, which take longer on a CPU."""
    return torch.maximum(x.amax((-2, -1), keepdim=True), -x.amin((-2, -1), keepdim=True))


def _tiny(x: Tensor) -> float:
    return float(torch.finfo(x.dtype).tiny)


class M3(MemoryOptimizer):
    """M3 (Algorithm 1) for matrices and stacks of matrices, AdamW for everything else; see `m3_step` for the rule.

    Groups may have ``rule`` "m3" (the default) or "adamw". Under "m3" the last two axes of a parameter are a matrix and
    the axes before them number independent ones; parameters with fewer than two axes take AdamW's step all the same.
    `M3.for_model` sorts a model's parameters. State: four numbers a parameter, two under AdamW.

    In a group, the period is called ``slow_period``: ``period`` is that of `LevelOptimizer`.

    Args:
        params: as `torch.optim` takes them.
        lr: learning rate; in the "ema" form AdamW's.
        form: "ema", averages and a step that does not depend on the gradient's scale, or "paper", Algorithm 1 to the
            letter, whose sums never decay.
        betas: beta_1 of the fast momentum, beta_2 of the second moment, beta_3 of the slow momentum, in [0, 1).
        alpha: weight of the slow direction, at least 0.
        period: f, steps between two changes of the slow direction.
        ns_steps: Newton-Schulz iterations.
        eps: added to the root of the second moment, None for 1e-8; in the "ema" form relative to the root of its mean,
            None for 1: an entry whose gradients are small is then enlarged to at most twice what one of average
            gradients gets.
        weight_decay: times `lr`, apart from the step.
        adamw_betas, adamw_eps: of the parameters that AdamW moves.
        nonfinite: "raise" or "skip", for gradients that are not finite.

    Raises:
        ValueError: for a setting out of range or an empty group.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        >>> optimizer = M3(model.parameters(), lr=1e-3)
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        *,
        form: Form = "ema",
        betas: tuple[float, float, float] = (0.9, 0.95, 0.5),
        alpha: float = 0.2,
        period: int = 16,
        ns_steps: int = 5,
        eps: float | None = None,
        weight_decay: float = 0.1,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        nonfinite: NonFinite = "raise",
    ) -> None:
        defaults = {
            "lr": lr,
            "form": form,
            "betas": betas,
            "alpha": alpha,
            "slow_period": period,
            "ns_steps": ns_steps,
            "eps": eps,
            "weight_decay": weight_decay,
            "rule": "m3",
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
        }
        super().__init__(params, defaults, nonfinite=nonfinite)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        adamw: Collection[str] = (),
        notice: Callable[[str], None] = print,
        **settings: Any,
    ) -> M3:
        """M3 for a model's matrices; AdamW for embeddings, head, norms, biases, convolutions and other small things.

        Weight decay is for matrices only, without the initial states of memories. Groups of a model with
        ``level_parameters()`` carry its periods, so that ``LevelOptimizer(M3.for_model(model))`` trains its levels.

        Args:
            model: parameters that do not require a gradient are left out.
            lr: learning rate of both.
            weight_decay: per step, times `lr`.
            adamw: parts of names of further parameters that AdamW is to move.
            notice: called with a table that says what went where, and why.
            settings: others of `M3`.

        Raises:
            ValueError: if nothing requires a gradient, or a name in `adamw` fits no parameter.
        """
        groups = sorted_groups(model, rule="m3", weight_decay=weight_decay, adamw=adamw)
        notice(describe_groups(groups))
        kept = [{name: value for name, value in group.items() if name != "reasons"} for group in groups]
        return cls(kept, lr, weight_decay=weight_decay, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; its eps, where it is None, is that of its own form. Errors as in the class."""
        if param_group.get("eps", self.defaults["eps"]) is None:
            param_group["eps"] = 1.0 if param_group.get("form", self.defaults["form"]) == "ema" else 1e-8
        super().add_param_group(param_group)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        need(group["form"] in ("ema", "paper"), "form", "'ema' or 'paper'", group["form"])
        need(group["rule"] in ("m3", "adamw"), "rule", "'m3' or 'adamw'", group["rule"])
        fit = len(group["betas"]) == 3 and all(0 <= beta < 1 for beta in group["betas"])
        need(fit, "betas", "three numbers in [0, 1)", group["betas"])
        for name in ("alpha", "eps"):
            need(0 <= group[name] < math.inf, name, "at least 0 and finite", group[name])
        for name, own in (("period", "slow_period"), ("ns_steps", "ns_steps")):
            value = group[own]
            need(type(value) is int and value >= 1, name, "an integer of at least 1", value)

    def update_group(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        pairs = list(zip(parameters, gradients, strict=True))
        matrix = [group["rule"] == "m3" and p.ndim >= 2 for p in parameters]
        rest = [pair for pair, fits in zip(pairs, matrix, strict=True) if not fits]
        if rest:
            self.adamw(group, [p for p, _ in rest], [g for _, g in rest])
        pairs = [pair for pair, fits in zip(pairs, matrix, strict=True) if fits]
        for own in alike([p for p, _ in pairs]):
            some = [pairs[i][0] for i in own]
            states = self.buffers(some, "fast", "slow", "variance", "slow_direction")
            m3_step(
                some,
                [pairs[i][1] for i in own],
                *states,
                steps=self.count_steps(some),
                lr=float(group["lr"]),
                form=group["form"],
                betas=group["betas"],
                alpha=group["alpha"],
                period=group["slow_period"],
                ns_steps=group["ns_steps"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
