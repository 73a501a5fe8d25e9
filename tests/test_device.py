"""nanogpt/device.py: what 'auto' means on machines of many kinds, which are imitated here."""

import csv
import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, RESUME, ROOT, SYNTHETIC, TINY, error_line, flags, machine
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from nanogpt import cpu_kernels, device as devices, device as device_module
from nanogpt.device import emulation_remark, pick_device, pick_dtype, pick_threads, usable_cores
from nanogpt.errors import UserError, machine_failure


def test_the_device_is_cuda_else_mps_else_cpu(monkeypatch):
    for cuda, mps, expected in [(2, False, "cuda"), (1, True, "cuda"), (0, True, "mps"), (0, False, "cpu")]:
        machine(monkeypatch, cuda, mps)
        assert pick_device("auto") == expected
        assert pick_device("cpu") == "cpu"
    machine(monkeypatch, cuda=2)
    assert pick_device("cuda") == "cuda" and pick_device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps", "cpu:1", "gpu", "cuda:x", "cuda:-1", "", "0", "CPU", True])
def test_a_device_that_is_not_there_is_an_error(monkeypatch, device):
    machine(monkeypatch)
    with pytest.raises(UserError, match=f"--device={device}"):
        pick_device(device)


def test_a_gpu_beyond_those_that_are_there_is_an_error(monkeypatch):
    machine(monkeypatch, cuda=2)
    with pytest.raises(UserError, match="--device=cuda:2: there is no such device.*of cuda it has 2"):
        pick_device("cuda:2")


def test_the_dtype_is_bfloat16_where_it_is_fast(monkeypatch):
    machine(monkeypatch, cuda=1, bf16=True)
    assert pick_dtype("auto", "cuda") == pick_dtype("auto", "cuda:1") == "bfloat16"
    machine(monkeypatch, cuda=1, bf16=False)  # before Ampere: emulated
    assert pick_dtype("auto", "cuda") == "float16"
    for avx512, amx, expected in [(True, False, "bfloat16"), (False, True, "bfloat16"), (False, False, "float32")]:
        found = {"avx512_bf16": avx512, "amx_bf16": amx}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert pick_dtype("auto", "cpu") == expected
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)  # a CPU of which torch tells nothing
    assert pick_dtype("auto", "cpu") == "float32"
    for dtype in ("float32", "bfloat16", "float16"):
        assert pick_dtype(dtype, "cpu") == dtype
    for wrong in ("float64", "bf16", "", True):
        with pytest.raises(UserError, match=f"--dtype={wrong}"):
            pick_dtype(wrong, "cpu")


def pick_compile(compile, device):
    """(what is picked, what is said of it or None)."""
    said = []
    return device_module.pick_compile(compile, device, said.append), said[0] if said else None


def test_compile_pays_on_cuda_and_needs_its_compiler(monkeypatch, tmp_path):
    found = {"triton": True, "g++": True, "gcc": True}
    monkeypatch.setattr(device_module.sysconfig, "get_path", lambda name: str(tmp_path / name))
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    capability = [(8, 0)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability[0])
    monkeypatch.setattr(device_module.importlib.util, "find_spec", lambda name: found.get(name) or None)
    monkeypatch.setattr(device_module.shutil, "which", lambda name: found.get(name) or None)
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)
    assert pick_compile("auto", "cuda") == pick_compile(True, "cuda:0") == (True, None)
    assert pick_compile("auto", "cpu") == pick_compile(False, "cuda") == (False, None)
    assert pick_compile(True, "cpu") == (True, None)
    for name, device in (("CC", "cuda"), ("CXX", "cpu")):  # one that is asked for is the one that is used
        monkeypatch.setenv(name, "nocc")
        chosen, said = pick_compile(True, device)
        assert chosen is False and "compiler" in said
        monkeypatch.delenv(name)
    (tmp_path / "include" / "Python.h").unlink()
    for device in ("cuda", "cpu"):
        chosen, said = pick_compile(True, device)
        assert chosen is False and "Python.h" in said
    (tmp_path / "include" / "Python.h").touch()
    capability[0] = (6, 1)
    assert pick_compile("auto", "cuda")[0] is False and "7.0" in pick_compile("auto", "cuda")[1]
    del found["gcc"]
    assert pick_compile("auto", "cuda")[0] is False and "C compiler" in pick_compile("auto", "cuda")[1]
    found.clear()
    for device, missing in (("cuda", "Triton"), ("cpu", "C++ compiler")):
        chosen, said = pick_compile(True, device)
        assert chosen is False and missing in said
    for wrong in ("yes", "1", ""):
        with pytest.raises(UserError, match=f"--compile={wrong}"):
            pick_compile(wrong, "cpu")


