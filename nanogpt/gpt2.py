"""Hugging Face's GPT-2 format: a folder with config.json, model.safetensors and a tokenizer, read and written.

Names of weights are nanoGPT's, behind an optional "transformer."; matrices are (in, out) there, (out, in) in nn.Linear.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from nanogpt.errors import UserError, require, writing
from nanogpt.text_file import read_text

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, in OpenAI's files and in nanoGPT's of torch 1


def find(name_or_path):
    """Paths of config.json and model.safetensors, of a folder or one of NAMES: in Hugging Face's cache, or fetched from
    the hub. UserError where there are none."""
    require(f"--init_from={name_or_path}", "safetensors")
    names = ("config.json", "model.safetensors")
    if os.path.exists(os.path.join(name_or_path, names[0])):  # a folder, even one called gpt2
        return [os.path.join(name_or_path, name) for name in names]
    if name_or_path not in NAMES:
        raise UserError(f"{name_or_path} is no folder with ckpt.pt or config.json, and not one of {', '.join(NAMES)}")
    require(f"--init_from={name_or_path}", "huggingface_hub")
    from huggingface_hub import hf_hub_download, logging, try_to_load_from_cache

    logging.set_verbosity_error()  # it would print each retry; the one line below says all
    for repository in (name_or_path, f"openai-community/{name_or_path}"):  # nanoGPT's name, and the hub's own
        cached = [try_to_load_from_cache(repository, name) for name in names]
        if all(isinstance(path, str) for path in cached):
            return cached
    try:
        return [hf_hub_download(repository, name) for name in names]
    except Exception as error:  # a missing network raises a dozen kinds
        raise UserError(
            f"{repository} is not in the Hugging Face cache and cannot be fetched ({type(error).__name__}): on a "
            f"machine with a network run hf download {repository} {' '.join(names)} --local-dir DIR, copy DIR to "
            "this one, and give --init_from=DIR"
        ) from None


def read_config(path):
    """The arguments for GPTConfig, all but dropout, in a config.json; UserError where it is damaged, or describes a
    model that GPT does not compute."""
    text = read_text(path)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{path}: it is no JSON") from None
    if not isinstance(found, dict) or found.get("model_type") != "gpt2":
        raise UserError(f"{path} is not of a GPT-2: its model_type is not gpt2")
    config = {"bias": True, "activation": found.get("activation_function", "gelu_new")}
    for name in ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd"):
        size = config["block_size" if name == "n_positions" else name] = found.get(name)
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {name} must be a whole number of at least 1, not {size!r}")
    computed = {  # the first value is transformers' default, taken where the key is missing
        "activation_function": ("gelu_new", "gelu"), "n_inner": (None, 4 * config["n_embd"]),
        "layer_norm_epsilon": (1e-5,), "tie_word_embeddings": (True,), "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,), "add_cross_attention": (False,),
    }  # fmt: skip
    for name, values in computed.items():
        if found.get(name, values[0]) not in values:
            raise UserError(f"{path}: {name} is {found[name]!r}: only {' or '.join(map(str, values))} can be loaded")
    return config


class WithoutInit(TorchFunctionMode):
    """A context in which new modules keep uninitialised weights: nothing is drawn, and no memory page is touched.
    torch.device("meta") would do the same, but its normal_ imports the whole compiler."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_):
            return None
        return func(*args, **(kwargs or {}))


def load_weights(make_model, config, path):
    """make_model(config), a GPT, with the weights in the safetensors file at `path`, which is memory-mapped and copied
    once, to float32. UserError where they do not fit."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = {}
        for name, tensor in load_file(path).items():
            if not name.endswith(MASKS):
                if not tensor.is_floating_point():
                    raise ValueError(f"{name} is not of floats")
                tensor = tensor.mT if name.endswith(TRANSPOSED) else tensor
                weights[f"transformer.{name.removeprefix('transformer.')}"] = tensor
        check_sizes(config, weights)
        wte = weights["transformer.wte.weight"]
        if not weights.pop("transformer.lm_head.weight", wte).equal(wte):
            raise ValueError("its lm_head is not tied to its wte")
        with WithoutInit():
            model = make_model(config)
        model.load_state_dict(weights | {"lm_head.weight": wte})
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded: {str(error)[:300]}") from None
    return model


def check_sizes(config, weights):
    """ValueError unless `weights`, {name: tensor} of a GPT, have the sizes in `config`: before such a model is made."""
    for name, rows in {"wte": config.vocab_size, "wpe": config.block_size}.items():
        tensor, size = weights.get(f"transformer.{name}.weight"), (rows, config.n_embd)
        if tensor is None or tensor.shape != size:
            raise ValueError(f"there is no {name} of size {size}")
    if sum(name.endswith(".ln_1.weight") for name in weights) != config.n_layer:
        raise ValueError(f"there are not n_layer = {config.n_layer} layers")


def write_folder(to, model, codec, tokenizer):
    """Writes `model` (a GPT) and `tokenizer`, the text of a tokenizer.json for its `codec`, to the folder `to`, whole
    or not at all. OSError where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    sizes, eot = model.config, codec.eot  # None where no id ends a document
    ends = {"bos_token_id": eot, "eos_token_id": eot}
    config = {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": sizes.vocab_size,
        "n_positions": sizes.block_size, "n_embd": sizes.n_embd, "n_layer": sizes.n_layer, "n_head": sizes.n_head,
        "activation_function": sizes.activation, "embd_pdrop": sizes.dropout, "attn_pdrop": sizes.dropout,
        "resid_pdrop": sizes.dropout, "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
        "torch_dtype": "float32",
    } | ends  # fmt: skip
    padding = [i for i in range(sizes.vocab_size) if not codec.known(i)]  # which sample.py does not draw either
    generation = ends | ({"suppress_tokens": padding} if padding else {})
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": sizes.block_size,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # a GPT-2 would add embeddings of token_type_ids
    }
    if eot is not None:
        about |= dict.fromkeys(("bos_token", "eos_token"), codec.end)
    contents = {"config": config, "generation_config": generation, "tokenizer_config": about}
    texts = {name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()}
    folder = os.path.abspath(to)
    temporary = f"{folder}.{os.getpid()}.tmp"  # beside it, and renamed once it is whole
    try:
        os.makedirs(temporary)
        with writing(to):
            for name, text in (texts | {"tokenizer": tokenizer}).items():
                Path(temporary, f"{name}.json").write_text(text, encoding="utf-8")
        save_file(_weights(model), os.path.join(temporary, "model.safetensors"), metadata={"format": "pt"})
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(temporary, folder)
    except SafetensorError as error:  # this library's word for a full disk
        raise OSError(f"could not write {to}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weights(model):
    """{name: tensor} as GPT-2's files have them: matrices (in, out), a bias everywhere, no head, since it is tied."""
    weights = {}
    for name, tensor in model.state_dict().items():
        tensor = (tensor.mT if name.endswith(TRANSPOSED) else tensor).contiguous()
        if ".h." in name or ".ln_f." in name:  # the module's own bias, where it has one, comes next
            weights[name.replace("weight", "bias")] = torch.zeros(tensor.shape[-1])
        weights[name] = tensor
    del weights["lm_head.weight"]
    return weights
