"""The settings attention and deterministic: what they switch, that a resume keeps them, and that a CPU's numbers stay."""

import csv
import os

import pytest
import torch
from conftest import GOLDEN, SYNTHETIC, TINY, error_line, flags
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from nanogpt import cpu_kernels
from nanogpt import device as devices
from nanogpt.errors import UserError, machine_failure

SWITCHES = ("flash_sdp", "mem_efficient_sdp", "math_sdp", "cudnn_sdp")


def switches():
    return {name: getattr(torch.backends.cuda, f"{name}_enabled")() for name in SWITCHES}


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Puts torch's global switches back."""
    before, tag = switches(), torch.compiler.config.cache_key_tag
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    for name, enabled in before.items():
        getattr(torch.backends.cuda, f"enable_{name}")(enabled)
    torch.compiler.config.cache_key_tag, cpu_kernels.plain_attention = tag, False
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
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
    ("fast", "cuda", "bfloat16", "--attention=fast: takes auto, flash, efficient or math"),
    (True, "cuda", "bfloat16", "--attention=True: takes auto, flash, efficient or math"),
    ("flash", "cpu", "bfloat16", "--attention=flash is not available on cpu, which takes auto or math"),
    ("efficient", "cpu", "float32", "--attention=efficient is not available on cpu, which takes auto or math"),
    ("math", "mps", "float32", "--attention=math is not available on mps, which takes auto"),
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


@pytest.mark.parametrize("attention", ["math", "auto"])
def test_golden_losses_on_a_cpu_do_not_depend_on_the_kernel(run, tmp_path, attention):
    result = run("train.py", *flags(SYNTHETIC, max_iters=40, attention=attention, out_dir=tmp_path / "out"))
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
    devices.compute_deterministically()
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"  # torch's documentation of use_deterministic_algorithms
    assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    import torch._inductor.config as inductor

    assert inductor.deterministic


@pytest.mark.parametrize("before, after", [(":16:8", ":16:8"), (":4096:8", ":4096:8"), (":4096:2", ":4096:8")])
def test_a_workspace_of_the_user_stays_where_it_is_deterministic(monkeypatch, before, after):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", before)
    devices.compute_deterministically()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == after


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
    again = run("train.py", *flags(init_from="resume", out_dir=out_dir, attention="auto", max_iters=6))
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
    again = run("train.py", *flags(init_from="resume", out_dir=out_dir, device="cpu", max_iters=6))
    assert "the run was on cuda: dtype, compile and attention are chosen anew for cpu" in again.lines
    assert torch.load(path, weights_only=True)["config"]["attention"] == "auto"


def test_a_wrong_kernel_is_one_line_and_makes_no_folder(run, tmp_path):
    result = run("train.py", *flags(TINY, attention="flash", out_dir=tmp_path / "out"), expect=2)
    assert error_line(result) == "--attention=flash is not available on cpu, which takes auto or math"
    assert not (tmp_path / "out").exists()
