"""FineWeb's sample of 10 billion tokens in GPT-2's byte-pair tokens, which config/train_gpt2_fineweb.py trains on.

usage: python data/fineweb/prepare.py [--source=FOLDER] [--tokenizer=PATH]

Fetches some 15 million documents (28 GB, and more in Hugging Face's cache, see HF_HOME), and writes
train.bin (about 21 GB) and val.bin (about 10 MB), each document ended by <|endoftext|>. If it is
stopped, the same command goes on where it was. Needs: pip install datasets
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from configurator import configure
from data.documents import prepare_documents
from data.text import data_folder, print_next

source = "HuggingFaceFW/fineweb"  # a hub dataset with a text column, or a folder of .jsonl, .parquet, .txt
subset = "sample-10BT"  # a configuration of the hub dataset (sample-100BT, ...); empty: its default
tokenizer = ""  # a tokenizer.json, or a folder that has one; empty: GPT-2's
name = "fineweb"  # the dataset's name: the folder under data/ that it is written to

configure(globals())
prepare_documents(data_folder(name), source, subset, tokenizer)
print_next("config/train_gpt2_fineweb.py", f"--dataset={name}", launcher="torchrun --standalone --nproc_per_node=8")
