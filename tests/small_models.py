"""A small GPT for the tests that need no training run."""

import torch

from model import GPT, GPTConfig


def small(seed=0, **more):
    torch.manual_seed(seed)
    sizes = dict(block_size=12, vocab_size=23, n_layer=2, n_head=2, n_embd=16, bias=True)
    return GPT(GPTConfig(**sizes | more)).eval()


def shaken(model, by=0.5):
    """With weights so large that the model has opinions, and biases and norms that are not all alike."""
    torch.manual_seed(99)
    for parameter in model.parameters():
        parameter.data += by * torch.randn_like(parameter)
    return model
