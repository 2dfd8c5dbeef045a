"""Training on several processes equals training on one: FSDP2 and DDP with gloo."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tolerance import close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from zoo import KINDS, sample, shallow

WORLD = 2


def is_block(module: nn.Module) -> bool:
    """What people shard: the unit that a network repeats."""
    return type(module).__name__.endswith(("Block", "Bottleneck")) or type(module).__name__ == "ULSAM"


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    """A model in training mode, its norms fixed so that a sample does not see the others, and a batch."""
    torch.manual_seed(0)
    model = shallow(name, drop_path_rate=0.0).double().train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return model, sample(model, side=64, batch=2 * WORLD).double()


def step(model: nn.Module, x: Tensor, checkpointing: bool = False) -> None:
    """Two updates, the second one with checkpointing if it is wanted."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for second in (False, True):
        if checkpointing:
            model.set_grad_checkpointing(second)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def work(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    mesh = init_device_mesh("cpu", (WORLD,))
    for name in KINDS:
        single, x = prepared(name)
        sharded, replicated = copy.deepcopy(single), copy.deepcopy(single)
        own = x.chunk(WORLD)[rank]
        blocks = [m for m in reversed(list(sharded.modules())) if is_block(m)]  # inner ones first
        assert blocks, name
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        step(sharded, own, checkpointing=True)
        step(DistributedDataParallel(replicated, find_unused_parameters=False), own)
        step(single, x)
        for (key, p), q, r in zip(
            single.named_parameters(), sharded.parameters(), replicated.parameters(), strict=True
        ):
            close(q.full_tensor(), p, "gradient", f"FSDP2 {name} {key}")
            close(r, p, "gradient", f"DDP {name} {key}")
        with torch.no_grad():
            close(sharded.eval()(x), single.eval()(x), "layout", f"FSDP2 {name}")
    dist.destroy_process_group()


def test_fsdp2_and_ddp(tmp_path: Path) -> None:
    """Every block and the whole model sharded over two processes, with and without checkpointing; and replicas."""
    command = [sys.executable, __file__, str(tmp_path / "rendezvous")]
    path = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
    how: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [
        subprocess.Popen([*command, str(rank)], env={**os.environ, "PYTHONPATH": path}, **how) for rank in range(WORLD)
    ]
    for process in started:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output


if __name__ == "__main__":  # one of the processes
    work(int(sys.argv[2]), sys.argv[1])
