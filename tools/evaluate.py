"""The exact loss of a trained model on a whole text: every token is predicted once, none is drawn at random.

    python tools/evaluate.py --out_dir=out-shakespeare-char
    python tools/evaluate.py --init_from=gpt2 --file=book.txt --stride=512
    torchrun --standalone --nproc_per_node=8 tools/evaluate.py --init_from=gpt2 --dataset=openwebtext

It prints nats a token, perplexity, bits per byte where the bytes are known, the number of predicted tokens, and the
standard error over windows of block_size tokens.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))

import numpy as np
import torch

from configurator import configure
from data.bins import check_ids
from data.codecs import bytes_of_ids
from data.dataset import Dataset
from data.pretrained import Pretrained
from data.text import encode_piece
from data.text_files import pieces, text_chunks
from model import GPT
from nanogpt import device as devices
from nanogpt.distributed import Processes
from nanogpt.errors import UserError
from nanogpt.meter import Meter
from tools.evaluation import evaluate

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

# ---- the model ---------------------------------------------------------------------------------------------------
trained = Pretrained.load(GPT, init_from, out_dir)
processes.say(*trained.remarks)
model = trained.model
block_size, vocab_size = model.config.block_size, model.config.vocab_size
if stride > block_size:
    raise UserError(f"--stride={stride}: must be at most the model's block_size, {block_size}")

# ---- the text ----------------------------------------------------------------------------------------------------


def ids_of_file(path):
    """Yields the ids of the text in `path`, part by part, and counts them and their bytes in `of_file`."""
    for text in pieces(text_chunks([path]), codec.cuts_at_lines):
        ids, n_bytes = encode_piece(text, codec)
        of_file["tokens"] += len(ids)
        of_file["bytes"] += n_bytes
        yield ids


def ids_of_split(path):
    """Yields the ids of the bin at `path`, part by part, each checked."""
    for position in range(0, n_tokens, 1 << 20):  # a map's pages count as this process's memory while it is held
        ids = np.array(corpus.open(split)[position : position + (1 << 20)])
        check_ids(ids, vocab_size, path, position)
        yield ids


of_file = {"tokens": 0, "bytes": 0}
if file:
    facts, codec = None, trained.codec
    name, n_tokens, chunks = file, None, ids_of_file(file)
else:
    corpus = Dataset(dataset or trained.dataset or "openwebtext", 1, [split])
    if trained.tokens.same_as(corpus.tokens) is False:
        raise UserError(f"the tokens of {corpus.name} are not those of the model: they stand for other texts")
    why_unknown = "this tokenizer's normalizer may change a text, so an id does not tell its bytes"
    try:
        codec = corpus.tokens.codec
    except UserError as error:
        codec, why_unknown = None, error
    facts, path = corpus.facts, corpus.bins[split]
    name, n_tokens, chunks = split, len(corpus.open(split)), ids_of_split(path)
bytes_of = codec and bytes_of_ids(codec, vocab_size)
if bytes_of is None and not file and not facts:  # then the bytes of the whole are not known either
    processes.say(f"no bits per byte: {why_unknown}")

# ---- the loss ----------------------------------------------------------------------------------------------------

processes.join("auto", device)
model.to(device).eval()
meter = Meter("evaluating, tokens", n_tokens - 1 if n_tokens else 0)

with devices.autocast(device, dtype):
    totals = evaluate(model, chunks, block_size, stride or block_size, batch_size, bytes_of, device, processes, meter)
if totals:
    if bytes_of is None and (file or facts):
        totals.bytes = totals.tokens * (of_file["bytes"] / of_file["tokens"] if file else corpus.bytes_per_token(split))
    processes.say(totals.line(name))
model = trained = None
processes.leave()
