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
        self.taken, self.current = tokens_seen // block_size, None  # windows, of all processes

    def starts(self, n_tokens, evaluation=False):
        """int64 (B,): where each window of the next batch starts in a bin of `n_tokens`; all below n_tokens - T."""
        if self.order == "random" or evaluation:
            last = n_tokens - self.block_size
            return torch.randint(last, (self.batch_size,), generator=self.generator).numpy()
        first = self.taken + self.rank * self.batch_size
        self.taken += self.world_size * self.batch_size
        found, position = [], first
        while position < first + self.batch_size:  # a batch may take the end of a pass and the start of the next
            one = self._pass_at(position, n_tokens)
            k = np.arange(position, min(first + self.batch_size, one.end)) - one.begin
            found.append(one.starts(k))
            position += len(k)
        return np.concatenate(found)

    def _pass_at(self, position, n_tokens):
        """The Pass that window `position` of the whole run is in. Positions only grow: the search never goes back."""
        self.current = self.current or Pass(self.seed, 0, 0, n_tokens, self.block_size)
        while position >= self.current.end:
            self.current = self.current.next()
        return self.current


class Pass:
    """One pass over `n_tokens`: its windows are numbers `begin` to `end` - 1 of the whole run."""

    def __init__(self, seed, number, begin, n_tokens, block_size):
        self.seed, self.number, self.n_tokens, self.block_size = seed, number, n_tokens, block_size
        offset, *self.keys = np.random.SeedSequence([seed, number]).generate_state(1 + ROUNDS, np.uint64)
        # below block_size, and so that a window and the token after it fit
        self.offset = int(offset) % min(block_size, n_tokens - block_size)
        self.windows = (n_tokens - 1 - self.offset) // block_size
        self.begin, self.end = begin, begin + self.windows

    def next(self):
        return Pass(self.seed, self.number + 1, self.end, self.n_tokens, self.block_size)

    def starts(self, k):
        """int64 (n,): where the k-th windows of this pass start; k: int64 (n,), from 0 on."""
        return self.offset + self.block_size * permuted(k, self.windows, self.keys)


def permuted(k, n, keys):
    """int64: the places of `k` (int64, each below n) in a pseudo-random permutation of 0 ... n - 1, a round per key."""
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)  # a b is n or more, and less than n + a: about one in sqrt(n) results is outside
    sizes = np.array([a, b], dtype=np.uint64)
    k = k.astype(np.uint64)
    outside = np.arange(len(k))
    while len(outside):
        halves = list(np.divmod(k[outside], sizes[1]))
        for i, key in enumerate(keys):
            changed, other = i % 2, 1 - i % 2
            halves[changed] = (halves[changed] + scrambled(halves[other] + key) % sizes[changed]) % sizes[changed]
        k[outside] = halves[0] * sizes[1] + halves[1]
        outside = outside[k[outside] >= n]
    return k.astype(np.int64)


def scrambled(x):
    """uint64: SplitMix64's finalizer, a bijection each of whose output bits depends on every input bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
