"""Short samples while a model is trained, to see what it writes. They change no other random draw."""

import torch

TOKENS = 100


class ShortSamples:
    """Samples of TOKENS tokens after evaluations, each from a generator of its own."""

    def __init__(self, interval, data, vocab_size, seed, device):
        """interval: iterations from one sample to the next; 0: none. data: the run's Dataset."""
        self.interval, self.seed, self.device = interval, seed, device
        if not interval:
            return
        self.codec = codec = data.codec
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
            ids = model.generate(prompt, TOKENS, 0.8, 200, generators=[generator], allowed=self.allowed)
        model.train()
        return [f"sample at iteration {iter_num}:", self.codec.decode(ids[0, 1:].tolist()), "-" * 15]
