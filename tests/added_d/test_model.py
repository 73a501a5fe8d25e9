"""A model from nanoGPT's checkpoints."""

import pytest
import torch
from conftest import TINY, flags

from model import GPT, GPTConfig
from nanogpt.errors import UserError


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
def test_a_checkpoint_with_masks_samples_and_is_trained_on(run, project, tmp_path, prefix):
    run("train.py", *flags(TINY, out_dir=tmp_path))
    saved = torch.load(tmp_path / "last.pt", weights_only=True)
    keys = ("optimizer", "model_args", "iter_num", "best_val_loss", "config")
    nanogpts = {"model": with_masks(saved["model"], prefix)} | {key: saved[key] for key in keys}
    (tmp_path / "last.pt").unlink()
    torch.save(nanogpts, tmp_path / "ckpt.pt")
    run("sample.py", *flags(out_dir=tmp_path, device="cpu", num_samples=1, max_new_tokens=5))
    run("train.py", *flags(out_dir=tmp_path, init_from="resume", device="cpu", max_iters=10, lr_decay_iters=10))
