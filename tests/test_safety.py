"""A run is never lost and never trains on garbage: kills, stops, bad disks, bad files, numbers that are not finite.

What is expected is always what the uninterrupted run printed. NANO_KILLS sets how often the kill test kills.
"""

import csv
import itertools
import math
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import psutil
import pytest
import torch
from conftest import META, TINY, error_line, flags, tree, write_synthetic

from nanogpt import checkpoint as ckpt
from nanogpt import run_folder, run_log
from model import GPT, GPTConfig

KILLS = int(os.environ.get("NANO_KILLS", 24))
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # a tiny model's threads only wait for each other
SMALL = TINY | dict(max_iters=16, lr_decay_iters=16, gradient_accumulation_steps=2, save_interval=3)

# Runs train.py after the Python in $SABOTAGE, which may put its own functions in the place of the project's.
DRIVER = """
import os, runpy, signal, sys
here = os.path.dirname(os.path.abspath(__file__))
exec(os.environ["SABOTAGE"])
sys.argv[0] = os.path.join(here, "train.py")
runpy.run_path(sys.argv[0], run_name="__main__")
"""

# Sends this process signal {number} as the {k}th batch is drawn: a training batch's or an evaluation's.
SIGNAL_AT_BATCH = """
import data.bins
check_ids, drawn = data.bins.check_ids, 0
def counted(tokens, *rest):
    global drawn
    drawn += tokens.ndim > 1
    if drawn == {k} and tokens.ndim > 1:
        os.kill(os.getpid(), {number})
    return check_ids(tokens, *rest)
data.bins.check_ids = counted
"""


@pytest.fixture(scope="module")
def train(project, run):
    """train(settings, expect=0, sabotage=None, **more) -> Result."""
    (project / "driver.py").write_text(DRIVER)

    def train(settings, expect=0, sabotage=None, project=project, **more):
        script = "driver.py" if sabotage else "train.py"
        if sabotage:
            (project / "driver.py").write_text(DRIVER)
        env = ONE_THREAD | ({"SABOTAGE": sabotage} if sabotage else {})
        return run(script, *flags(settings, **more), expect=expect, env=env, project=project)

    return train


@pytest.fixture(scope="module")
def whole_run(train, tmp_path_factory):
    """whole_run(settings) -> (losses, rows of log.csv) of the run that nothing interrupts."""
    seen = {}

    def whole_run(settings):
        key = tuple(sorted(settings.items()))
        if key not in seen:
            out_dir = tmp_path_factory.mktemp("whole") / "out"
            losses = train(settings, out_dir=out_dir).losses
            seen[key] = losses, rows(out_dir)
            assert len(losses) > settings["max_iters"] and len(seen[key][1]) == len(losses)
        return seen[key]

    return whole_run


@pytest.fixture
def small_run(train, tmp_path):
    """The folder of SMALL's run stopped after iteration 8: last.pt is at 9, ckpt.pt at 8."""
    out_dir = tmp_path / "out"
    train(SMALL, out_dir=out_dir, max_iters=8)
    assert torch.load(out_dir / "last.pt")["iter_num"] == 9 and torch.load(out_dir / "ckpt.pt")["iter_num"] == 8
    return out_dir


def rows(out_dir):
    """log.csv without the columns that time, or an estimate from it, is in."""
    with open(out_dir / "log.csv", newline="") as f:
        table = list(csv.DictReader(f))
    timed = ("ms", "tokens_per_s", "mfu")
    return [tuple(value for name, value in row.items() if name not in timed) for row in table]


def content(out_dir):
    return {path.name: path.read_bytes() for path in out_dir.iterdir() if path.is_file()}


def one_failure(result, code):
    """The one line on stderr of a run that ended with `code`."""
    assert result.returncode == code, (result.stdout, result.stderr)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


# ----------------------------------------------------------------------------------------------
# kill -9


@pytest.mark.slow
def test_a_run_killed_over_and_over_prints_and_logs_what_the_uninterrupted_one_does(start, train, whole_run, tmp_path):
    settings = SMALL | dict(max_iters=120, lr_decay_iters=120, dropout=0.1, eval_interval=10, init_from="auto")
    expected, expected_rows = whole_run(settings)
    draw, kills, in_saves, finished = random.Random(7), 0, 0, 0
    while kills < KILLS:
        out_dir, printed, lives = tmp_path / f"out{finished}", [], 0
        while True:  # one run, from life to life
            process = start("train.py", *flags(settings, out_dir=out_dir), env=ONE_THREAD)
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
            assert result.returncode in (0, -signal.SIGKILL), result.stderr
            assert result.stderr == ""
            kills += result.returncode != 0
            in_saves += result.returncode != 0 and bool(list(out_dir.glob("*.tmp")))
            lives += 1
            assert lives < 300
            if lives > 1 and (out_dir / "last.pt").exists() and printed:
                assert result.losses == [] or result.losses[0] in expected
            printed += result.losses
            if result.returncode == 0:
                break
        finished += 1
        assert set(printed) == set(expected)  # a line printed twice is the same line
        assert rows(out_dir) == expected_rows
        assert not list(out_dir.glob("*.tmp"))
        shutil.rmtree(out_dir)
    print(f"{kills} kills, {in_saves} of them during a save, in {finished} runs")
    assert in_saves >= KILLS // 10


