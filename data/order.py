"""Which windows of a bin a batch takes: drawn at random, as in nanoGPT, or each once a pass over the training tokens.

With order='epoch' a pass cuts the tokens, from an offset below block_size on, into windows of block_size tokens, and
takes them in the order of a pseudo-random permutation. Offset and permutation are computed from (seed, pass) alone, so
no list of windows is in memory, and a resume needs nothing but the number of windows taken so far.

The permutation is the generalized Feistel cipher of Black and Rogaway ("Ciphers with Arbitrary Finite Domains", 2002,
method 3). It takes a number below a b as a pair, one below a and one below b. Each round adds to one of the two, modulo
its size, a hash of the other. Where the result is no window, because a b exceeds their number, the cipher is applied
again (cycle walking, method 2). The hash is SplitMix64's finalizer (Steele, Lea and Flood, 2014).
"""

import math

import numpy as np
import torch

ROUNDS = 10  # with 8, some orders of five windows came half as often again as others


class Windows:
    """The start positions of the windows in each batch of this process.

    order: 'random' draws them from `generator`, with repeats; with 'epoch' the training batches of all processes
    together take each window of a pass once. Evaluation batches are drawn from `generator` in both, and so change
    nothing in the order of training.
    generator: of the windows alone, so that dropout changes no batch. It starts as torch's global one is now.
    tokens_seen: those that all processes have trained on before, from which 'epoch' continues.
    """

    def __init__(self, order, seed, tokens_seen, batch_size, block_size, rank=0, world_size=1):
        self.order, self.seed = order, seed
        self.generator = torch.Generator().set_state(torch.get_rng_state())
        self.batch_size, self.block_size, self.rank, self.world_size = batch_size, block_size, rank, world_size
        self.taken = tokens_seen // block_size  # windows, of all processes
        self.passes = self.begin = self.end = 0  # begun; the present one has windows begin to end - 1 of the whole run

    def starts(self, n_tokens, evaluation=False):
        """int64 (B,): where each window of the next batch starts in a bin of `n_tokens`; all below n_tokens - T."""
        if self.order == "random" or evaluation:
            last = n_tokens - self.block_size
            return torch.randint(last, (self.batch_size,), generator=self.generator).numpy()
        position = self.taken + self.rank * self.batch_size
        stop = position + self.batch_size
        self.taken += self.world_size * self.batch_size
        found = []
        while position < stop:  # a batch may take the end of a pass and the start of the next
            while position >= self.end:  # positions only grow: the search never goes back
                self._begin_pass(n_tokens)
            k = np.arange(position, min(stop, self.end)) - self.begin
            found.append(self.offset + self.block_size * permuted(k, self.end - self.begin, self.keys))
            position += len(k)
        return np.concatenate(found)

    def _begin_pass(self, n_tokens):
        """The next pass over `n_tokens`: its offset, its permutation's keys, and which windows of the run are in it."""
        seeds = np.random.SeedSequence([self.seed, self.passes])
        offset, *self.keys = seeds.generate_state(1 + ROUNDS, np.uint64)
        # below block_size, and so that a window and the token after it fit
        self.offset = int(offset) % min(self.block_size, n_tokens - self.block_size)
        self.passes += 1
        self.begin, self.end = self.end, self.end + (n_tokens - 1 - self.offset) // self.block_size


def permuted(k, n, keys):
    """int64: the places of `k` (int64, each below n) in a pseudo-random permutation of 0 ... n - 1, a round per key."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)  # a b is n or more, and less than n + a: about one in sqrt(n) results is outside
    k = k.astype(np.uint64)
    outside = np.arange(len(k))
    while len(outside):
        left, right = np.divmod(k[outside], b)
        for of_left, of_right in zip(keys[::2], keys[1::2], strict=True):
            left = (left + scrambled(right + of_left) % a) % a
            right = (right + scrambled(left + of_right) % b) % b
        k[outside] = left * b + right
        outside = outside[k[outside] >= n]
    return k.astype(np.int64)


def scrambled(x):
    """uint64: SplitMix64's finalizer, a bijection each of whose output bits depends on every input bit."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)
