"""Runs train.py as one rank of several, and writes to the folder $RECORD what its gradients were.

gradients{rank}.pt has those of the first step; counts{rank} says how many times each iteration exchanged any.
"""

import os
from pathlib import Path

from script import run_script

import torch
import torch.distributed as dist
import torch.nn.parallel as parallel

from nanogpt import optim

folder, rank = Path(os.environ["RECORD"]), os.environ["RANK"]
exchanges, counts = [], []
SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"  # of fsdp
DDP, scatter, step = parallel.DistributedDataParallel, getattr(dist, SCATTER), optim.AdamW.step


def counted_ddp(*args, **options):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    wrapped = DDP(*args, **options)
    wrapped.register_comm_hook(None, lambda state, bucket: exchanges.append(1) or allreduce_hook(state, bucket))
    return wrapped


def counted_scatter(*args, **options):
    exchanges.append(1)
    return scatter(*args, **options)


def recorded_step(self, *args, **options):
    if not counts:
        gradients = [p.grad for group in self.param_groups for p in group["params"]]
        gradients = [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in gradients]
        torch.save(gradients, folder / f"gradients{rank}.pt")
    counts.append(len(exchanges))
    exchanges.clear()
    (folder / f"counts{rank}").write_text(" ".join(map(str, counts)))
    return step(self, *args, **options)


parallel.DistributedDataParallel = counted_ddp
setattr(dist, SCATTER, counted_scatter)
optim.AdamW.step = recorded_step
run_script()
