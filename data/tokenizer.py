"""tokenizer.json, Hugging Face's file of a tokenizer: trained on a text, found, read into a codec, and written.

tiktoken encodes a byte-level BPE that splits a text as GPT-2 does, with the file's own merges: several times as fast as
the library tokenizers, which encodes the other kinds, and trains. It is imported for these two alone.
"""

import json
import os
from contextlib import contextmanager
from itertools import pairwise

from data.codecs import END, GPT2_VOCAB_SIZE, BPECodec, CharCodec, TokenizerCodec
from nanogpt.errors import UserError, require
from nanogpt.text_file import read_text

LEAST_VOCAB_SIZE = 257  # a token for each byte, and <|endoftext|>
LARGEST_ID = (1 << 24) - 1
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # names for the end of a document, the first there is counts
GPT2_SIGNS = {"Hello": 15496, "\u0120world": 995, "\u0120gazed": 50255, END: 50256}  # U+0120 spells a blank
# how GPT-2 splits a text, as tiktoken has it
GPT2_SPLIT = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
CHARACTER = r"[\s\S]"

# The format spells each byte as a visible character: printable ones of Latin-1 as they are, the others from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)}
BYTE_OF = {character: byte for byte, character in SPELLING.items()}

# ----------------------------------------------------------------------------------------------
# training


def check_vocab_size(vocab_size):
    """UserError where no tokenizer of that size can be trained here."""
    if not LEAST_VOCAB_SIZE <= vocab_size <= LARGEST_ID:
        raise UserError(f"--vocab_size={vocab_size}: must be at least {LEAST_VOCAB_SIZE}, and at most {LARGEST_ID:,}")
    require("--vocab_size", "tokenizers")


