"""A text in pieces that are encoded one by one: where it can be cut."""

import re

# Where a text can be cut and its parts encoded by themselves: before a blank or a line feed that a
# visible character follows. GPT-2's pattern starts a piece there in any case, since it leaves the last
# character of a run of white space to what follows. And what stands before the cut splits as it would
# have, since the pattern takes white space at the end of a text whole.
BORDER = re.compile(r".+(?=[ \n]\S)", re.DOTALL)  # greedy, so this finds the last one
LINE_END = re.compile(r".*\n", re.DOTALL)
PIECE = 1 << 17  # characters


def pieces(texts, at_lines=False):
    """Cuts the concatenation of `texts` anew: the pieces' GPT-2 tokens, in a row, are those of the whole. `at_lines`:
    it cuts at line ends, for other tokens.

    A piece has about PIECE characters, and never over four times as many (tiktoken breaks down on a million blanks):
    where two PIECEs hold no such place, as no natural text does, it ends where it stands.
    """
    place, pending = LINE_END if at_lines else BORDER, ""
    for text in texts:
        for start in range(0, len(text), PIECE):
            pending += text[start : start + PIECE]
            if len(pending) < PIECE:
                continue
            border = place.match(pending)
            if border or len(pending) >= 2 * PIECE:
                cut = border.end() if border else len(pending)
                yield pending[:cut]
                pending = pending[cut:]
    if pending:
        yield pending
