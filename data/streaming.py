"""Text from token ids as they come: whole characters only, up to a text that ends it."""

import codecs


def stream_text(prompt_ids, new_ids, codec, stop=""):
    """Yields the text of `prompt_ids`, and then, part by part, that of `new_ids` up to where the text `stop` begins.

    new_ids: an iterator; nothing is taken from it after `stop`. A token may end within a character, whose bytes wait
    until it is complete."""
    stream = ByteStream(codec) if codec.bytes_by_id else TextStream(codec)
    yield stream.add(prompt_ids)

    def texts():
        for id in new_ids:
            yield stream.add([id])
        yield stream.end()

    yield from until(stop, texts())


def until(stop, texts):
    """Yields the concatenation of `texts`, part by part, up to the first place where the text `stop` begins.

    It holds back only what may be the beginning of `stop`, and takes nothing from `texts` after it. An empty `stop`
    ends nothing."""
    held = ""
    for text in texts:
        held += text
        at = held.find(stop) if stop else -1
        if at >= 0:
            yield held[:at]
            return
        may_begin = next((k for k in range(min(len(stop) - 1, len(held)), 0, -1) if held.endswith(stop[:k])), 0)
        yield held[: len(held) - may_begin]
        held = held[len(held) - may_begin :]
    yield held


class ByteStream:
    """Text from ids as they come, of a codec whose pieces are the text's bytes. A token may end within a character,
    which is returned once it is complete."""

    def __init__(self, codec):
        self._codec, self._decoder = codec, codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, ids):
        return self._decoder.decode(b"".join(map(self._codec.piece, ids)))

    def end(self):
        return self._decoder.decode(b"", final=True)


class TextStream:
    """Text from ids as they come, of a codec whose decode() decides on blanks between tokens.

    The ids since the last whole text are decoded behind those before them, which have been returned: what is new is
    the difference."""

    def __init__(self, codec):
        self._decode, self._before, self._new = codec.decode, [], []

    def add(self, ids):
        self._new += ids
        return "" if self._text().endswith("\ufffd") else self.end()

    def end(self):
        text, self._before, self._new = self._text(), self._new or self._before, []
        return text

    def _text(self):
        return self._decode(self._before + self._new)[len(self._decode(self._before)) :]
