"""Runs a command in a folder, and prints as JSON [its stdout, its seconds, the peak of its memory in MiB].

    python measure_command.py FOLDER COMMAND ...

A process of its own for each command: a process knows only the largest peak of all its children.
"""

import json
import resource
import subprocess
import sys
import time

folder, *command = sys.argv[1:]
start = time.perf_counter()
done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
seconds = time.perf_counter() - start
if done.returncode:
    sys.exit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
print(json.dumps([done.stdout, seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024]))
