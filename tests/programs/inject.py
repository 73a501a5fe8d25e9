"""Runs train.py, and harms it in $COUNT iterations from $AT on.

$INJECT says how: "random" puts random tokens in place of the batch; "huge" does that, and has the gradient $SCALE times
as large. What is injected depends on the iteration alone: a run that is killed and resumed gets the same.
"""

import os

from script import run_script

import torch

import model
from nanogpt import guard

AT, COUNT = int(os.environ["AT"]), int(os.environ["COUNT"])
SCALE = {"random": 1.0, "huge": float(os.environ.get("SCALE", 1000))}[os.environ["INJECT"]]
forward, Guard = model.GPT.forward, guard.StepGuard
iteration = 0


class WatchedGuard(Guard):
    def __init__(self, saved, *rest):
        global iteration
        super().__init__(saved, *rest)
        iteration = saved.get("iter_num", 0)

    def step(self, *arguments):
        global iteration
        super().step(*arguments)
        iteration += 1


def harmed(self, idx, targets=None, **options):
    if not (self.training and AT <= iteration < AT + COUNT):
        return forward(self, idx, targets, **options)
    draw = torch.Generator().manual_seed(iteration)
    idx, targets = torch.randint(self.config.vocab_size, (2, *idx.shape), generator=draw).to(idx.device)
    logits, loss = forward(self, idx, targets, **options)
    return logits, loss + (SCALE - 1) * (loss - loss.detach())  # the printed loss stays, the gradient is scaled


model.GPT.forward, guard.StepGuard = harmed, WatchedGuard
run_script()
