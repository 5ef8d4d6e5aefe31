"""The optimizers in loops that are not ours: a script, accelerate, the Trainer of transformers, torch's checkpoints."""

import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from house import ROOT
from nestlearn.optim import M3, DeltaGradientDescent, DeltaMomentum

OPTIMIZERS = {
    "m3": lambda model: M3(model.named_parameters(), lr=0.01, period=2),
    "dgd": lambda model: DeltaGradientDescent(model, lr=0.1, momentum=0.5),
    "delta momentum": lambda model: DeltaMomentum(model.named_parameters(), lr=0.01),
}


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 5))


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)


def run(model, optimizer, start: int, stop: int, backward=torch.Tensor.backward) -> None:
    for step in range(start, stop):
        x, y = batch(step)
        optimizer.zero_grad()
        backward((model(x) - y).square().mean())
        optimizer.step()


def test_the_example_swaps_adamw_for_m3_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "examples" / "swap_optimizer.py"
    code = [line for line in path.read_text().split('"""')[2].splitlines() if line and not line.startswith("#")]
    assert len(code) <= 20
    runpy.run_path(str(path))
    swapped = path.read_text().replace("optimizer = M3(", "optimizer = torch.optim.AdamW(")
    assert swapped.count("optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)") == 2  # the comment says it too
    exec(compile(swapped, "swapped", "exec"), {})
    losses = [float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 8
    for own in (losses[:4], losses[4:]):
        assert own == sorted(own, reverse=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_accelerate_computes_the_same(name: str) -> None:
    from accelerate import Accelerator

    model, plain = new_model(), new_model()
    accelerator = Accelerator(cpu=True)
    wrapped, optimizer = accelerator.prepare(model, OPTIMIZERS[name](model))
    run(wrapped, optimizer, 0, 5, accelerator.backward)
    run(plain, OPTIMIZERS[name](plain), 0, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_torchs_distributed_checkpoints_hold_the_state(name: str) -> None:
    whole, first = new_model(), new_model()
    run(whole, OPTIMIZERS[name](whole), 0, 6)
    optimizer = OPTIMIZERS[name](first)
    run(first, optimizer, 0, 3)
    saved = get_optimizer_state_dict(first, optimizer)
    resumed = OPTIMIZERS[name](first)
    set_optimizer_state_dict(first, resumed, saved)
    run(first, resumed, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), first.parameters(), strict=True))


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = torch.randint(32, (8,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": row, "labels": row}


def language_model() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def train(folder: Path, *, optimizer=None, resume: bool = False, **settings) -> nn.Module:
    from transformers import Trainer, TrainingArguments

    model = language_model()
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, per_device_train_batch_size=4, save_steps=3, learning_rate=0.01,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    if optimizer is not None:
        settings["optimizers"] = (optimizer(model), None)
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), **settings)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer_cls_and_kwargs": (M3, {"lr": 0.01, "period": 2})},
        {"optimizer": lambda model: M3.for_model(model, lr=0.01, notice=lambda text: None)},
        {"optimizer": lambda model: DeltaGradientDescent(model, lr=0.01, others="adamw")},
    ],
    ids=["m3 by class", "m3 sorted", "dgd"],
)
def test_the_trainer_trains_and_resumes(tmp_path: Path, settings: dict) -> None:
    before = language_model()
    trained = train(tmp_path / "run", **settings)
    assert not any(torch.equal(a, b) for a, b in zip(before.parameters(), trained.parameters(), strict=True))
    resumed = train(tmp_path / "run", resume=True, **settings)
    assert all(torch.equal(a, b) for a, b in zip(trained.parameters(), resumed.parameters(), strict=True))
