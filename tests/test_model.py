"""model.py against golden/, transformers' GPT-2, and plain re-implementations."""

import collections
import json
import math
import re

import pytest
import reference
import torch
from conftest import GOLDEN, RESUME, flags
from small_models import shaken, small
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, MLP, GPTConfig
from nanogpt import mfu
from nanogpt.device import pick_dtype
from nanogpt.errors import UserError

FIGURES = json.loads((GOLDEN / "model.json").read_text())


# ----------------------------------------------------------------------------------------------
# nanoGPT's own figures


@pytest.fixture(params=FIGURES, scope="module")
def golden(request):
    """(figures, the model that they are of, straight after its initialisation)"""
    figures = FIGURES[request.param]
    torch.manual_seed(figures["seed"])
    return figures, GPT(GPTConfig(**figures["config"])).eval()


def test_a_new_model_has_nanogpts_parameters_in_name_number_and_norm(golden):
    figures, model = golden
    norms = {name: p.norm().item() for name, p in model.named_parameters()}
    assert list(norms) == list(figures["param_norms"])
    assert norms == pytest.approx(figures["param_norms"], abs=1e-4)
    assert model.transformer.wte.weight[0, :4].tolist() == pytest.approx(figures["wte_row0"], abs=1e-6)
    assert model.get_num_params() == figures["num_params"]
    assert model.get_num_params(non_embedding=False) == figures["num_params_all"]
    assert model.lm_head.weight is model.transformer.wte.weight


def test_loss_and_logits_are_nanogpts(golden):
    """The figures are of the ids 0, 1, 2, ... over the whole context, each followed by the next."""
    figures, model = golden
    x = torch.arange(model.config.block_size)[None]
    logits, loss = model(x, (x + 1) % model.config.vocab_size)
    assert loss.item() == pytest.approx(figures["loss"], abs=1e-4)
    assert logits[0, -1, :8].tolist() == pytest.approx(figures["logits_last_first8"], abs=1e-4)
    logits, loss = model(x)
    assert loss is None and logits.shape == (1, 1, model.config.vocab_size)
    assert logits[0, -1, :8].tolist() == pytest.approx(figures["logits_last_first8"], abs=1e-4)


@pytest.mark.parametrize("name, seed, temperature, top_k", [
    ("sample_seed42_t0.8_k10", 42, 0.8, 10), ("sample_seed43_t1.0", 43, 1.0, None), ("greedy_k1", 44, 1.0, 1),
])  # fmt: skip
def test_sampled_tokens_are_nanogpts(golden, name, seed, temperature, top_k):
    """60 tokens, well past block_size, from the global generator and from one of the row's own."""
    figures, model = golden
    prompt = torch.tensor([[0, 1, 2, 3]])
    torch.manual_seed(seed)
    assert model.generate(prompt, 60, temperature, top_k)[0].tolist() == figures[name]
    torch.manual_seed(0)
    own = [torch.Generator().manual_seed(seed)]
    assert model.generate(prompt, 60, temperature, top_k, generators=own)[0].tolist() == figures[name]


def test_the_plain_reimplementation_that_other_tests_compare_with_is_nanogpts_too(golden):
    figures, _ = golden
    torch.manual_seed(figures["seed"])
    weights = reference.fresh_weights(**figures["config"])
    norms = {name: w.norm().item() for name, w in weights.items()}
    assert norms == pytest.approx(figures["param_norms"], abs=1e-4)
    x = torch.arange(figures["config"]["block_size"])[None]
    logits = reference.logits_of(weights, x, figures["config"]["n_head"])
    assert logits[0, -1, :8].tolist() == pytest.approx(figures["logits_last_first8"], abs=1e-4)


def test_the_golden_figures_are_those_that_the_project_was_given(shared):
    for path in (shared / "golden").iterdir():
        assert (GOLDEN / path.name).read_bytes() == path.read_bytes()


# ----------------------------------------------------------------------------------------------
# nanoGPT's public names, called as its scripts call them


