"""Runs train.py, whose losses are NaN in evaluations and are not in training."""

from script import run_script

import model

forward = model.GPT.forward


def spoilt(self, idx, targets=None, cache=None):
    logits, loss = forward(self, idx, targets, cache)
    return logits, loss if self.training else loss * float("nan")


model.GPT.forward = spoilt
run_script()
