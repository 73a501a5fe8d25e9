"""What a run needs, from its settings alone: parameters, memory, and time.

Nothing here allocates the model: it is asked for its parameters on torch's "meta" device. FLOPs a token are
GPT.flops_per_token(), the definition that train.py prints MFU by.
"""

import bisect
import dataclasses
import difflib
import os
import re

from nanogpt.cpu_kernels import CPUAttention
from nanogpt.cross_entropy import LARGE_VOCABULARY, LOSS_ROWS
from nanogpt.errors import UserError
from nanogpt.mfu import DEVICES, find_row, peak_from_table

# ----------------------------------------------------------------------------------------------
# devices

# bytes that hold no tensor of the run: a process before its model is made; on a GPU CUDA's context and its libraries
RESERVED = {"cpu": 240 << 20, "mps": 240 << 20, "cuda": 1 << 30}


def find_gpu(name):
    """(dtype that 'auto' picks, bytes of memory) of the GPU called `name`, such as "A100" or "A100 80GB".

    UserError naming the nearest of the table's names where it has no such GPU.
    """
    key = find_row(name)
    if key is None:
        near = difflib.get_close_matches(name.lower(), DEVICES, n=5)
        raise UserError(f"--gpu={name}: not in the table; the nearest names there: {', '.join(near or DEVICES)}")
    size = re.search(r"\b(\d+) ?gi?b\b", name.lower())
    dtype = "bfloat16" if peak_from_table(name, "bfloat16") else "float16"
    return dtype, (int(size[1]) if size else DEVICES[key][-1]) << 30


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

    GPUs: 17 % below 512 channels (the baby GPT on an H200; nanoGPT's log has 11 % on an A100), 34 % below 1024 (GPT-2
    124M has 37 % on an H200; nanoGPT trains it in four days on eight A100s, which is 29 %), 40 % below 2048, then 50 %.
    CPUs, whose peak is measured: 20 % below 256 channels, then 50 % (docs/benchmarks.md).
    """
    if device_type == "cpu":
        return 0.2 if n_embd < 256 else 0.5
    return 0.17 if n_embd < 512 else 0.34 if n_embd < 1024 else 0.4 if n_embd < 2048 else 0.5


# ----------------------------------------------------------------------------------------------
# parameters and memory

KINDS = {
    "wte": "token embeddings (and head)", "wpe": "position embeddings", "attn": "attention", "mlp": "MLP",
    "ln_": "LayerNorm",
}  # fmt: skip


def parameters_by_kind(model):
    """{kind: how many} of the parameters of `model`, a GPT on any device; a bias counts with its layer."""
    counts = dict.fromkeys(KINDS.values(), 0)
    for name, p in model.named_parameters():
        counts[next(kind for part, kind in KINDS.items() if f".{part}" in name)] += p.numel()
    return counts


@dataclasses.dataclass
class Setup:
    """What the memory of one process depends on, beside the model."""

    batch_size: int
    micro_steps: int = 1
    processes: int = 1
    sharding: str = "ddp"  # or fsdp
    recompute: bool = False
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    device_type: str = "cpu"
    dropout: float = 0.0


# Measured with torch 2.13 on Linux, as what a process holds beyond the tensors that it keeps.
# kernels, once they have run: on a CPU their code, and oneDNN's workspaces; on a GPU cuBLAS's workspaces (an H200)
LIBRARIES = {"cpu": 40 << 20, "mps": 0, "cuda": 64 << 20}
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
    """Bytes that one block keeps for the backward pass of a micro-batch, as its modules save them."""
    C, T, N = config.n_embd, config.block_size, setup.batch_size * config.block_size
    e = 4 if setup.dtype == "float32" else 2
    on_cpu, drops = setup.device_type == "cpu", setup.dropout > 0
    kept = 2 * (4 * C + 8) * N  # both LayerNorms: their inputs in float32, a mean and a deviation a row
    kept += 5 * e * C * N  # attention: the inputs of c_attn and c_proj, and q, k, v
    kept += 9 * e * C * N  # MLP: the inputs of c_fc, of GELU and of c_proj
    if on_cpu and (drops or e == 2):  # CPUAttention keeps its scores, and a mask of that size
        kept += e * config.n_head * T * N * score_share(T) * (2 if drops else 1)
    else:
        kept += 4 * config.n_head * N  # the kernel keeps a logsumexp a row
    if drops:
        kept += 2 * (e if on_cpu else 1) * C * N  # the masks of both outputs
    return kept


def memory(config, parameters, setup):
    """{kind: bytes} of one process at the peak of an iteration; their sum is the forecast. Evaluations are not counted.

    parameters: of the whole model. On a GPU this is what the modules keep without torch.compile, which keeps less.
    """
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    shares = setup.processes if setup.sharding == "fsdp" else 1
    of_muon = 12 * L * C * C if setup.optimizer == "muon" else 0  # one moment for each, where AdamW has two
    found = {"weights": 4 * parameters / shares, "optimizer": (8 * parameters - 4 * of_muon) / shares}
    if setup.sharding == "fsdp":  # whole for a time: the embeddings, the block in use, and the next
        found["weights gathered"] = 4 * (V + config.block_size) * C + 2 * 4 * 12 * C * C
    found |= max(_moments(config, parameters, setup, shares), key=_total)
    found["libraries"] = LIBRARIES[setup.device_type]
    if setup.device_type == "cpu":
        plain = dataclasses.replace(setup, recompute=False)
        found["holes in the heap"] = HEAP_HOLES * max(map(_total, _moments(config, parameters, plain, shares)))
        found["libraries"] += COMPILER if setup.recompute else 0
    return {kind: int(size) for kind, size in found.items()}


def _total(kinds):
    return sum(kinds.values())


def _moments(config, parameters, setup, shares):
    """[{kind: bytes}] of what comes and goes in an iteration, at each moment that may be its peak.

    These are the head's forward and backward pass, the last block's backward pass, and the end of the backward pass,
    when all gradients are there.
    """
    C, V, L = config.n_embd, config.vocab_size, config.n_layer
    N, e = setup.batch_size * config.block_size, 4 if setup.dtype == "float32" else 2
    whole_gradients = 4 * parameters if setup.micro_steps > 1 else 0  # of earlier micro-steps; fsdp too
    block = block_activations(config, setup) + (e * 12 * C * C if e == 2 else 0)  # and its weights, cast
    kept = L * block
    if setup.recompute:  # a block's input, and in the backward pass all that one block keeps
        kept = 4 * C * N * L
    kept += 32 * N  # embeddings, and the ids of two batches
    if setup.dropout > 0:
        kept += (4 if setup.device_type == "cpu" else 1) * C * N
    if V >= LARGE_VOCABULARY:  # cross_entropy.ChunkedCrossEntropy: dx, the logits of a chunk, and the weight's gradient
        rows, product, gradient = min(N, LOSS_ROWS), e * V * C, 4 * V * C
        cast = product if e == 2 else 0
        so_far = gradient if N > rows else 0  # of earlier chunks
        in_product = product + (cast + so_far * (2 if e == 2 else 1) if so_far else 0)
        in_softmax = cast + so_far + 8 * rows * V if setup.device_type != "cpu" else 0  # its input and output
        forward = 4 * C * N + e * rows * V + max(in_product, in_softmax)
        backward = 8 * C * N + (so_far or product) + gradient
    else:  # the head's input, and in float32 the logits and their log-softmax; then the gradients
        stays = e * C * N + 4 * V * N + (e * V * C if e == 2 else 0)
        forward = stays + e * V * N + (4 * V * N if e == 2 else 0)
        backward = stays + (4 + e) * V * N
    in_block = 4 * e * C * N + (4 + e) * 4 * C * C  # the gradients of GELU's output and of a matrix
    last_norm, embeddings = (4 * C + 8) * N, 4 * V * C
    moments = [
        (whole_gradients, kept + last_norm, forward),
        (whole_gradients, kept + last_norm, backward),
        (max(whole_gradients, embeddings / shares), kept + (block if setup.recompute else 0), in_block),
        (max(whole_gradients, 4 * parameters / shares), 0, embeddings + 4 * C * N),
    ]
    return [dict(zip(("gradients", "activations", "the pass at the peak"), sizes, strict=True)) for sizes in moments]


def largest_batch_size(config, parameters, setup, capacity):
    """The largest batch_size whose memory() is at most `capacity` bytes; 0 where none is."""

    def needed(batch_size):
        return _total(memory(config, parameters, dataclasses.replace(setup, batch_size=batch_size)))

    return bisect.bisect_right(range(1, 1 << 20), capacity, key=needed)


# ----------------------------------------------------------------------------------------------
# time


def recompute_flops(config, dropout):
    """FLOPs a token that recompute adds: each block's forward pass, up to the last tensor that backward needs.

    The MLP's second product is not needed again unless its output is dropped out.
    """
    products = 12 if dropout > 0 else 8
    return config.n_layer * (2 * products * config.n_embd**2 + 4 * config.n_embd * config.block_size)


def iteration_seconds(model, tokens, peak_flops, mfu, recompute):
    """Seconds of an iteration in which a device trains on `tokens`: its FLOPs over mfu * peak_flops. MFU counts the
    model's own FLOPs; what recompute adds takes time besides."""
    flops = model.flops_per_token()
    flops += recompute_flops(model.config, model.config.dropout) if recompute else 0
    return tokens * flops / (peak_flops * mfu)


def run_seconds(iteration, first, max_iters, eval_interval, eval_iters, micro_steps):
    """Seconds of a run from iteration `first` to its end, from those of an iteration of `micro_steps` batches: a
    forward pass takes a third of it.

    An evaluation has eval_iters batches of each of two splits, which the processes share: eval_iters is a process's."""
    evaluations = max_iters // eval_interval - (first - 1) // eval_interval
    return (max_iters + 1 - first) * iteration + evaluations * 2 * eval_iters * iteration / micro_steps / 3
