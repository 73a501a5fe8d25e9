"""nanogpt/cpu_kernels.py: dropout and attention against plain ones, and packed weights against their own."""

import math

import pytest
import reference
import torch
from small_models import shaken, small

from model import GPT, GPTConfig
from nanogpt import cpu_kernels
from nanogpt.cpu_kernels import CPUAttention, keep_mask, pack_linear_layers
from nanogpt.decoding import cast_once

# ----------------------------------------------------------------------------------------------
# dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
def test_each_position_modulo_8_is_dropped_at_the_same_rate(p, dtype):
    """A random int64 whose top bit is 0 would drop every eighth twice as often."""
    torch.manual_seed(0)
    mask = keep_mask(torch.empty(400_000, dtype=dtype), p)
    assert mask.dtype == dtype and set(mask.unique().tolist()) == {0.0, 1.0}
    rates = (mask.view(-1, 8) == 0).float().mean(0)
    # 50,000 draws: a standard deviation is at most 0.0023; p is rounded to a 256th
    assert (rates - p).abs().max() < 0.012, rates
    kept = 1 - round(256 * p) / 256
    both = ((mask[1:] == 0) & (mask[:-1] == 0)).float().mean()  # neighbours do not know of each other
    assert both.item() == pytest.approx((1 - kept) ** 2, abs=0.005)
    assert mask.float().mean().item() == pytest.approx(kept, abs=0.003)


@pytest.mark.parametrize("p", [0.1, 0.2, 0.25])
def test_dropout_in_bfloat16_keeps_the_mean(p):
    """A mask with the scale in it would be off by what bfloat16 rounds from the scale: 0.33 % for 0.1."""
    torch.manual_seed(0)
    x = torch.rand(4_000_000).add_(1).bfloat16()
    y = cpu_kernels.Dropout(p)(x)
    assert y.dtype == torch.bfloat16 and y.float().mean() / x.float().mean() == pytest.approx(1, abs=1e-3)
    q, k, v = torch.zeros(2000, 64, 8), torch.zeros(2000, 64, 8), torch.rand(2000, 64, 8) + 1
    q, k, v = q.bfloat16().requires_grad_(), k.bfloat16(), v.bfloat16().requires_grad_()
    means = []
    for used in (p, 0.0):
        out = CPUAttention.apply(q, k, v, used)
        (dv,) = torch.autograd.grad(out, v, torch.rand(out.shape).add_(1).bfloat16())
        means.append((out.float().mean().item(), dv.float().mean().item()))
    for dropped, plain in zip(*means, strict=True):
        assert dropped / plain == pytest.approx(1, abs=1.2e-3)


@pytest.mark.parametrize("shape", [(3,), (8,), (5, 7), (1,)])
def test_masks_of_every_size_fit(shape):
    assert keep_mask(torch.empty(shape), 0.3).shape == shape


def test_dropout_is_for_training_only_and_drops_the_gradient_with_the_value():
    dropout = cpu_kernels.Dropout(0.5)
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach()) and set(y.detach().unique().tolist()) == {0.0, 2.0}
    assert torch.equal(dropout.eval()(x), x) and torch.equal(cpu_kernels.Dropout(0.0)(x), x)


def test_two_masks_are_not_alike():
    x = torch.empty(10_000)
    assert 0.4 < (keep_mask(x, 0.5) == keep_mask(x, 0.5)).float().mean() < 0.6


# ----------------------------------------------------------------------------------------------
# attention


@pytest.mark.parametrize("T", [1, 7, 64, 65, 150, 600])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_attention_in_stretches_is_plain_attention_forward_and_backward(monkeypatch, T, p):
    """In float64 against attention written out; dropout by masks that both sides know."""
    torch.manual_seed(0)
    n, hs = (2, 8) if T > 500 else (3, 8)
    q, k, v, dy = torch.randn(4, n, T, hs, dtype=torch.float64).unbind()
    whole, asked = torch.ones(n, T, T, dtype=torch.float64), []

    def known_mask(att, p):
        start = asked[-1] if asked else 0
        asked.append(start + att.size(1))
        mask = (torch.rand(att.shape, dtype=att.dtype) >= p).to(att.dtype)
        whole[:, start : start + att.size(1), : att.size(2)] = mask * 256 / 179  # 0.3 is 77 of 256
        return mask

    monkeypatch.setattr(cpu_kernels, "keep_mask", known_mask)
    ours = [t.clone().requires_grad_() for t in (q, k, v)]
    y = CPUAttention.apply(*ours, p)
    y.backward(dy)
    assert asked[-1:] == ([T] if p else [])
    theirs = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = reference.attention(*theirs, whole)
    expected.backward(dy)
    torch.testing.assert_close(y, expected, atol=1e-10, rtol=1e-10)
    for a, b, name in zip(ours, theirs, "qkv", strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-9, rtol=1e-9, msg=lambda m, name=name: f"d{name}: {m}")


