"""Several processes: torchrun launches on loopback, and ranks started one by one where it is not the point.

A rank started by itself has the environment that torchrun gives it; it is forked from a warm process,
which saves most of a launch's time.
"""

import csv
import math
import os
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import reference
import torch
import torch.distributed as dist
from conftest import ROOT, RESUME, SYNTHETIC, TINY, error_line, flags, parse, rows as log_rows
from reference import F
from runs import assert_close, load, places

from nanogpt.distributed import pick_backend
from nanogpt.errors import UserError

# Two micro-steps each on two processes; five evaluation batches, which two and four processes cannot share evenly.
RUN = SYNTHETIC | dict(gradient_accumulation_steps=4, max_iters=60, eval_interval=20)
BETAS = dict(weight_decay=0.1, beta1=0.9, beta2=0.95, grad_clip=1.0, decay_lr=True, seed=1337)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def processes_with(mark):
    """{pid: environment} of the processes in whose environment `mark` is."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if mark in environment:
            found[int(folder.name)] = dict(line.split("=", 1) for line in environment if "=" in line)
    return found


@pytest.fixture(scope="session")
def ranks(start):
    """ranks(n, *arguments) -> [Running], a process a rank, started as torchrun would, but by itself."""

    def ranks(n, *arguments, script="train.py", cwds=None, env=None, **options):
        shared = {"WORLD_SIZE": n, "LOCAL_WORLD_SIZE": n, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
                  "OMP_NUM_THREADS": 1} | (env or {})  # fmt: skip
        running = [
            start(script, *arguments, cwd=cwds and cwds[r], **options,
                  env={k: str(v) for k, v in (shared | {"RANK": r, "LOCAL_RANK": r}).items()})
            for r in range(n)
        ]  # fmt: skip
        started.extend(running)
        return running

    started = []
    ranks.started = started
    return ranks


@pytest.fixture(autouse=True)
def no_rank_stays(ranks):
    """A failed test's processes would slow down all that follow."""
    yield
    while ranks.started:
        each = ranks.started.pop()
        if each.code is None:
            each.process.kill()


@pytest.fixture(scope="session")
def run_ranks(ranks):
    """run_ranks(n, *arguments) -> rank 0's Result; every rank ends with `expect`, and only rank 0 has printed."""

    def run_ranks(n, *arguments, expect=0, **options):
        results = [each.end() for each in ranks(n, *arguments, **options)]
        assert [r.returncode for r in results] == [expect] * n, results
        assert all(r.stdout == r.stderr == "" for r in results[1:]), results
        return results[0]

    return run_ranks


class Launch:
    """A torchrun under way."""

    def __init__(self, running, mark):
        self.running, self.mark = running, mark

    def __getattr__(self, name):
        return getattr(self.running, name)

    def workers(self):
        """{rank: pid}"""
        found = {int(e["RANK"]): pid for pid, e in processes_with(self.mark).items() if "TORCHELASTIC_RUN_ID" in e}
        return {rank: pid for rank, pid in found.items() if pid != self.process.pid}


