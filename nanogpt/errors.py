"""One line for each mistake of the user and each failure of the machine, and what every script needs to know of itself.

Importing this module sets the exception hook: a UserError prints `error: ...` and exits with code 2, a failure of the
machine (disk full, out of memory, another process gone) prints the same and exits with code 1. Anything else is a bug
and keeps its traceback.
"""

import atexit
import importlib
import os
import re
import signal
import sys
import time

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project: config/ and data/ are in it


class UserError(ValueError):
    """Something the user can correct. The message is the one line they see."""


def relative_path(script):
    """The path of one of the project's scripts as one types it in the current folder."""
    return os.path.relpath(os.path.join(ROOT, script))


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
        return "out of memory: try a smaller --batch_size or --block_size, or a smaller model"
    if re.search("No available kernel|No viable backend for scaled_dot_product_attention", str(error)):
        return "this device has no such attention kernel for this dtype and head size: add --attention=auto"
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
