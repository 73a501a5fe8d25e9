"""Checks this trainer on the GPU of this machine, in about eight minutes, and prints what it found as a table.

    python tools/gpu_check.py                             every part
    python tools/gpu_check.py --only=golden,resume        these parts
    python tools/gpu_check.py --peer=DIR                  nanoGPT's checkout in DIR runs beside, on the same card
    python tools/gpu_check.py --device=cpu                the checks that make sense without a GPU

It needs no network and no data: the tokens come from a formula, the expected losses from tests/golden. The parts that
time nothing run side by side, as many as half the cores; then the others run alone. All share one compile cache, which
is empty at first. A row is `pass`, `fail`, `figure` (a measurement, which nothing is expected of) or `skip` (with the
reason), and is printed as soon as it is known. The exit code is 1 if a row is `fail`.
"""

import argparse
import copy
import csv
import glob
import importlib.util
import json
import math
import os
import pickle
import platform
import queue
import re
import signal
import statistics
import string
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
HOOKS = os.path.join(ROOT, "tools", "gpu_hooks.py")
PART_SECONDS = 480  # no part may take longer

# the settings of golden/synthetic.csv
GOLDEN = dict(
    n_layer=2, n_head=2, n_embd=64, block_size=32, batch_size=8, gradient_accumulation_steps=2, max_iters=150,
    lr_decay_iters=120, warmup_iters=10, learning_rate=1e-3, min_lr=1e-4, dropout=0.0, bias=False, eval_interval=50,
    eval_iters=5, log_interval=1,
)  # fmt: skip
# the settings of golden/shakespeare_cpu.csv, over config/train_shakespeare_char.py
SHAKESPEARE = dict(
    n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0, max_iters=300, lr_decay_iters=2000,
    eval_interval=100, eval_iters=20, log_interval=1,
)  # fmt: skip
ONE_MICRO_STEP = GOLDEN | dict(gradient_accumulation_steps=1)  # with it torch.compile uses CUDA graphs
BABY = GOLDEN | dict(
    n_layer=6, n_head=6, n_embd=384, block_size=256, batch_size=64, gradient_accumulation_steps=1, dropout=0.2,
    max_iters=300, eval_interval=1_000_000, eval_iters=1,
)  # fmt: skip
# one of the eight processes of config/train_gpt2.py
GPT2 = BABY | dict(
    n_layer=12, n_head=12, n_embd=768, block_size=1024, batch_size=12, gradient_accumulation_steps=5, dropout=0.0,
    max_iters=20, log_interval=10,
)  # fmt: skip
NO_TF32 = {"NVIDIA_TF32_OVERRIDE": "0"}  # cuBLAS then computes float32 in float32


# ----------------------------------------------------------------------------------------------
# rows, and runs


@dataclass
class Row:
    check: str
    result: str  # pass, fail, figure, skip
    seen: str


def check(what, holds, seen):
    return Row(what, "pass" if holds else "fail", seen)


class Failed(Exception):
    """A command that did not do what the check needs. `output` is what it printed."""

    def __init__(self, message, output=""):
        super().__init__(message)
        self.output = output


@dataclass
class Output:
    text: str
    code: int
    stamps: list  # (line, seconds since the start) of each line

    @property
    def iters(self):
        """{iteration: (loss, ms, mfu in percent or None)} of the printed lines."""
        found = re.findall(r"^iter (\d+): loss (\S+), time ([\d.]+)ms, mfu (\S+?)%?$", self.text, re.M)
        return {int(n): (float(loss), float(ms), None if mfu == "n/a" else float(mfu)) for n, loss, ms, mfu in found}

    @property
    def losses(self):
        return {n: loss for n, (loss, _, _) in self.iters.items()}

    @property
    def steps(self):
        """{iteration: (train loss, val loss)} of the evaluations."""
        found = re.findall(r"^step (\d+): train loss (\S+), val loss (\S+)$", self.text, re.M)
        return {int(n): (float(train), float(val)) for n, train, val in found}

    @property
    def seen(self):
        """What the instrument of tools/gpu_hooks.py saw."""
        return json.loads(re.findall(r"^seen: (.*)$", self.text, re.M)[-1])

    @property
    def arrived(self):
        """{iteration: seconds since the start at which its line came}."""
        return {int(m[1]): when for line, when in self.stamps if (m := re.match(r"iter (\d+): ", line))}

    def ms(self, begin=10):
        """Milliseconds of an iteration after `begin`, by our own clock.

        What nanoGPT prints is the time in which the host launches an iteration, unless each one is logged."""
        arrived = self.arrived
        end = max(arrived)
        return (arrived[end] - arrived[begin]) / (end - begin) * 1000


