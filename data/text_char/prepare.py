"""Any text, a character a token.

usage: python data/text_char/prepare.py [FILE ...] [--name=mytext]

Reads UTF-8 text files, one after the other (of a folder, every .txt below it), and writes train.bin
(the first 90 %), val.bin and meta.pkl. Without a FILE it takes a text that is on every machine: the
source of Python's standard library (its top-level modules, some 4.7 MB, without the characters that
are not ASCII).
"""

import os
import sys
import sysconfig
from pathlib import Path

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from configurator import configure
from data.text import data_folder, prepare_chars, print_next
from data.text_files import text_chunks, text_files
from nanogpt.errors import advise_on_memory

name = "text_char"  # the dataset's name: the folder under data/ that it is written to

files = []
configure(globals(), positional=files.append)
advise_on_memory("data/text_bpe/prepare.py takes a text that does not fit")
folder = data_folder(name)
if files:
    text = "".join(text_chunks(text_files(files)))
else:
    library = sorted(Path(sysconfig.get_path("stdlib")).glob("[!.]*.py"))
    text = "".join(path.read_text(encoding="ascii", errors="ignore") for path in library)
    print(f"the standard library of Python {sys.version.split()[0]}: {len(library)} files")
prepare_chars(folder, text)
own = [f"--dataset={name}", f"--out_dir=out-{name}"] if name != "text_char" else []
print_next("config/train_text_char.py", *own)
