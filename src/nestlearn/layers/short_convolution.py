"""A causal depthwise convolution over the last few tokens, in front of every query, key and value.

Shapes: B batch, T tokens, C channels, N positions next to a document start.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["ShortConvolution", "causal_convolution", "last_document_start"]


def last_document_start(document_starts: Tensor) -> Tensor:
    """Index of the token that opened the document of each token, -1 where that document began before token 0.

    document_starts (B, T) bool -> (B, T) int64.
    """
    token = torch.arange(document_starts.shape[1], device=document_starts.device)
    return torch.where(document_starts, token, -1).cummax(dim=1).values


def causal_convolution(x: Tensor, weight: Tensor, document_starts: Tensor | None = None) -> Tensor:
    """y_t = sum_d weight[width - 1 - d] * x_{t-d}, per channel, over the delays d = 0 .. width - 1.

    Tokens before token 0, and tokens of another document than token t, count as zero.
    x (B, T, C), weight (width, C), document_starts (B, T) bool -> (B, T, C).
    """
    width, tokens = weight.shape[0], x.shape[1]
    starts = None if document_starts is None else last_document_start(document_starts)
    if tokens <= width or x.device.type != "cpu" or not (x.dtype == weight.dtype == torch.float32):
        return _shifted_products(x, weight, starts)
    rows = columns = None
    if starts is not None:
        # Only the first width - 1 tokens of a document have taps to cut off.
        age = torch.arange(tokens, device=x.device) - starts
        rows, columns = torch.nonzero((starts >= 0) & (age < width - 1), as_tuple=True)
        if rows.numel() * width > x.shape[0] * tokens:
            return _shifted_products(x, weight, starts)
        if rows.numel() == 0:
            rows = columns = None
    return _DepthwiseConvolution.apply(x, weight, starts, rows, columns)


def _shifted_products(x: Tensor, weight: Tensor, starts: Tensor | None) -> Tensor:
    """The sum as it is written, for any device and dtype, differentiable any number of times."""
    width, tokens = weight.shape[0], x.shape[1]
    y = x * weight[-1]
    for delay in range(1, min(width, tokens)):
        term = x[:, :-delay] * weight[width - 1 - delay]
        if starts is not None:
            cut = starts[:, delay:] > torch.arange(tokens - delay, device=x.device)
            term = term.masked_fill(cut.unsqueeze(-1), 0)
        y = y + F.pad(term, (0, 0, delay, 0))
    return y


class _DepthwiseConvolution(torch.autograd.Function):
    """The same sum in fp32 on the CPU, several times faster.

    oneDNN has a fast depthwise kernel for two-dimensional images in channels-last layout, which is what (B, T, C)
    already is. Its weight gradient is slow on long images, so that one is taken row by row through one buffer. The
    few tokens next to a document start are computed apart and overwrite what the kernel left there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, starts: Tensor | None, rows: Tensor | None, columns: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, weight, starts, rows, columns)
        y = _image_convolution(x, weight)[:, : x.shape[1]]
        if starts is not None and rows is not None and columns is not None:
            taps, _ = _taps_of(x, starts, rows, columns, weight.shape[0])
            y[rows, columns] = (taps * weight).sum(1)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight, starts, rows, columns = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: take a form that can be differentiated again
            wanted = [t for t, need in zip((x, weight), ctx.needs_input_grad[:2], strict=True) if need]
            found = iter(torch.autograd.grad(_shifted_products(x, weight, starts), wanted, grad, create_graph=True))
            first, second = (next(found) if need else None for need in ctx.needs_input_grad[:2])
            return first, second, None, None, None
        width, tokens = weight.shape[0], x.shape[1]
        edge = None
        if rows is not None:
            edge = grad[rows, columns].unsqueeze(1)
            grad = grad.clone()
            grad[rows, columns] = 0
        grad_x = _image_convolution(grad, weight.flip(0))[:, width - 1 :]
        grad_weight = torch.zeros_like(weight)
        buffer = torch.empty_like(x[0])
        for row in range(x.shape[0]):
            for delay in range(width):
                product = buffer[delay:]
                torch.mul(grad[row, delay:], x[row, : tokens - delay], out=product)
                grad_weight[width - 1 - delay] += product.sum(0)
        if edge is not None:
            taps, (source, valid) = _taps_of(x, starts, rows, columns, width)
            grad_weight += (edge * taps).sum(0)
            grad_x.index_put_((rows.unsqueeze(1), source), edge * weight * valid.unsqueeze(-1), accumulate=True)
        return grad_x, grad_weight, None, None, None


