"""Trains a GPT on a stream of tokens.

    python train.py config/train_shakespeare_char.py --log_interval=1
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Settings come from config files and --key=value arguments; later ones win.
"""

import math

import numpy as np
import torch

from configurator import configure
from data.bins import check_ids, to_device
from data.dataset import Dataset
from data.order import Windows
from data.pretrained import Pretrained
from model import GPT, GPTConfig
from nanogpt import device as devices
from nanogpt import run_log
from nanogpt.cross_entropy import bits_per_byte
from nanogpt.distributed import Processes, share_evenly
from nanogpt.errors import UserError
from nanogpt.guard import StepGuard, clip_gradients
from nanogpt.mfu import Clock, RunningMFU
from nanogpt.optim import restore_optimizer, schedule_remark
from nanogpt.progress import Progress
from nanogpt.run_folder import RunFolder, resume_point
from nanogpt.sampling import ShortSamples

# ---- settings: the defaults train a GPT-2 (124M) on OpenWebText ----------------------
# output: where, and how often
out_dir = "out"  # checkpoints and the log go here
eval_interval = 2000  # iterations from one evaluation to the next
log_interval = 1  # iterations from one printed line to the next
eval_iters = 200  # batches of each split in an evaluation
eval_only = False  # evaluate once, print, and end; nothing is written
always_save_checkpoint = True  # save ckpt.pt at every evaluation, not only at the best so far
save_interval = 0  # iterations from one last.pt to the next; 0: eval_interval
patience = 0  # end after this many evaluations in a row without a better val loss; 0: never
max_seconds = 0.0  # end, evaluated and saved, after this time over all resumes; 0: never
sample_interval = 0  # iterations from one short sample, after an evaluation, to the next; 0: none
init_from = "scratch"  # scratch, resume, auto (resume, else scratch), a gpt2 name, or a model's folder
# loggers, in addition to the printed lines and log.csv
tensorboard_log = False  # log to TensorBoard too, in out_dir/tensorboard
wandb_log = False  # log to Weights & Biases too
wandb_project = "owt"  # W&B project
wandb_run_name = "gpt2"  # W&B run name
# data
dataset = "openwebtext"  # the folder under data/
order = "random"  # of the training windows: random, with repeats, or epoch, each once a pass
gradient_accumulation_steps = 5 * 8  # micro-batches per iteration, over all processes
batch_size = 12  # sequences in a micro-batch
block_size = 1024  # tokens in a sequence: the context's length
# model
n_layer = 12  # transformer blocks
n_head = 12  # attention heads per block
n_embd = 768  # channels
dropout = 0.0  # for pretraining 0 is good, for small data and finetuning 0.1 and more
bias = False  # biases in Linear and LayerNorm
recompute = False  # activation checkpointing: less memory, more time
# optimizer
optimizer = "adamw"  # adamw, or muon for the blocks' matrices and adamw for the rest
learning_rate = 6e-4  # peak learning rate
max_iters = 600000  # number of the last iteration; the first is 0
weight_decay = 1e-1  # on matrices and embeddings
beta1 = 0.9  # AdamW's beta1, and Muon's momentum
beta2 = 0.95  # AdamW's beta2
grad_clip = 1.0  # clip the gradient at this norm; 0: do not clip
max_nonfinite = 10  # stop after this many iterations in a row whose gradients are not finite
spike_sigma = 0.0  # skip steps whose loss or norm is this many deviations above the mean; 0: never
# learning rate schedule
decay_lr = True  # cosine decay after the warm-up; False: constant
warmup_iters = 2000  # iterations of linear warm-up
lr_decay_iters = 600000  # iteration at which the decay ends; should be about max_iters
min_lr = 6e-5  # learning rate after the decay; should be about learning_rate / 10
# the machine
backend = "auto"  # collectives under torchrun: nccl on CUDA, else gloo
sharding = "ddp"  # ddp: each process has the whole model; fsdp: a share of weights and moments
device = "auto"  # cuda, cuda:N, mps or cpu; auto: the first of these that there is
dtype = "auto"  # float32, bfloat16, or float16 with a loss scale; auto: bfloat16 where it is fast
compile = "auto"  # torch.compile the model; auto: only on CUDA
attention = "auto"  # its kernel: auto, flash, efficient or math; on a CPU auto or math
deterministic = False  # deterministic algorithms only: the same digits each time on a GPU; slower
peak_flops = 0.0  # the device's peak FLOPS, for MFU; 0: look it up or measure it
seed = 1337  # of all random generators; process r takes seed + r

