"""tests/bench.py: its command line, and a row of its table."""

import os
import re
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT, copy_project


def bench(project, *arguments):
    command = [sys.executable, str(project / "tests" / "bench.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"})


def with_bench(project):
    shutil.copy(ROOT / "tests" / "bench.py", project / "tests")
    return project


@pytest.mark.parametrize("arguments, said", [
    (["train_cup"], "no such row: train_cup; there are train_baby,"), (["--peer"], "--peer"), (["--runs=0"], "--runs=0"),
    (["--runs=x"], "--runs"), (["--rnus=5"], "--rnus=5"), (["--peer={}"], "there is no train.py in it"),
    (["train_cpu"], "python data/shakespeare_char/prepare.py"),
])  # fmt: skip
def test_a_mistake_is_named(tmp_path, own_project, arguments, said):
    result = bench(with_bench(own_project), *(a.format(tmp_path) for a in arguments))
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr
    assert said in result.stderr.splitlines()[-1]


def test_help_names_every_row(own_project):
    result = bench(with_bench(own_project), "--help")
    rows = "train_baby train_cpu train_gpt2 sample_baby sample_gpt2 val_cpu time_to_loss load_gpt2 scaling"
    assert result.returncode == 0 and set(rows.split()) <= set(re.findall(r"\w+", result.stdout))
    assert "train_gpt2_recompute" in result.stdout


@pytest.mark.slow
def test_a_row_has_our_figures_and_the_peers(tmp_path):
    sides = [copy_project(tmp_path / name) for name in ("ours", "peer")]
    for side in sides:  # a text of this size takes no longer to prepare than to read
        (side / "data" / "shakespeare_char" / "input.txt").write_bytes((ROOT / "model.py").read_bytes())
        subprocess.run([sys.executable, str(side / "data/shakespeare_char/prepare.py")], check=True, capture_output=True)
    result = bench(with_bench(sides[0]), f"--peer={sides[1]}", "--runs=1", "train_cpu")
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
