"""The clock of each device, and what a version of torch that tells less of the CPU gives."""

import types

import pytest
import torch

from nanogpt import device as devices


class MPSEvent:
    """torch.mps.Event as torch's MPSEvent.mm has it: whoever waits for an event takes its one signal."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing
        self.signalled = False

    def record(self):
        MPSEvent.now += 0.25
        self.time, self.signalled = MPSEvent.now, True

    def synchronize(self):
        assert self.signalled, "this waits forever"
        self.signalled = False

    def elapsed_time(self, end):
        end.synchronize()
        return 1000 * (end.time - self.time)


class CUDAEvent(MPSEvent):
    """torch.cuda.Event: elapsed_time() fails where the end has not been waited for."""

    def record(self):
        super().record()
        self.waited = False

    def synchronize(self):
        self.waited = True

    def elapsed_time(self, end):
        if not end.waited:
            raise RuntimeError("CUDA error: device not ready")
        return 1000 * (end.time - self.time)


@pytest.mark.parametrize("kind, event", [("mps", MPSEvent), ("cuda", CUDAEvent)])
def test_the_clock_waits_for_each_mark_once(monkeypatch, kind, event):
    monkeypatch.setattr(torch, kind, types.SimpleNamespace(Event=event))
    clock = devices.Clock(kind)
    last = clock.mark()
    for logged in (True, True, False, True):  # as train.py's loop has it: a mark ends an iteration and begins the next
        now = clock.mark()
        if logged:
            assert clock.seconds(last, now) == pytest.approx(0.25)
        last = now


def test_a_torch_that_does_not_know_the_cpu_computes_in_float32(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert devices.pick_dtype("auto", "cpu") == "bfloat16"
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert devices.fast_bfloat16() is False and devices.pick_dtype("auto", "cpu") == "float32"


def test_a_torch_that_does_not_count_cores_takes_those_that_are_allowed(monkeypatch, tmp_path):
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    assert devices.usable_cores(str(tmp_path / "no quota")) == 6