def test_nanogpts_public_names_work(tmp_path):
    model = GPT(GPTConfig(block_size=12, vocab_size=23, n_layer=2, n_head=2, n_embd=16, dropout=0.0, bias=True))
    x = torch.zeros((1, 1), dtype=torch.int64)
    assert model.generate(x, 3, temperature=0.8, top_k=5).shape == (1, 4)
    model.crop_block_size(6)
    assert model.config.block_size == 6
    settings = dict(weight_decay=0.1, learning_rate=1e-3, betas=(0.9, 0.95), device_type="cpu")
    assert isinstance(model.configure_optimizers(**settings), torch.optim.AdamW)
    assert model.get_num_params() == model.get_num_params(non_embedding=False) - 6 * 16
    hugging_face(model).save_pretrained(tmp_path)
    again = GPT.from_pretrained(str(tmp_path), override_args=dict(dropout=0.1))
    assert again.config.dropout == 0.1 and all(torch.equal(w, again.state_dict()[n]) for n, w in model.state_dict().items())
    assert GPT.from_pretrained(str(tmp_path)).config.dropout == 0.0


def test_without_a_peak_mfu_is_against_the_devices_at_its_auto_dtype_found_once(monkeypatch):
    measured = []
    monkeypatch.setattr(mfu, "measure_peak", lambda *what: measured.append(what) or 2e9)
    mfu.auto_peak_flops.cache_clear()
    try:
        model = small()
        assert model.estimate_mfu(3, 0.5) == model.flops_per_token() * 12 * 3 / (0.5 * mfu.auto_peak_flops("cpu"))
        assert model.estimate_mfu(3, 0.5) == model.estimate_mfu(3, 0.5, 2e9)
        assert measured == [("cpu", pick_dtype("auto", "cpu"))]
    finally:
        mfu.auto_peak_flops.cache_clear()


def test_nanogpts_bench_runs(run, project):
    result = run("tests/programs/nanogpt_bench.py", cwd=project)
    assert re.fullmatch(r"time per iteration: \d+\.\d{4}ms, MFU: \d+\.\d\d%", result.lines[-1]) and len(result.lines) == 4


# ----------------------------------------------------------------------------------------------
# the forward pass


def exact_gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def tanh_gelu(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize("activation, gelu, other", [
    ("gelu", exact_gelu, tanh_gelu), ("gelu_new", tanh_gelu, exact_gelu),
])  # fmt: skip
def test_the_mlp_has_its_own_gelu_and_not_the_other(activation, gelu, other):
    """On inputs of size 1 to 3, where the two forms lie up to 5e-4 apart: the golden losses cannot tell them."""
    mlp = MLP(GPTConfig(n_embd=2, n_head=1, bias=False, activation=activation))
    with torch.no_grad():
        # c_fc copies the first channel eight times, and c_proj reads one of the copies
        mlp.c_fc.weight.zero_()[:, 0] = 1
        mlp.c_proj.weight.zero_()[0, 0] = 1
        size = torch.linspace(1, 3, 101)
        x = torch.cat([size, -size])
        y = mlp(torch.stack([x, torch.zeros_like(x)], dim=-1))[:, 0]
    torch.testing.assert_close(y, gelu(x.double()).float(), atol=1e-6, rtol=1e-6)
    assert (y - other(x.double())).abs().max() > 4e-4


TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # GPT-2's Conv1D is a Linear the other way round


def hugging_face(gpt, dropout=0.0):
    """transformers' GPT-2 with the same sizes and weights."""
    transformers = pytest.importorskip("transformers")
    c = gpt.config
    config = transformers.GPT2Config(
        vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
        activation_function=c.activation, resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config)
    weights = {name: w.T if name.endswith(TRANSPOSED) else w for name, w in gpt.state_dict().items()}
    if not c.bias:
        weights |= {name: 0 * w for name, w in theirs.state_dict().items() if name.endswith(".bias")}
    missing = theirs.load_state_dict(weights, strict=False)
    assert not missing.unexpected_keys and all("attn." in name for name in missing.missing_keys)  # its mask buffers
    return theirs.to(next(gpt.parameters()).dtype)


@pytest.mark.parametrize("activation, bias", [("gelu", True), ("gelu_new", True), ("gelu", False)])
def test_the_whole_model_is_transformers_gpt2(activation, bias):
    sizes = dict(block_size=20, vocab_size=31, n_layer=3, n_head=4, n_embd=32)
    ours = shaken(small(activation=activation, bias=bias, **sizes), 0.1)
    theirs = hugging_face(ours).eval()
    x, y = torch.randint(31, (2, 3, 20)).unbind()
    expected = theirs(x).logits
    logits, loss = ours(x, y)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)
    assert loss.item() == pytest.approx(F.cross_entropy(expected.flatten(0, 1), y.flatten()).item(), abs=1e-4)
    torch.testing.assert_close(ours(x)[0], expected[:, -1:], atol=1e-4, rtol=1e-4)


