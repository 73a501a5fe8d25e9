"""Runs train.py, and makes one gradient infinite in the $NTH iteration."""

import os

from script import run_script

import torch

clip, calls = torch.nn.utils.clip_grad_norm_, 0


def spoilt(parameters, grad_clip):
    global calls
    parameters = list(parameters)
    calls += 1
    if calls == int(os.environ["NTH"]):
        parameters[0].grad.view(-1)[0] = float("inf")
    return clip(parameters, grad_clip)


torch.nn.utils.clip_grad_norm_ = spoilt
run_script()
