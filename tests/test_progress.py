"""nanogpt/progress.py: runs that end by themselves, and what is said of their progress; and short samples."""

import math
import pickle
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
from conftest import RESUME, SYNTHETIC, TINY, error_line, flags, tree
from runs import load

from nanogpt.distributed import Processes
from nanogpt.progress import Progress, duration


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time


def progress(saved=None, processes=None, now=None, max_iters=100, patience=0, max_seconds=0.0):
    """Of a run of 64 tokens an iteration."""
    return Progress(saved or {}, 0, 64, processes or Processes(), max_iters, patience, max_seconds, now or Clock())


# ----------------------------------------------------------------------------------------------
# the rules, by a clock of the test's own


def test_patience_counts_evaluations_in_a_row(capsys):
    run = progress(patience=3)
    for iter_num, (loss, better) in enumerate([(4, True), (5, False), (4, False), (3, True), (3, False), (9, False)]):
        assert run.note_evaluation({"val": loss}, iter_num) == better
        assert not run.ended_by
    run.note_evaluation({"val": math.nan}, 6)
    assert run.ended_by == "patience = 3"
    assert (run.best_val_loss, run.best_iter) == (3, 3)
    saved = run.for_checkpoint()
    assert progress(saved, patience=3).nothing_left(7) and "larger --patience=" in capsys.readouterr().out
    assert not progress(saved, patience=4).nothing_left(7) and not progress(saved).nothing_left(7)
    assert capsys.readouterr().out == ""


def test_the_time_is_up_from_max_seconds_on_over_all_resumes(capsys):
    clock = Clock()
    run = progress(now=clock, max_seconds=10.0)
    clock.time += 7
    assert not run.time_is_up() and run.seconds() == 7
    clock.time += 1000  # what passes between two processes of a run does not count
    resumed = progress(run.for_checkpoint() | {"seconds": 7.0}, now=clock, max_seconds=10.0)
    clock.time += 2.9
    assert not resumed.time_is_up()
    clock.time += 0.1
    assert resumed.time_is_up() and not resumed.ended_by  # its last evaluation is still to come
    resumed.note_evaluation({"val": 1.0}, 5, time_is_up=True)
    assert resumed.ended_by == "max_seconds = 10"
    saved = resumed.for_checkpoint()
    assert saved["seconds"] == pytest.approx(10.0)
    assert progress(saved, max_seconds=10.0).nothing_left(5) and "larger --max_seconds=" in capsys.readouterr().out
    assert not progress(saved, max_seconds=20.0).nothing_left(5)


def test_an_evaluation_that_a_signal_cuts_short_is_no_end_by_the_clock():
    clock = Clock()
    run = progress(now=clock, max_seconds=10.0)
    clock.time += 11
    assert run.time_is_up()  # train.py leaves here, before note_evaluation()
    assert progress(run.for_checkpoint(), max_seconds=10.0).nothing_left(5) is False


def test_without_max_seconds_no_time_is_up():
    clock = Clock()
    run = progress({"seconds": 1e9}, now=clock)
    clock.time += 1e9
    assert not run.time_is_up()


def test_rank_0s_clock_decides_for_all():
    sent, clocks = [], [Clock(), Clock()]

    def largest(number):  # rank 0 asks first here
        sent.append(number)
        return max(sent[-2:])

    ranks = [
        progress(processes=SimpleNamespace(rank=rank, largest=largest), now=clock, max_seconds=10.0)
        for rank, clock in enumerate(clocks)
    ]
    clocks[1].time += 500  # its own clock would end the run
    for seconds, expected in ((4, False), (5, False), (1, True)):
        clocks[0].time += seconds
        assert [each.time_is_up() for each in ranks] == [expected] * 2


def test_a_clock_that_stands_still_between_two_evaluations_gives_no_rate():
    run = progress()
    for iter_num in (0, 10):
        run.note_evaluation({"val": 1.0}, iter_num)
        assert run.rate is None and run.line(iter_num) == f"{iter_num}% done"


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
# a run's last lines, and the commands in them


def words(line):
    """The words of the command at the end of a line."""
    return shlex.split(line[line.index("python ") :])


def test_the_commands_of_a_finished_run_can_be_pasted(run, tmp_path):
    out_dir = "My Runs/it's $1"
    result = run("train.py", *flags(TINY, out_dir=out_dir, max_iters=2), cwd=tmp_path)
    sample, plot = (words(line) for line in result.lines[-2:])
    assert sample[1].endswith("sample.py") and sample[2:] == [f"--out_dir={out_dir}"]
    assert plot[1].endswith("tools/plot.py") and plot[2:] == [out_dir]


def test_the_command_of_a_stopped_run_can_be_pasted(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "My Runs").mkdir()
    run = progress(max_iters=5)
    [line] = run.last_lines(3, "My Runs", "cpu")
    assert line.endswith("is none, as nothing was saved yet")
    torch.save({"model": {}, "model_args": {}, "iter_num": 3, "config": {}}, tmp_path / "My Runs" / "last.pt")
    [line] = run.last_lines(3, "My Runs", "cpu")
    assert words(line)[2:] == ["--init_from=resume", "--out_dir=My Runs"]


