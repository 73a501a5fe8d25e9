"""data/tokens.py: the codecs, and where a text is cut."""

import random
import string

import pytest
import torch
from prepare_scripts import SHAKESPEARE, UNICODE, needs_bpe, needs_shakespeare, tiktoken_gpt2

from data import pieces as data_pieces
from data.pieces import bpe_pieces
from data.tokens import BPECodec
from data.vocabulary import codec_for
from nanogpt.errors import UserError

ABC = {"vocab_size": 3, "stoi": {"a": 0, "b": 1, "é": 2}, "itos": {0: "a", 1: "b", 2: "é"}}

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
    monkeypatch.setattr(data_pieces, "PIECE", 64)
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
    monkeypatch.setattr(data_pieces, "PIECE", size)
    with open(SHAKESPEARE, encoding="utf-8") as f:
        text = f.read()
    pieces, tokens = encoded_in_pieces([text])
    assert len(pieces) > 5 and tokens == tiktoken_gpt2().encode_ordinary(text)


@needs_bpe
@pytest.mark.parametrize("text", [" " * 1_500_000 + "x", "中" * 1_000_000, "a b" + " " * 1_200_000 + "x"])
def test_a_text_without_a_place_to_cut_is_cut_all_the_same(text):
    pieces, tokens = encoded_in_pieces([text])  # tiktoken panics on a million blanks in one text
    assert max(map(len, pieces)) < 1 << 19 and BPECodec().decode(tokens) == text
