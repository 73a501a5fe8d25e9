"""nanogpt/guard.py: steps that are skipped, runs that go back, and what is said of both afterwards.

tests/spikes.py shows what it is worth; what becomes of numbers that are not finite is in test_optim.py.
"""

import csv
import math
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
import torch
from conftest import ONE_THREAD, SYNTHETIC, TINY, error_line, flags, rows
from guards import make_guard
from runs import assert_same_losses, content, golden
from small_models import small

from nanogpt import checkpoint as ckpt
from nanogpt.run_log import RunLog, read_log

KILLS = int(os.environ.get("NANO_KILLS", 12))
# long enough to fill the ring; from iteration 150 on it is harmed
RUN = TINY | dict(max_iters=220, lr_decay_iters=220, eval_interval=20, dropout=0.1, save_interval=7, init_from="auto")
HUGE = dict(INJECT="huge", AT=150, COUNT=5)
ASCENT = dict(INJECT="ascent", AT=150, COUNT=30)
GUARDED = RUN | dict(spike_sigma=6.0, spike_rewind=0.5, grad_clip=0.0)


def harmed(train, settings, harm, **more):
    return train(settings, program="inject.py", env=harm, **more)


def full_log(out_dir):
    with open(out_dir / "log.csv", newline="") as f:
        return list(csv.DictReader(f))


# ----------------------------------------------------------------------------------------------
# which steps are spikes


def spikes_by_hand(values, sigma):
    """Whether each of `values` (n, 2) is skipped: the rule in words, in float64."""
    ring, verdicts, in_a_row = [], [], 0
    for value in np.asarray(values, dtype=np.float64):
        last = np.array(ring[-128:])
        spike = len(ring) >= 128 and bool((value > last.mean(0) + sigma * last.std(0)).any())
        in_a_row = in_a_row + 1 if spike else 0
        if not spike or in_a_row >= 3:
            ring.append(value)
        verdicts.append(spike)
    return verdicts


def judged(guard, values):
    """What `guard` made of each (norm, loss): whether the step was skipped."""
    weight = torch.nn.Parameter(torch.zeros(1))
    verdicts = []
    for n, (norm, loss) in enumerate(values):
        optim, weight.grad = torch.optim.SGD([weight], lr=1.0), torch.ones(1)
        before = weight.item()
        guard.note_loss(torch.tensor(loss, dtype=torch.float32, requires_grad=True))
        guard.skips_on_device = False  # SGD does not look at found_inf
        guard.step(optim, torch.tensor(norm, dtype=torch.float32), n)
        verdicts.append(weight.item() == before)
    return verdicts


def drawn(spikes, mean=10.0, deviation=0.01, n=400):
    """Norms and losses of so small a deviation that E[x^2] - E[x]^2 in float32 is of no use."""
    values = np.random.default_rng(0).normal(mean, deviation, (n, 2))
    for at, which, by in spikes:
        values[at, which] += by * deviation
    return values.astype(np.float32)


@pytest.mark.parametrize("spikes", [
    [], [(200, 0, 9)], [(200, 1, 9)], [(200, 0, 7), (201, 1, 7), (250, 0, 50)], [(100, 0, 1000)], [(127, 0, 99)],
    [(128, 1, 99)], [(200, 0, -50)], [(n, 0, 40) for n in range(200, 203)], [(n, 1, 40) for n in range(200, 400)],
    [(n, 0, 100 * 2.0 ** (n - 200)) for n in range(200, 220)],
])  # fmt: skip
@pytest.mark.parametrize("sigma", [4.0, 6.0])
def test_a_step_is_skipped_where_its_norm_or_loss_is_that_many_deviations_above_the_mean_of_the_last_128(spikes, sigma):
    values = drawn(spikes)
    assert judged(make_guard(spike_sigma=sigma), values) == spikes_by_hand(values, sigma)


def test_what_is_not_finite_is_skipped_and_stays_out_of_the_ring():
    values = drawn([])
    guard = make_guard(spike_sigma=6.0)
    expected = judged(make_guard(spike_sigma=6.0), values[:200])
    for bad in (math.nan, math.inf):
        mixed = np.insert(values[:200], [5, 150, 150, 150, 150], bad, axis=0)
        verdicts = judged(guard := make_guard(spike_sigma=6.0), mixed)
        assert [v for v, row in zip(verdicts, mixed, strict=True) if np.isfinite(row).all()] == expected
        assert all(v for v, row in zip(verdicts, mixed, strict=True) if not np.isfinite(row).all())
        assert torch.isfinite(guard.ring).all()


