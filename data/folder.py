"""A dataset's folder on disk: its bins, and dataset.json, which says what they are. Read, and written whole.

docs/data.md lists the keys of dataset.json. A folder without it is nanoGPT's, or another program has written it: what
lies there counts.
"""

import hashlib
import json
import os
import pickle
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data.bins import ENDINGS, SPLITS, check_ids, dtype_of, fingerprint
from nanogpt.errors import ROOT, UserError, relative_path, writing
from nanogpt.files import flush, lock, rename, whole_file
from nanogpt.text_file import read_text

FACTS = "dataset.json"
TOKENS = ("meta.pkl", "tokenizer.json")  # what the ids stand for, unless they are GPT-2's
ALL_FILES = {FACTS, *TOKENS, *(split + ending for split in SPLITS for ending in ENDINGS.values())}


def dataset_folder(name):
    """The folder of the dataset `name`."""
    return os.path.join(ROOT, "data", name)


def read_facts(folder):
    """What dataset.json in `folder` says; None where there is none. UserError where it is not one."""
    path = os.path.join(folder, FACTS)
    if not os.path.exists(path):
        return None
    text = read_text(path)
    try:
        facts = json.loads(text)
        counts = [facts["vocab_size"], *(facts[key][split] for key in ("tokens", "bytes") for split in SPLITS)]
        tokenizer = facts["tokenizer"]
        is_whole = (
            facts["dtype"] in ENDINGS
            and all(type(n) is int and 0 <= n < 1 << 60 for n in counts)
            and set(SPLITS) <= set(facts["fingerprints"])
            and (tokenizer is None or tokenizer["file"] in TOKENS and "sha256" in tokenizer)
        )
    except (ValueError, RecursionError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise UserError(f"{path} is not a dataset's: it is damaged, or of another kind")
    return facts


def _sha256(content):
    return hashlib.sha256(content).hexdigest()


def tokens_path(folder, facts):
    """The path of the file that says what the ids of the dataset in `folder` stand for; None: GPT-2's tokens.

    It is the file that its read_facts() `facts` name: UserError where that is missing, or has changed since. Without
    dataset.json it is the one that is there."""
    if not facts:
        paths = (os.path.join(folder, name) for name in TOKENS)
        return next(filter(os.path.exists, paths), None)
    if not facts["tokenizer"]:
        return None
    path = os.path.join(folder, facts["tokenizer"]["file"])
    if not os.path.isfile(path) or _sha256(Path(path).read_bytes()) != facts["tokenizer"]["sha256"]:
        how = "prepare it again, or put the old file back"
        raise UserError(f"{path} is missing, or has changed since the dataset was prepared: {how}")
    return path


def bin_path(folder, split):
    """The path of the split's bin in the dataset's `folder`: uint16, unless there is one in uint32 alone."""
    paths = [os.path.join(folder, split + ending) for ending in ENDINGS.values()]
    return next(filter(os.path.exists, paths), paths[0])


@contextmanager
def locked(folder):
    """Locks a dataset's `folder` for the block, in which it is written; UserError where another process does this.

    A new folder in which nothing is left at the end is removed."""
    with lock(folder, f"another preparation is writing {relative_path(folder)}") as handle:
        try:
            yield
        finally:
            if os.listdir(folder) == [os.path.basename(handle.name)]:
                with suppress(OSError):  # Windows keeps a file that is open
                    os.remove(handle.name)
                    os.rmdir(folder)


def unfinished_bins(folder, dtype):
    """{split: path} of the bins that are being written to `folder`, with ids of that dtype."""
    return {split: os.path.join(folder, f"{split}{ENDINGS[dtype.name]}.tmp") for split in SPLITS}


def write_dataset(folder, train, val, vocab_size, meta=None, tokenizer=None):
    """Writes a dataset to `folder`, each file whole, and all of them or none. Prints how many tokens each split has.

    train, val: iterables of (ids, the number of bytes they stand for). `meta` is that of characters, `tokenizer` the
    text of a tokenizer.json; without both the tokens are GPT-2's. UserError where an id is not below `vocab_size`.
    """
    dtype, n_bytes = dtype_of(vocab_size), dict.fromkeys(SPLITS, 0)
    paths = unfinished_bins(folder, dtype)
    with locked(folder):
        try:
            for (split, path), arrays in zip(paths.items(), (train, val), strict=True):
                with writing(path), open(path, "wb") as f:
                    for ids, length in arrays:
                        check_ids(ids, vocab_size, path, f.tell() // dtype.itemsize)
                        f.write(ids.astype(dtype).tobytes())
                        n_bytes[split] += length
                    flush(f)
            publish(folder, vocab_size, n_bytes, meta, tokenizer)
        finally:
            for path in paths.values():
                Path(path).unlink(missing_ok=True)


def publish(folder, vocab_size, n_bytes, meta=None, tokenizer=None):
    """Gives the unfinished_bins() in `folder`, which are complete, their names, and writes the files that say what they
    are. Removes an older dataset's files of other names. Prints how many tokens each split has.

    dataset.json is the first: a stop after it leaves files that it does not describe, which is an error."""
    dtype = dtype_of(vocab_size)
    bins = unfinished_bins(folder, dtype)
    tokens = {split: os.path.getsize(path) // dtype.itemsize for split, path in bins.items()}
    file, content = ("meta.pkl", pickle.dumps(meta)) if meta else ("tokenizer.json", (tokenizer or "").encode("utf-8"))
    facts = {
        "dtype": dtype.name, "vocab_size": vocab_size, "tokens": tokens, "bytes": n_bytes,
        "fingerprints": {split: fingerprint(path) for split, path in bins.items()},
        "tokenizer": {"file": file, "sha256": _sha256(content)} if content else None,
    }  # fmt: skip
    written = ({file: content} if content else {}) | {FACTS: json.dumps(facts, indent=2).encode() + b"\n"}
    with ExitStack() as stack:  # at its end they get their names, the last one first
        for name, data in written.items():
            f = stack.enter_context(whole_file(os.path.join(folder, name)))
            f.write(data)
            flush(f)
    names = {path: path.removesuffix(".tmp") for path in bins.values()}
    for path, name in names.items():
        rename(path, name)
    for name in ALL_FILES - {*written, *map(os.path.basename, names.values())}:
        Path(folder, name).unlink(missing_ok=True)
    for split, count in tokens.items():
        print(f"{split} has {count:,} tokens")