# Points in a save that a kill may hit: before it, half way through the bytes, before and after the rename.
KILL_IN_SAVE = """
from nanogpt import checkpoint
save, saves = checkpoint.save, 0
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
class Half:
    def __init__(self, f):
        self.f, self.left = f, 20000
    def write(self, data):
        self.f.write(bytes(data)[:self.left])
        self.left -= len(data)
        if self.left <= 0:
            self.f.flush()
            kill()
        return len(data)
    def __getattr__(self, name):
        return getattr(self.f, name)
def sabotaged(checkpoint_, path):
    global saves
    saves += path.endswith("{name}")
    if saves == {nth} and path.endswith("{name}"):
        if "{point}" == "before":
            kill()
        elif "{point}" == "half":
            torch_save = checkpoint.torch.save
            checkpoint.torch.save = lambda what, f: torch_save(what, Half(f))
        elif "{point}" == "rename":
            os.replace = kill
    save(checkpoint_, path)
    if saves == {nth} and path.endswith("{name}") and "{point}" == "after":
        kill()
checkpoint.save = sabotaged
"""


@pytest.mark.parametrize("name", ["last.pt", "ckpt.pt"])
@pytest.mark.parametrize("point", ["before", "half", "rename", "after"])
def test_a_kill_at_this_point_of_a_save_loses_nothing(train, whole_run, tmp_path, name, point):
    settings = SMALL | dict(init_from="auto", always_save_checkpoint=True)
    expected, expected_rows = whole_run(settings)
    nth = 2 if name == "ckpt.pt" else 3
    sabotage = KILL_IN_SAVE.format(name=name, point=point, nth=nth)
    killed = train(settings, out_dir=tmp_path, expect=-signal.SIGKILL, sabotage=sabotage)
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
    "bfloat16, muon": dict(dtype="bfloat16", optimizer="muon"),
    "bfloat16, dropout, one micro-step": dict(dtype="bfloat16", dropout=0.1, gradient_accumulation_steps=1),
    "float16's scaler": dict(dtype="float16", dropout=0.1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not_been(train, whole_run, tmp_path, kind):
    settings = SMALL | dict(init_from="auto") | KINDS[kind]
    expected, expected_rows = whole_run(settings)
    printed, in_evaluations = [], 0
    # Batches of this process: 1 before the loop, then 4 an evaluation and one a micro-step.
    for number, k in ((signal.SIGTERM, 3), (signal.SIGINT, 8), (signal.SIGTERM, 14)):
        sabotage = SIGNAL_AT_BATCH.format(k=k, number=int(number))
        stopped = train(settings, out_dir=tmp_path, expect=128 + number, sabotage=sabotage)
        printed += stopped.losses
        last = torch.load(tmp_path / "last.pt")
        done = sum(line[0] == "iter" for line in printed)
        where = f"stopped at iteration {done}; the checkpoint to go on from is iteration {done}'s in {tmp_path}"
        assert stopped.lines[-1].startswith(where + ";") and last["iter_num"] == done and stopped.stderr == ""
        in_evaluations += done % 4 == 0 and not last["points"][0]["evaluated"]
    assert in_evaluations >= 1
    assert len(printed) < len(expected) - 4
    printed += train(settings, out_dir=tmp_path).losses
    assert printed == expected  # no line lost, and none twice
    assert rows(tmp_path) == expected_rows


def test_a_stop_between_micro_steps_gives_up_the_iteration_and_keeps_its_start(train, whole_run, tmp_path):
    settings = SMALL | dict(gradient_accumulation_steps=8, init_from="auto", dropout=0.1)
    expected, _ = whole_run(settings)
    sabotage = SIGNAL_AT_BATCH.format(k=1 + 4 + 8 + 3, number=int(signal.SIGTERM))  # iteration 1's third of eight
    stopped = train(settings, out_dir=tmp_path, expect=128 + signal.SIGTERM, sabotage=sabotage)
    assert stopped.losses == expected[:2] and "stopped at iteration 1;" in stopped.stdout
    assert stopped.losses + train(settings, out_dir=tmp_path).losses == expected


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_from_outside_ends_the_run_with_the_signals_code(start, tmp_path, number):
    running = start("train.py", *flags(SMALL, out_dir=tmp_path, max_iters=10**6), env=ONE_THREAD)
    running.wait_for("iter 5:")
    running.signal(number)
    result = running.end()
    assert result.returncode == 128 + number and result.stderr == ""
    done = result.losses[-1][1] + (result.losses[-1][0] == "iter")
    assert result.lines[-1].startswith(f"stopped at iteration {done};")
    assert torch.load(tmp_path / "last.pt")["iter_num"] == done


def test_a_second_interrupt_stops_at_once(start, train, project, tmp_path):
    train(SMALL, out_dir=tmp_path, max_iters=4)
    before = content(tmp_path)["last.pt"]
    sabotage = "import time; from nanogpt import checkpoint; checkpoint.save = lambda *_: (print('saving', flush=True), time.sleep(100))"
    arguments = flags(SMALL, out_dir=tmp_path, max_iters=10**6, init_from="resume", save_interval=10**6,
                      eval_interval=10**6)  # fmt: skip
    running = start("driver.py", *arguments, env=ONE_THREAD | {"SABOTAGE": sabotage})
    running.wait_for("iter 6:")
    running.signal(signal.SIGINT)
    running.wait_for("saving")
    began = time.monotonic()
    running.signal(signal.SIGINT)
    result = running.end()
    assert time.monotonic() - began < 10
    assert result.returncode == 130 and "Traceback" not in result.stderr
    assert content(tmp_path)["last.pt"] == before


def test_the_last_iteration_is_saved_and_a_resume_of_it_says_that_nothing_is_left(train, small_run):
    before = content(small_run)
    result = train(SMALL, out_dir=small_run, max_iters=8, init_from="resume")
    assert "the run has reached max_iters = 8" in result.stdout and not result.losses
    assert {k: v for k, v in content(small_run).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


@pytest.mark.parametrize("name", ["last.pt", "ckpt.pt"])
def test_eval_only_on_a_checkpoint_evaluates_once_and_writes_nothing(train, small_run, name):
    """From either file, of which ckpt.pt has its evaluation behind it, and at a run's end."""
    os.remove(small_run / ({"last.pt", "ckpt.pt"} - {name}).pop())
    before = tree(small_run)
    result = train(SMALL, out_dir=small_run, max_iters=8, init_from="resume", eval_only=True)
    assert [line[:2] for line in result.losses] == [("step", 9 if name == "last.pt" else 8)]
    assert tree(small_run) == before


# ----------------------------------------------------------------------------------------------
# what a resumed run takes from the checkpoint


def test_out_dir_and_resume_are_enough_and_overrides_are_said(train, whole_run, small_run):
    expected, _ = whole_run(SMALL)
    plain = train({}, out_dir=small_run, init_from="resume", max_iters=16, device="cpu", compile=False)
    assert plain.losses == expected[-len(plain.losses) :] and len(plain.losses) == 8 + 2
    assert "max_iters is now 16 (the run had 8)" in plain.lines
    changed = train({}, out_dir=small_run, init_from="resume", max_iters=18, learning_rate=0.5, weight_decay=0.25)
    for line in (
        "max_iters is now 18 (the run had 16)",
        "learning_rate is now 0.5 (the run had 0.01)",
        "weight_decay is now 0.25 (the run had 0.1)",
    ):
        assert line in changed.lines
    kept = torch.load(small_run / "last.pt")
    assert (kept["config"]["learning_rate"], kept["config"]["max_iters"]) == (0.5, 18)
    assert kept["optimizer"]["param_groups"][0]["weight_decay"] == 0.25


@pytest.mark.parametrize("changed", [dict(beta1=0.5), dict(beta2=0.5), dict(weight_decay=0.9)])
def test_an_optimizer_setting_changed_at_a_resume_takes_effect(train, whole_run, small_run, changed):
    expected, _ = whole_run(SMALL)
    result = train(SMALL, out_dir=small_run, init_from="resume", **changed)
    assert result.losses[0] == expected[-len(result.losses)]  # the state is the same, the steps from here on are not
    assert result.losses != expected[-len(result.losses) :]
    ((name, value),) = changed.items()
    for group in torch.load(small_run / "last.pt")["optimizer"]["param_groups"][:1]:
        assert group["fused"] and value in (group["weight_decay"], *group["betas"])


@pytest.mark.parametrize("name, value", [("n_layer", 2), ("n_embd", 32), ("bias", True)])
def test_a_models_size_cannot_be_changed_by_a_resume(train, small_run, name, value):
    before = content(small_run)
    line = error_line(train(SMALL, expect=2, out_dir=small_run, init_from="resume", **{name: value}))
    assert name in line and str(value) in line and str(SMALL[name]) in line
    assert content(small_run) == before


def test_a_shorter_context_can_be_taken_on_at_a_resume(train, small_run):
    result = train(SMALL, out_dir=small_run, init_from="resume", block_size=8)
    assert "block_size is now 8 (the run had 16)" in result.lines
    last = torch.load(small_run / "last.pt")
    moments = [tuple(s["exp_avg"].shape) for s in last["optimizer"]["state"].values()]
    assert last["model"]["transformer.wpe.weight"].shape == (8, 16) and moments[:2] == [(61, 16), (8, 16)]


def test_another_optimizer_at_a_resume_is_refused_in_one_line(train, small_run):
    before = content(small_run)["last.pt"]
    line = error_line(train(SMALL, expect=2, out_dir=small_run, init_from="resume", optimizer="muon"))
    assert "optimizer" in line and "muon" in line
    assert content(small_run)["last.pt"] == before


def test_the_machines_settings_never_come_from_the_checkpoint(train, whole_run, small_run):
    expected, _ = whole_run(SMALL)
    for name in ("last.pt", "ckpt.pt"):
        saved = torch.load(small_run / name)
        saved["config"] |= dict(device="cuda:7", backend="mpi", dtype="float16", compile=True, peak_flops=7e12)
        saved["config"] |= dict(out_dir="/nowhere", init_from="gpt2", eval_only=True)
        ckpt.save(saved, str(small_run / name))
    result = train({}, out_dir=small_run, init_from="resume", max_iters=16, peak_flops=1e9)
    assert result.losses == expected[-len(result.losses) :]
    assert "1 x cpu" in result.stdout and "float32, compile False" in result.stdout


def test_data_that_changed_underneath_is_an_error(train, own_project, tmp_path):
    out_dir, data = tmp_path / "out", own_project / "data" / "synthetic"
    train(SMALL, out_dir=out_dir, project=own_project)
    before = content(out_dir)
    for change in ("size", "first bytes", "val's size"):
        write_synthetic(data)
        path = data / ("val.bin" if "val" in change else "train.bin")
        tokens = np.fromfile(path, "<u2")
        if change == "first bytes":
            tokens[5] = (tokens[5] + 1) % 61
        else:
            tokens = tokens[:-1]
        tokens.tofile(path)
        dataset = tree(data)
        result = train(SMALL, expect=2, out_dir=out_dir, init_from="resume", max_iters=20, project=own_project)
        assert "not the data this run was trained on" in error_line(result)
        assert tree(data) == dataset and content(out_dir) == before
    write_synthetic(data)
    train(SMALL, out_dir=out_dir, init_from="resume", max_iters=20, project=own_project)


def test_an_out_dir_of_odd_bytes_is_written_to_and_named(train, tmp_path):
    out_dir = os.path.join(tmp_path, "r\udcffn \u00e9\n*[1]")  # no UTF-8, a line feed, a glob's characters
    result = train(SMALL, out_dir=out_dir, max_iters=4)
    assert f"saving checkpoint to {tmp_path}/r\\udcffn" in result.stdout and result.stderr == ""
    assert len(train(SMALL, out_dir=out_dir, max_iters=8, init_from="resume").losses) == 4 + 1


def test_auto_starts_where_there_is_no_run_and_resumes_where_there_is_one(train, whole_run, tmp_path):
    expected, _ = whole_run(SMALL)
    first = train(SMALL, out_dir=tmp_path / "out", init_from="auto", max_iters=8)
    second = train(SMALL, out_dir=tmp_path / "out", init_from="auto")
    assert "from scratch" in first.stdout and "Resuming" in second.stdout
    assert second.losses == expected[-len(second.losses) :]


# ----------------------------------------------------------------------------------------------
# checkpoints that are damaged


def damage(path, how):
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "bit flipped in a weight":
        weights = torch.load(path)["model"]["transformer.h.0.attn.c_attn.weight"].numpy().tobytes()
        at = data.index(weights) + 41
        path.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
        torch.load(path, weights_only=True)  # which does not notice
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(len(data)))
    elif how == "a folder":
        path.unlink()
        path.mkdir()


DAMAGES = ["truncated", "bit flipped in a weight", "empty", "garbage", "a folder"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_last_pt_is_passed_over_for_ckpt_pt(train, whole_run, small_run, how):
    expected, expected_rows = whole_run(SMALL)
    damage(small_run / "last.pt", how)
    if how == "a folder":
        (small_run / "last.pt").rmdir()
        (small_run / "last.pt").write_bytes(b"PK\x03\x04")
    result = train(SMALL, out_dir=small_run, init_from="resume")
    said = [line for line in result.lines if "last.pt" in line and line.endswith(f"going on from {small_run}/ckpt.pt")]
    assert len(said) == 1
    step = expected.index(next(line for line in expected if line[:2] == ("iter", 8)))
    assert result.losses == expected[step:]  # ckpt.pt stands after iteration 8's evaluation
    assert rows(small_run) == expected_rows
    assert ckpt.load(str(small_run / "last.pt"))["iter_num"] == 17


@pytest.mark.parametrize("how", DAMAGES[:3])
def test_a_damaged_ckpt_pt_does_not_matter_to_a_resume(train, whole_run, small_run, how):
    expected, _ = whole_run(SMALL)
    damage(small_run / "ckpt.pt", how)
    result = train(SMALL, out_dir=small_run, init_from="resume", max_iters=11)
    assert result.losses == expected[-len(result.losses) - 7 :][: len(result.losses)] and result.losses


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("init_from", ["resume", "auto"])
def test_two_damaged_checkpoints_are_one_line_and_are_left_there(train, small_run, how, init_from):
    for name in ("last.pt", "ckpt.pt"):
        damage(small_run / name, how)
    before = content(small_run)
    line = error_line(train(SMALL, expect=2, out_dir=small_run, init_from=init_from))
    assert f"{small_run}/last.pt" in line and f"{small_run}/ckpt.pt" in line
    assert content(small_run) == before


def test_the_newer_of_the_two_files_is_taken(train, small_run):
    """ckpt.pt is newer where a run was killed between an evaluation and its last.pt."""
    shutil.copy(small_run / "last.pt", small_run / "nine")
    shutil.copy(small_run / "ckpt.pt", small_run / "last.pt")
    shutil.copy(small_run / "nine", small_run / "ckpt.pt")
    checkpoint, path, remarks = ckpt.load_run(str(small_run))
    assert checkpoint["iter_num"] == 9 and path == str(small_run / "ckpt.pt") and remarks == []


# ----------------------------------------------------------------------------------------------
# hostile files


class Hostile:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("where", ["whole", "config", "optimizer", "pickle"])
def test_a_hostile_checkpoint_is_refused_in_one_line_and_runs_nothing(train, run, small_run, tmp_path, where):
    evil = Hostile(tmp_path / "ran")
    for name in ("last.pt", "ckpt.pt"):
        saved = torch.load(small_run / name)
        if where in ("config", "optimizer"):
            saved[where]["evil"] = evil
        elif where == "whole":
            saved = evil
        if where == "pickle":
            (small_run / name).write_bytes(pickle.dumps(evil))
        else:
            torch.save(saved, small_run / name)
    before = content(small_run)
    line = error_line(train(SMALL, expect=2, out_dir=small_run, init_from="resume"))
    sampled = error_line(run("sample.py", f"--out_dir={small_run}", expect=2))
    assert "last.pt" in line and "ckpt.pt" in sampled
    if where != "pickle":
        assert "more than plain data" in line and "more than plain data" in sampled
    assert not (tmp_path / "ran").exists() and content(small_run) == before
    torch.load(small_run / "last.pt", weights_only=False) if where != "pickle" else pickle.loads(before["last.pt"])
    assert (tmp_path / "ran").exists()  # the bait was live


def test_a_hostile_meta_is_refused_in_one_line_and_runs_nothing(train, own_project, tmp_path):
    path = own_project / "data" / "synthetic" / "meta.pkl"
    path.write_bytes(pickle.dumps(META | {"evil": Hostile(tmp_path / "ran")}))
    line = error_line(train(SMALL, expect=2, out_dir=tmp_path / "out", project=own_project))
    assert "meta.pkl" in line and not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "ran").exists()  # the bait was live


# ----------------------------------------------------------------------------------------------
# the disk


def mounted(*arguments):
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("mounting a tmpfs takes Linux and root")
    mounted("-t", "tmpfs", "-o", "size=1m", "tmpfs", folder)
    yield folder
    while subprocess.run(["umount", "-l", str(folder)], capture_output=True).returncode == 0:
        pass


def fill(folder, leave):
    """A file that leaves `leave` bytes of the disk free."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as f:
        try:
            while True:
                f.write(bytes(4096))
        except OSError:
            pass
    os.truncate(path, path.stat().st_size - leave)
    return path


@pytest.mark.parametrize("leave", [40960, 4096, 0])
def test_a_full_disk_costs_nothing_but_time(train, whole_run, small_disk, leave):
    """Full in the midst of a checkpoint's bytes, at its first ones, and for the log too."""
    expected, expected_rows = whole_run(SMALL)
    out_dir = small_disk / "out"
    printed = train(SMALL, out_dir=out_dir, max_iters=8).losses
    before = content(out_dir)
    filler = fill(small_disk, leave)
    failed = train(SMALL, expect=1, out_dir=out_dir, init_from="resume")
    line = one_failure(failed, 1)
    assert "No space left on device" in line and str(out_dir) in line
    if leave:
        assert f"could not save {out_dir}/" in line and "earlier checkpoint there is intact" in line
    after = content(out_dir)
    assert {name: after[name] for name in ("last.pt", "ckpt.pt")} == {
        name: before[name] for name in ("last.pt", "ckpt.pt")
    }
    assert not list(out_dir.glob("*.pt.*")), "what a failed save wrote takes no room"
    filler.unlink()
    rest = train(SMALL, out_dir=out_dir, init_from="resume")
    assert set(printed + failed.losses + rest.losses) == set(expected)
    assert rows(out_dir) == expected_rows


def test_a_file_that_may_not_grow_costs_nothing_but_time(train, whole_run, small_run):
    expected, expected_rows = whole_run(SMALL)
    before = content(small_run)
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (30000, 30000))"
    failed = train(SMALL, expect=1, out_dir=small_run, init_from="resume", sabotage=limit)
    line = one_failure(failed, 1)
    assert f"could not save {small_run}/ckpt.pt: File too large" in line and "intact" in line
    after = content(small_run)
    assert (after["last.pt"], after["ckpt.pt"]) == (before["last.pt"], before["ckpt.pt"])
    rest = train(SMALL, out_dir=small_run, init_from="resume")
    assert rest.losses == expected[-len(rest.losses) :] and rows(small_run) == expected_rows


