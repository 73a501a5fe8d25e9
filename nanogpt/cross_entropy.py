"""The loss of the head's logits; for a large vocabulary in chunks, so that the logits are never all in memory.

Logits (B T, V) and their gradient are most of a GPT-2's memory. In training, at most LOSS_ROWS rows of them exist at
once, and what is kept for the backward pass has the sizes of x and of the head's weight.
"""

import torch
from torch.nn import functional as F

LARGE_VOCABULARY = 8192
LOSS_ROWS = 2048
CPU_SOFTMAX_ROWS = 32


def logits_and_loss(x, lm_head, targets, keep_logits):
    """(logits (B, T, V) or None, mean cross-entropy in nats) of x (B, T, C) for `targets` (B, T); -1 does not count.

    Without `keep_logits` a large vocabulary's logits are computed in chunks, and not returned.
    """
    if not keep_logits and lm_head.out_features >= LARGE_VOCABULARY:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        return None, ChunkedCrossEntropy.apply(x.flatten(0, 1), lm_head.weight, targets.flatten(), dtype)
    logits = lm_head(x)
    rows, targets = logits.flatten(0, 1), targets.flatten()
    if logits.size(-1) < LARGE_VOCABULARY:
        return logits, F.cross_entropy(rows.float(), targets, ignore_index=-1)
    chunks = zip(rows.split(softmax_rows(x)), targets.split(softmax_rows(x)), strict=True)
    total = sum(F.cross_entropy(row.float(), t, ignore_index=-1, reduction="sum") for row, t in chunks)
    return logits, total / (targets != -1).sum()


def softmax_rows(x):
    """How many rows of logits are float32 at once: on a CPU so few that they stay in its cache.

    Not where a compiler traces this: it would unroll the loop over so many chunks."""
    return CPU_SOFTMAX_ROWS if x.device.type == "cpu" and not torch.compiler.is_compiling() else LOSS_ROWS


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the head's logits x @ weight.T, for x (N, C), weight (V, C), targets (N,).

    Products are computed in `dtype`, the softmax in float32. The forward pass computes both gradients, a chunk of rows
    at a time; the backward pass scales them by the incoming gradient.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        weight_cast, count = weight.to(dtype), (targets != -1).sum()
        total = torch.zeros((), device=x.device)
        dx, dweight = torch.empty_like(x), None
        chunks = list(zip(*(t.split(LOSS_ROWS) for t in (x, targets[:, None], dx)), strict=True))
        for i, (x_rows, target_rows, dx_rows) in enumerate(chunks, start=1):
            x_rows = x_rows.to(dtype)
            logits = x_rows @ weight_cast.mT  # (rows, V); softmax - onehot, the loss's gradient, takes its place
            for part, target in zip(logits.split(softmax_rows(x)), target_rows.split(softmax_rows(x)), strict=True):
                ignored, target = target == -1, target.clamp(min=0)
                logp = part.float().log_softmax(-1)
                total -= logp.gather(1, target).masked_fill(ignored, 0).sum()
                grad = logp.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=logp.dtype))
                part.copy_(grad.mul_(~ignored))
            dx_rows.copy_(logits @ weight_cast)
            if i == len(chunks):
                del weight_cast  # the next product is as large
            product = logits.mT @ x_rows
            dweight = product if dweight is None else product.float().add_(dweight)
        ctx.save_for_backward(dx, dweight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        dx, dweight, count = ctx.saved_tensors
        return dx * (grad / count), dweight.to(dx.dtype, copy=True).mul_(grad / count), None, None
