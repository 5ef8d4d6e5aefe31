"""Delta gradient descent (Eq. 54-57): a linear layer is written as an associative memory that first erases.

For a layer y = W x + b, its inputs x_n and u_n = -(gradient of the loss of one input by y_n), Eq. 56 over a batch is

    argmin_W  mean_n 1/2 |W x_n - u_n|^2 + 1/(2 lr) |W - W_t|^2  =  (W_t - lr grad) (I + lr G)^-1

with G = mean_n x_n x_n^T, exactly, for inputs of any length. The printed step lr / (1 + lr) of Eq. 57 is the case of
one input of norm 1.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from nestlearn.optim.leveled import levels_of
from nestlearn.optim.shell import MemoryOptimizer, NonFinite, local, need

Rule = Literal["dgd", "delta"]
Others = Literal["adamw", "sgd"]

# A Gram matrix is symmetric: from this width on only the blocks on and above the diagonal are computed.
_WIDE, _BLOCKS = 256, 4


def delta_step(weight: Tensor, update: Tensor, gram: Tensor, *, lr: float, rule: Rule = "dgd") -> Tensor:
    """The exact step: what a linear memory is after it has seen its inputs.

    Args:
        weight: (rows, columns), W, or W beside b as a last column.
        update: (rows, columns), the gradient, or a momentum of gradients.
        gram: (columns, columns), G, the mean of x x^T over the inputs (with a last 1 in x for b).
        lr: learning rate, at least 0.
        rule: "dgd", (W - lr update)(I + lr G)^-1, the argmin of Eq. 56: erases what the inputs read, and writes.
            "delta", W - lr update (I + lr G)^-1, the same for the change of W alone: the outputs' change is kept small,
            and what the layer knew is not erased.

    Returns:
        The new weight, (rows, columns).
    """
    solved = weight - lr * update if rule == "dgd" else -lr * update
    system = lr * gram
    system.diagonal().add_(1.0)
    factor, failed = torch.linalg.cholesky_ex(system)
    if bool(failed):  # at large lr G, rounding makes it indefinite: G without its negative eigenvalues
        values, vectors = torch.linalg.eigh(gram.double())
        solved = ((solved.double() @ vectors) / (1 + lr * values.clamp_min(0)) @ vectors.mT).to(weight.dtype)
    else:
        solved = torch.cholesky_solve(solved.mT, factor).mT
    return solved if rule == "dgd" else weight + solved


def gram_matrix(x: Tensor) -> Tensor:
    """Sum of x_n x_n^T over the rows of x (N, D), (D, D); in fp32 or better."""
    width = x.shape[-1]
    if width < _WIDE:
        return x.mT @ x
    gram = x.new_empty(width, width)
    edges = [width * i // _BLOCKS for i in range(_BLOCKS + 1)]
    for low, high in itertools.pairwise(edges):
        gram[low:high, low:] = x[:, low:high].mT @ x[:, low:]
        gram[high:, low:high] = gram[low:high, high:].mT
    return gram


@dataclass
class _Seen:
    """What a layer has seen: the sum of x x^T, the sum of x where there is a bias, and how many inputs."""

    gram: Tensor
    total: Tensor | None
    count: int

    def __add__(self, other: _Seen) -> _Seen:
        total = None if self.total is None or other.total is None else self.total + other.total
        return _Seen(self.gram + other.gram, total, self.count + other.count)


class _Layer:
    """A linear layer under treatment and the inputs whose gradients have arrived since the last step."""

    def __init__(self, name: str, module: nn.Linear, others: _LastInput) -> None:
        self.name = name
        self.weight, self.bias = module.weight, module.bias
        self.seen: _Seen | None = None
        self._last = others
        self.handle = module.register_forward_hook(self._watch, with_kwargs=True)

    def _watch(self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
        """Counts a forward pass once the gradient of its output arrives.

        So evaluations count nothing, and under activation checkpointing either the first pass or its recomputation
        counts, the one that is differentiated. What waits for the gradient is a Gram matrix, never the inputs. Where
        only the gradient of something else is asked for, as by a memory that learns in context, nothing is counted.
        """
        if not (torch.is_grad_enabled() and isinstance(output, Tensor) and output.requires_grad and output.numel()):
            return
        weight = module.weight
        assert isinstance(weight, Tensor)
        if not weight.requires_grad:
            return
        if not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(output):
            return  # torch.func computes no gradient of a parameter's own, and its tensors do not outlive it
        seen = self._last.seen(inputs[0] if inputs else named["input"])
        if self.bias is None:
            seen = _Seen(seen.gram, None, seen.count)

        # A shard is not what the layer has multiplied by: its gradient comes from elsewhere.
        node = None if isinstance(weight, DTensor) else torch.autograd.graph.get_gradient_edge(weight).node

        def arrived(gradient: Tensor) -> None:
            if node is None or _is_differentiated(node):
                self.seen = seen if self.seen is None else self.seen + seen

        output.register_hook(arrived)


def _is_differentiated(node: torch.autograd.graph.Node) -> bool:
    """Whether the backward pass that is running also computes the gradient of a weight."""
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # what torch.autograd.grad is asked for
        return True


class _LastInput:
    """The last input's Gram matrix, for layers that read the same tensor, as projections to q, k and v do."""

    def __init__(self) -> None:
        self._of: weakref.ref[Tensor] | None = None
        self._version = -1
        self._found: _Seen | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return _LastInput, ()  # nothing to copy, and no weak reference can be saved

    def seen(self, x: Tensor) -> _Seen:
        same = self._of is not None and self._of() is x and self._version == x._version
        if not same or self._found is None:
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                rows = x.detach().reshape(-1, x.shape[-1])
                rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
                self._found = _Seen(gram_matrix(rows), rows.sum(0), len(rows))
            self._of, self._version = weakref.ref(x), x._version
        return self._found


