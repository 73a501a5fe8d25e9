"""Text to token ids and back: the safe reader of meta.pkl, and a codec for either kind of dataset.

A dataset is a folder under data/ with train.bin and val.bin (see data/bins.py). Where its tokens are
characters it has meta.pkl too, as nanoGPT's prepare scripts write it: a pickled
{'vocab_size': int, 'stoi': {str: int}, 'itos': {int: str}}. Training needs vocab_size alone, and a text
one of the two tables. Without a meta.pkl the tokens are GPT-2's byte pairs.
"""

import json
import os
import pickle
import pickletools
import re

from nanogpt.errors import ROOT, UserError

# ----------------------------------------------------------------------------------------------
# meta.pkl

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


def find_meta(folder):
    """read_meta() of the dataset in `folder`; None where it has no meta.pkl, since its tokens are GPT-2's."""
    path = os.path.join(folder, "meta.pkl")
    return read_meta(path) if os.path.exists(path) else None


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


# ----------------------------------------------------------------------------------------------
# codecs


def codec_for(meta, where="meta.pkl"):
    """The codec of `meta`, as read_meta returns it or a checkpoint has kept it; GPT-2's where it is None.

    Both kinds have vocab_size, encode(text) -> ids, decode(ids) -> text, piece(id) -> the bytes of
    UTF-8 that the id adds (not always whole characters), and known(id) -> whether it stands for anything.
    """
    return BPECodec() if meta is None else CharCodec(meta, where)


def codec_of_run(checkpoint, path, vocab_size):
    """(codec, remarks for the user) of the model of `vocab_size` ids in `checkpoint`, read from `path`.

    The codec is the one kept in the checkpoint, since the dataset may have been prepared again from another text. Where
    the checkpoint has none, as nanoGPT's do, it is the dataset's of today. UserError where neither has one, or it has
    more ids than the model.
    """
    folder = os.path.join(ROOT, "data", str(checkpoint["config"].get("dataset")))
    meta_path = os.path.join(folder, "meta.pkl")
    if not _has_codec(checkpoint, path):
        here = os.path.exists(meta_path)
        codec = codec_for(read_meta(meta_path), meta_path) if here else codec_for(checkpoint.get("meta"), path)
        return codec_that_fits(codec, vocab_size, path), []
    codec = codec_that_fits(codec_for(checkpoint["meta"], path), vocab_size, path)
    remark = f"{folder} has other tokens than the run was trained on: using those in {path}"
    return codec, [remark] if _has_other_tokens(folder, codec) else []


def _has_codec(checkpoint, path):
    """Whether the checkpoint read from `path` keeps what its ids stand for. None is kept where these are GPT-2's."""
    meta = checkpoint.get("meta")
    return "meta" in checkpoint and (meta is None or "stoi" in check_meta(meta, path))


def _has_other_tokens(folder, codec):
    """Whether the ids of the dataset in `folder`, as it is now, stand for something else than those of `codec`."""
    try:
        meta = find_meta(folder)
    except UserError:  # a broken file does not say
        return False
    if meta is None:
        return isinstance(codec, CharCodec) and os.path.exists(os.path.join(folder, "train.bin"))
    return "stoi" in meta and not (isinstance(codec, CharCodec) and meta["stoi"] == codec.stoi)


def check_tokens(checkpoint, path, dataset, meta):
    """UserError if the ids of the model in `checkpoint`, read from `path`, stand for other tokens than the dataset's.

    `meta` is the dataset's find_meta(). A checkpoint that does not keep its tokens, such as nanoGPT's, may have any."""
    if _has_codec(checkpoint, path) and _stoi(checkpoint["meta"]) != _stoi(meta):
        raise UserError(
            f"the ids of the model in {path} stand for other tokens than those of {dataset}: prepare {dataset} with "
            "the tokens of that model, or train from scratch"
        )


def _stoi(meta):
    return meta and meta.get("stoi")


def vocabulary_remark(init_from, vocab_size, dataset, meta):
    """A line if the dataset has other tokens than the GPT-2 in `init_from`, whose ids are `vocab_size`; else None."""
    if not meta:
        return None
    theirs = _stoi(meta)
    if os.path.isfile(os.path.join(init_from, "tokenizer.json")):
        try:
            codec = codec_of_folder(init_from, vocab_size)
            theirs = codec.stoi if isinstance(codec, CharCodec) else None
        except UserError:  # a tokenizer of another kind: training does not need it
            theirs = None
    if meta["vocab_size"] != vocab_size or theirs != _stoi(meta):
        return (
            f"{dataset} has tokens of its own, {meta['vocab_size']}, not the {vocab_size} of {init_from}: what that "
            "model knows of its tokens is lost"
        )
    return None


