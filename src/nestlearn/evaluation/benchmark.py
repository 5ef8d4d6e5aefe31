"""Speed of training, as a ratio to a plain Transformer in the same process.

A speed is worth nothing if what is timed is wrong. So before a mixer is timed, a small model with its settings must
read a sequence whole as it does token by token, gradients included, in float64; otherwise no speed is given.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nestlearn.models import HopeConfig, HopeLM
from nestlearn.models.config import Mixer
from nestlearn.optim.leveled import LevelOptimizer
from nestlearn.training.distributed import Processes
from nestlearn.training.record import describe_environment

REFERENCE = "transformer"
MIXERS: tuple[str, ...] = get_args(Mixer)
EQUALITY = 1e-9

Notice = Callable[[str], None]


class NotEqual(ValueError):
    """A model does not read a sequence whole as it does token by token."""


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """What is timed: training steps (forward, backward, clipping, optimizer) on random bytes in fp32.

    Attributes:
        mixers: the models beside the reference, as in `HopeConfig.mixer`.
        lengths: T, sequence lengths.
        dim, depth, heads: of all models.
        batch: B, sequences a step.
        alternations: how often all models are timed one after another; the ratio is the median over them.
        threads: CPU threads.
        device: "cpu" or a CUDA device.
        seed: of weights and tokens.

    Raises:
        ValueError: for an unknown mixer or a number out of range.
    """

    mixers: tuple[str, ...] = MIXERS
    lengths: tuple[int, ...] = (512, 2048)
    dim: int = 256
    depth: int = 4
    heads: int = 4
    batch: int = 4
    alternations: int = 5
    threads: int = 2
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in self.mixers:
            if name not in MIXERS:
                raise ValueError(f"mixers: expected names among {', '.join(MIXERS)}; got {name!r}")
        if len(set(self.mixers)) < len(self.mixers) or not self.mixers:
            raise ValueError(f"mixers: expected one or more different names, got {', '.join(self.mixers) or 'none'}")
        for name, value in (("batch", self.batch), ("alternations", self.alternations), ("threads", self.threads)):
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if not self.lengths or min(self.lengths) < 2:
            raise ValueError(f"lengths: expected one or more sequence lengths of at least 2, got {self.lengths}")
        self.configs()

    def configs(self) -> dict[str, HopeConfig]:
        """The models by name, the reference first."""
        size: dict[str, Any] = {"dim": self.dim, "depth": self.depth, "heads": self.heads}
        others = {name: HopeConfig(mixer=name, **size) for name in self.mixers}  # type: ignore[arg-type]
        return {REFERENCE: HopeConfig.transformer(**size), **others}


def check_equality(config: HopeConfig, *, tokens: int = 37, tolerance: float = EQUALITY, seed: int = 0) -> float:
    """Compares reading whole with reading token by token: logits, state and all gradients, in float64.

    Args:
        config: its settings are kept; width, depth, vocabulary and chunks are made small.
        tokens: T.
        tolerance: largest difference allowed, over the largest value of each tensor.
        seed: of weights and tokens.

    Returns:
        The largest difference found, relative to the largest value of its tensor.

    Raises:
        NotEqual: naming the tensor that differs.
    """
    chunk = 8
    projection = config.projection_chunk_size
    small = replace(
        config,
        vocab_size=23,
        dim=16,
        depth=2,
        heads=2,
        chunk_size=chunk,
        projection_chunk_size=None if projection is None else _in_proportion(chunk, config.chunk_size, projection),
        global_chunk_size=16,
        local_chunk_sizes=(2, 4),
        shard_length=12,
        memory_hidden=None,
        cms_expansion=2.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HopeLM(small).double()
        # Memories start at zero in part, which would hide what is wrong with them.
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        inputs, targets = torch.randint(small.vocab_size, (2, 2, tokens))

    def piecewise(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        state, logits = model.init_state(len(x)), []
        for i in range(x.shape[1]):
            out, state = model(x[:, i : i + 1], state)
            logits.append(out)
        return torch.cat(logits, dim=1), state

    def everything(read: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]) -> dict[str, Tensor]:
        model.zero_grad()
        logits, state = read(inputs)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"logits": logits.detach(), **{name: x.detach() for name, x in state.items()}, **_copies(gradients)}

    whole, pieces = everything(model), everything(piecewise)
    if whole.keys() != pieces.keys():
        raise NotEqual(f"{config.mixer}: not the same tensors: {', '.join(sorted(whole.keys() ^ pieces.keys()))}")
    worst = 0.0
    for name, expected in pieces.items():
        largest = max(float(expected.abs().max()), 1e-12)
        difference = float((whole[name] - expected).abs().max()) / largest
        if not difference <= tolerance:
            raise NotEqual(
                f"{config.mixer}: a whole sequence and its tokens one by one give different results: {name} differs "
                f"by {difference:.1e} of its largest value, at most {tolerance:.0e} is allowed. No speed is given for "
                f"a model that is wrong; the tests in tests/models say where"
            )
        worst = max(worst, difference)
    return worst


def benchmark_training(settings: TrainingBenchmark, *, notice: Notice = lambda text: None) -> dict[str, Any]:
    """Times training steps of all models, in turns, in this process.

    Args:
        settings: what and how often.
        notice: called with a sentence about what is being done.

    Returns:
        As plain JSON types: "settings", "environment" (commit, versions, device, threads), and "rows", one for each
        model and length: model, tokens (T), milliseconds (median of a step), tokens_per_second, ratio, ratio_min and
        ratio_max (to the reference in the same turn), gflops_per_second, parameters, equality (largest relative
        difference of `check_equality`).

    Raises:
        NotEqual: if a model is wrong; nothing was timed then.
    """
    configs = settings.configs()
    equality = {}
    for name, config in configs.items():
        notice(f"{name}: whole sequence against token by token")
        equality[name] = check_equality(config, seed=settings.seed)
    device, before = torch.device(settings.device), torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        rows = [row for tokens in settings.lengths for row in _time(settings, configs, tokens, device, notice)]
        environment = describe_environment(Processes(device=device))
    finally:
        torch.set_num_threads(before)
    for row in rows:
        row["equality"] = equality[row["model"]]
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(settings).items()}
    return {"benchmark": "training step", "settings": plain, "environment": environment, "rows": rows}


def _time(
    settings: TrainingBenchmark, configs: dict[str, HopeConfig], tokens: int, device: torch.device, notice: Notice
) -> list[dict[str, Any]]:
    torch.manual_seed(settings.seed)
    models = {name: HopeLM(config).to(device) for name, config in configs.items()}
    steps = {name: training_step(model) for name, model in models.items()}
    batches = torch.randint(256, (settings.alternations + 1, 2, settings.batch, tokens), device=device)
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for turn, (inputs, targets) in enumerate(batches):
        notice(f"T = {tokens:,}: " + (f"turn {turn} of {settings.alternations}" if turn else "warming up"))
        for name, step in steps.items():
            begin = _now(device)
            step(inputs, targets)
            if turn:
                seconds[name].append(_now(device) - begin)
    return [
        _row(name, models[name], tokens, settings.batch, taken, seconds[REFERENCE]) for name, taken in seconds.items()
    ]


def _row(
    name: str, model: HopeLM, tokens: int, batch: int, taken: Sequence[float], reference: Sequence[float]
) -> dict[str, Any]:
    ratios = [own / other for own, other in zip(taken, reference, strict=True)]
    median = statistics.median(taken)
    return {
        "model": name,
        "tokens": tokens,
        "milliseconds": 1000 * median,
        "tokens_per_second": batch * tokens / median,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        # A backward pass costs twice its forward pass.
        "gflops_per_second": 3 * model.flops_per_token(tokens) * batch * tokens / median / 1e9,
        "parameters": model.num_parameters(),
    }


def training_step(model: HopeLM) -> Callable[[Tensor, Tensor], None]:
    """What is timed: a function of inputs and targets (B, T) that takes one optimizer step."""
    optimizer = LevelOptimizer.for_model(model, lr=1e-4, weight_decay=0.1, betas=(0.9, 0.95))

    def step(inputs: Tensor, targets: Tensor) -> None:
        optimizer.zero_grad()
        logits, _ = model(inputs)
        F.cross_entropy(logits.flatten(0, 1), targets.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _in_proportion(chunk: int, main: int, projection: int) -> int:
    """A projection chunk that is to `chunk` as `projection` is to `main`, so that one still divides the other."""
    return chunk * (projection // main) if projection >= main else max(1, chunk // (main // projection))


def _copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
