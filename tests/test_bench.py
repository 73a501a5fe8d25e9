"""tools/bench.py: its command line, and a row of its table."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, TINY, copy_project, flags
from runs import assert_close

from tools import bench as bench_module


def bench(project, *arguments):
    command = [sys.executable, str(project / "tools" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


@pytest.mark.slow
@pytest.mark.parametrize("arguments, said", [
    (["train_cup"], "no such row: train_cup; there are train_baby,"), (["--peer"], "--peer"), (["--runs=0"], "--runs=0"),
    (["--runs=x"], "--runs"), (["--rnus=5"], "--rnus=5"), (["--peer={}"], "there is no train.py in it"),
    (["train_cpu"], "python data/shakespeare_char/prepare.py"),
])  # fmt: skip
def test_a_mistake_is_named(tmp_path, own_project, arguments, said):
    result = bench(own_project, *(a.format(tmp_path) for a in arguments))
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert said in result.stderr.splitlines()[-1]


def test_help_names_every_row(run):
    result = run("tools/bench.py", "--help")
    rows = "train_baby train_cpu train_gpt2 sample_baby sample_gpt2 val_cpu time_to_loss load_gpt2 scaling encode trials"
    assert set(rows.split()) <= set(re.findall(r"\w+", result.stdout))
    assert "train_gpt2_recompute" in result.stdout


@pytest.mark.slow
def test_a_row_has_our_figures_and_the_peers(tmp_path):
    sides = [copy_project(tmp_path / name) for name in ("ours", "peer")]
    for side in sides:  # a text of this size takes no longer to prepare than to read
        (side / "data" / "shakespeare_char" / "input.txt").write_bytes((ROOT / "model.py").read_bytes())
        subprocess.run([sys.executable, str(side / "data/shakespeare_char/prepare.py")], check=True, capture_output=True)
    result = bench(sides[0], f"--peer={sides[1]}", "--runs=1", "train_cpu")
    assert result.returncode == 0, result.stderr
    header, _, row = result.stdout.splitlines()
    assert header == "| work | ours | peer | ratio | tokens/s | MFU | peak memory, ours / peer |"
    work, ours, peer, ratio, tokens, mfu, memory = (cell.strip() for cell in row.strip("|").split("|"))
    ours, peer = (float(ms.removesuffix(" ms").replace(",", "")) for ms in (ours, peer))
    assert work == "4 layers x 128, block 64, batch 12" and re.fullmatch(r"\d+ / \d+ MiB", memory)
    # the figures are of one another: 768 tokens an iteration, and 0.8 M parameters a share of some peak
    assert float(ratio.removesuffix(" x")) == pytest.approx(peer / ours, abs=0.02)
    assert int(tokens.replace(",", "")) == pytest.approx(768 / ours * 1000, rel=0.01)
    assert 0 < float(mfu.removesuffix(" %")) <= 100


# ----------------------------------------------------------------------------------------------
# tools/bench.py on a GPU: its commands there, and where its memory figure comes from. No GPU is needed


@pytest.fixture
def commands(monkeypatch):
    """The commands that bench would run, each answered with lines of train.py."""
    ran = []

    def child(command, cwd):
        ran.append((command, cwd))
        iters = "".join(f"iter {n}: loss 2.0, time {n + 1}.00ms, mfu 12.50%\n" for n in range(11))
        return iters + '\nseen: {"device_mib": 345.5}\n', 1.5

    monkeypatch.setattr(bench_module, "child", child)
    return ran


def test_on_a_gpu_ours_is_on_auto_and_the_peer_has_nanogpts_defaults(commands):
    for side in (bench_module.ROOT, "/peer"):
        ms, peak, mfu = bench_module.train_times(side, "train_baby", "/tmp/x", "cuda")
        assert (ms, peak, mfu) == (8.5, 345.5, 12.5)  # the median of 6 to 11: the first five are left out
    (ours, _), (theirs, cwd) = commands
    assert cwd == "/peer" and ours[1:3] == theirs[1:3] == [os.path.join(bench_module.ROOT, "tools", "gpu_hooks.py"), "memory"]
    assert [a for a in ours if a.startswith(("--device", "--compile", "--dtype"))] == ["--device=cuda"]
    # nanoGPT's train.py: compile = True, and bfloat16 where the GPU has it
    assert {"--device=cuda", "--compile=True", "--dtype=bfloat16"} <= set(theirs)
    assert "--max_iters=100" in ours and "--max_iters=100" in theirs


def test_the_peer_is_not_asked_for_a_setting_that_it_does_not_have(commands):
    for side in (bench_module.ROOT, "/peer"):
        bench_module.train_times(side, "train_gpt2_recompute", "/tmp/x", "cuda")
    assert ["--recompute=True" in command for command, _ in commands] == [True, False]


def test_on_a_gpu_a_sample_row_is_measured_there(commands):
    seconds, peak = bench_module.sample_times(bench_module.ROOT, "sample_baby", "/tmp/x", "cuda")
    assert (seconds, peak) == (0.0, 345.5)
    assert all("--device=cuda" in command for command, _ in commands)


def test_trials_run_train_py_with_each_change_and_compare_with_none(monkeypatch):
    def child(command, cwd):
        changes, micro_steps = command[2].removeprefix("trial:"), int(command[-1].partition("=")[2])
        ms = 10.0 * micro_steps / (2 if changes else 1)
        iters = "".join(f"iter {n}: loss 2.5, time {ms}ms, mfu {'n/a' if n == 0 else '40.00%'}\n" for n in (0, 10, 20))
        return iters + '\nseen: {"device_mib": 7000.0}\n', 1.0

    monkeypatch.setattr(bench_module, "child", child)
    rows = bench_module.other_row("trials", None, 1, "/tmp/x", "cuda").splitlines()
    assert rows[0] == "| GPT-2 124M, 1 x 12 x 1024, as it is: loss 2.5000 | 10.00 ms | - | 1.000 x | 1,228,800 | 40.0 % | 7,000 MiB |"
    assert rows[-1] == ("| GPT-2 124M, 5 x 12 x 1024, graphs+rows+clip+tuning: loss 2.5000 | 25.00 ms | - | 2.000 x | 2,457,600 "
                        "| 40.0 % | 7,000 MiB |")  # fmt: skip
    assert "GPU" in bench_module.other_row("trials", None, 1, "/tmp/x", "cpu")


def test_a_trial_computes_the_same_losses(run, whole_run, project, tmp_path):
    """What of it does not take a GPU: kept gradients, rows of the loss, the clip in AdamW's step."""
    settings = TINY | dict(gradient_accumulation_steps=2, grad_clip=0.1)
    tried = run("tools/gpu_hooks.py", "trial:graphs+rows+clip+tuning", project / "train.py", *flags(settings, out_dir=tmp_path / "out"))
    assert_close(tried.losses, [(*line[:2], *map(float, line[2:])) for line in whole_run(settings)[0]])


def test_a_gpu_that_is_not_there_is_named(run):
    result = run("tools/bench.py", "--device=cuda", "train_cpu", expect=2)
    assert "finds no GPU" in result.stderr.splitlines()[-1] and result.stdout == ""


def test_the_small_process_that_measures_memory_imports_no_torch():
    """A process that starts another hands its own peak on, so a large one would hide the command's."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from tools import bench; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=True)
    assert out.stdout == "False\n"
