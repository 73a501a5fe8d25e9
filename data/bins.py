"""Token bins as train.py finds them: raw little-endian token ids, no header.

They are uint16, as nanoGPT's, or uint32 where uint16 does not hold them. Those have another name: under its own nanoGPT
would read them as uint16, and train on garbage."""

import hashlib
import os

import numpy as np

from nanogpt.errors import UserError, command

SPLITS = ("train", "val")
ENDINGS = {"uint16": ".bin", "uint32": ".u32.bin"}  # of a bin's name, which begins with the split
FULL_CHECK_TOKENS = 1 << 26  # a longer bin is checked in samples here, and each batch when it is drawn


def dtype_of(vocab_size):
    """The type of a bin whose ids are below `vocab_size`: little-endian uint16 where it holds them, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def open_bin(path):
    """(the bin's tokens as a read-only memory map, uint16 or uint32 (n,), what tells this file from another one there).

    Open it for each batch: pages once read count as this process's memory while a map is held. UserError where its
    size is none of a bin."""
    dtype = "<u4" if path.endswith(ENDINGS["uint32"]) else "<u2"
    with open(path, "rb") as f:
        found = os.fstat(f.fileno())
        try:
            return np.memmap(f, dtype, mode="r"), (found.st_ino, found.st_size, found.st_mtime_ns)
        except ValueError as error:
            reason = f"its size, {found.st_size:,} bytes, is no whole number of tokens: {error}"
            raise UserError(f"{path} is cut, or is no token bin: {reason}") from None


def open_checked(path, block_size, dataset):
    """What open_bin() returns. UserError where the bin cannot be trained on, as it is missing, cut or too short."""
    if not os.path.isfile(path):
        own = os.path.join(os.path.dirname(path), "prepare.py")
        any_text = command("data/text_bpe/prepare.py", "FILE", f"--name={dataset}")
        how = command(own) if os.path.exists(own) else f"{any_text}, which takes any text"
        if dataset == "openwebtext":  # train.py's default, and 53 GB
            how += f"; for something small: {command('data/shakespeare_char/prepare.py')}"
        raise UserError(f"dataset {dataset} is not prepared ({os.path.basename(path)} is missing); run: {how}")
    tokens, file = open_bin(path)
    if len(tokens) < block_size + 1:
        least = f"block_size + 1 = {block_size + 1:,}: prepare a longer text, or give a smaller --block_size="
        raise UserError(f"{path}: {len(tokens):,} tokens are fewer than {least}")
    return tokens, file


def check_bin(path, vocab_size):
    """UserError where an id in the bin at `path` is >= vocab_size."""
    tokens, _ = open_bin(path)
    # Reading a whole 17 GB file would take minutes: check 64 samples of a million tokens then.
    samples = 1 if len(tokens) <= FULL_CHECK_TOKENS else 64
    sample = min(len(tokens), FULL_CHECK_TOKENS) // samples
    for start in np.linspace(0, len(tokens) - sample, samples, dtype=np.int64):
        check_ids(tokens[start : start + sample], vocab_size, path, start)


def check_ids(tokens, vocab_size, path, start):
    """UserError naming file and position where `tokens`, read from `path` at `start`, hold an id >= vocab_size.

    `start` is the position of tokens[0], or of each row's first token where `tokens` is (B, T)."""
    if tokens.max(initial=0) >= vocab_size:
        at = np.argmax(tokens >= vocab_size)
        row, column = divmod(at, tokens.shape[-1])
        position, id = np.atleast_1d(start)[row] + column, tokens.flat[at]
        raise UserError(f"{path}: token {position:,} is {id}, but the vocabulary's ids end at {vocab_size - 1}")


def fingerprint(path):
    """A short text that changes with a bin's size or its first 64 KiB, by which a resumed run recognises its data."""
    with open(path, "rb") as f:
        return f"{os.path.getsize(path)}:{hashlib.sha256(f.read(1 << 16)).hexdigest()[:16]}"


def to_device(tokens, device):
    """`tokens`, uint16 on the host, as int64 on `device`."""
    if device.startswith("cuda"):  # copies two bytes per token, from pinned memory: the host does not wait
        return tokens.pin_memory().to(device, non_blocking=True).long()
    return tokens.long().to(device)
