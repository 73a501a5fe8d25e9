"""A dataset as a folder under data/: its bins, what the ids in them stand for, and dataset.json, which describes both.

dataset.json has
    dtype            "uint16" or "uint32", of the ids in the bins (data/bins.py)
    vocab_size       ids go from 0 to below it
    tokens, bytes    {split: n}: how many tokens, and how many bytes of text they stand for
    fingerprints     {split: fingerprint of its bin}
    tokenizer        {"file", "sha256"} of meta.pkl (characters) or of a tokenizer.json; null: GPT-2's tokens
A folder without it is nanoGPT's, or was made by hand: uint16, and a meta.pkl, or GPT-2's tokens.
"""

import hashlib
import json
import math
import os
import pickle

import numpy as np

from data.bins import SPLITS, bin_name, check_bin, check_size, dtype_in, fingerprint
from data.meta import check_meta, read_meta
from data.tokenizer import LARGEST_ID, codec_of_tokenizer, read_tokenizer, same_tokenizer
from data.tokens import BPECodec, CharCodec, bytes_of_ids, codec_that_fits, dtype_of, gpt2_is_cached
from nanogpt.bits_per_byte import TextBytes
from nanogpt.errors import ROOT, UserError, writing

GPT2_VOCAB_SIZE = 50304  # of a new model: GPT-2's 50257, rounded up for speed
ROUNDED_ABOVE = 8192  # a smaller vocabulary is not worth the padding
FACTS = "dataset.json"

# ----------------------------------------------------------------------------------------------
# reading


