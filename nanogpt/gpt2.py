"""Hugging Face's GPT-2 format: a folder with config.json, model.safetensors and a tokenizer, read and written.

Names of weights are nanoGPT's, behind an optional "transformer."; matrices are (in, out) there, (out, in) in nn.Linear.
"""

import json
import os
import shutil

import torch
from torch.overrides import TorchFunctionMode

from nanogpt.errors import UserError, require, writing

NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")

# ----------------------------------------------------------------------------------------------
# in


def find(name_or_path):
    """(arguments for GPTConfig, all but dropout; path of the safetensors file), of a folder or one of NAMES.

    UserError where the files are missing or damaged, or describe a model that GPT does not compute.
    """
    require(f"--init_from={name_or_path}", "safetensors")
    config_path, path = _files(name_or_path)
    config = _read_config(config_path)
    if not os.path.isfile(path):
        raise UserError(f"there is no {path}")
    return config, path


def _files(name_or_path):
    """Paths of config.json and model.safetensors: in that folder, in Hugging Face's cache, or fetched from the hub."""
    names = ("config.json", "model.safetensors")
    if os.path.exists(os.path.join(name_or_path, names[0])):  # a folder, even one called gpt2
        return [os.path.join(name_or_path, name) for name in names]
    if name_or_path not in NAMES:
        if not os.path.isdir(name_or_path):
            raise UserError(f"{name_or_path} is neither a folder nor one of {', '.join(NAMES)}")
        raise UserError(f"there is neither a run (ckpt.pt) nor a GPT-2 (config.json) in {name_or_path}")
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


def _read_config(path):
    """The arguments for GPTConfig in a config.json; UserError where it describes a model that GPT does not compute."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            found = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or 'it is no JSON'}") from None
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

    torch.device("meta") would do the same, but its normal_ imports the whole compiler.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.init.normal_, torch.nn.init.uniform_, torch.nn.init.kaiming_uniform_):
            return None
        return func(*args, **(kwargs or {}))


def load_weights(make_model, config, path):
    """make_model(config), a GPT, with the weights in the safetensors file at `path`; UserError where they do not fit.

    The file is memory-mapped and copied once, to float32.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        stored = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
        check_sizes(config, {name: tensor.shape for name, tensor in stored.items()})
        wte = stored["wte.weight"]
        if not stored.pop("lm_head.weight", wte).equal(wte):
            raise ValueError("its lm_head is not tied to its wte")
        weights = {"lm_head.weight": wte}
        for name, tensor in stored.items():
            if not tensor.is_floating_point():
                raise ValueError(f"{name} is not of floats")
            if not name.endswith((".attn.bias", ".attn.masked_bias")):  # masks
                weights[f"transformer.{name}"] = tensor.mT if name.endswith(TRANSPOSED) else tensor
        with WithoutInit():
            model = make_model(config)
        model.load_state_dict(weights)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    return model


def check_sizes(config, shapes):
    """ValueError unless weights of these `shapes`, {name without "transformer.": shape}, have the sizes in `config`.

    Call it before a model of these sizes is made. It serves checkpoints too."""
    for name, rows in {"wte.weight": config.vocab_size, "wpe.weight": config.block_size}.items():
        size = [rows, config.n_embd]
        if name not in shapes or list(shapes[name]) != size:
            raise ValueError(f"{name} should be {size}, and is {shapes.get(name, 'missing')}")
    if sum(name.endswith(".ln_1.weight") for name in shapes) != config.n_layer:
        raise ValueError(f"they are not of n_layer = {config.n_layer}")


# ----------------------------------------------------------------------------------------------
# out


def write_folder(to, model, codec, tokenizer):
    """Writes `model` (a GPT) and `tokenizer`, the text of a tokenizer.json for its `codec`, to the folder `to`, whole
    or not at all. OSError where that fails."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    eot = codec.eot  # None where no id ends a document
    generation = {"bos_token_id": eot, "eos_token_id": eot}
    if padding := [i for i in range(model.config.vocab_size) if not codec.known(i)]:
        generation["suppress_tokens"] = padding  # ids that stand for no text, which sample.py does not draw either
    about = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.config.block_size,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],  # a GPT-2 would add embeddings of token_type_ids
    }
    if eot is not None:
        about |= dict.fromkeys(("bos_token", "eos_token"), codec.end)
    if eot is not None and not codec.tokenizer:  # GPT-2's own
        about |= {"tokenizer_class": "GPT2TokenizerFast", "unk_token": codec.end, "add_prefix_space": False}
    contents = {"config": _config(model.config, eot), "generation_config": generation, "tokenizer_config": about}
    texts = {name: json.dumps(content, ensure_ascii=False, indent=2) + "\n" for name, content in contents.items()}
    folder = os.path.abspath(to)
    temporary = f"{folder}.{os.getpid()}.tmp"  # beside it, and renamed once it is whole
    try:
        os.makedirs(temporary)
        with writing(to):
            for name, text in (texts | {"tokenizer": tokenizer}).items():
                with open(os.path.join(temporary, f"{name}.json"), "w", encoding="utf-8") as f:
                    f.write(text)
        save_file(_weights(model), os.path.join(temporary, "model.safetensors"), metadata={"format": "pt"})
        if os.path.isdir(folder):
            os.rmdir(folder)
        os.rename(temporary, folder)
    except SafetensorError as error:  # this library's word for a full disk
        raise OSError(f"could not write {to}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _config(config, eot):
    """config.json for a GPTConfig."""
    return {
        "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": config.vocab_size,
        "n_positions": config.block_size, "n_embd": config.n_embd, "n_layer": config.n_layer, "n_head": config.n_head,
        "n_inner": None, "activation_function": config.activation, "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout, "resid_pdrop": config.dropout, "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02, "tie_word_embeddings": True, "bos_token_id": eot, "eos_token_id": eot,
        "torch_dtype": "float32",
    }  # fmt: skip


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
