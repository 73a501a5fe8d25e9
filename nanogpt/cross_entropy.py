"""The cross-entropy of the head's logits, computed in chunks of rows for a large vocabulary; and bits per byte.

Logits (B T, V) and their gradient are most of a GPT-2's memory. A caller that needs no logits has at most LOSS_ROWS
rows of them at once, and training keeps for the backward pass only what has the size of x and of the head's weight.
"""

import math

import torch
from torch.nn import functional as F

LARGE_VOCABULARY = 8192
LOSS_ROWS = 2048
CPU_SOFTMAX_ROWS = 32


def mean_loss(logits, targets):
    """The mean cross-entropy in nats of logits (B, T, V) for `targets` (B, T); -1 does not count."""
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)


def bits_per_byte(nats, n_bytes):
    """The measure that compares losses of different tokens: `nats` of all predicted tokens, over the `n_bytes` of the
    original text that they stand for, / ln 2. None where the bytes are not known (0 or NaN)."""
    return nats / n_bytes / math.log(2) if n_bytes > 0 else None


def loss_in_chunks(x, lm_head, targets):
    """mean_loss(lm_head(x), targets) of x (B, T, C). A large vocabulary's logits are computed in chunks."""
    if lm_head.out_features < LARGE_VOCABULARY:
        return mean_loss(lm_head(x), targets)
    if torch.is_grad_enabled():
        return ChunkedCrossEntropy.apply(x.flatten(0, 1), lm_head.weight, targets.flatten(), product_dtype(x))
    return token_losses(x, lm_head, targets).sum() / (targets != -1).sum()


def token_losses(x, lm_head, targets):
    """The cross-entropy in nats of each of `targets` (B, T), float32, for x (B, T, C); 0 for a target of -1.

    The logits are computed in chunks. That saves memory only under torch.no_grad().
    """
    losses = []
    for rows, row_targets in zip(x.flatten(0, 1).split(LOSS_ROWS), targets.flatten().split(LOSS_ROWS), strict=True):
        logits = lm_head(rows)
        size = softmax_rows(logits)  # only so many rows are float32 at once
        for part, target in zip(logits.split(size), row_targets.split(size), strict=True):
            losses.append(F.cross_entropy(part.float(), target, ignore_index=-1, reduction="none"))
    return torch.cat(losses).view_as(targets)


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
