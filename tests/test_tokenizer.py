"""data/tokenizer.py: a tokenizer trained, read and written. What is right is what Hugging Face's tokenizers computes."""

import datetime
import functools
import hashlib
import json
import random
import string
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
from conftest import ROOT, TINY, error_line, flags
from prepare_scripts import (
    SHAKESPEARE, UNICODE, error_after_progress, files_in, ids, needs_bpe, needs_shakespeare, prepare, tiktoken_gpt2,
    write_text,
)  # fmt: skip
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data import text as data_text
from data.documents import prepare_documents
from data.folder import locked
from data.text_files import pieces as cut_in_pieces
from data.streaming import stream_text
from data.codecs import BPECodec, CharCodec, TokenizerCodec
from data.text import pick_codec
from data.tokenizer import (
    check_vocab_size, codec_of_tokenizer, find_tokenizer, same_tokenizer, tokenizer_of, train_tokenizer
)  # fmt: skip
from nanogpt.errors import UserError

END = "<|endoftext|>"


def english(n, seed=0):
    """A text of `n` words, some more frequent than others."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(string.ascii_lowercase[:12], k=rng.randint(1, 7))) for _ in range(400)]
    return " ".join(words[int(rng.paretovariate(0.7)) % 400] + rng.choice(["", "", ",", ".\n", "'s"]) for _ in range(n))


def ugly(rng):
    """A short text of all that a tokenizer may trip over: planes, controls, blanks, digits, code, mixed scripts."""
    kinds = [
        lambda: chr(rng.randrange(0x20, 0x7F)), lambda: rng.choice("\t\n\r  \n\x0b\x85\xa0\u2028\u3000\u200b\ufeff"),
        lambda: rng.choice("0123456789"), lambda: rng.choice(["'s", "'LL", "'re", "Abc", "dEF", "e\u0301", END, "<s>"]),
        lambda: chr(rng.randrange(0xA0, 0xD800)), lambda: chr(rng.randrange(0xE000, 0x10FFFF)),
        lambda: chr(rng.randrange(0x20)), lambda: rng.choice(["中文", "नमस्ते", "שלום", "é", "👩‍👩‍👧", "²", "१२"]),
    ]  # fmt: skip
    return "".join(rng.choice(kinds)() for _ in range(rng.randint(1, 100)))


UGLY = [ugly(random.Random(seed)) for seed in range(1500)]
TEXT = english(6000)


@pytest.fixture(scope="module")
def own():
    """The text of a tokenizer.json of 600 tokens, trained here."""
    return train_tokenizer([TEXT], 600)


@functools.cache
def gpt2s_tokenizer():
    """The text of GPT-2's tokenizer.json, which takes a second to make."""
    return tokenizer_of(BPECodec())


def hugging_face(text):
    """tokenizers' own reading of that tokenizer.json, with special tokens in a text as plain text."""
    tokenizer = Tokenizer.from_str(text)
    tokenizer.encode_special_tokens = True
    return tokenizer


