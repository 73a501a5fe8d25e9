"""Trains a GPT on a stream of tokens.

    python train.py config/train_shakespeare_char.py --log_interval=1
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Settings come from config files and --key=value arguments, later ones winning.
"""

import math
import os
import sys
import time
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP

import checkpoint as ckpt
from configurator import (
    ROOT, Clock, Processes, Progress, UserError, adopt, at_least, configure, find_peak_flops, from_here, keep_memory,
    needed_for, one_of, peak_memory, pick_backend, pick_compile, pick_device, pick_dtype, pick_threads, setting_names,
    share_evenly, usable_cores,
)  # fmt: skip
from data.bins import check_bin, check_ids, check_size, open_bin
from data.tokens import find_meta
from model import LARGE_VOCABULARY, GPT, GPTConfig

# ----------------------------------------------------------------------------------------------
# settings: the defaults train a GPT-2 (124M) on OpenWebText

# where to, how often
out_dir = "out"  # checkpoints and the log go here
eval_interval = 2000  # iterations from one evaluation to the next
log_interval = 1  # iterations from one printed line to the next
eval_iters = 200  # batches of each split in an evaluation
eval_only = False  # evaluate once, print, and end; nothing is written
always_save_checkpoint = True  # save ckpt.pt at every evaluation, not only at the best so far
save_interval = 0  # iterations from one last.pt to the next; 0: at each evaluation that wrote no ckpt.pt
init_from = "scratch"  # scratch, resume, auto (resume where there is a run, else scratch), gpt2*, or a GPT-2 folder
# beside the printed lines and log.csv
tensorboard_log = False  # log to TensorBoard too, in out_dir/tensorboard
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
optimizer = "adamw"  # adamw, or muon for the blocks' matrices and adamw for the rest
learning_rate = 6e-4  # the highest
max_iters = 600000  # the last iteration
weight_decay = 1e-1  # on matrices and embeddings
beta1 = 0.9  # AdamW's, and Muon's momentum
beta2 = 0.95  # AdamW's
grad_clip = 1.0  # the gradient norm's upper bound; 0: none
max_nonfinite = 10  # iterations in a row whose loss or gradient is not finite, before the run stops
# the learning rate's course
decay_lr = True  # cosine decay after the warm-up; False: constant
warmup_iters = 2000  # iterations of linear warm-up
lr_decay_iters = 600000  # where the decay ends, about max_iters
min_lr = 6e-5  # what it ends at, about learning_rate / 10
# the machine
backend = "auto"  # the collectives under torchrun: nccl on CUDA, else gloo
sharding = "ddp"  # ddp: each process has the whole model; fsdp: a share of weights, gradients and optimizer state
device = "auto"  # cuda, cuda:N, mps or cpu
dtype = "auto"  # float32, bfloat16 or float16 (which scales the loss)
compile = "auto"  # torch.compile the model
peak_flops = 0.0  # what the device could do a second, for MFU; 0: look it up or measure it
seed = 1337  # of every random draw; process r takes seed + r

settings = setting_names(globals())
given = configure(globals())

# ----------------------------------------------------------------------------------------------
# this process, its device, and the others

processes = Processes()
rank, world_size = processes.rank, processes.world_size


def say(line):
    """Prints on one process, and at once, so that a log file shows where the run is."""
    if rank == 0:
        print(line, flush=True)


device = pick_device(device)
backend = pick_backend(backend, device)
if processes.several and device == "mps":
    raise UserError("several processes work on CUDA devices and CPUs, not on mps: add --device=cpu")
if processes.several and device.startswith("cuda"):
    if processes.local_world_size > torch.cuda.device_count():
        raise UserError(f"{processes.local_world_size} processes for {torch.cuda.device_count()} GPUs on a machine")
    device = f"cuda:{processes.local_rank}"
device_type = torch.device(device).type
if device_type == "cuda":
    torch.cuda.set_device(torch.device(device).index or 0)  # which takes no bare "cuda"
