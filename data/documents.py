"""From a hub dataset, or a folder of files, to token bins: what OpenWebText's and FineWeb's scripts share."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from data.bins import dtype_of
from data.folder import locked, publish, unfinished_bins
from data.text import CHANGED, Meter, comes_back, encode_piece, end_of_text, in_threads, pick_codec, say_end
from data.text_files import files_below, pieces
from nanogpt.device import usable_cores
from nanogpt.errors import UserError, require, writing
from nanogpt.files import flush, whole_file

UNFINISHED = "unfinished.tmp"  # what a stopped run has done
AT_ONCE = 100  # documents that are encoded in one call


def prepare_documents(folder, source, subset, tokenizer):
    """Makes `folder` a dataset of the documents of `source`, each ended by <|endoftext|>. Prints facts.

    source: a hub dataset with a text column, of which `subset` names a configuration, or a folder (load_documents()).
    tokenizer: as --tokenizer= takes it. If it is stopped, the same call resumes it: UNFINISHED counts what is done.
    """
    require(f"--source={source}", "datasets")
    codec = pick_codec(tokenizer)
    say_end(codec)
    try:
        documents = load_documents(source, subset)
    except Exception as error:  # the libraries below raise a dozen kinds
        other = "" if os.path.isdir(source) else "; --source= takes a folder of .parquet, .jsonl and .txt files too"
        raise UserError(f"--source={source} cannot be loaded: {error.__cause__ or error}{other}") from None
    texts = documents.data.column("text")
    if str(texts.type) not in ("string", "large_string", "null"):
        raise UserError(f"--source={source}: the column text has no texts but {texts.type}")
    without = texts.null_count
    if len(documents) - without < 2:
        raise UserError(f"--source={source}: {len(documents) - without} document cannot be split into train and val")
    print(f"{len(documents):,} documents" + f", {without:,} of them without a text: these are left out" * bool(without))
    with locked(folder):
        write_documents(folder, documents, source, codec)


def write_documents(folder, documents, source, codec):
    """Writes the dataset of `documents`, which are from `source`, to `folder`, and removes UNFINISHED."""
    dtype = dtype_of(codec.vocab_size)
    parts = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)  # nanoGPT's split
    splits = {"train": parts["train"], "val": parts["test"]}
    paths = unfinished_bins(folder, dtype)
    first = str(splits["train"][0]["text"])
    origin = [source, len(documents), hashlib.sha256((first + (codec.tokenizer or "")).encode()).hexdigest()]
    unfinished = os.path.join(folder, UNFINISHED)
    state = resumed_state(unfinished, origin, paths, dtype.itemsize)

    def save():
        with whole_file(unfinished, "w") as f:
            json.dump(state, f)

    try:
        for split, part in splits.items():
            tokenise(split, part, paths[split], state[split], codec, save)
    finally:
        if not os.path.exists(unfinished):  # nothing to resume
            for path in paths.values():
                Path(path).unlink(missing_ok=True)
    n_bytes = {split: state[split]["bytes"] for split in splits}
    publish(folder, codec.vocab_size, n_bytes, tokenizer=codec.tokenizer)
    os.remove(unfinished)
    if any(state[split]["changed"] for split in splits):
        print(CHANGED)


def resumed_state(path, origin, bins, itemsize):
    """{"of": origin, split: what tokenise() has done} of the unfinished run in the file `path`, or of a new run.

    origin: says which documents and tokens; UserError where the run was of others. bins: {split: path of its bin}."""
    state = {"of": origin} | {split: {"documents": 0, "tokens": 0, "bytes": 0, "changed": False} for split in bins}
    if not os.path.exists(path):
        return state
    with open(path) as f:
        saved = json.load(f)
    if saved["of"] != origin:
        raise UserError(f"{path}: unfinished run on {saved['of'][0]}: finish it as it was begun, or delete this")
    for split, bin in bins.items():
        if os.path.exists(bin) and os.path.getsize(bin) >= itemsize * saved[split]["tokens"]:
            state[split] |= saved[split]
            print(f"going on after document {state[split]['documents']:,} of {split}")
    return state


def load_documents(source, subset):
    """The documents of `source`, a Dataset with the one column "text".

    In a folder these are the "text" of every line of its .jsonl files and row of its .parquet files, and each .txt.
    """
    from datasets import concatenate_datasets, load_dataset

    if os.path.isfile(source):
        raise UserError("it is a file")
    if not os.path.isdir(source):
        return load_dataset(source, subset or None, split="train", num_proc=usable_cores()).select_columns("text")
    endings = (".jsonl", ".parquet", ".txt")
    files = files_below(source, *endings)
    jsonl, parquet, txt = ([path for path in files if path.lower().endswith(ending)] for ending in endings)
    # one .jsonl at a time, as they may differ in their other columns
    parts = [load_dataset("json", data_files=path, split="train") for path in jsonl]
    if parquet:
        parts.append(load_dataset("parquet", data_files=parquet, split="train", columns=["text"]))
    if txt:
        parts.append(load_dataset("text", data_files=txt, split="train", sample_by="document"))
    return concatenate_datasets([part.select_columns("text") for part in parts])


def encode(texts, codec):
    """Of a few documents: their ids, (n,), each ended by <|endoftext|>; the bytes of their text; and whether the ids do
    not give it back. A text of None is no document."""
    ids, n_bytes, changed = [end_of_text(codec)[:0]], 0, False
    for text in texts:
        if text is None:
            continue
        text = text.removeprefix("\ufeff")  # this mark is no text; all else stays as it is
        for piece in pieces([text], codec.cuts_at_lines):
            found, length = encode_piece(piece, codec)
            ids.append(found)
            n_bytes += length
            changed = changed or not comes_back(piece, found, codec)
        ids.append(end_of_text(codec))
    return np.concatenate(ids), n_bytes, changed


def tokenise(split, documents, path, done, codec, save):
    """Appends to the file `path` the tokens of those `documents` that are not counted in `done`, counts them there, and
    calls save() when they are on disk.

    done: {"documents": n, "tokens": n, "bytes": n, "changed": whether the tokens of one do not give it back}."""
    meter = Meter(f"tokenising {split}, documents", len(documents))
    # Plain writes, no memory map: on a full disk they raise an error, where a map would end the process.
    with writing(path), open(path, "ab") as f:
        f.truncate(dtype_of(codec.vocab_size).itemsize * done["tokens"])  # what came after the last save is done again
        starts = range(done["documents"], len(documents), AT_ONCE)
        tasks = in_threads(lambda start: encode(documents[start : start + AT_ONCE]["text"], codec), starts)
        for count, (start, (ids, length, changed)) in enumerate(zip(starts, tasks, strict=True), 1):
            f.write(ids.tobytes())
            done["changed"] |= changed
            done["tokens"] += len(ids)
            done["bytes"] += length
            done["documents"] = min(start + AT_ONCE, len(documents))
            meter.show(done["documents"])
            if count % 10 == 0 or done["documents"] == len(documents):
                flush(f)
                save()
