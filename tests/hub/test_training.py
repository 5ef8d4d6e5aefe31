"""`Trainer` and `accelerate`: they train a Hope as they train any model, and go on where they stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hope_models import small_model, text
from torch.utils.data import DataLoader
from transformers import DataCollatorForLanguageModeling, Trainer, TrainerCallback, TrainingArguments

import nestlearn.optim
from nestlearn.hub import HopeForCausalLM, to_transformers
from nestlearn.optim import LevelOptimizer
from nestlearn.training.tokenizers import ByteTokenizer

TOKENIZER = to_transformers(ByteTokenizer())
TOKENIZER.padding_side = "right"  # Trainer counts a row's first token as predicted where padding is before it
TEXTS = [f"{number} cats sat on the mat" + "." * (number % 5) for number in range(64)]
# The newer versions of transformers have the first name for it, the older ones the second.
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in TrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
# Optimizers of ours that are there, each made for a model.
OPTIMIZERS = {"LevelOptimizer": lambda model: LevelOptimizer.for_model(model, lr=5e-3)}
if hasattr(nestlearn.optim, "M3"):
    OPTIMIZERS["M3"] = lambda model: nestlearn.optim.M3(model.parameters(), lr=5e-2, period=3)


class StopAt(TrainerCallback):
    """As if somebody stopped the run after a step that was saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step >= self.step


def byte_model(**settings: Any) -> HopeForCausalLM:
    return small_model("self_modifying_titans", vocab_size=256, tie_embeddings=True, **settings)


def trainer(
    folder: Path,
    *,
    optimizer: str | None = None,
    stop: int | None = None,
    **settings: Any,
) -> Trainer:
    model = byte_model()
    arguments = {
        "max_steps": 8,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **{**arguments, **settings}),
        train_dataset=[TOKENIZER(line) for line in TEXTS],
        data_collator=DataCollatorForLanguageModeling(TOKENIZER, mlm=False),
        processing_class=TOKENIZER,
        optimizers=(OPTIMIZERS[optimizer](model) if optimizer else None, None),
        callbacks=[StopAt(stop)] if stop else [],
    )


def losses(run: Trainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


@pytest.mark.parametrize("optimizer", [None, *OPTIMIZERS])
def test_trainer_trains_stops_and_goes_on_to_the_same_weights(tmp_path: Path, optimizer: str | None) -> None:
    whole = trainer(tmp_path / "whole", optimizer=optimizer)
    whole.train()
    assert len(losses(whole)) == 8
    assert losses(whole)[-1] < 0.8 * losses(whole)[0]
    first = trainer(tmp_path / "parts", optimizer=optimizer, stop=4)
    first.train()
    assert len(losses(first)) == 4
    second = trainer(tmp_path / "parts", optimizer=optimizer)
    second.train(resume_from_checkpoint=True)
    assert losses(second) == losses(whole)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], tensor), name
    saved = HopeForCausalLM.from_pretrained(tmp_path / "parts/checkpoint-8")
    assert torch.equal(saved.embedding.weight, whole.model.embedding.weight)


@pytest.mark.parametrize("settings", [{CHECKPOINTING: True}, {"gradient_accumulation_steps": 2}])
def test_what_saves_memory_changes_no_loss(tmp_path: Path, settings: dict[str, Any]) -> None:
    size = 8 // settings.get("gradient_accumulation_steps", 1)
    # Not AdamW, which makes whole steps of gradients that are nothing but rounding.
    same: dict[str, Any] = {"max_steps": 3, "save_strategy": "no", "optim": "sgd", "learning_rate": 0.1}
    plain = trainer(tmp_path / "plain", **same)
    plain.train()
    thrifty = trainer(tmp_path / "thrifty", **same, per_device_train_batch_size=size, **settings)
    thrifty.train()
    assert losses(thrifty) == pytest.approx(losses(plain), rel=1e-5)


def test_bfloat16_trains(tmp_path: Path) -> None:
    run = trainer(tmp_path, bf16=True, max_steps=4, save_strategy="no")
    run.train()
    found = losses(run)
    assert all(map(math.isfinite, found))
    assert found[-1] < found[0]
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


def test_evaluation_gives_the_loss_of_the_model(tmp_path: Path) -> None:
    run = trainer(tmp_path, per_device_eval_batch_size=64)
    found = run.evaluate([TOKENIZER(line) for line in TEXTS])["eval_loss"]
    batch = run.data_collator([TOKENIZER(line) for line in TEXTS])
    assert "attention_mask" in batch
    with torch.no_grad():
        assert found == pytest.approx(float(run.model(**batch).loss), rel=1e-5)


def test_accelerate_trains_as_a_plain_loop_does() -> None:
    def train(accelerated: bool) -> tuple[list[float], HopeForCausalLM]:
        model = small_model("self_modifying_titans").train()
        optimizer: Any = LevelOptimizer.for_model(model, lr=5e-3)
        loader: Any = DataLoader(text(24, 12), batch_size=6)
        accelerator = Accelerator(cpu=True) if accelerated else None
        if accelerator is not None:
            model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        found = []
        for batch in loader:
            loss = model(input_ids=batch, labels=batch).loss
            accelerator.backward(loss) if accelerator is not None else loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found, model

    (plain, ours), (theirs, accelerated) = train(False), train(True)
    assert plain == theirs
    for name, tensor in ours.state_dict().items():
        assert torch.equal(accelerated.state_dict()[name], tensor), name
