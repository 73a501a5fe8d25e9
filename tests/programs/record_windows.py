"""Runs train.py, and writes to the file $NOTES where each window of its training batches started."""

import os
import sys

from script import run_script

import numpy as np

import data.bins

check_ids, starts = data.bins.check_ids, []


def recorded(tokens, vocab_size, path, start):
    if tokens.ndim > 1 and sys._getframe(2).f_code.co_name != "estimate_loss":
        assert path.endswith("train.bin")
        starts.extend(start.tolist())
    return check_ids(tokens, vocab_size, path, start)


data.bins.check_ids = recorded
try:
    run_script()
finally:
    np.save(os.environ["NOTES"], starts)
