"""What all optimizers here share: the gradients they take, what they say of a foreign state, how they see shards."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.adamw import adamw

NonFinite = Literal["raise", "skip"]


class MemoryOptimizer(torch.optim.Optimizer):
    """A `torch.optim.Optimizer` that updates a group at a time and never spreads a broken gradient.

    Subclasses write `update_group`. State has at least fp32 precision, whatever the parameters have, and comes back
    from a state dict bit for bit. The caller's gradients are never changed.

    Args:
        params: as `torch.optim` takes them; no group may be empty.
        defaults: settings of a group.
        nonfinite: what `step` does with a gradient that is not finite: "raise" (nothing has moved then), or "skip" the
            whole step with a RuntimeWarning. Under `torch.amp.GradScaler` neither is reached.

    Raises:
        ValueError: for an empty group or a setting out of range.
        TypeError: for a complex parameter.
    """

    def __init__(self, params: Any, defaults: dict[str, Any], *, nonfinite: NonFinite = "raise") -> None:
        super().__init__(params, {**defaults, "nonfinite": nonfinite})

    def update_group(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """Moves the parameters of a group that have a gradient; no gradient is sparse, complex or not finite."""
        raise NotImplementedError

    def check_group(self, group: Mapping[str, Any]) -> None:
        """Raises ValueError if a setting of a group is out of range."""
        lr = float(group["lr"])
        need(0 <= lr < float("inf"), "lr", "at least 0 and finite", lr)
        decay = group["weight_decay"]
        need(0 <= decay < float("inf"), "weight_decay", "at least 0 and finite", decay)
        need(group["nonfinite"] in ("raise", "skip"), "nonfinite", "'raise' or 'skip'", group["nonfinite"])
        if "adamw_betas" in group:
            betas, eps = group["adamw_betas"], group["adamw_eps"]
            fit = len(betas) == 2 and all(0 <= beta < 1 for beta in betas)
            need(fit, "adamw_betas", "two numbers in [0, 1)", betas)
            need(0 <= eps < float("inf"), "adamw_eps", "at least 0 and finite", eps)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates all parameters that have a gradient.

        Args:
            closure: optional; evaluated once, with gradients enabled, before anything moves.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: for a sparse or complex gradient, or one that is not finite where `nonfinite` is "raise"; names
                the parameter, and nothing has moved.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.gradients_are_fit():
            for group in self.param_groups:
                parameters = [p for p in group["params"] if p.grad is not None and p.numel()]
                if parameters:
                    self.update_group(group, parameters, [p.grad for p in parameters])
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group; errors as in the class."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            if not group["params"]:
                raise ValueError(
                    f"parameter group {len(self.param_groups) - 1} is empty: expected one or more parameters; leave "
                    "out a group without any"
                )
            for parameter in group["params"]:
                if parameter.is_complex():
                    raise TypeError(
                        f"{type(self).__name__} takes real parameters, got one of dtype {parameter.dtype} and shape "
                        f"{tuple(parameter.shape)}; hold real and imaginary parts in a real one (torch.view_as_complex)"
                    )
            self.check_group(group)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores what `state_dict` returned; training then goes on bitwise as it would have.

        Raises:
            ValueError: if it is the state of another optimizer, or of other parameters.
        """
        own = {name for name in self.defaults if name != "differentiable"}  # which torch.optim adds when it is copied
        for saved in state_dict["param_groups"]:
            missing = sorted(own - set(saved))
            if missing:
                raise ValueError(
                    f"this state was saved by another optimizer than {type(self).__name__}: its groups have no "
                    f"{', '.join(missing)}; start {type(self).__name__} with a state of its own"
                )
        parameters = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=False):
            for name, value in state_dict["state"].get(number, {}).items():
                expected = self.state_shape(parameter, name)
                if torch.is_tensor(value) and expected is not None and tuple(value.shape) != expected:
                    raise ValueError(
                        f"the saved {name} of parameter {number} has shape {tuple(value.shape)}, expected {expected} "
                        f"for a parameter of shape {tuple(parameter.shape)}: the state belongs to another model"
                    )
        super().load_state_dict(state_dict)
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if torch.is_tensor(value):
                    # torch.optim keeps the caller's tensors, or casts them to the parameter's dtype, which rounds.
                    device = value.device if name == "step" else parameter.device
                    self.state[parameter][name] = value.to(device=device, copy=True)

    def state_shape(self, parameter: Tensor, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor of the state, None where it may have any."""
        return None if name == "step" else tuple(parameter.shape)

    def buffers(self, parameters: Sequence[Tensor], *names: str) -> list[list[Tensor]]:
        """For each name a list of the parameters' buffers in the state, made of zeros where there is none yet."""
        for parameter in parameters:
            state = self.state[parameter]
            for name in names:
                if name not in state:
                    state[name] = zeros_like(parameter)
        return [[self.state[p][name] for p in parameters] for name in names]

    def count_steps(self, parameters: Sequence[Tensor]) -> list[int]:
        """Counts a step of each parameter; returns how many it has made, this one included."""
        for parameter in parameters:
            state = self.state[parameter]
            state["step"] = state.get("step", torch.zeros((), dtype=torch.float32)) + 1
        return [int(self.state[p]["step"]) for p in parameters]

    def adamw(self, group: Mapping[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        """A step of torch.optim.AdamW with the group's ``lr``, ``weight_decay``, ``adamw_betas`` and ``adamw_eps``."""
        for parameter in parameters:
            if "step" not in self.state[parameter]:
                self.state[parameter]["step"] = torch.zeros((), dtype=torch.float32)
        for own in alike(parameters):
            some = [parameters[i] for i in own]
            means, squares = self.buffers(some, "exp_avg", "exp_avg_sq")
            exact = [m.dtype == p.dtype for m, p in zip(means, some, strict=True)]
            moved = [p if same else p.to(m.dtype) for p, m, same in zip(some, means, exact, strict=True)]
            adamw(
                moved,
                [gradients[i].to(m.dtype) for i, m in zip(own, means, strict=True)],
                means,
                squares,
                [],
                [self.state[p]["step"] for p in some],
                amsgrad=False,
                beta1=group["adamw_betas"][0],
                beta2=group["adamw_betas"][1],
                lr=float(group["lr"]),
                weight_decay=group["weight_decay"],
                eps=group["adamw_eps"],
                maximize=False,
            )
            for parameter, value, same in zip(some, moved, exact, strict=True):
                if not same:
                    parameter.copy_(value)

    def gradients_are_fit(self) -> bool:
        """Whether the step may go on; raises where it may not and nobody asked to skip it.

        `LevelOptimizer` asks before it gathers the gradients of slow groups.
        """
        found: list[Tensor] = []
        for name, parameter in self._with_gradients():
            gradient = parameter.grad
            assert gradient is not None
            for kind, bad in (("sparse", gradient.layout != torch.strided), ("complex", gradient.is_complex())):
                if bad:
                    raise ValueError(
                        f"{name} has a {kind} gradient, expected a dense real one"
                        + ("; build its layer with sparse=False" if kind == "sparse" else "")
                    )
            found.append(gradient)
        if not found or self._all_finite(found):
            return True
        broken = [name for name, p in self._with_gradients() if not bool(local(p.grad).isfinite().all())]
        names = ", ".join(broken[:3]) or "a shard on another process"
        if any(group["nonfinite"] == "raise" for group in self.param_groups):
            raise ValueError(
                f"the gradient of {names} is not finite, so nothing was moved; look for the cause (a learning rate "
                "that is too high, a division by zero), or let such steps pass with nonfinite='skip'"
            )
        warnings.warn(f"step skipped: the gradient of {names} is not finite", RuntimeWarning, stacklevel=4)
        return False

    @staticmethod
    def _all_finite(gradients: list[Tensor]) -> bool:
        parts = [local(g) for g in gradients]
        # A norm shows anything that is not finite; a finite gradient whose square overflows is looked at whole.
        norms = torch.stack([norm.float() for norm in torch._foreach_norm(parts)])
        fine = bool(norms.isfinite().all()) or all(bool(part.isfinite().all()) for part in parts)
        if any(isinstance(g, DTensor) for g in gradients):
            # Others hold other shards, and all must do the same.
            flag = torch.tensor(int(fine), device=parts[0].device)
            dist.all_reduce(flag, op=dist.ReduceOp.MIN)
            fine = bool(flag)
        return fine

    def _with_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """What to call a parameter, and the parameter."""
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names")
            for i, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    name = names[i] if names else f"parameter {i} of group {number}, shape {tuple(parameter.shape)},"
                    yield name, parameter


def need(holds: bool, name: str, expected: str, got: Any) -> None:
    """Raises ValueError for a setting out of range."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {got!r}")


def zeros_like(parameter: Tensor) -> Tensor:
    """Zeros of the parameter's shape and placement, in fp32 or better."""
    return torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32), requires_grad=False)


def local(tensor: Tensor | None) -> Tensor:
    """The part that this process holds; the tensor itself where it is no shard."""
    assert tensor is not None
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, gathered from all processes that hold a shard of it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, like: Tensor) -> Tensor:
    """This process's shard of a whole tensor that all have, placed as `like`; no communication."""
    if isinstance(like, DTensor):
        return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None)
    return tensor


def apply_update(parameters: Sequence[Tensor], updates: Sequence[Tensor], *, lr: float, weight_decay: float) -> None:
    """W <- (1 - lr weight_decay) W + lr update, in place."""
    if weight_decay:
        torch._foreach_mul_(list(parameters), 1 - lr * weight_decay)
    same = [u.to(p.dtype) for u, p in zip(updates, parameters, strict=True)]
    torch._foreach_add_(list(parameters), same, alpha=lr)


def alike(parameters: Sequence[Tensor]) -> list[list[int]]:
    """Indices of ordinary tensors, and those of shards, which no call can mix with them."""
    parts: dict[bool, list[int]] = {}
    for i, parameter in enumerate(parameters):
        parts.setdefault(isinstance(parameter, DTensor), []).append(i)
    return list(parts.values())
