"""A run is never lost: kills at any point, and stops that it was asked for.

What is expected is always what the uninterrupted run printed. NANO_KILLS sets how often the kill test kills.
"""

import os
import random
import shutil
import signal
import time

import pytest
import torch
from conftest import IN_BFLOAT16, RESUME, SMALL, TINY, flags, rows
from runs import content

KILLS = int(os.environ.get("NANO_KILLS", 24))


# ----------------------------------------------------------------------------------------------
# kill -9


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, dict(max_iters=170, spike_sigma=6.0)], ids=["plain", "with spikes"])
def test_a_run_killed_over_and_over_prints_and_logs_what_the_uninterrupted_one_does(start, train, tmp_path, more):
    settings = SMALL | dict(max_iters=120, lr_decay_iters=120, dropout=0.1, eval_interval=10, init_from="auto") | more
    script, harm = "tests/programs/inject.py", dict(INJECT="huge", AT="150", COUNT="5")
    whole = train(settings, out_dir=tmp_path / "whole", program="inject.py", env=harm)
    assert ("steps skipped" in whole.stdout) == bool(more)
    draw, kills, in_saves, finished, summaries = random.Random(7), 0, 0, 0, 0
    while kills < KILLS:
        out_dir, printed, lives = tmp_path / f"out{finished}", [], 0
        while True:  # one run, from life to life
            process = start(script, *flags(settings, out_dir=out_dir), env=harm)
            if kills < KILLS:
                process.wait(lambda p=process: "iter " in p.read()[0])
                at_save = draw.random() < 0.5
                deadline = time.monotonic() + draw.uniform(0, 0.15)
                process.wait(lambda d=deadline: time.monotonic() > d)
                if at_save:  # as soon as the next checkpoint is being written, or a little later
                    process.wait(lambda o=out_dir: list(o.glob("*.tmp")))
                    time.sleep(draw.choice([0, 0, 0.001, 0.003, 0.01]))
                if process.code is None:
                    process.signal(signal.SIGKILL)
            result = process.end()
            assert result.returncode in (0, -signal.SIGKILL) and result.stderr == "", result.stderr
            kills += result.returncode != 0
            in_saves += result.returncode != 0 and bool(list(out_dir.glob("*.tmp")))
            lives += 1
            assert lives < 300
            printed += result.losses
            if result.returncode == 0:
                break
        finished += 1
        assert set(printed) == set(whole.losses)  # a line printed twice is the same line
        assert rows(out_dir) == rows(tmp_path / "whole") and not list(out_dir.glob("*.tmp"))
        if "the run has reached max_iters" not in result.stdout:  # else a kill fell between the last save and the end
            assert [line for line in whole.lines if line.startswith("skipped steps: ")][0] in result.lines
            summaries += 1
        shutil.rmtree(out_dir)
    print(f"{kills} kills, {in_saves} of them during a save, in {finished} runs, {summaries} ended by themselves")
    assert summaries
    assert in_saves >= KILLS // 10


@pytest.mark.parametrize("name", ["last.pt", "ckpt.pt"])
@pytest.mark.parametrize("point", ["before", "half", "rename", "after"])
def test_a_kill_at_this_point_of_a_save_loses_nothing(train, whole_run, tmp_path, name, point):
    settings = SMALL | dict(init_from="auto", always_save_checkpoint=True)
    expected, expected_rows = whole_run(settings)
    nth = 2 if name == "ckpt.pt" else 3
    where = dict(NAME=name, POINT=point, NTH=nth)
    killed = train(settings, out_dir=tmp_path, expect=-signal.SIGKILL, program="kill_in_save.py", env=where)
    assert killed.losses == expected[: len(killed.losses)]
    assert bool(list(tmp_path.glob("*.tmp"))) == (point in ("half", "rename"))
    rest = train(settings, out_dir=tmp_path)
    assert "Resuming training" in rest.stdout
    assert set(killed.losses + rest.losses) == set(expected)
    assert rest.losses == expected[-len(rest.losses) :]
    assert rows(tmp_path) == expected_rows
    assert not list(tmp_path.glob("*.tmp"))


# ----------------------------------------------------------------------------------------------
# asked to stop

KINDS = {
    "float32": dict(),
    "float32, dropout, muon, 3 micro-steps": dict(dropout=0.1, optimizer="muon", gradient_accumulation_steps=3),
    "bfloat16, muon, biases": dict(dtype="bfloat16", optimizer="muon", bias=True),
    "bfloat16, dropout, one micro-step": dict(dtype="bfloat16", dropout=0.1, gradient_accumulation_steps=1),
    "order=epoch, dropout": dict(order="epoch", dropout=0.1),
    "float16's scaler": dict(dtype="float16", dropout=0.1),
}


