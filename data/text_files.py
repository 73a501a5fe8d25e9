"""Text files in: which ones a folder has, and their characters, in small parts; and where a text can be cut."""

import os
import re
import sys

from nanogpt.errors import UserError
from nanogpt.text_file import decoded

READ = 1 << 17  # characters read at a time
PIECE = 1 << 17  # characters encoded at a time
# Where a text can be cut and its parts encoded by themselves: before a blank or a line feed that a visible character
# follows. GPT-2's pattern starts a word there in any case, since it leaves the last character of a run of white space
# to what follows. And what stands before the cut splits as before, since the pattern takes white space at the end of a
# text whole. ".+" is greedy: this is the last such place.
BORDER = re.compile(r".+(?=[ \n]\S)", re.DOTALL)
LINE_END = re.compile(r".*\n", re.DOTALL)


def text_files(paths):
    """`paths`, each folder among them replaced by every .txt below it, in order of name. UserError if it has none."""
    return [file for path in paths for file in (files_below(path, ".txt") if os.path.isdir(path) else [path])]


def files_below(folder, *endings):
    """The files below `folder` whose names have one of the `endings`, in order of their paths. Links are followed.

    Hidden names and empty files are left out, and each file or folder is taken once, by whatever links it is found.
    Prints a line on what is left out. UserError where nothing is left."""
    found, left_out, seen = [], [], {os.path.realpath(folder)}

    def visit(place):
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if not entry.is_dir() and not entry.name.lower().endswith(endings):
                continue
            real = os.path.realpath(entry)
            has_content = entry.is_dir() or entry.is_file() and entry.stat().st_size > 0
            if entry.name.startswith(".") or real in seen or not has_content:
                left_out.append(os.path.relpath(entry, folder))
                continue
            seen.add(real)
            if entry.is_dir():
                visit(entry.path)
            else:
                found.append(entry.path)

    visit(folder)
    if left_out:
        print(f"{folder}: left out as hidden, empty or there twice: {len(left_out):,}, the first is {left_out[0]}")
    if not found:
        raise UserError(f"{folder}: there is no {' or '.join(endings)} file in this folder")
    return sorted(found)


def text_chunks(paths, start=0, stop=sys.maxsize):
    """The characters [start, stop) of the UTF-8 files `paths`, one after the other, in small texts.

    They are read as nanogpt/text_file.py says. Raises UserError for a file that is missing, empty or not UTF-8.
    """
    position = 0
    for path in paths:
        if not os.path.isfile(path):
            raise UserError(f"{path}: there is no such file, or it is a folder, a pipe or a device")
        begin = position
        with open(path, "rb") as f:
            for text in decoded(f, path, READ):
                wanted = text[max(0, start - position) : max(0, stop - position)]
                position += len(text)
                if wanted:
                    yield wanted
                if position >= stop:
                    return
        if position == begin:
            raise UserError(f"{path}: the file is empty")


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
            border = len(pending) >= PIECE and place.match(pending)
            if border or len(pending) >= 2 * PIECE:
                cut = border.end() if border else len(pending)
                yield pending[:cut]
                pending = pending[cut:]
    if pending:
        yield pending
