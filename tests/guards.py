"""A StepGuard outside a run."""

import torch

from nanogpt.distributed import Processes
from nanogpt.guard import StepGuard


def make_guard(saved=None, scaler=None, processes=None, device="cpu", optimizer="adamw", spike_sigma=0.0):
    """The guard of a run with these settings, alone unless it has `processes`."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    processes = processes or Processes()
    return StepGuard(saved or {}, processes, scaler, device, optimizer, "ddp", spike_sigma, max_nonfinite=10, out_dir="out")
