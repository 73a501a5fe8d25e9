"""Runs train.py, and kills it in the $NTH save of the file $NAME.

$POINT says where: "before" the save, "half" way through the bytes, before the "rename", or "after" the save.
"""

import os
import signal

from script import run_script

from nanogpt import checkpoint

NAME, POINT, NTH = os.environ["NAME"], os.environ["POINT"], int(os.environ["NTH"])
save, torch_save, saves = checkpoint.save, checkpoint.torch.save, 0


def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)


class Half:
    """A file that kills this process after 20,000 bytes."""

    def __init__(self, f):
        self.f, self.left = f, 20000

    def write(self, data):
        self.f.write(bytes(data)[: self.left])
        self.left -= len(data)
        if self.left <= 0:
            self.f.flush()
            kill()
        return len(data)

    def __getattr__(self, name):
        return getattr(self.f, name)


def save_and_be_killed(state, path):
    global saves
    saves += path.endswith(NAME)
    here = saves == NTH and path.endswith(NAME)
    if here and POINT == "before":
        kill()
    if here and POINT == "half":
        checkpoint.torch.save = lambda what, f: torch_save(what, Half(f))
    if here and POINT == "rename":
        os.replace = kill
    save(state, path)
    if here and POINT == "after":
        kill()


checkpoint.save = save_and_be_killed
run_script()
