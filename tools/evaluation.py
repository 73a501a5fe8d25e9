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

    chunks: arrays of token ids, which in a row are the text; only the span's own tokens are held.
    """
    held, context = np.zeros(0, dtype=np.int64), 0  # context: predictions in a span that an earlier one has made
    for chunk in chunks:
        held = np.concatenate([held, chunk.astype(np.int64)])
        start = 0
        while len(held) - start > block_size:
            yield held[start : start + block_size + 1], block_size - context
            start, context = start + stride, block_size - stride
        held = held[start:]
    if len(held) - 1 > context:  # the last span may be short
        yield held, len(held) - 1 - context


def batches(spans, size):
    """Yields (ids (B, t + 1), new) of at most `size` consecutive spans that have the same length and `new`."""
    for (_, new), group in groupby(spans, key=lambda span: (len(span[0]), span[1])):
        while part := list(islice(group, size)):
            yield np.stack([ids for ids, _ in part]), new


class Totals:
    """What the spans of a text add up to, by math.fsum, whose result does not depend on their order.

    spans (S, 3), float64: of each its nats L, its n predictions, and the bytes of text that these stand for.
    """

    def __init__(self, spans):
        self.spans = spans
        self.nats, self.tokens, self.bytes = map(math.fsum, spans.T)
        self.loss = self.nats / self.tokens  # nats a token

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
        bits, error = bits_per_byte(self.nats, self.bytes), self.standard_error
        in_bits = "" if bits is None else f"{bits:.4f} bits per byte, "
        error = "unknown (a single window)" if error is None else f"{error:.4f}"
        return (f"{name}: {self.loss:.4f} nats a token, perplexity {perplexity:.3f}, {in_bits}"
                f"{self.tokens:,.0f} tokens, standard error {error}")  # fmt: skip


@torch.no_grad()
def evaluate(model, chunks, block_size, stride, batch_size, bytes_of, device, processes, meter):
    """The Totals over the text in `chunks` (see spans()), on rank 0; None on the others. They share the batches.
    UserError where the text has fewer than two tokens.

    batch_size: spans computed at once; 0: as many as keep the device busy.
    bytes_of (V,) int64: the bytes of text of each id, or None where these are not known.
    meter: a Meter of the tokens that have been predicted, over all processes; rank 0 shows it.
    """
    own, done = [np.zeros((0, 3))], 0
    batch_size = batch_size or max(1, BATCH_TOKENS // block_size)
    for k, (ids, new) in enumerate(batches(spans(chunks, block_size, stride), batch_size)):
        if k % processes.world_size == processes.rank:
            part = torch.from_numpy(ids).to(device)
            hidden = model.hidden(part[:, :-1])[:, -new:]
            nats = token_losses(hidden, model.lm_head, part[:, -new:]).tolist()
            n_bytes = np.zeros(len(ids)) if bytes_of is None else bytes_of[ids[:, -new:]].sum(1)
            own.append(np.stack([list(map(math.fsum, nats)), np.full(len(ids), new), n_bytes], axis=1))
        done += len(ids) * new
        if processes.rank == 0:
            meter.show(done)
    if not done:
        raise UserError("a text of fewer than two tokens: nothing can be predicted")
    found = processes.gather(np.concatenate(own))
    return found and Totals(np.concatenate(found))
