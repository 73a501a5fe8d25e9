"""One line for each mistake of the user and each failure of the machine, and what every script needs to know of itself.

Importing this module sets the exception hook: a UserError prints `error: ...` and exits with code 2, a failure of the
machine (disk full, out of memory, another process gone) prints the same and exits with code 1. Anything else is a bug
and keeps its traceback.
"""

import atexit
import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project: config/ and data/ are in it


memory_advice = "try a smaller --batch_size or --block_size, or a smaller model"


class UserError(ValueError):
    """Something the user can correct. The message is the one line they see."""


def relative_path(path):
    """The path of one of the project's files as one types it in the current folder."""
    path = os.path.join(ROOT, path)
    try:
        return os.path.relpath(path)
    except ValueError:  # Windows: the current folder is on another drive
        return path


def command(script, *arguments, launcher="python"):
    """The command that runs a script of the project, as one types it in the current folder, quoted for the shell."""
    words = [relative_path(script), *arguments]
    return f"{launcher} {subprocess.list2cmdline(words) if os.name == 'nt' else shlex.join(words)}"


def advise_on_memory(advice):
    """Sets what the line for a lack of memory advises in this script: train.py's settings unless it is called."""
    global memory_advice
    memory_advice = advice


def require(what, *libraries):
    """Imports `libraries`, names of modules; UserError where one is missing: `what` needs it, and which pip install."""
    missing = []
    for library in libraries:
        try:
            importlib.import_module(library)
        except ImportError:
            missing.append(library.partition(".")[0])
    if missing:
        raise UserError(f"{what} needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def machine_failure(error):
    """The one line for a failure of the machine, or None where the exception is a bug."""
    if isinstance(error, OSError):
        return f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"out of memory: {memory_advice}"
    if isinstance(error, RuntimeError) and re.search("gloo|nccl|Connection (closed|reset)", str(error), re.I):
        return f"another process is gone or cannot be reached: {str(error).splitlines()[0]}"
    return None


def _drop_output():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@atexit.register
def _flush_output():
    """Without this, Python's own last flush of stdout prints a complaint where the pipe is closed."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_output()


def report(kind, error, trace):
    """sys.excepthook: prints one line for what is not a bug, and exits."""
    sys.stdout = sys.stdout or open(os.devnull, "w")
    if issubclass(kind, KeyboardInterrupt):
        sys.exit(130)
    if issubclass(kind, BrokenPipeError):  # `| head` has read enough: this is no error
        _drop_output()
        sys.exit(0)
    message = str(error) if issubclass(kind, UserError) else machine_failure(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
        sys.exit(1)
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        # Nearly always rank 0 meets the same error and prints it. torchrun stops this process while it waits.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"rank {rank}: {message}"
    sys.stdout.flush()
    print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    sys.exit(2 if issubclass(kind, UserError) else 1)


sys.excepthook = report
