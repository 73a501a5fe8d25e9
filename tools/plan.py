"""What a run will need, before it starts: parameters, FLOPs, memory, disk, data, time and money. Nothing is trained.

    python tools/plan.py config/train_gpt2.py --gpu="A100" --count=8
    python tools/plan.py config/train_shakespeare_cpu.py --measure=True --to=plan.png

It takes config files and all settings of train.py (python train.py --help). Without --gpu it plans for this machine.
"""

import dataclasses
import os
import re
import statistics
import subprocess
import sys
import tempfile
from types import SimpleNamespace

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import torch

from configurator import configure, documented
from data.bins import SPLITS, dtype_in
from data.folder import bin_path, dataset_folder, read_facts
from data.tokens import Tokens
from model import GPT, GPTConfig
from nanogpt import device as devices
from nanogpt import gpt2, planning
from nanogpt.checkpoint import has_run, peek
from nanogpt.distributed import share_evenly
from nanogpt.errors import ROOT, UserError, require
from nanogpt.mfu import find_peak_flops, peak_from_table
from nanogpt.run_folder import NOT_RESUMED

# ---- settings, beside those of train.py --------------------------------------------------------------------------

gpu = ""  # a name of the table in nanogpt/mfu.py, such as "A100" or "A100 80GB"; empty: this machine
count = 1  # devices, a process on each
vocab_size = 0  # token ids; 0: the dataset's, or 50304 as in train.py
mfu = 0.0  # the share of the peak to expect, as a fraction of 1; 0: by planning.usual_mfu()
measure = False  # run ten iterations here with these settings, and take their time
dollars_per_hour = 0.0  # the price of all devices together
to = ""  # a picture of this run beside the compute-optimal frontier, its kind by its name (.png, .svg, .pdf)

TRAIN = os.path.join(ROOT, "train.py")
of_train = {name: eval(default, {}) for name, (default, _) in documented(TRAIN).items()}  # such as `5 * 8`
own = {name: globals()[name] for name in [*documented(__file__), "__file__", "__doc__"]}
namespace = of_train | own
settings = configure(namespace, sources=[TRAIN, __file__])
resumes = namespace["init_from"] == "resume" or (namespace["init_from"] == "auto" and has_run(namespace["out_dir"]))
if resumes:
    saved = peek(namespace["out_dir"])
    if not saved:
        raise UserError(f"there is no checkpoint in {namespace['out_dir']} that can be read")
    resumed = {name: value for name, value in saved["config"].items() if name not in NOT_RESUMED}
    for line in settings.adopt(resumed):
        print(line)
settings.at_least(1, "count eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size")
settings.at_least(0, "max_iters vocab_size mfu dollars_per_hour peak_flops")
settings.at_least(0, "dropout", below=1)
settings.one_of(optimizer=("adamw", "muon"), sharding=("ddp", "fsdp"))
run = SimpleNamespace(**namespace)
micro_steps = share_evenly(run.gradient_accumulation_steps, run.count)
if run.measure and (run.gpu or run.count > 1):
    raise UserError("--measure=True measures this machine, with one process: leave out --gpu and --count")
if run.to:
    require("--to", "matplotlib.figure")

# ---- the model, without its memory -------------------------------------------------------------------------------

data_dir = dataset_folder(run.dataset)
sizes = {name: namespace[name] for name in ("n_layer", "n_head", "n_embd", "bias", "block_size")}
sizes["vocab_size"] = run.vocab_size or Tokens.of_dataset(data_dir).model_vocab_size
if resumes or has_run(run.init_from):
    sizes = (saved if resumes else peek(run.init_from))["model_args"]
    sizes = {name: sizes[name] for name in ("n_layer", "n_head", "n_embd", "bias", "vocab_size", "block_size")}
    sizes["block_size"] = min(run.block_size, sizes["block_size"])
elif run.init_from in gpt2.NAMES:
    sizes |= dict(zip(("n_layer", "n_head", "n_embd"), planning.GPT2_SIZES[run.init_from], strict=True))
    sizes |= {"vocab_size": 50257, "bias": True}
elif os.path.isdir(run.init_from):
    found, _ = gpt2.find(run.init_from)
    sizes = found | {"block_size": min(run.block_size, found["block_size"])}
config = GPTConfig(dropout=run.dropout, **sizes)
config.check()
with torch.device("meta"), gpt2.WithoutInit():
    model = GPT(config)
parameters = model.get_num_params(non_embedding=False)
tokens_per_iter = run.gradient_accumulation_steps * run.batch_size * config.block_size

# ---- the device --------------------------------------------------------------------------------------------------

