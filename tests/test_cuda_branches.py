"""The code for a GPU, run without one: torch.cuda's calls are replaced, and tensors on the meta device stand for CUDA's.

A meta tensor has a device that is not the CPU, a shape and a dtype, and no numbers. Reading one on the host raises. So
these tests find a wrong name, a wrong shape, and a step that would wait for the GPU.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from guards import make_guard

from data.bins import to_device
from model import GPT, GPTConfig
from nanogpt import device as devices
from nanogpt import mfu
from nanogpt.decoding import Step
from nanogpt.distributed import Processes
from nanogpt.errors import UserError
from nanogpt.guard import clip_gradients
from nanogpt.run_folder import restore_generators, resume_point


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("device, index", [("cuda", 0), ("cuda:3", 3)])
def test_a_process_takes_its_gpu_and_tf32(monkeypatch, precision, device, index):
    taken = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    threads = torch.get_num_threads()
    assert devices.set_up(device) == "cuda" and taken == [index]
    assert torch.get_float32_matmul_precision() == "high" and torch.get_num_threads() == threads


def test_tokens_travel_as_two_bytes_from_pinned_memory_without_waiting(monkeypatch):
    calls = []

    class Tokens:
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            calls.append((device, non_blocking))
            return self

        def long(self):
            calls.append("long")
            return self

    to_device(Tokens(), "cuda:1")
    assert calls == ["pinned", ("cuda:1", True), "long"]


def test_a_gpus_peak_memory_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: {"cuda:1": 5 * 2**30}[device])
    assert devices.peak_memory("cuda:1").endswith(" GiB on the host, 5.00 GiB on cuda:1")


def test_cuda_graphs_are_for_one_process_one_micro_step_and_a_small_model():
    assert devices.compile_mode("cuda", 1, 1, 10_646_784 * 64 * 256) == "reduce-overhead"  # the baby GPT
    assert devices.compile_mode("cuda", 1, 1, 124e6 * 12 * 1024) is None  # GPT-2 keeps a GPU busy
    assert devices.compile_mode("cuda", 2, 1, 1e6) is devices.compile_mode("cuda", 1, 2, 1e6) is None
    assert devices.compile_mode("cpu", 1, 1, 1e6) is None


def test_a_gpus_generator_is_saved_and_restored(monkeypatch):
    state = torch.arange(16, dtype=torch.uint8)
    restored = []
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", restored.append)
    batches = torch.Generator().manual_seed(1)
    states = resume_point("cuda:1", SimpleNamespace(generator=batches), None, False)["generators"]
    assert states.keys() == {"cpu", "batches", "cuda"}
    restore_generators(states, "cuda:1", batches)
    assert restored == [state]
    restore_generators({k: v for k, v in states.items() if k != "cuda"}, "cuda", batches)  # a run from a CPU
    assert restored == [state]


def test_each_process_of_a_machine_takes_the_gpu_of_its_local_rank(monkeypatch):
    for name, value in {"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Processes().own_device("cuda") == "cuda:1" and Processes().own_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes for 1 GPUs on a machine"):
        Processes().own_device("cuda")


def test_the_auto_peak_of_a_gpu_is_that_of_its_dtype(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla T4")
    assert mfu.auto_peak_flops("cuda:7") == 65e12  # float16, which has no bfloat16 beside it
    mfu.auto_peak_flops.cache_clear()


# ----------------------------------------------------------------------------------------------
# a training step, a save and sampling, with tensors that have no numbers


@pytest.fixture
def no_autocast(monkeypatch):
    """The meta device has none, not even one that is off."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)
    monkeypatch.setattr(torch, "autocast", lambda kind, enabled: contextlib.nullcontext())


@pytest.mark.parametrize("vocab_size", [61, 9000])  # the plain loss, and the one in chunks
@pytest.mark.parametrize("dropout, recompute", [(0.0, False), (0.2, False), (0.2, True)])
def test_a_forward_and_backward_pass_off_the_cpu(no_autocast, vocab_size, dropout, recompute):
    with torch.device("meta"):
        model = GPT(GPTConfig(16, vocab_size, 2, 2, 32, dropout, False)).train()
        x = torch.randint(vocab_size, (3, 16))
    model.recompute, model.loss_only = recompute, True
    loss = model(x, x)[1]
    assert loss.shape == () and loss.device.type == "meta"
    loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
    assert clip_gradients(model.parameters(), 1.0).device.type == "meta"
    model.eval().loss_only = False
    assert model(x, x)[0].shape == (3, 16, vocab_size) and model(x)[0].shape == (3, 1, vocab_size)


def test_off_the_cpu_a_cache_has_the_models_own_dtype(no_autocast):
    config = GPTConfig(16, 61, 2, 2, 32, 0.0, False)
    with torch.device("meta"):
        model = GPT(config).eval().bfloat16()
        x = torch.randint(61, (3, 5))
    step = Step(model, 3)
    step.begin()
    assert model(x, cache=step)[0].shape == (3, 1, 61)
    step.length = 5
    assert model(x[:, :1], cache=step)[0].shape == (3, 1, 61)
    assert {kept.dtype for pair in step.layers for kept in pair} == {torch.bfloat16}
    assert len(step.layers) == len(model.transformer.h)


class FusedAdamW:
    """Stands for torch's: it takes the flag to the device."""

    found_inf, steps = None, 0

    def step(self):
        self.steps += 1

    def zero_grad(self, set_to_none):
        assert set_to_none


@pytest.mark.parametrize("sigma", [0.0, 6.0])
def test_an_unlogged_step_with_fused_adamw_reads_nothing_on_the_host(sigma):
    """Reading a meta tensor raises, so a read would end this."""
    guard, optimizer = make_guard(device="meta", spike_sigma=sigma), FusedAdamW()
    for iteration in range(600):
        guard.note_loss(torch.empty((), device="meta"))
        guard.step(optimizer, torch.empty((), device="meta"))
        guard.report(iteration, False)
    assert optimizer.steps == 600 and optimizer.found_inf.dtype == torch.float32 and optimizer.found_inf.shape == ()
    with pytest.raises((RuntimeError, NotImplementedError)):
        guard.report(600, True)  # a logged one reads the count


def test_muon_reads_the_flag_first():
    guard = make_guard(device="meta", optimizer="muon")
    with pytest.raises((RuntimeError, NotImplementedError)):
        guard.step(FusedAdamW(), torch.empty((), device="meta"))
