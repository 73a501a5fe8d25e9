"""data/codecs.py: text to ids and back."""

import pytest
import torch
from prepare_scripts import UNICODE, needs_bpe

from data.codecs import BPECodec, CharCodec, first_prompt
from nanogpt.errors import UserError

ABC = {"vocab_size": 3, "stoi": {"a": 0, "b": 1, "é": 2}, "itos": {0: "a", 1: "b", 2: "é"}}


def test_characters_go_to_ids_and_back_and_padding_is_not_known():
    codec = CharCodec(ABC | {"vocab_size": 8})
    assert codec.encode("aéb") == [0, 2, 1] and codec.decode([0, 2, 1]) == "aéb"
    assert codec.vocab_size == 8 and [codec.known(i) for i in range(8)] == [True] * 3 + [False] * 5
    assert codec.piece(2) == "é".encode()


@pytest.mark.parametrize(
    "character, shown", [("ö", "'ö' (U+00F6)"), ("\n", "'\\n' (U+000A)"), ("😀", "U+1F600")]
)
def test_a_character_that_the_vocabulary_lacks_is_named(character, shown):
    with pytest.raises(UserError) as error:
        CharCodec(ABC).encode("ab" + character)
    assert shown in str(error.value)


def test_a_codec_comes_back_from_a_checkpoint(tmp_path):
    torch.save({"meta": ABC}, tmp_path / "ckpt.pt")
    saved = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    assert CharCodec(saved["meta"]).encode("é") == [2]
    with pytest.raises(UserError, match="ckpt.pt"):
        CharCodec({"vocab_size": 3, "stoi": {"a": 9}, "itos": {9: "a"}}, "ckpt.pt")


@needs_bpe
def test_byte_pairs_go_to_ids_and_back_and_padding_is_not_known():
    codec = BPECodec()
    assert codec.encode("Hello world") == [15496, 995]  # GPT-2's own ids
    assert codec.encode("a<|endoftext|>") == [64, 50256]
    assert codec.encode_ordinary("a<|endoftext|>").tolist() == [64, 27, 91, 437, 1659, 5239, 91, 29]
    assert codec.decode(codec.encode(UNICODE)) == UNICODE
    assert b"".join(map(codec.piece, codec.encode(UNICODE))) == UNICODE.encode()
    assert codec.decode(codec.encode("😀")[:1]) == "\ufffd"
    assert codec.vocab_size == 50257
    assert [i for i in range(50304) if not codec.known(i)] == list(range(50257, 50304))


def test_a_default_prompt_that_has_no_tokens_is_replaced_by_a_token_and_this_is_said():
    assert first_prompt(CharCodec(ABC), "ab") == ("ab", [])
    prompt, [remark] = first_prompt(CharCodec(ABC), "x")
    assert prompt == "a" and "'x'" in remark and "begin with 'a'" in remark
