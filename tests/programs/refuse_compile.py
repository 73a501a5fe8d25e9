"""Runs sample.py, and fails where it asks torch to compile something."""

from script import run_script

import torch


def refuse(*args, **options):
    raise AssertionError("compiled")


torch.compile = refuse
run_script("sample.py")
