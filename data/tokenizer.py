"""tokenizer.json, Hugging Face's file of a tokenizer: trained on a text, found, read into a codec, and written.

A byte-level BPE whose split is known here is encoded by tiktoken, from the file's own merges: several times as fast as
by tokenizers. That library computes the other kinds, and trains; it is imported for these two alone.
"""

import json
import os

import numpy as np

from data.codecs import END, GPT2_VOCAB_SIZE, BPECodec, CharCodec, TokenizerCodec, tiktoken_encoding
from nanogpt.errors import UserError, require

LEAST_VOCAB_SIZE = 257  # a token for each byte, and <|endoftext|>
LARGEST_ID = (1 << 24) - 1
ENDS = (END, "</s>", "<|end_of_text|>", "<eos>", "[SEP]")  # names for the end of a document, the first there is counts
GPT2_SIGNS = {"Hello": 15496, "\u0120world": 995, "\u0120gazed": 50255, END: 50256}  # U+0120 spells a blank
CHARACTER = r"[\s\S]"

_O200K = "|".join([
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
    r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+",
])  # fmt: skip
# {how a text is split: (the pattern in tokenizer.json, None for ByteLevel's own; the same as tiktoken writes it)}.
# Possessive quantifiers are quicker. They stand in tiktoken's alone: tokenizers reads `{1,3}+` as another thing.
SPLITS = {
    "GPT-2": (None, r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""),
    "cl100k": (
        r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
        r"""|\s*[\r\n]+|\s+(?!\S)|\s+""",
        r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
        r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    ),
    "o200k": (_O200K, _O200K),
}
SPLIT_OF_TIKTOKEN = {"gpt2": "GPT-2", "r50k": "GPT-2", "p50k": "GPT-2", "cl100k": "cl100k", "o200k": "o200k"}

# The format spells each byte as a visible character: printable ones of Latin-1 as they are, the others from U+0100 on.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
SPELLING = {byte: chr(byte) for byte in _PRINTABLE} | {byte: chr(0x100 + i) for i, byte in enumerate(_OTHERS)}
BYTE_OF = {character: byte for byte, character in SPELLING.items()}

# ----------------------------------------------------------------------------------------------
# training


def check_vocab_size(vocab_size):
    """UserError where no tokenizer of that size can be trained here."""
    if vocab_size < LEAST_VOCAB_SIZE:
        raise UserError(
            f"--vocab_size={vocab_size}: must be at least {LEAST_VOCAB_SIZE}: a token for each byte, and {END}"
        )
    if vocab_size > LARGEST_ID:
        raise UserError(f"--vocab_size={vocab_size}: must be at most {LARGEST_ID:,}")
    require("--vocab_size", "tokenizers")


def train_tokenizer(texts, vocab_size):
    """The text of a tokenizer.json: a byte-level BPE of `vocab_size` tokens in all, trained on `texts`, which GPT-2's
    pattern splits. The same texts give the same tokenizer. UserError where they give fewer tokens.

    <|endoftext|> has the last id; tokenizers by itself would give it the first one."""
    check_vocab_size(vocab_size)
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END])
    reached = tokenizer.get_vocab_size()
    if reached < vocab_size:
        raise UserError(f"--vocab_size={vocab_size}: the text gives no more than {reached:,} tokens: give at most that")
    return tokenizer.to_str(pretty=True)


# ----------------------------------------------------------------------------------------------
# reading


def find_tokenizer(path_or_name):
    """The codec of --tokenizer=PATH or NAME: a tokenizer.json, a folder that has one, or the name of an encoding of
    tiktoken's. UserError where it is none of them."""
    path = path_or_name
    if os.path.isdir(path):
        path = os.path.join(path, "tokenizer.json")
        if not os.path.isfile(path):
            raise UserError(f"--tokenizer={path_or_name}: there is no tokenizer.json in this folder")
    if os.path.exists(path):
        return codec_of_tokenizer(read_tokenizer(path), path)
    import tiktoken

    names = tiktoken.list_encoding_names()
    if path_or_name not in names:
        raise UserError(
            f"--tokenizer={path_or_name}: takes a tokenizer.json, a folder that has one, or one of tiktoken's: "
            f"{', '.join(sorted(names))}"
        )
    if path_or_name == "gpt2":
        return BPECodec()
    return codec_of_tokenizer(tokenizer_of_encoding(tiktoken_encoding(path_or_name)), f"--tokenizer={path_or_name}")


def read_tokenizer(path):
    """The text of the tokenizer.json at `path`; UserError where it cannot be read."""
    try:
        with open(path, encoding="utf-8") as f:
            return f.read()
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is no UTF-8'}") from None