def test_a_crash_in_the_save_itself_leaves_the_earlier_checkpoint(train, small_run):
    before = content(small_run)["last.pt"]
    sabotage = """
import torch
whole = torch.save
def crash(what, f):
    f.write(b"some bytes")
    raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64 vs 0")
torch.save = crash
"""
    failed = train(SMALL, expect=1, out_dir=small_run, init_from="resume", sabotage=sabotage)
    assert "the earlier checkpoint there is intact" in one_failure(failed, 1)
    assert content(small_run)["last.pt"] == before and not list(small_run.glob("*.tmp"))


def test_a_folder_that_turns_read_only_costs_nothing_but_time(start, train, whole_run, small_run):
    if sys.platform != "linux" or os.geteuid():
        pytest.skip("root writes to any folder, and a read-only mount takes Linux and root")
    settings = SMALL | dict(eval_interval=10**6, save_interval=10**6)
    sabotage = f"""
import subprocess
from nanogpt import checkpoint
save = checkpoint.save
def read_only(what, path):
    subprocess.run("mount --bind {small_run} {small_run} && mount -o remount,bind,ro {small_run}", shell=True)
    save(what, path)
checkpoint.save = read_only
"""
    before = content(small_run)
    mounted("--bind", small_run, small_run)  # whether that can be done here
    try:
        failed = train(SMALL | settings, expect=1, out_dir=small_run, init_from="resume", sabotage=sabotage)
        line = one_failure(failed, 1)
        assert f"could not save {small_run}/last.pt: Read-only file system; the earlier checkpoint" in line
        again = train(SMALL, expect=1, out_dir=small_run, init_from="resume")
        assert f"cannot write to --out_dir={small_run}: Read-only file system" in one_failure(again, 1)
        after = content(small_run)
    finally:
        while subprocess.run(["umount", "-l", str(small_run)], capture_output=True).returncode == 0:
            pass
    assert (after["last.pt"], after["ckpt.pt"]) == (before["last.pt"], before["ckpt.pt"])
    expected, _ = whole_run(SMALL)
    rest = train(SMALL, out_dir=small_run, init_from="resume")
    assert rest.losses == expected[-len(rest.losses) :]


