"""torch.compile: no graph is added after the first evaluation, and the numbers stay the same."""

import re
import signal

import pytest
import torch
from conftest import SMALL
from runs import assert_close
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


@pytest.mark.slow
def test_compiled_losses_with_recompute_are_the_eager_ones_without(train, tmp_path):
    settings = SMALL | dict(n_layer=2, max_iters=8)
    eager = train(settings, out_dir=tmp_path / "eager").losses
    result = train(settings, compile=True, recompute=True, out_dir=tmp_path / "compiled")
    assert ", compile True, " in result.stdout
    assert_close(result.losses, [(*line[:2], *map(float, line[2:])) for line in eager])


def test_a_save_compiles_nothing(train, tmp_path):
    """A resumed run that is stopped before its first evaluation has no graph for one, and the save needs the loss."""
    train(SMALL, out_dir=tmp_path, max_iters=9)
    # it has its next batch; iteration 10 draws two more, and the third is drawn between iteration 11's micro-steps
    env = dict(SIGNAL=int(signal.SIGTERM), BATCH=3)
    more = dict(init_from="resume", eval_interval=10**6, compile=True)
    result = train(SMALL, expect=143, out_dir=tmp_path, program="count_graphs.py", env=env, **more)
    [(before, after)] = re.findall(r"^graphs: (\d+) when asked to stop, (\d+) at the end$", result.stdout, re.M)
    assert int(before) == int(after) > 0
    assert torch.load(tmp_path / "last.pt")["iter_num"] == 11


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
