"""train.py as a user sees it: printed losses, lines, checkpoints, resume."""

import csv
import fcntl
import json
import math
import re
import shutil
import signal

import pytest
import torch
from conftest import GOLDEN, SYNTHETIC, TINY, error_line, flags, parse, tree
from reference import losses_of_a_run

from nanogpt.run_log import read_log

DEFAULTS = dict(seed=1337, weight_decay=1e-1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True)  # nanoGPT's
SIX = {"model", "optimizer", "model_args", "iter_num", "best_val_loss", "config"}
TOKENS = (lambda i: (i * i * 7 + i // 3) % 61)(torch.arange(24000))
TOKENS = {"train": TOKENS[:20000], "val": TOKENS[20000:]}


def assert_same_losses(printed, expected):
    """As shared/DESIGN.md has it: equal as printed; where not, at most 1e-4 off, on at most 2 % of the lines."""
    assert [line[:2] for line in printed] == [line[:2] for line in expected]
    off = []
    for ours, theirs in zip(printed, expected, strict=True):
        for a, b in zip(ours[2:], theirs[2:], strict=True):
            difference = abs(float(a) - float(f"{float(b):.4f}"))
            assert difference < 1.5e-4, (ours, theirs)
            if difference:
                off.append((ours, theirs))
    assert len(off) <= 0.02 * len(printed), off


def assert_near(printed, expected):
    """Within 1e-4, figures of a plain reimplementation, which rounds in other places."""
    assert [line[:2] for line in printed] == [line[:2] for line in expected]
    for ours, theirs in zip(printed, expected, strict=True):
        assert [float(a) for a in ours[2:]] == pytest.approx(theirs[2:], abs=1e-4), (ours, theirs)


def val_losses(result):
    return [float(line[3]) for line in result.losses if line[0] == "step"]


def golden(name):
    with open(GOLDEN / name, newline="") as f:
        rows = list(csv.DictReader(f))
    return [(r["kind"], int(r["n"]), r["loss"], *([r["val_loss"]] if r["kind"] == "step" else [])) for r in rows]


def load(path):
    return torch.load(path)  # torch's default since 2.6: weights_only=True


# ----------------------------------------------------------------------------------------------
# the numbers


def test_losses_equal_nanogpts_on_the_synthetic_tokens(synthetic_run):
    assert_same_losses(synthetic_run[1].losses, golden("synthetic.csv"))


def test_losses_equal_nanogpts_on_tiny_shakespeare(run, own_project, shared, tmp_path):
    folder = own_project / "data" / "shakespeare_char"
    shutil.copy(shared / "tinyshakespeare" / "input.txt", folder)
    run("data/shakespeare_char/prepare.py", project=own_project)
    settings = dict(
        n_layer=4, n_head=4, n_embd=128, block_size=64, batch_size=12, dropout=0.0, max_iters=300, lr_decay_iters=2000,
        eval_interval=100, eval_iters=20, log_interval=1, device="cpu", dtype="float32", compile=False, peak_flops=1e12,
    )  # fmt: skip
    arguments = flags(settings, out_dir=tmp_path / "out")
    result = run("train.py", "config/train_shakespeare_char.py", *arguments, project=own_project)
    assert_same_losses(result.losses, golden("shakespeare_cpu.csv"))


OTHERS = {
    "biases, accumulation, no clipping, constant lr": dict(
        bias=True, gradient_accumulation_steps=3, grad_clip=0.0, decay_lr=False, seed=7, eval_iters=21
    ),
    "tight clipping, other AdamW settings, past the decay": dict(
        grad_clip=0.1, weight_decay=0.5, beta1=0.8, beta2=0.9, seed=2, learning_rate=3e-3, lr_decay_iters=20,
        warmup_iters=0, n_layer=3, n_head=4, gradient_accumulation_steps=1,
    ),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS.keys())  # 21 evaluation batches are passes of 16 and 5
def test_losses_equal_a_plain_reimplementation_at_other_settings(run, tmp_path, other):
    settings = SYNTHETIC | DEFAULTS | dict(max_iters=40, eval_interval=20) | other
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
    run("train.py", *flags(TINY, decay_lr=False, max_iters=3, out_dir=tmp_path))
    with open(tmp_path / "log.csv", newline="") as f:
        assert {float(row["lr"]) for row in csv.DictReader(f)} == {1e-2}


def test_dropout_changes_the_losses_but_not_the_batches(run, tmp_path):
    """The batches have a generator of their own, so evaluation before the first step sees the same ones."""
    plain = run("train.py", *flags(TINY, out_dir=tmp_path / "a")).losses
    dropped = run("train.py", *flags(TINY, dropout=0.2, out_dir=tmp_path / "b")).losses
    assert dropped[0] == plain[0] and dropped[1] != plain[1]
    last = [float(losses[-2][3]) for losses in (plain, dropped)]  # val loss after the same batches
    assert last[0] != last[1] and abs(last[0] - last[1]) < 0.2


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
        *[STEP, progress, *[ITER] * 4],
        *[STEP, saving, progress, *[ITER] * 4],
        *[STEP, saving, progress, *[ITER] * 2],
        rf"best val loss {NUMBER} at iteration 8, 640 tokens seen, \d:\d\d:\d\d in all, at most .*",
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


def test_log_csv_has_a_row_for_each_printed_loss(synthetic_run):
    with open(synthetic_run[0] / "log.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    found = []
    for row in rows:
        loss, val = (f"{float(row[name]):.4f}" if row[name] else None for name in ("train_loss", "val_loss"))
        n = int(row["iter"])
        found.append(("step", n, loss, val) if row["kind"] == "eval" else ("iter", n, loss))
    assert found == synthetic_run[1].losses


# ----------------------------------------------------------------------------------------------
# checkpoints, ours and nanoGPT's


def nanogpt_shapes(V, C, T, n_layer):
    shapes = {"transformer.wte.weight": (V, C), "transformer.wpe.weight": (T, C), "transformer.ln_f.weight": (C,)}
    for i in range(n_layer):
        shapes |= {
            f"transformer.h.{i}.ln_1.weight": (C,),
            f"transformer.h.{i}.attn.c_attn.weight": (3 * C, C),
            f"transformer.h.{i}.attn.c_proj.weight": (C, C),
            f"transformer.h.{i}.ln_2.weight": (C,),
            f"transformer.h.{i}.mlp.c_fc.weight": (4 * C, C),
            f"transformer.h.{i}.mlp.c_proj.weight": (C, 4 * C),
        }
    return shapes | {"lm_head.weight": (V, C)}


@pytest.mark.parametrize("name", ["ckpt.pt", "last.pt"])
def test_our_checkpoint_is_one_of_nanogpts(synthetic_run, name):
    saved = load(synthetic_run[0] / name)
    assert saved.keys() >= SIX
    assert {name: tuple(w.shape) for name, w in saved["model"].items()} == nanogpt_shapes(61, 64, 32, 2)
    assert saved["model_args"] == dict(
        n_layer=2, n_head=2, n_embd=64, block_size=32, bias=False, vocab_size=61, dropout=0.0
    )
    assert saved["iter_num"] == {"ckpt.pt": 150, "last.pt": 151}[name]
    assert float(saved["best_val_loss"]) == pytest.approx(1.6349, abs=2e-4)  # golden/synthetic.csv, the least
    assert saved["config"] == saved["config"] | SYNTHETIC | {"out_dir": str(synthetic_run[0])}
    # the optimizer state fits torch's AdamW over nanoGPT's groups: matrices first, then the norms
    shapes = [s for n, s in nanogpt_shapes(61, 64, 32, 2).items() if n != "lm_head.weight"]
    groups = [[torch.zeros(s) for s in shapes if len(s) == k] for k in (2, 1)]
    optimizer = torch.optim.AdamW([{"params": group} for group in groups])
    optimizer.load_state_dict(saved["optimizer"])
    for parameter in sum(groups, []):
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    assert saved["optimizer"]["param_groups"][0]["betas"] == (0.9, 0.95)
    assert [group["weight_decay"] for group in saved["optimizer"]["param_groups"]] == [0.1, 0.0]


def as_nanogpt_saves(path, to, n_layer=2):
    """`path`, one of our checkpoints, with what nanoGPT's train.py saves from a compiled model and nothing else."""
    saved = load(path)
    config = {name: saved["config"][name] for name in SYNTHETIC | DEFAULTS if name != "seed"}
    config |= dict(backend="nccl", device="cuda", dtype="bfloat16", compile=True, init_from="scratch", eval_only=False)
    torch.save(
        {
            "model": {f"_orig_mod.{name}": weight for name, weight in saved["model"].items()},
            "optimizer": saved["optimizer"],
            "model_args": saved["model_args"],
            "iter_num": saved["iter_num"],
            "best_val_loss": torch.tensor(float(saved["best_val_loss"])),
            "config": config,
        },
        to,
    )
    return to


def test_a_checkpoint_of_nanogpts_resumes_with_nanogpts_losses(run, synthetic_run, tmp_path):
    """nanoGPT's resume starts its generators anew: the losses are those of a plain reimplementation of that."""
    as_nanogpt_saves(synthetic_run[0] / "ckpt.pt", tmp_path / "ckpt.pt")
    more = flags(device="cpu", dtype="float32", compile=False, max_iters=170, eval_interval=10)
    result = run("train.py", f"--out_dir={tmp_path}", "--init_from=resume", *more)
    assert f"Resuming training from {tmp_path}" in result.lines
    saved = load(synthetic_run[0] / "ckpt.pt")
    settings = SYNTHETIC | DEFAULTS | dict(max_iters=170, eval_interval=10)
    expected = losses_of_a_run(TOKENS, settings, (saved["model"], saved["optimizer"]), first=150)
    assert_near(result.losses, expected)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_prefixes_of_wrapped_modules_are_taken_off(run, synthetic_run, tmp_path, prefix):
    saved = load(synthetic_run[0] / "ckpt.pt")
    saved["model"] = {prefix + name: weight for name, weight in saved["model"].items()}
    torch.save(saved, tmp_path / "ckpt.pt")
    result = run("train.py", *flags(out_dir=tmp_path, init_from="resume", device="cpu", max_iters=150))
    assert_same_losses(result.losses, synthetic_run[1].losses[-1:])  # its step 150 had been printed already


@pytest.mark.parametrize("name, iteration", [("ckpt.pt", 150), ("last.pt", 151)])
def test_eval_only_evaluates_at_whatever_iteration_the_checkpoint_is(run, synthetic_run, tmp_path, name, iteration):
    """ckpt.pt was saved just after an evaluation: that one is done again, and no iteration is run."""
    shutil.copy(synthetic_run[0] / name, tmp_path)
    result = run("train.py", *flags(out_dir=tmp_path, init_from="resume", device="cpu", eval_only=True))
    assert [line[:2] for line in result.losses] == [("step", iteration)]
    assert float(result.losses[0][3]) == pytest.approx(1.6349, abs=0.05)  # golden/synthetic.csv; other batches here


@pytest.mark.parametrize("always", [True, False])
def test_ckpt_is_the_best_model_or_with_always_save_checkpoint_the_latest(run, tmp_path, always):
    """At learning rate 1 the val loss only rises from iteration 0's, at which nanoGPT never saves."""
    settings = TINY | dict(learning_rate=1.0, min_lr=1.0, warmup_iters=0, grad_clip=0.0, max_iters=10)
    result = run("train.py", *flags(settings, always_save_checkpoint=always, out_dir=tmp_path))
    val = val_losses(result)
    assert len(val) == 3 and min(val) == val[0]
    assert result.stdout.count(f"saving checkpoint to {tmp_path}") == (2 if always else 0)
    if always:
        saved = load(tmp_path / "ckpt.pt")
        assert saved["iter_num"] == 8
        assert float(saved["best_val_loss"]) == pytest.approx(val[0], abs=1e-4)
    else:
        assert not (tmp_path / "ckpt.pt").exists()


def test_the_best_model_stays_in_ckpt_while_worse_ones_follow(run, tmp_path):
    settings = TINY | dict(max_iters=24, lr_decay_iters=1, min_lr=3.0, grad_clip=0.0, always_save_checkpoint=False)
    result = run("train.py", *flags(settings, learning_rate=3e-3, warmup_iters=5, out_dir=tmp_path))
    steps = [line for line in result.losses if line[0] == "step"]
    best = min(steps, key=lambda line: float(line[3]))
    assert 0 < best[1] < 24, steps  # it has a best, and worse ones after it
    assert load(tmp_path / "ckpt.pt")["iter_num"] == best[1]
    assert f"best val loss {best[3]} at iteration {best[1]}, " in result.stdout


# ----------------------------------------------------------------------------------------------
# resume

LONGER = SYNTHETIC | dict(max_iters=60, eval_interval=8, eval_iters=3, learning_rate=1e-2, peak_flops=1e12)
KINDS = {
    "float32": (signal.SIGINT, dict(gradient_accumulation_steps=1)),
    "float32, dropout, accumulation": (signal.SIGTERM, dict(dropout=0.2, gradient_accumulation_steps=3)),
    "bfloat16": (signal.SIGTERM, dict(dtype="bfloat16", gradient_accumulation_steps=1)),
    "bfloat16, dropout, saves between": (signal.SIGINT, dict(dtype="bfloat16", dropout=0.2, save_interval=3)),
    "float16": (signal.SIGTERM, dict(dtype="float16", n_layer=1, n_embd=16, block_size=16, batch_size=4)),
    "muon, biases": (signal.SIGTERM, dict(optimizer="muon", bias=True, gradient_accumulation_steps=1)),
}


@pytest.mark.parametrize("number, kind", KINDS.values(), ids=KINDS.keys())
def test_a_stopped_run_goes_on_as_if_it_had_not_been(start, run, tmp_path, number, kind):
    settings = LONGER | dict(max_iters=120) | kind  # enough for the signal to find it at work
    whole = run("train.py", *flags(settings, out_dir=tmp_path / "whole")).losses
    out_dir = tmp_path / "out"
    first = start("train.py", *flags(settings, out_dir=out_dir))
    first.wait_for("iter 10:")
    first.signal(number)
    first = first.end()
    assert first.returncode == 128 + number and first.stderr == ""
    at = re.search(r"stopped at iteration (\d+); the checkpoint to go on from is iteration (\d+)'s", first.lines[-1])
    assert at and at[1] == at[2] and 10 < int(at[1]) <= settings["max_iters"]
    second = run("train.py", f"--out_dir={out_dir}", "--init_from=resume", "--device=cpu")
    assert f", {kind.get('dtype', 'float32')}, compile False, {kind.get('optimizer', 'adamw')}, " in second.stdout
    assert first.losses + second.losses == whole
    # and log.csv has no row twice
    with open(out_dir / "log.csv", newline="") as f:
        rows = [(row["kind"], int(row["iter"])) for row in csv.DictReader(f)]
    assert rows == [({"step": "eval", "iter": "train"}[line[0]], line[1]) for line in whole]
    ends = [load(folder / "last.pt")["model"] for folder in (out_dir, tmp_path / "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_stopped_three_times_goes_on_as_if_it_had_not_been(start, run, tmp_path):
    settings = LONGER | dict(dropout=0.1, eval_iters=30, eval_interval=4, max_iters=36)  # mostly evaluations
    whole = run("train.py", *flags(settings, out_dir=tmp_path / "whole")).losses
    joined, arguments = [], flags(settings, out_dir=tmp_path / "out")
    for text in ("step 8:", "iter 15:", "step 28:"):
        part = start("train.py", *arguments)
        part.wait_for(text)
        part.signal(signal.SIGTERM)
        part = part.end()
        assert part.returncode == 143, part.stderr
        joined += part.losses
        arguments = flags(out_dir=tmp_path / "out", init_from="resume", device="cpu")
    assert joined + run("train.py", *arguments).losses == whole


def test_a_finished_run_goes_on_to_a_larger_max_iters(run, tmp_path):
    whole = run("train.py", *flags(TINY, dropout=0.1, max_iters=16, out_dir=tmp_path / "whole")).losses
    first = run("train.py", *flags(TINY, dropout=0.1, max_iters=9, out_dir=tmp_path / "out")).losses
    second = run("train.py", *flags(out_dir=tmp_path / "out", init_from="resume", device="cpu", max_iters=16))
    assert first + second.losses == whole
    assert "max_iters is now 16 (the run had 9)" in second.lines


def test_resume_at_max_iters_says_so_and_changes_nothing(run, synthetic_run, tmp_path):
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    before = tree(tmp_path)
    result = run("train.py", *flags(out_dir=tmp_path / "out", init_from="resume", device="cpu"))
    assert "reached max_iters = 150" in result.lines[-1] and not result.losses
    assert tree(tmp_path) == before


def test_eval_only_evaluates_once_and_writes_nothing(run, synthetic_run, project, tmp_path):
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    saved = load(tmp_path / "out" / "last.pt")
    assert saved["iter_num"] == 151  # of no eval_interval
    before = tree(tmp_path, project)
    result = run("train.py", *flags(out_dir=tmp_path / "out", init_from="resume", device="cpu", eval_only=True))
    assert [line[:2] for line in result.losses] == [("step", 151)] and re.fullmatch(STEP, result.lines[-1])
    fresh = run("train.py", *flags(SYNTHETIC, out_dir=tmp_path / "new", eval_only=True))
    assert fresh.losses == [golden("synthetic.csv")[0]] and re.fullmatch(STEP, fresh.lines[-1])
    assert tree(tmp_path, project) == before


def test_eval_only_works_beside_the_run_that_is_writing_and_moves_nothing(run, synthetic_run, tmp_path):
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = tree(tmp_path)
        for init_from in ("resume", "scratch"):
            run("train.py", *flags(SYNTHETIC, out_dir=tmp_path / "out", init_from=init_from, eval_only=True))
        assert tree(tmp_path) == before


def test_a_second_run_on_the_same_out_dir_is_refused_and_the_first_goes_on(start, run, tmp_path):
    first = start("train.py", *flags(LONGER, max_iters=100000, out_dir=tmp_path))
    first.wait_for("iter 2:")
    for init_from in ("scratch", "resume"):
        second = run("train.py", *flags(LONGER, out_dir=tmp_path, init_from=init_from), expect=2)
        assert f"another run is writing to {tmp_path}" in error_line(second)
    seen = len(first.read()[0])
    first.wait(lambda: len(first.read()[0]) > seen + 100)
    first.signal(signal.SIGTERM)
    assert first.end().returncode == 143
    assert load(tmp_path / "last.pt")["iter_num"] > 2
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []  # nothing was moved aside


def test_a_run_from_scratch_moves_an_earlier_runs_files_aside(run, synthetic_run, tmp_path):
    out_dir = tmp_path / "out"
    shutil.copytree(synthetic_run[0], out_dir)
    (out_dir / "notes.txt").write_text("the user's own")
    old = {name: (out_dir / name).read_bytes() for name in ("ckpt.pt", "last.pt", "log.csv")}
    result = run("train.py", *flags(TINY, out_dir=out_dir, max_iters=2))
    (folder,) = (path for path in out_dir.iterdir() if path.is_dir())
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    assert [line for line in result.lines if str(folder) in line and "moved" in line]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == old
    assert (out_dir / "notes.txt").exists()
    run("train.py", *flags(TINY, out_dir=out_dir, max_iters=2))  # within the same second, most likely
    assert len([path for path in out_dir.iterdir() if path.is_dir()]) == 2


def test_init_from_auto_resumes_where_there_is_a_run_and_else_starts(run, tmp_path):
    arguments = flags(TINY, out_dir=tmp_path, init_from="auto")
    first = run("train.py", *arguments)
    assert "Initializing a new model from scratch" in first.lines
    second = run("train.py", *arguments[:-1], "--init_from=auto", "--max_iters=12")
    assert f"Resuming training from {tmp_path}" in second.lines
    assert [line[1] for line in second.losses if line[0] == "iter"] == [9, 10, 11, 12]


@pytest.fixture(scope="module")
def half_way(run, tmp_path_factory):
    """(out_dir of a run of 20 iterations, the weights that it has after 30)"""
    folder = tmp_path_factory.mktemp("half")
    run("train.py", *flags(LONGER, max_iters=19, out_dir=folder / "out"))
    shutil.copytree(folder / "out", folder / "on")
    run("train.py", *flags(out_dir=folder / "on", init_from="resume", device="cpu", max_iters=29))
    return folder / "out", load(folder / "on" / "last.pt")["model"]


@pytest.mark.parametrize("name, value", [("beta1", 0.5), ("beta2", 0.5), ("weight_decay", 0.7)])
def test_optimizer_settings_changed_on_resume_take_effect(run, half_way, tmp_path, name, value):
    """A group loaded from a checkpoint brings its own, and turns fused off (shared/DESIGN.md, settled 3)."""
    shutil.copytree(half_way[0], tmp_path / "out")
    changed = {name: value}
    more = flags(init_from="resume", device="cpu", max_iters=29, **changed)
    result = run("train.py", f"--out_dir={tmp_path / 'out'}", *more)
    assert [line for line in result.lines if line.startswith(f"{name} is now {value}")]
    saved = load(tmp_path / "out" / "last.pt")
    matrices, vectors = saved["optimizer"]["param_groups"]
    expected = dict(beta1=0.9, beta2=0.95, weight_decay=0.1) | changed
    assert matrices["betas"] == vectors["betas"] == (expected["beta1"], expected["beta2"])
    assert matrices["weight_decay"] == expected["weight_decay"] and vectors["weight_decay"] == 0.0
    assert matrices["fused"] and vectors["fused"]
    # and not on paper only: the weights are others
    assert not torch.equal(saved["model"]["transformer.wte.weight"], half_way[1]["transformer.wte.weight"])


def test_betas_and_decay_changed_on_resume_give_adamws_own_losses(run, synthetic_run, tmp_path):
    as_nanogpt_saves(synthetic_run[0] / "ckpt.pt", tmp_path / "ckpt.pt")
    changed = dict(beta1=0.5, beta2=0.6, weight_decay=0.9, max_iters=165, eval_interval=10, grad_clip=0.5)
    settings = SYNTHETIC | DEFAULTS | changed | dict(min_lr=3e-3, lr_decay_iters=120)
    more = flags(device="cpu", dtype="float32", compile=False, min_lr=3e-3, **changed)
    result = run("train.py", f"--out_dir={tmp_path}", "--init_from=resume", *more)
    saved = load(synthetic_run[0] / "ckpt.pt")
    for group, decay in zip(saved["optimizer"]["param_groups"], (0.9, 0.0), strict=True):
        group |= dict(betas=(0.5, 0.6), weight_decay=decay)
    expected = losses_of_a_run(TOKENS, settings, (saved["model"], saved["optimizer"]), first=150)
    assert_near(result.losses, expected)


def test_resume_crops_the_context_where_a_smaller_block_size_is_given(run, synthetic_run, tmp_path):
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    run("train.py", *flags(out_dir=tmp_path / "out", init_from="resume", device="cpu", block_size=16, max_iters=152))
    saved = load(tmp_path / "out" / "last.pt")
    assert saved["model"]["transformer.wpe.weight"].shape == (16, 64) and saved["model_args"]["block_size"] == 16


def test_the_newer_of_the_two_checkpoints_that_is_whole_is_resumed(run, synthetic_run, tmp_path):
    """A single flipped bit in last.pt: ckpt.pt is taken, and that is said (settled 4)."""
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    path = tmp_path / "out" / "last.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # amid the weights
    path.write_bytes(data)
    result = run("train.py", *flags(out_dir=tmp_path / "out", init_from="resume", device="cpu", max_iters=152))
    assert [line for line in result.lines if str(path) in line and "ckpt.pt" in line]
    assert result.losses[0][1] == 150


# ----------------------------------------------------------------------------------------------
# the command


def test_it_works_from_any_folder_by_a_fresh_interpreter(run, project, tmp_path):
    """Data and config/ are found beside the script; out_dir is taken from where the user stands."""
    settings = dict(dataset="synthetic", n_layer=1, n_head=1, n_embd=8, block_size=16, batch_size=2, eval_iters=1)
    more = flags(settings, max_iters=1, device="cpu", out_dir="here", warmup_iters=0)
    run("train.py", "config/train_shakespeare_char.py", *more, cwd=tmp_path, interpreter=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here"]
    assert load(tmp_path / "here" / "last.pt")["config"]["beta2"] == 0.99  # the config file's


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_compiles_nothing_does_not_import_the_compiler(run, project, tmp_path, optimizer):
    script = tmp_path / "watched.py"
    script.write_text(
        "import runpy, sys\n"
        f"sys.path.insert(0, {str(project)!r})\n"
        f"runpy.run_path({str(project / 'train.py')!r}, run_name='__main__')\n"
        "print('torch._dynamo' in sys.modules)\n"
    )
    settings = flags(TINY, out_dir=tmp_path / "out", optimizer=optimizer)
    for more in (["--max_iters=1"], ["--max_iters=2", "--init_from=resume"]):
        assert run(str(script), *settings, *more, interpreter=True).stdout.splitlines()[-1] == "False"


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


def test_bfloat16_learns_as_float32_does(run, tmp_path):
    steps = {}
    for dtype in ("float32", "bfloat16"):
        result = run("train.py", *flags(LONGER, dtype=dtype, out_dir=tmp_path / dtype))
        assert f", {dtype}, compile False" in result.stdout
        steps[dtype] = val_losses(result)
    assert steps["bfloat16"] == pytest.approx(steps["float32"], abs=0.05) and steps["float32"][-1] < 2.5


def test_float16_on_a_cpu_scales_its_loss_and_learns(run, tmp_path):
    settings = TINY | dict(dtype="float16", max_iters=40, lr_decay_iters=40, eval_interval=10)
    result = run("train.py", *flags(settings, out_dir=tmp_path / "out"))
    assert val_losses(result)[-1] < val_losses(result)[0] - 0.3
    assert load(tmp_path / "out" / "last.pt")["scaler"]["scale"] > 1


@pytest.mark.parametrize("setting, library", [("wandb_log", "wandb"), ("tensorboard_log", "tensorboard")])
def test_a_logger_that_is_not_installed_is_one_line_with_the_pip_install_and_costs_nothing(
    run, own_project, synthetic_run, tmp_path, setting, library
):
    (own_project / f"{library}.py").write_text("raise ImportError('not installed')\n")
    shutil.copytree(synthetic_run[0], tmp_path / "out")  # an earlier run, which stays where it is
    before = tree(tmp_path / "out")
    arguments = flags(TINY, out_dir=tmp_path / "out", **{setting: True})
    result = run("train.py", *arguments, project=own_project, expect=2)
    assert f"pip install {library}" in error_line(result)
    assert tree(tmp_path / "out") == before


def killed_after_its_last_save(train, out_dir, saved="*.pt", **settings):
    """A run to iteration 9 whose iterations from 5 on were computed twice, as after a kill; with `saved` "ckpt.pt"
    those from 4 on, whose evaluation was done before."""
    train(out_dir, max_iters=4, **settings)
    early = {path: path.read_bytes() for path in out_dir.glob(saved)}
    for _ in range(2):
        train(out_dir, max_iters=9, init_from="resume", **settings)
        if early:
            for path in out_dir.glob("*.pt"):
                path.unlink()
            for path, content in early.items():
                path.write_bytes(content)
        early = {}


def logged(out_dir):
    """{(kind, name): {iteration: value}} of log.csv."""
    found = {}
    for row in read_log(out_dir / "log.csv"):
        for name, value in row.items():
            if name not in ("iter", "kind") and value:
                found.setdefault(f"{row['kind']}/{name}", {})[int(row["iter"])] = float(value)
    return found


@pytest.mark.parametrize("saved", ["*.pt", "ckpt.pt"])
def test_tensorboard_gets_what_log_csv_has_and_no_iteration_twice(run, tmp_path, saved):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def train(out_dir, **settings):
        run("train.py", *flags(TINY, out_dir=out_dir, tensorboard_log=True, **settings))

    killed_after_its_last_save(train, tmp_path / "out", saved)
    board = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    board.Reload()
    expected = logged(tmp_path / "out")
    assert set(board.Tags()["scalars"]) == set(expected) and "eval/val_loss" in expected
    for name, rows in expected.items():
        points = [(event.step, event.value) for event in board.Scalars(name)]
        # times and rates are those of either go, the rest is the same in both
        assert [step for step, _ in points] == sorted(rows)
        if name.endswith(("loss", "lr", "grad_norm", "tokens_seen")):
            assert [value for _, value in points] == pytest.approx([rows[step] for step, _ in points], rel=1e-6)


FAKE_WANDB = """
import json, os

def note(*what):
    with open(os.environ["NOTES"], "a") as f:
        f.write(json.dumps(what) + "\\n")

class Run:
    id = "run-7"
    def log(self, row):
        note("log", row)
    def define_metric(self, *names, **options):
        note("define", names, options)

def init(**options):
    if options["project"] == "closed":
        raise RuntimeError("api_key not configured")
    note("init", {name: options[name] for name in ("project", "name", "id", "resume")}, options["config"]["n_layer"])
    return Run()
"""


def test_wandb_gets_what_log_csv_has_and_a_resume_goes_on_in_the_same_run(run, own_project, tmp_path):
    (own_project / "wandb.py").write_text(FAKE_WANDB)
    environment = {"NOTES": str(tmp_path / "notes")}
    settings = TINY | dict(wandb_log=True, wandb_project="p", wandb_run_name="r", out_dir=tmp_path / "out")
    run("train.py", *flags(settings, max_iters=4), project=own_project, env=environment)
    run("train.py", *flags(settings, max_iters=9, init_from="resume"), project=own_project, env=environment)
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    started = dict(project="p", name="r", resume="allow")
    assert [n[1:] for n in notes if n[0] == "init"] == [[started | {"id": None}, 1], [started | {"id": "run-7"}, 1]]
    found = {}
    for _, row in (n for n in notes if n[0] == "log"):
        for name in row.keys() - {"iter"}:
            found.setdefault(name, {})[row["iter"]] = row[name]
    assert found == logged(tmp_path / "out")
    refused = run("train.py", *flags(settings | dict(wandb_project="closed", out_dir=tmp_path / "other")),
                  project=own_project, env=environment, expect=2)  # fmt: skip
    line = error_line(refused)
    assert "api_key not configured" in line and "wandb login" in line and "--wandb_log=False" in line


def test_the_readers_of_the_lines_find_all_of_them():
    """conftest.parse, on the seed's own excerpt."""
    text = "iter 4980: loss 0.8010, time 33.22ms, mfu 11.07%\nstep 5000: train loss 0.6224, val loss 1.7044\n"
    assert parse(text) == [("iter", 4980, "0.8010"), ("step", 5000, "0.6224", "1.7044")]
