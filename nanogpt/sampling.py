"""How the next token is drawn from a model's logits (temperature, top_k, top_p); short samples in training."""

import math

import torch
from torch.nn import functional as F


def sample_token(logits, noise, temperature=1.0, top_k=None, top_p=1.0, allowed=None):
    """Returns a token for each row of `logits` (B, V): (B, 1), the one that torch.multinomial would draw.

    noise (B, V): drawn by exponential_(), as torch.multinomial does; None will do for temperature 0.
    temperature: divides the logits; 0 takes the most likely token. top_k: draw from the k most likely tokens only; 0 or
    None: from all. top_p: draw from the smallest set of most likely tokens whose probabilities sum to top_p
    (arXiv:1904.09751); 1: from all.
    allowed (V,) bool: the tokens that may be drawn; None: all.
    """
    if allowed is not None:
        logits = logits.masked_fill(~allowed, -math.inf)
    if temperature < 1e-6:  # the most likely token; the division below would overflow
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k:
        kth_largest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        sorted_probs, order = probs.sort(descending=True)
        beyond = sorted_probs.cumsum(-1) - sorted_probs >= top_p  # the tokens before have a sum of top_p already
        probs = probs.masked_fill(beyond.scatter(-1, order, beyond), 0.0)
    return (probs / noise).argmax(-1, keepdim=True)


class ShortSamples:
    """Samples of 100 tokens after evaluations, to see what a model writes while it is trained.

    Each is drawn from a generator of its own, so they change no other random draw.
    """

    def __init__(self, interval, tokens, vocab_size, seed, device):
        """interval: iterations from one sample to the next; 0: none. tokens: what the run's ids stand for."""
        self.interval, self.seed, self.device = interval, seed, device
        if not interval:
            return
        self.codec = codec = tokens.codec
        known = [codec.known(id) for id in range(vocab_size)]
        self.allowed = torch.tensor(known, device=device)
        self.first = next((id for id in range(vocab_size) if known[id] and codec.piece(id) == b"\n"), known.index(True))

    def lines(self, model, iter_num, autocast):
        """What `model` writes after a line feed, if iteration `iter_num` has a sample.

        Every process calls this, since fsdp has spread the model over them."""
        if not self.interval or iter_num % self.interval:
            return []
        model.eval()
        with autocast:
            prompt = torch.tensor([[self.first]], device=self.device)
            generator = torch.Generator(self.device).manual_seed(self.seed + iter_num)
            ids = model.generate(prompt, 100, 0.8, 200, generators=[generator], allowed=self.allowed)
        model.train()
        return [f"sample at iteration {iter_num}:", self.codec.decode(ids[0, 1:].tolist()), "-" * 15]
