"""Trains a GPT on a stream of tokens.

    python train.py config/train_shakespeare_char.py --log_interval=1
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Settings come from config files and --key=value arguments, later ones winning.
"""

import gc
import math
import os
import signal
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint as ckpt
from configurator import (
    ROOT, UserError, adopt, at_least, configure, find_peak_flops, keep_memory, pick_backend, pick_compile, pick_device, pick_dtype,
    pick_threads, setting_names, usable_cores,
)  # fmt: skip
from data.bins import check_bin, check_ids, fingerprint, open_bin
from data.tokens import read_meta
from model import GPT, GPTConfig

# ----------------------------------------------------------------------------------------------
# settings: the defaults train a GPT-2 (124M) on OpenWebText

# where to, how often
out_dir = "out"  # checkpoints and the log go here
eval_interval = 2000  # iterations from one evaluation to the next
log_interval = 1  # iterations from one printed line to the next
eval_iters = 200  # batches of each split in an evaluation
eval_only = False  # evaluate once, print, and end; nothing is written
always_save_checkpoint = True  # save ckpt.pt at every evaluation, not only at the best so far
save_interval = 0  # iterations from one last.pt to the next; 0: at every evaluation
init_from = "scratch"  # scratch, resume, auto (resume where there is a run, else scratch), or a gpt2 name
# wandb
wandb_log = False  # log to Weights & Biases too
wandb_project = "owt"  # its project there
wandb_run_name = "gpt2"  # its name there
# data
dataset = "openwebtext"  # the folder under data/
gradient_accumulation_steps = 5 * 8  # micro-batches an iteration, over all processes
batch_size = 12  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence: the context's length
# model
n_layer = 12  # transformer blocks
n_head = 12  # attention heads a block
n_embd = 768  # channels
dropout = 0.0  # for pretraining 0 is good, for small data and finetuning 0.1 and more
bias = False  # biases in Linear and LayerNorm
# optimizer
learning_rate = 6e-4  # the highest
max_iters = 600000  # the last iteration
weight_decay = 1e-1  # on matrices and embeddings
beta1 = 0.9  # AdamW's
beta2 = 0.95  # AdamW's
grad_clip = 1.0  # the gradient norm's upper bound; 0: none
max_nonfinite = 10  # iterations in a row whose loss or gradient is not finite, before the run stops
# the learning rate's course
decay_lr = True  # cosine decay after the warm-up; False: constant
warmup_iters = 2000  # iterations of linear warm-up
lr_decay_iters = 600000  # where the decay ends, about max_iters
min_lr = 6e-5  # where the decay ends, about learning_rate / 10
# the machine
backend = "auto"  # the collectives under torchrun: nccl on CUDA, else gloo
device = "auto"  # cuda, cuda:N, mps or cpu
dtype = "auto"  # float32, bfloat16 or float16 (which scales the loss)
compile = "auto"  # torch.compile the model
peak_flops = 0.0  # what the device could do a second, for MFU; 0: look it up or measure it
seed = 1337  # of every random draw; process r takes seed + r

settings = setting_names(globals())
given = configure(globals())

# ----------------------------------------------------------------------------------------------
# this process among the others (torchrun sets these), and its device

distributed = "RANK" in os.environ
rank = int(os.environ.get("RANK", 0))
local_rank = int(os.environ.get("LOCAL_RANK", 0))
world_size = int(os.environ.get("WORLD_SIZE", 1))
local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def say(line):
    """Prints on one process, and at once, so that a log file shows where the run is."""
    if rank == 0:
        print(line, flush=True)


device = pick_device(device)
backend = pick_backend(backend, device)
if device == "cuda" and distributed:
    if local_world_size > torch.cuda.device_count():
        raise UserError(f"{local_world_size} processes on a machine with {torch.cuda.device_count()} GPUs")
    device = f"cuda:{local_rank}"
device_type = torch.device(device).type
if device_type == "cuda":
    torch.cuda.set_device(device)
if device_type == "cpu":
    keep_memory()
    torch.set_num_threads(pick_threads(os.environ.get("OMP_NUM_THREADS"), local_world_size, usable_cores()))
if distributed:
    dist.init_process_group(backend)
    # What the hosts agree on travels beside the gradients, and may wait for a long save.
    hosts = dist.new_group(backend="gloo", timeout=timedelta(days=1))

# ----------------------------------------------------------------------------------------------
# where to start from: nothing, or a run's checkpoint

if init_from == "auto":
    init_from = "resume" if ckpt.has_run(out_dir) else "scratch"
