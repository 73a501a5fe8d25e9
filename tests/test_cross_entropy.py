"""nanogpt/cross_entropy.py: the loss of a large vocabulary, in chunks, against torch's own."""

import contextlib

import pytest
import torch
from small_models import shaken, small
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from nanogpt import cross_entropy
from nanogpt.cross_entropy import ChunkedCrossEntropy

def losses_and_gradients(x, weight, targets, dtype):
    """Ours: (loss, dx, dweight)."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = ChunkedCrossEntropy.apply(x, weight, targets, dtype)
    (3 * loss).backward()
    return loss.detach(), x.grad, weight.grad


def exact_losses_and_gradients(x, weight, targets):
    """torch's cross_entropy, in float64."""
    x, weight = x.double().requires_grad_(), weight.double().requires_grad_()
    loss = F.cross_entropy(x @ weight.T, targets, ignore_index=-1)
    (3 * loss).backward()
    return loss.detach(), x.grad, weight.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [2048, 16])
def test_a_second_way_back_through_the_loss_in_chunks_adds_the_same_gradients(monkeypatch, dtype, rows):
    monkeypatch.setattr(cross_entropy, "LOSS_ROWS", rows)
    torch.manual_seed(0)
    x, weight = torch.randn(37, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    loss = ChunkedCrossEntropy.apply(x, weight, torch.randint(50, (37,)), dtype)
    (3 * loss).backward(retain_graph=True)
    once = [t.grad.clone() for t in (x, weight)]
    (3 * loss).backward()
    assert all(torch.equal(t.grad, 2 * grad) for t, grad in zip((x, weight), once, strict=True))


@pytest.mark.parametrize("rows, softmax_rows", [(2048, 32), (16, 64), (16, 8), (10, 3), (1, 1)])
@pytest.mark.parametrize("ignored", [0, 1, 20])
def test_the_loss_in_chunks_is_cross_entropy(monkeypatch, rows, softmax_rows, ignored):
    monkeypatch.setattr(cross_entropy, "LOSS_ROWS", rows)
    monkeypatch.setattr(cross_entropy, "CPU_SOFTMAX_ROWS", softmax_rows)
    torch.manual_seed(0)
    x, weight = torch.randn(37, 8), torch.randn(50, 8)
    targets = torch.randint(50, (37,))
    targets[torch.randperm(37)[:ignored]] = -1
    ours, exact = losses_and_gradients(x, weight, targets, x.dtype), exact_losses_and_gradients(x, weight, targets)
    for a, b in zip(ours, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize("rows", [2048, 10])
def test_the_loss_in_chunks_holds_in_bfloat16(monkeypatch, rows):
    monkeypatch.setattr(cross_entropy, "LOSS_ROWS", rows)
    torch.manual_seed(0)
    x, weight, targets = torch.randn(37, 8), torch.randn(50, 8), torch.randint(50, (37,))
    targets[5] = -1
    exact = exact_losses_and_gradients(x, weight, targets)
    ours = losses_and_gradients(x, weight, targets, torch.bfloat16)
    assert ours[1].dtype == ours[2].dtype == torch.float32  # the parameters' own
    assert ours[0].item() == pytest.approx(exact[0].item(), rel=1e-2)
    for a, b in zip(ours[1:], exact[1:], strict=True):
        assert (a.double() - b).abs().max() < 0.03 * b.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_in_training_a_large_vocabulary_has_the_loss_and_gradients_of_a_plain_head(monkeypatch, autocast):
    x, y = torch.randint(23, (2, 3, 12)).unbind()
    y[0, :3] = -1
    found = []
    for large in (10**9, 1):
        monkeypatch.setattr(cross_entropy, "LARGE_VOCABULARY", large)
        monkeypatch.setattr(cross_entropy, "LOSS_ROWS", 8)
        monkeypatch.setattr(cross_entropy, "CPU_SOFTMAX_ROWS", 5)
        model = shaken(small(), 0.1).train()
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            logits, loss = model(x, y)
        assert (logits is None) == (large == 1)
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
        with torch.no_grad():
            logits, evaluated = model.eval()(x, y)
        assert logits.shape == (3, 12, 23)  # evaluation has them
        found[-1].append(evaluated)
    for a, b in zip(*found, strict=True):
        scale = a.abs().max().item() + 1e-6
        assert (a - b).abs().max().item() < (0.03 if autocast else 1e-5) * scale


# ----------------------------------------------------------------------------------------------
# the loss alone, without gradients: in chunks for a large vocabulary, and the very same numbers for a small one


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is computed."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


def small_model(vocab_size, block_size=16):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, 1, 2, 16, 0.0, False)).eval()
    x, y = torch.randint(vocab_size, (2, 4, block_size))
    y[0, :5] = -1
    return model, x, y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [50, 9000])
def test_the_loss_alone_is_the_loss_beside_the_logits(monkeypatch, vocab_size, dtype):
    monkeypatch.setattr(cross_entropy, "LOSS_ROWS", 24)  # of 64: the last chunk is a smaller one
    model, x, y = small_model(vocab_size)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        logits, loss = model(x, y)
        model.loss_only = True
        nothing, loss_alone = model(x, y)
    assert logits.shape == (4, 16, vocab_size) and nothing is None
    if vocab_size < 8192:
        assert torch.equal(loss_alone, loss)
    assert loss_alone.item() == pytest.approx(loss.item(), abs=2e-6 if dtype == torch.float32 else 1e-3)


def test_the_loss_alone_has_a_gradient_where_one_is_asked_for():
    model, x, y = small_model(9000)
    model(x, y)[1].backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    model.loss_only = True
    model(x, y)[1].backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_without_gradients_none_are_computed_in_training_mode(monkeypatch):
    model, x, y = small_model(9000)
    expected = model(x, y)[1].item()
    monkeypatch.setattr(cross_entropy.ChunkedCrossEntropy, "apply", None)  # its forward pass computes gradients
    with torch.no_grad():
        assert model.train()(x, y)[1].item() == pytest.approx(expected, abs=2e-6)
