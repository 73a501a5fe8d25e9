"""tools/plan.py: its figures beside torch's own counters, the tensors that autograd keeps, and published numbers."""

import re
import shutil

import pytest
import torch
from conftest import error_line, flags
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from nanogpt import device as devices
from nanogpt import gpt2, mfu
from nanogpt.errors import UserError
from tools import planning


def model_of(config):
    with torch.device("meta"), gpt2.WithoutInit():
        return GPT(config)


# ----------------------------------------------------------------------------------------------
# parameters and FLOPs


@pytest.mark.parametrize("arguments, parameters", [
    (["--vocab_size=50257", "--bias=False"], "124,337,664"), ([], "124,373,760"), (["--init_from=gpt2-xl"], "1,557,611,200"),
])  # fmt: skip
def test_parameters_are_the_published_ones(run, arguments, parameters):
    result = run("tools/plan.py", "config/train_gpt2.py", "--gpu=A100", "--count=8", *arguments)
    assert f"parameters: {parameters}" in result.lines


@pytest.mark.parametrize("bias", [True, False])
def test_kinds_of_parameters_add_up(bias):
    config = GPTConfig(16, 61, 2, 2, 16, 0.0, bias)
    kinds = planning.parameters_by_kind(model_of(config))
    assert sum(kinds.values()) == sum(p.numel() for p in GPT(config).parameters())
    assert kinds["attention"] == 2 * (4 * 16 * 16 + (4 * 16 if bias else 0))
    assert kinds["MLP"] == 2 * (8 * 16 * 16 + (5 * 16 if bias else 0))


@pytest.mark.parametrize("recompute, dropout", [(False, 0.0), (True, 0.0), (True, 0.1)])
@pytest.mark.parametrize("vocab_size", [61, 9000])
def test_flops_are_torchs_count_and_what_recompute_adds(recompute, dropout, vocab_size, monkeypatch):
    import model as model_module

    def attention(q, k, v, dropout_p=0.0, bias=None):  # without this project's kernel, and in full
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    monkeypatch.setattr(model_module, "attention", attention)
    config = GPTConfig(16, vocab_size, 2, 2, 32, dropout, True)
    model = GPT(config)
    model.recompute = recompute
    ids = torch.randint(vocab_size, (3, 16))
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        model(ids, ids)[1].backward()
    in_no_product = sum(p.numel() for p in model.parameters() if p.dim() == 1)  # norms and biases, which 6N counts
    expected = model.flops_per_token() - 6 * in_no_product
    expected += planning.recompute_flops(config) if recompute else 0
    assert counter.get_total_flops() == expected * 3 * 16


# ----------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_activations_are_the_tensors_that_autograd_keeps(dtype, dropout):
    sizes = {}
    for n_layer in (1, 2):
        torch.manual_seed(0)
        model = GPT(GPTConfig(256, 61, n_layer, 4, 64, dropout, False))
        own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def keep(tensor, own=own, kept=kept):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        ids = torch.randint(61, (3, 256))
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with devices.autocast("cpu", dtype, cache=False):
                model(ids, ids)
        sizes[n_layer] = sum(size for size, _ in kept.values())
    setup = planning.Setup(3, dtype=dtype)
    casts = 2 * 12 * 64**2 if dtype == "bfloat16" else 0
    assert planning.block_activations(model.config, setup) + casts == sizes[2] - sizes[1]


# MiB that train.py's process held at its peak, less what it held before the model was made (Linux, torch 2.13, two cores)
HELD = [
    ((65, 256, 6, 6, 384, 0.2), 64, "bfloat16", False, 2708), ((65, 256, 6, 6, 384, 0.2), 64, "bfloat16", True, 1338),
    ((65, 256, 6, 6, 384, 0.2), 64, "float32", False, 4333),
    ((50304, 1024, 12, 12, 768, 0.0), 2, "bfloat16", False, 3250), ((50304, 1024, 12, 12, 768, 0.0), 2, "bfloat16", True, 2501),
    ((50304, 1024, 12, 12, 768, 0.0), 2, "float32", False, 3517), ((50304, 1024, 12, 12, 768, 0.0), 2, "float32", True, 2693),
    ((65, 64, 4, 4, 128, 0.0), 12, "bfloat16", False, 73.5), ((65, 64, 4, 4, 128, 0.0), 12, "bfloat16", True, 136),
]  # fmt: skip


@pytest.mark.parametrize("model, batch_size, dtype, recompute, held", HELD)
def test_memory_is_within_a_tenth_of_what_was_measured(model, batch_size, dtype, recompute, held):
    vocab_size, block_size, n_layer, n_head, n_embd, dropout = model
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, False)
    parameters = sum(p.numel() for p in model_of(config).parameters())
    setup = planning.Setup(batch_size, recompute=recompute, dtype=dtype)
    found = sum(planning.memory(config, parameters, setup).values()) / 2**20
    assert found == pytest.approx(held, rel=0.1)