def ids_by(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


# ----------------------------------------------------------------------------------------------
# trained


def test_a_trained_tokenizer_has_the_size_that_was_asked_for_and_endoftext_last(own):
    tokenizer = hugging_face(own)
    assert tokenizer.get_vocab_size() == 600 and tokenizer.token_to_id(END) == 599
    codec = codec_of_tokenizer(own, "x")
    assert (codec.vocab_size, codec.eot, codec.end) == (600, 599, END)
    assert all(codec.known(i) for i in range(600)) and not codec.known(600) and not codec.known(-1)


def test_the_same_text_gives_the_same_tokenizer(own):
    assert train_tokenizer([TEXT], 600) == own
    program = f"from data.tokenizer import train_tokenizer; import sys; print(train_tokenizer([{TEXT!r}], 600), end='')"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
    assert done.stdout == own


def test_any_text_comes_back_byte_for_byte(own):
    codec = codec_of_tokenizer(own, "x")
    for text in UGLY:
        found = codec.encode_ordinary(text).tolist()
        assert codec.decode(found) == text and b"".join(map(codec.piece, found)) == text.encode()


def test_tiktokens_ids_are_those_of_tokenizers(own):
    codec, tokenizer = codec_of_tokenizer(own, "x"), hugging_face(own)
    assert isinstance(codec, BPECodec)
    for text in [*UGLY, TEXT]:
        assert codec.encode_ordinary(text).tolist() == ids_by(tokenizer, text)


@pytest.mark.slow
def test_tiktokens_ids_are_those_of_tokenizers_for_every_character(own):
    codec, tokenizer = codec_of_tokenizer(own, "x"), hugging_face(own)
    for c in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(c) != "Cs":
            text = f"a{c}a 1{c}1 {c}.{c} {c}{c}"
            assert codec.encode_ordinary(text).tolist() == ids_by(tokenizer, text), hex(ord(c))


def test_endoftext_in_a_corpus_is_plain_text_and_in_a_prompt_the_token(own):
    codec = codec_of_tokenizer(own, "x")
    assert 599 not in codec.encode_ordinary(f"a{END}b") and codec.decode(codec.encode_ordinary(f"a{END}b")) == f"a{END}b"
    assert codec.encode(f"a{END}b") == [*codec.encode("a"), 599, *codec.encode("b")]


@pytest.mark.parametrize("size", [256, 1, 0, -5, 1 << 30])
def test_a_vocabulary_size_that_cannot_be_is_one_line(size):
    with pytest.raises(UserError, match=f"--vocab_size={size}"):
        check_vocab_size(size)


def test_a_vocabulary_larger_than_the_text_gives_says_the_size_reached():
    with pytest.raises(UserError, match="no more than") as error:
        train_tokenizer(["abab abab"], 5000)
    reached = int(str(error.value).split("no more than ")[1].split()[0])
    assert 257 < reached < 265
    assert hugging_face(train_tokenizer(["abab abab"], reached)).get_vocab_size() == reached


def test_the_least_vocabulary_has_a_token_for_each_byte():
    codec = codec_of_tokenizer(train_tokenizer(["ab"], 257), "x")
    assert sorted(codec.piece(i) for i in range(256)) == [bytes([i]) for i in range(256)] and codec.eot == 256


def test_a_long_text_is_taken_evenly_and_this_is_said(tmp_path, monkeypatch, capsys):
    lines = [f"{i:07d} words of a line\n" for i in range(40_000)]
    path = write_text(tmp_path / "a.txt", "".join(lines))
    monkeypatch.setattr(data_text, "TRAIN_BYTES", 200_000)
    monkeypatch.setattr("data.text_files.PIECE", 5_000)
    n = 36_000 * 24
    taken = list(data_text._training_texts([str(path)], n, n))
    assert 150_000 < sum(map(len, taken)) <= 200_000
    numbers = [int(word) for text in taken for word in text.split() if len(word) == 7 and word.isdigit()]
    for tenth in range(10):  # of each tenth of the training part about as much, and of the last part of the text nothing
        assert 600 < sum(3600 * tenth <= number < 3600 * (tenth + 1) for number in numbers) < 1100
    assert max(numbers) < 36_000
    assert "200,000 of 864,000 bytes, taken evenly" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------
# which way a tokenizer.json is encoded


def edited(text, change):
    content = json.loads(text)
    change(content)
    return json.dumps(content)


def reversed_merges(content):
    content["model"]["merges"].reverse()


def another_pair(content):
    """A merge by other parts than the ids themselves would give: (a, bc) for abc, where ab is joined first."""
    content["model"]["vocab"] |= {"zx": 601, "xq": 602, "zxq": 603}
    content["model"]["merges"] += [["z", "x"], ["x", "q"], ["z", "xq"]]


@pytest.mark.parametrize("change", [
    reversed_merges, another_pair, lambda c: c.update(normalizer={"type": "NFC"}),
    lambda c: c["pre_tokenizer"].update(add_prefix_space=True), lambda c: c["pre_tokenizer"].update(use_regex=False),
    lambda c: c["added_tokens"].append(c["added_tokens"][0] | {"id": 600, "content": "words", "special": False}),
], ids=["merges in another order", "other parts", "a normalizer", "a blank in front", "no split", "a word added"])  # fmt: skip
def test_a_byte_level_bpe_that_tiktoken_would_encode_differently_is_encoded_by_tokenizers(own, change):
    text = edited(own, change)
    codec, tokenizer = codec_of_tokenizer(text, "x"), hugging_face(text)
    assert isinstance(codec, TokenizerCodec)
    for each in UGLY[:200]:
        assert codec.encode_ordinary(each).tolist() == ids_by(tokenizer, each)


# how cl100k splits a text, as tokenizers takes it
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def test_a_byte_level_bpe_of_another_split_is_encoded_by_tokenizers_and_its_bytes_are_known(own):
    split = {"type": "Split", "pattern": {"Regex": CL100K}, "behavior": "Isolated", "invert": False}
    by_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    text = edited(own, lambda c: c.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [split, by_bytes]}))
    codec, tokenizer = codec_of_tokenizer(text, "x"), hugging_face(text)
    assert isinstance(codec, TokenizerCodec) and codec.cuts_at_lines and codec.bytes_by_id
    for each in UGLY[:300]:
        found = codec.encode_ordinary(each).tolist()
        assert found == ids_by(tokenizer, each)
        assert b"".join(map(codec.piece, found)) == each.encode()


