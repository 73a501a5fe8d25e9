"""What a run will need: parameters, FLOPs, memory, disk, time and data, from its settings alone.

Nothing here allocates the model: it is asked for its parameters on torch's "meta" device. FLOPs a token are
GPT.flops_per_token(), the definition that train.py prints MFU by.
"""

import dataclasses
import difflib
import math
import os
import re

from nanogpt.cpu_kernels import CPUAttention
from nanogpt.cross_entropy import LARGE_VOCABULARY, LOSS_ROWS
from nanogpt.errors import UserError
from nanogpt.mfu import PEAK_TFLOPS, peak_from_table

# ----------------------------------------------------------------------------------------------
# devices

# GiB of each device of mfu.PEAK_TFLOPS, from the same data sheets; where it is sold with two sizes, the smaller.
MEMORY_GIB = {
    "b200": 180, "gb200": 186, "b300": 288, "gb300": 288, "h100": 80, "h200": 141, "gh200": 96, "h800": 80,
    "h100 pcie": 80, "h800 pcie": 80, "h100 nvl": 94, "h200 nvl": 141, "h20": 96, "a100": 40, "a100 pcie": 40,
    "a800": 40, "a800 pcie": 40, "a30": 24, "a40": 48, "a10": 24, "a10g": 24, "l40s": 48, "l40": 48, "l4": 24,
    "rtx a6000": 48, "rtx 6000 ada": 48, "rtx pro 6000 blackwell workstation": 96, "rtx 5090": 32, "rtx 5080": 16,
    "rtx 5070 ti": 16, "rtx 5070": 12, "rtx 5060 ti": 8, "rtx 5060": 8, "rtx 4090": 24, "rtx 4090 d": 24,
    "rtx 4080 super": 16, "rtx 4080": 16, "rtx 4070 ti super": 16, "rtx 4070 ti": 12, "rtx 4070 super": 12,
    "rtx 4070": 12, "rtx 4060 ti": 8, "rtx 4060": 8, "rtx 3090": 24, "rtx 3060": 12, "v100 sxm2": 16,
    "v100 sxm3": 32, "v100 pcie": 16, "t4": 16, "mi300x": 192, "mi250x": 64,
}  # fmt: skip


# (n_layer, n_head, n_embd) of OpenAI's GPT-2
GPT2_SIZES = {
    "gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600),
}  # fmt: skip
# bytes that hold no tensor of the run: a process before its model is made; on a GPU CUDA's context and its libraries
RESERVED = (240 << 20, 1 << 30)


def find_gpu(name):
    """(name, dtype that 'auto' picks on it, bytes of memory) of the GPU called `name`, such as "A100" or "A100 80GB".

    UserError naming the nearest of the table's names where it has no such GPU.
    """
    size = re.search(r"\b(\d+) ?gi?b\b", name.lower())
    bare = re.sub(r"\b\d+ ?gi?b\b", "", name.lower()).strip()
    if peak_from_table(bare, "float32") is None:
        near = [key for key in PEAK_TFLOPS if set(key.split()) & set(bare.split())]
        near = near or difflib.get_close_matches(bare, PEAK_TFLOPS, n=3, cutoff=0.4) or list(PEAK_TFLOPS)
        raise UserError(f"--gpu={name}: not in the table; the nearest names there: {', '.join(near)}")
    dtype = "float16" if peak_from_table(bare, "bfloat16") is None else "bfloat16"
    words = set(re.findall("[a-z0-9]+", bare))
    key = max((key for key in MEMORY_GIB if set(key.split()) <= words), key=len)  # "h100 pcie" before "h100"
    return name, dtype, (int(size[1]) if size else MEMORY_GIB[key]) << 30


