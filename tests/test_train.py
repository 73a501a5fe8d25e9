"""train.py as a user sees it: printed losses, lines, the command."""

import csv
import math
import os
import re
import shutil
import time
from collections import Counter

import psutil
import pytest
import torch
from conftest import IN_BFLOAT16, RESUME, SMALL, SYNTHETIC, TINY, flags, parse, rows, tree
from reference import losses_of_a_run
from runs import DEFAULTS, TOKENS, assert_near, assert_same_losses, golden, load, val_losses


# ----------------------------------------------------------------------------------------------
# the numbers


def test_losses_equal_nanogpts_on_the_synthetic_tokens(synthetic_run):
    assert_same_losses(synthetic_run[1].losses, golden("synthetic.csv"))


@pytest.mark.parametrize("iterations", [100, pytest.param(300, marks=pytest.mark.slow)])
def test_losses_equal_nanogpts_on_tiny_shakespeare(run, own_project, shared, tmp_path, iterations):
    folder = own_project / "data" / "shakespeare_char"
    shutil.copy(shared / "tinyshakespeare" / "input.txt", folder)
    run("data/shakespeare_char/prepare.py", project=own_project)
    settings = dict(
        n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0, max_iters=iterations,
        lr_decay_iters=2000, eval_interval=100, eval_iters=20, log_interval=1, device="cpu", dtype="float32",
        compile=False, peak_flops=1e12, out_dir=tmp_path / "out",
    )  # fmt: skip
    result = run("train.py", "config/train_shakespeare_char.py", *flags(settings), project=own_project)
    expected = [line for line in golden("shakespeare_cpu.csv") if line[1] <= iterations]
    assert_same_losses(result.losses, expected)


