"""A dtype that is only emulated is said."""

import pytest
import torch

from nanogpt.device import emulation_remark


@pytest.mark.parametrize("device, dtype, here, remark", [
    ("cpu", "float32", {}, False),
    ("cpu", "bfloat16", dict(bf16=False, avx2=True), True),
    ("cpu", "bfloat16", dict(bf16=True, avx2=True), False),
    ("cpu", "bfloat16", dict(bf16=False, avx2=False), False),  # no x86: torch cannot tell
    ("cpu", "float16", dict(capabilities={"architecture": "x86_64", "avx512_fp16": False, "amx_fp16": False}), True),
    ("cpu", "float16", dict(capabilities={"architecture": "x86_64", "avx512_fp16": True}), False),
    ("cpu", "float16", dict(capabilities={"architecture": "aarch64"}), False),
    ("cuda:1", "bfloat16", dict(gpu=False), True),
    ("cuda", "bfloat16", dict(gpu=True), False),
    ("cuda", "float16", dict(gpu=False), False),
    ("mps", "bfloat16", {}, False),
])  # fmt: skip
def test_a_dtype_that_the_device_only_emulates_is_said(monkeypatch, device, dtype, here, remark):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: here.get("bf16"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: here.get("avx2"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: here.get("capabilities", {}))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: here.get("gpu"))
    found = emulation_remark(dtype, device)
    assert bool(found) == remark
    if remark:
        assert device in found and dtype in found and "--dtype=float32" in found