@needs_bpe
def test_gpt2s_tokenizer_json_has_gpt2s_ids_for_tokenizers():
    tokenizer, tiktokens = hugging_face(gpt2s_tokenizer()), tiktoken_gpt2()
    assert tokenizer.token_to_id(END) == tiktokens.eot_token == 50256
    for each in [*UGLY, TEXT]:
        assert ids_by(tokenizer, each) == tiktokens.encode_ordinary(each)


@needs_bpe
def test_gpt2s_own_tokenizer_json_is_gpt2s_codec():
    codec = codec_of_tokenizer(gpt2s_tokenizer(), "x")
    assert isinstance(codec, BPECodec) and codec.tokenizer is None and codec.vocab_size == 50257


@needs_bpe
@pytest.mark.parametrize("change", [
    lambda c: c.update(normalizer={"type": "Lowercase"}), lambda c: c["pre_tokenizer"].update(add_prefix_space=True),
    lambda c: c["added_tokens"].append(c["added_tokens"][0] | {"id": 50257, "content": "<|user|>"}),
    lambda c: c["model"]["merges"].pop(),
])  # fmt: skip
def test_what_is_made_of_gpt2s_tokens_is_not_gpt2s(change):
    text = edited(gpt2s_tokenizer(), change)
    codec, tokenizer = codec_of_tokenizer(text, "x"), hugging_face(text)
    assert codec.tokenizer == text
    for each in ("Hello WORLD<|user|>", *UGLY[:20]):
        assert codec.encode_ordinary(each).tolist() == ids_by(tokenizer, each)


def test_a_tokenizer_of_50257_tokens_is_not_taken_for_gpt2s():
    text = train_tokenizer([TEXT], 300)
    vocab = {f"w{i}": i for i in range(300, 50258)}
    other = edited(text, lambda c: c["model"]["vocab"].update(vocab))
    assert len(json.loads(other)["model"]["vocab"]) == 50257
    assert codec_of_tokenizer(other, "x").tokenizer == other


def test_characters_are_read_back_as_characters():
    stoi = {"a": 0, "é": 1, "\n": 2, "漢": 3}
    codec = CharCodec({"vocab_size": 4, "stoi": stoi, "itos": {}})
    again = codec_of_tokenizer(tokenizer_of(codec), "x")
    assert isinstance(again, CharCodec) and again.stoi == stoi


# ----------------------------------------------------------------------------------------------
# of other kinds


@functools.cache  # a Unigram is another one each time
def trained(kind):
    """A small tokenizer of that kind, trained by tokenizers: (its text, whether every text comes back)."""
    texts = [TEXT + " " + string.printable + "é漢字"] * 2
    if kind == "Unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFKC(), pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    if kind == "WordPiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    if kind == "BPE":
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"])
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


