"""model.py against nanoGPT's figures, Hugging Face's GPT-2, and formulas written out."""

import csv
import json
import math

import pytest
import torch
from conftest import GOLDEN
from reference import attention, fresh_weights, logits_of
from torch.nn import functional as F

import model as model_module
from configurator import UserError
from model import GPT, CPUAttention, GPTConfig, keep_mask

with open(GOLDEN / "model.json") as f:
    MODELS = json.load(f)
SMALL = dict(block_size=16, vocab_size=61, n_layer=2, n_head=2, n_embd=16, dropout=0.0, bias=True)


def built(seed=1, scale=1.0, **other):
    """A model in eval mode; `scale` above 1 takes its weights far from the flat start."""
    torch.manual_seed(seed)
    gpt = GPT(GPTConfig(**SMALL | other)).eval()
    if scale != 1.0:
        with torch.no_grad():
            for parameter in gpt.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.02 * scale + (parameter.dim() < 2))
    return gpt


def tokens(*shape, seed=3, V=61):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------------
# nanoGPT's figures: golden/model.json


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def golden(request):
    """(figures, the model they are of)"""
    torch.manual_seed(request.param["seed"])
    return request.param, GPT(GPTConfig(**request.param["config"])).eval()


def test_initial_weights_are_nanogpts(golden):
    figures, gpt = golden
    assert gpt.get_num_params() == figures["num_params"]
    assert gpt.get_num_params(non_embedding=False) == figures["num_params_all"]
    norms = {name: parameter.norm().item() for name, parameter in gpt.named_parameters()}
    assert norms.keys() == figures["param_norms"].keys()
    for name, norm in figures["param_norms"].items():
        assert norms[name] == pytest.approx(norm, abs=1e-4), name
    assert gpt.transformer.wte.weight[0, :4].tolist() == pytest.approx(figures["wte_row0"], abs=1e-6)
    assert gpt.lm_head.weight is gpt.transformer.wte.weight


def test_loss_and_logits_are_nanogpts(golden):
    """Of the ids 0, 1, 2 ... block_size - 1, each to be followed by the next."""
    figures, gpt = golden
    idx = torch.arange(gpt.config.block_size)[None]
    logits, loss = gpt(idx, idx + 1)
    assert loss.item() == pytest.approx(figures["loss"], abs=1e-4)
    assert logits[0, -1, :8].tolist() == pytest.approx(figures["logits_last_first8"], abs=1e-4)
    last, nothing = gpt(idx)
    assert last.shape == (1, 1, gpt.config.vocab_size) and nothing is None
    assert last[0, 0, :8].tolist() == pytest.approx(figures["logits_last_first8"], abs=1e-4)


