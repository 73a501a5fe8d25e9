"""Shows what spike_sigma is worth: trains small models on tiny Shakespeare, and harms some of them.

    python data/shakespeare_char/prepare.py
    python tests/spikes.py                          every row, seeds 1337 to 1341: about eight minutes on a core
    python tests/spikes.py --seeds=2 skipped huge   these rows, two seeds

A model has 2 layers x 64 and a context of 64 characters; it trains for 1000 iterations in float32 on one core, at the
learning rate of config/train_shakespeare_char.py, with the clip off. Iterations 300 to 304 are harmed (see
tests/programs/inject.py). The losses are tools/evaluate.py's, exact over the val split.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SETTINGS = (
    "config/train_shakespeare_char.py --device=cpu --compile=False --dtype=float32 --block_size=64 --batch_size=12 "
    "--n_layer=2 --n_head=2 --n_embd=64 --dropout=0.0 --peak_flops=1e12 --max_iters=1000 --lr_decay_iters=1000 "
    "--eval_interval=100 --eval_iters=10 --log_interval=50 --always_save_checkpoint=True --grad_clip=0.0"
).split()
RANDOM = dict(INJECT="random", AT="300", COUNT="5")
HUGE = RANDOM | dict(INJECT="huge", SCALE="100")
SIGMA = ["--spike_sigma=6"]
# name: (what it is, the harm, more settings)
ROWS = {
    "random": ("random tokens", RANDOM, []),
    "random_guarded": ("random tokens, spike_sigma = 6", RANDOM, SIGMA),
    "huge": ("random tokens, gradient x 100", HUGE, []),
    "huge_guarded": ("random tokens, gradient x 100, spike_sigma = 6", HUGE, SIGMA),
    "muon_guarded": ("muon: random tokens, gradient x 100, spike_sigma = 6", HUGE, [*SIGMA, "--optimizer=muon"]),
}
LONG = ["--max_iters=2000", "--lr_decay_iters=2000", *SIGMA]  # what `skipped` runs, with the clip on and off


def python(*arguments, env=None):
    """What `python ARGUMENTS` prints."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | (env or {})
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(arguments)}\n{done.stdout[-500:]}{done.stderr[-2000:]}")
    return done.stdout


def trained(seed, harm, more):
    """(exact val loss, steps skipped) of a run."""
    with tempfile.TemporaryDirectory() as out_dir:
        script = "tests/programs/inject.py" if harm else "train.py"
        printed = python(script, *SETTINGS, *more, f"--seed={seed}", f"--out_dir={out_dir}", env=harm)
        skipped = int(re.search(r"^skipped steps: (\d+)$", printed, re.M)[1])
        losses = python("tools/evaluate.py", f"--out_dir={out_dir}", "--device=cpu")
    return float(re.search(r"^val: ([\d.]+) nats", losses, re.M)[1]), skipped


def clean(seed, more, known={}):  # noqa: B006 - one clean run a seed and optimizer
    """The exact val loss of the run of `seed` that nothing harms, without a guard."""
    more = tuple(setting for setting in more if "spike" not in setting)
    if (seed, more) not in known:
        known[seed, more] = trained(seed, {}, more)[0]
    return known[seed, more]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help=", ".join([*ROWS, "skipped"]))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=1337)
    options = parser.parse_args()
    rows, seeds = options.rows or [*ROWS, "skipped"], range(options.first, options.first + options.seeds)
    if unknown := set(rows) - {*ROWS, "skipped"}:
        parser.error(f"unknown: {', '.join(unknown)}")
    print("| run | val loss above the clean run's, each seed | median | steps skipped |")
    print("| --- | --- | --- | --- |")
    for name in (row for row in rows if row in ROWS):
        what, harm, more = ROWS[name]
        results = [(trained(seed, harm, more), clean(seed, more)) for seed in seeds]
        above = [loss - reference for (loss, _), reference in results]
        skipped = " ".join(str(count) for (_, count), _ in results)
        figures = " ".join(f"{x:+.4f}" for x in above)
        print(f"| {what} | {figures} | {statistics.median(above):+.4f} | {skipped} |", flush=True)
    for clip in ("1.0", "0.0") if "skipped" in rows else ():
        skipped = [trained(seed, {}, [*LONG, f"--grad_clip={clip}"])[1] for seed in seeds]
        what = f"clean, 2000 iterations, grad_clip = {clip}, spike_sigma = 6"
        print(f"| {what} | | | {' '.join(map(str, skipped))} |", flush=True)


if __name__ == "__main__":
    main()