def test_all_gradients_are_transformers_gpt2s():
    """In float64, in which a CPU trains through CPUAttention, and with T over the length of a stretch."""
    ours = shaken(small(block_size=150), 0.1).double().train()
    theirs = hugging_face(ours).train()
    x, y = torch.randint(23, (2, 2, 150)).unbind()
    ours(x, y)[1].backward()
    F.cross_entropy(theirs(x).logits.flatten(0, 1), y.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        grad = expected[name].grad
        grad = grad.T if name.endswith(TRANSPOSED) else grad
        torch.testing.assert_close(parameter.grad, grad, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_disturbs_the_logits_as_much_as_transformers_does(dtype):
    """Same places, same rate: after the embeddings, on the probabilities, and after both halves of each block.

    Without any one of these the disturbance is 15 to 55 % less."""
    ours = shaken(small(dropout=0.25), 0.2)
    theirs = hugging_face(ours, dropout=0.25).train()
    x = torch.randint(23, (4, 12))
    torch.manual_seed(0)
    with torch.no_grad():
        plain = ours(x, x)[0]
        ours.train()
        expected = torch.stack([(theirs(x).logits - plain).square().mean() for _ in range(300)])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            found = torch.stack([(ours(x, x)[0] - plain).square().mean() for _ in range(300)])
    assert found.double().mean().item() == pytest.approx(expected.double().mean().item(), rel=0.05)


def test_no_position_sees_a_later_one():
    model = shaken(small())
    x = torch.randint(23, (1, 12))
    changed = x.clone()
    changed[0, 7] = (changed[0, 7] + 1) % 23
    before, after = model(x, x)[0][0], model(changed, x)[0][0]
    assert torch.equal(before[:7], after[:7]) and (before[7:] - after[7:]).abs().amax(1).min() > 1e-3


def test_targets_of_minus_1_do_not_count():
    model = shaken(small())
    x, y = torch.randint(23, (2, 2, 12)).unbind()
    y[0, :5] = -1
    y[1, 11] = -1
    logits, loss = model(x, y)
    logp = logits.log_softmax(-1)
    kept = [-logp[b, t, y[b, t]] for b in range(2) for t in range(12) if y[b, t] >= 0]
    assert len(kept) == 18 and loss.item() == pytest.approx((sum(kept) / 18).item(), abs=1e-6)


def test_more_tokens_than_block_size_are_an_error():
    with pytest.raises(ValueError, match="13 tokens are more than block_size = 12"):
        small()(torch.zeros(1, 13, dtype=torch.int64))


@pytest.mark.parametrize("wrong, message", [
    (dict(n_embd=15), "n_embd must be divisible by n_head"), (dict(n_layer=0), "n_layer must be a whole number of at least 1"),
    (dict(n_head=0), "n_head must be a whole number of at least 1"), (dict(vocab_size=-1), "vocab_size must be a whole number of at least 1"),
    (dict(block_size=0), "block_size must be a whole number of at least 1"), (dict(dropout=1.0), "dropout must be"),
    (dict(dropout=-0.1), "dropout must be"), (dict(activation="relu"), "activation must be"),
])  # fmt: skip
def test_sizes_that_make_no_model_are_the_users_error(wrong, message):
    with pytest.raises(UserError, match=message):
        small(**wrong)


def test_crop_block_size_keeps_the_first_positions_and_their_logits():
    model = shaken(small())
    x = torch.randint(23, (2, 8))
    before = model(x, x)[0]
    model.crop_block_size(8)
    assert model.config.block_size == 8 and model.transformer.wpe.weight.shape == (8, 16)
    assert isinstance(model.transformer.wpe.weight, torch.nn.Parameter)
    assert torch.equal(model(x, x)[0], before)
    with pytest.raises(UserError, match="at most 8, not to 9"):
        model.crop_block_size(9)
    with pytest.raises(ValueError, match="block_size = 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


# ----------------------------------------------------------------------------------------------
# FLOPs

BABY = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, bias=False)


@pytest.fixture(scope="module")
def baby():
    return GPT(BABY)


def test_the_baby_gpt_has_10_65_million_parameters(baby):
    assert baby.get_num_params() == 10_646_784 and baby.get_num_params(False) == 10_646_784 + 256 * 384


def test_mfu_is_the_seeds_three_figures(baby):
    """33.22 ms, 33.23 ms and 4446.83 ms, logged as 11.07 %, 11.09 % and 9.99 %; against the A100's 312 TFLOPS."""
    now, spike = baby.estimate_mfu(64, 33.23e-3, 312e12), baby.estimate_mfu(64, 4446.83e-3, 312e12)
    assert f"{now:.2%}" == "11.21%"
    after = set()
    for k in range(100):  # the running averages that are shown as 11.07 %, and the two that follow each
        first = 0.9 * (0.11065 + k * 1e-6) + 0.1 * now
        after.add((f"{first:.2%}", f"{0.9 * first + 0.1 * spike:.2%}"))
    assert ("11.09%", "9.99%") in after
    assert f"{now * 6 * 10_646_784 / baby.flops_per_token():.2%}" == "10.09%"  # 6 N alone, which cannot be


def test_flops_are_6n_and_the_attention_term(baby):
    """PaLM's appendix B: 6 N + 12 L H Q T a token."""
    per_token = 6 * 10_646_784 + 12 * 6 * 6 * 64 * 256
    assert baby.estimate_mfu(3, 2.0, 5e9) == pytest.approx(per_token * 256 * 3 / (2.0 * 5e9), rel=1e-12)


def test_mfu_follows_a_cropped_context():
    model = small()
    model.crop_block_size(6)
    n = sum(p.numel() for p in model.parameters()) - 6 * 16
    assert model.estimate_mfu(1, 1.0, 1.0) == (6 * n + 12 * 2 * 16 * 6) * 6


# ----------------------------------------------------------------------------------------------
# recomputed in the backward pass


class Counted(TorchDispatchMode):
    """How often each of torch's operations ran within it."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step_with_and_without_recompute(autocast=False, **sizes):
    """[(loss and gradients, counts of torch's operations)] of a training step of the same model, without and with."""
    found = []
    for recompute in (False, True):
        model = shaken(small(**sizes), 0.1).train()
        model.recompute, model.loss_only = recompute, True
        x, y = torch.randint(model.config.vocab_size, (2, 3, model.config.block_size)).unbind()
        with Counted() as counted, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x, y)[1]
            loss.backward()
        found.append(([loss.detach(), *(p.grad for p in model.parameters())], counted.calls))
    return found


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_with_recompute_each_blocks_operations_are_done_twice_and_the_gradients_are_the_same(autocast, bias):
    (plain, once), (recomputed, twice) = step_with_and_without_recompute(autocast, bias=bias, dropout=0.2)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))  # the same dropout, too
    calls = once, twice
    assert [c["gelu"] for c in calls] == [2, 4] and [c["gelu_backward"] for c in calls] == [2, 2]
    assert [c["native_layer_norm"] for c in calls] == [5, 9]  # the last one, before the head, is kept
    # CPUAttention's, and its masks with the blocks' and the embeddings'
    assert [c["_softmax"] for c in calls] == [2, 4] and [c["random_"] for c in calls] == [7, 13]
    # four matrices a block and the head: each in one product forward and in two backward
    assert [c["mm"] + c["addmm"] for c in calls] == [3 * 9, 3 * 9 + 2 * 4]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sizes", [
    dict(), dict(dropout=0.2, block_size=150), dict(dropout=0.2, vocab_size=9000), dict(activation="gelu_new"),
], ids=str)  # fmt: skip
def test_with_recompute_the_gradients_are_the_same_bit_for_bit(autocast, sizes):
    """Attention by torch's kernel, by CPUAttention in several chunks; the loss at once and in chunks."""
    (plain, _), (recomputed, _) = step_with_and_without_recompute(autocast, **sizes)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))


