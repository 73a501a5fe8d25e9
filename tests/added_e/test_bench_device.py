"""tests/bench.py on a GPU: its commands there, and where its memory figure comes from. No GPU is needed."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import bench


@pytest.fixture
def commands(monkeypatch):
    """The commands that bench would run, each answered with lines of train.py."""
    ran = []

    def child(command, cwd):
        ran.append((command, cwd))
        iters = "".join(f"iter {n}: loss 2.0, time {n + 1}.00ms, mfu 12.50%\n" for n in range(11))
        return iters + '\nseen: {"device_mib": 345.5}\n', 1.5

    monkeypatch.setattr(bench, "child", child)
    return ran


def test_on_a_gpu_ours_is_on_auto_and_the_peer_has_nanogpts_defaults(commands):
    for side in (bench.ROOT, "/peer"):
        ms, peak, mfu = bench.train_times(side, "train_baby", "/tmp/x", "cuda")
        assert (ms, peak, mfu) == (8.5, 345.5, 12.5)  # the median of 6 to 11: the first five are left out
    (ours, _), (theirs, cwd) = commands
    assert cwd == "/peer" and ours[1:3] == theirs[1:3] == [os.path.join(bench.ROOT, "tests", "gpu_hooks.py"), "memory"]
    assert [a for a in ours if a.startswith(("--device", "--compile", "--dtype"))] == ["--device=cuda"]
    # nanoGPT's train.py: compile = True, and bfloat16 where the GPU has it
    assert {"--device=cuda", "--compile=True", "--dtype=bfloat16"} <= set(theirs)
    assert "--max_iters=100" in ours and "--max_iters=100" in theirs


def test_the_peer_is_not_asked_for_a_setting_that_it_does_not_have(commands):
    for side in (bench.ROOT, "/peer"):
        bench.train_times(side, "train_gpt2_recompute", "/tmp/x", "cuda")
    assert ["--recompute=True" in command for command, _ in commands] == [True, False]


def test_on_a_gpu_a_sample_row_is_measured_there(commands):
    seconds, peak = bench.sample_times(bench.ROOT, "sample_baby", "/tmp/x", "cuda")
    assert (seconds, peak) == (0.0, 345.5)
    assert all("--device=cuda" in command for command, _ in commands)


def test_a_gpu_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, str(ROOT / "tests" / "bench.py"), "--device=cuda", "train_cpu"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2 and "finds no GPU" in result.stderr.splitlines()[-1] and result.stdout == ""


def test_the_small_process_that_measures_memory_imports_no_torch():
    """A process that starts another hands its own peak on, so a large one would hide the command's."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); import bench; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, str(ROOT / "tests")], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
