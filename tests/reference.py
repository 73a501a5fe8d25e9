"""nanoGPT's numbers computed anew, in the plainest way, for the tests to compare with.

Nothing here uses the project's code: weights are a dict of tensors under nanoGPT's names, attention
is written out, and the optimizer is torch's. test_model.py holds it against golden/ itself.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F


def fresh_weights(n_layer, n_embd, block_size, vocab_size, bias=False, **other):
    """GPT-2's initialisation from the global generator, in nanoGPT's order of draws."""
    wte, wpe = nn.Embedding(vocab_size, n_embd), nn.Embedding(block_size, n_embd)
    sizes = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}
    linear = {}
    for i in range(n_layer):
        for name, (ins, outs) in sizes.items():
            linear[f"transformer.h.{i}.{name}"] = nn.Linear(ins * n_embd, outs * n_embd, bias=bias)
    nn.Linear(n_embd, vocab_size, bias=False)  # lm_head draws too, and then takes wte's weights

    weights = {"transformer.wte.weight": wte.weight.data, "transformer.wpe.weight": wpe.weight.data}
    for weight in weights.values():
        weight.normal_(0.0, 0.02)
    for i in range(n_layer):
        for name in (f"transformer.h.{i}.ln_1", f"transformer.h.{i}.ln_2"):
            weights |= norm(name, n_embd, bias)
    for name, layer in linear.items():
        weights[f"{name}.weight"] = layer.weight.data.normal_(0.0, 0.02)
        if bias:
            weights[f"{name}.bias"] = torch.zeros_like(layer.bias)
    weights |= norm("transformer.ln_f", n_embd, bias)
    weights["transformer.wte.weight"].normal_(0.0, 0.02)  # a second time, as it is the head's as well
    for i in range(n_layer):
        for name in ("attn.c_proj", "mlp.c_proj"):
            weights[f"transformer.h.{i}.{name}.weight"].normal_(0.0, 0.02 / math.sqrt(2 * n_layer))
    return weights


def norm(name, n_embd, bias):
    return {f"{name}.weight": torch.ones(n_embd)} | ({f"{name}.bias": torch.zeros(n_embd)} if bias else {})


def logits_of(weights, idx, n_head):
    """Logits (B, T, V) of a GPT-2 with exact GELU."""

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def layer_norm(name, x):
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    B, T = idx.shape
    x = weights["transformer.wte.weight"][idx] + weights["transformer.wpe.weight"][:T]
    C = x.size(-1)
    for i in range(sum(name.endswith("ln_1.weight") for name in weights)):
        block = f"transformer.h.{i}"
        q, k, v = linear(f"{block}.attn.c_attn", layer_norm(f"{block}.ln_1", x)).split(C, dim=-1)
        q, k, v = (t.view(B, T, n_head, C // n_head).transpose(1, 2) for t in (q, k, v))
        y = attention(q, k, v).transpose(1, 2).reshape(B, T, C)
        x = x + linear(f"{block}.attn.c_proj", y)
        h = linear(f"{block}.mlp.c_fc", layer_norm(f"{block}.ln_2", x))
        x = x + linear(f"{block}.mlp.c_proj", h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))
    return layer_norm("transformer.ln_f", x) @ weights["transformer.wte.weight"].T


def attention(q, k, v, keep=1.0):
    """Causal attention, written out; `keep` multiplies the probabilities, as dropout does."""
    T = q.size(-2)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))
    scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -math.inf)
    return (scores.softmax(-1) * keep) @ v


def optimizer_of(weights, settings):
    """AdamW in nanoGPT's two groups, in the order of nanoGPT's parameters."""
    parameters = [w.requires_grad_() for w in (weights[name] for name in parameter_names(weights))]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings["weight_decay"]},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1.0, betas=(settings["beta1"], settings["beta2"]))


def parameter_names(weights):
    """nanoGPT's order of parameters: wte, wpe, the blocks, ln_f."""
    order = ["ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"]
    n_layer = sum(name.endswith("ln_1.weight") for name in weights)
    blocks = [f"transformer.h.{i}.{name}" for i in range(n_layer) for name in order]
    modules = ["transformer.wte", "transformer.wpe", *blocks, "transformer.ln_f"]
    return [f"{m}.{kind}" for m in modules for kind in ("weight", "bias") if f"{m}.{kind}" in weights]


def losses_of_a_run(tokens, s, checkpoint=None, first=0):
    """What nanoGPT's train.py computes, as conftest.parse() gives it but in numbers.

    tokens: {split: int64 tensor}; s: settings. With a `checkpoint` (weights, optimizer state) it
    resumes at iteration `first`.
    """
    torch.manual_seed(s["seed"])
    weights = fresh_weights(vocab_size=61, **s)
    if checkpoint:
        weights = {name: w.clone() for name, w in checkpoint[0].items() if name != "lm_head.weight"}
    optimizer = optimizer_of(weights, s)
    if checkpoint:
        lr_free = {k: v for k, v in optimizer.state_dict()["param_groups"][0].items() if k in ("fused", "foreach")}
        optimizer.load_state_dict(checkpoint[1])
        for group in optimizer.param_groups:
            group.update(lr_free)

    def batch(split):
        starts = torch.randint(len(tokens[split]) - s["block_size"], (s["batch_size"],)).tolist()
        rows = torch.stack([tokens[split][i : i + s["block_size"] + 1] for i in starts])
        return rows[:, :-1], rows[:, 1:]

    def loss_of(x, y):
        return F.cross_entropy(logits_of(weights, x, s["n_head"]).flatten(0, 1), y.flatten())

    found = []
    x, y = batch("train")
    for n in range(first, s["max_iters"] + 1):
        lr = learning_rate(n, s) if s["decay_lr"] else s["learning_rate"]
        for group in optimizer.param_groups:
            group["lr"] = lr
        if n % s["eval_interval"] == 0:
            with torch.no_grad():
                means = [
                    sum(loss_of(*batch(split)).item() for _ in range(s["eval_iters"])) / s["eval_iters"]
                    for split in ("train", "val")
                ]
            found.append(("step", n, *means))
        for _ in range(s["gradient_accumulation_steps"]):
            loss = loss_of(x, y)
            x, y = batch("train")
            (loss / s["gradient_accumulation_steps"]).backward()
        if s["grad_clip"]:
            nn.utils.clip_grad_norm_(list(weights.values()), s["grad_clip"])
        optimizer.step()
        optimizer.zero_grad()
        found.append(("iter", n, loss.item()))
    return found


def learning_rate(n, s):
    """Linear warm-up, then a cosine from learning_rate down to min_lr (Loshchilov & Hutter, arXiv:1608.03983)."""
    if n < s["warmup_iters"]:
        return s["learning_rate"] * (n + 1) / (s["warmup_iters"] + 1)
    if n > s["lr_decay_iters"]:
        return s["min_lr"]
    done = (n - s["warmup_iters"]) / (s["lr_decay_iters"] - s["warmup_iters"])
    return s["min_lr"] + 0.5 * (1 + math.cos(math.pi * done)) * (s["learning_rate"] - s["min_lr"])