@pytest.fixture
def torchrun(start, project, tmp_path):
    """torchrun(*arguments, n=2) -> Launch of train.py with those. `options` are torchrun's own."""
    marks = []

    def torchrun(*arguments, n=2, options=("--standalone",), env=None, program=project / "train.py"):
        mark = f"{tmp_path}/{len(marks)}"
        marks.append("LAUNCH=" + mark)
        arguments = [*options, f"--nproc_per_node={n}", program, *arguments]
        return Launch(start("tests/programs/torchrun.py", *arguments, env={"LAUNCH": mark} | (env or {})), marks[-1])

    yield torchrun
    for mark in marks:  # a worker outlives a killed torchrun
        for pid in processes_with(mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def our_errors(text):
    """The `error:` lines in a launch's stderr, which has torchrun's own report as well."""
    return [line for line in text.splitlines() if line.startswith("error:")]


def rows(out_dir):
    with open(out_dir / "log.csv", newline="") as f:
        return [({"eval": "step", "train": "iter"}[row["kind"]], int(row["iter"])) for row in csv.DictReader(f)]


def joined(*parts):
    """The losses of a run in parts, of which one may repeat the end of the one before: those must agree."""
    found = {}
    for losses in parts:
        for line in losses:
            assert found.setdefault(line[:2], line) == line
    return sorted(found.values(), key=lambda line: (line[1], line[0] == "iter"))


# ----------------------------------------------------------------------------------------------
# the numbers


@pytest.fixture(scope="module")
def whole(ranks, tmp_path_factory):
    """whole(sharding) -> (folder of each rank, results) of RUN on two processes, each with a working directory."""
    done = {}

    def whole(sharding):
        if sharding not in done:
            cwds = [tmp_path_factory.mktemp(f"{sharding}{r}") for r in range(2)]
            running = ranks(2, *flags(RUN, sharding=sharding, out_dir="out"), cwds=cwds)
            done[sharding] = cwds, [each.end() for each in running]
        return done[sharding]

    return whole


def synthetic_tokens():
    i = torch.arange(24000)
    tokens = (i * i * 7 + i // 3) % 61
    return {"train": tokens[:20000], "val": tokens[20000:]}


class OneProcess:
    """What `world` processes compute together, by one process and the plain model of reference.py."""

    def __init__(self, s, world):
        torch.set_num_threads(1)
        self.s, self.world, self.tokens = s | BETAS, world, synthetic_tokens()
        self.streams = []
        for rank in range(world):
            torch.manual_seed(self.s["seed"] + rank)
            weights = reference.fresh_weights(vocab_size=61, **s)
            self.weights = weights if rank == 0 else self.weights
            self.streams.append(torch.Generator())
            self.streams[-1].set_state(torch.get_rng_state())
        self.optimizer = reference.optimizer_of(self.weights, self.s)
        self.next = [self.batch(rank, "train") for rank in range(world)]

    def batch(self, rank, split):
        tokens, T = self.tokens[split], self.s["block_size"]
        starts = torch.randint(len(tokens) - T, (self.s["batch_size"],), generator=self.streams[rank]).tolist()
        window = torch.stack([tokens[i : i + T + 1] for i in starts])
        return window[:, :-1], window[:, 1:]

    def loss(self, x, y):
        return F.cross_entropy(reference.logits_of(self.weights, x, self.s["n_head"]).flatten(0, 1), y.flatten())

    def backward(self):
        """Gradients of an iteration; rank 0's last loss."""
        micro_steps = self.s["gradient_accumulation_steps"] // self.world
        for _ in range(micro_steps):
            batches = self.next
            self.next = [self.batch(rank, "train") for rank in range(self.world)]
            losses = [self.loss(*batch) for batch in batches]
            (sum(losses) / (micro_steps * self.world)).backward()
        return losses[0].item()

    @torch.no_grad()
    def evaluate(self):
        means, n = [], self.s["eval_iters"]
        for split in ("train", "val"):
            turns = math.ceil(n / self.world)
            each = [[self.loss(*self.batch(rank, split)).item() for _ in range(turns)] for rank in range(self.world)]
            means.append(sum([loss for turn in zip(*each, strict=True) for loss in turn][:n]) / n)
        return means

    def losses(self):
        found = []
        for n in range(self.s["max_iters"] + 1):
            for group in self.optimizer.param_groups:
                group["lr"] = reference.learning_rate(n, self.s)
            if n % self.s["eval_interval"] == 0:
                found.append(("step", n, *self.evaluate()))
            found.append(("iter", n, self.backward()))
            torch.nn.utils.clip_grad_norm_(list(self.weights.values()), self.s["grad_clip"])
            self.optimizer.step()
            self.optimizer.zero_grad()
        return found


def test_two_processes_print_the_losses_of_one_that_sees_both_their_batches(whole):
    """A step's losses are the mean over the batches of all ranks, an iteration's is rank 0's."""
    results = whole("ddp")[1]
    assert [r.returncode for r in results] == [0, 0], results
    assert_close(results[0].losses, OneProcess(RUN, 2).losses())


def test_fsdp_prints_ddps_losses(whole):
    assert whole("fsdp")[1][0].losses == whole("ddp")[1][0].losses
    assert ", fsdp; " in whole("fsdp")[1][0].stdout and ", ddp; " in whole("ddp")[1][0].stdout


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_only_rank_0_prints_and_writes(whole, sharding):
    (first, second), results = whole(sharding)
    assert [r.returncode for r in results] == [0, 0] and results[0].stderr == ""
    assert results[1].stdout == results[1].stderr == "" and list(second.iterdir()) == []
    assert sorted(p.name for p in (first / "out").iterdir()) == [".lock", "ckpt.pt", "last.pt", "log.csv"]
    assert rows(first / "out") == places(results[0].losses)
    assert "2 x cpu, " in results[0].stdout


@pytest.mark.slow
def test_four_processes_under_torchrun_print_the_losses_of_one_that_sees_all_their_batches(torchrun, tmp_path):
    settings = RUN | dict(max_iters=12, eval_interval=6)
    result = torchrun(*flags(settings, out_dir=tmp_path / "out"), n=4).end()
    assert result.returncode == 0, result
    assert "4 x cpu, 1 CPU threads each" in result.stdout and "tokens per iteration will be: 1,024" in result.stdout
    assert_close(result.losses, OneProcess(settings, 4).losses())


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_recompute_changes_no_loss_and_no_gradient_norm_on_two_processes(run_ranks, tmp_path, sharding):
    settings = TINY | dict(n_layer=2, dropout=0.2, gradient_accumulation_steps=4, sharding=sharding)
    plain, recomputed = (
        run_ranks(2, *flags(settings, recompute=r, out_dir=tmp_path / str(r))).losses for r in (False, True)
    )
    assert plain == recomputed and len(plain) == 9 + 3
    assert log_rows(tmp_path / "False") == log_rows(tmp_path / "True")


@pytest.mark.slow
def test_a_compiled_gpt2_with_its_loss_in_chunks_has_the_eager_losses_under_ddp(run_ranks, own_project, tmp_path):
    (own_project / "data" / "synthetic" / "meta.pkl").unlink()  # and so GPT-2's vocabulary
    settings = TINY | dict(gradient_accumulation_steps=4, max_iters=3, eval_interval=3)
    eager, compiled = (
        run_ranks(2, *flags(settings, compile=c, out_dir=tmp_path / f"out{c}"), project=own_project).losses
        for c in (False, True)
    )
    assert_close(compiled, [(*line[:2], *map(float, line[2:])) for line in eager])


@pytest.mark.parametrize("sharding, exchanges", [("ddp", 1), ("fsdp", 3)])  # one bucket; two blocks and the root
def test_gradients_are_one_processs_and_exchanged_once_an_iteration(run_ranks, tmp_path, sharding, exchanges):
    settings = RUN | dict(gradient_accumulation_steps=8, max_iters=3, eval_interval=100, grad_clip=0.0)
    settings |= dict(sharding=sharding, out_dir=tmp_path / "out")
    run_ranks(2, *flags(settings), script="tests/programs/record_gradients.py", env={"RECORD": str(tmp_path)})
    one = OneProcess(RUN | dict(gradient_accumulation_steps=8), 2)
    one.evaluate()  # iteration 0 has one, which draws from the same streams
    one.backward()
    expected = [p.grad for group in one.optimizer.param_groups for p in group["params"]]
    largest = max(g.abs().max().item() for g in expected)
    for rank in range(2):
        found = load(tmp_path / f"gradients{rank}.pt")
        assert len(found) == len(expected) and largest > 1e-3
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-6
        assert (tmp_path / f"counts{rank}").read_text().split() == [str(exchanges)] * 4


def test_a_few_steps_give_the_weights_of_one_process(run_ranks, tmp_path):
    """AdamW's first steps divide the gradient by its own size, so rounding shows where it is next to nothing."""
    settings = RUN | dict(max_iters=3, eval_interval=100)
    run_ranks(2, *flags(settings, out_dir=tmp_path / "out"))
    one = OneProcess(settings, 2)
    one.losses()
    found = load(tmp_path / "out" / "last.pt")["model"]
    apart = torch.cat([(found[name] - weight).abs().flatten() for name, weight in one.weights.items()])
    assert (apart > 1e-6).float().mean() < 1e-4 and apart.max() < 0.05 * RUN["learning_rate"], apart.max()


def test_the_threads_of_a_process_are_set_and_said(ranks, tmp_path):
    launches = {n: ranks(2, *flags(TINY, gradient_accumulation_steps=2, out_dir=tmp_path / str(n)),
                         env={"OMP_NUM_THREADS": n}) for n in (1, 3)}  # fmt: skip
    for n, running in launches.items():
        results = [each.end() for each in running]
        assert [r.returncode for r in results] == [0, 0]
        cores = min(len(os.sched_getaffinity(0)), torch.cpu.get_capabilities()["num_physical_cores"])
        assert f"2 x cpu, {3 if n == 3 else max(1, cores // 2)} CPU threads each" in results[0].stdout


# ----------------------------------------------------------------------------------------------
# mistakes


MISTAKES = {
    "--backend=nccl": "--backend=nccl works on CUDA devices only",
    "--gradient_accumulation_steps=3": "--gradient_accumulation_steps=3: must be at least 1, and a multiple of the number of processes, 2",
    "--learning_rat=1": "--learning_rat=1: there is no setting learning_rat; did you mean learning_rate?",
    "--dataset=nowhere": "dataset nowhere is not prepared (train.bin is missing)",
    "--init_from=resume": "there is no checkpoint in ",
}


@pytest.mark.slow  # real launches; the quick one below starts ranks by itself
def test_a_mistake_is_one_line_from_rank_0_and_ends_every_rank(torchrun, tmp_path):
    settings, program = flags(TINY, gradient_accumulation_steps=2), ROOT / "tests/programs/abort_at_exit.py"
    launches = {
        mistake: torchrun(*settings, f"--out_dir={tmp_path / str(i)}", mistake, program=program)
        for i, mistake in enumerate(MISTAKES)
    }
    for mistake, launch in launches.items():
        result = launch.end()
        assert result.returncode == 1
        lines = our_errors(result.stderr)
        assert len(lines) == 1 and lines[0].startswith("error: " + MISTAKES[mistake]), (mistake, result.stderr)
        assert "SIGABRT" not in result.stderr
        # of the ranks' own; the ChildFailedError at the end is torchrun's
        assert "train.py\", line" not in result.stderr
        assert launch.workers() == {}
    assert not any((tmp_path / str(i)).exists() for i in range(len(MISTAKES)))


@pytest.mark.slow
def test_ranks_that_make_a_mistake_end_within_seconds_without_torchrun_too(ranks, tmp_path):
    start = time.monotonic()
    running = ranks(2, *flags(TINY, dataset="nowhere", out_dir=tmp_path / "out"), "--gradient_accumulation_steps=2")
    results = [each.end() for each in running]
    assert time.monotonic() - start < 30
    assert error_line(results[0]).startswith("dataset nowhere is not prepared")
    assert error_line(results[1]).startswith("rank 1: dataset nowhere is not prepared")


@pytest.mark.slow
def test_an_error_on_one_rank_ends_the_others(ranks, tmp_path):
    settings = RUN | dict(max_iters=10**6, eval_interval=10**6, out_dir=tmp_path / "out")
    spoilt = ranks(2, *flags(settings), script="tests/programs/bad_batch.py")
    first, second = [each.end() for each in spoilt]
    assert error_line(second) == "rank 1: this batch is bad"
    assert first.returncode == 1 and len(first.stderr.splitlines()) == 1, first.stderr
    assert first.stderr.startswith("error: another process is gone or cannot be reached")


# ----------------------------------------------------------------------------------------------
# checkpoints


def test_a_checkpoint_of_fsdps_is_whole_and_the_same_as_ddps(whole):
    sharded, plain = (load(whole(s)[0][0] / "out" / "last.pt") for s in ("fsdp", "ddp"))
    assert list(sharded["model"]) == list(plain["model"])
    for name, weight in plain["model"].items():
        assert type(sharded["model"][name]) is torch.Tensor
        assert sharded["model"][name].shape == weight.shape and (sharded["model"][name] - weight).abs().max() < 1e-5
    for i, moments in plain["optimizer"]["state"].items():
        for name, value in moments.items():
            found = sharded["optimizer"]["state"][i][name]
            assert type(found) is torch.Tensor and found.shape == value.shape
            assert (found - value).abs().max() < 1e-5
    assert len(sharded["points"]) == len(plain["points"]) == 2


@pytest.fixture(scope="module")
def half_way(run_ranks, tmp_path_factory):
    """half_way(sharding, to) -> the losses of RUN's first 30 iterations, whose out_dir is copied to `to`."""
    done = {}

    def half_way(sharding, to):
        if sharding not in done:
            out_dir = tmp_path_factory.mktemp("half") / sharding
            arguments = flags(RUN, max_iters=29, sharding=sharding, out_dir=out_dir)
            done[sharding] = out_dir, run_ranks(2, *arguments).losses
        shutil.copytree(done[sharding][0], to)
        return done[sharding][1]

    return half_way


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("fsdp", "ddp"), ("ddp", "fsdp"), ("fsdp", "fsdp")])
def test_a_run_goes_on_exactly_with_either_sharding(run_ranks, whole, half_way, tmp_path, first, second):
    losses = half_way(first, tmp_path / "out")
    arguments = flags(RESUME, out_dir=tmp_path / "out", max_iters=60, sharding=second)
    rest = run_ranks(2, *arguments).losses
    assert losses + rest == whole("ddp")[1][0].losses
    assert rows(tmp_path / "out") == places(losses + rest)


