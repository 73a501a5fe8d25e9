"""Times this trainer, alone or in turn with another checkout that has nanoGPT's command line and printed lines.

    python tools/bench.py                                  every row but trials
    python tools/bench.py --peer=DIR train_cpu sample_baby   these rows, beside the checkout in DIR
    python tools/bench.py --device=cpu                     on the CPU; by default on a GPU where there is one

A row runs whole commands in turn, ours, peer's, ours, ..., and quotes medians. train rows take the
median of the printed iteration times (the first five left out), sample rows the seconds between
two lengths of text, so that neither counts the start of Python. Peak memory is the process's own; on a GPU it is
the most that its tensors have taken there.
--runs=N sets how often (5 by default, and at least that for figures to quote).
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PROGRAMS = os.path.join(ROOT, "tests", "programs")
SMALL = "--n_layer=4 --n_head=4 --n_embd=128 --block_size=64 --batch_size=12 --dropout=0.0".split()
GPT2 = "--batch_size=2 --block_size=1024 --gradient_accumulation_steps=1 --dataset={gpt2_data}".split()
# the peer's settings: on a CPU as its README gives them, on a GPU its own defaults
PLAIN = {"cpu": ["--device=cpu", "--compile=False"], "cuda": ["--device=cuda", "--compile=True", "--dtype=bfloat16"]}
AUTO = {"cpu": ["--device=cpu"], "cuda": ["--device=cuda"]}  # ours: all else on 'auto'
GPU_ITERS = 100  # at least: there a training row takes milliseconds an iteration
BABY = ["config/train_shakespeare_char.py"]
NO_EVAL = ["--eval_iters=1", "--eval_interval=1000000", "--always_save_checkpoint=False", "--log_interval=1"]

# name: (what it is, the arguments of train.py, iterations to time)
TRAIN = {
    "train_baby": ("baby GPT, dropout 0.2", BABY, 8),
    "train_cpu": ("4 layers x 128, block 64, batch 12", BABY + SMALL, 300),
    "train_gpt2": ("GPT-2 124M, batch 2 x 1024", GPT2, 8),
    "train_gpt2_recompute": ("GPT-2 124M, batch 2 x 1024, recompute", [*GPT2, "--recompute=True"], 8),
}
# name: (what it is, the model, samples, tokens in each)
SAMPLE = {
    "sample_baby": ("baby GPT, 10 samples of 500, exact", "baby", 10, 500),
    "sample_gpt2": ("GPT-2 124M, 1 sample of 200", "gpt2", 1, 200),
}
# changes to training on a GPU that train.py does not have yet (tools/gpu_hooks.py makes them), and micro-steps
TRIALS = (
    ("", 1), ("graphs", 1), ("", 5), ("graphs", 5), ("rows", 5), ("clip", 5), ("tuning", 5), ("graphs+rows+clip+tuning", 5),
)  # fmt: skip
OTHER = ("val_cpu", "time_to_loss", "load_gpt2", "scaling", "plan", "encode", "trials")


def child(command, cwd):
    """(stdout, seconds) of one run of `command`."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate()
    seconds = time.perf_counter() - start
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{err[-2000:]}")
    return out, seconds


def measured(command, cwd, device):
    """[stdout, seconds, peak MiB] of one run of `command`; on a GPU the peak of the GPU's memory."""
    if device == "cuda":  # tools/gpu_hooks.py reads it at the end of the script
        python, *script = command
        out, seconds = child([python, os.path.join(ROOT, "tools", "gpu_hooks.py"), "memory", *script], cwd)
        return out, seconds, json.loads(re.findall(r"^seen: (.*)$", out, re.M)[-1])["device_mib"]
    out, _ = child([sys.executable, os.path.join(PROGRAMS, "measure_command.py"), cwd, *command], cwd)
    return json.loads(out)


def train_times(side, row, temporary, device):
    """(median ms an iteration, peak MiB, printed MFU or None) of one training run."""
    _, arguments, iters = TRAIN[row]
    iters = max(iters, GPU_ITERS) if device == "cuda" else iters
    arguments = [a.format(gpt2_data=os.path.join(temporary, "gpt2_data")) for a in arguments]
    extra = (PLAIN if side != ROOT else AUTO)[device]
    if side != ROOT:  # ours alone has this setting: beside it the peer runs as it is
        arguments = [a for a in arguments if a != "--recompute=True"]
    out_dir = os.path.join(temporary, "out-bench")
    command = [sys.executable, "train.py", *arguments, *NO_EVAL, f"--max_iters={iters}", f"--out_dir={out_dir}", *extra]
    out, _, peak = measured(command, side, device)
    times = [float(ms) for ms in re.findall(r"^iter \d+: loss \S+, time ([\d.]+)ms", out, re.M)][5:]
    mfu = re.findall(r"mfu ([\d.]+)%$", out, re.M)
    return statistics.median(times), peak, float(mfu[-1])