if device_type == "cpu":
    keep_memory()
    torch.set_num_threads(pick_threads(os.environ.get("OMP_NUM_THREADS"), processes.local_world_size, usable_cores()))
if init_from not in ("resume", "auto"):  # those may bring another number
    share_evenly(gradient_accumulation_steps, world_size)  # before they meet, so that each can say no by itself
processes.join(backend)

# ----------------------------------------------------------------------------------------------
# where to start from: nothing, a run's checkpoint, or GPT-2

# Before anything is read there, lest it be another run's. A new folder is made once all else is in order.
lock = ckpt.claim(out_dir) if rank == 0 and not eval_only and ckpt.has_lock(out_dir) else None
# torchrun starts a group anew with the same command when a worker is gone: it goes on from what it has saved itself,
# not from what an earlier run had left there. The count is each machine's own.
restarted = processes.largest(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)))
run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # torchrun's "none" names no run
has_run = processes.largest(int(rank == 0 and ckpt.has_run(out_dir)))
may_go_on = rank == 0 and not eval_only and (restarted or run_id != "none")
if processes.largest(int(may_go_on and ckpt.peek(out_dir).get("run_id") == run_id)):
    init_from = "resume"
elif init_from == "auto":
    init_from = "resume" if has_run else "scratch"
saved = {}
if init_from == "resume":
    saved, saved_path, remarks = ckpt.load_run(out_dir)
    # The run's settings are the checkpoint's; where it runs, and what for, are this command's.
    here = {"device", "backend", "sharding", "dtype", "compile", "peak_flops", "out_dir", "init_from", "eval_only"}
    remarks += adopt(globals(), [name for name in settings if name not in here], saved["config"], given)
    machine = saved.get("machine", {})
    if machine.get("device_type") == device_type:  # the numbers keep their kind
        dtype = given.get("dtype", machine["dtype"])
        compile = given.get("compile", machine["compile"])
    elif machine:
        remarks.append(f"the run was on {machine['device_type']}: dtype and compile are chosen anew for {device_type}")
pretrained = init_from not in ("scratch", "resume") and (init_from.startswith("gpt2") or os.path.isdir(init_from))
if not (pretrained or init_from in ("scratch", "resume")):
    raise UserError(f"--init_from={init_from}: takes scratch, resume, auto, a gpt2 name or a GPT-2 folder")

at_least(1, globals(), "eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size")
at_least(1, globals(), "max_nonfinite")
at_least(0, globals(), "max_iters warmup_iters save_interval seed learning_rate min_lr weight_decay grad_clip")
at_least(0, globals(), "peak_flops lr_decay_iters")
for name in ("beta1", "beta2", "dropout"):
    if not 0 <= globals()[name] < 1:
        raise UserError(f"--{name}={globals()[name]}: must be at least 0 and below 1")
if not out_dir:
    raise UserError("--out_dir= is empty: give the folder to write to")
one_of(globals(), optimizer=("adamw", "muon"), sharding=("ddp", "fsdp"))
micro_steps = share_evenly(gradient_accumulation_steps, world_size)
tokens_per_iter = micro_steps * world_size * batch_size * block_size
dtype = pick_dtype(dtype, device)
compile, remark = pick_compile(compile, device)
if remark:
    say(remark)
if sharding == "fsdp" and (optimizer == "muon" or dtype == "float16" or not processes.several):
    raise UserError("--sharding=fsdp works under torchrun, with --optimizer=adamw, and not with --dtype=float16")
data_dir = os.path.join(ROOT, "data", dataset)
bins = {split: os.path.join(data_dir, f"{split}.bin") for split in ("train", "val")}
for path in bins.values():  # before gigabytes of weights are fetched
    check_size(path, block_size, dataset)
if rank == 0 and not eval_only:
    needed_for(wandb_log, "wandb", "--wandb_log=True")
    needed_for(tensorboard_log, "tensorboard", "--tensorboard_log=True")
torch.set_float32_matmul_precision("high" if device_type == "cuda" else "highest")  # TF32 where CUDA has it
torch.manual_seed(seed + rank)

