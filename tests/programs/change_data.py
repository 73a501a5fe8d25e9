"""Runs train.py, and as the $BATCH-th batch is drawn, does to its train.bin and val.bin what $CHANGE says."""

import os
import shutil

import numpy as np
from script import run_script

from data.dataset import Dataset

open_split, drawn = Dataset.open, 0


def change(path):
    if os.environ["CHANGE"] == "removed":
        os.remove(path)
    elif os.environ["CHANGE"] == "other ids":  # as many, and each of them in the vocabulary
        np.roll(np.fromfile(path, "<u2"), 7).tofile(path + ".new")
        os.replace(path + ".new", path)
    elif os.environ["CHANGE"] == "copied":
        shutil.copy(path, path + ".new")
        os.replace(path + ".new", path)
    else:  # cut to so many bytes
        os.truncate(path, int(os.environ["CHANGE"]))


def counted(self, split):
    global drawn
    drawn += 1
    if drawn == int(os.environ["BATCH"]):
        for path in self.bins.values():
            change(path)
    return open_split(self, split)


Dataset.open = counted
run_script()