@pytest.mark.slow
def test_a_run_of_fsdps_goes_on_in_one_process_or_in_four_which_is_said(run, run_ranks, half_way, tmp_path):
    resume = flags(RESUME, max_iters=45)
    for n, sharding in (1, "ddp"), (4, "ddp"):
        out_dir = tmp_path / str(n)
        before = half_way("fsdp", out_dir)
        arguments = [*resume, f"--out_dir={out_dir}", f"--sharding={sharding}"]
        result = run("train.py", *arguments) if n == 1 else run_ranks(n, *arguments)
        assert f"the run had 2 processes and has {n} now: from here on other batches come" in result.stdout
        assert places(result.losses)[0] == ("iter", 30) and places(result.losses)[-1] == ("iter", 45)
        start, end = float(before[-1][2]), float(result.losses[-1][2])
        assert float(result.losses[0][2]) < start + 0.1 and end < start, (before[-1], result.losses)


def test_sample_reads_a_checkpoint_of_fsdps(run, whole):
    result = run("sample.py", f"--out_dir={whole('fsdp')[0][0] / 'out'}", "--num_samples=1", "--max_new_tokens=20",
                 "--device=cpu", "--dtype=float32", "--start=a")  # fmt: skip
    assert len(result.stdout) > 20 and result.stdout.startswith("a")


