"""Runs that end by themselves: patience, max_seconds, samples on the way; exact on resume, unchanged where off."""

import math
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import SYNTHETIC, TINY, error_line, flags, tree

from nanogpt.progress import Progress, duration

SETTINGS = dict(max_iters=100, eval_interval=20, save_interval=0, patience=0, max_seconds=0.0, decay_lr=True, lr_decay_iters=100)


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def alone():
    """The folder of a run of one process."""
    return SimpleNamespace(
        processes=SimpleNamespace(rank=0, largest=lambda number: number), longest_save=0.0, seconds_saving=0.0
    )


def progress(saved=None, folder=None, now=None, **settings):
    return Progress(saved or {}, 0, SETTINGS | settings, 64, folder or alone(), now or Clock())


def checkpoint(out_dir, name="last.pt"):
    return torch.load(out_dir / name, weights_only=True)


# ----------------------------------------------------------------------------------------------
# the rules, by a clock of the test's own


def test_patience_counts_evaluations_in_a_row():
    run = progress(patience=3)
    for iter_num, (loss, better) in enumerate([(4, True), (5, False), (4, False), (3, True), (3, False), (9, False)]):
        assert run.note_evaluation({"val": loss}, iter_num) == better
        assert not run.has_ended(iter_num)
    run.note_evaluation({"val": math.nan}, 6)
    assert run.has_ended(6) and run.ended_by == "patience = 3"
    assert (run.best_val_loss, run.best_iter) == (3, 3)
    saved = run.for_checkpoint()
    assert "larger --patience=" in progress(saved, patience=3).nothing_left(7)
    assert progress(saved, patience=4).nothing_left(7) == "" == progress(saved).nothing_left(7)


@pytest.mark.parametrize("iteration, evaluation, save", [(0.1, 3.0, 1.0), (1.0, 0.5, 5.0), (0.01, 0.01, 0.01)])
@pytest.mark.parametrize("before", [0.0, 30.0])
@pytest.mark.parametrize("first", [1, 10])  # how much longer the first evaluation takes
@pytest.mark.parametrize("save_interval", [0, 7])
def test_the_budget_is_kept_with_what_the_end_takes(iteration, evaluation, save, before, first, save_interval):
    budget, clock, folder = 100.0, Clock(), alone()
    run = progress({"seconds": before}, folder, clock, max_seconds=budget, save_interval=save_interval)

    def saves():
        clock.time += save
        folder.longest_save, folder.seconds_saving = save, folder.seconds_saving + save

    for iter_num in range(100_000):
        saved = False
        run.read_clock()
        if run.evaluates_at(iter_num):
            clock.time += evaluation * (first if iter_num == 0 else 1)
            run.note_evaluation({"val": 1.0}, iter_num)
            saves()
            saved = True
            if run.ended_by:
                break
        if run.saves_at(iter_num) and not saved:
            saves()
        clock.time += iteration
    saves()
    assert run.ended_by == "max_seconds = 100"
    too_much = evaluation * (first - 1) if len(run.evaluations) == 2 else 0.0  # reserved by the only one before
    assert budget - 2 - too_much <= run.seconds() <= budget + 0.01
    saved = run.for_checkpoint()
    assert "larger --max_seconds=" in progress(saved, max_seconds=budget).nothing_left(1)
    assert progress(saved, max_seconds=2 * budget).nothing_left(1) == ""


def test_an_evaluation_that_a_signal_cuts_short_is_no_end_by_the_clock():
    clock = Clock()
    run = progress(now=clock, max_seconds=10.0)
    clock.time += 11
    run.read_clock()
    assert run.evaluates_at(5) and not run.has_ended(5)  # train.py leaves here, before note_evaluation()
    assert progress(run.for_checkpoint(), max_seconds=10.0).nothing_left(5) == ""


