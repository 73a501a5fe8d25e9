"""Any text in GPT-2's byte-pair tokens, for finetuning or for training from scratch.

usage: python data/text_bpe/prepare.py FILE ... [--name=mytext] [--val_fraction=0.1]

Reads UTF-8 text files, one after the other (of a folder, every .txt below it; they may be larger
than memory), and writes train.bin and, from the end of the text, val.bin. Between two files comes
<|endoftext|>.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from configurator import configure
from data.text import data_folder, prepare_bpe, print_next, text_files
from nanogpt.errors import UserError, command

name = "text_bpe"  # the dataset's name: the folder under data/ that it is written to
val_fraction = 0.1  # the part of the text, at its end, that is kept for validation

files = []
configure(globals(), positional=files.append)
if not files:
    raise UserError(f"give the text: {command('data/text_bpe/prepare.py')} FILE ...")
prepare_bpe(data_folder(name), text_files(files), val_fraction)
print_next("config/finetune_shakespeare.py", f"--dataset={name}", "--init_from=gpt2", f"--out_dir=out-{name}")