def train_tokenizer(texts, vocab_size):
    """The text of a tokenizer.json: a byte-level BPE of `vocab_size` tokens in all, trained on `texts`, which GPT-2's
    pattern splits. The same texts give the same tokenizer. UserError where they give fewer tokens.

    Call check_vocab_size() first. <|endoftext|> has the last id; tokenizers by itself would give it the first one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=by_bytes.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END])
    if (reached := tokenizer.get_vocab_size()) < vocab_size:
        raise UserError(f"--vocab_size={vocab_size}: the text gives no more than {reached:,} tokens: give at most that")
    return tokenizer.to_str(pretty=True)


# ----------------------------------------------------------------------------------------------
# reading


def find_tokenizer(path_or_name):
    """The codec of --tokenizer=PATH: a tokenizer.json, or a folder that has one; "gpt2" is GPT-2's. UserError where it
    is none of them."""
    path = os.path.join(path_or_name, "tokenizer.json") if os.path.isdir(path_or_name) else path_or_name
    if os.path.exists(path):
        return codec_of_tokenizer(read_text(path), path)
    if path == "gpt2":
        return BPECodec()
    raise UserError(f"--tokenizer={path_or_name}: takes a tokenizer.json, a folder that has one, or gpt2")


@contextmanager
def _reading(where):
    """UserError, naming `where`, if what the block reads is damaged, or not a tokenizer.json."""
    try:
        yield
    except (UserError, OSError, MemoryError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers raises an Exception of no class of its own, or panics, which is none
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise UserError(f"{where} is not a tokenizer.json that can be read ({reason})") from None


def codec_of_tokenizer(text, where):
    """The codec of the tokenizer.json whose `text` is from `where`; UserError if it is damaged or of no known kind."""
    with _reading(where):
        codec = _codec(json.loads(text), text, where)
    if codec.vocab_size - 1 > LARGEST_ID:
        raise UserError(f"{where} has an id above {LARGEST_ID:,}")
    return codec


def _codec(content, text, where):
    """The codec of the tokenizer.json with this `text`, whose `content` may have wrong types in it."""
    model, pre_tokenizer = content["model"], content.get("pre_tokenizer") or {}
    vocab = model["vocab"] if isinstance(model["vocab"], dict) else {}  # Unigram's is a list
    if model.get("type") == "WordLevel" and pre_tokenizer.get("pattern") == {"Regex": CHARACTER}:  # by _characters()
        return CharCodec({"vocab_size": max(vocab.values(), default=0) + 1, "stoi": vocab}, where)
    added_tokens = content.get("added_tokens") or []
    added = {token["content"]: token["id"] for token in added_tokens}
    end = next((name for name in ENDS if name in added or name in vocab), None)
    *before, last = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    # whether its words are the bytes of the text itself, with nothing put before them
    by_bytes = (
        not content.get("normalizer") and (content.get("decoder") or {}).get("type") == "ByteLevel"
        and last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True)
    )  # fmt: skip
    if (
        by_bytes and not before and last.get("use_regex", True)  # it splits as GPT-2 does
        and model.get("type") == "BPE" and all(token.get("special") for token in added_tokens)
        and not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    ):  # fmt: skip
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        # a few of GPT-2's tokens tell it, since 50,000 merges take a second to compare
        has_gpt2s_size = (len(vocab), len(merges)) == (GPT2_VOCAB_SIZE, GPT2_VOCAB_SIZE - LEAST_VOCAB_SIZE)
        if has_gpt2s_size and GPT2_SIGNS.items() <= vocab.items() and added == {END: GPT2_SIGNS[END]}:
            return BPECodec()
        if ranks := _ranks(vocab, merges, added):
            import tiktoken

            encoding = tiktoken.Encoding("own", pat_str=GPT2_SPLIT, mergeable_ranks=ranks, special_tokens=added)
            return BPECodec(encoding, text, end or END)
    unknown = model.get("unk_id", vocab.get(model.get("unk_token")))  # Unigram has an id, the others have a name
    return TokenizerCodec(text, where, end, unknown, _bytes if by_bytes else None)


def _ranks(vocab, merges, added):
    """{a token's bytes: its id} where tiktoken computes the same ids from these; else None.

    tokenizers joins the pairs that it lists, in that order. tiktoken joins any two parts whose bytes are a token, the
    lowest id first. The two agree on all texts if the merges are those that the ids give."""
    ranks = {_bytes(name): id for name, id in vocab.items() if name not in added}
    ids = [*ranks.values(), *added.values()]
    has_bytes = {token for token in ranks if len(token) < 2} == {bytes([byte]) for byte in range(256)}
    pairs = [tuple(map(_bytes, merge)) for merge in merges]
    return ranks if has_bytes and len(set(ids)) == len(ids) and pairs == _merges(ranks) else None


def _merges(ranks):
    """Of each token of several bytes, by its id: the parts that byte-pair encoding by `ranks` joins to it at last."""
    return [_last_parts(token, ranks) for token in sorted(ranks, key=ranks.get) if len(token) > 1]


def _last_parts(token, ranks):
    """The two parts that byte-pair encoding by `ranks` joins last in making `token`; more parts where it makes none."""
    parts, rank = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in pairwise(parts)]
        lowest = min(pairs)
        if lowest >= rank:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def _bytes(spelt):
    return bytes(BYTE_OF[character] for character in spelt)


def same_tokenizer(one, other):
    """Whether two texts of a tokenizer.json give the same ids: they may differ in how they are written."""
    with _reading("one of the two tokenizers"):
        return _meaning(one) == _meaning(other)


def _meaning(text):
    """The content of a tokenizer.json without what changes no id of a text."""
    # transformers changes the last digit of a Unigram's scores in saving it
    content = json.loads(text, parse_float=lambda digits: round(float(digits), 4))
    for key in ("truncation", "padding", "post_processor"):  # no tokens that it adds are asked for here
        content.pop(key, None)
    content["model"].pop("dropout", None)  # it is switched off
    return content


# ----------------------------------------------------------------------------------------------
# writing


def tokenizer_of(codec):
    """The text of the tokenizer.json of any codec."""
    if codec.tokenizer:
        return codec.tokenizer
    content = _characters(codec.stoi) if isinstance(codec, CharCodec) else _gpt2s(codec.ranks)
    return json.dumps({"version": "1.0"} | content, ensure_ascii=False, indent=2) + "\n"


def _characters(stoi):
    """The tokenizer.json, as a dict, that splits a text after every character, and looks each up in `stoi`."""
    split = {"type": "Split", "pattern": {"Regex": CHARACTER}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": stoi, "unk_token": ""}
    return {"added_tokens": [], "pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": model}


def _gpt2s(ranks):
    """GPT-2's tokenizer.json, as a dict. `ranks` are its {a token's bytes: its id}."""

    def spell(token):
        return "".join(SPELLING[byte] for byte in token)

    vocab = {spell(token): ranks[token] for token in sorted(ranks, key=ranks.get)} | {END: GPT2_SIGNS[END]}
    model = {"type": "BPE", "vocab": vocab, "merges": [[spell(part) for part in parts] for parts in _merges(ranks)]}
    flags = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    added = [{"id": GPT2_SIGNS[END], "content": END} | flags]
    return {"added_tokens": added, "pre_tokenizer": by_bytes, "decoder": by_bytes, "model": model}
