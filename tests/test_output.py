"""Where the reader of stdout goes away: a run saves its state first, and its exit code tells why it ended."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import TINY, flags

LONG = TINY | dict(max_iters=10**6, lr_decay_iters=10**6, eval_interval=10**6, save_interval=10**6)
GONE = "error: standard output cannot be written any more"


def hangups_end_it():
    """In the new process: whoever runs these tests may have switched SIGHUP off, as nohup does."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def train(project, tmp_path):
    """train(**Popen's options) -> the process of a long run into tmp_path/out, a new interpreter."""

    def train(settings=LONG, shell="", **options):
        command = [sys.executable, "-u", "train.py", *flags(settings, out_dir=tmp_path / "out")]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        if shell:
            command = ["bash", "-c", f'"$@" {shell}', "bash", *command]
        options.setdefault("preexec_fn", hangups_end_it)
        started.append(subprocess.Popen(command, cwd=project, env=environment, **options))
        return started[-1]

    started = []
    yield train
    for process in started:
        process.kill()


def read_until(stream, text):
    for line in stream:
        if text in line:
            return
    pytest.fail(f"the run ended before {text!r}")


def saved_iteration(out_dir):
    return torch.load(out_dir / "last.pt")["iter_num"]


def logged_iterations(out_dir):
    rows = (out_dir / "log.csv").read_text().splitlines()[1:]
    return [int(row.split(",")[0]) for row in rows if ",train," in row]


def test_a_reader_that_goes_away_costs_no_iteration(train, tmp_path):
    """As `| head`, a pager that is quit, a tee that is killed."""
    process = train(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    read_until(process.stdout, "iter 5:")
    process.stdout.close()
    assert process.wait(60) == 1
    assert process.stderr.read().splitlines() == [f"{GONE} (Broken pipe): the run has stopped, its state saved"]
    assert saved_iteration(tmp_path / "out") == logged_iterations(tmp_path / "out")[-1] + 1 >= 6


@pytest.mark.parametrize("number, code", [
    (signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow), (signal.SIGHUP, 129),
])  # fmt: skip
def test_a_stop_that_was_asked_for_saves_and_has_its_code_whether_or_not_anyone_reads(train, tmp_path, number, code):
    """Ctrl-C ends `2>&1 | tee log` with the run: reader and signal go together."""
    process = train(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    read_until(process.stdout, "iter 5:")
    process.send_signal(number)
    process.stdout.close()
    assert process.wait(60) == code
    assert saved_iteration(tmp_path / "out") == logged_iterations(tmp_path / "out")[-1] + 1


def test_a_terminal_that_is_lost_is_like_a_pipe_that_is_closed(train, tmp_path):
    master, slave = os.openpty()
    process = train(stdout=slave, stderr=subprocess.PIPE, text=True, start_new_session=True)
    os.close(slave)
    seen = b""
    while b"iter 5:" not in seen:
        seen += os.read(master, 1 << 16)
    os.close(master)
    assert process.wait(60) == 1
    assert process.stderr.read() == f"{GONE} (Input/output error): the run has stopped, its state saved\n"
    assert saved_iteration(tmp_path / "out") == logged_iterations(tmp_path / "out")[-1] + 1


def test_a_run_that_can_print_nothing_from_the_start_trains_nothing(train, tmp_path):
    with open("/dev/full", "w") as full:
        process = train(stdout=full, stderr=subprocess.PIPE, text=True)
        assert process.wait(60) == 1
    assert process.stderr.read() == f"{GONE} (No space left on device)\n"
    assert not (tmp_path / "out").exists()


SLOW = pytest.mark.slow  # a new interpreter each


@pytest.mark.parametrize("closed", [
    pytest.param(">&-", marks=SLOW), pytest.param("2>&-", marks=SLOW), pytest.param(">&- 2>&-", marks=SLOW),
    "<&- >&- 2>&-",
])  # fmt: skip
def test_streams_closed_at_the_start_do_not_matter(train, tmp_path, closed):
    """Nor does a file of the run take their number, and get what a library prints."""
    process = train(TINY, shell=closed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    assert ("best val loss" in out) == (closed == "2>&-")
    assert saved_iteration(tmp_path / "out") == 9
    assert logged_iterations(tmp_path / "out") == list(range(9))


@pytest.mark.slow
def test_a_hangup_that_nohup_has_switched_off_stays_off(train, tmp_path):
    ignore = lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)  # noqa: E731
    process = train(stdout=subprocess.PIPE, text=True, preexec_fn=ignore)
    read_until(process.stdout, "iter 2:")
    process.send_signal(signal.SIGHUP)
    read_until(process.stdout, "iter 20:")
    process.send_signal(signal.SIGTERM)
    read_until(process.stdout, "stopped at iteration")
    assert process.wait(60) == 143


@pytest.mark.slow
def test_where_stderr_is_gone_too_the_state_is_saved_all_the_same(train, tmp_path):
    process = train(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    read_until(process.stdout, "iter 5:")
    process.stdout.close()
    assert process.wait(60) == 1
    assert saved_iteration(tmp_path / "out") == logged_iterations(tmp_path / "out")[-1] + 1


@pytest.mark.slow
def test_of_two_processes_both_stop_where_the_output_is_gone(project, tmp_path):
    settings = flags(LONG | dict(gradient_accumulation_steps=2), out_dir=tmp_path / "out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py"]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen([*command, *settings], cwd=project, env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    read_until(process.stdout, "iter 3:")
    process.stdout.close()
    process.stderr.read()
    assert process.wait(120) == 1
    assert saved_iteration(tmp_path / "out") == logged_iterations(tmp_path / "out")[-1] + 1


@pytest.mark.slow
def test_help_on_a_full_disk_is_an_error_and_for_head_it_is_none(project):
    command = [sys.executable, "train.py", "--help"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=project, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1
    process = subprocess.Popen(command, cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    time.sleep(0.1)
    assert process.wait(60) == 0 and process.stderr.read() == ""
