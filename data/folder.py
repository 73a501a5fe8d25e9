"""A dataset's folder on disk: its bins, and dataset.json, which says what they are. Read, and written whole.

dataset.json has
    dtype            "uint16" or "uint32", of the ids in the bins (data/bins.py)
    vocab_size       ids go from 0 to below it
    tokens, bytes    {split: n}: how many tokens, and how many bytes of text they stand for
    fingerprints     {split: fingerprint of its bin}
    tokenizer        {"file", "sha256"} of meta.pkl (characters) or of a tokenizer.json; null: GPT-2's tokens
A folder without it is nanoGPT's, or another program has written it: what lies there counts.
"""

import hashlib
import json
import math
import os
import pickle

import numpy as np

from data.bins import SPLITS, bin_name, dtype_in, dtype_of, fingerprint
from data.meta import read_meta
from data.tokenizer import LARGEST_ID
from nanogpt.errors import UserError, writing
from nanogpt.text_file import read_text

FACTS = "dataset.json"
TOKENS = ("meta.pkl", "tokenizer.json")  # what the ids stand for, unless they are GPT-2's

# ----------------------------------------------------------------------------------------------
# reading


def read_facts(folder):
    """What dataset.json in `folder` says; None where there is none. UserError where it is not one."""
    path = os.path.join(folder, FACTS)
    if not os.path.exists(path):
        return None
    try:
        with open(path, encoding="utf-8") as f:
            facts = json.load(f)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no JSON'}") from None
    if problem := _problem(facts):
        raise UserError(f"{path} is not a dataset's: {problem}")
    return facts


def _problem(facts):
    """What is wrong with the content of a dataset.json, in a few words; None where it has its form."""
    if not isinstance(facts, dict) or facts.get("dtype") not in ("uint16", "uint32"):
        return "it has no dtype, uint16 or uint32"
    if "tokenizer" not in facts:
        return "it does not say which tokenizer it has"
    size = facts.get("vocab_size")
    if type(size) is not int or not 1 <= size <= LARGEST_ID + 1:
        return f"it has no vocab_size from 1 to {LARGEST_ID + 1:,}"
    for key, kind in (("tokens", int), ("bytes", int), ("fingerprints", str)):
        found = facts.get(key)
        if not isinstance(found, dict) or any(type(found.get(split)) is not kind for split in SPLITS):
            return f"it has no {key} of train and val"
        if kind is int and any(not 0 <= found[split] < 1 << 60 for split in SPLITS):
            return f"its {key} of train and val cannot be"
    tokenizer = facts.get("tokenizer")
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, dict) or tokenizer.get("file") not in TOKENS:
        return "its tokenizer is neither null nor a meta.pkl or a tokenizer.json"
    return None if isinstance(tokenizer.get("sha256"), str) else "its tokenizer has no sha256"


def tokens_in(folder, facts):
    """(meta, text of the tokenizer.json) of the dataset in `folder`, whose read_facts() are `facts`.

    One is None, and both are if its tokens are GPT-2's. UserError where the file that dataset.json names is missing, or
    has changed since. Without dataset.json it is the file that is there."""
    if facts:
        name = facts["tokenizer"] and facts["tokenizer"]["file"]
    else:
        name = next((name for name in TOKENS if os.path.exists(os.path.join(folder, name))), None)
    if not name:
        return None, None
    path = os.path.join(folder, name)
    if facts and not os.path.isfile(path):
        raise UserError(f"{path} is missing, and without it the dataset's ids stand for nothing: prepare it again")
    if facts and sha256_of(path) != facts["tokenizer"]["sha256"]:
        raise UserError(
            f"{path} has changed since the dataset was prepared: prepare it again, or put the old file back"
        )
    return (read_meta(path), None) if name == "meta.pkl" else (None, read_text(path))


def sha256_of(path):
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def bytes_per_token(facts, split):
    """How many bytes of text a token of the split stands for, on average, by a dataset's read_facts(); NaN without."""
    return facts["bytes"][split] / max(1, facts["tokens"][split]) if facts else math.nan


