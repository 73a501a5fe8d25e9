"""Loads a GPT-2 folder, and prints three sizes in MiB.

    python loading_memory.py FOLDER

The peak of the process's own memory while it loads, that peak with the pages of mapped files, and the model's weights;
the peaks are over what the process had before.
"""

import sys
import threading

import script  # noqa: F401
import torch  # noqa: F401
from safetensors import torch as safetensors_torch  # noqa: F401  what loading imports is not what loading takes

from model import GPT


def resident():
    with open("/proc/self/status") as f:
        found = dict(line.split(":") for line in f if line.startswith(("RssAnon", "VmRSS")))
    return [int(found[name].split()[0]) / 1024 for name in ("RssAnon", "VmRSS")]


before, peak, loaded = resident(), [0, 0], threading.Event()


def watch():
    while not loaded.wait(0.002):
        peak[:] = map(max, peak, resident())


thread = threading.Thread(target=watch)
thread.start()
model = GPT.from_pretrained(sys.argv[1])
loaded.set()
thread.join()
over_before = [most - first for most, first in zip(peak, before, strict=True)]
print(*over_before, sum(p.nbytes for p in model.parameters()) / 2**20)
