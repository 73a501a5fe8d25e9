"""Runs train.py, and puts a NaN into a weight after AdamW's step number $STEP; of several ranks, into the last one's."""

import os

from script import run_script

import torch

step, steps = torch.optim.AdamW.step, 0
LAST = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", 1)) - 1)


def spoil(self, *rest):
    global steps
    found = step(self, *rest)
    steps += 1
    if steps == int(os.environ["STEP"]) and LAST:
        with torch.no_grad():
            weight = self.param_groups[0]["params"][1]
            own = weight.to_local() if hasattr(weight, "to_local") else weight  # with fsdp, this rank's share
            own[-1, -1] = float("nan")
    return found


spoil.hooked = True  # without it torch wraps the function
torch.optim.AdamW.step = spoil
run_script()
