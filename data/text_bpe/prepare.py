"""Any text in byte-pair tokens: GPT-2's, a tokenizer trained on this text, or one that you bring.

usage: python data/text_bpe/prepare.py FILE ... [--vocab_size=4096 | --tokenizer=PATH] [--name=mytext]

Reads UTF-8 text files, one after the other (of a folder, every .txt below it; they may be larger
than memory), and writes train.bin and, from the end of the text, val.bin. Between two files comes
<|endoftext|>. --vocab_size and most of --tokenizer need: pip install tokenizers
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from configurator import configure
from data.text import data_folder, prepare_bpe, print_next
from data.text_files import text_files
from nanogpt.errors import UserError, command

name = "text_bpe"  # the dataset's name: the folder under data/ that it is written to
vocab_size = 0  # train a tokenizer of this many tokens on the text; 0: take those of --tokenizer
tokenizer = ""  # a tokenizer.json, or a folder that has one; empty: GPT-2's
val_fraction = 0.1  # the part of the text, at its end, that is kept for validation

files = []
configure(globals(), positional=files.append)
if not files:
    script = command("data/text_bpe/prepare.py")
    raise UserError(f"give the text: {script} FILE ..., or, for its own tokens: {script} FILE ... --vocab_size=4096")
if vocab_size and tokenizer:
    raise UserError("give --vocab_size, to train a tokenizer, or --tokenizer, to take one, and not both")
prepare_bpe(data_folder(name), text_files(files), val_fraction, tokenizer, vocab_size)
own = [f"--dataset={name}", f"--out_dir=out-{name}"]
if vocab_size or tokenizer:
    print_next("config/train_text_bpe_cpu.py", *own)
else:
    print_next("config/finetune_shakespeare.py", own[0], "--init_from=gpt2", own[1])