def test_a_new_level_is_no_spike_for_long():
    values = drawn([(n, 1, 40) for n in range(200, 400)])
    verdicts = judged(make_guard(spike_sigma=6.0), values)
    assert sum(verdicts) < 10 and all(verdicts[200:203]) and not any(verdicts[210:])


def test_the_loss_is_the_mean_over_the_micro_batches_and_the_processes():
    class Two:
        world_size = 2

        def add_up(self, values):
            values += torch.tensor([0.75, 2.0])  # the other process, divided by 2

        say = all_agree = None

    guard = make_guard(spike_sigma=6.0, processes=Two())
    for loss in (2.0, 3.0, 4.0, 3.0):
        guard.note_loss(torch.tensor(loss / 4))
    weight = torch.nn.Parameter(torch.zeros(1))
    guard.skips_on_device = False  # SGD does not look at found_inf
    guard.step(torch.optim.SGD([weight]), torch.tensor(1.5), 0)
    assert guard.ring[:, -1].tolist() == [1.5, 3.5] and guard.loss == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "float16"])
def test_a_spike_leaves_weights_moments_and_loss_scale_as_they_were(optimizer):
    model = small().train()
    scaler = torch.amp.GradScaler("cpu", enabled=optimizer == "float16", init_scale=64.0, growth_interval=10**6)
    optim = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu", "muon" if optimizer == "muon" else "adamw")
    guard = make_guard(spike_sigma=6.0, optimizer="muon" if optimizer == "muon" else "adamw", scaler=scaler)

    def state(part):
        if isinstance(part, torch.Tensor):
            return [part.clone()]
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        return [tensor for each in parts for tensor in state(each)]

    def step(n, factor):
        loss = model(*torch.randint(23, (2, 4, 12), generator=draw))[1]
        guard.note_loss(loss)
        scaler.scale(loss * factor).backward()
        scaler.unscale_(optim)
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        before = state(model.state_dict()) + state(optim.state_dict())
        guard.step(optim, norm, n)
        after = state(model.state_dict()) + state(optim.state_dict())
        return len(before) == len(after) and all(map(torch.equal, before, after))

    draw = torch.Generator().manual_seed(1)
    assert not any(step(n, 1.0) for n in range(130))
    assert [step(130, 1000.0), step(131, 1.0), step(132, 1000.0), step(133, 1.0)] == [True, False, True, False]
    assert scaler.get_scale() == (64.0 if optimizer == "float16" else 1.0)
    assert all(p.grad is None for p in model.parameters())


def test_a_guard_that_finds_no_spike_changes_no_digit(train, tmp_path):
    """golden/synthetic.csv has nanoGPT's losses."""
    result = train(SYNTHETIC, out_dir=tmp_path, spike_sigma=1e6, spike_rewind=1e6)
    assert_same_losses(result.losses, golden("synthetic.csv"))


# ----------------------------------------------------------------------------------------------
# a run with spikes, and one that goes back


def test_spikes_are_said_and_skipped_and_counted(train, tmp_path):
    result = harmed(train, GUARDED, HUGE, out_dir=tmp_path)
    said = [line for line in result.lines if "steps skipped" in line]
    assert [line.split(",")[0] for line in said[:5]] == [f"iter {n}: 1 steps skipped" for n in range(150, 155)]
    assert "more than 6 standard deviations above its mean" in said[0]
    norms = sorted(
        ((float(r["grad_norm"]), int(r["iter"])) for r in full_log(tmp_path) if r["grad_norm"]), reverse=True
    )
    three = ", ".join(f"{norm:.4g} at iteration {n}" for norm, n in norms[:3])
    assert f"largest gradient norms: {three}; skipped steps: {len(said)}, gone back: 0" in result.lines
    assert {n for _, n in norms[:3]} <= set(range(150, 155))


def test_a_run_without_the_guard_says_its_largest_norms_of_all_iterations_even_after_a_resume(train, tmp_path):
    whole = train(RUN, out_dir=tmp_path / "a")
    [expected] = [line for line in whole.lines if line.startswith("largest gradient norms: ")]
    norms = sorted((float(r["grad_norm"]), int(r["iter"])) for r in full_log(tmp_path / "a") if r["grad_norm"])[-3:]
    assert all(f"{norm:.4g} at iteration {n}" in expected for norm, n in norms)
    train(RUN, out_dir=tmp_path / "b", max_iters=200)
    resumed = train(RUN, out_dir=tmp_path / "b").lines
    assert expected.replace(":", " (before iteration 201: of those in log.csv):", 1) in resumed
    assert expected in train(RUN, out_dir=tmp_path / "c", log_interval=100).lines  # the device has those not logged


