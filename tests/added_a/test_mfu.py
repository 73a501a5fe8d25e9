"""The measured peak, and an MFU that is never above 100 % of it."""

import re

import pytest
import torch
from conftest import TINY, flags

from nanogpt import mfu
from nanogpt.distributed import Processes


class Model:
    def flops_per_token(self):
        return 1e6


def running(monkeypatch, peak, source, said):
    monkeypatch.setattr(mfu, "find_peak_flops", lambda *_: (peak, source))
    processes = Processes()
    processes.say = lambda *lines: said.extend(lines)
    return mfu.RunningMFU(Model(), 0.0, "cpu", "float32", processes, first_iter=10)


def test_a_measured_peak_that_is_beaten_is_raised_and_the_mean_with_it(monkeypatch):
    """By hand: 100 tokens of 1 MFLOP are 1e8 FLOP."""
    said = []
    found = running(monkeypatch, 1e9, "measured, cpu, float32", said)
    assert [found.update(n, 100, 1.0) for n in (10, 14)] == ["n/a", "n/a"]
    assert found.update(15, 100, 0.2) == "50.00%"  # 5e8 of 1e9
    assert said == []
    assert found.update(16, 100, 0.05) == "32.50%"  # 2e9 is the peak now: 0.9 * 25 % + 0.1 * 100 %
    assert said == ["the peak was measured too low: from here on it is 0.002 TFLOPS"]
    assert found.update(17, 100, 0.05) == "39.25%" and len(said) == 1
    for n in range(18, 200):
        assert float(found.update(n, 100, 0.05 * 0.99 ** (n - 17)).rstrip("%")) <= 100


@pytest.mark.parametrize("source", ["given", "NVIDIA A100-SXM4-80GB, bfloat16"])
def test_a_peak_that_was_not_measured_stands_as_it_is(monkeypatch, source):
    said = []
    found = running(monkeypatch, 1e9, source, said)
    assert found.update(15, 100, 0.05) == "200.00%" and said == [] and found.peak == 1e9


def test_a_run_whose_peak_was_measured_far_too_low_prints_no_mfu_above_100(run, own_project, tmp_path):
    driver = own_project / "driver.py"
    driver.write_text(
        "import os, runpy, sys\nfrom nanogpt import mfu\nmfu.measure_peak = lambda device, dtype: 1e4\n"
        "runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), 'train.py'), run_name='__main__')\n"
    )
    arguments = flags(TINY | dict(max_iters=30, peak_flops=0.0), out_dir=tmp_path / "out")
    result = run("driver.py", *arguments, project=own_project)
    shown = [float(m) for m in re.findall(r"mfu ([\d.]+)%$", result.stdout, re.M)]
    assert len(shown) == 26 and max(shown) <= 100
    assert "the peak was measured too low: from here on it is" in result.stdout
    given = run("train.py", *flags(TINY, out_dir=tmp_path / "given", peak_flops=1e4))
    assert max(float(m) for m in re.findall(r"mfu ([\d.]+)%$", given.stdout, re.M)) > 100
    assert "measured too low" not in given.stdout


class FakeTime:
    """Bursts of 0.05 s each, whose figures come from a list."""

    def __init__(self, figures):
        self.now, self.figures, self.sizes = 0.0, figures, []

    def perf_counter(self):
        return self.now

    def burst(self, a, at_once, synchronize):
        self.now += 0.05
        self.sizes.append(len(a))
        return next(self.figures)


@pytest.mark.parametrize("figures, seconds", [
    (lambda k: 1e12, 0.5), (lambda k: 1e12 * (1 + 0.01 * (k % 3)), 0.5), (lambda k: 1e11 * 1.2**k, 1.0),
], ids=["all alike", "nearly alike", "each better than all before"])  # fmt: skip
def test_the_peak_takes_half_a_second_and_a_whole_one_where_bursts_disagree(monkeypatch, figures, seconds):
    taken = []
    fake = FakeTime(taken.append(figures(k)) or taken[-1] for k in range(1000))
    monkeypatch.setattr(mfu, "time", fake)
    monkeypatch.setattr(mfu, "_burst", fake.burst)
    assert mfu.measure_peak("cpu", "float32") == max(taken)
    assert seconds <= fake.now <= seconds + 0.15 and set(fake.sizes) == {256, 1024, 2048}


def test_a_dtype_so_slow_that_large_products_take_seconds_is_measured_on_small_ones(monkeypatch):
    fake = FakeTime(iter([3e8] * 1000))
    monkeypatch.setattr(mfu, "time", fake)
    monkeypatch.setattr(mfu, "_burst", fake.burst)
    assert mfu.measure_peak("cpu", "bfloat16") == 3e8 and set(fake.sizes) == {256}


def test_the_measured_peak_is_what_the_fastest_product_reaches():
    """Against products timed here: other work on the machine only ever lowers either."""
    import time

    a, best = torch.randn(1024, 1024), 0.0
    for _ in range(20):
        start = time.perf_counter()
        a @ a
        best = max(best, 2 * 1024**3 / (time.perf_counter() - start))
    assert 0.3 * best < mfu.measure_peak("cpu", "float32") < 10 * best
