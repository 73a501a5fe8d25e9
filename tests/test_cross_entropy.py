"""nanogpt/cross_entropy.py: the loss of a large vocabulary, in chunks, against torch's own; and bits per byte."""

import math

import pytest
import torch
from small_models import shaken, small
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
from nanogpt import cross_entropy
from nanogpt.cross_entropy import ChunkedCrossEntropy, bits_per_byte, token_losses


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


@pytest.mark.parametrize("rows, softmax_rows", [(2048, 32), (16, 64), (10, 3), (1, 1)])
@pytest.mark.parametrize("ignored", [0, 20])
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
def test_a_large_vocabularys_loss_alone_has_the_value_and_gradients_of_a_plain_head(monkeypatch, autocast):
    monkeypatch.setattr(cross_entropy, "LARGE_VOCABULARY", 1)
    monkeypatch.setattr(cross_entropy, "LOSS_ROWS", 8)  # of 36: the last chunk is a smaller one
    monkeypatch.setattr(cross_entropy, "CPU_SOFTMAX_ROWS", 5)
    x, y = torch.randint(23, (2, 3, 12)).unbind()
    y[0, :3] = -1
    found = []
    for loss_only in (False, True):
        model = shaken(small(), 0.1).train()
        model.loss_only = loss_only
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits, loss = model(x, y)
            with torch.no_grad():
                evaluated = model.eval()(x, y)[1]
        assert logits is None if loss_only else logits.shape == (3, 12, 23)
        loss.backward()
        found.append([loss.detach(), evaluated, *(p.grad for p in model.parameters())])
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() < (0.03 if autocast else 1e-5) * (a.abs().max() + 1e-6)


@pytest.mark.parametrize("training, grad", [(True, True), (True, False), (False, False)])
def test_logits_are_none_exactly_where_loss_only_is_set(training, grad):
    for vocab_size in (50, 9000):
        model, x, y = small_model(vocab_size)
        with torch.set_grad_enabled(grad):
            logits, loss = model.train(training)(x, y)
            model.loss_only = True
            nothing, loss_alone = model(x, y)
        assert logits.shape == (4, 16, vocab_size) and nothing is None
        if vocab_size == 50:
            assert torch.equal(loss_alone, loss)  # to the bit
        assert loss_alone.item() == pytest.approx(loss.item(), abs=2e-6)


def small_model(vocab_size, block_size=16):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size, vocab_size, 1, 2, 16, 0.0, False)).eval()
    x, y = torch.randint(vocab_size, (2, 4, block_size))
    y[0, :5] = -1
    return model, x, y


@pytest.mark.parametrize("vocab_size", [50, 9000])
def test_the_losses_of_single_tokens_are_torchs_and_0_where_the_target_does_not_count(monkeypatch, vocab_size):
    monkeypatch.setattr(cross_entropy, "LOSS_ROWS", 24)  # of 64: the last chunk is a smaller one
    model, x, y = small_model(vocab_size)
    with torch.no_grad():
        found = token_losses(model.hidden(x), model.lm_head, y)
        expected = F.cross_entropy(model(x, y)[0].double().mT, y, ignore_index=-1, reduction="none")
    assert (found == 0).sum() == 5
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------
# what a loss alone costs


class Largest(TorchDispatchMode):
    """Notes the most elements of any tensor that is computed."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.numel = max([self.numel, *sizes])
        return result


@pytest.mark.parametrize("grad", [True, False])
def test_the_loss_alone_never_holds_all_logits(grad):
    model, x, y = small_model(50304, block_size=640)  # 4 x 640 rows are more than LOSS_ROWS
    model.loss_only = True
    with Largest() as largest, torch.set_grad_enabled(grad):
        model(x, y)
    assert largest.numel <= cross_entropy.LOSS_ROWS * 50304 < x.numel() * 50304


def test_without_gradients_the_loss_alone_computes_none_in_training_mode_either():
    model, x, y = small_model(9000)
    model.train()
    counts = []
    for model.loss_only in (False, True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(x, y)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 2 * 64 * 16 * 9000


def test_as_many_bits_as_bytes_are_one_bit_per_byte():
    assert bits_per_byte(15 * math.log(2), 15.0) == pytest.approx(1.0)
    assert bits_per_byte(5.0, 0.0) is None and bits_per_byte(5.0, math.nan) is None
