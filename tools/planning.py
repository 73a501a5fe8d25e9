"""What a run needs, from its settings alone: parameters, memory, and time.

Nothing here allocates the model: it is asked for its parameters on torch's "meta" device.
"""

import bisect
import difflib
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from nanogpt.cpu_kernels import CPUAttention
from nanogpt.cross_entropy import LARGE_VOCABULARY, LOSS_ROWS
from nanogpt.errors import UserError
from nanogpt.mfu import DEVICES, find_row, peak_from_table

# ---- devices ---------------------------------------------------------------------------------------------------------

# bytes that hold no tensor of the run: a process before its model is made; on a GPU CUDA's context and its libraries
RESERVED = {"cpu": 240 << 20, "mps": 240 << 20, "cuda": 1 << 30}


def find_gpu(name):
    """(dtype that 'auto' picks, bytes of memory) of the GPU `name`, such as "A100 80GB"; UserError if it is unknown."""
    key = find_row(name)
    if key is None:
        near = difflib.get_close_matches(name.lower(), DEVICES, n=5)
        raise UserError(f"--gpu={name}: not in the table; the nearest names there: {', '.join(near or DEVICES)}")
    size = re.search(r"\b(\d+) ?gi?b\b", name.lower())
    dtype = "bfloat16" if peak_from_table(name, "bfloat16") else "float16"
    return dtype, (int(size[1]) if size else DEVICES[key][-1]) << 30