@pytest.mark.parametrize("omp, processes, cores, threads", [
    (None, 1, 16, 16), (None, 2, 16, 8), ("1", 2, 16, 8), ("1", 1, 16, 1), ("4", 2, 16, 4), ("4", 1, 16, 4),
    ("1", 8, 4, 1), ("1", 32, 16, 1), ("1", 3, 16, 5), ("", 2, 16, 8), ("0", 2, 16, 8), ("x", 1, 16, 16), ("4,2", 1, 16, 16),
])  # fmt: skip
def test_threads_share_the_cores_and_torchruns_1_is_its_default(omp, processes, cores, threads):
    assert pick_threads(omp, processes, cores) == threads


def test_cores_are_those_this_process_may_use(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_physical_cores": 8})
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert usable_cores("no such file") == 3
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    assert usable_cores("no such file") == 8


@pytest.mark.parametrize("cpu_max, cores", [
    ("max 100000\n", 8), ("200000 100000\n", 2), ("250000 100000\n", 3), ("50000 100000\n", 1), ("1600000 100000\n", 8),
    ("", 8), ("200000\n", 8),
])  # fmt: skip
def test_a_containers_quota_of_processor_time_bounds_the_cores(monkeypatch, tmp_path, cpu_max, cores):
    """cpu.max has microseconds of processor time, and of the period that they are for (the kernel's cgroup-v2.rst)."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"num_physical_cores": 8})
    monkeypatch.setattr(device_module.os, "sched_getaffinity", lambda pid: set(range(16)), raising=False)
    (tmp_path / "cpu.max").write_text(cpu_max)
    assert usable_cores(tmp_path / "cpu.max") == cores


# ----------------------------------------------------------------------------------------------
# a dtype that is only emulated is said


@pytest.mark.parametrize("device, dtype, here, remark", [
    ("cpu", "float32", {}, False),
    ("cpu", "bfloat16", dict(capabilities={"architecture": "x86_64", "avx512_bf16": False}), True),
    ("cpu", "bfloat16", dict(capabilities={"architecture": "x86_64", "avx512_bf16": True}), False),
    ("cpu", "bfloat16", dict(capabilities={"architecture": "aarch64"}), False),  # torch cannot tell
    ("cpu", "float16", dict(capabilities={"architecture": "x86_64", "avx512_fp16": False, "amx_fp16": False}), True),
    ("cpu", "float16", dict(capabilities={"architecture": "x86_64", "avx512_fp16": True}), False),
    ("cpu", "float16", dict(capabilities={"architecture": "aarch64"}), False),
    ("cuda:1", "bfloat16", dict(gpu=False), True),
    ("cuda", "bfloat16", dict(gpu=True), False),
    ("cuda", "float16", dict(gpu=False), False),
    ("mps", "bfloat16", {}, False),
])  # fmt: skip
def test_a_dtype_that_the_device_only_emulates_is_said(monkeypatch, device, dtype, here, remark):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: here.get("capabilities", {}))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: here.get("gpu"))
    found = emulation_remark(dtype, device)
    assert bool(found) == remark
    if remark:
        assert device in found and dtype in found and "--dtype=float32" in found


# ----------------------------------------------------------------------------------------------
# the settings attention and deterministic: what they switch, that a resume keeps them, and that a CPU's numbers stay


SWITCHES = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")


def switches():
    return {name: getattr(torch.backends.cuda, f"{name}_enabled")() for name in SWITCHES}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Puts torch's global switches back."""
    before, tag = switches(), torch.compiler.config.cache_key_tag
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    for name, enabled in before.items():
        getattr(torch.backends.cuda, f"enable_{name}")(enabled)
    torch.compiler.config.cache_key_tag, cpu_kernels.plain_attention = tag, False
    torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------------------------
# attention


@pytest.mark.parametrize("attention, switch", [("flash", "flash_sdp"), ("efficient", "mem_efficient_sdp"), ("math", "math_sdp")])
def test_on_a_gpu_only_the_chosen_kernel_is_left(attention, switch):
    devices.pick_attention(attention, "cuda:1", "bfloat16")
    assert switches() == {name: name == switch for name in SWITCHES}


@pytest.mark.parametrize("device", ["cuda", "cpu", "mps"])
def test_auto_leaves_the_choice_to_torch(device):
    before = switches()
    devices.pick_attention("auto", device, "float32")
    assert switches() == before and torch.compiler.config.cache_key_tag == ""


@pytest.mark.parametrize("attention, device, dtype, said", [
    ("fast", "cuda", "bfloat16", "--attention=fast: takes auto or flash or efficient or math on cuda"),
    (True, "cuda", "bfloat16", "--attention=True: takes auto or flash or efficient or math on cuda"),
    ("flash", "cpu", "bfloat16", "--attention=flash: takes auto or math on cpu"),
    ("efficient", "cpu", "float32", "--attention=efficient: takes auto or math on cpu"),
    ("math", "mps", "float32", "--attention=math: takes auto on mps"),
    ("flash", "cuda", "float32", "--attention=flash does not work in float32"),
])  # fmt: skip
def test_a_kernel_that_is_not_there_is_one_line(attention, device, dtype, said):
    with pytest.raises(UserError, match=said):
        devices.pick_attention(attention, device, dtype)


def test_a_gpu_without_the_kernel_is_one_line():
    """What torch's sdp_utils.cpp raises, and what it raises on a CPU where every kernel is switched off."""
    assert "--attention=auto" in machine_failure(RuntimeError("No available kernel. Aborting execution."))
    for name in SWITCHES:
        getattr(torch.backends.cuda, f"enable_{name}")(False)
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(RuntimeError) as caught:
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    assert "--attention=auto" in machine_failure(caught.value)


@pytest.mark.parametrize("dtype, dropout", [(torch.bfloat16, 0.0), (torch.float32, 0.3)])
def test_on_a_cpu_math_is_torchs_plain_attention(monkeypatch, dtype, dropout):
    q, k, v = torch.randn(3, 2, 2, 40, 8, dtype=dtype).unbind()
    monkeypatch.setattr(cpu_kernels.CPUAttention, "apply", lambda *_: pytest.fail("the kernel written for a CPU"))
    devices.pick_attention("math", "cpu", "bfloat16")
    torch.manual_seed(5)
    y = cpu_kernels.attention(q, k, v, dropout)
    torch.manual_seed(5)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.equal(y, F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout))


