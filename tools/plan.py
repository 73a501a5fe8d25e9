"""What a run needs, before it starts: parameters, memory, disk, data, time and money.

    python tools/plan.py config/train_gpt2.py --gpu="A100" --count=8
    python tools/plan.py config/train_shakespeare_cpu.py --measure=True

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
from data.bins import SPLITS, open_bin
from data.folder import bin_path, dataset_folder
from data.tokens import Tokens
from model import GPT, GPTConfig
from nanogpt import device as devices
from nanogpt import gpt2
from nanogpt.checkpoint import peek
from nanogpt.distributed import share_evenly
from nanogpt.errors import ROOT, UserError
from nanogpt.mfu import find_peak_flops, peak_from_table
from nanogpt.run_folder import NOT_RESUMED
from tools import planning

# ---- settings, beside those of train.py --------------------------------------------------------------------------

gpu = ""  # a name of the table in nanogpt/mfu.py, such as "A100" or "A100 80GB"; empty: this machine
count = 1  # devices, a process on each
vocab_size = 0  # token ids; 0: the dataset's, or 50304 as in train.py
mfu = 0.0  # the share of the peak to expect, as a fraction of 1; 0: by planning.usual_mfu()
measure = False  # run ten iterations here with these settings, and take the median time of the last five
dollars_per_hour = 0.0  # the price of all devices together

TRAIN = os.path.join(ROOT, "train.py")
of_train = {name: eval(default, {}) for name, (default, _) in documented(TRAIN).items()}  # such as `5 * 8`
run = SimpleNamespace(**of_train | globals())
settings = configure(vars(run), sources=[TRAIN, __file__])
saved = peek(run.out_dir) if run.init_from in ("resume", "auto") else {}
if saved:
    for line in settings.adopt({name: value for name, value in saved["config"].items() if name not in NOT_RESUMED}):
        print(line)
elif run.init_from == "resume":
    raise UserError(f"there is no checkpoint in {run.out_dir} that can be read")
settings.at_least(1, "count eval_interval log_interval eval_iters gradient_accumulation_steps batch_size block_size")
settings.at_least(0, "max_iters max_seconds vocab_size dollars_per_hour peak_flops")
settings.at_least(0, "dropout mfu", below=1)
settings.one_of(optimizer=("adamw", "muon"), sharding=("ddp", "fsdp"))
micro_steps = share_evenly(run.gradient_accumulation_steps, run.count)
if run.measure and (run.gpu or run.count > 1):
    raise UserError("--measure=True measures this machine, with one process: leave out --gpu and --count")

# ---- the model, without its memory -------------------------------------------------------------------------------

# (n_layer, n_head, n_embd) of OpenAI's GPT-2
GPT2_SIZES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024),
              "gpt2-large": (36, 20, 1280), "gpt2-xl": (48, 25, 1600)}  # fmt: skip
data_dir = dataset_folder(run.dataset)
sizes = {name: vars(run)[name] for name in ("n_layer", "n_head", "n_embd", "bias", "block_size")}
if checkpoint := saved or peek(run.init_from):
    sizes |= checkpoint["model_args"]
elif run.init_from in GPT2_SIZES:
    sizes |= zip(("n_layer", "n_head", "n_embd"), GPT2_SIZES[run.init_from], strict=True)
    sizes |= {"vocab_size": 50257, "bias": True}
elif os.path.isdir(run.init_from):
    sizes |= gpt2.read_config(gpt2.find(run.init_from)[0])
else:
    sizes["vocab_size"] = run.vocab_size or Tokens.of_dataset(data_dir).model_vocab_size
sizes |= {"block_size": min(run.block_size, sizes["block_size"]), "dropout": run.dropout}
config = GPTConfig(**sizes)
config.check()
with torch.device("meta"), gpt2.WithoutInit():
    model = GPT(config)
by_kind = planning.parameters_by_kind(model)
parameters = sum(by_kind.values())
tokens_per_iter = run.gradient_accumulation_steps * run.batch_size * config.block_size

# ---- the device --------------------------------------------------------------------------------------------------

if run.gpu:
    device_type, where = "cuda", run.gpu
    auto_dtype, capacity = planning.find_gpu(run.gpu)
    dtype = auto_dtype if run.dtype == "auto" else devices.pick_dtype(run.dtype, "cuda")
    peak, source = run.peak_flops or peak_from_table(run.gpu, dtype, tf32=True), run.gpu
    if not peak:
        raise UserError(f"--dtype={dtype}: {run.gpu} is not fast at it; use float16")
else:
    device = devices.pick_device(run.device)
    device_type, where = devices.set_up(device), f"this machine ({device})"
    dtype = devices.pick_dtype(run.dtype, device)
    on_cuda = device_type == "cuda"
    capacity = torch.cuda.get_device_properties(device).total_memory if on_cuda else planning.host_memory()
    peak, source = find_peak_flops(run.peak_flops, device, dtype)


def table(rows):
    """Prints `rows`, lists of texts, the first text of each to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *rest in rows:
        print(" ", first.ljust(widths[0]), *map(str.rjust, rest, widths[1:]))