def test_plain_names_are_printed_as_ever(run, tmp_path, project):
    result = run("train.py", *flags(TINY, out_dir="out", max_iters=2), cwd=project.parent)
    assert result.lines[-2:] == [
        f"to see what it writes: python {project.name}/sample.py --out_dir=out",
        f"to see the curves: python {project.name}/tools/plot.py out",
    ]


def test_a_run_that_was_never_evaluated_on_its_data_has_no_best_val_loss_to_print():
    run = progress(max_iters=5)
    line = run.last_lines(6, "out", "cpu")[1]
    assert line.startswith("no val loss yet, 0 tokens seen") and "inf" not in line
    run.note_evaluation({"val": 2.5, "val_bpb": 1.25}, 4)
    line = run.last_lines(6, "out", "cpu")[1]
    assert line.startswith("best val loss 2.5000 at iteration 4, 1.2500 bits per byte, 0 tokens seen")


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
    assert load(tmp_path / "out" / "last.pt")["evals_since_best"] == 2
    resume = flags(RESUME, out_dir=tmp_path / "out")
    again = run("train.py", *resume)
    assert again.lines[-1].startswith("the run has ended by patience = 2") and not again.losses
    more = run("train.py", *resume, "--patience=4")
    assert more.losses[0][:2] == ("iter", last) and "ended by patience = 4" in more.stdout


@pytest.mark.slow
@pytest.mark.parametrize("extra", [dict(patience=3), dict(patience=3, sample_interval=10), dict(max_seconds=1e6)])
def test_resumed_runs_are_exact_with_these_settings_on(run, tmp_path, extra):
    settings = SYNTHETIC | dict(max_iters=60, eval_interval=10, lr_decay_iters=60, dropout=0.1) | extra
    whole = run("train.py", *flags(settings, out_dir=tmp_path / "whole"))
    first = run("train.py", *flags(settings | dict(max_iters=33), out_dir=tmp_path / "parts"))
    second = run("train.py", *flags(RESUME, out_dir=tmp_path / "parts", max_iters=60))
    assert first.losses + second.losses == whole.losses
    ends = [load(tmp_path / name / "last.pt") for name in ("whole", "parts")]
    assert ends[0]["evals_since_best"] == ends[1]["evals_since_best"]
    assert all(ends[0]["model"][name].equal(ends[1]["model"][name]) for name in ends[0]["model"])
    if "sample_interval" in extra:
        sample = re.compile(r"sample at iteration \d+:\n.*?\n-{15}", re.S)
        texts = sample.findall(whole.stdout)
        assert sample.findall(first.stdout + second.stdout) == texts and len(texts) == 7


def test_samples_move_no_other_draw(run, tmp_path):
    settings = SYNTHETIC | dict(max_iters=30, eval_interval=10, dropout=0.2)
    plain = run("train.py", *flags(settings, out_dir=tmp_path / "a"))
    sampled = run("train.py", *flags(settings, out_dir=tmp_path / "b", sample_interval=20))
    assert plain.losses == sampled.losses and "sample at" not in plain.stdout
    assert re.findall(r"sample at iteration (\d+):", sampled.stdout) == ["0", "20"]


def test_whole_golden_losses_with_everything_on_that_watches_a_run(run, synthetic_run, tmp_path):
    extra = dict(patience=100, max_seconds=1e6, sample_interval=50, spike_sigma=1e6, save_interval=20)
    result = run("train.py", *flags(SYNTHETIC, out_dir=tmp_path / "out", **extra))
    assert result.losses == synthetic_run[1].losses  # which test_train.py compares with nanoGPT's


def test_a_run_ends_by_the_clock_evaluated_and_saved_and_goes_on_with_more_time(run, tmp_path):
    settings = TINY | dict(max_iters=10_000_000, eval_interval=1_000_000, log_interval=100)
    result = run("train.py", *flags(settings, out_dir=tmp_path / "out", max_seconds=1))
    last = [step for step in result.losses if step[0] == "step"][-1][1]
    assert f"ended by max_seconds = 1 at iteration {last}" in result.lines and last > 0
    assert load(tmp_path / "out" / "ckpt.pt")["iter_num"] == load(tmp_path / "out" / "last.pt")["iter_num"] == last
    assert 1 <= load(tmp_path / "out" / "last.pt")["seconds"] < 3
    resume = flags(RESUME, out_dir=tmp_path / "out")
    again = run("train.py", *resume)
    assert again.lines[-1].startswith("the run has ended by max_seconds = 1") and not again.losses
    more = run("train.py", *resume, "--max_seconds=2")
    assert "ended by max_seconds = 2" in more.stdout and more.losses[-1][1] > last
    assert 2 <= load(tmp_path / "out" / "last.pt")["seconds"] < 4


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
