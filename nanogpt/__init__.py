"""What train.py and sample.py run. This is imported before any other file of the project: it checks the versions."""

import sys

import torch

if sys.version_info < (3, 11) or tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11):
    found = f"Python {sys.version.split()[0]} with torch {torch.__version__}"
    print(f"error: this project needs Python 3.11 and torch 2.11 or newer, and this is {found}", file=sys.stderr)
    sys.exit(2)