def test_a_resumed_run_may_have_a_number_of_processes_that_only_its_own_settings_fit(run_ranks, tmp_path):
    """The defaults' 40 micro-batches cannot be shared by three."""
    settings = TINY | dict(gradient_accumulation_steps=3, out_dir=tmp_path / "out")
    run_ranks(3, *flags(settings, max_iters=3))
    result = run_ranks(3, *flags(RESUME, out_dir=tmp_path / "out", max_iters=5))
    assert places(result.losses)[-1] == ("iter", 5)


def test_eval_only_on_two_processes_writes_nothing(run_ranks, half_way, whole, tmp_path):
    half_way("ddp", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    result = run_ranks(2, *flags(RESUME, out_dir=tmp_path / "out", eval_only=True))
    assert places(result.losses) == [("step", 30)]
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == before


# ----------------------------------------------------------------------------------------------
# stopping, restarts


@pytest.mark.slow
@pytest.mark.parametrize("who, sharding", [("torchrun", "ddp"), ("worker", "fsdp")])
def test_sigterm_to_torchrun_or_to_a_worker_stops_all_and_the_run_goes_on(
    torchrun, run_ranks, whole, tmp_path, who, sharding
):
    out_dir = tmp_path / "out"
    launch = torchrun(*flags(RUN, sharding=sharding, out_dir=out_dir))
    launch.wait_for("iter 10:")
    os.kill(launch.process.pid if who == "torchrun" else launch.workers()[1], signal.SIGTERM)
    first = launch.end()
    assert first.returncode != 0 and our_errors(first.stderr) == [], first.stderr
    at = re.search(r"^stopped at iteration (\d+); .* is iteration (\d+)'s", first.stdout, re.M)
    assert at and at[1] == at[2], first.stdout + first.stderr
    assert launch.workers() == {}
    second = run_ranks(2, *flags(RESUME, out_dir=out_dir, sharding=sharding))
    assert first.losses + second.losses == whole("ddp")[1][0].losses
    assert rows(out_dir) == places(whole("ddp")[1][0].losses)


@pytest.mark.slow
def test_a_bfloat16_run_with_dropout_goes_on_exactly_when_its_job_is_queued_again(ranks, run_ranks, tmp_path):
    """The same command with the same torchrun run id is the same job, and goes on."""
    settings = RUN | dict(dtype="bfloat16", dropout=0.2)
    uninterrupted = run_ranks(2, *flags(settings, out_dir=tmp_path / "whole")).losses
    job = dict(env={"TORCHELASTIC_RUN_ID": "job-7"})
    arguments = flags(settings, out_dir=tmp_path / "out")
    running = ranks(2, *arguments, **job)
    running[0].wait_for("iter 10:")
    running[1].signal(signal.SIGTERM)
    first, other = [each.end() for each in running]
    assert other.returncode == 143 and other.stderr == first.stderr == ""
    second = run_ranks(2, *arguments, **job)
    assert "Resuming training from" in second.stdout
    assert first.losses + second.losses == uninterrupted
    # another job with that command starts anew
    third = run_ranks(2, *flags(settings, max_iters=1, out_dir=tmp_path / "out"), env={"TORCHELASTIC_RUN_ID": "job-8"})
    assert "Initializing a new model from scratch" in third.stdout and "were in" in third.stdout


@pytest.mark.slow
@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_rank_whose_peer_is_killed_ends_and_saves_nothing(ranks, tmp_path, sharding, gone):
    settings = RUN | dict(max_iters=10**6, eval_interval=20, sharding=sharding, out_dir=tmp_path / "out")
    running = ranks(2, *flags(settings))
    running[0].wait_for("iter 25:")
    running[gone].signal(signal.SIGKILL)
    left, start = running[1 - gone].end(), time.monotonic()
    assert left.returncode == 1 and time.monotonic() - start < 20
    assert len(left.stderr.splitlines()) == 1 and "another process is gone" in left.stderr, left.stderr
    assert "stopped at" not in left.stdout
    assert not (tmp_path / "out" / "last.pt").exists()  # written only when a run stops, or between evaluations
    assert load(tmp_path / "out" / "ckpt.pt")["iter_num"] % 20 == 0


def test_a_rank_whose_peer_is_killed_in_an_evaluation_ends(ranks, tmp_path):
    settings = RUN | dict(eval_iters=10**6, out_dir=tmp_path / "out")
    running = ranks(2, *flags(settings))
    running[0].wait_for("2 x cpu")
    time.sleep(1)
    running[1].signal(signal.SIGKILL)
    left = running[0].end()
    assert left.returncode == 1 and len(left.stderr.splitlines()) == 1 and "another process is gone" in left.stderr
    assert not (tmp_path / "out" / "last.pt").exists()


@pytest.mark.slow
def test_slow_saves_and_evaluations_do_not_trip_the_time_out_of_collectives(run_ranks, whole, tmp_path):
    arguments = flags(RUN, max_iters=21, out_dir=tmp_path / "out")
    result = run_ranks(2, *arguments, script="tests/programs/slow_saves.py")
    assert result.losses == [line for line in whole("ddp")[1][0].losses if line[1] <= 21]


@pytest.mark.slow
def test_two_nodes_print_the_losses_of_two_processes(torchrun, whole, tmp_path):
    port = free_port()
    both = [
        torchrun(*flags(RUN, out_dir=tmp_path / "out"), n=1, env={"OMP_NUM_THREADS": "1"},
                 options=["--nnodes=2", f"--node_rank={r}", "--master_addr=127.0.0.1", f"--master_port={port}"])
        for r in range(2)
    ]  # fmt: skip
    first, second = [each.end() for each in both]
    assert first.returncode == second.returncode == 0, (first, second)
    assert first.losses == whole("ddp")[1][0].losses and second.stdout == ""


@pytest.mark.slow
def test_a_killed_worker_on_either_of_two_nodes_leads_to_a_restart_that_goes_on_exactly(torchrun, whole, tmp_path):
    """torchrun's restart count is each node's own: the node whose worker was not killed must resume as well."""
    options = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--rdzv-id=a-job",
               "--max-restarts=3"]  # fmt: skip
    arguments = flags(RUN, save_interval=5, out_dir=tmp_path / "out")
    both = [torchrun(*arguments, n=1, options=options, env={"OMP_NUM_THREADS": "1"}) for _ in range(2)]

    def printed():
        return "".join(each.read()[0] for each in both)

    both[0].wait(lambda: "iter 12:" in printed())
    workers = {rank: pid for each in both for rank, pid in each.workers().items()}
    os.kill(workers[1], signal.SIGKILL)
    results = [each.end() for each in both]
    assert [r.returncode for r in results] == [0, 0], results
    text = printed()
    assert text.count("Resuming training from") == 1, text
    # rank 0 may be the other node's after the restart
    part = sorted((r.stdout.split("Resuming training from") for r in results), key=len)
    parts = [parse(p) for half in part for p in half]
    parts = sorted((p for p in parts if p), key=lambda p: p[0][1])
    assert joined(*parts) == whole("ddp")[1][0].losses
    assert rows(tmp_path / "out") == places(whole("ddp")[1][0].losses)


