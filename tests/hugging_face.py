"""transformers' GPT-2s, small ones with random weights, for the tests of GPT-2's format, in and out."""

import json
import os

import torch
from conftest import TINY

offline = os.environ.get("HF_HUB_OFFLINE")
os.environ["HF_HUB_OFFLINE"] = "1"  # read as it is imported: nothing here may hang on a network
import transformers
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

if offline is None:
    del os.environ["HF_HUB_OFFLINE"]
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
# without what comes from the model
TUNE = {name: value for name, value in TINY.items() if name not in ("n_layer", "n_head", "n_embd", "bias")}
SMALL = dict(n_layer=2, n_head=2, n_embd=32, n_positions=64, vocab_size=97)


def gpt2(**settings):
    """A transformers GPT-2 with weights large enough that every part of it shows in the logits."""
    torch.manual_seed(1)
    settings = dict(bos_token_id=None, eos_token_id=None, initializer_range=0.3) | settings
    model = GPT2LMHeadModel(GPT2Config(**settings)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases 0 and gains 1 would hide a mix-up
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def folder_of(tmp_path, **settings):
    gpt2(**SMALL | settings).save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def ids_for(config):
    return torch.randint(config.vocab_size, (2, config.n_positions), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def differences(theirs, ours, ids):
    return (theirs(ids).logits - ours(ids, ids)[0]).abs().max().item()


def edit(path, **changes):
    """Changes keys of a JSON file."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps(content))


def edit_weights(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
