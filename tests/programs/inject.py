"""Runs train.py, and harms it in $COUNT iterations from $AT on, unless the run has gone back $TIMES (1) times already.

$INJECT says how: "random" puts random tokens in place of the batch; "huge" does that, and has the gradient $SCALE times
as large; "ascent" turns the gradient around, so that the loss climbs. What is injected depends on the iteration alone:
a run that is killed and resumed gets the same.
"""

import os

from script import run_script

import torch

import model
from nanogpt import guard

KIND, AT, COUNT = os.environ["INJECT"], int(os.environ["AT"]), int(os.environ["COUNT"])
TIMES = int(os.environ.get("TIMES", 1))
SCALE = {"random": 1.0, "huge": float(os.environ.get("SCALE", 1000)), "ascent": -1.0}[KIND]
forward, Guard = model.GPT.forward, guard.StepGuard
watched = {}


class WatchedGuard(Guard):
    def __init__(self, config, processes, scaler, saved):
        super().__init__(config, processes, scaler, saved)
        watched.update(guard=self, iter_num=saved.get("iter_num", 0))

    def step(self, optim, grad_norm, iter_num):
        super().step(optim, grad_norm, iter_num)
        watched["iter_num"] = iter_num + 1

    def go_back(self, iter_num, saved):
        seed = super().go_back(iter_num, saved)
        watched["iter_num"] = saved["iter_num"]
        return seed


def harmed(self, idx, targets=None, **options):
    at = watched["iter_num"]
    if not (self.training and AT <= at < AT + COUNT and len(watched["guard"].went_back) < TIMES):
        return forward(self, idx, targets, **options)
    if KIND != "ascent":
        draw = torch.Generator().manual_seed(at)
        ids = torch.randint(self.config.vocab_size, (2, *idx.shape), generator=draw).to(idx.device)
        idx, targets = ids
    logits, loss = forward(self, idx, targets, **options)
    return logits, loss + (SCALE - 1) * (loss - loss.detach())  # the printed loss stays, the gradient is scaled


model.GPT.forward, guard.StepGuard = harmed, WatchedGuard
run_script()
