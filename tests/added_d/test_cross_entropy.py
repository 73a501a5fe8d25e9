"""The loss alone, without gradients: in chunks for a large vocabulary, and the very same numbers for a small one."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model import GPT, GPTConfig
from nanogpt import cross_entropy
from nanogpt.optim import NonFiniteGuard


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
        nothing, loss_alone = model(x, y, loss_only=True)
    assert logits.shape == (4, 16, vocab_size) and nothing is None
    if vocab_size < 8192:
        assert torch.equal(loss_alone, loss)
    assert loss_alone.item() == pytest.approx(loss.item(), abs=2e-6 if dtype == torch.float32 else 1e-3)


def test_the_loss_alone_has_a_gradient_where_one_is_asked_for():
    model, x, y = small_model(9000)
    model(x, y)[1].backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad(set_to_none=True)
    model(x, y, loss_only=True)[1].backward()
    torch.testing.assert_close(model.lm_head.weight.grad, expected, rtol=1e-4, atol=1e-7)


def test_without_gradients_none_are_computed_in_training_mode(monkeypatch):
    model, x, y = small_model(9000)
    expected = model(x, y)[1].item()
    monkeypatch.setattr(cross_entropy.ChunkedCrossEntropy, "apply", None)  # its forward pass computes gradients
    with torch.no_grad():
        assert model.train()(x, y)[1].item() == pytest.approx(expected, abs=2e-6)


def test_what_a_save_looks_at_never_holds_all_logits():
    model, x, y = small_model(50304, block_size=640)  # 4 x 640 rows are more than LOSS_ROWS
    guard = NonFiniteGuard("cpu", True, torch.amp.GradScaler("cpu", enabled=False), 10)
    with Largest() as largest:
        assert guard.allows_save(model, {"evaluated": False, "batch": (x, y)}, torch.autocast("cpu", enabled=False))
    assert largest.numel <= cross_entropy.LOSS_ROWS * 50304 < x.numel() * 50304
