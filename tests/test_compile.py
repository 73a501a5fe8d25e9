"""torch.compile: no graph is added after the first evaluation, and the numbers stay the same."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from model import GPT, GPTConfig
from nanogpt import cross_entropy


def iteration(model, compiled, x, y):
    """One training iteration and one evaluation batch, as train.py has them; their losses."""
    model.train()
    loss = compiled(x, y)[1]
    loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()
    with torch.no_grad():
        return loss.item(), compiled(x, y)[1].item()


@pytest.mark.parametrize("vocab_size, dropout", [(50, 0.2), (9000, 0.0)])  # the plain loss, and the one in chunks
def test_no_graph_is_added_after_the_first_evaluation(vocab_size, dropout):
    torch._dynamo.reset()
    counter = CompileCounter()
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, vocab_size, 2, 2, 32, dropout, False))
    compiled = torch.compile(model, backend=counter)
    x, y = torch.randint(vocab_size, (2, 4, 16))
    iteration(model, compiled, x, y)
    graphs = counter.frame_count
    assert graphs > 0
    for _ in range(3):
        iteration(model, compiled, x, y)
    assert counter.frame_count == graphs


@pytest.mark.slow
def test_compiled_losses_are_the_eager_ones():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 50, 2, 2, 32, 0.0, False))
    x, y = torch.randint(50, (2, 4, 16))
    eager = iteration(model, model, x, y)
    assert iteration(model, torch.compile(model), x, y) == pytest.approx(eager, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_chunks_and_its_gradients_are_the_eager_ones(monkeypatch, dtype):
    """Traced, and differentiated by the compiler, as a GPT-2 is on a GPU; what the kernels are does not matter here."""
    monkeypatch.setattr(cross_entropy, "LOSS_ROWS", 24)  # of 64: the last chunk is a smaller one
    monkeypatch.setattr(cross_entropy, "CPU_SOFTMAX_ROWS", 24)
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 9000, 2, 2, 32, 0.0, False)).train()
    x, y = torch.randint(9000, (2, 4, 16))
    found = []
    for run in (model, torch.compile(model, backend="aot_eager")):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = run(x, y)[1]
        loss.backward()
        found.append([loss.item(), *(p.grad.clone() for p in model.parameters())])
        model.zero_grad(set_to_none=True)
    (loss, *gradients), (compiled_loss, *compiled_gradients) = found
    of_loss, of_largest = (1e-6, 1e-5) if dtype == torch.float32 else (1e-3, 0.03)
    assert compiled_loss == pytest.approx(loss, rel=of_loss)
    for eager, compiled in zip(gradients, compiled_gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=0, atol=of_largest * eager.abs().max().item())
