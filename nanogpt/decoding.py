"""From the tokens of a text to the next one: the key/value cache, a step, and on CUDA a step that becomes a graph."""

import math
import sys

import torch

from nanogpt.cross_entropy import product_dtype
from nanogpt.sampling import sample_token

SHORTEST_SPAN = 128  # positions


class KVCache:
    """Keys and values of the tokens so far, so that only the new tokens pass through the model.

    On a CPU the cache is float32: there scaled_dot_product_attention is nine times slower with one bfloat16 query.
    """

    def __init__(self, config, batch, device, dtype=torch.float32):
        self.length = 0  # tokens so far; the step adds to it after the model has run
        size = (batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        dtype = torch.float32 if torch.device(device).type == "cpu" else dtype
        self.layers = [[torch.empty(size, dtype=dtype, device=device) for _ in range(2)] for _ in range(config.n_layer)]

    def extend(self, T):
        """(positions, layers) for T tokens more: one, or a prompt into the empty cache.

        positions: those of the T tokens. layers: for each layer what store() takes, without a position and a bias.
        """
        end = self.length + T
        layers = [(keys[:, :, :end], values[:, :, :end], None, None) for keys, values in self.layers]
        return slice(self.length, end), layers


def store(layer_cache, k, v):
    """Writes k and v (B, nh, T, hs) into a layer of extend(). Returns the keys, values and bias for the attention."""
    keys, values, position, bias = layer_cache
    T = k.size(2)
    if position is not None:
        keys.index_copy_(2, position, k.to(keys.dtype))
        values.index_copy_(2, position, v.to(values.dtype))
    else:
        keys[:, :, -T:], values[:, :, -T:] = k, v
    # a prompt, of more tokens, attends to itself alone, in its own dtype
    return (keys, values, bias) if T == 1 else (k, v, None)


class StaticCache(KVCache):
    """A cache for graphs, which fix every address and every number of the host: the position is on the device.

    A token attends to a whole span of positions: 128, 256, ..., block_size, a graph each. A bias hides those that are
    not yet filled; they begin as zeros, since it would not hide a NaN.
    """

    def __init__(self, config, batch, device, dtype=torch.float32):
        super().__init__(config, batch, device, dtype)
        for buffer in sum(self.layers, []):
            buffer.zero_()
        self.position = torch.zeros(1, dtype=torch.int64, device=device)  # of a single token
        self.places = torch.arange(config.block_size, device=device)

    def span(self):
        """How many positions the next token attends to."""
        return min(len(self.places), max(SHORTEST_SPAN, 1 << self.length.bit_length()))

    def extend(self, T):
        """As KVCache.extend(). A single token's position and bias (1, span) are the same for all layers."""
        if T > 1:
            return super().extend(T)
        span = self.span()
        bias = self.layers[0][0].new_zeros(1, span).masked_fill(self.places[:span] > self.position, -math.inf)
        layers = [(keys[:, :, :span], values[:, :, :span], self.position, bias) for keys, values in self.layers]
        return self.position, layers


class Step:
    """From new tokens of B texts to the next one of each. It serves one stream at a time.

    temperature, top_k, top_p: see nanogpt/sampling.py. allowed (V,) bool: the tokens that may be drawn.
    """

    cache_type = KVCache

    def __init__(self, model, batch, temperature=1.0, top_k=None, top_p=None, allowed=None):
        self.model, self.how = model, (temperature, top_k, top_p)
        self.banned = None if allowed is None else ~allowed
        weight = model.transformer.wte.weight
        self.cache = self.cache_type(model.config, batch, weight.device, product_dtype(weight))
        self.stream, self.generators = None, None

    def begin(self, generators=None):
        """Begins new texts, with a generator for each. Returns a key for __call__(); older keys no longer serve."""
        self.stream, self.generators, self.cache.length = object(), generators, 0
        return self.stream

    def __call__(self, stream, new):
        """The next token (B, 1) after `new` (B, T): the first tokens of a window, or the one that was returned before.

        Raises ValueError where another stream has begun with this step.
        """
        if stream is not self.stream:
            raise ValueError("another stream has begun with this step: each needs its own")
        token = self.next_token(new.clone(memory_format=torch.contiguous_format))  # compiled code depends on strides
        self.cache.length += new.size(1)
        return token

    def next_token(self, new):
        return self.compute(new, generators=self.generators)[1]

    def compute(self, new, **random):
        """(logits (B, V), float32, next token). random: generators or noise, of sample_token()."""
        fills_window = new.size(1) == self.model.config.block_size  # then a cache would have no room for another token
        logits = self.model(new, cache=None if fills_window else self.cache)[0][:, -1].float()
        allowed = logits if self.banned is None else logits.masked_fill(self.banned, -math.inf)
        return logits, sample_token(allowed, *self.how, **random)


class GraphStep(Step):
    """A step on CUDA. A GPU computes it faster than the host launches its operations, and a graph is one launch.

    A shape (tokens given, positions attended to) runs without a graph the first time, in which cuBLAS chooses its
    kernels, and becomes a graph the second time. Prompts do not: each has its own length. Random numbers are drawn
    before, in the order of torch.multinomial, so that a text keeps its seed.
    """

    cache_type = StaticCache

    def __init__(self, model, batch, *how, **more):
        super().__init__(model, batch, *how, **more)
        greedy = self.how[0] < 1e-6  # as in sample_token(): it draws nothing
        self.noise = None if greedy else torch.empty(batch, model.config.vocab_size, device=self.cache.position.device)
        self.seen, self.graphs, self.pool, self.works, self.prompt = set(), {}, None, True, True

    def begin(self, generators=None):
        self.prompt = True
        return super().begin(generators)

    def next_token(self, new):
        self.cache.position.fill_(self.cache.length)
        if self.noise is not None:  # what torch.multinomial would draw for each row
            rows = self.noise.split(1) if self.generators else [self.noise]
            for row, generator in zip(rows, self.generators or [None], strict=True):
                row.exponential_(generator=generator)
        shape = new.size(1), self.cache.span()
        if shape in self.graphs:
            graph, given, token = self.graphs[shape]
            given.copy_(new)
            graph.replay()
            return token.clone()  # the next replay writes there
        logits, token = self.compute_uncached(new)
        if self.noise is not None and logits.isnan().any():
            raise RuntimeError("the model's logits are not numbers")
        if self.works and not self.prompt and shape in self.seen:
            self.record(shape, new, logits)
        self.seen.add(shape)
        self.prompt = False
        return token

    def compute_uncached(self, new):
        """compute(), but autocast keeps no cast weight: a graph would read it after autocast had freed it."""
        kind = new.device.type
        dtype, enabled = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        with torch.autocast(kind, dtype, enabled, cache_enabled=False):
            return self.compute(new, noise=self.noise)

    def record(self, shape, new, expected):
        """Makes the graph of a shape, if its first replay gives the logits `expected`. Else there will be no more."""
        given, eps = new.clone(), max(torch.finfo(self.cache.layers[0][0].dtype).eps, 2**-10)  # TF32's
        try:
            graph, (logits, token) = capture(lambda: self.compute_uncached(given), given.device, self.pool)
            logits.zero_()  # so that a graph without operations is found out
            graph.replay()
            if not torch.allclose(logits, expected, rtol=0, atol=8 * eps * expected.abs().max().item()):
                raise RuntimeError("its logits are other ones")
            self.graphs[shape], self.pool = (graph, given, token), graph.pool()  # all graphs share its memory
        except RuntimeError as error:
            self.works = False
            reason = str(error).partition("\n")[0]
            print(f"a CUDA graph does not work here ({reason}): sampling continues without, slower", file=sys.stderr)
            self.compute_uncached(new)  # writes its keys and values again


def capture(function, device, pool):
    """(CUDA graph of `function`, what it returned). `pool`: the memory of earlier graphs, or None."""
    graph = torch.cuda.CUDAGraph()
    # the outer stream context returns to this stream if the capture fails
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            outputs = function()
    return graph, outputs


def cast_once(model, device, dtype):
    """Casts the weights of `model` to what autocast would cast them to for every token; norms stay float32."""
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            norm = isinstance(module, torch.nn.LayerNorm)
            parameter.data = parameter.data.to(device, torch.float32 if norm else dtype)


def make_step(model, batch, **how):
    """A step for `batch` texts of `model`; `how` as in Step. A graph is for CUDA, but not for compiled code or fsdp."""
    plain = "forward" not in vars(model) and not hasattr(model, "unshard")
    takes_bias = torch.backends.cuda.math_sdp_enabled()  # --attention=flash does not
    graphs = model.transformer.wte.weight.is_cuda and plain and takes_bias
    return (GraphStep if graphs else Step)(model, batch, **how)


def on_host(tokens):
    """Yields each of `tokens`, (B, 1), as a list of B ids. CUDA computes the next ones meanwhile."""
    before = None
    for new in tokens:
        if not new.is_cuda:
            yield new.flatten().tolist()
            continue
        copy, copied = new.flatten().to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
        copied.record()
        if before:
            yield read(*before)
        before = copy, copied
    if before:
        yield read(*before)


def read(copy, copied):
    copied.synchronize()
    return copy.tolist()