def codec_of_folder(name_or_path, vocab_size):
    """The codec of a GPT-2: that of the characters in the tokenizer.json which export.py has put into its folder,
    else GPT-2's own. UserError where the folder's is of another kind, or has more ids than the model."""
    path = os.path.join(name_or_path, "tokenizer.json")
    if not os.path.isfile(path):
        return codec_that_fits(BPECodec(), vocab_size, name_or_path)
    try:
        with open(path, encoding="utf-8") as f:
            model = json.load(f)["model"]
        kind, vocab = model["type"], dict(model["vocab"])
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is damaged'}") from None
    if kind == "WordLevel":
        meta = {"vocab_size": vocab_size, "stoi": vocab, "itos": {i: c for c, i in vocab.items() if type(i) is int}}
        return CharCodec(meta, path)
    if kind != "BPE" or len(vocab) != BPECodec.vocab_size:
        raise UserError(f"{path} is neither GPT-2's tokenizer nor one of characters, and no other is known here")
    return codec_that_fits(BPECodec(), vocab_size, name_or_path)


def codec_that_fits(codec, vocab_size, path):
    if codec.vocab_size > vocab_size:
        raise UserError(f"{path} has {vocab_size} token ids, fewer than the {codec.vocab_size} of its dataset's codec")
    return codec


def first_prompt(codec, start):
    """(a prompt, remarks for the user): `start` where `codec` knows its characters, else the vocabulary's first one."""
    try:
        codec.encode(start)
    except UserError as error:
        characters = [(i, c) for c, i in codec.stoi.items() if len(c) == 1]
        if not characters:
            raise
        first = min(characters)[1]
        return first, [f"{error}, the default prompt: the samples begin with {first!r} (--start= gives another)"]
    return start, []


class CharCodec:
    """A character an id, by the table in `meta`; UserError where it has none, naming `where` it is from."""

    def __init__(self, meta, where="meta.pkl"):
        meta = check_meta(meta, where)
        if "stoi" not in meta:
            missing = "no stoi from texts to ids, no itos from ids to texts"
            raise UserError(f"{where} has no characters ({missing}), so its ids cannot be made into text")
        self.vocab_size, self.stoi, self.itos = meta["vocab_size"], meta["stoi"], meta["itos"]

    def encode(self, text):
        """List of ids; UserError names the first character that the vocabulary lacks."""
        for character in text:
            if character not in self.stoi:
                raise UserError(f"the vocabulary has no character {character!r} (U+{ord(character):04X})")
        return [self.stoi[character] for character in text]

    def decode(self, ids):
        return "".join(self.itos[i] for i in ids)

    def piece(self, id):
        return self.itos[id].encode("utf-8")

    def known(self, id):
        return id in self.itos


class BPECodec:
    """GPT-2's byte-pair encoding, through tiktoken. UserError where its vocabulary cannot be had.

    A model may have more ids (50304, rounded up for speed): those from 50257 on are not known.
    """

    vocab_size = 50257
    eot = 50256  # <|endoftext|>

    def __init__(self):
        import tiktoken

        try:
            self._encoding = tiktoken.get_encoding("gpt2")
        except (OSError, ValueError) as error:  # an OSError: so are the exceptions of requests
            raise UserError(
                f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}): on a machine with a "
                "network run TIKTOKEN_CACHE_DIR=DIR python -c "
                "\"import tiktoken; tiktoken.get_encoding('gpt2')\", copy DIR to this one, and set "
                "TIKTOKEN_CACHE_DIR to where it is"
            ) from None

    def encode(self, text):
        """List of ids; <|endoftext|> in the text is the one token of that name."""
        return self._encoding.encode(text, allowed_special={"<|endoftext|>"})

    def encode_ordinary(self, text):
        """Ids as a dataset holds them, uint16 (n,); <|endoftext|> is but the characters it is spelt with."""
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype("<u2")

    def decode(self, ids):
        return self._encoding.decode(ids, errors="replace")

    def piece(self, id):
        return self._encoding.decode_single_token_bytes(id)

    def known(self, id):
        return 0 <= id < self.vocab_size


# Where a text can be cut and its parts encoded by themselves: before a blank or a line feed that a
# visible character follows. GPT-2's pattern starts a piece there in any case, since it leaves the last
# character of a run of white space to what follows. And what stands before the cut splits as it would
# have, since the pattern takes white space at the end of a text whole.
BORDER = re.compile(r".*(?=[ \n]\S)", re.DOTALL)  # greedy, so this finds the last one
PIECE = 1 << 17  # characters


def bpe_pieces(texts):
    """Cuts the concatenation of `texts` anew: the pieces' GPT-2 tokens, in a row, are those of the whole.

    A piece has about PIECE characters, and never over four times as many (tiktoken breaks down on a
    million blanks): where two PIECEs hold no border, as no natural text does, it ends where it stands.
    """
    pending = ""
    for text in texts:
        for start in range(0, len(text), PIECE):
            pending += text[start : start + PIECE]
            if len(pending) < PIECE:
                continue
            border = BORDER.match(pending)
            cut = border.end() if border else 0
            if not cut and len(pending) >= 2 * PIECE:
                cut = len(pending)
            if cut:
                yield pending[:cut]
                pending = pending[cut:]
    if pending:
        yield pending