KINDS = {"Unigram": ("</s>", 1), "WordPiece": ("[SEP]", 3), "BPE": (None, None)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_another_kind_has_tokenizers_ids(kind):
    text = trained(kind)
    codec, tokenizer = codec_of_tokenizer(text, "x"), hugging_face(text)
    assert isinstance(codec, TokenizerCodec) and not codec.bytes_by_id
    assert (codec.end, codec.eot) == KINDS[kind] and codec.vocab_size == tokenizer.get_vocab_size()
    for each in [TEXT, *TEXT.split("\n")[:50]]:
        assert codec.encode_ordinary(each).tolist() == ids_by(tokenizer, each)
        assert codec.decode(ids_by(tokenizer, each)) == tokenizer.decode(ids_by(tokenizer, each), skip_special_tokens=False)


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_unknown_tokens_are_never_drawn_and_the_end_may_be(kind):
    codec, tokenizer = codec_of_tokenizer(trained(kind), "x"), hugging_face(trained(kind))
    names = ["<unk>", "[PAD]", "[UNK]", "[CLS]", "</s>", "[SEP]"]
    special = {name: tokenizer.token_to_id(name) for name in names if tokenizer.token_to_id(name) is not None}
    assert {name: codec.known(i) for name, i in special.items()} == {name: name == codec.end for name in special}
    assert sum(codec.known(i) for i in range(codec.vocab_size)) == codec.vocab_size - len(special) + (codec.eot is not None)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_characters_are_named_and_counted(kind):
    codec = codec_of_tokenizer(trained(kind), "x")
    text = "aab ж b жж ☃ ab"
    assert {c: n for c, n in codec.missing(text, codec.encode_ordinary(text)).items() if c != "▁"} == {"ж": 3, "☃": 1}
    assert not codec.missing("ab b", codec.encode_ordinary("ab b"))
    with pytest.raises(UserError, match=r"no tokens for 'ж' \(U\+0436\)"):
        codec.encode("aж")


def without_unknown(kind):
    """A tokenizer of that kind that has no id for what its vocabulary lacks: it drops that, or raises."""
    model = {"BPE": models.BPE, "bytes": models.BPE, "Unigram": models.Unigram, "WordPiece": models.WordPiece,
             "WordLevel": models.WordLevel}[kind]()  # fmt: skip
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    if kind == "bytes":
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    if kind in ("WordPiece", "WordLevel"):
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    tokenizer.train_from_iterator(["the cat and the hat, an ant\n"] * 9, tokenizer.model.get_trainer())
    return tokenizer.to_str()


def test_bpe_dropout_is_switched_off_and_the_file_stays_as_it_came(own):
    """Also where tiktoken encodes: tokenizers without dropout has the expected ids."""
    for plain in (own, trained("BPE")):
        text = edited(plain, lambda c: c["model"].update(dropout=0.5))
        codec, tokenizer = codec_of_tokenizer(text, "x"), hugging_face(plain)
        for _ in range(3):
            assert codec.encode_ordinary(TEXT).tolist() == ids_by(tokenizer, TEXT)
        assert tokenizer_of(codec) == text and same_tokenizer(text, plain)


def test_bpe_dropout_is_told(own, tmp_path, capsys):
    path = write_text(tmp_path / "dropout.json", edited(own, lambda c: c["model"].update(dropout=0.1)))
    pick_codec(str(path))
    assert "BPE dropout is switched off" in capsys.readouterr().out
    pick_codec(str(write_text(tmp_path / "plain.json", own)))
    assert capsys.readouterr().out == ""


def test_a_word_longer_than_wordpiece_takes_is_named():
    text = edited(trained("WordPiece"), lambda c: c["model"].update(max_input_chars_per_word=30))
    codec = codec_of_tokenizer(text, "x")
    assert not codec.missing("the cat " + "a" * 30, codec.encode_ordinary("the cat " + "a" * 30))
    assert codec.missing("the cat " + "a" * 31, codec.encode_ordinary("the cat " + "a" * 31)) == {"a" * 31: 1}
    with pytest.raises(UserError, match=r"no tokens for 'aaaaaaaaaaaaaaaaaaaa' \(31 characters\)"):
        codec.encode("the cat " + "a" * 31)


def test_a_byte_order_mark_before_a_tokenizer_json_is_read_over(own, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"\xef\xbb\xbf" + own.replace("\n", "\r\n").encode())
    assert find_tokenizer(str(tmp_path)).tokenizer == own


@pytest.mark.parametrize("kind", ["BPE", "bytes", "Unigram", "WordPiece", "WordLevel"])
def test_characters_that_would_be_dropped_are_named_and_counted(kind):
    codec = codec_of_tokenizer(without_unknown(kind), "x")
    known = "the cat and the hat,"
    assert not codec.missing(known, codec.encode_ordinary(known))
    text = "the 中 cat ü 中 and"
    missing = codec.missing(text, codec.encode_ordinary(text))
    assert missing["中"] == 2 and missing["ü"] == 1
    if kind != "WordLevel":  # whose words are no characters
        assert set(missing) == {"中", "ü"}


def test_a_character_of_which_one_byte_has_no_token_is_named():
    """ü is C3 BC: the vocabulary has the first byte, which é has too, and tokenizers by itself would drop the other."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(["a cat é\n"] * 9, tokenizer.model.get_trainer())
    assert len(ids_by(tokenizer, "ü")) == 1
    codec = codec_of_tokenizer(tokenizer.to_str(), "x")
    assert dict(codec.missing("é a cat", codec.encode_ordinary("é a cat"))) == {}
    assert dict(codec.missing("é a cüt", codec.encode_ordinary("é a cüt"))) == {"ü": 1}


@pytest.mark.parametrize("name", ["</s>", "<unk>"])
def test_the_name_of_a_special_token_in_a_corpus_is_plain_text_for_a_model_that_has_it_as_a_piece(name):
    text = trained("Unigram")
    codec, tokenizer = codec_of_tokenizer(text, "x"), hugging_face(text)
    special = tokenizer.token_to_id(name)
    ordinary = f"the {name} cat{name}"
    assert special in ids_by(tokenizer, ordinary)  # what tokenizers by itself makes of it
    ids = codec.encode_ordinary(ordinary)
    assert special not in ids and not codec.missing(ordinary, ids)
    assert codec.decode(ids).replace(" ", "") == ordinary.replace(" ", "")


def test_a_character_that_is_known_in_a_special_tokens_name_alone_is_lacking():
    scores = {"<unk>": 0.0, "</s>": -1.0, "a": -2.0, "/s>": -3.0}  # no "<" but in </s>, which a text cannot have
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    codec = codec_of_tokenizer(tokenizer.to_str(), "x")
    assert codec.missing("a</s>a", codec.encode_ordinary("a</s>a")) == {"<": 1}
    assert codec.encode("a</s>a") == [2, 1, 2]  # a prompt may have the token that ends a document


@pytest.mark.parametrize("kind", [*KINDS, "own"])
def test_a_tokenizer_that_transformers_has_saved_is_the_same(kind, own, tmp_path):
    text = own if kind == "own" else trained(kind)
    (tmp_path / "a").mkdir()
    write_text(tmp_path / "a" / "tokenizer.json", text)
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "a" / "tokenizer.json")).save_pretrained(tmp_path / "b")
    saved = (tmp_path / "b" / "tokenizer.json").read_text(encoding="utf-8")
    assert same_tokenizer(text, saved) and same_tokenizer(saved, text)
    assert not same_tokenizer(saved, train_tokenizer([TEXT], 500))
    other = edited(text, lambda c: c.update(normalizer={"type": "Lowercase"}))
    assert not same_tokenizer(other, saved)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stream_says_what_decoding_all_at_once_says(kind, own):
    for codec in (codec_of_tokenizer(trained(kind), "x"), codec_of_tokenizer(own, "x")):
        for text in TEXT.split("\n")[:40]:
            found = codec.encode_ordinary(text).tolist() or [5]
            parts = list(stream_text(found[:2], iter(found[2:]), codec))
            assert "".join(parts) == codec.decode(found) and len([p for p in parts if p]) > len(found) / 3


def test_a_character_of_several_tokens_is_streamed_once_it_is_whole():
    """Where decode() is tokenizers' own: a byte-level BPE with a blank put in front."""
    text = edited(train_tokenizer([TEXT], 300), lambda c: c["pre_tokenizer"].update(add_prefix_space=True))
    codec = codec_of_tokenizer(text, "x")
    found = codec.encode_ordinary("中é").tolist()
    parts = list(stream_text([], iter(found), codec))
    assert len(found) == 6 and [p for p in parts if p] == [" ", "中", "é"]


# ----------------------------------------------------------------------------------------------
# damaged


DAMAGED = {
    "nothing": "", "no JSON": "{", "a list": "[]", "no model": "{}", "a model that is none": '{"model": 3}', "deep": "[" * 99_999,
    "an unknown kind": '{"model": {"type": "Quantum", "vocab": {"a": 0}}}', "digits": '{"model": {"type": ' + "1" * 5000 + "}}",
    "added tokens that are none": '{"model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": [3]}',
    "a vocabulary that is a number": '{"model": {"type": "BPE", "vocab": 3, "merges": []}}',
    "a prefix longer than the tokens": '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0, "b": 1,'
    ' "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "#####"}}',
    "an empty vocabulary": '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    "a merge of none": '{"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
    "an id too large": '{"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "unk_token": "a", "vocab": {"a": 99999999}}}',
}  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED.keys())
def test_a_damaged_tokenizer_json_is_one_line_with_its_name(text, tmp_path):
    path = write_text(tmp_path / "tokenizer.json", text)
    with pytest.raises(UserError) as error:
        find_tokenizer(str(path))
    assert str(path) in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("content", [b"\xff\xfe{", b"\x00" * 9])
def test_a_tokenizer_json_that_is_no_text_is_one_line(content, tmp_path):
    (tmp_path / "t.json").write_bytes(content)
    with pytest.raises(UserError, match="t.json"):
        find_tokenizer(str(tmp_path / "t.json"))


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    for given in (str(tmp_path), "o200k_base"):
        with pytest.raises(UserError, match=f"--tokenizer={given}: takes a tokenizer.json, a folder that has one, or gpt2"):
            find_tokenizer(given)


@needs_bpe
def test_gpt2_is_a_name():
    assert find_tokenizer("gpt2").tokenizer is None


def test_a_missing_library_is_one_line(monkeypatch, own):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    codec_of_tokenizer(own, "x")  # needs tiktoken alone
    with pytest.raises(UserError, match="pip install tokenizers"):
        check_vocab_size(300)
    with pytest.raises(UserError, match="pip install tokenizers"):
        codec_of_tokenizer(edited(own, reversed_merges), "x")


# ----------------------------------------------------------------------------------------------
# by the scripts


def bpe_dataset(work, *arguments, name="mine", text=TEXT, code=0, **env):
    """Runs data/text_bpe/prepare.py on `text`; its Result."""
    path = write_text(work / "text.txt", text)
    result = prepare(work, "text_bpe", path, f"--name={name}", *arguments, **env)
    assert result.returncode == code, result.stderr
    return result


def test_prepare_trains_on_the_training_part_and_encodes_the_whole(work):
    result = bpe_dataset(work, "--vocab_size=500", TIKTOKEN_CACHE_DIR=str(work / "nothing"))
    assert f"{END} is id 499" in result.stdout and "config/train_text_bpe_cpu.py" in result.stdout
    folder, n = work / "data" / "mine", int(len(TEXT) * 0.9)
    assert sorted(files_in(folder)) == ["dataset.json", "tokenizer.json", "train.bin", "val.bin"]
    written = (folder / "tokenizer.json").read_text(encoding="utf-8")
    assert written == train_tokenizer([TEXT[:n]], 500)
    tokenizer = hugging_face(written)
    assert ids(work, "mine", "train").tolist() == ids_by(tokenizer, TEXT[:n])
    assert ids(work, "mine", "val").tolist() == ids_by(tokenizer, TEXT[n:])
    facts = json.loads((folder / "dataset.json").read_text())
    assert facts["bytes"] == {"train": n, "val": len(TEXT) - n} and facts["vocab_size"] == 500
    before = files_in(folder)
    bpe_dataset(work, "--vocab_size=500")
    assert files_in(folder) == before


def test_between_two_files_comes_endoftext_and_the_name_in_the_text_is_plain(work, tmp_path):
    one, two = write_text(tmp_path / "1.txt", f"one {END} one " * 300), write_text(tmp_path / "2.txt", "two two " * 600)
    result = prepare(work, "text_bpe", one, two, "--name=mine", "--vocab_size=260", "--val_fraction=0.2")
    assert result.returncode == 0, result.stderr
    train = ids(work, "mine", "train").tolist()
    assert train.count(259) == 1
    codec = find_tokenizer(str(work / "data" / "mine"))
    first = train[: train.index(259)]
    assert codec.decode(first) == f"one {END} one " * 300 and codec.decode(train[len(first) + 1 :]).startswith("two two")


@needs_bpe
@pytest.mark.slow
def test_preparing_again_in_other_tokens_leaves_nothing_of_the_ones_before(work):
    bpe_dataset(work, "--vocab_size=300")
    bpe_dataset(work)
    assert sorted(files_in(work / "data" / "mine")) == ["dataset.json", "train.bin", "val.bin"]
    assert prepare(work, "text_char", work / "text.txt", "--name=mine").returncode == 0
    assert sorted(files_in(work / "data" / "mine")) == ["dataset.json", "meta.pkl", "train.bin", "val.bin"]


@pytest.mark.parametrize("arguments, said", [
    (["--vocab_size=256"], "--vocab_size=256: must be at least 257"), (["--vocab_size=60000"], "no more than"),
    (["--vocab_size=300", "--tokenizer=x"], "not both"), (["--tokenizer=nowhere.json"], "--tokenizer=nowhere.json"),
    (["--tokenizer={work}/damaged.json"], "damaged.json"), (["--tokenizer={work}/lacking.json"], "'b' (U+0062)"),
    (["--tokenizer={work}/characters.json"], "data/text_char/prepare.py"),
], ids=["small", "large", "both", "nowhere", "damaged", "lacking", "characters"])  # fmt: skip
def test_a_wrong_vocabulary_or_tokenizer_is_one_line_and_writes_nothing(work, arguments, said):
    write_text(work / "damaged.json", trained("Unigram")[:-50])
    words = {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"}
    split = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    content = {"version": "1.0", "added_tokens": [], "pre_tokenizer": split, "model": words}
    write_text(work / "lacking.json", json.dumps(content))
    characters = CharCodec({"vocab_size": 1, "stoi": {"a": 0}, "itos": {0: "a"}})
    write_text(work / "characters.json", tokenizer_of(characters))
    arguments = [argument.format(work=work) for argument in arguments]
    result = bpe_dataset(work, *arguments, text="ab ba abab " * 300, code=2)
    assert said in error_after_progress(result)
    folder = work / "data" / "mine"
    assert not folder.exists() or not files_in(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_of_another_kind_makes_a_dataset_cut_at_line_ends(work, kind):
    path = write_text(work / f"{kind}.json", trained(kind))
    result = bpe_dataset(work, f"--tokenizer={path}", text=TEXT * 8)
    assert "cut at line ends" in result.stdout
    assert ("no token for the end" in result.stdout) == (kind == "BPE")
    assert "do not give this very text back" in result.stdout
    n = int(len(TEXT * 8) * 0.9)
    pieces = list(cut_in_pieces([(TEXT * 8)[:n]], at_lines=True))
    assert len(pieces) > 1 and all(piece.endswith("\n") for piece in pieces[:-1])
    tokenizer = hugging_face(trained(kind))
    assert ids(work, "mine", "train").tolist() == [i for piece in pieces for i in ids_by(tokenizer, piece)]
    assert (work / "data" / "mine" / "tokenizer.json").read_text(encoding="utf-8") == trained(kind)


@pytest.mark.parametrize("kind", ["own", "WordPiece"])
def test_a_run_is_sampled_resumed_and_exported_without_its_data_folder(run, own_project, tmp_path, kind):
    arguments = ["--vocab_size=500"]
    if kind != "own":
        arguments = [f"--tokenizer={write_text(tmp_path / 't.json', trained(kind))}"]
    run("data/text_bpe/prepare.py", write_text(tmp_path / "a.txt", TEXT), "--name=mine", *arguments, project=own_project)
    folder, out = own_project / "data" / "mine", tmp_path / "out"
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    settings = TINY | dict(dataset="mine", out_dir=out)
    result = run("train.py", *flags(settings), project=own_project)
    size = hugging_face(tokenizer).get_vocab_size()
    assert f"found vocab_size = {size} (inside data/mine/dataset.json)" in result.lines
    run("train.py", *flags(settings, max_iters=10, init_from="resume"), project=own_project)
    folder.rename(own_project / "data" / "elsewhere")
    options = [f"--out_dir={out}", "--device=cpu", "--dtype=float32", "--max_new_tokens=12", "--temperature=0", "--start=abc "]
    one = run("sample.py", *options, "--num_samples=1", project=own_project)
    two = run("sample.py", *options, "--num_samples=2", project=own_project)
    assert two.stdout.startswith(one.stdout) and len(one.stdout) > 22
    run("tools/export.py", f"--out_dir={out}", f"--to={tmp_path / 'hf'}", project=own_project)
    assert (tmp_path / "hf" / "tokenizer.json").read_text(encoding="utf-8") == tokenizer
    again = run("sample.py", *options, "--num_samples=1", f"--init_from={tmp_path / 'hf'}", project=own_project)
    assert again.stdout == one.stdout


def test_a_run_on_the_data_of_another_tokenizer_is_one_line(run, own_project, tmp_path):
    path = write_text(tmp_path / "a.txt", TEXT)
    for name, size in (("mine", 400), ("other", 401)):
        run("data/text_bpe/prepare.py", path, f"--name={name}", f"--vocab_size={size}", project=own_project)
    run("data/text_bpe/prepare.py", path, "--name=same", f"--tokenizer={own_project}/data/mine", project=own_project)
    settings = TINY | dict(dataset="mine", out_dir=tmp_path / "out")
    run("train.py", *flags(settings), project=own_project)
    for dataset in ("other", "synthetic"):
        for init_from, out in (("resume", "out"), (tmp_path / "out", "new")):
            more = flags(settings, dataset=dataset, init_from=init_from, out_dir=tmp_path / out, max_iters=9)
            line = error_line(run("train.py", *more, project=own_project, expect=2))
            assert "stand for other tokens" in line and str(tmp_path / "out") in line
    assert not (tmp_path / "new").exists()
    for init_from, out in ((tmp_path / "out", "new"), ("resume", "out")):
        more = flags(settings, dataset="same", init_from=init_from, out_dir=tmp_path / out, max_iters=9)
        run("train.py", *more, project=own_project)


def test_a_vocabulary_above_65536_trains_on_u32_bins(run, own_project, tmp_path):
    small = train_tokenizer([TEXT], 300)
    codec, content = codec_of_tokenizer(small, "x"), json.loads(small)
    content["model"]["vocab"] = {token: i + 70_000 for token, i in content["model"]["vocab"].items() if token != END}
    content["added_tokens"][0]["id"] = 80_000
    content["model"]["vocab"][END] = 80_000
    tokenizer = write_text(tmp_path / "t.json", json.dumps(content))
    path = write_text(tmp_path / "a.txt", TEXT)
    run("data/text_bpe/prepare.py", path, "--name=mine", f"--tokenizer={tokenizer}", project=own_project)
    folder, n = own_project / "data" / "mine", int(len(TEXT) * 0.9)
    found = np.fromfile(folder / "train.u32.bin", dtype="<u4")
    assert found.tolist() == [i + 70_000 for i in codec.encode_ordinary(TEXT[:n]).tolist()]
    settings = TINY | dict(dataset="mine", out_dir=tmp_path / "out")
    result = run("train.py", *flags(settings), project=own_project)
    assert "found vocab_size = 80001 (inside data/mine/dataset.json)" in result.lines
    assert "the model's vocab_size = 80064: rounded up to a multiple of 64 for speed" in result.lines
    sampled = run("sample.py", f"--out_dir={tmp_path / 'out'}", "--device=cpu", "--num_samples=1", project=own_project)
    assert sampled.stdout.endswith("-" * 15 + "\n")  # of known ids alone: another would be a KeyError
    wrong = np.append(found, np.array([80_064], dtype="<u4"))
    wrong.tofile(folder / "train.u32.bin")
    (folder / "dataset.json").unlink()
    line = error_line(run("train.py", *flags(settings, out_dir=tmp_path / "new"), project=own_project, expect=2))
    assert f"token {len(found):,} is 80064, but the vocabulary's ids end at 80063" in line


def jsonl(path, texts):
    path.parent.mkdir(exist_ok=True)
    write_text(path, "".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def documents(own, tmp_path, monkeypatch):
    """documents(text) -> the ids of both splits that are made of the folder tmp_path/source, in the tokens of that
    tokenizer.json, or of `own`."""
    pytest.importorskip("datasets")
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hf"))

    def documents(text=own):
        tokenizer = write_text(tmp_path / "t.json", text)
        prepare_documents(str(tmp_path / "data"), str(tmp_path / "source"), "", str(tokenizer))
        return [i for split in ("train", "val") for i in np.fromfile(tmp_path / "data" / f"{split}.bin", dtype="<u2")]

    return documents


def test_documents_without_a_text_are_left_out_and_counted_and_an_empty_text_is_a_document(documents, own, tmp_path, capsys):
    jsonl(tmp_path / "source" / "a.jsonl", ["the cat", None, "", "a hat", None])
    jsonl(tmp_path / "source" / ".hidden.jsonl", ["not this"])
    write_text(tmp_path / "source" / "empty.txt", "")
    (tmp_path / "source" / "circle").symlink_to(tmp_path / "source")
    codec = codec_of_tokenizer(own, "x")
    texts = "".join(codec.decode([i]) for i in documents()).split(END)
    assert sorted(texts) == ["", "", "a hat", "the cat"]  # the last one is what follows the last <|endoftext|>
    said = capsys.readouterr().out
    assert "5 documents, 2 of them without a text: these are left out\n" in said
    assert "left out as hidden, empty or there twice: 3, the first is .hidden.jsonl\n" in said


@pytest.mark.parametrize("kind", KINDS)
def test_documents_in_tokens_of_another_kind_have_tokenizers_ids(documents, tmp_path, kind):
    jsonl(tmp_path / "source" / "a.jsonl", ["the cat"] * 9)
    tokenizer, (_, eot) = hugging_face(trained(kind)), KINDS[kind]
    assert documents(trained(kind)) == [*ids_by(tokenizer, "the cat"), *([] if eot is None else [eot])] * 9


def test_documents_whose_texts_are_no_texts_are_one_line(documents, tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "source").mkdir()
    table = pyarrow.table({"text": pyarrow.array([None, datetime.date(2024, 5, 17), datetime.date(2024, 5, 18)])})
    pyarrow.parquet.write_table(table, tmp_path / "source" / "a.parquet")
    with pytest.raises(UserError, match=r"the column text has no texts but date32\[day\]$"):
        documents()
    assert not (tmp_path / "data").exists()


def test_a_second_preparation_of_documents_is_refused_before_it_reads_what_is_done(documents, tmp_path):
    jsonl(tmp_path / "source" / "a.jsonl", ["the cat"] * 9)
    (tmp_path / "data").mkdir()
    write_text(tmp_path / "data" / "unfinished.tmp", "not yet written")
    with locked(str(tmp_path / "data")), pytest.raises(UserError, match="another preparation is writing .*data$"):
        documents()


@pytest.mark.slow
def test_openwebtext_in_other_tokens_says_what_text_bpe_says(work, tmp_path):
    pytest.importorskip("datasets")
    path, folder = write_text(tmp_path / "t.json", trained("WordPiece")), work / "data" / "web"
    arguments = [f"--source={tmp_path / 'source'}", "--name=web", f"--tokenizer={path}"]
    documents = ["The cat and Ann, and a hat"] * 3000  # alike, whichever is the first in the shuffle
    jsonl(tmp_path / "source" / "a.jsonl", documents)
    result = prepare(work, "openwebtext", *arguments)
    assert result.returncode == 0, result.stderr
    assert "do not give this very text back" in result.stdout and "--dataset=web" in result.stdout
    # as a stop leaves it; then another tokenizer by the same name
    state = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    of = hashlib.sha256((documents[0] + trained("WordPiece")).encode()).hexdigest()
    state["of"] = [str(tmp_path / "source"), 3000, of]
    write_text(folder / "unfinished.tmp", json.dumps(state))
    write_text(path, trained("Unigram"))
    assert "unfinished run" in error_after_progress(prepare(work, "openwebtext", *arguments))
    # a character that it lacks
    jsonl(tmp_path / "source" / "a.jsonl", ["the cat ☃ and ☃"] * 300)
    (folder / "unfinished.tmp").unlink()
    before = files_in(folder)
    line = error_after_progress(prepare(work, "openwebtext", *arguments))
    assert "no tokens for '☃' (U+2603)" in line
    assert files_in(folder) == before


@needs_shakespeare
@pytest.mark.slow
def test_tiny_shakespeare_is_encoded_as_tokenizers_encodes_it():
    text = SHAKESPEARE.read_text(encoding="utf-8")
    trained_text = train_tokenizer([text], 4096)
    codec, tokenizer = codec_of_tokenizer(trained_text, "x"), hugging_face(trained_text)
    assert [i for p in cut_in_pieces([text]) for i in codec.encode_ordinary(p).tolist()] == ids_by(tokenizer, text)
    assert codec.decode(codec.encode_ordinary(UNICODE)) == UNICODE
