"""Text by one rule, for data, prompts, stdin and config files: UTF-8, universal newlines, no byte order mark.

So a text has the same characters whichever system it comes from: \\r\\n and \\r become \\n, as open() reads them.
"""

import codecs
import io
import sys

from nanogpt.errors import UserError

HEAD = 1 << 12  # bytes by which UTF-16 is recognised
UTF16 = "not UTF-8 text; it looks like UTF-16: save it as UTF-8"


def read_text(path, name=None):
    """The text of the file at `path`; UserError, which calls it `name`, where it cannot be read or is not UTF-8."""
    name = name or path
    try:
        with open(path, "rb") as f:
            return "".join(decoded(f, name))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # a ValueError: a path with a NUL in it
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def decoded(f, name, size=-1):
    """The text in the open binary file `f`, in pieces of `size` characters (-1: whole); UserError, which calls it
    `name`, where it is not UTF-8."""
    if looks_like_utf16(f.peek(HEAD)[:HEAD]):
        raise UserError(f"{name}: {UTF16}")
    text = io.TextIOWrapper(f, "utf-8-sig")
    try:
        yield from iter(lambda: text.read(size), "")
    except UnicodeDecodeError as error:
        end = f.tell() if f.seekable() else len(error.object)
        at = f"byte {end - len(error.object) + error.start:,}: {error.reason}"
        raise UserError(f"{name}: not UTF-8 text ({at})") from None


def stdin_lines():
    """The lines of stdin, to its end; a terminal shows "> " before each. UserError where it is closed or UTF-16."""
    if sys.stdin is None:
        raise UserError("stdin is closed, and the prompts are read from it")
    # bytes that are not UTF-8 become an unknown character
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace", newline=None)
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt)
        except EOFError:
            return
        if looks_like_utf16(line.lstrip("\ufffd").encode()):
            raise UserError(f"stdin: {UTF16}")
        yield line


def looks_like_utf16(data):
    """Whether `data` (bytes) begins with UTF-16's byte order mark, or a quarter of it or more are NULs."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    return data.startswith(marks) or (b"\0" in data and 4 * data.count(0) >= len(data))
