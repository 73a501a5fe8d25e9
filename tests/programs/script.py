"""How a program beside this file runs one of the project's scripts, after it has changed or watched something in it.

Import this before any module of the project: it makes them importable.
"""

import os
import runpy
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path.insert(0, ROOT)


def run_script(name="train.py"):
    """Runs the script as `python NAME` would, with this program's arguments."""
    sys.argv[0] = os.path.join(ROOT, name)
    runpy.run_path(sys.argv[0], run_name="__main__")
