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
from data.text import Meter, encode_piece
from data.text_files import pieces, text_chunks
from model import GPT
from nanogpt import device as devices
from nanogpt.distributed import Processes
from nanogpt.errors import UserError
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
devices.set_up(device, processes.local_world_size)
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
    """Yields the ids of the text in `path`, part by part, and adds their bytes to `bytes_of_parts`."""
    for text in pieces(text_chunks([path]), codec.cuts_at_lines):
        ids, n_bytes = encode_piece(text, codec)
        bytes_of_parts.append(n_bytes)
        yield ids


def ids_of_split(path):
    """Yields the ids of the bin at `path`, part by part, each checked."""
    for position in range(0, n_predicted + 1, 1 << 20):  # a map's pages count as this process's memory while it is held
        ids = np.array(corpus.open(split)[position : position + (1 << 20)])
        check_ids(ids, vocab_size, path, position)
        yield ids


bytes_of_parts = []
if file:
    codec, chunks = trained.codec, ids_of_file(file)
    n_predicted = 0  # not known before the end
else:
    corpus = Dataset(dataset or trained.dataset or "openwebtext", 1, [split])
    if trained.tokens.same_as(corpus.tokens) is False:
        raise UserError(f"the tokens of {corpus.name} are not those of the model: they stand for other texts")
    why_unknown = "this tokenizer's normalizer may change a text, so an id does not tell its bytes"
    try:
        codec = corpus.tokens.codec
    except UserError as error:
        codec, why_unknown = None, error
    chunks, n_predicted = ids_of_split(corpus.bins[split]), len(corpus.open(split)) - 1
bytes_of = codec and bytes_of_ids(codec, vocab_size)
if bytes_of is None and not file and not corpus.facts:  # then the bytes of the whole are not known either
    processes.say(f"no bits per byte: {why_unknown}")

# ---- the loss ----------------------------------------------------------------------------------------------------

processes.join("auto", device)
model.to(device).eval()
meter = Meter("evaluating, tokens", n_predicted)
with devices.autocast(device, dtype):
    totals = evaluate(model, chunks, block_size, stride or block_size, batch_size, bytes_of, device, processes, meter)
if totals:
    if bytes_of is None:  # those of a token on average
        average = sum(bytes_of_parts) / (totals.tokens + 1) if file else corpus.bytes_per_token(split)
        totals.bytes = totals.tokens * average
    processes.say(totals.line(file or split))
model = trained = None
processes.leave()
