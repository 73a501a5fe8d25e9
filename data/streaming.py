"""Text from token ids as they come: whole characters only, up to a text that ends it."""

import codecs


def stream_text(prompt_ids, new_ids, codec, stop=""):
    """Yields the text of `prompt_ids`, and then, part by part, that of `new_ids` up to where the text `stop` begins.

    new_ids: an iterator; nothing is taken from it after `stop`. A token may end within a character: its bytes wait
    until the character is complete, and at the end what is left becomes a replacement character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    yield decoder.decode(b"".join(map(codec.piece, prompt_ids)))

    def texts():
        for id in new_ids:
            yield decoder.decode(codec.piece(id))
        yield decoder.decode(b"", final=True)

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
