"""meta.pkl, in which nanoGPT's prepare scripts keep a dataset's characters: read so that no code in it can run.

It is a pickled {'vocab_size': int, 'stoi': {str: int}, 'itos': {int: str}}. Training needs vocab_size alone, and a text
one of the two tables.
"""

import pickle
import pickletools
import re

from nanogpt.errors import UserError

# All that a pickle of plain values is made of: dicts, lists, tuples, sets, texts, bytes, numbers, True, False and None.
# No opcode here looks up a name or calls anything.
PLAIN_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "LIST",
    "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_SET", "ADDITEMS", "FROZENSET",
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "NONE", "NEWTRUE", "NEWFALSE",
    "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8",
    "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "GET", "BINGET", "LONG_BINGET",
}  # fmt: skip
TUPLE_DEPTH = 32  # of tuples in tuples
META_BYTES = 1 << 23  # twice what 65,536 characters take in the least compact protocol


def read_meta(path):
    """The meta.pkl at `path`, as check_meta returns it. Nothing in the file can run. Raises UserError."""
    with open(path, "rb") as f:
        pickled = f.read(META_BYTES + 1)
    try:
        if len(pickled) > META_BYTES:
            raise ValueError(f"larger than {META_BYTES:,} bytes")
        _check_plain(pickled)
        meta = pickle.loads(pickled)
    except Exception as error:  # a broken pickle raises nearly anything
        raise UserError(f"{path} is not a meta.pkl: {error}") from None
    return check_meta(meta, path)


def _check_plain(pickled):
    """ValueError unless `pickled` is made of PLAIN_OPCODES, with tuples as values only, and none nested deep.

    Hashing a tuple that nests deep ends the process, so none may be a key. This walks the opcodes as an unpickler does,
    but keeps of each value only how deep it is in tuples: 0 for what is none."""
    stack, marks, memo = [], [], {}
    for count, (opcode, argument, _) in enumerate(pickletools.genops(pickled)):
        name, before = opcode.name, opcode.stack_before
        if name not in PLAIN_OPCODES:
            raise ValueError(f"holds more than dicts, lists, tuples, texts and numbers ({name})")
        if name.endswith("PUT") and argument > count:
            raise ValueError("memo index out of range")  # unpickling takes memory for all below it
        if name == "MARK":
            marks.append(len(stack))
        elif name.endswith("PUT") or name == "MEMOIZE":
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name.endswith("GET"):
            stack.append(memo[argument])
        else:
            marked = pickletools.markobject in before  # it takes what came since the mark, and what is named before it
            start = marks.pop() if marked else len(stack)
            start -= before.index(pickletools.markobject) if marked else len(before)
            taken = stack[start:]
            del stack[start:]
            hashed = {"SETITEM": taken[1:2], "SETITEMS": taken[1::2], "DICT": taken[::2], "ADDITEMS": taken[1:]}
            if any(hashed.get(name, ())) or (name == "FROZENSET" and any(taken)):
                raise ValueError("holds a tuple in a key or a set")
            depth = 1 + max(taken, default=0) if "TUPLE" in name or name == "FROZENSET" else 0
            if depth > TUPLE_DEPTH:
                raise ValueError(f"holds tuples nested deeper than {TUPLE_DEPTH}")
            stack += [depth] * len(opcode.stack_after)


def check_meta(meta, where):
    """`meta` reduced to vocab_size and, where it has characters, stoi and itos; UserError if these do not agree.

    Either table follows from the other, and itos may be a list. What in them is no text or no id does not count.
    """
    size = meta.get("vocab_size") if type(meta) is dict else None
    if type(size) is not int or not 1 <= size <= 1 << 16:
        raise UserError(f"{where} is not a meta.pkl: it has no vocab_size from 1 to 65,536")
    stoi, itos = meta.get("stoi"), meta.get("itos")
    itos = dict(enumerate(itos)) if type(itos) in (list, tuple, str) else itos
    stoi, itos = (table if type(table) is dict else {} for table in (stoi, itos))
    stoi = {c: i for c, i in stoi.items() if type(c) is str and type(i) is int}
    itos = {i: c for i, c in itos.items() if type(c) is str and type(i) is int}
    if not stoi and not itos:
        return {"vocab_size": size}
    if not stoi:
        stoi = _inverse(itos)
        itos = _inverse(stoi)
    elif not itos:
        itos = _inverse(stoi)
        stoi = _inverse(itos)
    if (
        not all(0 <= i < size for i in stoi.values())
        or not all(stoi.get(c) == i for i, c in itos.items())
        or len(itos) != len(stoi)
        or re.search("[\ud800-\udfff]", "".join(stoi))  # half a character, which cannot be printed
    ):
        raise UserError(f"{where} is not a meta.pkl: stoi and itos are no table of {size:,} characters")
    return {"vocab_size": size, "stoi": stoi, "itos": itos}


def _inverse(table):
    """{value: key} of `table`, with the first key of each value."""
    return {value: key for key, value in reversed(table.items())}
