"""A GPT: the decoder-only transformer of GPT-2, forward pass, loss, optimizer groups, FLOPs and sampling.

Shapes are written beside the lines that make them: B sequences of T tokens, C = n_embd channels,
nh heads of hs = C / nh channels, V = vocab_size.

Sources: "Language Models are Unsupervised Multitask Learners" (GPT-2, Radford et al. 2019) for the
architecture and the initialisation; parameter names and shapes are nanoGPT's, so that checkpoints
go both ways.
"""

import inspect
import json
import math
import os
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute

from configurator import UserError, fast_bfloat16


@dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, padded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as GPT-2 has; False is a little better and faster
    activation: str = "gelu"  # 'gelu': x * Phi(x) exactly; 'gelu_new': the tanh form of OpenAI's GPT-2


# ----------------------------------------------------------------------------------------------
# What a CPU is slow at, done another way. CUDA and MPS have kernels of their own for these.


def dropped_lots(p):
    """How many of the 256 values of a byte mean "dropped": none for a p below 1/512."""
    return min(round(256 * p), 255)


def keep_scale(p):
    """What keeps the mean where keep_mask(x, p) drops: a factor by itself, as bfloat16 would round it in the mask."""
    return 256 / (256 - dropped_lots(p))


def keep_mask(x, p):
    """A mask like `x` for dropout: 0 with probability round(256 p) / 256, else 1.

    One random byte decides each element: 16 times as fast on a CPU as bernoulli_, which draws 64 bits
    for it. random_() alone would leave each int64's top bit 0, and drop every eighth element more
    often. The comparison writes x's own type, since a bool mask costs ten times as much to apply.
    """
    words = torch.empty((x.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
    lots = words.view(torch.uint8)[: x.numel()].view(x.shape)
    return torch.ge(lots, dropped_lots(p), out=torch.empty(x.shape, dtype=x.dtype))


class Dropout(nn.Dropout):
    def forward(self, x):
        if x.device.type == "cpu" and self.training and self.p > 0:
            return (x * keep_mask(x, self.p)).mul_(keep_scale(self.p))
        return super().forward(x)


class CPUAttention(torch.autograd.Function):
    """Causal attention over q, k, v (n, T, hs), with attention dropout, for a CPU.

    scaled_dot_product_attention there has a slow backward in bfloat16, and with dropout writes the
    whole (T, T) out several times over. This goes through the queries in stretches, and multiplies
    each by the keys up to its end only: for long T that is half the work.
    """

    @staticmethod
    def stretches(T):
        size = max(64, T // 8)
        return [(start, min(start + size, T)) for start in range(0, T, size)]

    @staticmethod
    def forward(ctx, q, k, v, p):
        T, ctx.scale, ctx.p = q.size(1), q.size(2) ** -0.5, p
        y = torch.empty_like(q)
        ahead = q.new_full((T, T), -math.inf).triu_(1)  # added to the scores: a query may not see later keys
        saved = []
        for start, stop in CPUAttention.stretches(T):
            att = torch.baddbmm(ahead[start:stop, :stop], q[:, start:stop], k[:, :stop].mT, alpha=ctx.scale)
            att = att.softmax(-1)  # (n, stretch, stop)
            saved.append(att)
            if p > 0:
                saved.append(keep_mask(att, p))
                att = att * saved[-1]
            part = y[:, start:stop]
            torch.baddbmm(part, att, v[:, :stop], beta=0, alpha=keep_scale(p), out=part)
        ctx.save_for_backward(q, k, v, *saved)
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, *saved = ctx.saved_tensors
        scale = ctx.scale * keep_scale(ctx.p)
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        saved = iter(saved)
        for start, stop in CPUAttention.stretches(q.size(1)):
            att, keep = next(saved), next(saved) if ctx.p > 0 else None
            dy = grad[:, start:stop]
            dv[:, :stop].baddbmm_((att * keep if ctx.p > 0 else att).mT, dy, alpha=keep_scale(ctx.p))
            datt = torch.bmm(dy, v[:, :stop].mT)
            if ctx.p > 0:
                datt.mul_(keep)
            datt = torch._softmax_backward_data(datt, att, -1, att.dtype)
            torch.baddbmm(dq[:, start:stop], datt, k[:, :stop], beta=0, alpha=scale, out=dq[:, start:stop])
            dk[:, :stop].baddbmm_(datt.mT, q[:, start:stop], alpha=scale)
        return dq, dk, dv, None


# ----------------------------------------------------------------------------------------------
# The loss of a large vocabulary. Logits (B T, V) and their gradient are most of a GPT-2's memory: here
# the logits of LOSS_ROWS tokens at most are there at once, and what is kept has the sizes of x and weight.

LARGE_VOCABULARY = 8192
LOSS_ROWS = 2048
CPU_SOFTMAX_ROWS = 32


def softmax_rows(x):
    """How many rows of logits are float32 at once: on a CPU so few that they stay in its cache.

    A compiler would write the loop over them out."""
    return CPU_SOFTMAX_ROWS if x.device.type == "cpu" and not torch.compiler.is_compiling() else LOSS_ROWS


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of the head's logits x @ weight.T, for x (N, C), weight (V, C), targets (N,).

    Products are taken in `dtype`, the softmax in float32. Both gradients are computed on the way
    forward, a chunk of rows at a time, and scaled by the incoming one on the way back.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, dtype):
        lower, count = weight.to(dtype), (targets != -1).sum()
        total = torch.zeros((), device=x.device)
        dx, dweight = torch.empty_like(x), None
        chunks = list(zip(*(t.split(LOSS_ROWS) for t in (x, targets[:, None], dx)), strict=True))
        for i, (x_rows, target_rows, dx_rows) in enumerate(chunks, start=1):
            x_rows = x_rows.to(dtype)
            logits = x_rows @ lower.mT  # (rows, V), and in its place softmax - onehot, the loss's gradient
            for part, target in zip(logits.split(softmax_rows(x)), target_rows.split(softmax_rows(x)), strict=True):
                ignored, target = target == -1, target.clamp(min=0)
                logp = part.float().log_softmax(-1)
                total -= logp.gather(1, target).masked_fill(ignored, 0).sum()
                grad = logp.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=logp.dtype))
                part.copy_(grad.mul_(~ignored))
            dx_rows.copy_(logits @ lower)
            if i == len(chunks):
                del lower  # the next product is as large
            product = logits.mT @ x_rows
            dweight = product if dweight is None else product.float().add_(dweight)
        ctx.save_for_backward(dx, dweight, count)
        return total / count

    @staticmethod
    def backward(ctx, grad):
        dx, dweight, count = ctx.saved_tensors
        return dx * (grad / count), dweight.to(dx.dtype, copy=True).mul_(grad / count), None, None


