"""Files on disk: written whole or not at all, and a folder that one process alone writes to."""

import os
import time
import warnings
from contextlib import contextmanager, suppress

from nanogpt.errors import UserError, at_the_end, writing

try:
    import fcntl
except ImportError:  # Windows has none: two processes that write to one folder go unnoticed there
    fcntl = None


@contextmanager
def whole_file(path, mode="wb", **options):
    """Opens a file to write, as open() does, which takes the name `path` at the end of the block, once it is on disk.

    If the block or the disk fails, the older file stays; an OSError names a file. The bytes go to a temporary file
    beside it, are flushed to disk, and then the file is renamed. So neither a kill nor a power cut leaves half a file.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with writing(path), open(temporary, mode, **options) as f:
            yield f
            flush(f)
        rename(temporary, path)
    finally:
        with suppress(OSError):
            os.remove(temporary)


def flush(f):
    """Everything written to the open file `f` is on the disk after this; OSError, which names it, where that fails."""
    with writing(f.name):
        f.flush()
        os.fsync(f.fileno())


def rename(path, name):
    """Gives the file at `path` the name `name`, in place of what has it, and makes this survive a power cut.

    A rename that fails is tried again: on Windows another program may have the file open for a moment. Not every file
    system can flush a folder, and Windows has no such call: the file itself is whole all the same."""
    for seconds in (0.1, 0.5, 2.0):
        with suppress(OSError):
            os.replace(path, name)
            break
        time.sleep(seconds)
    else:
        os.replace(path, name)
    with suppress(OSError):
        handle = os.open(os.path.dirname(name) or ".", os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock(folder, busy):
    """Locks `folder`, made where it is missing, for this process; UserError with the text `busy` where another has it.

    Returns the open lock file, which must be kept. The system drops the lock with the process, however that ends.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        handle = open(os.path.join(folder, ".lock"), "w")
    except (OSError, ValueError) as error:
        raise OSError(f"cannot write to {folder}: {getattr(error, 'strerror', error)}") from error
    if fcntl:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(busy) from None
        except OSError as error:  # this file system has no locks: continue without one
            warnings.warn(f"{folder} cannot be locked ({error.strerror})", stacklevel=2)
    at_the_end.callback(handle.close)
    return handle
