"""Runs train.py, which may write no file of more than $BYTES."""

import os
import resource

from script import run_script

resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["BYTES"]),) * 2)
run_script()