def test_a_save_is_flushed_to_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    events, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append((str(a), str(b))), replace(a, b)))
    path = str(tmp_path / "last.pt")
    ckpt.save({"a": torch.ones(3)}, path)
    temporary, renamed, folder = events
    assert renamed == (temporary, path) and os.path.dirname(temporary) == folder == str(tmp_path)
    assert os.listdir(tmp_path) == ["last.pt"]


# ----------------------------------------------------------------------------------------------
# the run's folder


def test_a_second_run_on_one_folder_is_refused_in_one_line(start, train, tmp_path):
    first = start("train.py", *flags(SMALL, out_dir=tmp_path, max_iters=10**6), env=ONE_THREAD)
    first.wait_for("iter 1:")
    for init_from in ("scratch", "auto"):
        line = error_line(train(SMALL, expect=2, out_dir=tmp_path, init_from=init_from, max_iters=10**6))
        assert f"another run is writing to {tmp_path}" in line
    assert first.code is None and not [p for p in tmp_path.iterdir() if p.is_dir()]
    first.signal(signal.SIGKILL)
    first.end()
    train(SMALL, out_dir=tmp_path)  # a dead run holds no lock


def test_leftover_temporary_files_are_cleared_and_others_are_not(train, tmp_path):
    ours = ["last.pt.123.tmp", "ckpt.pt.99999.tmp", "log.csv.tmp"]
    theirs = ["notes.tmp", "essay.pt", "folder.tmp"]
    for name in ours + theirs[:2]:
        (tmp_path / name).write_text("x")
    (tmp_path / "folder.tmp").mkdir()
    train(SMALL, out_dir=tmp_path, max_iters=2)
    left = os.listdir(tmp_path)
    assert not set(ours) & set(left) and set(theirs) <= set(left)