# ----------------------------------------------------------------------------------------------
# the model

say(f"tokens per iteration will be: {tokens_per_iter:,}")
meta = find_meta(data_dir)
if meta:
    say(f"found vocab_size = {meta['vocab_size']} (inside {os.path.join('data', dataset, 'meta.pkl')})")
iter_num, best_iter, best_val_loss = 0, 0, math.inf
tokens_seen, seconds_before, running_mfu, wandb_id = 0, 0.0, None, None
if saved:
    say(f"Resuming training from {out_dir}")
    for remark in remarks:
        say(remark)
    model = ckpt.build_model(saved, saved_path, dropout)
    iter_num, best_val_loss = saved["iter_num"], float(saved.get("best_val_loss", math.inf))
    best_iter, tokens_seen = saved.get("best_iter", iter_num), saved.get("tokens_seen", iter_num * tokens_per_iter)
    seconds_before, wandb_id = saved.get("seconds", 0.0), saved.get("wandb_id")
elif pretrained:
    say(f"Initializing from GPT-2 weights: {init_from}")
    model = GPT.from_pretrained(init_from, dropout)
else:
    say("Initializing a new model from scratch")
    if not meta:
        say("no meta.pkl beside the data: vocab_size = 50304, GPT-2's 50257 rounded up for speed")
    model = GPT(GPTConfig(block_size, meta["vocab_size"] if meta else 50304, n_layer, n_head, n_embd, dropout, bias))
if block_size != model.config.block_size:
    model.crop_block_size(block_size)
for name in ("n_layer", "n_head", "n_embd", "bias"):
    if name in given and given[name] != getattr(model.config, name):
        there = f"the model of --init_from={init_from} has {getattr(model.config, name)}"
        raise UserError(f"--{name}={given[name]}: {there}")
    globals()[name] = getattr(model.config, name)
vocab_size = model.config.vocab_size
if pretrained and meta and meta["vocab_size"] != vocab_size:
    say(f"{dataset} has {meta['vocab_size']} tokens, its own, and {init_from} {vocab_size}: what that knows is lost")
config = {name: globals()[name] for name in settings}
say(f"number of parameters: {model.get_num_params() / 1e6:.2f}M")

# ----------------------------------------------------------------------------------------------
# data

fingerprints = {split: check_bin(path, block_size, vocab_size, dataset) for split, path in bins.items()}
if saved and dataset == saved["config"].get("dataset") and saved.get("data", fingerprints) != fingerprints:
    raise UserError(f"{data_dir} is not the data this run was trained on: prepare it as it was, or start from scratch")
if saved and iter_num > max_iters and not eval_only:
    say(f"the run has reached max_iters = {max_iters}: nothing is left to do (a larger --max_iters= goes on)")
    processes.leave()
    sys.exit(0)
batches = torch.Generator()  # the batches' own: their order hangs on the seed alone, not on dropout or device
batches.set_state(torch.get_rng_state())


def get_batch(split):
    """(x, y), each (B, T) int64 on the device: random windows of the split's tokens, and each token's next."""
    tokens = open_bin(bins[split])
    start = torch.randint(len(tokens) - block_size, (batch_size,), generator=batches).numpy()
    window = tokens[start[:, None] + np.arange(block_size + 1)]  # (B, T + 1), in one gather
    check_ids(window, vocab_size, bins[split], start)
    window = torch.from_numpy(window)
    if device_type == "cuda":  # two bytes a token, pinned, so that the host need not wait for the copy
        window = window.pin_memory().to(device, non_blocking=True).long()
    else:
        window = window.long().to(device)
    return window[:, :-1].contiguous(), window[:, 1:].contiguous()


# ----------------------------------------------------------------------------------------------
# the model on its device, its optimizer, and the run's folder

