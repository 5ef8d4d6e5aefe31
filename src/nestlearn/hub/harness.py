"""Hope in lm-evaluation-harness (Gao et al.): any of its tasks, and a document read through one memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch.nn import functional as F

from nestlearn.hub.cache import HopeCache
from nestlearn.hub.modeling import HopeForCausalLM

TASKS = Path(__file__).parent / "tasks"
# Names of tasks over local files, for those who just say which set they mean.
LOCAL = {name: f"local_{name}" for name in ("lambada", "piqa", "arc_easy", "novels")}
# Prompts are never shortened: the state does not grow with them.
UNBOUNDED = 2**40


class HopeHarness(HFLM):
    """A model as the harness wants it.

    Every request begins with empty memories, so that no answer is seen by a later question. Whole documents (those of
    perplexity tasks) are read in windows, either through one memory or each window for itself.

    Args:
        model: in evaluation mode.
        tokenizer: of `transformers`.
        carry: whether the windows of a document share one memory.
        window: tokens of a window.
        batch_size: requests at once.
    """

    def __init__(
        self, model: HopeForCausalLM, tokenizer: Any, *, carry: bool = False, window: int = 2048, batch_size: int = 8
    ) -> None:
        if window < 1:
            raise ValueError(f"window: expected at least 1 token, got {window}")
        known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        # A tokenizer that has no token for the beginning of a text lets it follow a new line.
        prefix = next((token for token in known if token is not None), tokenizer.encode("\n")[0])
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            max_length=UNBOUNDED,
            batch_size=batch_size,
            prefix_token_id=prefix,
        )
        self.carry, self.window = carry, window

    @property
    def eot_token_id(self) -> int:
        """What ends a text: the padding where the tokenizer has nothing else."""
        tokenizer = self.tokenizer
        return int(tokenizer.pad_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each document in nats; every token is predicted once."""
        return [self._document(self.tok_encode(request.args[0])) for request in requests]

    @torch.no_grad()
    def _document(self, ids: list[int]) -> float:
        tokens = torch.tensor([self.prefix_token_id, *ids], device=self.device)
        cache, likelihood = HopeCache(), 0.0
        for start in range(0, len(ids), self.window):
            piece = tokens[start : start + self.window + 1]
            if not self.carry:
                cache = HopeCache()
            logits = self.model(piece[None, :-1], cache=cache, use_cache=True).logits[0]
            likelihood -= float(F.cross_entropy(logits.float(), piece[1:], reduction="sum"))
        return likelihood


def evaluate_tasks(
    model: HopeForCausalLM,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    carry: bool = False,
    window: int = 2048,
    batch_size: int = 8,
    include_path: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The measures of a model on tasks.

    Args:
        model, tokenizer, carry, window, batch_size: as in `HopeHarness`.
        tasks: names: of our local ones ("lambada", "piqa", "arc_easy", "novels"), of those in `include_path`, or of the
            harness, which then wants a network.
        limit: only the first documents of each task.
        include_path: a folder with further tasks in YAML.

    Returns:
        name -> measure -> number, with "samples", how many documents it is over.

    Raises:
        ValueError: for an unknown task, or none.
    """
    if not tasks:
        raise ValueError("tasks: expected at least one name, got none")
    names = [LOCAL.get(name, name) for name in tasks]
    folders: list[str | Path] = [TASKS, *([include_path] if include_path is not None else [])]
    manager = TaskManager(include_path=folders, include_defaults=False)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(include_path=folders)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        raise ValueError(
            f"tasks: {', '.join(unknown)} is known neither here ({', '.join(LOCAL)}) nor to lm-evaluation-harness; "
            f"--include-path takes a folder with tasks of your own"
        )
    # It asks git about the folder that it runs in, and git complains on standard error where that is no repository.
    with mock.patch("lm_eval.evaluator.get_git_commit_hash", return_value=None):
        found = simple_evaluate(
            model=HopeHarness(model, tokenizer, carry=carry, window=window, batch_size=batch_size),
            tasks=names,
            task_manager=manager,
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
        )
    assert found is not None  # only other processes than the first get nothing
    table = {}
    for asked, name in zip(tasks, names, strict=True):
        measured = {key.removesuffix(",none"): value for key, value in found["results"][name].items()}
        numbers = {key: value for key, value in measured.items() if isinstance(value, float) and "stderr" not in key}
        table[asked] = {**numbers, "samples": found["n-samples"][name]["effective"]}
    return table
