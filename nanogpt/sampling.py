"""How the next token is drawn from a model's logits: temperature, top_k, top_p."""

import math

import torch
from torch.nn import functional as F


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generators=None):
    """Returns a token for each row of `logits` (B, V): (B, 1).

    temperature: divides the logits; 0 takes the most likely token. top_k: draw from the k most likely tokens only.
    top_p: draw from the smallest set of most likely tokens whose probabilities sum to top_p (arXiv:1904.09751).
    generators: one for each row, so that its text does not depend on the other rows; None: the global generator.
    """
    if temperature < 1e-6:  # the most likely token; the division below would overflow
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        kth_largest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p is not None and top_p < 1:
        sorted_probs, order = probs.sort(descending=True)
        beyond = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # the tokens before have a sum of top_p already
        probs = probs.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    if generators is None:
        return torch.multinomial(probs, 1)
    rows = zip(probs.split(1), generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
