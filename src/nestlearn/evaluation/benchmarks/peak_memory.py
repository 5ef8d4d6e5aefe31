"""The most memory that a step takes, measured in a process of its own that runs nothing else."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch

from nestlearn.evaluation.benchmarks.context import growing_tensors
from nestlearn.evaluation.benchmarks.equality import small_config
from nestlearn.evaluation.benchmarks.settings import ModelBenchmark
from nestlearn.evaluation.benchmarks.work import build_model, make_work
from nestlearn.models import HopeLM

Memory = dict[str, float | None]

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_memory(settings: ModelBenchmark, name: str, batch: int, tokens: int) -> Memory:
    """Peak memory of a step, in units of 1e6 bytes.

    Two numbers, because neither is the whole truth: the peak of the process holds Python and torch too, which are the
    same for every model; the growth is what the step added to a process that held the model already (activations,
    gradients, the optimizer's and the context's state), and is what ratios are taken of. On a GPU both are what
    torch's allocator gave out.

    Args:
        settings: of the benchmark.
        name: of the model, among `settings.configs`.
        batch: B.
        tokens: T.

    Returns:
        "peak_megabytes" and "growth_megabytes"; both None if the process was killed, most likely for its memory.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(measure_here, settings, name, batch, tokens).result()
        except BrokenProcessPool:
            return {"peak_megabytes": None, "growth_megabytes": None}


def measure_here(settings: ModelBenchmark, name: str, batch: int, tokens: int) -> Memory:
    """As `peak_memory`, in this process, which should be fresh: what it freed before hides what is taken now."""
    torch.set_num_threads(settings.threads)
    device, config = settings.torch_device, settings.configs[name]
    # Loads libraries and fills their caches, with next to no memory of its own.
    make_work(settings.kind, HopeLM(small_config(config)).to(device), 1, 2).step()
    model = build_model(config, settings)
    if settings.kind == "decode" and not growing_tensors(model):
        tokens = min(
            tokens, config.chunk_size
        )  # the state is of one size, and reading takes memory that decoding does not
    before = _current(device)
    work = make_work(settings.kind, model, batch, tokens)
    _forget_peak(device)
    work.step()
    peak = _peak(device)
    return {"peak_megabytes": peak, "growth_megabytes": max(0.0, peak - before)}


def _current(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / 1e6
    return _field("VmRSS") or _maximum()


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return _field("VmHWM") or _maximum()


def _forget_peak(device: torch.device) -> None:
    """Peaks count from here, where the system allows it; otherwise from the start of the process."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _CLEAR.exists():
        _CLEAR.write_text("5")


def _field(name: str) -> float | None:
    """A field of Linux's /proc/self/status. Its VmHWM is the peak of this process alone; ru_maxrss is not, it begins
    with that of the process that started this one."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024 / 1e6
    return None


def _maximum() -> float:
    """The peak of this process where there is no /proc."""
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
