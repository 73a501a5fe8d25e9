"""Runs train.py as one rank of several, and rank 1 meets a batch that is the user's mistake."""

import os

from script import run_script

import data.bins
from nanogpt.errors import UserError

check_ids, checked = data.bins.check_ids, 0


def bad(*args):
    global checked
    checked += 1
    if checked == 20:
        raise UserError("this batch is bad")
    return check_ids(*args)


if os.environ["RANK"] == "1":
    data.bins.check_ids = bad
run_script()
