"""Two processes, with whole parameters (DDP) or with shards (FSDP2), compute what one computes."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

SCRIPT = textwrap.dedent("""
    import gc, os, sys
    from pathlib import Path

    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    from nestlearn.optim import (
        M3, DeepMomentum, DeltaGradientDescent, DeltaMomentum, HigherOrderMomentum, Muon, PreconditionedMomentum,
    )

    torch.set_num_threads(1)
    folder, ranks = Path(sys.argv[1]), int(os.environ.get("WORLD_SIZE", 1))
    rank = int(os.environ.get("RANK", 0))
    if ranks > 1:
        dist.init_process_group("gloo")


    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 9), nn.Linear(9, 5)  # rows that two processes share unevenly
            self.stack = nn.Parameter(torch.randn(3, 9, 9) / 3)

        def forward(self, x):
            hidden = torch.tanh(self.first(x))
            for matrix in self.stack:
                hidden = hidden + torch.tanh(hidden @ matrix)
            return self.last(hidden)


    OPTIMIZERS = {
        "m3": lambda model: M3(model.parameters(), lr=0.01, period=3),
        "m3 paper": lambda model: M3(model.parameters(), lr=1e-4, period=3, form="paper"),
        "dgd": lambda model: DeltaGradientDescent(model, lr=0.1, momentum=0.5, others="adamw", others_lr=1e-3),
        "delta momentum": lambda model: DeltaMomentum(model.parameters(), lr=0.01),
        "preconditioned": lambda model: PreconditionedMomentum(model.parameters(), lr=0.01),
        "higher order": lambda model: HigherOrderMomentum(model.parameters(), lr=0.01),
        "deep momentum": lambda model: DeepMomentum(model.parameters(), lr=0.01),
        "muon": lambda model: Muon([p for p in model.parameters() if p.ndim > 1], lr=0.01),
    }


    def run(name, how, poison=None):
        torch.manual_seed(0)
        model = Model().double()
        wrapped = model
        if how == "ddp":
            wrapped = DistributedDataParallel(model)
        if how == "fsdp":
            fully_shard(model.first)
            fully_shard(model)
        optimizer = OPTIMIZERS[name](model)
        for step in range(7):
            generator = torch.Generator().manual_seed(step)
            x, y = (torch.randn(8, width, generator=generator, dtype=torch.float64) for width in (6, 5))
            rows = slice(rank * 8 // ranks, (rank + 1) * 8 // ranks)
            optimizer.zero_grad()
            (wrapped(x[rows]) - y[rows]).square().mean().backward()
            if poison == step and rank == 0:
                model.first.weight.grad._local_tensor[0, 0] = float("nan")
            optimizer.step()
            if step == 3 and how == "fsdp":  # stop and go on
                saved = optimizer.state_dict()
                optimizer = OPTIMIZERS[name](model)
                optimizer.load_state_dict(saved)
        full = (p.full_tensor() if how == "fsdp" else p for p in model.parameters())
        return [p.detach().clone() for p in full]


    hows = sys.argv[2].split(",")
    found = {f"{name}/{how}": run(name, how) for how in hows for name in OPTIMIZERS}
    if "fsdp" in hows:
        try:
            run("m3", "fsdp", poison=2)
            said = "nothing"
        except ValueError as error:  # on both processes, though one alone holds the broken number
            said = str(error)
        (folder / f"said{rank}").write_text(said)
    if rank == 0:
        torch.save(found, folder / f"{'-'.join(hows)}.pt")
    if ranks > 1:
        gc.collect()  # nothing of DistributedDataParallel may outlive the group
        dist.barrier()
        dist.destroy_process_group()
""")


def launch(folder: Path, hows: str, processes: int) -> dict[str, list[torch.Tensor]]:
    script = folder / "run.py"
    script.write_text(SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder), hows],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[:6000]
    found: dict[str, list[torch.Tensor]] = torch.load(folder / f"{hows.replace(',', '-')}.pt")
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    two, one = launch(tmp_path, "ddp,fsdp", 2), launch(tmp_path, "plain", 1)
    assert len(two) == 2 * len(one)
    for key, parameters in two.items():
        name = key.partition("/")[0]
        for number, (a, b) in enumerate(zip(parameters, one[f"{name}/plain"], strict=True)):
            torch.testing.assert_close(
                a, b, rtol=1e-9, atol=1e-10, msg=lambda text, key=key, n=number: f"{key} {n}: {text}"
            )
    for rank in (0, 1):
        assert "is not finite, so nothing was moved" in (tmp_path / f"said{rank}").read_text()