def test_off_a_checkpoint_and_a_log_hold_nothing_new(synthetic_run):
    saved = ckpt.load(str(synthetic_run[0] / "last.pt"))
    assert "guard" not in saved and not (synthetic_run[0] / "good.pt").exists()
    assert {row["kind"] for row in full_log(synthetic_run[0])} == {"train", "eval"}
    assert "going back" not in synthetic_run[1].stdout


@pytest.fixture(scope="module")
def rewound(train, tmp_path_factory):
    """(out_dir, Result) of a run whose gradient is turned around at iteration 150: it goes back once."""
    out_dir = tmp_path_factory.mktemp("rewound") / "out"
    return out_dir, harmed(train, GUARDED | dict(spike_sigma=0.0), ASCENT, out_dir=out_dir)


def test_a_run_that_explodes_goes_back_to_its_last_good_evaluation_and_draws_other_batches(rewound):
    out_dir, result = rewound
    [said] = [line for line in result.lines if "going back" in line]
    at, good, seed = ckpt.load(str(out_dir / "last.pt"))["guard"]["went_back"][0]
    assert said.startswith(f"iteration {at}: val loss ") and f"going back to iteration {good};" in said
    assert said.endswith(f"seed {seed}") and (at, good) == (180, 140) and seed != 1337
    assert result.lines[-4].endswith("gone back: 1")
    # the iteration that it went back to is not evaluated again, and its batch is another
    of_good = [line for line in result.losses if line[1] == good]
    assert [line[0] for line in of_good] == ["step", "iter", "iter"] and of_good[1] != of_good[2]
    evaluated = [(line[1], float(line[3])) for line in result.losses if line[0] == "step"]
    [exploded] = [loss for n, loss in evaluated if n == 180 and f"val loss {loss:.4f} is more than 0.5 above" in said]
    assert f"best val loss {min(loss for _, loss in evaluated):.4f}" in result.stdout
    assert evaluated[-1][1] < exploded - 0.5


def test_undone_rows_stay_in_the_log_marked(rewound):
    out_dir, result = rewound
    log = full_log(out_dir)
    [back] = [i for i, row in enumerate(log) if row["kind"].startswith("back")]
    assert log[back]["iter"] == "140" and log[back]["kind"] == "back (seed 2001340)"
    assert [r["iter"] for r in log[:back] if r["kind"] == "undone train"] == [str(n) for n in range(140, 180)]
    assert [r["iter"] for r in log[:back] if r["kind"] == "undone eval"] == ["160", "180"]
    assert not any(r["kind"].startswith("undone") for r in log[back:])
    for kind, step in (("train", 1), ("eval", 20)):  # what counts has every iteration once
        assert [int(r["iter"]) for r in log if r["kind"] == kind] == list(range(0, 221, step))
    printed = [(kind, n) for kind, n, *_ in result.losses]
    names = {"train": "iter", "eval": "step"}
    logged = [(names[r["kind"].split()[-1]], int(r["iter"])) for r in log if not r["kind"].startswith("back")]
    assert logged == printed
    assert [r["tokens_seen"] for r in log if r["kind"] == "train"][-1] == str(221 * 64)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "muon", "float16", "3 micro-steps"])
def test_the_same_command_goes_the_same_way(train, tmp_path, kind):
    settings = GUARDED | {"adamw": {}, "muon": dict(optimizer="muon"), "float16": dict(dtype="float16"),
                          "3 micro-steps": dict(gradient_accumulation_steps=3)}[kind]  # fmt: skip
    runs = [harmed(train, settings, ASCENT, out_dir=tmp_path / name).losses for name in "ab"]
    assert runs[0] == runs[1] and len(runs[0]) > 221 + 12
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_a_run_goes_back_twice_and_then_stops_with_advice_at_its_good_checkpoint(train, tmp_path):
    failed = harmed(train, GUARDED, ASCENT | dict(TIMES=3), out_dir=tmp_path, expect=2)
    line = error_line(failed)
    for advice in ("twice", "--learning_rate", "--warmup_iters", "--beta2", "float32", "docs/exploding_loss.md"):
        assert advice in line
    assert failed.stdout.count("going back to iteration 140") == 2
    assert f"a resume starts at iteration 140: python train.py --init_from=resume --out_dir={tmp_path}" in line
    for name in ("ckpt.pt", "last.pt", "good.pt"):
        assert ckpt.load(str(tmp_path / name))["iter_num"] == 140
    assert not list(tmp_path.glob("*.tmp"))
    resumed = train(GUARDED, out_dir=tmp_path)  # unharmed
    assert resumed.losses[0][:2] == ("iter", 140) and resumed.lines[-4].endswith("gone back: 2")
    kinds = [row["kind"] for row in full_log(tmp_path)]
    assert sum(kind.startswith("back") for kind in kinds) == 2 and kinds[-1] == "train"