SAMPLES = {
    "sample_seed42_t0.8_k10": dict(seed=42, temperature=0.8, top_k=10),
    "sample_seed43_t1.0": dict(seed=43, temperature=1.0),
    "greedy_k1": dict(seed=0, temperature=1.0, top_k=1),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sampled_tokens_are_nanogpts_past_the_context_too(golden, name):
    figures, gpt = golden
    options = dict(SAMPLES[name])
    torch.manual_seed(options.pop("seed"))
    assert gpt.generate(torch.arange(4)[None], 60, **options)[0].tolist() == figures[name]
    if name == "greedy_k1":
        assert gpt.generate(torch.arange(4)[None], 60, temperature=0)[0].tolist() == figures[name]


def test_the_plain_reimplementation_is_nanogpts_as_well(golden):
    """So that test_train.py may compare with reference.py where golden/ has no figures."""
    figures, _ = golden
    torch.manual_seed(figures["seed"])
    weights = fresh_weights(**figures["config"])
    for name, norm in figures["param_norms"].items():
        assert weights[name].norm().item() == pytest.approx(norm, abs=1e-4), name
    idx = torch.arange(figures["config"]["block_size"])[None]
    logits = logits_of(weights, idx, figures["config"]["n_head"])
    assert F.cross_entropy(logits[0], idx[0] + 1).item() == pytest.approx(figures["loss"], abs=1e-4)


# ----------------------------------------------------------------------------------------------
# the forward pass

PHI = {0.5: 0.6914624613, 1.0: 0.8413447461, 1.5: 0.9331927987, 2.0: 0.9772498681, 2.5: 0.9937903347, 3.0: 0.9986501020}
TANH = {1.0: 0.8411919906, 2.0: 1.9545976549, 3.0: 2.9963625834}  # 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))


def through_mlp(values, activation):
    """What an MLP makes of `values` where its matrices are identities: GELU alone."""
    mlp = model_module.MLP(GPTConfig(n_embd=len(values), n_head=1, bias=False, activation=activation)).eval()
    eye = torch.eye(len(values))
    with torch.no_grad():
        mlp.c_fc.weight.copy_(torch.cat([eye, 0 * eye, 0 * eye, 0 * eye]))
        mlp.c_proj.weight.copy_(torch.cat([eye, 0 * eye, 0 * eye, 0 * eye], dim=1))
        return mlp(torch.tensor(values)[None, None])[0, 0].tolist()


def test_the_mlp_has_the_exact_gelu():
    """x times the normal distribution's integral up to x, from tables; the tanh form differs by 1.5e-4 to 4e-4 here."""
    expected = {x: x * phi for x, phi in PHI.items()} | {-x: -x * (1 - phi) for x, phi in PHI.items()}
    assert through_mlp(list(expected), "gelu") == pytest.approx(list(expected.values()), abs=1e-6)


def test_the_mlp_has_the_tanh_gelu_where_gpt2s_weights_want_it():
    expected = TANH | {-x: y - x for x, y in TANH.items()}
    assert through_mlp(list(expected), "gelu_new") == pytest.approx(list(expected.values()), abs=1e-6)


def hugging_face(gpt):
    """transformers' GPT-2 with the same weights."""
    transformers = pytest.importorskip("transformers")
    c = gpt.config
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=c.vocab_size, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head,
            activation_function=c.activation, embd_pdrop=0.0, resid_pdrop=0.0, attn_pdrop=0.0,
        )  # fmt: skip
    )
    conv1d = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
    weights = {name: w.T if name.endswith(conv1d) else w for name, w in gpt.state_dict().items()}
    zeros = {name: torch.zeros_like(w) for name, w in theirs.state_dict().items() if name.endswith(".bias")}
    theirs.load_state_dict({**(zeros if not c.bias else {}), **weights})
    return theirs.to(next(gpt.parameters()).dtype)


@pytest.mark.parametrize("activation, bias", [("gelu", True), ("gelu_new", True), ("gelu", False)])
@pytest.mark.parametrize("training", [False, True])
def test_logits_and_loss_are_hugging_faces_gpt2s(activation, bias, training):
    gpt = built(scale=8, n_layer=3, n_head=4, n_embd=32, activation=activation, bias=bias)
    theirs = hugging_face(gpt)
    gpt.train(training)
    theirs.train(training)
    idx = tokens(3, 16)
    with torch.no_grad():
        expected = theirs(idx).logits
        logits, loss = gpt(idx, idx.roll(-1, 1))
        last, _ = gpt(idx)
    assert expected.std() > 0.5  # far from flat, so that a difference would show
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(last, expected[:, -1:], atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, F.cross_entropy(expected.flatten(0, 1), idx.roll(-1, 1).flatten()), atol=1e-4, rtol=0)


def test_gradients_are_hugging_faces_gpt2s():
    """In float64, where a CPU goes through CPUAttention in training (and through its stretches: T > 64)."""
    gpt = built(scale=8, n_layer=2, n_head=2, block_size=150).double().train()
    theirs = hugging_face(gpt).train()
    idx, y = tokens(2, 150), tokens(2, 150, seed=4)
    gpt(idx, y)[1].backward()
    F.cross_entropy(theirs(idx).logits.flatten(0, 1), y.flatten()).backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in gpt.named_parameters():
        grad = expected[name].grad
        grad = grad.T if grad.shape != parameter.shape or ("c_" in name and grad.dim() == 2) else grad
        torch.testing.assert_close(parameter.grad, grad, atol=1e-9, rtol=1e-6)


def test_a_token_never_hangs_on_later_ones():
    gpt = built(scale=8).train()
    a, b = tokens(1, 16), tokens(1, 16)
    b[:, 9:] = (b[:, 9:] + 7) % 61
    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                first, second = gpt(a, a)[0], gpt(b, b)[0]
            assert torch.equal(first[:, :9], second[:, :9]) and not torch.equal(first[:, 9:], second[:, 9:])


