"""Text from token ids as they come: whole characters only, up to a text that ends it."""


def stream_text(prompt_ids, new_ids, codec, stop=""):
    """Yields the text of `prompt_ids`, and then, part by part, that of `new_ids` up to where the text `stop` begins.

    new_ids: an iterator; nothing is taken from it after `stop`. A token may end within a character, which is held back
    until it is complete."""
    yield codec.decode(prompt_ids)
    yield from until(stop, whole_texts(prompt_ids, new_ids, codec))


def whole_texts(ids, new_ids, codec):
    """Yields the text of `new_ids`, which come after `ids`, in parts that do not end within a character.

    What decode() puts between two tokens may depend on both: so the ids since the last part are decoded behind those
    of that part, and what this adds is the next one."""
    before, new, text = list(ids), [], ""
    for id in new_ids:
        new.append(id)
        text = codec.decode(before + new)[len(codec.decode(before)) :]
        if not text.endswith("\ufffd"):
            yield text
            before, new, text = new, [], ""
    yield text


def until(stop, texts):
    """Yields the concatenation of `texts`, part by part, up to the first place where the text `stop` begins.

    It holds back only what may be the beginning of `stop`, and takes nothing from `texts` after it. An empty `stop`
    ends nothing."""
    held = ""
    for text in texts:
        held += text
        if stop and stop in held:
            yield held.partition(stop)[0]
            return
        safe = next(k for k in range(len(held) + 1) if stop.startswith(held[k:]))
        yield held[:safe]
        held = held[safe:]
    yield held
