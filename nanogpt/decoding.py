"""From the tokens of a text to the next one: a step with its key/value cache, and on CUDA one that becomes a graph."""

import math
import sys

import torch
from torch import nn

from nanogpt.cross_entropy import product_dtype
from nanogpt.sampling import sample_token

SHORTEST_SPAN = 128  # positions


class Step:
    """From new tokens of B texts to the next one of each. It serves one stream at a time.

    It keeps the keys and values of the tokens so far, so that only the new tokens pass through the model. On a CPU they
    are float32: there scaled_dot_product_attention is nine times slower with one bfloat16 query.
    how: temperature, top_k, top_p and allowed of sample_token().
    """

    def __init__(self, model, batch, **how):
        self.model, self.how = model, how
        config, weight = model.config, model.transformer.wte.weight
        size = (batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        kind = {"dtype": torch.float32 if weight.is_cpu else product_dtype(weight), "device": weight.device}
        self.layers = [[torch.empty(size, **kind) for _ in range(2)] for _ in range(config.n_layer)]
        greedy = how.get("temperature", 1.0) < 1e-6  # as in sample_token(): it draws nothing
        self.noise = None if greedy else torch.empty(batch, config.vocab_size, device=weight.device)

    def begin(self, generators=None):
        """Begins new texts: with a generator for each, which then does not depend on the others, or the global one."""
        self.generators = generators
        self.length, self.is_prompt = 0, True  # how many tokens the cache has; whether the next ones are the first

    def __call__(self, new):
        """The next token (B, 1) after `new` (B, T): the first tokens of a window, or the one it returned before."""
        if self.noise is not None:  # drawn here, since a CUDA graph cannot
            rows = self.noise.split(1) if self.generators else [self.noise]
            for row, generator in zip(rows, self.generators or [None], strict=True):
                row.exponential_(generator=generator)
        token = self.next_token(new.clone(memory_format=torch.contiguous_format))  # compiled code depends on strides
        self.length += new.size(1)
        self.is_prompt = False
        return token

    def next_token(self, new):
        return self.compute_checked(new)[1]

    def compute_checked(self, new):
        """As compute(). RuntimeError where no token can be drawn."""
        logits, token = self.compute(new)
        if self.noise is not None and not logits.amax(-1).isfinite().all():
            raise RuntimeError("the model's logits are not finite")
        return logits, token

    def compute(self, new):
        """(logits (B, V), float32, next token)."""
        fills_window = new.size(1) == self.model.config.block_size  # then there is no room for another token
        logits = self.model(new, cache=None if fills_window else self)[0][:, -1].float()
        return logits, sample_token(logits, self.noise, **self.how)

    def extend(self, T):
        """(positions, layers) for T tokens more: one, or the first ones of a window.

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


class GraphStep(Step):
    """A step on CUDA. A GPU computes it faster than the host launches its operations, and a graph is one launch.

    A shape (tokens given, positions attended to) runs without a graph the first time, in which cuBLAS chooses its
    kernels, and becomes a graph the second time. Prompts do not: each has its own length.

    A graph fixes every address and every number of the host, so the position of a single token is on the device. Such
    a token attends to a whole span of positions: 128, 256, ..., block_size, a graph each. A bias hides those that are
    not yet filled; they begin as zeros, since it would not hide a NaN.
    """

    def __init__(self, model, batch, **how):
        super().__init__(model, batch, **how)
        for buffer in sum(self.layers, []):
            buffer.zero_()
        device = buffer.device
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.places = torch.arange(model.config.block_size, device=device)
        self.seen, self.graphs, self.pool, self.works = set(), {}, None, True

    def span(self):
        """How many positions the next token attends to."""
        return min(len(self.places), max(SHORTEST_SPAN, 1 << self.length.bit_length()))

    def extend(self, T):
        """As Step.extend(). A single token's position and bias (1, span) are the same for all layers."""
        if T > 1:
            return super().extend(T)
        span = self.span()
        bias = self.layers[0][0].new_zeros(1, span).masked_fill(self.places[:span] > self.position, -math.inf)
        layers = [(keys[:, :, :span], values[:, :, :span], self.position, bias) for keys, values in self.layers]
        return self.position, layers

    def next_token(self, new):
        self.position.fill_(self.length)
        shape = new.size(1), self.span()
        if shape in self.graphs:
            graph, given, token = self.graphs[shape]
            given.copy_(new)
            graph.replay()
            return token.clone()  # the next replay writes there
        logits, token = self.compute_checked(new)
        if self.works and not self.is_prompt and shape in self.seen:
            self.record(shape, new, logits)
        self.seen.add(shape)
        return token

    def compute(self, new):
        """As Step.compute(), but autocast keeps no cast weight: a graph would read it after autocast had freed it."""
        kind = new.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            return super().compute(new)

    def record(self, shape, new, expected):
        """Makes the graph of a shape, if its first replay gives the logits `expected`. Else there will be no more."""
        eps = max(torch.finfo(self.layers[0][0].dtype).eps, 2**-10)  # TF32's
        try:
            graph, (logits, token) = capture(lambda: self.compute(new), new.device, self.pool)
            logits.zero_()  # so that a graph without operations is found out
            graph.replay()
            if not torch.allclose(logits, expected, rtol=0, atol=8 * eps * expected.abs().max().item()):
                raise RuntimeError("its logits are other ones")
            self.graphs[shape], self.pool = (graph, new, token), graph.pool()  # all graphs share its memory
        except RuntimeError as error:
            self.works = False
            reason = str(error).partition("\n")[0]
            print(f"a CUDA graph does not work here ({reason}): sampling continues without, slower", file=sys.stderr)
            self.compute(new)  # writes its keys and values again


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
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(device, dtype)
    model.to(device)


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
