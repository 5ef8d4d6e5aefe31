"""Numbers as tensors, made once: an operation on a Python number first has to make a tensor of it.

Only for code without gradients that reads many small tensors, as decoding does.
"""

from functools import lru_cache

import torch
from torch import Tensor


@lru_cache(maxsize=256)
def constant(value: float | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor () or (n,) that is shared and must not be written to."""
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)