def test_recompute_leaves_evaluation_and_sampling_alone():
    model = shaken(small(), 0.1)
    x = torch.randint(23, (2, 12))
    found = []
    for recompute in (False, True):
        model.recompute = recompute
        with Counted() as counted:
            logits, loss = model(x, x)
            loss.backward()
            model.zero_grad()
            text = model.generate(x[:, :3], 20, temperature=0)
        found.append((logits, loss, text, counted.calls))
    assert all(torch.equal(a, b) for a, b in zip(found[0][:3], found[1][:3], strict=True))
    assert found[0][3] == found[1][3]


# ----------------------------------------------------------------------------------------------
# generate


def naive(model, idx, new, choose, window):
    """Text without a cache: `window(length, new so far)` is how many of the last tokens are looked at."""
    for k in range(new):
        seen = idx[:, -window(idx.size(1), k) :]
        logits = model(seen, seen)[0][:, -1].float()
        idx = torch.cat([idx, choose(logits)], dim=1)
    return idx


def drawing(seed, temperature=1.0, top_k=None):
    """nanoGPT's way to draw: temperature, then the k most likely, then multinomial."""
    generator = torch.Generator().manual_seed(seed)

    def choose(logits):
        logits = logits / temperature
        if top_k:
            least = torch.topk(logits, min(top_k, logits.size(-1))).values[:, [-1]]
            logits[logits < least] = -math.inf
        return torch.multinomial(logits.softmax(-1), 1, generator=generator)

    return choose