class Dataset:
    """The dataset data/NAME as train.py finds it; UserError where it cannot be trained on with that `block_size`."""

    def __init__(self, name, block_size):
        self.name, self.folder = name, os.path.join(ROOT, "data", name)
        self.facts = read_facts(self.folder)
        self.bins = {split: bin_path(self.folder, split, self.facts) for split in SPLITS}
        for path in self.bins.values():
            check_size(path, block_size, name)
        self.meta, self.tokenizer = tokens_in(self.folder, self.facts)

    @property
    def vocab_size(self):
        """How many ids a new model for it has."""
        return _model_size(self.facts, self.meta, self.tokenizer)

    @property
    def found(self):
        """The line on its vocabulary size; None where its tokens are GPT-2's."""
        if not self.meta and not self.tokenizer:
            return None
        exact, file = (self.meta or self.facts)["vocab_size"], "meta.pkl" if self.meta else FACTS
        return f"found vocab_size = {exact} (inside {os.path.join('data', self.name, file)})"

    @property
    def rounded(self):
        """The line on a new model's vocabulary size, if it is not the dataset's own; else None."""
        if not self.meta and not self.tokenizer:
            return f"no meta.pkl beside the data: vocab_size = {GPT2_VOCAB_SIZE}, GPT-2's 50257 rounded up for speed"
        if self.tokenizer and self.vocab_size != self.facts["vocab_size"]:
            return f"the model's vocab_size = {self.vocab_size}: rounded up to a multiple of 64 for speed"
        return None

    def check(self, block_size, vocab_size, expected):
        """{split: fingerprint} of the bins. UserError where an id is >= `vocab_size`, or the bins are not those that
        dataset.json describes, or not the `expected` ones, which a resumed run was trained on (None: any)."""
        found = {split: check_bin(path, block_size, vocab_size, self.name) for split, path in self.bins.items()}
        for split, path in self.bins.items():
            if self.facts and self._described(split) != (os.path.getsize(path), found[split]):
                raise UserError(
                    f"{path} is not the one that {FACTS} beside it describes: prepare {self.name} again, or remove "
                    f"{FACTS} if another program has written the bins"
                )
        if expected not in (None, found):
            raise UserError(
                f"{self.folder} is not the data this run was trained on: prepare it as it was, or start from scratch"
            )
        return found

    def _described(self, split):
        size = self.facts["tokens"][split] * dtype_in(self.bins[split]).itemsize
        return size, self.facts["fingerprints"][split]

    def kept(self):
        """What a checkpoint keeps of its tokens: the keys meta (characters; None: GPT-2's) or tokenizer (its text)."""
        return {"tokenizer": self.tokenizer} if self.tokenizer else {"meta": self.meta}

    def text_bytes(self, vocab_size, device):
        """The TextBytes of its ids, for a model of `vocab_size` ids on `device`.

        GPT-2's are counted by id only if tiktoken need not fetch its vocabulary: training needs no network."""
        fetches = not self.meta and not self.tokenizer and not gpt2_is_cached()
        try:
            by_id = None if fetches else bytes_of_ids(self.codec(), vocab_size)
        except UserError:  # a meta.pkl without characters, say, or tokenizers is not installed
            by_id = None
        return TextBytes(by_id, bytes_per_token(self.facts, "val"), device)

    def codec(self):
        """What turns its text into ids and back."""
        return _codec_of(self.meta, self.tokenizer, self.folder)

    def check_resumed(self, saved, path):
        """A list with a line if the ids of the run in `saved`, read from `path`, stand for other tokens than its own.

        UserError where one of the two has a tokenizer: then nothing of what the model knows is left."""
        if not has_tokens(saved) or same_tokens(saved, self.kept()):
            return []
        if saved.get("tokenizer") or self.tokenizer:
            raise UserError(_other_tokens(path, self.name))
        return [f"the ids of {self.name} stand for other tokens now: what the model knows of them is lost"]

    def check_tokens(self, checkpoint, path):
        """UserError if the ids of the model in `checkpoint`, read from `path`, stand for other tokens than its own.

        A checkpoint that does not keep its tokens, such as nanoGPT's, may have any."""
        if _has_codec(checkpoint, path) and not same_tokens(checkpoint, self.kept()):
            raise UserError(_other_tokens(path, self.name))

    def remark_on(self, init_from, vocab_size):
        """A line if its tokens are not those of the GPT-2 in `init_from`, whose ids are `vocab_size`; else None."""
        path, theirs = os.path.join(init_from, "tokenizer.json"), {"meta": None}
        if os.path.isfile(path):
            try:
                theirs = kept_of_codec(codec_of_tokenizer(read_tokenizer(path), path))
            except UserError:  # damaged, or of a kind whose library is missing: training does not need it
                theirs = None
        both_are_gpt2s = self.kept() == {"meta": None} and theirs in (None, {"meta": None})
        own = (self.meta or self.facts or {"vocab_size": 50257})["vocab_size"]
        same_size = own == vocab_size or (self.tokenizer and own <= vocab_size)
        if both_are_gpt2s or (same_size and theirs and same_tokens(theirs, self.kept())):
            return None
        return (
            f"{self.name} has tokens of its own, {own}, not the {vocab_size} of {init_from}: what that "
            "model knows of its tokens is lost"
        )


def _other_tokens(path, name):
    return (
        f"the ids of the model in {path} stand for other tokens than those of {name}: prepare {name} with "
        "the tokens of that model, or train from scratch"
    )


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
    size = facts.get("vocab_size")
    if type(size) is not int or not 1 <= size <= LARGEST_ID + 1:
        return f"it has no vocab_size from 1 to {LARGEST_ID + 1:,}"
    for key, kind in (("tokens", int), ("bytes", int), ("fingerprints", str)):
        found = facts.get(key)
        if not isinstance(found, dict) or any(type(found.get(split)) is not kind for split in SPLITS):
            return f"it has no {key} of train and val"
    tokenizer = facts.get("tokenizer")
    if tokenizer is None:
        return None
    if not isinstance(tokenizer, dict) or tokenizer.get("file") not in ("meta.pkl", "tokenizer.json"):
        return "its tokenizer is neither null nor a meta.pkl or a tokenizer.json"
    return None if isinstance(tokenizer.get("sha256"), str) else "its tokenizer has no sha256"