def test_a_run_from_scratch_moves_another_runs_files_aside_and_says_so(train, small_run):
    before = content(small_run)
    result = train(SMALL, out_dir=small_run, max_iters=4)
    (said,) = [line for line in result.lines if "moved to" in line]
    folder = small_run / said.rpartition("/")[2]
    assert said == f"an earlier run's files were in {small_run}: moved to {folder}"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    assert content(folder) == {name: before[name] for name in ("last.pt", "ckpt.pt", "log.csv")}
    assert torch.load(small_run / "last.pt")["iter_num"] == 5


def test_runs_moved_aside_within_one_second_do_not_meet(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "2026-01-01_00-00-00")
    kept = []
    for k in range(5):
        (tmp_path / "last.pt").write_text(str(k))
        kept.append(run_folder.move_aside(str(tmp_path)))
    assert len(set(kept)) == 5
    assert [open(os.path.join(folder, "last.pt")).read() for folder in kept] == list("01234")
    assert run_folder.move_aside(str(tmp_path)) is None


def test_a_refused_command_moves_and_writes_nothing(train, small_run):
    before = tree(small_run)
    for bad in (dict(dataset="nowhere"), dict(n_embd=15), dict(dropout=2.0), dict(learning_rate="x"), dict(beta1=2.0)):
        error_line(train(SMALL, expect=2, out_dir=small_run, **bad))
        assert tree(small_run) == before


