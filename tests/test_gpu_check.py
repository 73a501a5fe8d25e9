"""tools/gpu_check.py: its command line, its table, its checks on made-up runs, and its parts with --device=cpu."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
import warnings

import pytest
import torch
from conftest import ROOT, SYNTHETIC, write_synthetic

from nanogpt.distributed import Processes
from tools import gpu_check, gpu_hooks
from tools.gpu_check import Failed, Lab, Output, Row


def gpu_check_command(*arguments, **options):
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)


def output(text, code=0, seconds=0.1):
    """An Output whose lines came `seconds` apart."""
    return Output(text, code, [(line, seconds * k) for k, line in enumerate(text.splitlines())])


def lines(losses, ms=10.0, mfu="50.00%"):
    return "".join(f"iter {n}: loss {loss:.4f}, time {ms:.2f}ms, mfu {mfu}\n" for n, loss in losses.items())


@pytest.fixture
def gpu(monkeypatch):
    """A machine that says it has one GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


# ----------------------------------------------------------------------------------------------
# the command line and the table


def test_without_a_gpu_it_is_one_line(run):
    result = run("tools/gpu_check.py", expect=2)
    assert result.stdout == ""
    assert re.fullmatch(r"error: torch \S+ finds no GPU; --device=cpu runs the checks that need none\n", result.stderr)


