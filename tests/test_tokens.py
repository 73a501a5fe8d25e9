"""data/tokens.py: the safe reader of meta.pkl, and the codecs."""

import os
import pickle
import random
import string

import numpy as np
import pytest
import torch
from prepare_scripts import SHAKESPEARE, UNICODE, needs_bpe, needs_shakespeare, tiktoken_gpt2

from data import tokens as data_tokens
from data.tokens import BPECodec, bpe_pieces, codec_for, read_meta
from nanogpt.errors import UserError


# ----------------------------------------------------------------------------------------------
# meta.pkl

ABC = {"vocab_size": 3, "stoi": {"a": 0, "b": 1, "é": 2}, "itos": {0: "a", 1: "b", 2: "é"}}


class Runs:
    """Pickles as a call of os.system."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_is_read_in_every_pickle_protocol_and_may_have_other_plain_keys(tmp_path, protocol):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(ABC | {"words": ["x", {"y": [1, -(10**30)]}]}, protocol))
    assert read_meta(path) == ABC


def test_a_meta_with_a_vocabulary_size_alone_will_do_for_training(tmp_path):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": 61}))
    meta = read_meta(tmp_path / "meta.pkl")
    assert meta == {"vocab_size": 61}
    with pytest.raises(UserError, match="no characters"):
        codec_for(meta)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: ABC | {"more": [x]}, lambda x: {x: 1}])
def test_a_hostile_meta_does_not_run(tmp_path, protocol, wrap):
    path = tmp_path / "meta.pkl"
    path.write_bytes(pickle.dumps(wrap(Runs(tmp_path / "it_ran")), protocol))
    with pytest.raises(UserError, match="is not a meta.pkl") as error:
        read_meta(path)
    assert str(path) in str(error.value) and not (tmp_path / "it_ran").exists()


BROKEN = {
    "nothing": b"",
    "text": b"hello, this is text",
    "cut": pickle.dumps(ABC)[:-20],
    "a list": pickle.dumps([1, 2]),
    "bytes": pickle.dumps(b"abc"),
    "numpy's int": pickle.dumps(ABC | {"vocab_size": np.int64(3)}),
    "too large": pickle.dumps("x" * (1 << 23)),
    "a deep list": b"]" * 300_000 + b"a" * 299_999 + b".",
    "a deep key": b"}" + b")" + b"\x85" * 1_000_000 + b"K\x01s.",  # hashing it would overflow the stack
    "a memo index": b"\x80\x02}r\xff\xff\xff\x7f.",  # would take 32 GB
    "a long that is none": b"L" + b"9" * 5000 + b"L\n.",
    "no hashable key": b"}]K\x01s.",
    "no vocab_size": pickle.dumps({k: ABC[k] for k in ("stoi", "itos")}),
    "vocab_size 0": pickle.dumps(ABC | {"vocab_size": 0}),
    "vocab_size too large": pickle.dumps(ABC | {"vocab_size": 65537}),
    "vocab_size True": pickle.dumps(ABC | {"vocab_size": True}),
    "vocab_size a float": pickle.dumps(ABC | {"vocab_size": 3.0}),
    "id out of range": pickle.dumps(ABC | {"vocab_size": 2}),
    "tables that disagree": pickle.dumps(ABC | {"itos": {0: "b", 1: "a", 2: "é"}}),
    "a table that lacks one": pickle.dumps(ABC | {"itos": {0: "a", 1: "b"}}),
    "two characters of one id": pickle.dumps(ABC | {"stoi": {"a": 0, "b": 1, "é": 2, "c": 2}}),
    "no stoi": pickle.dumps({k: ABC[k] for k in ("vocab_size", "itos")}),
    "itos a list": pickle.dumps(ABC | {"itos": ["a", "b", "é"]}),
    "half a character": pickle.dumps({"vocab_size": 1, "stoi": {"\ud800": 0}, "itos": {0: "\ud800"}}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_meta_gets_one_line_with_its_name(tmp_path, content):
    path = tmp_path / "meta.pkl"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not a meta.pkl") as error:
        read_meta(path)
    assert str(path) in str(error.value)


# ----------------------------------------------------------------------------------------------
# codecs


def test_characters_go_to_ids_and_back_and_padding_is_not_known():
    codec = codec_for(ABC | {"vocab_size": 8})
    assert codec.encode("aéb") == [0, 2, 1] and codec.decode([0, 2, 1]) == "aéb"
    assert codec.vocab_size == 8 and [codec.known(i) for i in range(8)] == [True] * 3 + [False] * 5
    assert codec.piece(2) == "é".encode()


@pytest.mark.parametrize(
    "character, shown", [("ö", "'ö' (U+00F6)"), ("\n", "'\\n' (U+000A)"), ("😀", "U+1F600")]
)
def test_a_character_that_the_vocabulary_lacks_is_named(character, shown):
    with pytest.raises(UserError) as error:
        codec_for(ABC).encode("ab" + character)
    assert shown in str(error.value)


def test_a_codec_comes_back_from_a_checkpoint(tmp_path):
    torch.save({"meta": ABC}, tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert codec_for(saved["meta"]).encode("é") == [2]
    with pytest.raises(UserError, match="ckpt.pt"):
        codec_for({"vocab_size": 3, "stoi": {"a": 9}, "itos": {9: "a"}}, "ckpt.pt")


@needs_bpe
def test_byte_pairs_go_to_ids_and_back_and_padding_is_not_known():
    codec = codec_for(None)
    assert codec.encode("Hello world") == [15496, 995]  # GPT-2's own ids
    assert codec.encode("a<|endoftext|>") == [64, 50256]
    assert codec.encode_ordinary("a<|endoftext|>").tolist() == [64, 27, 91, 437, 1659, 5239, 91, 29]
    assert codec.decode(codec.encode(UNICODE)) == UNICODE
    assert b"".join(map(codec.piece, codec.encode(UNICODE))) == UNICODE.encode()
    assert codec.decode(codec.encode("😀")[:1]) == "\ufffd"
    assert codec.vocab_size == 50257
    assert [i for i in range(50304) if not codec.known(i)] == list(range(50257, 50304))


def encoded_in_pieces(texts):
    codec = BPECodec()
    pieces = list(bpe_pieces(texts))
    return pieces, [i for piece in pieces for i in codec.encode_ordinary(piece).tolist()]


@needs_bpe
@pytest.mark.parametrize("seed", range(40))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, seed):
    monkeypatch.setattr(data_tokens, "PIECE", 64)
    rng = random.Random(seed)
    # words and white space of every kind, none of them so long that a piece must end inside one
    odd = ["\t", "\r\n", "\xa0", "\u3000", "\x1c", "\x85", "\u2028", "\v", "\u200b"]
    spaces = [" ", " ", "\n", "\n\n", "   ", "\n  ", "  \n"]
    words = [
        "'s",
        "'ll",
        "don't",
        "e\u0301",
        "中文",
        "😀",
        "x²",
        "१२",
        "\ufeff",
        "--",
        "...",
        "<|endoftext|>",
    ]
    letters = string.ascii_letters + "019'."
    parts = []
    for _ in range(2000):
        parts.append(rng.choice(spaces + [rng.choice(odd), " " + rng.choice(odd)]) * rng.randint(1, 2))
        parts.append(rng.choice([rng.choice(words), "".join(rng.choices(letters, k=rng.randint(1, 8)))]))
    text = "".join(parts)
    cuts = sorted(rng.randint(0, len(text)) for _ in range(50))
    texts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=False)]
    pieces, tokens = encoded_in_pieces(texts)
    assert "".join(pieces) == text and len(pieces) > 50
    assert tokens == tiktoken_gpt2().encode_ordinary(text)


@needs_bpe
@needs_shakespeare
@pytest.mark.parametrize("size", [1000, 1 << 17])
def test_tiny_shakespeare_in_pieces_has_the_tokens_of_the_whole(monkeypatch, size):
    monkeypatch.setattr(data_tokens, "PIECE", size)
    with open(SHAKESPEARE, encoding="utf-8") as f:
        text = f.read()
    pieces, tokens = encoded_in_pieces([text])
    assert len(pieces) > 5 and tokens == tiktoken_gpt2().encode_ordinary(text)


@needs_bpe
@pytest.mark.parametrize("text", [" " * 1_500_000 + "x", "中" * 1_000_000, "a b" + " " * 1_200_000 + "x"])
def test_a_text_without_a_place_to_cut_is_cut_all_the_same(text):
    pieces, tokens = encoded_in_pieces([text])  # tiktoken panics on a million blanks in one text
    assert max(map(len, pieces)) < 1 << 19 and BPECodec().decode(tokens) == text
