"""The cross-entropy of the head's logits. A large vocabulary's is computed in chunks of rows.

Logits (B T, V) and their gradient are most of a GPT-2's memory. If the caller does not need the logits, at most
LOSS_ROWS rows of them exist at once. What training keeps for the backward pass has the sizes of x and of the head's
weight.
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
    rows, targets = x.flatten(0, 1), targets.flatten()
    if lm_head.out_features < LARGE_VOCABULARY:
        logits = lm_head(x)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=-1)
    if keep_logits:
        logits = lm_head(x)
        total = summed_loss(logits.flatten(0, 1), targets)
    elif torch.is_grad_enabled():
        return None, ChunkedCrossEntropy.apply(rows, lm_head.weight, targets, product_dtype(x))
    else:
        logits, chunks = None, zip(rows.split(LOSS_ROWS), targets.split(LOSS_ROWS), strict=True)
        total = sum(summed_loss(lm_head(chunk), target) for chunk, target in chunks)
    return logits, total / (targets != -1).sum()


def summed_loss(logits, targets):
    """The sum of the cross-entropies of logits (N, V) for targets (N,); only a few rows are float32 at once."""
    chunks = zip(logits.split(softmax_rows(logits)), targets.split(softmax_rows(logits)), strict=True)
    return sum(F.cross_entropy(rows.float(), target, ignore_index=-1, reduction="sum") for rows, target in chunks)


def product_dtype(x):
    """The dtype in which a matrix product of x is computed: autocast's where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def softmax_rows(x):
    """How many rows of logits are float32 at once: on a CPU so few that they stay in its cache.

    Under torch.compile the chunks are large, because it would unroll the loop over small ones."""
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
