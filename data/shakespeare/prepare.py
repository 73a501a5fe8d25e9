"""Tiny Shakespeare in GPT-2's byte-pair tokens, for finetuning.

usage: python data/shakespeare/prepare.py

Reads input.txt in this folder or in data/shakespeare_char, or downloads it (1.1 MB), and writes
train.bin and val.bin.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from configurator import configure
from data.text import data_folder, prepare_bpe, print_next
from data.tiny_shakespeare import shakespeare

configure(globals())
folder = data_folder("shakespeare")
prepare_bpe(folder, [shakespeare(folder)])
print_next("config/finetune_shakespeare.py", "--init_from=gpt2")
# train has 301,966 tokens
# val has 36,059 tokens