def tokens_in(folder, facts):
    """(meta, text of the tokenizer.json) of the dataset in `folder`, whose read_facts() are `facts`.

    One is None, and both are if its tokens are GPT-2's. UserError where the file is missing, or has changed since."""
    if not facts:
        return find_meta(folder), None
    if not facts["tokenizer"]:
        return None, None
    path = os.path.join(folder, facts["tokenizer"]["file"])
    if not os.path.isfile(path):
        raise UserError(f"{path} is missing, and without it the dataset's ids stand for nothing: prepare it again")
    with open(path, "rb") as f:
        if hashlib.sha256(f.read()).hexdigest() != facts["tokenizer"]["sha256"]:
            raise UserError(
                f"{path} has changed since the dataset was prepared: prepare it again, or put the old file back"
            )
    return (read_meta(path), None) if path.endswith("meta.pkl") else (None, read_tokenizer(path))


def bytes_per_token(facts, split):
    """How many bytes of text a token of the split stands for, on average, by a dataset's read_facts(); NaN without."""
    return facts["bytes"][split] / facts["tokens"][split] if facts else math.nan


def bin_path(folder, split, facts):
    """The path of the split's bin in the dataset's `folder`, whose read_facts() are `facts`."""
    return os.path.join(folder, bin_name(split, facts["dtype"] if facts else "uint16"))


def new_vocab_size(folder):
    """How many ids a new model for the dataset in `folder` has; GPT-2's where there is no dataset."""
    facts = read_facts(folder)
    return _model_size(facts, *tokens_in(folder, facts))