settings = configure(globals())

# ---- this process, its device, and the other processes -------------------------------
processes = Processes()
rank, world_size = processes.rank, processes.world_size
say = processes.say  # prints lines on rank 0; skips None
device = processes.own_device(devices.pick_device(device))
device_type = devices.set_up(device, processes.local_world_size)
backend = processes.join(backend, device)

# ---- what to start from, and whether the settings fit together -----------------------
folder = RunFolder(out_dir, processes, read_only=eval_only)
init_from = folder.resolve(init_from)  # auto is decided; what torchrun restarts resumes
saved = folder.load() if init_from == "resume" else {}
# a resume keeps the saved settings that the command does not give: this rebinds the globals
folder.remarks += settings.adopt(folder.settings_of(saved, device_type))
settings.at_least(1, "eval_interval log_interval eval_iters batch_size block_size max_nonfinite")
settings.at_least(0, "max_iters warmup_iters lr_decay_iters learning_rate min_lr weight_decay")
settings.at_least(0, "grad_clip spike_sigma seed save_interval sample_interval patience max_seconds peak_flops")
settings.at_least(0, "beta1 beta2 dropout", below=1)
settings.one_of(optimizer=("adamw", "muon"), sharding=("ddp", "fsdp"), order=("random", "epoch"))
micro_steps = share_evenly(gradient_accumulation_steps, world_size)
dtype = devices.pick_dtype(dtype, device)
compile = devices.pick_compile(compile, device, say)
say(devices.emulation_remark(dtype, device))
devices.pick_attention(attention, device, dtype)
devices.set_deterministic(deterministic)
processes.check_sharding(sharding, optimizer, dtype)
corpus = Dataset(dataset, block_size)  # its bins, and what the ids in them stand for
run_log.check_loggers(folder, tensorboard_log, wandb_log)

# ---- the model -----------------------------------------------------------------------
torch.manual_seed(seed + rank)
tokens_per_iter = micro_steps * world_size * batch_size * block_size
say(f"tokens per iteration will be: {tokens_per_iter:,}", corpus.found_line)
if saved:
    folder.forget_other_data(saved, dataset)
    say(f"Resuming training from {out_dir}", *folder.remarks, corpus.resumed_remark(saved, folder.loaded_path))
    model = GPT.from_checkpoint(saved, folder.loaded_path, dropout)
elif init_from == "scratch":
    say("Initializing a new model from scratch", corpus.rounded_line)
    model = GPT(GPTConfig(block_size, corpus.tokens.model_vocab_size, n_layer, n_head, n_embd, dropout, bias))
else:
    pretrained = Pretrained.load(GPT, init_from, dropout=dropout)
    say(f"Initializing from {pretrained.title}", *pretrained.remarks, corpus.start_remark(pretrained))
    model = pretrained.model
model.crop_block_size(block_size)
model.recompute, model.loss_only = recompute, True  # forward() returns (None, loss)
settings.adopt_model_sizes(model.config, init_from)  # sets n_layer, n_head, n_embd and bias
say(f"number of parameters: {model.get_num_params() / 1e6:.2f}M")
iter_num = saved.get("iter_num", 0)
progress = Progress(saved, iter_num, tokens_per_iter, processes, max_iters, patience, max_seconds)
if not eval_only and progress.nothing_left(iter_num):
    processes.leave()
    raise SystemExit

# ---- data ----------------------------------------------------------------------------
vocab_size = model.config.vocab_size
corpus.check_bins(vocab_size, expected=saved.get("data"))
samples = ShortSamples(sample_interval, corpus.tokens, vocab_size, seed, device)
bytes_by_id = corpus.bytes_by_id(vocab_size, device)
windows = Windows(order, seed, progress.tokens_seen, batch_size, block_size, rank, world_size)