@pytest.mark.parametrize("prompt", [1, 5, 12, 30], ids=lambda n: f"{n} tokens before")
@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, 5)])
def test_text_by_the_cache_is_that_of_the_whole_window_anew_each_time(prompt, temperature, top_k):
    """Within the context and past it: block_size is 12."""
    model = shaken(small(), 0.2)
    idx = torch.randint(23, (1, prompt))
    expected = naive(model, idx, 40, drawing(5, temperature, top_k), lambda length, k: min(length, 12))
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, 40, temperature, top_k), expected)
    assert len(set(expected[0].tolist())) > 5  # and it is a text


@pytest.mark.parametrize("step", [2, 5, 12, 100])
@pytest.mark.parametrize("prompt", [1, 11, 12, 30])
def test_window_step_moves_the_full_window_that_many_tokens_at_once(prompt, step):
    """The rule, anew: where the window is full, it starts again with the last block_size - step + 1 tokens."""
    model = shaken(small(), 0.2)
    idx = torch.randint(23, (1, prompt))
    state = {"window": None}

    def window(length, k):
        w = min(prompt, 12) if k == 0 else state["window"] + 1
        state["window"] = w if w <= 12 else max(1, 12 - step + 1)
        assert 1 <= state["window"] <= 12
        return state["window"]

    expected = naive(model, idx, 50, drawing(5), window)
    torch.manual_seed(5)
    assert torch.equal(model.generate(idx, 50, window_step=step), expected)


def test_no_step_of_a_text_is_given_more_than_block_size(monkeypatch):
    model = small()
    seen, forward = [], GPT.forward

    def watched(self, idx, targets=None, cache=None):
        result = forward(self, idx, targets, cache)
        seen.append((idx.size(1), cache and cache.length + idx.size(1)))
        return result

    monkeypatch.setattr(GPT, "forward", watched)
    for step in (1, 4):
        seen.clear()
        model.generate(torch.zeros(1, 3, dtype=torch.int64), 40, window_step=step)
        assert max(length or size for size, length in seen) == 12 and len(seen) == 40
        # what fills the window leaves no room for a token more: no cache of it is kept
        assert all((length is None) == (size == 12) for size, length in seen)
        # the first of 3, nine alone while there is room, then the whole window each time or every fourth
        anew = [size for size, _ in seen if size > 1]
        assert anew == ([3] + [12] * 30 if step == 1 else [3] + [9] * 8), seen


def test_temperature_0_is_the_most_likely_token():
    model = shaken(small(), 0.2)
    idx = torch.randint(23, (2, 4))
    expected = naive(model, idx, 20, lambda logits: logits.argmax(-1, keepdim=True), lambda length, k: min(length, 12))
    assert torch.equal(model.generate(idx, 20, temperature=0), expected)
    assert torch.equal(model.generate(idx, 20, temperature=0, top_k=3), expected)
    assert torch.equal(model.generate(idx, 20, temperature=1.0, top_k=1), expected)


