"""From a text to a dataset: what the prepare scripts have in common."""

import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from data.bins import dtype_of
from data.codecs import BPECodec, CharCodec
from data.folder import dataset_folder, write_dataset
from data.text_files import pieces, text_chunks
from data.tokenizer import check_vocab_size, codec_of_tokenizer, find_tokenizer, train_tokenizer
from nanogpt.device import usable_cores
from nanogpt.errors import UserError, command

TRAIN_BYTES = 100_000_000  # of text that a tokenizer is trained on, at most
CHANGED = "the tokens do not give this very text back: the tokenizer's normalizer or decoder changes it"


class Meter:
    """A line on stderr that says how much of `total` is done (0: not known), ten times a second at most."""

    def __init__(self, what, total):
        self.what, self.total, self.shown_at = what, total, 0.0

    def show(self, done):
        """Prints over the line before, and ends it when all is done."""
        if done != self.total and time.monotonic() - self.shown_at < 0.1:
            return
        self.shown_at = time.monotonic()
        line = f"{self.what}: {done:,}" + (f" of {self.total:,} ({done / self.total:.0%})" if self.total else "")
        print(line, end="\n" if done == self.total else "\r", file=sys.stderr, flush=True)


def metered(texts, what, total):
    """Yields `texts` and shows on stderr how many of the `total` characters have gone by."""
    meter, done = Meter(what, total), 0
    for text in texts:
        yield text
        done += len(text)
        meter.show(done)


def data_folder(name):
    """The folder of the dataset `name`. UserError where it would not be one under data/."""
    folder = dataset_folder(name)
    if not name or os.path.basename(name) != name or name.startswith(".") or os.path.isfile(folder):
        raise UserError(f"--name={name}: takes the name of a folder under data/")
    return folder


def split_at(n, val_fraction):
    """How many of `n` characters, from the start, are for training. UserError where too few are left."""
    if not 0 < val_fraction < 1:
        raise UserError(f"--val_fraction={val_fraction}: must be between 0 and 1")
    n_train = int(n * (1 - val_fraction))
    if min(n_train, n - n_train) < 2:
        raise UserError(f"the text is too short: {n_train:,} of its characters are for train, {n - n_train:,} for val")
    return n_train