def test_targets_of_minus_one_do_not_count():
    gpt = built(scale=8)
    idx, y = tokens(2, 16), tokens(2, 16, seed=4)
    y[0, 3:] = -1
    logits, loss = gpt(idx, y)
    rows = logits.double().log_softmax(-1)
    picked = [-rows[b, t, y[b, t]].item() for b in range(2) for t in range(16) if y[b, t] != -1]
    assert len(picked) == 19 and loss.item() == pytest.approx(sum(picked) / 19, abs=1e-5)


def test_more_tokens_than_block_size_are_refused():
    with pytest.raises(ValueError, match="block_size = 16"):
        built()(tokens(1, 17))


BAD_SIZES = [
    ("n_embd", 17), ("n_head", 3), ("n_layer", 0), ("n_head", 0), ("vocab_size", 0), ("block_size", -1),
    ("dropout", 1.0), ("dropout", -0.1), ("activation", "relu"),
]  # fmt: skip


@pytest.mark.parametrize("name, value", BAD_SIZES)
def test_sizes_that_make_no_model_are_refused_by_name(name, value):
    with pytest.raises(UserError, match=name):
        GPT(GPTConfig(**SMALL | {name: value}))


def test_cropping_the_context_leaves_what_fits_as_it_was():
    gpt = built(scale=8)
    idx = tokens(2, 10)
    before, loss = gpt(idx, idx)
    parameters = gpt.get_num_params(non_embedding=False)
    gpt.crop_block_size(10)
    assert gpt.config.block_size == 10 and gpt.transformer.wpe.weight.shape == (10, 16)
    assert gpt.get_num_params(non_embedding=False) == parameters - 6 * 16
    after, cropped_loss = gpt(idx, idx)
    assert torch.equal(before, after) and torch.equal(loss, cropped_loss)
    with pytest.raises(ValueError):
        gpt(tokens(1, 11))
    assert gpt.generate(idx, 5).shape == (2, 15)
    gpt(idx, idx)[1].backward()
    assert gpt.transformer.wpe.weight.grad.shape == (10, 16)
    with pytest.raises(UserError, match="block_size"):
        gpt.crop_block_size(11)


# ----------------------------------------------------------------------------------------------
# the loss of a large vocabulary


@pytest.mark.parametrize("V", [8192, 9001])
@pytest.mark.parametrize("rows, softmax_rows", [(2048, 64), (7, 3)])
def test_the_loss_of_a_large_vocabulary_is_the_plain_one_and_so_are_its_gradients(monkeypatch, V, rows, softmax_rows):
    monkeypatch.setattr(model_module, "LOSS_ROWS", rows)
    monkeypatch.setattr(model_module, "SOFTMAX_ROWS", softmax_rows)
    gpt = built(scale=8, vocab_size=V, n_layer=1).train()
    idx, y = tokens(3, 16, V=V), tokens(3, 16, seed=4, V=V)
    y[1, 5:9] = -1
    logits, loss = gpt(idx, y)
    assert logits is None
    (loss / 3).backward()
    grads = {name: parameter.grad.clone() for name, parameter in gpt.named_parameters()}
    gpt.zero_grad()
    monkeypatch.setattr(model_module, "LARGE_VOCABULARY", 1 << 20)
    logits, expected = gpt(idx, y)
    assert logits.shape == (3, 16, V)
    (F.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=-1) / 3).backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    for name, parameter in gpt.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, atol=1e-6, rtol=1e-4)
    gpt.eval()
    assert gpt(idx, y)[0].shape == (3, 16, V)


def test_the_loss_of_a_large_vocabulary_is_near_in_bfloat16_too():
    gpt = built(scale=8, vocab_size=8192, n_layer=1).train()
    idx, y = tokens(4, 16, V=8192), tokens(4, 16, seed=4, V=8192)
    exact = gpt(idx, y)[1]
    exact.backward()
    grads = {name: parameter.grad.clone() for name, parameter in gpt.named_parameters()}
    gpt.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = gpt(idx, y)[1]
    loss.backward()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(exact.item(), rel=0.01)
    for name, parameter in gpt.named_parameters():
        assert (parameter.grad - grads[name]).norm() < 0.03 * grads[name].norm(), name


