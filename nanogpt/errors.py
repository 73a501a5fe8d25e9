"""Prints a mistake of the user and a failure of the machine as one line, without a traceback; and paths of the project.

After install(), which configure() calls, a UserError prints `error: ...` and exits with code 2. A failure of the
machine (disk full, out of memory, another process gone) prints the same and exits with code 1. Anything else is a bug
and keeps its traceback.
"""

import atexit
import importlib
import os
import re
import select
import shlex
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # the project: config/ and data/ are in it

# callback(f, *args) calls f when the script ends, in whatever way, in a notebook too, whose process lives on
at_the_end = ExitStack()
memory_advice = "try a smaller --batch_size or --block_size, or a smaller model"

# not every version of torch has a class for the errors of several processes: their words tell them
COLLECTIVES = r"gloo|nccl|\bmpi\b|connection (closed|reset)"
PEER_IS_GONE = (
    r"connection (was )?(closed|reset|refused|aborted)|remote ?(process|error)|timed? ?out|broken pipe"
    r"|unreachable|no route to host|failed to connect|connectFullMesh|pair closure"
)


@contextmanager
def writing(path):
    """Names `path` in an OSError of this block that names no file, as that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or path
        raise


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
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
        return f"out of memory: {memory_advice}"
    if re.search("No available kernel|No viable backend for scaled_dot_product_attention", str(error)):
        return "this device has no such attention kernel for this dtype and head size: add --attention=auto"
    named = isinstance(error, RuntimeError) and re.search(COLLECTIVES, str(error), re.I)
    if named or isinstance(error, torch.distributed.DistError):
        cause, _, more = str(error).partition("\n")
        if last := re.search(r"Last error:\s*(.+)", more):  # NCCL's own word for what went wrong
            cause += f"; Last error: {last[1]}"
        gone = re.search(PEER_IS_GONE, str(error), re.I)
        return f"another process is gone or cannot be reached: {cause}" if gone else cause
    return None


def drop_output(stream=None):
    """Sends all that is printed to `stream` (None: stdout) from now on, or still buffered, to the null device."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), (stream or sys.stdout).fileno())


def complain(message):
    """Prints `error: message` as one line on stderr, if anyone can still read that."""
    try:
        print("error:", " ".join(message.split()), file=sys.stderr, flush=True)
    except OSError:
        drop_output(sys.stderr)


def install():
    """From now on, in this process: one line for what is not a bug; a standard stream that is closed leads to the null
    device, so that no file opened later takes its number; and what a terminal cannot show is printed escaped."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None and name != "stdin":
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = report
    atexit.register(_flush_output)
    at_the_end.close()  # of the script before, in the same cell of a notebook
    if "IPython" in sys.modules and (shell := sys.modules["IPython"].get_ipython()):
        shell.events.register("post_execute", at_the_end.close)


def _flush_output():
    """Flushes stdout. Python would do it after this, and print a complaint where nobody can read stdout any more."""
    try:
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        if not isinstance(error, BrokenPipeError):  # a full disk: the exit code says that what was printed is lost
            complain(f"standard output: {error.strerror}")
            os._exit(1)


def _is_unread():
    """Whether stdout leads to a pipe that nobody reads any more."""
    if not hasattr(select, "poll"):  # Windows has none, and no BrokenPipeError
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)  # for no event but errors and hang-ups, which are always reported
    return bool(poll.poll(0))


def _end(code):
    """Ends the process; if it is connected to others, at once: gloo's threads may abort while Python is torn down."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        os._exit(code)
    sys.exit(code)


def report(kind, error, trace):
    """sys.excepthook: prints one line for what is not a bug, and exits."""
    unread = _is_unread()
    try:
        sys.stdout.flush()
    except OSError:
        drop_output()
    if issubclass(kind, KeyboardInterrupt):
        _end(130)
    if issubclass(kind, BrokenPipeError) and unread:  # `| head` has read enough: this is no error
        _end(0)
    message = str(error) if issubclass(kind, UserError) else machine_failure(error)
    if message is None:
        sys.__excepthook__(kind, error, trace)
        _end(1)
    rank = int(os.environ.get("RANK", 0))
    if rank > 0:
        # Nearly always rank 0 meets the same error and prints it. torchrun stops this process while it waits.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5)
        message = f"rank {rank}: {message}"
    complain(message)
    _end(2 if issubclass(kind, UserError) else 1)
