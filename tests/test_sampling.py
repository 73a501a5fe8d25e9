"""The next token: temperature, top_k and top_p, against softmax, transformers and nanoGPT's way of drawing."""

import math

import pytest
import torch

from nanogpt import sampling


def sample_token(logits, *how, **more):
    return sampling.sample_token(logits, torch.empty_like(logits).exponential_(), *how, **more)


def test_top_k_draws_from_the_k_most_likely_and_from_all_of_them():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.5, -1.0, 2.9]])
    torch.manual_seed(0)
    drawn = [sample_token(logits, 1.0, 3).item() for _ in range(300)]
    assert set(drawn) == {1, 3, 5}
    assert {sample_token(logits, 1.0, 99).item() for _ in range(2000)} == set(range(6))


def test_temperature_sharpens_and_flattens_as_softmax_says():
    logits = torch.tensor([[1.0, 0.0]])
    torch.manual_seed(0)
    for temperature in (0.5, 1.0, 2.0):
        share = sum(sample_token(logits, temperature).item() == 0 for _ in range(4000)) / 4000
        assert share == pytest.approx(1 / (1 + math.exp(-1 / temperature)), abs=0.03)


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_top_p_draws_from_the_tokens_that_transformers_keeps(top_p):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    logits = torch.randn(4, 50) * 2
    kept = torch.isfinite(transformers.TopPLogitsWarper(top_p)(None, logits / 0.7))
    drawn = torch.zeros_like(kept)
    for _ in range(4000):
        drawn.scatter_(1, sample_token(logits, 0.7, None, top_p), True)
    assert not (drawn & ~kept).any()
    likely = (logits / 0.7).softmax(-1) > 0.01
    assert (drawn | ~(kept & likely)).all()


def test_top_p_or_top_k_off_draws_what_is_drawn_without_it():
    logits = torch.randn(3, 50)
    for top_k, kept in ((20, 20), (0, 50), (None, 50)):
        generators = [torch.Generator().manual_seed(k) for k in range(3)]
        noise = [torch.empty(1, 50).exponential_(generator=generator) for generator in generators]
        found = sampling.sample_token(logits, torch.cat(noise), 0.8, top_k, 1.0)
        generators = [torch.Generator().manual_seed(k) for k in range(3)]
        least = (logits / 0.8).topk(kept).values[:, -1:]
        probs = (logits / 0.8).masked_fill(logits / 0.8 < least, -torch.inf).softmax(-1)
        expected = [torch.multinomial(row, 1, generator=g) for row, g in zip(probs.split(1), generators, strict=True)]
        assert found.equal(torch.cat(expected))
