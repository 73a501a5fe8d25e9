"""torch.compile: sampling is a graph for prompts and one for single tokens; evaluation gives back the loss alone."""

import pytest
import torch
from conftest import TINY, flags
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters

from model import GPT, GPTConfig


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
        logits, loss = torch.compile(model, backend=backend, fullgraph=True)(x, y, loss_only=True)
        assert logits is None and loss.item() == pytest.approx(model(x, y)[1].item(), abs=1e-6)
    assert returned == [torch.Size([])]


@pytest.mark.slow  # the compiler takes a minute
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