@pytest.mark.parametrize("kind", [pytest.param(kind, marks=IN_BFLOAT16 * ("bfloat16" in kind)) for kind in KINDS])
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not_been(train, whole_run, tmp_path, kind):
    settings = SMALL | dict(init_from="auto") | KINDS[kind]
    expected, expected_rows = whole_run(settings)
    printed, in_evaluations = [], 0
    # Batches of this process: 1 before the loop, then 4 an evaluation and one a micro-step.
    for number, k in ((signal.SIGTERM, 3), (signal.SIGINT, 8), (signal.SIGTERM, 14)):
        when = dict(SIGNAL=int(number), BATCH=k)
        stopped = train(settings, out_dir=tmp_path, expect=128 + number, program="signal_at_batch.py", env=when)
        printed += stopped.losses
        last = torch.load(tmp_path / "last.pt")
        done = sum(line[0] == "iter" for line in printed)
        where = f"stopped at iteration {done}; the checkpoint to go on from is iteration {done}'s in {tmp_path}"
        assert stopped.lines[-1].startswith(where + ";") and last["iter_num"] == done and stopped.stderr == ""
        in_evaluations += done % 4 == 0 and not last["points"][0]["evaluated"]
    assert in_evaluations >= 1
    assert len(printed) < len(expected) - 4
    rest = train(RESUME, out_dir=tmp_path)  # its own settings stand in the checkpoint
    assert f", {settings['dtype']}, compile False, {settings.get('optimizer', 'adamw')}, " in rest.stdout
    assert printed + rest.losses == expected  # no line lost, and none twice
    assert rows(tmp_path) == expected_rows


def test_a_stop_between_micro_steps_gives_up_the_iteration_and_keeps_its_start(train, whole_run, tmp_path):
    settings = SMALL | dict(gradient_accumulation_steps=8, init_from="auto", dropout=0.1)
    expected, _ = whole_run(settings)
    when = dict(SIGNAL=int(signal.SIGTERM), BATCH=1 + 4 + 8 + 3)  # iteration 1's third of eight
    stopped = train(settings, out_dir=tmp_path, expect=143, program="signal_at_batch.py", env=when)
    assert stopped.losses == expected[:2] and "stopped at iteration 1;" in stopped.stdout
    assert stopped.losses + train(settings, out_dir=tmp_path).losses == expected


@pytest.mark.parametrize("number", [
    signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
])  # fmt: skip
def test_a_stop_from_outside_ends_the_run_with_the_signals_code(start, tmp_path, number):
    running = start("train.py", *flags(SMALL, out_dir=tmp_path, max_iters=10**6))
    running.wait_for("iter 5:")
    running.signal(number)
    result = running.end()
    assert result.returncode == 128 + number and result.stderr == ""
    done = result.losses[-1][1] + (result.losses[-1][0] == "iter")
    assert result.lines[-1].startswith(f"stopped at iteration {done};")
    assert torch.load(tmp_path / "last.pt")["iter_num"] == done


def test_a_second_interrupt_stops_at_once(start, train, tmp_path):
    train(SMALL, out_dir=tmp_path, max_iters=4)
    before = content(tmp_path)["last.pt"]
    arguments = flags(SMALL, out_dir=tmp_path, max_iters=10**6, init_from="resume", save_interval=10**6,
                      eval_interval=10**6)  # fmt: skip
    running = start("tests/programs/hang_in_save.py", *arguments)
    running.wait_for("iter 6:")
    running.signal(signal.SIGINT)
    running.wait_for("saving")
    began = time.monotonic()
    running.signal(signal.SIGINT)
    result = running.end()
    assert time.monotonic() - began < 10
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert content(tmp_path)["last.pt"] == before


def test_a_second_interrupt_ends_the_run_where_an_exception_would_be_swallowed(start, tmp_path):
    running = start("tests/programs/interrupted_destructor.py", *flags(TINY, out_dir=tmp_path, max_iters=10**6))
    result = running.end()
    assert result.returncode == 130 and "swallowed" not in result.stdout + result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_that_was_ignored_as_the_run_started_stays_ignored(train, tmp_path, number):
    """As nohup and a shell script's background jobs want it."""
    when = dict(SIGNAL=int(number), BATCH=8, IGNORED=True)
    assert train(TINY, out_dir=tmp_path, program="signal_at_batch.py", env=when).losses[-1][:2] == ("iter", 8)