def prepare_chars(folder, text):
    """Makes `folder` a dataset of `text`, a character a token, the first 90 % train. Prints facts."""
    characters = sorted(set(text))
    vocab_size = len(characters)
    if vocab_size > 1 << 16:
        raise UserError(f"{vocab_size:,} different characters, and uint16 has 65,536 ids: use data/text_bpe")
    n_train = split_at(len(text), 0.1)
    print(f"length of dataset in characters: {len(text):,}")
    # escaped, as line feeds and the like are among them, and not every terminal can show the others
    print("all the unique characters:", ascii("".join(characters[:256])), "..." if vocab_size > 256 else "")
    print(f"vocab size: {vocab_size:,}")
    id_of = np.zeros(0x110000, dtype="<u2")  # indexed by code point
    id_of[[ord(c) for c in characters]] = np.arange(vocab_size)
    ids = id_of[np.frombuffer(text.encode("utf-32-le"), dtype="<u4")]
    itos = dict(enumerate(characters))
    meta = {"vocab_size": vocab_size, "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    parts = ([(ids[part], len(text[part].encode()))] for part in (slice(n_train), slice(n_train, None)))
    write_dataset(folder, *parts, vocab_size, meta=meta)


def prepare_bpe(folder, paths, val_fraction=0.1, tokenizer="", vocab_size=0):
    """Makes `folder` a dataset of the files `paths` in tokens of a tokenizer, holding little of them in memory.

    The tokens are those of --tokenizer=`tokenizer`, or of a tokenizer of `vocab_size` tokens that is trained on the
    text, or GPT-2's. Between two files comes <|endoftext|>. The last `val_fraction` of the characters are val. Prints
    facts.
    """
    if vocab_size:
        check_vocab_size(vocab_size)
    else:
        codec = pick_codec(tokenizer)
    # one pass to count; it finds a bad file before anything is written
    lengths = [sum(map(len, text_chunks([path]))) for path in paths]
    n_train = split_at(sum(lengths), val_fraction)
    if vocab_size:
        n_bytes = sum(map(os.path.getsize, paths)) * n_train // sum(lengths)
        text = train_tokenizer(_training_texts(paths, n_train, n_bytes), vocab_size)
        codec = codec_of_tokenizer(text, "the new tokenizer")
    say_end(codec)
    changed = []

    def parts_of(start, stop):
        """The characters [start, stop) of all files in pieces, and "" where a file ends and another follows."""
        for i, (path, length) in enumerate(zip(paths, lengths, strict=True)):
            if start < length and stop > 0:
                yield from pieces(text_chunks([path], start, stop), codec.cuts_at_lines)
                if length <= stop and i + 1 < len(paths):
                    yield ""
            start, stop = start - length, stop - length

    def encoded(text):
        if not text:
            return end_of_text(codec), 0
        ids, length = encode_piece(text, codec)
        if not changed and not comes_back(text, ids, codec):
            changed.append(text)
        return ids, length

    def arrays(split, start, stop):
        return in_threads(encoded, metered(parts_of(start, stop), f"tokenising {split}, characters", stop - start))

    parts = arrays("train", 0, n_train), arrays("val", n_train, sum(lengths))
    write_dataset(folder, *parts, codec.vocab_size, tokenizer=codec.tokenizer)
    if changed:
        print(CHANGED)


def _training_texts(paths, n_train, n_bytes):
    """Pieces of the first `n_train` characters of the files, some `n_bytes` bytes: TRAIN_BYTES of them, evenly."""
    share, seen, taken = min(1.0, TRAIN_BYTES / n_bytes), 0, 0
    if share < 1:
        print(f"training the tokenizer on {TRAIN_BYTES:,} of {n_bytes:,} bytes, taken evenly over the training part")
    texts = pieces(text_chunks(paths, 0, n_train))
    for text in metered(texts, "training a tokenizer, characters", n_train):
        seen += len(text)
        if taken + len(text) <= share * seen:
            taken += len(text)
            yield text


def pick_codec(tokenizer):
    """The codec of --tokenizer=`tokenizer`, "" for GPT-2's. UserError where it has no codec of words or bytes."""
    if not tokenizer:
        return BPECodec()
    codec = find_tokenizer(tokenizer)
    if isinstance(codec, CharCodec):
        raise UserError(f"--tokenizer={tokenizer} is one of characters: data/text_char/prepare.py makes such a dataset")
    if codec.tokenizer and json.loads(codec.tokenizer)["model"].get("dropout"):
        print("this tokenizer's BPE dropout is switched off: the same text always has the same tokens")
    if codec.cuts_at_lines:
        print("the text is cut at line ends every 131,072 characters or so: this tokenizer's ids may depend on where")
    return codec


def say_end(codec):
    """Prints which id ends a document."""
    if codec.eot is None:
        print("this tokenizer has no token for the end of a document: nothing stands between two of them")
    elif codec.tokenizer:
        print(f"{codec.end} is id {codec.eot}; where it stands in the text, it is plain text")


def encode_piece(text, codec):
    """(ids, (n,), how many bytes of UTF-8 they stand for). UserError names the characters that the vocabulary lacks."""
    return codec.encode_plain(text), len(text.encode())


def end_of_text(codec):
    """The ids that end a document: one, or none."""
    return np.array([] if codec.eot is None else [codec.eot], dtype_of(codec.vocab_size))


def comes_back(text, ids, codec):
    """Whether the `ids` give this very text back."""
    return codec.bytes_by_id or codec.decode(ids) == text


def in_threads(function, items):
    """Yields function(item) of each item, in order, from a thread a core (tiktoken runs without the GIL)."""
    items = iter(items)
    with ThreadPoolExecutor(usable_cores()) as pool:
        while batch := list(islice(items, 64)):  # pool.map by itself would first read all its input
            yield from pool.map(function, batch)


def print_next(*arguments, launcher="python", when="next"):
    """Says what to type once the dataset is ready: train.py with these `arguments`."""
    print(f"{when}: {command('train.py', *arguments, launcher=launcher)}")