model.to(device)
if sharding == "fsdp":
    from torch.distributed.device_mesh import init_device_mesh  # half a second, which the other runs save
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device_type, (world_size,))  # without it torch takes the GPU it was built for
    for parameter in model.parameters():  # each process drew other weights: all take rank 0's
        dist.broadcast(parameter.data, src=0)
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
optim = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
if saved:
    ckpt.restore_optimizer(optim, saved.get("optimizer"), saved_path)
    if scaler.is_enabled() and saved.get("scaler"):
        scaler.load_state_dict(saved["scaler"])
# Fused AdamW can be told to leave weights and moments alone without the host's knowing. The others wait to know.
skips_by_itself = optimizer == "adamw" and sharding == "ddp"

peak, peak_source = find_peak_flops(peak_flops, device, dtype) if rank == 0 else (1.0, "")
processes.wait()  # rank 0 measures alone
tflops = format(peak / 1e12, ".1f" if peak > 1e13 else ".4g")
say(
    f"{world_size} x {device}, {torch.get_num_threads()} CPU threads each, {dtype}, compile {compile}, {optimizer}, "
    f"{sharding if processes.several else 'one process'}; peak {tflops} TFLOPS ({peak_source})"
    f"{'; mfu is per device, tokens/s over all' if processes.several else ''}"
)
autocast = torch.amp.autocast(device_type, getattr(torch, dtype), enabled=dtype != "float32")
# a training step takes each weight once: what was cast need not stay
autocast_step = torch.amp.autocast(device_type, getattr(torch, dtype), dtype != "float32", cache_enabled=False)
# CUDA graphs launch an iteration's kernels at once: for a model too small to keep a GPU busy between launches, and one
# micro-step, since gradients that a second one adds to would lie in the memory that its own graph writes.
small = not processes.several and micro_steps == 1 and model.get_num_params() * batch_size * block_size < 5e11
mode = "reduce-overhead" if device_type == "cuda" and small else None
eval_model = train_model = torch.compile(model, mode=mode) if compile else model
if processes.several and sharding == "ddp":
    gpu = [device] if device_type == "cuda" else None
    train_model = DDP(eval_model, device_ids=gpu, gradient_as_bucket_view=True)  # not each gradient twice