def _model_size(facts, meta, tokenizer):
    if meta:
        return meta["vocab_size"]
    if not tokenizer:
        return GPT2_VOCAB_SIZE
    exact = facts["vocab_size"]
    return exact if exact <= ROUNDED_ABOVE else -(-exact // 64) * 64


def find_meta(folder):
    """read_meta() of the dataset in `folder`; None where it has no meta.pkl, since its tokens are GPT-2's."""
    path = os.path.join(folder, "meta.pkl")
    return read_meta(path) if os.path.exists(path) else None


# ----------------------------------------------------------------------------------------------
# whose tokens: a dataset's, a checkpoint's, a model's folder's


def codec_for(meta, where="meta.pkl"):
    """The codec of `meta`, as read_meta returns it or a checkpoint has kept it; GPT-2's where it is None."""
    return BPECodec() if meta is None else CharCodec(meta, where)


def codec_of_dataset(folder):
    """The codec of the dataset in `folder`; UserError where its ids cannot be made into text."""
    return _codec_of(*tokens_in(folder, read_facts(folder)), folder)


def _codec_of(meta, tokenizer, folder):
    """The codec of what tokens_in() has found in `folder`."""
    if tokenizer:
        return codec_of_tokenizer(tokenizer, os.path.join(folder, "tokenizer.json"))
    return codec_for(meta, os.path.join(folder, "meta.pkl"))


def codec_of_run(checkpoint, path, vocab_size):
    """(codec, remarks for the user) of the model of `vocab_size` ids in `checkpoint`, read from `path`.

    The codec is the one kept in the checkpoint, since the dataset may have been prepared again from another text. Where
    the checkpoint has none, as nanoGPT's do, it is the dataset's of today. UserError where neither has one, or it has
    more ids than the model.
    """
    folder = os.path.join(ROOT, "data", str(checkpoint["config"].get("dataset")))
    if not _has_codec(checkpoint, path):
        here = any(os.path.exists(os.path.join(folder, name)) for name in ("meta.pkl", FACTS))
        codec = codec_of_dataset(folder) if here else codec_for(checkpoint.get("meta"), path)
        return codec_that_fits(codec, vocab_size, path), []
    if checkpoint.get("tokenizer"):
        codec = codec_of_tokenizer(checkpoint["tokenizer"], f"the tokenizer in {path}")
    else:
        codec = codec_for(checkpoint["meta"], path)
    remark = f"{folder} has other tokens than the run was trained on: using those in {path}"
    return codec_that_fits(codec, vocab_size, path), [remark] if _has_other_tokens(folder, checkpoint) else []


def has_tokens(checkpoint):
    """Whether the checkpoint says what its ids stand for, or at least how many there are."""
    return "meta" in checkpoint or bool(checkpoint.get("tokenizer"))


def _has_codec(checkpoint, path):
    """Whether the checkpoint read from `path` keeps what its ids stand for. A meta of None says that it is GPT-2's."""
    if checkpoint.get("tokenizer"):
        return True
    meta = checkpoint.get("meta")
    return "meta" in checkpoint and (meta is None or "stoi" in check_meta(meta, path))


def same_tokens(kept, others):
    """Whether the ids of two checkpoints, or of what Dataset.kept() returns, stand for the same tokens."""
    tokenizers = [each.get("tokenizer") for each in (kept, others)]
    if any(tokenizers):
        return all(tokenizers) and same_tokenizer(*tokenizers)
    one, other = (each.get("meta") and each["meta"].get("stoi") for each in (kept, others))
    return one == other


def kept_of_codec(codec):
    """What Dataset.kept() would be of a dataset with the tokens of `codec`."""
    if codec.tokenizer:
        return {"tokenizer": codec.tokenizer}
    return {"meta": {"stoi": codec.stoi} if isinstance(codec, CharCodec) else None}


def _has_other_tokens(folder, checkpoint):
    """Whether the ids of the dataset in `folder`, as it is now, stand for something else than the checkpoint's."""
    try:
        meta, tokenizer = tokens_in(folder, read_facts(folder))
    except UserError:  # a broken file does not say
        return False
    if tokenizer:
        return not same_tokens({"tokenizer": tokenizer}, checkpoint)
    if meta is None:
        is_gpt2 = not checkpoint.get("tokenizer") and checkpoint["meta"] is None
        return not is_gpt2 and os.path.exists(os.path.join(folder, "train.bin"))
    return "stoi" in meta and not same_tokens({"meta": meta}, checkpoint)


def codec_of_folder(name_or_path, vocab_size):
    """The codec of a GPT-2: that of the tokenizer.json in its folder, else GPT-2's own. UserError where the folder's
    cannot be read, or has more ids than the model."""
    path = os.path.join(name_or_path, "tokenizer.json")
    has_own = os.path.isfile(path)
    codec = codec_of_tokenizer(read_tokenizer(path), path) if has_own else BPECodec()
    if os.path.isdir(name_or_path) and not has_own and codec.vocab_size > vocab_size:
        raise UserError(f"{name_or_path} has no tokenizer.json, and its {vocab_size} ids are not GPT-2's")
    return codec_that_fits(codec, vocab_size, name_or_path)


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
        if not os.listdir(folder):  # it was made above, and nothing has come of it
            os.rmdir(folder)


def _names(dtype):
    return [*(bin_name(split, dtype) for split in SPLITS), "meta.pkl", "tokenizer.json", FACTS]


def publish(folder, vocab_size, n_bytes, meta=None, tokenizer=None):
    """Gives the finished bins in `folder`, NAME.tmp, their names, and writes the files that say what they are. Removes
    an older dataset's files of other names. Returns how many tokens each split has.

    dataset.json comes before the bins: a stop between the two leaves bins that it does not describe, an error."""
    dtype = dtype_of(vocab_size)
    bins = {split: os.path.join(folder, bin_name(split, dtype)) for split in SPLITS}
    tokens = {split: os.path.getsize(f"{path}.tmp") // dtype.itemsize for split, path in bins.items()}
    file, content = ("meta.pkl", pickle.dumps(meta)) if meta else ("tokenizer.json", (tokenizer or "").encode("utf-8"))
    facts = {
        "dtype": dtype.name, "vocab_size": vocab_size, "tokens": tokens, "bytes": n_bytes,
        "fingerprints": {split: fingerprint(f"{path}.tmp") for split, path in bins.items()},
        "tokenizer": {"file": file, "sha256": hashlib.sha256(content).hexdigest()} if content else None,
    }  # fmt: skip
    written = {file: content} if content else {}
    written[FACTS] = json.dumps(facts, indent=2).encode() + b"\n"
    for name, data in written.items():
        path = os.path.join(folder, name + ".tmp")
        with writing(path), open(path, "wb") as f:
            f.write(data)
            flush(f)
    for name in [*written, *(os.path.basename(path) for path in bins.values())]:
        os.replace(os.path.join(folder, name + ".tmp"), os.path.join(folder, name))
    for name in {*_names(np.uint16), *_names(np.uint32)} - {*written, *(os.path.basename(p) for p in bins.values())}:
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
