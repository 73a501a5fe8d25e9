"""Prints README's settings tables, made of the settings and their comments in the scripts.

    python tests/settings_table.py
"""

import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

from configurator import documented


def table(script):
    """A script's settings as Markdown."""
    rows = ["| setting | default | meaning |", "| --- | --- | --- |"]
    for name, (default, comment) in documented(os.path.join(ROOT, script)).items():
        rows.append(f"| `{name}` | `{default}` | {comment} |")
    return "\n".join(rows)


def tables():
    """What README has between its settings markers."""
    return "\n\n".join(f"`{script}`:\n\n{table(script)}" for script in ("train.py", "sample.py"))


if __name__ == "__main__":
    print(tables())