def test_attention_in_stretches_passes_torchs_gradient_check():
    torch.manual_seed(0)
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 66, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda *qkv: CPUAttention.apply(*qkv, 0.0), (q, k, v))


@pytest.mark.parametrize("T", [8, 96])
def test_attention_dropout_drops_probabilities_at_its_rate_by_one_mask_both_ways(T):
    """With the identity as v the output is the dropped matrix itself, which shows the mask that was drawn."""
    torch.manual_seed(0)
    q, k = (t.requires_grad_() for t in torch.randn(2, 4, T, T, dtype=torch.float64))
    v = torch.eye(T, dtype=torch.float64).expand(4, T, T).clone().requires_grad_()
    y = CPUAttention.apply(q, k, v, 0.25)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    keep = (y / reference.attention(q, k, v, 1.0)).detach()[:, seen]
    assert torch.all((keep.abs() < 1e-9) | ((keep - 4 / 3).abs() < 1e-9))  # 0.25 is 64 of 256
    assert (keep < 0.5).double().mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / keep.numel()))
    mask, dy = torch.zeros_like(y), torch.randn_like(y)
    mask[:, seen] = keep
    ours = torch.autograd.grad(y, (q, k, v), dy)
    for a, b in zip(ours, torch.autograd.grad(reference.attention(q, k, v, mask), (q, k, v), dy), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_attention_in_stretches_keeps_to_its_dtype(dtype, tolerance):
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(4, 2, 100, 16).unbind()
    exact = [t.double().requires_grad_() for t in (q, k, v)]
    expected = reference.attention(*exact, 1.0)
    expected.backward(dy.double())
    ours = [t.to(dtype).requires_grad_() for t in (q, k, v)]
    y = CPUAttention.apply(*ours, 0.0)
    y.backward(dy.to(dtype))
    assert y.dtype == dtype
    for a, b in [(y, expected), *((a.grad, b.grad) for a, b in zip(ours, exact, strict=True))]:
        assert (a.double() - b).abs().max() < tolerance * b.abs().max()


def test_a_training_step_with_dropout_0_has_the_same_gradients_whichever_attention(monkeypatch):
    """CPUAttention in bfloat16 or with dropout, torch's own in float32 without: here the same model by both."""
    x, y = torch.randint(23, (2, 3, 12)).unbind()
    grads = []
    for dropout in (0.0, 1e-9):  # so small that no byte falls under it, but dropout it is
        model = shaken(small(dropout=dropout), 0.1).train()
        model(x, y)[1].backward()
        grads.append([p.grad for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------
# packed weights


def packs_bfloat16():
    """Whether oneDNN reorders bfloat16 weights here: on a CPU without AVX-512 it raises."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@pytest.mark.skipif(not packs_bfloat16(), reason="this CPU, or this torch, cannot pack bfloat16 weights")
@pytest.mark.parametrize("bias", [False, True])
def test_a_packed_model_computes_and_samples_the_same(bias):
    plain = shaken(GPT(GPTConfig(32, 101, 2, 2, 64, 0.0, bias)), 0.1).eval()
    packed = shaken(GPT(GPTConfig(32, 101, 2, 2, 64, 0.0, bias)), 0.1).eval()
    packed.load_state_dict(plain.state_dict())
    for model in (plain, packed):
        cast_once(model, "cpu", torch.bfloat16)
    pack_linear_layers(packed)
    assert not any(isinstance(m, torch.nn.Linear) for m in packed.modules())
    x = torch.randint(101, (3, 7))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, exact = packed(x)[0].float(), plain(x)[0].float()
        assert (ours - exact).abs().max() <= 0.01 * exact.abs().max() and exact.std() > 0.1
        # past the context's end, too
        assert torch.equal(packed.generate(x, 40, temperature=0), plain.generate(x, 40, temperature=0))