def test_fsdp_shares_weights_and_optimizer_and_keeps_gradients_whole_between_micro_steps():
    config = GPTConfig(1024, 50304, 12, 12, 768, 0.0, False)
    alone = planning.memory(config, 124_373_760, planning.Setup(12, 5, device_type="cuda"))
    shared = planning.memory(config, 124_373_760, planning.Setup(12, 5, 8, device_type="cuda"))
    for kind in ("weights", "optimizer"):
        assert shared[kind] == alone[kind] // 8
    assert shared["gradients"] == alone["gradients"]
    once = planning.memory(config, 124_373_760, planning.Setup(12, 1, 8, device_type="cuda"))
    assert once["gradients"] <= alone["gradients"] // 8 + 4 * 50304 * 768
    assert alone["weights"] + alone["gradients"] + alone["optimizer"] == 16 * 124_373_760  # ZeRO, arXiv:1910.02054


@pytest.mark.parametrize("recompute", [False, True])
def test_the_largest_batch_fits_and_the_next_does_not(recompute):
    config = GPTConfig(1024, 50304, 12, 12, 768, 0.0, False)
    setup = planning.Setup(1, recompute=recompute, device_type="cuda")
    for gib in (8, 24, 80):
        n = planning.largest_batch_size(config, 124_373_760, setup, gib << 30)
        sizes = [sum(planning.memory(config, 124_373_760, planning.Setup(b, recompute=recompute, device_type="cuda")).values())
                 for b in (n, n + 1)]  # fmt: skip
        assert sizes[0] <= gib << 30 < sizes[1]
    assert planning.largest_batch_size(config, 124_373_760, setup, 1 << 30) == 0


# ----------------------------------------------------------------------------------------------
# time, loss, devices


def test_gpt2_on_eight_a100s_takes_the_days_that_nanogpt_publishes(run):
    result = run("tools/plan.py", "config/train_gpt2.py", "--gpu=A100", "--count=8", "--dollars_per_hour=10")
    line = next(line for line in result.lines if line.startswith("the run: "))
    hours = float(line.split()[2].replace(",", ""))
    assert hours == pytest.approx(4 * 24, rel=0.15)  # "about 4 days"
    assert line.endswith(f"; {hours * 10:,.2f} dollars") or abs(hours * 10 - float(line.split()[-2].replace(",", ""))) < 0.1


def cost_and_tokens(result):
    """(hours, dollars, tokens, iterations) as the plan prints them."""
    found = re.search(r"^tokens \w+(?: all)?: ([\d,]+) in ([\d,]+) iter.*\nthe run: ([\d,.]+) hours.*; ([\d,.]+) dol", result.stdout, re.M)
    tokens, iterations, hours, dollars = (float(text.replace(",", "")) for text in found.groups())
    return hours, dollars, tokens, iterations


def test_a_run_that_max_seconds_ends_takes_that_time_and_what_is_left_of_it(run, tmp_path, synthetic_run):
    """An hour of eight A100s at 16 dollars is 16 dollars, and the tokens are in proportion."""
    common = ["config/train_gpt2.py", "--gpu=A100", "--count=8", "--dollars_per_hour=16"]
    whole = cost_and_tokens(run("tools/plan.py", *common))
    hours, dollars, tokens, iterations = cost_and_tokens(run("tools/plan.py", *common, "--max_seconds=3600"))
    assert (hours, dollars) == (1.0, 16.0) and tokens == iterations * 491_520
    assert tokens == pytest.approx(whole[2] / whole[0], rel=0.01)

    shutil.copytree(synthetic_run[0], tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "last.pt")
    torch.save(saved | {"seconds": 1800.0}, tmp_path / "run" / "last.pt")
    (tmp_path / "run" / "ckpt.pt").unlink()
    more = flags(init_from="resume", out_dir=tmp_path / "run", gpu="A100", dollars_per_hour=2, max_iters=300)
    left = cost_and_tokens(run("tools/plan.py", *more))
    assert left[2:] == (150 * 512, 150)  # 301 iterations, of which 151 are done
    more += flags(max_seconds=5400, max_iters=10**12)
    assert cost_and_tokens(run("tools/plan.py", *more))[:2] == (1.0, 2.0)


# what an H200 took with torch 2.13, compiled, one process: MiB of tensors at the peak, milliseconds of an iteration
H200 = [
    ((50304, 1024, 12, 12, 768, 0.0), 12, False, 7261, 28.45), ((65, 256, 6, 6, 384, 0.2), 64, False, 1639, 6.86),
    ((65, 256, 6, 6, 384, 0.2), 64, True, 634, None),
]  # fmt: skip