def host_memory():
    """Bytes of this machine's memory, or of the container's share; None where the system does not say."""
    found = []
    with suppress(ValueError, AttributeError, OSError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def usual_mfu(n_embd, device_type):
    """The MFU to expect where none is given, by a rule: wider matrices keep a device busier.

    GPUs: 17 % below 512 channels (the baby GPT on an H200; nanoGPT's log has 11 % on an A100), 34 % below 1024 (GPT-2
    124M has 37 % on an H200; nanoGPT trains it in four days on eight A100s, which is 29 %), 40 % below 2048, then 50 %.
    CPUs, whose peak is measured: 20 % below 256 channels, then 50 % (docs/benchmarks.md).
    """
    if device_type == "cpu":
        return 0.2 if n_embd < 256 else 0.5
    return 0.17 if n_embd < 512 else 0.34 if n_embd < 1024 else 0.4 if n_embd < 2048 else 0.5


# ---- parameters and memory -------------------------------------------------------------------------------------------

KINDS = {"wte": "token embeddings (and head)", "wpe": "position embeddings",
         "attn": "attention", "mlp": "MLP", "ln_": "LayerNorm"}  # fmt: skip


def parameters_by_kind(model):
    """{kind: how many} of the parameters of `model`, a GPT on any device; a bias counts with its layer."""
    counts = dict.fromkeys(KINDS.values(), 0)
    for name, p in model.named_parameters():
        counts[next(kind for part, kind in KINDS.items() if f".{part}" in name)] += p.numel()
    return counts


class Setup(NamedTuple):
    """What the memory of one process depends on, beside the model."""

    batch_size: int
    micro_steps: int = 1
    shares: int = 1  # that weights, gradients and the optimizer's moments are split into; 1 but for fsdp
    recompute: bool = False
    optimizer: str = "adamw"
    dtype: str = "bfloat16"
    device_type: str = "cpu"


# Measured with torch 2.13 on Linux, as what a process holds beyond the tensors that it keeps.
# kernels, once they have run: on a CPU their code, and oneDNN's workspaces; on a GPU cuBLAS's workspaces (an H200)
LIBRARIES = {"cpu": 40 << 20, "mps": 0, "cuda": 64 << 20}
COMPILER = 72 << 20  # torch._dynamo, which torch.utils.checkpoint imports at its first call
# glibc keeps freed memory (device.keep_freed_memory), and holes between live blocks do not fit the next ones. They come
# to about this share of what an iteration allocates without recompute: measured, not derived. It is the median over 21
# figures of docs/plan.md (0.20 to 0.42 for the baby GPT and GPT-2 124M; more, of some MB, for train_cpu's model).
HEAP_HOLES = 0.31


def memory(config, parameters, setup):
    """{kind: bytes} of one process at the peak of an iteration; their sum is the forecast. Evaluations are not counted.

    parameters: of the whole model. On a GPU this is what the modules keep without torch.compile, which keeps less.
    """
    C = config.n_embd
    of_muon = 12 * config.n_layer * C**2 if setup.optimizer == "muon" else 0  # one moment each, where AdamW has two
    found = {"weights": 4 * parameters / setup.shares, "optimizer": (8 * parameters - 4 * of_muon) / setup.shares}
    if setup.shares > 1:  # whole for a time: the embeddings, the block in use, and the next
        found["weights gathered"] = 4 * (config.vocab_size + config.block_size) * C + 2 * 4 * 12 * C**2
    passing = passing_memory(config, parameters, setup)
    found["gradients"], found["activations"], found["the pass at the peak"] = passing
    found["libraries"] = LIBRARIES[setup.device_type]
    if setup.device_type == "cpu":
        found["libraries"] += COMPILER * setup.recompute
        allocated = sum(passing_memory(config, parameters, setup._replace(recompute=False)))
        found["holes in the heap"] = HEAP_HOLES * allocated
    return {kind: int(size) for kind, size in found.items()}


def passing_memory(config, parameters, setup):
    """Bytes of (gradients, activations, what a pass needs besides) when they are the most in an iteration.

    That is in the head's pass, in the last block's backward pass, or at the end of the backward pass, when all
    gradients are there.
    """
    C, V, N = config.n_embd, config.vocab_size, setup.batch_size * config.block_size
    half = setup.dtype != "float32"
    e = 2 if half else 4  # bytes of an element
    cast = 2 * half  # bytes of a weight's copy in 16 bits
    gradients = 4 * parameters if setup.micro_steps > 1 else 0  # of earlier micro-steps; fsdp too
    embeddings, last_norm = 4 * V * C, (4 * C + 8) * N
    block = block_activations(config, setup) + cast * 12 * C**2
    # of all blocks; with recompute their inputs, and in the backward pass all that one block keeps
    kept, one_block = (4 * C * N * config.n_layer, block) if setup.recompute else (block * config.n_layer, 0)
    kept += 32 * N  # embeddings, and the ids of two batches
    if config.dropout > 0:  # the embeddings' mask
        kept += (4 if setup.device_type == "cpu" else 1) * C * N
    if V >= LARGE_VOCABULARY:  # cross_entropy.ChunkedCrossEntropy: dx, a chunk's logits, and the weight's gradient
        rows, several = min(N, LOSS_ROWS), N > LOSS_ROWS
        # a chunk's product; of earlier chunks the sum, and with 16 bits its next value and the weight's copy
        in_product = (e + several * (10 if half else 4)) * V * C
        # a GPU's softmax has the whole chunk as input and output in float32
        in_softmax = (cast + 4 * several) * V * C + 8 * rows * V if setup.device_type != "cpu" else 0
        in_head = 4 * C * N + e * rows * V + max(in_product, in_softmax)
    else:  # the head's input and weight, the log-softmax and its gradient in float32, and the logits' gradient
        in_head = e * C * N + (8 + e) * V * N + cast * V * C
    in_block = 4 * e * C * N + (4 + e) * 4 * C**2  # the gradients of GELU's output and of a matrix
    moments = [
        (gradients, kept + last_norm, in_head),
        (max(gradients, embeddings / setup.shares), kept + one_block, in_block),
        (max(gradients, 4 * parameters / setup.shares), 0, embeddings + 4 * C * N),
    ]
    return max(moments, key=sum)


def block_activations(config, setup):
    """Bytes that one block keeps for the backward pass of a micro-batch, as its modules save them."""
    C, T, N = config.n_embd, config.block_size, setup.batch_size * config.block_size
    e = 4 if setup.dtype == "float32" else 2
    on_cpu, drops = setup.device_type == "cpu", config.dropout > 0
    kept = 2 * (4 * C + 8) * N  # both LayerNorms: their inputs in float32, a mean and a deviation a row
    # the inputs of attention's c_attn and c_proj, and q, k, v; of MLP's c_fc (C), GELU and c_proj (4 C each)
    kept += 14 * e * C * N
    if on_cpu and (drops or e == 2):  # CPUAttention keeps its scores, up to each chunk's last key, and a mask of them
        scores = sum((stop - start) * stop for start, stop in CPUAttention.query_chunks(T))
        kept += e * config.n_head * setup.batch_size * scores * (1 + drops)
    else:
        kept += 4 * config.n_head * N  # the kernel keeps a logsumexp a row
    if drops:
        kept += 2 * (e if on_cpu else 1) * C * N  # the masks of both outputs
    return kept


def largest_batch_size(config, parameters, setup, capacity):
    """The largest batch_size whose memory() is at most `capacity` bytes; 0 where none is."""

    def needed(batch_size):
        return sum(memory(config, parameters, setup._replace(batch_size=batch_size)).values())

    return bisect.bisect_right(range(1, 1 << 20), capacity, key=needed)


# ---- time ------------------------------------------------------------------------------------------------------------


def recompute_flops(config):
    """FLOPs a token that recompute adds: each block's forward pass, up to the last tensor that backward needs.

    The MLP's second product is not needed again unless its output is dropped out.
    """
    products = 12 if config.dropout > 0 else 8
    return config.n_layer * (2 * products * config.n_embd**2 + 4 * config.n_embd * config.block_size)


def iteration_seconds(model, tokens, peak_flops, mfu, recompute):
    """Seconds of an iteration in which a device trains on `tokens`: its FLOPs over mfu * peak_flops. MFU counts the
    model's own FLOPs; what recompute adds takes time besides."""
    flops = model.flops_per_token() + recompute * recompute_flops(model.config)
    return tokens * flops / (peak_flops * mfu)
