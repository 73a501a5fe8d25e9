"""A GPT: the decoder-only transformer of GPT-2, its loss, its sampling and its FLOPs.

Shapes: B sequences of T tokens, C = n_embd channels, nh heads of hs = C / nh channels, V = vocab_size.
Source: "Language Models are Unsupervised Multitask Learners" (Radford et al. 2019), architecture and initialisation.
Names and shapes of the parameters are nanoGPT's: each program can load the other's checkpoints.
"""

import dataclasses
import math

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from nanogpt import decoding, gpt2, mfu, optim
from nanogpt.cpu_kernels import Dropout, attention
from nanogpt.cross_entropy import loss_in_chunks, mean_loss
from nanogpt.errors import UserError


@dataclasses.dataclass
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50304  # GPT-2's 50257, rounded up to a multiple of 64 for speed
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2; False is a little better and faster
    activation: str = "gelu"  # "gelu": x * Phi(x) exactly; "gelu_new": the tanh form of OpenAI's GPT-2

    def check(self):
        """Raises UserError if no model can have these values."""
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            if not isinstance(value := getattr(self, name), int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        size = 12 * self.n_layer * self.n_embd**2 + (self.vocab_size + self.block_size) * self.n_embd
        if size > 1e13:
            raise UserError(f"n_layer {self.n_layer} and n_embd {self.n_embd} make {size:.0e} parameters: too many")
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd must be divisible by n_head: {self.n_embd} by {self.n_head} is not")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        if self.activation not in ("gelu", "gelu_new"):
            raise UserError(f"activation must be gelu or gelu_new, not {self.activation}")

    def as_model_args(self):
        """The model_args of a checkpoint: nanoGPT's seven, and `activation` only if it is not "gelu", nanoGPT's own."""
        arguments = dataclasses.asdict(self)
        if self.activation == "gelu":
            del arguments["activation"]
        return arguments


class CausalSelfAttention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k and v of all heads
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x, cache=None, last_only=False):
        """x (B, T, C) to (B, T, C), or with `last_only` to (B, 1, C). cache: this layer's, of Step.extend()."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).split(C, dim=2)
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for t in (q, k, v))  # (B, nh, T, hs)
        if last_only:
            q = q[:, :, -1:]
        k, v, bias = decoding.store(cache, k, v) if cache is not None else (k, v, None)
        y = attention(q, k, v, self.dropout if self.training else 0.0, bias)  # causal
        y = y.transpose(1, 2).flatten(2)  # (B, T, C), heads side by side
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.gelu = nn.GELU(approximate={"gelu": "none", "gelu_new": "tanh"}[config.activation])
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x):
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, last_only=False):
        """With `last_only` (B, 1, C), all that sampling needs of the last block: a baby GPT samples 20 % faster."""
        residual = x[:, -1:] if last_only else x
        x = residual + self.attn(self.ln_1(x), cache, last_only)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, config):
        """Draws the weights in nanoGPT's order: the same seed gives the same ones. UserError as in config.check()."""
        super().__init__()
        config.check()
        self.config = config
        self.recompute = False  # activation checkpointing; not in the config, since it changes no number
        self.loss_only = False  # with targets forward() returns no logits, and saves their memory
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
            if name.endswith("c_proj.weight"):  # the residual stream adds 2 * n_layer of these outputs
                nn.init.normal_(parameter, mean=0.0, std=0.02 / math.sqrt(2 * config.n_layer))

    def hidden(self, idx, cache=None, last_only=False):
        """The hidden states (B, T, C) after ln_f of token ids `idx` (B, T); with `last_only` the last one, (B, 1, C).

        With a `cache` (a decoding.Step), `idx` continues its tokens: many into an empty cache, or one. ValueError where
        T is more than block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size = {self.config.block_size}")
        positions, layer_caches = cache.extend(T) if cache is not None else (slice(T), [None] * self.config.n_layer)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe.weight[positions])  # (B, T, C)
        for block, layer_cache in zip(self.transformer.h, layer_caches, strict=True):
            arguments = x, layer_cache, last_only and block is self.transformer.h[-1]
            if self.recompute and self.training:
                x = recompute_in_backward(block, *arguments, use_reentrant=False)
            else:
                x = block(*arguments)
        return self.transformer.ln_f(x)

    def forward(self, idx, targets=None, cache=None):
        """(logits, loss) for token ids `idx` (B, T), T <= block_size; `cache` as in hidden().

        With `targets` (B, T): logits (B, T, V), or None if self.loss_only is set, and the mean cross-entropy in nats of
        the positions whose target is not -1. With loss_only a large vocabulary's logits are never all in memory.
        Without: logits (B, 1, V) of the last position only, and None for the loss.
        """
        if targets is None:
            return self.lm_head(self.hidden(idx, cache, last_only=True)), None
        x = self.hidden(idx, cache)
        if self.loss_only:
            return None, loss_in_chunks(x, self.lm_head, targets)
        logits = self.lm_head(x)
        return logits, mean_loss(logits, targets)

    @classmethod
    def from_pretrained(cls, name_or_path, override_args=None):
        """A GPT with the weights of "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", or of a folder in that format.

        `override_args` may hold {"dropout": p}. Raises UserError where the files are missing, damaged or no GPT-2's.
        """
        config_path, path = gpt2.find(name_or_path)
        config = GPTConfig(**gpt2.read_config(config_path), **(override_args or {}))
        return gpt2.load_weights(cls, config, path)

    @classmethod
    def from_checkpoint(cls, checkpoint, path, dropout=0.0):
        """The GPT in `checkpoint`, a dict read from `path`; UserError where its weights do not fit its model_args."""
        weights = {name: tensor for name, tensor in checkpoint["model"].items() if not name.endswith(gpt2.MASKS)}
        try:
            config = GPTConfig(**checkpoint["model_args"] | {"dropout": dropout})
            gpt2.check_sizes(config, weights)
            model = cls(config)
            model.load_state_dict(weights)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"{path}: its weights do not fit its model_args: {str(error)[:300]}") from None
        return model

    def crop_block_size(self, block_size):
        """Shortens the context to `block_size` tokens: drops the position embeddings beyond it."""
        if block_size > self.config.block_size:
            raise UserError(f"block_size can be cropped to at most {self.config.block_size}, not to {block_size}")
        self.config.block_size = block_size
        self.transformer.wpe.weight = nn.Parameter(self.transformer.wpe.weight[:block_size].detach().clone())

    configure_optimizers = optim.configure_optimizers  # a method with nanoGPT's arguments, and `optimizer`

    def get_num_params(self, non_embedding=True):
        """How many parameters there are; the token embeddings count, because they are the head's weights too."""
        count = sum(p.numel() for p in self.parameters())
        return count - self.transformer.wpe.weight.numel() if non_embedding else count

    def flops_per_token(self):
        """Training FLOPs per token: 6N, and 12 L C T for the attention (PaLM, arXiv:2204.02311, appendix B)."""
        c = self.config
        return 6 * self.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def estimate_mfu(self, fwdbwd_per_iter, dt, peak_flops=None):
        """Model FLOPs utilisation, a fraction of 1: `fwdbwd_per_iter` sequences of block_size tokens in `dt` seconds.

        `peak_flops` is what the device could do a second; by default its peak at the 'auto' dtype.
        """
        peak_flops = peak_flops or mfu.auto_peak_flops(str(self.lm_head.weight.device))
        return self.flops_per_token() * self.config.block_size * fwdbwd_per_iter / (dt * peak_flops)

    def generate(self, idx, max_new_tokens, temperature=1.0, top_k=None, **options):
        """`idx` (B, T) with `max_new_tokens` sampled tokens appended: (B, T + max_new_tokens). See stream()."""
        tokens = self.stream(idx, max_new_tokens, temperature=temperature, top_k=top_k, **options)
        return torch.cat([idx, *tokens], dim=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, window_step=1, generators=None, step=None, **options):
        """Yields `max_new_tokens` times the next token (B, 1) of each row of `idx` (B, T).

        generators, and in options temperature, top_k, top_p and allowed: see nanogpt/sampling.py. In place of options,
        texts in turn may share a `step` = decoding.make_step(self, B, **options), and on CUDA its graphs.

        While the text fits in block_size, a cache holds the keys and values of all tokens but the last. After that the
        window moves, and with it the position of every token, so exact text (window_step 1) computes the whole window
        for each token. window_step k moves it k tokens at once, and the cache serves k - 1 tokens in between: many
        times faster, with a little less context.
        """
        size = self.config.block_size
        step = step or decoding.make_step(self, len(idx), **options)
        step.begin(generators)
        new = idx[:, -size:]
        for _ in range(max_new_tokens):
            new = step(new)
            idx = torch.cat([idx, new], dim=1)
            yield new
            if step.length == size:  # the window moves: compute it again
                step.length, new = 0, idx[:, -max(1, size - window_step + 1) :]
