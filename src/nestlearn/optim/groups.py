"""Which parameter is what: matrices for the rules of this package, the rest for AdamW."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

from nestlearn.memory import MatrixMemory, MLPMemory
from nestlearn.optim.leveled import levels_of

# With fewer rows or columns a matrix is some vectors side by side, such as a read-out for each head.
_THIN = 8
_HEADS = ("lm_head", "classifier", "score", "head", "unembedding", "logits")


def kinds_of(model: nn.Module) -> dict[str, str]:
    """What each parameter is, by name: "matrix", "memory" (a matrix too), or why it is neither."""
    found: dict[str, str] = {}
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for path, module in model.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{own}" if path else own
            last = path.rpartition(".")[2]
            kind = type(module).__name__
            if isinstance(module, nn.Embedding | nn.EmbeddingBag) or "embed" in name or own.startswith("pos"):
                found[name] = "embedding"
            elif parameter.ndim < 2:
                found[name] = "bias" if own.endswith("bias") else "norm" if "norm" in name.lower() else "vector"
            elif isinstance(module, MLPMemory | MatrixMemory):
                found[name] = "memory"
            elif isinstance(module, nn.modules.conv._ConvNd) or "convolution" in kind.lower():
                found[name] = "convolution"
            elif module is output or last in _HEADS:
                found[name] = "head"
            elif min(parameter.shape[-2:]) < _THIN:
                found[name] = "thin"
            else:
                found[name] = "matrix"
    return found


def sorted_groups(model: nn.Module, *, rule: str, weight_decay: float, adamw: Collection[str]) -> list[dict[str, Any]]:
    """Parameter groups with ``rule``, ``weight_decay`` and ``period``, and why each of their members is there.

    Args:
        model: its parameters that require a gradient; periods as from its ``level_parameters()``, otherwise 1.
        rule: of matrices and memories; the rest has "adamw".
        weight_decay: of matrices; everything else has 0.
        adamw: parts of names of further parameters for AdamW.

    Raises:
        ValueError: if there is nothing to train, or a part of a name fits no parameter.
    """
    kinds = kinds_of(model)
    for part in adamw:
        if not any(part in name for name in kinds):
            raise ValueError(f"adamw: no parameter's name has {part!r} in it; names are like {', '.join([*kinds][:3])}")
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for period, members in sorted(levels_of(model).items()):
        for name, parameter in members:
            kind = "as asked" if any(part in name for part in adamw) else kinds[name]
            own = rule if kind in ("matrix", "memory") else "adamw"
            exempt = kind not in ("matrix", "head", "convolution", "as asked") or parameter.ndim < 2
            decay = 0.0 if exempt or getattr(parameter, "_no_weight_decay", False) else weight_decay
            new: dict[str, Any] = {"params": [], "rule": own, "weight_decay": decay, "period": period, "reasons": []}
            group = groups.setdefault((period, own, decay), new)
            group["params"].append((name, parameter))
            group["reasons"].append(kind)
    if not groups:
        raise ValueError("the model has no parameter that requires a gradient, so there is nothing to train")
    return list(groups.values())


def describe_groups(groups: Collection[Mapping[str, Any]]) -> str:
    """A line for each rule and kind of parameter: how many, how many numbers, and the first name."""
    lines: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for group in groups:
        for (name, parameter), reason in zip(group["params"], group["reasons"], strict=True):
            lines.setdefault((group["rule"], reason), []).append((name, parameter.numel()))
    text = [f"{'rule':8}{'kind':14}{'tensors':>8}{'numbers':>14}  such as"]
    for (rule, reason), members in sorted(lines.items(), key=lambda item: item[0][0] == "adamw"):
        numbers = sum(count for _, count in members)
        text.append(f"{rule:8}{reason:14}{len(members):8}{numbers:14,}  {members[0][0]}")
    return "\n".join(text)
