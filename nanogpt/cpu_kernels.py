"""Attention and dropout, and linear layers for inference. A CPU uses the code here, other devices use torch's.

On two cores torch's dropout takes 17 % of a baby GPT's iteration, and its attention 10 % or more.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F


def dropped_byte_values(p):
    """How many of the 256 values of a random byte mean "dropped": round(256 p), 0 for a p below 1/512."""
    return min(round(256 * p), 255)


def keep_scale(p):
    """Scale that keeps the mean after keep_mask(x, p); separate from the mask, because bfloat16 would round it."""
    return 256 / (256 - dropped_byte_values(p))


def keep_mask(x, p):
    """A dropout mask of x's shape and dtype: 0 with probability round(256 p) / 256, else 1.

    One random byte decides each element: on a CPU 16 times as fast as bernoulli_, which draws 64 bits for it.
    random_() alone would leave the top bit of each int64 0, and drop every eighth element more often. The mask has
    x's own dtype, because multiplying by a bool mask takes ten times as long.
    """
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    byte_of_element = words.view(torch.uint8)[: x.numel()].view(x.shape)
    return torch.ge(byte_of_element, dropped_byte_values(p), out=torch.empty(x.shape, dtype=x.dtype))


class Dropout(nn.Dropout):
    """nn.Dropout, faster on a CPU; there p is rounded to a multiple of 1/256."""

    def forward(self, x):
        if x.device.type == "cpu" and self.training and self.p > 0:
            return (x * keep_mask(x, self.p)).mul_(keep_scale(self.p))
        return super().forward(x)


plain_attention = False  # a CPU uses torch's plain kernel; devices.pick_attention() sets this


def attention(q, k, v, dropout_p=0.0, bias=None):
    """Causal attention of q (B, nh, T, hs) over k and v (B, nh, S, hs): (B, nh, T, hs), by this device's best kernel.

    Either S = T, or T = 1: a single query that sees all S keys, its scores plus `bias` (1, S).
    """
    if q.size(2) == 1:
        with torch.autocast(q.device.type, enabled=False):  # a CPU's cache is float32, whatever q is
            return F.scaled_dot_product_attention(q.to(k.dtype), k, v, bias, dropout_p)
    compiled_inference = torch.compiler.is_compiling() and not torch.is_grad_enabled()  # it would compile for each T
    ours = (dropout_p > 0 or q.dtype != torch.float32) and not (plain_attention or compiled_inference)
    if q.device.type == "cpu" and ours:
        return CPUAttention.apply(*(t.flatten(0, 1) for t in (q, k, v)), dropout_p).view_as(q)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout_p)


class CPUAttention(torch.autograd.Function):
    """Causal attention over q, k, v (n, T, hs), with attention dropout, for a CPU.

    scaled_dot_product_attention has a slow backward pass in bfloat16 there, and with dropout it writes the whole (T, T)
    matrix several times. This goes through the queries in chunks, and multiplies each chunk by the keys up to its end
    only: for long T that is half the work.
    """

    @staticmethod
    def query_chunks(T):
        """[(start, stop)] of each chunk of queries."""
        size = max(64, T // 8)
        return [(start, min(start + size, T)) for start in range(0, T, size)]

    @staticmethod
    def forward(ctx, q, k, v, p):
        T, ctx.scale, ctx.p = q.size(1), q.size(2) ** -0.5, p
        y = torch.empty_like(q)
        causal_bias = q.new_full((T, T), -math.inf).triu_(1)  # added to the scores: no query sees a later key
        saved = []
        for start, stop in CPUAttention.query_chunks(T):
            att = torch.baddbmm(causal_bias[start:stop, :stop], q[:, start:stop], k[:, :stop].mT, alpha=ctx.scale)
            att = att.softmax(-1)  # (n, chunk, stop)
            saved.append(att)
            if p > 0:
                saved.append(keep_mask(att, p))
                att = att * saved[-1]
            y[:, start:stop].baddbmm_(att, v[:, :stop], beta=0, alpha=keep_scale(p))
        ctx.save_for_backward(q, k, v, *saved)
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        scale = ctx.scale * keep_scale(ctx.p)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        saved = iter(saved)
        for start, stop in CPUAttention.query_chunks(q.size(1)):
            att, keep = next(saved), next(saved) if ctx.p > 0 else None
            dy = grad[:, start:stop]
            dv[:, :stop].baddbmm_((att * keep if ctx.p > 0 else att).mT, dy, alpha=keep_scale(ctx.p))
            datt = torch.bmm(dy, v[:, :stop].mT)
            if ctx.p > 0:
                datt.mul_(keep)
            datt = torch._softmax_backward_data(datt, att, -1, att.dtype)  # private, and one pass over both
            dq[:, start:stop].baddbmm_(datt, k[:, :stop], beta=0, alpha=scale)
            dk[:, :stop].baddbmm_(datt.mT, q[:, start:stop], alpha=scale)
        return dq, dk, dv, None


class PackedLinear(nn.Module):
    """An nn.Linear in bfloat16, for inference on a CPU, with its weights in oneDNN's own order: the same numbers.

    F.linear reorders them for each product, and for a single token that takes as long as everything else.
    """

    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = linear.bias

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, self.bias, "none", [], "")


def pack_linear_layers(model):
    """Replaces every nn.Linear in `model`, which is in bfloat16: it can then sample, but neither train nor be saved."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, PackedLinear(module))
