"""The exact loss of a model on a text: every token is predicted once, and its nats are added up in float64.

n tokens give n - 1 predictions, since the first token is context only. Span k predicts the tokens k T + 1 ... k T + T
(T: block_size), the first of them from one token. With a stride S below T each later span predicts S tokens only, and
has the T - S tokens before them as context.
"""

import math
from itertools import groupby, islice

import numpy as np
import torch

from nanogpt.cross_entropy import bits_per_byte, token_losses
from nanogpt.errors import UserError

BATCH_TOKENS = 1 << 14  # of a batch, where the user gives no batch size: enough to keep a CPU busy


def spans(chunks, block_size, stride):
    """Yields (ids, new) of each span: ids (at most block_size + 1,) int64, of which the last `new` are predicted.

    chunks: arrays of token ids, which in a row are the text; only the span's own tokens are held. UserError where
    there are fewer than two tokens in all.
    """
    held, new, first = np.zeros(0, dtype=np.int64), block_size, True
    for chunk in chunks:
        held = np.concatenate([held, chunk.astype(np.int64)])
        start = 0
        while len(held) - start > block_size:
            yield held[start : start + block_size + 1], new
            start, new, first = start + stride, stride, False
        held = held[start:]
    if first and len(held) < 2:
        raise UserError(f"a text of {len(held)} tokens: nothing can be predicted in fewer than two")
    rest = len(held) - 1 if first else len(held) - 1 - (block_size - stride)
    if rest > 0:  # the last span may be short
        yield held, rest


def batches(spans, size):
    """Yields (ids (B, t + 1), new) of at most `size` consecutive spans that have the same length and `new`."""
    alike = groupby(spans, key=lambda span: (len(span[0]), span[1]))
    for (_, new), group in alike:
        while part := list(islice(group, size)):
            yield np.stack([ids for ids, _ in part]), new


@torch.no_grad()
def nats_of(model, ids, new):
    """Cross-entropy in nats (B, new), float64 on the CPU, of the last `new` tokens of each row of ids (B, t + 1)."""
    hidden = model.hidden(ids[:, :-1])[:, -new:]
    return token_losses(hidden, model.lm_head, ids[:, -new:]).cpu().double()


class Totals:
    """What the spans of a text add up to, by math.fsum, whose result does not depend on their order.

    spans (S, 3), float64: of each its nats L, its n predictions, and the bytes of text that these stand for.
    """

    def __init__(self, spans):
        self.spans = spans
        self.nats, self.tokens, self.bytes = map(math.fsum, spans.T)

    @property
    def loss(self):
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self):
        """None where the predicted tokens stand for no bytes, or it is not known for which."""
        return bits_per_byte(self.nats, self.bytes)

    @property
    def standard_error(self):
        """Of the loss, over spans as independent draws: that of a ratio of sums (Cochran, Sampling Techniques,
        1977, chapter 6), which for spans of one length is their standard deviation / sqrt(spans). None for one."""
        nats, n, _ = self.spans.T
        if len(n) < 2:
            return None
        return math.sqrt(((nats - self.loss * n) ** 2).sum() * len(n) / (len(n) - 1)) / self.tokens

    def line(self, name):
        """A line such as `val: 1.4657 nats a token, perplexity 4.331, ...`."""
        perplexity = math.exp(self.loss) if self.loss < 700 else math.inf
        text = f"{name}: {self.loss:.4f} nats a token, perplexity {perplexity:.3f}, "
        text += f"{self.bits_per_byte:.4f} bits per byte, " if self.bytes else ""
        error = "unknown (a single window)" if len(self.spans) < 2 else f"{self.standard_error:.4f}"
        return f"{text}{self.tokens:,.0f} tokens, standard error {error}"


def evaluate(model, chunks, block_size, stride, batch_size, bytes_of, device, processes, meter):
    """The Totals over the text in `chunks` (see spans()), on rank 0; None on the others. They share the batches.

    batch_size: spans computed at once; 0: as many as keep the device busy.
    bytes_of (V,) int64: the bytes of text of each id, or None where these are not known.
    meter: a Meter of the tokens that have been predicted, over all processes; rank 0 shows it.
    """
    own, done = [np.zeros((0, 3))], 0
    batch_size = batch_size or max(1, BATCH_TOKENS // block_size)
    for k, (ids, new) in enumerate(batches(spans(chunks, block_size, stride), batch_size)):
        if k % processes.world_size == processes.rank:
            nats = nats_of(model, torch.from_numpy(ids).to(device), new).tolist()
            n_bytes = np.zeros(len(ids)) if bytes_of is None else bytes_of[ids[:, -new:]].sum(1)
            own.append(np.stack([list(map(math.fsum, nats)), np.full(len(ids), new), n_bytes], axis=1))
        done += len(ids) * new
        if processes.rank == 0:
            meter.show(done)
    found = processes.gather(np.concatenate(own))
    return found and Totals(np.concatenate(found))
