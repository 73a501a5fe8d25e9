"""data/text_files.py: where a text is cut. What else is in it: test_text.py."""

import random
import string

import pytest
from prepare_scripts import SHAKESPEARE, needs_bpe, needs_shakespeare, tiktoken_gpt2

from data import text_files
from data.codecs import BPECodec
from data.text_files import pieces as cut_in_pieces


def encoded_in_pieces(texts):
    codec = BPECodec()
    pieces = list(cut_in_pieces(texts))
    return pieces, [i for piece in pieces for i in codec.encode_ordinary(piece).tolist()]


@needs_bpe
@pytest.mark.parametrize("seed", range(40))
def test_a_text_in_pieces_has_the_tokens_of_the_whole(monkeypatch, seed):
    monkeypatch.setattr(text_files, "PIECE", 64)
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
    monkeypatch.setattr(text_files, "PIECE", size)
    with open(SHAKESPEARE, encoding="utf-8") as f:
        text = f.read()
    pieces, tokens = encoded_in_pieces([text])
    assert len(pieces) > 5 and tokens == tiktoken_gpt2().encode_ordinary(text)


@needs_bpe
@pytest.mark.parametrize("text", [" " * 1_500_000 + "x", "中" * 1_000_000, "a b" + " " * 1_200_000 + "x"])
def test_a_text_without_a_place_to_cut_is_cut_all_the_same(text):
    pieces, tokens = encoded_in_pieces([text])  # tiktoken panics on a million blanks in one text
    assert max(map(len, pieces)) < 1 << 19 and BPECodec().decode(tokens) == text