if init_from.startswith("gpt2"):
    raise UserError(f"--init_from={init_from}: GPT-2's weights cannot be loaded yet")
if init_from not in ("scratch", "resume"):
    raise UserError(f"--init_from={init_from}: takes scratch, resume, auto or a gpt2 name")
saved = {}
if init_from == "resume":
    saved, saved_path, remarks = ckpt.load_run(out_dir)
    # The run's settings are the checkpoint's; where it runs, and what for, are this command's.
    here = {"device", "backend", "dtype", "compile", "peak_flops", "out_dir", "init_from", "eval_only"}
    remarks += adopt(globals(), [name for name in settings if name not in here], saved["config"], given)
    machine = saved.get("machine", {})
    if machine.get("device_type") == device_type:  # the numbers keep their kind
        dtype = given.get("dtype", machine["dtype"])
        compile = given.get("compile", machine["compile"])
    elif machine:
        remarks.append(f"the run was on {machine['device_type']}: dtype and compile are chosen anew for {device_type}")

at_least(1, globals(), "eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size")
at_least(0, globals(), "max_iters warmup_iters save_interval seed learning_rate min_lr weight_decay grad_clip peak_flops")
micro_steps, remainder = divmod(gradient_accumulation_steps, world_size)
if remainder:
    raise UserError(f"--gradient_accumulation_steps={gradient_accumulation_steps} cannot be shared by {world_size} processes")
config = {name: globals()[name] for name in settings}
dtype = pick_dtype(dtype, device)
compile = pick_compile(compile, device)
torch.set_float32_matmul_precision("high" if device_type == "cuda" else "highest")  # TF32 where CUDA has it
torch.manual_seed(seed + rank)

# ----------------------------------------------------------------------------------------------
# data

data_dir = os.path.join(ROOT, "data", dataset)
bins = {split: os.path.join(data_dir, f"{split}.bin") for split in ("train", "val")}
meta_path = os.path.join(data_dir, "meta.pkl")
meta = read_meta(meta_path) if os.path.exists(meta_path) else None
vocab_size = saved["model_args"]["vocab_size"] if saved else meta["vocab_size"] if meta else 50304
for path in bins.values():
    check_bin(path, block_size, vocab_size, dataset)
fingerprints = {split: fingerprint(path) for split, path in bins.items()}
if saved and dataset == saved["config"].get("dataset") and saved.get("data", fingerprints) != fingerprints:
    raise UserError(f"the data in {data_dir} is not what this run was trained on: prepare it as it was, or start from scratch")


def get_batch(split):
    """(x, y), each (batch_size, block_size) int64 on the device: windows of the split's tokens, and each token's next."""
    tokens = open_bin(bins[split])
    start = torch.randint(len(tokens) - block_size, (batch_size,), generator=batches).numpy()
    window = tokens[start[:, None] + np.arange(block_size + 1)]  # (B, T + 1), in one gather
    check_ids(window, vocab_size, bins[split], start)
    window = torch.from_numpy(window)
    if device_type == "cuda":  # two bytes a token, pinned, so that the copy overlaps with the computation
        window = window.pin_memory().to(device, non_blocking=True).long()
    else:
        window = window.long().to(device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------
# the model, the optimizer, and the run's state

tokens_per_iter = micro_steps * world_size * batch_size * block_size
say(f"tokens per iteration will be: {tokens_per_iter:,}")
if meta:
    say(f"found vocab_size = {meta['vocab_size']} (inside {os.path.join('data', dataset, 'meta.pkl')})")
iter_num, best_val_loss, running_mfu = 0, math.inf, None
if saved:
    say(f"Resuming training from {out_dir}")
    for remark in remarks:
        say(remark)
    model = ckpt.build_model(saved, saved_path, dropout)
    iter_num, best_val_loss = saved["iter_num"], float(saved.get("best_val_loss", math.inf))
    running_mfu = saved.get("running_mfu")
else:
    say("Initializing a new model from scratch")
    if not meta:
        say("no meta.pkl beside the data: vocab_size = 50304, GPT-2's 50257 rounded up for speed")
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, bias))
if block_size < model.config.block_size:
    model.crop_block_size(block_size)
say(f"number of parameters: {model.get_num_params() / 1e6:.2f}M")
if saved and iter_num > max_iters and not eval_only:
    say(f"the run has reached max_iters = {max_iters}: nothing is left to do (a larger --max_iters= goes on)")
    sys.exit(0)
model.to(device)

optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
batches = torch.Generator()  # the batches' own: their order hangs on the seed alone, not on dropout or device
batches.set_state(torch.get_rng_state())
if saved:
    ckpt.restore_optimizer(optimizer, saved["optimizer"], saved_path)
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])

