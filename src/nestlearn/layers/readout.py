"""What every gated mixer does with the outputs of its heads before they leave the layer."""

import torch.nn.functional as F
from torch import Tensor, nn

from nestlearn.functional.plain import plain_weight
from nestlearn.functional.recomputed import gated_output, recomputable
from nestlearn.functional.rms_norm import RMSNorm

__all__ = ["GatedReadout"]


class GatedReadout(nn.Module):
    """y = W_o (RMSNorm(o) * SiLU(x W_g)): each head normalised, gated by the layer's input, projected back.

    dim: D, model width. heads: H. head_dim: Dh, width of one head's output. The norm's scale (Dh) is shared by the
    heads. No biases. eps: of the norm.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = RMSNorm(head_dim, eps=eps)
        self.gate = nn.Linear(dim, heads * head_dim, bias=False)
        self.output = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(self, o: Tensor, x: Tensor) -> Tensor:
        """o (B, H, T, Dh) from the heads, x (B, T, D) the input of the layer -> (B, T, D)."""
        o = o.transpose(1, 2).to(self.norm.weight.dtype)  # autocast leaves o in half precision
        gate = self.gate(x)
        norm, output = plain_weight(self.norm, RMSNorm, o), plain_weight(self.output, nn.Linear, o)
        if (
            norm is not None
            and output is not None
            and recomputable(o, gate, norm, output)
            and (norm.shape == o.shape[-1:] and gate.shape[-1] == output.shape[1] == o.shape[2] * o.shape[3])
        ):
            return gated_output(o, norm, gate, output, self.norm.eps)
        y: Tensor = self.output(self.norm(o).flatten(2) * F.silu(gate))
        return y