@pytest.mark.slow
def test_rank_0_killed_under_standalone_torchrun_is_restarted_and_goes_on_exactly(torchrun, whole, tmp_path):
    options = ["--nnodes=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--max-restarts=2"]
    launch = torchrun(*flags(RUN, sharding="fsdp", out_dir=tmp_path / "out"), options=options)
    launch.wait_for("iter 30:")
    os.kill(launch.workers()[0], signal.SIGKILL)
    result = launch.end()
    assert result.returncode == 0, result
    before, after = result.stdout.split("Resuming training from")
    assert joined(parse(before), parse(after)) == whole("ddp")[1][0].losses
    assert rows(tmp_path / "out") == places(whole("ddp")[1][0].losses)


@pytest.mark.slow
def test_a_finished_run_leaves_with_0_every_time(torchrun, tmp_path):
    """gloo used to abort finished processes as they left."""
    for k in range(10):
        settings = TINY | dict(gradient_accumulation_steps=2, sharding=("ddp", "fsdp")[k % 2])
        result = torchrun(*flags(settings, out_dir=tmp_path / str(k))).end()
        assert result.returncode == 0, result
        assert "terminate" not in result.stderr


# ----------------------------------------------------------------------------------------------
# which library the processes talk by; and an evaluation of a model that is split over them