# ----------------------------------------------------------------------------------------------
# log.csv


LOG_HEADER = ",".join(run_log.RunLog.columns) + "\n"


@pytest.mark.parametrize(
    "tail",
    [
        b"1",  # of 12,train,...
        b"9,train,4.1,,0.01,1.0,3.0,100,,12",  # of 1234 tokens
        b"\0" * 50,
        b"\xff\xfe\n",
        b"\xc2\xb2,train,1,1,1,1,1,1,1,1\n",
        b'"' + b"x" * 200000 + b"\n",
        b"9" * 5000 + b",train\n",
        b"-3,train,4.1,,0.01,1.0,3.0,100,,1200\n",
    ],
    ids=["torn number", "torn row", "zeros", "no text", "odd digit", "open quote", "long number", "negative"],
)
def test_a_torn_log_loses_its_torn_rows_alone(tmp_path, tail):
    whole = [f"{i},train,4.1,,0.01,1.0,3.0,100,,{64 * (i + 1)}" for i in range(9)]
    (tmp_path / "log.csv").write_bytes((LOG_HEADER + "\n".join(whole) + "\n").encode() + tail)
    run_log.RunLog(str(tmp_path), 20, False)
    assert (tmp_path / "log.csv").read_text().split() == [LOG_HEADER.strip(), *whole]


