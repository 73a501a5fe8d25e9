"""Text as it is generated: whole characters, and the end at a stop text."""

import random

import pytest

from data.streaming import stream_text, until


@pytest.mark.parametrize("stop", ["\n\n", "aab", "x", "the end", ""])
@pytest.mark.parametrize("size", [1, 2, 7, 100])
def test_a_text_ends_where_stop_begins_whatever_its_parts_are(stop, size):
    for text in ("aaab and x", "one\n\ntwo\n\n", "\n", "", "aaaab", "to the en, to the end, the end", "the en"):
        parts = [text[i : i + size] for i in range(0, len(text), size)]
        assert "".join(until(stop, parts)) == (text.partition(stop)[0] if stop else text)


def test_nothing_is_read_after_stop_and_text_without_its_beginning_comes_at_once():
    def parts():
        yield from ("ab", "c\n", "\nde")
        raise AssertionError("read on after the stop")

    assert list(until("\n\n", parts())) == ["ab", "c", ""]


class Bytes:
    """A codec whose ids are bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def test_a_character_comes_once_its_last_byte_is_there_and_a_half_one_is_replaced_at_the_end():
    ids = list("aé中😀".encode())
    assert [part for part in stream_text([], iter(ids), Bytes()) if part] == ["a", "é", "中", "😀"]
    assert "".join(stream_text(ids[:3], iter(ids[3:-1]), Bytes())) == "aé中\ufffd"


def test_a_stop_within_the_prompt_does_not_end_the_text():
    assert "".join(stream_text(list(b"ab"), iter(b"cdabe"), Bytes(), "ab")) == "abcd"


def test_a_text_in_parts_is_the_text_decoded_at_once():
    """Also where its bytes are no UTF-8."""
    rng = random.Random(0)
    for _ in range(2000):
        ids = [rng.choice(b"a\xc3\xa9\xe4\xb8\xad\xf0\x9f\x98\x80\xff") for _ in range(rng.randrange(12))]
        assert "".join(stream_text(list(b"ab"), iter(ids), Bytes())) == Bytes().decode([*b"ab", *ids])
