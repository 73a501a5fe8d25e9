"""Bits per byte: the measure that compares losses of different tokens. It is the nats of all predicted tokens over the
bytes of the original text that they stand for, / ln 2."""

import math

import torch


def bits_per_byte(nats, n_bytes):
    """`nats` in all, over `n_bytes` of text; None where the bytes are not known (0 or NaN)."""
    return nats / n_bytes / math.log(2) if n_bytes > 0 else None


class TextBytes:
    """How many bytes of text a batch of ids stands for."""

    def __init__(self, by_id, mean, device):
        """by_id (V,): the bytes of each id, an array; None where an id does not tell. mean: then those of a token on
        average, NaN where that is not known either: then a sum over processes is not known."""
        self.by_id = torch.as_tensor(by_id, dtype=torch.float32, device=device) if by_id is not None else None
        self.mean = mean

    def of(self, ids):
        """The bytes of the `ids`, in any shape: a float32 tensor without dimensions; NaN where they are not known."""
        if self.by_id is None:
            return torch.full((), ids.numel() * self.mean, device=ids.device)
        return self.by_id[ids].sum()