def host_memory(limit="/sys/fs/cgroup/memory.max"):
    """Bytes of this machine's memory, or of the container's share; None where the system does not say."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, AttributeError, OSError):
        return None
    try:
        with open(limit, encoding="ascii") as f:
            return min(total, int(f.read()))
    except (OSError, ValueError):
        return total


def usual_mfu(n_embd, device_type):
    """The MFU to expect where none is given, by a rule: wider matrices keep a device busier.

    GPUs: 10 % below 512 channels (nanoGPT's log of the baby GPT on an A100 has 11 %), 30 % below 1024 (nanoGPT trains
    GPT-2 124M in four days on eight A100s, which is 29 %), 40 % below 2048, then 50 %. CPUs, whose peak is measured:
    20 % below 256 channels, then 50 % (docs/benchmarks.md).
    """
    if device_type == "cpu":
        return 0.2 if n_embd < 256 else 0.5
    return 0.1 if n_embd < 512 else 0.3 if n_embd < 1024 else 0.4 if n_embd < 2048 else 0.5


# ----------------------------------------------------------------------------------------------
# parameters and FLOPs


def parameters_by_kind(model):
    """{kind: how many} of the parameters of `model`, a GPT on any device, "meta" too."""
    names = ["token embeddings (and head)", "position embeddings", "attention", "MLP", "LayerNorm", "biases"]
    kinds = dict.fromkeys(names, 0)
    for name, p in model.named_parameters():
        parts = (".wte.", ".wpe.", ".attn.", ".mlp.", ".ln_")
        kind = next(k for part, k in zip(parts, names, strict=False) if part in f".{name}")
        kinds["biases" if name.endswith("bias") and kind != "LayerNorm" else kind] += p.numel()
    return {kind: count for kind, count in kinds.items() if count}


def flops_by_kind(model):
    """{kind: FLOPs a token} of training: a product of (m, k) and (k, n) is 2 m k n, once forward and twice backward.

    "6N" and "attention" are GPT.flops_per_token()'s two terms. "products" is the exact count of the matrix products:
    6N counts norms and biases, which are in no product. "head" is the head's part of it. Attention is counted in full,
    though half of its scores are masked: FlopCounterMode counts the math kernel so, and the CPU's kernels compute less.
    """
    c, tokens = model.config, 1
    attention = 12 * c.n_layer * c.n_embd * c.block_size * tokens
    head = 6 * c.vocab_size * c.n_embd
    blocks = 6 * 12 * c.n_layer * c.n_embd**2
    total = model.flops_per_token()
    return {"6N": total - attention, "attention": attention, "head": head, "blocks": blocks,
            "products": head + blocks + attention}  # fmt: skip


def recompute_flops(config, dropout):
    """FLOPs a token that recompute adds: each block's forward pass, up to the last tensor that backward needs.

    The MLP's second product is not needed again unless its output is dropped out.
    """
    products = 12 if dropout > 0 else 8
    return config.n_layer * (2 * products * config.n_embd**2 + 4 * config.n_embd * config.block_size)


# ----------------------------------------------------------------------------------------------
# memory


@dataclasses.dataclass
class Setup:
    """What the memory of one process hangs on, beside the model."""

    batch_size: int
    micro_steps: int = 1
    processes: int = 1
    sharding: str = "one process"  # one process, ddp or fsdp
    recompute: bool = False
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    device_type: str = "cpu"
    dropout: float = 0.0


# Measured with torch 2.13 on Linux, as what a process holds beyond the tensors that it keeps.
LIBRARIES = 40 << 20  # a CPU's kernels, once they have run: their code, and oneDNN's workspaces
COMPILER = 72 << 20  # torch._dynamo, which torch.utils.checkpoint imports at its first call
# glibc keeps freed memory (device.keep_freed_memory), and holes between live blocks do not fit the next ones. They come
# to about this share of what an iteration allocates without recompute: measured, not derived. Nine runs (the baby GPT,
# GPT-2 124M and train_cpu's model, bfloat16 and float32, with and without recompute) had 0.18 to 0.34.
HEAP_HOLES = 0.27


def score_share(T):
    """The share of the (T, T) attention scores that CPUAttention computes and keeps: chunks of queries up to their
    last key."""
    return sum((stop - start) * stop for start, stop in CPUAttention.query_chunks(T)) / T**2


def block_activations(config, setup):
    """{kind: bytes} that one block keeps for the backward pass of a micro-batch, as its modules save them."""
    C, T, N = config.n_embd, config.block_size, setup.batch_size * config.block_size
    e = 4 if setup.dtype == "float32" else 2
    on_cpu, drops = setup.device_type == "cpu", setup.dropout > 0
    kept = {
        "norms and residual stream": 2 * (4 * C + 8) * N,  # both inputs in float32, a mean and a deviation a row
        "attention: inputs, q, k, v": 5 * e * C * N,  # of c_attn and c_proj, and q, k, v
        "MLP": 9 * e * C * N,  # the inputs of c_fc, of GELU and of c_proj
    }
    if on_cpu and (drops or e == 2):  # CPUAttention
        scores = e * config.n_head * T * N * score_share(T)
        kept["attention: scores"] = scores * (2 if drops else 1)  # and a mask of that size
    else:
        kept["attention: scores"] = 4 * config.n_head * N  # the kernel keeps a logsumexp a row
    if drops:
        kept["dropout masks"] = 2 * (e if on_cpu else 1) * C * N
    return kept


def memory(config, parameters, setup):
    """{kind: bytes} of one process at the peak of an iteration; their sum is the forecast. Evaluations are not counted.

    parameters: of the whole model. The peak is the largest of four moments: the head's forward and backward pass, the
    last block's backward pass, and the end of the backward pass, when all gradients are there. On a GPU this is what
    the modules keep without torch.compile, which keeps less.
    """
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    shares = setup.processes if setup.sharding == "fsdp" else 1
    of_muon = 12 * L * C * C if setup.optimizer == "muon" else 0  # one moment for each, where AdamW has two
    found = {"weights": 4 * parameters / shares, "optimizer": (8 * parameters - 4 * of_muon) / shares}
    if setup.sharding == "fsdp":  # whole for a time: the embeddings, the block in use, and the next
        found["weights gathered"] = 4 * (V + config.block_size) * C + 2 * 4 * 12 * C * C
    passing = max(_moments(config, parameters / shares, setup, shares), key=lambda kinds: sum(kinds.values()))
    if setup.device_type == "cpu":
        plain = dataclasses.replace(setup, recompute=False)
        moments = _moments(config, parameters / shares, plain, shares)
        passing = passing | {"holes in the heap": HEAP_HOLES * max(sum(kinds.values()) for kinds in moments)}
        passing["libraries"] = LIBRARIES
        if setup.recompute:
            passing["torch._dynamo, which recompute imports"] = COMPILER
    return {kind: int(size) for kind, size in (found | passing).items() if size}


def _moments(config, parameters, setup, shares):
    """The {kind: bytes} of what comes and goes in an iteration, at each moment that may be its peak.

    parameters: of this process's share."""
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    N, e = setup.batch_size * config.block_size, 4 if setup.dtype == "float32" else 2
    block = block_activations(config, setup)
    earlier = 4 * parameters * shares * (setup.micro_steps > 1)  # fsdp too: whole until the last one
    casts = e * 12 * C * C if e == 2 else 0  # of a block's weights
    kept = {kind: L * size for kind, size in block.items()} | {"weights cast for products": L * casts}
    again = {}
    if setup.recompute:  # a block's input, and in the backward pass all that one block keeps
        kept, again = {"inputs of the blocks": 4 * C * N * L}, block | {"weights cast for products": casts}
    kept["embeddings, and the ids of two batches"] = 32 * N
    if setup.dropout > 0:
        kept["embeddings, and the ids of two batches"] += (4 if setup.device_type == "cpu" else 1) * C * N
    last_norm = {"last norm": (4 * C + 8) * N}
    head = {"the head's forward pass": 0, "the head's backward pass": 0}
    if V >= LARGE_VOCABULARY:  # cross_entropy.ChunkedCrossEntropy: dx, the logits of a chunk, and the weight's gradient
        chunks, product = math.ceil(N / LOSS_ROWS), e * V * C
        cast = product if e == 2 else 0
        sums = 0 if chunks == 1 else 4 * V * C + (4 * V * C if e == 2 else 0)
        logits = e * min(N, LOSS_ROWS) * V
        work = max(cast if chunks == 1 else cast + product + sums, product + sums)
        head["the head's forward pass"] = 4 * C * N + logits + work
        head["the head's backward pass"] = 8 * C * N + (product if chunks == 1 else 4 * V * C) + 4 * V * C
    else:  # the head's input, and in float32 the logits and their log-softmax; then the gradients
        stays = e * C * N + 4 * V * N + (e * V * C if e == 2 else 0)
        head["the head's forward pass"] = stays + e * V * N + (4 * V * N if e == 2 else 0)
        head["the head's backward pass"] = stays + (4 + e) * V * N
    moments = [kept | last_norm | {"gradients": earlier, where: size} for where, size in head.items()]
    work = 4 * e * C * N + (4 + e) * 4 * C * C  # the gradients of GELU's output and of a matrix
    both = {kind: kept.get(kind, 0) + again.get(kind, 0) for kind in kept | again}
    gradients = max(earlier, 4 * V * C / shares)
    moments.append(both | {"gradients": gradients, "a block's backward pass": work})
    gathered = {"gradients": max(earlier, 4 * parameters), "the embeddings' backward pass": 4 * V * C + 4 * C * N}
    return [*moments, gathered]


