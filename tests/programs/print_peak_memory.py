"""Runs the script $SCRIPT, and prints `peak N` at exit, the most KiB of memory that it had."""

import atexit
import os

from script import run_script



def print_peak():
    with open("/proc/self/status", encoding="ascii") as f:
        print("peak", f.read().partition("VmHWM:")[2].split()[0])


atexit.register(print_peak)
run_script(os.environ["SCRIPT"])
