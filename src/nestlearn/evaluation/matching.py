"""Models of the same size, so that a comparison of mixers is not one of parameter counts."""

from __future__ import annotations

import dataclasses

import torch

from nestlearn.models import HopeConfig, HopeLM


def count_parameters(config: HopeConfig) -> int:
    """Learnt numbers of the model that a configuration describes; nothing is allocated."""
    with torch.device("meta"):
        return HopeLM(config).num_parameters()


def match_parameters(config: HopeConfig, target: int) -> HopeConfig:
    """The configuration whose CMS levels are as wide as brings its parameter count nearest to `target`.

    Everything else stays: the width of the levels (`cms_expansion`) is what no mixer depends on. One unit of hidden
    width is 2 x dim x depth x levels parameters, so the counts agree to half of that.

    Args:
        config: of the model to be matched.
        target: its parameter count is to be this.

    Raises:
        ValueError: if the model is larger than the target even with levels of width 1.
    """

    def with_hidden(hidden: int) -> HopeConfig:
        # round(dim * expansion) gives the hidden width back.
        return dataclasses.replace(config, cms_expansion=hidden / config.dim)

    smallest = count_parameters(with_hidden(1))
    each = count_parameters(with_hidden(2)) - smallest
    hidden = 1 + round((target - smallest) / each)
    if hidden < 1:
        raise ValueError(
            f"target: {config.mixer} of width {config.dim} and depth {config.depth} has at least {smallest:,} "
            f"parameters, got a target of {target:,}; give a larger target, or a smaller dim or depth"
        )
    return with_hidden(hidden)
