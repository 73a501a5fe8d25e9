"""Runs train.py compiled, but by a backend that only counts graphs, and sends it $SIGNAL as the $BATCH-th batch is drawn.

Prints at the end how many graphs there were when the run was asked to stop, before it saved, and how many at the end.
"""

import script  # noqa: F401
import torch
from torch._dynamo.testing import CompileCounter

from nanogpt import device
from nanogpt.distributed import Processes

counter, compile, asked_to_stop, leave = CompileCounter(), torch.compile, Processes.asked_to_stop, Processes.leave
when_asked = []


def counted_compile(model, **options):
    return compile(model, backend=counter)


def noted_stop(self):
    stop = asked_to_stop(self)
    if stop:
        when_asked.append(counter.frame_count)
    return stop


def leave_and_print(self):
    print(f"graphs: {when_asked[0]} when asked to stop, {counter.frame_count} at the end", flush=True)
    leave(self)


torch.compile, device.pick_compile = counted_compile, lambda *_: True  # this backend needs no C++ compiler
Processes.asked_to_stop, Processes.leave = noted_stop, leave_and_print
import signal_at_batch  # noqa: F401  runs train.py
