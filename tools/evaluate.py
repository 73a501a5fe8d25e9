"""The exact loss of a trained model on a whole text: every token is predicted once, none is drawn at random.

    python tools/evaluate.py --out_dir=out-shakespeare-char
    python tools/evaluate.py --init_from=gpt2 --file=book.txt --stride=512
    torchrun --standalone --nproc_per_node=8 tools/evaluate.py --init_from=gpt2 --dataset=openwebtext

It prints nats a token, perplexity, bits per byte where the bytes are known, the number of predicted tokens, and the
standard error over windows of block_size tokens.
"""

import os
import sys
import time

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy as np
import torch

from configurator import configure
from data.bins import check_ids, check_size, open_bin
from data.folder import bin_path, bytes_per_token, check_described, read_facts, tokens_in
from data.pieces import pieces_for
from data.text import check_missing, text_chunks
from data.tokens import CharCodec, bytes_of_ids
from data.vocabulary import codec_of_folder, codec_of_run, has_codec, kept, kept_of_codec, same_tokens
from model import GPT
from nanogpt import checkpoint as ckpt
from nanogpt import device as devices
from nanogpt.distributed import Processes, pick_backend
from nanogpt.errors import ROOT, UserError
from nanogpt.evaluation import chunks_of, evaluate, pick_batch_size

# ---- settings ----------------------------------------------------------------------------------------------------

out_dir = "out"  # where train.py put its checkpoints
init_from = "resume"  # resume (the model in out_dir), a gpt2 name, or the folder of a model
split = "val"  # val or train, of the dataset
dataset = ""  # the folder under data/; empty: the run's own, and openwebtext for a GPT-2
file = ""  # a UTF-8 text to evaluate on in place of a split, in the run's tokens
stride = 0  # tokens that each window after the first predicts: fewer give each more context; 0: block_size
batch_size = 0  # windows computed at once; 0: as many as keep the device busy
device = "auto"  # cuda, cuda:N, mps or cpu
dtype = "float32"  # float32 for exact figures; bfloat16 and float16 are faster, and off in the third or fourth digit

settings = configure(globals())
settings.at_least(0, "stride batch_size")
settings.one_of(split=("val", "train"))
processes = Processes()
device = processes.own_device(devices.pick_device(device))
device_type = devices.set_up(device, processes.local_world_size)
torch.set_float32_matmul_precision("highest")  # no TF32: float32 here is for exact figures
dtype = devices.pick_dtype(dtype, device)

# ---- the model, and what its tokens stand for --------------------------------------------------------------------
why_unknown = codec = tokens_of_run = None
if init_from == "resume" or ckpt.has_run(init_from):
    checkpoint, path, remarks = ckpt.load_model_file(out_dir if init_from == "resume" else init_from)
    processes.say(*remarks)
    model = GPT.from_checkpoint(checkpoint, path)
    own_dataset = str(checkpoint["config"].get("dataset", ""))
    try:
        codec, remarks = codec_of_run(checkpoint, path, model.config.vocab_size)
        processes.say(*remarks)
    except UserError as error:
        why_unknown = error
        tokens_of_run = checkpoint if has_codec(checkpoint, path) else None
elif init_from.startswith("gpt2") or os.path.isdir(init_from):
    model = GPT.from_pretrained(init_from)
    own_dataset, codec = "openwebtext", codec_of_folder(init_from, model.config.vocab_size)
else:
    raise UserError(f"--init_from={init_from}: takes resume, a gpt2 name or a model's folder")
block_size, vocab_size = model.config.block_size, model.config.vocab_size
if stride > block_size:
    raise UserError(f"--stride={stride}: must be at most the model's block_size, {block_size}")

# ---- the text ----------------------------------------------------------------------------------------------------


def ids_of_file(path):
    """Yields the ids of the text in `path`, part by part, and counts them and their bytes in `of_file`."""
    of_characters = isinstance(codec, CharCodec)
    texts = text_chunks([path])
    for text in texts if of_characters else pieces_for(codec, texts):
        ids = np.array(codec.encode(text), dtype=np.int64) if of_characters else codec.encode_ordinary(text)
        if not of_characters:
            check_missing(codec.missing(text, ids))
        of_file["tokens"] += len(ids)
        of_file["bytes"] += len(text.encode())
        yield ids


def ids_of_split(path):
    """Yields the ids of the bin at `path`, part by part, each checked."""
    position = 0
    for ids in chunks_of(lambda: open_bin(path), 1 << 20):
        check_ids(ids, vocab_size, path, position)
        position += len(ids)
        yield ids


of_file = {"tokens": 0, "bytes": 0}
if file:
    if codec is None:
        raise why_unknown
    name, n_tokens, chunks = file, None, ids_of_file(file)
else:
    dataset = dataset or own_dataset
    data_dir = os.path.join(ROOT, "data", dataset)
    facts = read_facts(data_dir)
    path = bin_path(data_dir, split, facts)
    check_size(path, 1, dataset)
    if facts:
        check_described(path, split, facts)
    meta, tokenizer = tokens_in(data_dir, facts)
    theirs = kept(meta, tokenizer)
    mine = kept_of_codec(codec) if codec else tokens_of_run
    is_known = has_codec(theirs, data_dir)
    if mine and is_known and not same_tokens(mine, theirs):
        raise UserError(f"the tokens of {dataset} are not those of the model: they stand for other texts")
    if meta and meta["vocab_size"] != vocab_size and not (mine and is_known):
        raise UserError(f"{dataset} has {meta['vocab_size']} tokens and the model {vocab_size}: they differ")
    if not is_known:
        codec, why_unknown = None, why_unknown or f"{os.path.join(data_dir, 'meta.pkl')} has no characters"
    name, n_tokens, chunks = split, len(open_bin(path)), ids_of_split(path)
bytes_of = codec and bytes_of_ids(codec, vocab_size)
if bytes_of is None and not file and not facts:  # an id does not tell its bytes, and the whole's are not known either
    unclear = "this tokenizer's normalizer may change a text, so an id does not tell its bytes"
    processes.say(f"no bits per byte: {unclear if codec else why_unknown}")

# ---- the loss ----------------------------------------------------------------------------------------------------

processes.join(pick_backend("auto", device))
model.to(device).eval()
shown_at = time.monotonic()


def show(done):
    """Shows on stderr, once a second, how many tokens have been predicted."""
    global shown_at
    if processes.rank == 0 and time.monotonic() - shown_at > 1:
        shown_at = time.monotonic()
        share = f" of {n_tokens - 1:,} ({done / (n_tokens - 1):.0%})" if n_tokens else ""
        print(f"{done:,}{share} tokens".ljust(60), end="\r", file=sys.stderr, flush=True)


with devices.autocast(device, dtype):
    totals = evaluate(
        model, chunks, block_size, stride or block_size, batch_size or pick_batch_size(block_size, vocab_size),
        bytes_of, device, processes, show,
    )  # fmt: skip
if totals:
    if bytes_of is None and (file or facts):
        totals.bytes = totals.tokens * (of_file["bytes"] / of_file["tokens"] if file else bytes_per_token(facts, split))
    processes.say(totals.line(name))
model = None
processes.leave()