def test_rank_0s_clock_decides_for_all():
    answers, clocks = [], [Clock(), Clock()]

    def largest(rank):
        def exchanged(number):
            assert rank == 0 or number == 0
            answers.append(number)
            return max(answers[-2:])

        return exchanged

    def found(ranks):
        for each in ranks:
            each.read_clock()
        return [each.evaluates_at(3) for each in ranks]

    folders = [alone(), alone()]
    for rank, folder in enumerate(folders):
        folder.processes = SimpleNamespace(rank=rank, largest=largest(rank))
    settings = dict(max_seconds=10.0, lr_decay_iters=0)
    ranks = [progress(None, folder, clock, **settings) for folder, clock in zip(folders, clocks, strict=True)]
    clocks[1].time += 500  # its own clock would end the run
    for _ in range(8):
        clocks[0].time += 1
        assert found(ranks) == [False, False]
        assert ranks[0].share_of_time == ranks[1].share_of_time > 0
    clocks[0].time += 2
    assert found(ranks) == [True, True]


def test_the_decay_follows_the_clock_over_all_resumes_only_where_both_settings_say_so():
    clock = Clock()
    run = progress({"seconds": 2.0}, now=clock, max_seconds=10.0, lr_decay_iters=0)
    assert run.by_clock and run.share_of_time == pytest.approx(0.2)
    clock.time += 3
    run.read_clock()
    assert run.share_of_time == pytest.approx(0.5)
    clock.time += 100
    run.read_clock()
    assert run.share_of_time == 1.0
    assert not progress(lr_decay_iters=0).by_clock and not progress(max_seconds=10.0).by_clock
    assert not progress(max_seconds=10.0, lr_decay_iters=0, decay_lr=False).by_clock


def test_a_run_of_any_length_has_a_line():
    clock = Clock()
    run = progress(now=clock, max_iters=10**18)

    def line(iter_num):
        run.note_evaluation({"val": 1.0}, iter_num)
        return run.line(iter_num)

    assert line(0) == "0% done"
    clock.time += 7
    assert line(7) == "0% done, 64 tokens/s, 999999999 days, 23:59:59 left"
    clock.time -= 3
    assert line(14).endswith(" left")  # a clock that is set back
    assert [duration(s) for s in (0.4, 3725, 86400 * 3 + 61)] == ["0:00:00", "1:02:05", "3 days, 0:01:01"]


# ----------------------------------------------------------------------------------------------
# runs

NO_BETTER = TINY | dict(learning_rate=0.0, min_lr=0.0, eval_interval=2, max_iters=100, always_save_checkpoint=False)


def test_a_run_ends_by_patience_and_its_resume_says_so_unless_it_is_raised(run, tmp_path):
    settings = NO_BETTER | dict(eval_iters=40)
    result = run("train.py", *flags(settings, out_dir=tmp_path / "out", patience=2))
    steps = [step for step in result.losses if step[0] == "step"]
    losses, last = [float(step[3]) for step in steps], steps[-1][1]
    assert min(losses) in losses[:-2] and last == 2 * (len(losses) - 1)
    assert f"ended by patience = 2 at iteration {last}" in result.lines
    assert checkpoint(tmp_path / "out")["evals_since_best"] == 2
    resume = flags(init_from="resume", out_dir=tmp_path / "out", device="cpu")
    again = run("train.py", *resume)
    assert again.lines[-1].startswith("the run has ended by patience = 2") and not again.losses
    more = run("train.py", *resume, "--patience=4")
    assert more.losses[0][:2] == ("iter", last) and "ended by patience = 4" in more.stdout


