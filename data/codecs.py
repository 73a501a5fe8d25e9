"""Text to token ids and back: a codec for each kind of tokens.

Every codec has vocab_size, encode(text) -> ids, decode(ids) -> text, piece(id) -> the bytes of UTF-8 that the id adds
(not always whole characters), known(id) -> whether it stands for anything, and
    eot, end      the id that ends a document, and its name; None where there is none
    tokenizer     the text of its tokenizer.json; None for characters and for GPT-2's tokens
    meta          the content of its meta.pkl; None but for characters
    bytes_by_id   whether piece() tells how many bytes of the original text an id stands for
    cuts_at_lines whether ids depend on where a text is cut, so that it is cut at line ends (data/text_files.py)
encode_plain(text) -> the ids (n,) of plain text, for a bin; encode_ordinary(text) is without its error and dtype.
"""

import itertools
import os
import re
import tempfile
from collections import Counter
from contextlib import suppress
from types import SimpleNamespace

import numpy as np

from data.bins import dtype_of
from data.meta import check_meta
from nanogpt.errors import UserError, require

END = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
# what tiktoken calls GPT-2's encoder.json in its cache, which it stores last: the SHA-1 of its address
GPT2_FILE = "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6"


def bytes_of_ids(codec, vocab_size):
    """How many bytes of text each of `vocab_size` ids stands for, (V,) int64: none for the end of a document, and for
    ids that stand for nothing. None where an id does not tell."""
    if not codec.bytes_by_id:
        return None
    return np.array([len(codec.piece(i)) if codec.known(i) and i != codec.eot else 0 for i in range(vocab_size)])


def first_prompt(codec, start):
    """(a prompt, remarks for the user): `start`, or where `codec` lacks its characters the first token that is one."""
    tokens = (codec.decode([i]) for i in range(codec.vocab_size) if codec.known(i))
    for text in itertools.chain([start], tokens):
        with suppress(UserError):
            if codec.encode(text):
                said = f"no tokens for {start!r}, the default prompt: the samples begin with {text!r} (or --start=)"
                return text, [] if text == start else [said]
    return start, []


class Codec:
    """What the codecs have in common. `_pieces`, {id: bytes}: of every id that stands for something."""

    eot = end = tokenizer = meta = None
    bytes_by_id = True
    cuts_at_lines = False

    def known(self, id):
        return id in self._pieces

    def piece(self, id):
        return self._pieces[id]

    def encode(self, text):
        """List of ids; the token that ends a document may be in the text by its name. UserError: encode_plain()."""
        ids = []
        for i, part in enumerate([text] if self.eot is None else text.split(self.end)):
            found = self.encode_plain(part).tolist()
            ids += [self.eot, *found] if i else found
        return ids

    def encode_plain(self, text):
        """Ids (n,) of plain text, in a bin's dtype. UserError names characters that the vocabulary lacks."""
        ids = self.encode_ordinary(text)
        if missing := self.missing(text, ids):
            most = ", ".join(shown(part) for part, _ in missing.most_common(5))
            more = " and others" if len(missing) > 5 else ""
            raise UserError(f"the vocabulary has no tokens for {most}{more}")
        return ids.astype(dtype_of(self.vocab_size))

    def decode(self, ids):
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def missing(self, text, ids):
        """Counter of the characters of `text` that the vocabulary lacks, or of words whose characters it all has;
        `ids` are those of the text."""
        return Counter()


class CharCodec(Codec):
    """A character an id, by the table in `meta`; UserError where it has none, naming `where` it is from."""

    def __init__(self, meta, where="meta.pkl"):
        self.meta = meta = check_meta(meta, where)
        if "stoi" not in meta:
            raise UserError(f"{where} has no characters (no stoi and no itos), so its ids cannot be made into text")
        self.vocab_size, self.stoi = meta["vocab_size"], meta["stoi"]
        self._pieces = {i: text.encode("utf-8") for i, text in meta["itos"].items()}

    def encode_ordinary(self, text):
        return np.array([self.stoi[c] for c in text if c in self.stoi])

    def missing(self, text, ids):
        return Counter(c for c in text if c not in self.stoi)


class BPECodec(Codec):
    """Byte-pair encoding of bytes, through tiktoken: GPT-2's, or that of `encoding`, a tiktoken.Encoding that splits a
    text as GPT-2 does. So a text can be cut without a change of its ids (data/text_files.py).

    `tokenizer` is the text of its tokenizer.json, `end` the name of the token that ends a document, `ranks` {a token's
    bytes: its id}. A model may have more ids than the codec (50304, GPT-2's 50257 rounded up for speed): those are not
    known.
    """

    def __init__(self, encoding=None, tokenizer=None, end=END):
        self._encoding = encoding or gpt2_encoding()
        self.tokenizer, self.end, self.ranks = tokenizer, end, self._encoding._mergeable_ranks
        self.eot = self._encoding._special_tokens.get(end)
        self.vocab_size = self._encoding.max_token_value + 1
        self._pieces = {id: token for token, id in self.ranks.items()} | {self.eot: end.encode("utf-8")}

    def encode_ordinary(self, text):
        return self._encoding.encode_to_numpy(text, disallowed_special=())