lock = None
if rank == 0 and not eval_only:
    lock = ckpt.claim(out_dir)
    moved = None if saved else ckpt.move_aside(out_dir)
    if moved:
        say(f"an earlier run's files were in {out_dir}: moved to {moved}")

peak, peak_source = find_peak_flops(peak_flops, device, dtype)
say(f"on {device}, {dtype}, compile {compile}, {torch.get_num_threads()} CPU threads; "
    f"peak {peak / 1e12:.4g} TFLOPS ({peak_source})")  # fmt: skip

autocast = torch.amp.autocast(device_type, getattr(torch, dtype), enabled=dtype != "float32")
eval_model = train_model = torch.compile(model) if compile else model
if distributed:
    train_model = DDP(eval_model, device_ids=[local_rank] if device_type == "cuda" else None)


# ----------------------------------------------------------------------------------------------
# what the loop calls


def get_lr(it):
    """The learning rate of iteration `it`: a linear warm-up, then a cosine down to min_lr."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    progress = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)  # 0 to 1
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (learning_rate - min_lr)


@torch.no_grad()
def estimate_loss():
    """{split: mean loss over eval_iters batches}, shared out over the processes; None once asked to stop."""
    model.eval()
    mean = {}
    for split in ("train", "val"):
        losses = torch.zeros(eval_iters, device=device)
        for k in range(0, eval_iters, world_size):
            if stopping():
                return None
            if k + rank < eval_iters:
                x, y = get_batch(split)
                with autocast:
                    losses[k + rank] = eval_model(x, y)[1]
        if distributed:
            dist.all_reduce(losses)
        mean[split] = losses.mean().item()
    model.train()
    return mean


def request_stop(number, frame):
    """Handles SIGTERM and SIGINT: the loop looks at stop_signal. A second SIGINT stops at once."""
    global stop_signal
    if number == signal.SIGINT and stop_signal:
        raise KeyboardInterrupt
    stop_signal = number


def stopping():
    """The signal on which to stop, or 0.

    Among several processes each call starts an exchange that the next call reads, so that all of
    them stop at the same call, and none waits for the network.
    """
    global exchange
    if not distributed:
        return stop_signal
    agreed = 0
    if exchange:
        exchange[1].wait()
        agreed = exchange[0].item()
    flag = torch.tensor(stop_signal)
    exchange = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=hosts, async_op=True)
    return agreed


def resume_point(evaluated):
    """Where a run that goes on from here goes on: what the next draws hang on, and whether the evaluation is done."""
    return {"generators": ckpt.generator_states(device, batches), "batch": (x, y), "evaluated": evaluated}


def save(name, point):
    """Writes the run as it stands at `point` to out_dir/name; every process calls it.

    Weights whose gradients or val loss are not finite are not written: what lies there is better."""
    if int(skipped_in_row) or not healthy:
        return say(f"{name} is not written: the loss or its gradient is not finite")
    points = [point]
    if distributed:
        points = [None] * world_size if rank == 0 else None
        dist.gather_object(point, points, group=hosts)
    if rank == 0:
        ckpt.save(
            {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "model_args": ckpt.model_args(model.config),
                "iter_num": iter_num,
                "best_val_loss": best_val_loss,
                "config": config,
                "machine": {"device_type": device_type, "dtype": dtype, "compile": compile},
                "points": points,
                "scaler": scaler.state_dict(),
                "running_mfu": running_mfu,
                "meta": meta,
                "data": fingerprints,
            },
            os.path.join(out_dir, name),
        )
    if distributed:
        dist.barrier(hosts)


def mark():
    """The end of an iteration in the device's own time, without waiting for it."""
    if device_type == "cpu":
        return time.perf_counter()
    event = getattr(torch, device_type).Event(enable_timing=True)
    event.record()
    return event


def seconds_between(start, end):
    if device_type == "cpu":
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000


if wandb_log and rank == 0:
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb_log=True needs wandb: pip install wandb") from None
    wandb.init(project=wandb_project, name=wandb_run_name, config=config)

# ----------------------------------------------------------------------------------------------
# the training loop