@pytest.mark.slow
@pytest.mark.parametrize("extra", [dict(patience=3), dict(patience=3, sample_interval=10), dict(max_seconds=1e6)])
def test_resumed_runs_are_exact_with_these_settings_on(run, tmp_path, extra):
    settings = SYNTHETIC | dict(max_iters=60, eval_interval=10, lr_decay_iters=60, dropout=0.1, peak_flops=1e9) | extra
    whole = run("train.py", *flags(settings, out_dir=tmp_path / "whole"))
    first = run("train.py", *flags(settings | dict(max_iters=33), out_dir=tmp_path / "parts"))
    second = run("train.py", *flags(init_from="resume", out_dir=tmp_path / "parts", max_iters=60, device="cpu"))
    assert first.losses + second.losses == whole.losses
    ends = [checkpoint(tmp_path / name) for name in ("whole", "parts")]
    assert ends[0]["evals_since_best"] == ends[1]["evals_since_best"]
    assert all(ends[0]["model"][name].equal(ends[1]["model"][name]) for name in ends[0]["model"])
    if "sample_interval" in extra:
        sample = re.compile(r"sample at iteration \d+:\n.*?\n-{15}", re.S)
        texts = sample.findall(whole.stdout)
        assert sample.findall(first.stdout + second.stdout) == texts and len(texts) == 7


def test_samples_move_no_other_draw(run, tmp_path):
    settings = SYNTHETIC | dict(max_iters=30, eval_interval=10, dropout=0.2, peak_flops=1e9)
    plain = run("train.py", *flags(settings, out_dir=tmp_path / "a"))
    sampled = run("train.py", *flags(settings, out_dir=tmp_path / "b", sample_interval=20))
    assert plain.losses == sampled.losses and "sample at" not in plain.stdout
    assert re.findall(r"sample at iteration (\d+):", sampled.stdout) == ["0", "20"]


def test_the_golden_losses_are_printed_with_all_of_them_on(run, synthetic_run, tmp_path):
    extra = dict(patience=100, max_seconds=1e6, sample_interval=50, plan=True)
    result = run("train.py", *flags(SYNTHETIC, out_dir=tmp_path / "out", **extra))
    assert result.losses == synthetic_run[1].losses


@pytest.mark.slow
def test_a_run_ends_within_its_budget_evaluated_and_saved(run, tmp_path):
    settings = TINY | dict(max_iters=10_000_000, eval_interval=1_000_000, log_interval=100, lr_decay_iters=0, warmup_iters=0)
    result = run("train.py", *flags(settings, out_dir=tmp_path / "out", max_seconds=6))
    last = [step for step in result.losses if step[0] == "step"][-1]
    assert f"ended by max_seconds = 6 at iteration {last[1]}" in result.lines
    found = checkpoint(tmp_path / "out", "ckpt.pt")
    assert found["iter_num"] == last[1] and 4 <= checkpoint(tmp_path / "out")["seconds"] <= 8
    rates = [float(row.split(",")[4]) for row in (tmp_path / "out" / "log.csv").read_text().splitlines()[1:]]
    assert rates == sorted(rates, reverse=True)  # a cosine over the budget
    assert rates[-1] < settings["min_lr"] + 0.1 * (settings["learning_rate"] - settings["min_lr"])
    assert "follows the clock" in result.stdout
    again = run("train.py", *flags(init_from="resume", out_dir=tmp_path / "out", device="cpu"))
    assert again.lines[-1].startswith("the run has ended by max_seconds = 6")


@pytest.mark.parametrize("argument", ["--patience=-1", "--max_seconds=-5", "--sample_interval=-1"])
def test_a_negative_budget_is_one_line(run, tmp_path, argument):
    result = run("train.py", *flags(TINY, out_dir=tmp_path / "out"), argument, expect=2)
    assert "must be at least 0" in error_line(result)
    assert not (tmp_path / "out").exists()


def test_samples_of_data_whose_ids_stand_for_no_text_are_refused_before_anything_is_moved(run, own_project, tmp_path):
    settings = TINY | dict(out_dir=tmp_path / "out")
    run("train.py", *flags(settings), project=own_project)
    before = tree(tmp_path / "out")
    (own_project / "data" / "synthetic" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 61}))
    result = run("train.py", *flags(settings), "--sample_interval=4", project=own_project, expect=2)
    assert "meta.pkl" in error_line(result) and tree(tmp_path / "out") == before