def _image_convolution(x: Tensor, weight: Tensor) -> Tensor:
    """Full convolution (B, T + width - 1, C) with zeros on both sides, x taken as an image of height 1 and width T."""
    width, channels = weight.shape
    image = x.contiguous().unsqueeze(1).permute(0, 3, 1, 2)
    kernel = weight.t().reshape(channels, 1, 1, width)
    return F.conv2d(image, kernel, padding=(0, width - 1), groups=channels).permute(0, 2, 3, 1).squeeze(1)


def _taps_of(
    x: Tensor, starts: Tensor, rows: Tensor, columns: Tensor, width: int
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """What the taps of the named tokens see: (N, width, C), zero before the document; and where, and whether."""
    source = columns.unsqueeze(1) + torch.arange(1 - width, 1, device=x.device)
    valid = source >= starts[rows, columns].unsqueeze(1)
    source = source.clamp_min(0)
    return x[rows.unsqueeze(1), source].masked_fill(~valid.unsqueeze(-1), 0), (source, valid)


class ShortConvolution(nn.Module):
    """Causal depthwise convolution of a few tokens, with its state.

    weight (width, C): the last row meets the current token. All rows start uniform in +-1/sqrt(width), as in
    torch.nn.Conv1d; `Streams` then gives those of queries and keys a lead.

    channels: C. width: tokens seen, the current one included; 1 is a scale per channel.
    """

    def __init__(self, channels: int, width: int = 4) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(
                f"ShortConvolution: expected width >= 1, got {width}. Use 1 to see the current token only."
            )
        self.channels = channels
        self.width = width
        self.weight = nn.Parameter(torch.empty(width, channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            self.weight.uniform_(-(self.width**-0.5), self.width**-0.5)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The empty tail, zeros (B, width - 1, C); by default on the device and in the dtype of the weight."""
        return self.weight.new_zeros(batch_size, self.width - 1, self.channels, device=device, dtype=dtype)

    def forward(
        self,
        x: Tensor,
        tail: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        document_starts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve x (B, T, C) with the tail (B, width - 1, C) before it; None: nothing before it.

        lengths (B,): valid tokens of each right-padded row. document_starts (B, T) bool: no tap reaches behind these.
        Returns y (B, T, C) and the new tail: the inputs of each row's last width - 1 valid tokens, oldest first, with
        zeros in place of earlier documents.
        """
        weight = self.weight.to(x.dtype)
        if tail is None:
            y = causal_convolution(x, weight, document_starts)
        else:
            tail = tail.to(x.dtype)
            joined = torch.cat([tail, x], dim=1)
            if x.shape[1] == 1 and document_starts is None:
                y = (joined * weight).sum(1, keepdim=True)
            else:
                history = self.width - 1
                starts = None if document_starts is None else F.pad(document_starts, (history, 0))
                y = causal_convolution(joined, weight, starts)[:, history:]
        return y, self.tail_after(x, tail, lengths, document_starts)

    def decode_step(self, x: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
        """One token x (B, 1, C) without gradients -> y (B, 1, C) and the tail, overwritten where its dtype allows."""
        joined = torch.cat([tail.to(x.dtype), x], dim=1)
        y = (joined * self.weight.to(x.dtype)).sum(1, keepdim=True)
        if tail.dtype == x.dtype:
            return y, tail.copy_(joined[:, 1:])
        return y, joined[:, 1:].contiguous()

    def tail_after(
        self, x: Tensor, tail: Tensor | None, lengths: Tensor | None, document_starts: Tensor | None
    ) -> Tensor:
        """The new tail; arguments as in `forward`."""
        batch, tokens, _ = x.shape
        if tail is None:
            tail = x.new_zeros(batch, self.width - 1, x.shape[2])
        kept = self.width - 1
        if kept == 0:
            return tail
        if lengths is None and document_starts is None:
            return torch.cat([tail, x[:, -kept:]], dim=1)[:, -kept:].contiguous() if tokens else tail
        if lengths is None:
            lengths = torch.full((batch,), tokens, device=x.device)
        # Token index of each entry of the new tail; negative ones lie in the old tail.
        index = lengths.unsqueeze(1) + torch.arange(-kept, 0, device=x.device)
        new = x.gather(1, index.clamp_min(0).unsqueeze(-1).expand(-1, -1, x.shape[2])) if tokens else tail
        old = tail.gather(1, (index + kept).clamp_max(kept - 1).unsqueeze(-1).expand(-1, -1, x.shape[2]))
        result = torch.where((index >= 0).unsqueeze(-1), new, old)
        if document_starts is not None and tokens:
            starts = last_document_start(document_starts).gather(1, (lengths - 1).clamp_min(0).unsqueeze(1))
            starts = torch.where(lengths.unsqueeze(1) > 0, starts, -1)
            result = torch.where(((starts < 0) | (index >= starts)).unsqueeze(-1), result, 0)
        return result