@pytest.mark.parametrize("model, batch_size, recompute, held, ms", H200)
def test_a_gpus_memory_is_within_a_tenth_of_what_was_measured_and_its_time_by_rule_within_an_eighth(
    model, batch_size, recompute, held, ms
):  # fmt: skip
    vocab_size, block_size, n_layer, n_head, n_embd, dropout = model
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd, dropout, False)
    model = model_of(config)
    setup = planning.Setup(batch_size, recompute=recompute, device_type="cuda")
    found = planning.memory(config, sum(p.numel() for p in model.parameters()), setup)
    assert sum(found.values()) / 2**20 == pytest.approx(held, rel=0.1)
    if ms:
        share = planning.usual_mfu(n_embd, "cuda")
        seconds = planning.iteration_seconds(model, batch_size * block_size, 989.4e12, share, recompute)
        assert 1000 * seconds == pytest.approx(ms, rel=0.125)


def test_the_memory_of_a_gpu_is_its_own_or_the_one_that_its_name_gives():
    for name in mfu.DEVICES:
        assert planning.find_gpu(name.upper())[1] == mfu.DEVICES[name][-1] << 30
    assert planning.find_gpu("A100 80GB") == ("bfloat16", 80 << 30)
    assert planning.find_gpu("NVIDIA H100 PCIe") == ("bfloat16", 80 << 30)  # the data sheets' figures
    assert planning.find_gpu("T4") == ("float16", 16 << 30)


@pytest.mark.parametrize("name, near", [("V100", "v100 sxm2"), ("A1000", "a100"), ("RTX 4091", "rtx 4090"), ("nonsense", "h100")])
def test_an_unknown_gpu_names_the_nearest(name, near):
    with pytest.raises(UserError, match=f"--gpu={name}: not in the table; .*{near}"):
        planning.find_gpu(name)


@pytest.mark.parametrize("arguments, said", [
    (["--gpu=A1000"], "nearest names there: a100"), (["--count=0"], "--count=0: must be at least 1"),
    (["--count=7"], "number of processes, 7"), (["--gpu=H100", "--measure=True"], "measures this machine"),
    (["--bacth_size=2"], "did you mean batch_size?"), (["--n_head=5"], "n_embd must be divisible by n_head"),
    (["--mfu=-0.1"], "--mfu=-0.1"), (["--mfu=40"], "--mfu=40.0: must be at least 0 and below 1"),
])  # fmt: skip
def test_a_mistake_is_one_line(run, arguments, said):
    result = run("tools/plan.py", *arguments, expect=2)
    assert said in error_line(result)


def test_it_takes_any_setting_of_train_and_counts_the_passes_over_the_data(run):
    result = run("tools/plan.py", "--gpu=H100", "--n_layer=3", "--recompute=True", "--dataset=synthetic",
                 "--gradient_accumulation_steps=4", "--count=4", "--max_iters=9")  # fmt: skip
    assert f"{491520 / 20000:,.2f} passes over the data" in result.stdout


def test_a_measured_iteration_is_train_pys(run, project):
    tiny = "--n_layer=1 --n_head=2 --n_embd=16 --block_size=16 --batch_size=4 --gradient_accumulation_steps=1".split()
    result = run("tools/plan.py", "--dataset=synthetic", "--device=cpu", "--measure=True", "--peak_flops=1e9", *tiny)
    [line] = [line for line in result.lines if line.startswith("an iteration: ")]
    assert 0 < float(line.split()[2].replace(",", "")) < 1000 and "measured here" in line and "GiB on the host" in line


# ----------------------------------------------------------------------------------------------
# what it takes from elsewhere


@pytest.fixture(scope="module")
def plan_of_the_run(run, synthetic_run):
    return run("tools/plan.py", *flags(init_from="resume", out_dir=synthetic_run[0], device="cpu", batch_size=4))


def test_a_resume_is_planned_with_the_runs_own_settings(plan_of_the_run):
    lines = plan_of_the_run.lines
    assert lines[0] == "batch_size is now 4 (the run had 8)"
    # golden/synthetic.csv's model: 2 layers of 64 channels, 61 tokens, 32 positions, without biases
    assert f"parameters: {2 * 12 * 64**2 + (61 + 32) * 64 + 5 * 64:,}" in lines
    # the run has ended; of a longer one, what is left
    assert "tokens left: 0 in 0 iterations, 0.00 passes over the data" in lines
    assert any(line.startswith("the run: 0.00 hours") for line in lines)


def test_a_runs_folder_gives_the_model_and_nothing_else(run, synthetic_run, plan_of_the_run):
    result = run("tools/plan.py", *flags(init_from=synthetic_run[0], dataset="synthetic", device="cpu"))
    [parameters] = [line for line in plan_of_the_run.lines if line.startswith("parameters:")]
    assert parameters in result.lines and any("in 600,001 iterations" in line for line in result.lines)


def test_a_resume_without_a_checkpoint_is_one_line(run, tmp_path):
    result = run("tools/plan.py", *flags(init_from="resume", out_dir=tmp_path), expect=2)
    assert f"no checkpoint in {tmp_path}" in error_line(result)


def test_help_explains_the_settings_of_train_and_its_own(run):
    lines = run("tools/plan.py", "--help").lines
    for name, comment in (("n_head", "attention heads per block"), ("count", "devices, a process on each")):
        assert any(line.startswith(f"  --{name}=") and line.endswith(comment) for line in lines)
