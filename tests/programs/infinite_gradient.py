"""Runs train.py, and makes one gradient infinite in the $NTH iteration."""

import os

from script import run_script

import torch

norm, calls = torch.nn.utils.get_total_norm, 0


def spoilt(grads, *rest, **more):
    global calls
    grads = list(grads)
    calls += 1
    if calls == int(os.environ["NTH"]):
        grads[0].view(-1)[0] = float("inf")
    return norm(grads, *rest, **more)


torch.nn.utils.get_total_norm = spoilt
run_script()
