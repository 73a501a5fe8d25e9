"""Text files in: which ones a folder has, and their characters, in small parts."""

import os
import sys

from nanogpt.errors import UserError
from nanogpt.text_file import decoded

READ = 1 << 17  # characters read at a time


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
