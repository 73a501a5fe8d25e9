"""data/order.py: each window of a pass comes once, over all processes, in an order computed from seed and pass."""

import csv
import itertools
import math
import time

import numpy as np
import pytest
import torch
from conftest import RESUME, SYNTHETIC, error_line, flags
from test_distributed import no_rank_stays, ranks, run_ranks  # noqa: F401  (fixtures)

from data.order import Windows

B, T = 4, 8  # windows in a micro-batch, tokens in a window


def micro_batches(n, n_tokens, world_size=1, seed=1337, taken=0, batch_size=B, block_size=T):
    """The starts (n, world_size, batch_size) of `n` micro-batches of all processes."""
    each = [
        Windows("epoch", seed, taken * block_size, batch_size, block_size, rank, world_size)
        for rank in range(world_size)
    ]
    return np.array([[windows.starts(n_tokens) for windows in each] for _ in range(n)])


def passes(starts, n_tokens, block_size=T):
    """`starts` (n,) cut into whole passes; the rest, an unfinished one, is left out.

    A pass from the offset o on has the windows o, o + T, ... that fit, each with the token after it."""
    found = []
    while len(starts):
        offset = starts[0] % block_size
        count = (n_tokens - 1 - offset) // block_size
        if len(starts) < count:
            break
        found.append(starts[:count])
        starts = starts[count:]
    return found


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("n_tokens", [T + 1, T + 2, 2 * T, 2 * T + 1, 3 * T, 1000, 1001, 1007])
def test_every_window_of_a_pass_comes_once_over_all_processes(n_tokens, world_size):
    n = 40 + 6 * (n_tokens // T) // B  # six passes, and of a few windows many more
    found = passes(micro_batches(n, n_tokens, world_size).reshape(-1), n_tokens)
    assert len(found) >= n * world_size * B // (n_tokens // T + 1) - 1 >= 5
    for one in found:
        offset = one.min()
        assert 0 <= offset < T
        assert sorted(one) == list(range(offset, n_tokens - T, T))  # all that fit; T + 1 tokens are read from each


def test_each_pass_has_an_offset_and_an_order_of_its_own():
    found = passes(micro_batches(3000, 1001).reshape(-1), 1001)
    offsets = [one.min() for one in found]
    assert len(found) > 90 and set(offsets) == set(range(T))
    orders = {tuple((one - one.min()) // T)[:100] for one in found}
    assert len(orders) == len(found)


def test_the_order_is_the_same_for_any_number_of_processes_and_from_any_position():
    whole = micro_batches(600, 1001).reshape(-1)
    for world_size in (2, 5):
        assert micro_batches(600 // world_size, 1001, world_size).reshape(-1).tolist() == whole.tolist()
    for taken in (1, 124, 125, 126, 1999):  # in the middle of a micro-batch and of a pass, too
        rest = micro_batches(40, 1001, world_size=2, taken=taken).reshape(-1)
        assert rest.tolist() == whole[taken : taken + len(rest)].tolist()


def test_another_seed_is_another_order():
    one, two, again = (micro_batches(50, 100_000, seed=seed).reshape(-1).tolist() for seed in (1, 2, 1))
    assert one == again
    # two draws of 200 from 12,500 windows have 200 * 200 / 12,500 = 3.2 in common, could they be compared by window
    assert len({start // T for start in one} & {start // T for start in two}) < 15


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_all_orders_of_a_few_windows_are_equally_likely(n):
    """Pearson's chi-squared test: the statistic is below its 99.99 % quantile."""
    counts = dict.fromkeys(itertools.permutations(range(n)), 0)
    for seed in range(max(1000, 50 * len(counts))):  # of windows of one token, so that the offset is 0
        counts[tuple(Windows("epoch", seed, 0, n, 1).starts(n + 1).tolist())] += 1
    expected = sum(counts.values()) / math.factorial(n)
    chi_squared = sum((count - expected) ** 2 / expected for count in counts.values())
    quantile = {2: 15.1, 3: 25.7, 4: 60.0, 5: 186.5}[n]  # scipy.stats.chi2.ppf(0.9999, n! - 1)
    assert expected > 4 and chi_squared < quantile


def test_a_long_order_looks_random():
    """Neighbours, and a window's place and its number, do not correlate: |r| < 4 / sqrt(n)."""
    n = 20_000
    [order] = passes(micro_batches(n // B + 1, n * T + 1).reshape(-1), n * T + 1)
    order = order.astype(float)
    places = np.arange(len(order))
    for one, other in [(order[:-1], order[1:]), (order[:-2], order[2:]), (order, places)]:
        assert abs(np.corrcoef(one, other)[0, 1]) < 4 / math.sqrt(n)
    assert abs(np.corrcoef(order % (2 * T), places)[0, 1]) < 4 / math.sqrt(n)  # odd and even windows


def test_ten_trillion_tokens_take_no_memory_and_no_time():
    began = time.perf_counter()
    starts = micro_batches(100, 10**13, taken=10**9, block_size=1024)
    assert time.perf_counter() - began < 2 and len(np.unique(starts)) == starts.size
    assert starts.min() >= 0 and starts.max() < 10**13 - 1024 and starts.std() > 2e12  # uniform: 2.9e12


# ----------------------------------------------------------------------------------------------
# random, and evaluations


def test_random_is_nanogpts_draw():
    torch.manual_seed(7)
    windows = Windows("random", 1337, 0, B, T)
    expected = torch.Generator().manual_seed(7)
    for n_tokens, evaluation in [(1000, False), (300, True), (1000, True), (1000, False)]:
        draw = torch.randint(n_tokens - T, (B,), generator=expected)
        assert windows.starts(n_tokens, evaluation).tolist() == draw.tolist()


def test_evaluations_are_drawn_at_random_and_change_nothing_in_an_epochs_order():
    torch.manual_seed(7)
    windows = Windows("epoch", 1337, 0, B, T)
    found, drawn = [], []
    for _ in range(100):
        found.append(windows.starts(1000).tolist())
        drawn.append(windows.starts(300, evaluation=True).tolist())
    assert found == micro_batches(100, 1000)[:, 0].tolist()
    expected = torch.Generator().manual_seed(7)
    assert drawn == [torch.randint(300 - T, (B,), generator=expected).tolist() for _ in range(100)]


# ----------------------------------------------------------------------------------------------
# in a run

RUN = SYNTHETIC | dict(order="epoch", max_iters=44, eval_interval=20)  # 20,000 tokens: 39 iterations


def gradient_norms(out_dir):
    with open(out_dir / "log.csv", newline="") as f:
        return [float(row["grad_norm"]) for row in csv.DictReader(f) if row["kind"] == "train"]


def test_a_run_trains_on_every_window_once_a_pass(run, own_project, tmp_path):
    """train.py's own get_batch, whose gathers are written down by the program that runs it."""
    run("tests/programs/record_windows.py", *flags(RUN, out_dir=tmp_path / "out", eval_iters=1),
        project=own_project, env={"NOTES": str(tmp_path / "starts.npy")})  # fmt: skip
    starts = np.load(tmp_path / "starts.npy")
    assert len(starts) == (45 * 2 + 1) * 8  # iterations, micro-batches, windows; and the batch drawn last
    [first] = passes(starts, 20000, 32)
    assert sorted(first) == list(range(first.min(), 20000 - 32, 32))


@pytest.mark.slow
def test_two_processes_and_a_resume_on_one_take_the_windows_of_one_process(run, run_ranks, tmp_path):  # noqa: F811
    """The gradient of an iteration is a mean over its windows: over the same ones, its norm is the same."""
    run("train.py", *flags(RUN, out_dir=tmp_path / "one"))
    expected = gradient_norms(tmp_path / "one")
    run_ranks(2, *flags(RUN, out_dir=tmp_path / "two", max_iters=19))
    assert gradient_norms(tmp_path / "two") == pytest.approx(expected[:20], rel=1e-3)
    result = run("train.py", *flags(RESUME, out_dir=tmp_path / "two", max_iters=44))
    assert "the run had 2 processes and has 1 now: from here on other evaluation batches come" in result.lines
    assert gradient_norms(tmp_path / "two") == pytest.approx(expected, rel=1e-3)
    run("train.py", *flags(RUN, out_dir=tmp_path / "random", order="random"))
    assert gradient_norms(tmp_path / "random") != pytest.approx(expected, rel=1e-2)


@pytest.mark.slow
def test_a_resume_with_another_batch_size_continues_the_pass_and_another_seed_takes_other_windows(run, tmp_path):
    run("train.py", *flags(RUN, out_dir=tmp_path / "one"))
    norms = gradient_norms(tmp_path / "one")
    for name, seed in (("same", 1337), ("other", 5)):
        run("train.py", *flags(RUN, out_dir=tmp_path / name, max_iters=19))
        more = RESUME | dict(max_iters=44, seed=seed)
        # 1 x 16 windows an iteration, where the run had 2 x 8
        result = run("train.py", *flags(out_dir=tmp_path / name, batch_size=16, gradient_accumulation_steps=1, **more))
        found = gradient_norms(tmp_path / name)
        assert (found == pytest.approx(norms, rel=1e-3)) == (name == "same")
        assert ("seed is now 5 (the run had 1337)" in result.lines) == (name == "other")


def test_an_order_that_there_is_not_is_one_line(run, tmp_path):
    line = error_line(run("train.py", *flags(RUN, out_dir=tmp_path / "out", order="shuffle"), expect=2))
    assert line == "--order=shuffle: takes random or epoch" and not (tmp_path / "out").exists()