def sample_times(side, row, temporary, device):
    """(seconds for the text, peak MiB) of one sampling run, less the same command's time for a single token."""
    _, model, samples, tokens = SAMPLE[row]
    command = [sys.executable, "sample.py", f"--out_dir={temporary}/{model}", f"--num_samples={samples}", *AUTO[device]]
    _, start, _ = measured([*command, "--max_new_tokens=1"], side, device)
    _, seconds, peak = measured([*command, f"--max_new_tokens={tokens}"], side, device)
    return seconds - start, peak


def write_models(temporary):
    """Checkpoints with random weights for the sample rows, and a random dataset with GPT-2's ids."""
    sys.path.insert(0, ROOT)
    import numpy as np
    import torch

    from model import GPT, GPTConfig
    from nanogpt import checkpoint as ckpt

    data = os.path.join(temporary, "gpt2_data")
    os.makedirs(data)
    for split in ("train", "val"):
        np.random.default_rng(0).integers(0, 50257, 200_000, dtype=np.uint16).tofile(f"{data}/{split}.bin")
    shapes = {"baby": (GPTConfig(256, 65, 6, 6, 384, 0.0, False), "shakespeare_char"), "gpt2": (GPTConfig(), data)}
    for name, (config, dataset) in shapes.items():
        torch.manual_seed(0)
        state = {"model": GPT(config).state_dict(), "optimizer": {}, "model_args": config.as_model_args()}
        state |= {"iter_num": 0, "best_val_loss": 9.0, "config": {"dataset": dataset}}
        os.makedirs(os.path.join(temporary, name))
        ckpt.save(state, os.path.join(temporary, name, "ckpt.pt"))


def in_turn(measure, row, peer, runs, temporary, device):
    """The medians of `runs` runs of ours and of the peer's (None without one), taken in turn."""
    sides = {"ours": ROOT} | ({"peer": peer} if peer else {})
    results = {name: [] for name in sides}
    for _ in range(runs):
        for name, side in sides.items():
            results[name].append(measure(side, row, temporary, device))
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in results.items()}


def time_to_loss(side, settings, target, temporary):
    """(seconds, val loss, evaluations) of a run to its end, or to an evaluation of 100 batches at `target` or below."""
    command = [sys.executable, "train.py", *settings, "--eval_iters=100", "--log_interval=100"]
    command += [f"--out_dir={temporary}/out-bench"]
    unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}  # a line counts when it is printed
    process = subprocess.Popen(command, cwd=side, stdout=subprocess.PIPE, text=True, env=unbuffered)
    start, loss, evaluations = time.perf_counter(), None, 0
    for line in process.stdout:
        match = re.match(r"step \d+: train loss \S+, val loss ([\d.]+)", line)
        if match:
            loss, evaluations = float(match[1]), evaluations + 1
            if loss <= target:
                break
    seconds = time.perf_counter() - start
    process.kill()
    process.wait()
    if loss is None:
        sys.exit(f"{' '.join(command)}\nhas not evaluated its model")
    return seconds, loss, evaluations


def val_loss(seed, temporary, device):
    """Our val loss at nanoGPT's README settings for a CPU after 2000 iterations, 400 batches, all on 'auto'."""
    arguments = [*BABY, *SMALL, "--max_iters=2000", "--lr_decay_iters=2000", "--eval_iters=400", "--eval_interval=2000"]
    command = [sys.executable, "train.py", *arguments, *AUTO[device], f"--seed={seed}", f"--out_dir={temporary}/out-bench"]
    out, _ = child([*command, "--log_interval=1000"], ROOT)
    return float(re.findall(r"^step 2000: train loss \S+, val loss ([\d.]+)", out, re.M)[0])