def gpt2_is_cached():
    """Whether tiktoken has GPT-2's vocabulary on disk, so that it need not fetch it."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = os.path.join(tempfile.gettempdir(), "data-gym-cache") if folder is None else folder
    return os.path.exists(os.path.join(folder, GPT2_FILE))


def gpt2_encoding():
    """tiktoken's GPT-2; UserError where its vocabulary cannot be had."""
    import tiktoken

    try:
        return tiktoken.get_encoding("gpt2")
    except (OSError, ValueError) as error:  # an OSError: so are the exceptions of requests
        raise UserError(
            f"tiktoken cannot fetch GPT-2's vocabulary ({type(error).__name__}): on a machine with a network run "
            "TIKTOKEN_CACHE_DIR=DIR python -c \"import tiktoken; tiktoken.get_encoding('gpt2')\", copy DIR to this "
            "one, and set TIKTOKEN_CACHE_DIR to where it is"
        ) from None


class TokenizerCodec(Codec):
    """Any tokenizer.json, through Hugging Face's tokenizers. Its normalizer may change a text: then how many bytes of
    the original an id stands for depends on the text, and piece() only tells tokens apart.

    `text` is the file's, `end` the name of the token that ends a document (None: none), `unknown` the id of what the
    vocabulary lacks (None: none), `bytes_of` gives the bytes that a token's name spells, where they are the text's own.
    Other special tokens are in no text, so they are not known. BPE dropout is switched off. UserError, which names
    `where` the text is from, if tokenizers cannot read it.
    """

    cuts_at_lines = True

    def __init__(self, text, where, end, unknown, bytes_of=None):
        require(where, "tokenizers")
        from tokenizers import Tokenizer

        tokenizer = self._tokenizer = Tokenizer.from_str(text)
        model = tokenizer.model
        if hasattr(model, "dropout"):  # it is a BPE
            model.dropout = None
            model.unk_token = model.unk_token or "\0no token\0"  # so it raises where it would drop a character silently
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = True  # <|endoftext|> in a text is plain text
        vocab = tokenizer.get_vocab()
        self.tokenizer, self.end, self.eot = text, end, vocab.get(end)
        self._unknown = -1 if unknown is None else unknown
        self.vocab_size, self.bytes_by_id = max(vocab.values()) + 1, bool(bytes_of)
        added = tokenizer.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special and id != self.eot} | {unknown}
        self._pieces = {
            id: bytes_of(name) if bytes_of and id not in added else name.encode("utf-8")
            for name, id in vocab.items()
            if id not in special
        }
        names = [name for name, id in vocab.items() if id in (self.eot, self._unknown)]
        inside = "|".join(f"(?<={re.escape(name[:1])})(?={re.escape(name[1:])})" for name in names)
        self._inside_names = re.compile(inside or r"(?!)")  # places in a text, and (?!) is in none

    def encode_ordinary(self, text):
        """Ids of plain text, (n,): -1 for what the vocabulary lacks, where it has no id for that."""
        return np.array([id for _, found in self._parts(text) for id in found.ids])

    def _parts(self, text):
        """[(part, its encoding)] of the text: the whole, or, where a model takes a name in it for the end of a document
        or for an unknown token, as it has that name among its pieces, the text cut inside such names."""
        found = self._encode(text)
        if {self.eot, self._unknown}.isdisjoint(found.ids):
            return [(text, found)]
        return [(part, self._encode(part)) for part in self._inside_names.split(text)]

    def _encode(self, text):
        """What has its `ids` and `offsets`. Where tokenizers raises, as no id stands for what the vocabulary lacks, the
        whole text is unknown."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception:  # its own class of exception
            return SimpleNamespace(ids=[self._unknown], offsets=[(0, len(text))])

    def missing(self, text, ids):
        if self._unknown not in ids:
            return Counter()
        words = [
            part[start:end]
            for part, found in self._parts(text)
            for id, (start, end) in zip(found.ids, found.offsets, strict=True) if id == self._unknown and start < end
        ]  # fmt: skip
        alone = Counter(c for c in "".join(words) if self._unknown in self._encode(c).ids)
        return alone or Counter(words)  # one character may make a whole word unknown; or words are all that is known

    def decode(self, ids):
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def shown(text):
    """A character or a word in an error. A word may be unknown because it is long."""
    return f"{text!r} (U+{ord(text):04X})" if len(text) == 1 else f"{text[:20]!r} ({len(text):,} characters)"