OTHERS = {
    "biases, accumulation, no clipping, constant lr": dict(
        bias=True, gradient_accumulation_steps=3, grad_clip=0.0, decay_lr=False, seed=7, eval_iters=21
    ),
    "tight clipping, other AdamW settings, past the decay": dict(
        grad_clip=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, seed=2, learning_rate=3e-3, lr_decay_iters=10,
        warmup_iters=0, n_layer=3, n_head=4, gradient_accumulation_steps=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())  # 21 evaluation batches are passes of 16 and 5
def test_losses_equal_a_plain_reimplementation_at_other_settings(run, tmp_path, other):
    settings = SYNTHETIC | DEFAULTS | dict(max_iters=12, eval_interval=6) | other
    result = run("train.py", *flags(settings, out_dir=tmp_path / "out"))
    assert_near(result.losses, losses_of_a_run(TOKENS, settings))


def test_the_learning_rate_warms_up_and_falls_along_a_cosine(synthetic_run):
    with open(synthetic_run[0] / "log.csv", newline="") as f:
        lr = {int(row["iter"]): float(row["lr"]) for row in csv.DictReader(f) if row["kind"] == "train"}
    # by hand, for 1e-3, min 1e-4, warm-up 10, decay 120: at 21 a tenth of the cosine is done, at 65 half of it
    by_hand = {0: 1e-3 / 11, 4: 5e-3 / 11, 9: 10e-3 / 11, 10: 1e-3, 21: 9.779754e-4, 65: 5.5e-4, 109: 1.220246e-4}
    for n, expected in (by_hand | {120: 1e-4, 121: 1e-4, 150: 1e-4}).items():
        assert lr[n] == pytest.approx(expected, rel=1e-6), n


def test_a_constant_learning_rate_has_no_warm_up(run, tmp_path):
    result = run("train.py", *flags(TINY, decay_lr=False, max_iters=3, warmup_iters=9, out_dir=tmp_path))
    assert "warm-up" not in result.stdout
    with open(tmp_path / "log.csv", newline="") as f:
        assert {float(row["lr"]) for row in csv.DictReader(f)} == {1e-2}


def test_dropout_changes_the_losses_but_not_the_batches(run, tmp_path):
    """The batches have a generator of their own, so evaluation before the first step sees the same ones."""
    plain = run("train.py", *flags(TINY, out_dir=tmp_path / "a")).losses
    dropped = run("train.py", *flags(TINY, dropout=0.2, out_dir=tmp_path / "b")).losses
    assert dropped[0] == plain[0] and dropped[1] != plain[1]
    last = [float(losses[-2][3]) for losses in (plain, dropped)]  # val loss after the same batches
    assert last[0] != last[1] and abs(last[0] - last[1]) < 0.2


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=IN_BFLOAT16)])
def test_recompute_changes_no_printed_loss_and_no_row_of_the_log(train, tmp_path, dtype):
    settings = SMALL | dict(n_layer=2, dropout=0.2, dtype=dtype)
    plain, recomputed = (train(settings, recompute=r, out_dir=tmp_path / str(r)) for r in (False, True))
    assert plain.losses == recomputed.losses and len(plain.losses) == 17 + 5
    assert rows(tmp_path / "False") == rows(tmp_path / "True")  # gradient norms, too
    weights = [load(tmp_path / str(r) / "last.pt")["model"] for r in (False, True)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.parametrize("dtype", [pytest.param("bfloat16", marks=IN_BFLOAT16), "float16"])
def test_half_precision_learns_as_float32_does(train, whole_run, tmp_path, dtype):
    settings = TINY | dict(max_iters=40, lr_decay_iters=40, eval_interval=10)
    expected = [float(line[3]) for line in whole_run(settings)[0] if line[0] == "step"]
    result = train(settings, dtype=dtype, out_dir=tmp_path)
    assert f", {dtype}, compile False" in result.stdout
    assert val_losses(result) == pytest.approx(expected, abs=0.05) and expected[-1] < expected[0] - 0.3
    assert (load(tmp_path / "last.pt")["scaler"].get("scale", 0) > 1) == (dtype == "float16")  # it scales its loss


# ----------------------------------------------------------------------------------------------
# the lines

NUMBER = r"\d+\.\d{4}"
ITER = rf"iter \d+: loss {NUMBER}, time \d+\.\d\dms, mfu (n/a|\d+\.\d\d%)"
STEP = rf"step \d+: train loss {NUMBER}, val loss {NUMBER}"


def test_every_printed_line_has_its_form_and_place(run, tmp_path):
    lines = run("train.py", *flags(TINY, out_dir=tmp_path / "out", max_iters=9)).lines
    start_up = r"1 x cpu, \d+ CPU threads each, float32, compile False, adamw, .*peak 0\.001 TFLOPS \(given\)"
    progress = r"\d+% done(, [\d,]+ tokens/s, \d:\d\d:\d\d left)?"
    saving = re.escape(f"saving checkpoint to {tmp_path / 'out'}")
    expected = [
        r"tokens per iteration will be: 64",
        r"found vocab_size = 61 \(inside data/synthetic/meta\.pkl\)",
        r"Initializing a new model from scratch",
        r"number of parameters: 0\.00M",
        start_up,
        r"the learning rate is min_lr = 0\.001 from iteration 8 on, .*--lr_decay_iters=9",
        *[STEP, progress, *[ITER] * 4],
        *[STEP, saving, progress, *[ITER] * 4],
        *[STEP, saving, progress, *[ITER] * 2],
        r"skipped steps: 0",
        rf"best val loss {NUMBER} at iteration 8, {NUMBER} bits per byte, 640 tokens seen, \d:\d\d:\d\d in all, at most .*",
        r"to see what it writes: python .*sample\.py --out_dir=.*",
        r"to see the curves: python .*plot\.py .*",
    ]
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), (line, pattern)
    # 0.00M by hand: wte 61 x 16, 12 x 16^2 a block, three norms of 16; positions left out
    assert [int(line.split()[1].rstrip(":")) for line in lines if line.startswith("iter")] == list(range(10))


def test_the_baby_gpts_first_lines_are_the_seeds(run, tmp_path):
    """16,384 tokens and 10.65M parameters: config/train_shakespeare_char.py's sizes."""
    settings = dict(batch_size=64, block_size=256, eval_iters=1, max_iters=0, device="cpu", dtype="float32")
    small = dict(n_layer=1, n_head=1, n_embd=8, peak_flops=1e12, dataset="synthetic")
    result = run("train.py", "config/train_shakespeare_char.py", *flags(settings | small, out_dir=tmp_path / "out"))
    assert result.lines[0] == "tokens per iteration will be: 16,384"


