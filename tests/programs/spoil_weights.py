"""Runs train.py, and puts a NaN into a weight after AdamW's step number $STEP."""

import os

from script import run_script

import torch

step, steps = torch.optim.AdamW.step, 0


def spoil(self, *rest):
    global steps
    found = step(self, *rest)
    steps += 1
    if steps == int(os.environ["STEP"]):
        with torch.no_grad():
            self.param_groups[0]["params"][1][0, 0] = float("nan")
    return found


spoil.hooked = True  # without it torch wraps the function
torch.optim.AdamW.step = spoil
run_script()