# ----------------------------------------------------------------------------------------------
# dropout on a CPU


@pytest.mark.parametrize("p", [0.1, 0.2, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cpus_dropout_drops_alike_in_each_position_modulo_8(p, dtype):
    """Bytes of random words: were a bit of each word fixed, every eighth element would fare otherwise."""
    torch.manual_seed(0)
    n = 400_000
    mask = keep_mask(torch.empty(8 * n, dtype=dtype), p)
    assert mask.dtype == dtype
    values = mask.unique().tolist()
    really = 1 - 1 / values[1]  # the drop probability that the scale makes up for
    assert values[0] == 0 and really == pytest.approx(p, abs=1 / 512 if dtype == torch.float32 else 1 / 64)
    probability = round(256 * p) / 256
    assert values[1] == pytest.approx(1 / (1 - probability), rel=1e-6 if dtype == torch.float32 else 1 / 256)
    rates = (mask.view(n, 8) == 0).double().mean(0)
    error = math.sqrt(probability * (1 - probability) / n)
    assert (rates - probability).abs().max() < 5 * error, rates
    pairs = (mask.view(n, 8)[:, :-1] == 0) & (mask.view(n, 8)[:, 1:] == 0)  # neighbours do not know of each other
    assert (pairs.double().mean(0) - probability**2).abs().max() < 5 * math.sqrt(probability**2 / n)


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 9)])
def test_a_dropout_mask_has_any_shape_and_hangs_on_the_seed_alone(shape):
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(torch.stack([keep_mask(torch.empty(shape), 0.5) for _ in range(20)]))
    assert masks[0].shape == (20, *shape) and torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2])