def test_mfu_is_no_number_for_five_iterations_and_then_a_running_average(run, tmp_path):
    lines = run("train.py", *flags(TINY, max_iters=12, out_dir=tmp_path)).lines
    shown = [(float(m[1]), m[2]) for m in (re.match(r"iter .* time (\S+)ms, mfu (\S+)", line) for line in lines) if m]
    assert [mfu for _, mfu in shown[:5]] == ["n/a"] * 5
    # PaLM, appendix B: 6N + 12 L H Q T a token, N by hand as above; 16 x 4 tokens, peak 1e9
    flops = (6 * (61 * 16 + 12 * 16**2 + 3 * 16) + 12 * 16 * 16) * 64
    running = None
    for ms, mfu in shown[5:]:
        now = flops / (ms / 1000 * 1e9)
        running = now if running is None else 0.9 * running + 0.1 * now
        assert mfu.endswith("%") and float(mfu[:-1]) == pytest.approx(100 * running, rel=0.01)


def test_a_line_is_printed_every_log_interval_and_an_evaluation_every_eval_interval(run, tmp_path):
    losses = run("train.py", *flags(TINY, max_iters=20, log_interval=6, eval_interval=7, out_dir=tmp_path)).losses
    assert [line[:2] for line in losses] == [
        ("step", 0), ("iter", 0), ("iter", 6), ("step", 7), ("iter", 12), ("step", 14), ("iter", 18)
    ]  # fmt: skip