# An evaluation of a small model takes several batches in one pass: one by one they keep no device busy.
alone = compile or processes.several or vocab_size >= LARGE_VOCABULARY  # one more shape to compile, or large logits
eval_together = 1 if alone else max(1, 4096 // (batch_size * block_size))
log = None
if rank == 0 and not eval_only:
    lock = lock or ckpt.claim(out_dir)
    ckpt.sweep(out_dir)
    moved = None if saved else ckpt.move_aside(out_dir)
    if moved:
        say(f"an earlier run's files were in {out_dir}: moved to {moved}")


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
        losses = torch.zeros(math.ceil(eval_iters / world_size) * world_size, device=device)
        with autocast:  # around all of them: not compiled, it casts each weight once
            for k in range(rank, len(losses), world_size * eval_together):
                if processes.asked_to_stop():
                    return None
                some = losses[k : k + eval_together]
                x, y = map(torch.cat, zip(*(get_batch(split) for _ in some), strict=True))
                some.fill_(eval_model(x, y)[1])
        if processes.several:
            dist.all_reduce(losses)
        mean[split] = losses[:eval_iters].mean().item()
    model.train()
    return mean


def resume_point(evaluated):
    """Where a run that goes on from here goes on: what the next draws hang on, and whether the evaluation is done."""
    return {"generators": ckpt.generator_states(device, batches), "batch": (x, y), "evaluated": evaluated}


def save(name, point):
    """Writes the run as it stands at `point` to out_dir/name; every process calls it.

    Weights whose gradients, val loss or next loss are not finite are not written: what lies there is better."""
    model.eval()  # without dropout, and so without a random draw
    with torch.no_grad(), autocast:
        next_loss = eval_model(*point["batch"])[1]
    model.train()
    spared = int(skipped_in_row) and not scaler.is_enabled()  # float16's scaler skips a step now and then
    if processes.largest(int(spared or not healthy or not torch.isfinite(next_loss))):
        say(f"{name} is not written: the loss or its gradient is not finite")
        return
    points = processes.gather({**point, "batch": [tokens.cpu() for tokens in point["batch"]]})
    weights, moments = (ckpt.whole(part.state_dict(), keep=rank == 0) for part in (model, optim))
    if rank == 0:
        nanogpt = {"model": weights, "optimizer": moments, "model_args": ckpt.model_args(model.config)}
        nanogpt |= {"iter_num": iter_num, "best_val_loss": best_val_loss, "config": config}
        ours = {"points": points, "scaler": scaler.state_dict(), "best_iter": best_iter}
        ours |= {"tokens_seen": tokens_seen, "seconds": seconds_before + time.time() - began, "wandb_id": wandb_id}
        ours |= {"machine": {"device_type": device_type, "dtype": dtype, "compile": compile}, "run_id": run_id}
        ours |= {"meta": meta, "data": fingerprints}
        ckpt.save(nanogpt | ours, os.path.join(out_dir, name))
    processes.wait()


# ----------------------------------------------------------------------------------------------
# the training loop

clock, began = Clock(device), time.time()
processes.listen()  # from here on SIGTERM and SIGINT end the run between micro-steps
x, y = get_batch("train")  # (B, T); each next batch is fetched while the device computes
evaluated = False
if "points" in saved:
    if len(saved["points"]) != world_size:
        say(f"the run had {len(saved['points'])} processes and has {world_size} now: from here on other batches come")
        batches.manual_seed(seed + rank + 1_000_003 * iter_num)
        x, y = get_batch("train")
    else:
        point = saved["points"][rank]
        ckpt.restore_generators(point["generators"], device, batches)
        evaluated = point["evaluated"]
        if point["batch"][0].shape == x.shape and dataset == saved["config"].get("dataset"):
            x, y = (tokens.to(device) for tokens in point["batch"])
saved = None  # a checkpoint is as large as the model and its optimizer
if rank == 0 and not eval_only:
    log = ckpt.RunLog(out_dir, iter_num, evaluated)
    if tensorboard_log:
        log.add_tensorboard(out_dir, iter_num)
    if wandb_log:
        wandb_id = log.add_wandb(out_dir, wandb_project, wandb_run_name, config, wandb_id)
skipped_in_row = torch.zeros((), dtype=torch.int64, device=device)  # steps not taken, as the weights were spared
skipped_since = torch.zeros_like(skipped_in_row)  # ... since that was last said
healthy, iters_here, saved_at = True, 0, iter_num
last_mark, progress = clock.mark(), Progress(max_iters, tokens_per_iter)

while iter_num <= max_iters or eval_only:
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for group in optim.param_groups:
        group["lr"] = lr

    point = resume_point(evaluated)
    if eval_only or (iter_num % eval_interval == 0 and not evaluated):
        losses = estimate_loss()
        if losses is None:
            break
        say(f"step {iter_num}: train loss {losses['train']:.4f}, val loss {losses['val']:.4f}")
        if eval_only:
            break
        point = resume_point(evaluated=True)
        healthy = math.isfinite(losses["val"])
        better = losses["val"] < best_val_loss
        if better:
            best_val_loss, best_iter = losses["val"], iter_num
        line = progress.line(iter_num)
        if log:  # before the checkpoint, which has this evaluation behind it
            log.write(iter=iter_num, kind="eval", train_loss=losses["train"], val_loss=losses["val"], lr=lr,
                      tokens_per_s=progress.rate, tokens_seen=tokens_seen)  # fmt: skip
        if (better or (always_save_checkpoint and healthy)) and iter_num > 0:
            say(f"saving checkpoint to {out_dir}")
            save("ckpt.pt", point)
            saved_at = iter_num
        say(line)
    evaluated = False
    if iter_num % (save_interval or eval_interval) == 0 and saved_at != iter_num:
        save("last.pt", point)
        saved_at = iter_num

    for micro_step in range(micro_steps):
        if asked := processes.asked_to_stop():
            break
        last = micro_step == micro_steps - 1
        if sharding == "fsdp":  # gradients are exchanged once an iteration, with the last micro-step's backward
            model.set_requires_gradient_sync(last)
        elif processes.several:
            train_model.require_backward_grad_sync = last
        with autocast_step:
            loss = train_model(x, y)[1] / micro_steps
        x, y = get_batch("train")
        scaler.scale(loss).backward()
    if asked:
        break

    # A gradient that is not finite, as after a loss that is not, must not reach the weights.
    scaler.unscale_(optim)
    grad_norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    if grad_clip > 0:
        torch.nn.utils.clip_grads_with_norm_(model.parameters(), grad_clip, grad_norm)
    grad_norm = ckpt.whole(grad_norm)
    nonfinite = ~torch.isfinite(grad_norm)
    if skips_by_itself and not scaler.is_enabled():
        optim.found_inf = nonfinite.float()
    if skips_by_itself or scaler.is_enabled() or not nonfinite:
        scaler.step(optim)
    scaler.update()
    optim.zero_grad(set_to_none=True)
    skipped_in_row = (skipped_in_row + 1) * nonfinite
    skipped_since += nonfinite

    now = clock.mark()
    tokens_seen += tokens_per_iter
    if iter_num % log_interval == 0 or device_type == "cpu":  # a CPU has nothing to wait for
        if int(skipped_since):
            say(f"iter {iter_num}: {int(skipped_since)} steps skipped, their gradients were not finite")
            skipped_since.zero_()
        if int(skipped_in_row) >= max_nonfinite:
            raise UserError(
                f"iteration {iter_num}: the loss or its gradient was not finite {int(skipped_in_row)} times in a row; "
                f"the last good checkpoint is {ckpt.newest(out_dir)}; "
                "try a lower --learning_rate, --grad_clip=1.0, or --dtype=bfloat16 or float32"
            )
    if iter_num % log_interval == 0:
        dt = clock.seconds(last_mark, now)
        if iters_here >= 5:  # the first ones compile, allocate and warm up
            mfu = model.estimate_mfu(batch_size * micro_steps, dt, peak)
            running_mfu = mfu if running_mfu is None else 0.9 * running_mfu + 0.1 * mfu
        shown = f"{running_mfu * 100:.2f}%" if iters_here >= 5 else "n/a"
        lossf = loss.item() * micro_steps
        say(f"iter {iter_num}: loss {lossf:.4f}, time {dt * 1000:.2f}ms, mfu {shown}")
        if log:
            log.write(iter=iter_num, kind="train", train_loss=lossf, lr=lr, grad_norm=grad_norm.item(), ms=dt * 1000,
                      tokens_per_s=tokens_per_iter / dt, mfu=running_mfu, tokens_seen=tokens_seen)  # fmt: skip
    last_mark = now
    iter_num += 1
    iters_here += 1

# ----------------------------------------------------------------------------------------------
# the end: of the run, or of this process's part in it

finished = iter_num > max_iters and not eval_only
if not eval_only:
    save("last.pt", resume_point(evaluated=False) if finished else point)
    if not finished:
        how = f"; type: python {from_here('train.py')} --init_from=resume --out_dir={out_dir}" * ckpt.has_run(out_dir)
        say(f"stopped at iteration {iter_num}; the checkpoint to go on from is {ckpt.newest(out_dir)}{how}")
if finished:
    wall = timedelta(seconds=round(seconds_before + time.time() - began))
    say(f"best val loss {best_val_loss:.4f} at iteration {best_iter}, {tokens_seen:,} tokens seen, {wall} in all, "
        f"at most {peak_memory(device)}")  # fmt: skip
    say(f"to see what it writes: python {from_here('sample.py')} --out_dir={out_dir}")
    say(f"to see the curves: python {from_here('plot.py')} {out_dir}")
# gloo aborts at exit where these outlive the process group
train_model = eval_model = model = optim = block = parameter = None
processes.leave()
