"""Text to token ids and back: a codec for each kind of tokens.

Every codec has vocab_size, encode(text) -> ids, decode(ids) -> text, piece(id) -> the bytes of UTF-8 that the id adds
(not always whole characters), known(id) -> whether it stands for anything, and
    eot           the id that ends a document, or None
    tokenizer     the text of its tokenizer.json; None for characters and for GPT-2's tokens
    bytes_by_id   whether piece() tells how many bytes of the original text an id stands for
A prepare script uses three more: encode_ordinary(text), missing(text, ids) and
    cuts_at_lines whether ids depend on where a text is cut, so that it is cut at line ends (data/pieces.py)
"""

import functools
import itertools
import math
import os
import re
import tempfile
from collections import Counter

import numpy as np

from data.bins import dtype_of
from data.meta import check_meta
from nanogpt.errors import UserError, require

END = "<|endoftext|>"
GPT2_VOCAB_SIZE = 50257
# what tiktoken calls GPT-2's vocab.bpe and encoder.json in its cache: the SHA-1 of their addresses
GPT2_FILES = ("6d1cbeee0f20b3d9449abfede4726ed8212e3aee", "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6")


def bytes_of_ids(codec, vocab_size):
    """How many bytes of text each of `vocab_size` ids stands for, (V,) int64: none for the end of a document, and for
    ids that stand for nothing. None where an id does not tell."""
    if not codec.bytes_by_id:
        return None
    pieces = (codec.piece(i) if codec.known(i) and i != codec.eot else b"" for i in range(vocab_size))
    return np.array([len(piece) for piece in pieces])


def first_prompt(codec, start):
    """(a prompt, remarks for the user): `start`, or where `codec` lacks its characters the first token that is one."""
    lacking = None
    for text in itertools.chain([start], (codec.decode([i]) for i in range(codec.vocab_size) if codec.known(i))):
        try:
            if codec.encode(text):
                said = f"{lacking}, the default prompt: the samples begin with {text!r} (--start= gives another)"
                return text, [said] if lacking else []
        except UserError as error:
            lacking = lacking or error
    raise lacking


# ----------------------------------------------------------------------------------------------
# codecs


class Codec:
    """What the codecs have in common. `_pieces`, {id: bytes}: of every id that stands for something."""

    eot = tokenizer = None
    bytes_by_id = True
    cuts_at_lines = False

    def known(self, id):
        return id in self._pieces

    def piece(self, id):
        return self._pieces[id]

    def decode(self, ids):
        return b"".join(map(self.piece, ids)).decode("utf-8", "replace")

    def missing(self, text, ids):
        """Counter of the characters of `text` that the vocabulary lacks; `ids` are those of the text."""
        return Counter()


class CharCodec(Codec):
    """A character an id, by the table in `meta`; UserError where it has none, naming `where` it is from."""

    def __init__(self, meta, where="meta.pkl"):
        meta = check_meta(meta, where)
        if "stoi" not in meta:
            raise UserError(f"{where} has no characters (no stoi and no itos), so its ids cannot be made into text")
        self.vocab_size, self.stoi = meta["vocab_size"], meta["stoi"]
        self._pieces = {i: text.encode("utf-8") for i, text in meta["itos"].items()}

    def encode(self, text):
        """List of ids; UserError names the first character that the vocabulary lacks."""
        for character in text:
            if character not in self.stoi:
                raise UserError(f"the vocabulary has no character {shown(character)}")
        return [self.stoi[character] for character in text]

    def encode_ordinary(self, text):
        """Ids as a dataset holds them, (n,); UserError as encode()."""
        return np.array(self.encode(text), dtype=dtype_of(self.vocab_size))