def get_batch(split, evaluation=0):
    """(x, y), each (B, T) int64 on the device: windows of the split, y one token further on.

    The batches of an `evaluation`, so many, come one below the other, in one read."""
    try:
        tokens = corpus.open(split)  # anew: a map that is held keeps every page it has read
        start = np.concatenate([windows.starts(len(tokens), evaluation > 0) for _ in range(max(1, evaluation))])
        window = tokens[start[:, None] + np.arange(block_size + 1)]  # (B, T + 1), in one gather
        check_ids(window, vocab_size, corpus.bins[split], start)
    except (OSError, UserError):  # the data is gone, or has changed
        if point and world_size == 1:
            save("last.pt")
        raise
    ids = to_device(torch.from_numpy(window), device)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


# ---- the model on its device, its optimizer, and the run's folder --------------------
model.to(device)
processes.shard(model, sharding, device_type)  # with fsdp each process keeps a share of the weights
optim = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type, optimizer)
scaler = torch.amp.GradScaler(device_type, enabled=dtype == "float16")
guard = StepGuard(saved, processes, scaler, device, optimizer, sharding, spike_sigma, max_nonfinite, out_dir)
restore_optimizer(optim, scaler, saved, folder.loaded_path)
running_mfu = RunningMFU(peak_flops, device, dtype, processes, first_iter=iter_num)
say(run_log.start_line(processes, device, dtype, compile, optimizer, sharding, running_mfu))
if decay_lr and not eval_only:
    say(schedule_remark(learning_rate, warmup_iters, lr_decay_iters, max_iters, min_lr, max_seconds))
autocast = devices.autocast(device, dtype)
autocast_step = devices.autocast(device, dtype, cache=False)  # a forward pass uses each weight once
mode = devices.compile_mode(device_type, world_size, micro_steps, model.get_num_params() * tokens_per_iter)
# what computes: the model compiled, where that is on, and in DDP, where there are several processes
train_model = processes.wrap_ddp(torch.compile(model, mode=mode) if compile else model, sharding)
folder.prepare(resumed=bool(saved))  # locks out_dir; a new run moves an older one's files aside
batch, evaluated = folder.restore_point(saved, device, windows)
log = run_log.RunLog(folder, iter_num, evaluated, tensorboard_log, wandb_log, project=wandb_project,
                     name=wandb_run_name, id=saved.get("wandb_id"), config=settings.values())  # fmt: skip
saved = pretrained = None  # frees the checkpoint, which is as large as the model and its optimizer


# ---- what the loop calls -------------------------------------------------------------
def get_lr(it):
    """The learning rate of iteration `it`: a linear warm-up, then a cosine down to min_lr."""
    if not decay_lr:
        return learning_rate
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decayed = (it - warmup_iters) / max(1, lr_decay_iters - warmup_iters)  # from 0 to 1
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decayed)) * (learning_rate - min_lr)


@torch.no_grad()
def estimate_loss():
    """Prints and returns {split: mean loss of eval_iters batches, val_bpb: bits per byte}; None if asked to stop."""
    model.eval()
    mean = {}
    for split in ("train", "val"):
        per_process = math.ceil(eval_iters / world_size)
        found = torch.zeros(2, per_process, world_size, device=device)  # a batch's loss, and the bytes of its targets
        with autocast:  # one context for all batches: it casts each weight only once
            for first in range(0, per_process, 16):  # in one read, and one copy to a GPU
                xs, ys = get_batch(split, evaluation=min(16, per_process - first))
                for k, (x, y) in enumerate(zip(xs.split(batch_size), ys.split(batch_size), strict=True), first):
                    if processes.asked_to_stop():
                        return None
                    found[0, k, rank] = train_model(x, y)[1]
                    found[1, k, rank] = bytes_by_id[y].sum()
        processes.add_up(found)
        mean[split], n_bytes = found.flatten(1)[:, :eval_iters].mean(1).tolist()
    say(f"step {iter_num}: train loss {mean['train']:.4f}, val loss {mean['val']:.4f}")
    mean["val_bpb"] = bits_per_byte(mean["val"] * batch_size * block_size, n_bytes)
    model.train()
    return mean