class Lab:
    """Where the checks run: the device, the folder for data and runs, the peer, and how much time is left."""

    def __init__(self, device, folder, peer=None):
        self.device, self.folder, self.peer = device, folder, peer
        self.on_gpu = device.startswith("cuda")
        self.deadline, self.poll = time.monotonic() + PART_SECONDS, 0.001
        self.small, self.large, self.golden_out = (os.path.join(folder, name) for name in ("small", "large", "golden"))
        write_data(self.small, 61, characters=True)
        write_data(self.large, 50257, characters=False)
        caches = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
        self.environment = {"PYTHONUNBUFFERED": "1"} | {name: os.path.join(folder, name) for name in caches}
        # of all parts
        self.stopped, self.runs, self.lock = threading.Event(), {}, threading.Lock()

    def of_part(self, part, alone):
        """The lab of one part: a folder of its own, a deadline, and a share of the cores where it is not alone."""
        lab = copy.copy(self)
        lab.folder = os.path.join(self.folder, part)
        os.makedirs(lab.folder, exist_ok=True)
        lab.deadline = time.monotonic() + PART_SECONDS
        if not alone:
            lab.poll = 0.02
            shared = {"TORCHINDUCTOR_COMPILE_THREADS": "2", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
            lab.environment = self.environment | shared
        return lab

    def out(self, name):
        return os.path.join(self.folder, "out-" + name)

    def command(self, command, cwd=ROOT, env=None, expect=0, on_line=None):
        """Runs `command` and returns its Output. `on_line(line, process)` is called for each line as it comes."""
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment |= self.environment | (env or {})
        start, lines = time.monotonic(), []
        with open(os.path.join(self.folder, "log"), "w+", encoding="utf-8", errors="replace") as log:
            process = subprocess.Popen(
                command, cwd=cwd, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                with open(log.name, encoding="utf-8", errors="replace") as reader:
                    rest, ended = "", False
                    while not ended:
                        ended = process.poll() is not None  # read once more after the end
                        rest += reader.read()
                        *complete, rest = rest.split("\n")
                        for line in complete:
                            lines.append((line, time.monotonic() - start))
                            if on_line:
                                on_line(line, process)
                        if self.stopped.is_set():
                            raise Failed("stopped")
                        if time.monotonic() > self.deadline:
                            raise Failed(f"not finished after {PART_SECONDS} s", "\n".join(line for line, _ in lines))
                        time.sleep(0 if complete else self.poll)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        text = "\n".join([line for line, _ in lines] + [rest])
        if process.returncode != expect:
            raise Failed(f"exit code {process.returncode}: {last_line(text)}", text)
        return Output(text, process.returncode, lines)

    def train(self, settings, name="run", hook=None, processes=0, side=None, data=None, **options):
        """One run of train.py with `settings`, of this project or of the checkout in `side`."""
        side = side or ROOT
        script = os.path.join(side, "train.py")
        where = {"dataset": data or self.small, "device": self.device, "out_dir": self.out(name)}
        start = [sys.executable]
        if processes:
            start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        if hook:
            start += [HOOKS, hook]
        return self.command([*start, script, *flags(where | settings)], cwd=side, **options)

    def once(self, name, *arguments, **options):
        """The Output of train(*arguments, **options), which several parts read and the first of them runs."""
        with self.lock:
            if name not in self.runs:
                self.runs[name] = self.train(*arguments, **options)
            return self.runs[name]

    @property
    def golden_run(self):
        """The run of golden/synthetic.csv on this device: float32, nothing compiled, TF32 off."""
        settings = GOLDEN | dict(dtype="float32", compile=False, out_dir=self.golden_out)
        return self.once("golden", settings, env=NO_TF32)

    @property
    def baby_run(self):
        """The baby GPT, each iteration logged; on a CPU a smaller model."""
        settings = BABY if self.on_gpu else GOLDEN | dict(max_iters=300, eval_interval=1000)
        return self.once("baby", settings, hook="graphs", env={"TORCH_LOGS": "recompiles"})

    def write(self, tokens, device=None, **settings):
        """(the greedy text of sample.py from the golden run's model, seconds of the whole command)."""
        common = dict(num_samples=1, max_new_tokens=tokens, start="abc", temperature=0, dtype="float32")
        arguments = flags(common | dict(device=device or self.device) | settings)
        start = time.monotonic()
        text = self.command([sys.executable, "sample.py", *arguments], env=NO_TF32).text
        return text, time.monotonic() - start


def flags(settings):
    return [f"--{name}={value}" for name, value in settings.items()]


def last_line(text):
    """The last line that says something, for a row of the table."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("seen: ")]
    return lines[-1][:200] if lines else "nothing was printed"


def write_data(folder, vocab_size, characters):
    """A dataset by formula: tok(i) = (i*i*7 + i//3) % vocab_size. With `characters` its meta.pkl too."""
    os.makedirs(folder, exist_ok=True)
    i = np.arange(24000, dtype=np.int64)
    tokens = ((i * i * 7 + i // 3) % vocab_size).astype("<u2")
    tokens[:20000].tofile(os.path.join(folder, "train.bin"))
    tokens[20000:].tofile(os.path.join(folder, "val.bin"))
    if characters:
        known = "\n " + string.ascii_letters + string.digits[:7]
        meta = {"vocab_size": 61, "stoi": {c: n for n, c in enumerate(known)}, "itos": dict(enumerate(known))}
        with open(os.path.join(folder, "meta.pkl"), "wb") as f:
            pickle.dump(meta, f)


def largest_difference(found, expected):
    """The largest difference of two {key: number}; infinite where a key is missing or a number is not finite."""
    if found.keys() != expected.keys():
        return math.inf
    differences = [abs(found[key] - expected[key]) for key in expected]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def within(what, limit, found, expected):
    """A row: whether the numbers of `found` are within `limit` of `expected`."""
    difference = largest_difference(found, expected)
    return check(f"{what}: within {limit}", difference <= limit, f"{difference:.4f} over {len(expected)} figures")


def first(losses, count):
    return {n: loss for n, loss in losses.items() if n < count}


# ----------------------------------------------------------------------------------------------
# the parts


def golden(lab):
    """float32 losses against tests/golden, and beside the peer."""
    yield within("float32 losses, golden/synthetic.csv, TF32 off", 1e-3, all_losses(lab.golden_run), read_golden("synthetic"))
    if os.path.exists(os.path.join(ROOT, "data", "shakespeare_char", "train.bin")):
        config = os.path.join(ROOT, "config", "train_shakespeare_char.py")
        settings = SHAKESPEARE | dict(device=lab.device, dtype="float32", compile=False, out_dir=lab.out("text"))
        run = lab.command([sys.executable, "train.py", config, *flags(settings)], env=NO_TF32)
        yield within("float32 losses, golden/shakespeare_cpu.csv", 1e-3, all_losses(run), read_golden("shakespeare_cpu"))
    else:
        yield Row("float32 losses, golden/shakespeare_cpu.csv", "skip", "data/shakespeare_char is not prepared")
    if lab.peer:
        settings = GOLDEN | dict(dtype="float32", compile=False)
        peer = lab.train(settings, "peer", side=lab.peer, env=NO_TF32)
        yield within("float32 losses, nanoGPT on this device", 1e-3, all_losses(lab.golden_run), all_losses(peer))
    else:
        yield Row("float32 losses, nanoGPT on this device", "skip", "no --peer")


def all_losses(run):
    """{(kind, iteration[, split]): loss} of a run's lines, as read_golden() has them."""
    evaluations = {("step", n, split): loss for n, pair in run.steps.items() for split, loss in enumerate(pair)}
    return {("iter", n): loss for n, loss in run.losses.items()} | evaluations


def read_golden(name):
    found = {}
    with open(os.path.join(ROOT, "tests", "golden", f"{name}.csv"), encoding="utf-8") as f:
        for row in csv.DictReader(f):
            n = int(row["n"])
            if row["kind"] == "iter":
                found["iter", n] = float(row["loss"])
            else:
                found |= {("step", n, 0): float(row["loss"]), ("step", n, 1): float(row["val_loss"])}
    return found


def dtypes(lab):
    """bfloat16 and each attention kernel against float32."""
    float32 = first(lab.golden_run.losses, 50)
    settings = GOLDEN | dict(max_iters=49, dtype="bfloat16", compile=False)
    bfloat16 = lab.train(settings).losses
    yield within("bfloat16 against float32, 50 iterations", 0.02, bfloat16, float32)
    for attention in ("flash", "efficient", "math"):
        what = f"--attention={attention} against auto, bfloat16, 50 iterations"
        if not lab.on_gpu and attention != "math":
            yield Row(what, "skip", "a kernel for GPUs")
            continue
        yield within(what, 0.02, lab.train(settings | dict(attention=attention)).losses, bfloat16)


def compiled(lab):
    """torch.compile: the same losses, no recompilation, CUDA graphs, and as many graphs as are traced on a CPU."""
    settings = ONE_MICRO_STEP | dict(max_iters=49, eval_interval=20)
    eager = lab.train(settings | dict(compile=False))
    logs = {"TORCH_LOGS": "recompiles,perf_hints,cudagraphs"}
    run = lab.train(settings | dict(compile=True), hook="graphs", env=logs)
    if "runs without torch.compile" in run.text:
        yield Row("torch.compile", "skip", next(line for line in run.text.splitlines() if "without torch.compile" in line))
        return
    yield within("compiled against not, 50 iterations", 0.02, run.losses, eager.losses)
    yield no_recompilation(run)
    skipped = re.findall(r"skipping cudagraphs.*", run.text, re.I)
    yield check("no CUDA graph is skipped", not skipped and not run.seen["cudagraph_skips"],
                skipped[0][:150] if skipped else f"{run.seen['cudagraph_skips']} were")  # fmt: skip
    counted = lab.train(settings | dict(device="cpu", compile=True, dtype="float32"), hook="counted_graphs").seen
    yield check("as many graphs as the counting compiler traces on a CPU", run.seen["graphs"] == counted["graphs"] > 0,
                f"{run.seen['graphs']} and {counted['graphs']}")  # fmt: skip
    yield check("no graph is broken", run.seen["breaks"] == 0, f"{run.seen['breaks']} breaks")


def no_recompilation(run):
    """A row: nothing is recompiled after iteration 2, or the first that is logged after it. TORCH_LOGS=recompiles is on.

    The training graph is itself a recompilation, since an evaluation comes first: without it the log is not on."""
    early, n, late = [*re.split(r"^iter ([2-9]|\d\d+): ", run.text, maxsplit=1, flags=re.M), "2", ""][:3]
    found = re.findall(r"Recompiling function .*", late)
    logged = "Recompiling function" in early
    seen = found[0][:150] if found else "none" if logged else "the log of recompilations is empty"
    return check(f"no recompilation after iteration {n}", bool(late) and logged and not found, seen)


def sync(lab):
    """The host does not wait for the GPU in an unlogged iteration."""
    if not lab.on_gpu:
        yield Row("no synchronisation in an unlogged iteration", "skip", "a CPU computes at once")
        return
    settings = ONE_MICRO_STEP | dict(max_iters=40, log_interval=10, eval_interval=1000)  # the last iteration is logged
    for compile in (False, True):
        run = lab.train(settings | dict(compile=compile), hook="sync_error")
        yield check(f"no synchronisation in an unlogged AdamW iteration, compile {compile}", run.seen["iterations"] > 20,
                    f"none in {run.seen['iterations']} iterations")  # fmt: skip
    for optimizer in ("adamw", "muon"):
        seen = lab.train(settings | dict(compile=False, optimizer=optimizer), hook="sync_count").seen
        rate = seen["synchronisations"] / seen["iterations"]
        yield Row(f"synchronisations in an unlogged iteration, {optimizer}", "figure", f"{rate:.2f}")


def guard(lab):
    """A gradient that is not finite, and float16's loss scale."""
    run = lab.train(GOLDEN | dict(max_iters=20, compile=False), hook="nan")
    yield check("a NaN in a gradient: weights and moments stay, bit for bit", run.seen.get("changed") == 0,
                f"{run.seen.get('changed')} of {run.seen.get('tensors')} tensors changed")  # fmt: skip
    said = re.findall(r"^iter (\d+): 1 steps skipped, their gradients were not finite$", run.text, re.M)
    yield check("the skipped step is said, and training continues", said == ["5"] and math.isfinite(run.losses[20]),
                f"said at iteration {', '.join(said) or 'none'}; loss {run.losses[20]} at iteration 20")  # fmt: skip
    run = lab.train(GOLDEN | dict(max_iters=99, compile=False, dtype="float16"), "float16")
    skipped = [int(n) for n in re.findall(r"^iter (\d+): \d+ steps skipped", run.text, re.M)]
    scale = torch.load(os.path.join(lab.out("float16"), "last.pt"), weights_only=True)["scaler"]["scale"]
    yield check("float16: 100 iterations, the loss scale settles", max(skipped, default=0) < 50 and run.losses[99] < 3,
                f"scale {scale:.0f}; steps skipped at {skipped or 'none'}; loss {run.losses[99]}")  # fmt: skip


def resume(lab, deterministic=False):
    """A resumed run continues the one that was never stopped."""
    settings = ONE_MICRO_STEP | dict(dropout=0.1, eval_interval=10, deterministic=deterministic)
    whole = lab.train(settings | dict(max_iters=40), "whole")
    lab.train(settings | dict(max_iters=20), "parts")
    rest = lab.train(dict(init_from="resume", max_iters=40), "parts")
    points = [torch.load(os.path.join(lab.out(name), "last.pt"), weights_only=True) for name in ("whole", "parts")]
    yield check("a resume: generators and batches are the same", same_points(*points), "states of last.pt")
    expected = {n: loss for n, loss in whole.losses.items() if n > 20}
    if not deterministic:
        yield within("a resume: losses", 1e-2, rest.losses, expected)
        return
    differ = sum(not torch.equal(w, points[1]["model"][name]) for name, w in points[0]["model"].items())
    yield check("a resume: losses and weights to the digit", not differ and rest.losses == expected,
                f"{differ} of {len(points[0]['model'])} weights differ; losses {largest_difference(rest.losses, expected):.4f}")  # fmt: skip


def deterministic(lab):
    """A resume with --deterministic=True, to the digit."""
    yield from resume(lab, deterministic=True)


def same_points(a, b):
    """Whether two checkpoints continue with the same generators and the same batch."""
    a, b = a["points"][0], b["points"][0]
    same = a["generators"].keys() == b["generators"].keys()
    same = same and all(torch.equal(state, b["generators"][name]) for name, state in a["generators"].items())
    return same and all(torch.equal(*pair) for pair in zip(a["batch"], b["batch"], strict=True))


def sigterm(lab):
    """SIGTERM as the first iteration begins, with nothing compiled yet. torchrun kills 30 s after its SIGTERM."""
    sent = []

    def stop(line, process):
        if line.startswith("step 0:") and not sent:
            sent.append(time.monotonic())
            process.send_signal(signal.SIGTERM)

    caches = {name: tempfile.mkdtemp(dir=lab.folder) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    lab.train((BABY if lab.on_gpu else GOLDEN), "stopped", env=caches, expect=128 + signal.SIGTERM, on_line=stop)
    seconds = time.monotonic() - sent[0]
    saved = torch.load(os.path.join(lab.out("stopped"), "last.pt"), weights_only=True)
    yield check("SIGTERM to saved, with a cold compile cache: within 30 s", seconds < 30 and saved["iter_num"] >= 0,
                f"{seconds:.1f} s, at iteration {saved['iter_num']}")  # fmt: skip


def clock(lab):
    """The printed times against a clock of our own, and the peak that MFU is measured against."""
    run, begin = lab.baby_run, 50
    if lab.on_gpu:
        yield Row("the first iteration, with an evaluation and all compilation", "figure", f"{run.iters[0][1] / 1000:.1f} s")
    printed = statistics.mean(ms for n, (_, ms, _) in run.iters.items() if n > begin)
    yield check("the mean printed time against our clock: within 3 %", abs(printed / run.ms(begin) - 1) <= 0.03,
                f"{printed:.2f} ms printed, {run.ms(begin):.2f} ms by our clock")  # fmt: skip
    settings = BABY if lab.on_gpu else GOLDEN | dict(max_iters=300, eval_interval=1000)
    sparse = lab.train(settings | dict(log_interval=10))
    printed = statistics.mean(ms for n, (_, ms, _) in sparse.iters.items() if n > begin)
    yield Row("one line in ten: the mean printed time, and by our clock", "figure",
              f"{printed:.2f} and {sparse.ms(begin):.2f} ms")  # fmt: skip
    yield mfu_row(run)
    said = re.search(r"peak ([\d.]+) TFLOPS \((.*?)\)", run.text)
    dtype = said[2].rpartition(" ")[2].replace("tf32", "float32")
    measured = lab.command([sys.executable, HOOKS, "matmul", lab.device, dtype]).seen["tflops"]
    yield Row("the peak that MFU uses, and a measured matmul", "figure",
              f"{said[1]} TFLOPS ({said[2]}); measured {measured:.4g}, {measured / float(said[1]):.0%}")  # fmt: skip


def mfu_row(run):
    values = [mfu for _, _, mfu in run.iters.values() if mfu is not None]
    return check("MFU is at most 100 %", bool(values) and 0 < max(values) <= 100, f"at most {max(values, default=0):.1f} %")


def sample(lab):
    """Text, evaluation and export of a model that this device has trained."""
    lab.golden_run  # noqa: B018 - trains the model where no part before has done so
    model = dict(out_dir=lab.golden_out)
    text, _ = lab.write(100, **model)
    graphs = " by CUDA graphs" if lab.on_gpu else ""
    yield check(f"greedy float32 text{graphs} is that of a CPU", text == lab.write(100, device="cpu", **model)[0], repr(text[:40]))
    if lab.on_gpu and importlib.util.find_spec("triton"):
        compiled = lab.write(100, compile=True, **model)[0]
        yield check("greedy text, compiled and not", compiled == text, f"{len(text)} characters")
    else:
        yield Row("greedy text, compiled and not", "skip", "takes a GPU and Triton")
    again = model | dict(init_from="resume", eval_only=True, eval_iters=50, dtype="float32", compile=False)
    evaluated = {device: lab.train(again | dict(device=device), env=NO_TF32) for device in {lab.device, "cpu"}}
    yield within("evaluated as on a CPU, float32", 1e-3, *(all_losses(evaluated[device]) for device in (lab.device, "cpu")))
    if importlib.util.find_spec("safetensors") is None:
        yield Row("exported", "skip", "safetensors is not installed")
        return
    folder = os.path.join(lab.folder, "exported")
    lab.command([sys.executable, "tools/export.py", f"--out_dir={lab.golden_out}", f"--to={folder}"])
    yield check("exported: the folder writes the same greedy text", lab.write(100, init_from=folder)[0] == text, "GPT-2 folder")


def sampling(lab):
    """How fast text is written."""
    lab.golden_run  # noqa: B018 - as in sample()
    short, long = (lab.write(tokens, out_dir=lab.golden_out)[1] for tokens in (1, 201))
    yield Row("sampling: 2 layers x 64, window of 32, exact, float32", "figure", f"{200 / max(long - short, 1e-9):,.0f} tokens/s")
    what = "GPT-2 124M, 200 tokens: first text and second"
    if not lab.on_gpu:
        yield Row(what, "skip", "figures of a GPU; tools/bench.py measures CPUs")
        return
    for side in filter(None, (ROOT, lab.peer)):
        run = lab.command([sys.executable, HOOKS, "decoding", lab.device], cwd=side)
        name = what if side == ROOT else f"{what}, nanoGPT"
        yield Row(name, "figure", " and ".join(f"{rate:,.0f} tokens/s" for rate in run.seen["tokens_per_second"]))
        if side == ROOT:
            refused = re.findall("a CUDA graph does not work here.*", run.text)
            yield check("no CUDA graph is refused", not refused, refused[0] if refused else "none")


def speed(lab, settings, what, data):
    """Figures of one model, with and without recompute, and of the peer."""
    if not lab.on_gpu:
        yield Row(what, "skip", "figures of a GPU; tools/bench.py measures CPUs")
        return
    tokens = settings["batch_size"] * settings["block_size"] * settings["gradient_accumulation_steps"]
    times = {}
    for recompute in (False, True):
        row = f"{what}, recompute {recompute}"
        try:
            if settings is BABY and not recompute:
                run = lab.baby_run
            else:
                run = lab.train(settings | dict(recompute=recompute), hook="graphs", data=data, env={"TORCH_LOGS": "recompiles"})
        except Failed as failure:
            if "out of memory" not in failure.output:
                raise
            yield Row(row, "skip", "does not fit into this card's memory")
            continue
        times[recompute] = ms = run.ms()
        final = run.iters[settings["max_iters"]][2]
        yield Row(row, "figure", f"{ms:.2f} ms, {tokens / ms * 1000:,.0f} tokens/s, MFU {final:.1f} %, "
                                 f"{run.seen['device_mib']:,.0f} MiB on the device")  # fmt: skip
        yield mfu_row(run)
        yield no_recompilation(run)
    if not lab.peer:
        yield Row(f"{what}, nanoGPT", "skip", "no --peer")
        return
    dtype = "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    run = lab.train(settings | dict(dtype=dtype, compile=True), hook="memory", data=data, side=lab.peer)
    ms = run.ms()
    ratio = f"; ours is {ms / times[False]:.2f} x as fast" if False in times else ""
    yield Row(f"{what}, nanoGPT, {dtype}, compiled", "figure",
              f"{ms:.2f} ms, {tokens / ms * 1000:,.0f} tokens/s, {run.seen['device_mib']:,.0f} MiB{ratio}")  # fmt: skip


def baby(lab):
    """The baby GPT: MFU and peak device memory."""
    yield from speed(lab, BABY, "baby GPT, 64 x 256, dropout 0.2", lab.small)


def gpt2(lab):
    """GPT-2 124M: MFU and peak device memory."""
    yield from speed(lab, GPT2, "GPT-2 124M, 5 micro-steps of 12 x 1024", lab.large)


def several(lab):
    """Two processes, by ddp and by fsdp."""
    if lab.on_gpu and torch.cuda.device_count() < 2:
        yield Row("two GPUs: ddp and fsdp", "skip", "this machine has one GPU")
        return
    settings = GOLDEN | dict(max_iters=19, eval_interval=1000)
    runs = {kind: lab.train(settings | dict(sharding=kind), processes=2).losses for kind in ("ddp", "fsdp")}
    complete = all(losses.keys() == set(range(20)) for losses in runs.values())
    yield check("two processes: 20 iterations by ddp and fsdp", complete, ", ".join(f"{k} {len(v)}" for k, v in runs.items()))
    yield within("two processes: the first losses, ddp and fsdp", 1e-2, first(runs["ddp"], 5), first(runs["fsdp"], 5))


SIDE_BY_SIDE = (golden, deterministic, compiled, sample, resume, sync, dtypes, guard, several)  # they time nothing
ALONE = (sigterm, clock, sampling, baby, gpt2)
PARTS = {part.__name__: part for part in SIDE_BY_SIDE + ALONE}


# ----------------------------------------------------------------------------------------------
# the table


def machine(device):
    """What the figures are of, in a line."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    count = f"{torch.cuda.device_count()} x {name}" if device.startswith("cuda") else name
    return f"{count}; torch {torch.__version__}, CUDA {torch.version.cuda}, Python {platform.python_version()}, {platform.system()}"


def rows_of(part, lab):
    """The rows of one part. What stops it is the last but one; the last is its time."""
    start = time.monotonic()
    try:
        yield from PARTS[part](lab)
    except Failed as failure:
        print("\n".join(failure.output.splitlines()[-25:]), file=sys.stderr, flush=True)
        yield Row("the part runs to its end", "fail", str(failure))
    except Exception as error:  # a missing line in an output, say: the other parts can still run
        yield Row("the part runs to its end", "fail", f"{type(error).__name__}: {error}")
    yield Row("time of this part", "figure", f"{time.monotonic() - start:.0f} s")


def run_side_by_side(parts, lab, see):
    """Runs `parts`, as many at once as half the cores, and calls see(part, row) for each row as it comes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows = queue.SimpleQueue()

    def run(part):
        for row in rows_of(part, lab.of_part(part, alone=False)):
            rows.put((part, row))
        rows.put(None)  # this part has ended

    pool = ThreadPoolExecutor(max(1, cores // 2))
    try:
        for part in parts:
            pool.submit(run, part)
        under_way = len(parts)
        while under_way:
            if found := rows.get():
                see(*found)
            else:
                under_way -= 1
    except BaseException:  # Ctrl-C: the commands under way end with this process
        lab.stopped.set()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def show(part, row):
    cells = (" ".join(cell.split()).replace("|", "/") for cell in (part, row.check, row.result, row.seen))
    print("|", " | ".join(cells), "|", flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PART,PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--peer", metavar="DIR", type=os.path.abspath, help="nanoGPT's checkout, to run beside")
    parser.add_argument("--device", default="cuda", help="cuda (the default), cuda:N or cpu")
    options = parser.parse_args(arguments)
    parts = options.only.split(",") if options.only else list(PARTS)
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", options.device):
        parser.error(f"--device={options.device}: takes cuda, cuda:N or cpu")
    if options.peer and not glob.glob(os.path.join(glob.escape(options.peer), "train.py")):
        parser.error(f"--peer={options.peer}: there is no train.py in it")
    if options.device != "cpu" and not torch.cuda.is_available():
        print(f"error: torch {torch.__version__} finds no GPU; --device=cpu runs the checks that need none", file=sys.stderr)
        return 2
    began, counts = time.monotonic(), dict.fromkeys(("pass", "fail", "figure", "skip"), 0)
    print(machine(options.device), end="\n\n")
    print("| part | check | result | seen |\n| --- | --- | --- | --- |", flush=True)

    def see(part, row):
        counts[row.result] += 1
        show(part, row)

    with tempfile.TemporaryDirectory() as folder:
        lab = Lab(options.device, folder, options.peer)
        alone = [part for part in parts if PARTS[part] in ALONE]
        run_side_by_side([part for part in parts if part not in alone], lab, see)
        for part in alone:
            for row in rows_of(part, lab.of_part(part, alone=True)):
                see(part, row)
    print("\n" + ", ".join(f"{count} {result}" for result, count in counts.items()) + f"; {time.monotonic() - began:.0f} s")
    return 1 if counts["fail"] else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # ends the commands under way, too
    sys.exit(main())
