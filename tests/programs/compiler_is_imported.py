"""Runs train.py, and prints at last whether that has imported the compiler."""

import sys

from script import run_script

run_script()
print("torch._dynamo" in sys.modules)