# ----------------------------------------------------------------------------------------------


WIDE = 768  # channels


def maybe_recompute(function, x):
    """function(x), which ends in a product. A wide model on a CPU keeps x alone and does it once more on the way back.

    What the product takes is made again (norm, GELU, weights in bfloat16), the product itself is not: its
    inputs are all that is asked for. A GPT-2's training at 2 x 1024 takes 6 % longer (with AMX), and 450 MB less.
    """
    if torch.is_grad_enabled() and x.device.type == "cpu" and x.size(-1) >= WIDE and not torch.compiler.is_compiling():
        return recompute(function, x, use_reentrant=False, preserve_rng_state=False)
    return function(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def heads(self, x):
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)  # (B, T, C) -> (B, nh, T, hs)

    def forward(self, x, norm, cache=None, last=False):
        qkv = maybe_recompute(lambda x: self.c_attn(norm(x)), x)  # (B, T, 3 C)
        q, k, v = map(self.heads, qkv.chunk(3, dim=2))
        if last:
            q = q[:, :, -1:]
        kept = cache.append(self, k, v) if cache is not None else None
        p = self.dropout if self.training else 0.0
        if kept and q.size(2) == 1:  # one query, which sees every key there is
            with torch.autocast(x.device.type, enabled=False):
                y = F.scaled_dot_product_attention(q.to(kept[0].dtype), *kept)
        elif x.device.type == "cpu" and q.size(2) > 1 and (p > 0 or q.dtype != torch.float32):
            y = CPUAttention.apply(*(t.flatten(0, 1) for t in (q, k, v)), p).view_as(q)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=q.size(2) > 1, dropout_p=p)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C), heads side by side
        return self.resid_dropout(maybe_recompute(self.c_proj, y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate={"gelu": "none", "gelu_new": "tanh"}[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x, norm):
        h = maybe_recompute(lambda x: self.c_fc(norm(x)), x)  # (B, T, 4 C)
        return self.dropout(maybe_recompute(lambda h: self.c_proj(self.gelu(h)), h))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, last=False):
        """x (B, T, C), or with `last` its last position (B, 1, C) only, which is all that a head of one token needs."""
        x = (x[:, -1:] if last else x) + self.attn(x, self.ln_1, cache, last)
        return x + self.mlp(x, self.ln_2)


class PackedLinear(nn.Module):
    """A Linear for inference in bfloat16 on a CPU, its weights kept as oneDNN multiplies them: the same numbers.

    F.linear packs them anew for each product, and for one token's that takes as long as all the rest.
    """

    def __init__(self, linear):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach().bfloat16(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach().bfloat16()

    def forward(self, x):
        return torch.ops.mkldnn._linear_pointwise(x.bfloat16(), self.packed, self.bias, "none", [], "")


class KVCache:
    """Keys and values of the tokens seen so far, so that decoding one more computes one more only.

    On a CPU they are float32: a single bfloat16 query takes scaled_dot_product_attention nine times as long.
    """

    def __init__(self, config, batch, device):
        self.shape = (batch, config.n_head, config.block_size, config.n_embd // config.n_head)
        self.device, self.length, self.kept = device, 0, {}

    def append(self, layer, k, v):
        """Adds k, v (B, nh, T, hs) of the next T tokens in `layer`; returns those of all tokens up to them."""
        if layer not in self.kept:
            dtype = torch.float32 if k.device.type == "cpu" else k.dtype
            self.kept[layer] = [torch.empty(self.shape, dtype=dtype, device=self.device) for _ in (k, v)]
        stop = self.length + k.size(2)
        for kept, new in zip(self.kept[layer], (k, v), strict=True):
            kept[:, :, self.length : stop] = new
        return [kept[:, :, :stop] for kept in self.kept[layer]]


class GPT(nn.Module):
    def __init__(self, config):
        """A model with freshly drawn weights, in nanoGPT's order of draws from the global generator.

        Raises UserError where the sizes in `config` make no model.
        """
        super().__init__()
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if getattr(config, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(config, name)}")
        size = 12 * config.n_layer * config.n_embd**2 + (config.vocab_size + config.block_size) * config.n_embd
        if size > 1e13:
            raise UserError(f"n_layer {config.n_layer} and n_embd {config.n_embd} make {size:.0e} parameters: too many")
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd must be divisible by n_head: {config.n_embd} by {config.n_head} is not")
        if not 0 <= config.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, not {config.dropout}")
        if config.activation not in ("gelu", "gelu_new"):
            raise UserError(f"activation must be gelu or gelu_new, not {config.activation}")
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "drop": Dropout(config.dropout),
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight  # tied, as in GPT-2

        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, mean=0.0, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):  # the residual stream sums 2 * n_layer of these: keep its variance
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def forward(self, idx, targets=None, cache=None):
        """(logits, loss) for token ids `idx` (B, T), T <= block_size.

        With `targets` (B, T): logits (B, T, V) and the mean cross-entropy in nats, positions whose
        target is -1 left out; in training with a large vocabulary None for the logits, which are never
        all there. Without: logits (B, 1, V) of the last position only, and None. With a
        `cache` (KVCache), `idx` goes on where the cache ends: many tokens into an empty one, or one.
        """
        start = cache.length if cache is not None else 0
        stop = start + idx.size(1)
        if stop > self.config.block_size:
            raise ValueError(f"{stop} tokens are more than block_size = {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start:stop]  # (B, T, C)
        x = self.transformer.drop(x)
        for i, block in enumerate(self.transformer.h, start=1):
            x = block(x, cache, last=targets is None and i == self.config.n_layer)
        x = self.transformer.ln_f(x)
        if cache is not None:
            cache.length = stop
        if targets is None:
            return self.lm_head(x[:, -1:]), None
        if self.training and self.config.vocab_size >= LARGE_VOCABULARY:
            kind = x.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
            return None, ChunkedCrossEntropy.apply(x.flatten(0, 1), self.lm_head.weight, targets.flatten(), dtype)
        logits = self.lm_head(x)
        rows, each = logits.flatten(0, 1), targets.flatten()
        if self.config.vocab_size < LARGE_VOCABULARY:
            return logits, F.cross_entropy(rows.float(), each, ignore_index=-1)
        parts = zip(rows.split(softmax_rows(x)), each.split(softmax_rows(x)), strict=True)
        total = sum(F.cross_entropy(row.float(), t, ignore_index=-1, reduction="sum") for row, t in parts)
        return logits, total / (each != -1).sum()

    @classmethod
    def from_pretrained(cls, name_or_path, dropout=0.0):
        """A GPT with the weights of one of GPT2_NAMES, or of a folder with a GPT-2's config.json and model.safetensors.

        They are read memory-mapped and copied once, to float32: the peak is the model and one tensor.
        Raises UserError where there are none, or they are damaged or no GPT-2's.
        """
        try:
            from safetensors import SafetensorError
        except ImportError:
            raise UserError(f"--init_from={name_or_path} needs a library: pip install safetensors") from None
        config_path, path = gpt2_files(name_or_path)
        config = gpt2_config(config_path, dropout)
        if not os.path.isfile(path):
            raise UserError(f"there is no {path}")
        try:
            return cls._from_safetensors(path, config)
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{path} cannot be loaded: {error}") from None

    @classmethod
    def _from_safetensors(cls, path, config):
        """The GPT of `config` with the weights in the safetensors file at `path`; ValueError where they are others."""
        from safetensors import safe_open

        def read(name):  # opened anew: pages once touched count as this process's for as long as a map is held
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        with safe_open(path, framework="pt") as file:
            stored = {name.removeprefix("transformer."): name for name in file.keys()}
            shapes = {name: file.get_slice(there).get_shape() for name, there in stored.items()}
        sizes = {"wte.weight": [config.vocab_size, config.n_embd], "wpe.weight": [config.block_size, config.n_embd]}
        for name, size in sizes.items():  # before a model of that size is made
            if shapes.get(name) != size:
                raise ValueError(f"{name} should be {size}, and is {shapes.get(name, 'missing')}")
        if sum(name.endswith(".ln_1.weight") for name in stored) != config.n_layer:
            raise ValueError(f"it is not of n_layer = {config.n_layer}")
        with WithoutInit():
            model = cls(config)
        weights = model.state_dict()
        del weights["lm_head.weight"]  # tied, so that most files leave it out
        for name, parameter in weights.items():
            name_there = stored.pop(name.removeprefix("transformer."), None)
            tensor = read(name_there) if name_there else torch.empty(0)
            tensor = tensor.mT if name.endswith(TRANSPOSED) and tensor.dim() == 2 else tensor
            if tensor.shape != parameter.shape or not tensor.is_floating_point():
                raise ValueError(f"{name} should be floats {list(parameter.shape)}, and is {list(tensor.shape)}")
            parameter.copy_(tensor)
        wte = weights["transformer.wte.weight"]
        if "lm_head.weight" in stored and not read(stored.pop("lm_head.weight")).float().equal(wte):
            raise ValueError("its lm_head is not tied to its wte")
        if others := [name for name in stored if not name.endswith((".attn.bias", ".attn.masked_bias"))]:  # the masks
            raise ValueError(f"it has weights that are not a GPT-2's: {', '.join(others[:3])}")
        return model

    def get_num_params(self, non_embedding=True):
        """How many parameters there are, by default without the position embeddings.

        The token embeddings count: they are the head's weights too.
        """
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding else count

    def crop_block_size(self, block_size):
        """Shortens the context to `block_size` tokens by dropping the positions beyond it."""
        if block_size > self.config.block_size:
            raise UserError(f"block_size can be cropped to at most {self.config.block_size}, not to {block_size}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type, optimizer="adamw"):
        """AdamW over two groups: matrices and embeddings, which decay, and biases and norms, which do not.

        Fused wherever torch has the kernel: one pass over the weights, no temporary copies. With
        `optimizer` "muon" the blocks' matrices go to Muon, and the rest to AdamW.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        hidden = [p for p in self.transformer.h.parameters() if p.dim() >= 2] if optimizer == "muon" else []
        taken = {id(p) for p in hidden}
        groups = [
            {"params": [p for p in parameters if p.dim() >= 2 and id(p) not in taken], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        adamw = AdamW(groups, lr=learning_rate, betas=betas, fused=device_type in ("cuda", "cpu", "mps"))
        if optimizer == "adamw":
            return adamw
        # match_rms_adamw scales Muon's step to the size of AdamW's, so that one learning rate serves both
        muon = Muon(hidden, learning_rate, weight_decay, betas[0], adjust_lr_fn="match_rms_adamw")
        return MuonWithAdamW(muon, adamw)

    def pack(self):
        """Makes every Linear a PackedLinear, for good: the model can be sampled from, but neither trained nor saved."""
        for module in list(self.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(module, name, PackedLinear(child))

    def flops_per_token(self):
        """Training FLOPs a token: 6N, and the attention's own products (PaLM, arXiv:2204.02311, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops):
        """Model FLOPs utilisation, a fraction of 1: `fwdbwd_per_iter` sequences of block_size tokens
        in `dt` seconds against a device that could do `peak_flops` a second."""
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / (dt * peak_flops)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """`idx` (B, T) with `max_new_tokens` sampled tokens appended: (B, T + max_new_tokens). See stream()."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, temperature, top_k, **options)], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, window_step=1, generators=None, known=None):
        """Yields `max_new_tokens` times the next token (B, 1) of each row of `idx` (B, T).

        temperature: divides the logits; 0 takes the most likely token. top_k: draw from the k most
        likely only. generators: one for each row, so that a row's text does not hang on the others;
        None draws all from the global one. known (V,) bool: tokens never drawn where False.

        While the text fits in block_size a cache holds the keys and values of all but its last token.
        After that the window moves, and with it every token's learned position, so exact text
        (window_step 1) computes the whole window each time. window_step k moves it k tokens at once,
        which leaves the cache good for k - 1 tokens: many times faster, with a little less context.
        """
        size = self.config.block_size
        cache, pending = KVCache(self.config, len(idx), idx.device), idx[:, -size:]
        for _ in range(max_new_tokens):
            if cache.length + pending.size(1) > size:
                cache.length, pending = 0, idx[:, -max(1, size - window_step + 1) :]
            full = pending.size(1) == size  # a cache of it has no room for a token more: none is filled
            logits = self(pending, cache=None if full else cache)[0][:, -1].float()  # (B, V)
            if full:
                cache.length = size
            if known is not None:
                logits = logits.masked_fill(~known, -math.inf)
            pending = choose(logits, temperature, top_k, generators)
            idx = torch.cat([idx, pending], dim=1)
            yield pending


# ----------------------------------------------------------------------------------------------
# GPT-2 weights in

GPT2_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # (in, out) in GPT-2's files, (out, in) in Linear


class WithoutInit(TorchFunctionMode):
    """Modules made within it keep their weights as the memory was found: nothing is drawn, and no page touched.

    torch.device("meta") would do, but its normal_ imports the whole compiler.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return None
        return func(*args, **(kwargs or {}))


def gpt2_files(name_or_path):
    """Paths of config.json and model.safetensors: in that folder, or of that one of GPT2_NAMES, from the
    Hugging Face hub unless its cache has them. UserError where they cannot be had."""
    names = ("config.json", "model.safetensors")
    if name_or_path not in GPT2_NAMES:
        if not os.path.isdir(name_or_path):
            raise UserError(f"{name_or_path} is neither a folder nor one of {', '.join(GPT2_NAMES)}")
        return [os.path.join(name_or_path, name) for name in names]
    try:
        from huggingface_hub import hf_hub_download, logging, try_to_load_from_cache
    except ImportError:
        raise UserError(f"{name_or_path} needs two libraries: pip install huggingface_hub safetensors") from None
    logging.set_verbosity_error()  # its retries; the one line below says it all
    for repository in (name_or_path, f"openai-community/{name_or_path}"):  # nanoGPT's name, and the hub's own
        cached = [try_to_load_from_cache(repository, name) for name in names]
        if all(isinstance(path, str) for path in cached):
            return cached
    try:
        return [hf_hub_download(repository, name) for name in names]
    except Exception as error:  # a missing network has a dozen kinds
        raise UserError(
            f"{repository} is not in the Hugging Face cache and cannot be fetched ({type(error).__name__}): on a "
            f"machine with a network run hf download {repository} {' '.join(names)} --local-dir DIR, copy DIR to "
            "this one, and give --init_from=DIR"
        ) from None


def gpt2_config(path, dropout):
    """The GPTConfig of a Hugging Face config.json; UserError where it tells of a model that GPT does not compute."""
    try:
        with open(path, encoding="utf-8") as f:
            found = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'it is no JSON'}") from None
    if not isinstance(found, dict) or found.get("model_type") != "gpt2":
        raise UserError(f"{path} is not of a GPT-2: its model_type is not gpt2")
    names = ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd")
    sizes = [found.get(name) for name in names]
    for name, size in zip(names, sizes, strict=True):
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {name} must be a whole number of at least 1, not {size!r}")
    computed = {  # what is taken for a key that is missing, as transformers does, stands first
        "activation_function": ("gelu_new", "gelu"), "n_inner": (None, 4 * sizes[-1]), "layer_norm_epsilon": (1e-5,),
        "tie_word_embeddings": (True,), "scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }  # fmt: skip
    for name, values in computed.items():
        if found.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {found[name]!r}: only {' or '.join(map(str, values))} can be loaded")
    return GPTConfig(*sizes, dropout, bias=True, activation=found.get("activation_function", "gelu_new"))


def maps(p):
    """The linear maps in p, a matrix of a block or its gradient: c_attn has three, which give q, k and v, else one.

    Apart they learn faster: config/train_shakespeare_cpu.py's val loss after 350 iterations was 0.035 lower so.
    """
    return p.chunk(3) if len(p) == 3 * p.size(1) else (p,)


class Lean:
    """torch.optim.Optimizer's methods without their wrappers for torch.compile, which import all of the compiler: a
    second of each start. train.py compiles the model, never an optimizer."""

    add_param_group = inspect.unwrap(torch.optim.Optimizer.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.Optimizer.zero_grad)
    state_dict = inspect.unwrap(torch.optim.Optimizer.state_dict)
    load_state_dict = inspect.unwrap(torch.optim.Optimizer.load_state_dict)


class AdamW(Lean, torch.optim.AdamW):
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


class Muon(Lean, torch.optim.Muon):
    """torch.optim.Muon over those maps(), all of one shape, or its transpose, orthogonalised as one batch: its numbers.

    One by one, a small model's matrices keep no device busy: a batch is up to three times as fast. A CPU
    that is slow at bfloat16 takes float32.
    """

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(tuple(sorted(maps(p)[0].shape)), []).append(p)
            for (_, longer), parameters in shapes.items():
                lower = torch.bfloat16 if parameters[0].is_cuda or fast_bfloat16() else torch.float32
                means = (self.momentum(p, group["momentum"], group["nesterov"]).to(lower) for p in parameters)
                updates = [update for mean in means for update in maps(mean)]
                x = torch.stack([u.mT if len(u) > u.size(1) else u for u in updates])  # (maps, shorter, longer)
                del updates
                x = newton_schulz(x, group["ns_coefficients"], group["ns_steps"], group["eps"])
                lr, scale = group["lr"], 0.2 * math.sqrt(longer)  # match_rms_adamw: arXiv:2502.16982
                parts = [part for p in parameters for part in maps(p)]
                for part, update in zip(parts, x, strict=True):
                    part.mul_(1 - lr * group["weight_decay"])
                    part.add_(update.mT if len(part) > part.size(1) else update, alpha=-lr * scale)

    def momentum(self, p, beta, nesterov):
        """The running mean of p's gradients with this one in it, or what Nesterov steps along."""
        state = self.state[p]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(p)
        mean = state["momentum_buffer"].lerp_(p.grad, 1 - beta)
        return p.grad.lerp(mean, beta) if nesterov else mean


def newton_schulz(x, coefficients, steps, eps):
    """x (n, rows, columns), rows <= columns, with the singular values of each matrix brought near 1 (0.7 to 1.2)."""
    a, b, c = coefficients
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class MuonWithAdamW:
    """Two optimizers as one: Muon (Jordan et al. 2024; torch.optim.Muon) for hidden matrices, AdamW for the rest."""

    def __init__(self, muon, adamw):
        self.parts = {"muon": muon, "adamw": adamw}

    @property
    def param_groups(self):
        return [group for part in self.parts.values() for group in part.param_groups]

    def step(self):
        for part in self.parts.values():
            part.step()

    def zero_grad(self, set_to_none=True):
        for part in self.parts.values():
            part.zero_grad(set_to_none)

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def choose(logits, temperature, top_k, generators):
    """A token for each row of `logits` (B, V): (B, 1). See GPT.stream()."""
    if temperature < 1e-6:  # the most likely alone has a chance, and the quotient would overflow
        return logits.argmax(-1, keepdim=True)
    logits = logits / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    probs = F.softmax(logits, dim=-1)
    if generators is None:
        return torch.multinomial(probs, 1)
    rows = zip(probs.split(1), generators, strict=True)
    return torch.cat([torch.multinomial(row, 1, generator=generator) for row, generator in rows])