def test_the_choice_is_part_of_the_compilers_cache_key():
    """torch.compile's cache looks at neither switch: with a warm one, code with the other kernel would run."""
    devices.pick_attention("math", "cuda", "bfloat16")
    assert "math" in torch.compiler.config.cache_key_tag


@pytest.mark.parametrize("attention", ["auto", "math"])
def test_the_choice_breaks_no_graph(attention):
    devices.pick_attention(attention, "cpu", "float32")
    torch._dynamo.reset()
    counter = CompileCounter()
    q = torch.randn(2, 2, 16, 8)
    torch.compile(cpu_kernels.attention, backend=counter, fullgraph=True)(q, q, q)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_a_warm_cache_does_not_bring_back_the_other_kernel(tmp_path):
    """The two kernels round differently, so the compiled result tells which of them it has."""
    import subprocess
    import sys

    code = (
        "import sys, torch; from nanogpt import cpu_kernels, device; device.pick_attention(sys.argv[1], 'cpu', 'float32');"
        "q = torch.randn(2, 3, 70, 16, generator=torch.Generator().manual_seed(0)).double();"
        "print(torch.compile(cpu_kernels.attention)(q.float(), q.float(), q.float()).double().sum().item())"
    )
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(GOLDEN.parent.parent)}
    found = []
    for attention in ("auto", "math", "auto", "math"):
        command = [sys.executable, "-c", code, attention]
        found.append(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert found[:2] == found[2:] and found[0] != found[1]


def test_golden_losses_on_a_cpu_do_not_depend_on_the_kernel(run, tmp_path):
    """Those of `auto` are in test_train.py."""
    result = run("train.py", *flags(SYNTHETIC, max_iters=40, attention="math", out_dir=tmp_path / "out"))
    assert_golden(result, 40)


# ----------------------------------------------------------------------------------------------
# deterministic


def assert_golden(result, last):
    """nanoGPT's printed losses, to the digit that another kind of machine may round differently."""
    with open(GOLDEN / "synthetic.csv", encoding="utf-8") as f:
        golden = {(row["kind"], int(row["n"])): float(row["loss"]) for row in csv.DictReader(f)}
    for kind, n, loss, *_ in result.losses:
        assert float(loss) == pytest.approx(golden[kind, n], abs=1.01e-4)
    assert result.losses[-1][1] == last


def test_deterministic_sets_all_that_belongs_to_it():
    devices.set_deterministic(True)
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # torch's documentation of use_deterministic_algorithms
    import torch._inductor.config as inductor

    assert inductor.deterministic


def test_on_a_cpu_deterministic_changes_no_loss(run, tmp_path):
    result = run("train.py", *flags(SYNTHETIC, max_iters=60, deterministic=True, out_dir=tmp_path / "out"))
    assert_golden(result, 60)


def test_every_operation_of_a_step_has_a_deterministic_form(run, tmp_path):
    """With dropout, a loss in chunks and bfloat16; torch raises where there is none (here for a CPU)."""
    settings = TINY | dict(deterministic=True, dropout=0.2, dtype="bfloat16", recompute=True, max_iters=2)
    run("train.py", *flags(settings, out_dir=tmp_path / "out"))


# ----------------------------------------------------------------------------------------------
# both, in a run


def test_a_resume_keeps_both_and_says_what_is_given(run, tmp_path):
    out_dir = tmp_path / "out"
    run("train.py", *flags(TINY, attention="math", deterministic=True, out_dir=out_dir, max_iters=4))
    saved = torch.load(out_dir / "last.pt", weights_only=True)
    assert saved["config"]["attention"] == "math" and saved["config"]["deterministic"] is True
    again = run("train.py", *flags(RESUME, out_dir=out_dir, attention="auto", max_iters=6))
    assert "attention is now 'auto' (the run had 'math')" in again.lines
    assert not any("deterministic is now" in line for line in again.lines)
    saved = torch.load(out_dir / "last.pt", weights_only=True)
    assert saved["config"]["attention"] == "auto" and saved["config"]["deterministic"] is True


def test_a_run_from_a_gpu_with_a_gpus_kernel_resumes_on_a_cpu(run, tmp_path):
    out_dir = tmp_path / "out"
    run("train.py", *flags(TINY, out_dir=out_dir, max_iters=4))
    path = out_dir / "last.pt"
    saved = torch.load(path, weights_only=True)
    saved["config"]["attention"], saved["machine"]["device_type"] = "flash", "cuda"
    torch.save(saved, path)
    (out_dir / "ckpt.pt").unlink(missing_ok=True)
    again = run("train.py", *flags(RESUME, out_dir=out_dir, max_iters=6))
    assert "the run was on cuda: dtype, compile and attention are chosen anew for cpu" in again.lines
    assert torch.load(path, weights_only=True)["config"]["attention"] == "auto"


def test_a_wrong_kernel_is_one_line_and_makes_no_folder(run, tmp_path):
    result = run("train.py", *flags(TINY, attention="flash", out_dir=tmp_path / "out"), expect=2)
    assert error_line(result) == "--attention=flash: takes auto or math on cpu"
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="without /proc")
def test_the_peak_of_memory_is_this_processs_own_whatever_has_started_it():
    """Linux counts the starting process's size in a new one's ru_maxrss. How much torch itself takes depends on its build."""
    program = (
        "import subprocess, sys\n"
        "held = bytearray(1 << 30)\n"
        "code = 'import os; from nanogpt import device; print(device.peak_host_bytes(),'\n"
        "code += 'int(open(\"/proc/self/statm\").read().split()[1]) * os.sysconf(\"SC_PAGE_SIZE\"))'\n"
        "print(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout)"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, now = map(int, result.stdout.split())
    assert 50 << 20 < peak < now + (200 << 20)