def main():
    import torch  # not above: measured() imports this module in a process that has to be small

    every = [*TRAIN, *SAMPLE, *OTHER]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"{', '.join(every)}; without one all but trials")
    parser.add_argument("--peer", metavar="DIR", type=os.path.abspath, help="the other checkout")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="cuda where there is a GPU, else cpu")
    parser.add_argument("--runs", metavar="N", type=int, default=5, help="how often each command runs")
    options = parser.parse_args()
    rows = options.rows or [row for row in every if row != "trials"]
    peer, runs = options.peer, options.runs
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if unknown := ", ".join(row for row in rows if row not in every):
        parser.error(f"no such row: {unknown}; there are {', '.join(every)}")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device=cuda: torch {torch.__version__} finds no GPU")
    if runs < 1:
        parser.error(f"--runs={runs}: must be at least 1")
    if peer and not os.path.exists(os.path.join(peer, "train.py")):
        parser.error(f"--peer={peer}: there is no train.py in it")
    for side in (ROOT, peer):
        if side and not os.path.exists(os.path.join(side, "data", "shakespeare_char", "train.bin")):
            parser.error(f"type first, in {side}: python data/shakespeare_char/prepare.py")
    with tempfile.TemporaryDirectory() as temporary:
        write_models(temporary)
        print("| work | ours | peer | ratio | tokens/s | MFU | peak memory, ours / peer |")
        print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
        for row in rows:
            if row in TRAIN:
                tokens = {"train_baby": 64 * 256, "train_cpu": 12 * 64}.get(row, 2 * 1024)
                result = in_turn(train_times, row, peer, runs, temporary, device)
                ms, peak, mfu = result["ours"]
                cells = [f"{ms:,.1f} ms", f"{tokens / ms * 1000:,.0f}", f"{mfu:.0f} %"]
                theirs = f"{result['peer'][0]:,.1f} ms" if peer else "-"
            elif row in SAMPLE:
                result = in_turn(sample_times, row, peer, runs, temporary, device)
                seconds, peak = result["ours"]
                _, _, samples, tokens = SAMPLE[row]
                cells = [f"{seconds:,.2f} s", f"{samples * tokens / seconds:,.0f}", "-"]
                theirs = f"{result['peer'][0]:,.2f} s" if peer else "-"
            else:
                print(other_row(row, peer, runs, temporary, device), flush=True)
                continue
            ratio = f"{result['peer'][0] / result['ours'][0]:.2f} x" if peer else "-"
            memory = f"{peak:,.0f} / {result['peer'][1]:,.0f} MiB" if peer else f"{peak:,.0f} MiB"
            what = {**TRAIN, **SAMPLE}[row][0]
            print("|", " | ".join([what, cells[0], theirs, ratio, *cells[1:], memory]), "|", flush=True)


def other_row(row, peer, runs, temporary, device):
    if row == "val_cpu":
        losses = [val_loss(seed, temporary, device) for seed in (1337, 1, 2)]
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        return f"| val loss after 2000 iterations, seeds 1337, 1, 2 | mean {statistics.mean(losses):.3f} ({shown}) | | | | | |"
    if row == "load_gpt2":
        return load_row(temporary)
    if row == "plan":
        return plan_rows(runs, temporary, device)
    if row == "encode":
        return encode_rows(runs)
    if row == "trials":
        return trial_rows(runs, temporary, device)
    if row == "scaling" and device == "cuda":
        return "| scaling | measures processes on a CPU: add --device=cpu | | | | | |"
    if row == "scaling":
        return scaling_rows(runs, temporary)
    return loss_row(peer, runs, temporary, device)


def encode_rows(runs):
    """Rows of how fast one thread encodes tiny Shakespeare's characters: GPT-2's tokens, 4,096 trained ones, and these by
    Hugging Face's tokenizers, with Unigram tokens of theirs for a kind that only tokenizers computes."""
    sys.path.insert(0, ROOT)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from data.bins import open_bin
    from data.codecs import BPECodec, TokenizerCodec
    from data.text_files import pieces
    from data.tokenizer import codec_of_tokenizer, train_tokenizer
    from data.tokens import Tokens

    folder = os.path.join(ROOT, "data", "shakespeare_char")
    text = Tokens.of_dataset(folder).codec.decode(open_bin(os.path.join(folder, "train.bin"))[0].tolist())
    trained = train_tokenizer([text], 4096)
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer, unigram.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=4096, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    unigram.train_from_iterator(text.splitlines(), trainer)
    codecs = {
        "GPT-2's tokens": BPECodec(), "4,096 trained tokens": codec_of_tokenizer(trained, "trained"),
        "the same by tokenizers": TokenizerCodec(trained, "trained", None, None),
        "4,096 Unigram tokens": codec_of_tokenizer(unigram.to_str(), "Unigram"),
    }  # fmt: skip
    times = {name: [] for name in codecs}
    for _ in range(runs):
        for name, codec in codecs.items():
            start = time.perf_counter()
            for piece in pieces([text], codec.cuts_at_lines):
                codec.encode_ordinary(piece)
            times[name].append(time.perf_counter() - start)
    lines, gpt2 = [], statistics.median(times["GPT-2's tokens"])
    for name in codecs:
        seconds = statistics.median(times[name])
        speed = f"{len(text.encode()) / seconds / 1e6:.1f} MB/s"
        lines.append(f"| encoding, one thread: {name} | {speed} | - | {gpt2 / seconds:.2f} x GPT-2's | - | - | - |")
    return "\n".join(lines)


