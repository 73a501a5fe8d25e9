"""OpenWebText in GPT-2's byte-pair tokens, which config/train_gpt2.py trains on.

usage: python data/openwebtext/prepare.py [--source=FOLDER] [--tokenizer=PATH]

Fetches some 8 million documents (13 GB, and 40 GB more in Hugging Face's cache, see HF_HOME), and
writes train.bin (17 GB) and val.bin (9 MB), each document ended by <|endoftext|>. If it is stopped,
the same command goes on where it was. Needs: pip install datasets
"""

import glob
import hashlib
import json
import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

import numpy as np

from configurator import configure
from data.bins import bin_name
from data.dataset import publish
from data.text import check_missing, data_folder, end_of_text, in_threads, pick_codec, print_next, say_end
from data.tokens import dtype_of
from nanogpt.device import usable_cores
from nanogpt.errors import UserError, require

# A copy in parquet: nanoGPT's "openwebtext" has a loading script, which `datasets` no longer runs.
source = "dylanebert/openwebtext"  # a hub dataset with a text column, or a folder of .jsonl, .parquet, .txt
tokenizer = ""  # a tokenizer.json, a folder that has one, or the name of an encoding of tiktoken's; empty: GPT-2's
name = "openwebtext"  # the dataset's name: the folder under data/ that it is written to

configure(globals())
require("data/openwebtext/prepare.py", "datasets", "tqdm")
from datasets import concatenate_datasets, load_dataset
from tqdm import tqdm

folder = data_folder(name)
progress_path = os.path.join(folder, "progress.tmp")
codec = pick_codec(tokenizer)
say_end(codec)
dtype = dtype_of(codec.vocab_size)


def load():
    """The documents of `source`, a Dataset with the one column "text".

    In a folder these are the "text" of every line of its .jsonl files, every row of its .parquet
    files, and every .txt file whole.
    """
    if not os.path.isdir(source):
        return load_dataset(source, split="train", num_proc=usable_cores()).select_columns("text")
    found = {}
    for kind in ("jsonl", "parquet", "txt"):
        found[kind] = sorted(glob.glob(f"{glob.escape(source)}/**/*.{kind}", recursive=True))
    # one .jsonl at a time, as they may differ in their other columns
    parts = [load_dataset("json", data_files=path, split="train") for path in found["jsonl"]]
    if found["parquet"]:
        parts.append(load_dataset("parquet", data_files=found["parquet"], split="train", columns=["text"]))
    if found["txt"]:
        parts.append(load_dataset("text", data_files=found["txt"], split="train", sample_by="document"))
    if not parts:
        raise UserError("there is no .jsonl, .parquet or .txt file in this folder")
    return concatenate_datasets([part.select_columns("text") for part in parts])


def encode(documents):
    """(ids of a few documents, (n,), each ended by <|endoftext|>; the bytes of their text)."""
    ids, length = [], 0
    for text in documents["text"]:
        if not isinstance(text, str):
            raise UserError(f"--source={source}: a document's text is {text!r}")
        for piece in codec.pieces([text.removeprefix("\ufeff")]):  # this mark is no text; all else stays as it is
            ids.append(codec.encode_ordinary(piece))
            check_missing(codec.missing(piece, ids[-1]))
            length += len(piece.encode())
        ids.append(end_of_text(codec))
    return np.concatenate(ids).astype(dtype), length


def tokenise(split, documents, progress, at_once=100):
    """Appends to the split's file the tokens of those `documents` that `progress` does not count as done."""
    done = progress[split]
    # Plain writes, no memory map: on a full disk they raise an error, where a map would end the process.
    with open(os.path.join(folder, bin_name(split, dtype) + ".tmp"), "ab") as f:
        f.truncate(dtype.itemsize * done["tokens"])  # what came after the last saved progress is done anew
        starts = range(done["documents"], len(documents), at_once)
        tasks = in_threads(lambda start: encode(documents[start : start + at_once]), starts)
        with tqdm(desc=split, total=len(documents), initial=done["documents"], unit=" documents") as bar:
            for count, (start, (ids, length)) in enumerate(zip(starts, tasks, strict=True), 1):
                f.write(ids.tobytes())
                done["tokens"] += len(ids)
                done["bytes"] += length
                done["documents"] = min(start + at_once, len(documents))
                bar.update(done["documents"] - start)
                if count % 10 == 0 or done["documents"] == len(documents):
                    f.flush()
                    os.fsync(f.fileno())
                    save(progress)


def save(progress):
    with open(progress_path + ".tmp", "w") as f:
        json.dump(progress, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(progress_path + ".tmp", progress_path)


try:
    documents = load()
except Exception as error:  # the libraries below raise a dozen kinds
    raise UserError(f"--source={source} cannot be loaded: {error.__cause__ or error}") from None
if len(documents) < 2:
    raise UserError(f"--source={source}: {len(documents)} document cannot be split into train and val")
print(f"{len(documents):,} documents")
parts = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)  # nanoGPT's split
splits = {"train": parts["train"], "val": parts["test"]}

os.makedirs(folder, exist_ok=True)
first = hashlib.sha256(str(splits["train"][0]["text"]).encode()).hexdigest()
progress = {"of": [source, len(documents), first] + [tokenizer] * bool(tokenizer)}
progress |= {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in splits}
if os.path.exists(progress_path):
    with open(progress_path) as f:
        saved = json.load(f)
    if saved["of"] != progress["of"]:
        raise UserError(f"{progress_path}: unfinished run on {saved['of'][0]}: finish it, or delete this")
    if any("bytes" not in saved[split] for split in splits):
        raise UserError(f"{progress_path}: unfinished run of an older version, which counted no bytes: delete this")
    for split in splits:
        path = os.path.join(folder, bin_name(split, dtype) + ".tmp")
        if os.path.exists(path) and os.path.getsize(path) >= dtype.itemsize * saved[split]["tokens"]:
            progress[split] = saved[split]
            print(f"going on after document {progress[split]['documents']:,} of {split}")
for split, documents in splits.items():
    tokenise(split, documents, progress)
publish(folder, codec.vocab_size, {split: progress[split]["bytes"] for split in splits}, tokenizer=codec.tokenizer)
os.remove(progress_path)
for split in splits:
    print(f"{split} has {progress[split]['tokens']:,} tokens")
print_next("config/train_gpt2.py", launcher="torchrun --standalone --nproc_per_node=8")
# train has 9,035,582,198 tokens
# val has 4,434,897 tokens
