"""torch.compile: no graph is added after the first evaluation, and the numbers stay the same."""

import json
import re
import signal

import pytest
import torch
from conftest import SMALL, TINY, flags
from runs import assert_close
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from model import GPT, GPTConfig
from nanogpt import cross_entropy

pytestmark = pytest.mark.slow


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
    model.loss_only = True  # as train.py has it
    compiled = torch.compile(model, backend=counter)
    x, y = torch.randint(vocab_size, (2, 4, 16))
    iteration(model, compiled, x, y)
    graphs = counter.frame_count
    assert graphs > 0
    for _ in range(3):
        iteration(model, compiled, x, y)
    assert counter.frame_count == graphs


def test_compiled_losses_are_the_eager_ones():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTConfig(16, 50, 2, 2, 32, 0.0, False))
    x, y = torch.randint(50, (2, 4, 16))
    eager = iteration(model, model, x, y)
    assert iteration(model, torch.compile(model), x, y) == pytest.approx(eager, abs=1e-5)


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
    model.loss_only = True
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


# ----------------------------------------------------------------------------------------------
# torch.compile: sampling is a graph for prompts and one for single tokens; evaluation gives back the loss alone


def sampled(prompt_lengths, batch, bfloat16, **options):
    """(graphs after each sampling of 24 + 16 tokens, all that broke a graph, texts, eager texts) of a small GPT."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = GPT(GPTConfig(24, 50, 5, 2, 32, 0.0, False)).eval()
    prompts = [torch.randint(50, (1, length)).expand(batch, -1) for length in prompt_lengths]
    counter, graphs, texts = CompileCounter(), [], []
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        eager = [model.generate(prompt, 40, temperature=0.0, **options) for prompt in prompts]
        model.forward = torch.compile(model.forward, dynamic=True, backend=counter)  # as sample.py has it
        for prompt in prompts:
            texts.append(model.generate(prompt, 40, temperature=0.0, **options))
            graphs.append(counter.frame_count)
    return graphs, dict(counters["graph_break"]) | dict(counters["recompile_limit"]), texts, eager


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    "prompts, batch, window_step, most",
    [([5], 1, 8, 2), ([1], 2, 8, 2), ([5], 1, 1, 3), ([7, 11, 3, 9, 1, 13, 30], 1, 8, 3), ([6, 30], 2, 1, 3)],
    ids=["several tokens", "one token", "window_step 1", "many prompts", "prompts of two rows"],
)
def test_compiled_sampling_is_a_graph_for_prompts_and_one_for_single_tokens(prompts, batch, window_step, most, bfloat16):
    """... and one for whole windows, which need no cache; however many layers, prompts and tokens there are."""
    graphs, broken, texts, eager = sampled(prompts, batch, bfloat16, window_step=window_step)
    assert 1 <= graphs[-1] <= most, graphs
    assert broken == {}
    if not bfloat16:
        assert all(torch.equal(*both) for both in zip(texts, eager, strict=True))


def test_no_graph_is_added_for_later_tokens():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = GPT(GPTConfig(40, 50, 2, 2, 32, 0.0, False)).eval()
    counter, graphs = CompileCounter(), []
    model.forward = torch.compile(model.forward, dynamic=True, backend=counter)
    for _ in model.stream(torch.randint(50, (1, 5)), 80, temperature=0.0, window_step=8):
        graphs.append(counter.frame_count)
    assert graphs == [1] + [2] * 79


@pytest.mark.parametrize("vocab_size", [50, 9000])
def test_a_compiled_evaluation_returns_the_loss_alone(vocab_size):
    torch._dynamo.reset()
    returned = []

    def backend(graph, inputs):
        [output] = [node for node in graph.graph.nodes if node.op == "output"]
        returned.extend(value.meta["example_value"].shape for value in output.args[0])
        return graph

    torch.manual_seed(0)
    model = GPT(GPTConfig(16, vocab_size, 2, 2, 32, 0.0, False)).eval()
    x, y = torch.randint(vocab_size, (2, 4, 16))
    with torch.no_grad():
        eager = model(x, y)[1].item()
        model.loss_only = True
        logits, loss = torch.compile(model, backend=backend, fullgraph=True)(x, y)
    assert logits is None and loss.item() == pytest.approx(eager, abs=1e-6)
    assert returned == [torch.Size([])]


def test_compiled_greedy_text_is_the_eager_one(run, synthetic_run):
    settings = flags(device="cpu", dtype="float32", out_dir=synthetic_run[0], start="abc", temperature=0, num_samples=1,
                     max_new_tokens=60, window_step=8)  # fmt: skip
    eager, compiled = (run("sample.py", *settings, f"--compile={on}") for on in (False, True))
    assert compiled.stdout == eager.stdout and len(eager.stdout) > 60


LARGEST = """
import runpy, sys, torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

class Largest(TorchDispatchMode):
    numel = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.numel = max([self.numel] + [t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor)])
        return result

sys.argv = sys.argv[1:]
with Largest() as largest:
    runpy.run_path(sys.argv[0], run_name="__main__")
print("largest tensor:", largest.numel)
"""


def test_an_evaluation_with_gpt2s_vocabulary_never_holds_all_logits(run, own_project):
    (own_project / "data" / "synthetic" / "meta.pkl").unlink()  # vocab_size is 50304 then
    (own_project / "watched.py").write_text(LARGEST)
    settings = TINY | dict(block_size=256, batch_size=9, eval_only=True, eval_iters=1, out_dir=own_project / "none")
    done = run("watched.py", own_project / "train.py", *flags(settings), project=own_project, cwd=own_project)
    [step] = [line for line in done.lines if line.startswith("step 0: ")]
    [largest] = [int(line.split()[-1]) for line in done.lines if line.startswith("largest tensor: ")]
    assert 10.7 < float(step.split()[-1]) < 10.9  # ln(50304) is 10.83
    assert 2048 * 50304 <= largest < 9 * 256 * 50304


def test_a_second_start_finds_the_loss_of_a_large_vocabulary_in_torchs_cache(run, tmp_path):
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    first, second = (json.loads(run("tests/programs/train_large_vocabulary.py", env=env).stdout) for _ in range(2))
    if not first["compile"]:
        pytest.skip("no C++ compiler, or no Python.h")
    assert "autograd_cache_bypass" not in first["cache"] | second["cache"]
    assert second["cache"]["autograd_cache_hit"] == 1 and first["numbers"] == second["numbers"]