@pytest.mark.parametrize("built_in", [True, False])
def test_auto_is_nccl_on_cuda_where_torch_has_it(monkeypatch, built_in):
    monkeypatch.setattr(dist, "is_nccl_available", lambda: built_in)
    for world_size in (1, 2):
        assert pick_backend("auto", "cuda:3", world_size) == ("nccl" if built_in else "gloo")
        assert pick_backend("auto", "cpu", world_size) == pick_backend("auto", "mps", world_size) == "gloo"
    assert pick_backend("gloo", "cuda", 2) == "gloo"
    assert pick_backend("nccl", "cuda", 2) == "nccl"  # torch itself says what is wrong with it


def test_a_backend_does_not_matter_to_a_single_process():
    for device in ("cpu", "mps"):
        assert pick_backend("nccl", device, 1) == "gloo"
        with pytest.raises(UserError, match=f"--backend=nccl works on CUDA devices only, and this run is on {device}"):
            pick_backend("nccl", device, 2)
    for wrong in ("tcp", "", True, 1):
        for world_size in (1, 2):
            with pytest.raises(UserError, match=f"--backend={wrong}: takes auto, nccl, gloo or mpi"):
                pick_backend(wrong, "cpu", world_size)


@pytest.mark.parametrize("backend", ["nccl", "mpi"])
def test_nanogpts_backend_trains_in_a_single_process_on_a_cpu(run, tmp_path, backend):
    config = tmp_path / "config.py"
    config.write_text(f"backend = '{backend}'\n")
    done = run("train.py", config, *flags(TINY, out_dir=tmp_path / "out", max_iters=2))
    assert "iter 2: loss" in done.stdout and done.stderr == ""