if run.gpu:
    device_type = "cuda"
    where, auto_dtype, capacity = planning.find_gpu(run.gpu)
    dtype = auto_dtype if run.dtype == "auto" else devices.pick_dtype(run.dtype, "cuda")
    peak, source = run.peak_flops or peak_from_table(where, dtype, tf32=True), where
    if not peak:
        raise UserError(f"--dtype={dtype}: {where} is not fast at it; use float16")
else:
    device = devices.pick_device(run.device)
    device_type = devices.set_up(device)
    dtype = devices.pick_dtype(run.dtype, device)
    where = f"this machine ({device})"
    capacity = planning.host_memory()
    if device_type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
    peak, source = find_peak_flops(run.peak_flops, device, dtype)
setup = planning.Setup(
    run.batch_size, micro_steps, run.count, "one process", run.recompute, run.optimizer, dtype, device_type,
    run.dropout,
)  # fmt: skip


def number(n):
    """Such as 124,373,760, or 3.1e+21 where it is too long to read."""
    return f"{n:,.0f}" if n < 1e13 else f"{n:.3g}"


def amount(n):
    """Bytes as GiB, MiB or KiB."""
    unit = next((k for k in (30, 20) if n >= 1 << k), 10)
    return f"{n / (1 << unit):,.{2 if unit == 30 else 1}f} {'GiB' if unit == 30 else 'MiB' if unit == 20 else 'KiB'}"