def trial_rows(runs, temporary, device):
    """Rows of GPT-2 124M with each change of TRIALS; the ratio is to the same micro-steps without it."""
    if device == "cpu":
        return "| trials | measures changes for a GPU | | | | | |"
    settings = ["--batch_size=12", "--block_size=1024", f"--dataset={temporary}/gpt2_data", f"--out_dir={temporary}/out"]
    settings += ["--device=cuda", *NO_EVAL[:-1], "--log_interval=10", "--max_iters=40"]
    found = {trial: [] for trial in TRIALS}
    for _ in range(runs):
        for changes, micro_steps in TRIALS:
            hook = [sys.executable, os.path.join(ROOT, "tools", "gpu_hooks.py"), f"trial:{changes}"]
            command = [*hook, "train.py", *settings, f"--gradient_accumulation_steps={micro_steps}"]
            out, _ = child(command, ROOT)
            lines = re.findall(r"^iter \d+: loss (\S+), time ([\d.]+)ms, mfu ([\d.]+)%$", out, re.M)
            loss, _, mfu = map(float, lines[-1])
            peak = json.loads(re.findall(r"^seen: (.*)$", out, re.M)[-1])["device_mib"]
            ms = statistics.median(float(ms) for _, ms, _ in lines)
            found[changes, micro_steps].append((ms, mfu, peak, loss))
    medians = {trial: [statistics.median(column) for column in zip(*rows, strict=True)] for trial, rows in found.items()}
    lines = []
    for (changes, micro_steps), (ms, mfu, peak, loss) in medians.items():
        what = f"GPT-2 124M, {micro_steps} x 12 x 1024, {changes or 'as it is'}: loss {loss:.4f}"
        ratio = f"{medians['', micro_steps][0] / ms:.3f} x"
        rate = f"{micro_steps * 12 * 1024 / ms * 1000:,.0f}"
        lines.append(f"| {what} | {ms:,.2f} ms | - | {ratio} | {rate} | {mfu:.1f} % | {peak:,.0f} MiB |")
    return "\n".join(lines)


def loss_row(peer, runs, temporary, device, target=1.908):
    """The way to nanoGPT's val loss at its README settings for a CPU: ours with a seed of its own each time."""
    theirs = [*BABY, *SMALL, *PLAIN[device], "--max_iters=2000", "--lr_decay_iters=2000"]
    results = {"ours": [], "peer": []}
    for k in range(runs):
        ours = ["config/train_shakespeare_cpu.py", *AUTO[device], f"--seed={1337 + k}"]
        results["ours"].append(time_to_loss(ROOT, ours, target, temporary))
        if peer:
            results["peer"].append(time_to_loss(peer, theirs, target, temporary))
    cells, medians = [], []
    for found in filter(None, results.values()):
        times, losses, evaluations = zip(*found, strict=True)
        medians.append(statistics.median(times))
        reached = ", ".join(f"{loss:.3f}" + " missed" * (loss > target) for loss in losses)
        cells.append(f"{medians[-1]:.1f} s (val {reached}; {max(evaluations)} evaluations)")
    missed = any(loss > target for _, loss, _ in results["ours"])
    ratio = f"{medians[1] / medians[0]:.2f} x" if peer and not missed else "-"
    return f"| wall time to val loss {target} | {cells[0]} | {cells[1] if peer else '-'} | {ratio} | | | |"


PLANNED = ("train_baby", "train_cpu", "train_gpt2")


def plan_rows(runs, temporary, device):
    """Forecast beside fact of three training rows, without and with recompute. A row outside the limits says so.

    Time: tools/plan.py --measure=True, within 15 %. Memory: what it forecasts, within 10 %."""
    return "\n".join(
        plan_row(*TRAIN[name], recompute, runs, temporary, device) for name in PLANNED for recompute in (False, True)
    )