def test_ten_skipped_steps_in_a_row_send_a_run_back_too(train, tmp_path):
    """A weight is NaN from iteration 150 on, and every gradient with it."""
    settings = GUARDED | dict(eval_interval=50, save_interval=1000)
    result = train(settings, out_dir=tmp_path, program="spoil_weights.py", env=dict(STEP=151))
    [said] = [line for line in result.lines if "going back" in line]
    assert said.startswith("iteration 161: 10 steps in a row were skipped: going back to iteration 150;")
    assert result.lines[-4].endswith("skipped steps: 10, gone back: 1")


def test_without_a_good_checkpoint_the_run_stops_with_advice(train, tmp_path):
    train(RUN, out_dir=tmp_path, max_iters=145, eval_interval=1000)
    settings = GUARDED | dict(eval_interval=160)
    failed = train(settings, out_dir=tmp_path, program="spoil_weights.py", env=dict(STEP=3), expect=2)
    line = error_line(failed)
    assert "no good.pt of this data to go back to" in line and "--learning_rate" in line


@pytest.mark.parametrize("setting, word", [
    (dict(spike_sigma=-1.0), "--spike_sigma=-1.0: must be at least 0"),
    (dict(spike_rewind=-0.5), "--spike_rewind=-0.5: must be at least 0"),
    (dict(spike_sigma="six"), "spike_sigma takes a number"),
    (dict(spike_rewind=1.0, eval_interval=9), "--spike_rewind=1 needs evaluations, and --eval_interval=9"),
])  # fmt: skip
def test_a_bad_value_is_one_line_and_costs_nothing(train, tmp_path, setting, word):
    train(TINY, out_dir=tmp_path)
    before = content(tmp_path)
    assert word in error_line(train(TINY | setting, out_dir=tmp_path, expect=2))
    assert content(tmp_path) == before


# ----------------------------------------------------------------------------------------------
# kills and resumes


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """{harm: (losses, rows of the log, the line of norms)} of the run that nothing kills."""
    found = {}
    for name, harm in (("huge", HUGE), ("ascent", ASCENT)):
        out_dir = tmp_path_factory.mktemp("whole") / "out"
        result = harmed(train, GUARDED, harm, out_dir=out_dir)
        found[name] = result.losses, rows(out_dir), result.lines[-4]
    assert found["huge"][2].endswith("gone back: 0") and found["ascent"][2].endswith("gone back: 1")
    return found


@pytest.mark.parametrize("stops", [[20], [140], [149, 152], [153, 190]])
@pytest.mark.parametrize("harm", ["huge", "ascent"])
def test_a_resume_is_exact_to_the_digit(train, whole, tmp_path, harm, stops):
    for stop in stops:
        harmed(train, GUARDED, {"huge": HUGE, "ascent": ASCENT}[harm], out_dir=tmp_path, max_iters=stop)
    result = harmed(train, GUARDED, {"huge": HUGE, "ascent": ASCENT}[harm], out_dir=tmp_path)
    losses, log, norms = whole[harm]
    assert rows(tmp_path) == log and result.lines[-4] == norms
    assert result.losses == losses[-len(result.losses) :]


def test_with_order_epoch_a_run_that_goes_back_draws_other_windows_and_resumes_to_the_digit(train, tmp_path):
    settings, logs = GUARDED | dict(order="epoch"), {}
    for name, stops in (("whole", [{}]), ("parts", [dict(max_iters=140), dict(max_iters=190), {}])):
        for stop in stops:
            result = harmed(train, settings | stop, ASCENT, out_dir=tmp_path / name)
        logs[name] = rows(tmp_path / name)
    assert logs["whole"] == logs["parts"] and result.lines[-4].endswith("gone back: 1")
    undone, kept = ({row[2] for row in logs["whole"] if row[1] == kind} for kind in ("undone train", "train"))
    assert len(undone) >= 20 and not undone & kept


@pytest.mark.parametrize("kill", ["links", "log", "marked", "good", "second name"])
def test_a_kill_as_the_run_goes_back_loses_nothing(train, whole, tmp_path, kill):
    killed = train(GUARDED, out_dir=tmp_path, expect=-signal.SIGKILL, program="kill_going_back.py",
                   env=ASCENT | dict(KILL=kill))  # fmt: skip
    assert ("going back" in killed.stdout) == (kill in ("log", "marked", "good"))
    harmed(train, GUARDED, ASCENT, out_dir=tmp_path)
    assert rows(tmp_path) == whole["ascent"][1] and not list(tmp_path.glob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["huge", "ascent"])
