"""Runs a script as `python SCRIPT ARGUMENTS` would, in a process of its own.

That process is forked from one that has imported torch already, which saves some four seconds a run.
No module of the project is imported here, so the script takes those beside it.
"""

import multiprocessing
import os
import runpy
import signal
import sys

TESTS = os.path.dirname(os.path.abspath(__file__))
PRELOADED = [
    "torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "torch.nn.parallel",
    "numpy", "requests", "tiktoken", "pytest",
]  # fmt: skip


def run_script(path, arguments, cwd, environment, *streams):
    """The forked process's part: never returns. `streams`: the files that stand for stdin, stdout and stderr."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, name in enumerate(streams):
        handle = os.open(name, os.O_WRONLY if number else os.O_RDONLY)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdin = open(0, encoding="utf-8", closefd=False)
    sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = open(2, "w", encoding="utf-8", closefd=False, buffering=1)
    sys.dont_write_bytecode = True
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a test run in the background ignores it
    sys.argv = [path, *arguments]
    elsewhere = [p for p in sys.path if os.path.abspath(p) not in (TESTS, os.path.dirname(TESTS))]
    given = environment["PYTHONPATH"].split(os.pathsep) if "PYTHONPATH" in environment else []
    sys.path[:] = [os.path.dirname(path), *given, *elsewhere]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        sys.stdout.flush()


def fork(*arguments):
    """A multiprocessing.Process in which run_script(*arguments) is under way."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=run_script, args=arguments, daemon=True)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported; train.py sets the number by itself
    process.start()
    if before is None:
        del os.environ["OMP_NUM_THREADS"]
    else:
        os.environ["OMP_NUM_THREADS"] = before
    return process