def parse(text, where):
    """The content of a tokenizer.json as a dict whose "model" is a dict; UserError, naming `where`, if it is none."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise UserError(f"{where} is not a tokenizer.json: it is damaged, or of another kind")
    return content


def codec_of_tokenizer(text, where):
    """The codec of the tokenizer.json whose `text` is from `where`; UserError if it is damaged or of no known kind."""
    content = parse(text, where)
    model, added = content["model"], _added_tokens(content, where)
    vocab = model.get("vocab")
    if _is_gpt2s(content, added):
        return BPECodec()
    if _is_characters(content):
        stoi = {c: i for c, i in vocab.items() if type(i) is int} if isinstance(vocab, dict) else {}
        meta = {"vocab_size": max(stoi.values(), default=0) + 1, "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
        return CharCodec(meta, where)
    names = [token["content"] for token in added] + list(vocab if isinstance(vocab, dict) else ())
    end = next((name for name in ENDS if name in names), None)
    if found := _byte_pairs(content, added):
        import tiktoken

        split, ranks = found
        special = {token["content"]: token["id"] for token in added}
        encoding = tiktoken.Encoding("own", pat_str=SPLITS[split][1], mergeable_ranks=ranks, special_tokens=special)
        return BPECodec(encoding, text, end if end in special else END, split)
    by_bytes = _splits_bytes(content) and not content.get("normalizer")
    codec = TokenizerCodec(text, where, end, _unknown_id(model), _bytes if by_bytes else None)
    if codec.vocab_size - 1 > LARGEST_ID:
        raise UserError(f"{where} has an id above {LARGEST_ID:,}")
    return codec


def _added_tokens(content, where):
    added = content.get("added_tokens") or []
    form = {"content": str, "id": int}
    if not isinstance(added, list) or not all(
        isinstance(token, dict) and all(type(token.get(key)) is kind for key, kind in form.items()) for token in added
    ):
        raise UserError(f"{where} is not a tokenizer.json: its added_tokens are none")
    return added


def _is_gpt2s(content, added):
    """Whether it is GPT-2's own, by a few of its tokens: 50,000 merges take a second to compare."""
    model = content["model"]
    vocab, merges = model.get("vocab"), model.get("merges")
    return (
        isinstance(vocab, dict) and len(vocab) == GPT2_VOCAB_SIZE and GPT2_SIGNS.items() <= vocab.items()
        and isinstance(merges, list) and len(merges) == GPT2_VOCAB_SIZE - LEAST_VOCAB_SIZE
        and _is_plain(content) and _split(content) == "GPT-2"
        and [token["content"] for token in added] == [END] and added[0].get("special") is True
    )  # fmt: skip


def _is_plain(content):
    """Whether it is a BPE of the bytes of the text itself, computed as usual."""
    model = content["model"]
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    return model.get("type") == "BPE" and not content.get("normalizer") and not any(model.get(name) for name in others)


def _is_characters(content):
    """Whether it is a tokenizer of characters, as tokenizer_of_characters() writes it."""
    split = content.get("pre_tokenizer")
    return (
        content["model"].get("type") == "WordLevel"
        and isinstance(split, dict)
        and split.get("pattern") == {"Regex": CHARACTER}
    )


def _unknown_id(model):
    """The id that stands for what the vocabulary lacks; None where it has none."""
    if type(model.get("unk_id")) is int:  # Unigram's
        return model["unk_id"]
    vocab, name = model.get("vocab"), model.get("unk_token")
    return vocab.get(name) if isinstance(vocab, dict) and isinstance(name, str) else None


def _byte_pairs(content, added):
    """(name in SPLITS, {a token's bytes: its id}) where tiktoken computes this tokenizer's ids from these; else None.

    tokenizers joins the pairs that it lists, in that order. tiktoken joins any two parts whose bytes are a token, the
    lowest id first. The two agree on all texts if ids rise with the merges, and each token's own bytes are joined from
    the parts that its merge names."""
    model = content["model"]
    split, vocab, merges = _split(content), model.get("vocab"), model.get("merges")
    if not _is_plain(content) or not split or not isinstance(vocab, dict) or not isinstance(merges, list):
        return None
    special = {token["content"]: token["id"] for token in added}
    if not all(token.get("special") for token in added) or not all(type(i) is int for i in vocab.values()):
        return None
    try:
        ranks = {bytes([byte]): vocab[character] for byte, character in SPELLING.items()}
        parts_of, last = {}, -1
        for merge in merges:
            left, right = (_bytes(part) for part in (merge.split(" ") if isinstance(merge, str) else merge))
            rank = vocab["".join(SPELLING[byte] for byte in left + right)]
            if rank <= last:
                return None
            ranks[left + right], parts_of[left + right], last = rank, (left, right), rank
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    ids = [*ranks.values(), *special.values()]
    whole = len(set(ids)) == len(ids) and 0 <= min(ids) <= max(ids) <= LARGEST_ID
    spelt = len(ranks) + sum(name in vocab for name in special) == len(vocab)  # no token that no merge makes
    if not whole or not spelt or any(last_parts(token, ranks) != parts for token, parts in parts_of.items()):
        return None
    return split, ranks


def _bytes(spelt):
    return bytes(BYTE_OF[character] for character in spelt)