def test_a_run_killed_over_and_over_logs_what_the_whole_one_does(start, whole, tmp_path, harm):
    environment = ONE_THREAD | {k: str(v) for k, v in {"huge": HUGE, "ascent": ASCENT}[harm].items()}
    losses, log, norms = whole[harm]
    draw, kills, runs, back = random.Random(11), 0, 0, 0
    while kills < KILLS:
        out_dir, lives = tmp_path / f"out{runs}", 0
        while True:
            process = start("tests/programs/inject.py", *flags(GUARDED, out_dir=out_dir), env=environment)
            if kills < KILLS:
                process.wait(lambda p=process: "iter " in p.read()[0])
                deadline = time.monotonic() + draw.uniform(0, 0.25)
                process.wait(lambda d=deadline: time.monotonic() > d)
                if process.code is None:
                    process.signal(signal.SIGKILL)
            result = process.end()
            assert result.returncode in (0, -signal.SIGKILL) and result.stderr == "", result.stderr
            assert set(result.losses) <= set(losses)
            kills, lives = kills + (result.returncode != 0), lives + 1
            back += result.returncode != 0 and "going back" in result.stdout
            assert lives < 300
            if result.returncode == 0:
                break
        runs += 1
        assert rows(out_dir) == log and result.lines[-4] == norms
        shutil.rmtree(out_dir)
    print(f"{kills} kills in {runs} runs; {back} of them in a life that had gone back")


# ----------------------------------------------------------------------------------------------
# good.pt and the log


def test_good_pt_is_a_second_name_of_the_checkpoint_that_was_just_written(train, tmp_path):
    train(RUN, out_dir=tmp_path, spike_rewind=1.0, always_save_checkpoint=True, max_iters=40)
    assert (tmp_path / "good.pt").samefile(tmp_path / "ckpt.pt") and not list(tmp_path.glob("*.tmp"))


def test_a_second_name_is_a_copy_where_links_do_not_work(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no links")

    monkeypatch.setattr(os, "link", refuse)
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").write_bytes(b"two")
    ckpt.name_again(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "b").read_bytes() == b"one" and sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
    assert not (tmp_path / "b").samefile(tmp_path / "a")


def test_a_log_is_cut_where_the_checkpoint_stands_before_and_after_going_back(tmp_path):
    """Iterations 0 to 5, back to 2, 2 to 4; a checkpoint from before it went back, and one from after."""
    log = RunLog(str(tmp_path), 0, False)
    for n in range(6):
        if n % 2 == 0:
            log.write(iter=n, kind="eval", val_loss=float(n))
        log.write(iter=n, kind="train", train_loss=float(n))
    log.go_back(2, 99)
    for n in range(2, 5):
        log.write(iter=n, kind="train", train_loss=10.0 + n)
    log.file.close()
    whole = (tmp_path / "log.csv").read_bytes()

    def cut(*place):
        (tmp_path / "log.csv").write_bytes(whole)
        RunLog(str(tmp_path), *place).file.close()
        return [(int(r["iter"]), r["kind"], r["train_loss"] or r["val_loss"]) for r in read_log(tmp_path / "log.csv")]

    first = [(0, "eval", "0.0"), (0, "train", "0.0"), (1, "train", "1.0"), (2, "eval", "2.0")]
    then = [(2, "train", "2.0"), (3, "train", "3.0"), (4, "eval", "4.0"), (4, "train", "4.0"), (5, "train", "5.0")]
    undone = [(n, f"undone {kind}", loss) for n, kind, loss in then] + [(2, "back (seed 99)", "")]
    assert cut(5, False, 0) == first + then[:-1]
    assert cut(2, True, 0) == first
    assert cut(2, True, 1) == first + undone
    assert cut(4, False, 1) == first + undone + [(2, "train", "12.0"), (3, "train", "13.0")]


def test_tensorboard_forgets_what_is_undone(train, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    harmed(train, GUARDED, ASCENT, out_dir=tmp_path, tensorboard_log=True)
    board = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    for kind, name in (("train", "train_loss"), ("eval", "val_loss")):
        found = [(event.step, event.value) for event in board.Scalars(f"{kind}/{name}")]
        logged = [(int(r["iter"]), float(r[name])) for r in full_log(tmp_path) if r["kind"] == kind]
        assert [n for n, _ in found] == [n for n, _ in logged]
        assert [v for _, v in found] == pytest.approx([v for _, v in logged], rel=1e-6)