def test_dropout_drops_in_training_forward_and_backward_and_never_in_evaluation():
    layer = model_module.Dropout(0.5)
    x = torch.randn(200, 50).requires_grad_()
    y = layer(x)
    y.sum().backward()
    kept = y != 0
    assert 0.45 < kept.double().mean() < 0.55
    assert torch.equal(y[kept], 2 * x[kept]) and torch.equal(x.grad, 2.0 * kept)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_acts_on_embeddings_attention_and_both_residuals():
    gpt = built(scale=8, dropout=0.5)
    idx = tokens(1, 16)
    assert torch.equal(gpt(idx)[0], gpt(idx)[0])
    gpt.train()
    for module in gpt.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0.5
    off = [m for m in gpt.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(off) == 1 + 2 * 2  # after the embeddings, and in each block after attention and after the MLP
    for module in off:
        module.p = 0.0
    assert not torch.equal(gpt(idx, idx)[0], gpt(idx, idx)[0])  # what is left is attention's own
    for block in gpt.transformer.h:
        block.attn.dropout = 0.0
    assert torch.equal(gpt(idx, idx)[0], gpt(idx, idx)[0])


# ----------------------------------------------------------------------------------------------
# attention on a CPU

LENGTHS = [1, 2, 63, 64, 65, 130, 600]


def heads(T, hs=8, n=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(T)
    return [torch.randn(n, T, hs, dtype=torch.float64, generator=generator).to(dtype).requires_grad_() for _ in range(3)]


def gradients(y, inputs):
    grad = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(y.dtype)
    return torch.autograd.grad(y, inputs, grad)


@pytest.mark.parametrize("T", LENGTHS)
def test_a_cpus_attention_is_attention_written_out_forward_and_backward(T):
    inputs = heads(T)
    ours, plain = CPUAttention.apply(*inputs, 0.0), attention(*inputs)
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=1e-9)
    for a, b in zip(gradients(ours, inputs), gradients(plain, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-9)


def test_a_cpus_attention_passes_torchs_gradient_check():
    assert torch.autograd.gradcheck(lambda *qkv: CPUAttention.apply(*qkv, 0.0), heads(66, hs=2, n=1))


@pytest.mark.parametrize("dtype, near", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize("T", [65, 256])
def test_a_cpus_attention_in_lower_precision_is_as_near_as_its_rounding(T, dtype, near):
    inputs = heads(T, hs=32, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    ours, plain = CPUAttention.apply(*inputs, 0.0), attention(*exact)
    assert ours.dtype == dtype
    for a, b in zip([ours, *gradients(ours, inputs)], [plain, *gradients(plain, exact)], strict=True):
        assert a.dtype == dtype and (a.double() - b).norm() < near * b.norm()


@pytest.mark.parametrize("T", [8, 64, 96])
def test_attention_dropout_is_one_mask_on_the_probabilities_forward_and_backward(T):
    """With the identity as v the output is the dropped matrix itself, which shows the mask."""
    q, k, _ = heads(T, hs=T, n=4)
    v = torch.eye(T, dtype=torch.float64).expand(4, T, T).clone().requires_grad_()
    torch.manual_seed(5)
    y = CPUAttention.apply(q, k, v, 0.25)
    seen = torch.ones(T, T, dtype=torch.bool).tril()
    keep = (y / attention(q, k, v)).detach()[:, seen]
    assert torch.all((keep.abs() < 1e-9) | ((keep - 4 / 3).abs() < 1e-9))  # 0.25 is 64 / 256, exactly
    mask = torch.zeros(4, T, T, dtype=torch.float64)
    mask[:, seen] = keep
    for a, b in zip(gradients(y, [q, k, v]), gradients(attention(q, k, v, mask), [q, k, v]), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-7)
    n = keep.numel()
    assert (keep < 0.5).double().mean() == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / n))


def test_attention_dropout_keeps_the_mean():
    q, k, v = (t.detach() for t in heads(40, n=2))
    torch.manual_seed(6)
    ys = torch.stack([CPUAttention.apply(q, k, v, 0.2) for _ in range(3000)])
    error = ys.std(0) / math.sqrt(len(ys))
    assert ((ys.mean(0) - attention(q, k, v)).abs() < 6 * error + 1e-12).all()


def test_a_model_with_dropout_has_its_own_mean_in_both_precisions():
    """The training pass with dropout, averaged, is near the pass without: one block, so nearly linear in it."""
    gpt = built(scale=2, n_layer=1, dropout=0.1)
    idx = tokens(2, 16)
    with torch.no_grad():
        exact = gpt(idx, idx)[1].item()
        gpt.train()
        for dtype in (torch.float32, torch.bfloat16):
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                losses = torch.stack([gpt(idx, idx)[1] for _ in range(300)])
            assert losses.std() > 0 and losses.mean().item() == pytest.approx(exact, abs=0.01)


# ----------------------------------------------------------------------------------------------
# optimizer, FLOPs


@pytest.mark.parametrize("bias", [True, False])
def test_matrices_and_embeddings_decay_and_the_rest_does_not(bias):
    gpt = built(bias=bias)
    optimizer = gpt.configure_optimizers(0.1, 3e-4, (0.8, 0.9), "cpu")
    assert type(optimizer) is torch.optim.AdamW
    names = {parameter: name for name, parameter in gpt.named_parameters()}
    decayed, others = ([names[p] for p in group["params"]] for group in optimizer.param_groups)
    matrices = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = ["wte", "wpe", *(f"h.{i}.{matrix}" for i in range(2) for matrix in matrices)]
    assert decayed == [f"transformer.{name}.weight" for name in expected]  # in this order in nanoGPT's checkpoints
    assert sorted(decayed + others) == sorted(names.values())
    assert len(others) == (2 * (2 + 2 + 4) + 2 if bias else 2 * 2 + 1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    for group in optimizer.param_groups:
        assert group["lr"] == 3e-4 and group["betas"] == (0.8, 0.9) and group["fused"]


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    gpt = built()
    optimizer = gpt.configure_optimizers(0.1, 3e-4, (0.8, 0.9), "cpu", "muon")
    names = {parameter: name for name, parameter in gpt.named_parameters()}
    groups = [sorted(names[p] for p in group["params"]) for group in optimizer.param_groups]
    hidden = sorted(n for n in names.values() if ".h." in n and "c_" in n and n.endswith("weight"))
    assert hidden in groups and sorted(sum(groups, [])) == sorted(names.values())
    before = {name: p.detach().clone() for p, name in names.items()}
    gpt(tokens(2, 16), tokens(2, 16, seed=4))[1].backward()
    optimizer.step()
    assert all(not torch.equal(before[name], p) for p, name in names.items() if p.grad.any())
    optimizer.zero_grad()
    assert all(p.grad is None for p in names)


def baby_gpt():
    """config/train_shakespeare_char.py's, whose log shared/seed/ holds."""
    return GPT(GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False))


def test_mfu_gives_the_three_figures_of_the_seeds_log():
    """iter 4980: 33.22 ms, mfu 11.07 %; iter 4990: 33.23 ms, 11.09 %; iter 5000: 4446.83 ms, 9.99 %."""
    gpt = baby_gpt()
    assert gpt.get_num_params() == 10_646_784  # by hand: 65 x 384 + 6 x (12 x 384^2 + 2 x 384) + 384
    mfu = gpt.estimate_mfu(64, 33.23e-3, 312e12)
    assert mfu == pytest.approx(0.1121, abs=5e-5)
    spike = gpt.estimate_mfu(64, 4446.83e-3, 312e12)

    def goes_on(running):  # what the log shows after a running average that it shows as 11.07
        first = 0.9 * running + 0.1 * mfu
        return f"{first * 100:.2f} {(0.9 * first + 0.1 * spike) * 100:.2f}"

    assert "11.09 9.99" in [goes_on(0.110651 + k * 1e-6) for k in range(99)]  # all that round to 11.07
    assert mfu * (6 * 10_646_784) / (6 * 10_646_784 + 12 * 6 * 384 * 256) == pytest.approx(0.1009, abs=5e-5)


def test_mfu_falls_with_time_and_peak_and_grows_with_sequences():
    gpt = built()
    one = gpt.estimate_mfu(1, 1.0, 1e12)
    assert gpt.estimate_mfu(8, 2.0, 4e12) == pytest.approx(one)
    # 6N + 12 L H Q T a token (PaLM, appendix B), 16 tokens a sequence
    assert one == pytest.approx((6 * gpt.get_num_params() + 12 * 2 * 2 * 8 * 16) * 16 / 1e12)


# ----------------------------------------------------------------------------------------------
# sampling


def naive(gpt, idx, n, temperature=1.0, top_k=None, seed=0, window_step=1, known=None):
    """One row at a time, the whole context anew for each token, by the textbook."""
    rows = []
    for row, prompt in enumerate(idx):
        generator = torch.Generator().manual_seed(seed + row)
        row, start, size = prompt.tolist(), 0, gpt.config.block_size
        start = max(0, len(row) - size)
        for _ in range(n):
            if len(row) - start > size:
                start = len(row) - max(1, size - window_step + 1)
            with torch.no_grad():
                logits = gpt(torch.tensor([row[start:]]))[0][0, -1]
            if known is not None:
                logits[~known] = -math.inf
            if temperature == 0:
                row.append(logits.argmax().item())
                continue
            probabilities = (logits / temperature).softmax(-1)
            if top_k:
                probabilities[logits < logits.sort(descending=True).values[min(top_k, len(logits)) - 1]] = 0
            row.append(torch.multinomial(probabilities / probabilities.sum(), 1, generator=generator).item())
        rows.append(row)
    return rows


def seeded(n, seed=0):
    return [torch.Generator().manual_seed(seed + k) for k in range(n)]


@pytest.mark.parametrize("length", [1, 5, 16, 20])
@pytest.mark.parametrize("window_step", [1, 2, 5, 16, 40])
def test_cached_decoding_draws_what_recomputing_everything_draws(length, window_step):
    """Within block_size and past it; with a longer step the window moves by that many tokens at once."""
    gpt = built(scale=8)
    idx = tokens(2, length)
    ids = gpt.generate(idx, 40, temperature=0.9, top_k=20, window_step=window_step, generators=seeded(2))
    assert ids.tolist() == naive(gpt, idx, 40, 0.9, 20, window_step=window_step)


@pytest.mark.parametrize("window_step", [1, 4])
def test_the_context_is_never_longer_than_block_size_nor_more_than_a_step_shorter(monkeypatch, window_step):
    gpt = built(scale=8)
    seen, forward = [], gpt.forward

    def watched(idx, targets=None, cache=None):
        seen.append(idx.size(1) + (cache.length if cache is not None else 0))
        return forward(idx, targets, cache)

    monkeypatch.setattr(gpt, "forward", watched)
    gpt.generate(tokens(1, 3), 50, window_step=window_step)
    assert len(seen) == 50 and seen[:13] == list(range(3, 16))[:13]
    assert max(seen) == 16 and min(seen[14:]) == 16 - window_step + 1


def test_temperature_0_takes_the_most_likely_token():
    gpt = built(scale=8)
    idx = tokens(3, 4)
    assert gpt.generate(idx, 30, temperature=0).tolist() == naive(gpt, idx, 30, temperature=0)


def test_a_low_temperature_draws_the_likely_and_a_high_one_nearly_anything():
    gpt = built(scale=8)
    idx = tokens(1, 16)
    probabilities = gpt(idx)[0][0, -1].softmax(-1).detach()
    many = idx.expand(4000, -1)
    for temperature in (0.5, 1.0, 3.0):
        torch.manual_seed(0)
        drawn = gpt.generate(many, 1, temperature=temperature)[:, -1].bincount(minlength=61) / 4000
        expected = probabilities ** (1 / temperature)
        expected /= expected.sum()
        assert ((drawn - expected).abs() < 5 * (expected / 4000).sqrt() + 1e-3).all()


@pytest.mark.parametrize("top_k", [1, 3, 61, 1000])
def test_top_k_draws_from_the_k_most_likely_only(top_k):
    gpt = built(scale=4)
    idx = tokens(1, 16)
    likely = gpt(idx)[0][0, -1].argsort(descending=True)[:top_k].tolist()
    drawn = gpt.generate(idx.expand(3000, -1), 1, temperature=2.0, top_k=top_k)[:, -1].unique().tolist()
    assert set(drawn) <= set(likely) and len(drawn) > 0.7 * min(top_k, 61)


@pytest.mark.parametrize("options", [dict(temperature=0), dict(temperature=1.5), dict(top_k=5)])
def test_tokens_that_are_not_known_are_never_drawn(options):
    """top_k counts the known ones: padding may not use up its places."""
    gpt = built(scale=4)
    known = torch.arange(61) % 3 == 0
    idx = tokens(50, 4)
    torch.manual_seed(1)
    drawn = gpt.generate(idx, 30, known=known, **options)[:, 4:]
    assert known[drawn].all()
    if options == dict(top_k=5):
        first = [set(gpt(row[None])[0][0, -1].masked_fill(~known, -math.inf).topk(5).indices.tolist()) for row in idx]
        assert all(token.item() in allowed for token, allowed in zip(drawn[:, 0], first, strict=True))
        torch.manual_seed(2)
        more = gpt.generate(idx[:1].expand(500, -1), 1, known=known, **options)[:, -1]
        assert len(more.unique()) > 1


def test_a_samples_text_does_not_hang_on_how_many_are_asked_for():
    gpt = built(scale=8)
    prompt = tokens(1, 5)
    three = gpt.generate(prompt.expand(3, -1), 40, generators=seeded(3, 7))
    for k in range(3):
        alone = gpt.generate(prompt, 40, generators=seeded(1, 7 + k))
        assert torch.equal(alone[0], three[k])
    assert not torch.equal(three[0], three[1])


def test_a_stream_yields_a_token_at_a_time_and_starts_with_the_prompts_end():
    gpt = built(scale=8)
    idx = tokens(2, 30)  # longer than block_size
    stream = gpt.stream(idx, 5, generators=seeded(2))
    parts = list(stream)
    assert [part.shape for part in parts] == [(2, 1)] * 5
    whole = gpt.generate(idx, 5, generators=seeded(2))
    assert torch.equal(torch.cat([idx, *parts], dim=1), whole)
    assert torch.equal(gpt.generate(idx, 0), idx)


def test_decoding_in_bfloat16_takes_mostly_the_float32_tokens():
    gpt = built(scale=8)
    idx = tokens(8, 4)
    exact = gpt.generate(idx, 10, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        near = gpt.generate(idx, 10, temperature=0)
    assert (exact[:, 4] == near[:, 4]).double().mean() >= 0.75


def test_the_golden_figures_are_those_that_the_project_was_given(shared):
    for path in (shared / "golden").iterdir():
        assert (GOLDEN / path.name).read_bytes() == path.read_bytes()
    with open(GOLDEN / "synthetic.csv", newline="") as f:
        assert len(list(csv.DictReader(f))) == 155