def plan_row(what, arguments, iters, recompute, runs, temporary, device):
    common = [a.format(gpt2_data=os.path.join(temporary, "gpt2_data")) for a in arguments]
    common += [*AUTO[device], f"--recompute={recompute}"]
    forecast, fact, memory, held = [], [], [], []
    for _ in range(runs):
        out, _ = child([sys.executable, "tools/plan.py", *common, "--measure=True"], ROOT)
        forecast.append(float(re.search(r"^an iteration: ([\d.,]+) ms, measured", out, re.M)[1].replace(",", "")))
        memory.append(int(re.search(r"^  sum +([\d,]+) +([\d,]+)$", out, re.M)[1 + recompute].replace(",", "")))
        run = [*common, *NO_EVAL, f"--max_iters={iters}", f"--out_dir={temporary}/out-bench"]
        hook = [sys.executable, os.path.join(ROOT, "tools", "gpu_hooks.py"), "added_memory"]
        out, _ = child([*hook, os.path.join(ROOT, "train.py"), *run], ROOT)
        times = [float(ms) for ms in re.findall(r"^iter \d+: loss \S+, time ([\d.]+)ms", out, re.M)]
        fact.append(statistics.median(times[5:]))
        held.append(json.loads(re.findall(r"^seen: (.*)$", out, re.M)[-1])["added_mib"])
    forecast, fact, memory, held = map(statistics.median, (forecast, fact, memory, held))
    time_off, memory_off = forecast / fact - 1, memory / held - 1
    cells = [f"plan: {what}{', recompute' * recompute}", f"{forecast:,.1f} / {fact:,.1f} ms", "-", f"{time_off:+.0%}", "-", "-"]
    cells[3] += " MISSED" * (abs(time_off) > 0.15)
    cells.append(f"{memory:,.0f} / {held:,.0f} MiB, {memory_off:+.0%}" + " MISSED" * (abs(memory_off) > 0.10))
    return f"| {' | '.join(cells)} |"


def loopback_bytes():
    """What has passed through this machine's loopback device so far, which is how gloo's processes here talk."""
    with open("/proc/net/dev", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.strip().startswith("lo:"))


def scaling_rows(runs, temporary):
    """Rows of one process with two threads, and two with one each by ddp and fsdp, on the same batches an iteration."""
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    starts = {
        "1 process x 2 threads": [sys.executable, "train.py"],
        "2 processes x 1 thread, ddp": [*together, "train.py"],
        "2 processes x 1 thread, fsdp": [*together, "train.py", "--sharding=fsdp"],
    }
    arguments = [*BABY, *SMALL, *NO_EVAL, "--gradient_accumulation_steps=2", "--device=cpu", f"--out_dir={temporary}/out"]
    times, moved = {name: [] for name in starts}, {name: [] for name in starts}
    for _ in range(runs):
        for name, start in starts.items():
            passed = []
            for iters in (20, 120):  # the difference leaves out what start and end have moved
                before = loopback_bytes()
                out, _ = child([*start, *arguments, f"--max_iters={iters}"], ROOT)
                passed.append(loopback_bytes() - before)
            moved[name].append((passed[1] - passed[0]) / 100)
            printed = re.findall(r"^iter \d+: loss \S+, time ([\d.]+)ms", out, re.M)
            times[name].append(statistics.median(map(float, printed[5:])))
    lines, alone = [], statistics.median(times["1 process x 2 threads"])
    for name in starts:
        ms, megabytes = statistics.median(times[name]), statistics.median(moved[name]) / 1e6
        ratio = f"{alone / ms:.2f} x one process"
        lines.append(f"| {name}, 2 micro-batches an iteration | {ms:.1f} ms | - | {ratio} | {2 * 12 * 64 / ms * 1000:,.0f} | - "
                     f"| {megabytes:.2f} MB an iteration by loopback |")  # fmt: skip
    return "\n".join(lines)


def load_row(temporary):
    """Peak memory of loading a local GPT-2 folder of 124M parameters, over what the process had before."""
    folder = os.path.join(temporary, "hf-gpt2")
    child([sys.executable, "tools/export.py", f"--out_dir={temporary}/gpt2", f"--to={folder}"], ROOT)
    out, _ = child([sys.executable, os.path.join(PROGRAMS, "loading_memory.py"), folder], ROOT)
    own, total, model = map(float, out.split())
    return f"| loading a GPT-2 folder, 124M | {own:.0f} MiB, {total:.0f} with the mapped file; the model has {model:.0f} | | | | | |"


if __name__ == "__main__":
    main()