@pytest.mark.parametrize("garbage", [b"", b"\xff\xfe\x00garbage", b"a,b\n1,2\n", b"iter\n3\n20\n", b"\n\n,,,\n"])
def test_a_log_that_is_none_is_begun_anew(tmp_path, garbage):
    (tmp_path / "log.csv").write_bytes(garbage)
    run_log.RunLog(str(tmp_path), 20, True)
    assert (tmp_path / "log.csv").read_text().split() == [LOG_HEADER.strip()]


# ----------------------------------------------------------------------------------------------
# numbers that are not finite


def poison(path, iter_num=None):
    """Puts a NaN into a weight of the checkpoint at `path`."""
    saved = torch.load(path)
    saved["model"]["transformer.h.0.mlp.c_fc.weight"][3, 5] = math.nan
    ckpt.save(saved, str(path))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("max_nonfinite", [3, 10])
def test_nan_in_the_weights_stops_the_run_and_overwrites_nothing(train, tmp_path, optimizer, max_nonfinite):
    out_dir = tmp_path / "out"
    settings = SMALL | dict(optimizer=optimizer, max_nonfinite=max_nonfinite)
    train(settings, out_dir=out_dir, max_iters=8)
    poison(out_dir / "last.pt")
    before = content(out_dir)
    failed = train(settings, expect=2, out_dir=out_dir, init_from="resume", max_iters=100, eval_interval=5)
    line = error_line(failed)
    assert line.startswith(f"iteration {9 + max_nonfinite - 1}: ") and f"{max_nonfinite} times in a row" in line
    for advice in ("--learning_rate", "--grad_clip", "bfloat16 or float32", str(out_dir)):
        assert advice in line
    iters = [found for found in failed.losses if found[0] == "iter"]
    assert [found[1] for found in iters] == list(range(9, 9 + max_nonfinite - 1))
    assert all(found[2] == "nan" for found in iters)
    for n in range(9, 9 + max_nonfinite):
        assert f"iter {n}: 1 steps skipped, their gradients were not finite" in failed.lines
    assert f"saving checkpoint to {out_dir}" not in failed.lines
    after = content(out_dir)
    assert (after["last.pt"], after["ckpt.pt"]) == (before["last.pt"], before["ckpt.pt"])


def test_nan_at_a_known_iteration_names_the_last_good_checkpoint(train, tmp_path):
    """The weights are spoilt in memory after iteration 6's step; last.pt is then iteration 6's."""
    sabotage = """
import torch
step, steps = torch.optim.AdamW.step, 0
def spoil(self, *rest):
    global steps
    found = step(self, *rest)
    steps += 1
    if steps == 7:
        with torch.no_grad():
            self.param_groups[0]["params"][1][0, 0] = float("nan")
    return found
spoil.hooked = True  # or torch wraps it anew
torch.optim.AdamW.step = spoil
"""
    failed = train(SMALL, expect=2, out_dir=tmp_path, max_iters=100, max_nonfinite=4, sabotage=sabotage)
    line = error_line(failed)
    assert line.startswith("iteration 10: ") and f"the last good checkpoint is iteration 6's in {tmp_path}" in line
    assert ckpt.load(str(tmp_path / "last.pt"))["iter_num"] == 6
    best = ckpt.load(str(tmp_path / "ckpt.pt"))
    assert best["iter_num"] == 4 and all(torch.isfinite(w).all() for w in best["model"].values())