def bin_path(folder, split, facts):
    """The path of the split's bin in the dataset's `folder`, whose read_facts() are `facts`.

    Without dataset.json it is uint16, unless there is one in uint32 alone."""
    narrow, wide = (os.path.join(folder, bin_name(split, dtype)) for dtype in ("uint16", "uint32"))
    if facts and facts["dtype"] == "uint32" and os.path.exists(narrow) and os.path.exists(wide):
        raise UserError(f"{wide} and {narrow} are both there, and {FACTS} describes the first: remove one, or {FACTS}")
    if facts:
        return wide if facts["dtype"] == "uint32" else narrow
    return wide if os.path.exists(wide) and not os.path.exists(narrow) else narrow


def check_described(path, split, facts):
    """UserError where the split's bin at `path` is not the one that dataset.json, with content `facts`, describes."""
    size = facts["tokens"][split] * dtype_in(path).itemsize
    if (size, facts["fingerprints"][split]) != (os.path.getsize(path), fingerprint(path)):
        raise UserError(
            f"{path} is not the one that {FACTS} beside it describes: prepare the dataset again, or remove "
            f"{FACTS} if another program has written the bins"
        )


# ----------------------------------------------------------------------------------------------
# writing


def write_dataset(folder, train, val, vocab_size, meta=None, tokenizer=None):
    """Writes a dataset to `folder`, each file whole, and all of them or none; returns how many tokens each split has.

    train, val: iterables of (ids, the number of bytes they stand for). `meta` is that of characters, `tokenizer` the
    text of a tokenizer.json; without both the tokens are GPT-2's. UserError where an id is not below `vocab_size`.
    """
    os.makedirs(folder, exist_ok=True)
    dtype, n_bytes = dtype_of(vocab_size), dict.fromkeys(SPLITS, 0)
    try:
        for split, arrays in zip(SPLITS, (train, val), strict=True):
            path = os.path.join(folder, bin_name(split, dtype) + ".tmp")
            with open(path, "wb") as f:
                for ids, length in arrays:
                    if len(ids) and ids.max() >= vocab_size:
                        raise UserError(f"id {ids.max():,} is not below the vocabulary's size, {vocab_size:,}")
                    with writing(path):
                        f.write(ids.astype(dtype).tobytes())
                    n_bytes[split] += length
                flush(f)
        return publish(folder, vocab_size, n_bytes, meta, tokenizer)
    finally:
        for name in _names(dtype):
            remove(os.path.join(folder, name + ".tmp"))
        remove_if_empty(folder)  # it was made above, and nothing has come of it


def _names(dtype):
    return [*(bin_name(split, dtype) for split in SPLITS), *TOKENS, FACTS]


def publish(folder, vocab_size, n_bytes, meta=None, tokenizer=None):
    """Gives the finished bins in `folder`, NAME.tmp, their names, and writes the files that say what they are. Removes
    an older dataset's files of other names. Returns how many tokens each split has.

    dataset.json is the first: a stop after it leaves files that it does not describe, which is an error."""
    dtype = dtype_of(vocab_size)
    bins = {split: os.path.join(folder, bin_name(split, dtype)) for split in SPLITS}
    tokens = {split: os.path.getsize(f"{path}.tmp") // dtype.itemsize for split, path in bins.items()}
    file, content = ("meta.pkl", pickle.dumps(meta)) if meta else ("tokenizer.json", (tokenizer or "").encode("utf-8"))
    facts = {
        "dtype": dtype.name, "vocab_size": vocab_size, "tokens": tokens, "bytes": n_bytes,
        "fingerprints": {split: fingerprint(f"{path}.tmp") for split, path in bins.items()},
        "tokenizer": {"file": file, "sha256": hashlib.sha256(content).hexdigest()} if content else None,
    }  # fmt: skip
    written = {FACTS: json.dumps(facts, indent=2).encode() + b"\n"} | ({file: content} if content else {})
    for name, data in written.items():
        path = os.path.join(folder, name + ".tmp")
        with writing(path), open(path, "wb") as f:
            f.write(data)
            flush(f)
    published = [*written, *(os.path.basename(path) for path in bins.values())]
    for name in published:
        os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))
    for name in {*_names(np.uint16), *_names(np.uint32)} - {*published}:
        remove(os.path.join(folder, name))
    return list(tokens.values())


def flush(f):
    """Everything written to the file is on the disk after this; OSError, which names it, where that fails."""
    with writing(f.name):
        f.flush()
        os.fsync(f.fileno())


def remove(path):
    if os.path.exists(path):
        os.remove(path)


def remove_if_empty(folder):
    if not os.listdir(folder):
        os.rmdir(folder)
