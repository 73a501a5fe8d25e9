"""Bits per byte: the measure that compares losses of different tokens. It is the nats of all predicted tokens over the
bytes of the original text that they stand for, / ln 2."""

import math


def bits_per_byte(nats, n_bytes):
    """`nats` in all, over `n_bytes` of text; None where the bytes are not known (0 or NaN)."""
    return nats / n_bytes / math.log(2) if n_bytes > 0 else None
