"""Runs inject.py, and kills this process as the run goes back, or as good.pt is written.

$KILL says when: "links" before the checkpoints of what is undone make way; "log" before the log is marked; "marked" after
that; "good" before good.pt is written again; "second name" between ckpt.pt and the
second name of it that is good.pt.
"""

import os
import signal

from script import run_script  # noqa: F401 - makes the project importable

from nanogpt import checkpoint, run_log

KILL = os.environ["KILL"]
back, name_again, save, went = run_log.RunLog.go_back, checkpoint.name_again, checkpoint.save, False


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def going_back(log, *place):
    global went
    if KILL == "log":
        kill()
    back(log, *place)
    if KILL == "marked":
        kill()
    went = True


def naming(path, name):
    to_good = name.endswith("good.pt")
    if (
        (KILL == "second name" and to_good)
        or (KILL == "links" and not to_good)
        or (KILL == "good" and went and to_good)
    ):
        kill()
    name_again(path, name)


def saving(state, path):
    if KILL == "good" and went and path.endswith("good.pt"):
        kill()
    save(state, path)


run_log.RunLog.go_back, checkpoint.name_again, checkpoint.save = going_back, naming, saving
import inject  # noqa: E402, F401