@pytest.mark.parametrize("how", [
    dict(temperature=0), dict(temperature=1.0), dict(temperature=5.0, top_k=3), dict(temperature=1.0, top_k=100),
], ids=str)  # fmt: skip
def test_ids_that_pad_the_vocabulary_are_never_drawn(how):
    model = small()
    with torch.no_grad():
        model.transformer.wte.weight[20:] *= 50  # the model would have it so: 20, 21, 22 are much the likeliest
    known = torch.arange(23) < 20
    torch.manual_seed(1)
    free = model.generate(torch.full((8, 1), 21), 40, **how)[:, 1:]
    assert (free >= 20).any()
    bound = model.generate(torch.full((8, 1), 21), 40, allowed=known, **how)[:, 1:]
    assert (bound < 20).all()


def test_each_row_with_its_own_generator_does_not_hang_on_the_others():
    model = shaken(small(), 0.2)
    texts = {}
    for rows in (1, 2, 5):
        generators = [torch.Generator().manual_seed(7 + k) for k in range(rows)]
        texts[rows] = model.generate(torch.zeros(rows, 1, dtype=torch.int64), 30, generators=generators)
    assert torch.equal(texts[5][:2], texts[2]) and torch.equal(texts[5][:1], texts[1])
    assert not torch.equal(texts[5][0], texts[5][1])


def test_stream_yields_what_generate_returns():
    model = shaken(small(), 0.2)
    idx = torch.randint(23, (2, 3))
    torch.manual_seed(3)
    whole = model.generate(idx, 20)
    torch.manual_seed(3)
    assert torch.equal(torch.cat([idx, *model.stream(idx, 20)], dim=1), whole)
    assert torch.equal(model.generate(idx, 0), idx)


# ----------------------------------------------------------------------------------------------
# a model from nanoGPT's checkpoints


def with_masks(weights, prefix=""):
    """`weights` as nanoGPT saves them under torch 1: each layer with its causal mask."""
    masks = {}
    for name in weights:
        if name.endswith("attn.c_attn.weight"):
            masks[name.replace("c_attn.weight", "bias")] = torch.ones(1, 1, 8, 8).tril()
            masks[name.replace("c_attn.weight", "masked_bias")] = torch.tensor(-1e4)
    return {prefix + name: tensor for name, tensor in {**weights, **masks}.items()}


@pytest.mark.parametrize("bias", [True, False])
def test_the_masks_in_a_checkpoint_of_nanogpts_are_skipped(bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(8, 50, 2, 2, 16, 0.0, bias))
    for parameter in model.parameters():  # biases too are other than a new model's
        torch.nn.init.normal_(parameter)
    saved = {"model": with_masks(model.state_dict()), "model_args": model.config.as_model_args()}
    loaded = GPT.from_checkpoint(saved, "ckpt.pt").state_dict()
    assert list(loaded) == list(model.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_weight_that_is_missing_or_unknown_is_an_error_beside_masks_too():
    model = GPT(GPTConfig(8, 50, 1, 2, 16, 0.0, True))
    for change in ({"transformer.h.0.attn.c_attn.bias": None}, {"transformer.h.0.attn.other.bias": torch.zeros(3)}):
        weights = {name: t for name, t in {**with_masks(model.state_dict()), **change}.items() if t is not None}
        with pytest.raises(UserError, match=next(iter(change))):
            GPT.from_checkpoint({"model": weights, "model_args": model.config.as_model_args()}, "ckpt.pt")


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module."])
def test_a_checkpoint_with_masks_samples_and_is_trained_on(run, small_run, tmp_path, prefix):
    saved = torch.load(small_run / "last.pt", weights_only=True)
    keys = ("optimizer", "model_args", "iter_num", "best_val_loss", "config")
    nanogpts = {"model": with_masks(saved["model"], prefix)} | {key: saved[key] for key in keys}
    torch.save(nanogpts, tmp_path / "ckpt.pt")
    run("sample.py", *flags(out_dir=tmp_path, device="cpu", num_samples=1, max_new_tokens=5))
    run("train.py", *flags(RESUME, out_dir=tmp_path, max_iters=10, lr_decay_iters=10))