@pytest.mark.parametrize("dtype, lr, save_interval", [("float32", 1e4, 1), ("float32", 50.0, 3), ("bfloat16", 1e4, 1)])
def test_a_learning_rate_that_diverges_for_real_stops_and_leaves_weights_that_work(
    train, tmp_path, dtype, lr, save_interval
):
    settings = SMALL | dict(dtype=dtype, save_interval=save_interval, max_nonfinite=5)
    train(settings, out_dir=tmp_path, max_iters=8)
    settings |= dict(learning_rate=lr, decay_lr=False, grad_clip=0.0, max_iters=400, eval_interval=50)
    line = error_line(train(settings, expect=2, out_dir=tmp_path, init_from="resume"))
    stopped, kept = map(int, re.match(r"iteration (\d+): .* is iteration (\d+)'s", line).groups())
    assert 9 <= kept < stopped - 3 and ckpt.load(str(tmp_path / "last.pt"))["iter_num"] == kept
    # Going on from there, the next iteration's loss is a number: what was kept is no garbage.
    rest = train(settings, expect=2, out_dir=tmp_path, init_from="resume")
    assert rest.losses[0][:2] == ("iter", kept) and math.isfinite(float(rest.losses[0][2]))


def test_a_val_loss_of_nan_writes_no_checkpoint(train, tmp_path):
    """With evaluations that see NaN where training does not."""
    sabotage = """
import model
forward = model.GPT.forward
def spoilt(self, idx, targets=None, cache=None):
    logits, loss = forward(self, idx, targets, cache)
    return logits, loss if self.training else loss * float("nan")
model.GPT.forward = spoilt
"""
    result = train(SMALL, out_dir=tmp_path, always_save_checkpoint=True, sabotage=sabotage)
    assert ("step", 4, "nan", "nan") in result.losses
    assert not (tmp_path / "ckpt.pt").exists() and not (tmp_path / "last.pt").exists()
    assert "saving checkpoint" not in result.stdout
    assert "last.pt is not written: the loss or its gradient is not finite" in result.lines


def test_a_single_bad_step_is_skipped_and_the_run_goes_on(train, tmp_path):
    """The gradient of iteration 5 is infinite. Nothing but that step is missing."""
    sabotage = """
import torch
norm, calls = torch.nn.utils.get_total_norm, 0
def spoilt(grads, *rest, **more):
    global calls
    grads = list(grads)
    calls += 1
    if calls == 6:
        grads[0].view(-1)[0] = float("inf")
    return norm(grads, *rest, **more)
torch.nn.utils.get_total_norm = spoilt
"""
    result = train(SMALL, out_dir=tmp_path, sabotage=sabotage)
    assert "iter 5: 1 steps skipped, their gradients were not finite" in result.lines
    assert result.stdout.count("steps skipped") == 1 and len(result.losses) == 17 + 5
    last = ckpt.load(str(tmp_path / "last.pt"))
    assert last["iter_num"] == 17 and last["optimizer"]["state"][0]["step"] == 16
    assert all(torch.isfinite(w).all() for w in last["model"].values())


def test_a_skipped_step_leaves_weights_count_and_moments_as_they_were():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=2, n_embd=16, bias=True))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), "cpu")

    def state():
        moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
        return [t.clone() for t in [*model.state_dict().values(), *moments]]

    def step(bad):
        model(torch.randint(11, (2, 8)), torch.randint(11, (2, 8)))[1].backward()
        if bad:
            model.transformer.ln_f.weight.grad[3] = bad
        optimizer.found_inf = torch.tensor(float(bool(bad)))
        optimizer.step()
        optimizer.zero_grad()

    step(None)
    before = state()
    assert len(before) == len(model.state_dict()) + 3 * len(list(model.parameters()))
    for bad in (math.nan, math.inf, -math.inf):
        step(bad)
        assert all(torch.equal(a, b) for a, b in zip(before, state(), strict=True))
    step(None)
    after = state()
    assert all(torch.isfinite(t).all() for t in after)
    assert not any(torch.equal(a, b) for a, b in itertools.islice(zip(before, after, strict=True), 3))


# ----------------------------------------------------------------------------------------------
# a long run


@pytest.mark.slow
def test_a_long_run_takes_no_more_memory_or_files_than_a_short_one(start, tmp_path):
    settings = SMALL | dict(max_iters=6000, eval_interval=250, save_interval=50, gradient_accumulation_steps=1)
    running = start("train.py", *flags(settings, out_dir=tmp_path), env=ONE_THREAD)
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