class BPECodec(Codec):
    """Byte-pair encoding of bytes, through tiktoken: GPT-2's, or that of `encoding`, a tiktoken.Encoding that splits a
    text as GPT-2 does. So a text can be cut without a change of its ids (data/pieces.py).

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

    def encode(self, text):
        """List of ids; <|endoftext|> in the text is the one token of that name."""
        return self._encoding.encode(text, allowed_special={self.end}, disallowed_special=())

    def encode_ordinary(self, text):
        """Ids as a dataset holds them, (n,); <|endoftext|> is but the characters it is spelt with."""
        return self._encoding.encode_to_numpy(text, disallowed_special=()).astype(dtype_of(self.vocab_size))


def gpt2_is_cached():
    """Whether tiktoken has GPT-2's vocabulary on disk, so that it need not fetch it."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", os.environ.get("DATA_GYM_CACHE_DIR"))
    folder = os.path.join(tempfile.gettempdir(), "data-gym-cache") if folder is None else folder
    return all(os.path.exists(os.path.join(folder, name)) for name in GPT2_FILES)


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
        from tokenizers.models import BPE

        try:
            self._tokenizer = Tokenizer.from_str(text)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # its own class of exception is no other than Exception, and a panic is none
            raise UserError(f"{where} is not a tokenizer.json that can be read: {str(error)[:200]}") from None
        self._drops = unknown is None and isinstance(self._tokenizer.model, BPE)  # what it lacks, without a word
        if isinstance(self._tokenizer.model, BPE):
            self._tokenizer.model.dropout = None
        self._longest_word = getattr(self._tokenizer.model, "max_input_chars_per_word", math.inf)  # WordPiece's
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # <|endoftext|> in a text is plain text
        self.tokenizer, self.end, self._unknown = text, end, unknown
        self.eot = self._tokenizer.token_to_id(end) if end else None
        vocab = self._tokenizer.get_vocab()
        if not vocab:
            raise UserError(f"{where} has no tokens")
        self.vocab_size, self.bytes_by_id = max(vocab.values()) + 1, bool(bytes_of)
        added = self._tokenizer.get_added_tokens_decoder()
        special = {id for id, token in added.items() if token.special and id != self.eot} | {unknown}
        self._pieces = {
            id: bytes_of(name) if bytes_of and id not in added else name.encode("utf-8")
            for name, id in vocab.items()
            if id not in special
        }
        names = [end, None if unknown is None else self._tokenizer.id_to_token(unknown)]
        inside = (f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if name and name[1:])
        self._inside_names = re.compile("|".join(inside) or r"(?!)")  # places in a text, and (?!) is in none
        self._lacks = functools.cache(self._lacks)

    def encode(self, text):
        """List of ids; the token that ends a document may stand in the text by its name. UserError where the vocabulary
        lacks a character, or the text gives no ids."""
        ids = []
        for i, part in enumerate(text.split(self.end) if self.end else [text]):
            ids += [self.eot] if i else []
            ids += (found := self.encode_ordinary(part).tolist())
            if missing := self.missing(part, found):
                raise UserError(f"the vocabulary has no character {shown(next(iter(missing)))}")
        if not ids:
            raise UserError(f"the tokenizer makes no token of {text[:20]!r}")
        return ids

    def encode_ordinary(self, text):
        """Ids as a dataset holds them, (n,): none where the vocabulary lacks a character and no id stands for that."""
        ids = self._encode(text) or []
        if {self.eot, self._unknown} & set(ids) and self._inside_names.search(text):
            # a model that has such a name among its pieces takes it for that token: it cannot where the text is cut
            ids = [id for part in self._inside_names.split(text) for id in self._encode(part) or []]
        return np.array(ids, dtype=dtype_of(self.vocab_size))

    def _encode(self, text):
        """Its ids; None where the vocabulary lacks a character and no id stands for that, which tokenizers raises."""
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception:  # its own class of exception
            return None

    def _lacks(self, character):
        """Whether the vocabulary lacks a character, or a part of it, where it stands alone."""
        tokenizer = self._tokenizer
        if not self._drops:
            ids = self._encode(character)
            return ids is None or self._unknown in ids
        text = tokenizer.normalizer.normalize_str(character) if tokenizer.normalizer else character
        words = tokenizer.pre_tokenizer.pre_tokenize_str(text) if tokenizer.pre_tokenizer else [(text, None)]
        return any(sum(len(token.value) for token in tokenizer.model.tokenize(word)) < len(word) for word, _ in words)

    def missing(self, text, ids):
        if self._unknown in ids:
            found = self._tokenizer.encode(text, add_special_tokens=False)
            spans = zip(found.ids, found.offsets, strict=True)
            words = [text[start:end] for id, (start, end) in spans if id == self._unknown]
            if len(longest := max(words, key=len)) > self._longest_word:
                raise UserError(
                    f"the tokenizer takes no word of more than {self._longest_word} characters (WordPiece's "
                    f"max_input_chars_per_word), and {longest[:20]!r}... has {len(longest):,}"
                )
            text = "".join(words)
        elif not self._drops and (len(ids) or self._encode(text) is not None):
            return Counter()
        alone = Counter(c for c in text if self._lacks(c))
        # one character may make a whole word unknown, or words may be all that is known
        return alone if alone or self._drops else Counter(text)

    def decode(self, ids):
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)


def shown(character):
    return f"{character!r} (U+{ord(character):04X})"