class DeltaGradientDescent(MemoryOptimizer):
    """Delta gradient descent for the linear layers of a model: the exact argmin of Eq. 56, see `delta_step`.

    Its groups carry the periods of the model's ``level_parameters()``, for `LevelOptimizer`.

    Hooks on every `nn.Linear` gather the Gram matrix of its inputs (D x D numbers, never the inputs), of all backward
    passes since the last step; weight and bias are one memory whose key has a last 1. The loss is taken to be a mean
    over the inputs of each layer, as a mean over rows and tokens is. Works under gradient accumulation, activation
    checkpointing, DistributedDataParallel and FSDP2 (shard the model first), where Gram matrices are averaged over the
    processes as gradients are. Call `zero_grad` of the optimizer, not of the model: it also drops inputs whose gradient
    is dropped.

    State: nothing without momentum, otherwise one number a parameter.

    Args:
        model: its linear layers are treated; whatever else requires a gradient needs `others`.
        lr: learning rate; the step is exact, so no rate diverges on a single layer.
        momentum: of the gradients, as in torch.optim.SGD, in [0, 1).
        weight_decay: times `lr`, apart from the step; of linear layers' weights.
        rule: "dgd" or "delta", see `delta_step`.
        others: what moves the remaining parameters, "adamw" (without decay) or "sgd"; None refuses them.
        others_lr: their learning rate; None for `lr`.
        process_group: over which gradients are averaged; None for all processes where torch.distributed is in use.
        adamw_betas, adamw_eps: for `others`.
        nonfinite: "raise" or "skip", for gradients that are not finite.

    Raises:
        TypeError: if `model` is no module.
        ValueError: for a setting out of range, a model without linear layers, or parameters that cannot be treated,
            which are named.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
        >>> optimizer = DeltaGradientDescent(model, lr=0.1)
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.1,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        rule: Rule = "dgd",
        others: Others | None = None,
        others_lr: float | None = None,
        process_group: dist.ProcessGroup | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        nonfinite: NonFinite = "raise",
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"DeltaGradientDescent reads the inputs of a model's layers, so it takes the model, not its "
                f"parameters: expected an nn.Module, got {type(model).__name__}"
            )
        need(others in (None, "adamw", "sgd"), "others", "'adamw', 'sgd' or None", others)
        layers, treated, rest = _sort(model)
        if rest and others is None:
            shown = ", ".join(f"{name} ({kind})" for name, _, kind in rest[:8]) + (", ..." if len(rest) > 8 else "")
            raise ValueError(
                f"delta gradient descent treats weights and biases of nn.Linear, which these are not: {shown}; train "
                f"them by others='adamw' or others='sgd', or freeze them with requires_grad_(False)"
            )
        if not layers:
            raise ValueError(
                "the model has no nn.Linear whose weight requires a gradient, so there is nothing to treat"
            )
        last = _LastInput()
        self._layers = {module.weight: _Layer(name, module, last) for name, module in layers}
        self._process_group = process_group
        weakref.finalize(self, _remove_hooks, list(self._layers.values()))
        own = {"lr": lr if others_lr is None else others_lr, "weight_decay": 0.0}
        groups: list[dict[str, Any]] = []
        for period, members in sorted(levels_of(model).items()):
            linear = [pair for pair in members if pair[1] in treated]
            further = [pair for pair in members if pair[1] not in treated]
            if linear:
                groups.append({"params": linear, "rule": rule, "period": period})
            if further:
                groups.append({"params": further, "rule": others, "period": period, **own})
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "rule": rule,
            "adamw_betas": adamw_betas,
            "adamw_eps": adamw_eps,
        }
        super().__init__(groups, defaults, nonfinite=nonfinite)

    def check_group(self, group: Any) -> None:
        super().check_group(group)
        need(0 <= group["momentum"] < 1, "momentum", "a number in [0, 1)", group["momentum"])
        known = ("dgd", "delta", "adamw", "sgd")
        need(group["rule"] in known, "rule", "'dgd' or 'delta'", group["rule"])
        if group["rule"] in ("dgd", "delta"):
            foreign = [p for p in group["params"] if p not in self._layers and not self._is_bias(p)]
            shapes = [tuple(p.shape) for p in foreign]
            need(not foreign, "params", "weights and biases of the model's linear layers", shapes)

    def __getstate__(self) -> dict[str, Any]:
        own = {"_layers": self._layers, "_process_group": self._process_group}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_layers" in state:  # of a copy, and not of `load_state_dict`
            weakref.finalize(self, _remove_hooks, list(self._layers.values()))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears gradients, and the inputs that belong to them."""
        super().zero_grad(set_to_none)
        for layer in self._layers.values():
            layer.seen = None

    def gather_inputs(self, group: dict[str, Any]) -> None:
        """Keeps what the group's layers have seen beyond `zero_grad`, in the state, until the group moves.

        `LevelOptimizer` calls it where it gathers the gradients of a slow group.
        """
        for weight in group["params"]:
            layer = self._layers.get(weight)
            if layer is None or layer.seen is None:
                continue
            state, seen = self.state[weight], layer.seen
            if "gram" in state:
                seen = _Seen(state["gram"], state.get("total"), int(state["count"])) + seen
            state["gram"], state["count"] = seen.gram, torch.tensor(seen.count)
            if seen.total is not None:
                state["total"] = seen.total
            layer.seen = None

    def state_shape(self, parameter: Tensor, name: str) -> tuple[int, ...] | None:
        width = parameter.shape[-1:]
        shapes = {"gram": (*width, *width), "total": (*width,), "count": ()}
        return shapes[name] if name in shapes else super().state_shape(parameter, name)

    def update_group(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        if group["rule"] == "adamw":
            self.adamw(group, parameters, gradients)
            return
        updates = self._momenta(group, parameters, gradients)
        if group["rule"] == "sgd":
            for parameter, update in zip(parameters, updates, strict=True):
                parameter.add_(update, alpha=-float(group["lr"]))
            return
        by_parameter = dict(zip(parameters, updates, strict=True))
        weights: dict[Tensor | None, Tensor] = {layer.bias: weight for weight, layer in self._layers.items()}
        for parameter in parameters:
            if parameter in self._layers:
                self._move(group, self._layers[parameter], by_parameter)
            elif weights[parameter] not in by_parameter:
                self._move_bias(group, parameter, by_parameter[parameter])

    def _move(self, group: dict[str, Any], layer: _Layer, updates: dict[Tensor, Tensor]) -> None:
        weight, lr = layer.weight, float(group["lr"])
        bias = layer.bias if layer.bias is not None and layer.bias in updates else None
        seen = self._taken(layer)
        if seen is None:
            if bool(local(weight.grad).any()):
                raise ValueError(
                    f"{layer.name}.weight has a gradient, but its layer's forward was never called with gradients "
                    f"since the last zero_grad, so its inputs are unknown: it is used from outside its module (as nn."
                    f"MultiheadAttention does), or zero_grad was called between backward and step"
                )
            return
        # Its rows are memories of their own, so each process moves those that it holds.
        rows, update = local(weight).to(updates[weight].dtype), local(updates[weight])
        gram = (seen.gram / seen.count).to(rows.dtype)
        decayed = rows * (1 - lr * group["weight_decay"]) if group["weight_decay"] else rows
        if bias is not None:
            assert seen.total is not None
            mean = (seen.total / seen.count).to(rows.dtype)
            one = mean.new_ones(1)
            gram = torch.cat([torch.cat([gram, mean[:, None]], 1), torch.cat([mean, one])[None]], 0)
            decayed = torch.cat([decayed, local(bias).to(rows.dtype)[:, None]], 1)
            update = torch.cat([update, local(updates[bias])[:, None]], 1)
        moved = delta_step(decayed, update, gram, lr=lr, rule=group["rule"])
        local(weight).copy_(moved[:, : rows.shape[1]])
        if bias is not None:
            local(bias).copy_(moved[:, -1])

    def _move_bias(self, group: dict[str, Any], bias: Tensor, update: Tensor) -> None:
        """Of a layer whose weight stays, or has a group of its own: a memory whose only key is 1."""
        own, update = local(bias).to(update.dtype)[:, None], local(update)[:, None]
        if bool(update.any()):
            moved = delta_step(own, update, own.new_ones(1, 1), lr=float(group["lr"]), rule=group["rule"])
            local(bias).copy_(moved[:, 0])

    def _taken(self, layer: _Layer) -> _Seen | None:
        """All that a layer has seen since it last moved, on all processes; it begins anew."""
        state, seen = self.state[layer.weight], layer.seen
        layer.seen = None
        if "gram" in state:
            total = state.pop("total", None)
            kept = _Seen(state.pop("gram"), total, int(state.pop("count")))
            seen = kept if seen is None else kept + seen
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size(self._process_group) > 1):
            return seen
        width = layer.weight.shape[-1]
        like = local(layer.weight)
        dtype = torch.promote_types(like.dtype, torch.float32)
        flat = torch.zeros(width * width + width + 1, dtype=dtype, device=like.device)
        if seen is not None:
            flat[: width * width] = seen.gram.flatten()
            flat[width * width : -1] = 0 if seen.total is None else seen.total
            flat[-1] = seen.count
        dist.all_reduce(flat, group=self._process_group)
        if not bool(flat[-1]):
            return None
        total = None if layer.bias is None else flat[width * width : -1]
        return _Seen(flat[: width * width].view(width, width), total, int(flat[-1]))

    def _momenta(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
        if not group["momentum"]:
            return [g.to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        (momenta,) = self.buffers(parameters, "momentum")
        for momentum, gradient in zip(momenta, gradients, strict=True):
            momentum.mul_(group["momentum"]).add_(gradient.to(momentum.dtype))
        return momenta

    def _is_bias(self, parameter: Tensor) -> bool:
        return any(layer.bias is parameter for layer in self._layers.values())


def _sort(model: nn.Module) -> tuple[list[tuple[str, nn.Linear]], set[Tensor], list[tuple[str, nn.Parameter, str]]]:
    """Linear layers to be treated, their weights and biases, and what else requires a gradient, with what holds it."""
    holders: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            holders.setdefault(parameter, []).append((path, module, own))
    layers: list[tuple[str, nn.Linear]] = []
    treated: set[Tensor] = set()
    for parameter, places in holders.items():
        path, module, own = places[0]
        sound = isinstance(module, nn.Linear) and own == "weight" and len(places) == 1 and _by_rows(parameter)
        if parameter.requires_grad and sound:
            assert isinstance(module, nn.Linear)
            layers.append((path, module))
            own_bias = module.bias is not None and len(holders[module.bias]) == 1
            treated |= {module.weight, module.bias} if own_bias else {module.weight}
    rest = []
    for parameter, places in holders.items():
        if parameter.requires_grad and parameter not in treated:
            path, module, own = places[0]
            shared = f", shared with {places[1][0] or 'the model'}" if len(places) > 1 else ""
            rest.append((f"{path}.{own}" if path else own, parameter, type(module).__name__ + shared))
    return layers, treated, rest


def _by_rows(weight: Tensor) -> bool:
    """Whether a process holds whole rows of it."""
    return not isinstance(weight, DTensor) or all(p == Shard(0) or p.is_replicate() for p in weight.placements)


def _remove_hooks(layers: list[_Layer]) -> None:
    for layer in layers:
        layer.handle.remove()