def mib(n):
    return f"{n / 2**20:,.0f}"


print(f"plan for {where}, {run.count} x {dtype}\n\nparameters: {parameters:,}")
table([[kind, f"{n:,}"] for kind, n in by_kind.items()])

# ---- memory, disk and data ---------------------------------------------------------------------------------------

setups = {}
for sharding in ("ddp", "fsdp") if run.count > 1 else ("one process",):
    shares = run.count if sharding == "fsdp" else 1
    for recompute in (False, True):
        setup = planning.Setup(run.batch_size, micro_steps, shares, recompute, run.optimizer, dtype, device_type)
        setups[sharding + ", recompute" * recompute] = setup
found = [planning.memory(config, parameters, setup) for setup in setups.values()]
print(f"\nMiB on each device at the peak, batch_size {run.batch_size}, without what Python and torch hold before"
      f"{', and without torch.compile' * (device_type == 'cuda')}")  # fmt: skip
rows = [["", *setups]]
rows += [[kind, *(mib(kinds.get(kind, 0)) for kinds in found)] for kind in found[-1]]
rows.append(["sum", *(mib(sum(kinds.values())) for kinds in found)])
if capacity:
    free = capacity - planning.RESERVED[device_type]
    fitting = [planning.largest_batch_size(config, parameters, setup, free) for setup in setups.values()]
    rows.append([f"largest batch_size in {capacity / 2**30:.0f} GiB", *(str(n or "none") for n in fitting)])
table(rows)
print(f"\na checkpoint: {mib(found[0]['weights'] + found[0]['optimizer'])} MiB")
bins = {split: path for split in SPLITS if os.path.exists(path := bin_path(data_dir, split))}
print(f"the data: {mib(sum(map(os.path.getsize, bins.values())))} MiB" if bins
      else f"the data: {run.dataset} is not prepared here")  # fmt: skip

# ---- time and money ----------------------------------------------------------------------------------------------

if run.measure:  # ten iterations of train.py here, of a new model of the same sizes, whatever it starts from
    with tempfile.TemporaryDirectory() as folder:
        wanted = vars(run) | dataclasses.asdict(config) | {"out_dir": f"{folder}/out"}
        arguments = [f"--{name}={wanted[name]}" for name in of_train]
        arguments += "--init_from=scratch --max_iters=9 --eval_iters=1 --eval_interval=1000000 --log_interval=1".split()
        arguments += "--eval_only=False --wandb_log=False --tensorboard_log=False".split()
        done = subprocess.run([sys.executable, TRAIN, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"--measure=True: {(done.stderr.strip() or 'train.py has failed').splitlines()[-1]}")
    times = [float(ms) for ms in re.findall(r"^iter \d+: loss \S+, time ([\d.]+)ms", done.stdout, re.M)]
    seconds, held = statistics.median(times[5:]) / 1000, re.search(r"at most (.*)$", done.stdout, re.M)[1]
    how = f", measured here (the median of five); the process held {held}"
else:
    share = run.mfu or planning.usual_mfu(config.n_embd, device_type)
    seconds = planning.iteration_seconds(model, tokens_per_iter / run.count, peak, share, run.recompute)
    rule = "given" if run.mfu else "by rule for this width and kind of device"
    how = f" at {share:.0%} MFU ({rule}) of {peak / 1e12:.4g} TFLOPS ({source})"
print(f"\nan iteration: {seconds * 1000:,.1f} ms{how}")
first = min(saved.get("iter_num", 0), run.max_iters + 1)
iterations, ended_by = run.max_iters + 1 - first, ""
# the processes share an evaluation: eval_iters forward passes for each split, each a third of a micro-step's time
evaluations = run.max_iters // run.eval_interval - (first - 1) // run.eval_interval
in_all = seconds * (iterations + evaluations * 2 * run.eval_iters / run.count / micro_steps / 3)
left = max(0.0, run.max_seconds - saved.get("seconds", 0.0))
if run.max_seconds and left < in_all:
    ended_by = f", which max_seconds = {run.max_seconds:g} ends"
    iterations, in_all = int(iterations * left / in_all), left
tokens = tokens_per_iter * iterations
passes = f", {tokens / len(open_bin(bins['train'])[0]):,.2f} passes over the data" if "train" in bins else ""
print(f"tokens {'left' if saved else 'in all'}: {tokens:,} in {iterations:,} iterations{passes}{ended_by}")
cost = f"; {in_all / 3600 * run.dollars_per_hour:,.2f} dollars" if run.dollars_per_hour else ""
print(f"the run: {in_all / 3600:,.2f} hours, evaluations included, start-up and saves not{cost}")