def save(name):
    """Writes the run, to be resumed from `point`, to out_dir/name. Every process calls it.

    If the last gradients, the last evaluation or a weight are not finite, the older file stays."""
    if guard.allows_save(name, model, losses):
        folder.save(
            name, model, optim, scaler, point, settings.values(), iter_num=iter_num, data=corpus.fingerprints,
            wandb_id=log.wandb_id, **corpus.tokens.kept(), **progress.for_checkpoint(), **guard.for_checkpoint(),
        )  # fmt: skip


# ---- the training loop ---------------------------------------------------------------
processes.listen()  # from here on a signal such as SIGTERM stops the run between two micro-steps
point, losses = None, {}  # where a resume starts; the last evaluation's losses
x, y = batch or get_batch("train")  # (B, T)
point = resume_point(device, windows, (x, y), evaluated)
saved_at = iter_num  # there is nothing new to save yet
clock = Clock(device)

if eval_only:
    estimate_loss()

while iter_num <= max_iters and not eval_only:
    lr = get_lr(iter_num)
    for group in optim.param_groups:
        group["lr"] = lr

    # evaluate, and save: ckpt.pt has the best or each evaluated model; last.pt serves in between
    time_is_up = progress.time_is_up()
    if (iter_num % eval_interval == 0 or time_is_up) and not point["evaluated"]:
        if (latest := estimate_loss()) is None:  # the run was asked to stop
            break
        losses = latest
        better = progress.note_evaluation(losses, iter_num, time_is_up)  # may set progress.ended_by
        log.write(iter=iter_num, kind="eval", train_loss=losses["train"], val_loss=losses["val"], lr=lr,
                  val_bpb=losses["val_bpb"], tokens_per_s=progress.rate, tokens_seen=progress.tokens_seen)  # fmt: skip
        point = resume_point(device, windows, (x, y), evaluated=True)
        if (better or always_save_checkpoint) and iter_num > 0:
            save("ckpt.pt")
            saved_at = iter_num
        say(progress.line(iter_num), *samples.lines(model, iter_num, autocast))
        if progress.ended_by:
            break
    if iter_num % (save_interval or eval_interval) == 0 and saved_at != iter_num:
        save("last.pt")

    # forward and backward, with gradients accumulated over the micro-steps
    for micro_step in range(micro_steps):
        if stopping := processes.asked_to_stop():
            break
        processes.set_gradient_sync(train_model, micro_step == micro_steps - 1)  # after the last
        with autocast_step:
            loss = train_model(x, y)[1] / micro_steps
        guard.note_loss(loss)  # for spike_sigma
        x, y = get_batch("train")  # the next batch, while a GPU is still in the forward pass
        scaler.scale(loss).backward()
    if stopping:
        break

    # clip, and step: scaler.step, unless the step is bad, scaler.update and zero_grad
    scaler.unscale_(optim)
    grad_norm = clip_gradients(model.parameters(), grad_clip)
    guard.step(optim, grad_norm)

    # time, and log: an evaluation and a save count in the time of their iteration, as in nanoGPT
    clock.tick()
    progress.tokens_seen += tokens_per_iter
    logged = iter_num % log_interval == 0
    guard.report(iter_num, logged)
    if logged:
        dt = clock.seconds()
        lossf = loss.item() * micro_steps  # rank 0's last micro-batch
        shown_mfu = running_mfu.update(iter_num, model, batch_size * micro_steps, dt)
        say(f"iter {iter_num}: loss {lossf:.4f}, time {dt * 1000:.2f}ms, mfu {shown_mfu}")
        log.write(iter=iter_num, kind="train", train_loss=lossf, tokens_seen=progress.tokens_seen, lr=lr, ms=dt * 1000,
                  grad_norm=grad_norm.item(), tokens_per_s=tokens_per_iter / dt, mfu=running_mfu.value)  # fmt: skip
    iter_num += 1
    point = resume_point(device, windows, (x, y), evaluated=False)

# ---- the run has finished, or was asked to stop --------------------------------------
if not eval_only:
    save("last.pt")
    say(guard.summary(), *progress.last_lines(iter_num, out_dir, device))
model = train_model = optim = None  # otherwise gloo aborts at exit
processes.leave()
