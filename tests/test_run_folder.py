"""nanogpt/run_folder.py: out_dir is locked, an earlier run's files are moved aside, and nothing else is touched."""

import fcntl
import os
import re
import shutil
import signal
import time

import torch
from conftest import LONGER, ONE_THREAD, SMALL, SYNTHETIC, TINY, error_line, flags, tree
from runs import content, load

from nanogpt import run_folder


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


def test_eval_only_works_beside_the_run_that_is_writing_and_moves_nothing(run, synthetic_run, tmp_path):
    shutil.copytree(synthetic_run[0], tmp_path / "out")
    with open(tmp_path / "out" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = tree(tmp_path)
        for init_from in ("resume", "scratch"):
            run("train.py", *flags(SYNTHETIC, out_dir=tmp_path / "out", init_from=init_from, eval_only=True))
        assert tree(tmp_path) == before


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


def test_an_out_dir_of_odd_bytes_is_written_to_and_named(train, tmp_path):
    out_dir = os.path.join(tmp_path, "r\udcffn \u00e9\n*[1]")  # no UTF-8, a line feed, a glob's characters
    result = train(SMALL, out_dir=out_dir, max_iters=4)
    assert f"saving checkpoint to {tmp_path}/r\\udcffn" in result.stdout and result.stderr == ""
    assert len(train(SMALL, out_dir=out_dir, max_iters=8, init_from="resume").losses) == 4 + 1