@pytest.mark.parametrize("arguments, said", [
    (["--only=golden,goldne"], "no such part: goldne; there are golden, dtypes,"), (["--only="], None),
    (["--device=mps"], "--device=mps: takes cuda, cuda:N or cpu"), (["--peer={}"], "there is no train.py in it"),
    (["--onyl=sync"], "--onyl=sync"),
])  # fmt: skip
def test_a_mistake_is_named(tmp_path, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(gpu_check, "PARTS", {"golden": None, "dtypes": None, "sync": None} if said else {})
    arguments = [*(a.format(tmp_path) for a in arguments), *([] if said else ["--device=cpu"])]
    if said is None:  # an empty list means every part
        assert gpu_check.main(arguments) == 0
        return
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(arguments)
    captured = capsys.readouterr()
    assert ended.value.code == 2 and captured.out == "" and said in captured.err.splitlines()[-1]


def test_each_row_is_printed_as_it_comes_and_a_fail_sets_the_exit_code(monkeypatch, capsys):
    shown, show = threading.Event(), gpu_check.show
    monkeypatch.setattr(gpu_check, "show", lambda part, row: (show(part, row), shown.set()))

    def good(lab):
        yield Row("one", "pass", "1 | 2")
        yield Row("two", "figure", "3\nms" if shown.wait(30) else "row one was not shown")

    def bad(lab):
        yield Row("three", "fail", "4")

    def broken(lab):
        yield Row("four", "skip", "one GPU only")
        raise Failed("exit code 1: error: out of memory", "first\nlast")

    def odd(lab):
        yield Row("five", "pass", "")
        raise KeyError("iter 5")

    parts = {"good": good, "bad": bad, "broken": broken, "odd": odd}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    assert gpu_check.main(["--device=cpu", "--only=good"]) == 0
    assert "| good | one | pass | 1 / 2 |\n| good | two | figure | 3 ms |\n" in capsys.readouterr().out
    for name in ("bad", "broken", "odd"):
        assert gpu_check.main(["--device=cpu", f"--only={name}"]) == 1
    captured = capsys.readouterr()
    assert "| broken | the part runs to its end | fail | exit code 1: error: out of memory |" in captured.out
    assert "| odd | the part runs to its end | fail | KeyError: 'iter 5' |" in captured.out
    assert "last" in captured.err
    assert gpu_check.main(["--device=cpu"]) == 1  # every part, whatever fails
    assert re.search(r"^2 pass, 3 fail, 5 figure, 1 skip; \d+ s$", capsys.readouterr().out, re.M)


def test_parts_that_time_nothing_run_at_once_and_the_others_alone(monkeypatch, tmp_path, capsys):
    """On four cores two at once, in folders of their own; after them each other part by itself."""
    together, under_way, seen = threading.Barrier(2), set(), []

    def part(name, meet):
        def rows(lab):
            under_way.add(name)
            if meet:
                together.wait(30)  # broken where the other part does not run beside
            seen.append((name, set(under_way) - {"one", "two"}, lab.folder, lab.environment))
            if meet:
                together.wait(30)
            under_way.discard(name)
            yield Row(name, "pass", "")

        return rows

    parts = {name: part(name, name in ("one", "two")) for name in ("last", "one", "two", "end")}
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    monkeypatch.setattr(gpu_check, "ALONE", (parts["last"], parts["end"]))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    assert gpu_check.main(["--device=cpu"]) == 0, capsys.readouterr().out
    assert {name for name, *_ in seen[:2]} == {"one", "two"} and [name for name, *_ in seen[2:]] == ["last", "end"]
    assert [beside for _, beside, *_ in seen[2:]] == [{"last"}, {"end"}]
    assert len({folder for _, _, folder, _ in seen}) == 4
    caches = {environment["TORCHINDUCTOR_CACHE_DIR"] for *_, environment in seen}
    assert len(caches) == 1  # one cache for all
    assert ["TORCHINDUCTOR_COMPILE_THREADS" in environment for *_, environment in seen] == [True, True, False, False]


@pytest.mark.skipif(os.name != "posix", reason="signals of POSIX")
def test_a_stop_in_the_middle_ends_the_commands_under_way(tmp_path):
    """One command in a thread of its own, as in the parts that run side by side; then Ctrl-C."""
    code = (
        "import sys; from tools import gpu_check as g\n"
        "def part(lab):\n"
        "    yield g.Row('first', 'pass', '')\n"
        "    lab.command([sys.executable, '-c', 'import os, time; open(sys.argv[1], \"w\").write(str(os.getpid()));"
        " time.sleep(600)'.replace('sys.argv[1]', repr(sys.argv[1]))])\n"
        "g.PARTS = {'part': part}\n"
        "g.main(['--device=cpu'])\n"
    )
    pid = tmp_path / "pid"
    process = subprocess.Popen([sys.executable, "-c", code, str(pid)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0 and "| part | first | pass |" in out
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_on_a_gpu_the_table_names_it(gpu, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "PARTS", {})
    assert gpu_check.main([]) == 0
    assert capsys.readouterr().out.startswith(f"1 x NVIDIA A100-SXM4-80GB; torch {torch.__version__}, CUDA ")


def test_its_golden_settings_and_data_are_the_tests_own(tmp_path):
    others = ("dataset", "device", "dtype", "compile", "peak_flops")
    assert gpu_check.GOLDEN == {k: v for k, v in SYNTHETIC.items() if k not in others}
    gpu_check.write_data(tmp_path / "theirs", 61, characters=True)
    write_synthetic(tmp_path / "ours")
    for name in ("train.bin", "val.bin", "meta.pkl"):
        assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


# ----------------------------------------------------------------------------------------------
# running commands


@pytest.fixture
def lab(tmp_path):
    return Lab("cpu", str(tmp_path))


def test_a_command_that_ends_otherwise_than_expected_is_a_failure_with_its_output(lab):
    command = [sys.executable, "-c", "print('some'); raise SystemExit('error: no')"]
    with pytest.raises(Failed, match="exit code 1: error: no") as caught:
        lab.command(command)
    assert "some" in caught.value.output
    assert lab.command(command, expect=1).code == 1


def test_a_command_beyond_the_parts_time_is_killed(lab):
    lab.deadline = 0.0
    with pytest.raises(Failed, match="not finished after 480 s"):
        lab.command([sys.executable, "-c", "import time; time.sleep(600)"])


def test_each_line_is_handed_on_as_it_comes(lab):
    """The process waits for a signal that it only gets once its first line has arrived."""
    code = "import signal, sys; print('ready', flush=True); signal.sigwait([10]); print('woken', end='')"
    code = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [10]); " + code
    run = lab.command([sys.executable, "-c", code], on_line=lambda line, process: process.send_signal(10))
    assert run.text == "ready\nwoken"


# ----------------------------------------------------------------------------------------------
# the checks can fail


def test_losses_are_compared_key_by_key():
    within = gpu_check.within
    assert within("x", 0.01, {1: 2.0, 2: 3.0}, {1: 2.009, 2: 3.0}).result == "pass"
    assert within("x", 0.01, {1: 2.0, 2: 3.0}, {1: 2.011, 2: 3.0}).result == "fail"
    assert within("x", 0.01, {1: 2.0}, {1: 2.0, 2: 3.0}).result == "fail"  # a line is missing
    assert within("x", 0.01, {1: float("nan")}, {1: 2.0}).result == "fail"


def test_printed_lines_are_read():
    run = output("step 0: train loss 4.1321, val loss 4.1199\n" + lines({0: 4.5}, 12.5, "n/a") + lines({1: 4.25}, 7.0, "31.07%"))
    assert run.iters == {0: (4.5, 12.5, None), 1: (4.25, 7.0, 31.07)}
    assert gpu_check.all_losses(run) == {("iter", 0): 4.5, ("iter", 1): 4.25, ("step", 0, 0): 4.1321, ("step", 0, 1): 4.1199}


def test_golden_figures_are_read():
    found = gpu_check.read_golden("synthetic")
    assert found["step", 0, 1] == 4.1199 and found["iter", 2] == 4.1037 and len(found) == 151 + 2 * 4


@pytest.mark.parametrize("text, result", [
    ("Recompiling function forward in model.py:1\niter 1: x\niter 2: x\niter 3: x\n", "pass"),
    ("Recompiling function a\niter 2: x\nRecompiling function b\niter 3: x\n", "fail"),
    ("Recompiling function a\niter 0: x\niter 10: x\niter 20: x\n", "pass"),  # one line in ten
    ("Recompiling function a\niter 0: x\niter 10: x\nRecompiling function b\niter 20: x\n", "fail"),
    ("iter 1: x\niter 2: x\niter 3: x\n", "fail"),  # the log is not on
    ("Recompiling function a\n", "fail"),  # the run has not come that far
])  # fmt: skip
def test_a_late_recompilation_fails(text, result):
    assert gpu_check.no_recompilation(output(text)).result == result


@pytest.mark.parametrize("mfu, result", [("99.00%", "pass"), ("100.10%", "fail"), ("n/a", "fail")])
def test_an_mfu_above_100_percent_fails(mfu, result):
    assert gpu_check.mfu_row(output(lines({0: 1.0}, mfu=mfu))).result == result


def test_points_that_differ_in_one_generator_or_one_token_fail():
    def point(state, token):
        return {"points": [{"generators": {"cpu": torch.tensor([1, state])}, "batch": [torch.tensor([token])] * 2}]}

    assert gpu_check.same_points(point(1, 5), point(1, 5))
    assert not gpu_check.same_points(point(1, 5), point(2, 5))
    assert not gpu_check.same_points(point(1, 5), point(1, 6))


class FakeLab(Lab):
    """A lab on a GPU whose runs are made up: `answer(settings, hook)` returns the output of one."""

    def __init__(self, folder, answer, peer=None):
        super().__init__("cuda", str(folder), peer)
        self.answer, self.ran = answer, []

    def train(self, settings, name="run", hook=None, **options):
        self.ran.append((settings, hook, options))
        return self.answer(settings, hook)


def test_a_synchronisation_in_the_unlogged_iterations_is_found(gpu, tmp_path):
    def answer(settings, hook):
        count = 30 if settings.get("optimizer") == "muon" else 0
        return output("seen: " + json.dumps({"iterations": 30, "synchronisations": count}) + "\n")

    rows = list(gpu_check.sync(FakeLab(tmp_path, answer)))
    assert [(row.result, row.seen) for row in rows[:2]] == [("pass", "none in 30 iterations")] * 2
    assert [(row.result, row.seen) for row in rows[2:]] == [("figure", "0.00"), ("figure", "1.00")]

    def raising(settings, hook):
        raise Failed("exit code 1: RuntimeError: called a synchronizing CUDA operation")

    with pytest.raises(Failed):
        list(gpu_check.sync(FakeLab(tmp_path, raising)))


def test_the_speed_rows_have_time_tokens_mfu_memory_and_the_peers_ratio(gpu, tmp_path):
    seen = 'seen: {"graphs": 2, "breaks": 0, "device_mib": 5120.0}\n'

    def answer(settings, hook):
        iters = range(0, settings["max_iters"] + 1, settings["log_interval"])
        seconds = (0.02 if hook == "memory" else 0.01) * settings["log_interval"]
        text = "Recompiling function forward\n" + lines(dict.fromkeys(iters, 2.0), ms=1.0) + seen
        return output(text, seconds=seconds)  # what counts is when the lines came

    lab = FakeLab(tmp_path, answer, peer="/peer")
    rows = list(gpu_check.baby(lab))
    assert rows[0].result == "figure"
    assert rows[0].seen == "10.00 ms, 1,638,400 tokens/s, MFU 50.0 %, 5,120 MiB on the device"  # 64 x 256 in 10 ms
    assert [row.result for row in rows] == ["figure", "pass", "pass"] * 2 + ["figure"]
    assert rows[-1].seen.endswith("5,120 MiB; ours is 2.00 x as fast")
    assert [settings.get("recompute") for settings, _, _ in lab.ran] == [None, True, None]
    assert lab.ran[-1][0]["compile"] is True and lab.ran[-1][0]["dtype"] == "bfloat16"
    rows = list(gpu_check.gpt2(lab))
    # 5 micro-steps of 12 x 1024 tokens in 10 ms
    assert rows[0].seen == "10.00 ms, 6,144,000 tokens/s, MFU 50.0 %, 5,120 MiB on the device"
    assert list(gpu_check.baby(FakeLab(tmp_path, answer)))[-1] == Row("baby GPT, 64 x 256, dropout 0.2, nanoGPT", "skip", "no --peer")


def test_a_model_that_does_not_fit_is_skipped_and_another_failure_is_not(gpu, tmp_path):
    def failing(message):
        def answer(settings, hook):
            raise Failed("exit code 1", message)

        return list(gpu_check.gpt2(FakeLab(tmp_path, answer)))

    rows = failing("error: out of memory: try a smaller --batch_size")
    assert [row.result for row in rows] == ["skip"] * 3 and "does not fit" in rows[0].seen
    with pytest.raises(Failed):
        failing("error: something else")


def test_one_gpu_skips_the_part_for_two(gpu, tmp_path):
    assert list(gpu_check.several(FakeLab(tmp_path, None))) == [Row("two GPUs: ddp and fsdp", "skip", "this machine has one GPU")]


def test_skipped_cuda_graphs_and_broken_graphs_fail(gpu, tmp_path):
    good = "Recompiling function forward\n" + lines(dict.fromkeys(range(50), 2.0))

    def rows(text, graphs=2, breaks=0, skips=0):
        def answer(settings, hook):
            seen = {"graphs": 2 if hook == "counted_graphs" else graphs, "breaks": breaks, "cudagraph_skips": skips}
            return output(text + "seen: " + json.dumps(seen) + "\n")

        return {row.check: row.result for row in gpu_check.compiled(FakeLab(tmp_path, answer))}

    assert set(rows(good).values()) == {"pass"}
    assert rows(good + "skipping cudagraphs due to mutated inputs\n")["no CUDA graph is skipped"] == "fail"
    assert rows(good, skips=1)["no CUDA graph is skipped"] == "fail"
    assert rows(good, graphs=3)["as many graphs as the counting compiler traces on a CPU"] == "fail"
    assert rows(good, breaks=1)["no graph is broken"] == "fail"
    skipped = list(gpu_check.compiled(FakeLab(tmp_path, lambda *_: output("no Triton is found, so the model runs without torch.compile\n"))))
    assert [row.result for row in skipped] == ["skip"] and "no Triton" in skipped[0].seen


# ----------------------------------------------------------------------------------------------
# the instruments, with CUDA's calls replaced: on a CPU build they raise


class Event:
    """torch.cuda.Event, whose times are those of a list."""

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        self.at = next(CLOCK)

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


CLOCK = iter(())


@pytest.fixture
def cuda_calls(monkeypatch):
    global CLOCK
    CLOCK = iter(range(0, 100_000, 25))  # milliseconds
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    return modes


@pytest.mark.parametrize("mode", ["error", "warn"])
def test_only_unlogged_iterations_are_watched(monkeypatch, cuda_calls, mode):
    from nanogpt import mfu

    monkeypatch.setattr(sys, "argv", ["train.py", "--log_interval=5"])
    monkeypatch.setattr(mfu, "Clock", mfu.Clock)  # put back afterwards
    with warnings.catch_warnings():
        seen = gpu_hooks.synchronisations(mode)
        clock = mfu.Clock("cuda")  # before the loop
        watched = []
        for iteration in range(21):
            watched.append(cuda_calls[-1])
            if cuda_calls[-1] == "warn":
                warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
            clock.tick()
            assert cuda_calls[-1] == "default" or iteration % 5, "a logged iteration may wait"
            assert clock.seconds() == 0.025
    # an iteration is watched if the one before it was not logged, and the warm-up is over
    expected = [n for n in range(21) if n - 1 >= gpu_hooks.WARM_UP and (n - 1) % 5]
    assert [n for n, state in enumerate(watched) if state == mode] == expected
    assert seen() == {"iterations": len(expected), "synchronisations": len(expected) if mode == "warn" else 0}


def test_device_memory_is_torchs_peak(monkeypatch):
    seen = gpu_hooks.device_memory()
    assert seen() == {"device_mib": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**30)
    assert seen() == {"device_mib": 3072}


def test_a_models_tokens_a_second_are_those_of_two_texts(monkeypatch):
    ticks = iter([0.0, 2.0, 10.0, 10.5])
    monkeypatch.setattr(gpu_hooks.time, "perf_counter", lambda: next(ticks))
    sizes = dict(block_size=16, vocab_size=300, n_layer=1, n_head=2, n_embd=16)
    assert gpu_hooks.decoding_rates("cpu", sizes, tokens=30) == [15, 60]


def test_a_matmuls_tflops_come_from_many_products_a_synchronisation(monkeypatch):
    """Each product takes 2 n^3 FLOPs: 20 of 64 x 64 in 2 ms are 5.24 GFLOPS."""
    calls, ticks = types.SimpleNamespace(products=0, waits=0), iter(k * 0.002 for k in range(100))
    monkeypatch.setattr(torch, "mm", lambda *_, **__: setattr(calls, "products", calls.products + 1))
    monkeypatch.setattr(torch.cpu, "synchronize", lambda: setattr(calls, "waits", calls.waits + 1))
    monkeypatch.setattr(gpu_hooks.time, "perf_counter", lambda: next(ticks))
    precision = torch.get_float32_matmul_precision()
    try:
        assert gpu_hooks.matmul_tflops("cpu", "float32", size=64) == pytest.approx(20 * 2 * 64**3 / 0.002 / 1e12)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert calls.products == 120 and calls.waits == 12


def test_a_changed_weight_is_seen(monkeypatch):
    """A guard that steps in spite of a gradient that is not finite."""
    from nanogpt import guard, optim

    class Careless(guard.StepGuard):
        def step(self, optimizer, grad_norm):
            optimizer.step()

    for base, changed in ((Careless, 4), (guard.StepGuard, 0)):
        monkeypatch.setattr(guard, "StepGuard", base)
        monkeypatch.setattr(guard, "clip_gradients", guard.clip_gradients)
        seen = gpu_hooks.poisoned_gradient()
        weight = torch.nn.Parameter(torch.ones(3, 2))
        optimizer = optim.AdamW([weight], lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        watched = guard.StepGuard({}, Processes(), scaler, "cpu", "adamw", "ddp", 0.0, 10, "out")
        for _ in range(7):
            weight.grad = torch.ones(3, 2)
            watched.step(optimizer, guard.clip_gradients([weight], 1.0))
        assert seen() == {"tensors": 4, "changed": changed}  # the weight, two moments, the count of steps
        monkeypatch.undo()


# ----------------------------------------------------------------------------------------------
# the parts, for real, on a CPU


@pytest.mark.slow
def test_every_part_that_makes_sense_on_a_cpu_passes():
    result = gpu_check_command("--device=cpu", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in result.stdout.splitlines() if line.startswith("| ")]
    passed = {part for part, _, outcome, _ in rows if outcome == "pass"}
    assert passed - {"compiled"} == {"golden", "dtypes", "guard", "resume", "deterministic", "sigterm", "clock", "sample", "several"}
    assert {part for part, _, outcome, _ in rows if outcome == "skip"} >= {"sync", "baby", "gpt2"}
    assert "| no graph is broken | pass |" in result.stdout or "without torch.compile" in result.stdout


@pytest.mark.slow
def test_the_golden_part_passes_on_a_cpu():
    result = gpu_check_command("--device=cpu", "--only=golden", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| golden | float32 losses, golden/synthetic.csv, TF32 off: within 0.001 | pass |" in result.stdout
