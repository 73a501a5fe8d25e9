"""What is said of a learning rate that does not do what it looks like, and of a run without its optimizer's state."""

import csv

import pytest
import torch
from conftest import TINY, error_line, flags

from nanogpt.optim import schedule_remark

SCHEDULE = dict(decay_lr=True, learning_rate=1e-3, warmup_iters=10, lr_decay_iters=100, max_iters=100, min_lr=0.0)


@pytest.mark.parametrize("change, parts", [
    ({}, None),
    (dict(lr_decay_iters=120), None),
    (dict(lr_decay_iters=99), ["min_lr = 0.0 from iteration 99 on", "--lr_decay_iters=100"]),
    (dict(lr_decay_iters=5), ["min_lr = 0.0 from iteration 10 on", "--lr_decay_iters=100"]),  # the warm-up comes first
    (dict(max_iters=5000), ["from iteration 100 on", "max_iters = 5000", "--lr_decay_iters=5000"]),
    (dict(warmup_iters=100), ["warm-up of 100 iterations does not end before max_iters = 100", "--warmup_iters="]),
    (dict(warmup_iters=2000, lr_decay_iters=50), ["warm-up of 2000", "never reaches 0.001"]),
    (dict(warmup_iters=99), None),
    (dict(decay_lr=False, lr_decay_iters=5, warmup_iters=200), None),  # a constant rate has neither
    (dict(max_iters=0, warmup_iters=0), None),
])  # fmt: skip
def test_a_schedule_that_does_not_fit_the_run_is_said(change, parts):
    remark = schedule_remark(**SCHEDULE | change)
    assert (remark is None) == (parts is None)
    assert all(part in remark for part in parts or [])


def test_a_run_that_is_resumed_beyond_its_schedule_is_told_from_which_iteration_the_rate_is_min_lr(run, tmp_path):
    settings = TINY | dict(max_iters=8, lr_decay_iters=8, min_lr=0.0, out_dir=tmp_path / "out")
    first = run("train.py", *flags(settings))
    assert "min_lr" not in first.stdout
    nothing_left = run("train.py", "--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--device=cpu")
    assert "--max_iters= and --lr_decay_iters=" in nothing_left.lines[-1]
    longer = run("train.py", "--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=12", "--device=cpu")
    [said] = [line for line in longer.lines if "min_lr = 0.0" in line]
    assert "from iteration 8 on" in said and "--lr_decay_iters=12" in said
    with open(tmp_path / "out" / "log.csv") as f:
        rates = {int(row["iter"]): float(row["lr"]) for row in csv.DictReader(f)}
    assert rates[7] > 0 and {rates[n] for n in range(8, 13)} == {0.0}  # as was said
    evaluated = run("train.py", "--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--eval_only=True",
                    "--max_iters=20", "--device=cpu")  # fmt: skip
    assert "min_lr" not in evaluated.stdout  # which trains nothing


@pytest.mark.parametrize("state", ["none", "empty"])
def test_a_checkpoint_without_optimizer_state_is_one_line_that_names_the_way_to_use_it(run, tmp_path, state):
    run("train.py", *flags(TINY, out_dir=tmp_path / "out"))
    for path in (tmp_path / "out").glob("*.pt"):
        checkpoint = torch.load(path)
        if state == "none":
            del checkpoint["optimizer"]
        else:
            checkpoint["optimizer"] = {}
        torch.save(checkpoint, path)
    resumed = run("train.py", "--init_from=resume", f"--out_dir={tmp_path / 'out'}", "--max_iters=20", "--device=cpu",
                  expect=2)  # fmt: skip
    line = error_line(resumed)
    assert "no optimizer state" in line and f"--init_from={tmp_path / 'out'}" in line
