"""Parameters that train at their own periods: the continuum memory of Eq. 70-71, realised in training.

Eq. 71 changes the weights of level l every C^(l) steps by the gradients gathered since its last change. Here a step is
one step of the optimizer, and any `torch.optim.Optimizer` supplies the update.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nestlearn.levels import Clock, Level
from nestlearn.memory import MatrixMemory, MLPMemory

_STATE_KEY = "levels"


class LevelOptimizer(torch.optim.Optimizer):
    """Steps every parameter group of another optimizer at the group's own ``period``.

    A group with ``period`` p (in optimizer steps; 1 where a group has none) moves at steps p, 2p, 3p, ... of this
    optimizer. In between, its gradients are gathered in a running mean of their own, which `zero_grad` does not touch.
    When the group is due, the mean stands in ``.grad`` for the duration of the inner step. A group that is not due
    does not move at all: no weight decay, no momentum decay, no step count. Groups of period 1 behave bitwise as under
    the plain optimizer.

    The mean, not the sum of Eq. 71: a learning rate then means the same at every period, and SGD with the learning
    rate p * lr gives the sum. It is over the steps in which a parameter had a gradient; a parameter that had none since
    its last update is left alone, as ``torch.optim`` does with ``grad=None``. Clip gradients before `step`, as usual:
    that clips each step's gradient, before it enters the mean.

    ``param_groups``, ``state`` and ``defaults`` are those of the inner optimizer, so learning-rate schedulers work
    unchanged (a slow group uses the rate that holds when it is due). `torch.amp.GradScaler` works too: a step that it
    skips for infinite gradients does not count, and neither does one that an optimizer of this package refuses, none of
    whose gradients is gathered, where a group has a period above 1.

    Args:
        optimizer: The optimizer that does the updates, any but LBFGS, which must evaluate its closure many times.

    Raises:
        TypeError: If `optimizer` is no optimizer, or one that cannot be leveled.
        ValueError: If a period is not an integer of at least 1.

    Example:
        >>> import torch
        >>> fast, slow = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        >>> groups = [{"params": fast.parameters()}, {"params": slow.parameters(), "period": 8}]
        >>> optimizer = LevelOptimizer(torch.optim.AdamW(groups, lr=1e-3))
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}")
        if isinstance(optimizer, (torch.optim.LBFGS, LevelOptimizer)):
            raise TypeError(f"{type(optimizer).__name__} cannot be wrapped in a LevelOptimizer")
        # Not super().__init__: groups and state must be the inner optimizer's own, under either name.
        self.optimizer = optimizer
        self._clock = Clock(unit="step")
        self._means: dict[Tensor, Tensor] = {}
        self._counts: dict[Tensor, int] = {}
        self._share_hooks()
        for group in self.param_groups:
            _check_period(group)

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> LevelOptimizer:
        """AdamW over a model's levels, with weight decay on its matrices only.

        The periods come from ``model.level_parameters()`` (period in optimizer steps -> named parameters); a model
        without it trains every parameter at every step. Decay leaves out whatever has fewer than two axes (biases,
        norms), embeddings, the initial states of memories, and parameters that carry ``_no_weight_decay = True``.

        Args:
            model: The model. Parameters that do not require a gradient are left out.
            lr: Learning rate of all levels.
            weight_decay: Decay per update, times `lr`, of the matrices.
            betas, eps: Of AdamW.

        Raises:
            ValueError: If ``level_parameters()`` does not name each trainable parameter exactly once.
        """
        levels = levels_of(model)
        exempt_ids = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
        memories = [m for m in model.modules() if isinstance(m, (MLPMemory, MatrixMemory))]
        exempt_ids |= {id(parameter) for memory in memories for parameter in memory.parameters()}
        groups: list[dict[str, Any]] = []
        for period in sorted(levels):
            decayed: list[tuple[str, nn.Parameter]] = []
            plain: list[tuple[str, nn.Parameter]] = []
            for name, parameter in levels[period]:
                exempt = parameter.ndim < 2 or id(parameter) in exempt_ids
                exempt = exempt or getattr(parameter, "_no_weight_decay", False)
                (plain if exempt else decayed).append((name, parameter))
            for members, decay in ((decayed, weight_decay), (plain, 0.0)):
                if members:
                    groups.append({"params": members, "period": period, "weight_decay": decay})
        if not groups:
            raise ValueError("the model has no parameter that requires a gradient, so there is nothing to train")
        return cls(torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps))

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The inner optimizer's parameter groups, each with its ``period``."""
        return self.optimizer.param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:  # type: ignore[override]
        """The inner optimizer's state."""
        return self.optimizer.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The inner optimizer's defaults."""
        return self.optimizer.defaults

    @property
    def steps(self) -> int:
        """Steps taken so far, the unit in which periods count."""
        return self._clock.time

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Gather the slow groups' gradients and update the groups that are due.

        Args:
            closure: Optional; evaluated once, with gradients enabled, before anything is gathered.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        gathering = [group for group in groups if _check_period(group) > 1]
        if gathering and not getattr(self.optimizer, "gradients_are_fit", lambda: True)():
            return loss
        for group in gathering:
            self._gather(group)
        clock = self._clock.advance()
        due = [group for group in groups if clock.due(_level(group))]
        slow = [p for group in due if group["period"] > 1 for p in group["params"]]
        own = [p.grad for p in slow]
        try:
            for parameter in slow:
                mean = self._means.get(parameter)
                parameter.grad = None if mean is None else mean.to(parameter.dtype)
            self.optimizer.param_groups = due
            if due:
                self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups
            for parameter, gradient in zip(slow, own, strict=True):
                parameter.grad = gradient
        for parameter in slow:
            self._means.pop(parameter, None)
            self._counts.pop(parameter, None)
        self._clock = clock
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear ``.grad`` of all parameters. What the slow groups have gathered stays."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the inner optimizer; ``period`` defaults to 1."""
        _check_period(param_group)
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict plus ``"levels"``: the clock and the gradients gathered so far.

        ``"levels"`` is ``{"clock": {...}, "means": {i: tensor}, "counts": {i: steps}}`` with i numbering the parameters
        as ``"param_groups"`` does.
        """
        state = self.optimizer.state_dict()
        index = {parameter: i for i, parameter in enumerate(self._parameters())}
        state[_STATE_KEY] = {
            "clock": self._clock.to_dict(),
            "means": {index[parameter]: mean for parameter, mean in self._means.items()},
            "counts": {index[parameter]: count for parameter, count in self._counts.items()},
        }
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; training then goes on bitwise as it would have, also in mid-period.

        Raises:
            ValueError: If the state is a plain optimizer's, or fits other parameters.
        """
        if _STATE_KEY not in state_dict:
            raise ValueError(
                f"this state has no {_STATE_KEY!r} entry: it was saved by a plain optimizer, not by LevelOptimizer; "
                "to go on from it, load it into the inner optimizer (level_optimizer.optimizer) before the first step"
            )
        levels = state_dict[_STATE_KEY]
        parameters = list(self._parameters())
        means = {}
        for i, mean in levels["means"].items():
            parameter = parameters[i] if i < len(parameters) else None
            if parameter is None or mean.shape != parameter.shape:
                expected = f"the {len(parameters)} parameters here" if parameter is None else tuple(parameter.shape)
                raise ValueError(f"gradient mean {i} of shape {tuple(mean.shape)} does not fit: expected {expected}")
            means[parameter] = mean.to(device=parameter.device, copy=True)
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != _STATE_KEY})
        self._clock = Clock.from_dict(levels["clock"])
        self._means = means
        self._counts = {parameters[i]: count for i, count in levels["counts"].items()}

    def parts(self) -> tuple[list[Level], dict[str, tuple[str, ...]]]:
        """The parts of the optimizer and what each needs, as `nestlearn.levels.order_by_frequency` takes them.

        Per group: the weights, the inner optimizer's state (once it exists), which the weights need at the same
        moment, and for a slow group the gathered gradients, which change at every step.
        """
        parts: list[Level] = []
        needs: dict[str, tuple[str, ...]] = {}
        for i, group in enumerate(self.param_groups):
            period = _check_period(group)
            state: dict[str, Any] = next((self.state[p] for p in group["params"] if p in self.state), {})
            kept = [key for key, value in state.items() if torch.is_tensor(value) and key != "step"]
            names = tuple(f"group {i} {name}" for name in kept)
            if period > 1:
                parts.append(Level(f"group {i} gradient mean", 1, "step"))
            parts.extend(Level(name, period, "step") for name in names)
            parts.append(Level(f"group {i} weights", period, "step"))
            needs[f"group {i} weights"] = names
        return parts, needs

    def __repr__(self) -> str:
        periods = [group["period"] for group in self.param_groups]
        return f"LevelOptimizer(periods={periods}, optimizer={self.optimizer!r})"

    def __getstate__(self) -> dict[str, Any]:
        # A learning-rate scheduler puts a `step` on the instance, which in a copy would still step the original.
        return {name: value for name, value in self.__dict__.items() if name != "step" and not name.endswith("_hooks")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._share_hooks()

    def _share_hooks(self) -> None:
        kinds = ("step", "state_dict", "load_state_dict")
        for kind in [f"{kind}_{when}" for kind in kinds for when in ("pre", "post")]:
            setattr(self, f"_optimizer_{kind}_hooks", getattr(self.optimizer, f"_optimizer_{kind}_hooks"))

    def _parameters(self) -> Iterator[Tensor]:
        for group in self.param_groups:
            yield from group["params"]

    def _gather(self, group: dict[str, Any]) -> None:
        """mean <- mean + (gradient - mean) / n, in at least float32."""
        gather_inputs = getattr(self.optimizer, "gather_inputs", None)
        if gather_inputs is not None:  # an optimizer that also learns from the layers' inputs
            gather_inputs(group)
        for parameter in group["params"]:
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.is_sparse:
                raise ValueError("a group with a period above 1 cannot gather sparse gradients; use sparse=False")
            dtype = torch.promote_types(gradient.dtype, torch.float32)
            count = self._counts.get(parameter, 0) + 1
            self._counts[parameter] = count
            if count == 1:
                self._means[parameter] = gradient.detach().to(dtype, copy=True)
            else:
                self._means[parameter].lerp_(gradient.to(dtype), 1.0 / count)


def _check_period(group: dict[str, Any]) -> int:
    """The group's period in optimizer steps; 1 where it has none."""
    period = group.setdefault("period", 1)
    if not isinstance(period, int) or isinstance(period, bool) or period < 1:
        raise ValueError(
            f"the 'period' of a parameter group counts optimizer steps and must be an integer of at least 1, "
            f"got {period!r}; leave out of the optimizer what should never move"
        )
    return period


def _level(group: dict[str, Any]) -> Level:
    unit: Literal["step"] = "step"
    return Level("parameter group", group["period"], unit)


def levels_of(model: nn.Module) -> dict[int, list[tuple[str, nn.Parameter]]]:
    """Period -> named trainable parameters of `model`, each exactly once."""
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not hasattr(model, "level_parameters"):
        return {1: list(trainable.items())}
    named: dict[int, list[tuple[str, nn.Parameter]]] = model.level_parameters()  # type: ignore[operator]
    levels = {k: [(name, p) for name, p in members if p.requires_grad] for k, members in named.items()}
    seen = [id(p) for members in levels.values() for _, p in members]
    missing = [name for name, p in trainable.items() if id(p) not in set(seen)]
    if missing or len(seen) != len(set(seen)):
        raise ValueError(
            f"{type(model).__name__}.level_parameters() must name each trainable parameter exactly once; it names "
            f"{len(seen) - len(set(seen))} more than once and misses {missing or 'none'}"
        )
    return levels
