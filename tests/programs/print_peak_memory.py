"""Runs the script $SCRIPT, and prints `peak N` at exit, the most KiB of memory that it had."""

import atexit
import os
import resource

from script import run_script

atexit.register(lambda: print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
run_script(os.environ["SCRIPT"])