@pytest.mark.slow
def test_a_sharded_model_with_a_large_vocabulary_evaluates_as_a_replicated_one(ranks, own_project, tmp_path):  # noqa: F811
    (own_project / "data" / "synthetic" / "meta.pkl").unlink()  # vocab_size is 50304 then
    settings = TINY | dict(gradient_accumulation_steps=2, max_iters=2, eval_interval=1, eval_iters=2)
    printed = []
    for sharding in ("ddp", "fsdp"):
        settings |= dict(sharding=sharding, out_dir=tmp_path / sharding)
        first, second = (r.end() for r in ranks(2, *flags(settings), project=own_project))
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        printed.append([line for line in first.losses if line[0] == "step"])
    assert printed[0] == printed[1] and len(printed[0]) == 3


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_runs_of_several_processes_end_by_the_clock_together_with_samples(run_ranks, tmp_path, sharding):
    settings = TINY | dict(
        gradient_accumulation_steps=2, max_iters=10**7, eval_interval=40, log_interval=10**6,
        sharding=sharding, max_seconds=4, sample_interval=40, out_dir=tmp_path / "out",
    )  # fmt: skip
    result = run_ranks(2, *flags(settings))
    last = [step for step in result.losses if step[0] == "step"][-1][1]
    assert f"ended by max_seconds = 4 at iteration {last}" in result.lines
    assert 3 < torch.load(tmp_path / "out" / "last.pt")["seconds"] < 6
    assert "sample at iteration 0:" in result.lines


