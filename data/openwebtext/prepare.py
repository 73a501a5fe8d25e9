"""OpenWebText in GPT-2's byte-pair tokens, which config/train_gpt2.py trains on.

usage: python data/openwebtext/prepare.py [--source=FOLDER] [--tokenizer=PATH]

Fetches some 8 million documents (13 GB, and 40 GB more in Hugging Face's cache, see HF_HOME), and
writes train.bin (17 GB) and val.bin (9 MB), each document ended by <|endoftext|>. If it is stopped,
the same command goes on where it was. Needs: pip install datasets
"""

import os
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))

from configurator import configure
from data.documents import prepare_documents
from data.text import data_folder, print_next

# A copy in parquet: nanoGPT's "openwebtext" has a loading script, which `datasets` no longer runs.
source = "dylanebert/openwebtext"  # a hub dataset with a text column, or a folder of .jsonl, .parquet, .txt
tokenizer = ""  # a tokenizer.json, or a folder that has one; empty: GPT-2's
name = "openwebtext"  # the dataset's name: the folder under data/ that it is written to

configure(globals())
prepare_documents(data_folder(name), source, "", tokenizer)
print_next("config/train_gpt2.py", f"--dataset={name}", launcher="torchrun --standalone --nproc_per_node=8")
# train has 9,035,582,198 tokens
# val has 4,434,897 tokens
