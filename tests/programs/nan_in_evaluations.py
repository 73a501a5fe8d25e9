"""Runs train.py, whose losses are NaN in evaluations and are not in training."""

from script import run_script

import model

forward = model.GPT.forward


def spoilt(self, *arguments, **options):
    logits, loss = forward(self, *arguments, **options)
    return logits, loss if self.training else loss * float("nan")


model.GPT.forward = spoilt
run_script()