def test_several_processes_have_the_bits_per_byte_of_all_batches(run_ranks, tmp_path):
    settings = TINY | dict(eval_iters=3, gradient_accumulation_steps=2, max_iters=4)
    found = {}
    for sharding in ("ddp", "fsdp"):
        out_dir = tmp_path / sharding
        run_ranks(2, *flags(settings, sharding=sharding, out_dir=out_dir))
        with open(out_dir / "log.csv", newline="") as f:
            found[sharding] = [(float(row["val_loss"]), float(row["val_bpb"])) for row in csv.DictReader(f) if row["val_bpb"]]
    assert found["ddp"] == found["fsdp"] and len(found["ddp"]) == 2
    for loss, bpb in found["ddp"]:
        assert bpb == pytest.approx(loss / math.log(2), rel=1e-6)  # each of these characters is one byte


@pytest.mark.slow
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_two_processes_skip_spikes_together_and_resume_to_the_digit(run_ranks, tmp_path, sharding):
    settings = TINY | dict(gradient_accumulation_steps=2, max_iters=170, lr_decay_iters=170, eval_interval=20,
                           grad_clip=0.0, spike_sigma=6.0, init_from="auto", sharding=sharding)  # fmt: skip
    for name, stops in (("whole", [170]), ("parts", [152, 160, 170])):
        for stop in stops:
            arguments = flags(settings, out_dir=tmp_path / name, max_iters=stop)
            environment = dict(INJECT="huge", AT=150, COUNT=5)
            result = run_ranks(2, *arguments, script="tests/programs/inject.py", env=environment)
        assert name == "parts" or "more than 6 standard deviations" in result.stdout
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "parts")
    assert load(tmp_path / "whole" / "last.pt")["guard"]["skipped"] >= 5


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_weight_that_is_not_finite_on_one_process_keeps_all_from_saving(run_ranks, tmp_path, sharding):
    """After the last step: no gradient and no evaluation has seen the NaN."""
    settings = TINY | dict(gradient_accumulation_steps=2, max_iters=5, save_interval=5, sharding=sharding)
    arguments = flags(settings, out_dir=tmp_path)
    result = run_ranks(2, *arguments, script="tests/programs/spoil_weights.py", env=dict(STEP=6))
    assert result.stdout.count("last.pt is not written") == 1
    saved = load(tmp_path / "last.pt")
    assert saved["iter_num"] == 5 and all(torch.isfinite(weight).all() for weight in saved["model"].values())
