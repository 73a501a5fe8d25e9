"""Compares kinds of tokens by bits per byte after equal training time: characters, your own, and GPT-2's.

    pip install tokenizers
    python tests/compare_tokens.py data/shakespeare_char/input.txt            30 seconds, seeds 1337, 1 and 2
    python tests/compare_tokens.py FILE --seconds=120 --seeds 1337 --vocab_sizes 512 2048 -- --dropout=0.1

The model and all settings are those of config/train_text_bpe_cpu.py, and of train.py's arguments after `--`. First the
time of an iteration is measured for each kind of tokens, in turn. Then each run has as many iterations as fit in
--seconds, so evaluations and the start do not count, and its learning rate decays over them. The figure is
tools/evaluate.py's, of the best of about ten evaluations, exact over the val part: the same bytes for all kinds.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = "config/train_text_bpe_cpu.py"
WARM_UP, TIMED, ROUNDS = 30, 120, 3  # iterations, and how often all kinds are timed in turn


def python(*arguments):
    """What `python ARGUMENTS` prints."""
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout


def prepare(file, vocab_sizes):
    """{kind of tokens: name of its dataset} of the text in `file`."""
    stem = "compare-" + re.sub(r"\W+", "-", os.path.basename(file))
    scripts = {"characters": ["data/text_char/prepare.py"], "GPT-2's": ["data/text_bpe/prepare.py"]}
    scripts |= {f"own, {size}": ["data/text_bpe/prepare.py", f"--vocab_size={size}"] for size in vocab_sizes}
    names = {kind: f"{stem}-{re.sub(r'[^a-z0-9]', '', kind.lower())}" for kind in scripts}
    for kind, script in scripts.items():
        python(*script, os.path.abspath(file), f"--name={names[kind]}")
    return names


def train(dataset, out_dir, *settings):
    return python("train.py", CONFIG, f"--dataset={dataset}", f"--out_dir={out_dir}", *settings)


def milliseconds(names, settings):
    """{kind: median time of an iteration in ms}, over all rounds."""
    times = {kind: [] for kind in names}
    once = [f"--max_iters={WARM_UP + TIMED}", "--eval_interval=1000000", "--eval_iters=1", "--log_interval=1"]
    for _ in range(ROUNDS):
        for kind, name in names.items():
            with tempfile.TemporaryDirectory() as out_dir:
                printed = train(name, out_dir, *settings, *once)
            times[kind] += [float(ms) for ms in re.findall(r"time ([\d.]+)ms", printed)[WARM_UP:]]
    return {kind: statistics.median(found) for kind, found in times.items()}


def bits_per_byte(dataset, iterations, seed, settings):
    """Of the best model of a run, over the whole val part."""
    last = iterations - 1
    schedule = [f"--max_iters={last}", f"--lr_decay_iters={last}", f"--eval_interval={max(1, last // 10)}"]
    with tempfile.TemporaryDirectory() as out_dir:
        train(dataset, out_dir, *settings, *schedule, f"--seed={seed}")
        printed = python("tools/evaluate.py", f"--out_dir={out_dir}")
    return float(re.search(r"^val: .* ([\d.]+) bits per byte", printed, re.M)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1337, 1, 2])
    parser.add_argument("--vocab_sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("settings", nargs="*", help="more of train.py's arguments, after --")
    options = parser.parse_args()
    names = prepare(options.file, options.vocab_sizes)
    ms = milliseconds(names, options.settings)
    print(f"| tokens | ms | iterations | bits per byte, {options.seconds:g} s of training, each seed | median |")
    print("| --- | --- | --- | --- | --- |")
    for kind, name in names.items():
        iterations = max(2, round(options.seconds * 1000 / ms[kind]))
        found = [bits_per_byte(name, iterations, seed, options.settings) for seed in options.seeds]
        figures = " ".join(f"{figure:.3f}" for figure in found)
        print(f"| {kind} | {ms[kind]:.1f} | {iterations:,} | {figures} | {statistics.median(found):.3f} |", flush=True)


if __name__ == "__main__":
    main()
