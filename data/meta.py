"""meta.pkl, in which nanoGPT's prepare scripts keep a dataset's characters: read so that no code in it can run.

It is a pickled {'vocab_size': int, 'stoi': {str: int}, 'itos': {int: str}}. Training needs vocab_size alone, and a text
one of the two tables.
"""

import pickle
import pickletools
import re

from nanogpt.errors import UserError

# What a pickle of dicts, lists, texts, bytes, numbers, True, False and None is made of. No opcode here looks up a name
# or calls anything. Tuples and sets are left out: hashing a tuple that nests deep, as a key, ends the process.
PLAIN_OPCODES = set(
    "PROTO FRAME STOP MARK EMPTY_DICT DICT SETITEM SETITEMS EMPTY_LIST LIST APPEND APPENDS INT BININT BININT1 BININT2 "
    "LONG LONG1 LONG4 FLOAT BINFLOAT NONE NEWTRUE NEWFALSE UNICODE SHORT_BINUNICODE BINUNICODE BINUNICODE8 "
    "SHORT_BINBYTES BINBYTES BINBYTES8 MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET".split()
)
META_BYTES = 1 << 23  # twice what 65,536 characters take in the least compact protocol


def read_meta(path):
    """The meta.pkl at `path`, as check_meta returns it. Nothing in the file can run. Raises UserError."""
    with open(path, "rb") as f:
        pickled = f.read(META_BYTES + 1)
    try:
        if len(pickled) > META_BYTES:
            raise ValueError(f"larger than {META_BYTES:,} bytes")
        for position, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
            if opcode.name not in PLAIN_OPCODES:
                raise ValueError(f"holds more than dicts, lists, texts and numbers ({opcode.name})")
            if opcode.name.endswith("PUT") and argument > position:
                raise ValueError("memo index out of range")  # unpickling takes memory for all below it
        meta = pickle.loads(pickled)
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path} is not a meta.pkl: {error}") from None
    return check_meta(meta, path)


def check_meta(meta, where):
    """`meta` reduced to vocab_size and, where it has characters, stoi and itos; UserError if these do not agree.

    Either table follows from the other, and itos may be a list. What in them is no text or no id does not count.
    """
    size = meta.get("vocab_size") if type(meta) is dict else None
    if type(size) is not int or not 1 <= size <= 1 << 16:
        raise UserError(f"{where} is not a meta.pkl: it has no vocab_size from 1 to 65,536")
    stoi, itos = meta.get("stoi"), meta.get("itos")
    itos = dict(enumerate(itos)) if type(itos) in (list, str) else itos
    stoi, itos = (table if type(table) is dict else {} for table in (stoi, itos))
    stoi = {c: i for c, i in stoi.items() if type(c) is str and type(i) is int}
    itos = {i: c for i, c in itos.items() if type(c) is str and type(i) is int}
    if not stoi or not itos:
        stoi = _inverse(itos or _inverse(stoi))
        itos = _inverse(stoi)
    if not stoi:
        return {"vocab_size": size}
    agree = itos == _inverse(stoi) and stoi == _inverse(itos) and all(0 <= i < size for i in itos)
    if not agree or re.search("[\ud800-\udfff]", "".join(stoi)):  # half a character, which cannot be printed
        raise UserError(f"{where} is not a meta.pkl: stoi and itos are no table of {size:,} characters")
    return {"vocab_size": size, "stoi": stoi, "itos": itos}


def _inverse(table):
    """{value: key} of `table`, with the first key of each value."""
    return {value: key for key, value in reversed(table.items())}
