"""Where a version of torch lacks a private operator, the plain way gives the same numbers."""

import types

import pytest
import torch

from model import GPT, GPTConfig
from nanogpt import cpu_kernels


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_attentions_gradients_do_not_hang_on_a_private_function(monkeypatch, dtype, atol, dropout_p):
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 6, 100, 16, dtype=dtype)
    found = []
    for private in (True, False):
        if not private:
            monkeypatch.delattr(torch, "_softmax_backward_data")
        leaves = [t.clone().requires_grad_() for t in (q, k, v)]
        torch.manual_seed(1)
        cpu_kernels.CPUAttention.apply(*leaves, dropout_p).backward(grad)
        found.append([leaf.grad for leaf in leaves])
    for with_it, without in zip(*found, strict=True):
        torch.testing.assert_close(without, with_it, rtol=0, atol=atol * with_it.abs().max().item())


@pytest.mark.parametrize("missing", ["_reorder_linear_weight", "_linear_pointwise"])
def test_without_onednns_operators_a_model_samples_unpacked(monkeypatch, missing):
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 50, 1, 2, 32, 0.0, True)).eval()
    idx = torch.randint(50, (1, 4))
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.generate(idx, 8, temperature=0.0)
        there = {name: None for name in ("_reorder_linear_weight", "_linear_pointwise") if name != missing}
        monkeypatch.setattr(torch.ops, "mkldnn", types.SimpleNamespace(**there))
        cpu_kernels.pack_linear_layers(model)
        assert torch.equal(model.generate(idx, 8, temperature=0.0), expected)
    assert isinstance(model.lm_head, torch.nn.Linear)