def _steps(content):
    """The steps of how this tokenizer.json splits a text: a list of dicts, or None where it is no such list."""
    steps = content.get("pre_tokenizer")
    steps = [steps] if not isinstance(steps, dict) or steps.get("type") != "Sequence" else steps.get("pretokenizers")
    return steps if isinstance(steps, list) and steps and all(isinstance(step, dict) for step in steps) else None


def _splits_bytes(content):
    """Whether its words are the bytes of the text, with nothing put before them."""
    last = (_steps(content) or [{}])[-1]
    decoder = content.get("decoder")
    by_bytes = isinstance(decoder, dict) and decoder.get("type") == "ByteLevel"
    return by_bytes and last.get("type") == "ByteLevel" and not last.get("add_prefix_space", True)


def _split(content):
    """The name in SPLITS of how this tokenizer.json splits a text into words of bytes; None where it is another way."""
    if not _splits_bytes(content):
        return None
    *before, last = _steps(content)
    by_itself = last.get("use_regex", True)
    if not before and by_itself:
        return "GPT-2"
    if len(before) != 1 or by_itself or before[0].get("type") != "Split" or before[0].get("invert"):
        return None
    pattern, isolated = before[0].get("pattern"), before[0].get("behavior") == "Isolated"
    return next(
        (name for name, (known, _) in SPLITS.items() if isolated and known and pattern == {"Regex": known}), None
    )


def last_parts(token, ranks):
    """The two parts that byte-pair encoding by `ranks` joins last in making `token`; other parts where it does not."""
    parts, rank = [bytes([byte]) for byte in token], ranks[token]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, rank) for a, b in zip(parts, parts[1:], strict=False)]
        lowest = min(pairs)
        if lowest >= rank:
            break
        at = pairs.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return tuple(parts)


def same_tokenizer(one, other):
    """Whether two texts of a tokenizer.json give the same ids: they may differ in how they are written."""
    parsed, scores = [parse(text, "tokenizer.json") for text in (one, other)], []
    for content in parsed:
        for key in ("truncation", "padding", "post_processor"):  # no tokens that it adds are asked for here
            content.pop(key, None)
        vocab = content["model"].get("vocab")
        if content["model"].get("type") == "Unigram" and isinstance(vocab, list):
            # transformers rounds a score's last digit in saving it
            scores.append([score for _, score in vocab])
            content["model"]["vocab"] = [piece for piece, _ in vocab]
    return parsed[0] == parsed[1] and (len(scores) < 2 or np.allclose(*scores, rtol=1e-9))


# ----------------------------------------------------------------------------------------------
# writing


def tokenizer_of(codec):
    """The text of the tokenizer.json of any codec."""
    if codec.tokenizer:
        return codec.tokenizer
    return (
        tokenizer_of_characters(codec.stoi) if isinstance(codec, CharCodec) else tokenizer_of_encoding(codec._encoding)
    )


def tokenizer_of_characters(stoi):
    """A tokenizer.json that splits a text after every character, and looks each up in `stoi`."""
    split = {"type": "Split", "pattern": {"Regex": CHARACTER}, "behavior": "Isolated", "invert": False}
    model = {"type": "WordLevel", "vocab": stoi, "unk_token": ""}
    return _json({"added_tokens": [], "pre_tokenizer": split, "decoder": {"type": "Fuse"}, "model": model})


def tokenizer_of_encoding(encoding):
    """The tokenizer.json of a tiktoken.Encoding, whose ranks are its ids; UserError if its split is not known here."""
    family = encoding.name.partition("_")[0]
    if family not in SPLIT_OF_TIKTOKEN:
        raise UserError(f"how tiktoken's {encoding.name} splits a text cannot be written to a tokenizer.json")
    pattern, ranks = SPLITS[SPLIT_OF_TIKTOKEN[family]][0], encoding._mergeable_ranks

    def spell(token):
        return "".join(SPELLING[byte] for byte in token)

    tokens = sorted(ranks, key=ranks.get)
    parts_of = [last_parts(token, ranks) for token in tokens if len(token) > 1]
    merges = [[spell(part) for part in parts] for parts in parts_of if len(parts) == 2]
    common = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    special = sorted(encoding._special_tokens.items(), key=lambda item: item[1])
    added = [{"id": id, "content": name} | common for name, id in special]
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": pattern is None}
    split = by_bytes
    if pattern:
        by_pattern = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        split = {"type": "Sequence", "pretokenizers": [by_pattern, by_bytes]}
    vocab = {spell(token): ranks[token] for token in tokens} | dict(special)
    model = {"type": "BPE", "vocab": vocab, "merges": merges}
    if len(merges) < len(parts_of):  # a token that no merge makes, which tiktoken looks up as a whole word
        model["ignore_merges"] = True
    return _json({"added_tokens": added, "pre_tokenizer": split, "decoder": by_bytes, "model": model})


def _json(content):
    return json.dumps({"version": "1.0"} | content, ensure_ascii=False, indent=2) + "\n"