stop_signal, exchange = 0, None
signal.signal(signal.SIGINT, request_stop)
signal.signal(signal.SIGTERM, request_stop)
x, y = get_batch("train")  # (B, T); each next batch is fetched while the device computes
evaluated = False
if "points" in saved:
    point = saved["points"][rank] if len(saved["points"]) == world_size else None
    if point is None:
        say(f"the run had {len(saved['points'])} processes and has {world_size} now: the batches are drawn anew")
    else:
        ckpt.restore_generators(point["generators"], device, batches)
        evaluated = point["evaluated"]
        if point["batch"][0].shape == x.shape and dataset == saved["config"]["dataset"]:
            x, y = (tokens.to(device) for tokens in point["batch"])
saved = point = None  # a checkpoint is as large as the model and its optimizer
skipped_in_row = torch.zeros((), dtype=torch.int64, device=device)  # steps not taken, as the weights were spared
skipped_since = torch.zeros_like(skipped_in_row)  # ... since that was last said
last_mark, iters_here, saved_at, healthy = mark(), 0, iter_num, True

while iter_num <= max_iters:
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in optimizer.param_groups:
        group["lr"] = lr

    point = resume_point(evaluated)
    if (iter_num % eval_interval == 0 or eval_only) and not evaluated:
        losses = estimate_loss()
        if losses is None:
            break
        say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if eval_only:
            break
        point = resume_point(evaluated=True)
        healthy = math.isfinite(losses["val"])
        better = losses["val"] < best_val_loss
        if better or always_save_checkpoint:
            best_val_loss = losses["val"] if better else best_val_loss
            if iter_num > 0:
                say(f"saving checkpoint to {out_dir}")
                save("ckpt.pt", point)
                saved_at = iter_num
    evaluated = False

    if iter_num % (save_interval or eval_interval) == 0 and iter_num > 0 and saved_at != iter_num:
        save("last.pt", point)
        saved_at = iter_num

    for micro_step in range(micro_steps):
        if asked := stopping():
            break
        if distributed:  # gradients are exchanged once an iteration, with the last micro-step's backward
            train_model.require_backward_grad_sync = micro_step == micro_steps - 1
        with autocast:
            loss = train_model(x, y)[1] / micro_steps
        x, y = get_batch("train")
        scaler.scale(loss).backward()
    if asked:
        break

    # A gradient that is not finite, as after a loss that is not, must not reach the weights: fused AdamW
    # leaves them and its moments alone where found_inf is set. Nothing here waits for the device.
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, grad_norm)
    nonfinite = ~torch.isfinite(grad_norm)
    if not scaler.is_enabled():
        optimizer.found_inf = nonfinite.float()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    skipped_in_row = (skipped_in_row + 1) * nonfinite
    skipped_since += nonfinite

    now = mark()
    if iter_num % log_interval == 0 or device_type == "cpu":  # a CPU has nothing to wait for
        if int(skipped_since):
            say(f"iter {iter_num}: {int(skipped_since)} steps skipped, their gradients were not finite")
            skipped_since.zero_()
        if int(skipped_in_row) >= max_nonfinite:
            good = next((n for n in ("last.pt", "ckpt.pt") if os.path.exists(os.path.join(out_dir, n))), None)
            raise UserError(
                f"iteration {iter_num}: {int(skipped_in_row)} steps in a row had a gradient that is not finite; "
                f"the last good checkpoint is {os.path.join(out_dir, good) if good else 'none: the run had not saved yet'}; "
                "try a lower --learning_rate, a --grad_clip=1.0, or --dtype=bfloat16 or float32"
            )
    if iter_num % log_interval == 0:
        dt = seconds_between(last_mark, now)
        if iters_here >= 5:  # the first ones compile, allocate and warm up
            mfu = model.estimate_mfu(batch_size * micro_steps, dt, peak)
            running_mfu = mfu if running_mfu is None else 0.9 * running_mfu + 0.1 * mfu
        shown = f"{running_mfu * 100:.2f}%" if iters_here >= 5 else "n/a"
        say(f"iter {iter_num}: loss {loss.item() * micro_steps:.4f}, time {dt * 1000:.2f}ms, mfu {shown}")
    last_mark = now
    iter_num += 1
    iters_here += 1

# ----------------------------------------------------------------------------------------------
# the end: of the run, or of this process's part in it

if not eval_only:
    finished = iter_num > max_iters
    save("last.pt", resume_point(evaluated=False) if finished else point)
    where = os.path.join(out_dir, "last.pt")
    if not finished:
        say(f"stopped at iteration {iter_num}: saved to {where}; --init_from=resume goes on from there")
if distributed:
    if exchange:
        exchange[1].wait()
    # gloo aborts at exit where a wrapped model outlives its process group
    train_model = eval_model = model = optimizer = None
    gc.collect()
    dist.destroy_process_group()
if stop_signal:
    sys.exit(128 + stop_signal)
