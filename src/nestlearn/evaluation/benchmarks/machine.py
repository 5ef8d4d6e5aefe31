"""What the machine can do at most, measured in the process that is timed; and the floor that follows from it.

    floor = max(operations / measured rate of products, bytes / measured rate of a copy)

No step that computes and moves as much can be faster here, so time / floor says how far a step is from ideal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch

SIDE = 1024  # of the large product
BATCHED = (256, 64)  # how many small products at once, and their side: a head's
COPIES = (1, 4, 16, 64, 256)  # megabytes read and as many written


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a step must compute and move.

    Attributes:
        linear_flops: of the linear layers, large products.
        mixer_flops: of attention or memories, small products a head.
        bytes: that cross memory: parameters, states, activations. See `nestlearn.evaluation.benchmarks.work`.
    """

    linear_flops: float
    mixer_flops: float
    bytes: float


class Floor(NamedTuple):
    """The least seconds of a step, and whether operations or bytes set it."""

    seconds: float
    by: Literal["operations", "bytes"]


class Machine(NamedTuple):
    """Measured rates in fp32.

    Attributes:
        product_flops: operations a second of a large matrix product.
        batched_flops: the same of many small products at once.
        copy_bytes: bytes a second, read and written together, by the megabytes of the source. Small copies stay in
            caches and are faster; so are small models.
    """

    product_flops: float
    batched_flops: float
    copy_bytes: dict[int, float]

    def floor(self, needs: Needs) -> Floor:
        """The least time for what a step needs."""
        computing = needs.linear_flops / self.product_flops + needs.mixer_flops / self.batched_flops
        fits = [size for size in self.copy_bytes if 2e6 * size <= needs.bytes] or [min(self.copy_bytes)]
        moving = needs.bytes / self.copy_bytes[max(fits)]
        return Floor(computing, "operations") if computing >= moving else Floor(moving, "bytes")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, in units of 1e9 a second."""
        return {
            "product_gflops_per_second": self.product_flops / 1e9,
            "batched_product_gflops_per_second": self.batched_flops / 1e9,
            "copy_gigabytes_per_second": {str(size): rate / 1e9 for size, rate in self.copy_bytes.items()},
        }


def measure_machine(device: torch.device, *, seconds: float = 0.15) -> Machine:
    """Measures the rates with the threads that torch has now; each is the best of as many tries as fit in `seconds`."""
    a, b, c = (torch.randn(SIDE, SIDE, device=device) for _ in range(3))
    count, side = BATCHED
    x, y, z = (torch.randn(count, side, side, device=device) for _ in range(3))
    copies = {}
    for size in COPIES:
        source = torch.zeros(size * 250_000, device=device)
        target = torch.zeros_like(source)
        copies[size] = 2e6 * size / _best(lambda s=source, t=target: t.copy_(s), device, seconds)  # type: ignore[misc]
    return Machine(
        product_flops=2 * SIDE**3 / _best(lambda: torch.mm(a, b, out=c), device, seconds),
        batched_flops=2 * count * side**3 / _best(lambda: torch.bmm(x, y, out=z), device, seconds),
        copy_bytes=copies,
    )


def now(device: torch.device) -> float:
    """Seconds, once the device is done with what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _best(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    work()
    end = now(device) + seconds
    best = float("inf")
    while (begin := now(device)) < end:
        work()
        best = min(best, now(device) - begin)
    return best
