"""Token bins as train.py finds them: raw little-endian uint16 token ids, no header."""

import hashlib
import os

import numpy as np

from configurator import UserError, from_here

CHECKED_WHOLE = 1 << 26  # tokens; a longer bin is looked at in places, and every batch as it is drawn


def open_bin(path):
    """The bin's tokens as a read-only memory map, uint16 (n,). Opened anew for each batch, since
    pages once touched count as this process's memory for as long as a map is held."""
    return np.memmap(path, dtype="<u2", mode="r")


def check_size(path, block_size, dataset):
    """UserError where `path` cannot be trained on, as far as its size shows: missing, cut or too short."""
    if not os.path.isfile(path):
        where = os.path.dirname(path)
        prepare = os.path.join(where, "prepare.py")
        what = f"run: python {os.path.relpath(prepare)}" if os.path.exists(prepare) else f"there is no {prepare} either"
        if dataset == "openwebtext":  # train.py's own choice, and 53 GB
            what += f"; to begin with something small, python {from_here('data/shakespeare_char/prepare.py')}"
        raise UserError(f"dataset {dataset} is not prepared ({os.path.basename(path)} is missing); {what}")
    size = os.path.getsize(path)
    if size % 2:
        raise UserError(f"{path}: {size:,} bytes is odd, and a token is two: the file is cut or is no token bin")
    if size // 2 < block_size + 1:
        raise UserError(f"{path}: {size // 2:,} tokens are fewer than block_size + 1 = {block_size + 1:,}")


def check_bin(path, block_size, vocab_size, dataset):
    """UserError where `path` cannot be trained on: by check_size(), or for an id >= vocab_size.

    Returns its fingerprint(), by which a resumed run knows its data again.
    """
    check_size(path, block_size, dataset)
    tokens = open_bin(path)
    # A whole pass over a 17 GB file would take minutes: look at 64 stretches of a million tokens then.
    stretch = len(tokens) if len(tokens) <= CHECKED_WHOLE else CHECKED_WHOLE // 64
    for start in np.linspace(0, len(tokens) - stretch, 1 if stretch == len(tokens) else 64, dtype=np.int64):
        check_ids(tokens[start : start + stretch], vocab_size, path, start)
    return fingerprint(path)


def check_ids(tokens, vocab_size, path, start):
    """UserError naming file and position where `tokens`, which stand at `start` in `path`, hold an id >= vocab_size.

    `start` is the position of tokens[0], or of each row's first token where `tokens` is (B, T)."""
    if tokens.max() >= vocab_size:
        at = np.unravel_index(np.argmax(tokens >= vocab_size), tokens.shape)
        position = int(np.atleast_1d(start)[at[0] if tokens.ndim > 1 else 0]) + int(at[-1])
        raise UserError(f"{path}: token {position:,} is {tokens[at]}, but the vocabulary's ids end at {vocab_size - 1}")


def fingerprint(path):
    """A short text that changes with a bin's size or its first 64 KiB."""
    with open(path, "rb") as f:
        return f"{os.path.getsize(path)}:{hashlib.sha256(f.read(1 << 16)).hexdigest()[:16]}"