def largest_batch_size(config, parameters, setup, capacity):
    """The largest batch_size whose memory() is at most `capacity` bytes; 0 where none is."""

    def fits(batch_size):
        return sum(memory(config, parameters, dataclasses.replace(setup, batch_size=batch_size)).values()) <= capacity

    low, high = 0, 1
    while fits(high) and high < 1 << 20:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ----------------------------------------------------------------------------------------------
# time and loss


def iteration_seconds(model, tokens, peak_flops, mfu, recompute):
    """Seconds of an iteration in which a device trains on `tokens`: its FLOPs over mfu * peak_flops. MFU counts the
    model's own FLOPs; what recompute adds takes time besides."""
    flops = model.flops_per_token()
    flops += recompute_flops(model.config, model.config.dropout) if recompute else 0
    return tokens * flops / (peak_flops * mfu)


def run_seconds(iteration, max_iters, eval_interval, eval_iters, micro_steps):
    """Seconds of a whole run, from those of an iteration of `micro_steps` batches: a forward pass takes a third of it.

    An evaluation has eval_iters batches of each of two splits, which the processes share: eval_iters is a process's."""
    evaluations = max_iters // eval_interval + 1
    return (max_iters + 1) * iteration + evaluations * 2 * eval_iters * iteration / micro_steps / 3


def expected_loss(parameters, tokens):
    """Nats a token of a model of so many parameters after so many tokens: Hoffmann et al. 2022 (arXiv:2203.15556),
    equation 10, fitted to their text and their 32,000-token vocabulary."""
    return 1.69 + 406.4 / parameters**0.34 + 410.7 / tokens**0.28


COMPUTE_OPTIMAL = 20  # tokens a parameter (the same paper, table 3)
