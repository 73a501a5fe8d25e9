"""A line on stderr that says how far a long task is."""

import sys
import time


class Meter:
    """Shows how much of `total` is done (0: it is not known how much there is), ten times a second at most."""

    def __init__(self, what, total=0):
        self.what, self.total, self.shown_at = what, total, 0.0

    def show(self, done):
        """Prints over the line before, and ends it when all is done."""
        if done != self.total and time.monotonic() - self.shown_at < 0.1:
            return
        self.shown_at = time.monotonic()
        line = f"{self.what}: {done:,}" + (f" of {self.total:,} ({done / self.total:.0%})" if self.total else "")
        print(line, end="\n" if done == self.total else "\r", file=sys.stderr, flush=True)
