"""A StepGuard outside a run."""

import torch

from nanogpt.distributed import Processes
from nanogpt.guard import StepGuard

SETTINGS = dict(
    device="cpu", optimizer="adamw", sharding="ddp", out_dir="out", dataset="synthetic", seed=1337, max_nonfinite=10,
    spike_sigma=0.0, spike_rewind=0.0, eval_interval=10, max_iters=100,
)  # fmt: skip


def make_guard(saved=None, scaler=None, processes=None, **settings):
    """The guard of a run with these settings, alone unless it has `processes`."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    return StepGuard(SETTINGS | settings, processes or Processes(), scaler, saved or {})
