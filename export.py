"""Writes a trained model as a Hugging Face GPT-2 folder, which transformers and its kin load.

    python export.py --out_dir=out-shakespeare-char --to=hf-shakespeare-char

The folder has config.json, generation_config.json, model.safetensors and the tokenizer. Needs: pip install safetensors
"""

import json
import os
import shutil

import torch

import checkpoint as ckpt
from configurator import UserError, configure, from_here
from data.tokens import BPECodec, codec_of_run
from model import TRANSPOSED

out_dir = "out"  # where train.py put its checkpoints
to = ""  # the folder to write; it must not exist, or be empty

configure(globals())
try:
    from safetensors import SafetensorError
    from safetensors.torch import save_file
except ImportError:
    raise UserError("export.py needs a library that is not here: pip install safetensors") from None
if not to:
    raise UserError("give the folder to write: --to=DIR")
if os.path.exists(to) and not (os.path.isdir(to) and not os.listdir(to)):
    raise UserError(f"--to={to} is there already, and is not an empty folder: give another, or move it away")


def gpt2_config(config, eot):
    """config.json of a model with that GPTConfig; `eot` is the id of <|endoftext|>, None where there is none."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": None,
        "activation_function": config.activation,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "resid_pdrop": config.dropout,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "torch_dtype": "float32",
    }


def gpt2_weights(model):
    """{name: tensor} as GPT-2's files have them: matrices (in, out), a bias everywhere, no head, since it is tied."""
    weights = {}
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            weights[name] = (tensor.mT if name.endswith(TRANSPOSED) else tensor).contiguous()
    for name in list(weights):
        if ".h." in name or ".ln_f." in name:
            bias = name.removesuffix("weight").removesuffix("bias") + "bias"
            weights.setdefault(bias, torch.zeros(weights[name].shape[-1]))  # a matrix has (in, out) here
    return weights


def char_tokenizer(codec):
    """tokenizer.json of a CharCodec: the text is cut after every character, and each is looked up."""
    cut = {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": codec.stoi, "unk_token": ""}
    return {"added_tokens": [], "pre_tokenizer": cut, "decoder": {"type": "Fuse"}, "model": model}


def bpe_tokenizer(codec):
    """tokenizer.json of GPT-2's byte pairs, whose format spells each byte as a visible character.

    Printable bytes of Latin-1 are spelt as they are, the others by the characters from U+0100 on. A token's
    merge is found by merging its bytes by all those before it, which leaves two parts.
    """
    tokens = [codec.piece(i) for i in range(codec.eot)]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    spelt = {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}

    def spell(token):
        return "".join(spelt[byte] for byte in token)

    merges = []
    for rank, token in enumerate(tokens):
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
            at = pairs.index(min(pairs))
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        if len(parts) == 2:
            merges.append([spell(part) for part in parts])
    end = {"id": codec.eot, "content": "<|endoftext|>", "special": True, "normalized": False}
    end |= {"single_word": False, "lstrip": False, "rstrip": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    vocab = {spell(token): rank for rank, token in enumerate(tokens)} | {end["content"]: codec.eot}
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    return {"added_tokens": [end], "pre_tokenizer": by_bytes, "decoder": by_bytes, "model": model}


def write_json(folder, name, content):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as f:
        json.dump(content, f, ensure_ascii=False, indent=2)
        f.write("\n")


checkpoint, path, remarks = ckpt.load_model_file(out_dir)
for remark in remarks:
    print(remark)
model = ckpt.build_model(checkpoint, path)
codec = codec_of_run(checkpoint, path, model.config.vocab_size)
bpe = isinstance(codec, BPECodec)
eot = codec.eot if bpe else None
generation = {"bos_token_id": eot, "eos_token_id": eot}
padding = [i for i in range(model.config.vocab_size) if not codec.known(i)]
if padding:  # ids that stand for no text, which sample.py does not draw either
    generation["suppress_tokens"] = padding
tokenizer = {"tokenizer_class": "GPT2TokenizerFast" if bpe else "PreTrainedTokenizerFast"}
tokenizer |= {"model_max_length": model.config.block_size, "clean_up_tokenization_spaces": False}
tokenizer["model_input_names"] = ["input_ids", "attention_mask"]  # a GPT-2 adds embeddings of token_type_ids, if any
if bpe:
    tokenizer |= {name: "<|endoftext|>" for name in ("bos_token", "eos_token", "unk_token")}
    tokenizer["add_prefix_space"] = False

folder = os.path.abspath(to)
temporary = f"{folder}.{os.getpid()}.tmp"  # beside it, to take its name once it is whole
try:
    os.makedirs(temporary)
    write_json(temporary, "config.json", gpt2_config(model.config, eot))
    write_json(temporary, "generation_config.json", generation)
    write_json(temporary, "tokenizer_config.json", tokenizer)
    write_json(temporary, "tokenizer.json", {"version": "1.0"} | (bpe_tokenizer if bpe else char_tokenizer)(codec))
    save_file(gpt2_weights(model), os.path.join(temporary, "model.safetensors"), metadata={"format": "pt"})
    if os.path.isdir(folder):
        os.rmdir(folder)
    os.rename(temporary, folder)
except SafetensorError as error:  # a full disk, as this library tells of it
    raise OSError(f"could not write {to}: {error}") from None
finally:
    shutil.rmtree(temporary, ignore_errors=True)
print(f"wrote {to} from {path}")
print(f"to sample from it: python {from_here('sample.py')} --init_from={to}")