def test_time_is_that_of_the_iteration_with_its_evaluation(run, tmp_path):
    lines = run("train.py", *flags(TINY, eval_iters=200, out_dir=tmp_path)).lines
    times = [float(re.search(r"time (\S+)ms", line)[1]) for line in lines if line.startswith("iter")]
    others = sorted(times[n] for n in (1, 2, 3, 5, 6, 7))
    assert min(times[0], times[4], times[8]) > 3 * others[len(others) // 2]  # 400 more forward passes


def test_the_readers_of_the_lines_find_all_of_them():
    """conftest.parse, on the seed's own excerpt."""
    text = "iter 4980: loss 0.8010, time 33.22ms, mfu 11.07%\nstep 5000: train loss 0.6224, val loss 1.7044\n"
    assert parse(text) == [("iter", 4980, "0.8010"), ("step", 5000, "0.6224", "1.7044")]


# ----------------------------------------------------------------------------------------------
# eval_only


def test_eval_only_evaluates_once_and_writes_nothing(run, synthetic_run, project, tmp_path):
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    saved = load(tmp_path / "out" / "last.pt")
    assert saved["iter_num"] == 151  # of no eval_interval
    before = tree(tmp_path, project)
    result = run("train.py", *flags(RESUME, out_dir=tmp_path / "out", eval_only=True))
    assert [line[:2] for line in result.losses] == [("step", 151)] and re.fullmatch(STEP, result.lines[-1])
    fresh = run("train.py", *flags(SYNTHETIC, out_dir=tmp_path / "new", eval_only=True))
    assert fresh.losses == [golden("synthetic.csv")[0]] and re.fullmatch(STEP, fresh.lines[-1])
    assert tree(tmp_path, project) == before


@pytest.mark.parametrize("name", ["last.pt", "ckpt.pt"])
def test_eval_only_on_a_checkpoint_evaluates_once_and_writes_nothing(train, small_run, name):
    """From either file, of which ckpt.pt has its evaluation behind it, and at a run's end."""
    os.remove(small_run / ({"last.pt", "ckpt.pt"} - {name}).pop())
    best = load(small_run / name)["best_val_loss"]
    before = tree(small_run)
    result = train(SMALL, out_dir=small_run, max_iters=8, init_from="resume", eval_only=True)
    assert [line[:2] for line in result.losses] == [("step", 9 if name == "last.pt" else 8)]
    assert val_losses(result) == [pytest.approx(best, abs=0.1)]  # on other batches
    assert tree(small_run) == before


# ----------------------------------------------------------------------------------------------
# the command


def test_it_works_from_any_folder_by_a_fresh_interpreter(run, project, tmp_path):
    """Data and config/ are found beside the script; out_dir is taken from where the user stands."""
    settings = dict(dataset="synthetic", n_layer=1, n_head=1, n_embd=8, block_size=16, batch_size=2, eval_iters=1)
    more = flags(settings, max_iters=1, device="cpu", out_dir="here", warmup_iters=0)
    run("train.py", "config/train_shakespeare_char.py", *more, cwd=tmp_path, interpreter=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
    assert load(tmp_path / "here" / "last.pt")["config"]["beta2"] == 0.99  # the config file's


def test_a_config_file_of_the_users_may_compute(run, tmp_path):
    config = tmp_path / "mine.py"
    config.write_text(
        "import math\n"
        "_heads = 2\n"
        "n_head = _heads\n"
        "n_embd = 8 * _heads\n"
        "max_iters = int(math.sqrt(16))\n"
        "lr_decay_iters = max_iters\n"
        "eval_interval = eval_iters + 1\n"
    )
    result = run("train.py", *flags(TINY, n_embd=4, eval_iters=1), str(config), f"--out_dir={tmp_path / 'out'}")
    saved = load(tmp_path / "out" / "last.pt")
    assert saved["model_args"]["n_embd"] == 16
    assert [line[:2] for line in result.losses if line[0] == "step"] == [("step", 0), ("step", 2), ("step", 4)]


def test_without_a_meta_the_vocabulary_is_gpt2s_padded(run, own_project, tmp_path):
    (own_project / "data" / "synthetic" / "meta.pkl").unlink()
    result = run("train.py", *flags(TINY, max_iters=2, out_dir=tmp_path / "out"), project=own_project)
    assert "50304" in result.stdout and "found vocab_size" not in result.stdout
    assert load(tmp_path / "out" / "last.pt")["model_args"]["vocab_size"] == 50304
    first = float(result.losses[0][2])
    assert first == pytest.approx(math.log(50304), abs=0.05)  # an untrained model knows nothing


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_compiles_nothing_does_not_import_the_compiler(run, tmp_path, optimizer):
    script = "tests/programs/compiler_is_imported.py"
    settings = flags(TINY, out_dir=tmp_path / "out", optimizer=optimizer)
    for more in (["--max_iters=1"], ["--max_iters=2", "--init_from=resume"]):
        assert run(script, *settings, *more, interpreter=True).stdout.splitlines()[-1] == "False"


# ----------------------------------------------------------------------------------------------
# a long run


@pytest.mark.slow
def test_a_long_run_takes_no_more_memory_or_files_than_a_short_one(start, tmp_path):
    settings = SMALL | dict(max_iters=6000, eval_interval=250, save_interval=50, gradient_accumulation_steps=1)
    running = start("train.py", *flags(settings, out_dir=tmp_path))
    running.wait_for("iter 1000:")
    process, seen = psutil.Process(running.process.pid), []
    while running.code is None:
        try:
            open_files = Counter(f.path for f in process.open_files() if not f.path.endswith(".tmp"))
            memory = process.memory_info().rss / 2**20
            at = running.read()[0].count("\niter ")
        except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            break
        seen.append((at, memory, len(open_files), process.num_fds() if process.is_running() else 0))
        time.sleep(0.25)
    assert running.end().returncode == 0
    assert len(seen) >= 8 and seen[-1][0] > 4000
    quarter = len(seen) // 4
    early, late = seen[:quarter], seen[-quarter - 1 : -1]
    print(early[0], late[-1])
    assert max(m for _, m, *_ in late) < max(m for _, m, *_ in early) + 4  # MiB
    assert max(n for *_, n, _ in late) <= max(n for *_, n, _ in early) + 1
    assert max(n for *_, n in late) <= max(n for *_, n in early) + 2