def table(rows):
    """Prints `rows`, lists of texts, the first text of each to the left and the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print(" ", row[0].ljust(widths[0]), *rest)


print(f"plan for {where}, {run.count} x {dtype}")

# ---- parameters and FLOPs ----------------------------------------------------------------------------------------

print(f"\nparameters: {parameters:,}")
table([[kind, f"{n:,}"] for kind, n in planning.parameters_by_kind(model).items()])
flops = planning.flops_by_kind(model)
definition = flops["6N"] + flops["attention"]
KINDS = (("6N: parameters, without positions", "6N"), ("attention", "attention"), ("(the head, within 6N)", "head"))
print(f"\nFLOPs an iteration of {tokens_per_iter:,} tokens: {number(definition * tokens_per_iter)}, of which")
table([[kind, number(flops[name] * tokens_per_iter), f"{flops[name] / definition:.1%}"] for kind, name in KINDS])
print(f"  the exact count of all matrix products is {number(flops['products'] * tokens_per_iter)}: 6N + attention is "
      f"{definition / flops['products'] - 1:+.3%} from it")  # fmt: skip
added = planning.recompute_flops(config, run.dropout)
print(f"  --recompute=True adds {number(added * tokens_per_iter)} ({added / definition:.0%}), which MFU does not count")

# ---- memory and disk ---------------------------------------------------------------------------------------------

ways = ["one process", "ddp", "fsdp"] if run.count > 1 else ["one process"]
columns = {}
for way in ways:
    for again in (False, True):
        alone = way == "one process"
        one = dataclasses.replace(
            setup, sharding=way, recompute=again, processes=1 if alone else run.count,
            micro_steps=run.gradient_accumulation_steps if alone else micro_steps,
        )  # fmt: skip
        columns[way + ", recompute" * again] = one, planning.memory(config, parameters, one)
print(f"\nMiB on each device at the peak, batch_size {run.batch_size}, without what Python and torch hold before"
      f"{', and without torch.compile' * (device_type == 'cuda')}")  # fmt: skip
kinds = list(dict.fromkeys(kind for _, found in columns.values() for kind in found))
rows = [["", *columns]]
rows += [[kind, *(f"{found.get(kind, 0) / 2**20:,.0f}" for _, found in columns.values())] for kind in kinds]
rows.append(["sum", *(f"{sum(found.values()) / 2**20:,.0f}" for _, found in columns.values())])
if capacity:
    free = capacity - planning.RESERVED[device_type == "cuda"]
    fitting = [planning.largest_batch_size(config, parameters, one, free) for one, _ in columns.values()]
    rows.append([f"largest batch_size in {capacity / 2**30:.0f} GiB", *(str(n) if n else "none" for n in fitting)])
table(rows)
moments = 8 * parameters - (4 * 12 * config.n_layer * config.n_embd**2 if run.optimizer == "muon" else 0)
print(f"\na checkpoint: {amount(4 * parameters + moments)}")
facts = read_facts(data_dir)
bins = [bin_path(data_dir, split, facts) for split in SPLITS]
there = [os.path.getsize(path) for path in bins if os.path.exists(path)]
print(f"the data: {amount(sum(there))}" if there else f"the data: {run.dataset} is not prepared here")

# ---- tokens and loss ---------------------------------------------------------------------------------------------

tokens = tokens_per_iter * (run.max_iters + 1)
passes = f", {tokens / (there[0] / dtype_in(bins[0]).itemsize):,.2f} passes over the data" if there else ""
print(f"\ntokens in all: {number(tokens)} in {run.max_iters + 1:,} iterations{passes}")
ratio = tokens / parameters
shown = number(ratio) if ratio >= 100 else format(ratio, ".3g")
print(f"tokens a parameter: {shown}; {planning.COMPUTE_OPTIMAL} is compute-optimal (Hoffmann et al. 2022)")
loss = planning.expected_loss(parameters, tokens)
print(f"loss by their formula: {loss:.2f} nats a token. A rough guess: their text, their 32,000 tokens, one pass")

# ---- time and money ----------------------------------------------------------------------------------------------


def measured():
    """(seconds of an iteration, the peak memory as train.py prints it), of ten iterations of train.py here."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = {name: namespace[name] for name in of_train if resumes or name in settings.given}
        wanted |= {"init_from": "scratch"} if resumes else {}  # the same model, and no other run's folder
        arguments = [f"--{name}={value}" for name, value in wanted.items()]
        arguments += "--max_iters=9 --eval_iters=1 --eval_interval=1000000 --log_interval=1 --eval_only=False".split()
        arguments += ["--wandb_log=False", "--tensorboard_log=False", f"--out_dir={os.path.join(folder, 'out')}"]
        done = subprocess.run([sys.executable, TRAIN, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--measure=True: {(done.stderr.strip() or 'train.py has failed').splitlines()[-1]}")
    times = [float(ms) for ms in re.findall(r"^iter \d+: loss \S+, time ([\d.]+)ms", done.stdout, re.M)]
    return statistics.median(times[5:]) / 1000, re.search(r"at most (.*)$", done.stdout, re.M)[1]


if run.measure:
    seconds, held = measured()
    print(f"\nan iteration: {seconds * 1000:,.1f} ms, measured here (the median of five); the process held {held}")
else:
    share = run.mfu or planning.usual_mfu(config.n_embd, device_type)
    seconds = planning.iteration_seconds(model, tokens_per_iter / run.count, peak, share, run.recompute)
    rule = "given" if run.mfu else "by rule for this width and kind of device"
    print(f"\nan iteration: {seconds * 1000:,.1f} ms at {share:.0%} MFU ({rule}) of {peak / 1e12:.4g} TFLOPS", end="")
    print(f" ({source})")
in_all = planning.run_seconds(seconds, run.max_iters, run.eval_interval, run.eval_iters / run.count, micro_steps)
print(f"the run: {in_all / 3600:,.2f} hours, evaluations included, start-up and saves not", end="")
print(f"; {in_all / 3600 * run.dollars_per_hour:,.2f} dollars" if run.dollars_per_hour else "")

# ---- the picture -------------------------------------------------------------------------------------------------


LEVELS = (1.8, 2.0, 2.2, 2.4, 2.6, 2.8, 3.0, 3.5, 4.0, 5.0, 6.0, 8.0, 10.0)


def draw(path):
    """Writes the picture: the loss by the formula over parameters and tokens, the optimal line, and this run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot(xlabel="parameters", ylabel="tokens", xscale="log", yscale="log")
    low, high = min(parameters, tokens / 20) / 30, max(parameters, tokens / 20) * 30
    n = [low * (high / low) ** (i / 99) for i in range(100)]
    d = [20 * low / 30 * (900 * high / low) ** (i / 99) for i in range(100)]
    losses = [[planning.expected_loss(a, b) for a in n] for b in d]
    lines = axes.contour(n, d, losses, levels=LEVELS, cmap="viridis_r", linewidths=0.9)
    axes.clabel(lines, fmt="%.2f", fontsize=8)
    optimal = planning.COMPUTE_OPTIMAL
    axes.plot(n, [optimal * a for a in n], color="black", label=f"compute-optimal: {optimal} tokens a parameter")
    compute = 6 * parameters * tokens
    axes.plot(n, [compute / 6 / a for a in n], "--", color="#0072b2", label=f"as many FLOPs as this run: {compute:.2g}")
    best = (compute / 6 / optimal) ** 0.5
    axes.plot(best, optimal * best, "o", color="#0072b2", label=f"the best use of them: {best:.2g} parameters")
    label = f"this run: {parameters:.3g} parameters, {tokens:.3g} tokens"
    axes.plot(parameters, tokens, "*", color="#d55e00", markersize=16, label=label)
    axes.set(xlim=(n[0], n[-1]), ylim=(d[0], d[-1]))
    axes.set_title("thin lines: loss in nats by the formula of Hoffmann et al. 2022, a rough guess", fontsize=10)
    axes.grid(color="0.92")
    axes.legend(loc="upper left", fontsize=9)
    try:
        figure.savefig(path, dpi=150)
    except ValueError as error:  # a kind of picture that there is not
        raise UserError(f"--to={path}: {error}") from None
    print(f"wrote {path}")


if run.to:
    draw(run.to)
