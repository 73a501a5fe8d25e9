"""Tiny Shakespeare, a character a token.

usage: python data/shakespeare_char/prepare.py

Reads input.txt in this folder, or downloads it (1.1 MB), and writes train.bin, val.bin and meta.pkl.
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from configurator import configure
from data.text import data_folder, prepare_chars, print_next
from data.text_files import text_chunks
from data.tiny_shakespeare import shakespeare

configure(globals())
folder = data_folder("shakespeare_char")
prepare_chars(folder, "".join(text_chunks([shakespeare(folder)])))
print_next("config/train_shakespeare_char.py")
print_next("config/train_shakespeare_cpu.py", when="or, on a CPU")
# length of dataset in characters: 1,115,394
# vocab size: 65
# train has 1,003,854 tokens
# val has 111,540 tokens
